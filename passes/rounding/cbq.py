"""CBQ: cross-block reconstruction with low-rank rounding."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...codegen.weight_format import WeightFormat
from ..site import get_site
from . import grid
from ._fold import apply_fold, find_fold, find_groups
from ._reconstruct import Rounder, Start, relative_error
from ._windows import Precision, Recipe, check_options, learn
from .base import Calibration, Method, WeightSite
from .grid import QuantizedWeight

STRETCH = (-0.1, 1.1)
"""What the sigmoid is stretched to before it is clipped to 0 .. 1."""
HARDENED = 0.3
"""Share of the steps over which soft offsets turn into 0 or 1."""
SHARPNESS = (20.0, 2.0)
"""The regulariser's exponent at the first step and when offsets are hard."""


class _LowRank(torch.autograd.Function):
    """The rounded weight from logits that are added to each weight's own, and its offsets h in 0 .. 1.

    With u = (w - low) / step and f = floor(u), h = clip(stretched sigmoid(V + logits)), where V makes h = u - f without
    logits. The code is f + (1 - hard) h + hard [h >= 1/2], clamped; the gradient passes as if hard were 0.
    """

    @staticmethod
    def forward(
        ctx: Any, w: Tensor, logits: Tensor, step: Tensor, low: Tensor, least: Any, most: Any, hard: float
    ) -> tuple[Tensor, Tensor]:
        u = w.sub(low).div_(step)
        below = u.floor()
        size = STRETCH[1] - STRETCH[0]
        share = u.sub(below).sub_(STRETCH[0]).div_(size)
        odds = logits.exp().mul_(share).div_(1 - share)
        sigmoid = odds.div_(1 + odds)
        h = sigmoid.mul(size).add_(STRETCH[0])
        slope = sigmoid.mul_(1 - sigmoid).mul_(size).mul_((h > 0) & (h < 1))
        h.clamp_(0, 1)
        codes = (h >= 0.5).to(h.dtype)
        if hard < 1:
            codes.lerp_(h, 1 - hard)
        codes.add_(below)
        inside = (codes >= least) & (codes <= most)
        codes.clamp_(least, most)
        ctx.save_for_backward(u, codes, slope, step, inside)
        return codes.mul(step).add_(low), h

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        gradient, by_h = outputs
        u, codes, slope, step, inside = ctx.saved_tensors
        through = gradient * inside
        by_step = (gradient * codes).sub_(through * u).sum(-1, keepdim=True)
        by_low = (gradient - through).sum(-1, keepdim=True) if ctx.needs_input_grad[3] else None
        by_logits = through.mul_(step).add_(by_h).mul_(slope)
        return None, by_logits, by_step, by_low, None, None, None


