"""Which Triton kernel a call of an op on packed weights gets."""

from __future__ import annotations

import functools

from torch import Tensor

from ...codegen.quantized_triton import QuantizedLinearTritonSpec, tiles
from ...codegen.spec import SpecError
from ...codegen.weight_format import WeightFormat
from ..errors import UnsupportedKernel
from .attention_kernel import large_shared_memory
from .native import DTYPE_NAMES

DEVICES = {"triton": "cuda", "triton-interpret": "cpu"}


def check(name: str, target: str, fmt: WeightFormat, **tensors: Tensor | None) -> None:
    """Raise :class:`UnsupportedKernel` unless the op ``name`` has a kernel for these tensors and their format."""
    for key, tensor in tensors.items():
        if tensor is not None and tensor.device.type != DEVICES[target]:
            raise UnsupportedKernel(f"{target} kernels take {DEVICES[target]} tensors, and {key} is on {tensor.device}")
    if fmt.layout != "plain":
        raise UnsupportedKernel(f"{name}: Triton kernels read the layout 'plain', not {fmt.layout!r}")


def linear_spec(x: Tensor, fmt: WeightFormat, activation: str, gated: bool, target: str) -> QuantizedLinearTritonSpec:
    """The kernels of ``quantized_linear`` for x, with the tiles shipped for its device.

    Raises :class:`UnsupportedKernel` with the reason when there are none.
    """
    if x.dtype not in DTYPE_NAMES:
        found = str(x.dtype).removeprefix("torch.")
        raise UnsupportedKernel(f"quantized_linear kernels compute float32, bfloat16 and float16, and x is {found}")
    large = target == "triton" and large_shared_memory(x.device)
    return _linear_spec(DTYPE_NAMES[x.dtype], fmt, activation, gated, large)


@functools.lru_cache(maxsize=1024)
def _linear_spec(dtype: str, fmt: WeightFormat, activation: str, gated: bool, large: bool) -> QuantizedLinearTritonSpec:
    try:
        chosen = QuantizedLinearTritonSpec(
            dtype=dtype,
            bits=fmt.bits,
            group=fmt.group,
            zero=fmt.zero,
            scales=fmt.scales,
            activations=fmt.activations,
            weights=fmt.kind,
            activation=activation,
            gated=gated,
        )
        return tiles(chosen, large=large)
    except SpecError as error:
        raise UnsupportedKernel(str(error)) from error
