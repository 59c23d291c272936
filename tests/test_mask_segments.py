"""Segments, the loop limits of a mask's disjuncts, against the mask evaluated pair by pair."""

from __future__ import annotations

import pytest
import sympy
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mask_cases import limited, visible

import tilewright.runtime.ops  # noqa: F401
from tilewright.codegen import bounds, symbols
from tilewright.codegen.mask_logic import disjuncts, hides_everything, implies

CAUSAL = "(k_idx <= q_idx)"
WINDOW = "((k_idx <= q_idx) & (k_idx > q_idx - 5))"
SINKS = "(k_idx < 3)"


def ranges(limits, size, at):
    """(needed, full) ranges of a segment where the ends of the tile and the lengths are those of ``at``."""

    def values(expressions):
        return [int(sympy.sympify(e).subs(at)) for e in expressions]

    def holds(conditions):
        return all(bool(c.subs(at)) for c in conditions)

    needed = full = range(0)
    if holds(limits.needed_if):
        needed = range(max([0, *values(limits.needed_lower)]), min([size, *values(limits.needed_upper)]))
    if limits.has_full and holds(limits.full_if):
        full = range(max([0, *values(limits.full_lower)]), min([size, *values(limits.full_upper)]))
    return needed, full


def check_segments(text, index, q_len, k_len, tile, exact=False):
    """Needed ranges cover what is visible and full ranges are visible; exact: a needed tile of 1 sees all of it."""
    found = bounds.segments(text, index)
    assert len(found) <= bounds.MAX_SEGMENTS
    seen = visible(text, q_len, k_len, 2, 3)
    size, other_size = (k_len, q_len) if index is symbols.K else (q_len, k_len)
    for batch, head in ((0, 0), (1, 2)):
        pairs = seen[batch, head] if index is symbols.K else seen[batch, head].T
        for first in range(0, other_size, tile):
            last = min(first + tile, other_size) - 1
            at = {symbols.Q_LEN: q_len, symbols.K_LEN: k_len, symbols.BATCH: batch, symbols.HEAD: head}
            at |= {bounds.FIRST: first, bounds.LAST: last}
            parts = [ranges(limits, size, at) for limits in found]
            needed = {position for part, _ in parts for position in part}
            full = {position for _, part in parts for position in part}
            rows = pairs[first : last + 1]
            some = set(rows.any(0).nonzero().flatten().tolist())
            every = set(rows.all(0).nonzero().flatten().tolist())
            assert some <= needed, (text, found, first, last)
            assert full <= every, (text, found, first, last)
            if exact and first == last:
                assert needed == full == some, (text, found, first)


@given(limited, st.sampled_from([symbols.K, symbols.Q]), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4))
@example("(not (k_idx // 3 == 2 * q_idx + 1))", symbols.Q, 7, 9, 3)
@settings(max_examples=40)
def test_segments_enclose_what_is_visible(text, index, q_len, k_len, tile):
    check_segments(text, index, q_len, k_len, tile, exact=bounds.closed_form(text))


@pytest.mark.grid
@given(limited, st.sampled_from([symbols.K, symbols.Q]), st.integers(1, 12), st.integers(1, 12), st.integers(1, 5))
@settings(max_examples=3000)
def test_segments_of_many_masks(text, index, q_len, k_len, tile):
    check_segments(text, index, q_len, k_len, tile, exact=bounds.closed_form(text))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 1),
        (CAUSAL, 1),
        (WINDOW, 1),
        ("(k_idx > q_idx - 4) & (k_idx <= q_idx + 2)", 1),
        (f"{CAUSAL} & ({WINDOW} | {SINKS})", 2),
        (f"{CAUSAL} | {SINKS}", 2),
        ("k_idx // 4 == q_idx // 4", 1),
        ("k_idx // 4 <= q_idx // 4", 1),
        ("k_idx // 4 != q_idx // 4", 2),
        ("k_idx <= q_idx + k_len - q_len", 1),
        (f"(head == 0) & {WINDOW} | (head == 1) & {CAUSAL} | (head >= 2) & (k_idx > q_idx - 3)", 3),
        (f"{CAUSAL} & ({WINDOW} | {SINKS} | (k_idx // 8 == q_idx // 8) | (head == 1) & (q_idx >= 5))", 4),
    ],
)
def test_common_masks_are_closed_form_with_tight_limits(text, count):
    assert bounds.closed_form(text)
    for index in (symbols.K, symbols.Q):
        assert len(bounds.segments(text, index)) == count
        for tile in (1, 3):
            check_segments(text, index, 13, 11, tile, exact=True)


