"""Codes of quantized weights: packing, the two layouts, and the way back to numbers. Plain torch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ...codegen.weight_format import PANEL, UNIT, WeightFormat


def pack(codes: Tensor, fmt: WeightFormat) -> Tensor:
    """Codes (N, K), integers below 2^bits, to bytes in ``fmt``'s layout (see ``codegen.weight_format``), uint8."""
    rows, columns = codes.shape
    units = -(-columns // UNIT)
    codes = functional.pad(codes.to(torch.uint8), (0, units * UNIT - columns))
    if fmt.layout == "panels":
        codes = functional.pad(codes, (0, 0, 0, -rows % PANEL))
        return _pack_panels(codes.reshape(-1, PANEL, units, UNIT), fmt.bits)
    codes = codes.reshape(rows, units, UNIT)
    if fmt.bits == 3:
        packed = torch.cat([_join(codes & 3, 2, 8), _join(codes >> 2, 1, 4)], -1)
    else:
        packed = _join(codes, fmt.bits, 4 * fmt.bits)
    return packed.flatten(1)


def unpack(codes: Tensor, fmt: WeightFormat, rows: int, columns: int) -> Tensor:
    """The codes (N, K), uint8, of bytes in ``fmt``'s layout: undoes :func:`pack`. Any leading rows or panels do."""
    if fmt.layout == "panels":
        found = _unpack_panels(codes, fmt.bits)
        return found[:rows, :columns]
    units = codes.reshape(rows, codes.shape[1] // (4 * fmt.bits), 4 * fmt.bits)
    if fmt.bits == 3:
        found = _split(units[..., :8], 2) | _split(units[..., 8:], 1) << 2
    else:
        found = _split(units, fmt.bits)
    return found.flatten(1)[:, :columns]


def dequantize(
    codes: Tensor, scale: Tensor, zero: Tensor | None, fmt: WeightFormat, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """The weight (N, K): computed in float32 (float64 for float64) and rounded to ``dtype``."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    integers = unpack(codes, fmt, rows, columns)
    scale, zero = by_rows(scale, fmt, rows), None if zero is None else by_rows(zero, fmt, rows)
    return numbers(integers, scale, zero, fmt, wide).to(dtype)


def take(
    codes: Tensor, scale: Tensor, zero: Tensor | None, fmt: WeightFormat, ids: Tensor, columns: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rows ``ids`` (n,): codes (n, columns), scale and zero (n, G). IndexError for ids beyond them."""
    if fmt.layout == "plain":
        integers = unpack(codes.index_select(0, ids), fmt, ids.shape[0], columns)
        return integers, scale.index_select(0, ids), None if zero is None else zero.index_select(0, ids)
    panels, lanes = ids // PANEL, ids % PANEL
    place = torch.arange(ids.shape[0], device=ids.device)
    words = codes.reshape(*codes.shape[:2], fmt.bits, PANEL, 4).index_select(0, panels)[place, :, :, lanes]
    integers = _unpack_panels(words.flatten(2), fmt.bits, 1)[:, :columns]

    def taken(numbers: Tensor) -> Tensor:
        return numbers.index_select(0, panels)[place, :, lanes]

    return integers, taken(scale), None if zero is None else taken(zero)


def numbers(integers: Tensor, scale: Tensor, zero: Tensor | None, fmt: WeightFormat, dtype: torch.dtype) -> Tensor:
    """Codes (N, K) with scale and zero (N, G) as numbers, computed in ``dtype``."""
    columns = integers.shape[1]
    scale = _spread(scale.to(dtype), fmt, columns)
    if fmt.kind != "int":
        return integers.view(torch.float8_e4m3fn).to(dtype) * scale
    if fmt.zero == "middle" or zero is None:
        return (integers.to(dtype) - fmt.middle) * scale
    zero = _spread(zero.to(dtype), fmt, columns)
    return (integers.to(dtype) - zero) * scale if fmt.zero == "point" else integers.to(dtype) * scale + zero


def by_rows(numbers: Tensor, fmt: WeightFormat, rows: int) -> Tensor:
    """Scales or zeros as (N, G), whatever the layout."""
    if fmt.layout == "plain":
        return numbers
    return numbers.transpose(1, 2).reshape(-1, numbers.shape[1])[:rows]


def to_layout(
    codes: Tensor, scale: Tensor, zero: Tensor | None, fmt: WeightFormat, rows: int, columns: int, layout: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same weight in another layout: a permutation of bits, nothing is rounded."""
    if layout == fmt.layout:
        return codes, scale, zero
    changed = fmt.changed(layout=layout)
    packed = pack(unpack(codes, fmt, rows, columns), changed)

    def moved(numbers: Tensor) -> Tensor:
        numbers = by_rows(numbers, fmt, rows)
        if layout == "plain":
            return numbers.contiguous()
        padded = functional.pad(numbers, (0, 0, 0, -rows % PANEL))
        return padded.reshape(-1, PANEL, padded.shape[1]).transpose(1, 2).contiguous()

    return packed, moved(scale), None if zero is None else moved(zero)


def _spread(numbers: Tensor, fmt: WeightFormat, columns: int) -> Tensor:
    if not fmt.group:
        return numbers
    # Not repeat_interleave and not expand: where columns are no multiple of the group, Inductor's vectors (torch 2.13,
    # CPU) then read beyond what is there.
    return numbers.index_select(1, torch.arange(columns, device=numbers.device) // fmt.group)


def _join(codes: Tensor, bits: int, size: int) -> Tensor:
    """(..., size * 8 / bits) codes to ``size`` bytes: part p of the codes at bits p * bits of all bytes."""
    if bits == 8:
        return codes
    packed = codes[..., :size].clone()
    for place in range(1, 8 // bits):
        packed |= codes[..., place * size : (place + 1) * size] << (bits * place)
    return packed


def _split(packed: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return packed
    return torch.cat([packed >> (bits * place) & (2**bits - 1) for place in range(8 // bits)], -1)


def _pack_panels(codes: Tensor, bits: int) -> Tensor:
    """(P, 16, U, 32) codes to (P, U, 64 * bits) bytes."""
    panels, _, units, _ = codes.shape
    codes = codes.permute(0, 2, 3, 1).reshape(panels, units, 8, 4, PANEL)  # ..., column / 4, column % 4, row
    if bits == 3:
        packed = torch.cat([_vectors(codes & 3, 2), _vectors(codes >> 2, 1)], 2)
    else:
        packed = _vectors(codes, bits)
    return packed.transpose(3, 4).reshape(panels, units, 64 * bits).contiguous()


def _vectors(codes: Tensor, bits: int) -> Tensor:
    """(P, U, 8, 4, 16) codes to (P, U, bits, 4, 16) bytes: 8 / bits neighbours of dimension 2 share a byte."""
    share = codes.unflatten(2, (bits, 8 // bits))
    packed = share[:, :, :, 0].clone()
    for place in range(1, 8 // bits):
        packed |= share[:, :, :, place] << (bits * place)
    return packed


def _unpack_panels(packed: Tensor, bits: int, lanes: int = PANEL) -> Tensor:
    """(P, U, lanes * 4 * bits) bytes to (P * lanes, U * 32) codes."""
    panels, units, _ = packed.shape
    packed = packed.reshape(panels, units, bits, lanes, 4).transpose(3, 4)
    if bits == 3:
        codes = _unvectors(packed[:, :, :2], 2) | _unvectors(packed[:, :, 2:], 1) << 2
    else:
        codes = _unvectors(packed, bits)
    return codes.reshape(panels, units * UNIT, lanes).transpose(1, 2).reshape(panels * lanes, units * UNIT)


def _unvectors(packed: Tensor, bits: int) -> Tensor:
    parts = [packed >> (bits * place) & (2**bits - 1) for place in range(8 // bits)]
    return torch.stack(parts, 3).flatten(2, 3)
