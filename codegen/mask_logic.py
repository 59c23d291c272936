"""What follows from masks: their disjuncts, contradictions between comparisons, and whether one mask implies another.

Every answer is a proof: "contradictory" and "implies" are said only where the linear facts at hand show it, over all
lengths, heads, batch entries and tables. What they cannot show counts as unknown, never as true.
"""

from __future__ import annotations

import functools
import math

import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import And, Boolean, BooleanFalse, BooleanTrue, Not, Or

from .symbols import K_LEN, Q_LEN, K, Mod, Q, canonical, parse_mask

MAX_DISJUNCTS = 64
"""Masks with more disjuncts are left alone: nothing is proven about them."""
MAX_FACTS = 400
"""Elimination stops at this many inequalities, and proves nothing."""

Conjunction = frozenset[Relational]
Row = tuple[dict[sympy.Expr, int], int]
"""Coefficients by term, and a constant: their sum is at most 0."""


@functools.lru_cache(maxsize=512)
def disjuncts(mask: Boolean | str) -> tuple[Conjunction, ...] | None:
    """The mask as "one of these conjunctions of comparisons holds", none of which follows from another.

    ``!=`` counts as ``<`` or ``>``. Conjunctions that contradict themselves are left out: ``()`` hides every pair.
    None when there would be more than ``MAX_DISJUNCTS``.
    """
    mask = parse_mask(mask) if isinstance(mask, str) else canonical(mask)
    found = _distribute(mask)
    if found is None:
        return None
    kept: list[Conjunction] = []
    for one in sorted((one for one in found if not contradictory(one)), key=lambda one: (len(one), _order(one))):
        if not any(_follows(one, other) for other in kept):
            kept = [other for other in kept if not _follows(other, one)] + [one]
    return tuple(sorted(kept, key=_order))


def implies(mask: Boolean | str, other: Boolean | str) -> bool:
    """Whether every pair that ``mask`` shows is shown by ``other``, for all lengths, heads and tables.

    True only where it is proven; False where it is wrong or unknown.
    """
    left, right = (parse_mask(m) if isinstance(m, str) else canonical(m) for m in (mask, other))
    return hides_everything(And(left, Not(right)))


def hides_everything(mask: Boolean | str) -> bool:
    """Whether no pair can be visible. True only where it is proven."""
    return disjuncts(mask) == ()


def _follows(one: Conjunction, other: Conjunction) -> bool:
    """Whether ``one`` shows nothing that ``other`` does not show."""
    return other <= one or all(contradictory(one | negated) for term in other for negated in _split(Not(term)))


def _order(one: Conjunction) -> str:
    return " & ".join(sorted(str(term) for term in one))


def _distribute(mask: Boolean) -> set[Conjunction] | None:
    if isinstance(mask, BooleanTrue):
        return {frozenset()}
    if isinstance(mask, BooleanFalse):
        return set()
    if isinstance(mask, Or):
        union: set[Conjunction] = set()
        for term in mask.args:
            parts = _distribute(term)
            if parts is None or len(union := union | parts) > MAX_DISJUNCTS:
                return None
        return union
    if isinstance(mask, And):
        product: set[Conjunction] = {frozenset()}
        for term in mask.args:
            parts = _distribute(term)
            if parts is None or len(product) * len(parts) > 4 * MAX_DISJUNCTS:
                return None
            product = {one for left in product for right in parts if not _clash(one := left | right)}
            product = {one for one in product if not any(other < one for other in product)}
            if len(product) > MAX_DISJUNCTS:
                return None
        return product
    return set(_split(mask))


def _split(relation: Boolean) -> list[Conjunction]:
    """The disjuncts of one comparison: two for ``!=``, none if it is false, else one."""
    relation = canonical(relation)
    if isinstance(relation, BooleanTrue):
        return [frozenset()]
    if isinstance(relation, BooleanFalse):
        return []
    if relation.rel_op == "!=":
        sides = (sympy.Lt(relation.lhs, relation.rhs), sympy.Gt(relation.lhs, relation.rhs))
        return [part for side in sides for part in _split(side)]
    return [frozenset({relation})]


def _clash(one: Conjunction) -> bool:
    """A cheap look for a comparison beside its negation."""
    return any(isinstance(negated := Not(term), Relational) and negated in one for term in one)


# --------------------------------------------------------------------------------------------------- contradictions


