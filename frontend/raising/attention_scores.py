"""The way from the product of queries and keys up to the softmax, and from the softmax down to the values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx

from ...passes.view import arguments, same_sizes, value
from .attention_products import PRODUCTS, Product, Stopped, parse_product, real_users
from .masks import Change, Masks
from .rules import Facts

Node = torch.fx.Node
aten = torch.ops.aten

_CASTS = (
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
)
_COPIES = (
    aten.alias.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.lift_fresh.default,
    aten.slice.Tensor,
    aten.expand.default,
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
)
RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.view_as.default,
    aten.reshape_as.default,
)
_DROPOUTS = (aten.dropout.default, aten.dropout_.default)
_LOOK = 14


def is_cast(node: Node) -> bool:
    """A cast between floating-point types; the device stays."""
    if node.op != "call_function" or node.target not in _CASTS:
        return False
    old, new = value(node.args[0]), value(node)
    return old.dtype.is_floating_point and new.dtype.is_floating_point and old.device == new.device


def is_noise(node: Node) -> bool:
    """A node that passes its first input on unchanged: a full slice, a copy, dropout that is not active, a cast."""
    if node.op != "call_function":
        return False
    if node.target in _DROPOUTS:
        return active_dropout(node) is None
    if is_cast(node):
        return True
    return node.target in _COPIES and same_sizes(value(node.args[0]).shape, value(node).shape) and not (
        node.target is aten.slice.Tensor and arguments(node)["step"] != 1
    )  # fmt: skip


def active_dropout(node: Node) -> str | None:
    """Why a dropout node does something, or None when it does nothing."""
    given = arguments(node)
    if given["train"] is False or given["p"] == 0:
        return None
    return f"dropout is active (p={given['p']})"


def _keeps_scores(node: Node) -> bool:
    """A reshape of the batch dims only: the last two dims, queries and keys, stay."""
    old, new = value(node.args[0]).shape, value(node).shape
    return len(old) >= 2 and len(new) >= 2 and same_sizes(old[-2:], new[-2:])


# ------------------------------------------------------------------------------------------------------- upwards


@dataclass(frozen=True)
class Up:
    """What lies between the product and the softmax.

    product: of queries and keys. shapes: the scores' shape at the product, then at every reshape on the way.
    factor: product of all scales. changes: makers of :class:`Change`, given the layout, from the softmax inwards.
    covered: the nodes on the way, the product included.
    """

    product: Product
    shapes: tuple[Any, ...]
    factor: float
    changes: tuple[Callable[[Any], Change], ...]
    covered: tuple[Node, ...]


@dataclass(frozen=True)
class _Way:
    factor: float = 1.0
    changes: tuple[Callable[[Any], Change], ...] = ()
    covered: tuple[Node, ...] = ()
    shapes: tuple[Any, ...] = ()

    def change(self, node: Node, kind: str, operand: Node, **how: Any) -> _Way:
        shape = value(node).shape

        def make(layout: Any) -> Change:
            return Change(kind, operand, layout.index(shape, node), **how)

        return replace(self, changes=(*self.changes, make))


def walk_up(softmax: Node, facts: Facts) -> Up | Stopped | None:
    """From a softmax to the product of queries and keys. None when there is no product nearby."""
    given = arguments(softmax)
    start = given["self"]
    rank = value(start).dim()
    if rank == 0 or not isinstance(start, torch.fx.Node):
        return None
    found = _up(start, _Way(), facts, 0)
    if isinstance(found, Up) and given["dim"] % rank != rank - 1:
        return Stopped(softmax, f"the softmax runs over dim {given['dim']} of {rank}, not over the keys")
    return found


def _up(node: Node, way: _Way, facts: Facts, depth: int) -> Up | Stopped | None:
    if node.op != "call_function" or depth > 40:
        return None
    if node.target in PRODUCTS:
        product = parse_product(node, facts)
        if product is None:
            return Stopped(node, "a product that the rule cannot read")
        way = replace(way, covered=(*way.covered, node), shapes=(value(node).shape, *way.shapes))
        if product.added is not None:
            way = way.change(node, "add", product.added, factor=way.factor * product.beta)
        return Up(product, way.shapes, way.factor * product.alpha, way.changes, way.covered)
    name = node.target._schema.name.split("::")[1].rstrip("_") if hasattr(node.target, "_schema") else ""
    inside = replace(way, covered=(*way.covered, node))
    if is_noise(node):
        return _up(node.args[0], inside, facts, depth + 1)
    if node.target in RESHAPES:
        if _keeps_scores(node):
            return _up(node.args[0], replace(inside, shapes=(value(node).shape, *way.shapes)), facts, depth + 1)
        return _stop(node, "the scores are reshaped", facts)
    step = _STEPS.get(name)
    if step is None:
        return _stop(node, _REASONS.get(name, f"{node.target} between the scores and the softmax"), facts)
    return step(node, inside, facts, depth)


_REASONS = {
    "tanh": "the scores are capped by tanh (softcapping)",
    "cat": "something is appended to the scores (attention sinks)",
    "clamp": "the scores are clamped",
    "sigmoid": "the scores go through a sigmoid",
    "relu": "the scores go through a relu",
    "permute": "the scores are permuted",
    "transpose": "the scores are transposed",
    "slice": "the scores are sliced",
    "nan_to_num": "NaN scores are replaced",
}


def _stop(node: Node, reason: str, facts: Facts) -> Stopped | None:
    """A stop, when a product is near behind the node: else there is nothing that resembles attention."""
    queue, seen = [node], {node}
    while queue and len(seen) < _LOOK:
        for source in queue.pop(0).all_input_nodes:
            if source.target in PRODUCTS:
                return Stopped(node, reason)
            val = value(source)
            if source not in seen and source.op == "call_function" and isinstance(val, torch.Tensor) and val.dim() > 1:
                if source.target in (aten.linear.default, aten.embedding.default, aten.layer_norm.default):
                    continue
                seen.add(source)
                queue.append(source)
    return None


def _scale(node: Node, way: _Way, facts: Facts, depth: int) -> Up | Stopped | None:
    """``scores * c``, ``c * scores``, ``scores / c``."""
    given = arguments(node)
    divides = "div" in str(node.target) or "divide" in str(node.target)
    if given.get("rounding_mode") is not None:
        return _stop(node, "the scores are rounded", facts)
    left, right = given["self"], given["other"]
    pairs = [(left, right)] if divides else [(left, right), (right, left)]
    for scores, number in pairs:
        factor = Masks.of(facts).number(number)
        if factor is not None and isinstance(scores, Node) and same_sizes(value(scores).shape, value(node).shape):
            if divides and factor == 0:
                return _stop(node, "the scores are divided by 0", facts)
            total = way.factor / factor if divides else way.factor * factor
            return _up(scores, replace(way, factor=total), facts, depth + 1)
    return _stop(node, "the scores are scaled by a tensor whose value is not known when compiling", facts)


def _negate(node: Node, way: _Way, facts: Facts, depth: int) -> Up | Stopped | None:
    return _up(node.args[0], replace(way, factor=-way.factor), facts, depth + 1)


def _add(node: Node, way: _Way, facts: Facts, depth: int) -> Up | Stopped | None:
    """``scores + bias``, ``bias + scores``, ``scores - bias``; ``alpha`` scales the second operand."""
    given = arguments(node)
    minus = "sub" in str(node.target)
    alpha = Masks.of(facts).number(given["alpha"])
    if alpha is None:
        return _stop(node, "alpha is not known when compiling", facts)
    second = -float(alpha) if minus else float(alpha)
    left, right = given["self"], given["other"]
    stops: list[Stopped | None] = []
    for scores, other, inner, outer in ((left, right, 1.0, second), (right, left, second, 1.0)):
        if not isinstance(scores, Node) or not same_sizes(_shape(scores), value(node).shape):
            continue
        if not isinstance(other, Node) or not isinstance(value(other), torch.Tensor):
            number = Masks.of(facts).number(other)
            if number == 0:
                stops.append(_up(scores, replace(way, factor=way.factor * inner), facts, depth + 1))
            else:
                stops.append(_stop(node, "a number is added to the scores", facts))
        else:
            next_way = way.change(node, "add", other, factor=way.factor * outer)
            stops.append(_up(scores, replace(next_way, factor=way.factor * inner), facts, depth + 1))
        if isinstance(stops[-1], Up):
            return stops[-1]
    return next((stop for stop in stops if stop is not None), None)


def _shape(node: Node) -> Any:
    val = value(node)
    return val.shape if isinstance(val, torch.Tensor) else ()


def _fill_number(item: Any, facts: Facts) -> float | None:
    number = Masks.of(facts).number(item)
    if number is not None:
        return float(number)
    # A tensor full of one number.
    if isinstance(item, Node) and item.target in (aten.full.default, aten.full_like.default, aten.new_full.default):
        number = Masks.of(facts).number(arguments(item)["fill_value"])
        return None if number is None else float(number)
    return None


def _fill(node: Node, way: _Way, facts: Facts, depth: int) -> Up | Stopped | None:
    """``scores.masked_fill(mask, number)``."""
    given = arguments(node)
    number = _fill_number(given["value"], facts)
    if number is None:
        return _stop(node, "the scores are filled with what is not known when compiling", facts)
    return _filled(node, given["self"], given["mask"], number, False, way, facts, depth)


def _where(node: Node, way: _Way, facts: Facts, depth: int) -> Up | Stopped | None:
    """``where(mask, scores, number)`` or ``where(mask, number, scores)``."""
    given = arguments(node)
    stops = []
    for scores, other, inverted in ((given["self"], given["other"], True), (given["other"], given["self"], False)):
        number = _fill_number(other, facts)
        if number is None or not isinstance(scores, Node):
            continue
        found = _filled(node, scores, given["condition"], number, inverted, way, facts, depth)
        if isinstance(found, Up):
            return found
        stops.append(found)
    if not stops:
        return _stop(node, "the scores are selected against what is not known when compiling", facts)
    return next((stop for stop in stops if stop is not None), None)


def _filled(
    node: Node, scores: Node, mask: Node, number: float, inverted: bool, way: _Way, facts: Facts, depth: int
) -> Up | Stopped | None:
    if not same_sizes(_shape(scores), value(node).shape):
        return _stop(node, "the mask is larger than the scores", facts)
    if way.factor == 0:
        return _stop(node, "the scores are scaled by 0", facts)
    way = way.change(node, "fill", mask, fill=number * way.factor, inverted=inverted)
    return _up(scores, way, facts, depth + 1)


_STEPS: dict[str, Callable[[Node, _Way, Facts, int], Up | Stopped | None]] = {
    "mul": _scale,
    "div": _scale,
    "multiply": _scale,
    "divide": _scale,
    "true_divide": _scale,
    "neg": _negate,
    "add": _add,
    "sub": _add,
    "masked_fill": _fill,
    "where": _where,
}


# ------------------------------------------------------------------------------------------------------- downwards


@dataclass(frozen=True)
class Down:
    """What lies between the softmax and the product with the values.

    side: 0 when the weights are its left operand. covered: the nodes on the way and the product.
    decline: why the site has to be left alone (active dropout), or None.
    """

    product: Product
    side: int
    covered: tuple[Node, ...]
    decline: str | None


def walk_down(softmax: Node, facts: Facts) -> Down | Stopped | None:
    """From a softmax to the product with the values. None when there is no product nearby."""
    node, covered, decline = softmax, [], None
    while True:
        users = real_users(node)
        if not users:
            return None
        if len(users) > 1:
            others = ", ".join(user.name for user in users[:4])
            return _stop_below(node, f"the attention weights are used more than once ({others})")
        user = users[0]
        if user.op != "call_function":
            return None
        if user.target in PRODUCTS:
            product = parse_product(user, facts)
            if product is None or product.added is not None or product.alpha != 1:
                return Stopped(user, "a product that the rule cannot read")
            side = 0 if product.left_node is node else 1
            return Down(product, side, (*covered, user), decline)
        if user.target in _DROPOUTS:
            decline = decline or active_dropout(user)
        elif not is_noise(user) and not (user.target in RESHAPES and _keeps_scores(user)):
            return _stop_below(user, f"the attention weights go through {user.target} after the softmax")
        if user.args[0] is not node:
            return None
        covered.append(user)
        node = user


def _stop_below(node: Node, reason: str) -> Stopped | None:
    queue, seen = [node], {node}
    while queue and len(seen) < _LOOK:
        for user in queue.pop(0).users:
            if user.target in PRODUCTS:
                return Stopped(node, reason)
            if user not in seen:
                seen.add(user)
                queue.append(user)
    return None
