"""``tilewright.mask``: which (query, key) pairs attention sees, written in Python or as text.

    from tilewright import mask
    mask.causal() & (mask.window(256) | mask.sinks(4))
    mask.Mask.parse("causal & (window(256) | sinks(4))")     # the same

Masks are closed under ``&``, ``|`` and ``~``. They are symbolic (codegen/symbols.py): no constructor evaluates pairs,
and one mask serves every length. docs/masks.md shows each with its equation, its source and its picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import sympy
import torch
from sympy.logic.boolalg import And, Boolean, Not, Or
from torch import Tensor

from ..codegen import bounds, mask_constructors, mask_logic, symbols
from ..codegen.spec import SpecError
from ..codegen.symbols import BATCH, HEAD, K, Q, Table
from .errors import BadArgument
from .mask_tiles import tile_states

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_PAIRS = 2**28
"""``visible`` makes no tensor of more entries than this."""


@dataclass(frozen=True, eq=False, repr=False)
class Mask:
    """A mask: a condition over ``q_idx, k_idx, q_len, k_len, batch, head``, and the table it looks entries up in.

    expression: sympy boolean in canonical form. table: int32 (N,), or None when nothing is looked up. length, batch,
    heads: the number of positions, batch entries and query heads that tensors given to constructors speak of, at most;
    None: any number.
    """

    expression: Boolean
    table: Tensor | None = None
    length: int | None = None
    batch: int | None = None
    heads: int | None = None

    def __post_init__(self) -> None:
        if len(self.text) > symbols.MAX_TEXT:
            raise BadArgument(
                f"the mask's text has {len(self.text)} characters, more than {symbols.MAX_TEXT}: put what varies in a "
                "table (documents, segments, bitmap)"
            )

    @staticmethod
    def parse(text: str, table: Tensor | None = None) -> Mask:
        """The mask that ``text`` means; the empty text hides nothing.

        Raises :class:`~tilewright.codegen.symbols.MaskError`, a ValueError that names the column, for what the grammar
        does not allow, and BadArgument when the text looks entries of a table up and there is none.
        """
        return _with_table(symbols.parse_mask(text), table)

    @cached_property
    def text(self) -> str:
        """The canonical text, which :meth:`parse` reads back together with the table."""
        return symbols.mask_text(self.expression)

    def __and__(self, other: Mask) -> Mask:
        return _combine(And, [self, other]) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: Mask) -> Mask:
        return _combine(Or, [self, other]) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> Mask:
        return self._replace(Not(self.expression))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        return self.text == other.text and _same_table(self.table, other.table)

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        table = "" if self.table is None else f", table of {self.table.shape[0]} entries"
        return f"Mask({self.text!r}{table})"

    def __bool__(self) -> bool:
        raise BadArgument("a mask is no truth value: combine masks with & | ~, not with and, or, not")

    def _replace(self, expression: Boolean) -> Mask:
        return Mask(symbols.canonical(expression), self.table, self.length, self.batch, self.heads)

    def at(self, position: int) -> Mask:
        """The mask for queries that start at ``position``: query 0 is what was query ``position``."""
        if not isinstance(position, int) or isinstance(position, bool):
            raise BadArgument(f"a position is an int, not {position!r}")
        return self._replace(mask_constructors.at(self.expression, position))

    def end_aligned(self) -> Mask:
        """The mask for queries that are the last ``q_len`` of ``k_len`` positions, as in decoding with a cache."""
        return self._replace(mask_constructors.end_aligned(self.expression))

    @property
    def closed_form(self) -> bool:
        """Whether kernels loop over closed-form limits; if not they read lists of blocks."""
        return bounds.closed_form(self.expression)

    @property
    def hides_everything(self) -> bool:
        """Whether no pair can be visible. True only where it is proven."""
        return mask_logic.hides_everything(self.expression)

    def implies(self, other: Mask) -> bool:
        """Whether ``other`` shows every pair that this mask shows, for all sizes. True only where it is proven."""
        return (self & ~other).hides_everything

    def why_not(self, q_len: Any, k_len: Any, heads: Any, batch: Any) -> str | None:
        """Why the mask cannot serve attention of these sizes, or None. Symbolic sizes are taken to fit."""
        sizes = (
            ("positions", self.length, max((n for n in (q_len, k_len) if isinstance(n, int)), default=0)),
            ("heads", self.heads, heads),
            ("batch entries", self.batch, batch),
        )
        for name, most, size in sizes:
            if most is not None and isinstance(size, int) and size > most:
                return f"the mask was made for {most} {name}, and there are {size}"
        return None

    def visible(self, q_len: int, k_len: int, heads: int = 1, batch: int = 1) -> Tensor:
        """bool (batch, heads, q_len, k_len): the mask pair by pair. For small sizes: pictures and tests."""
        _sizes(q_len, k_len, heads, batch)
        if q_len * k_len * heads * batch > MOST_PAIRS:
            raise BadArgument(f"{q_len} x {k_len} pairs are too many to list one by one: states() tells of tiles")
        device = None if self.table is None else self.table.device
        values = {
            "q_idx": torch.arange(q_len, device=device)[:, None],
            "k_idx": torch.arange(k_len, device=device)[None, :],
            "q_len": q_len,
            "k_len": k_len,
            "batch": torch.arange(batch, device=device)[:, None, None, None],
            "head": torch.arange(heads, device=device)[None, :, None, None],
            "table": self.table,
        }
        return symbols.evaluate(self.expression, values).expand(batch, heads, q_len, k_len).contiguous()

    def states(
        self, q_len: int, k_len: int, block: int | tuple[int, int] = 128, heads: int = 1, batch: int = 1
    ) -> Tensor:
        """uint8 (Bl, Hl, NQ, NK): 0 where a tile is empty, 2 where it is full, 1 where it is partly visible.

        From interval analysis, in time proportional to the tiles: a few tiles of 1 may be empty or full. Bl is
        ``batch`` if the mask names it, else 1; Hl is ``heads`` likewise. block: queries and keys in a tile.
        """
        _sizes(q_len, k_len, heads, batch)
        block_q, block_k = _block(block)
        return tile_states(
            self.expression,
            q_len=q_len,
            k_len=k_len,
            block_q=block_q,
            block_k=block_k,
            heads=heads,
            batch=batch,
            table=self.table,
            device=None if self.table is None else self.table.device,
        )

    def density(
        self, q_len: int, k_len: int, block: int | tuple[int, int] = 128, heads: int = 1, batch: int = 1
    ) -> float:
        """The share of tiles that are not empty: what a kernel computes of all there is. 0 where there are no tiles."""
        states = self.states(q_len, k_len, block, heads, batch)
        return float((states > 0).double().mean()) if states.numel() else 0.0

    def show(
        self,
        q_len: int,
        k_len: int,
        block: int | tuple[int, int] | None = None,
        *,
        head: int = 0,
        batch: int = 0,
    ) -> Figure:
        """A picture of the mask: tiles coloured empty, full or partial, and the visible pairs of partial tiles.

        block: queries and keys in a tile; by default so that there are at most 32 in each direction. Returns a
        matplotlib figure (``.savefig(path)``), which a notebook displays.
        """
        from .mask_picture import draw

        _sizes(q_len, k_len, head + 1, batch + 1)
        if not q_len or not k_len:
            raise BadArgument("a picture needs at least one query and one key")
        block_q, block_k = (max(1, -(-max(q_len, k_len) // 32)),) * 2 if block is None else _block(block)
        return draw(self, q_len, k_len, block_q, block_k, head, batch)


# ----------------------------------------------------------------------------------------------------- constructors


def causal() -> Mask:
    """``k_idx <= q_idx``: keys up to the query's own position."""
    return _named(mask_constructors.causal)


