"""Queries and keys of one projection are turned by one kernel call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import decoders
import pytest
import tiny
import torch
from torch import Tensor, nn

import tilewright as tw
from tilewright.frontend import fuse_linear, fuse_rope, lower
from tilewright.frontend.raising import raise_graph
from tilewright.passes.site import get_site

ROPE = torch.ops.tilewright.rope.default
SIZE = 8


def turn(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """x: (B, H, L, SIZE). angles: their cosines and sines, (B, 1, L, SIZE)."""
    cos, sin = angles
    return x * cos + torch.cat((-x[..., SIZE // 2 :], x[..., : SIZE // 2]), dim=-1) * sin


class Projected(nn.Module):
    """Queries, keys and values (B, H, L, SIZE) of 4, 2 and 2 heads, and what is done with them."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, heads * SIZE) for heads in (4, 2, 2))
        self.function = function

    def forward(self, x: Tensor, angles: Tensor) -> Any:
        q, k, v = (one(x).view(*x.shape[:2], -1, SIZE).transpose(1, 2) for one in self.layers)
        return self.function(q, k, v, (angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)))


def mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.sum(1) * 2 + (k * v).sum(1)


def ropes(module: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return module.graph.find_nodes(op="call_function", target=ROPE)


def graph_of(function: Callable[..., Any], dynamic: bool = True) -> tuple[torch.fx.GraphModule, tuple[Tensor, Tensor]]:
    """Raised, its linear layers joined."""
    inputs = torch.randn(2, 5, 16), torch.rand(2, 5, SIZE)
    length = {1: torch.export.Dim("length", min=2)} if dynamic else {}
    module = torch.export.export(Projected(function), inputs, dynamic_shapes=(length, length)).module()
    raise_graph(module)
    fuse_linear.fuse(module)
    assert ropes(module)
    return module, inputs


JOINED = {
    "queries and keys": lambda q, k, v, a: mixed(turn(q, a), turn(k, a), v),
    "keys first": lambda q, k, v, a: (lambda turned: mixed(turn(q, a), turned, v))(turn(k, a)),
    "values read first": lambda q, k, v, a: (lambda first: mixed(turn(q, a), turn(k, a), v) + first)(v.sum(1)),
    "all three": lambda q, k, v, a: mixed(turn(q, a), turn(k, a), turn(v, a)),
    "keys and values": lambda q, k, v, a: mixed(q, turn(k, a), turn(v, a)),
    "unturned keys as well": lambda q, k, v, a: mixed(turn(q, a), turn(k, a), v) + k.sum(1),
}
APART = {
    "angles of their own": lambda q, k, v, a: mixed(turn(q, a), turn(k, (a[0], -a[1])), v),
    "queries alone": lambda q, k, v, a: mixed(turn(q, a), k, v),
    "not side by side": lambda q, k, v, a: mixed(turn(q, a), k, turn(v, a)),
    "scaled before": lambda q, k, v, a: mixed(turn(q * 2, a), turn(k, a), v),
    "given out": lambda q, k, v, a: (turn(q, a), turn(k, a), v),
}


@torch.no_grad()
@pytest.mark.parametrize("name", list(JOINED))
@pytest.mark.parametrize("dynamic", [False, True])
def test_joined(name, dynamic):
    module, inputs = graph_of(JOINED[name], dynamic)
    sites = [get_site(node) for node in ropes(module)]
    want = copy.deepcopy(module)(*inputs)
    assert fuse_rope.fuse(module) == 1
    (node,) = ropes(module)
    assert get_site(node) == sites[0]
    assert torch.equal(module(*inputs), want)
    if dynamic:
        longer = torch.randn(2, 9, 16), torch.rand(2, 9, SIZE)
        assert module(*longer).shape == (2, 9, SIZE)
    assert fuse_rope.fuse(module) == 0


@torch.no_grad()
@pytest.mark.parametrize("name", list(APART))
def test_left_apart(name):
    module, inputs = graph_of(APART[name])
    before, want = len(ropes(module)), module(*inputs)
    assert fuse_rope.fuse(module) == 0 and len(ropes(module)) == before
    torch.testing.assert_close(module(*inputs), want, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("passes", ["", "kv-cache{max_length=32}", "quantize{bits=8},kv-cache{max_length=32}"])
def test_decoders_turn_queries_and_keys_at_once(passes, monkeypatch):
    model = decoders.model("llama")
    joined = tw.compile(model, passes, target="cpp", rest="eager", example_inputs=(tiny.tokens(),))
    layers = model.config.num_hidden_layers
    assert len(ropes(joined.records[0].lowered)) == layers
    monkeypatch.setattr(lower.fuse_rope, "fuse", lambda module: 0)
    apart = tw.compile(model, passes, target="cpp", rest="eager", example_inputs=(tiny.tokens(),))
    assert len(ropes(apart.records[0].lowered)) == 2 * layers
    for batch, length in ((1, 7), (3, 1), (2, 12)):
        ids = tiny.tokens(batch, length)
        assert torch.equal(joined(ids).logits, apart(ids).logits)
