"""``tilewright::attention``: softmax or sigmoid attention with symbolic masks, bias and grouped heads.

    softmax   out = softmax_k(scale * q.k + bias) v                 over the visible keys
    sigmoid   out = sum_k sigmoid(scale * q.k + bias + shift) v     over the visible keys

A pair (query, key) is visible when ``mask`` (a symbolic expression, codegen/symbols.py) and a boolean ``bias`` say so.
Edge cases follow torch's scaled_dot_product_attention: a query that sees no key, or only keys at ``-inf``, gives zeros.
Sigmoid attention: "Theory, Analysis, and Best Practices for Sigmoid Self-Attention", Ramapuram et al. 2024, section 2.
"""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ...codegen import symbols
from ...codegen.attention import AttentionSpec
from ..errors import BadArgument
from . import attention_kernel
from .registry import Tolerance, canonical

NORMALIZERS = ("softmax", "sigmoid")
_CAUSAL = symbols.causal()
_CAUSAL_END = symbols.causal(end_aligned=True)

# With u the unit roundoff of the dtype (2^-24, 2^-11, 2^-8), inputs of order one and weights that sum to about one:
# storing the output costs u |out|, and rounding the weights to the dtype before they meet v (as flash kernels and
# torch's do) costs u max|v|, where max|v| is about 4 for normal values: rtol u, atol 4u, doubled for the rounding of
# intermediate results. float32 rounds inside the dot products instead: a score is off by at most D u |q||k| scale,
# about 64 * 5 u for D = 64, which is the weights' relative error.
TOLERANCE = {
    torch.float64: Tolerance(atol=1e-12, rtol=1e-12),
    torch.float32: Tolerance(atol=2e-5, rtol=2e-5),
    torch.float16: Tolerance(atol=4e-3, rtol=1e-3),
    torch.bfloat16: Tolerance(atol=3.2e-2, rtol=8e-3),
}


def visible_pairs(q: Tensor, k: Tensor, mask: str, table: Tensor | None = None) -> Tensor | None:
    """The mask as a bool tensor, broadcastable to (B, Hq, Lq, Lk) and no larger than it has to be; None when empty.

    table: int32 (N,), what the mask looks up.
    """
    expression = symbols.parse_mask(mask)
    if expression == sympy.true:
        return None
    batch, heads, q_len, k_len = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    device = q.device
    values: dict[str, Any] = {
        "q_idx": torch.arange(q_len, device=device)[:, None],
        "k_idx": torch.arange(k_len, device=device)[None, :],
        "q_len": q_len,
        "k_len": k_len,
    }
    if symbols.BATCH in expression.free_symbols:
        values["batch"] = torch.arange(batch, device=device)[:, None, None, None]
    if symbols.HEAD in expression.free_symbols:
        values["head"] = torch.arange(heads, device=device)[None, :, None, None]
    if table is not None:
        values["table"] = table
    visible = symbols.evaluate(expression, values)
    return visible.expand(*visible.shape[:-2], q_len, k_len)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    scale: float,
    mask: str = "",
    normalizer: str = "softmax",
) -> Tensor:
    """Attention by its definition, computed in float32 for half types and in the inputs' dtype otherwise.

    q (B, Hq, Lq, D), k (B, Hk, Lk, D), v (B, Hk, Lk, Dv) with Hq a multiple of Hk; bias broadcastable to
    (B, Hq, Lq, Lk), float (added) or bool (True is visible); shift broadcastable to (B, Hq, Lq, 1), sigmoid only.
    Returns (B, Hq, Lq, Dv) in q's dtype.
    """
    check_arguments(q, k, v, bias, shift, mask, normalizer)
    return attend(q, k, v, bias, shift, visible_pairs(q, k, mask), scale, normalizer)[0]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    visible: Tensor | None,
    scale: float,
    normalizer: str,
) -> tuple[Tensor, Tensor]:
    """out (B, Hq, Lq, Dv) in q's dtype by the definition, and the rows' log-sum-exp (B, Hq, Lq), float32 or float64.

    visible: bool, broadcastable to (B, Hq, Lq, Lk). A row that sees nothing gives zeros and ``-inf``.
    """
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1] if k.shape[1] else 1
    keys = k.to(compute).repeat_interleave(group, dim=1)
    values = v.to(compute).repeat_interleave(group, dim=1)
    scores = torch.matmul(q.to(compute), keys.transpose(-2, -1)) * scale
    if bias is not None and bias.dtype == torch.bool:
        visible = bias if visible is None else visible & bias
    elif bias is not None:
        scores = scores + bias.to(compute)
    if normalizer == "sigmoid":
        if shift is not None:
            scores = scores + shift.to(compute)
        weights = torch.sigmoid(scores)
        if visible is not None:
            weights = weights.masked_fill(~visible, 0.0)
        lse = scores.new_empty((*scores.shape[:-1],)).fill_(-math.inf)
    else:
        if visible is not None:
            scores = scores.masked_fill(~visible, float("-inf"))
        weights, lse = _safe_softmax(scores)
    return torch.matmul(weights, values).to(q.dtype), lse


