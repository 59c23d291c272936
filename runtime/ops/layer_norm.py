"""Layer normalisation ("Layer Normalization", Ba, Kiros and Hinton 2016), as ``torch.nn.functional.layer_norm``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...codegen.norm import NormSpec
from ..errors import UnsupportedKernel
from . import norm_kernel
from .native import check_native
from .registry import Tolerance, canonical


def reference(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the trailing ``normalized_shape``; var is biased (1/N).

    x: (..., *normalized_shape), any floating dtype; weight, bias: normalized_shape or None; eps: unit of x squared.
    Returns x's shape and dtype. Raises RuntimeError when the shapes disagree, as torch does.
    """
    return torch.layer_norm(x, normalized_shape, weight, bias, eps)


def _composite(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    target: str = "reference",
) -> Tensor:
    if target == "reference":
        return torch.layer_norm(x, normalized_shape, weight, bias, eps)
    check_shapes(x, normalized_shape, weight, bias)
    rows = [t if t is None else flat(t, normalized_shape) for t in (x, weight, bias)]
    forward = torch.ops.tilewright.norm_forward
    return forward(rows[0], None, *rows[1:], eps, 0.0, True, False, target).view(x.shape)


def flat(tensor: Tensor, normalized_shape: Sequence[int]) -> Tensor:
    """The trailing ``normalized_shape`` of a tensor as one dimension."""
    return tensor if len(normalized_shape) == 1 else tensor.flatten(tensor.dim() - len(normalized_shape))


def spec(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    target: str = "cpp",
) -> NormSpec:
    """The kernel for a call. Raises :class:`~tilewright.runtime.errors.UnsupportedKernel` when there is none."""
    check_native("layer_norm", target, x=x, weight=weight, bias=bias)
    check_shapes(x, normalized_shape, weight, bias)
    return norm_kernel.spec(
        "layer_norm",
        flat(x, normalized_shape),
        None,
        *(t if t is None else flat(t, normalized_shape) for t in (weight, bias)),
        centred=True,
        round_before_weight=False,
        weight_offset=0.0,
        keep_sum=False,
        target=target,
    )


def check_shapes(x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None) -> None:
    """Raise UnsupportedKernel unless x ends in ``normalized_shape`` and weight and bias have exactly it."""
    wanted = tuple(normalized_shape)
    fits = bool(wanted) and tuple(x.shape[-len(wanted) :]) == wanted
    if not fits or any(t is not None and tuple(t.shape) != wanted for t in (weight, bias)):
        raise UnsupportedKernel(f"x, weight or bias do not have the normalized shape {wanted}")


# Computed in float32 for half dtypes and rounded once: eps/2, doubled. x - mean cancels: the error of the mean is
# eps/2 * |x|, divided by the standard deviation; with |x| up to 64 standard deviations and weights near one that is
# 32 eps absolute, in the dtype of the computation.
op = canonical(
    "layer_norm(Tensor x, SymInt[] normalized_shape, Tensor? weight=None, Tensor? bias=None, float eps=1e-05, *, "
    'str target="reference") -> Tensor',
    reference=reference,
    composite=_composite,
    tolerance={
        torch.float64: Tolerance(32 * 2.0**-52, 8 * 2.0**-52),
        torch.float32: Tolerance(32 * 2.0**-23, 8 * 2.0**-23),
        torch.bfloat16: Tolerance(32 * 2.0**-23, 2.0**-7),
        torch.float16: Tolerance(32 * 2.0**-23, 2.0**-10),
    },
    spec=spec,
)
