"""Linear layers with packed weights in float64, and a bound, element by element, on how far a kernel may be off.

Let u be the unit roundoff of the dtype (2^-24, 2^-11, 2^-8), u32 = 2^-24 and K the number of columns. A product of x
and a number made of a code is off by 4 u of x W (rounding W; Triton's interpreter truncates to bfloat16, which counts
twice) and 4 u32 of what W is made of, |scale code| + |zero|. Errors of K products are independent: FACTOR times the
root of the sum of their squares; what goes one way, truncation, by 2 u of the sum. A float32 sum errs by u32 sqrt(K) of
that root more. Where codes become numbers without a scale (groups of a whole row), or products are of integers, nothing
is rounded but sums. Bias, gate and residual carry errors on, activations by a slope of at most 1.13; results are
rounded once, 2 u for the same reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from attention_bounds import DTYPES, U32, UNIT
from torch import Tensor

from tilewright.codegen.weight_format import WeightFormat
from tilewright.runtime.ops import gated_mlp, quantized_weight
from tilewright.runtime.ops.quantized_linear import round_activations

FACTOR = 3


@dataclass(frozen=True)
class Case:
    """A call: M rows of x, N of each weight, K columns."""

    form: WeightFormat = field(default_factory=WeightFormat)
    dtype: str = "float32"
    rows: int = 3
    widths: tuple[int, ...] = (21,)
    columns: int = 75
    activation: str = "none"
    gated: bool = False
    bias: bool = True
    residual: bool = True


@dataclass
class Call:
    """The tensors of a call; codes in the layout ``plain``, and with them what stands beyond K is arbitrary."""

    case: Case
    x: Tensor
    codes: list[Tensor]
    scales: list[Tensor]
    zeros: list[Tensor]
    biases: list[Tensor | None]
    residual: Tensor | None

    def arguments(self) -> tuple:
        weights = (self.codes, self.scales, self.zeros, self.biases)
        return self.x, *weights, self.residual, list(self.case.widths)


def make_weight(
    rows: int, columns: int, form: WeightFormat, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor | None]:
    """codes, scale and zero of a random weight."""
    whole = -(-columns // 32) * 32
    codes = torch.randint(0, form.levels, (rows, whole), generator=generator).to(torch.uint8)
    if form.kind != "int":
        codes[:, :columns] = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn).view(torch.uint8)
        codes[:, columns:] = 0x7F  # NaN
    kind, groups = getattr(torch, form.scales), form.groups(columns)
    scale = (torch.rand(rows, groups, generator=generator) * 0.02 + 0.01).to(kind)
    zero = None
    if form.zero == "point":
        zero = torch.randint(0, form.levels, (rows, groups), generator=generator).to(torch.uint8)
    elif form.zero == "offset":
        zero = (torch.randn(rows, groups, generator=generator) * 0.05).to(kind)
    return quantized_weight.pack(codes, form), scale, zero


def make_call(case: Case, seed: int = 0) -> Call:
    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[case.dtype]
    made = [make_weight(width, case.columns, case.form, generator) for width in case.widths]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    biases = [normal(width) if case.bias else None for width in case.widths]
    total = case.widths[0] if case.gated else sum(case.widths)
    residual = normal(case.rows, total) if case.residual else None
    codes, scales, zeros = ([weight[i] for weight in made] for i in range(3))
    zeros = [zero for zero in zeros if zero is not None]
    return Call(case, normal(case.rows, case.columns), codes, scales, zeros, biases, residual)


def expected(call: Call) -> tuple[Tensor, Tensor]:
    """The result (M, sum of N) in float64, and how far a kernel may be from it."""
    case, form = call.case, call.case.form
    unit = UNIT[DTYPES[case.dtype]]
    x, step = call.x.double(), torch.ones(case.rows, 1, dtype=torch.float64)
    if form.activations:
        integers, step = round_activations(call.x, form.activations)
        x, step = integers.double(), step.double()
    of_integers = bool(form.activations) and form.kind == "int"
    exact = of_integers or (not form.group and form.zero != "offset")
    values, bounds = [], []
    for i, width in enumerate(case.widths):
        zero = call.zeros[i] if call.zeros else None
        given = (call.codes[i], call.scales[i], zero, form, width, case.columns)
        weight = quantized_weight.dequantize(*given, torch.float64)
        none = None if zero is None else torch.zeros_like(zero)
        code = quantized_weight.dequantize(given[0], given[1], none, form, width, case.columns, torch.float64)
        size = weight.abs() + code.abs()
        y = x @ weight.mT
        products = ((x**2) @ (weight**2).mT).sqrt()
        whole = ((x**2) @ (size**2).mT).sqrt()
        off = FACTOR * U32 * (4 + case.columns**0.5) * whole + 4 * U32 * y.abs()
        if not exact:
            off = off + FACTOR * 4 * unit * products + 2 * unit * y.abs()
        y, off = y * step, off * step
        bias = call.biases[i]
        if bias is not None:
            y = y + bias.double()
        values.append(y)
        bounds.append(off + 2 * U32 * y.abs())
    act = gated_mlp.ACTIVATIONS.get(case.activation, lambda y: y)
    slope = 1.0 if case.activation == "none" else 1.13
    if case.gated:
        first, off = act(values[0]), slope * bounds[0] + 32 * U32 * values[0].abs()
        out = first * values[1]
        bound = off * values[1].abs() + first.abs() * bounds[1] + off * bounds[1]
    else:
        both = torch.cat(values, 1)
        out, bound = act(both), slope * torch.cat(bounds, 1)
        bound = bound if case.activation == "none" else bound + 32 * U32 * (1.0 + both.abs())
    if call.residual is not None:
        out = out + call.residual.double()
    tiny = 2.0**-24 if case.dtype == "float16" else 2.0**-40
    return out, bound + 2 * unit * out.abs() + 2 * U32 * out.abs() + tiny
