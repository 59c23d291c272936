"""rope: rotary position embedding in the spellings of GPT-NeoX and Llama (halves) and of GPT-J and ViT (pairs).

``x * cos + rotate(x) * sin`` with the rotation built from halves or pairs, and the same written out on the two parts:
``cat(a * cos - b * sin, b * cos + a * sin)``. Partial rotary needs nothing: x is then a slice.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx

from ...passes.view import GraphView, arguments, peel, same_size, same_sizes, value
from .rules import (
    Builder,
    Decline,
    Facts,
    NearMiss,
    Raised,
    RaiseRule,
    chain_to,
    is_call,
    is_dim,
    last_size,
    other_operand,
    past_identities,
    sole_reader,
)

Node = torch.fx.Node
aten = torch.ops.aten

_PARTS = {"rotate_half": ("low", "high"), "interleaved": ("even", "odd")}
_VIEWS = (aten.view.default, aten.reshape.default, aten.unflatten.int, aten._unsafe_view.default)
_SPLITS = (aten.chunk.default, aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default)


class Rope:
    op = "rope"
    anchors = (aten.cat.default, aten.stack.default)

    def match(self, node: Node, view: GraphView, facts: Facts) -> Raised | NearMiss | Decline | None:
        given = arguments(node)
        tensors = given["tensors"]
        if not isinstance(tensors, list | tuple) or len(tensors) != 2:
            return None
        joined = _joined(node, given["dim"], facts)
        if joined is None:
            return None
        layout, result, chain = joined
        written_out = _written_out(tensors, layout, node)
        if isinstance(written_out, NearMiss):
            return written_out
        if written_out is not None:
            x, cos, sin, covered = written_out
            if not _rejoins(x, result):
                return NearMiss(node, "the rotated parts are not joined to the shape of x")
            if not all(same_size(last_size(t), last_size(x) // 2) for t in (cos, sin)):
                return NearMiss(node, "cosine and sine are not as wide as one part of x")

            def before(builder: Builder) -> dict[str, Any]:
                return {"cos": _doubled(builder, cos, layout), "sin": _doubled(builder, sin, layout)}

            covered = (*covered, node, *chain)
            return Raised("rope", (x,), {"layout": layout}, covered, node, before=before, root=result)

        turned = _turned(tensors, layout, node)
        if turned is None or isinstance(turned, NearMiss):
            return turned
        x, covered = turned
        if not _rejoins(x, result):
            return NearMiss(node, "the rotated parts are not joined to the shape of x")
        product = sole_reader(result)
        if product is None or not is_call(product, aten.mul.Tensor):
            return NearMiss(result, "the rotated x is not multiplied by a sine, or is used elsewhere too")
        sin = other_operand(product, result)
        top, after = past_identities(product)
        total = sole_reader(top)
        if not isinstance(sin, Node) or total is None or not is_call(total, aten.add.Tensor):
            return NearMiss(product, "x times a cosine is not added to the rotated x times a sine")
        if arguments(total)["alpha"] != 1:
            return NearMiss(total, f"one term is scaled by {arguments(total)['alpha']}")
        term = other_operand(total, top)
        straight = peel(term)
        if not is_call(straight, aten.mul.Tensor):
            return NearMiss(total, "x times a cosine is not added to the rotated x times a sine")
        cos = other_operand(straight, x)
        if not isinstance(cos, Node):
            return NearMiss(straight, "the tensor multiplied by the cosine is not the one that was rotated")
        covered = (*covered, node, *chain, product, *after, *chain_to(term, straight), straight, total)
        return Raised("rope", (x, cos, sin), {"layout": layout}, covered, total, root=total)


def _joined(node: Node, dim: Any, facts: Facts) -> tuple[str, Node, list[Node]] | None:
    """The layout, the joined tensor, the nodes after ``node`` up to it: cat joins halves, stack and flatten pairs."""
    rank = facts.rank(node)
    if not is_dim(dim, -1, rank):
        return None
    if node.target is aten.cat.default:
        return "rotate_half", *past_identities(node)
    top, chain = past_identities(node)
    flat = sole_reader(top)
    if flat is None:
        return None
    if is_call(flat, aten.flatten.using_ints):
        given = arguments(flat)
        if not is_dim(given["start_dim"], -2, rank) or not is_dim(given["end_dim"], -1, rank):
            return None
    elif not is_call(flat, *_VIEWS):
        return None
    top, more = past_identities(flat)
    return "interleaved", top, [*chain, flat, *more]


def _rejoins(x: Node, result: Node) -> bool:
    return same_sizes(value(x).shape, value(result).shape)


def _turned(tensors: Any, layout: str, anchor: Node) -> tuple[Node, tuple[Node, ...]] | NearMiss | None:
    """x and the nodes covered when ``tensors`` are x's parts turned by 90 degrees: (-second, first)."""
    first, second = (_negated(tensor) for tensor in tensors)
    parts = [_part(item) for _, item, _ in (first, second)]
    if parts[0] is None or parts[1] is None or parts[0][0] is not parts[1][0]:
        return None
    names = (parts[0][1], parts[1][1])
    if set(names) != set(_PARTS[layout]):
        return None
    if (first[0], second[0]) != (True, False) or names != _PARTS[layout][::-1]:
        if not first[0] and not second[0]:
            return None
        joined = f"{_signed(first[0], names[0])} and {_signed(second[0], names[1])}"
        return NearMiss(anchor, f"it joins {joined}, a rotation minus the second part and the first")
    return parts[0][0], (*first[2], *second[2], *parts[0][2], *parts[1][2])


