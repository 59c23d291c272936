"""Elements of tensors as values: cases under conditions, data, and the arithmetic of indices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch.fx
from sympy.logic.boolalg import Boolean

Node = torch.fx.Node
Index = tuple[sympy.Expr, ...]

MAX_CASES = 8


@dataclass(frozen=True)
class Opaque:
    """A floating-point element that is only known when the model runs: ``node`` at ``index``."""

    node: Node
    index: Index


@dataclass(frozen=True)
class Cases:
    """Finitely many values under exclusive, exhaustive conditions: ``((value, condition), ...)``."""

    items: tuple[tuple[Any, Boolean], ...]

    @property
    def single(self) -> Any:
        """The value when there is only one, else None."""
        return self.items[0][0] if len(self.items) == 1 else None


Element = Boolean | Cases | Opaque


class Unsupported(Exception):
    """The interpreter cannot follow the graph at this node. Never leaves :meth:`Interpreter.element`."""


class Mutated(Exception):
    """A tensor on the way is changed in place while others read it: nothing can be said about its elements."""


def size_expr(size: Any) -> sympy.Expr:
    """A tensor's size (int or SymInt) as a sympy expression, under what the shape environment has proven."""
    if isinstance(size, sympy.Expr):
        return size
    return sympy.Integer(size) if isinstance(size, int) else sympy.sympify(size.node.expr)


def same_expr(left: sympy.Expr, right: sympy.Expr) -> bool:
    """Whether two integer expressions are provably the same."""
    return left == right or sympy.expand(left - right) == 0


def is_one(size: Any) -> bool:
    return size_expr(size) == 1


def fresh(name: str) -> sympy.Symbol:
    """An index symbol: a non-negative integer, different from every other one."""
    return sympy.Dummy(name, integer=True, nonnegative=True)


def bool_cases(condition: Boolean) -> Cases:
    if condition == sympy.true or condition == sympy.false:
        return Cases(((bool(condition), sympy.true),))
    return Cases(((True, condition), (False, sympy.Not(condition))))


def truth(cases: Cases) -> Boolean:
    """Where a number is not zero (NaN counts as true, as in torch)."""
    return sympy.Or(*(sympy.And(condition, _nonzero(item)) for item, condition in cases.items))


def _nonzero(item: Any) -> Boolean:
    if isinstance(item, bool | float):
        return sympy.true if item else sympy.false
    return sympy.Ne(item, 0)


def make_cases(items: Sequence[tuple[Any, Boolean]]) -> Cases:
    """Cases without impossible ones; equal values share one condition."""
    merged: dict[Any, Boolean] = {}
    for item, condition in items:
        if condition == sympy.false:
            continue
        # NaN differs from itself, and -0.0 from 0.0 where a division follows: the text tells them apart.
        key = (type(item).__name__, repr(item)) if isinstance(item, float) else item
        previous = merged.get(key)
        merged[key] = (item, condition if previous is None else sympy.Or(previous[1], condition))
    if not merged or len(merged) > MAX_CASES:
        raise Unsupported("too many cases")
    if len(merged) == 1:
        return Cases(((next(iter(merged.values()))[0], sympy.true),))
    return Cases(tuple(merged.values()))


def is_number(item: Any) -> bool:
    return isinstance(item, bool | float) or bool(item.is_Integer)


def python_number(item: Any) -> bool | int | float:
    return item if isinstance(item, bool | float) else int(item)


# Index arithmetic.


def broadcast_index(shape: Sequence[Any], index: Index) -> Index:
    """The index into a tensor of ``shape`` that broadcasts to a result indexed by ``index``."""
    if len(shape) > len(index):
        raise Unsupported("rank")
    tail = index[len(index) - len(shape) :]
    return tuple(sympy.Integer(0) if is_one(size) else i for size, i in zip(shape, tail, strict=True))


def reshape_index(source: Sequence[Any], target: Sequence[Any], index: Index) -> Index:
    """The index into ``source`` of the element at ``index`` of a reshape to ``target``.

    Dimensions are grouped into runs of provably equal product; inside a run, the flat index is taken apart by floor
    and modulo.
    """
    old = [(d, size_expr(s)) for d, s in enumerate(source) if not is_one(s)]
    new = [(d, size_expr(s)) for d, s in enumerate(target) if not is_one(s)]
    result = [sympy.Integer(0)] * len(source)
    i = j = 0
    while i < len(old) or j < len(new):
        if i == len(old) or j == len(new):
            raise Unsupported("reshape")
        left, right = [old[i]], [new[j]]
        i, j = i + 1, j + 1
        while not same_expr(_product(left), _product(right)):
            # Grow the side whose product divides the other's; without proof, whichever is shorter and has more.
            if j < len(new) and _divides(_product(right), _product(left)):
                right.append(new[j])
                j += 1
            elif i < len(old) and _divides(_product(left), _product(right)):
                left.append(old[i])
                i += 1
            else:
                raise Unsupported("reshape")
        flat = sympy.Integer(0)
        for d, size in right:
            flat = flat * size + index[d]
        for d, size in reversed(left[1:]):
            result[d], flat = remainder(flat, size), sympy.floor(flat / size)
        result[left[0][0]] = flat
    return tuple(result)


def remainder(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    """``a % b``, rounding down. sympy's own Mod takes Mod(2*Mod(q, 3), 3) for something it is not."""
    return a - b * sympy.floor(a / b)


def _product(dims: Sequence[tuple[int, sympy.Expr]]) -> sympy.Expr:
    return sympy.Mul(*(size for _, size in dims))


def _divides(small: sympy.Expr, large: sympy.Expr) -> bool:
    ratio = sympy.cancel(large / small)
    return bool(ratio != 1 and sympy.denom(ratio) == 1)
