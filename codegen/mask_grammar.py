"""Reading masks: text through a whitelist of syntax, never evaluated. The grammar stands in codegen/symbols.py."""

from __future__ import annotations

import ast
import inspect

import sympy
from sympy.logic.boolalg import And, Boolean, Not, Or

from . import mask_constructors
from .mask_constructors import CONSTRUCTORS
from .mask_terms import MAX_DEPTH, MAX_LITERAL, MAX_TEXT, SYMBOLS, MaskError, Mod, Table
from .spec import SpecError


def read_mask(text: str) -> Boolean:
    """The mask that ``text`` means, as written; ``sympy.true`` for the empty text.

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
    return _Parser(text, offset).boolean(tree.body, 0)


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
            case ast.Name(id=name) if name not in SYMBOLS:
                return self.constructor(node, name, [], [], depth)
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if name != "table":
                return self.constructor(node, name, args, keywords, depth)
            case _:
                raise self.fail(node, "expected a condition such as k_idx <= q_idx")

    def compare(self, node: ast.expr, op: ast.cmpop, left: sympy.Expr, right: sympy.Expr) -> Boolean:
        relation = _COMPARISONS.get(type(op))
        if relation is None:
            raise self.fail(node, "only < <= > >= == != compare")
        return relation(left, right)

    def constructor(
        self, node: ast.expr, name: str, args: list[ast.expr], keywords: list[ast.keyword], depth: int
    ) -> Boolean:
        """The mask of a name such as ``window(256)``."""
        if name in ("per_head", "end_aligned"):
            if keywords or not args or (name == "end_aligned" and len(args) > 1):
                raise self.fail(node, f"{name} takes {'masks' if name == 'per_head' else 'one mask'}")
            masks = [self.boolean(arg, depth + 1) for arg in args]
            return mask_constructors.per_head(masks) if name == "per_head" else mask_constructors.end_aligned(masks[0])
        if name in ("documents", "segments", "bitmap"):
            raise self.fail(node, f"{name} comes with a tensor: build it with tilewright.mask.{name}")
        if name not in CONSTRUCTORS:
            names = ", ".join((*CONSTRUCTORS, "per_head", "end_aligned"))
            raise self.fail(node, f"unknown mask {name!r}: there are {names}, and comparisons such as k_idx <= q_idx")
        build = CONSTRUCTORS[name]
        signature = inspect.signature(build)
        for starred in [arg for arg in args if isinstance(arg, ast.Starred)] + [k for k in keywords if k.arg is None]:
            raise self.fail(starred, "* and ** cannot be read")
        given = [self.literal(arg) for arg in args]
        named = {str(keyword.arg): self.literal(keyword.value) for keyword in keywords}
        try:
            signature.bind(*given, **named)
        except TypeError:
            expected = ", ".join(
                str(p).split(":")[0] + (f"={p.default}" if p.default is not p.empty else "")
                for p in signature.parameters.values()
            )
            raise self.fail(node, f"wrong arguments: it is {name}({expected})") from None
        try:
            return build(*given, **named)
        except SpecError as error:
            raise self.fail(node, str(error)) from None

    def literal(self, node: ast.expr) -> int:
        try:
            value = ast.literal_eval(node)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.fail(node, "expected an integer literal")
        if abs(value) > MAX_LITERAL:
            raise self.fail(node, f"{value} does not fit 32 bits")
        return value

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
            case ast.Call(func=ast.Name(id="table"), args=[index], keywords=[]):
                return Table(self.integer(index, depth + 1))
            case ast.Call(func=ast.Name(id="table")):
                raise self.fail(node, "table takes one index")
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