def _signed(negative: bool, name: str) -> str:
    return f"minus the {name} part" if negative else f"the {name} part"


def _negated(item: Any) -> tuple[bool, Any, list[Node]]:
    """Whether ``item`` is the negative of something, and of what."""
    node = peel(item)
    if is_call(node, aten.neg.default):
        return True, node.args[0], [*chain_to(item, node), node]
    if is_call(node, aten.mul.Tensor) and node.args[1] == -1:
        return True, node.args[0], [*chain_to(item, node), node]
    return False, item, []


def _part(item: Any) -> tuple[Node, str, list[Node]] | None:
    """x, which part of its last dimension ``item`` is (low, high, even, odd), and the nodes from it to x."""
    node = peel(item)
    chain = chain_to(item, node)
    if not isinstance(node, Node):
        return None
    if is_call(node, aten.slice.Tensor):
        name = _sliced(node)
        return (node.args[0], name, [*chain, node]) if name else None
    index: Any = None
    if is_call(node, operator.getitem):
        source, index = node.args
        if is_call(source, *_SPLITS):
            return (
                (source.args[0], ("low", "high")[index], [*chain, node, source]) if _is_halving(source, index) else None
            )
        if not is_call(source, aten.unbind.int):
            return None
        dim, inner, covered = arguments(source)["dim"], source.args[0], [*chain, node, source]
    elif is_call(node, aten.select.int):
        inner, dim, index = node.args
        covered = [*chain, node]
    else:
        return None
    folded = peel(inner)
    if index not in (0, 1) or not is_call(folded, *_VIEWS):
        return None
    x = folded.args[0]
    names = _folded(value(x).shape, value(folded).shape, dim)
    return (x, names[index], [*covered, *chain_to(inner, folded), folded]) if names else None


