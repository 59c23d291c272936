"""Specs of linear layers with what follows them (native CPU only)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .spec import DTYPES, KernelSpec, require, require_choice

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "silu", "relu", "sigmoid")
MOST_WEIGHTS = 8


@dataclass(frozen=True)
class LinearSpec(KernelSpec):
    """``act(x W^T + b)``, times a second product when ``gated``, plus a residual; several weights in one call.

    dtype: of x, weights, bias, residual and the result; sums are float32. Sizes, strides and whether there is a bias or
    a residual are known at run time.
    """

    kind: ClassVar[str] = "linear"
    templates: ClassVar[dict[str, str]] = {"cpp": "cpp/linear.cpp.jinja"}

    dtype: str = "float32"
    activation: str = "none"
    gated: bool = False

    def check(self) -> None:
        require_choice("dtype", self.dtype, DTYPES)
        require_choice("activation", self.activation, ACTIVATIONS)
        require(isinstance(self.gated, bool), f"gated is {self.gated!r}, but must be True or False")

    def context(self, target: str) -> dict[str, Any]:
        return {"few": 4}
