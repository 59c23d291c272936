"""Rows of a table that is kept in packed low-bit codes, as ``torch.nn.functional.embedding``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...codegen.quantized_embedding import QuantizedEmbeddingSpec
from ...codegen.weight_format import parse_weight_format
from .. import fast_call
from ..errors import BadArgument, UnsupportedKernel
from ..load import load
from . import quantized_triton, quantized_weight
from .native import DTYPE_NAMES
from .registry import LIBRARY, Tolerance, canonical


def reference(
    ids: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    *,
    rows: int,
    columns: int,
    format: str,
    dtype: torch.dtype,
) -> Tensor:
    """The rows ``ids`` of a table (rows, columns), dequantized.

    ids: integers of any shape, 0 .. rows - 1. codes, scale, zero: as ``format`` says (:mod:`codegen.weight_format`).
    Returns (*ids.shape, columns) of ``dtype``. Raises IndexError for ids out of range, as torch does.
    """
    fmt = parse_weight_format(format)
    integers, scale, zero = quantized_weight.take(codes, scale, zero, fmt, ids.reshape(-1), columns)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return quantized_weight.numbers(integers, scale, zero, fmt, wide).to(dtype).reshape(*ids.shape, columns)


def _composite(
    ids: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    *,
    rows: int,
    columns: int,
    format: str,
    dtype: torch.dtype,
    target: str = "reference",
) -> Tensor:
    if target == "reference":
        return reference(ids, codes, scale, zero, rows=rows, columns=columns, format=format, dtype=dtype)
    return torch.ops.tilewright.quantized_embedding_forward(
        ids, codes, scale, zero, rows, columns, format, dtype, target
    )


def spec(
    ids: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    *,
    rows: int,
    columns: int,
    format: str,
    dtype: torch.dtype,
    target: str = "cpp",
) -> QuantizedEmbeddingSpec:
    """The kernel for a call. Raises :class:`~tilewright.runtime.errors.UnsupportedKernel` when there is none."""
    fmt = parse_weight_format(format)
    tensors = {"ids": ids, "codes": codes, "scale": scale, "zero": zero}
    if target in quantized_triton.DEVICES:
        quantized_triton.check("quantized_embedding", target, fmt, **tensors)
    elif target != "cpp" or any(t is not None and t.device.type != "cpu" for t in tensors.values()):
        raise UnsupportedKernel(f"quantized_embedding has no kernel for target {target!r} on {codes.device}")
    elif fmt.kind != "int":
        raise UnsupportedKernel(f"quantized_embedding: native kernels have no {fmt.kind} weights")
    if dtype not in DTYPE_NAMES:
        found = str(dtype).removeprefix("torch.")
        raise UnsupportedKernel(f"quantized_embedding kernels give float32, bfloat16 and float16, not {found}")
    return QuantizedEmbeddingSpec(
        DTYPE_NAMES[dtype], fmt.bits, fmt.group, fmt.zero, fmt.scales, fmt.layout, weights=fmt.kind
    )


LIBRARY.define(
    "quantized_embedding_forward(Tensor ids, Tensor codes, Tensor scale, Tensor? zero, int rows, int columns, "
    "str format, ScalarType dtype, str target) -> Tensor"
)


def _launch(
    ids: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    rows: int,
    columns: int,
    format: str,
    dtype: torch.dtype,
    target: str,
) -> Callable[..., Tensor]:
    chosen = spec(ids, codes, scale, zero, rows=rows, columns=columns, format=format, dtype=dtype, target=target)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise BadArgument(f"quantized_embedding: ids are {ids.dtype}, but must be integers")
    wanted = parse_weight_format(format).shapes(rows, columns)
    found = {"codes": codes, "scale": scale} | ({} if zero is None else {"zero": zero})
    given = {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in found.items()}
    if given != wanted:
        raise BadArgument(f"quantized_embedding: a table ({rows}, {columns}) of {format} has {wanted}, not {given}")
    launch = load(chosen, target).launch

    def run(*arguments: Any) -> Tensor:
        # Not the launcher itself: it looks at what the kernel found, which a plan (see fast_call) would not repeat.
        out: Tensor = launch(*arguments)
        return out

    return run


fast_call.implement("quantized_embedding_forward", _launch, passes=("ids", "codes", "scale", "zero", "rows", "columns"))


@torch.library.register_fake("tilewright::quantized_embedding_forward", lib=LIBRARY)
def _fake(
    ids: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    rows: int,
    columns: int,
    format: str,
    dtype: torch.dtype,
    target: str,
) -> Tensor:
    return scale.new_empty((*ids.shape, columns), dtype=dtype)


# A product and a sum in float32, then one rounding.
op = canonical(
    "quantized_embedding(Tensor ids, Tensor codes, Tensor scale, Tensor? zero, *, int rows, int columns, "
    'str format, ScalarType dtype, str target="reference") -> Tensor',
    reference=reference,
    composite=_composite,
    tolerance={
        torch.float64: Tolerance(0.0, 2.0**-51),
        torch.float32: Tolerance(2.0**-24, 2.0**-22),
        torch.bfloat16: Tolerance(2.0**-24, 2.0**-8),
        torch.float16: Tolerance(2.0**-24, 2.0**-10),
    },
    spec=spec,
)
