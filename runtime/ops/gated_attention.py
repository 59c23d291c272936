"""``tilewright::gated_attention``: attention whose distant pairs pass a differentiable gate, to train groups with.

A helper of :class:`~tilewright.passes.focus_attention.FocusAttention`, used while tuning only: it computes all pairs.
"Why Attend to Everything? Focus is the Key" (arXiv 2604.03260), equation 2, is the gate ``score``; ``weight`` is ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import BadArgument
from .attention import check_arguments, visible_pairs
from .group_attention import kept_groups
from .registry import helper

GATES = ("score", "weight")


class _Gated(torch.autograd.Function):
    """Rows, keys and values of all heads against one gate (B, 1, L, L); the weights are computed again backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, hidden: Tensor, of_scores: bool) -> Tensor:
        weights = _weights(q, k, gate, hidden, of_scores)[0]
        out = weights @ v
        ctx.save_for_backward(q, k, v, gate, hidden, out)
        ctx.of_scores = of_scores
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, gate, hidden, out = ctx.saved_tensors
        (grad,) = grads
        weights, scores, total = _weights(q, k, gate, hidden, ctx.of_scores)
        dv = weights.transpose(-1, -2) @ grad if ctx.needs_input_grad[2] else None
        gain = (grad @ v.transpose(-1, -2)).sub_((grad * out).sum(-1, keepdim=True))
        if ctx.of_scores:
            inner = gain.mul_(weights)
            d_gate = (inner * scores).sum(1, keepdim=True)
            d_scores = inner.mul_(gate)
        else:
            # A pair that is shut out has a weight too, the one it would have beside those that are in; x / (1 + x)
            # is what it would take of the row, and keeps one pair with a high score from drowning all others.
            alone = torch.exp((scores - total).clamp_max_(30.0))
            alone = torch.where(gate > 0, weights, alone / (1 + alone)).masked_fill_(hidden, 0.0)
            d_gate = (alone * gain).sum(1, keepdim=True)
            d_scores = gain.mul_(weights)
        dq = d_scores @ k if ctx.needs_input_grad[0] else None
        dk = d_scores.transpose(-1, -2) @ q if ctx.needs_input_grad[1] else None
        return dq, dk, dv, d_gate, None, None


def _weights(q: Tensor, k: Tensor, gate: Tensor, hidden: Tensor, of_scores: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The softmax weights, the scores before the gate, and the rows' log-sum-exp. q holds the scale already."""
    scores = q @ k.transpose(-1, -2)
    gated = scores * gate if of_scores else scores.masked_fill(gate == 0, float("-inf"))
    gated = gated.masked_fill_(hidden, float("-inf"))
    total = gated.logsumexp(-1, keepdim=True)
    total = total.masked_fill(total == float("-inf"), 0.0)
    return gated.sub_(total).exp_(), scores, total


def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float,
    mask: str,
    window: int,
    keep: int,
    gate: str,
    steepness: float,
    sinks: int = 0,
) -> Tensor:
    """(B, Hq, L, Dv) in q's dtype; q (B, Hq, L, D), k (B, Hk, L, D), v (B, Hk, L, Dv), log_g (B, L, K), bias bool.

    Pairs at most ``window`` apart, and with one of the first ``sinks`` keys, attend in full. A distant pair's gate,
    with g = exp(log_g):

    - ``score``: its score is multiplied by sigmoid(steepness * g_i.g_j), the paper's equation 2;
    - ``weight``: it counts when both tokens keep a common one of their ``keep`` likeliest groups, as at inference;
      backward, a token's membership of a group moves with g (straight through), and a pair that is shut out feels
      what it would add.
    """
    check_arguments(q, k, v, bias, None, mask, "softmax")
    if gate not in GATES:
        raise BadArgument(f"gated_attention: gate is {gate!r}, but must be one of {', '.join(GATES)}")
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    length = q.shape[2]
    place = torch.arange(length, device=q.device)
    near = ((place[:, None] - place).abs() <= window) | (place < sinks)
    g = log_g.to(compute).exp()
    if gate == "score":
        factor = torch.sigmoid(steepness * (g @ g.transpose(-1, -2)))
    else:
        hard = kept_groups(log_g, keep=keep).to(compute)
        member = hard + (g - g.detach())
        factor = (member @ member.transpose(-1, -2)).clamp_max(1.0)
    factor = torch.where(near, 1.0, factor)[:, None]
    visible = visible_pairs(q, k, mask)
    if bias is not None:
        visible = bias if visible is None else visible & bias
    hidden = torch.zeros_like(near)[None, None] if visible is None else ~visible
    hidden = hidden.reshape((1,) * (4 - hidden.dim()) + tuple(hidden.shape))
    group = q.shape[1] // k.shape[1]
    keys, values = (t.to(compute).repeat_interleave(group, dim=1) for t in (k, v))
    return _Gated.apply(q.to(compute) * scale, keys, values, factor, hidden, gate == "score").to(q.dtype)


GATED_ATTENTION = helper(
    "gated_attention(Tensor q, Tensor k, Tensor v, Tensor log_g, Tensor? bias=None, *, float scale, str mask, "
    "int window, int keep, str gate, float steepness, int sinks=0) -> Tensor",
    gated_attention,
)
