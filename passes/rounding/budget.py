"""Mixed precision: which layers get how many bits, when a model may spend so many on average.

A search over levels in the manner of "EvoPress: Towards Optimal Dynamic Model Compression via Evolutionary Search"
(Sieberling et al. 2024, arXiv 2410.14649), sections 3 and 4: a candidate is a level for every unit; an offspring
switches the levels of a few units, some up and some down, so that the total stays within the budget; of a generation's
offspring the best on a few samples are tried on more, and the survivor takes its parent's place where it is better on
those. What is compared is the model's output: its KL divergence to the float model where it gives logits, else the
relative squared error. Nothing is assumed about how the errors of layers add up, except for where the search begins:

    damage(unit, level) = measured(unit, probe) * squared error(unit, level) / squared error(unit, probe)

with one measurement a unit, alone at the ``probe`` level, spent by the best ratio of damage to bits.

A *unit* is the linear layers that read one tensor: they keep one format, so that they still run as one product.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...runtime import cpu
from ...runtime.errors import BadPassOption
from .._quantize_sites import head_nodes
from ..view import value
from . import grid
from ._fold import find_groups
from ._moments import clipped
from .base import Calibration
from .blocks import calm, split

LEVELS = (2, 3, 4, 8)
KEPT = "budget"
"""Key of the checkpoint."""
ROWS = 256
"""Rows of a sample's logits that are compared."""
STEPS = 8
"""Ranges that are tried for each group of columns of a weight."""


@dataclass(frozen=True)
class Plan:
    """How long to search.

    generations, offspring: of them. survivors, samples: how many of a generation are tried on how many calibration
    samples, step by step; the parent joins the last step. patience: generations without a better one to stop after.
    """

    generations: int = 30
    offspring: int = 8
    survivors: tuple[int, ...] = (8, 2)
    samples: tuple[int, ...] = (1, 4)
    patience: int = 12


@dataclass(frozen=True)
class Unit:
    """Sites with one level. leaders: of their weights; size: how many weights. segment: the part of the model that
    holds the first of them. fixed: bits that are given, or None.
    """

    sites: tuple[str, ...]
    leaders: tuple[str, ...]
    size: int
    segment: int
    fixed: int | None


Choice = tuple[int, ...]
"""The bits of every unit."""


def search_bits(
    work: Calibration,
    average: float,
    *,
    levels: Sequence[int] = LEVELS,
    fixed: Mapping[str, int] | None = None,
    clip: bool = True,
    plan: Plan | None = None,
) -> dict[str, int]:
    """Bits for every linear site of ``work``, at most ``average`` a weight; scales and zeros are not counted.

    fixed: site id -> bits that are given; they count. clip: while levels are compared, weights are rounded to nearest
    with clipped ranges, as most methods do, and not with whole ones. Deterministic for a ``work.seed``; stops at its
    deadline with the best so far, and goes on from its checkpoint. Leaves what it found in
    ``work.facts["bits_budget"]``.
    Raises :class:`BadPassOption` for an average that no choice of levels keeps to.
    """
    return _Search(work, average, tuple(sorted(levels)), fixed or {}, clip, plan or Plan()).run()


