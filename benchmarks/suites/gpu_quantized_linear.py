"""Linear layers with packed low-bit weights on a GPU, beside torch's own packed products and plain matrix products.

Formats are written as ``w4-64``: bits, columns a scale (``row``: one a row), ``a8`` where each token is rounded to
8-bit integers first, ``fp8`` for 8-bit floats. A call of few rows goes through copies of the weight that together do
not fit the GPU's cache, as the layers of a model do; what its bytes say is codes and scales. torch's
``_weight_int4pack_mm`` takes the very same codes and scales; ``_int_mm`` and ``_scaled_mm`` are what a product of
rounded operands costs alone, with nothing done to x. Those two, and plain products, are there for speed: none of them
computes the same numbers.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...codegen.weight_format import WeightFormat
from ...runtime.autotune import load_best
from ...runtime.ops import quantized_linear, quantized_weight
from ..harness import Bound, Case, Contender, Problem, Skip, Suite
from ..machine import dtype_name
from ..measure import Call
from ..record import Kind

aten = torch.ops.aten
BEYOND_CACHE, MOST_COPIES = 256 * 2**20, 64
FEW = 32
BOUND = {torch.float16: Bound(4e-3, largest=True), torch.bfloat16: Bound(3e-2, largest=True)}
BOUND[torch.float32] = Bound(1e-5, largest=True)
FORMATS = {
    "w8-row": WeightFormat(8, 0),
    "w4-64": WeightFormat(4, 64),
    "w4-32-point": WeightFormat(4, 32, "point"),
    "w3-64": WeightFormat(3, 64),
    "w2-64": WeightFormat(2, 64),
    "fp8-row": WeightFormat(8, 0, kind="float8_e4m3fn"),
    "w8a8-row": WeightFormat(8, 0, activations=8),
    "w4a8-128": WeightFormat(4, 128, activations=8),
}
SIZES = {"4k": (4096, 4096), "mlp": (4096, 14336), "smollm2": (576, 3072)}  # columns, rows of W
ROWS = (1, 4, 16, 64, 512, 4096)


@dataclass(frozen=True)
class Shape:
    name: str
    form: WeightFormat
    rows: int
    columns: int
    width: int
    dtype: torch.dtype = torch.bfloat16


def _shapes() -> tuple[Shape, ...]:
    found = [
        Shape(f"{name}/{size}/{rows}", form, rows, *SIZES[size])
        for name, form in FORMATS.items()
        for size in SIZES
        for rows in ROWS
        if size == "4k" or rows in (1, 512)
    ]
    found += [Shape(f"w4-64/4k-{rows}-{d}", FORMATS["w4-64"], rows, 4096, 4096, getattr(torch, d))
              for d in ("float16", "float32") for rows in (1, 512)]  # fmt: skip
    return tuple(found)


SHAPES = _shapes()
QUICK = ("w4-64/4k/1", "w4-64/4k/16", "w4-64/4k/512", "w8a8-row/4k/4096", "fp8-row/4k/1")


class Layer:
    """x (M, K), the packed weight and as many copies as go through the cache, and the same weight as numbers."""

    def __init__(self, case: Shape, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)
        form, size = case.form, (case.width, case.columns)
        self.x = torch.randn(case.rows, case.columns, device=device, generator=generator).to(case.dtype)
        if form.kind == "int":
            self.integers = torch.randint(0, form.levels, size, device=device, generator=generator).to(torch.uint8)
        else:
            numbers = torch.randn(size, device=device, generator=generator).to(torch.float8_e4m3fn)
            self.integers = numbers.view(torch.uint8)
        groups = form.groups(case.columns)
        spread = torch.rand(case.width, groups, device=device, generator=generator)
        self.scale = ((0.5 + spread) / (form.middle * case.columns**0.5)).to(getattr(torch, form.scales))
        self.zero = None
        if form.zero == "point":
            self.zero = torch.randint(0, form.levels, (case.width, groups), device=device).to(torch.uint8)
        self.codes = quantized_weight.pack(self.integers, form)
        given = (self.codes, self.scale, self.zero, form, case.width, case.columns)
        self.weight = quantized_weight.dequantize(*given, case.dtype)
        parts = (self.codes, self.scale, self.zero)
        self.bytes = sum(t.numel() * t.element_size() for t in parts if t is not None)
        self.case = case

    def copies(self, size: int) -> int:
        return max(1, min(MOST_COPIES, BEYOND_CACHE // max(1, size))) if self.case.rows <= FEW else 1


def _through(count: int, make: Any) -> Call:
    """A call of the next of ``count`` layers at each call, so that each weight is read from memory."""
    calls = [make() for _ in range(count)]
    place = 0

    def run() -> Any:
        nonlocal place
        place = (place + 1) % count
        return calls[place]()

    return run


def ours(one: Layer, target: str) -> Call:
    form, rows = one.case.form, [one.case.width]

    def given() -> tuple[Any, ...]:
        zeros = [] if one.zero is None else [one.zero.clone()]
        return one.x, [one.codes.clone()], [one.scale.clone()], zeros, [None], None, rows

    first = given()
    spec = quantized_linear.spec(*first[:6], rows=rows, format=form.text(), target=target)
    launch = load_best(spec, target, lambda: first).launch
    return _through(one.copies(one.bytes), lambda: functools.partial(launch, *given()))


def plain(one: Layer) -> Call:
    size = one.weight.numel() * one.weight.element_size()
    return _through(one.copies(size), lambda: functools.partial(F.linear, one.x, one.weight.clone()))


def int4pack(one: Layer) -> Call:
    """torch's 4-bit product: the same codes and scales, in bfloat16."""
    form = one.case.form
    if form.bits != 4 or form.activations or form.zero != "middle" or one.x.dtype != torch.bfloat16:
        raise Skip("symmetric 4-bit weights and bfloat16 only")
    codes = one.integers[:, ::2] << 4 | one.integers[:, 1::2]
    packed = aten._convert_weight_to_int4pack(codes.contiguous(), 8)
    scales = one.scale.to(one.x.dtype).T.contiguous()
    info = torch.stack([scales, torch.zeros_like(scales)], -1).contiguous()

    def make() -> Call:
        weight, numbers = packed.clone(), info.clone()
        return lambda: aten._weight_int4pack_mm(one.x, weight, form.group, numbers)

    return _through(one.copies(one.bytes), make)


