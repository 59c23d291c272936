"""Linear layers that share an input, with the activation, gate and residual that follow them, in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ...codegen.linear import ACTIVATIONS, LinearSpec
from ..errors import BadArgument
from . import gated_mlp, linear
from .registry import Tolerance, canonical


def reference(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    residual: Tensor | None = None,
    *,
    activation: str = "none",
    gated: bool = False,
) -> Tensor:
    """``act(x @ W.T + b) + residual``, every operation rounded to x's dtype.

    x: (..., K). weights: (N_i, K) each; biases: (N_i,) or None each. Their results follow each other in the last
    dimension; ``gated`` takes two of one shape and gives ``act(first) * second``. residual: of the result's shape.
    activation: ``none`` or one of gated_mlp's. One floating dtype. Returns (..., sum of N_i), gated (..., N).
    """
    if activation not in ACTIVATIONS:
        raise BadArgument(f"linear_fused has no activation {activation!r}; use one of {', '.join(ACTIVATIONS)}")
    if not weights or len(weights) != len(biases) or (gated and len(weights) != 2):
        raise BadArgument(f"linear_fused got {len(weights)} weights and {len(biases)} biases; gated takes two of each")
    parts = [functional.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    act = gated_mlp.ACTIVATIONS.get(activation, lambda y: y)
    out = act(parts[0]) * parts[1] if gated else act(torch.cat(parts, -1) if len(parts) > 1 else parts[0])
    return out if residual is None else out + residual


def _composite(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    residual: Tensor | None = None,
    *,
    activation: str = "none",
    gated: bool = False,
    target: str = "reference",
) -> Tensor:
    if linear.runs_reference(target, x, residual, *weights, *biases):
        return reference(x, weights, biases, residual, activation=activation, gated=gated)
    return torch.ops.tilewright.linear_forward(x, weights, biases, residual, activation, gated, target)


def spec(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    residual: Tensor | None = None,
    *,
    activation: str = "none",
    gated: bool = False,
    target: str = "cpp",
) -> LinearSpec:
    """The kernel for a call. Raises :class:`~tilewright.runtime.errors.UnsupportedKernel` when there is none."""
    return linear.kernel_spec("linear_fused", x, weights, biases, residual, activation, gated, target)


# A linear layer's rounding (see linear), carried on by activations whose slope is at most 1.13, doubled by a gate of
# order one, and one more rounding each: three times the linear layer's tolerance.
op = canonical(
    "linear_fused(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor? residual=None, *, "
    'str activation="none", bool gated=False, str target="reference") -> Tensor',
    reference=reference,
    composite=_composite,
    tolerance={dtype: Tolerance(3 * t.atol, 3 * t.rtol) for dtype, t in linear.TOLERANCE.items()},
    spec=spec,
)
