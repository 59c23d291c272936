"""layer_norm of a sum, ``x + residual``, and the sum itself: BERT's norm after a block, GPT-2's before one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...codegen.norm import NormSpec
from . import layer_norm, norm_kernel
from .native import check_native
from .registry import Tolerance, canonical


def reference(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    keep_sum: bool = True,
) -> tuple[Tensor, Tensor]:
    """``(layer_norm(sum), sum)`` with ``sum = x + residual``, rounded to their dtype, which has to be one.

    x, residual: (..., *normalized_shape), of one shape. The rest as in :mod:`~.layer_norm`. keep_sum: whether anybody
    reads the sum; the second result has shape (0,) when not.
    """
    total = x + residual
    normed = torch.layer_norm(total, normalized_shape, weight, bias, eps)
    return normed, total if keep_sum else total.new_empty((0,))


def _composite(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    keep_sum: bool = True,
    target: str = "reference",
) -> tuple[Tensor, Tensor]:
    if target == "reference":
        return reference(x, residual, normalized_shape, weight, bias, eps, keep_sum=keep_sum)
    layer_norm.check_shapes(x, normalized_shape, weight, bias)
    rows = [t if t is None else layer_norm.flat(t, normalized_shape) for t in (x, residual, weight, bias)]
    arguments = (*rows, eps, 0.0, True, False, target)
    if keep_sum:
        normed, total = torch.ops.tilewright.add_norm_forward(*arguments)
        return normed.view(x.shape), total.view(x.shape)
    return torch.ops.tilewright.norm_forward(*arguments).view(x.shape), x.new_empty((0,))


def spec(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    keep_sum: bool = True,
    target: str = "cpp",
) -> NormSpec:
    """The kernel for a call. Raises :class:`~tilewright.runtime.errors.UnsupportedKernel` when there is none."""
    check_native("add_layer_norm", target, x=x, residual=residual, weight=weight, bias=bias)
    layer_norm.check_shapes(x, normalized_shape, weight, bias)
    flat = layer_norm.flat
    return norm_kernel.spec(
        "add_layer_norm",
        flat(x, normalized_shape),
        flat(residual, normalized_shape),
        *(t if t is None else flat(t, normalized_shape) for t in (weight, bias)),
        centred=True,
        round_before_weight=False,
        keep_sum=keep_sum,
        weight_offset=0.0,
        target=target,
    )


# The sum s is rounded once: eps/2 |s|, divided by the standard deviation; with |s| up to 8 standard deviations that is
# 4 eps of the dtype itself, absolute, times weights near one: 8 eps, beside what layer_norm has.
op = canonical(
    "add_layer_norm(Tensor x, Tensor residual, SymInt[] normalized_shape, Tensor? weight=None, Tensor? bias=None, "
    'float eps=1e-05, *, bool keep_sum=True, str target="reference") -> (Tensor, Tensor)',
    reference=reference,
    composite=_composite,
    tolerance={
        dtype: Tolerance(known.atol + 8 * torch.finfo(dtype).eps, known.rtol)
        for dtype, known in layer_norm.op.tolerance.items()
    },
    spec=spec,
)