def _safe_softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last dim and its log-sum-exp; a row of ``-inf`` gives zeros and ``-inf``, with zero gradient."""
    if scores.shape[-1] == 0:
        return scores, scores.new_full(scores.shape[:-1], -math.inf)
    largest = scores.detach().amax(-1, keepdim=True)
    largest = largest.masked_fill(largest == float("-inf"), 0.0)
    weights = torch.exp(scores - largest)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    return weights / total, (largest + total.log()).masked_fill(empty, -math.inf).squeeze(-1)


def check_arguments(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, shift: Tensor | None, mask: str, normalizer: str
) -> None:
    """Raise :class:`~tilewright.runtime.errors.BadArgument` for a call that has no meaning."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise BadArgument(f"attention: {name} has {tensor.dim()} dimensions, but needs (batch, heads, length, dim)")
    if q.shape[1] % k.shape[1] if k.shape[1] else q.shape[1]:
        raise BadArgument(f"attention: {q.shape[1]} query heads are no multiple of {k.shape[1]} key heads")
    if q.shape[3] != k.shape[3]:
        raise BadArgument(f"attention: queries have {q.shape[3]} channels and keys {k.shape[3]}")
    if k.shape[1] != v.shape[1] or k.shape[2] != v.shape[2]:
        raise BadArgument(f"attention: keys {tuple(k.shape)} and values {tuple(v.shape)} differ in heads or length")
    if not q.dtype == k.dtype == v.dtype:
        raise BadArgument(f"attention: q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}, which must be the same")
    if normalizer not in NORMALIZERS:
        raise BadArgument(f"attention: normalizer is {normalizer!r}, but must be one of {', '.join(NORMALIZERS)}")
    if shift is not None and normalizer != "sigmoid":
        raise BadArgument("attention: shift belongs to the sigmoid normalizer; softmax does not feel it")
    if bias is not None and bias.dim() > 4:
        raise BadArgument(f"attention: bias has {bias.dim()} dimensions, which do not broadcast to (B, Hq, Lq, Lk)")
    try:
        symbols.parse_mask(mask)
    except symbols.SpecError as error:
        raise BadArgument(f"attention: mask: {error}") from None


def aten_form(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: float,
    mask: str,
    normalizer: str,
) -> Tensor:
    """The same function through ATen's fast paths, for ``target="reference"``. Works with symbolic lengths."""
    if normalizer == "sigmoid":
        return _aten_sigmoid(q, k, v, bias, shift, visible_pairs(q, k, mask), scale)
    text = symbols.mask_text(mask)
    # SDPA's is_causal aligns the first query with the first key, whatever the lengths.
    causal = text == _CAUSAL or (text == _CAUSAL_END and statically_known_true(q.shape[2] == k.shape[2]))
    if causal and bias is None:
        grouped = not statically_known_true(q.shape[1] == k.shape[1])
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    return aten_visible(q, k, v, bias, shift, visible_pairs(q, k, text), scale, normalizer)