def window(left: int, right: int = 0) -> Mask:
    """``q_idx - left < k_idx <= q_idx + right``: ``left`` keys up to and with the query's own position, and ``right``
    after it. ``window(256)`` is Mistral's sliding window of 256 (Jiang et al., arXiv:2310.06825, section 2);
    ``window(129, 128)`` reaches 128 to both sides (Longformer, Beltagy et al., arXiv:2004.05150, section 3.1)."""
    return _named(mask_constructors.window, left, right)


def sinks(count: int) -> Mask:
    """``k_idx < count``: the first keys (attention sinks: Xiao et al., arXiv:2309.17453, section 3)."""
    return _named(mask_constructors.sinks, count)


def prefix(count: int) -> Mask:
    """``(k_idx <= q_idx) | (k_idx < count)``: causal, but the first ``count`` positions all see each other (prefix
    language models: Raffel et al., arXiv:1910.10683, section 3.2.1)."""
    return _named(mask_constructors.prefix, count)


def dilated(stride: int) -> Mask:
    """``(q_idx - k_idx) % stride == 0``: every ``stride``-th key, counted from the query (Child et al.,
    arXiv:1904.10509, section 4.3; dilated windows: Longformer, section 3.1)."""
    return _named(mask_constructors.dilated, stride)


def blocks(size: int) -> Mask:
    """``k_idx // size == q_idx // size``: blocks on the diagonal (Qiu et al., arXiv:1911.02972)."""
    return _named(mask_constructors.blocks, size)


