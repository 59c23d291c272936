"""Specs of linear layers whose weights are packed low-bit codes, and of what follows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from . import weight_format
from .linear import ACTIVATIONS, MOST_WEIGHTS
from .spec import DTYPES, KernelSpec, require, require_choice

FEW = 8
"""Rows of x up to which the native kernel reads a weight's codes once and multiplies them by all rows."""
NORMS = ("none", "wide", "rounded")


@dataclass(frozen=True)
class QuantizedLinearSpec(KernelSpec):
    """``act(x W^T + b)``, times a second product when ``gated``, plus a residual; several weights in one call.

    dtype: of x, bias, residual and the result; sums are float32. bits, group, zero, scales, activations: those of the
    weights' :class:`~.weight_format.WeightFormat`. norm: RMS normalisation of x before all: ``rounded`` to dtype
    before its weight, ``wide`` after it alone. Sizes, and whether there is a bias or a residual, are known at run time.
    """

    kind: ClassVar[str] = "quantized_linear"
    templates: ClassVar[dict[str, str]] = {"cpp": "cpp/quantized_linear.cpp.jinja"}

    dtype: str = "float32"
    bits: int = 4
    group: int = 0
    zero: str = "middle"
    scales: str = "float16"
    activations: int = 0
    activation: str = "none"
    gated: bool = False
    norm: str = "none"

    def check(self) -> None:
        require_choice("dtype", self.dtype, DTYPES)
        require_choice("activation", self.activation, ACTIVATIONS)
        require_choice("norm", self.norm, NORMS)
        require(isinstance(self.gated, bool), f"gated is {self.gated!r}, but must be True or False")
        weight_format.WeightFormat(self.bits, self.group, self.zero, self.scales, self.activations)

    def context(self, target: str) -> dict[str, Any]:
        if target != "cpp":
            return {}
        require(self.dtype != "float16", "native kernels of quantized_linear compute float32 and bfloat16, not float16")
        dtypes = {"float32": None, self.dtype: None, self.scales: None}
        return {"few": FEW, "most": MOST_WEIGHTS, "dtypes": list(dtypes)}
