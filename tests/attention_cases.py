"""Helpers of the attention tests: capture a function, raise it, compare with the function in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tilewright.frontend.raising import RaiseResult, raise_graph
from tilewright.frontend.raising.attention import RULES
from tilewright.runtime.ops.attention import TOLERANCE

ATTENTION = torch.ops.tilewright.attention.default


class Function(nn.Module):
    """A function as a module, so that it can be exported and be in training mode."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


@dataclass
class Raised:
    """A captured graph before and after raising, with its outputs."""

    module: torch.fx.GraphModule
    result: RaiseResult
    before: Any
    after: Any

    @property
    def calls(self) -> list[torch.fx.Node]:
        return [node for node in self.module.graph.nodes if node.target is ATTENTION]

    @property
    def call(self) -> torch.fx.Node:
        (call,) = self.calls
        return call

    def argument(self, name: str) -> Any:
        from tilewright.passes.view import arguments

        return arguments(self.call)[name]

    def shape(self, name: str) -> tuple[Any, ...] | None:
        node = self.argument(name)
        return None if node is None else tuple(node.meta["val"].shape)

    @property
    def notes(self) -> str:
        return " ".join(note for details in self.result.details.values() for note in details.get("notes", ()))


def raise_function(
    function: Callable[..., Any], *args: Tensor, training: bool = False, dynamic_shapes: Any = None
) -> Raised:
    """Export, raise, and run before and after on the same inputs (and the same random seed)."""
    module = function if isinstance(function, nn.Module) else Function(function)
    module.train(training)
    with torch.no_grad():
        graph = torch.export.export(module, args, strict=False, dynamic_shapes=dynamic_shapes).module()
        torch.manual_seed(0)
        before = graph(*args)
        result = raise_graph(graph, RULES)
        torch.manual_seed(0)
        after = graph(*args)
    return Raised(graph, result, before, after)


def tensors(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [t for t in output if isinstance(t, Tensor)]


def assert_close(actual: Any, expected: Any, dtype: torch.dtype, equal_nan: bool = False) -> None:
    """Within the tolerance of the canonical op for ``dtype``; ``expected`` usually is float64."""
    tolerance = TOLERANCE[dtype]
    for a, e in zip(tensors(actual), tensors(expected), strict=True):
        torch.testing.assert_close(a.double(), e.double(), equal_nan=equal_nan, **vars(tolerance))


def in_float64(function: Callable[..., Any], args: Sequence[Tensor]) -> Any:
    with torch.no_grad():
        return function(*(a.double() if a.is_floating_point() else a for a in args))


def qkv(
    dtype: torch.dtype = torch.float32,
    batch: int = 2,
    heads: int = 4,
    key_heads: int | None = None,
    queries: int = 7,
    keys: int | None = None,
    width: int = 16,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys = queries if keys is None else keys
    key_heads = heads if key_heads is None else key_heads

    def draw(h: int, length: int) -> Tensor:
        return torch.randn(batch, h, length, width, generator=generator).to(dtype)

    return draw(heads, queries), draw(key_heads, keys), draw(key_heads, keys)
