"""Specs of the gate of a gated MLP, ``act(gate) * up``, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .norm import CPP_TYPES, used_dtypes
from .spec import DTYPES, KernelSpec, require_choice

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "sigmoid")


@dataclass(frozen=True)
class _GatedSpec(KernelSpec):
    """gate_dtype, up_dtype: of the operands. out_dtype: of the product (backward: of its gradient).

    activation: one of ``ACTIVATIONS``, computed in float32.
    """

    gate_dtype: str = "float32"
    up_dtype: str = "float32"
    out_dtype: str = "float32"
    activation: str = "silu"

    def check(self) -> None:
        for name in ("gate_dtype", "up_dtype", "out_dtype"):
            require_choice(name, getattr(self, name), DTYPES)
        require_choice("activation", self.activation, ACTIVATIONS)

    def context(self, target: str) -> dict[str, Any]:
        return {"types": CPP_TYPES, "dtypes": used_dtypes(self.gate_dtype, self.up_dtype, self.out_dtype)}


@dataclass(frozen=True)
class GatedSpec(_GatedSpec):
    """``act(gate)`` rounded to the gate's dtype, times up, rounded to out_dtype."""

    kind: ClassVar[str] = "gated_mlp"
    templates: ClassVar[dict[str, str]] = {"cpp": "cpp/gated_mlp.cpp.jinja"}


@dataclass(frozen=True)
class GatedBackwardSpec(_GatedSpec):
    """The gradients of gate and up, each rounded once, to its dtype."""

    kind: ClassVar[str] = "gated_mlp_backward"
    templates: ClassVar[dict[str, str]] = {"cpp": "cpp/gated_mlp_backward.cpp.jinja"}