def block_causal(size: int) -> Mask:
    """``k_idx // size <= q_idx // size``: all of the own block and the blocks before it (block diffusion: Fast-dLLM v2,
    Wu et al., arXiv:2509.26328)."""
    return _named(mask_constructors.block_causal, size)


def neighbourhood(height: int, width: int, halo: int, block: int = 1) -> Mask:
    """Pixels of ``height`` x ``width`` images in rows, one image after the other: a query sees its own ``block`` x
    ``block`` pixels and ``halo`` more to every side, as far as its image goes (HaloNet, Vaswani et al.,
    arXiv:2103.12731, section 2). ``block=1`` centres a window of ``2 * halo + 1`` pixels on each query.

    ``block`` has to divide height and width.
    """
    return _named(mask_constructors.neighbourhood, height, width, halo, block)


def documents(ids: Tensor | Sequence[Any]) -> Mask:
    """``ids[q_idx] == ids[k_idx]``: packed sequences, of which each sees itself alone.

    ids: integers (L,), or (batch, L). Positions from L on see nothing and are seen by nobody.
    """
    entries = _integers("ids", ids, (1, 2))
    length, batch = entries.shape[-1], entries.shape[0] if entries.dim() == 2 else None
    row = length * BATCH if batch else sympy.Integer(0)
    expression = And(sympy.Eq(Table(row + Q), Table(row + K)), Q < length, K < length)
    return _checked(expression, entries.flatten(), length=length, batch=batch)


def segments(
    edges: Tensor | Iterable[tuple[int, int]],
    *,
    lengths: Sequence[int] | None = None,
    ids: Tensor | Sequence[Any] | None = None,
) -> Mask:
    """Which segment of a sequence sees which: ``edges[ids[q_idx], ids[k_idx]]``.

    edges: bool (S, S), True where the segment of the row sees that of the column; or pairs (row, column), besides
    which each segment sees itself. lengths: of the segments, one after the other; or ids: the segment of each position,
    integers (L,) or (batch, L) from 0 to S - 1. Positions beyond them see nothing. ``& causal()`` makes it causal.

    Sources that hand segments on to targets: Graph-KV, Wang et al., arXiv:2506.07334. Documents that see themselves and
    the instruction, and a query that sees all: BlockRank, Gupta et al., arXiv:2510.05396. One context and candidates
    that do not see each other: Uni-Encoder, Song et al., arXiv:2106.01263. Contexts read in parallel behind a shared
    prefix: APE, Yang et al., arXiv:2502.05431.
    """
    if (lengths is None) == (ids is None):
        raise BadArgument("segments are given by their lengths, or by the ids of all positions")
    if ids is None:
        sizes = _integers("lengths", list(lengths or ()), (1,))
        if int(sizes.min()) < 0:
            raise BadArgument(f"lengths are at least 0, not {int(sizes.min())}")
        entries = torch.repeat_interleave(torch.arange(len(sizes)), sizes.long())
        entries = _integers("lengths", entries, (1,))
        count = len(sizes)
    else:
        entries = _integers("ids", ids, (1, 2))
        count = int(entries.max()) + 1
    allowed = _edges(edges, count)
    if not bool(allowed.any()):
        raise BadArgument("there are no edges: the mask hides every pair")
    if int(entries.min()) < 0 or int(entries.max()) >= len(allowed):
        raise BadArgument(f"there are edges for {len(allowed)} segments, and ids go from {int(entries.min())} to "
                          f"{int(entries.max())}")  # fmt: skip
    length, batch = entries.shape[-1], entries.shape[0] if entries.dim() == 2 else None
    row = length * BATCH if batch else sympy.Integer(0)
    pair = len(allowed) * Table(row + Q) + Table(row + K) + entries.numel()
    expression = And(Table(pair) > 0, Q < length, K < length)
    table = torch.cat([entries.flatten(), allowed.flatten().to(torch.int32)])
    return _checked(expression, table, length=length, batch=batch)


