"""Attention in float64 with a bound, element by element, on how far a kernel may be from it.

Let u be the unit roundoff of the inputs' dtype (2^-24, 2^-11, 2^-8) and u32 = 2^-24. A score is a dot product of D
terms in float32, scaled and with its bias added: it is off by e_s = (D + 8) u32 (scale sum |q k| + |bias| + |shift|).
A weight is off by the factor 1 + e_w with e_w = 2 e_s (numerator, denominator) + (Lk + 16) u32 (sums; exp2 and division
are good to 2 units). Rounding weights to the dtype before they meet v costs another factor of 1 + 2u, and storing the
result 1 + 2u: 2u and not u, because Triton's interpreter truncates to bfloat16 where GPUs round to nearest. float16
weights below the normal range are off by 2^-24 absolutely. A sum is bounded by the sum of its terms' magnitudes.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from tilewright.codegen.attention import AttentionBackwardSpec, AttentionSpec
from tilewright.runtime.ops.attention import reference, visible_pairs

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
U32 = 2.0**-24


def double(tensor: Tensor | None) -> Tensor | None:
    """The same values in float64, as a leaf that wants a gradient when it can have one."""
    if tensor is None or tensor.dtype == torch.bool:
        return tensor
    return tensor.detach().double().requires_grad_()


class Expected:
    """Output and gradients in float64, and their bounds, for the inputs of a kernel.

    pairs: bool, broadcastable to (B, Hq, Lq, Lk): which pairs are visible besides what mask and bias say.
    """

    def __init__(
        self,
        inputs: list[Tensor | None],
        grad: Tensor,
        scale: float,
        mask: str,
        normalizer: str,
        pairs: Tensor | None = None,
    ) -> None:
        exact = [double(tensor) for tensor in inputs]
        q, k, v, bias, shift = exact
        if pairs is not None and bias is None:
            bias = pairs
        elif pairs is not None:
            bias = bias & pairs if bias.dtype == torch.bool else torch.where(pairs, bias, float("-inf"))
        out = reference(q, k, v, bias, shift, scale=scale, mask=mask, normalizer=normalizer)
        wanted = [tensor for tensor in exact if tensor is not None and tensor.dtype != torch.bool]
        found = iter(torch.autograd.grad(out, wanted, grad.double(), allow_unused=True))
        grads = [next(found) if t is not None and t.dtype != torch.bool else None for t in exact]
        self.out = out.detach()
        self.dq, self.dk, self.dv, self.dbias, self.dshift = grads
        inner = [None if t is None else t.detach() for t in exact]
        self._bound(inner, grad, scale, mask, normalizer, inputs[0].dtype, pairs)

    def _bound(self, exact, grad, scale, mask, normalizer, dtype, pairs) -> None:
        q, k, v, bias, shift = exact
        group = q.shape[1] // k.shape[1]
        unit, tiny = UNIT[dtype], 2.0**-24 if dtype == torch.float16 else 0.0
        keys, values = (t.repeat_interleave(group, 1) for t in (k, v))
        scores = scale * q @ keys.mT
        size = scale * q.abs() @ keys.abs().mT
        visible = torch.ones((), dtype=torch.bool) if pairs is None else pairs
        if bias is not None and bias.dtype == torch.bool:
            visible = visible & bias
        elif bias is not None:
            scores = scores + bias
            size = size + bias.abs().masked_fill(bias.isinf(), 0.0)
        if mask:
            visible = visible & visible_pairs(q, k, mask)
        if shift is not None:
            scores = scores + shift
            size = size + shift.abs()
        if normalizer == "softmax":
            weights = scores.masked_fill(~visible, float("-inf")).softmax(-1).nan_to_num(0.0)
        else:
            weights = scores.sigmoid() * visible
        largest = size.amax() if size.numel() else torch.zeros(())
        error = 2 * (q.shape[3] + 8) * U32 * largest + (k.shape[2] + 16) * U32
        gradient = grad.double()
        length = q.shape[2] + k.shape[2] + q.shape[3] + v.shape[3]
        self.out_bound = (error + 4 * unit) * (weights @ values.abs()) + tiny * values.abs().sum(-2, keepdim=True)
        self.lse = scores.masked_fill(~visible, float("-inf")).logsumexp(-1)
        self.lse_bound = error + 4 * U32 * self.lse.abs().nan_to_num(0.0, posinf=0.0)
        # dz = w (dw - delta): delta comes from the rounded output, dz is rounded to the dtype before it meets q or k.
        dw = gradient.abs() @ values.abs().mT
        delta = (gradient.abs() * (weights @ values.abs())).sum(-1, keepdim=True)
        dz = weights * (dw + (delta if normalizer == "softmax" else 0.0))
        factor = 2 * error + 8 * unit + length * U32
        grouped = (k.shape[0], k.shape[1], group)
        self.dz_bound = factor * dz
        self.dq_bound = scale * (factor * dz @ keys.abs() + tiny * keys.abs().sum(-2, keepdim=True))
        dk = scale * (factor * dz.mT @ q.abs() + tiny * q.abs().sum(-2, keepdim=True))
        dv = factor * weights.mT @ gradient.abs() + tiny * gradient.abs().sum(-2, keepdim=True)
        self.dk_bound = dk.reshape(*grouped, *dk.shape[2:]).sum(2)
        self.dv_bound = dv.reshape(*grouped, *dv.shape[2:]).sum(2)


def weights_bound(dtype: str, keys: int) -> float:
    """What native weights add to a log-sum-exp. Of half types they are good to 7.5e-5, far below what storing them
    costs, and so is the factor by which a sum shrinks when its maximum grows: at most once every 64 keys."""
    return 0.0 if dtype == "float32" else 7.5e-5 * (1 + -(-keys // 64))


def close(name: str, found: Tensor, expected: Tensor, bound: Tensor) -> None:
    """Fail, saying by how much, unless every element is within its bound; infinities and NaN have to agree."""
    assert found.shape == expected.shape, f"{name}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    same = (found.double() == expected) | (found.double().isnan() & expected.isnan())
    error = (found.double() - expected).abs().masked_fill(same, 0.0)
    ok = error <= bound.expand_as(error) + 1e-30
    worst = (error / (bound.expand_as(error) + 1e-30)).max().item() if not bool(ok.all()) else 0.0
    assert bool(ok.all()), (
        f"{name}: {int((~ok).sum())} of {ok.numel()} elements beyond the bound, worst {worst:.3g} of it"
    )


def listed_pairs(
    counts: Tensor, indices: Tensor, blocks: tuple[int, int], visible: Tensor, lengths: tuple[int, int]
) -> Tensor:
    """Which pairs block lists show, (B or 1, Hq or 1, Lq, Lk), entry by entry. visible: what the mask says of a pair,
    broadcastable to that: it counts only where an entry is not full."""
    (block_q, block_k), (q_len, k_len) = blocks, lengths
    shape = torch.broadcast_shapes(counts.shape[:2], visible.shape[:-2])
    seen = torch.zeros(*shape, q_len, k_len, dtype=torch.bool)
    visible = visible.expand(*shape, q_len, k_len)
    for b, h, i in itertools.product(range(shape[0]), range(shape[1]), range(counts.shape[2])):
        row = (min(b, counts.shape[0] - 1), min(h, counts.shape[1] - 1), i)
        for entry in indices[row][: int(counts[row])].tolist():
            rows = slice(i * block_q, (i + 1) * block_q)
            columns = slice(entry // 2 * block_k, (entry // 2 + 1) * block_k)
            seen[b, h, rows, columns] = True if entry % 2 else visible[b, h, rows, columns]
    return seen


def make_inputs(
    spec: AttentionSpec | AttentionBackwardSpec,
    lengths: tuple[int, int],
    batch: int,
    key_heads: int,
    layout: str,
    seed: int,
) -> list[Tensor | None]:
    """q, k, v, bias, shift as the kernel of ``spec`` takes them. layout: how q, k, v lie in memory."""
    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[spec.dtype]
    q_len, k_len = lengths
    heads = key_heads * spec.group

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def tensor(count: int, length: int, dim: int) -> Tensor:
        if layout == "heads_last":
            return normal(batch, length, count, dim).transpose(1, 2).to(dtype)
        if layout == "transposed":
            return normal(batch, count, dim, length).transpose(2, 3).to(dtype)
        if layout == "strided":
            return normal(batch, count, 2 * length, 2 * dim).to(dtype)[:, :, ::2, ::2]
        return normal(batch, count, length, dim).to(dtype)

    q = tensor(heads, q_len, spec.head_dim)
    k, v = tensor(key_heads, k_len, spec.head_dim), tensor(key_heads, k_len, spec.value_dim)
    bias = shift = None
    if spec.bias != "none":
        shape = (batch, heads if seed % 2 else 1, q_len if spec.bias_rows else 1, k_len)
        if spec.bias == "bool":
            bias = torch.rand(*shape, generator=generator) > 0.3
        else:
            bias = normal(*shape).to(DTYPES[spec.bias])
    if spec.shift:
        shift = normal(1, heads, 1, 1)
    return [q, k, v, bias, shift]
