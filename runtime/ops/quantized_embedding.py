"""Rows of a table that is kept in packed low-bit codes, as ``torch.nn.functional.embedding``."""

from __future__ import annotations

import torch
from torch import Tensor

from ...codegen.weight_format import parse_weight_format
from . import quantized_weight
from .registry import Tolerance, canonical, reference_only


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
    reference_only("quantized_embedding", target)
    return reference(ids, codes, scale, zero, rows=rows, columns=columns, format=format, dtype=dtype)


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
)
