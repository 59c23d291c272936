"""What a mask says of whole tiles of pairs, without evaluating the pairs: interval analysis over tensors of tiles.

For every tile of queries ``[q0, q1]`` and keys ``[k0, k1]`` each integer expression of the mask becomes a range that
encloses its values (tensors of least and greatest, one entry a tile, broadcast), and each condition becomes two
booleans: whether it may hold for some pair and whether it surely holds for all. Time and memory are proportional to the
number of tiles; heads and batch entries are told apart only by masks that name them. Sizes may be symbolic.

Interval arithmetic: Moore, Kearfott, Cloud, "Introduction to Interval Analysis", chapter 5. Entries of tables over a
range of indices come from a sparse table of range minima and maxima (Bender and Farach-Colton, "The LCA Problem
Revisited", section 3), and how many entries of a rectangle satisfy a comparison from sums over prefixes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from sympy.core.relational import Relational
from sympy.logic.boolalg import And, Boolean, BooleanFalse, BooleanTrue, Or
from torch import Tensor

from ..codegen import bounds, symbols
from ..codegen.symbols import BATCH, HEAD, K_LEN, Q_LEN, K, Mod, Q, Table
from .errors import BadArgument

Range = tuple[Tensor, Tensor]
"""Least and greatest value, int64, broadcastable to (B, H, NQ, NK); the same tensor twice where they are equal."""
Truth = tuple[Tensor, Tensor]
"""Whether a condition may hold for some pair, and whether it surely holds for all; bool, broadcastable likewise."""


def tile_states(
    mask: Boolean | str,
    *,
    q_len: Any,
    k_len: Any,
    block_q: int,
    block_k: int,
    heads: Any = 1,
    batch: Any = 1,
    table: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """uint8 (Bl, Hl, NQ, NK): 0 where a tile has no visible pair, 2 where all its pairs are visible, 1 otherwise.

    Sound, not complete: a tile of 1 may turn out empty or full. Bl is ``batch`` if the mask names it, else 1; Hl is
    ``heads`` likewise. NQ = ceil(q_len / block_q), NK = ceil(k_len / block_k); tiles at the end are clipped to the
    lengths. Lengths, heads and batch are ints or symbolic ints; table is int32 (N,), N >= 1.
    """
    mask = symbols.parse_mask(mask) if isinstance(mask, str) else symbols.canonical(mask)
    if symbols.has_table(mask) and table is None:
        raise BadArgument("the mask looks entries of a table up: give it")
    nq, nk = (q_len + block_q - 1) // block_q, (k_len + block_k - 1) // block_k
    tiles = _Tiles.make(mask, q_len, k_len, nq, nk, block_q, block_k, heads, batch, table, device)
    maybe, surely = tiles.condition(mask)
    if not symbols.has_table(mask) and isinstance(mask, And | Or):
        needed, full = tiles.segments(mask)
        maybe, surely = maybe & needed, surely | full
    shape = (batch if BATCH in mask.free_symbols else 1, heads if HEAD in mask.free_symbols else 1, nq, nk)
    return (maybe.to(torch.uint8) + (maybe & surely).to(torch.uint8)).expand(shape).contiguous()


@dataclass
class _Tiles:
    symbols: dict[sympy.Symbol, Range]
    zero: Tensor
    """int64 (1, 1, 1, 1), which makes a tensor of whatever number is added to it."""
    spans: dict[sympy.Symbol, int]
    """Greatest minus least value of the indices, at most."""
    table: Tensor | None = None
    minima: dict[int, Range] = field(default_factory=dict)

    @classmethod
    def make(
        cls,
        mask: Boolean,
        q_len: Any,
        k_len: Any,
        nq: Any,
        nk: Any,
        block_q: int,
        block_k: int,
        heads: Any,
        batch: Any,
        table: Tensor | None,
        device: torch.device | str | None,
    ) -> _Tiles:
        zero = torch.zeros((1, 1, 1, 1), dtype=torch.int64, device=device)
        q_last, k_last = zero + (q_len - 1), zero + (k_len - 1)
        q0 = (torch.arange(nq, device=device) * block_q).view(1, 1, -1, 1)
        k0 = (torch.arange(nk, device=device) * block_k).view(1, 1, 1, -1)
        q1, k1 = torch.minimum(q0 + (block_q - 1), q_last), torch.minimum(k0 + (block_k - 1), k_last)
        ranges = {Q: (q0, q1), K: (k0, k1), bounds.FIRST: (q0, q0), bounds.LAST: (q1, q1)}
        numbers = {Q_LEN: zero + q_len, K_LEN: zero + k_len}
        if BATCH in mask.free_symbols:
            numbers[BATCH] = torch.arange(batch, device=device).view(-1, 1, 1, 1)
        if HEAD in mask.free_symbols:
            numbers[HEAD] = torch.arange(heads, device=device).view(1, -1, 1, 1)
        ranges |= {symbol: (number, number) for symbol, number in numbers.items()}
        if table is not None:
            table = table.to(device=device, dtype=torch.int32)
        return cls(ranges, zero, {Q: block_q - 1, K: block_k - 1}, table)

    # ------------------------------------------------------------------------------------------------- integers

    def integer(self, expression: sympy.Expr) -> Range:
        """The range of an integer expression: exact for those linear in the indices, an enclosure otherwise."""
        expression = sympy.expand(expression)
        least = greatest = self.zero
        same = True
        for term, coefficient in expression.as_coefficients_dict().items():
            low, high = self.term(term)
            same = same and low is high
            factor = int(coefficient)
            ends = (low * factor, high * factor) if factor >= 0 else (high * factor, low * factor)
            least = least + ends[0]
            greatest = least if same else greatest + ends[1]
        return least, greatest

    def term(self, e: sympy.Expr) -> Range:
        if e == 1:
            return self.zero + 1, self.zero + 1
        if e.is_Symbol:
            return self.symbols[e]
        if isinstance(e, sympy.floor):
            value, divisor = sympy.fraction(sympy.together(e.args[0]))
            low, high = self.integer(value)
            least = _floor_div(low, int(divisor))
            return (least, least) if low is high else (least, _floor_div(high, int(divisor)))
        if isinstance(e, Mod):
            low, high = self.integer(e.args[0])
            divisor = int(e.args[1])
            least = low % divisor
            if low is high:
                return least, least
            whole = _floor_div(low, divisor) == _floor_div(high, divisor)  # no multiple inside: the order is kept
            return torch.where(whole, least, 0), torch.where(whole, high % divisor, divisor - 1)
        if isinstance(e, Table):
            return self.entries(e.args[0])
        if e.is_Mul or e.is_Pow:
            factors = e.args if e.is_Mul else [e.base] * int(e.exp)
            found = self.integer(factors[0])
            for factor in factors[1:]:
                found = _product(found, self.integer(factor))
            return found
        raise BadArgument(f"{e} is no part of a mask")

    def span(self, expression: sympy.Expr) -> int | None:
        """The greatest minus the least value over a tile, at most; None when not known before the table is seen."""
        total = 0
        for term, coefficient in sympy.expand(expression).as_coefficients_dict().items():
            if not term.has(Q, K, Table) or (isinstance(term, Table) and not term.has(Q, K)):
                continue
            if term in self.spans:
                span: int | None = self.spans[term]
            elif isinstance(term, sympy.floor):
                value, divisor = sympy.fraction(sympy.together(term.args[0]))
                inner = self.span(value)
                span = None if inner is None else (inner + int(divisor) - 1) // int(divisor)
            elif isinstance(term, Mod):
                span = int(term.args[1]) - 1
            else:
                span = None
            if span is None:
                return None
            total += abs(int(coefficient)) * span
        return total

    # --------------------------------------------------------------------------------------------------- tables

    def entries(self, index: sympy.Expr) -> Range:
        """The range of the table's entries at the indices that ``index`` takes."""
        table, last = self._table()
        low, high = (end.clamp_min(0).minimum(last) for end in self.integer(index))
        if not index.has(Q, K):
            found = table[low].long()
            return found, found
        span, size = self.span(index), table.shape[0]
        if isinstance(size, int):
            span = size - 1 if span is None else min(span, size - 1)
        if span is None:  # neither is known when the graph is traced
            return table.min().long() + self.zero, table.max().long() + self.zero
        levels = (span + 1).bit_length()
        least, greatest = self._minima(levels)
        count = high - low + 1
        level = torch.zeros_like(count)
        for power in range(1, levels):
            level = level + (count >= (1 << power))
        start = level * size + low
        end = level * size + high - torch.bitwise_left_shift(torch.ones_like(level), level) + 1
        return torch.minimum(least[start], least[end]).long(), torch.maximum(greatest[start], greatest[end]).long()

    def _table(self) -> tuple[Tensor, Tensor]:
        assert self.table is not None
        return self.table, self.zero + (self.table.shape[0] - 1)

    def _minima(self, levels: int) -> Range:
        """Minima and maxima of ``2 ** level`` entries from each on, flat: (levels * N,)."""
        if levels not in self.minima:
            table, last = self._table()
            place = torch.arange(table.shape[0], device=table.device)

            def later(entries: Tensor, shift: int) -> Tensor:
                """The entries ``shift`` places on; the last one beyond the end."""
                if isinstance(size := entries.shape[0], int):
                    return torch.cat((entries[shift:], entries[-1:].expand(min(shift, size))))
                return entries[(place + shift).minimum(last.view(1))]

            least, greatest = [table], [table]
            for level in range(levels - 1):
                least.append(torch.minimum(least[-1], later(least[-1], 1 << level)))
                greatest.append(torch.maximum(greatest[-1], later(greatest[-1], 1 << level)))
            self.minima[levels] = torch.cat(least), torch.cat(greatest)
        return self.minima[levels]

    def compared_entries(self, holds: Tensor, index: sympy.Expr) -> Truth:
        """Whether ``holds`` (bool, one for each entry of the table) for some and for all of the entries at ``index``.

        The indices of a tile are a rectangle ``stride * a + b``: how many of its entries hold is the difference of four
        sums over prefixes.
        """
        base = self.zero
        ranges: dict[int, Range] = {}
        for term, coefficient in sympy.expand(index).as_coefficients_dict().items():
            first, last = self.term(term)
            factor = int(coefficient)
            if not term.has(Q, K):
                base = base + factor * first
                continue
            ends = (first, last) if factor > 0 else (-last, -first)
            known = ranges.get(abs(factor), (self.zero, self.zero))
            ranges[abs(factor)] = (known[0] + ends[0], known[1] + ends[1])
        nothing = (self.zero, self.zero)
        low, high = ranges.pop(1, nothing)
        stride, (a0, a1) = ranges.popitem() if len(ranges) == 1 else (0, nothing)
        for step, ends in ranges.items():  # several strides: all that lies between the ends
            low, high = low + step * ends[0], high + step * ends[1]
        low, high = low + base, high + base
        table, end = self._table()
        size = table.shape[0]
        sums = F.pad(holds.long().cumsum(0), (1, 0))
        if not stride:
            low, high = low.clamp_min(0).minimum(end), high.clamp_min(0).minimum(end)
            found = sums[high + 1] - sums[low]
            return found > 0, found == high - low + 1
        # strided[x] = sums[x] + sums[x - stride] + sums[x - 2 * stride] + ...
        strided = F.pad(sums, (0, (-(size + 1)) % stride)).view(-1, stride).cumsum(0).view(-1)
        inside = (stride * a0 + low >= 0) & (stride * a1 + high < size)

        def until(row: Tensor, column: Tensor) -> Tensor:
            place = stride * row + column
            return torch.where(place >= 0, strided[place.clamp_min(0).minimum(end + 1)], 0)

        found = until(a1, high + 1) - until(a0 - 1, high + 1) - until(a1, low) + until(a0 - 1, low)
        every = found == (a1 - a0 + 1) * (high - low + 1)
        # An index beyond the table's ends means another entry than the rectangle's: nothing is known then.
        return (found > 0) | ~inside, every & inside

    # ----------------------------------------------------------------------------------------------- conditions

    def condition(self, e: Boolean) -> Truth:
        if isinstance(e, BooleanTrue | BooleanFalse):
            constant = (self.zero == 0) if isinstance(e, BooleanTrue) else (self.zero != 0)
            return constant, constant
        if isinstance(e, And | Or):
            maybe, surely = self.condition(e.args[0])
            for term in e.args[1:]:
                other = self.condition(term)
                if isinstance(e, And):
                    maybe, surely = maybe & other[0], surely & other[1]
                else:
                    maybe, surely = maybe | other[0], surely | other[1]
            return maybe, surely
        return self.relation(e)

    def relation(self, e: Relational) -> Truth:
        difference = sympy.expand(e.lhs - e.rhs)
        terms = difference.as_coefficients_dict()
        if e.rel_op in ("==", "!=") and (residue := _residue(terms)) is not None:
            maybe, surely = self.congruent(*residue)
            return (maybe, surely) if e.rel_op == "==" else (~surely, ~maybe)
        looked_up = [term for term in terms if isinstance(term, Table)]
        if len(looked_up) == 1 and not (set(terms) - {looked_up[0], sympy.S.One}):
            entries = self._table()[0].long() * int(terms[looked_up[0]]) + int(terms.get(sympy.S.One, 0))
            return self.compared_entries(_compare(e.rel_op, entries, entries)[1], looked_up[0].args[0])
        return _compare(e.rel_op, *self.integer(difference))

    def congruent(self, value: sympy.Expr, divisor: int, remainder: sympy.Expr) -> Truth:
        """Whether ``value`` leaves ``remainder`` (the same for all pairs of a tile) when divided by ``divisor``."""
        low, high = self.integer(value)
        rest = self.integer(remainder)[0]
        possible = (rest >= 0) & (rest < divisor)
        maybe = possible & (_floor_div(high - rest, divisor) * divisor + rest >= low)
        return maybe, maybe & (low == high) if divisor > 1 else maybe

    def segments(self, mask: Boolean) -> Truth:
        """What the ranges of the mask's disjuncts say together: some range is needed; full ranges cover all keys."""
        k0, k1 = self.symbols[K]
        needed, covered = self.zero != 0, k0  # keys below ``covered`` are visible to all queries of the tile
        parts = []
        for part in bounds.segments(mask, K):
            low, high = self.limits(part.needed_lower, part.needed_upper)
            low, high = torch.maximum(low, k0), torch.minimum(high - 1, k1)
            needed = needed | ((low <= high) & self.all(part.needed_if))
            if part.full_lower is not None and part.full_upper is not None:
                parts.append((*self.limits(part.full_lower, part.full_upper), self.all(part.full_if)))
        for _ in parts:
            for low, high, holds in parts:
                covered = torch.where(holds & (low <= covered), torch.maximum(covered, high), covered)
        return needed, covered > k1

    def limits(self, lower: tuple[sympy.Expr, ...], upper: tuple[sympy.Expr, ...]) -> Range:
        low, high = self.zero, self.symbols[K_LEN][0]
        for e in lower:
            low = torch.maximum(low, self.integer(e)[0])
        for e in upper:
            high = torch.minimum(high, self.integer(e)[1])
        return low, high

    def all(self, conditions: tuple[Boolean, ...]) -> Tensor:
        return self.condition(And(*conditions))[1]


