"""Codes of a block of keys or values: quantize and dequantize, with GEAR's outliers and low rank.

A *block* is ``group`` tokens of one head, x (g, D). In this order:

    outliers     the n entries furthest from their vector's mean leave; the mean stands in for them
    ends         of each vector, least and most; at 2 bits both move inwards by INSET of their distance
    codes        offset = least and scale = (most - least) / (2^bits - 1), as float16;
                 code = round((x - offset) / scale)
    low rank     R = x - (scale code + offset), R ~ left right^T by power iteration from a fixed start
    outlier      what is still missing at its place: x - (scale code + offset) - left right^T

A *vector* is what shares a scale: a channel of the block for keys, ``value_group`` channels of a token for values. Keys
per channel and values per token: "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", Liu et al. 2024,
section 3. Low rank and outliers: "GEAR: An Efficient KV Cache Compression Recipe for Near-Lossless Generative Inference
of LLM", Kang et al. 2024, section 3, with these differences: a block has n outliers wherever they are, not the s %
at both ends of each vector; an outlier's value is corrected after the low rank, so that it is exact to float16; the
power iteration starts from fixed signs, so that the same tokens give the same codes on every machine.

Everything is plain torch over leading dimensions, on any device, in float32 (float64 for float64).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...codegen.cache_format import INSET

POWER_STEPS = 4
"""Rounds of the power iteration: a residual of rounding is nearly white, and more gain nothing."""
NEGLIGIBLE = 1e-8
"""A column that lost all but this share of its squared norm to earlier columns is dropped: it is rounding."""
LARGEST = 65504.0
"""The largest float16: scales and offsets are kept within."""


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (..., D), integers of ``bits`` bits, to bytes (..., D * bits / 8), uint8.

    Byte i holds channel i in its lowest bits, then i + n, i + 2n, ... with n = D * bits / 8.
    """
    codes = codes.to(torch.uint8)
    if bits == 8:
        return codes.contiguous()
    packed = torch.zeros_like(codes[..., : codes.shape[-1] * bits // 8])
    for place, part in enumerate(codes.split(packed.shape[-1], dim=-1)):
        packed |= part << (bits * place)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Bytes (..., n), uint8, to codes (..., n * 8 / bits), uint8: undoes :func:`pack`."""
    if bits == 8:
        return packed
    mask = 2**bits - 1
    return torch.cat([(packed >> (bits * place)) & mask for place in range(8 // bits)], dim=-1)


def quantize(
    x: Tensor, bits: int, *, keys: bool, value_group: int = 0, rank: int = 0, outliers: int = 0
) -> dict[str, Tensor]:
    """The parts of blocks x (..., g, D), floating: see the head of this file for the order of things.

    keys: a scale for each channel of a block, else for ``value_group`` channels (0: all) of a token.
    rank, outliers: of GEAR, 0 for none. Returns, in the store's order,

        codes (..., g, D * bits / 8) uint8
        scale, offset float16: (..., D) for keys, else (..., g, D / value_group)
        left (..., g, rank), right (..., D, rank) float16, with a rank
        outlier (..., n) float16, place (..., n) int16: token * D + channel, ascending, with outliers
    """
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    inner, place = x, None
    if outliers:
        place, inner = _leave_out(x, outliers, keys, value_group)
    parts = _codes(inner, bits, keys, value_group)
    rounded = _decode(parts, bits, keys, x.dtype)
    if rank:
        parts["left"], parts["right"] = low_rank(inner - rounded, rank)
        rounded = rounded + _product(parts, x.dtype)
    if place is not None:
        missing = (x - rounded).flatten(-2).gather(-1, place)
        parts["outlier"] = _half(missing)
        parts["place"] = place.to(torch.int16)
    return parts


def dequantize(parts: dict[str, Tensor], bits: int, *, keys: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """Blocks (..., g, D) in ``dtype`` from the parts of :func:`quantize`, computed in float32 (float64 for float64)."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    x = _decode(parts, bits, keys, compute)
    if "left" in parts:
        x = x + _product(parts, compute)
    if "outlier" in parts:
        flat = x.flatten(-2)
        x = flat.scatter_add(-1, parts["place"].long(), parts["outlier"].to(compute)).view_as(x)
    return x.to(dtype)


def low_rank(residual: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """left (..., g, rank) and right (..., D, rank), float16, with residual (..., g, D) ~ left right^T.

    Power iteration as in GEAR's (and PowerSGD's) solver: right starts as fixed signs; ``POWER_STEPS`` times left =
    orthonormal(residual right) by modified Gram-Schmidt and right = residual^T left.
    """
    right = start(residual.shape[-1], rank, residual.device).to(residual.dtype)
    left = residual[..., :rank]
    for _ in range(POWER_STEPS):
        left = _orthonormal(residual @ right)
        right = residual.transpose(-2, -1) @ left
    return _half(left), _half(right)


def start(dim: int, rank: int, device: torch.device | None = None) -> Tensor:
    """The power iteration's start (dim, rank): +1 or -1, by the top bit of a hash of (channel, column) in 32 bits.

    hash = (channel + 1) * 0x9E3779B1 * (2 * column + 3) mod 2^32; its top bit set is -1.
    """
    channel = torch.arange(dim, device=device, dtype=torch.int64)[:, None] + 1
    column = torch.arange(rank, device=device, dtype=torch.int64)[None, :] * 2 + 3
    hashed = ((channel * 0x9E3779B1 & 0xFFFFFFFF) * column) & 0xFFFFFFFF
    return 1 - 2 * (hashed >> 31)


def _orthonormal(columns: Tensor) -> Tensor:
    """Modified Gram-Schmidt over the last dimension; a column that depends on earlier ones becomes zero."""
    done: list[Tensor] = []
    for index in range(columns.shape[-1]):
        column = columns[..., index]
        before = (column * column).sum(-1, keepdim=True)
        for other in done:
            column = column - (other * column).sum(-1, keepdim=True) * other
        square = (column * column).sum(-1, keepdim=True)
        done.append(torch.where(square > NEGLIGIBLE * before, column * square.clamp_min(1e-38).rsqrt(), 0.0))
    return torch.stack(done, dim=-1)


def _leave_out(x: Tensor, count: int, keys: bool, value_group: int) -> tuple[Tensor, Tensor]:
    """Places (..., count), ascending, of the entries furthest from their vector's mean, and x with the mean there.

    The mean is summed in float64 and rounded once, so that its last bit does not hang on the order of summing. Of
    entries equally far the first ones leave.
    """
    vectors, axis = _vectors(x, keys, value_group)
    mean = vectors.double().mean(axis, keepdim=True).to(x.dtype).expand_as(vectors).reshape(x.shape)
    away = (x - mean).abs().flatten(-2)
    place = away.argsort(dim=-1, descending=True, stable=True)[..., :count].sort(dim=-1).values
    flat = x.flatten(-2)
    return place, flat.scatter(-1, place, mean.flatten(-2).gather(-1, place)).view_as(x)


def _codes(x: Tensor, bits: int, keys: bool, value_group: int) -> dict[str, Tensor]:
    vectors, axis = _vectors(x, keys, value_group)
    least, most = vectors.amin(axis, keepdim=True), vectors.amax(axis, keepdim=True)
    inwards = INSET[bits] * (most - least)
    least, most = least + inwards, most - inwards
    top = 2**bits - 1
    scale, offset = _half((most - least) / top), _half(least)
    step = scale.to(x.dtype)
    codes = torch.where(step > 0, (vectors - offset.to(x.dtype)) / step, 0.0).round().clamp(0, top)
    return {
        "codes": pack(codes.reshape(x.shape), bits),
        "scale": scale.squeeze(axis),
        "offset": offset.squeeze(axis),
    }


def _decode(parts: dict[str, Tensor], bits: int, keys: bool, dtype: torch.dtype) -> Tensor:
    codes = unpack(parts["codes"], bits).to(dtype)
    scale, offset = parts["scale"].to(dtype), parts["offset"].to(dtype)
    if keys:
        return codes * scale.unsqueeze(-2) + offset.unsqueeze(-2)
    vectors = codes.unflatten(-1, (scale.shape[-1], -1))
    return (vectors * scale.unsqueeze(-1) + offset.unsqueeze(-1)).flatten(-2)


def _vectors(x: Tensor, keys: bool, value_group: int) -> tuple[Tensor, int]:
    """x with what shares a scale along one axis, and that axis."""
    return (x, -2) if keys else (x.unflatten(-1, (-1, value_group or x.shape[-1])), -1)


def _product(parts: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    return parts["left"].to(dtype) @ parts["right"].to(dtype).transpose(-2, -1)


def _half(x: Tensor) -> Tensor:
    return x.clamp(-LARGEST, LARGEST).to(torch.float16)
