"""Specs of look-ups in a table whose rows are packed low-bit codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .norm import CPP_TYPES, used_dtypes
from .quantized_triton import launch_entry, parts_of, span
from .spec import DTYPES, KernelSpec, require, require_choice
from .weight_format import KINDS, LAYOUTS, UNIT, WeightFormat

_POINTER = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
BYTES = 128
"""Bytes of a row of codes that a program of the Triton kernel unpacks at a time."""


@dataclass(frozen=True)
class QuantizedEmbeddingSpec(KernelSpec):
    """Rows of a table, dequantized: computed in float32 and rounded to ``dtype`` once.

    bits, group, zero, scales, layout, weights: those of the table's :class:`~.weight_format.WeightFormat` (its ``kind``
    is ``weights`` here). Triton reads the layout ``plain``; C++ reads both, and integers only.
    """

    kind: ClassVar[str] = "quantized_embedding"
    templates: ClassVar[dict[str, str]] = {
        "cpp": "cpp/quantized_embedding.cpp.jinja",
        "triton": "triton/quantized_embedding.py.jinja",
    }

    dtype: str = "float32"
    bits: int = 4
    group: int = 0
    zero: str = "middle"
    scales: str = "float16"
    layout: str = "plain"
    weights: str = "int"

    def check(self) -> None:
        require_choice("dtype", self.dtype, DTYPES)
        require_choice("layout", self.layout, LAYOUTS)
        require_choice("weights", self.weights, KINDS)
        WeightFormat(self.bits, self.group, self.zero, self.scales, layout=self.layout, kind=self.weights)

    def context(self, target: str) -> dict[str, Any]:
        common = {"middle": 2 ** (self.bits - 1), "unit_bytes": 4 * self.bits}
        if target == "cpp":
            require(self.weights == "int", f"native kernels read integer codes, not {self.weights}")
            return common | {"types": CPP_TYPES, "dtypes": used_dtypes("float32", self.dtype, self.scales)}
        require(self.layout == "plain", f"Triton kernels read the layout 'plain', not {self.layout!r}")
        parts = parts_of(self.bits)
        scale = "*fp16" if self.scales == "float16" else "*fp32"
        arguments = {"ids": "*i64", "codes": "*u8", "scale": scale}
        if self.zero != "middle":
            arguments["zero"] = "*u8" if self.zero == "point" else scale
        arguments |= {"out": _POINTER[self.dtype], "rows": "i32", "K": "i32"}
        columns = BYTES * parts
        return common | {
            "parts": parts,
            "part": UNIT // parts,
            "integers": False,
            "columns": columns,
            "bytes": BYTES,
            "span": span(self.group, columns),
            "compile_entries": [launch_entry("look_up", arguments, {}, ["rows"], 4, 1)],
        }
