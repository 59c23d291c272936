"""Learning how to round by block reconstruction: the loop that FlexRound and CBQ share.

The weights of a window of blocks are rounded by modules with parameters of their own (:class:`Rounder`); these are
fitted until the window, fed with what the quantized model hands it, gives what the float model gives there. Gradients
pass straight through the rounding. torch.optim does the steps.

Errors count relative to the size of each token's vector: what reads the residual stream normalises it, and without this
the few tokens with huge values that language models have would be all that counts.
"""

from __future__ import annotations

import abc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.errors import QuantizationError
from . import grid
from ._feedback import feed_back
from .base import WeightSite
from .blocks import Feed, Values, Window
from .grid import QuantizedWeight

Distance = Callable[[Tensor, Tensor], Tensor]
"""(what the window gives, what the float model gives) -> a scalar to be made small."""
HESSIAN_ROWS = 16384
"""Tokens that go into the second moments of a layer's input."""


SLACK = 0.05
"""How far time may be ahead of the steps, as shares of the whole, before it decides (what then does not repeat)."""
RANGES = 13
"""Ranges that the start's grids are chosen from."""


class Rounder(nn.Module, abc.ABC):
    """How one weight is rounded. Subclasses have parameters."""

    @abc.abstractmethod
    def forward(self) -> Tensor:
        """The rounded weight (N, K), float32, differentiable in the parameters."""

    @abc.abstractmethod
    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups for torch.optim, with their learning rates."""

    def at(self, progress: float) -> None:
        """Told before each :meth:`forward`: 0 at the first step, 1 at the last one and whenever the result counts."""

    def penalty(self) -> Tensor | None:
        """What is added to the loss of the last :meth:`forward`."""
        return None

    @abc.abstractmethod
    def quantized(self) -> QuantizedWeight:
        """Codes and scales now."""


@dataclass(frozen=True)
class Plan:
    """How to fit. steps: of the optimiser, one sample each. held: samples that decide which state is the best, never
    fitted to. precision: of linear layers and attention. seconds: stop after so many, with the best so far.
    """

    steps: int
    seed: int
    held: int = 1
    precision: torch.dtype | None = None
    seconds: float = math.inf
    checks: int = 2
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass
class Outcome:
    """before, after: the loss on the held samples. steps: done. at: the step whose state was taken."""

    before: float
    after: float
    steps: int
    at: int


def relative_error(made: Tensor, wanted: Tensor) -> Tensor:
    """The mean over tokens of |made - wanted|^2 / |wanted|^2. Tensors (..., C) of any floating dtype; a scalar."""
    made, wanted = made.float(), wanted.float()
    size = wanted.square().sum(-1)
    # A token near zero is no reason to divide by zero.
    least = 1e-6 * size.mean() + torch.finfo(torch.float32).tiny
    return ((made - wanted).square().sum(-1) / (size + least)).mean()


def reconstruct(
    window: Window,
    rounders: Mapping[str, Rounder],
    weights: Callable[[], dict[str, Tensor]],
    inputs: Sequence[Values],
    targets: Sequence[Mapping[str, Tensor]],
    plan: Plan,
    *,
    feed: Feed | None = None,
    distance: Distance = relative_error,
    progress: Callable[[int], None] = lambda step: None,
) -> Outcome:
    """Fit the rounders in place; they are left with the state that was best on the held samples.

    weights: the window's weights by site id, from the rounders. inputs, targets: a mapping a sample, by value name.
    Raises :class:`QuantizationError` when the loss is not finite at the start.
    """
    held = range(max(0, len(inputs) - plan.held), len(inputs)) if len(inputs) > plan.held else range(len(inputs))
    fitted = range(held.start) if len(inputs) > plan.held else held

    def now(progress: float) -> dict[str, Tensor]:
        for rounder in rounders.values():
            rounder.at(progress)
        return weights()

    def loss(sample: int, given: dict[str, Tensor]) -> Tensor:
        made = window.run(inputs[sample], given, feed=feed, precision=plan.precision)
        parts = [distance(made[name], wanted) for name, wanted in targets[sample].items()]
        return torch.stack(parts).sum()

    def check() -> float:
        with torch.no_grad():
            given = now(1.0)
            return sum(float(loss(sample, given)) for sample in held) / len(held)

    params = [group for rounder in rounders.values() for group in rounder.groups()]
    optimizer = torch.optim.Adam(params, betas=plan.betas, fused=True)
    before = best = check()
    if not math.isfinite(before):
        raise QuantizationError("the rounded block gives NaN or infinite values", site=next(iter(rounders)))
    kept, at, begin, step = _state(rounders), 0, time.monotonic(), 0

    def done() -> float:
        # Where the time budget is what will end this, rates fall and offsets harden by it.
        steps, spent = (step - 1) / max(1, plan.steps - 1), (time.monotonic() - begin) / plan.seconds
        return steps if spent < steps + SLACK else min(1.0, spent)

    rates = [group["lr"] for group in optimizer.param_groups]
    marks = {math.ceil(plan.steps * (i + 1) / plan.checks) for i in range(plan.checks)}
    for step, sample in zip(range(1, plan.steps + 1), _order(fitted, plan.seed), strict=False):
        with torch.enable_grad():
            total = loss(sample, now(share := done()))
            for rounder in rounders.values():
                extra = rounder.penalty()
                total = total if extra is None else total + extra
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * share))
        optimizer.step()
        progress(step)
        late = time.monotonic() - begin > plan.seconds
        if step in marks or late:
            found = check()
            if found < best:
                best, at, kept = found, step, _state(rounders)
        if late:
            break
    for name, rounder in rounders.items():
        rounder.load_state_dict(kept[name])
        rounder.at(1.0)
    return Outcome(before, best, step, at)


def _order(samples: Sequence[int], seed: int) -> Iterator[int]:
    """Samples in shuffled rounds, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for place in torch.randperm(len(samples), generator=generator).tolist():
            yield samples[place]


