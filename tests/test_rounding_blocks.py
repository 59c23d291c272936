"""Graphs cut into blocks: windows compute what the graph computes, and walks keep one boundary of two paths."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import tiny
import torch
from rounding_cases import decoder
from torch import nn

from tilewright.frontend.capture import copy_module, export_model
from tilewright.frontend.raising import raise_graph
from tilewright.passes.execute import run
from tilewright.passes.rounding.blocks import Blocks, Walk, split
from tilewright.passes.site import Site, set_site
from tilewright.passes.view import GraphView
from tilewright.runtime.errors import BadArgument
from tilewright.runtime.ops import OPS


def cut(module: torch.fx.GraphModule) -> tuple[torch.fx.GraphModule, Blocks]:
    linears = [node for node in module.graph.nodes if node.target is OPS["linear"].overload]
    return module, split(GraphView(module), linears)


@functools.cache
def llama() -> tuple[torch.fx.GraphModule, Blocks]:
    return cut(decoder())


SAMPLES = [[tiny.tokens(), False], [tiny.tokens(seed=1), False], [tiny.tokens(1, 5, seed=2), False]]


def logits(blocks: Blocks, values: dict[str, Any]) -> torch.Tensor:
    (made,) = blocks.suffix().run(values).values()
    return made


def test_blocks_of_a_decoder():
    _, blocks = llama()
    assert blocks.names == ("model.layers.0", "model.layers.1", "model.layers.2")
    assert blocks.outside == ("lm_head/linear",)
    window = blocks.window(1, 3)
    assert window.sites == blocks.sites(1) + blocks.sites(2) and len(window.sites) == 14
    assert [len(group) for group in window.shared_inputs] == [3, 1, 2, 1] * 2
    assert window.input_of(window.sites[0]) == window.input_of(window.sites[2]) != window.input_of(window.sites[3])
    (hidden,) = [name for name in window.outputs if name in blocks.boundary(3)]
    assert window.outputs == (hidden,)


def test_a_walk_gives_what_the_graph_gives():
    module, blocks = llama()
    walk = Walk(blocks, SAMPLES)
    for _ in blocks.names:
        walk.advance({})
    assert walk.quantized is walk.float  # the paths have not parted
    for sample, values in zip(SAMPLES, walk.float, strict=True):
        assert torch.equal(logits(blocks, values), run(module, sample)[0])


def test_the_quantized_path_gives_what_the_graph_with_those_weights_gives():
    module, blocks = llama()
    site = blocks.sites(1)[4]
    other = blocks.weights[site] + 0.1
    walk = Walk(blocks, SAMPLES)
    for index in range(3):
        walk.advance({site: other} if index == 1 else {})
    changed = copy_module(module)
    name = next(node for node, found in blocks.linears.items() if found == site).args[1].target
    parent, _, leaf = name.rpartition(".")
    part = changed.get_submodule(parent)
    delattr(part, leaf)
    part.register_buffer(leaf, other)
    for sample, before, after in zip(SAMPLES, walk.float, walk.quantized, strict=True):
        assert torch.equal(logits(blocks, before), run(module, sample)[0])
        want = run(changed, sample)[0]
        assert torch.equal(logits(blocks, after), want)
        assert not torch.equal(want, run(module, sample)[0])


def test_windows_are_differentiable_in_weights_constants_and_linear_inputs():
    _, blocks = llama()
    walk = Walk(blocks, SAMPLES)
    window = blocks.window(0, 2)
    weights = {site: window.weight(site).clone().requires_grad_() for site in window.sites}
    name = next(n.target for n in window.module.graph.find_nodes(op="get_attr") if "layernorm" in n.target)
    norm = window.module.get_parameter(name).detach().clone().requires_grad_()
    factor = torch.ones((), requires_grad=True)
    values = walk.float[0]

    def loss(**changed: Any) -> torch.Tensor:
        given = {"weights": weights, "constants": {name: norm}, "feed": lambda site, x: x * factor}
        (made,) = window.run(values, **(given | changed)).values()
        return made.square().mean()

    gradients = torch.autograd.grad(loss(), [*weights.values(), norm, factor])
    assert all(g.abs().max() > 0 for g in gradients)
    # Along its gradient, the loss grows by the gradient's square.
    for site, gradient in ((window.sites[3], gradients[3]), (window.sites[-1], gradients[13])):
        step = 1e-3 / gradient.norm()
        up, down = (loss(weights=weights | {site: weights[site] + sign * step * gradient}) for sign in (1, -1))
        slope = (up - down).item() / (2 * step)
        assert slope == pytest.approx(gradient.square().sum().item(), rel=1e-2)


def test_a_window_runs_in_bfloat16():
    _, blocks = llama()
    walk = Walk(blocks, SAMPLES)
    window = blocks.window(0, 2)
    (exact,) = window.run(walk.float[0]).values()
    (rounded,) = window.run(walk.float[0], precision=torch.bfloat16).values()
    assert rounded.dtype == torch.float32
    assert 1e-4 < float((rounded - exact).detach().norm() / exact.detach().norm()) < 3e-2


def test_observe_shows_each_linear_its_input():
    _, blocks = llama()
    values = Walk(blocks, SAMPLES).float[0]
    window = blocks.window(0, 1)
    seen: dict[str, torch.Tensor] = {}
    made = window.observe(values, seen.__setitem__)
    assert tuple(seen) == window.sites
    down = window.sites[-1]
    assert seen[down].shape == (2, 7, 48)
    doubled = window.observe(values, lambda site, x: None, feed=lambda site, x: 2 * x if site == down else x)
    name = window.outputs[-1]
    expected = made[name] + seen[down] @ window.weight(down).T
    torch.testing.assert_close(doubled[name], expected, rtol=1e-5, atol=1e-5)


def test_memory_is_one_boundary_and_equal_values_are_held_once():
    _, blocks = llama()
    walk = Walk(blocks, SAMPLES[:2])
    walk.advance({blocks.sites(0)[0]: torch.zeros(32, 32)})
    assert set(walk.float[0]) == set(blocks.boundary(1)) == set(walk.quantized[1])
    tensors = [v for path in (walk.float, walk.quantized) for s in path for v in s.values() if torch.is_tensor(v)]
    hidden, tables = {v.data_ptr() for v in tensors if v.shape[-1] == 32}, {v.data_ptr() for v in tensors}
    assert len(hidden) == 4  # two samples on two paths
    assert len(tables - hidden) == 2  # cos and sin


class Shared(nn.Module):
    """A head tied to the first of two lists' layers, and a list inside a list."""

    def __init__(self) -> None:
        super().__init__()
        stage = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(2)])
        self.stages = nn.ModuleList([nn.ModuleDict({"parts": stage})])
        self.late = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.between, self.head = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head.weight = self.late[0].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.stages[0]["parts"]:
            x = x + part(x)
        x = self.between(x)
        for layer in self.late:
            x = x + layer(x)
        return self.head(x)


