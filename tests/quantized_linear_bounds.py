"""Linear layers with packed weights in float64, and how far a kernel for many rows, or for integers, may be from them.

Let u32 = 2^-24 and u be the unit roundoff of x's dtype. A weight is w = c + s: c = scale * (code - middle) and s, the
same for all of a group. Sums in float32, in any order and from partial sums of any size, err by at most n u32 of the
sum of their terms' magnitudes; n counts the columns, three slices of each for float32, and the steps that scale and
join them. The terms are |x| |c| and |sum of x| |s| <= |x| |s|. Weights that are rounded to bfloat16 before they are
multiplied are off by 2^-8 of themselves. Where x is integers times a step, the integers have to be the reference's:
one that is off by 1 would show in float32 results.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tilewright.codegen.quantized_linear import QuantizedLinearSpec
from tilewright.codegen.weight_format import WeightFormat
from tilewright.runtime.ops import gated_mlp, quantized_linear, quantized_weight

U32 = 2.0**-24
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
SLOPE = 1.13  # of an activation, at most


def rounds_weights(spec: QuantizedLinearSpec) -> bool:
    """Whether the kernel for many rows rounds weights to bfloat16: x in bfloat16, and groups too short for integers."""
    short = spec.group > 0 and (spec.activations == 0 or spec.group < 128 or spec.group % 64 != 0)
    return spec.dtype == "bfloat16" and short


def expected(
    spec: QuantizedLinearSpec,
    fmt: WeightFormat,
    x: Tensor,
    weights: list[tuple[Tensor, Tensor, Tensor | None]],
    biases: list[Tensor | None],
    residual: Tensor | None,
    rows: list[int],
) -> tuple[Tensor, Tensor]:
    """The result for x (M, K), in float64, and its bound."""
    unit, K = UNIT[x.dtype], x.shape[-1]
    if spec.activations:
        integers, step = quantized_linear.round_activations(x, spec.activations)
        exact = integers.double() * step.double()
    else:
        exact = x.double()
    values, bounds = [], []
    for (codes, scale, zero), bias, N in zip(weights, biases, rows, strict=True):
        weight = quantized_weight.dequantize(codes, scale, zero, fmt, N, K, torch.float64)
        centred = quantized_weight.dequantize(codes, scale, None, fmt.changed(zero="middle"), N, K, torch.float64)
        size = exact.abs() @ (centred.abs() + 2 * (weight - centred).abs()).T
        bound = (3 * K + 16) * U32 * size
        if rounds_weights(spec):
            bound = bound + 2.0**-8 * exact.abs() @ weight.abs().T
        value = exact @ weight.T
        if bias is not None:
            value = value + bias.double()
        values.append(value)
        bounds.append(bound + 2 * unit * value.abs())
    if not spec.gated:
        values, bounds = [torch.cat(values, -1)], [torch.cat(bounds, -1)]
    if spec.activation != "none":
        bounds[0] = SLOPE * bounds[0] + 4e-6 + 4 * unit * values[0].abs()
        values[0] = gated_mlp.ACTIVATIONS[spec.activation](values[0])
    out, bound = values[0], bounds[0]
    if spec.gated:
        bound = bound * values[1].abs() + bounds[1] * (out.abs() + bound) + 2 * unit * (out * values[1]).abs()
        out = out * values[1]
    if residual is not None:
        out = out + residual.double()
        bound = bound + 2 * unit * out.abs()
    return out, bound + 1e-30