def bitmap(shown: Tensor, block: int | tuple[int, int]) -> Mask:
    """An explicit choice of blocks: bool (NQ, NK), (heads, NQ, NK) or (batch, heads, NQ, NK), True where visible.

    block: queries and keys in a block. Positions beyond the last block see nothing and are seen by nobody.
    """
    if not isinstance(shown, Tensor) or shown.dtype != torch.bool or shown.dim() not in (2, 3, 4):
        raise BadArgument("a bitmap is a bool tensor (NQ, NK), (heads, NQ, NK) or (batch, heads, NQ, NK)")
    if not shown.numel() or not bool(shown.any()):
        raise BadArgument("the bitmap hides every block")
    block_q, block_k = _block(block)
    batch, heads, nq, nk = (1,) * (4 - shown.dim()) + tuple(shown.shape)
    place = nk * sympy.floor(Q / sympy.Integer(block_q)) + sympy.floor(K / sympy.Integer(block_k))
    place += (nq * nk * HEAD if heads > 1 else 0) + (heads * nq * nk * BATCH if batch > 1 else 0)
    expression = And(Table(place) > 0, nq * block_q > Q, nk * block_k > K)
    table = shown.detach().to(torch.int32).flatten()
    length = max(nq * block_q, nk * block_k)
    return _checked(expression, table, length, batch if batch > 1 else None, heads if heads > 1 else None)


def per_head(masks: Sequence[Mask]) -> Mask:
    """The mask of each query head, in turn; the last one holds for all further heads too."""
    if not masks or not all(isinstance(mask, Mask) for mask in masks):
        raise BadArgument("per_head takes a list of at least one mask")
    return _combine(lambda *parts: mask_constructors.per_head(parts), masks)


def expression(condition: Boolean | str, table: Tensor | None = None) -> Mask:
    """The mask of a condition: a sympy boolean over symbols named as the mask's, or text.

    table: integers (N,), what ``table(index)`` looks up (in sympy: ``tilewright.codegen.symbols.Table``); an index
    beyond its ends means its first or last entry, as long as the mask is not combined with another that has a table.

    Raises BadArgument for what is not a boolean, names unknown symbols or hides every pair, and MaskError for text that
    does not parse.
    """
    if isinstance(condition, str):
        return _checked(symbols.parse_mask(condition), table)
    if not isinstance(condition, Boolean) or isinstance(condition, sympy.Symbol):
        raise BadArgument(f"a mask is a condition (a sympy boolean or text), not {condition!r}")
    names = {symbol: symbols.SYMBOLS.get(str(symbol)) for symbol in condition.free_symbols}
    if unknown := sorted(str(symbol) for symbol, known in names.items() if known is None):
        raise BadArgument(f"unknown symbol {unknown[0]!r}: there are {', '.join(symbols.SYMBOLS)}")
    try:
        return _checked(symbols.parse_mask(symbols.mask_text(condition.xreplace(names))), table)
    except SpecError as error:
        raise BadArgument(f"{condition} is not a mask: {error}") from error


# ---------------------------------------------------------------------------------------------------------- helpers


def _named(build: Callable[..., Boolean], *arguments: int) -> Mask:
    try:
        return Mask(symbols.canonical(build(*arguments)))
    except SpecError as error:
        raise BadArgument(str(error)) from error


def _with_table(
    condition: Boolean,
    table: Tensor | None,
    length: int | None = None,
    batch: int | None = None,
    heads: int | None = None,
) -> Mask:
    condition = symbols.canonical(condition)
    if not symbols.has_table(condition):
        return Mask(condition, None, length, batch, heads)
    if table is None:
        raise BadArgument("the mask looks entries of a table up: give the table")
    return Mask(condition, _integers("table", table, (1,)), length, batch, heads)


