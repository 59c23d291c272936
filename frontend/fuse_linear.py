"""Linear layers and what follows them in one kernel call: activation, gate, residual, and layers that share an input.

Layers with packed low-bit weights take the same part as those with plain ones; they also take up the RMS norm of their
input.

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


_Layers = tuple[Any, ...]
_LAYERS = (_ops.linear.default, _ops.linear_fused.default, _ops.quantized_linear.default)
_PACKED = (_ops.quantized_linear.default,)
_LISTS = ("weights", "codes", "scales", "zeros", "biases", "rows")  # arguments with an item for each weight


def fuse(module: torch.fx.GraphModule, *, packed_only: bool = False) -> int:
    """Form ``tilewright::linear_fused`` nodes from raised ones, in place, and give ``tilewright::quantized_linear``
    nodes what stands around them. Returns how many calls do more than one layer.

    A linear layer takes up an activation and then a residual sum where it is the only one that feeds them; two layers
    take up the ``gated_mlp`` they alone feed; layers that share an input become one whose result is split; a call of
    packed layers takes up the RMS norm that it alone reads. A node has the site of its first linear layer. Nothing is
    fused across a write in place, or out of or into an autocast region.

    packed_only: for a GPU, where only layers with packed weights have such kernels: plain layers and norms stay as they
    are.
    """
    view = GraphView(module)
    layers = _PACKED if packed_only else _LAYERS
    count = _gates(view, layers) + _activations(view, layers) + _residuals(view, layers) + _siblings(view, layers)
    if not packed_only:
        count += _norms(view)
    if count:
        module.graph.lint()
        module.recompile()
    return sum(not _is_plain(_parts(node)) for node in _calls(view, *_LAYERS)) if count else 0


def _calls(view: GraphView, *targets: Any) -> list[Node]:
    return [node for node in view.graph.nodes if node.op == "call_function" and node.target in targets]


def _parts(node: Node) -> dict[str, Any]:
    """The arguments of the fused op that a layer stands for, and that op as ``op``."""
    given = arguments(node)
    if node.target is _ops.linear.default:
        return {
            "op": _ops.linear_fused.default,
            "x": given["x"],
            "weights": [given["weight"]],
            "biases": [given["bias"]],
            "residual": None,
            "activation": "none",
            "gated": False,
        }
    given.pop("target", None)
    return {"op": node.target, **given}


def _is_plain(parts: dict[str, Any]) -> bool:
    """Whether this is one layer, and nothing follows it."""
    return (
        len(parts["biases"]) == 1 and parts["activation"] == "none" and not parts["gated"] and parts["residual"] is None
    )


def _kind(parts: dict[str, Any]) -> tuple[Any, ...]:
    """What layers must have in common to be one call."""
    return parts["op"], parts.get("format")


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One call of several plain layers of one kind and input."""
    lists = {key: [item for one in parts for item in one[key]] for key in _LISTS if key in parts[0]}
    return parts[0] | lists


def _call(view: GraphView, parts: dict[str, Any]) -> Node:
    """The fused node, at the graph's insertion point."""
    op = parts["op"]
    schema = [a for a in op._schema.arguments if a.name in parts]
    args = tuple(parts[a.name] for a in schema if not a.kwarg_only)
    return view.graph.call_function(op, args, {a.name: parts[a.name] for a in schema if a.kwarg_only})


def _feeds_only(item: Any, user: Node, view: GraphView, layers: _Layers) -> tuple[Node, list[Node]] | None:
    """The linear layer behind the chain of copies ``item``, and that chain, if nothing but ``user`` reads them."""
    node = peel(item)
    if not isinstance(node, Node) or node.target not in layers:
        return None
    chain = [*chain_to(item, node), node]
    readers = {reader for one in chain for reader in one.users if not is_assertion(reader)} - set(chain)
    if readers != {user} or view.autocast.get(node) != view.autocast.get(user):
        return None
    return (node, chain) if view.modified(chain, user) is None else None


def _put(view: GraphView, root: Node, covered: list[Node], first: Node, parts: dict[str, Any]) -> Node:
    """A fused node in the place of ``root``, which with ``covered`` disappears."""
    with view.graph.inserting_before(root):
        fused = _call(view, parts)
    fused.meta["val"] = value(root)
    describe(fused, first)
    view.insert(fused)
    view.replace(root, fused)
    for node in (root, *covered):
        for user in list(node.users):  # assertions about it
            view.erase(user)
        view.erase(node)
    return fused


def describe(node: Node, origin: Node) -> None:
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack", DETAILS):
        if key in origin.meta:
            node.meta[key] = origin.meta[key]
    if (site := get_site(origin)) is not None:
        set_site(node, site)


