"""``tilewright::visible_keys``: how many keys each query of an attention sees, from its mask and bias.

A helper of the attention passes, not a canonical op: it never becomes a kernel. Like them it is composite, so it is one
readable node in a graph, takes its sizes from the tensors at every call, and dissolves to ATen below autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...codegen import bounds, symbols
from .attention import visible_pairs
from .registry import helper

MASKED_AT = -5000.0
"""A float bias at or below this hides its key.

Masks are added as ``-inf``, the dtype's minimum, -1e9 or, in older BERT code, -1e4, which bfloat16 rounds to -9984; a
position bias on top changes little. Half of -1e4 takes in all of them. A real bias as low as that belongs to a key that
attention ignores anyway: unless its score makes up for thousands, its sigmoid is exactly 0, and so is its softmax
weight beside any ordinary key.
"""


def count_visible(q: Tensor, k: Tensor, bias: Tensor | None = None, *, mask: str = "") -> Tensor:
    """Number of visible keys of each query, int64, broadcastable to (B, Hq, Lq, 1).

    q (B, Hq, Lq, D) and k (B, Hk, Lk, D) give the sizes and device alone; bias and mask are those of
    ``tilewright::attention``. A key is visible when the mask says so and its bias is True, or above ``MASKED_AT``: a
    real bias (T5, ALiBi) hides nothing. Without a bias a mask with closed-form limits (causal, window) costs O(Lq);
    otherwise the pairs are evaluated and summed, O(Lq Lk) for each head and batch entry that mask and bias tell apart.
    """
    if bias is None:
        limits = bounds.k_bounds(mask)
        if limits.exact:
            return _closed_form(q, k, limits)
    visible = visible_pairs(q, k, mask)
    if bias is not None:
        shown = bias if bias.dtype == torch.bool else bias > MASKED_AT
        visible = shown if visible is None else visible & shown
    assert visible is not None  # an empty mask has exact limits
    visible = visible.reshape((1,) * (4 - visible.dim()) + tuple(visible.shape))
    return visible.expand(*visible.shape[:-1], k.shape[2]).sum(-1, keepdim=True)


def _closed_form(q: Tensor, k: Tensor, limits: bounds.Bounds) -> Tensor:
    """How many integers lie in ``[max(0, *lower), min(k_len, *upper))``."""
    values: dict[str, Any] = {
        "q_idx": torch.arange(q.shape[2], device=q.device).view(1, 1, -1, 1),
        "batch": torch.arange(q.shape[0], device=q.device).view(-1, 1, 1, 1),
        "head": torch.arange(q.shape[1], device=q.device).view(1, -1, 1, 1),
        "q_len": q.shape[2],
        "k_len": k.shape[2],
    }
    zero = torch.zeros((1, 1, 1, 1), dtype=torch.int64, device=q.device)
    first, end = zero, zero + k.shape[2]
    for limit in limits.lower:
        first = torch.maximum(first, zero + symbols.evaluate_integer(limit, values))
    for limit in limits.upper:
        end = torch.minimum(end, zero + symbols.evaluate_integer(limit, values))
    return (end - first).clamp_min(0)


VISIBLE_KEYS = helper("visible_keys(Tensor q, Tensor k, Tensor? bias=None, *, str mask='') -> Tensor", count_visible)
