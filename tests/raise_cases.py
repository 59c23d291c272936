"""Helpers of the raising tests: trace a function to a pre-dispatch ATen graph, raise it, compare."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from tilewright.frontend.raising import RaiseResult, raise_graph
from tilewright.runtime import ops


def trace(function: Callable[..., Any], *inputs: torch.Tensor, symbolic: bool = False) -> torch.fx.GraphModule:
    """``function`` as door two sees it: every tensor is an input. symbolic: sizes other than 0 and 1 are symbols."""
    mode = "symbolic" if symbolic else "fake"
    return make_fx(function, pre_dispatch=True, tracing_mode=mode)(*inputs)


def export(module: torch.nn.Module, *inputs: torch.Tensor, **kwargs: Any) -> torch.fx.GraphModule:
    """``module`` as door one sees it: parameters are read with ``get_attr``."""
    with torch.no_grad():
        return torch.export.export(module, inputs, kwargs, strict=False).module()


def raise_function(
    function: Callable[..., Any], *inputs: torch.Tensor, symbolic: bool = False
) -> tuple[torch.fx.GraphModule, RaiseResult]:
    """Trace and raise; asserts that the graph computes the same before and after, within the dtype's rounding."""
    module = trace(function, *inputs, symbolic=symbolic)
    before = module(*inputs)
    result = raise_graph(module)
    assert_close(module(*inputs), before)
    return module, result


def nodes(module: torch.fx.GraphModule, op: str) -> list[torch.fx.Node]:
    """The graph's calls of the canonical op ``op``."""
    return [node for node in module.graph.nodes if node.target is ops.OPS[op].overload]


def counts(result: RaiseResult) -> dict[str, int]:
    return dict(collections.Counter(site.op for site in result.sites))


def assert_close(actual: Any, expected: Any, ulps: float = 8.0) -> None:
    """Equal within ``ulps`` units in the last place of the largest value of the tensor."""
    for a, e in zip(torch.utils._pytree.tree_leaves(actual), torch.utils._pytree.tree_leaves(expected), strict=True):
        if not isinstance(e, torch.Tensor):
            assert a == e
            continue
        assert a.dtype == e.dtype and a.shape == e.shape
        if not e.is_floating_point():
            assert torch.equal(a, e)
            continue
        scale = e.detach().abs().nan_to_num(0, 0, 0).max().item() if e.numel() else 0.0
        torch.testing.assert_close(
            a, e, rtol=0, atol=ulps * torch.finfo(e.dtype).eps * max(scale, 1e-30), equal_nan=True
        )
