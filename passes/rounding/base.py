"""What a rounding method is, and what it works with: the sites, the calibration inputs, and where results are kept.

A method is a frozen dataclass in a file of its own, whose fields are its options. It may change the float graph first
without changing its function (:meth:`Method.transform`), and then says what codes the weights of the sites get
(:meth:`Method.round`). What it does not answer for is rounded to nearest, with searched ranges.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.fx
from torch import Tensor

from ...codegen.weight_format import WeightFormat
from ...runtime.errors import CalibrationNeeded, QuantizationError
from ..base import Progress, SiteContext, silent
from ..execute import Hook, run
from ..view import GraphView, arguments
from . import grid
from .constants import constant
from .grid import QuantizedWeight
from .store import Store

Node = torch.fx.Node


@dataclass(frozen=True)
class WeightSite:
    """One place whose weight is to be rounded.

    id: of its :class:`~tilewright.passes.site.Site`. context: its node and view. format: what its weight becomes.
    whole: one grid for the whole tensor instead of one a row or group. leader: the first site with the same weight; its
    own id for most. Only leaders need codes: others read theirs.
    """

    id: str
    context: SiteContext = field(repr=False)
    format: WeightFormat
    whole: bool
    leader: str

    @property
    def node(self) -> Node:
        return self.context.node

    @property
    def linear(self) -> bool:
        """Whether it is a linear layer; otherwise an embedding, whose table has no input to be calibrated on."""
        return self.context.op == "linear"

    @property
    def weight(self) -> Node:
        """The node of the float weight (N, K)."""
        found: Node = arguments(self.node)["weight"]
        return found

    @property
    def x(self) -> Node:
        """The node of a linear layer's input (..., K)."""
        found: Node = arguments(self.node)["x"]
        return found


@dataclass
class InputStats:
    """What a linear layer's input (..., K) was over all calibration batches. float64, (K,) each.

    rows: how many. second, mean_abs: the mean of x^2 and of |x| by channel. most: the largest |x| by channel.
    """

    rows: int
    second: Tensor
    mean_abs: Tensor
    most: Tensor

    @staticmethod
    def empty(columns: int, device: torch.device) -> InputStats:
        return InputStats(0, *(torch.zeros(columns, dtype=torch.float64, device=device) for _ in range(3)))

    def see(self, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1])
        count = self.rows + len(rows)
        if not len(rows):
            return
        size = rows.abs().float()
        self.second += (size.square().sum(0, dtype=torch.float64) - len(rows) * self.second) / count
        self.mean_abs += (size.sum(0, dtype=torch.float64) - len(rows) * self.mean_abs) / count
        self.most = torch.maximum(self.most, size.amax(0).double())
        self.rows = count


