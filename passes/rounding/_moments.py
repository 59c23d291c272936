"""What the inputs of linear layers say about errors of their weights: moments, and searches that use them.

With H = mean x x^T over the rows x of a layer's input, the mean squared error of its output when W becomes W + D is the
sum over the rows d of D of ``d^T H d``: all inputs count, and none has to be kept.

A few tokens of a language model have hidden states hundreds of times larger than the others, which a norm makes equal
again later. So that they do not decide alone, rows larger than a sample's median are shrunk to it first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...codegen.weight_format import WeightFormat
from . import grid
from .blocks import Feed, Window
from .grid import QuantizedWeight

MOST_MOMENTS = 4096
"""Input channels up to which all K^2 second moments are kept; beyond, a sample of rows stands for them."""


@dataclass
class Inputs:
    """The input (..., K) of linear layers over the calibration samples, with large rows shrunk; all float32.

    rows: how many there were. mean_abs, most, second: (K,), mean and largest |x|, mean x^2. moments: (K, K), mean
    x x^T, or None beyond :data:`MOST_MOMENTS`. sample: (T, K), some rows, evenly spaced.
    """

    rows: int
    mean_abs: Tensor
    most: Tensor
    second: Tensor
    moments: Tensor | None
    sample: Tensor

    @staticmethod
    def of(parts: Sequence[Tensor], sample: int) -> Inputs:
        """From tensors (..., K), one a calibration sample. sample: rows to keep, at most."""
        seen = _Seen(sample, len(parts))
        for part in parts:
            seen.see(part)
        return seen.inputs()

    def scaled(self, scale: Tensor) -> Inputs:
        """Of x / scale."""
        moments = None if self.moments is None else self.moments / scale / scale[:, None]
        return Inputs(
            self.rows,
            self.mean_abs / scale,
            self.most / scale,
            self.second / scale.square(),
            moments,
            self.sample / scale,
        )


class _Seen:
    """Adds up :class:`Inputs`."""

    def __init__(self, sample: int, parts: int) -> None:
        self.each = -(-sample // max(1, parts))
        self.rows = 0
        self.kept: list[Tensor] = []
        self.sums: list[Tensor] = []
        self.most: Tensor | None = None

    def see(self, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if not len(rows):
            return
        length = rows.norm(dim=1, keepdim=True)
        rows = rows / (length / length.median().clamp_min(1e-30)).clamp_min(1.0)
        size = rows.abs()
        sums = [size.sum(0), rows.square().sum(0)]
        if rows.shape[1] <= MOST_MOMENTS:
            sums.append(rows.T @ rows)
        self.sums = [a.add_(b) for a, b in zip(self.sums, sums, strict=True)] if self.sums else sums
        most = size.amax(0)
        self.most = most if self.most is None else torch.maximum(self.most, most)
        self.rows += len(rows)
        if self.each:
            self.kept.append(rows[:: max(1, len(rows) // self.each)][: self.each].clone())

    def inputs(self) -> Inputs:
        assert self.most is not None, "a layer saw no rows"
        mean_abs, second, *moments = (total / self.rows for total in self.sums)
        return Inputs(self.rows, mean_abs, self.most, second, moments[0] if moments else None, torch.cat(self.kept))


def observe(
    window: Window, samples: Sequence[Any], sites: Sequence[str], sample: int, feed: Feed | None = None, **options: Any
) -> dict[str, Inputs]:
    """What ``sites`` read when ``window`` runs on each of ``samples`` (boundary values by name), by site id.

    sample: rows to keep of each input. feed, options: as of :meth:`Window.run`; the inputs are those before feed.
    """
    seen = {site: _Seen(sample, len(samples)) for site in sites}

    def look(site: str, x: Tensor) -> Tensor:
        if site in seen:
            seen[site].see(x)
        return x if feed is None else feed(site, x)

    with torch.no_grad():
        for values in samples:
            window.run(values, feed=look, **options)
    return {site: one.inputs() for site, one in seen.items() if one.rows}


def output_error(delta: Tensor, inputs: Inputs) -> float:
    """Mean over rows x of |delta x|^2, delta (N, K)."""
    delta = delta.float()
    if inputs.moments is None:
        return float((delta @ inputs.sample.T).square().sum()) / len(inputs.sample)
    return float(((delta @ inputs.moments) * delta).sum())


def clipped(
    w: Tensor, fmt: WeightFormat, second: Tensor, *, whole: bool = False, steps: int = 20, least: float = 0.4
) -> QuantizedWeight:
    """``w`` rounded to the grids that lose least, where column k counts ``second[k]``; 8 bits are not clipped."""
    if fmt.bits == 8 or steps < 2:
        return grid.round_weight(w, fmt, *grid.grid(*grid.ranges(w, fmt, whole=whole), fmt))
    return grid.round_weight(w, fmt, *grid.search_grid(w, fmt, second, whole=whole, steps=steps, least=least))