def _checked(
    condition: Boolean,
    table: Tensor | None,
    length: int | None = None,
    batch: int | None = None,
    heads: int | None = None,
) -> Mask:
    mask = _with_table(condition, table, length, batch, heads)
    if mask.hides_everything:
        raise BadArgument(f"the mask {mask.text!r} hides every pair")
    return mask


def _combine(build: Callable[..., Boolean], masks: Sequence[Mask]) -> Mask:
    """``build`` of the masks' conditions. Their tables follow each other; one that begins or ends another is shared."""
    placed: list[tuple[Tensor, int]] = []
    end = 0
    for table in sorted((m.table for m in masks if m.table is not None), key=len, reverse=True):
        if _place(table, placed) is None:
            placed.append((table, end))
            end += len(table)
    conditions = []
    for mask in masks:
        start = None if mask.table is None else _place(mask.table, placed)
        conditions.append(_moved(mask.expression, start) if start else mask.expression)

    def least(values: Iterable[int | None]) -> int | None:
        return min((value for value in values if value is not None), default=None)

    return Mask(
        symbols.canonical(build(*conditions)),
        torch.cat([table.to(placed[0][0].device) for table, _ in placed]) if placed else None,
        least(mask.length for mask in masks),
        least(mask.batch for mask in masks),
        least(mask.heads for mask in masks),
    )


def _place(table: Tensor, placed: Sequence[tuple[Tensor, int]]) -> int | None:
    for known, start in placed:
        if len(known) >= len(table):
            if _same_table(known[: len(table)], table):
                return start
            if _same_table(known[len(known) - len(table) :], table):
                return start + len(known) - len(table)
    return None


def _moved(condition: Boolean, offset: int) -> Boolean:
    return condition.replace(Table, lambda index: Table(index + offset))


def _same_table(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or (a.device == b.device and torch.equal(a, b))


def _integers(name: str, values: Tensor | Sequence[Any], dims: tuple[int, ...]) -> Tensor:
    """``values`` as an int32 tensor of at least one entry."""
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadArgument(f"{name} must be integers: {error}") from error
    if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
        raise BadArgument(f"{name} must be integers, not {tensor.dtype}")
    if tensor.dim() not in dims or not tensor.numel():
        shape = " or ".join("(L,)" if dim == 1 else "(batch, L)" for dim in dims)
        raise BadArgument(f"{name} must be {shape} with at least one entry, not {tuple(tensor.shape)}")
    if int(tensor.min()) < -(2**31) or int(tensor.max()) >= 2**31:
        raise BadArgument(f"{name} must fit 32 bits")
    return tensor.detach().to(torch.int32).contiguous()


def _edges(edges: Tensor | Iterable[tuple[int, int]], count: int) -> Tensor:
    if isinstance(edges, Tensor):
        if edges.dtype != torch.bool or edges.dim() != 2 or edges.shape[0] != edges.shape[1]:
            raise BadArgument(f"edges are a bool tensor (S, S) or pairs, not {edges.dtype} {tuple(edges.shape)}")
        if edges.shape[0] < count:
            raise BadArgument(f"there are edges for {edges.shape[0]} segments, and {count} segments")
        return edges.cpu()
    allowed = torch.eye(count, dtype=torch.bool)
    for pair in edges:
        if len(pair) != 2 or not all(isinstance(n, int) and 0 <= n < count for n in pair):
            raise BadArgument(f"an edge is a pair of segments from 0 to {count - 1}, not {pair!r}")
        allowed[pair[0], pair[1]] = True
    return allowed


def _block(block: int | tuple[int, int]) -> tuple[int, int]:
    sizes = (block, block) if isinstance(block, int) else tuple(block)
    if len(sizes) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in sizes):
        raise BadArgument(f"block is {block!r}, but must be a positive int or a pair of them")
    return sizes[0], sizes[1]


def _sizes(q_len: int, k_len: int, heads: int, batch: int) -> None:
    for name, value in (("q_len", q_len), ("k_len", k_len), ("heads", heads), ("batch", batch)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise BadArgument(f"{name} is {value!r}, but must be an int of at least 0")