def _state(rounders: Mapping[str, Rounder]) -> dict[str, dict[str, Tensor]]:
    return {
        name: {key: tensor.detach().clone() for key, tensor in rounder.state_dict().items()}
        for name, rounder in rounders.items()
    }


# --------------------------------------------------------------------------------------------------------------- start


@dataclass
class Start:
    """Where learning begins. weight: (N, K) float32, whose nearest levels on the grid of ``scale`` and ``zero`` (N, G)
    are the first codes.
    """

    weight: Tensor
    scale: Tensor
    zero: Tensor | None


def second_moments(window: Window, inputs: Sequence[Values], **options: Any) -> dict[str, Tensor]:
    """mean(x x^T), (K, K) float32, of each linear layer's input; layers that share their input share the tensor."""
    first = {group[0] for group in window.shared_inputs}
    moments: dict[str, Tensor] = {}
    seen: dict[str, int] = {}

    def see(site: str, x: Tensor) -> None:
        if site not in first or seen.get(site, 0) >= HESSIAN_ROWS:
            return
        rows = x.reshape(-1, x.shape[-1]).float()
        if site not in moments:
            moments[site] = rows.new_zeros(rows.shape[1], rows.shape[1])
        moments[site].addmm_(rows.T, rows)
        seen[site] = seen.get(site, 0) + len(rows)

    rows = 0
    for values in inputs:
        window.observe(values, see, **options)
        if seen and min(seen.values()) >= HESSIAN_ROWS:
            break
        rows += 1
    for site, moment in moments.items():
        moment /= max(1, seen[site])
    return {site: moments[group[0]] for group in window.shared_inputs for site in group if group[0] in moments}


def start(w: Tensor, site: WeightSite, moment: Tensor | None, *, feedback: bool, reach: float | None = None) -> Start:
    """The grid of the least expected error, and with ``feedback`` weights whose errors make up for each other.

    reach: a size of weights that grids may end at too, where that makes the error smaller.
    """
    weight, fmt = None if moment is None else moment.diagonal(), site.format
    scale, zero = grid.search_grid(w.float(), fmt, weight, whole=site.whole, steps=RANGES)
    if reach is not None:
        lower, upper = grid.ranges(w.float(), fmt, whole=site.whole)
        found = grid.round_weight(w.float(), fmt, *grid.grid(lower.clamp(min=-reach), upper.clamp(max=reach), fmt))
        lost = grid.error(w.float(), found, weight)
        before = grid.error(w.float(), grid.round_weight(w.float(), fmt, scale, zero), weight)
        if site.whole:
            lost, before = lost.sum().expand_as(lost), before.sum().expand_as(before)
        scale = torch.where(lost < before, found.scale, scale)
        if zero is not None and found.zero is not None:
            zero = torch.where(lost < before, found.zero, zero)
    if feedback and moment is not None:
        return Start(feed_back(w, moment, fmt, scale, zero), scale, zero)
    return Start(w.float(), scale, zero)
