"""Masks drawn at random, and their pairs one by one: what every analysis of masks is compared with."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from hypothesis import strategies as st

from tilewright.codegen import symbols

NAMES = ("q_idx", "k_idx", "q_len", "k_len", "batch", "head")

TABLE = (3, 0, 0, 1, 1, 1, 7, -2, 4, 4, 12)
"""The table of the masks drawn here."""


def table(index: int) -> int:
    """An entry of the table, as the text form of a mask names it."""
    return TABLE[min(max(int(index), 0), len(TABLE) - 1)]


integers = st.recursive(
    st.sampled_from(["q_idx", "k_idx", "q_idx", "k_idx", "q_len", "k_len", "head", "batch"])
    | st.integers(0, 9).map(str),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-"]), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        st.tuples(inner, st.integers(-3, 3)).map(
            lambda t: f"({t[0]} * {t[1]})" if t[1] >= 0 else f"(-{t[0]} * {-t[1]})"
        ),
        st.tuples(inner, st.sampled_from(["//", "%"]), st.integers(1, 7)).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        inner.map(lambda text: f"table({text})"),
    ),
    max_leaves=4,
)
COMPARISONS = ["<", "<=", ">", ">=", "==", "!="]
comparisons = st.tuples(integers, st.sampled_from(COMPARISONS), integers).map(lambda t: f"({t[0]} {t[1]} {t[2]})")

# What loop limits can be solved from: straight lines, rising and falling, blocks, and conditions of one index or head.
lines = st.tuples(
    st.sampled_from(["k_idx", "2 * k_idx", "-k_idx", "k_idx // 3"]),
    st.sampled_from(["<=", ">", "=="]),
    st.integers(-2, 2),
    st.sampled_from(["q_idx", "q_idx // 2", "(q_idx % 3)"]),
    st.integers(-4, 8),
).map(lambda t: f"({t[0]} {t[1]} {t[2]} * {t[3]} + {t[4]})")
conditions = st.tuples(
    st.sampled_from(["q_idx", "q_idx // 2", "q_idx % 3", "k_idx", "head", "batch", "k_len - q_len"]),
    st.sampled_from(COMPARISONS),
    st.integers(0, 6),
).map(lambda t: f"({t[0]} {t[1]} {t[2]})")


def combined(terms: st.SearchStrategy[str], most: int) -> st.SearchStrategy[str]:
    """Terms under ``and``, ``or`` and ``not``."""
    return st.recursive(
        terms,
        lambda inner: st.one_of(
            st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
            inner.map(lambda text: f"(not {text})"),
        ),
        max_leaves=most,
    )


masks = combined(comparisons, 3)
limited = combined(st.one_of(lines, lines, conditions, comparisons), 6)


def pairs(q_len: int, k_len: int, batches=(0, 1), heads=(0, 2)) -> Iterator[dict[str, int]]:
    for batch, head in itertools.product(batches, heads):
        for q_idx, k_idx in itertools.product(range(q_len), range(k_len)):
            yield dict(zip(NAMES, (q_idx, k_idx, q_len, k_len, batch, head), strict=True))


def visible(text: str, q_len: int, k_len: int, batch: int = 1, heads: int = 1, entries=TABLE) -> torch.Tensor:
    """(batch, heads, q_len, k_len) bool: the mask evaluated for every pair."""
    values = {
        "q_idx": torch.arange(q_len)[:, None],
        "k_idx": torch.arange(k_len)[None, :],
        "q_len": q_len,
        "k_len": k_len,
        "batch": torch.arange(batch)[:, None, None, None],
        "head": torch.arange(heads)[None, :, None, None],
        "table": torch.as_tensor(entries, dtype=torch.int32),
    }
    return symbols.evaluate(text, values).expand(batch, heads, q_len, k_len)
