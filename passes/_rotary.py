"""Queries and keys of an attention traced back to the rotary embedding they come from, and its angles as numbers.

What a cache needs to know of rotations: a decoder exported with ``position_ids`` as an input computes its angles from
them, and evaluating that part of the graph gives the rows of any position without running the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from ..runtime.ops import OPS
from .base import Builder
from .execute import extract, undisturbed
from .view import arguments, is_cast, is_identity, same_size, value

Node = torch.fx.Node
aten = torch.ops.aten
ROPE = OPS["rope"].overload
POSITIONS = "position_ids"
# Beyond any length a model was trained on: angles that are scaled by the length of the text change there.
_DISTANT = 10_000_000


@dataclass(frozen=True)
class Rotary:
    """Queries or keys, and the ``rope`` node that turned them.

    named: the rope's arguments. between: the nodes from the attention's argument down to the rope, each with the place
    of the next one among its inputs (for concatenations with channels that are not turned). angles: the dimension of
    cos and sin that counts the sequence.
    """

    named: Mapping[str, Any]
    between: tuple[tuple[Node, int], ...]
    angles: int

    def again(self, builder: Builder, cos: Node, sin: Node) -> Node:
        """The same, turned by other angles: cos, sin broadcastable to what is turned."""
        result = builder.call(ROPE, self.named["x"], cos, sin, layout=self.named["layout"])
        for node, place in reversed(self.between):
            if node.target is aten.cat.default:
                parts = list(arguments(node)["tensors"])
                parts[place] = result
                result = builder.call(node.target, parts, *node.args[1:], **node.kwargs)
            else:
                result = builder.call(node.target, result, *node.args[1:], **node.kwargs)
        return result


def find_rotary(item: Any, what: str) -> Rotary | str | None:
    """Where an attention's queries or keys (B, H, L, D) are turned; None when nothing is; else why it cannot be told.

    Casts, transposes and channels joined beside the turned ones may stand between.
    """
    between: list[tuple[Node, int]] = []
    dim, channel = 2, 3
    start = item
    while isinstance(item, Node) and item.target is not ROPE:
        place = 0
        if item.target is aten.cat.default:
            parts = arguments(item)["tensors"]
            turned = [index for index, part in enumerate(parts) if _comes_from_rope(part)]
            if not turned:
                return None
            along = arguments(item)["dim"] % 4
            if len(turned) > 1 or along != channel:
                return f"its {what} are a concatenation of several rotations, or of tokens"
            place = turned[0]
        elif item.target is aten.transpose.int:
            swapped = [arguments(item)[name] % 4 for name in ("dim0", "dim1")]
            dim, channel = (swapped[1 - swapped.index(d)] if d in swapped else d for d in (dim, channel))
        elif not is_identity(item) and not is_cast(item):
            return f"its {what} are computed from rotated ones by {item.target}" if _comes_from_rope(start) else None
        between.append((item, place))
        item = arguments(item)["tensors"][place] if item.target is aten.cat.default else item.args[0]
    if not isinstance(item, Node):
        return None
    named = arguments(item)
    x, cos = value(named["x"]), value(named["cos"])
    angles = cos.dim() - (x.dim() - dim)
    if x.dim() != 4 or channel != 3 or angles < 0 or not same_size(cos.shape[angles], x.shape[dim]):
        return f"the angles that its {what} are rotated by do not belong to their positions one by one"
    return Rotary(named, tuple(between), angles)


def _comes_from_rope(item: Any, depth: int = 8) -> bool:
    if not isinstance(item, Node) or not depth:
        return False
    return item.target is ROPE or any(_comes_from_rope(node, depth - 1) for node in item.all_input_nodes)


def angle_rows(module: torch.fx.GraphModule, rotary: Rotary, positions: Sequence[int]) -> list[torch.Tensor] | str:
    """The rows of cos and of sin at ``positions``, one of each a position and dtype as in the graph; or why not.

    Each row keeps the dimensions of its tensor, with 1 for all but the channels.
    """
    rows = []
    for name in ("cos", "sin"):
        found = evaluate(module, rotary.named[name], positions)
        if isinstance(found, str):
            return found
        # Scaling that depends on the longest position asked for would make keys in a cache wrong.
        for more in ([*positions, _DISTANT], [*reversed(positions)]):
            other = evaluate(module, rotary.named[name], more)
            if isinstance(other, str):
                return other
            order = list(range(len(positions))) if more[-1] == _DISTANT else list(range(len(positions) - 1, -1, -1))
            if not torch.equal(found, other.index_select(rotary.angles, torch.tensor(order))):
                return "its angles depend on the length of the text, not on each position alone"
        if any(size != 1 for dim, size in enumerate(found.shape[:-1]) if dim != rotary.angles):
            return "the angles that it is rotated by differ between heads"
        rows.append(found)
    return [row for tensor in rows for row in tensor.split(1, rotary.angles)]


def table_end(module: torch.fx.GraphModule) -> int | None:
    """The first position that a learned table of positions has no row for; None where there is no such table."""
    ends = []
    for node in module.graph.find_nodes(op="call_function", target=aten.embedding.default):
        named = arguments(node)
        first = evaluate(module, named["indices"], (0,))
        rows = value(named["weight"]).shape[0]
        if isinstance(first, torch.Tensor) and first.numel() == 1 and isinstance(rows, int):
            ends.append(rows - int(first))
    return min(ends, default=None)


def evaluate(module: torch.fx.GraphModule, wanted: Any, positions: Sequence[int]) -> torch.Tensor | str:
    """The value of a node that depends on ``position_ids`` and constants alone, for one sequence at ``positions``."""
    if not isinstance(wanted, Node):
        return "its angles are no tensor of the graph"
    inside: set[Node] = set()
    todo = [wanted]
    while todo:
        node = todo.pop()
        if node in inside or node.op == "placeholder":
            continue
        inside.add(node)
        todo += node.all_input_nodes
    part, names = extract(module, wanted, inside)
    outer = {node.name: node for node in module.graph.nodes if node.name in names}
    count = next((n for name, n in outer.items() if POSITIONS in name), None)
    if count is None:
        return f"its angles are not computed from {POSITIONS}: compile with them among the inputs"
    sizes = dict(zip(map(str, value(count).shape), (1, len(positions)), strict=True))
    given = []
    for name in names:
        if outer[name] is count:
            given.append(torch.tensor([list(positions)], dtype=value(count).dtype, device=value(count).device))
            continue
        # Another input may lend its sizes, and is empty of meaning otherwise.
        fake = value(outer[name])
        if any(user in inside and user.target is not aten.sym_size.int for user in outer[name].users):
            return f"its angles are computed from {name} too"
        if not isinstance(fake, torch.Tensor):
            return f"its angles depend on {name}"
        shape = [size if isinstance(size, int) else sizes.get(str(size), 1) for size in fake.shape]
        given.append(torch.empty(shape, dtype=fake.dtype, device=fake.device))
    with undisturbed():
        return part(*given)
