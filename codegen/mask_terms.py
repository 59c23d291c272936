"""What masks are made of: their symbols, and the integer functions that sympy lacks or has wrong."""

from __future__ import annotations

import sympy

from .spec import SpecError

Q = sympy.Symbol("q_idx", integer=True, nonnegative=True)
K = sympy.Symbol("k_idx", integer=True, nonnegative=True)
Q_LEN = sympy.Symbol("q_len", integer=True, nonnegative=True)
K_LEN = sympy.Symbol("k_len", integer=True, nonnegative=True)
BATCH = sympy.Symbol("batch", integer=True, nonnegative=True)
HEAD = sympy.Symbol("head", integer=True, nonnegative=True)
SYMBOLS = {symbol.name: symbol for symbol in (K, Q, HEAD, BATCH, K_LEN, Q_LEN)}

MAX_TEXT = 4096
MAX_DEPTH = 100
MAX_LITERAL = 2**31 - 1


class Mod(sympy.Function):
    """The remainder of rounding down by a positive literal. sympy's own takes 2 * (q % 3) for (2 * (q % 3)) % 3."""

    nargs = 2

    @classmethod
    def eval(cls, value: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr | None:
        if divisor == 1:
            return sympy.Integer(0)
        return sympy.Integer(int(value) % int(divisor)) if value.is_Integer and divisor.is_Integer else None

    def _eval_is_integer(self) -> bool:
        return True

    def _eval_is_nonnegative(self) -> bool:
        return True


class Table(sympy.Function):
    """The entry at an index of the flat int32 table that goes with the mask; the index is clamped to the table."""

    nargs = 1
    is_number = False  # table(5) is not known, and sympy must not try to compute it

    def _eval_is_integer(self) -> bool:
        return True


class MaskError(SpecError):
    """A mask text that does not parse. ``column`` counts from 1."""

    def __init__(self, message: str, text: str, column: int) -> None:
        super().__init__(f"{message} (column {column} of {text!r})")
        self.message = message
        self.column = column
