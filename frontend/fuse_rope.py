"""Queries and keys that are parts of one tensor are turned by their positions in one kernel call.

Where :mod:`.fuse_linear` has made one call of the projections, its result is split, each part is viewed as heads, and
queries and keys are turned by the same angles. Heads that lie side by side can as well be turned together and parted
afterwards: a call less a layer, some microseconds of a token. Only for the native CPU kernel, which takes any strides.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from ..passes.view import GraphView, arguments, is_assertion, is_identity, peel, same_sizes, value
from .fuse_linear import describe, survives

Node = torch.fx.Node
aten = torch.ops.aten
_ROPE = torch.ops.tilewright.rope.default
_SPLIT = aten.split_with_sizes.default
_HEADS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class _Turned:
    """One call of rope. heads: the view (B, L, H, N) of part ``index`` of ``split``, which it turns transposed."""

    rope: Node
    heads: Any
    split: Any
    index: int

    @property
    def count(self) -> int:
        found: int = value(self.heads).shape[2]
        return found


def fuse(module: torch.fx.GraphModule) -> int:
    """Join calls of ``tilewright::rope`` in place. Returns how many calls turn more than one part.

    The joined call has the site of its first one. Nothing is joined across a write in place or an autocast region's
    border, nor where somebody relies on how a result lies in memory.
    """
    view = GraphView(module)
    groups: dict[Any, list[_Turned]] = {}
    for node in view.graph.find_nodes(op="call_function", target=_ROPE):
        if (found := _turned(node)) is not None:
            given = arguments(node)
            same = found.split, peel(given["cos"]), peel(given["sin"]), given["layout"], view.autocast.get(node)
            groups.setdefault(same, []).append(found)
    count = 0
    for group in groups.values():
        group.sort(key=lambda one: one.index)
        count += _join(view, group)
    if count:
        module.graph.lint()
        module.recompile()
    return count


def _turned(node: Node) -> _Turned | None:
    given = arguments(node)
    across: Any = peel(given["x"])
    if not isinstance(across, Node) or across.target is not aten.transpose.int or value(across).dim() != 4:
        return None
    dims: Any = across.args[1:]
    if {dim % 4 for dim in dims} != {1, 2}:
        return None
    heads: Any = peel(across.args[0])
    part: Any = peel(heads.args[0]) if isinstance(heads, Node) and heads.target in _HEADS else None
    if not isinstance(part, Node) or part.target is not operator.getitem:
        return None
    split: Any = part.args[0]
    index: Any = part.args[1]
    if split.target is not _SPLIT or arguments(split)["dim"] % value(part).dim() != value(part).dim() - 1:
        return None
    *outer, count, size = value(heads).shape
    if not isinstance(count, int) or not isinstance(size, int) or not same_sizes(outer, value(part).shape[:-1]):
        return None
    angles = [value(given[name]) for name in ("cos", "sin")]
    if any(angle.dim() > 2 and angle.shape[-3] != 1 for angle in angles):  # each head has its own
        return None
    return _Turned(node, heads, split, index)


def _join(view: GraphView, group: list[_Turned]) -> int:
    """group: by index. Joins it if it is some parts side by side with heads of one size."""
    first, last = group[0], group[-1]
    size = value(first.heads).shape[3]
    together = [one.index for one in group] == list(range(first.index, last.index + 1))
    if len(group) < 2 or not together or any(value(one.heads).shape[3] != size for one in group):
        return 0
    early, late = min(one.rope for one in group), max(one.rope for one in group)
    if view.modified([one.rope for one in group] + [first.split], late) is not None:
        return 0
    here = next(one for one in group if one.rope is early)
    given = arguments(early)
    widths, counts = list(first.split.args[1]), [one.count for one in group]
    begin, end = first.index, last.index + 1
    whole: Any = first.split.args[0]
    # As fake tensors, to see whether those who read the results can live with how these lie in memory.
    parts = value(whole).split([*widths[:begin], sum(widths[begin:end]), *widths[end:]], -1)
    heads = parts[begin].view(*value(here.heads).shape[:2], sum(counts), size)
    across = heads.transpose(1, 2)
    turned = torch.empty_like(across, dtype=value(early).dtype)
    results = turned.split(counts, 1)
    updates: list[tuple[Node, Any]] = []
    if not all(survives(one.rope, part, updates.append) for one, part in zip(group, results, strict=True)):
        return 0
    made: list[Node] = []

    def call(before: Node, target: Any, args: tuple[Any, ...], shown: Any, origin: Node, **kwargs: Any) -> Node:
        with view.graph.inserting_before(before):
            node = view.graph.call_function(target, args, kwargs)
        node.meta["val"] = shown
        describe(node, origin)
        view.insert(node)
        made.append(node)
        return node

    behind: Node = first.split.next  # whoever reads another part may stand before the ropes
    split = call(behind, _SPLIT, (whole, [one.shape[-1] for one in parts], -1), parts, first.split)
    getters = [call(behind, operator.getitem, (split, i), one, first.split) for i, one in enumerate(parts)]
    sizes = [*here.heads.args[1][:2], sum(counts), size]
    node = call(early, aten.view.default, (getters[begin], sizes), heads, here.heads)
    node = call(early, aten.transpose.int, (node, 1, 2), across, here.heads)
    node = call(early, _ROPE, (node, given["cos"], given["sin"]), turned, early, layout=given["layout"])
    apart = call(early, _SPLIT, (node, counts, 1), results, early)
    pieces = [call(early, operator.getitem, (apart, i), part, group[i].rope) for i, part in enumerate(results)]
    for one, piece in zip(group, pieces, strict=True):
        view.replace(one.rope, piece)
        _drop(view, one.rope)
    user: Any
    for user in list(first.split.users):  # parts that are not turned
        if user.target is operator.getitem and not begin <= user.args[1] < end:
            place = user.args[1] if user.args[1] < begin else user.args[1] - (end - begin) + 1
            view.replace(user, getters[place])
            _drop(view, user)
    for unread in reversed(made):
        if not unread.users:
            view.erase(unread)
    for changed, shown in updates:
        changed.meta["val"] = shown
    return 1


def _drop(view: GraphView, node: Node) -> None:
    """Erase a node that only assertions read, and the views that it alone read."""
    if any(not is_assertion(user) for user in node.users):
        return
    for user in list(node.users):
        view.erase(user)
    before = node.args[0] if node.args else None
    view.erase(node)
    views = (*_HEADS, aten.transpose.int, operator.getitem, _SPLIT)
    if isinstance(before, Node) and (before.target in views or is_identity(before)):
        _drop(view, before)
