"""Specs of the normalisations of rows: rms_norm and layer_norm, with or without a residual added first; and backward.

Sizes, strides, eps and the offset of the weight are arguments of a launch; only dtypes and what is present decide the
text. One template serves both, because they differ in the mean alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .spec import DTYPES, KernelSpec, require, require_choice

CPP_TYPES = {"float32": "float", "bfloat16": "bfloat16", "float16": "float16"}


def require_flags(spec: KernelSpec, *names: str) -> None:
    """Raise SpecError unless each of these fields is True or False."""
    for name in names:
        value = getattr(spec, name)
        require(isinstance(value, bool), f"{name} is {value!r}, but must be True or False")


def used_dtypes(*dtypes: str) -> list[str]:
    """The dtypes among ``dtypes``, each once, in the order of ``DTYPES``; "none" is none of them."""
    return [dtype for dtype in DTYPES if dtype in dtypes]


@dataclass(frozen=True)
class _NormSpec(KernelSpec):
    """What forward and backward share.

    in_dtype: of x, of the residual and of their sum. out_dtype: of the result (backward: of its gradient).
    weight, bias: ``"none"`` or their dtype. centred: layer_norm, else rms_norm.
    round_before_weight: the normalised row is rounded to in_dtype before the weight multiplies it.
    offset: whether a number is added to the weight.
    """

    in_dtype: str = "float32"
    out_dtype: str = "float32"
    weight: str = "float32"
    bias: str = "none"
    centred: bool = False
    round_before_weight: bool = False
    offset: bool = False

    def check(self) -> None:
        require_choice("in_dtype", self.in_dtype, DTYPES)
        require_choice("out_dtype", self.out_dtype, DTYPES)
        require_choice("weight", self.weight, ("none", *DTYPES))
        require_choice("bias", self.bias, ("none", *DTYPES))
        require_flags(self, "centred", "round_before_weight", "offset")
        require(self.bias == "none" or self.centred, "bias belongs to layer_norm: centred must be True")
        rounds = self.round_before_weight
        require(not rounds or not self.centred, "round_before_weight belongs to rms_norm: centred must be False")
        require(not rounds or self.weight != "none", "round_before_weight needs a weight")
        weighted = self.weight != "none" and not self.centred
        require(weighted or not self.offset, "offset needs the weight of rms_norm")

    def context(self, target: str) -> dict[str, Any]:
        return {
            "types": CPP_TYPES,
            "dtypes": used_dtypes(self.in_dtype, self.out_dtype, self.weight, self.bias, "float32"),
        }


@dataclass(frozen=True)
class NormSpec(_NormSpec):
    """rms_norm or layer_norm of x, or of ``x + residual`` rounded to in_dtype.

    residual: whether one is added. keep_sum: whether the sum is a second result.
    """

    kind: ClassVar[str] = "norm"
    templates: ClassVar[dict[str, str]] = {"cpp": "cpp/norm.cpp.jinja"}

    residual: bool = False
    keep_sum: bool = False

    def check(self) -> None:
        super().check()
        require_flags(self, "residual", "keep_sum")
        require(self.residual or not self.keep_sum, "keep_sum needs a residual")
        # The result's rows hold the sum until it is normalised.
        wide = self.out_dtype in (self.in_dtype, "float32")
        require(wide, f"out_dtype is {self.out_dtype}, but must be float32 or {self.in_dtype} as in_dtype")


@dataclass(frozen=True)
class NormBackwardSpec(_NormSpec):
    """The gradients of NormSpec's result with respect to x (or the sum), weight and bias.

    extra: whether another gradient of the sum (of its second use) is added to x's.
    """

    kind: ClassVar[str] = "norm_backward"
    templates: ClassVar[dict[str, str]] = {"cpp": "cpp/norm_backward.cpp.jinja"}

    extra: bool = False

    def check(self) -> None:
        super().check()
        require_flags(self, "extra")
