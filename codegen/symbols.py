"""Attention masks as symbolic expressions: which (query, key) pairs are visible.

A mask is a boolean expression over six integer symbols:

    q_idx, k_idx   position of the query (0 <= q_idx < q_len) and of the key (0 <= k_idx < k_len)
    q_len, k_len   numbers of queries and keys
    batch, head    index of the batch entry and of the query head

It travels as text (in graphs, specs, saved files), such as ``"(k_idx <= q_idx) & (k_idx > q_idx - 256)"``. Text is
parsed through a whitelist of syntax, never evaluated; :func:`mask_text` prints the canonical form, so that one mask
has one text. The empty text hides nothing. Grammar: comparisons (chains too), ``& | ~`` and ``and or not``,
``+ - *``, ``//`` and ``%`` by a positive literal (rounding down, as in Python), integer literals, parentheses.

codegen/bounds.py derives loop limits from masks.
"""

from __future__ import annotations

import ast
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import And, Boolean, BooleanFalse, BooleanTrue, Not, Or, to_nnf

from .spec import SpecError

Q = sympy.Symbol("q_idx", integer=True, nonnegative=True)
K = sympy.Symbol("k_idx", integer=True, nonnegative=True)
Q_LEN = sympy.Symbol("q_len", integer=True, nonnegative=True)
K_LEN = sympy.Symbol("k_len", integer=True, nonnegative=True)
BATCH = sympy.Symbol("batch", integer=True, nonnegative=True)
HEAD = sympy.Symbol("head", integer=True, nonnegative=True)
SYMBOLS = {symbol.name: symbol for symbol in (K, Q, HEAD, BATCH, K_LEN, Q_LEN)}
# The first of these in a comparison is what its canonical form isolates on the left.
_PRIORITY = tuple(SYMBOLS.values())
_PRINT_ORDER = {s: i for i, s in enumerate((Q, K, HEAD, BATCH, K_LEN, Q_LEN))}