def _residue(terms: dict[sympy.Expr, sympy.Expr]) -> tuple[sympy.Expr, int, sympy.Expr] | None:
    """(value, divisor, remainder) when the sum of ``terms`` is 0 exactly where ``value % divisor == remainder``."""
    found = [(term, int(value)) for term, value in terms.items() if term.has(Q, K)]
    if not found or not all(isinstance(term, Mod) and abs(sign) == 1 for term, sign in found):
        return None
    rest = sympy.Add(*(value * term for term, value in terms.items() if not term.has(Q, K)))
    first, sign = found[0]
    value, divisor = first.args
    if len(found) == 1:
        return value, int(divisor), -sign * rest
    if len(found) == 2 and rest == 0 and found[1][1] == -sign and found[1][0].args[1] == divisor:
        return value - found[1][0].args[0], int(divisor), sympy.Integer(0)
    return None


def _compare(kind: str, low: Tensor, high: Tensor) -> Truth:
    """What is known of ``value kind 0`` for a value from low to high."""
    match kind:
        case "<=":
            return low <= 0, high <= 0
        case ">":
            return high > 0, low > 0
        case ">=":
            return high >= 0, low >= 0
        case "<":
            return low < 0, high < 0
    meets, equals = (low <= 0) & (high >= 0), (low == 0) & (high == 0)
    return (meets, equals) if kind == "==" else (~equals, ~meets)


def _product(a: Range, b: Range) -> Range:
    if a[0] is a[1] and b[0] is b[1]:
        found = a[0] * b[0]
        return found, found
    ends = [x * y for x in a for y in b]
    low, high = ends[0], ends[0]
    for end in ends[1:]:
        low, high = torch.minimum(low, end), torch.maximum(high, end)
    return low, high


def _floor_div(value: Tensor, divisor: int) -> Tensor:
    return torch.div(value, divisor, rounding_mode="floor")