def int_mm(one: Layer) -> Call:
    """The product of integers alone."""
    if one.case.form.activations != 8 or one.case.form.bits != 8 or one.case.rows <= 16:
        raise Skip("8-bit integers and more than 16 rows only")
    x = torch.randint(-127, 128, one.x.shape, device=one.x.device, dtype=torch.int8)
    weight = (one.integers.int() - 128).to(torch.int8)
    return functools.partial(torch._int_mm, x, weight.T)


def scaled_mm(one: Layer) -> Call:
    """The product of 8-bit floats alone."""
    if one.case.form.kind == "int" or torch.cuda.get_device_capability() < (8, 9):
        raise Skip("8-bit floats, from compute capability 8.9 on")
    x = one.x.to(torch.float8_e4m3fn)
    weight = one.integers.view(torch.float8_e4m3fn)
    scale = torch.ones((), device=x.device)
    return lambda: torch._scaled_mm(x, weight.T, scale_a=scale, scale_b=scale, out_dtype=one.case.dtype)


def problem(case: Shape, device: str = "cuda", target: str = "triton") -> Problem:
    one = Layer(case, device)

    def expected() -> Tensor:
        zeros = [] if one.zero is None else [one.zero]
        given = (one.x.float(), [one.codes], [one.scale], zeros, [None])
        return quantized_linear.reference(*given, rows=[case.width], format=case.form.text()).double()

    def float_expected() -> Tensor:
        return one.x.double() @ one.weight.double().T

    loose = Bound(1e9)
    whole = one.weight.numel() * one.weight.element_size()
    return Problem(
        "ours",
        [
            Contender("plain", Kind.PEER, make=lambda: plain(one), expected=float_expected, bytes=whole),
            Contender("int4pack", Kind.PEER, make=lambda: int4pack(one)),
            Contender("int_mm", Kind.CONTEXT, make=lambda: int_mm(one), bound=loose),
            Contender("scaled_mm", Kind.CONTEXT, make=lambda: scaled_mm(one), bound=loose),
            Contender("ours", Kind.OURS, make=lambda: ours(one, target)),
        ],
        expected,
        BOUND[case.dtype],
        lambda result: result.double(),
        bytes=one.bytes + case.rows * (case.columns + case.width) * one.x.element_size(),
        flops=2 * case.rows * case.columns * case.width,
        traffic="read",
        dtype=dtype_name(case.dtype),
    )


def cases() -> list[Case]:
    return [
        Case(
            case.name,
            {"dtype": dtype_name(case.dtype), "format": case.form.text(), "M": case.rows}
            | {"N": case.width, "K": case.columns},
            functools.partial(problem, case),
            quick=case.name in QUICK,
        )
        for case in SHAPES
    ]


SUITE = Suite(
    "gpu-quantized-linear",
    "Linear layers with packed weights of 8, 4, 3 and 2 bits on a GPU: one token to prefill.",
    cases,
    device="cuda",
    headline=("w4-64/4k/1", "w4-64/4k/512", "w8a8-row/4k/4096"),
    plot_panels=("dtype",),
)
