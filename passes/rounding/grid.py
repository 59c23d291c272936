"""Grids of numbers that low-bit codes stand for: choosing them, rounding weights to them, and doing so differentiably.

A grid is the scale (and zero) of each group of columns, tensors of shape (N, G) as ``codegen.weight_format`` describes.
Scales are rounded to the dtype that they are kept in before codes are computed, so that what is measured is what runs.
All of it is plain torch on the weight's device, computed in float32 (float64 for float64).

A scale may be negative: a symmetric grid has one level more on its negative side, which the sign turns to where it is
needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...codegen.weight_format import WeightFormat
from ...runtime.ops import quantized_weight

FLOAT8_MOST = 448.0
"""The largest number of float8_e4m3fn."""
_CHUNK = 2**19
"""Elements of a weight that are looked at together: few enough for a core's cache."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as codes. codes: (N, K) uint8, 0 .. 2^bits - 1, not packed. scale: (N, G) of the format's dtype.

    zero: (N, G), uint8 for ``point`` and the scales' dtype for ``offset``; None for ``middle``.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    format: WeightFormat

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers (N, K), computed in float32 (float64 for float64) and rounded to ``dtype``."""
        return quantized_weight.numbers(self.codes, self.scale, self.zero, self.format, _wide(dtype)).to(dtype)

    def packed(self) -> Tensor:
        """The codes as bytes in the format's layout."""
        return quantized_weight.pack(self.codes, self.format).contiguous()

    @property
    def nbytes(self) -> int:
        """Of codes as packed, scales and zeros."""
        return sum(
            math.prod(shape) * getattr(torch, dtype).itemsize
            for shape, dtype in self.format.shapes(*self.shape).values()
        )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def grouped(w: Tensor, group: int) -> Tensor:
    """w (N, K) as (N, G, columns of a group). A short last group is filled with copies of its last column."""
    size = group or w.shape[1]
    if short := -w.shape[1] % size:
        w = torch.cat([w, w[:, -1:].expand(-1, short)], 1)
    return w.unflatten(1, (-1, size))


def spread(numbers: Tensor, group: int, columns: int) -> Tensor:
    """One number a group, (N, G), as one a column, (N, K), or (N, 1) without groups."""
    return numbers if not group else numbers.repeat_interleave(group, 1)[:, :columns]


def ranges(w: Tensor, fmt: WeightFormat, *, whole: bool = False) -> tuple[Tensor, Tensor]:
    """The least and greatest number that each group's grid has to reach, (N, G) each, float32 or float64.

    Symmetric grids reach max|w| on both sides; integer zero points need zero itself in reach. whole: one range for the
    whole tensor, given to every group.
    """
    groups = grouped(w.to(_wide(w.dtype)), fmt.group)
    lower, upper = groups.amin(-1), groups.amax(-1)
    if whole:
        lower, upper = lower.amin().expand_as(lower), upper.amax().expand_as(upper)
    if fmt.zero == "middle":
        upper = torch.maximum(upper, -lower)
        lower = -upper
    elif fmt.zero == "point":
        lower, upper = lower.clamp(max=0), upper.clamp(min=0)
    return lower, upper


def grid(lower: Tensor, upper: Tensor, fmt: WeightFormat) -> tuple[Tensor, Tensor | None]:
    """Scale and zero, in the dtypes that they are kept in, whose levels reach from ``lower`` to ``upper``.

    ``middle`` spreads its 2^bits levels over the whole range, scale = max(|lower|, |upper|) / ((2^bits - 1) / 2), as
    GPTQ and torchao do: no number within is further than half a step from a level, on either side, although zero is a
    level. Where nothing is to be reached the scale is 1.
    """
    kept: torch.dtype = getattr(torch, fmt.scales)
    if fmt.zero == "middle":
        return _no_zeros((torch.maximum(upper, -lower) / reach(fmt)).to(kept)), None
    if fmt.zero == "offset":
        zero = lower.to(kept)
        return _no_zeros(((upper - zero) / (fmt.levels - 1)).to(kept)), zero
    scale = _no_zeros(((upper - lower) / (fmt.levels - 1)).to(kept))
    return scale, (-lower / scale.to(lower.dtype)).round().clamp(0, fmt.levels - 1).to(torch.uint8)


def reach(fmt: WeightFormat) -> float:
    """How many scales of a symmetric grid its range reaches to either side."""
    return FLOAT8_MOST if fmt.kind != "int" else (fmt.levels - 1) / 2


