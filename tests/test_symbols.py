"""Masks as text and as expressions, and the loop bounds derived from them, against evaluation pair by pair."""

from __future__ import annotations

import itertools

import pytest
import sympy
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tilewright.codegen import bounds, symbols
from tilewright.codegen.spec import SpecError
from tilewright.codegen.symbols import MaskError, mask_text, parse_mask

NAMES = ("q_idx", "k_idx", "q_len", "k_len", "batch", "head")


class TruncatingInt(int):
    """An int whose ``//`` and ``%`` round towards zero, as in C++ and Triton."""

    def __add__(self, other):
        return TruncatingInt(int(self) + int(other))

    def __sub__(self, other):
        return TruncatingInt(int(self) - int(other))

    def __mul__(self, other):
        return TruncatingInt(int(self) * int(other))

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other):
        return TruncatingInt(int(other) - int(self))

    def __neg__(self):
        return TruncatingInt(-int(self))

    def __floordiv__(self, other):
        magnitude = abs(int(self)) // abs(int(other))
        return TruncatingInt(magnitude if (int(self) < 0) == (int(other) < 0) else -magnitude)

    def __mod__(self, other):
        return self - (self // other) * other


def pairs(q_len, k_len, batches=(0, 1), heads=(0, 2)):
    for batch, head in itertools.product(batches, heads):
        for q_idx, k_idx in itertools.product(range(q_len), range(k_len)):
            yield dict(zip(NAMES, (q_idx, k_idx, q_len, k_len, batch, head), strict=True))


integers = st.recursive(
    st.sampled_from(["q_idx", "k_idx", "q_idx", "k_idx", "q_len", "k_len", "head", "batch"])
    | st.integers(0, 9).map(str),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-"]), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        st.tuples(inner, st.integers(-3, 3)).map(
            lambda t: f"({t[0]} * {t[1]})" if t[1] >= 0 else f"(-{t[0]} * {-t[1]})"
        ),
        st.tuples(inner, st.sampled_from(["//", "%"]), st.integers(1, 7)).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
    ),
    max_leaves=4,
)
comparisons = st.tuples(integers, st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), integers).map(
    lambda t: f"({t[0]} {t[1]} {t[2]})"
)
masks = st.recursive(
    comparisons,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        inner.map(lambda text: f"(not {text})"),
    ),
    max_leaves=3,
)


@given(masks, st.integers(1, 6), st.integers(1, 6))
@example("(0 - q_idx) < (q_idx // 2)", 4, 1)
@example("q_idx < (q_idx % 3) * 2 % 3", 3, 1)
@example("k_idx <= 0 - q_idx % 3 * (k_idx // 2)", 6, 6)
@settings(max_examples=120)
def test_every_printed_form_means_what_was_written(text, q_len, k_len):
    mask = parse_mask(text)
    printed = mask_text(mask)
    assert mask_text(printed) == printed
    python = compile(printed or "True", "mask", "eval")
    source = compile(text, "mask", "eval")
    triton = compile(symbols.triton_text(mask), "mask", "eval")
    cpp = symbols.cpp_text(mask).replace("&&", "and").replace("||", "or").replace(" / ", " // ")
    cpp = compile(cpp.replace("true", "True").replace("false", "False"), "mask", "eval")
    for values in pairs(q_len, k_len):
        expected = bool(eval(source, {}, dict(values)))
        truncating = {name: TruncatingInt(value) for name, value in values.items()}
        assert bool(eval(python, {}, dict(values))) == expected, (text, printed, values)
        assert bool(eval(triton, {}, dict(truncating))) == expected, (text, symbols.triton_text(mask), values)
        assert bool(eval(cpp, {}, dict(truncating))) == expected, (text, symbols.cpp_text(mask), values)


@given(masks)
@settings(max_examples=60)
def test_evaluate_on_tensors(text):
    q_len, k_len = 5, 7
    values = {
        "q_idx": torch.arange(q_len)[:, None],
        "k_idx": torch.arange(k_len)[None, :],
        "q_len": q_len,
        "k_len": k_len,
        "batch": torch.arange(2)[:, None, None, None],
        "head": torch.arange(3)[None, :, None, None],
    }
    found = symbols.evaluate(text, values).expand(2, 3, q_len, k_len)
    source = compile(text, "mask", "eval")
    for pair in pairs(q_len, k_len):
        expected = bool(eval(source, {}, dict(pair)))
        assert found[pair["batch"], pair["head"], pair["q_idx"], pair["k_idx"]].item() == expected, (text, pair)


@pytest.mark.parametrize(
    "spellings",
    [
        ("k_idx <= q_idx", "q_idx >= k_idx", "k_idx < q_idx + 1", "~(k_idx > q_idx)", "2 * k_idx <= 2 * q_idx + 1"),
        ("(k_idx <= q_idx) & (k_idx > q_idx - 256)", "q_idx - 256 < k_idx <= q_idx"),
        ("k_idx // 64 == q_idx // 64", "q_idx // 64 == k_idx // 64"),
        ("k_idx <= 3", "k_idx < 4", "4 > k_idx", "not k_idx >= 4"),
        ("k_idx <= q_idx + k_len - q_len", "k_idx - k_len <= q_idx - q_len"),
        ("", "  ", "k_idx < k_len", "q_idx <= q_len - 1", "k_idx >= 0", "True"),
    ],
)
def test_one_mask_has_one_text(spellings):
    assert {mask_text(spelling) for spelling in spellings} == {spellings[0]}


