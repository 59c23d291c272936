"""AWQ: scales of input channels that protect the weights which large activations meet, and a search for clipping.

"AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", Lin et al. 2023 (arXiv 2306.00978),
section 3.2; the search of clipping ranges is that of the authors' published code.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ...runtime.errors import BadPassOption
from ..site import get_site
from . import grid
from ._fold import Fold, apply_fold, find_fold, find_groups
from ._moments import Inputs, clipped, observe, output_error
from .base import Calibration, Method, WeightSite
from .blocks import Walk, Window, split
from .grid import QuantizedWeight

GRIDS = "tilewright_awq"
"""Key of the graph module's metadata: site id -> (scale, zero) that were chosen for the transformed weight."""
ROWS = 512
"""Output rows of a weight that stand for all of them while scales are compared."""
TRIED, CHECKED, CHOSEN = {2: 6}, 6, 20
"""Ranges that are tried for each group of columns: by bits while scales are compared (else 1, the whole range: scales
chosen so turned out better for the blocks' outputs); while the best scale is compared with none; for the grid at last.
"""
REACH = 1024.0
"""Scales stay between its inverse and it."""
_LEAST = 1e-12


@dataclass(frozen=True)
class AWQ(Method):
    """Round to nearest after scaling input channels by what activations say about them.

    For linear layers that share an input x, with scales s (K,) folded into what makes x::

        s = mean|x|^a, normalised to sqrt(max(s) * min(s)) = 1
        a = argmin sum_layers mean_x |Q(W s) (x / s) - W x|^2

    where a is one of ``steps`` numbers from 0 to 1. Then each group's range is clipped to the one that loses least, in
    all layers (the authors leave queries and keys out, which is worse here). Rows of x larger than the median are
    shrunk to it, so that a few tokens with huge hidden states do not decide alone. Blocks are done in order, each on
    what the already rounded ones before it give; the memory is that of one boundary between blocks and of one block's
    second moments. Where x / s folds into nothing (behind a GELU, or where others read x as well), a ``mul`` at the
    input stays, unless the best scale gains less than ``worth``.

    steps: numbers of a. clip: search ranges; without, each reaches to its group's largest weight. shrink: the smallest
    share of a range that is tried. rows: how many tokens stand for the inputs where activations are rounded too.
    worth: by which share of it the error must fall for a ``mul`` to be inserted.

    Exact before rounding; in float16 and bfloat16 scales are powers of two, so that no weight loses a bit.
    """

    name: ClassVar[str] = "awq"
    needs_calibration: ClassVar[bool] = True
    transforms: ClassVar[bool] = True

    steps: int = 20
    clip: bool = True
    shrink: float = 0.4
    rows: int = 1024
    worth: float = 0.1

    def __post_init__(self) -> None:
        if self.steps < 1 or self.rows < 1 or not 0 < self.shrink <= 1 or not 0 <= self.worth < 1:
            raise BadPassOption(
                f"awq: steps={self.steps} and rows={self.rows} must be at least 1, shrink={self.shrink} in (0, 1] and "
                f"worth={self.worth} in [0, 1)"
            )

    def transform(self, work: Calibration) -> Mapping[str, Any]:
        return _Search(self, work).run()

    def round(self, work: Calibration) -> dict[str, QuantizedWeight]:
        found = {}
        for site, (scale, zero) in work.view.module.meta.pop(GRIDS, {}).items():
            one = work.sites[site]
            found[site] = grid.round_weight(work.weight(site), one.format, scale, zero)
        for one in work.leaders(linear=True):
            if one.whole and one.id not in found and work.time_left() > 0:
                found[one.id] = work.nearest(one.id, clip=self.clip)
        return found

    def rest(self, work: Calibration, site: str) -> QuantizedWeight:
        return work.nearest(site, clip=self.clip)


@dataclass
class _Group:
    """Linear layers of sites that share an input. fold: where a scale of it goes, or why none does."""

    sites: list[WeightSite]
    fold: Fold | str

    @property
    def key(self) -> str:
        return self.sites[0].id


@dataclass
class _Found:
    """What the search chose for one group. scale: (K,) or None. grids: by leader, of the scaled weight."""

    scale: Tensor | None
    grids: dict[str, tuple[Tensor, Tensor | None]]
    details: dict[str, Any]