class Mod(sympy.Function):
    """The remainder of rounding down by a positive literal. sympy's own takes 2 * (q % 3) for (2 * (q % 3)) % 3."""

    nargs = 2

    @classmethod
    def eval(cls, value: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr | None:
        return sympy.Integer(int(value) % int(divisor)) if value.is_Integer and divisor.is_Integer else None

    def _eval_is_integer(self) -> bool:
        return True

    def _eval_is_nonnegative(self) -> bool:
        return True


MAX_TEXT = 4096
MAX_DEPTH = 100
MAX_LITERAL = 2**31 - 1


class MaskError(SpecError):
    """A mask text that does not parse. ``column`` counts from 1."""

    def __init__(self, message: str, text: str, column: int) -> None:
        super().__init__(f"{message} (column {column} of {text!r})")
        self.column = column


# ---------------------------------------------------------------------------------------------------------- parsing


@functools.lru_cache(maxsize=512)
def parse_mask(text: str) -> Boolean:
    """The mask that ``text`` means, in canonical form; ``sympy.true`` for the empty text.

    Raises :class:`MaskError` naming the column of what the grammar does not allow.
    """
    if not isinstance(text, str):
        raise SpecError(f"a mask is a text, not {type(text).__name__}")
    if len(text) > MAX_TEXT:
        raise MaskError(f"a mask has at most {MAX_TEXT} characters", text[:40] + "...", MAX_TEXT + 1)
    if not text.strip():
        return sympy.true
    # A newline would shift the columns of what follows it, and leading blanks are an indent to ast.
    shifted = text.replace("\n", " ").replace("\t", " ")
    body = shifted.lstrip(" ")
    offset = len(shifted) - len(body)
    try:
        tree = ast.parse(body, mode="eval")
    except SyntaxError as error:
        column = max(error.offset or 1, 1) + offset
        raise MaskError(f"not an expression: {error.msg}", text, min(column, len(text))) from None
    except (ValueError, RecursionError, MemoryError) as error:  # a null byte; nesting beyond the parser's stack
        raise MaskError(f"not an expression: {error}", text, 1) from None
    return canonical(_Parser(text, offset).boolean(tree.body, 0))


class _Parser:
    def __init__(self, text: str, offset: int) -> None:
        self.text = text
        self.offset = offset

    def fail(self, node: ast.AST, message: str) -> MaskError:
        return MaskError(message, self.text, getattr(node, "col_offset", 0) + self.offset + 1)

    def boolean(self, node: ast.expr, depth: int) -> Boolean:
        if depth > MAX_DEPTH:
            raise self.fail(node, f"nested deeper than {MAX_DEPTH}")
        match node:
            case ast.BoolOp(op=op, values=values):
                combine = And if isinstance(op, ast.And) else Or
                return combine(*(self.boolean(value, depth + 1) for value in values))
            case ast.BinOp(op=ast.BitAnd(), left=left, right=right):
                return And(self.boolean(left, depth + 1), self.boolean(right, depth + 1))
            case ast.BinOp(op=ast.BitOr(), left=left, right=right):
                return Or(self.boolean(left, depth + 1), self.boolean(right, depth + 1))
            case ast.UnaryOp(op=ast.Invert() | ast.Not(), operand=operand):
                return Not(self.boolean(operand, depth + 1))
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                terms = [self.integer(term, depth + 1) for term in (left, *comparators)]
                return And(*(self.compare(node, op, *terms[i : i + 2]) for i, op in enumerate(ops)))
            case ast.Constant(value=bool(value)):
                return sympy.true if value else sympy.false
            case _:
                raise self.fail(node, "expected a condition such as k_idx <= q_idx")

    def compare(self, node: ast.expr, op: ast.cmpop, left: sympy.Expr, right: sympy.Expr) -> Boolean:
        relation = _COMPARISONS.get(type(op))
        if relation is None:
            raise self.fail(node, "only < <= > >= == != compare")
        return relation(left, right)

    def integer(self, node: ast.expr, depth: int) -> sympy.Expr:
        if depth > MAX_DEPTH:
            raise self.fail(node, f"nested deeper than {MAX_DEPTH}")
        match node:
            case ast.Constant(value=int(value)) if not isinstance(value, bool):
                if value > MAX_LITERAL:
                    raise self.fail(node, f"{value} does not fit 32 bits")
                return sympy.Integer(value)
            case ast.Name(id=name):
                if name not in SYMBOLS:
                    raise self.fail(node, f"unknown symbol {name!r}: there are {', '.join(SYMBOLS)}")
                return SYMBOLS[name]
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self.integer(operand, depth + 1)
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return self.integer(operand, depth + 1)
            case ast.BinOp(op=ast.Add(), left=left, right=right):
                return self.integer(left, depth + 1) + self.integer(right, depth + 1)
            case ast.BinOp(op=ast.Sub(), left=left, right=right):
                return self.integer(left, depth + 1) - self.integer(right, depth + 1)
            case ast.BinOp(op=ast.Mult(), left=left, right=right):
                return self.integer(left, depth + 1) * self.integer(right, depth + 1)
            case ast.BinOp(op=ast.FloorDiv(), left=left, right=right):
                return sympy.floor(self.integer(left, depth + 1) / self.divisor(right, depth))
            case ast.BinOp(op=ast.Mod(), left=left, right=right):
                return Mod(self.integer(left, depth + 1), self.divisor(right, depth))
            case ast.BinOp(op=ast.BitAnd() | ast.BitOr()):
                raise self.fail(node, "& and | combine conditions: put each comparison in parentheses")
            case _:
                raise self.fail(node, "expected an integer: a symbol, a literal, or + - * // % of such")

    def divisor(self, node: ast.expr, depth: int) -> sympy.Integer:
        value = self.integer(node, depth + 1)
        if not (value.is_Integer and value > 0):
            raise self.fail(node, "// and % take a positive literal on the right")
        return value


_COMPARISONS = {
    ast.Lt: sympy.Lt,
    ast.LtE: sympy.Le,
    ast.Gt: sympy.Gt,
    ast.GtE: sympy.Ge,
    ast.Eq: sympy.Eq,
    ast.NotEq: sympy.Ne,
}


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
        return min(_PRIORITY.index(symbol) for symbol in term.free_symbols), _print(term, 0, PYTHON)

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


PYTHON = _Style(" & ", " | ", "True", "False", True, " // ")
TRITON = _Style(" & ", " | ", "True", "False", False, " // ")
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
    """The expression in Triton, whose ``//`` and ``%`` round towards zero. ``names`` renames symbols."""
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

    def integer(e: sympy.Expr) -> Any:
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
        if isinstance(e, sympy.floor):
            value, divisor = sympy.fraction(sympy.together(e.args[0]))
            return integer(value) // int(divisor)
        raise SpecError(f"{e} cannot be evaluated")

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
