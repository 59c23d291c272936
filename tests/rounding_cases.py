"""A tiny decoder ready for rounding methods, and what they are measured by."""

from __future__ import annotations

import functools
from typing import Any

import tiny
import torch

from tilewright.codegen.weight_format import WeightFormat
from tilewright.frontend.capture import copy_module, export_model
from tilewright.frontend.raising import raise_graph
from tilewright.passes.base import SiteContext
from tilewright.passes.rounding.base import Calibration, Method, WeightSite
from tilewright.passes.rounding.blocks import Blocks, Walk, split
from tilewright.passes.rounding.grid import QuantizedWeight
from tilewright.passes.view import GraphView
from tilewright.runtime.ops import OPS

LAYERS = 3
SAMPLES = [[tiny.tokens(2, 24, seed=seed), False] for seed in range(4)]
HELD = [[tiny.tokens(2, 24, seed=seed), False] for seed in range(100, 102)]


@functools.cache
def decoder() -> torch.fx.GraphModule:
    """The raised graph, of any batch and length. Not to be changed."""
    model = tiny.llama(layers=LAYERS)
    module = copy_module(export_model(model, (), {"input_ids": SAMPLES[0][0], "use_cache": False}).module)
    raise_graph(module)
    return module


def calibration(fmt: WeightFormat, *, whole: bool = False, samples: int = 4, **options: Any) -> Calibration:
    """Of a fresh copy of the decoder's graph, with every linear layer but the head as a site.

    With one sample, methods fit to the very sample that decides which state is the best.
    """
    view = GraphView(copy_module(decoder()))
    sites = {}
    for node in view.graph.nodes:
        if node.target is OPS["linear"].overload:
            context = SiteContext(node, view)
            if (name := context.site.id) != "lm_head/linear":
                sites[name] = WeightSite(name, context, fmt, whole, name)
    return Calibration(view, sites, SAMPLES[:samples], **options)


def rounded(work: Calibration, method: Method) -> dict[str, QuantizedWeight]:
    if method.transforms:
        method.transform(work)
    return method.round(work)


def output_error(work: Calibration, found: dict[str, QuantizedWeight]) -> float:
    """|a - b|^2 / |b|^2 of the last hidden states with and without rounding, on samples no method saw."""
    blocks: Blocks = split(work.view, [site.context for site in work.sites.values()])
    whole = blocks.window(0, len(blocks))
    walk = Walk(blocks, HELD)
    bits = {site.id: site.format.activations for site in work.sites.values()}
    lost = size = 0.0
    with torch.no_grad():
        for values in walk.float:
            (exact,) = whole.run(values).values()
            weights = {name: (found.get(name) or work.nearest(name)).dequantize() for name in whole.sites}
            (made,) = whole.run(values, weights, feed=lambda site, x: _ints(x, bits[site])).values()
            lost, size = lost + float((made - exact).square().sum()), size + float(exact.square().sum())
    return lost / size


def _ints(x: torch.Tensor, bits: int) -> torch.Tensor:
    if not bits:
        return x
    step = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (x / step).round() * step


def same(one: dict[str, QuantizedWeight], other: dict[str, QuantizedWeight]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name].codes, other[name].codes) and torch.equal(one[name].scale, other[name].scale)
        for name in one
    )