def _gates(view: GraphView, layers: _Layers) -> int:
    count = 0
    for node in _calls(view, _ops.gated_mlp.default):
        given = arguments(node)
        gate, up = (_feeds_only(given[name], node, view, layers) for name in ("gate", "up"))
        if gate is None or up is None or gate[0] is up[0]:
            continue
        left, right = _parts(gate[0]), _parts(up[0])
        if left["x"] is not right["x"] or not same_sizes(value(gate[0]).shape, value(up[0]).shape):
            continue
        if _kind(left) != _kind(right) or not _is_plain(left) or not _is_plain(right):
            continue
        both = _joined([left, right]) | {"activation": given["activation"], "gated": True}
        _put(view, node, [*gate[1], *up[1]], gate[0], both)
        count += 1
    return count


def _activation(node: Node) -> str | None:
    if node.target is aten.gelu.default:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(arguments(node)["approximate"])
    return _ACTIVATIONS.get(node.target)


def _activations(view: GraphView, layers: _Layers) -> int:
    count = 0
    for node in _calls(view, aten.gelu.default, *_ACTIVATIONS):
        name = _activation(node)
        found = _feeds_only(node.args[0], node, view, layers)
        if name is None or found is None:
            continue
        parts = _parts(found[0])
        if parts["activation"] == "none" and not parts["gated"] and parts["residual"] is None:
            _put(view, node, found[1], found[0], parts | {"activation": name})
            count += 1
    return count


def _residuals(view: GraphView, layers: _Layers) -> int:
    count = 0
    for node in _calls(view, aten.add.Tensor):
        if arguments(node)["alpha"] != 1:
            continue
        for item, other in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
            found = _feeds_only(item, node, view, layers)
            if found is None or peel(other) is found[0] or not _like(other, node) or not _like(found[0], node):
                continue
            parts = _parts(found[0])
            if parts["residual"] is None:
                _put(view, node, found[1], found[0], parts | {"residual": other})
                count += 1
                break
    return count


def _norms(view: GraphView) -> int:
    """Packed layers, one call by now, normalise their input themselves where nothing else reads it normalised."""
    count = 0
    for node in _calls(view, *_PACKED):
        parts = _parts(node)
        found = _feeds_only(parts["x"], node, view, (_ops.rms_norm.default,))
        if found is None or parts["norm"] is not None:
            continue
        given = arguments(found[0])
        x, weight = value(given["x"]), given["weight"]
        if given["weight_offset"] or not isinstance(weight, Node) or value(weight).shape != x.shape[-1:]:
            continue
        if value(weight).dtype != x.dtype or x.dtype != value(node).dtype:
            continue
        taken = {name: given[name] for name in ("x", "eps", "round_before_weight")} | {"norm": weight}
        _put(view, node, found[1], node, parts | taken)
        count += 1
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


def _siblings(view: GraphView, layers: _Layers) -> int:
    """Plain layers that read one input become one; their results are slices of its result."""
    groups: dict[Any, list[Node]] = {}
    for node in _calls(view, *layers):
        parts, x = _parts(node), peel(arguments(node)["x"])
        if isinstance(x, Node) and value(node).dim() >= 1 and _is_plain(parts):
            groups.setdefault((x, view.autocast.get(node), _kind(parts)), []).append(node)
    count = 0
    for group in groups.values():
        for start in range(0, len(group), MOST_WEIGHTS):
            count += _merge(view, group[start : start + MOST_WEIGHTS])
    return count


def _merge(view: GraphView, group: list[Node]) -> int:
    if len(group) < 2:
        return 0
    first, last = group[0], group[-1]
    parts = _joined([_parts(node) for node in group])
    late = [one for key in _LISTS for one in parts.get(key, ()) if isinstance(one, Node) and one > first]
    if any(one.op != "get_attr" for one in late) or view.modified(group, last) is not None:
        return 0
    widths = [value(node).shape[-1] for node in group]
    if not all(isinstance(width, int) for width in widths):
        return 0
    whole = value(first).new_empty((*value(first).shape[:-1], sum(widths)))
    slices = whole.split(widths, -1)
    updates: list[tuple[Node, Any]] = []
    if not all(survives(node, one, updates.append) for node, one in zip(group, slices, strict=True)):
        return 0
    for one in late:  # constants that stand beside their layer
        first.prepend(one)
    with view.graph.inserting_before(first):
        fused = _call(view, parts)
        split = view.graph.call_function(aten.split_with_sizes.default, (fused, widths, -1))
        results = [view.graph.call_function(operator.getitem, (split, i)) for i in range(len(group))]
    fused.meta["val"], split.meta["val"] = whole, slices
    for node in (fused, split):
        describe(node, first)
        view.insert(node)
    for node, part, one in zip(group, results, slices, strict=True):
        part.meta["val"] = one
        describe(part, node)
        view.insert(part)
        view.replace(node, part)
        view.erase(node)
    for node, shown in updates:
        node.meta["val"] = shown
    return 1


def survives(node: Node, shown: Any, update: Callable[[tuple[Node, Any]], None]) -> bool:
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
        if not survives(user, result, update):
            return False
    return True
