"""Norms of a sum are formed where that is right, keep their site, and compute the same; look-alikes are left alone."""

import operator

import pytest
import torch
from raise_cases import export, nodes

from tilewright.frontend.fuse_residual import fuse
from tilewright.frontend.raising import raise_graph
from tilewright.passes.site import get_site
from tilewright.passes.view import arguments

N = 16
aten = torch.ops.aten


class PreNorm(torch.nn.Module):
    """Two blocks as Llama has them: the sum goes on beside its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(N, eps=1e-6) for _ in range(3))
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(N, N) for _ in range(2))

    def forward(self, x):
        for norm, block in zip(self.norms, self.blocks, strict=False):
            x = x + block(norm(x))
        return self.norms[2](x)


class PostNorm(torch.nn.Module):
    """Two blocks as BERT has them: nobody reads the sum but the norm, and dropout is not active."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(N) for _ in range(2))
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(N, N) for _ in range(2))
        self.dropout = torch.nn.Dropout(0.1)

    def forward(self, x):
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = norm(self.dropout(block(x)) + x)
        return x


def raised(model, *inputs):
    exported = export(model.eval(), *inputs)
    raise_graph(exported)
    return exported


def run(module, *inputs):
    result = module(*inputs)
    return result[0] if isinstance(result, tuple | list) else result


@pytest.mark.parametrize("target", ["reference", "cpp"])
@pytest.mark.parametrize(
    ("model", "op", "count", "kept"), [(PreNorm, "rms_norm", 2, 1), (PostNorm, "layer_norm", 2, 0)]
)
def test_residual_streams(model, op, count, kept, target):
    torch.manual_seed(0)
    x = torch.randn(2, 3, N)
    graph = raised(model(), x)
    sites = [get_site(node) for node in nodes(graph, op)]
    expected = run(graph, x)
    assert fuse(graph) == count
    fused = nodes(graph, f"add_{op}")
    assert len(fused) == count and all(get_site(node) in sites for node in fused)
    assert [arguments(node)["keep_sum"] for node in fused] == [True] * kept + [False] * (count - kept)
    assert not [n for n in graph.graph.nodes if n.target is aten.add.Tensor]
    for node in graph.graph.nodes:
        if node.target is operator.getitem:
            source, index = node.args
            assert node.meta["val"].shape == source.meta["val"][index].shape
    for node in fused:
        node.update_kwarg("target", target)
    graph.recompile()
    torch.testing.assert_close(run(graph, x), expected, rtol=1e-5, atol=1e-5)
    assert fuse(graph) == 0


def left_alone(function, *inputs):
    graph = raised(Function(function), *inputs)
    assert nodes(graph, "rms_norm")
    before = [node.target for node in graph.graph.nodes]
    assert fuse(graph) == 0
    assert [node.target for node in graph.graph.nodes] == before


class Function(torch.nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def norm(x):
    return torch.rms_norm(x, [N], eps=1e-6)


def test_look_alikes_are_left_alone():
    x, y = torch.randn(2, 3, N), torch.randn(2, 3, N)
    left_alone(lambda x, y: norm(torch.add(x, y, alpha=2)), x, y)
    left_alone(lambda x, y: norm(x - y), x, y)
    left_alone(lambda x, y: norm(x + 1.0) + y, x, y)
    left_alone(lambda x, y: norm(x + y), x, y[:1])
    left_alone(lambda x, y: norm(x + y), x, y.bfloat16())
    left_alone(lambda x, y: norm((x + y) * 2), x, y)


def test_a_sum_that_is_read_before_the_norm_is_left_alone():
    def function(x, y):
        total = x + y
        other = total.exp()
        return norm(total) * other

    left_alone(function, torch.randn(3, N), torch.randn(3, N))


def test_one_sum_under_two_norms():
    x, y = torch.randn(3, N), torch.randn(3, N)

    def function(x, y):
        total = x + y
        return norm(total) + torch.layer_norm(total, [N])

    graph = raised(Function(function), x, y)
    expected = run(graph, x, y)
    assert fuse(graph) == 1
    torch.testing.assert_close(run(graph, x, y), expected, rtol=1e-6, atol=1e-6)


def test_a_copy_of_the_sum_is_the_sum():
    x, y = torch.randn(3, N), torch.randn(3, N)

    def function(x, y):
        copy = (x + y).clone()
        return norm(copy), copy

    graph = raised(Function(function), x, y)
    expected = graph(x, y)
    assert fuse(graph) == 1
    torch.testing.assert_close(tuple(graph(x, y)), tuple(expected), rtol=1e-6, atol=1e-6)
