"""``tilewright::attention_lse``: softmax attention together with the log-sum-exp of every row.

    out_i = softmax_j(scale * q_i.k_j + bias_ij) v_j,    lse_i = log sum_j exp(scale * q_i.k_j + bias_ij)

over the visible keys: what it takes to join attention over disjoint sets of keys, see merge_attention.py. A row that
sees no key gives zeros and ``-inf``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...codegen.attention import AttentionSpec
from . import attention, attention_kernel
from .attention import TOLERANCE, check_arguments, visible_pairs
from .registry import canonical


def reference(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, scale: float, mask: str = ""
) -> tuple[Tensor, Tensor]:
    """out (B, Hq, Lq, Dv) in q's dtype and lse (B, Hq, Lq), float32 (float64 for float64).

    The arguments are those of ``tilewright::attention`` with the softmax normalizer.
    """
    check_arguments(q, k, v, bias, None, mask, "softmax")
    return attention.attend(q, k, v, bias, None, visible_pairs(q, k, mask), scale, "softmax")


def spec(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, scale: float, mask: str = "", target: str
) -> AttentionSpec:
    """The kernel of this call; raises :class:`~tilewright.runtime.errors.UnsupportedKernel` when there is none."""
    check_arguments(q, k, v, bias, None, mask, "softmax")
    return attention_kernel.spec(q, k, v, bias, None, mask=mask, normalizer="softmax", target=target)


def _attention_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float,
    mask: str = "",
    target: str = "reference",
) -> tuple[Tensor, Tensor]:
    if target == "reference":
        return reference(q, k, v, bias, scale=scale, mask=mask)
    check_arguments(q, k, v, bias, None, mask, "softmax")
    bias, _ = attention.prepare(k, bias, None)
    return torch.ops.tilewright.attention_forward(
        q, k, v, bias, None, scale=scale, mask=mask, normalizer="softmax", target=target
    )


ATTENTION_LSE = canonical(
    "attention_lse(Tensor q, Tensor k, Tensor v, Tensor? bias=None, *, float scale, str mask='', "
    "str target='reference') -> (Tensor, Tensor)",
    reference=reference,
    composite=_attention_lse,
    tolerance=TOLERANCE,
    spec=spec,
)
