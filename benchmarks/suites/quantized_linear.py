"""Linear layers with packed low-bit weights on the CPU, beside torch's own packed products, torchao and plain ones.

A call of few rows goes through copies of the weight that together do not fit the caches, as the layers of a model do;
what its bytes say is codes and scales. Formats are written as ``w4-32``: bits, columns a scale (``row``: one a row),
and ``a8`` where each token is rounded to 8-bit integers first. Peers that round weights in their own way are held to
the float weight, loosely: these rows are about speed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tilewright.runtime.ops as registered
from tilewright.codegen.weight_format import WeightFormat
from tilewright.passes.rounding.grid import grid, ranges, round_weight
from tilewright.runtime.ops import quantized_weight

from ..harness import Bound, Case, Contender, Problem, Skip, Suite
from ..machine import dtype_name
from ..measure import Call, Limits
from ..peers import need
from ..record import Kind

aten = torch.ops.aten
BEYOND_CACHES, MOST_COPIES = 192 * 2**20, 256
FEW = 32  # rows up to which the weights are what costs
LOOSE = Bound(0.5, largest=True)
FORMATS = {
    "w8-row": WeightFormat(8, 0),
    "w4-32": WeightFormat(4, 32),
    "w4-128": WeightFormat(4, 128),
    "w3-64": WeightFormat(3, 64),
    "w2-64": WeightFormat(2, 64),
    "w8a8-row": WeightFormat(8, 0, scales="float32", activations=8),
    "w4a8-32": WeightFormat(4, 32, activations=8),
}
# SmolLM2's: (in, out) of the merged query, key and value projection, output, gate and up, down, head
SMOLLM2 = ((576, 960), (576, 576), (576, 3072), (1536, 576), (576, 49152))


@dataclass
class Layer:
    """x (M, K), the float weight (N, K), and its codes: packed, and (N, K) with scales (N, G)."""

    x: Tensor
    weight: Tensor
    format: WeightFormat
    packed: list[Tensor]
    integers: Tensor
    scale: Tensor
    copies: int

    @property
    def size(self) -> int:
        return sum(part.numel() * part.element_size() for part in self.packed)


def layer(fmt: WeightFormat, rows: int, wide: int, narrow: int, dtype: torch.dtype) -> Layer:
    torch.manual_seed(0)
    weight = torch.randn(narrow, wide) * wide**-0.5
    rounded = round_weight(weight, fmt, *grid(*ranges(weight, fmt), fmt))
    panels = fmt.changed(layout="panels")
    codes, scale, _ = quantized_weight.to_layout(rounded.packed(), rounded.scale, None, fmt, narrow, wide, "panels")
    found = Layer(torch.randn(rows, wide).to(dtype), weight, panels, [codes, scale], rounded.codes, rounded.scale, 1)
    if rows <= FEW:
        found.copies = max(1, min(MOST_COPIES, BEYOND_CACHES // found.size))
    return found


def over(copies: int, make: Callable[[], Call]) -> Call:
    """One call of each of ``copies`` layers, one after the other; the last one's result."""
    calls = [make() for _ in range(copies)]

    def run() -> Any:
        out = None
        for call in calls:
            out = call()
        return out

    return run


def ours(one: Layer) -> Call:
    def make() -> Call:
        codes, scale = ([part.clone()] for part in one.packed)
        rows, text = [one.weight.shape[0]], one.format.text()
        # What a compiled model calls: tracing has dissolved the op around it, as it has F.linear's module.
        op = torch.ops.tilewright.quantized_linear_forward.default
        return lambda: op(one.x, codes, scale, [], [None], None, rows, text, "none", False, "cpp")

    return over(one.copies, make)


def int4pack(one: Layer) -> Call:
    """torch's own 4-bit product: the very same codes and scales (its zeros are those of code 8)."""
    if one.format.bits != 4 or one.format.activations:
        raise Skip("4-bit weights alone")
    packed = aten._convert_weight_to_int4pack_for_cpu(one.integers.int(), 1)
    scales = one.scale.to(one.x.dtype).T.contiguous()
    both = torch.stack([scales, torch.zeros_like(scales)], -1)

    def make() -> Call:
        weight, info = packed.clone(), both.clone()
        return lambda: aten._weight_int4pack_mm_for_cpu(one.x, weight, one.format.group, info)

    return over(one.copies, make)


def int8pack(one: Layer) -> Call:
    if one.format.bits != 8 or one.format.activations:
        raise Skip("8-bit weights alone")
    codes = (one.integers.int() - 128).to(torch.int8)
    scale = one.scale[:, 0].to(one.x.dtype)

    def make() -> Call:
        weight, info = codes.clone(), scale.clone()
        return lambda: aten._weight_int8pack_mm(one.x, weight, info)

    return over(one.copies, make)