class _Search:
    """One run of the search over a graph."""

    def __init__(self, method: AWQ, work: Calibration) -> None:
        self.method, self.work = method, work
        linears = {site.node: site for site in work.sites.values() if site.linear}
        self.blocks = split(work.view, [site.context for site in linears.values()])
        self.groups: dict[str, _Group] = {}
        for group in find_groups(work.view):
            sites = [linears[node] for node in group.linears if node in linears]
            if sites:
                fold = find_fold(work.view, group)
                self.groups[sites[0].id] = _Group(sites, fold)
        self.found: dict[str, _Found] = {}
        self.grids: dict[str, tuple[Tensor, Tensor | None]] = {}
        """By leader, of the scaled weight; in the end of the transformed one."""
        self.scale_of: dict[str, Tensor] = {}

    def run(self) -> dict[str, Any]:
        work, blocks = self.work, self.blocks
        names = [node.name for node in blocks.module.graph.find_nodes(op="placeholder")]
        start = [dict(zip(names, batch, strict=True)) for batch in work.batches]
        walk = Walk(blocks, work.batches, self.window(blocks.prefix(), start))
        for index in range(len(blocks)):
            weights = self.window(blocks.window(index, index + 1), walk.quantized)
            if work.time_left() <= 0:
                break
            walk.advance(weights, self.feed)
        else:
            if len(blocks):
                self.window(blocks.suffix(), walk.quantized)
        work.progress(len(self.groups), len(self.groups), "searching scales")
        return self.apply()

    def feed(self, site: str, x: Tensor) -> Tensor:
        """A layer's input as it will be rounded."""
        bits = self.work.sites[site].format.activations
        scale = self.scale_of.get(site)
        if not bits or scale is None:
            return grid.fake_quantize_activations(x, bits)
        return (grid.fake_quantize_activations(x / scale, bits) * scale).to(x.dtype)

    def window(self, window: Window, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Scales and grids for a part of the graph; what its layers are to compute with, by site id."""
        inside = set(window.sites)
        here = [g for g in self.groups.values() if g.key in inside]
        kept = {g.key: self.work.kept(g.key) for g in here}
        missing = [g.key for g in here if kept[g.key] is None]
        inputs = observe(window, samples, missing, self.method.rows) if missing else {}
        weights: dict[str, Tensor] = {}
        for group in here:
            self.work.progress(len(self.found), len(self.groups), "searching scales")
            earlier = kept[group.key]
            if earlier is not None:
                found = _read(*earlier)
                self.grids |= found.grids
            elif self.work.time_left() <= 0 or group.key not in inputs:
                continue
            else:
                found = self.search(group, inputs[group.key])
                self.work.keep(group.key, *_kept(found))
            self.found[group.key] = found
            for site in group.sites:
                weights[site.id] = self.rounded(site, found)
                if found.scale is not None:
                    self.scale_of[site.id] = found.scale
        return weights

    def search(self, group: _Group, inputs: Inputs) -> _Found:
        """The scale with the least error for a group, and the grids of its weights."""
        work, method = self.work, self.method
        weights = {site.id: work.weight(site.id).float() for site in group.sites}
        plain = lost = self.error(group, weights, inputs, None, CHECKED)
        scale, power = None, 0.0
        if isinstance(group.fold, Fold):
            half = any(work.weight(site.id).element_size() == 2 for site in group.sites)
            found = list(candidates(group.fold, inputs, method.steps, half))
            tried = min(TRIED.get(site.format.bits, 1) for site in group.sites)
            best = min(found, key=lambda one: self.error(group, weights, inputs, one[0], tried))
            least = plain * (1 - method.worth if group.fold.kind == "input" else 1)
            # Where clipping mends more than that scale does, a smaller power may go with it.
            for one in itertools.chain([best], found[:: -(-len(found) // 5)]):
                error = self.error(group, weights, inputs, one[0], CHECKED)
                if error < min(lost, least):
                    (scale, power), lost = one, error
                if one is best and scale is not None:
                    break
        details: dict[str, Any] = {"input_error": plain, "scaled_error": lost, "alpha": power}
        if isinstance(group.fold, str):
            details["not_scaled"] = group.fold
        elif scale is not None:
            details["scale_goes_to"] = group.fold.kind
        grids = {}
        seen = inputs if scale is None else inputs.scaled(scale)
        for site in group.sites:
            if site.leader not in self.grids:
                w = weights[site.id] if scale is None else weights[site.id] * scale
                chosen = self.best_grid(w, site, seen.second, CHOSEN)
                self.grids[site.leader] = grids[site.leader] = chosen.scale, chosen.zero
        return _Found(scale, grids, details)

    def error(
        self, group: _Group, weights: Mapping[str, Tensor], inputs: Inputs, scale: Tensor | None, tried: int
    ) -> float:
        """How far the outputs of the group's layers are off with rounded weights, as a share of their mean square."""
        lost = total = 0.0
        second = inputs.second if scale is None else inputs.second / scale.square()
        for site in group.sites:
            w = _thin(weights[site.id], ROWS)
            scaled = w if scale is None else w * scale
            q = self.best_grid(scaled, site, second, tried).dequantize()
            bits = site.format.activations
            if bits:
                x = inputs.sample
                read = grid.fake_quantize_activations(x if scale is None else x / scale, bits)
                y = x @ w.T
                lost += float((read @ q.T - y).square().sum()) / len(x)
                total += float(y.square().sum()) / len(x)
            else:
                lost += output_error((q if scale is None else q / scale) - w, inputs)
                total += output_error(w, inputs)
        return lost / max(total, _LEAST)

    def best_grid(self, w: Tensor, site: WeightSite, second: Tensor, steps: int) -> QuantizedWeight:
        least = self.method.shrink
        return clipped(w, site.format, second, whole=site.whole, steps=steps if self.method.clip else 1, least=least)

    def rounded(self, site: WeightSite, found: _Found) -> Tensor:
        """What the layer computes with, for an input that is not scaled."""
        w = self.work.weight(site.id)
        wide = w.float() if found.scale is None else w.float() * found.scale
        q = grid.round_weight(wide, site.format, *self.grids[site.leader]).dequantize()
        return (q if found.scale is None else q / found.scale).to(w.dtype)

    def apply(self) -> dict[str, Any]:
        """Fold the scales, and leave the grids of the transformed weights for the rounding."""
        view = self.work.view
        grids = self.grids
        kinds: dict[str, int] = {}
        for group in self.groups.values():
            found = self.found.get(group.key)
            if found is None:
                continue
            for site in group.sites:
                self.work.details.setdefault(site.id, {}).update(found.details)
            if found.scale is None or isinstance(group.fold, str):
                continue
            apply_fold(view, group.fold, found.scale)
            kinds[group.fold.kind] = kinds.get(group.fold.kind, 0) + 1
            source = None if group.fold.source is None else get_site(group.fold.source)
            if group.fold.kind == "linear" and source is not None and source.id in grids:
                if self.work.sites[source.id].whole:
                    del grids[source.id]  # one grid no longer suits all rows
                else:
                    rows = group.fold.divisor(found.scale).float()[:, None]
                    scale, zero = grids[source.id]
                    offset = zero is not None and zero.is_floating_point()
                    grids[source.id] = (
                        scale.float() / rows,
                        zero.float() / rows if offset and zero is not None else zero,
                    )
        view.module.meta[GRIDS] = grids
        errors = [(f.details["input_error"], f.details["scaled_error"]) for f in self.found.values()]
        return {
            "groups": len(self.groups),
            "groups_searched": len(self.found),
            "scales_folded_into": kinds,
            "mean_error_before": sum(e for e, _ in errors) / max(1, len(errors)),
            "mean_error": sum(e for _, e in errors) / max(1, len(errors)),
        }


def candidates(fold: Fold, inputs: Inputs, steps: int, half: bool) -> Iterator[tuple[Tensor, float]]:
    """Scales (K,) float32 and their power a, equal over channels that must share theirs. half: powers of two only."""
    x = fold.shared(inputs.mean_abs, "mean")
    x = x.clamp_min(float(x.amax()) * 1e-4 + _LEAST)
    for step in range(1, steps + 1):
        scale = x.pow(step / steps)
        scale = (scale / (scale.amax() * scale.amin()).sqrt()).clamp(1 / REACH, REACH)
        # A vectorised power may differ in the last bit between equal numbers at different places.
        yield fold.shared(scale.log2().round().exp2() if half else scale), step / steps


def _thin(w: Tensor, rows: int) -> Tensor:
    return w[:: -(-len(w) // rows)]


def _kept(found: _Found) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """As the checkpoint keeps it: tensors and numbers."""
    tensors = {} if found.scale is None else {"scale": found.scale}
    for site, (scale, zero) in found.grids.items():
        tensors |= {f"scale:{site}": scale} | ({} if zero is None else {f"zero:{site}": zero})
    return tensors, {"sites": list(found.grids), "details": found.details}


def _read(tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> _Found:
    grids = {site: (tensors[f"scale:{site}"], tensors.get(f"zero:{site}")) for site in numbers["sites"]}
    return _Found(tensors.get("scale"), grids, dict(numbers["details"]))
