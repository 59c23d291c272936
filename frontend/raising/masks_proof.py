"""What is provable about positions: comparisons that the ranges of the axes decide, and rows that see a key."""

from __future__ import annotations

from typing import Any

import sympy
import torch
import torch.fx
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from sympy.logic.boolalg import And, Boolean, Not, Or

from ...passes.view import value
from .masks_emit import AXES, Geometry, K, Q

Node = torch.fx.Node
aten = torch.ops.aten


class Ranges:
    """Each axis runs from 0 to its size minus 1; sizes may be symbolic."""

    def __init__(self, geometry: Geometry) -> None:
        self.ends = {axis: size - 1 for axis, size in zip(AXES, geometry.exprs, strict=True)}

    def simplify(self, condition: Boolean) -> Boolean:
        """Decide comparisons that the ranges of the axes decide."""
        if isinstance(condition, And | Or):
            return condition.func(*map(self.simplify, condition.args))
        if isinstance(condition, Not):
            return Not(self.simplify(condition.args[0]))
        if not isinstance(condition, Relational) or condition.atoms(AppliedUndef, sympy.Mod, sympy.floor):
            return condition
        difference = sympy.expand(condition.lhs - condition.rhs)
        low, high = self._end(difference, -1), self._end(difference, 1)
        if low is None or high is None:
            return condition
        negative, positive = bool(high.is_negative), bool(low.is_positive)
        not_positive, not_negative = bool(high.is_nonpositive), bool(low.is_nonnegative)
        always, never = {
            "<": (negative, not_negative),
            "<=": (not_positive, positive),
            ">": (positive, not_positive),
            ">=": (not_negative, negative),
            "==": (low == 0 and high == 0, negative or positive),
            "!=": (negative or positive, low == 0 and high == 0),
        }[condition.rel_op]
        return sympy.true if always else sympy.false if never else condition

    def _end(self, expression: sympy.Expr, sign: int) -> sympy.Expr | None:
        """The largest (sign 1) or smallest (-1) value over the axes' ranges; None when it is not linear in them."""
        for axis in AXES:
            slope = expression.coeff(axis, 1)
            rest = sympy.expand(expression - slope * axis)
            if rest.has(axis) or not slope.is_number:
                return None
            expression = rest + (slope * self.ends[axis] if slope * sign > 0 else 0)
        return sympy.expand(expression)

    def seen_key(self, visible: Boolean) -> sympy.Expr | None:
        """A key, as an expression in ``q_idx``, that every query provably sees; None when none is found.

        visible: a condition on positions alone.
        """
        last = self.ends[K]
        limits = [limit for relation in visible.atoms(Relational) if (limit := _limit(relation)) is not None]
        for witness in [Q, Q + last - self.ends[Q], sympy.Integer(0), last, *limits]:
            inside = And(sympy.Ge(witness, 0), sympy.Le(witness, last))
            if self.simplify(And(inside, visible.xreplace({K: witness}))) == sympy.true:
                return witness
        return None


def _limit(relation: Relational) -> sympy.Expr | None:
    """The key at which a comparison turns, when it is linear in the key."""
    difference = sympy.expand(relation.lhs - relation.rhs)
    slope = difference.coeff(K, 1)
    rest = sympy.expand(difference - slope * K)
    return -rest / slope if abs(slope) == 1 and not rest.has(K) else None


_LEARNED = {
    aten.view.default, aten.reshape.default, aten.permute.default, aten.transpose.int, aten.unsqueeze.default,
    aten.squeeze.dim, aten.expand.default, aten.slice.Tensor, aten.select.int, aten.contiguous.default,
    aten.clone.default, aten.index.Tensor, aten.index_select.default, aten.alias.default, aten.detach.default,
    aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.gather.default, aten.repeat.default,
}  # fmt: skip


def is_learned(node: Node) -> bool:
    """Whether a tensor is picked from weights (an embedding, a table of relative positions): such values are finite."""
    while node.op == "call_function" and node.target in _LEARNED:
        node = node.args[0]
    if node.target is aten.embedding.default:
        return True
    if node.op == "get_attr":
        return _is_parameter_read(node)
    return isinstance(value(node), torch.nn.Parameter)


def _is_parameter_read(node: Node) -> bool:
    owner: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        owner = getattr(owner, name, None)
    return isinstance(owner, torch.nn.Parameter)