class _Search:
    def __init__(
        self,
        work: Calibration,
        average: float,
        levels: tuple[int, ...],
        fixed: Mapping[str, int],
        clip: bool,
        plan: Plan,
    ) -> None:
        self.work, self.average, self.levels, self.plan = work, average, levels, plan
        self.random = random.Random(work.seed)
        self.model = _Model(work, min(len(work.batches), max(plan.samples)), STEPS if clip else 1)
        self.units = _units(work, self.model, fixed)
        self.free = [index for index, unit in enumerate(self.units) if unit.fixed is None]
        weights = sum(unit.size for unit in self.units)
        self.budget = int(average * weights)
        least = self.bits(self.floor(levels[0]))
        if least > self.budget:
            raise BadPassOption(
                f"quantize: average_bits is {average}, but the fewest bits of all sites come to {least / weights:.3g}"
            )

    def floor(self, level: int) -> Choice:
        return tuple(level if unit.fixed is None else unit.fixed for unit in self.units)

    def bits(self, choice: Choice) -> int:
        return sum(unit.size * bits for unit, bits in zip(self.units, choice, strict=True))

    def run(self) -> dict[str, int]:
        facts: dict[str, Any] = {"average_asked": self.average, "units": len(self.units)}
        earlier = self.work.kept(KEPT)
        if earlier is None:
            parent = self.begin(facts)
            self.keep(parent, facts, 0)
            generation = 0
        else:
            numbers = earlier[1]
            parent, generation = tuple(numbers["choice"]), numbers["generation"]
            facts, self.random = dict(numbers["facts"]), random.Random(self.work.seed + generation)
        parent = self.evolve(parent, facts, generation)
        weights = sum(unit.size for unit in self.units)
        facts["average"] = self.bits(parent) / max(1, weights)
        facts["share_of_weights"] = {
            str(level): sum(u.size for u, b in zip(self.units, parent, strict=True) if b == level) / max(1, weights)
            for level in sorted(set(parent))
        }
        self.work.facts["bits_budget"] = facts
        return {site: bits for unit, bits in zip(self.units, parent, strict=True) for site in unit.sites}

    def keep(self, parent: Choice, facts: Mapping[str, Any], generation: int) -> None:
        self.work.keep(KEPT, {}, {"choice": list(parent), "facts": dict(facts), "generation": generation})

    # ------------------------------------------------------------------------------------------------------ beginning

    def begin(self, facts: dict[str, Any]) -> Choice:
        """Where the search begins: the budget spent by measured sensitivity."""
        probe = max((level for level in self.levels if level <= self.average), default=self.levels[0])
        damage: dict[tuple[int, int], float] = {}
        for done, index in enumerate(self.free):
            self.work.progress(done, len(self.free), "measuring sensitivity")
            unit = self.units[index]
            errors = {level: self.model.error(unit, level) for level in self.levels}
            measured = errors[probe]
            if self.work.time_left() > 0:
                measured = self.model.divergence({unit: probe}, [0], unit.segment)
            for level in self.levels:
                damage[index, level] = measured * errors[level] / max(errors[probe], 1e-30)
        choice = list(self.floor(self.levels[0]))
        self.spend(choice, damage)
        parent = tuple(choice)
        if self.work.time_left() > 0:
            whole = list(self.floor(probe))
            alike = self.divergence(tuple(whole))
            facts |= {"uniform_bits": probe, "uniform_divergence": alike}
            if self.bits(tuple(whole)) <= self.budget and alike < self.divergence(parent):
                self.spend(whole, damage)
                parent = tuple(whole)
        return parent

    def spend(self, choice: list[int], damage: Mapping[tuple[int, int], float]) -> None:
        """Raise levels while the budget lasts, first where a bit mends most."""
        left = self.budget - self.bits(tuple(choice))
        while True:
            steps = [
                ((damage[index, choice[index]] - damage[index, level]) / cost, index, level)
                for index in self.free
                for level in self.levels
                if level > choice[index] and (cost := self.units[index].size * (level - choice[index])) <= left
            ]
            if not steps:
                break
            _, index, level = max(steps)
            left -= self.units[index].size * (level - choice[index])
            choice[index] = level

    def divergence(self, choice: Choice) -> float:
        return self.model.divergence(dict(zip(self.units, choice, strict=True)), self.model.all, 0)

    # ------------------------------------------------------------------------------------------------------ evolution

    def evolve(self, parent: Choice, facts: dict[str, Any], generation: int) -> Choice:
        if not self.free or self.work.time_left() <= 0 or generation >= self.plan.generations:
            return parent
        self.model.settle(dict(zip(self.units, parent, strict=True)), 0)
        best = self.model.settled
        facts.setdefault("first_divergence", best)
        stale = 0
        while generation < self.plan.generations and stale < self.plan.patience and self.work.time_left() > 0:
            self.work.progress(generation, self.plan.generations, f"searching bits, divergence {best:.4g}")
            children = list({self.child(parent) for _ in range(self.plan.offspring)} - {parent})
            children.sort()
            first = self.random.randrange(len(self.model.all))
            for many, count in zip(self.plan.survivors[1:], self.plan.samples[:-1], strict=True):
                some = [(first + i) % len(self.model.all) for i in range(min(count, len(self.model.all)))]
                children = sorted(children, key=lambda child: self.fitness(parent, child, some))[:many]
            rated = [(self.fitness(parent, child, self.model.all), child) for child in children]
            generation += 1
            stale += 1
            if rated and min(rated)[0] < best:
                best, child = min(rated)
                self.model.settle(dict(zip(self.units, child, strict=True)), self.first(parent, child))
                parent, stale = child, 0
            facts |= {"divergence": best, "generations": generation}
            self.keep(parent, facts, generation)
        return parent

    def first(self, parent: Choice, child: Choice) -> int:
        """The first segment in which two choices differ."""
        return min(unit.segment for unit, a, b in zip(self.units, parent, child, strict=True) if a != b)

    def fitness(self, parent: Choice, child: Choice, samples: Sequence[int]) -> float:
        changed = {unit: b for unit, a, b in zip(self.units, parent, child, strict=True) if a != b}
        return self.model.divergence(changed, samples, self.first(parent, child))

    def child(self, parent: Choice) -> Choice:
        """A few units a level up, others down until the budget is kept, and what is then left spent."""
        choice, draw = list(parent), self.random
        raised: set[int] = set()
        for _ in range(min(draw.randint(1, 3), draw.randint(1, 3))):
            able = [index for index in self.free if choice[index] < self.levels[-1]]
            if able:
                index = draw.choice(able)
                choice[index] = self.levels[self.levels.index(choice[index]) + 1]
                raised.add(index)
        total = self.bits(tuple(choice))
        lowered: set[int] = set()
        while total > self.budget:
            able = [i for i in self.free if choice[i] > self.levels[0]]
            index = draw.choice([i for i in able if i not in raised] or able)
            below = self.levels[self.levels.index(choice[index]) - 1]
            total -= self.units[index].size * (choice[index] - below)
            choice[index] = below
            lowered.add(index)
        for index in draw.sample(self.free, len(self.free)):
            if choice[index] < self.levels[-1] and index not in lowered:
                above = self.levels[self.levels.index(choice[index]) + 1]
                cost = self.units[index].size * (above - choice[index])
                if total + cost <= self.budget:
                    total += cost
                    choice[index] = above
        return tuple(choice)


