"""One linear layer while OSTQuant learns: its weight turned, scaled and rounded, differentiable in turns and scales."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...codegen.weight_format import WeightFormat
from . import grid
from ._rotate import Side
from ._turn import turn_columns, turn_rows


class FakeQuantized(torch.autograd.Function):
    """A weight (N, K) rounded to the grids that reach ``ratio`` (N, G) times as far as its groups do.

    The gradient goes straight through the rounding, stops at clipped weights, and reaches, through the scale, the
    group's largest weight. A negative ratio turns a symmetric grid round.
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor, ratio: Tensor, fmt: WeightFormat, whole: bool) -> Tensor:
        groups = grid.grouped(w.float(), fmt.group)
        lower, upper = grid.ranges(w, fmt, whole=whole)
        share = ratio.abs()
        scale, zero = grid.grid(lower * share, upper * share, fmt)
        step = (scale.float() * ratio.sign())[..., None]
        if fmt.kind != "int":
            codes = (groups / step).clamp_(-grid.FLOAT8_MOST, grid.FLOAT8_MOST).to(torch.float8_e4m3fn).float()
            off, clipped, q = codes - groups / step, codes.abs() >= grid.FLOAT8_MOST, codes * step
        else:
            low = 0.0 if zero is None or fmt.zero == "point" else zero.float()[..., None] / step
            least: Any = -float(fmt.middle) if zero is None else -zero.float()[..., None]
            least = 0.0 if fmt.zero == "offset" else least
            exact = (groups / step).sub_(low)
            rounded = exact.round()
            codes = rounded.clamp(least, least + fmt.levels - 1)
            off, clipped, q = codes - exact, codes != rounded, (codes + low) * step
        # A clipped weight hands its gradient to the scale alone.
        ctx.save_for_backward(torch.where(clipped, codes, off).to(w.dtype), clipped, w, ratio)
        ctx.fmt = fmt
        return q.flatten(1)[:, : w.shape[1]].to(w.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        slope, clipped, w, ratio = ctx.saved_tensors
        fmt, columns = ctx.fmt, w.shape[1]
        grad = grid.grouped(grads[0], fmt.group)
        if short := -columns % (fmt.group or columns):
            grad[:, -1, -short:] = 0  # copies that only fill the last group
        change = (grad * slope).sum(-1, keepdim=True, dtype=torch.float32) * ratio[..., None]
        back = grad.masked_fill(clipped, 0)
        groups = grid.grouped(w, fmt.group)
        if fmt.zero == "middle":
            most = grid.reach(fmt)
            place = groups.abs().argmax(-1, keepdim=True)
            back.scatter_add_(-1, place, (change / most * groups.gather(-1, place).sign()).to(back.dtype))
        else:
            change = (change / (fmt.levels - 1)).to(back.dtype)
            back.scatter_add_(-1, groups.argmax(-1, keepdim=True), change)
            back.scatter_add_(-1, groups.argmin(-1, keepdim=True), -change)
        return back.flatten(1)[:, :columns], None, None, None


ROWS, STEPS, LEAST = 64, 10, 0.4
"""Of a layer that its grids' reach is fitted on, and the shares of the whole range that are tried."""


@dataclass
class LearntWeight:
    """What a linear layer computes with at one step.

    base: weight (N, K) with the norm folded in; bias (N,) or None. columns, rows: how its sides are turned.
    column_scale: (name, place of each column among the factors), multiplied; row_scale: the same of rows, divided by.
    format: what it is rounded to; None leaves it float. ratio: see :class:`FakeQuantized`.
    """

    base: Tensor = field(repr=False)
    bias: Tensor | None = field(repr=False)
    columns: Side | None = None
    rows: Side | None = None
    column_scale: tuple[str, Tensor] | None = None
    row_scale: tuple[str, Tensor, Tensor] | None = None
    format: WeightFormat | None = None
    whole: bool = False
    ratio: Tensor | None = field(default=None, repr=False)

    def turned(self, matrices: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> Tensor:
        """The weight before rounding, in the dtype of ``base``."""
        w = turn_rows(turn_columns(self.base, self.columns, matrices), self.rows, matrices)
        if self.column_scale is not None:
            name, place = self.column_scale
            w = w * scales[name][place].to(w.dtype)
        if self.row_scale is not None:
            name, rows, place = self.row_scale
            factor = torch.ones(len(w), dtype=w.dtype).index_copy(0, rows, scales[name].reciprocal()[place].to(w.dtype))
            w = w * factor[:, None]
        return w

    def turned_bias(self, matrices: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> Tensor | None:
        if self.bias is None:
            return None
        bias = turn_rows(self.bias.to(self.base.dtype), self.rows, matrices)
        if self.row_scale is not None:
            name, rows, place = self.row_scale
            bias = bias * torch.ones_like(bias).index_copy(0, rows, scales[name].reciprocal()[place].to(bias.dtype))
        return bias

    def __call__(
        self, x: Tensor, matrices: Mapping[str, Tensor], scales: Mapping[str, Tensor], rounded: bool
    ) -> Tensor:
        w, bias = self.turned(matrices, scales), self.turned_bias(matrices, scales)
        if rounded and self.format is not None:
            assert self.ratio is not None
            w = FakeQuantized.apply(w, self.ratio, self.format, self.whole)
            x = grid.fake_quantize_activations(x, self.format.activations)
        return functional.linear(x.to(w.dtype), w, None if bias is None else bias.to(w.dtype)).to(x.dtype)

    def fit_ratio(self, w: Tensor) -> None:
        """Look for the ratio, one for the whole layer, with the least squared error of ``w`` as it is now.

        On some of its rows: the groups of a layer are alike, and the final rounding looks at each of them.
        """
        assert self.format is not None
        rows = w.detach()[:: max(1, len(w) // ROWS)].float()
        lower, upper = grid.ranges(rows, self.format, whole=self.whole)
        best = (math.inf, 1.0)
        for share in torch.linspace(1, LEAST, STEPS).tolist() if self.format.bits < 8 else [1.0]:
            found = grid.round_weight(rows, self.format, *grid.grid(lower * share, upper * share, self.format))
            best = min(best, (float(grid.error(rows, found).sum()), share))
        self.ratio = torch.full((len(w), self.format.groups(w.shape[1])), best[1])