class LowRankRounder(Rounder):
    """Offsets of rounding from A1 (N, r) times A2 (r, K), and a step a group, all learnt."""

    w: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, fmt: WeightFormat, begin: Start, method: CBQ, *, seed: int, whole: bool = False) -> None:
        super().__init__()
        self.format, self.method, self.columns = fmt, method, begin.weight.shape[1]
        w = grid.grouped(begin.weight, fmt.group)
        self.register_buffer("w", w, persistent=False)
        scale, zero = grid.kept(begin.scale, begin.zero, fmt)
        self.register_buffer("scale", scale.float()[..., None], persistent=False)
        self.register_buffer("zero", None if zero is None else zero.float()[..., None], persistent=False)
        rank = max(1, min(method.rank, *begin.weight.shape))
        generator = torch.Generator().manual_seed(seed)
        second = torch.randn(rank, self.columns, generator=generator).to(w.device) * rank**-0.5
        self.first, self.second = nn.Parameter(w.new_zeros(len(w), rank)), nn.Parameter(second)
        self.size = nn.Parameter(w.new_zeros(1, 1, 1) if whole else torch.zeros_like(self.scale))
        self.progress, self.offsets = 1.0, w.new_zeros(())

    def groups(self) -> list[dict[str, Any]]:
        low_rank = {"params": [self.first, self.second], "lr": self.method.lr}
        return [low_rank, {"params": [self.size], "lr": self.method.lr_step}]

    def at(self, progress: float) -> None:
        self.progress = progress

    @property
    def hard(self) -> float:
        return min(1.0, self.progress / HARDENED)

    def _parts(self) -> tuple[Tensor, Tensor, Any, Any]:
        dtype: torch.dtype = getattr(torch, self.format.scales)
        step = self.scale * self.size.exp()
        step = step + (step.to(dtype).float() - step).detach()
        fmt = self.format
        if fmt.zero == "offset":
            assert self.zero is not None
            return step, self.zero, 0, fmt.levels - 1
        zero = fmt.middle if self.zero is None else self.zero
        return step, step.new_zeros(()), -zero, fmt.levels - 1 - zero

    def forward(self) -> Tensor:
        logits = grid.grouped(self.first @ self.second, self.format.group)
        made, self.offsets = _LowRank.apply(self.w, logits, *self._parts(), self.hard)
        return made.flatten(1)[:, : self.columns]

    def penalty(self) -> Tensor | None:
        if self.hard >= 1 or not self.method.regulariser:
            return None
        sharp = SHARPNESS[0] + (SHARPNESS[1] - SHARPNESS[0]) * self.hard
        away = (2 * self.offsets - 1).abs().pow(sharp)
        return self.method.regulariser * (1 - away).mean()

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        self.at(1.0)
        step, low, least, _ = self._parts()
        codes = ((grid.grouped(self.forward(), self.format.group) - low) / step).round() - least
        scale, zero = grid.kept(step[..., 0], None if self.zero is None else self.zero[..., 0], self.format)
        whole = codes.to(torch.uint8).flatten(1)[:, : self.columns].contiguous()
        return QuantizedWeight(whole, scale, zero, self.format)


def outliers_from(values: Tensor, coarse: float = 1.5, fine: float = 1.0) -> float | None:
    """The largest of ``values`` (any shape, >= 0) that is no outlier, or None when none is.

    Coarse: candidates lie above the third quartile by more than ``coarse`` interquartile ranges. Fine: of all places to
    split the sorted candidates, the one with the greatest (gap between the two sides)^2 - fine * (variance below the
    gap); all candidates are outliers where the gap in front of them is the best.
    """
    flat = values.detach().float().flatten()
    ordered = flat.sort().values
    if len(ordered) < 4:
        return None
    first, third = ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]
    bound = third + coarse * (third - first)
    begin = int(torch.searchsorted(ordered, bound, right=True))
    found = ordered[begin:].double()
    if not len(found) or begin == 0:
        return None
    # Split before candidate i: 0 .. i - 1 are kept.
    kept = torch.cat([ordered[begin - 1 : begin].double(), found])
    gaps = (kept[1:] - kept[:-1]).square()
    count = torch.arange(len(found), dtype=torch.float64, device=found.device)
    sums, squares = found.cumsum(0) - found, found.square().cumsum(0) - found.square()
    variance = squares / count.clamp(min=1) - (sums / count.clamp(min=1)).square()
    place = int((gaps - fine * variance.clamp(min=0)).argmax())
    return float(kept[place])