def _units(work: Calibration, model: _Model, fixed: Mapping[str, int]) -> list[Unit]:
    by_node = {site.node: site for site in work.sites.values() if site.linear}
    units: dict[tuple[str, int | None], list[str]] = {}
    of: dict[str, str] = {}  # leader -> the first site of its unit
    for group in find_groups(work.view):
        sites = [by_node[node] for node in group.linears if node in by_node]
        name = next((of[site.leader] for site in sites if site.leader in of), sites[0].id if sites else "")
        for site in sites:
            key = of.setdefault(site.leader, name), fixed.get(site.id)
            units.setdefault(key, []).append(site.id)
    found = []
    for (_, bits), names in units.items():
        leaders = tuple(dict.fromkeys(work.sites[site].leader for site in names))
        size = sum(work.weight(one).numel() for one in leaders)
        found.append(Unit(tuple(names), leaders, size, min(model.segment_of[site] for site in names), bits))
    return found


class _Model:
    """The model in segments, with some weights rounded: what its outputs are then worth.

    all: numbers of the samples. settled: divergence of the levels that :meth:`settle` took. Memory: of each sample, the
    boundary values before every segment; the rounded weights of the settled levels; and some rows of the logits.
    """

    def __init__(self, work: Calibration, samples: int, steps: int) -> None:
        self.work, self.steps = work, steps
        self.blocks = split(work.view, [site.context for site in work.sites.values() if site.linear])
        count = len(self.blocks)
        self.segments = [self.blocks.prefix(), *(self.blocks.window(i, i + 1) for i in range(count))]
        if count:
            self.segments.append(self.blocks.suffix())
        self.segment_of = {site: index for index, part in enumerate(self.segments) for site in part.sites}
        self.all = list(range(samples))
        device = next((w.device for w in self.blocks.weights.values()), torch.device("cpu"))
        fast = device.type == "cuda" or (device.type == "cpu" and "amx" in cpu.supported())
        self.precision = torch.bfloat16 if fast else None
        self.logits = _logits(work)
        self.grids: dict[tuple[str, int], tuple[Tensor, Tensor | None]] = {}
        self.weights: dict[str, Tensor] = {}
        self.settled = 0.0
        names = [node.name for node in self.blocks.module.graph.find_nodes(op="placeholder")]
        start = [dict(zip(names, batch, strict=True)) for batch in work.batches[:samples]]
        self.before: list[list[dict[str, Any]]] = [start, *([] for _ in self.segments[1:])]
        self.targets = [self.outputs(self.forward(index, 0, None, remember=True)) for index in self.all]

    def forward(self, sample: int, start: int, weights: Mapping[str, Tensor] | None, *, remember: bool = False) -> Any:
        """The values after the last segment, from the settled ones before segment ``start``. None: the float model."""
        values = dict(self.before[start][sample])
        feed = None if weights is None else self.feed
        with calm(self.blocks.module):
            for index in range(start, len(self.segments)):
                if index > start:
                    live = self.blocks.boundary(index - 1)
                    values = {name: values[name] for name in live}
                    if remember:
                        self.before[index][sample : sample + 1] = [dict(values)]
                part = self.segments[index]
                values |= part.run(values, weights, feed=feed, precision=self.precision)
        return values

    def feed(self, site: str, x: Tensor) -> Tensor:
        return grid.fake_quantize_activations(x, self.work.sites[site].format.activations)

    def outputs(self, values: Mapping[str, Any]) -> list[Tensor]:
        """What is compared: log-probabilities of some rows for a language model, else all floating outputs."""
        if not self.logits:
            nodes = self.work.view.graph.output_node().all_input_nodes
            found = [values[node.name] for node in nodes if node.name in values]
            return [v.float() for v in found if isinstance(v, Tensor) and v.is_floating_point()]
        rows = [values[name].flatten(0, -2) for name in self.logits if name in values]
        return [F.log_softmax(one[:: -(-len(one) // ROWS)].float(), -1) for one in rows if len(one)]

    def compare(self, found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
        if self.logits:
            parts = [
                F.kl_div(a, b, reduction="sum", log_target=True) / len(a) for a, b in zip(found, wanted, strict=True)
            ]
        else:
            parts = [
                (a - b).square().sum() / b.square().sum().clamp_min(1e-30) for a, b in zip(found, wanted, strict=True)
            ]
        total = float(sum(parts, torch.zeros(())))
        return total if math.isfinite(total) else math.inf

    def divergence(self, changed: Mapping[Unit, int], samples: Sequence[int], start: int) -> float:
        """Mean over samples, with the units in ``changed`` at those bits and the others as settled."""
        weights = dict(self.weights)
        for unit, bits in changed.items():
            weights |= self.rounded(unit, bits)
        found = [self.compare(self.outputs(self.forward(i, start, weights)), self.targets[i]) for i in samples]
        return sum(found) / max(1, len(found))

    def settle(self, levels: Mapping[Unit, int], start: int) -> None:
        """Take these levels as what others are compared with; they differ from the settled ones from ``start`` on."""
        for unit, bits in levels.items():
            if unit.segment >= start:
                self.weights |= self.rounded(unit, bits)
        found = [
            self.compare(self.outputs(self.forward(i, start, self.weights, remember=True)), self.targets[i])
            for i in self.all
        ]
        self.settled = sum(found) / max(1, len(found))

    def rounded(self, unit: Unit, bits: int) -> dict[str, Tensor]:
        """The unit's weights as ``bits`` keep them, by site."""
        made = {}
        for leader in unit.leaders:
            w = self.work.weight(leader)
            made[leader] = self.quantized(leader, bits).dequantize().to(self.precision or w.dtype)
        return {site: made[self.work.sites[site].leader] for site in unit.sites}

    def quantized(self, leader: str, bits: int) -> grid.QuantizedWeight:
        site, w = self.work.sites[leader], self.work.weight(leader)
        form = site.format.changed(bits=bits)
        form = form.changed(scales=grid.scales_dtype(w, form))
        if (leader, bits) not in self.grids:
            second = self.work.second(leader)
            assert second is not None
            found = clipped(w, form, second.float(), whole=site.whole, steps=self.steps)
            self.grids[leader, bits] = found.scale, found.zero
        return grid.round_weight(w, form, *self.grids[leader, bits])

    def error(self, unit: Unit, bits: int) -> float:
        """Squared error of the unit's outputs as second moments of the inputs have it."""
        total = 0.0
        for leader in unit.leaders:
            second = self.work.second(leader)
            total += float(grid.error(self.work.weight(leader), self.quantized(leader, bits), second).sum())
        return total


def _logits(work: Calibration) -> list[str]:
    """Names of the graph's outputs that are a language model's logits."""
    sizes = {value(node).shape[-1] for node in head_nodes(work.view)}
    return [
        node.name
        for node in work.view.graph.output_node().all_input_nodes
        if isinstance(val := value(node), Tensor)
        and val.is_floating_point()
        and val.dim() > 1
        and val.shape[-1] in sizes
    ]
