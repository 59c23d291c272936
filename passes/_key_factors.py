"""Low-rank factors of a key projection: what is measured on calibration inputs, and the fit.

All of it is about raw keys k = W_K x of one attention, the rows of all key heads in one vector, before bias, norm and
rotation. Factors are k ~ U B k with B (r, rows) and U (rows, r), so that what is cached is c = (B W_K) x. With a weight
G on the error and the keys' second moment S, the best of rank r are the leading eigenvectors u of G^1/2 S G^1/2:

    tr(G E S E^T) -> min,  E = I - U B        B = u^T G^1/2,  U = G^-1/2 u

(Eckart and Young 1936). ``none``: G = I and S = W W^T, the truncated SVD of W_K. ``activations``: S is the keys' second
moment. ``scores``: the error of score (i, j) is q_i . R_j E k_j with R_j the key's rotation and q_i turned already, and
softmax weighs it by p_ij, so that, taking the two moments as independent,

    G = sum_ij p_ij R_j^T q_i q_i^T R_j  for each head        S = sum_ij p_ij k_j k_j^T

Where no rotation stands between, softmax does not feel what all keys of a row have in common, and S is about each
row's weighted mean.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Weighting = Literal["scores", "activations", "none"]
ROWS = 1024  # queries of a sequence that are looked at
DRAWN = 24  # keys a head and sequence, drawn by the attention they get, whose rotation turns the queries back
SHRINK = 1e-3
"""Of the keys' second moment is as if inputs were white, for directions that the calibration inputs hardly showed."""
RIDGE = 1e-6  # of the mean diagonal, so that directions that calibration never showed stay defined


@dataclass
class KeyStatistics:
    """Sums over the calibration inputs of one site.

    heads, dim: of the keys. second: (rows, rows), the keys' weighted second moment; weight: (heads, dim, dim), the
    queries', turned back. tokens: how many were seen.
    """

    heads: int
    dim: int
    seed: int = 0
    tokens: int = 0
    second: Tensor = field(default_factory=lambda: torch.zeros(0))
    weight: Tensor = field(default_factory=lambda: torch.zeros(0))

    def __post_init__(self) -> None:
        rows = self.heads * self.dim
        self.second = torch.zeros(rows, rows, dtype=torch.float64)
        self.weight = torch.zeros(self.heads, self.dim, self.dim, dtype=torch.float64)
        self.generator = torch.Generator().manual_seed(self.seed)

    def shrunk(self, rows: Tensor) -> Tensor:
        """The keys' second moment, a little of it that of white inputs. rows: W_K, (heads * dim, C)."""
        white = rows @ rows.t()
        size, other = self.second.trace(), white.trace()
        return self.second + white * (SHRINK * size / other if other > 0 else 0.0)

    def see_keys(self, keys: Tensor, visible: Tensor | None) -> None:
        """Plain second moment. keys (B, L, rows); visible: bool (B, L), tokens that are no padding."""
        flat = keys.reshape(-1, keys.shape[-1]) if visible is None else keys[visible]
        self.second += _gram(flat, flat)
        self.tokens += len(flat)

    def see_scores(
        self,
        keys: Tensor,
        q: Tensor,
        weights: Tensor,
        turn_back: RotateBack | None,
        scales: Tensor | None,
        centred: bool,
    ) -> None:
        """One sequence. keys (L, rows), raw; q (Hq, N, D), rotated; weights (Hq, N, L): how much each score matters.

        turn_back: undoes the rotation of token j, or None. scales: (L, heads), what a norm multiplies raw keys by.
        centred: about each row's weighted mean.
        """
        self.tokens += keys.shape[0]
        per_head = q.shape[0] // self.heads
        received = weights.sum(1).reshape(self.heads, per_head, -1).sum(1)  # (heads, L)
        by_token = received.sum(0)
        if scales is not None:
            by_token = by_token * scales.square().mean(-1)
        self.second += _gram(keys * by_token[:, None], keys)
        if centred:
            for row_weights in weights:
                means = row_weights @ keys
                self.second -= _gram(means / row_weights.sum(-1, keepdim=True).clamp_min(1e-20), means)
        for head in range(self.heads):
            queries = q[head * per_head : (head + 1) * per_head]
            mine = weights[head * per_head : (head + 1) * per_head]
            if turn_back is None:
                mass = mine.sum(-1).reshape(-1, 1)
                flat = queries.reshape(-1, self.dim)
                self.weight[head] += _gram(flat * mass, flat)
                continue
            total = received[head].sum()
            if not total > 0:
                continue
            drawn = torch.multinomial(received[head].cpu(), DRAWN, replacement=True, generator=self.generator)
            for key in drawn.tolist():
                # Drawn in proportion to the attention, each stands for total / DRAWN of it.
                turned = turn_back(queries, key).reshape(-1, self.dim)
                share = (mine[:, :, key] * (total / (DRAWN * received[head, key]))).reshape(-1, 1)
                self.weight[head] += _gram(turned * share, turned)