def torchao(one: Layer) -> Call:
    """torchao's tensor subclass of the same kind, behind ``F.linear``."""
    ao, int4 = need("torchao.quantization"), need("torchao.prototype.quantization.int4")
    bits, group, activations = one.format.bits, one.format.group, one.format.activations
    configs: dict[tuple[int, int], Callable[[], Any]] = {
        (8, 0): ao.Int8WeightOnlyConfig,
        (4, 0): lambda: int4.PrototypeInt4WeightOnlyConfig(group_size=group),
        (8, 8): ao.Int8DynamicActivationInt8WeightConfig,
        (4, 8): lambda: int4.Int8DynamicActivationInt4WeightConfig(group_size=group),
    }
    if (bits, activations) not in configs:
        raise Skip("torchao has no such weights on the CPU")
    if one.copies * one.weight.numel() * one.x.element_size() > 2**33:
        raise Skip("its float weights would take more than 8 GiB")

    def make() -> Call:
        plain = nn.Linear(one.weight.shape[1], one.weight.shape[0], bias=False).to(one.x.dtype)
        with torch.no_grad():
            plain.weight.copy_(one.weight)
        ao.quantize_(plain, configs[bits, activations]())
        return lambda: plain(one.x)

    return over(one.copies, make)


def plain(one: Layer) -> Call:
    def make() -> Call:
        weight = one.weight.to(one.x.dtype, copy=True)
        return lambda: F.linear(one.x, weight)

    return over(one.copies, make)


def problem(name: str, rows: int, wide: int, narrow: int, dtype: torch.dtype) -> Problem:
    one = layer(FORMATS[name], rows, wide, narrow, dtype)
    tolerance = registered.OPS["quantized_linear"].tolerance[dtype]

    def expected() -> Tensor:
        form = one.format
        found: Tensor = torch.ops.tilewright.quantized_linear(
            one.x.double(),
            one.packed[:1],
            one.packed[1:],
            [],
            [None],
            rows=[narrow],
            format=form.text(),
        )
        return found

    # A code of x that falls the other way is worth one step of it.
    bound = Bound(0.02, largest=True) if one.format.activations else Bound(4 * tolerance.atol, 4 * tolerance.rtol)
    few = rows <= FEW
    return Problem(
        "ours",
        [
            Contender("plain", Kind.PEER, make=lambda: plain(one), bound=LOOSE),
            Contender("int4pack", Kind.PEER, make=lambda: int4pack(one), bound=Bound(0.02, largest=True)),
            Contender("int8pack", Kind.PEER, make=lambda: int8pack(one), bound=Bound(0.02, largest=True)),
            Contender("torchao", Kind.PEER, make=lambda: torchao(one), bound=LOOSE),
            Contender("ours", Kind.OURS, make=lambda: ours(one)),
        ],
        expected,
        bound,
        bytes=one.copies * one.size,
        flops=one.copies * 2 * rows * wide * narrow,
        traffic="read",
        dtype=dtype_name(dtype) if not one.format.activations else "int8",
        items=one.copies,
        item="layers",
        note=f"{one.copies} copies of the weight, one after the other" if few else "",
    )


def cases() -> list[Case]:
    found = []
    shapes = [(4096, 4096), *SMOLLM2]
    for name, wide, narrow in [(n, *s) for s in shapes for n in FORMATS]:
        small = (wide, narrow) != (4096, 4096)
        for rows in (1, 512) if small else (1, 4, 16, 512):
            if small and (name not in ("w8-row", "w4-32", "w4a8-32") or (rows == 512 and narrow > 8192)):
                continue
            for dtype in (torch.float32, torch.bfloat16):
                if dtype is torch.float32 and rows == 512 and not small and name not in ("w4-32", "w8a8-row"):
                    continue
                found.append(
                    Case(
                        f"{name}/{dtype_name(dtype)}/{rows}/{wide}x{narrow}",
                        {"format": name, "dtype": dtype_name(dtype), "rows": rows, "in": wide, "out": narrow},
                        functools.partial(problem, name, rows, wide, narrow, dtype),
                        quick=(wide, dtype, rows) == (4096, torch.bfloat16, 1) and name in ("w8-row", "w4-32"),
                        limits=Limits(seconds=4.0, least_rounds=5, most_rounds=15),
                    )
                )
    return found


SUITE = Suite(
    "quantized_linear",
    "Linear layers with packed weights of 8, 4, 3 and 2 bits: rows of x from 1 to 512.",
    cases,
    headline=("*/bfloat16/1/4096x4096", "*/bfloat16/512/4096x4096"),
    plot_panels=("dtype", "rows"),
)