@dataclass
class Calibration:
    """What a method works with. Nothing of it may be written into: constants may be the user's own weights.

    view: the graph, whose ``module`` takes the flat inputs of ``batches``, a sequence each. In :meth:`Method.transform`
    the graph is the method's to edit; in :meth:`Method.round` it is not. sites: by id, in graph order. seed: of every
    random choice. facts: JSON-able, for the report. progress: to be called often. deadline: ``time.monotonic()`` of
    when the time budget is spent, or None. store: keeps what is done for a run that is killed and started again.
    """

    view: GraphView
    sites: dict[str, WeightSite]
    batches: Sequence[Sequence[Any]] = ()
    seed: int = 0
    progress: Progress = silent
    deadline: float | None = None
    store: Store = field(default_factory=Store)
    facts: dict[str, Any] = field(default_factory=dict)
    details: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Site id -> JSON-able facts about it, for the report."""
    _stats: dict[str, InputStats] | None = None

    @property
    def module(self) -> torch.fx.GraphModule:
        return self.view.module

    def time_left(self) -> float:
        """Seconds until the time budget is spent, at least 0; infinite without one."""
        return math.inf if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def kept(self, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and numbers that an earlier run of the same settings kept under ``key``, or None."""
        return self.store.read(key)

    def keep(self, key: str, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any] | None = None) -> None:
        """Keep tensors and JSON-able numbers under ``key`` for a run that goes on after a kill. Replaces the key's."""
        self.store.write(key, tensors, numbers or {})

    def leaders(self, *, linear: bool = False) -> list[WeightSite]:
        """The sites that need codes, in graph order. linear: without embeddings."""
        return [s for s in self.sites.values() if s.leader == s.id and (s.linear or not linear)]

    def sharing(self, site: str) -> list[WeightSite]:
        """All sites that read the weight of ``site``, itself included, in graph order."""
        leader = self.sites[site].leader
        return [one for one in self.sites.values() if one.leader == leader]

    def weight(self, site: str) -> Tensor:
        """The float weight (N, K) as the graph has it now. Not to be written into."""
        found = constant(self.view, self.sites[site].weight)
        assert found is not None, f"{site} was taken up without a constant weight"
        return found

    def stats(self) -> dict[str, InputStats]:
        """Of the input of every linear site, by id; one run of the graph over all batches, at the first call.

        Raises :class:`QuantizationError` for an input that is not finite, naming the first site that reads it. Editing
        the graph makes them stale: :meth:`forget`.
        """
        if self._stats is None:
            stats: dict[str, InputStats] = {}
            bad: dict[str, str] = {}
            hooks = {site.node: _hook(site, stats, bad) for site in self.sites.values() if site.linear}
            for done, batch in enumerate(self.batches):
                self.progress(done, len(self.batches), "looking at activations")
                run(self.module, batch, hooks)
                for name, what in bad.items():
                    raise QuantizationError(
                        f"its input is {what} on the calibration inputs: look for the cause in the model or in the "
                        "inputs before quantizing",
                        site=name,
                        source=self.sites[name].context.site.source,
                    )
            self._stats = stats
        return self._stats

    def forget(self) -> None:
        """Take new :meth:`stats` when next asked."""
        self._stats = None

    def check_rows(self, method: str, least: int) -> None:
        """Raise :class:`CalibrationNeeded` when a site saw fewer than ``least`` rows (tokens) of calibration inputs."""
        stats = self.stats()
        for site in self.leaders(linear=True):
            rows = sum(stats[one.id].rows for one in self.sharing(site.id) if one.id in stats)
            if rows < least:
                raise CalibrationNeeded(
                    f"quantize{{method={method}}} saw {rows} rows of activations of this layer and needs at least "
                    f"{least}: give more or longer calibration inputs",
                    site=site.id,
                    source=site.context.site.source,
                )

    def second(self, site: str) -> Tensor | None:
        """The second moments (K,) of what a site's weight is multiplied by; None without calibration inputs."""
        if not self.batches:
            return None
        seen = [self.stats()[one.id] for one in self.sharing(site) if one.id in self.stats()]
        rows = sum(one.rows for one in seen)
        if not rows:
            return None
        found: Tensor = sum((one.second * (one.rows / rows) for one in seen), torch.zeros_like(seen[0].second))
        return found

    def nearest(self, site: str, *, clip: bool = False) -> QuantizedWeight:
        """The site's weight rounded to nearest. clip: with the ranges of the least weighted error."""
        one, w = self.sites[site], self.weight(site)
        if clip:
            weight = self.second(site) if one.linear else None
            return grid.round_weight(w, one.format, *grid.search_grid(w, one.format, weight, whole=one.whole))
        lower, upper = grid.ranges(w, one.format, whole=one.whole)
        return grid.round_weight(w, one.format, *grid.grid(lower, upper, one.format))


def _hook(site: WeightSite, stats: dict[str, InputStats], bad: dict[str, str]) -> Hook:
    """Adds to the site's statistics; a site whose input is not finite goes into ``bad``."""

    def see(values: list[Any], result: Any) -> Any:
        (x,) = values
        if x.numel() and not bool(torch.isfinite(x.detach().abs().amax())):
            bad.setdefault(site.id, "NaN" if bool(x.isnan().any()) else "infinite")
        elif not bad:
            stats.setdefault(site.id, InputStats.empty(x.shape[-1], x.device)).see(x)
        return result

    return Hook((site.x,), see)


@dataclass(frozen=True)
class Method:
    """Base of every rounding method; ``passes/rounding/__init__.py`` has the table of their names.

    needs_calibration: whether it cannot do without calibration inputs. least_rows: how many rows (tokens) each linear
    layer has to see at least. transforms: whether :meth:`transform` does anything.
    """

    name: ClassVar[str]
    needs_calibration: ClassVar[bool] = False
    least_rows: ClassVar[int] = 32
    transforms: ClassVar[bool] = False

    def transform(self, work: Calibration) -> Mapping[str, Any] | None:
        """Edit ``work.view``'s graph without changing its function: scales that fold, rotations that cancel.

        New constants are registered (``_fold.set_constant``, :class:`Builder`), old ones never written into. The graph
        is validated as a whole afterwards. Returns JSON-able facts for the report; what concerns one site goes into
        ``work.details``.
        """
        return None

    def round(self, work: Calibration) -> dict[str, QuantizedWeight]:
        """Codes by site id, for :meth:`Calibration.leaders` that the method has an answer for; the others get
        :meth:`rest`. Codes have to be of the site's format, ``zero`` and all, but for ``scales``.
        """
        return {}

    def rest(self, work: Calibration, site: str) -> QuantizedWeight:
        """What a site gets that :meth:`round` said nothing about: embeddings, layers outside of the blocks, and blocks
        that the time budget did not reach.
        """
        return work.nearest(site, clip=True)

    def options(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def text(self) -> str:
        """As on the command line: the name, and options that are not at their defaults."""
        changed = [f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self) if _changed(self, f)]
        return self.name + (f"{{{','.join(changed)}}}" if changed else "")


def _changed(method: Method, one: dataclasses.Field[Any]) -> bool:
    return bool(getattr(method, one.name) != one.default)


def each(work: Calibration, sites: Sequence[WeightSite], text: str) -> Iterator[WeightSite]:
    """The sites, with progress."""
    for done, site in enumerate(sites):
        work.progress(done, len(sites), text)
        yield site
    work.progress(len(sites), len(sites), text)
