"""RMS normalisation of the last dimension ("Root Mean Square Layer Normalization", Zhang and Sennrich 2019)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...codegen.norm import NormSpec
from . import norm_kernel
from .registry import Tolerance, canonical


def reference(
    x: Tensor, weight: Tensor | None, eps: float, *, weight_offset: float = 0.0, round_before_weight: bool = False
) -> Tensor:
    """``h * (weight_offset + weight)`` with ``h = x * rsqrt(mean(x^2) + eps)``.

    x: (..., N), any floating dtype. weight: broadcastable to x, or None. eps, weight_offset: no unit; Gemma stores
    ``weight - 1`` and has offset 1.

    Computed in float32 (float64 for float64). round_before_weight tells where models disagree: Llama and T5 round
    ``h`` to x's dtype and multiply then, so the result has the promoted dtype of weight and x; Gemma and
    ``torch.rms_norm`` multiply in float32 and round once, so it has x's dtype.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(compute)
    h = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return h.to(x.dtype)
    if round_before_weight:
        return (weight_offset + weight if weight_offset else weight) * h.to(x.dtype)
    scale = weight.to(compute)
    return ((weight_offset + scale if weight_offset else scale) * h).to(x.dtype)


def _composite(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    target: str = "reference",
) -> Tensor:
    if target == "reference":
        # The explicit form is what models write, so raising changes no bit; Inductor fuses it into one loop.
        return reference(x, weight, eps, weight_offset=weight_offset, round_before_weight=round_before_weight)
    forward = torch.ops.tilewright.norm_forward
    return forward(x, None, weight, None, eps, weight_offset, False, round_before_weight, target)


def spec(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    target: str = "cpp",
) -> NormSpec:
    """The kernel for a call. Raises :class:`~tilewright.runtime.errors.UnsupportedKernel` when there is none."""
    return norm_kernel.spec(
        "rms_norm",
        x,
        None,
        weight,
        None,
        centred=False,
        round_before_weight=round_before_weight,
        weight_offset=weight_offset,
        keep_sum=False,
        target=target,
    )


# float32: the mean is a vectorised sum (a few units in the last place), then rsqrt, two products: 8 eps covers it, and
# float64 alike. bfloat16 and float16: h, the offset weight and the product are rounded, eps/2 each: 2 eps. Nothing is
# added after the normalisation, so the error is relative; atol is the underflow of float16 alone.
op = canonical(
    "rms_norm(Tensor x, Tensor? weight, float eps, *, float weight_offset=0.0, bool round_before_weight=False, "
    'str target="reference") -> Tensor',
    reference=reference,
    composite=_composite,
    tolerance={
        torch.float64: Tolerance(0.0, 8 * 2.0**-52),
        torch.float32: Tolerance(0.0, 8 * 2.0**-23),
        torch.bfloat16: Tolerance(0.0, 2 * 2.0**-7),
        torch.float16: Tolerance(2.0**-24, 2 * 2.0**-10),
    },
    spec=spec,
)
