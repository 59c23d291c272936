"""softmax: the ATen forms of softmax and log_softmax, and hand-written exponentials over their sum."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx

from ...passes.view import GraphView, arguments, peel
from .rules import (
    Decline,
    Facts,
    NearMiss,
    Raised,
    RaiseRule,
    chain_to,
    is_call,
    is_dim,
    other_operand,
    past_identities,
    readers,
    sole_reader,
)

Node = torch.fx.Node
aten = torch.ops.aten

_LOG = (aten.log_softmax.int, aten._log_softmax.default, aten.special_log_softmax.default)


class AtenSoftmax:
    """``torch.softmax``, ``torch.log_softmax`` and what they lower to."""

    op = "softmax"
    anchors = (aten.softmax.int, aten._softmax.default, aten.special_softmax.default, *_LOG)

    def match(self, node: Node, view: GraphView, facts: Facts) -> Raised | NearMiss | Decline | None:
        given = arguments(node)
        dtype = torch.float32 if given.get("half_to_float") else given.get("dtype")
        kwargs = ({"dtype": dtype} if dtype is not None else {}) | ({"log": True} if node.target in _LOG else {})
        return Raised("softmax", (given["self"], given["dim"]), kwargs, (node,), node)


class WrittenSoftmax:
    """``e / sum(e)`` with ``e = exp(y)``, and ``y - log(sum(e))``; ``y`` is x, or x minus its maximum.

    Softmax does not change when a constant is subtracted from a row, so what ``y`` is matters to range only.
    """

    op = "softmax"
    anchors = (aten.exp.default,)

    def match(self, node: Node, view: GraphView, facts: Facts) -> Raised | NearMiss | Decline | None:
        top, chain = past_identities(node)
        sums = [user for user in readers(top) if is_call(user, aten.sum.dim_IntList, aten.sum.default)]
        if len(sums) != 1:
            return None
        total, rank = sums[0], facts.rank(node)
        below, more = past_identities(total)
        keeps = total.target is aten.sum.dim_IntList and arguments(total)["keepdim"]
        restored = sole_reader(below)
        if restored is not None and is_call(restored, aten.unsqueeze.default):
            below, after = past_identities(restored)
            more += [restored, *after]
        covered = [node, *chain, total, *more]
        ends = _quotient(top, below) or _difference(peel(node.args[0]), below)
        if ends is None:
            return None
        root, log, inside = ends
        if total.target is aten.sum.default:
            return NearMiss(total, "the sum is over all elements, not over one dimension")
        given = arguments(total)
        dim = _one_dim(given["dim"], rank)
        if dim is None:
            return NearMiss(total, f"the sum is over dimensions {given['dim']}, a softmax has one")
        if given["dtype"] not in (None, facts.dtype(node)):
            return NearMiss(total, f"the sum changes the dtype to {given['dtype']}")
        if not _keeps(keeps, [n for n in (*more, *inside) if is_call(n, aten.unsqueeze.default)], dim, rank):
            return NearMiss(total, "the sum is not broadcast along the dimension it was taken over")
        dtype = facts.dtype(node.args[0])
        if dtype is None or not dtype.is_floating_point:
            return NearMiss(node, f"the exponent is of {dtype}")
        x, shift = _shifted(node.args[0], dim, rank)
        if isinstance(x, NearMiss):
            return x
        covered += [*inside, root, *shift]
        return Raised("softmax", (x, dim), {"log": True} if log else {}, tuple(covered), node, root=root)


class LogSumExp:
    """``x - logsumexp(x)``: log_softmax."""

    op = "softmax"
    anchors = (aten.logsumexp.default,)

    def match(self, node: Node, view: GraphView, facts: Facts) -> Raised | NearMiss | Decline | None:
        top, chain = past_identities(node)
        user = sole_reader(top)
        if user is not None and is_call(user, aten.unsqueeze.default):
            top, more = past_identities(user)
            chain += [user, *more]
            user = sole_reader(top)
        if user is None or not is_call(user, aten.sub.Tensor) or user.args[1] is not top:
            return None
        given = arguments(node)
        rank = facts.rank(given["self"])
        if peel(user.args[0]) is not peel(given["self"]):
            return None
        if arguments(user)["alpha"] != 1:
            return NearMiss(user, f"logsumexp is subtracted {arguments(user)['alpha']} times")
        dim = _one_dim(given["dim"], rank)
        if dim is None:
            return NearMiss(node, f"logsumexp is over dimensions {given['dim']}, a log_softmax has one")
        if not _keeps(given["keepdim"], [n for n in chain if is_call(n, aten.unsqueeze.default)], dim, rank):
            return NearMiss(node, "logsumexp is not broadcast along the dimension it was taken over")
        return Raised("softmax", (user.args[0], dim), {"log": True}, (node, *chain, user), node, root=user)


def _one_dim(dims: Any, rank: int) -> int | None:
    """The one dimension of a reduction, from the end as models write it last; None when there are several or none."""
    if not isinstance(dims, Sequence) or len(dims) != 1 or rank < 1:
        return None
    return dims[0]


def _keeps(keepdim: bool, unsqueezes: list[Node], dim: int, rank: int) -> bool:
    """Whether a reduction over ``dim`` broadcasts back along it: kept, or dropped and put back in its place."""
    if keepdim:
        return not unsqueezes
    return len(unsqueezes) == 1 and is_dim(unsqueezes[0].args[1], dim, rank)


def _quotient(exp: Node, total: Node) -> tuple[Node, bool, list[Node]] | None:
    """``exp / total``, also as ``exp * reciprocal(total)``: the root, whether it is the log form, nodes in between."""
    for user in readers(total):
        if is_call(user, aten.div.Tensor) and user.args[1] is total and peel(user.args[0]) is peel(exp):
            return user, False, []
    user = sole_reader(total)
    if user is not None and is_call(user, aten.reciprocal.default):
        top, chain = past_identities(user)
        product = sole_reader(top)
        if product is not None and is_call(product, aten.mul.Tensor) and peel(other_operand(product, top)) is peel(exp):
            return product, False, [user, *chain]
    return None


def _difference(exponent: Any, total: Node) -> tuple[Node, bool, list[Node]] | None:
    """``exponent - log(total)``."""
    log = sole_reader(total)
    if log is None or not is_call(log, aten.log.default):
        return None
    top, chain = past_identities(log)
    user = sole_reader(top)
    if user is not None and is_call(user, aten.unsqueeze.default):
        top, more = past_identities(user)
        chain += [user, *more]
        user = sole_reader(top)
    if (
        user is not None
        and is_call(user, aten.sub.Tensor)
        and user.args[1] is top
        and peel(user.args[0]) is exponent
        and arguments(user)["alpha"] == 1
    ):
        return user, True, [log, *chain]
    return None


def _shifted(exponent: Any, dim: int, rank: int) -> tuple[Any, list[Node]]:
    """x and the nodes covered when ``exponent`` is ``x - max(x)``; else ``exponent`` itself."""
    node = peel(exponent)
    if not is_call(node, aten.sub.Tensor) or arguments(node)["alpha"] != 1:
        return exponent, []
    x, shift = node.args[:2]
    inner = shift
    unsqueezes = []
    while peel(inner) is not inner or is_call(inner, aten.detach.default, aten.unsqueeze.default):
        if is_call(inner, aten.unsqueeze.default):
            unsqueezes.append(inner)
        inner = inner.args[0]
    chain = chain_to(shift, inner)
    maximum = inner.args[0] if is_call(inner, operator.getitem) and inner.args[1] == 0 else inner
    if not is_call(maximum, aten.amax.default, aten.max.dim, aten.max.default):
        return exponent, []
    if peel(_undetached(maximum.args[0])) is not peel(_undetached(x)):
        return exponent, []
    given = arguments(maximum)
    dims = given.get("dim", [])
    dims = dims if isinstance(dims, list | tuple) else [dims]
    if not dims and rank == 1:
        return x, [*chain_to(exponent, node), node, *chain, maximum]
    if len(dims) != 1 or not is_dim(dims[0], dim, rank):
        return NearMiss(maximum, f"the maximum is over dimensions {dims}, the sum over {dim}"), []
    if not _keeps(given["keepdim"], unsqueezes, dim, rank):
        return NearMiss(maximum, "the maximum is not broadcast along the dimension it was taken over"), []
    picked = [inner] if inner is not maximum else []
    return x, [*chain_to(exponent, node), node, *chain, *picked, maximum]


def _undetached(item: Any) -> Any:
    while is_call(peel(item), aten.detach.default):
        item = peel(item).args[0]
    return item


RULES: tuple[RaiseRule, ...] = (AtenSoftmax(), WrittenSoftmax(), LogSumExp())