def test_lists_of_one_are_looked_into_and_tied_weights_have_one_owner():
    torch.manual_seed(0)
    module = copy_module(export_model(Shared(), (torch.randn(3, 8),), {}).module)
    raise_graph(module)
    module, blocks = cut(module)
    assert blocks.names == ("stages.0.parts.0", "stages.0.parts.1", "late.0", "late.1")
    # What stands between two lists belongs to the block before it.
    assert blocks.sites(1)[-1] == "between/linear"
    assert blocks.outside == ("head/linear",)
    assert blocks.owners["head/linear"] == "late.0/linear"
    assert blocks.owners["late.1/linear"] == "late.1/linear"
    sample = [torch.randn(3, 8)]
    walk = Walk(blocks, [sample])
    for _ in blocks.names:
        walk.advance({})
    assert torch.equal(logits(blocks, walk.float[0]), run(module, sample)[0])


def test_weights_among_the_inputs_are_found():
    """Behind Dynamo parameters are placeholders."""
    weight = nn.Parameter(torch.randn(4, 4))
    graph = torch.fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    node = graph.call_function(OPS["linear"].overload, (x, w, None))
    graph.output((node,))
    set_site(node, Site("a.0/linear", "a.0", "", "linear"))
    view = GraphView(torch.fx.GraphModule({}, graph))
    assert split(view, [node]).names == ()  # an unknown weight is no site
    blocks = split(view, [node], [torch.zeros(1, 4), weight])
    assert blocks.names == ("a.0",) and torch.equal(blocks.window(0, 1).weight("a.0/linear"), weight)


def test_bad_ranges_are_refused():
    _, blocks = llama()
    for first, last in ((0, 0), (2, 1), (-1, 1), (0, 4)):
        with pytest.raises(BadArgument, match="no such window"):
            blocks.window(first, last)
    with pytest.raises(BadArgument, match="at least one"):
        Walk(blocks, [])
    walk = Walk(blocks, SAMPLES[:1])
    with pytest.raises(BadArgument, match="window starts at 1"):
        next(walk.targets(blocks.window(1, 2)))
