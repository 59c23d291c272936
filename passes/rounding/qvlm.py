"""Q-VLM: rounding searched per joint block, blocks joined by the entropy of what passes between them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...runtime.errors import BadPassOption
from . import grid
from ._reconstruct import Rounder, Start, relative_error, second_moments
from ._windows import (
    Precision,
    State,
    begin_walk,
    check_options,
    cut,
    fixed_weights,
    hidden_values,
    keep,
    low_precision,
    restore,
    rounded_inputs,
)
from .base import Calibration, Method, WeightSite
from .blocks import Blocks, Feed, Walk, Window
from .grid import QuantizedWeight

LEVELS = 127
"""Activations are counted as integers from -LEVELS to LEVELS, by the largest of their token."""


def entropy(x: Tensor) -> float:
    """Nats, of the integers that the numbers x (..., C) become when each row is rounded to 8 bits."""
    rows = x.detach().float().reshape(-1, x.shape[-1])
    most = rows.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    counts = torch.bincount(((rows / most) * LEVELS).round().long().flatten() + LEVELS, minlength=2 * LEVELS + 1)
    share = counts[counts > 0].double() / max(1, int(counts.sum()))
    return float(-(share * share.log()).sum())


def partition(names: Sequence[str], entropies: Sequence[float], join: float, most: int) -> list[tuple[int, int]]:
    """(first, last) of joint blocks of at most ``most``.

    entropies: of what each block hands to the next. A block is joined with the next where its entropy is among the
    highest ``join`` (a share) of all and both are in one list of the model.
    """
    inner = sorted(entropies[:-1], reverse=True)
    count = round(join * len(inner))
    bound = inner[count - 1] if count else float("inf")
    spans, first = [], 0
    for index in range(len(names)):
        last = index + 1
        alike = last < len(names) and names[index].rpartition(".")[0] == names[last].rpartition(".")[0]
        if not (alike and entropies[index] >= bound and last - first < most):
            spans.append((first, last))
            first = last
    return spans


@dataclass(frozen=True)
class QVLM(Method):
    """Search the ranges of grids for blocks together whose errors depend on each other, as their entropy says.

    "Q-VLM: Post-training Quantization for Large Vision-Language Models", Wang et al. 2024. The error that rounding a
    layer makes at the end depends on how the next ones are rounded, the more so the higher the entropy of what passes
    between them (section 3.2). So blocks are joined with the next one where the entropy of their output is high, and
    the rounding function of each layer is searched for the least error of its joint block's output (3.3).

    The rounding function here is the range of the grid. The start is, for each group, the range with the least expected
    error; candidates are multiples of it, one for the layers that share an input. They are tried a layer after another
    and taken when the joint block's error falls, so the result is never worse than the start on the samples it is
    searched with. Nothing is learnt: no gradients. Inputs come along the quantized path. Activations keep their
    range, which kernels take from each token. The paper's changes to a visual encoder are not made; its blocks are
    searched like others and not joined with the language model's.

    ratios: the multiples to try. join: share of the boundaries between blocks that may be joined. most: blocks a joint
    block has at most. rounds: over all its layers; a round that changes nothing is the last. samples: calibration
    batches to search with. precision: as in FlexRound.
    """

    name: ClassVar[str] = "qvlm"
    needs_calibration: ClassVar[bool] = True

    ratios: tuple[float, ...] = (0.8, 0.9, 0.95, 1.05, 1.1, 1.2)
    join: float = 0.5
    most: int = 2
    rounds: int = 1
    samples: int = 4
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        check_options(self.name, most=(self.most, 1), rounds=(self.rounds, 0), samples=(self.samples, 1))
        check_options(self.name, join=(self.join, 0))
        object.__setattr__(self, "ratios", tuple(self.ratios))
        if not self.ratios or not all(isinstance(r, int | float) and 0 < r <= 2 for r in self.ratios):
            raise BadPassOption(f"quantize: qvlm: ratios are {self.ratios!r}, but must be numbers above 0 and up to 2")

    def round(self, work: Calibration) -> dict[str, QuantizedWeight]:
        blocks = cut(work)
        if not len(blocks):
            work.facts["blocks"] = "the model repeats no module: there is nothing to search, all is rounded to nearest"
            return {}
        entropies = self._entropies(work, blocks)
        spans = partition(blocks.names, entropies, self.join, self.most)
        work.facts["entropies"] = dict(zip(blocks.names, (round(e, 4) for e in entropies), strict=True))
        walk, feed, state = begin_walk(work, self, blocks), rounded_inputs(work), State()
        for index, (first, last) in enumerate(spans):
            key = f"{self.name}-{blocks.names[first]}"
            window = blocks.window(first, last)
            if not restore(work, _nothing, state, key):
                if work.time_left() <= 0:
                    break
                search = _Search(self, work, walk, window, feed, state)
                work.progress(index, len(spans), f"qvlm: {', '.join(blocks.names[first:last])}")
                seconds = work.time_left() / (len(spans) - index)
                state.facts.append({"blocks": list(blocks.names[first:last]), **search.run(seconds)})
                state.done |= search.found()
                keep(work, state, key, [work.sites[site].leader for site in window.sites])
            for position in range(first, last):
                if position + 1 < len(blocks):
                    walk.advance(fixed_weights(work, state, blocks.sites(position), blocks), feed)
        work.facts["windows"] = state.facts
        if missing := [n for (a, b) in spans[len(state.facts) :] for n in blocks.names[a:b]]:
            work.facts["not_reached"] = missing
        return state.done

    def _entropies(self, work: Calibration, blocks: Blocks) -> list[float]:
        """Of what each block of the float model gives, the mean over some samples."""
        walk = Walk(blocks, work.batches[: self.samples])
        found = []
        for index in range(len(blocks)):
            work.progress(index, len(blocks), "qvlm: entropies")
            window = blocks.window(index, index + 1)
            values = [v for made in walk.targets(window) for v in hidden_values(window, made).values()]
            found.append(sum(map(entropy, values)) / max(1, len(values)))
            if index + 1 < len(blocks):
                walk.advance({})
        return found


def _nothing(site: WeightSite, begin: Start) -> Rounder:
    raise AssertionError("a search keeps nothing open")


class _Search:
    """The grids of one joint block. Layers that share their input share their choice."""

    def __init__(
        self, method: QVLM, work: Calibration, walk: Walk, window: Window, feed: Feed | None, state: State
    ) -> None:
        self.work, self.window, self.feed, self.method = work, window, feed, method
        device = next(iter(window.linears.values())).weight.device if window.linears else torch.device("cpu")
        self.precision = low_precision(method.precision, device)
        self.fixed = fixed_weights(work, state, window.sites, walk.blocks)
        self.samples = walk.quantized[: method.samples]
        every = walk.targets(window, precision=self.precision)
        self.targets = [hidden_values(window, made) for _, made in zip(self.samples, every, strict=False)]
        leaders: dict[str, str] = {}
        for site in window.sites:
            if site in work.sites and site not in self.fixed:
                leaders.setdefault(work.sites[site].leader, site)
        self.reader = {site: leader for leader, site in leaders.items()}
        self.groups = [g for group in window.shared_inputs if (g := [s for s in group if s in self.reader])]
        self.moments = second_moments(window, self.samples, weights=self.fixed, feed=feed, precision=self.precision)
        self.start = {site: self._start(site) for site in self.reader}
        self.now = dict(self.start)

    def found(self) -> dict[str, QuantizedWeight]:
        return {self.reader[site]: weight for site, weight in self.now.items()}

    def _start(self, site: str) -> QuantizedWeight:
        one = self.work.sites[self.reader[site]]
        w, moment = self.work.weight(one.id).float(), self.moments.get(site)
        found = grid.search_grid(w, one.format, None if moment is None else moment.diagonal(), whole=one.whole)
        return grid.round_weight(w, one.format, *found)

    def _candidate(self, site: str, ratio: float) -> QuantizedWeight:
        """The site's weight on grids that reach ``ratio`` times as far from zero as the start's."""
        one, start = self.work.sites[self.reader[site]], self.start[site]
        zero = start.zero
        if zero is not None and one.format.zero == "offset":
            zero = zero.float() * ratio
        return grid.round_weight(self.work.weight(one.id).float(), one.format, start.scale.float() * ratio, zero)

    def _loss(self, rounded: Mapping[str, QuantizedWeight]) -> float:
        made = {leader: rounded[site].dequantize() for site, leader in self.reader.items()}
        sites = {site: self.work.sites[site].leader for site in self.window.sites}
        weights = self.fixed | {site: made[leader] for site, leader in sites.items() if leader in made}
        total = 0.0
        with torch.no_grad():
            for values, wanted in zip(self.samples, self.targets, strict=True):
                out = self.window.run(values, weights, feed=self.feed, precision=self.precision)
                total += sum(float(relative_error(out[name], value)) for name, value in wanted.items())
        return total / len(self.samples)

    def run(self, seconds: float) -> dict[str, Any]:
        """Try every candidate of every group in turn and keep what makes the joint block's error smaller."""
        began, tried = time.monotonic(), 0
        before = best = self._loss(self.now)
        for _ in range(self.method.rounds):
            changed = False
            for group in self.groups:
                for ratio in self.method.ratios:
                    if time.monotonic() - began > seconds:
                        break
                    trial = self.now | {site: self._candidate(site, ratio) for site in group}
                    loss, tried = self._loss(trial), tried + 1
                    if loss < best:
                        best, self.now, changed = loss, trial, True
            if not changed:
                break
        return {"before": before, "after": best, "tried": tried, "seconds": round(time.monotonic() - began, 2)}
