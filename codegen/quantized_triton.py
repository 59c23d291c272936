"""Specs of the Triton kernels of linear layers with packed weights, and what their template needs besides.

Bytes of a unit of 32 columns hold *parts*: byte i has column i in its low bits, then column i + 16 (4 bits), or i + 8,
i + 16, i + 24 (2 and 3 bits). A tile of bytes is one tile of columns a part, and x is read at the very columns of a
part, so that codes never move between threads.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from .linear import ACTIVATIONS
from .spec import DTYPES, KernelSpec, require, require_choice, require_power_of_two
from .weight_format import KINDS, UNIT, WeightFormat

FEW = 16
"""Rows of x up to which the columns are shared among programs where those of a tile would leave a GPU idle."""
MAX_SPLITS = 16
VECTOR_BYTES = {8: 256, 4: 256, 3: 128, 2: 128}
"""Bytes of a row of codes that a program reads at a time for one row of x: whole cache lines."""
_POINTER = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}


@dataclass(frozen=True)
class QuantizedLinearTritonSpec(KernelSpec):
    """``act(x W^T + b)``, times a second product when ``gated``, plus a residual; W in the layout ``plain``.

    dtype: of x, bias, residual and the result; sums are float32. bits, group, zero, scales, activations, weights: those
    of the weights' :class:`~.weight_format.WeightFormat` (its ``kind`` is ``weights`` here). block_m, block_n, block_k:
    rows of x, rows of W and columns in a tile of the kernel for many rows of x, which num_warps and num_stages are of.
    """

    kind: ClassVar[str] = "quantized_linear_triton"
    templates: ClassVar[dict[str, str]] = {"triton": "triton/quantized_linear.py.jinja"}

    dtype: str = "float32"
    bits: int = 4
    group: int = 0
    zero: str = "middle"
    scales: str = "float16"
    activations: int = 0
    weights: str = "int"
    activation: str = "none"
    gated: bool = False
    block_m: int = 64
    block_n: int = 64
    block_k: int = 128
    num_warps: int = 4
    num_stages: int = 2

    def check(self) -> None:
        require_choice("dtype", self.dtype, DTYPES)
        require_choice("activation", self.activation, ACTIVATIONS)
        require_choice("weights", self.weights, KINDS)
        require(isinstance(self.gated, bool), f"gated is {self.gated!r}, but must be True or False")
        WeightFormat(self.bits, self.group, self.zero, self.scales, self.activations, kind=self.weights)
        require_power_of_two("block_m", self.block_m, 16, 256)
        require_power_of_two("block_n", self.block_n, 16, 256)
        require_power_of_two("block_k", self.block_k, least_columns(self), 512)
        require_power_of_two("num_warps", self.num_warps, 1, 16)
        require(
            isinstance(self.num_stages, int) and 1 <= self.num_stages <= 6,
            f"num_stages is {self.num_stages}, but must be from 1 to 6",
        )

    def context(self, target: str) -> dict[str, Any]:
        parts = parts_of(self.bits)
        vector = VECTOR_BYTES[self.bits] * parts
        return {
            "parts": parts,
            "part": UNIT // parts,
            "unit_bytes": 4 * self.bits,
            "middle": 2 ** (self.bits - 1),
            # Sums of integers: codes and x both small integers. Else codes become numbers of x's dtype.
            "integers": bool(self.activations) and self.weights == "int",
            # A scale of a whole row goes into the finished sum.
            "whole": not self.group and (self.zero != "offset" or integers(self)),
            "span": span(self.group, self.block_k),
            "few_m": FEW,
            "few_n": few_rows(self),
            "max_splits": MAX_SPLITS,
            "vector_k": vector,
            "vector_span": span(self.group, vector),
            "weight_names": ("", "_2") if self.gated else ("",),
            "compile_entries": entries(self),
        }

    def candidates(self, target: str) -> list[QuantizedLinearTritonSpec]:
        """The spec, then a few with other tiles."""
        found = [self]
        tried: list[dict[str, Any]] = [
            {"block_m": min(256, self.block_m * 2), "num_warps": min(8, self.num_warps * 2)},
            {"block_n": max(16, self.block_n // 2)},
            {"block_k": min(256, self.block_k * 2), "num_stages": max(1, self.num_stages - 1)},
            {"num_stages": min(6, self.num_stages + 1)},
        ]
        for changes in tried:
            if (other := dataclasses.replace(self, **changes)) not in found:
                found.append(other)
        return found


def integers(spec: QuantizedLinearTritonSpec) -> bool:
    """Whether products are of integers."""
    return bool(spec.activations) and spec.weights == "int"


def parts_of(bits: int) -> int:
    """Columns that share a byte (the one with the low bits, of 3)."""
    return {8: 1, 4: 2, 3: 4, 2: 4}[bits]


def least_columns(spec: QuantizedLinearTritonSpec) -> int:
    """The least ``block_k``: products of matrices take 16 terms, of integers 32, and units are whole."""
    return max(UNIT, (32 if integers(spec) else 16) * parts_of(spec.bits))


def span(group: int, columns: int) -> int:
    """Columns, of so many that begin at a multiple of themselves, that surely share a scale."""
    return math.gcd(columns, group) if group else columns


def few_rows(spec: QuantizedLinearTritonSpec) -> int:
    """Rows of W in a tile for few rows of x."""
    return 32 if spec.dtype == "float32" or spec.gated else 64


def tiles(spec: QuantizedLinearTritonSpec, *, large: bool) -> QuantizedLinearTritonSpec:
    """The spec with the tile shipped for it. large: as in attention.default_tiles."""
    least = least_columns(spec)
    if spec.dtype == "float32" and not integers(spec):
        # Without tensor cores a product is unrolled: half the tile, and hardly anything to wait for.
        return dataclasses.replace(spec, block_m=32, block_n=32, block_k=max(32, least), num_warps=4, num_stages=2)
    # Four columns a byte: 128 of them spill registers at 2 bits, and at 3 bits beside their zeros.
    wide = spec.bits == 3 and spec.zero == "middle"
    block_k = max(128 if wide or (integers(spec) and not 0 < spec.group < 128) else 64, least)
    # Products by group, where a tile has several, are held at once: in tensor memory, of which there is little.
    block_m = 64 if spec.gated or (integers(spec) and span(spec.group, block_k) < block_k) else 128
    # Sums of integers and of their products with scales are held at once.
    block_n = 64 if not large or spec.gated or integers(spec) else 128
    return dataclasses.replace(
        spec,
        block_m=block_m,
        block_n=block_n,
        block_k=block_k,
        num_warps=8 if large else 4,
        num_stages=3 if large else 2,
    )


def entries(spec: QuantizedLinearTritonSpec) -> list[dict[str, Any]]:
    """How each kernel is compiled with no GPU, see the text's ``COMPILE``: every operand there, sums shared or not."""
    element, scale = _POINTER[spec.dtype], "*fp16" if spec.scales == "float16" else "*fp32"
    x = {"x": "*i8", "steps": "*fp32"} if spec.activations else {"x": element}
    weight: dict[str, str] = {}
    biases: dict[str, str] = {}
    for name in ("", "_2") if spec.gated else ("",):
        weight |= {f"codes{name}": "*u8", f"scale{name}": scale}
        if spec.zero != "middle":
            weight[f"zero{name}"] = "*u8" if spec.zero == "point" else scale
        biases[f"bias{name}"] = element
    sizes = ["M", "N", "K"]
    ends = biases | {"residual": element, "out": element}
    strides = {"residual_row": "i32", "out_row": "i32"}
    found = []
    if spec.activations:
        arguments = {"x": element, "rounded": "*i8", "steps": "*fp32", "K": "i32", "x_row": "i32"}
        found.append(launch_entry("round_rows", arguments, {"BLOCK": 1024}, [], 4, 1))
    common = x | weight | ends | dict.fromkeys(sizes, "i32") | {"x_row": "i32"} | strides
    found.append(launch_entry("vector", common, {"BLOCK_N": 16}, ["M", "N"], 4, spec.num_stages))
    tile = {"BLOCK_M": spec.block_m, "BLOCK_N": spec.block_n, "PARTIAL": False}
    common |= {"splits": "i32"}
    found.append(launch_entry("tiles", common, tile, ["M", "N", "splits"], spec.num_warps, spec.num_stages))
    split = {"BLOCK_M": FEW, "BLOCK_N": few_rows(spec), "PARTIAL": True}
    sums = common | {"out": "*fp32"}
    found.append(launch_entry("tiles", sums, split, ["M", "N", "splits"], 4, spec.num_stages))
    merge = {"sums": "*fp32"} | ends | {"M": "i32", "N": "i32"} | strides | {"splits": "i32"}
    found.append(launch_entry("merge", merge, {"BLOCK": 512}, ["M", "N", "splits"], 4, 1))
    return found


def launch_entry(
    kernel: str,
    arguments: dict[str, str],
    constants: dict[str, Any],
    unaligned: list[str],
    num_warps: int,
    num_stages: int,
) -> dict[str, Any]:
    """A row of the text's ``COMPILE``. constants: those of a launch that are no arguments' types."""
    return {
        "kernel": kernel,
        "signature": arguments | dict.fromkeys(constants, "constexpr"),
        "constexprs": dict(constants),
        "num_warps": num_warps,
        "num_stages": num_stages,
        "unaligned": list(unaligned),
    }
