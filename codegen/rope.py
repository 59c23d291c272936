"""Spec of rotary position embedding, forward and, with ``transposed``, the gradient of x."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .norm import CPP_TYPES, require_flags, used_dtypes
from .spec import DTYPES, KernelSpec, require_choice

LAYOUTS = ("rotate_half", "interleaved")


@dataclass(frozen=True)
class RopeSpec(KernelSpec):
    """``x * cos + rotate(x) * sin`` over the last dimension; sizes and strides are arguments of a launch.

    in_dtype: of x. angle_dtype: of cos and sin. out_dtype: of the result; products and sum are rounded to
    ``product_dtype``. layout: which elements are a pair. transposed: ``x * cos + rotate^T(x * sin)``, the gradient.
    """

    kind: ClassVar[str] = "rope"
    templates: ClassVar[dict[str, str]] = {"cpp": "cpp/rope.cpp.jinja"}

    in_dtype: str = "float32"
    angle_dtype: str = "float32"
    product_dtype: str = "float32"
    out_dtype: str = "float32"
    layout: str = "rotate_half"
    transposed: bool = False

    def check(self) -> None:
        for name in ("in_dtype", "angle_dtype", "product_dtype", "out_dtype"):
            require_choice(name, getattr(self, name), DTYPES)
        require_choice("layout", self.layout, LAYOUTS)
        require_flags(self, "transposed")

    def context(self, target: str) -> dict[str, Any]:
        dtypes = used_dtypes(self.in_dtype, self.angle_dtype, self.product_dtype, self.out_dtype)
        return {"types": CPP_TYPES, "dtypes": dtypes}
