"""rms_norm of a sum, ``x + residual``, and the sum itself: what a pre-norm transformer computes between two blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from ...codegen.norm import NormSpec
from . import norm_kernel, rms_norm
from .registry import Tolerance, canonical


def reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    keep_sum: bool = True,
) -> tuple[Tensor, Tensor]:
    """``(rms_norm(sum), sum)`` with ``sum = x + residual``, rounded to their dtype, which has to be one.

    x, residual: (..., N), of one shape. The rest as in :mod:`~.rms_norm`. keep_sum: whether anybody reads the sum; the
    second result has shape (0,) when not.
    """
    total = x + residual
    normed = rms_norm.reference(
        total, weight, eps, weight_offset=weight_offset, round_before_weight=round_before_weight
    )
    return normed, total if keep_sum else total.new_empty((0,))


def _composite(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    keep_sum: bool = True,
    target: str = "reference",
) -> tuple[Tensor, Tensor]:
    if target == "reference":
        return reference(
            x,
            residual,
            weight,
            eps,
            weight_offset=weight_offset,
            round_before_weight=round_before_weight,
            keep_sum=keep_sum,
        )
    arguments = (x, residual, weight, None, eps, weight_offset, False, round_before_weight, target)
    if keep_sum:
        return torch.ops.tilewright.add_norm_forward(*arguments)
    return torch.ops.tilewright.norm_forward(*arguments), x.new_empty((0,))


def spec(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    keep_sum: bool = True,
    target: str = "cpp",
) -> NormSpec:
    """The kernel for a call. Raises :class:`~tilewright.runtime.errors.UnsupportedKernel` when there is none."""
    return norm_kernel.spec(
        "add_rms_norm",
        x,
        residual,
        weight,
        None,
        centred=False,
        round_before_weight=round_before_weight,
        weight_offset=weight_offset,
        keep_sum=keep_sum,
        target=target,
    )


# The sum is rounded once (eps/2 relative to itself, so the same relative to the result), and the mean of the squares
# moves by less: one eps more than rms_norm's.
op = canonical(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, *, float weight_offset=0.0, "
    'bool round_before_weight=False, bool keep_sum=True, str target="reference") -> (Tensor, Tensor)',
    reference=reference,
    composite=_composite,
    tolerance={
        dtype: Tolerance(known.atol, known.rtol + torch.finfo(dtype).eps)
        for dtype, known in rms_norm.op.tolerance.items()
    },
    spec=spec,
)