@pytest.mark.parametrize(
    "text",
    [
        "(q_idx - k_idx) % 4 == 0",  # no range of keys
        "k_idx * q_idx < 9",
        "(k_idx <= 2 * (q_idx % 4))",  # a range of keys for a query, but none of queries for a key
        " | ".join(f"(head == {h}) & (k_idx > q_idx - {h + 2})" for h in range(5)),  # too many
        "(k_idx > q_idx) & (k_idx < q_idx)",  # nothing at all
    ],
)
def test_other_masks_are_not_closed_form(text):
    assert not bounds.closed_form(text)


def test_hull_of_what_needs_too_many_segments():
    many = " | ".join(f"(k_idx // 2 == {5 * i})" for i in range(6))
    (hull,) = bounds.segments(f"{CAUSAL} & ({many})")
    assert hull == bounds.tile_bounds(f"{CAUSAL} & ({many})")
    assert hull.needed_upper == (bounds.LAST + 1,) and not hull.has_full
    assert bounds.segments("(k_idx > q_idx) & (k_idx < q_idx)") == ()


def test_disjuncts_leave_out_what_follows_from_others():
    assert disjuncts(f"{CAUSAL} & ({CAUSAL} | {SINKS})") == disjuncts(CAUSAL)
    assert disjuncts(f"{WINDOW} | {CAUSAL}") == disjuncts(CAUSAL)
    assert disjuncts(" & ".join(f"((k_idx % {n} == 0) | (q_idx % {n} == 0))" for n in range(2, 12))) is None


@pytest.mark.parametrize(
    ("mask", "other", "known"),
    [
        (WINDOW, CAUSAL, True),
        (CAUSAL, WINDOW, False),
        (WINDOW, f"{CAUSAL} & ({WINDOW} | {SINKS})", True),
        ("(k_idx <= q_idx) & (k_idx > q_idx - 5)", "(k_idx <= q_idx) & (k_idx > q_idx - 6)", True),
        ("(k_idx <= q_idx) & (k_idx > q_idx - 6)", "(k_idx <= q_idx) & (k_idx > q_idx - 5)", False),
        (CAUSAL, "k_idx // 64 <= q_idx // 64", True),
        ("k_idx // 64 <= q_idx // 64", CAUSAL, False),
        ("k_idx // 64 == q_idx // 64", "k_idx // 64 <= q_idx // 64", True),
        ("k_idx // 64 == q_idx // 64", "k_idx // 128 == q_idx // 128", True),
        ("2 * k_idx == 2 * q_idx + 1", "False", True),  # no integers
        ("k_idx == q_idx", "(q_idx - k_idx) % 4 == 0", True),
        ("(q_idx - k_idx) % 8 == 0", "(q_idx - k_idx) % 4 == 0", True),
        ("(q_idx - k_idx) % 4 == 0", "(q_idx - k_idx) % 8 == 0", False),
        ("k_idx * q_idx < 9", "k_idx * q_idx < 10", True),
        (SINKS, "", True),
        ("", "k_idx < k_len", True),
        ("", SINKS, False),
        ("(head == 1) & (k_idx <= q_idx)", "k_idx <= q_idx", True),
    ],
)
def test_implication(mask, other, known):
    assert implies(mask, other) is known


@given(limited, limited)
@settings(max_examples=40)
def test_implication_is_sound(text, other):
    left, right = (visible(t, 7, 9, 2, 3) for t in (text, other))
    if implies(text, other):
        assert bool((right | ~left).all())
    if hides_everything(text):
        assert not bool(left.any())


@pytest.mark.grid
@given(limited, limited)
@settings(max_examples=2000)
def test_implication_is_sound_for_many_masks(text, other):
    for q_len, k_len in ((7, 9), (12, 5)):
        left, right = (visible(t, q_len, k_len, 2, 3) for t in (text, other))
        if implies(text, other):
            assert bool((right | ~left).all())
        if implies(text, f"({text}) and ({other})"):
            assert bool((right | ~left).all())


@pytest.mark.parametrize("text", ["k_idx <= q_idx % 4", "k_idx // 3 == q_idx // 2", WINDOW, "k_idx <= 2 * q_idx - 5"])
def test_visible_keys_are_counted_from_limits(text):
    q, k = torch.empty(1, 1, 9, 1), torch.empty(1, 1, 11, 1)
    assert bounds.k_bounds(text).exact
    found = torch.ops.tilewright.visible_keys(q, k, mask=text)
    assert torch.equal(found, visible(text, 9, 11).sum(-1, keepdim=True))
