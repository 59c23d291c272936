"""What a raising rule is: it recognises one canonical op in a pre-dispatch ATen graph, in all its spellings.

A rule looks at one node at a time (``anchors`` says which targets are worth asking about) and never edits the graph.
It answers with what :func:`~tilewright.frontend.raising.raise_graph` should do:

- ``None``: the node has nothing to do with the op;
- :class:`Raised`: replace the root by the canonical op;
- :class:`Decline`: it is the op, and has to be left alone, for a reason;
- :class:`NearMiss`: it resembled the op (two nodes or more) and stopped being it at one node, for a reason.

A rule that is not certain must not raise: a missed site costs speed, a wrong one costs the user's trust.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.fx

from ...passes.base import Builder, Decline, NearMiss
from ...passes.matcher import Miss
from ...passes.view import GraphView, arguments, same_sizes, value

__all__ = ["Builder", "Decline", "Facts", "NearMiss", "RaiseRule", "Raised", "near_miss"]

Node = torch.fx.Node
aten = torch.ops.aten


@dataclass(frozen=True)
class Raised:
    """A site found: replace ``root`` by a call of the canonical op.

    op: name of the canonical op.
    args, kwargs: its arguments; nodes of the graph or constants. Every node has to come before ``root``.
    covered: the nodes the op stands for, the root included. None but the root may be used outside of the cover
        (assertions about metadata aside), or the site becomes a near miss: leave out nodes that others share.
    origin: the node whose module path and source line name the site.
    before: inserts helper nodes (casts, slices, a transposed weight) in front of the root and returns arguments by
        schema name, which are merged over ``args`` and ``kwargs``.
    root: the node whose value the op computes; the anchor when None. Shape, dtype and device have to be the same.
    after: inserts what turns the op's result into the root's value (a reshape, a cast) and returns that node.
    details: JSON-able facts for the report, such as what was proven about a mask.
    """

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    covered: tuple[Node, ...]
    origin: Node
    before: Callable[[Builder], dict[str, Any]] | None = None
    root: Node | None = None
    after: Callable[[Builder, Node], Node] | None = None
    details: dict[str, Any] = field(default_factory=dict)


class RaiseRule(Protocol):
    """One file under ``frontend/raising`` holds one rule (or a few closely related ones)."""

    op: str
    """The canonical op's name."""
    anchors: tuple[Any, ...]
    """The operators :meth:`match` is asked about, in graph order. Take the rarest node of the pattern."""

    def match(self, node: Node, view: GraphView, facts: Facts) -> Raised | NearMiss | Decline | None: ...


@dataclass
class Facts:
    """What is known about one graph and shared between rules while it is being raised.

    memo: for results that several sites share, such as the analysis of a mask. Key it by the rule's name and node.
    """

    view: GraphView
    memo: dict[Any, Any] = field(default_factory=dict)

    def number(self, item: Any) -> int | float | None:
        """The number that ``item`` is, when known while compiling: a Python number or a constant 0-dim tensor."""
        if isinstance(item, bool):
            return None
        if isinstance(item, int | float):
            return item
        if not isinstance(item, Node):
            return None
        if item.op == "get_attr":
            return self._stored(item)
        if item.target in (aten.lift_fresh_copy.default, aten.detach.default, aten.alias.default, aten.clone.default):
            return self.number(item.args[0])
        if item.target in (aten.scalar_tensor.default, aten.full.default):
            given = arguments(item)
            if given.get("size", []) == []:
                return self.number(given.get("s", given.get("fill_value")))
        if item.target in (aten.zeros.default, aten.ones.default) and item.args[0] == []:
            return 0 if item.target is aten.zeros.default else 1
        return None

    def _stored(self, node: Node) -> int | float | None:
        tensor: Any = self.view.module
        for name in str(node.target).split("."):
            tensor = getattr(tensor, name, None)
        # A parameter, or a buffer that a call updates, is not a constant. Export names lifted constants so.
        if isinstance(tensor, torch.nn.Parameter) or not isinstance(tensor, torch.Tensor) or tensor.dim() != 0:
            return None
        if "lifted_tensor" not in str(node.target) and "_tensor_constant" not in str(node.target):
            return None
        number = tensor.item()
        return None if isinstance(number, bool | complex) else number

    @staticmethod
    def is_parameter(item: Any) -> bool:
        """Whether ``item`` may be a weight: read from the module, or a graph input (door two passes weights so)."""
        return isinstance(item, Node) and item.op in ("get_attr", "placeholder")

    @staticmethod
    def dtype(item: Any) -> torch.dtype | None:
        return getattr(value(item), "dtype", None)

    @staticmethod
    def rank(item: Any) -> int:
        """Number of dimensions; -1 when ``item`` is no tensor."""
        val = value(item)
        return val.dim() if isinstance(val, torch.Tensor) else -1

    @staticmethod
    def same_shape(left: Any, right: Any) -> bool:
        """Whether two nodes' shapes are provably equal; adds no guard on symbolic sizes."""
        a, b = value(left), value(right)
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and same_sizes(a.shape, b.shape)


def near_miss(miss: Miss) -> NearMiss | None:
    """A near miss when at least two nodes had matched; less is no resemblance."""
    return NearMiss(miss.node, miss.reason) if miss.depth >= 2 else None
