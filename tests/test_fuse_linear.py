"""Linear layers joined with what follows them: the graph afterwards, its values, and what is left alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tilewright.frontend.fuse_linear import fuse
from tilewright.frontend.raising import raise_graph
from tilewright.passes.site import get_site

K, N = 24, 16
fused_op = torch.ops.tilewright.linear_fused.default
linear_op = torch.ops.tilewright.linear.default


class Model(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.a = torch.nn.Linear(K, N)
        self.b = torch.nn.Linear(K, N, bias=False)
        self.c = torch.nn.Linear(K, N)
        self.down = torch.nn.Linear(N, K)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def graph_of(function, x):
    module = torch.export.export(Model(function), (x,)).module()
    raise_graph(module)
    return module


def nodes(module, target):
    return [node for node in module.graph.nodes if node.target is target]


def heads(y):
    return y.view(2, 5, 4, 4).transpose(1, 2) * 2


# Name -> function of (model, x); what each fused node holds: activation, gated, residual, weights; plain layers left.
FUSES = {
    "gelu": (lambda m, x: functional.gelu(m.a(x)), [("gelu", False, False, 1)], 0),
    "tanh gelu": (lambda m, x: functional.gelu(m.a(x), approximate="tanh"), [("gelu_tanh", False, False, 1)], 0),
    "silu": (lambda m, x: functional.silu(m.a(x)), [("silu", False, False, 1)], 0),
    "relu": (lambda m, x: functional.relu(m.b(x)), [("relu", False, False, 1)], 0),
    "sigmoid": (lambda m, x: torch.sigmoid(m.a(x)), [("sigmoid", False, False, 1)], 0),
    "dropout between": (
        lambda m, x: functional.gelu(functional.dropout(m.a(x), 0.1, training=False)),
        [("gelu", False, False, 1)],
        0,
    ),
    "residual": (lambda m, x: x + m.down(m.a(x)), [("none", False, True, 1)], 1),
    "residual after an activation": (
        lambda m, x: functional.gelu(m.down(x[..., :N])) + x,
        [("gelu", False, True, 1)],
        0,
    ),
    "mlp": (
        lambda m, x: m.down(functional.gelu(m.a(x))) + x,
        [("gelu", False, False, 1), ("none", False, True, 1)],
        0,
    ),
    "gated": (
        lambda m, x: m.down(functional.silu(m.a(x)) * m.b(x)) + x,
        [("silu", True, False, 2), ("none", False, True, 1)],
        0,
    ),
    "siblings": (lambda m, x: (heads(m.a(x)), heads(m.b(x)), heads(m.c(x))), [("none", False, False, 3)], 0),
    "one layer on two sums": (
        lambda m, x: m.down(m.a(x)) + m.down(m.b(x)),
        [("none", False, True, 1), ("none", False, False, 2)],
        1,
    ),
}


@pytest.mark.parametrize("name", FUSES)
def test_what_is_fused(name):
    function, wanted, plain = FUSES[name]
    x = torch.randn(2, 5, K)
    module = graph_of(function, x)
    expected = torch.utils._pytree.tree_leaves(module(x))
    sites = {get_site(node).id for node in nodes(module, linear_op)}
    assert fuse(module) == len(wanted)
    found = [
        (node.kwargs["activation"], node.kwargs["gated"], node.args[3] is not None, len(node.args[1]))
        for node in nodes(module, fused_op)
    ]
    assert sorted(found) == sorted(wanted) and len(nodes(module, linear_op)) == plain
    assert {get_site(node).id for node in nodes(module, fused_op)} <= sites
    for target in ("reference", "cpp"):
        for node in nodes(module, fused_op):
            node.update_kwarg("target", target)
        module.recompile()
        with torch.no_grad():
            results = torch.utils._pytree.tree_leaves(module(x))
        for result, one in zip(results, expected, strict=True):
            torch.testing.assert_close(result, one, atol=1e-5, rtol=1e-5)
    for node in module.graph.nodes:
        if node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor):
            assert node.meta["val"].dtype == torch.float32


def twice(m, x):
    y = m.a(x)
    return functional.gelu(y), y


def written(m, x):
    y = m.a(x)
    x.mul_(2)
    return m.b(x), y


LEFT = {
    "read twice": twice,
    "activation of another dtype": lambda m, x: functional.gelu(m.a(x).double()),
    "sum with a factor": lambda m, x: torch.add(x, m.down(m.a(x)), alpha=2),
    "sum that broadcasts": lambda m, x: m.down(m.a(x)) + x[:1],
    "sum with itself": lambda m, x: (y := m.a(x)) + y,
    "an activation without a kernel": lambda m, x: functional.elu(m.a(x)),
    "siblings across a write": written,
    "siblings whose layout is returned": lambda m, x: (m.a(x), m.b(x)),
    "siblings seen flat": lambda m, x: (m.a(x).view(-1), m.b(x).view(-1)),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_alone(name):
    x = torch.randn(2, 5, K)
    module = graph_of(LEFT[name], x)
    expected = torch.utils._pytree.tree_leaves(module(x.clone()))
    assert fuse(module) == 0
    for result, one in zip(torch.utils._pytree.tree_leaves(module(x.clone())), expected, strict=True):
        assert torch.equal(result, one)


def test_views_after_a_merge_know_their_layout():
    x = torch.randn(2, 5, K)
    module = graph_of(FUSES["siblings"][0], x)
    fuse(module)
    seen = {}

    class Record(torch.fx.Interpreter):
        def run_node(self, node):
            seen[node] = super().run_node(node)
            return seen[node]

    with torch.no_grad():
        Record(module).run(x)
    shown = [
        node for node in seen if isinstance(seen[node], torch.Tensor) and isinstance(node.meta.get("val"), torch.Tensor)
    ]
    views = [node for node in shown if node.target in (torch.ops.aten.view.default, torch.ops.aten.transpose.int)]
    assert len(views) == 6
    for node in views:
        assert seen[node].stride() == node.meta["val"].stride()
