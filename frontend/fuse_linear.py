"""Linear layers and what follows them in one kernel call: activation, gate, residual, and layers that share an input.

For the native CPU kernel, which finishes its sums while they are in registers; and a call less is some microseconds
less. Only for graphs that run without gradients: a fused node has none of its own kernel (its reference form has).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx

from ..codegen.linear import MOST_WEIGHTS
from ..passes.site import get_site, set_site
from ..passes.view import GraphView, arguments, is_assertion, peel, same_sizes, value
from .raising import DETAILS
from .raising.rules import chain_to

Node = torch.fx.Node
aten = torch.ops.aten
_ops = torch.ops.tilewright
_ACTIVATIONS: dict[Any, str] = {aten.silu.default: "silu", aten.relu.default: "relu", aten.sigmoid.default: "sigmoid"}
_VIEWS = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.unflatten.int,
        aten.transpose.int,
        aten.permute.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.expand.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.split.Tensor,
        aten.chunk.default,
        aten.split_with_sizes.default,
        operator.getitem,
    }
)


def fuse(module: torch.fx.GraphModule) -> int:
    """Form ``tilewright::linear_fused`` nodes from raised ones, in place. Returns how many were formed.

    A linear layer takes up an activation and then a residual sum where it is the only one that feeds them; two layers
    take up the ``gated_mlp`` they alone feed; layers that share an input become one whose result is split. A node has
    the site of its first linear layer. Nothing is fused across a write in place, or out of or into an autocast region.
    """
    view = GraphView(module)
    count = 0
    for step in (_gates, _activations, _residuals, _siblings):
        count += step(view)
    if count:
        module.graph.lint()
        module.recompile()
    return sum(node.target is _ops.linear_fused.default for node in module.graph.nodes) if count else 0


def _calls(view: GraphView, *targets: Any) -> list[Node]:
    return [node for node in view.graph.nodes if node.op == "call_function" and node.target in targets]


def _parts(node: Node) -> dict[str, Any]:
    """The arguments of ``linear_fused`` that a linear or already fused node stands for."""
    given = arguments(node)
    if node.target is _ops.linear.default:
        return {
            "x": given["x"],
            "weights": [given["weight"]],
            "biases": [given["bias"]],
            "residual": None,
            "activation": "none",
            "gated": False,
        }
    given.pop("target", None)
    return given


def _feeds_only(item: Any, user: Node, view: GraphView) -> tuple[Node, list[Node]] | None:
    """The linear layer behind the chain of copies ``item``, and that chain, if nothing but ``user`` reads them."""
    node = peel(item)
    if not isinstance(node, Node) or node.target not in (_ops.linear.default, _ops.linear_fused.default):
        return None
    chain = [*chain_to(item, node), node]
    readers = {reader for one in chain for reader in one.users if not is_assertion(reader)} - set(chain)
    if readers != {user} or view.autocast.get(node) != view.autocast.get(user):
        return None
    return (node, chain) if view.modified(chain, user) is None else None


def _put(view: GraphView, root: Node, covered: list[Node], first: Node, parts: dict[str, Any]) -> Node:
    """A fused node in the place of ``root``, which with ``covered`` disappears."""
    with view.graph.inserting_before(root):
        args = (parts["x"], parts["weights"], parts["biases"], parts["residual"])
        fused = view.graph.call_function(
            _ops.linear_fused.default, args, {"activation": parts["activation"], "gated": parts["gated"]}
        )
    fused.meta["val"] = value(root)
    _describe(fused, first)
    view.insert(fused)
    view.replace(root, fused)
    for node in (root, *covered):
        for user in list(node.users):  # assertions about it
            view.erase(user)
        view.erase(node)
    return fused


def _describe(node: Node, origin: Node) -> None:
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack", DETAILS):
        if key in origin.meta:
            node.meta[key] = origin.meta[key]
    if (site := get_site(origin)) is not None:
        set_site(node, site)


def _gates(view: GraphView) -> int:
    count = 0
    for node in _calls(view, _ops.gated_mlp.default):
        given = arguments(node)
        gate, up = _feeds_only(given["gate"], node, view), _feeds_only(given["up"], node, view)
        if gate is None or up is None or gate[0] is up[0]:
            continue
        left, right = _parts(gate[0]), _parts(up[0])
        if left["x"] is not right["x"] or not same_sizes(value(gate[0]).shape, value(up[0]).shape):
            continue
        for key in ("weights", "biases"):
            left[key] = [*left[key], *right[key]]
        left |= {"activation": given["activation"], "gated": True}
        _put(view, node, [*gate[1], *up[1]], gate[0], left)
        count += 1
    return count


def _activation(node: Node) -> str | None:
    if node.target is aten.gelu.default:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(arguments(node)["approximate"])
    return _ACTIVATIONS.get(node.target)


def _activations(view: GraphView) -> int:
    count = 0
    for node in _calls(view, aten.gelu.default, *_ACTIVATIONS):
        name = _activation(node)
        found = _feeds_only(node.args[0], node, view)
        if name is None or found is None:
            continue
        parts = _parts(found[0])
        if parts["activation"] == "none" and not parts["gated"]:
            _put(view, node, found[1], found[0], parts | {"activation": name})
            count += 1
    return count


def _residuals(view: GraphView) -> int:
    count = 0
    for node in _calls(view, aten.add.Tensor):
        if arguments(node)["alpha"] != 1:
            continue
        for item, other in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
            found = _feeds_only(item, node, view)
            if found is None or peel(other) is found[0] or not _like(other, node) or not _like(found[0], node):
                continue
            parts = _parts(found[0])
            if parts["residual"] is None:
                _put(view, node, found[1], found[0], parts | {"residual": other})
                count += 1
                break
    return count


def _like(item: Any, node: Node) -> bool:
    """Whether ``item`` is a tensor of the shape and dtype of the node's result."""
    mine, theirs = value(node), value(item)
    return (
        isinstance(item, Node)
        and isinstance(theirs, torch.Tensor)
        and theirs.dtype == mine.dtype
        and same_sizes(theirs.shape, mine.shape)
    )


