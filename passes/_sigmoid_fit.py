"""Calibration of sigmoid attention: a bounded sample of an attention's rows, and the biases fitted to it.

For head h and row r with scores s_k over its n visible keys, the weights sigmoid(s_k + b) sum to about one when b is
about -log(sum_k exp(s_k)), which is -log(n) only where all scores are zero. The fits, coarse to fine:

    offset         b = -log(n) + c_h
    constant       b = c_h
    query_linear   b = -log(n) - q.w_h + c_h     w_h: ridge regression of log(sum_k exp(s_k)) - log(n) on q;
                                                 q.w_h is limited to the range it has on the sampled rows

each with c_h such that the head's rows sum to one on average.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..runtime.ops.attention import visible_pairs
from ..runtime.ops.visible_keys import MASKED_AT, count_visible

ROWS = 64
"""Rows kept of each sampled sequence."""
REGRESSION_ROWS = 1024
"""Rows of each sequence that the regression on queries sees; it has as many unknowns as a head has channels."""
SAMPLE_BYTES = 8 * 2**20
"""What an attention's sample may take, unless a single sequence takes more: then one is kept."""
SCORE_BYTES = 64 * 2**20
"""What the scores of one sequence's sampled rows may take; long sequences have fewer rows sampled."""
RIDGE = 1e-3
"""Ridge strength of the regression on queries, relative to the mean square of the query's channels."""
LIMIT = 30.0
"""Largest correction of a head's bias: beyond it a sigmoid is 0 or 1 in float32."""


