"""Closed-form loop limits from symbolic masks (codegen/symbols.py), without evaluating a single pair.

:func:`bounds` solves a mask for one index; :func:`interval` gives the range of an expression over a tile;
:func:`tile_bounds` puts both together: which part of one index a tile of the other needs, and which part it sees in
full. With it a kernel loops over the tiles it needs and evaluates the mask in those that are partly visible.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import And, Boolean, BooleanTrue

from .mask_logic import Conjunction, disjuncts
from .symbols import K, Mod, Q, Table, canonical, parse_mask

MAX_SEGMENTS = 4
"""Kernels sort and merge at most this many ranges for every tile."""


@dataclass(frozen=True)
class Bounds:
    """Limits of one index that hold wherever the mask is true.

    lower, upper: expressions without the index; visible means ``max(lower) <= index`` and ``index < min(upper)``.
    exact: whether the limits are the whole mask. If not, there is more to check inside them.
    """

    lower: tuple[sympy.Expr, ...]
    upper: tuple[sympy.Expr, ...]
    exact: bool


@functools.lru_cache(maxsize=512)
def bounds(mask: Boolean | str, index: sympy.Symbol = K) -> Bounds:
    """Closed-form limits of ``index`` from the conjuncts of ``mask`` that can be solved for it.

    Solvable: comparisons linear in ``index`` or in ``(index + e) // c``, such as ``k_idx > q_idx - 256`` or
    ``k_idx // 64 == q_idx // 64``. A conjunct that does not mention ``index`` is not a limit and makes the result
    inexact, as do disjunctions, ``!=`` and whatever looks entries of a table up.
    """
    mask = parse_mask(mask) if isinstance(mask, str) else canonical(mask)
    terms: Iterable[Boolean] = mask.args if isinstance(mask, And) else (mask,)
    lower: list[sympy.Expr] = []
    upper: list[sympy.Expr] = []
    exact = True
    for term in terms:
        if isinstance(term, BooleanTrue):
            continue
        solved = _solve(term, index) if isinstance(term, Relational) else None
        if solved is None or term.has(Table):
            exact = False
            continue
        low, high = solved
        if low is not None:
            lower.append(low)
        if high is not None:
            upper.append(high)

    def ordered(limits: list[sympy.Expr]) -> tuple[sympy.Expr, ...]:
        return tuple(sorted(set(limits), key=str))

    return Bounds(ordered(lower), ordered(upper), exact)


def k_bounds(mask: Boolean | str) -> Bounds:
    """:func:`bounds` of ``k_idx`` in terms of ``q_idx``."""
    return bounds(mask, K)


def _solve(relation: Relational, index: sympy.Symbol) -> tuple[sympy.Expr | None, sympy.Expr | None] | None:
    """(inclusive lower, exclusive upper) of ``index`` equivalent to the relation, or None when it cannot be solved."""
    difference = sympy.expand(relation.lhs - relation.rhs)  # difference rel 0
    terms = difference.as_coefficients_dict()
    holding = [term for term in terms if index in term.free_symbols]
    if len(holding) != 1 or relation.rel_op == "!=":
        return None
    (term,) = holding
    coefficient = int(terms[term])
    rest = difference - coefficient * term
    # coefficient * term + rest rel 0, as low <= term < high
    flipped = coefficient < 0
    size = abs(coefficient)

    def floor_div(e: sympy.Expr) -> sympy.Expr:
        return e if size == 1 else sympy.floor(e / size)

    low: sympy.Expr | None
    high: sympy.Expr | None
    match relation.rel_op:
        case "==":
            if size != 1:
                return None
            value = rest if flipped else -rest
            low, high = value, value + 1
        case "<=" if not flipped:  # size * term <= -rest
            low, high = None, floor_div(-rest) + 1
        case "<=":  # size * term >= rest
            low, high = floor_div(rest + size - 1), None
        case ">" if not flipped:  # size * term >= 1 - rest
            low, high = floor_div(-rest + size), None
        case ">":  # size * term < rest
            low, high = None, floor_div(rest - 1) + 1
        case _:
            return None
    if term is index:
        return low, high
    if isinstance(term, sympy.floor):
        value, divisor = sympy.fraction(sympy.together(term.args[0]))
        offset = sympy.expand(value - index)
        if index not in offset.free_symbols and divisor.is_Integer:
            # low <= (index + offset) // c < high is c * low <= index + offset < c * high.
            return (
                None if low is None else sympy.expand(divisor * low - offset),
                None if high is None else sympy.expand(divisor * high - offset),
            )
    return None


def interval(
    expression: sympy.Expr, index: sympy.Symbol, first: sympy.Expr, last: sympy.Expr
) -> tuple[sympy.Expr, sympy.Expr] | None:
    """(least, greatest) value of ``expression`` for ``first <= index <= last``, as expressions without ``index``.

    Structural interval arithmetic: exact for expressions that hold ``index`` once, an enclosure otherwise. None when
    the expression has a form it does not know (a product of the index with another symbol).
    """
    if index not in expression.free_symbols:
        return expression, expression
    if expression is index:
        return first, last
    if expression.is_Add:
        parts = [interval(term, index, first, last) for term in expression.args]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        return sympy.Add(*(part[0] for part in known)), sympy.Add(*(part[1] for part in known))
    if expression.is_Mul:
        coefficient, rest = expression.as_coeff_Mul()
        inner = interval(rest, index, first, last) if coefficient != 1 else None
        if inner is None:
            return None
        ends = (coefficient * inner[0], coefficient * inner[1])
        return ends if coefficient > 0 else ends[::-1]
    if isinstance(expression, sympy.floor):
        inner = interval(expression.args[0], index, first, last)
        return None if inner is None else (sympy.floor(inner[0]), sympy.floor(inner[1]))
    if isinstance(expression, Mod):
        return sympy.Integer(0), expression.args[1] - 1
    return None


FIRST = sympy.Symbol("first", integer=True, nonnegative=True)
LAST = sympy.Symbol("last", integer=True, nonnegative=True)


@dataclass(frozen=True)
class TileBounds:
    """Limits of one index over a tile ``first <= other <= last`` of the other index, as expressions of both ends.

    needed_lower, needed_upper: outside ``max(needed_lower) <= index < min(needed_upper)`` nothing of the tile is
        visible. full_lower, full_upper: inside ``max(full_lower) <= index < min(full_upper)`` all of it is; None when
        the mask is not known to have such a part. Lengths limit the index besides.
    needed_if, full_if: conditions without either index. Nothing is visible unless all of ``needed_if`` hold, and the
        full part counts only where all of ``full_if`` do.
    """

    needed_lower: tuple[sympy.Expr, ...]
    needed_upper: tuple[sympy.Expr, ...]
    full_lower: tuple[sympy.Expr, ...] | None
    full_upper: tuple[sympy.Expr, ...] | None
    needed_if: tuple[Boolean, ...] = ()
    full_if: tuple[Boolean, ...] = ()

    @property
    def has_full(self) -> bool:
        return self.full_lower is not None


@functools.lru_cache(maxsize=512)
def tile_bounds(mask: Boolean | str, index: sympy.Symbol = K) -> TileBounds:
    """Which part of ``index`` (``K`` or ``Q``) a tile of the other index needs, and which part it sees in full."""
    other = Q if index is K else K
    limits = bounds(mask, index)
    exact = limits.exact
    needed: tuple[list[sympy.Expr], list[sympy.Expr]] = ([], [])
    full: tuple[list[sympy.Expr], list[sympy.Expr]] = ([], [])
    for side, expressions in enumerate((limits.lower, limits.upper)):
        for expression in expressions:
            ends = interval(expression, other, FIRST, LAST)
            if ends is None:
                exact = False
                continue
            # A lower limit is loosest at its least value, an upper limit at its greatest.
            needed[side].append(ends[side])
            full[side].append(ends[1 - side])
    return TileBounds(
        tuple(needed[0]), tuple(needed[1]), tuple(full[0]) if exact else None, tuple(full[1]) if exact else None
    )


# ------------------------------------------------------------------------------------------------------- segments


@functools.lru_cache(maxsize=512)
def segments(mask: Boolean | str, index: sympy.Symbol = K) -> tuple[TileBounds, ...]:
    """The ranges of ``index`` (``K`` or ``Q``) that a tile of the other index needs, one for each disjunct of the mask.

    Together they cover what is visible, every full part is visible throughout, and they may overlap, in any order.
    At most ``MAX_SEGMENTS``: a mask of more disjuncts, or with one that has no limit, gives :func:`tile_bounds` alone.
    A mask that hides everything has none.
    """
    found = [_segment(one, index) for one in disjuncts(mask) or ()]
    unlimited = [t for t in found if not (t.needed_lower or t.needed_upper or t.needed_if or t.has_full)]
    if disjuncts(mask) is None or len(found) > MAX_SEGMENTS or unlimited:
        return (tile_bounds(mask, index),)
    return tuple(found)


@functools.lru_cache(maxsize=512)
def closed_form(mask: Boolean | str) -> bool:
    """Whether :func:`segments` says exactly which tiles see something, for queries and for keys, from no table."""
    found = disjuncts(mask)
    if found is None or not 0 < len(found) <= MAX_SEGMENTS:
        return False
    return all(_exact(term, index) for one in found for term in one for index in (K, Q))


def _other(index: sympy.Symbol) -> sympy.Symbol:
    return Q if index is K else K


def _exact(term: Relational, index: sympy.Symbol) -> bool:
    """Whether the ends of a tile of the other index tell which part of ``index`` the comparison shows to the tile."""
    other = _other(index)
    if term.has(Table):
        return False
    if index not in term.free_symbols:
        limits: Iterable[sympy.Expr | None] = (term.lhs, term.rhs)
    elif (solved := _solve(term, index)) is None:
        return False
    else:
        limits = solved
    return all(e is None or (e.count(other) <= 1 and interval(e, other, FIRST, LAST)) for e in limits) and not any(
        other in part.free_symbols for part in term.atoms(Mod)
    )


def _segment(one: Conjunction, index: sympy.Symbol) -> TileBounds:
    """The limits of a conjunction, and the conditions in those of its comparisons that do not mention the index."""
    limited = And(*(term for term in one if index in term.free_symbols))
    limits = tile_bounds(limited, index)
    needed: list[Boolean] = []
    full: list[Boolean] = []
    for term in one:
        if index not in term.free_symbols:
            may, must = _tile_condition(term, _other(index))
            needed.append(may)
            full.append(must)
    has_full = limits.has_full and sympy.false not in full

    def conjuncts(conditions: list[Boolean]) -> tuple[Boolean, ...]:
        terms = {part for c in conditions for part in (c.args if isinstance(c, And) else (c,)) if part != sympy.true}
        return tuple(sorted(terms, key=str))

    return TileBounds(
        limits.needed_lower,
        limits.needed_upper,
        limits.full_lower if has_full else None,
        limits.full_upper if has_full else None,
        conjuncts(needed),
        conjuncts(full) if has_full else (),
    )


def _tile_condition(term: Relational, other: sympy.Symbol) -> tuple[Boolean, Boolean]:
    """(may hold for some of the tile, holds for all of it), over its ends; unknown is (true, false)."""
    left = interval(term.lhs, other, FIRST, LAST)
    right = interval(term.rhs, other, FIRST, LAST)
    if left is None or right is None or term.has(Table):
        return sympy.true, sympy.false
    if other not in term.free_symbols:
        return term, term
    match term.rel_op:
        case "<=":
            return sympy.Le(left[0], right[1]), sympy.Le(left[1], right[0])
        case ">":
            return sympy.Gt(left[1], right[0]), sympy.Gt(left[0], right[1])
        case ">=":
            return sympy.Ge(left[1], right[0]), sympy.Ge(left[0], right[1])
        case "==":
            meet = And(sympy.Le(left[0], right[1]), sympy.Ge(left[1], right[0]))
            return meet, And(sympy.Eq(left[0], right[1]), sympy.Eq(left[1], right[0]))
    return sympy.true, sympy.false
