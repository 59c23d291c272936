"""What hand-written rms_norm and layer_norm share: ``1 / sqrt(mean(x^2) + eps)`` and the affine end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx

from ...passes.view import arguments, is_cast, peel
from .rules import (
    Decline,
    Facts,
    NearMiss,
    chain_to,
    is_call,
    is_dim,
    is_vector,
    is_widening,
    last_size,
    other_operand,
    past_identities,
    peel_widening,
    readers,
    sole_reader,
)

Node = torch.fx.Node
aten = torch.ops.aten

ANCHORS = (aten.rsqrt.default, aten.sqrt.default, aten.pow.Tensor_Scalar)
"""Every spelling has exactly one of these: rsqrt(v), sqrt(v), v ** -0.5, v ** 0.5."""
VARIANCES = (aten.var.correction, aten.var.dim, aten.var.default)


@dataclass
class Scaled:
    """``numerator / sqrt(moment + eps)``.

    node: the quotient. numerator: as the graph has it. moment: the statistic under the root. covered: without what is
    behind numerator and moment.
    """

    node: Node
    numerator: Any
    moment: Any
    eps: float
    covered: list[Node]


def find_scaled(root: Node, facts: Facts) -> Scaled | NearMiss | None:
    """Read the quotient around ``root``, an anchor. None when it is nothing of the kind."""
    exponent = root.args[1] if root.target is aten.pow.Tensor_Scalar else None
    if exponent not in (None, 0.5, -0.5) or isinstance(exponent, bool):
        return None
    inverse = root.target is aten.rsqrt.default or exponent == -0.5
    under = peel(root.args[0])
    covered = [root, *chain_to(root.args[0], under)]
    eps = 0.0
    if is_call(under, aten.add.Tensor, aten.add.Scalar):
        number = [facts.number(side) for side in under.args[:2]]
        if number.count(None) != 1 or arguments(under)["alpha"] != 1:
            return None
        eps = float(next(n for n in number if n is not None))
        covered.append(under)
        moment = under.args[number.index(None)]
    else:
        moment = under
    if not is_moment(peel(moment)):
        return None

    top, chain = past_identities(root)
    covered += chain
    if not inverse and (user := sole_reader(top)) is not None and is_reciprocal(user, top, facts):
        # 1 / sqrt(v): a reciprocal, then perhaps a product with the 1.
        inverse = True
        covered.append(user)
        top, chain = past_identities(user)
        covered += chain
        if (user := sole_reader(top)) is not None and is_call(user, aten.mul.Tensor) and other_operand(user, top) == 1:
            covered.append(user)
            top, chain = past_identities(user)
            covered += chain
    users = readers(top)
    if len(users) != 1:
        return NearMiss(top, f"its intermediate result {top.name} is used elsewhere too") if users else None
    quotient = users[0]
    if inverse and is_call(quotient, aten.mul.Tensor):
        numerator = other_operand(quotient, top)
    elif not inverse and is_call(quotient, aten.div.Tensor) and quotient.args[1] is top:
        numerator = quotient.args[0]
    else:
        numerator = None
    if not isinstance(numerator, Node):
        return None
    return Scaled(quotient, numerator, moment, eps, [quotient, *covered])


def is_reciprocal(node: Node, of: Node, facts: Facts) -> bool:
    if is_call(node, aten.reciprocal.default):
        return True
    return is_call(node, aten.div.Tensor) and node.args[1] is of and facts.number(node.args[0]) == 1


def is_moment(node: Any) -> bool:
    return is_call(node, aten.mean.dim, aten.mean.default, aten.sum.dim_IntList, *VARIANCES)


def squared(item: Any) -> tuple[Any, list[Node]] | None:
    """``x`` and the nodes covered when ``item`` is ``x ** 2``, ``x * x`` or ``square(x)``."""
    node = peel(item)
    if is_call(node, aten.pow.Tensor_Scalar) and node.args[1] == 2 and not isinstance(node.args[1], bool):
        return node.args[0], [*chain_to(item, node), node]
    if is_call(node, aten.square.default):
        return node.args[0], [*chain_to(item, node), node]
    if is_call(node, aten.mul.Tensor) and peel(node.args[0]) is peel(node.args[1]):
        return node.args[0], [*chain_to(item, node), node]
    return None


def averaged(item: Any, what: str) -> tuple[Any, list[Node]] | NearMiss | None:
    """The operand and the nodes covered when ``item`` is a mean over the last dimension that keeps it.

    Another reduction of the same kind is a near miss; None when ``item`` is no reduction.
    """
    node = peel(item)
    if is_call(node, aten.sum.dim_IntList):
        return NearMiss(node, f"it sums {what} instead of averaging")
    if is_call(node, aten.mean.default):
        return NearMiss(node, f"the mean of {what} is over all elements, not over the last dimension")
    if not is_call(node, aten.mean.dim):
        return None
    given = arguments(node)
    rank = Facts.rank(given["self"])
    if not is_dim(given["dim"], -1, rank):
        return NearMiss(node, f"the mean of {what} is over dimension {given['dim']}, not over the last one")
    if not given["keepdim"]:
        return NearMiss(node, f"the mean of {what} does not keep its dimension")
    if given["dtype"] not in (None, Facts.dtype(given["self"])):
        return NearMiss(node, f"the mean of {what} changes the dtype to {given['dtype']}")
    return given["self"], [*chain_to(item, node), node]


def too_narrow(node: Node) -> Decline | None:
    """Canonical norms compute in float32; a model that computes in half precision is left as it is."""
    dtype = Facts.dtype(node)
    if dtype in (torch.float32, torch.float64):
        return None
    return Decline(f"the model computes the statistics in {dtype}, the canonical op in float32 at least")


@dataclass
class Affine:
    """What follows the quotient: a cast, a weight, a bias, a cast.

    root: the node whose value all this is. operand: the node the weight multiplies, or the root without a weight.
    rounded: whether a cast (to the same dtype counts) stands before the weight. offset: added to the weight.
    covered: the nodes after the quotient, and the sum of offset and weight.
    """

    root: Node
    operand: Node
    rounded: bool = False
    weight: Any = None
    offset: float = 0.0
    bias: Any = None
    covered: list[Node] = field(default_factory=list)


def find_affine(quotient: Node, facts: Facts, *, with_bias: bool) -> Affine:
    """Follow the quotient's single users: a cast, ``* weight`` or ``* (offset + weight)``, ``+ bias``, a cast.

    Weight and bias are vectors as long as the last dimension. What does not fit ends the site before it.
    """
    size = last_size(quotient)
    top, chain = _past_rounding(quotient)
    narrowed = Facts.dtype(top) != Facts.dtype(quotient)
    found = Affine(quotient, quotient)
    if narrowed:
        found = Affine(top, top, True, covered=list(chain))
    user = sole_reader(top)
    factor = other_operand(user, top) if user is not None and is_call(user, aten.mul.Tensor) else None
    if user is None or not isinstance(factor, Node) or not is_vector(factor, size):
        return found
    found.rounded = any(is_cast(node) for node in chain)
    found.weight, found.offset, more = _offset(factor, None if found.rounded else Facts.dtype(quotient), facts)
    found.operand, found.root = top, user
    found.covered = [*chain, user, *more]
    if with_bias:
        top, chain = past_identities(user)
        user = sole_reader(top)
        if user is not None and is_call(user, aten.add.Tensor) and arguments(user)["alpha"] == 1:
            term = other_operand(user, top)
            if isinstance(term, Node) and is_vector(term, size):
                found.bias, found.root = term, user
                found.covered += [*chain, user]
    top, chain = _past_rounding(found.root)
    if not narrowed and Facts.dtype(top) != Facts.dtype(found.root):
        found.root = top
        found.covered += chain
    return found


def _past_rounding(node: Node) -> tuple[Node, list[Node]]:
    """Forward over identities and at most one cast to a narrower floating dtype."""
    top, chain = past_identities(node)
    user = sole_reader(top)
    if user is not None and is_cast(user) and user.args[0] is top and not is_widening(user):
        dtype = Facts.dtype(user)
        if dtype is not None and dtype.is_floating_point:
            return user, [*chain, user]
    return top, chain


def _offset(factor: Node, dtype: torch.dtype | None, facts: Facts) -> tuple[Any, float, list[Node]]:
    """Split ``offset + weight``. dtype: the sum has to be computed in it, None for any."""
    node = peel(factor)
    if (
        is_call(node, aten.add.Tensor, aten.add.Scalar)
        and arguments(node)["alpha"] == 1
        and dtype in (None, Facts.dtype(node))
        and sole_reader(node) is not None
    ):
        numbers = [facts.number(side) for side in node.args[:2]]
        if numbers.count(None) == 1:
            offset = float(next(n for n in numbers if n is not None))
            return node.args[numbers.index(None)], offset, [*chain_to(factor, node), node]
    return factor, 0.0, []


def mean_of(item: Any, of: Any) -> bool:
    """Whether ``item`` is ``mean(of)`` over the last dimension, kept."""
    node = peel(item)
    mean = averaged(node, "x") if is_call(node, aten.mean.dim) else None
    return isinstance(mean, tuple) and peel_widening(mean[0]) is peel_widening(of)


def centred(item: Any) -> Any:
    """``x`` when ``item`` is ``x - mean(x)`` over the last dimension, else None."""
    node = peel_widening(item)
    if is_call(node, aten.sub.Tensor) and arguments(node)["alpha"] == 1 and mean_of(node.args[1], node.args[0]):
        return node.args[0]
    return None


def weight_as_stored(weight: Any) -> Any:
    """The weight behind its widening casts, so that passes see the parameter."""
    return peel_widening(weight) if isinstance(weight, Node) else weight
