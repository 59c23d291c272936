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
from ...passes.view import GraphView, arguments, is_assertion, is_cast, is_identity, peel, same_size, same_sizes, value

__all__ = [
    "Builder",
    "Decline",
    "Facts",
    "NearMiss",
    "RaiseRule",
    "Raised",
    "chain_to",
    "is_call",
    "is_dim",
    "is_vector",
    "is_widening",
    "last_size",
    "near_miss",
    "other_operand",
    "past_identities",
    "peel_widening",
    "readers",
    "sole_reader",
]

Node = torch.fx.Node
aten = torch.ops.aten

PARAMETER = "tilewright_parameter"
"""``node.meta`` key, true on placeholders that stand for parameters or buffers of the model."""


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
    def is_weight(item: Any) -> bool:
        """Whether ``item`` is a parameter or buffer of the model.

        Door one reads them with ``get_attr``. Door two passes them as inputs, which ``meta[PARAMETER]`` marks.
        """
        return isinstance(item, Node) and (
            item.op == "get_attr" or (item.op == "placeholder" and bool(item.meta.get(PARAMETER)))
        )

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


def is_call(item: Any, *targets: Any) -> bool:
    """Whether ``item`` is a graph node that calls one of ``targets``."""
    return isinstance(item, Node) and item.target in targets


def readers(node: Node) -> list[Node]:
    """The nodes that use ``node``'s value, assertions about metadata aside, in graph order."""
    return sorted(user for user in node.users if not is_assertion(user))


def sole_reader(node: Node) -> Node | None:
    """The only node that uses ``node``'s value; None when there are several or none."""
    users = readers(node)
    return users[0] if len(users) == 1 else None


def past_identities(node: Node) -> tuple[Node, list[Node]]:
    """Follow single users forward while they change nothing: the last of the chain, and the chain after ``node``."""
    chain: list[Node] = []
    while (user := sole_reader(node)) is not None and is_identity(user) and user.args[0] is node:
        chain.append(user)
        node = user
    return node, chain


def other_operand(node: Node, operand: Any) -> Any:
    """The other one of a binary node's first two arguments, or None when ``operand`` is neither, or is both."""
    left, right = node.args[:2]
    ours = [peel(side) is peel(operand) for side in (left, right)]
    return (right if ours[0] else left) if ours.count(True) == 1 else None


def is_widening(node: Any) -> bool:
    """Whether ``node`` is a cast between floating dtypes that loses nothing (bfloat16 to float32; a cast to itself)."""
    if not is_cast(node):
        return False
    before, after = Facts.dtype(node.args[0]), Facts.dtype(node)
    return (
        before is not None
        and after is not None
        and before.is_floating_point
        and after.is_floating_point
        and torch.promote_types(before, after) == after
    )


def peel_widening(item: Any) -> Any:
    """What is behind a chain of identities and widening casts."""
    while is_identity(item) or is_widening(item):
        item = item.args[0]
    return item


def chain_to(item: Any, end: Any) -> list[Node]:
    """The nodes from ``item`` down its first arguments to ``end``, ``end`` excluded."""
    chain: list[Node] = []
    while item is not end:
        chain.append(item)
        item = item.args[0]
    return chain


def is_dim(dim: Any, wanted: int, rank: int) -> bool:
    """Whether ``dim``, possibly negative or a list of one, is dimension ``wanted`` of ``rank``."""
    if isinstance(dim, list | tuple):
        dim = dim[0] if len(dim) == 1 else None
    return isinstance(dim, int) and not isinstance(dim, bool) and rank > 0 and dim % rank == wanted % rank


def last_size(item: Any) -> Any:
    """The size of the last dimension (int or SymInt); None for what is no tensor or a scalar."""
    val = value(item)
    return val.shape[-1] if isinstance(val, torch.Tensor) and val.dim() else None


def is_vector(item: Any, size: Any) -> bool:
    """Whether ``item`` is a tensor of one dimension with provably ``size`` elements."""
    val = value(item)
    return isinstance(val, torch.Tensor) and val.dim() == 1 and size is not None and same_size(val.shape[0], size)