def _siblings(view: GraphView) -> int:
    """Plain layers that read one input become one; their results are slices of its result."""
    groups: dict[Any, list[Node]] = {}
    for node in _calls(view, _ops.linear.default):
        x = peel(arguments(node)["x"])
        if isinstance(x, Node) and value(node).dim() >= 1:
            groups.setdefault((x, view.autocast.get(node)), []).append(node)
    count = 0
    for group in groups.values():
        for start in range(0, len(group), MOST_WEIGHTS):
            count += _merge(view, group[start : start + MOST_WEIGHTS])
    return count


def _merge(view: GraphView, group: list[Node]) -> int:
    if len(group) < 2:
        return 0
    first, last = group[0], group[-1]
    given = [arguments(node) for node in group]
    tensors = [item for g in given for item in (g["weight"], g["bias"]) if isinstance(item, Node)]
    if any(tensor > first for tensor in tensors) or view.modified(group, last) is not None:
        return 0
    widths = [value(g["weight"]).shape[0] for g in given]
    if not all(isinstance(width, int) for width in widths):
        return 0
    whole = value(first).new_empty((*value(first).shape[:-1], sum(widths)))
    slices = whole.split(widths, -1)
    updates: list[tuple[Node, Any]] = []
    if not all(_survives(node, one, updates.append) for node, one in zip(group, slices, strict=True)):
        return 0
    with view.graph.inserting_before(first):
        args = (given[0]["x"], [g["weight"] for g in given], [g["bias"] for g in given], None)
        fused = view.graph.call_function(_ops.linear_fused.default, args, {"activation": "none", "gated": False})
        split = view.graph.call_function(aten.split_with_sizes.default, (fused, widths, -1))
        parts = [view.graph.call_function(operator.getitem, (split, i)) for i in range(len(group))]
    fused.meta["val"], split.meta["val"] = whole, slices
    for node in (fused, split):
        _describe(node, first)
        view.insert(node)
    for node, part, one in zip(group, parts, slices, strict=True):
        part.meta["val"] = one
        _describe(part, node)
        view.insert(part)
        view.replace(node, part)
        view.erase(node)
    for node, shown in updates:
        node.meta["val"] = shown
    return 1


def _survives(node: Node, shown: Any, update: Callable[[tuple[Node, Any]], None]) -> bool:
    """Whether the views of ``node`` exist when its value is laid out as ``shown``; ``update`` gets their values."""
    for user in node.users:
        if user.target not in _VIEWS or user.args[0] is not node:
            if user.op == "output":
                return False  # callers may rely on the layout
            continue
        view: Any = user.target
        try:
            result = view(shown, *torch.fx.node.map_arg(user.args[1:], value), **user.kwargs)
        except (RuntimeError, ValueError):
            return False
        update((user, result))
        if not _survives(user, result, update):
            return False
    return True