def aten_visible(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    visible: Tensor | None,
    scale: float,
    normalizer: str,
) -> Tensor:
    """:func:`aten_form` for visible pairs as a bool tensor, broadcastable to (B, Hq, Lq, Lk)."""
    if normalizer == "sigmoid":
        return _aten_sigmoid(q, k, v, bias, shift, visible, scale)
    grouped = not statically_known_true(q.shape[1] == k.shape[1])
    merged = _merge(visible, bias, q.dtype)
    if merged is not None:
        # Fused CPU kernels take two or four dimensions and fall back to slow math for others.
        merged = merged.reshape((1,) * (4 - merged.dim()) + tuple(merged.shape))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=merged, scale=scale, enable_gqa=grouped)


def _merge(visible: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """One attn_mask for SDPA: bool, or float of the queries' dtype."""
    if bias is None:
        return visible
    if bias.dtype == torch.bool:
        return bias if visible is None else visible & bias
    bias = bias.to(dtype)
    return bias if visible is None else torch.where(visible, bias, float("-inf"))


def _aten_sigmoid(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    visible: Tensor | None,
    scale: float,
) -> Tensor:
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, q_len, k_len = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    key_heads = k.shape[1]
    group = heads // key_heads if key_heads else 1
    # The queries of a group stand below each other, so that grouped heads cost no copy of k and v.
    rows = q.to(compute).reshape(batch, key_heads, group * q_len, q.shape[3])
    scores = torch.matmul(rows, k.to(compute).transpose(-2, -1)).reshape(batch, heads, q_len, k_len) * scale
    if bias is not None and bias.dtype != torch.bool:
        scores = scores + bias.to(compute)
    if shift is not None:
        scores = scores + shift.to(compute)
    weights = torch.sigmoid(scores)
    if bias is not None and bias.dtype == torch.bool:
        visible = bias if visible is None else visible & bias
    if visible is not None:
        weights = torch.where(visible, weights, 0.0)
    # The weights meet v in v's dtype, as in SDPA.
    weights = weights.to(q.dtype).reshape(batch, key_heads, group * q_len, k_len)
    return torch.matmul(weights, v).reshape(batch, heads, q_len, v.shape[3])


def spec(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    scale: float,
    mask: str = "",
    normalizer: str = "softmax",
    target: str,
) -> AttentionSpec:
    """The forward kernel for this call, from tensors or fake tensors.

    Raises :class:`~tilewright.runtime.errors.UnsupportedKernel` with the reason when ``target`` has none.
    """
    check_arguments(q, k, v, bias, shift, mask, normalizer)
    return attention_kernel.spec(q, k, v, bias, shift, mask=mask, normalizer=normalizer, target=target)


def prepare(k: Tensor, bias: Tensor | None, shift: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """bias and shift as the kernel ops take them: four-dimensional, a bias with a column for every key."""
    if bias is not None:
        bias = attention_kernel.four_dimensional(bias)
        if not statically_known_true(bias.shape[3] == k.shape[2]):
            bias = bias.expand(*bias.shape[:3], k.shape[2])
    if shift is not None:
        shift = attention_kernel.four_dimensional(shift).to(torch.float32)
    return bias, shift


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    scale: float,
    mask: str = "",
    normalizer: str = "softmax",
    target: str = "reference",
) -> Tensor:
    check_arguments(q, k, v, bias, shift, mask, normalizer)
    if target == "reference":
        return aten_form(q, k, v, bias, shift, scale, mask, normalizer)
    bias, shift = prepare(k, bias, shift)
    return torch.ops.tilewright.attention_forward(
        q, k, v, bias, shift, scale=scale, mask=mask, normalizer=normalizer, target=target
    )[0]


ATTENTION = canonical(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? bias=None, Tensor? shift=None, *, float scale, str mask='', "
    "str normalizer='softmax', str target='reference') -> Tensor",
    reference=reference,
    composite=_attention,
    tolerance=TOLERANCE,
    spec=spec,
)