@dataclass(frozen=True)
class CBQ(Method):
    """Learn low-rank offsets of rounding, and steps, over windows of blocks that overlap.

    ::

        W' = s * (floor(W / s) + h(V + A1 A2))        h: sigmoid stretched to -0.1 .. 1.1 and clipped to 0 .. 1

    "CBQ: Cross-Block Quantization for Large Language Models", Ding et al. 2023: windows of several blocks fitted
    together (section 3.1), outliers of weights and activations found from coarse to fine and cut off, or scaled down,
    beforehand (3.2), LoRA-Rounding (3.3). A1 (N, r) starts at zero, A2 (r, K) is drawn, s is learnt.

    Ours: V is a constant that makes h the weight's own offset at the start, so that r numbers a row and a column decide
    which weights round the other way. h turns into 0 or 1 over the first 30 % of the steps, helped by the paper's
    regulariser 1 - |2 h - 1|^b with b from 20 to 2, and is hard from then on with the gradient of the soft one. Weights
    are cut off only in groups where that lowers the expected error. Errors count relative to a token's size, and as
    KL(softmax over channels) in units of it. ``feedback`` as in FlexRound.

    window, overlap: blocks that are fitted together, and how many the next window goes on with. rank: r. steps: of
    Adam a window, one calibration batch each; 0 takes the start. lr, lr_step: its rates for A1, A2 and for steps. kl,
    regulariser: weights in the loss. scaling: channels of activations that are outliers are divided by the square root
    of how far out they are, where a norm or layer before takes that up exactly. truncation: see above.
    """

    name: ClassVar[str] = "cbq"
    needs_calibration: ClassVar[bool] = True
    transforms: ClassVar[bool] = True

    window: int = 2
    overlap: int = 1
    rank: int = 5
    steps: int = 60
    lr: float = 2e-3
    lr_step: float = 1e-3
    kl: float = 1.0
    regulariser: float = 1e-3
    scaling: bool = True
    truncation: bool = True
    feedback: bool = True
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        check_options(self.name, window=(self.window, 1), overlap=(self.overlap, 0), rank=(self.rank, 1))
        check_options(self.name, steps=(self.steps, 0), lr=(self.lr, 0), lr_step=(self.lr_step, 0))
        check_options(self.name, kl=(self.kl, 0), regulariser=(self.regulariser, 0))
        check_options(self.name, window=(self.window, self.overlap + 1))

    def transform(self, work: Calibration) -> Mapping[str, Any] | None:
        if not self.scaling:
            return None
        scaled = 0
        for group in find_groups(work.view):
            names = [site.id for node in group.linears if (site := get_site(node)) is not None]
            names = [name for name in names if name in work.sites]
            if len(names) < len(group.linears):
                continue  # a layer that stays float keeps its input
            fold = find_fold(work.view, group)
            if isinstance(fold, str) or fold.kind == "input":
                continue
            most = work.stats()[names[0]].most
            bound = outliers_from(most)
            if bound is None or not bound > 0:
                continue
            factor = fold.shared((most / bound).clamp(min=1).sqrt())
            apply_fold(work.view, fold, factor)
            scaled += 1
            for name in names:
                work.details.setdefault(name, {})["scaled_channels"] = int((factor > 1).sum())
        if scaled:
            work.view.module.recompile()
            work.forget()
        return {"scaled_inputs": scaled}

    def round(self, work: Calibration) -> dict[str, QuantizedWeight]:
        def make(site: WeightSite, begin: Start) -> LowRankRounder:
            seed = (work.seed * 1_000_003 + zlib.crc32(site.id.encode())) % 2**63
            return LowRankRounder(site.format, begin, self, seed=seed, whole=site.whole)

        def reach(weight: Tensor) -> float | None:
            return outliers_from(weight.abs()) if self.truncation else None

        def distance(made: Tensor, wanted: Tensor) -> Tensor:
            error = relative_error(made, wanted)
            return error + self.kl * channel_divergence(made, wanted) if self.kl else error

        recipe = Recipe(
            self,
            make,
            self.steps,
            size=self.window,
            overlap=self.overlap,
            feedback=self.feedback,
            precision=self.precision,
            distance=distance,
            reach=reach,
        )
        return learn(work, recipe)


def channel_divergence(made: Tensor, wanted: Tensor) -> Tensor:
    """KL(softmax(wanted) || softmax(made)) over channels, the mean over tokens; both in units of the token's root mean
    square, since hidden states are no logits.
    """
    size = wanted.float().square().mean(-1, keepdim=True).add(1e-12).rsqrt()
    logs, wanted_logs = (made.float() * size).log_softmax(-1), (wanted.float() * size).log_softmax(-1)
    return (wanted_logs.exp() * (wanted_logs - logs)).sum(-1).mean()
