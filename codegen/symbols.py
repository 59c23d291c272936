"""Attention masks as symbolic expressions: which (query, key) pairs are visible.

A mask is a boolean expression over six integer symbols:

    q_idx, k_idx   position of the query (0 <= q_idx < q_len) and of the key (0 <= k_idx < k_len)
    q_len, k_len   numbers of queries and keys
    batch, head    index of the batch entry and of the query head

and over ``table(index)``, an entry of one flat int32 table that goes with the mask as a tensor (an index beyond its
ends means its first or last entry).

It travels as text (in graphs, specs, saved files), such as ``"(k_idx <= q_idx) & (k_idx > q_idx - 256)"``. Text is
parsed through a whitelist of syntax, never evaluated; :func:`mask_text` prints the canonical form, so that one mask
has one text. The empty text hides nothing. Grammar: comparisons (chains too), ``& | ~`` and ``and or not``,
``+ - *``, ``//`` and ``%`` by a positive literal (rounding down, as in Python), integer literals, ``table(index)``,
parentheses, and the masks of codegen/mask_constructors.py by name: ``causal & (window(256) | sinks(4))``.

codegen/mask_grammar.py reads masks, codegen/mask_logic.py proves what follows from them, and codegen/bounds.py derives
loop limits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import And, Boolean, BooleanFalse, BooleanTrue, Or, to_nnf

from .mask_grammar import read_mask
from .mask_terms import BATCH as BATCH
from .mask_terms import HEAD as HEAD
from .mask_terms import K_LEN as K_LEN
from .mask_terms import MAX_DEPTH as MAX_DEPTH
from .mask_terms import MAX_LITERAL as MAX_LITERAL
from .mask_terms import MAX_TEXT as MAX_TEXT
from .mask_terms import Q_LEN as Q_LEN
from .mask_terms import SYMBOLS as SYMBOLS
from .mask_terms import K as K
from .mask_terms import MaskError as MaskError
from .mask_terms import Mod as Mod
from .mask_terms import Q as Q
from .mask_terms import Table as Table
from .spec import SpecError

# The first of these in a comparison is what its canonical form isolates on the left.
_PRIORITY = tuple(SYMBOLS.values())
_PRINT_ORDER = {s: i for i, s in enumerate((Q, K, HEAD, BATCH, K_LEN, Q_LEN))}


@functools.lru_cache(maxsize=512)
def parse_mask(text: str) -> Boolean:
    """The mask that ``text`` means, in canonical form; ``sympy.true`` for the empty text.

    Raises :class:`MaskError` naming the column of what the grammar does not allow.
    """
    return canonical(read_mask(text))


def has_table(mask: Boolean | str) -> bool:
    """Whether the mask looks entries of its table up."""
    mask = parse_mask(mask) if isinstance(mask, str) else mask
    return bool(mask.has(Table))


# -------------------------------------------------------------------------------------------------- canonical form


def canonical(mask: Boolean) -> Boolean:
    """The mask in negation normal form, each comparison with one symbol isolated on the left where possible.

    Upper limits read ``<=`` and lower limits ``>``, so that a comparison and its negation are each other's mirror.
    ``k_idx < k_len`` and ``q_idx < q_len`` are facts and vanish.
    """
    mask = to_nnf(sympy.sympify(mask), simplify=False)
    if mask.has(sympy.Mod):
        mask = mask.replace(sympy.Mod, Mod)
    if isinstance(mask, BooleanTrue | BooleanFalse):
        return mask
    if isinstance(mask, And | Or):
        return mask.func(*(canonical(term) for term in mask.args))
    if isinstance(mask, Relational):
        return _canonical_relation(mask)
    raise SpecError(f"{mask} is not a mask")


def _canonical_relation(relation: Relational) -> Boolean:
    difference = sympy.expand(relation.lhs - relation.rhs)
    terms = difference.as_coefficients_dict()
    constant = terms.pop(sympy.S.One, sympy.Integer(0))
    kind = relation.rel_op
    # Over integers: a < b is a <= b - 1, and a >= b is a > b - 1.
    if kind == "<":
        kind, constant = "<=", constant + 1
    elif kind == ">=":
        kind, constant = ">", constant + 1
    terms = {term: value for term, value in terms.items() if value != 0}
    if not terms:
        return {"<=": constant <= 0, ">": constant > 0, "==": sympy.Eq(constant, 0), "!=": sympy.Ne(constant, 0)}[kind]
    lead = _leading_term(terms)
    if terms[lead] < 0:
        # -a <= 0 is a >= 0, that is a > -1.
        terms = {term: -value for term, value in terms.items()}
        constant = -constant
        if kind == "<=":
            kind, constant = ">", constant + 1
        elif kind == ">":
            kind, constant = "<=", constant + 1
    divisor = functools.reduce(math.gcd, (int(value) for value in terms.values()))
    limit = -constant  # sum(terms) kind limit
    if divisor > 1:
        terms = {term: value / divisor for term, value in terms.items()}
        if kind in ("==", "!=") and limit % divisor != 0:
            return sympy.false if kind == "==" else sympy.true
        limit = sympy.Integer(int(limit) // divisor)
    if terms[lead] == 1 and lead.is_Symbol:
        right = limit - sum((value * term for term, value in terms.items() if term != lead), sympy.Integer(0))
        left: sympy.Expr = lead
    else:
        left = sum((value * term for term, value in terms.items() if value > 0), sympy.Integer(0))
        right = limit - sum((value * term for term, value in terms.items() if value < 0), sympy.Integer(0))
    if kind == "<=" and left in (K, Q):
        slack = right - ((K_LEN if left is K else Q_LEN) - 1)
        if slack.is_Integer and slack >= 0:
            return sympy.true
    return {"<=": sympy.Le, ">": sympy.Gt, "==": sympy.Eq, "!=": sympy.Ne}[kind](left, right)


def _leading_term(terms: Mapping[sympy.Expr, sympy.Expr]) -> sympy.Expr:
    """The term to write first: an isolatable symbol if there is one, else the one that holds the first symbol."""
    for symbol in _PRIORITY:
        if abs(terms.get(symbol, 0)) == 1 and not any(symbol in t.free_symbols for t in terms if t != symbol):
            return symbol

    def rank(term: sympy.Expr) -> tuple[int, str]:
        first = min((_PRIORITY.index(symbol) for symbol in term.free_symbols), default=len(_PRIORITY))
        return first, _print(term, 0, PYTHON)

    return min(terms, key=rank)


# -------------------------------------------------------------------------------------------------------- printing


@dataclass(frozen=True)
class _Style:
    conjunction: str
    disjunction: str
    true: str
    false: str
    floors: bool  # whether // and % round down for negative numbers
    divide: str
    lookup: str = "lookup({index})"


PYTHON = _Style(" & ", " | ", "True", "False", True, " // ", "table({index})")
TRITON = _Style(" & ", " | ", "True", "False", False, " // ", "lookup({table}, {index}, {table_len})")
CPP = _Style(" && ", " || ", "true", "false", False, " / ")
CPP_LANES = _Style(" & ", " | ", "true", "false", False, " / ")

_OR, _AND, _COMPARE, _ADD, _MUL, _ATOM = range(6)


def mask_text(mask: Boolean | str) -> str:
    """The canonical text of a mask: empty when it hides nothing. ``parse_mask`` reads it back to the same mask.

    The text is also a Python expression over integers or torch tensors named as the symbols.
    """
    mask = parse_mask(mask) if isinstance(mask, str) else canonical(mask)
    return "" if mask == sympy.true else _print(mask, _OR, PYTHON)


def triton_text(expression: sympy.Basic, names: Mapping[str, str] | None = None) -> str:
    """The expression in Triton, whose ``//`` and ``%`` round towards zero. ``names`` renames symbols.

    Entries of the table read ``lookup(table, index, table_len)``, a function of the kernel that clamps the index.
    """
    return _print(expression, _OR, TRITON, names)


def cpp_text(expression: sympy.Basic, names: Mapping[str, str] | None = None) -> str:
    """The expression in C++ over signed integers. ``names`` renames symbols."""
    return _print(expression, _OR, CPP, names)


def cpp_lanes_text(expression: sympy.Basic, names: Mapping[str, str] | None = None) -> str:
    """The expression in C++ over vectors of signed integers (GCC's vector extension): a condition is a vector of lanes
    that are all ones or zero. At least one operand of every comparison has to be a vector."""
    return _print(expression, _OR, CPP_LANES, names)


def _print(e: sympy.Basic, outer: int, style: _Style, names: Mapping[str, str] | None = None) -> str:
    """``e`` as text, in parentheses where it binds more loosely than ``outer`` asks for."""

    def sub(child: sympy.Basic, level: int) -> str:
        return _print(child, level, style, names)

    def wrap(text: str, level: int) -> str:
        return f"({text})" if level < outer else text

    if isinstance(e, BooleanTrue):
        return style.true
    if isinstance(e, BooleanFalse):
        return style.false
    if isinstance(e, And | Or):
        level, glue = (_AND, style.conjunction) if isinstance(e, And) else (_OR, style.disjunction)
        # Comparisons always stand in parentheses: & binds tighter than <= in Python.
        return wrap(glue.join(sorted(f"({sub(term, _OR)})" for term in e.args)), level)
    if isinstance(e, Relational):
        return wrap(f"{sub(e.lhs, _ADD)} {e.rel_op} {sub(e.rhs, _ADD)}", _COMPARE)
    if e.is_Symbol:
        return (names or {}).get(e.name, e.name)
    if e.is_Integer:
        return wrap(str(int(e)), _ATOM if e >= 0 else _ADD)
    if e.is_Add:
        return wrap(_print_sum(e, sub), _ADD)
    if isinstance(e, Table):
        words = {word: (names or {}).get(word, word) for word in ("table", "table_len")}
        return style.lookup.format(index=sub(e.args[0], _OR), **words)
    if isinstance(e, Mod):
        value, divisor = e.args
        inner = sub(value, _MUL)
        if style.floors or value.is_nonnegative:
            return wrap(f"{sub(value, _ATOM)} % {divisor}", _MUL)
        return wrap(f"({inner} % {divisor} + {divisor}) % {divisor}", _MUL)
    if isinstance(e, sympy.floor):
        value, divisor = sympy.fraction(sympy.together(e.args[0]))
        if not divisor.is_Integer:
            raise SpecError(f"{e} cannot be printed")
        if style.floors or value.is_nonnegative:
            return wrap(f"{sub(value, _ATOM)}{style.divide}{divisor}", _MUL)
        # Rounded towards zero after subtracting the non-negative remainder: exact, so rounded down.
        remainder = sub(Mod(value, divisor), _ATOM)
        return wrap(f"({sub(value, _ADD)} - {remainder}){style.divide}{divisor}", _MUL)
    if isinstance(e, sympy.Min | sympy.Max):
        raise SpecError(f"{e} cannot be printed: combine limits in the template")
    if e.is_Mul:
        factors = sorted(e.args, key=lambda f: (not f.is_Integer, _order(f)))
        if factors[0] == -1:
            rest = sympy.Mul(*factors[1:])
            # A sign binds tighter than // and %, and -(a // b) is not -a // b.
            return wrap("-" + sub(rest, _MUL if rest.is_Mul else _ATOM), _ADD)
        return wrap(" * ".join(sub(factor, _ATOM) for factor in factors), _MUL)
    if e.is_Pow and e.exp.is_Integer and e.exp > 0:
        return wrap(" * ".join([sub(e.base, _ATOM)] * int(e.exp)), _MUL)
    raise SpecError(f"{e} cannot be printed")


def _order(term: sympy.Expr) -> tuple[int, str]:
    symbols = term.free_symbols
    return (min((_PRINT_ORDER.get(s, 99) for s in symbols), default=100), str(term))


def _print_sum(e: sympy.Expr, sub: Any) -> str:
    # Positive terms first, the constant last among each sign: "q_idx + k_len - q_len", "5 - q_idx".
    def key(term: sympy.Expr) -> tuple[bool, tuple[int, str]]:
        return (term.could_extract_minus_sign(), _order(term))

    first, *rest = sorted(e.args, key=key)
    text = sub(first, _ADD)
    for term in rest:
        negative = term.could_extract_minus_sign()
        text += f" - {sub(-term, _MUL)}" if negative else f" + {sub(term, _MUL)}"
    return text


# ------------------------------------------------------------------------------------------------------ evaluation


def evaluate(mask: Boolean | str, values: Mapping[str, Any]) -> Any:
    """The mask over ``values``: integers, symbolic integers or tensors that broadcast, by symbol name.

    Comparisons of lengths alone give what their operands give: a bool, or a symbolic bool. When ``k_idx`` is
    a tensor they are lifted to a tensor first, so that ``& | ~`` always meet tensors.
    """
    mask = parse_mask(mask) if isinstance(mask, str) else mask
    lift = values["k_idx"] * 0
    indices = {Q, K, HEAD, BATCH}

    integer = functools.partial(evaluate_integer, values=values)

    def boolean(e: Boolean) -> Any:
        if isinstance(e, BooleanTrue | BooleanFalse):
            return (lift == 0) if e == sympy.true else (lift != 0)
        if isinstance(e, And):
            return functools.reduce(lambda a, b: a & b, (boolean(term) for term in e.args))
        if isinstance(e, Or):
            return functools.reduce(lambda a, b: a | b, (boolean(term) for term in e.args))
        left, right = integer(e.lhs), integer(e.rhs)
        if not e.free_symbols & indices:
            left = left + lift
        match e.rel_op:
            case "<=":
                return left <= right
            case ">":
                return left > right
            case "==":
                return left == right
            case "!=":
                return left != right
            case other:
                raise SpecError(f"{other} is not canonical")

    return boolean(canonical(mask))


def evaluate_integer(e: sympy.Expr, values: Mapping[str, Any]) -> Any:
    """An integer expression of a mask over ``values``, as :func:`evaluate` takes them."""
    integer = functools.partial(evaluate_integer, values=values)
    if e.is_Symbol:
        return values[e.name]
    if e.is_Integer:
        return int(e)
    if e.is_Add or e.is_Mul:
        return functools.reduce(_add if e.is_Add else _mul, (integer(term) for term in e.args))
    if e.is_Pow:
        return functools.reduce(_mul, [integer(e.base)] * int(e.exp))
    if isinstance(e, Mod):
        return integer(e.args[0]) % int(e.args[1])
    if isinstance(e, Table):
        return _look_up(values.get("table"), integer(e.args[0]) + values["k_idx"] * 0)
    if isinstance(e, sympy.floor):
        value, divisor = sympy.fraction(sympy.together(e.args[0]))
        return integer(value) // int(divisor)
    raise SpecError(f"{e} cannot be evaluated")


def _look_up(table: Any, index: Any) -> Any:
    """Entries of a tensor or a sequence at a tensor of indices, or at one; indices are clamped."""
    if table is None:
        raise SpecError("the mask looks entries of a table up: give values['table']")
    if hasattr(index, "clamp"):
        return table[index.clamp(0, table.shape[0] - 1)]
    return table[min(max(index, 0), len(table) - 1)]


def _add(a: Any, b: Any) -> Any:
    return a + b


def _mul(a: Any, b: Any) -> Any:
    return a * b


# -------------------------------------------------------------------------------------------------------- builders


def causal(*, end_aligned: bool = False) -> str:
    """Keys up to the query's own position. ``end_aligned``: the last query stands at the last key (cached decoding);
    otherwise, and in SDPA's ``is_causal``, the first query stands at the first key."""
    return mask_text(f"k_idx <= {_position(end_aligned)}")


def sliding_window(size: int, *, end_aligned: bool = False) -> str:
    """The last ``size`` keys up to and with the query's own position, as Mistral's ``sliding_window``."""
    if not isinstance(size, int) or size < 1:
        raise SpecError(f"a window has at least 1 key, not {size}")
    position = _position(end_aligned)
    return mask_text(f"(k_idx <= {position}) & (k_idx > {position} - {size})")


def _position(end_aligned: bool) -> str:
    return "q_idx + k_len - q_len" if end_aligned else "q_idx"
