"""Rounding after the transformation: block by block, each column's error handed on to later ones (``_feedback.py``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..execute import protect
from . import grid
from ._feedback import feed_back
from ._moments import Inputs, clipped, observe
from .base import Calibration, WeightSite
from .blocks import Window, calm, split
from .grid import QuantizedWeight

STEPS = 12
"""Ranges that are tried for each group."""


class Rounding:
    """One run over the blocks of a graph, along the path of the rounded model. found: codes by site id.

    precision: what linear layers and attention compute in on the way; None for the model's own.
    """

    def __init__(self, work: Calibration, precision: torch.dtype | None = None) -> None:
        self.work, self.precision = work, precision
        self.sites = {site.id: site for site in work.sites.values() if site.linear}
        self.found: dict[str, QuantizedWeight] = {}

    def run(self) -> dict[str, QuantizedWeight]:
        work = self.work
        blocks = split(work.view, [site.context for site in self.sites.values()])
        names = [node.name for node in blocks.module.graph.find_nodes(op="placeholder")]
        samples = [dict(zip(names, protect(blocks.module, batch), strict=True)) for batch in work.batches]
        total = len(blocks)
        windows = [blocks.prefix(), *(blocks.window(i, i + 1) for i in range(total))]
        for index, window in enumerate(windows):
            work.progress(index, total + 1, "rounding blocks")
            if work.time_left() <= 0:
                break
            weights = self.window(str(index), window, samples)
            live = set(blocks.boundary(index))
            for values in samples:
                with calm(blocks.module):
                    values.update(window.run(values, weights=weights, feed=self.feed, precision=self.precision))
                for name in [name for name in values if name not in live]:
                    del values[name]
        else:
            if total:
                self.window("suffix", blocks.suffix(), samples)
        work.progress(total + 1, total + 1, "rounding blocks")
        return self.found

    def feed(self, site: str, x: Tensor) -> Tensor:
        one = self.sites.get(site)
        return x if one is None else grid.fake_quantize_activations(x, one.format.activations)

    def window(self, name: str, window: Window, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Round the layers of one window; the weights that the rounded model computes with, by site id."""
        sites = [self.sites[site] for site in window.sites if site in self.sites]
        wanted = [site for site in sites if site.leader not in self.found]
        if wanted:
            kept = self.work.kept(f"round/{name}")
            if kept is not None:
                self._restore(wanted, kept[0])
            else:
                ids = [site.id for site in wanted]
                inputs = observe(window, samples, ids, 1, self.feed, precision=self.precision)
                for site in wanted:
                    self.found.setdefault(site.leader, round_site(self.work, site, inputs.get(site.id)))
                self.work.keep(f"round/{name}", self._tensors(wanted))
        return {s.id: self.found[s.leader].dequantize(self.work.weight(s.id).dtype) for s in sites}

    def _tensors(self, sites: Sequence[WeightSite]) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}
        for site in sites:
            one = self.found[site.leader]
            named = {"codes": one.codes, "scale": one.scale, "zero": one.zero}
            kept |= {f"{site.leader}/{what}": t for what, t in named.items() if t is not None}
        return kept

    def _restore(self, sites: Sequence[WeightSite], kept: Mapping[str, Tensor]) -> None:
        for site in sites:
            codes, scale, zero = (kept.get(f"{site.leader}/{what}") for what in ("codes", "scale", "zero"))
            assert codes is not None and scale is not None
            self.found[site.leader] = QuantizedWeight(codes, scale, zero, site.format)


@torch.no_grad()
def round_site(work: Calibration, site: WeightSite, inputs: Inputs | None) -> QuantizedWeight:
    """With clipping for the inputs' second moments and, where all moments are known, errors handed on."""
    w = work.weight(site.leader)
    if inputs is None:
        return work.nearest(site.leader, clip=True)
    nearest = clipped(w, site.format, inputs.second, whole=site.whole, steps=STEPS)
    if inputs.moments is None:
        return nearest
    moved = feed_back(w, inputs.moments, site.format, nearest.scale, nearest.zero)
    return grid.round_weight(moved, site.format, nearest.scale, nearest.zero)