@pytest.mark.parametrize(
    ("text", "column", "says"),
    [
        ("k_idx <= foo", 10, "unknown symbol 'foo'"),
        ("k_idx <= q_idx & k_idx > 3", 10, "parentheses"),
        ("k_idx // q_idx == 0", 10, "positive literal"),
        ("k_idx % 0 == 1", 9, "positive literal"),
        ("k_idx", 1, "expected a condition"),
        ("(k_idx <= q_idx) & q_idx", 20, "expected a condition"),
        ("f(k_idx) < 3", 1, "expected an integer"),
        ("k_idx.real < 3", 1, "expected an integer"),
        ("k_idx ** 2 < 3", 1, "expected an integer"),
        ("k_idx < 3.5", 9, "expected an integer"),
        ("k_idx < 4294967296", 9, "32 bits"),
        ("k_idx in q_idx", 1, "compare"),
        ("__import__('os').system('true') == 0", 1, "expected an integer"),
        ("(k_idx < 1", 1, "not an expression"),
        ("  k_idx < z", 11, "unknown symbol 'z'"),
        ("k_idx <\nz", 9, "unknown symbol 'z'"),
        ("k_idx < " + "(" * 300 + "1" + ")" * 300, None, "not an expression"),
        ("k_idx < " + "-" * 200 + "1", None, "nested deeper"),
    ],
)
def test_errors_name_the_column(text, column, says):
    with pytest.raises(MaskError, match=says) as caught:
        parse_mask(text)
    assert f"column {caught.value.column}" in str(caught.value)
    assert column is None or caught.value.column == column


def test_expressions_built_elsewhere_are_printed():
    mask = sympy.Eq(sympy.Mod(symbols.Q - symbols.K, 4), 0) & ~(symbols.K > symbols.Q)
    assert mask_text(mask) == "((q_idx - k_idx) % 4 == 0) & (k_idx <= q_idx)"
    with pytest.raises(SpecError, match="cannot be printed"):
        mask_text(symbols.K <= symbols.Q / 2)


def test_text_length_is_limited():
    with pytest.raises(MaskError, match="characters"):
        parse_mask("k_idx < 1 " + " " * symbols.MAX_TEXT)


def test_builders():
    assert symbols.causal() == "k_idx <= q_idx"
    assert symbols.causal(end_aligned=True) == "k_idx <= q_idx + k_len - q_len"
    assert symbols.sliding_window(256) == "(k_idx <= q_idx) & (k_idx > q_idx - 256)"
    aligned = symbols.sliding_window(4, end_aligned=True)
    for values in pairs(3, 9):
        position = values["q_idx"] + values["k_len"] - values["q_len"]
        assert eval(aligned, {}, dict(values)) == (position - 4 < values["k_idx"] <= position)
    with pytest.raises(SpecError, match="at least 1 key"):
        symbols.sliding_window(0)


def test_bounds_of_the_common_masks():
    causal = bounds.k_bounds("k_idx <= q_idx")
    assert (causal.lower, causal.upper, causal.exact) == ((), (symbols.Q + 1,), True)
    window = bounds.k_bounds("(k_idx <= q_idx) & (k_idx > q_idx - 256)")
    assert (window.lower, window.upper, window.exact) == ((symbols.Q - 255,), (symbols.Q + 1,), True)
    assert not bounds.k_bounds("(k_idx <= q_idx) | (k_idx <= 3)").exact
    assert not bounds.k_bounds("k_idx != 3").exact
    assert bounds.bounds("k_idx <= q_idx", symbols.Q).lower == (symbols.K,)


# Conjunctions of what bounds can solve (straight lines, rising and falling, and blocks) and of what it may not.
lines = st.tuples(
    st.sampled_from(["k_idx", "2 * k_idx", "-k_idx", "k_idx // 3"]),
    st.sampled_from(["<=", ">", "=="]),
    st.integers(-2, 2),
    st.sampled_from(["q_idx", "q_idx // 2", "(q_idx % 3)"]),
    st.integers(-4, 8),
).map(lambda t: f"({t[0]} {t[1]} {t[2]} * {t[3]} + {t[4]})")
solvable = st.lists(st.one_of(lines, lines, comparisons), min_size=1, max_size=3).map(" & ".join)


@given(solvable, st.sampled_from([symbols.K, symbols.Q]), st.integers(2, 9), st.integers(2, 9), st.integers(1, 4))
@settings(max_examples=150)
def test_tile_bounds_enclose_what_is_visible(text, index, q_len, k_len, tile):
    """Outside the needed part no pair is visible; inside the full part every pair is."""
    limits = bounds.tile_bounds(text, index)
    other = symbols.Q if index is symbols.K else symbols.K
    size, other_size = (k_len, q_len) if index is symbols.K else (q_len, k_len)
    source = compile(text, "mask", "eval")
    for first in range(0, other_size, tile):
        last = min(first + tile, other_size) - 1
        at = {symbols.Q_LEN: q_len, symbols.K_LEN: k_len, symbols.BATCH: 1, symbols.HEAD: 2}
        at |= {bounds.FIRST: first, bounds.LAST: last}

        def values(expressions, at=at):
            return [int(sympy.sympify(expression).subs(at)) for expression in expressions]

        needed = range(max([0, *values(limits.needed_lower)]), min([size, *values(limits.needed_upper)]))
        full = range(0)
        if limits.has_full:
            full = range(max([0, *values(limits.full_lower)]), min([size, *values(limits.full_upper)]))
        for position in range(size):
            seen = [
                bool(
                    eval(
                        source,
                        {},
                        {"q_len": q_len, "k_len": k_len, "batch": 1, "head": 2, index.name: position, other.name: o},
                    )
                )
                for o in range(first, last + 1)
            ]
            assert position in needed or not any(seen), (text, limits, first, last, position)
            assert position not in full or all(seen), (text, limits, first, last, position)
