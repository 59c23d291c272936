"""What an attention's values were projected from: the hidden states that enter its layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from .base import Builder
from .view import same_size, value

Node = torch.fx.Node
aten = torch.ops.aten

# Position of the projected tensor among a projection's arguments.
_PROJECTIONS = {
    "tilewright::linear": 0,
    "tilewright::linear_fused": 0,
    "aten::linear": 0,
    "aten::matmul": 0,
    "aten::mm": 0,
    "aten::addmm": 1,
}
_MOVES = frozenset(
    f"aten::{name}"
    for name in (
        "view reshape _unsafe_view unflatten flatten transpose permute movedim contiguous clone alias slice select "
        "split split_with_sizes chunk unbind unsqueeze squeeze expand to _to_copy"
    ).split()
)


def hidden_states(v: Node) -> Node | None:
    """The (B, L, C) tensor whose projection is the attention's values ``v`` (B, H, L, Dv); None when not found.

    The way back leads through reshapes, transposes and splits only, so a token of the one is a token of the other.
    """
    batch, _, length, _ = value(v).shape
    if same_size(batch, length):  # a layout with the length first would pass for one with the batch first
        return None
    node: Any = v
    while isinstance(node, Node) and _name(node) not in _PROJECTIONS:
        if _name(node) not in _MOVES and getattr(node.target, "__name__", "") != "getitem":
            return None
        node = node.args[0]
    if not isinstance(node, Node):
        return None
    found = node.args[_PROJECTIONS[_name(node)]]
    while isinstance(found, Node) and value(found).dim() == 2 and _name(found) in _MOVES:
        found = found.args[0]
    if not isinstance(found, Node) or not isinstance(x := value(found), torch.Tensor) or x.dim() != 3:
        return None
    fits = same_size(x.shape[0], batch) and same_size(x.shape[1], length) and isinstance(x.shape[2], int)
    return found if fits and x.dtype.is_floating_point else None


def token_features(builder: Builder, v: Node) -> tuple[Node, int]:
    """One float32 vector a token, (B, L, C), and C: the hidden states, or else the values of all heads."""
    found = hidden_states(v)
    if found is None:
        heads, channels = value(v).shape[1], value(v).shape[3]
        found = builder.call(aten.flatten.using_ints, builder.call(aten.transpose.int, v, 1, 2), 2)
        width = int(heads) * int(channels)
    else:
        width = int(value(found).shape[2])
    if value(found).dtype not in (torch.float32, torch.float64):
        found = builder.call(aten.to.dtype, found, torch.float32)
    return found, width


def _name(node: Node) -> str:
    return node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""