@dataclass(frozen=True)
class Rows:
    """Some rows of one sequence: q (Hq, R, D), k (Hk, Lk, D), v (Hk, Lk, Dv), visible bool and bias float of shape
    (1 or Hq, 1 or R, Lk) or None, count (1 or Hq, R, 1) float32: visible keys of each row."""

    q: Tensor
    k: Tensor
    v: Tensor
    visible: Tensor | None
    bias: Tensor | None
    count: Tensor
    scale: float

    @property
    def bytes(self) -> int:
        tensors = (self.q, self.k, self.v, self.visible, self.bias, self.count)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def scores(self) -> Tensor:
        """(Hq, R, Lk) float32; ``-inf`` where the key is not visible."""
        group = self.q.shape[0] // self.k.shape[0]
        keys = self.k.float().repeat_interleave(group, dim=0)
        scores = self.q.float() @ keys.transpose(-1, -2) * self.scale
        if self.bias is not None:
            scores = scores + self.bias.float()
        if self.visible is not None:
            scores = scores.masked_fill(~self.visible, -torch.inf)
        return scores

    def values(self) -> Tensor:
        """(Hq, Lk, Dv) float32."""
        return self.v.float().repeat_interleave(self.q.shape[0] // self.v.shape[0], dim=0)


@dataclass
class Sample:
    """What calibration keeps of one attention: some rows of random sequences, and a query regression over all of them.

    Sequences are kept by random keys drawn from a generator seeded with the site's name: the ones with the smallest
    keys that fit :data:`SAMPLE_BYTES`. So the sample is uniform over all that was observed, and the same at every run.
    """

    name: str
    regress: bool = False
    kept: list[tuple[float, Rows]] = field(default_factory=list)
    seen: int = 0
    threshold: float = 1.0  # the smallest key that was dropped: larger ones are refused
    moments: Tensor | None = None  # (Hq, D + 2, D + 2) float64: sums of x x' for x = (q, 1, log sum exp - log n)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))

    @property
    def bytes(self) -> int:
        return sum(rows.bytes for _, rows in self.kept)

    def observe(self, values: Mapping[str, Any]) -> None:
        """Take rows of every sequence of a batch. ``values``: arguments of ``tilewright::attention`` by name."""
        q, k, v, bias, mask = (values[name] for name in ("q", "k", "v", "bias", "mask"))
        if q.numel() == 0 or k.numel() == 0:
            return
        batch, heads, q_len, _ = q.shape
        k_len = k.shape[2]
        visible = visible_pairs(q, k, mask)
        if bias is not None:
            bias = _four(bias).expand(-1, -1, -1, k_len)
            if bias.dtype == torch.bool:
                visible = bias if visible is None else visible & bias
                bias = None
        visible = None if visible is None else _four(visible)
        count = count_visible(q, k, values["bias"], mask=mask).float()
        limit = max(1, SCORE_BYTES // (4 * heads * k_len))
        for entry in range(batch):
            self.seen += 1
            # Both draws for every sequence, so that one that is refused does not change what follows.
            key = float(torch.rand((), generator=self.generator))
            order = torch.randperm(q_len, generator=self.generator)
            chosen = order[_real_rows(visible, bias, count, entry, q_len, k_len).cpu()[order]].to(q.device)
            if len(chosen) == 0:
                continue

            def take(rows: Tensor, entry: int = entry) -> Rows:
                return Rows(
                    q[entry][:, rows].clone(),
                    k[entry].clone(),
                    v[entry].clone(),
                    _pick(visible, entry, rows),
                    _pick(bias, entry, rows),
                    _rows_of(count, entry, rows).expand(-1, len(rows), -1),
                    values["scale"],
                )

            if self.regress:
                self._add_moments(take(chosen[: min(limit, REGRESSION_ROWS)]))
            if key < self.threshold:
                self._keep(key, take(chosen[: min(limit, ROWS)]))

    def _keep(self, key: float, rows: Rows) -> None:
        self.kept = sorted([*self.kept, (key, rows)], key=lambda item: item[0])
        while len(self.kept) > 1 and self.bytes > SAMPLE_BYTES:
            self.threshold = self.kept.pop()[0]

    def _add_moments(self, rows: Rows) -> None:
        target = rows.scores().double().logsumexp(-1, keepdim=True) - rows.count.double().log()
        usable = (rows.count > 0) & target.isfinite()
        x = torch.cat([rows.q.double(), torch.ones_like(target), target.nan_to_num(0.0, 0.0, 0.0)], -1) * usable
        products = (x.transpose(-1, -2) @ x).cpu()
        self.moments = products if self.moments is None else self.moments + products


def _four(t: Tensor) -> Tensor:
    return t.reshape((1,) * (4 - t.dim()) + tuple(t.shape))


def _real_rows(
    visible: Tensor | None, bias: Tensor | None, count: Tensor, entry: int, q_len: int, k_len: int
) -> Tensor:
    """(q_len,) bool: rows that see a key and are no padding.

    A padded query is not marked as such. In self-attention (as many keys as queries) it is one that does not see its
    own position; where that leaves nothing (a mask that hides every own position) all rows count.
    """
    seeing = (_entry(count, entry) > 0).any(0).squeeze(-1).expand(q_len)
    if q_len != k_len:
        return seeing
    own = torch.ones(q_len, dtype=torch.bool, device=count.device)
    if visible is not None:
        own = own & _entry(visible, entry).expand(-1, q_len, k_len).diagonal(dim1=-2, dim2=-1).any(0)
    if bias is not None:
        own = own & (_entry(bias, entry).expand(-1, q_len, k_len).diagonal(dim1=-2, dim2=-1) > MASKED_AT).any(0)
    real = seeing & own
    return real if bool(real.any()) else seeing


def _entry(t: Tensor, entry: int) -> Tensor:
    return t[entry if t.shape[0] > 1 else 0]


def _pick(t: Tensor | None, entry: int, rows: Tensor) -> Tensor | None:
    return None if t is None else _rows_of(t, entry, rows)


def _rows_of(t: Tensor, entry: int, rows: Tensor) -> Tensor:
    one = _entry(t, entry)
    return (one[:, rows] if one.shape[1] > 1 else one).clone()


@dataclass(frozen=True)
class Fit:
    """A fitted bias. head: c, (Hq,) float32. query: w, (Hq, D) float32, or None; query_range: least and greatest q.w of
    the sampled rows, (2, Hq) float32: queries unlike all of them must not extrapolate.

    row_sum, rel_l2: mean over sampled rows of the sum of weights, and relative L2 error of the sampled outputs against
    softmax attention's; row_sum_std: standard deviation of the sums.
    """

    form: str
    head: Tensor
    query: Tensor | None
    query_range: Tensor | None
    row_sum: float
    row_sum_std: float
    rel_l2: float


def fit_biases(sample: Sample) -> list[Fit]:
    """The uncalibrated bias (form ``-log_n``), then ``query_linear`` when the sample has its regression, else
    ``offset`` and, where rows see different numbers of keys, ``constant``. Empty when no sampled row sees a key.
    """
    blocks = [_Block(rows) for _, rows in sample.kept]
    if not blocks:
        return []
    zero = torch.zeros(blocks[0].scores.shape[0], dtype=torch.float64, device=blocks[0].scores.device)
    fits = [_measure("-log_n", blocks, [b.log_n for b in blocks], zero)]
    lengths = torch.cat([b.log_n[b.rows.count > 0] for b in blocks])
    forms = ["offset", "constant"] if bool((lengths != lengths[0]).any()) else ["offset"]
    for form in forms if sample.moments is None else ["query_linear"]:
        query = span = None
        bases = [b.log_n if form != "constant" else torch.zeros_like(b.log_n) for b in blocks]
        if sample.moments is not None:
            query = _regress(sample.moments).to(zero.device)
            linear = [b.rows.q.double() @ query[:, :, None] for b in blocks]
            span = torch.stack([torch.cat(linear, 1).amin((1, 2)), torch.cat(linear, 1).amax((1, 2))]).float()
            bases = [base + term for base, term in zip(bases, linear, strict=True)]
        # Scores are shifted by -base; c is what is left.
        head = solve_offset([b.scores - base.float() for b, base in zip(blocks, bases, strict=True)], zero)
        fits.append(_measure(form, blocks, [base - head[:, None, None] for base in bases], head, query, span))
    return fits


class _Block:
    """Rows of one sequence with their scores."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.scores = rows.scores()
        self.log_n = rows.count.clamp_min(1).double().log()
        self.usable = (rows.count > 0).expand(*self.scores.shape[:2], 1)


def solve_offset(scores: list[Tensor], zero: Tensor) -> Tensor:
    """c (Hq,) with the mean over rows of ``sum_k sigmoid(scores + c)`` equal to one, for each head.

    scores: tensors (Hq, R, Lk) float32, ``-inf`` where hidden; rows that see nothing do not count. Newton steps on the
    logarithm of the mean, which is nearly linear in c, kept inside a bracket; c is limited to +-:data:`LIMIT`. The mean
    is one to 1e-5, which leaves room for the rounding of c in float32.
    """
    rows = sum((s.amax(-1) > -torch.inf).sum(-1) for s in scores).clamp_min(1)  # type: ignore[union-attr]
    low, high = zero - LIMIT, zero + LIMIT
    c = zero.clone()
    for _ in range(60):
        total, slope = torch.zeros_like(zero), torch.zeros_like(zero)
        for s in scores:
            weights = torch.sigmoid(s + c.float()[:, None, None])
            total += weights.sum((-1, -2), dtype=torch.float64)
            slope += (weights - weights * weights).sum((-1, -2), dtype=torch.float64)
        mean = total / rows
        if bool(((mean - 1).abs() < 1e-5).all()):
            break
        low, high = torch.where(mean < 1, c, low), torch.where(mean < 1, high, c)
        step = c - mean.log() * total / slope
        c = torch.where((step > low) & (step < high), step, (low + high) / 2)
    return c


def _regress(moments: Tensor) -> Tensor:
    """w (Hq, D) from the sums of x x', x = (q, 1, target). The intercept is dropped: the head's offset replaces it."""
    size = moments.shape[-1] - 1
    gram, right = moments[:, :size, :size].clone(), moments[:, :size, size]
    power = gram.diagonal(dim1=-2, dim2=-1)[:, : size - 1].mean(-1)
    ridge = torch.full((size,), RIDGE, dtype=gram.dtype)
    ridge[-1] = 0.0
    gram += torch.diag_embed(ridge * power[:, None])
    return torch.linalg.lstsq(gram, right[:, :, None]).solution[:, :-1, 0]


def _measure(
    form: str,
    blocks: list[_Block],
    bases: list[Tensor],
    head: Tensor,
    query: Tensor | None = None,
    span: Tensor | None = None,
) -> Fit:
    sums, wrong, size = [], 0.0, 0.0
    for block, base in zip(blocks, bases, strict=True):
        weights = torch.sigmoid(block.scores - base.float())
        values = block.rows.values()
        usable = block.usable
        expected = torch.where(usable, torch.softmax(block.scores, -1), 0.0) @ values
        wrong += float(((weights @ values - expected) * usable).double().square().sum())
        size += float(expected.double().square().sum())
        sums.append(weights.double().sum(-1, keepdim=True)[usable])
    total = torch.cat(sums)
    return Fit(
        form,
        head.float(),
        None if query is None else query.float(),
        span,
        float(total.mean()) if len(total) else 0.0,
        float(total.std(correction=0)) if len(total) else 0.0,
        (wrong / size) ** 0.5 if size else 0.0,
    )