def _sliced(node: Node) -> str | None:
    given = arguments(node)
    size = last_size(given["self"])
    start, end, step = given["start"] or 0, given["end"], given["step"]
    if not is_dim(given["dim"], -1, Facts.rank(given["self"])):
        return None
    if not isinstance(size, int) or size % 2 or not isinstance(start, int):
        return None
    end = size if end is None else end
    if not isinstance(end, int):
        return None
    start = start + size if start < 0 else start
    end = min(end + size if end < 0 else end, size)
    return {
        (0, size // 2, 1): "low",
        (size // 2, size, 1): "high",
        (0, size, 2): "even",
        (0, size - 1, 2): "even",
        (1, size, 2): "odd",
    }.get((start, end, step))


def _is_halving(split: Node, index: Any) -> bool:
    """Whether a chunk or split cuts the last dimension into two equal parts."""
    given = arguments(split)
    size = last_size(given["self"])
    if not is_dim(given["dim"], -1, Facts.rank(given["self"])) or not isinstance(size, int) or size % 2:
        return False
    if index not in (0, 1):
        return False
    if "chunks" in given:
        return given["chunks"] == 2
    sizes = given["split_size"] if "split_size" in given else given["split_sizes"]
    return sizes == size // 2 or (isinstance(sizes, list | tuple) and list(sizes) == [size // 2] * 2)


def _folded(before: Any, after: Any, dim: Any) -> tuple[str, str] | None:
    """The parts that picking along ``dim`` gives when the last dimension was folded into two."""
    if len(after) != len(before) + 1 or not same_sizes(before[:-1], after[:-2]):
        return None
    if same_size(after[-1], 2) and is_dim(dim, -1, len(after)):
        return "even", "odd"
    if same_size(after[-2], 2) and is_dim(dim, -2, len(after)):
        return "low", "high"
    return None


def _written_out(
    tensors: Any, layout: str, anchor: Node
) -> tuple[Node, Node, Node, tuple[Node, ...]] | NearMiss | None:
    """x, cos, sin, the nodes covered when ``tensors`` are (a cos - b sin, b cos + a sin) with a, b the parts of x."""
    sides = [peel(tensor) for tensor in tensors]
    if not all(is_call(side, aten.sub.Tensor, aten.add.Tensor) and arguments(side)["alpha"] == 1 for side in sides):
        return None
    products = [_product(operand) for side in sides for operand in side.args[:2]]
    if any(product is None for product in products):
        return None
    parts, factors, nodes = zip(*products, strict=True)
    x = parts[0][0]
    names = [name for _, name, _ in parts]
    if any(part[0] is not x for part in parts) or not {*names[:2]} == {*names[2:]} == {*_PARTS[layout]}:
        return None
    low, high = _PARTS[layout]
    minus = [is_call(side, aten.sub.Tensor) for side in sides]
    cos, sin = factors[:2]
    second = {(names[2], peel(factors[2])), (names[3], peel(factors[3]))}
    if minus != [True, False] or names[0] != low or second != {(high, peel(cos)), (low, peel(sin))}:
        return NearMiss(anchor, f"the parts it joins are not a cos - b sin and b cos + a sin, a the {low} part of x")
    covered = [*sides, *chain_to(tensors[0], sides[0]), *chain_to(tensors[1], sides[1])]
    for part, more in zip(parts, nodes, strict=True):
        covered += [*more, *part[2]]
    return x, cos, sin, tuple(dict.fromkeys(covered))


def _product(item: Any) -> tuple[tuple[Node, str, list[Node]], Any, list[Node]] | None:
    """The part of x, the factor and the nodes covered when ``item`` is their product."""
    node = peel(item)
    if not is_call(node, aten.mul.Tensor):
        return None
    for part, factor in (node.args[:2], node.args[1::-1]):
        found = _part(part)
        if found is not None and isinstance(factor, Node):
            return found, factor, [*chain_to(item, node), node]
    return None


def _doubled(builder: Builder, angle: Node, layout: str) -> Node:
    """``angle`` at both places of its pair."""
    if layout == "rotate_half":
        return builder.call(aten.cat.default, [angle, angle], -1)
    return builder.call(aten.flatten.using_ints, builder.call(aten.stack.default, [angle, angle], -1), -2)


RULES: tuple[RaiseRule, ...] = (Rope(),)
