"""FlexRound: a divisor for every weight, learnt together with the grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...codegen.weight_format import WeightFormat
from . import grid
from ._reconstruct import Rounder, Start
from ._windows import Precision, Recipe, check_options, learn
from .base import Calibration, Method, WeightSite
from .grid import QuantizedWeight


class _Divide(torch.autograd.Function):
    """The rounded weight from the logarithms of its divisors, in few passes over memory.

    With v = w exp(-log), u = (v - low) / step and c = clamp(round(u), least, most): c step + low. All tensors are
    (N, G, columns of a group) or broadcast to it.
    """

    @staticmethod
    def forward(
        ctx: Any, w: Tensor, log: Tensor, row: Tensor, column: Tensor, step: Tensor, low: Tensor, least: Any, most: Any
    ) -> Tensor:
        v = (log + row).add_(column).neg_().exp_().mul_(w)
        u = v.sub(low).div_(step)
        codes = u.round().clamp_(least, most)
        ctx.save_for_backward(u, codes, v, step)
        ctx.limits = least, most
        return codes.mul(step).add_(low)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = outputs
        u, codes, v, step = ctx.saved_tensors
        least, most = ctx.limits
        inside = (u >= least - 0.5) & (u <= most + 0.5)
        through = gradient * inside
        by_log = through.mul(v).neg_()
        by_step = (gradient * codes).sub_(through * u).sum(-1, keepdim=True)
        by_low = (gradient - through).sum(-1, keepdim=True) if ctx.needs_input_grad[5] else None
        by_row = by_log.sum((1, 2), keepdim=True)
        by_column = by_log.sum(0, keepdim=True)
        return None, by_log, by_row, by_column, by_step, by_low, None, None


class FlexRounder(Rounder):
    """s1 round(W / (s1 S2 s3 s4)): s1 a group's step, S2 (N, K), s3 (N, 1) and s4 (1, K), learnt as logarithms."""

    w: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, fmt: WeightFormat, begin: Start, lr: float, lr_step: float, *, whole: bool = False) -> None:
        super().__init__()
        self.format, self.lr, self.lr_step, self.columns = fmt, lr, lr_step, begin.weight.shape[1]
        w = grid.grouped(begin.weight, fmt.group)
        self.register_buffer("w", w, persistent=False)
        scale, zero = grid.kept(begin.scale, begin.zero, fmt)
        self.register_buffer("scale", scale.float()[..., None], persistent=False)
        self.register_buffer("zero", None if zero is None else zero.float()[..., None], persistent=False)
        self.log = nn.Parameter(torch.zeros_like(w))
        self.row = nn.Parameter(w.new_zeros(len(w), 1, 1))
        self.column = nn.Parameter(w.new_zeros(1, *w.shape[1:]))
        # A grid for the whole tensor has one step.
        self.size = nn.Parameter(w.new_zeros(1, 1, 1) if whole else torch.zeros_like(self.scale))
        learnt = self.zero if fmt.zero == "offset" and not whole else None
        self.low = None if learnt is None else nn.Parameter(learnt.clone())

    def groups(self) -> list[dict[str, Any]]:
        fine = [self.log, self.row, self.column]
        coarse = [self.size] + ([self.low] if self.low is not None else [])
        return [{"params": fine, "lr": self.lr}, {"params": coarse, "lr": self.lr_step}]

    def _grid(self) -> tuple[Tensor, Any, Any, Any]:
        dtype: torch.dtype = getattr(torch, self.format.scales)
        step = self.scale * self.size.exp()
        step = step + (step.to(dtype).float() - step).detach()
        fmt = self.format
        if self.low is not None:
            low = self.low + (self.low.to(dtype).float() - self.low).detach()
            return step, low, 0, fmt.levels - 1
        if fmt.zero == "offset":
            assert self.zero is not None
            return step, self.zero, 0, fmt.levels - 1
        zero = fmt.middle if self.zero is None else self.zero
        return step, step.new_zeros(()), -zero, fmt.levels - 1 - zero

    def forward(self) -> Tensor:
        made: Tensor = _Divide.apply(self.w, self.log, self.row, self.column, *self._grid())
        return made.flatten(1)[:, : self.columns]

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        step, low, least, most = self._grid()
        u = (self.w * (self.log + self.row + self.column).neg().exp() - low) / step
        codes = u.round().clamp(least, most) - least
        zero = self.zero if self.low is None else self.low
        scale, zero = grid.kept(step[..., 0], None if zero is None else zero[..., 0], self.format)
        return QuantizedWeight(
            codes.to(torch.uint8).flatten(1)[:, : self.columns].contiguous(), scale, zero, self.format
        )


@dataclass(frozen=True)
class FlexRound(Method):
    """Learn a divisor for every weight, and the grid with it, until each block gives what it gave before.

    ::

        W' = s1 * round(W / (s1 * S2 * s3 * s4))      s1 a group, S2 (N, K) a weight, s3 a row, s4 a column

    "FlexRound: Learnable Rounding based on Element-wise Division for Post-Training Quantization", Lee et al. 2023,
    section 3. All factors are positive and start at 1 times the start's grid; Adam steps on their logarithms, straight
    through the rounding. A large weight moves to another level more easily than a small one, by design. Block by block:
    inputs are what the quantized model hands on, targets what the float model gives.

    Ours, not the paper's: the loss counts each token relative to its size, and W begins with errors handed on from
    column to column (``feedback``, as in GPTQ), on grids of the least expected error. That start takes few seconds a
    block and is most of the gain at 2 and 3 bits; learning starts from it.

    steps: of the optimiser a block, one calibration batch each; 0 takes the start as it is. lr, lr_step: Adam's rates
    for divisors and for s1, falling to 0 by a cosine. feedback: see above. precision: of products while learning;
    ``auto`` is bfloat16 on CPUs with AMX and on GPUs.
    """

    name: ClassVar[str] = "flexround"
    needs_calibration: ClassVar[bool] = True

    steps: int = 160
    lr: float = 5e-3
    lr_step: float = 1e-3
    feedback: bool = True
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        check_options(self.name, steps=(self.steps, 0), lr=(self.lr, 0), lr_step=(self.lr_step, 0))

    def round(self, work: Calibration) -> dict[str, QuantizedWeight]:
        def make(site: WeightSite, begin: Start) -> FlexRounder:
            return FlexRounder(site.format, begin, self.lr, self.lr_step, whole=site.whole)

        recipe = Recipe(self, make, self.steps, feedback=self.feedback, precision=self.precision)
        return learn(work, recipe)
