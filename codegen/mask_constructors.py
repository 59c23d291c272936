"""The masks that have a name, as expressions. tilewright.mask gives them to users, with pictures in docs/masks.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import sympy
from sympy.logic.boolalg import And, Boolean, Or

from .mask_terms import HEAD, K_LEN, MAX_LITERAL, Q_LEN, K, Mod, Q
from .spec import SpecError


def _size(name: str, value: int, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise SpecError(f"{name} is {value!r}, but must be an int of at least {least}")
    if value > MAX_LITERAL:
        raise SpecError(f"{name} is {value}, which does not fit 32 bits")
    return value


def causal() -> Boolean:
    """``k_idx <= q_idx``: keys up to the query's own position."""
    return sympy.Le(K, Q)


def window(left: int, right: int = 0) -> Boolean:
    """``q_idx - left < k_idx <= q_idx + right``: ``left`` keys up to and with the query's own position, and ``right``
    after it. ``window(256)`` is Mistral's sliding window of 256; ``window(129, 128)`` reaches 128 to both sides
    (Longformer, Beltagy et al., arXiv:2004.05150, section 3.1)."""
    _size("left", left)
    _size("right", right, 0)
    return And(sympy.Gt(K, Q - left), sympy.Le(K, Q + right))


def sinks(count: int) -> Boolean:
    """``k_idx < count``: the first keys (Xiao et al., "Efficient Streaming Language Models with Attention Sinks",
    arXiv:2309.17453, section 3.2)."""
    return sympy.Lt(K, _size("count", count))


def prefix(count: int) -> Boolean:
    """``(k_idx <= q_idx) | (k_idx < count)``: causal, but the first ``count`` positions all see each other (prefix
    language models: Raffel et al., arXiv:1910.10683, section 3.2.1)."""
    return Or(causal(), sympy.Lt(K, _size("count", count)))


def dilated(stride: int) -> Boolean:
    """``(q_idx - k_idx) % stride == 0``: every ``stride``-th key, counted from the query (strided attention: Child et
    al., arXiv:1904.10509, section 4.3; dilated windows: Longformer, section 3.1)."""
    return sympy.Eq(Mod(Q - K, _size("stride", stride)), 0)


def blocks(size: int) -> Boolean:
    """``k_idx // size == q_idx // size``: blocks on the diagonal (Qiu et al., "Blockwise Self-Attention",
    arXiv:1911.02972)."""
    _size("size", size)
    return sympy.Eq(sympy.floor(K / sympy.Integer(size)), sympy.floor(Q / sympy.Integer(size)))


def block_causal(size: int) -> Boolean:
    """``k_idx // size <= q_idx // size``: all of the own block and the blocks before it (Fast-dLLM v2, Wu et al.,
    arXiv:2509.26328)."""
    _size("size", size)
    return sympy.Le(sympy.floor(K / sympy.Integer(size)), sympy.floor(Q / sympy.Integer(size)))


def neighbourhood(height: int, width: int, halo: int, block: int = 1) -> Boolean:
    """Pixels of ``height`` x ``width`` images in rows, one image after the other: a query sees its own ``block`` x
    ``block`` pixels and ``halo`` more to every side, as far as its image goes.

    Blocked local attention with halos: HaloNet, Vaswani et al., arXiv:2103.12731, section 2.2. ``block=1`` centres a
    window of ``2 * halo + 1`` pixels on each query.
    """
    for name, value, least in (("height", height, 1), ("width", width, 1), ("halo", halo, 0), ("block", block, 1)):
        _size(name, value, least)
    if height % block or width % block:
        raise SpecError(f"block is {block}, but must divide height {height} and width {width}")
    image = sympy.Integer(_size("height * width", height * width))

    def near(key: sympy.Expr, first: sympy.Expr) -> Boolean:
        return And(sympy.Ge(key, first - halo), sympy.Lt(key, first + block + halo))

    return And(
        sympy.Eq(sympy.floor(K / image), sympy.floor(Q / image)),
        near(sympy.floor(K / sympy.Integer(width)), block * sympy.floor(Q / sympy.Integer(width * block))),
        near(Mod(K, width), block * sympy.floor(Mod(Q, width) / sympy.Integer(block))),
    )


def per_head(masks: Sequence[Boolean]) -> Boolean:
    """The mask of each query head; the last one holds for all further heads too."""
    if not masks:
        raise SpecError("per_head takes at least one mask")
    *first, last = masks
    conditions = [And(sympy.Eq(HEAD, index), mask) for index, mask in enumerate(first)]
    return Or(*conditions, And(sympy.Ge(HEAD, len(first)), last))


def at(mask: Boolean, offset: sympy.Expr | int) -> Boolean:
    """The mask for queries that start at position ``offset`` of the sequence the mask is about."""
    return mask.xreplace({Q: Q + offset})


def end_aligned(mask: Boolean) -> Boolean:
    """The mask for queries that are the last ``q_len`` of ``k_len`` positions (decoding with a cache)."""
    return at(mask, K_LEN - Q_LEN)


CONSTRUCTORS: dict[str, Callable[..., Boolean]] = {
    "causal": causal,
    "window": window,
    "sinks": sinks,
    "prefix": prefix,
    "dilated": dilated,
    "blocks": blocks,
    "block_causal": block_causal,
    "neighbourhood": neighbourhood,
}
