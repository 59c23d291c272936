"""``tilewright::attention_scores`` and ``attention_values``: the two products of an attention, around its softmax.

Helpers for passes that want the softmax of an attention as a canonical op of its own: the scores then go through
memory. Composite, like ``visible_keys``: one readable node each, sizes from the tensors at every call, ATen below
autograd. ``attention_values(softmax(attention_scores(q, k, bias)), v, scores)`` is ``attention(q, k, v, bias)``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .attention import visible_pairs
from .registry import helper


def attention_scores(q: Tensor, k: Tensor, bias: Tensor | None = None, *, scale: float, mask: str = "") -> Tensor:
    """``scale * q k^T + bias``, ``-inf`` where a pair is not visible: (B, Hq, Lq, Lk), float32 (float64 for float64).

    q (B, Hq, Lq, D) and k (B, Hk, Lk, D), Hq a multiple of Hk; bias and mask are those of ``tilewright::attention``.
    """
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, q_len, k_len = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    group = heads // k.shape[1] if k.shape[1] else 1
    # The queries of a group stand below each other, so that grouped heads cost no copy of k.
    rows = q.to(compute).reshape(batch, k.shape[1], group * q_len, q.shape[3])
    scores = torch.matmul(rows, k.to(compute).transpose(-2, -1)).reshape(batch, heads, q_len, k_len) * scale
    visible = visible_pairs(q, k, mask)
    if bias is not None and bias.dtype == torch.bool:
        visible = bias if visible is None else visible & bias
    elif bias is not None:
        scores = scores + bias.to(compute)
        # Changes nothing here; backward, it stops the NaN that the softmax of a row of -inf sends.
        scores = scores.masked_fill(scores == -math.inf, -math.inf)
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    return scores


def attention_values(weights: Tensor, v: Tensor, scores: Tensor | None = None) -> Tensor:
    """``weights v``: (B, Hq, Lq, Dv) in v's dtype, from weights (B, Hq, Lq, Lk) and v (B, Hk, Lk, Dv).

    scores: those the weights come from, where a row of them may be ``-inf`` throughout. Its softmax is NaN, but an
    attention that sees no key is zero, as in SDPA.
    """
    if scores is not None:
        weights = torch.where(scores == -math.inf, 0.0, weights)
    batch, heads, q_len, k_len = weights.shape
    key_heads = v.shape[1]
    group = heads // key_heads if key_heads else 1
    # The weights meet v in v's dtype, as in SDPA.
    rows = weights.to(v.dtype).reshape(batch, key_heads, group * q_len, k_len)
    return torch.matmul(rows, v).reshape(batch, heads, q_len, v.shape[3])


ATTENTION_SCORES = helper(
    "attention_scores(Tensor q, Tensor k, Tensor? bias=None, *, float scale, str mask='') -> Tensor", attention_scores
)
ATTENTION_VALUES = helper("attention_values(Tensor weights, Tensor v, Tensor? scores=None) -> Tensor", attention_values)