class RotateBack:
    """Undoes the rotation that RoPE gave the key of a token: R_j^T q."""

    def __init__(self, cos: Tensor, sin: Tensor, layout: str) -> None:
        """cos, sin: (L, rotary), each angle at both places of its pair."""
        self.cos, self.sin, self.layout = cos, sin, layout

    def __call__(self, q: Tensor, token: int) -> Tensor:
        from ..runtime.ops import rope

        cos, sin = self.cos[token].to(q.dtype), self.sin[token].to(q.dtype)
        rotary = cos.shape[-1]
        turned = rope.reference(q[..., :rotary], cos, -sin, layout=self.layout)
        # cos carries a model's attention scaling, which stays as it is: R^T, not the inverse, is what scores see.
        return torch.cat((turned, q[..., rotary:]), -1) if rotary < q.shape[-1] else turned


def _gram(left: Tensor, right: Tensor) -> Tensor:
    return (left.float().t() @ right.float()).cpu().double()


@dataclass(frozen=True)
class Spectrum:
    """A decomposed site, of which factors of any rank can be taken.

    values: eigenvalues, falling, >= 0: what each rank more saves of the weighted error. vectors: (rows, rows).
    root, inverse: (heads, dim, dim), of the weight G and of its inverse.
    """

    heads: int
    dim: int
    values: Tensor
    vectors: Tensor
    root: Tensor
    inverse: Tensor

    def kept(self, rank: int) -> float:
        """Share of the weighted spectrum that ``rank`` keeps."""
        total = self.values.sum()
        return float(self.values[:rank].sum() / total) if total > 0 else 1.0

    def lost(self, rank: int) -> float:
        return float(self.values[rank:].sum())

    def rank_for(self, energy: float) -> int:
        """The least rank that keeps this share."""
        total = self.values.sum()
        if not total > 0:
            return 1
        shares = self.values.cumsum(0) / total
        return min(int((shares < energy - 1e-12).sum()) + 1, len(self.values))

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """B (r, rows) and U (heads, dim, r), float64. At full rank U B is the identity up to rounding."""
        leading = self.vectors[:, :rank].reshape(self.heads, self.dim, rank)
        down = torch.einsum("hdr,hde->rhe", leading, self.root).reshape(rank, -1)
        return down, self.inverse @ leading


def decompose(second: Tensor, weight: Tensor | None, heads: int, dim: int) -> Spectrum:
    """second: (heads * dim, heads * dim); weight: (heads, dim, dim), or None for the identity."""
    second = second.double()
    if weight is None:
        root = inverse = torch.eye(dim, dtype=torch.float64).expand(heads, dim, dim)
    else:
        values, vectors = torch.linalg.eigh(weight.double())
        floor = (values.mean(-1, keepdim=True) * RIDGE).clamp_min(torch.finfo(torch.float64).tiny)
        scale = values.clamp_min(floor).sqrt()
        root = (vectors * scale[:, None, :]) @ vectors.transpose(1, 2)
        inverse = (vectors / scale[:, None, :]) @ vectors.transpose(1, 2)
    whole = torch.block_diag(*root)
    product = whole @ second @ whole
    values, vectors = torch.linalg.eigh((product + product.t()) / 2)
    return Spectrum(heads, dim, values.flip(0).clamp_min(0), vectors.flip(1), root, inverse)


def each_head(second: Tensor, weight: Tensor | None, heads: int, dim: int) -> list[Spectrum]:
    """Every head decomposed by itself."""
    blocks = second.reshape(heads, dim, heads, dim)
    return [decompose(blocks[h, :, h, :], None if weight is None else weight[h : h + 1], 1, dim) for h in range(heads)]


def spread(spectra: list[list[float]], costs: list[int], steps: list[list[int]], budget: float) -> list[int]:
    """Ranks of all sites under one budget: greedily the step that saves most error for each byte.

    spectra: for each site the relative error left at each of its steps; costs: bytes of one rank; steps: the ranks
    that a site can take, rising. Returns the index of each site's step. The lowest steps are taken whatever the budget.
    """
    chosen = [0] * len(steps)
    spent = sum(cost * step[0] for cost, step in zip(costs, steps, strict=True))
    while True:
        best, gain = -1, 0.0
        for site, at in enumerate(chosen):
            for ahead in range(at + 1, len(steps[site])):
                price = costs[site] * (steps[site][ahead] - steps[site][at])
                if spent + price > budget:
                    break
                saved = (spectra[site][at] - spectra[site][ahead]) / price
                if saved > gain:
                    best, gain = site, saved
                break
        if best < 0:
            return chosen
        at = chosen[best]
        spent += costs[best] * (steps[best][at + 1] - steps[best][at])
        chosen[best] = at + 1