@functools.lru_cache(maxsize=4096)
def contradictory(one: Conjunction) -> bool:
    """Whether the comparisons cannot hold together. True only where it is proven.

    Fourier-Motzkin elimination over the linear inequalities, rounded to integers (Schrijver, "Theory of Linear and
    Integer Programming", section 12.2), with ``x // c``, ``x % c``, ``table(x)`` and products as terms of their own
    of which only their ranges are known.
    """
    equal: list[Row] = []
    below: list[Row] = []
    for relation in one:
        difference = relation.lhs - relation.rhs
        match relation.rel_op:
            case "==":
                equal.append(_row(difference))
            case "<=":
                below.append(_row(difference))
            case ">":
                below.append(_row(1 - difference))
    _add_facts(equal, below)
    return _infeasible(equal, below)


def _row(expression: sympy.Expr) -> Row:
    terms = sympy.expand(expression).as_coefficients_dict()
    constant = int(terms.pop(sympy.S.One, 0))
    return {term: int(value) for term, value in terms.items() if value != 0}, constant


def _add_facts(equal: list[Row], below: list[Row]) -> None:
    """Append what is known of the terms: symbols are not negative, indices are below lengths, ranges of // and %."""
    todo = [term for terms, _ in equal + below for term in terms]
    seen: set[sympy.Expr] = set()
    while todo:
        term = todo.pop()
        if term in seen:
            continue
        seen.add(term)
        rows = [_row(-term)] if term.is_nonnegative else []
        if term in (K, Q):
            rows.append(_row(term + 1 - (K_LEN if term is K else Q_LEN)))
        elif isinstance(term, Mod):
            value, divisor = term.args
            rows.append(_row(term - divisor + 1))
            equal.append(_row(divisor * sympy.floor(value / divisor) + term - value))
            todo += equal[-1][0]
        elif isinstance(term, sympy.floor):
            value, divisor = sympy.fraction(sympy.together(term.args[0]))
            rows += [_row(divisor * term - value), _row(value - divisor * term - divisor + 1)]
        below += rows
        todo += [other for terms, _ in rows for other in terms]


def _tight(row: Row) -> Row:
    """The row divided by what divides all coefficients, its constant rounded: the terms are integers."""
    terms, constant = row
    divisor = math.gcd(*terms.values()) if terms else 1
    if divisor > 1:
        return {term: value // divisor for term, value in terms.items()}, -((-constant) // divisor)
    return row


def _combine(row: Row, times: int, other: Row, factor: int) -> Row:
    terms = {term: times * value for term, value in row[0].items()}
    for term, value in other[0].items():
        terms[term] = terms.get(term, 0) + factor * value
    return {term: value for term, value in terms.items() if value}, times * row[1] + factor * other[1]


def _infeasible(equal: list[Row], below: list[Row]) -> bool:
    # An equality gives one of its terms away. What has no term of coefficient 1 becomes two inequalities.
    while equal:
        terms, constant = equal.pop()
        divisor = math.gcd(*terms.values())
        if not terms or constant % divisor:
            if constant:
                return True
            continue
        row = {term: value // divisor for term, value in terms.items()}, constant // divisor
        unit = min((term for term, value in row[0].items() if abs(value) == 1), key=str, default=None)
        if unit is None:
            below += [row, ({term: -value for term, value in row[0].items()}, -row[1])]
            continue
        sign = row[0][unit]
        equal = [_combine(other, 1, row, -sign * other[0].get(unit, 0)) for other in equal]
        below = [_combine(other, 1, row, -sign * other[0].get(unit, 0)) for other in below]

    strongest: dict[frozenset[tuple[sympy.Expr, int]], Row] = {}

    def add(row: Row) -> bool:
        """Keep the row unless a stronger one is there; True when it is impossible by itself."""
        terms, constant = _tight(row)
        if not terms:
            return constant > 0
        key = frozenset(terms.items())
        if key not in strongest or strongest[key][1] < constant:
            strongest[key] = terms, constant
        return False

    if any(add(row) for row in below):
        return True
    while strongest:
        counts: dict[sympy.Expr, list[int]] = {}
        for terms, _ in strongest.values():
            for term, value in terms.items():
                counts.setdefault(term, [0, 0])[value > 0] += 1
        gone = min(counts, key=lambda t: (counts[t][0] * counts[t][1], str(t)))
        uppers = [row for row in strongest.values() if row[0].get(gone, 0) > 0]
        lowers = [row for row in strongest.values() if row[0].get(gone, 0) < 0]
        strongest = {key: row for key, row in strongest.items() if gone not in row[0]}
        for upper in uppers:
            for lower in lowers:
                times, factor = -lower[0][gone], upper[0][gone]
                common = math.gcd(times, factor)
                if add(_combine(upper, times // common, lower, factor // common)):
                    return True
        if len(strongest) > MAX_FACTS:
            return False
    return False
