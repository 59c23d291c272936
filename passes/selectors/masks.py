"""Masks over coarser indices: what is left of a mask when several queries and keys share one index.

Scores that rank blocks are taken over strided or moved queries and keys. The masks here hide from them what the exact
mask hides, as far as the coarse indices can say it; they never hide what some pair would see. Only the ranking depends
on them: what may be read at all is decided by the exact mask.
"""

from __future__ import annotations

from collections.abc import Callable

import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import And, Boolean, Not, Or

from ...codegen import symbols
from ...codegen.symbols import BATCH, HEAD, K_LEN, Q_LEN, K, Q

_LINEAR = frozenset({Q, K, Q_LEN, K_LEN, HEAD, BATCH, sympy.S.One})


def coarsen(mask: str, stride: int, queries: int | None = None, keys: int | None = None, *, aligned: bool) -> str:
    """The mask over groups of ``stride`` queries and keys: visible where some pair of the two groups is.

    queries, keys: how many there are, where that is known; otherwise the last groups may be of any size. aligned: they
    are equally many. Comparisons that are not linear in the indices (tables, ``//``, ``%``) hide nothing.
    """
    missing = {length: None if n is None else -n % stride for length, n in ((Q_LEN, queries), (K_LEN, keys))}

    def least(difference: sympy.Expr) -> Boolean:
        """Whether ``difference`` is at most 0 somewhere in the two groups."""
        terms = difference.as_coefficients_dict()
        coarse, rest = sympy.S.Zero, sympy.S.Zero
        for term, factor in terms.items():
            if term in (Q, K):  # index = stride * group + (0 .. stride - 1)
                coarse += factor * term
                rest += min(factor, 0) * (stride - 1)
            elif term in (Q_LEN, K_LEN):  # length = stride * groups - (0 .. stride - 1)
                coarse += factor * term
                known = missing[term]
                rest -= max(factor, 0) * (stride - 1) if known is None else factor * known
            else:
                rest += factor * term
        return sympy.Le(coarse, sympy.floor(-rest / stride))

    def weaker(relation: Relational) -> Boolean:
        difference = _difference(relation, aligned)
        if difference is None:
            return sympy.true
        match relation.rel_op:
            case "<=":
                return least(difference)
            case ">":
                return least(sympy.expand(1 - difference))
            case "==":
                return And(least(difference), least(sympy.expand(-difference)))
            case _:
                return sympy.true

    return _text(mask, weaker)


def last_queries(mask: str, *, aligned: bool) -> str:
    """The mask for a call that holds only the last queries of the attention, and all keys.

    aligned: queries and keys are equally many. A comparison in which the number of the queries left out would matter
    hides nothing.
    """
    total = sympy.Dummy("total", integer=True)

    def weaker(relation: Relational) -> Boolean:
        difference = _difference(relation, aligned)
        if difference is None:
            return sympy.true
        if aligned:
            moved = difference.subs(Q, Q + K_LEN - Q_LEN)
        else:
            moved = difference.subs({Q: Q + total - Q_LEN, Q_LEN: total}, simultaneous=True)
        moved = sympy.expand(moved)
        return sympy.true if total in moved.free_symbols else relation.func(moved, 0)

    return _text(mask, weaker)


def _difference(relation: Relational, aligned: bool) -> sympy.Expr | None:
    """Left minus right side, or None where it is not linear in the indices."""
    difference = sympy.expand(relation.lhs - relation.rhs)
    if aligned:
        difference = sympy.expand(difference.subs(Q_LEN, K_LEN))
    return difference if set(difference.as_coefficients_dict()) <= _LINEAR else None


def _text(mask: str, weaker: Callable[[Relational], Boolean]) -> str:
    """The mask with every comparison replaced by a weaker one; a mask without negations only grows by that."""

    def visit(e: Boolean) -> Boolean:
        if isinstance(e, And | Or):
            return e.func(*(visit(term) for term in e.args))
        if isinstance(e, Not):
            return sympy.true
        return weaker(e) if isinstance(e, Relational) else e

    return symbols.mask_text(visit(symbols.parse_mask(mask)))