def _no_zeros(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def round_weight(
    w: Tensor,
    fmt: WeightFormat,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    lower: Tensor | None = None,
    upper: Tensor | None = None,
) -> QuantizedWeight:
    """Each element of ``w`` (N, K) to the nearest level of its group's grid; ties to even codes.

    The grid: ``scale`` (and ``zero``), (N, G), in any floating dtype and rounded here to the kept one; or the grid that
    reaches from ``lower`` to ``upper``; or by default the one of :func:`ranges`.
    """
    wide = _wide(w.dtype)
    w = w.to(wide)
    if scale is None:
        least, greatest = ranges(w, fmt)
        scale, zero = grid(least if lower is None else lower, greatest if upper is None else upper, fmt)
    scale, zero = kept(scale, zero, fmt)
    step = spread(scale.to(wide), fmt.group, w.shape[1])
    if fmt.kind != "int":
        codes = (w / step).clamp(-FLOAT8_MOST, FLOAT8_MOST).to(torch.float8_e4m3fn).view(torch.uint8)
        return QuantizedWeight(codes, scale, None, fmt)
    middle = None if zero is None else spread(zero.to(wide), fmt.group, w.shape[1])
    if fmt.zero == "offset":
        assert middle is not None
        codes = ((w - middle) / step).round()
    else:
        codes = (w / step).round() + (fmt.middle if middle is None else middle)
    return QuantizedWeight(codes.clamp(0, fmt.levels - 1).to(torch.uint8), scale, zero, fmt)


def kept(scale: Tensor, zero: Tensor | None, fmt: WeightFormat) -> tuple[Tensor, Tensor | None]:
    """Scale and zero in the dtypes that the format keeps them in. Contiguous."""
    dtype: torch.dtype = getattr(torch, fmt.scales)
    scale = scale.detach().to(dtype).contiguous()
    if fmt.zero == "middle" or zero is None:
        return scale, None
    if fmt.zero == "offset":
        return scale, zero.detach().to(dtype).contiguous()
    if zero.dtype != torch.uint8:
        zero = zero.detach().round().clamp(0, fmt.levels - 1).to(torch.uint8)
    return scale, zero.contiguous()


def scales_dtype(w: Tensor, fmt: WeightFormat) -> str:
    """``float16`` where the scales of ``w`` keep at least 7 bits of precision in it, else ``float32``."""
    lower, upper = ranges(w, fmt)
    scale = (upper - lower) / (fmt.levels if fmt.kind == "int" else 2 * FLOAT8_MOST)
    reach = torch.maximum(lower.abs(), upper.abs()) if fmt.zero == "offset" else scale
    fits = bool((reach < torch.finfo(torch.float16).max / 2).all())
    return "float16" if fits and not bool(((scale > 0) & (scale < 2.0**-17)).any()) else "float32"


# -------------------------------------------------------------------------------------------------------------- search


def error(w: Tensor, found: QuantizedWeight, weight: Tensor | None = None) -> Tensor:
    """sum_k weight_k (w - q)^2 of each group, (N, G). weight: (K,) or (N, K), the inputs' second moments say."""
    off = (found.dequantize(_wide(w.dtype)) - w.to(_wide(w.dtype))).square()
    if weight is not None:
        off = off * weight.to(off)
    if short := -off.shape[1] % (found.format.group or off.shape[1]):
        off = torch.nn.functional.pad(off, (0, short))
    return off.unflatten(1, (-1, found.format.group or off.shape[1])).sum(-1)


class _Loss:
    """:func:`error` of one weight for one grid after another: a group's columns side by side, and no copy of them."""

    def __init__(self, w: Tensor, fmt: WeightFormat, weight: Tensor | None) -> None:
        self.fmt = fmt
        self.groups = grouped(w.to(_wide(w.dtype)), fmt.group)
        self.room = torch.empty_like(self.groups)
        counts = None if weight is None else weight.to(self.groups)
        if short := -w.shape[1] % (fmt.group or w.shape[1]):
            counts = self.groups.new_ones(w.shape[1]) if counts is None else counts
            # What a short last group is filled with does not count.
            counts = torch.nn.functional.pad(counts, (0, short))
        if counts is not None:
            counts = counts.reshape(-1, *self.groups.shape[1:])
        self.counts = counts

    def __call__(self, scale: Tensor, zero: Tensor | None) -> Tensor:
        """scale, zero: (N, G), in the dtypes that they are kept in. Returns (N, G)."""
        fmt, step = self.fmt, scale.to(self.groups)[..., None]
        low = None if zero is None else zero.to(self.groups)[..., None]
        if low is not None and fmt.zero == "offset":
            x = torch.sub(self.groups, low, out=self.room).div_(step).round_().clamp_(0, fmt.levels - 1)
            x.mul_(step).add_(low)
        elif fmt.kind != "int":
            x = torch.div(self.groups, step, out=self.room).clamp_(-FLOAT8_MOST, FLOAT8_MOST)
            x = x.to(torch.float8_e4m3fn).to(x.dtype).mul_(step)
        elif low is None:
            x = torch.div(self.groups, step, out=self.room).round_().clamp_(-fmt.middle, fmt.middle - 1).mul_(step)
        else:
            x = torch.div(self.groups, step, out=self.room).round_().add_(low).clamp_(0, fmt.levels - 1)
            x.sub_(low).mul_(step)
        x.sub_(self.groups).square_()
        return (x if self.counts is None else x.mul_(self.counts)).sum(-1)


def sqnr(w: Tensor, found: QuantizedWeight) -> float:
    """20 log10(|w| / |w - q|) in dB, some rows at a time; infinite where nothing is lost."""
    signal = noise = 0.0
    rows = max(1, _CHUNK // max(1, w.shape[1]))
    for i in range(0, len(w), rows):
        zero = None if found.zero is None else found.zero[i : i + rows]
        part = QuantizedWeight(found.codes[i : i + rows], found.scale[i : i + rows], zero, found.format)
        signal += float(w[i : i + rows].float().square().sum(dtype=torch.float64))
        noise += float(error(w[i : i + rows], part).sum(dtype=torch.float64))
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def search_grid(
    w: Tensor,
    fmt: WeightFormat,
    weight: Tensor | None = None,
    *,
    whole: bool = False,
    steps: int = 20,
    least: float = 0.4,
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero with the smallest :func:`error` among ``steps`` ranges from ``least`` to 1 times the whole one.

    A smaller range clips the largest weights and rounds all others more finely. Symmetric grids of at most 4 bits are
    tried with both signs of the scale. whole: one range and sign for the whole tensor.
    """
    rows = max(1, _CHUNK // max(1, w.shape[1]))
    if not whole and len(w) > rows:
        parts = [
            search_grid(
                w[i : i + rows],
                fmt,
                weight if weight is None or weight.dim() == 1 else weight[i : i + rows],
                steps=steps,
                least=least,
            )
            for i in range(0, len(w), rows)
        ]
        zeros = [zero for _, zero in parts if zero is not None]
        return torch.cat([scale for scale, _ in parts]), torch.cat(zeros) if zeros else None
    lower, upper = ranges(w, fmt, whole=whole)
    signs = (1, -1) if fmt.zero == "middle" and fmt.kind == "int" and fmt.bits <= 4 else (1,)
    loss = _Loss(w, fmt, weight)
    best: tuple[Tensor, Tensor, Tensor | None] | None = None
    for ratio in torch.linspace(1, least, steps).tolist():
        for sign in signs:
            scale, zero = grid(lower * ratio, upper * ratio, fmt)
            scale = scale * sign
            lost = loss(scale, zero)
            if whole:
                lost = lost.sum().expand_as(lost)
            if best is None:
                best = lost, scale, zero
                continue
            better = lost < best[0]
            best = (
                torch.where(better, lost, best[0]),
                torch.where(better, scale, best[1]),
                None if best[2] is None or zero is None else torch.where(better, zero, best[2]),
            )
    assert best is not None
    return best[1], best[2]


# ------------------------------------------------------------------------------------------------------ differentiable


def round_through(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes as if nothing were rounded (Bengio et al. 2013, straight through)."""
    return x + (x.round() - x).detach()


def fake_quantize(w: Tensor, fmt: WeightFormat, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """w (N, K) rounded to the grid of ``scale`` and ``zero`` (N, G); differentiable in all three.

    Straight through the rounding, and none to ``w`` where its code is clamped. The values are those of
    :func:`round_weight`: scale and zero are rounded to their kept dtypes, straight through as well.
    """
    columns = w.shape[1]
    dtype: torch.dtype = getattr(torch, fmt.scales)
    step = spread(scale + (scale.to(dtype).to(scale.dtype) - scale).detach(), fmt.group, columns)
    if fmt.kind != "int":
        x = (w / step).clamp(-FLOAT8_MOST, FLOAT8_MOST)
        return (x + (x.to(torch.float8_e4m3fn).to(x.dtype) - x).detach()) * step
    if fmt.zero == "middle" or zero is None:
        return round_through(w / step).clamp(-fmt.middle, fmt.middle - 1) * step
    if fmt.zero == "offset":
        low = spread(zero + (zero.to(dtype).to(zero.dtype) - zero).detach(), fmt.group, columns)
        return round_through((w - low) / step).clamp(0, fmt.levels - 1) * step + low
    point = spread(round_through(zero.to(w.dtype)).clamp(0, fmt.levels - 1), fmt.group, columns)
    return ((round_through(w / step) + point).clamp(0, fmt.levels - 1) - point) * step


def fake_quantize_activations(x: Tensor, bits: int) -> Tensor:
    """Each row of x (..., K) rounded to symmetric integers as ``quantized_linear`` does; straight through."""
    if not bits:
        return x
    most = 2.0 ** (bits - 1) - 1
    wide = x.to(_wide(x.dtype))
    step = wide.abs().amax(-1, keepdim=True) / most
    step = torch.where(step == 0, torch.ones_like(step), step)
    return (round_through(wide / step).clamp(-most, most) * step).to(x.dtype)
