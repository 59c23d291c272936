"""Masks as text and as expressions, and the loop bounds derived from them, against evaluation pair by pair."""

from __future__ import annotations

import pytest
import sympy
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mask_cases import TABLE, comparisons, lines, masks, pairs, table, visible

from tilewright.codegen import bounds, symbols
from tilewright.codegen.spec import SpecError
from tilewright.codegen.symbols import MaskError, mask_text, parse_mask


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


def lookup(*arguments):
    """What Triton's and C++'s texts call: lookup(table, index, table_len) and lookup(index)."""
    return TruncatingInt(table(arguments[-2] if len(arguments) == 3 else arguments[0]))


FUNCTIONS = {"table": table}
KERNEL_NAMES = {"lookup": lookup, "table": None, "table_len": len(TABLE)}


@given(masks, st.integers(1, 6), st.integers(1, 6))
@example("(0 - q_idx) < (q_idx // 2)", 4, 1)
@example("q_idx < (q_idx % 3) * 2 % 3", 3, 1)
@example("k_idx <= 0 - q_idx % 3 * (k_idx // 2)", 6, 6)
@settings(max_examples=80)
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
        expected = bool(eval(source, dict(FUNCTIONS), dict(values)))
        truncating = {name: TruncatingInt(value) for name, value in values.items()}
        assert bool(eval(python, dict(FUNCTIONS), dict(values))) == expected, (text, printed, values)
        assert bool(eval(triton, dict(KERNEL_NAMES), dict(truncating))) == expected, (
            text,
            symbols.triton_text(mask),
            values,
        )
        assert bool(eval(cpp, dict(KERNEL_NAMES), dict(truncating))) == expected, (text, symbols.cpp_text(mask), values)


@given(masks)
@settings(max_examples=60)
def test_evaluate_on_tensors(text):
    q_len, k_len = 5, 7
    found = visible(text, q_len, k_len, 2, 3)
    source = compile(text, "mask", "eval")
    for pair in pairs(q_len, k_len):
        expected = bool(eval(source, dict(FUNCTIONS), dict(pair)))
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
        ("table(q_idx, 1) == 0", 1, "one index"),
        ("table(k=q_idx) == 0", 1, "one index"),
        ("table < 1", 1, "unknown symbol 'table'"),
        ("table(causal) == 0", 7, "unknown symbol 'causal'"),
        ("causal & windw(3)", 10, "unknown mask 'windw': there are causal, window"),
        ("causal(1)", 1, "wrong arguments: it is causal"),
        ("causal | window()", 10, "wrong arguments: it is window.left, right=0"),
        ("window(1, 2, 3)", 1, "wrong arguments"),
        ("window(width=3)", 1, "wrong arguments"),
        ("window(q_idx)", 8, "expected an integer literal"),
        ("window(right=1.5, left=1)", 14, "expected an integer literal"),
        ("sinks(4294967296)", 7, "32 bits"),
        ("window(*[3])", 8, "cannot be read"),
        ("window(**{})", 8, "cannot be read"),
        ("causal & blocks(0)", 10, "size is 0, but must be an int of at least 1"),
        ("neighbourhood(8, 8, 1, 3)", 1, "block is 3, but must divide"),
        ("neighbourhood(65536, 65536, 1)", 1, "width is 4294967296, which does not fit"),
        ("per_head()", 1, "takes masks"),
        ("end_aligned(causal, causal)", 1, "takes one mask"),
        ("per_head(causal, 4)", 18, "expected a condition"),
        ("documents(3)", 1, "comes with a tensor"),
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


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("causal", "k_idx <= q_idx"),
        ("causal()", "k_idx <= q_idx"),
        ("window(256)", "(k_idx <= q_idx) & (k_idx > q_idx - 256)"),
        ("window(left=3, right=2)", "(k_idx <= q_idx + 2) & (k_idx > q_idx - 3)"),
        ("sinks(4)", "k_idx <= 3"),
        ("prefix(4)", "(k_idx <= 3) | (k_idx <= q_idx)"),
        ("dilated(3)", "(q_idx - k_idx) % 3 == 0"),
        ("dilated(1)", ""),
        ("blocks(64)", "k_idx // 64 == q_idx // 64"),
        ("block_causal(64)", "k_idx // 64 <= q_idx // 64"),
        ("~causal", "k_idx > q_idx"),
        ("per_head(causal, sinks(1))", "((head == 0) & (k_idx <= q_idx)) | ((head > 0) & (k_idx <= 0))"),
        ("per_head(causal)", "k_idx <= q_idx"),
        ("end_aligned(causal | sinks(2))", "(k_idx <= 1) | (k_idx <= q_idx + k_len - q_len)"),
        ("table(q_idx) == table(k_idx)", "table(k_idx) == table(q_idx)"),
        ("table(2 + 3) > 2 * table(5)", "table(5) <= -1"),
    ],
)
def test_named_masks_expand(written, canonical):
    assert mask_text(written) == canonical
    assert symbols.has_table(written) == ("table" in canonical)


@pytest.mark.parametrize(("halo", "block"), [(0, 1), (1, 1), (2, 1), (0, 2), (1, 2), (3, 2)])
def test_neighbourhood_is_what_halonet_draws(halo, block):
    height, width = 4, 6
    seen = visible(f"neighbourhood({height}, {width}, {halo}, {block})", 2 * height * width, 2 * height * width)[0, 0]
    expected = torch.zeros_like(seen)
    places = [(i, r, c) for i in range(2) for r in range(height) for c in range(width)]
    for q, (image, row, column) in enumerate(places):
        top, left = row // block * block - halo, column // block * block - halo
        for k, (other, r, c) in enumerate(places):
            reach = block + 2 * halo
            expected[q, k] = image == other and top <= r < top + reach and left <= c < left + reach
    assert torch.equal(seen, expected)


def test_lookups_are_clamped_and_printed_for_each_target():
    mask = parse_mask("table(q_idx - 5) == table(k_idx * 9)")
    seen = visible("table(q_idx - 5) == table(k_idx * 9)", 7, 3)[0, 0]
    assert seen.tolist() == [[table(q - 5) == table(9 * k) for k in range(3)] for q in range(7)]
    assert symbols.triton_text(mask, {"table": "entries"}) == (
        "lookup(entries, 9 * k_idx, table_len) == lookup(entries, q_idx - 5, table_len)"
    )
    assert symbols.cpp_lanes_text(mask) == symbols.cpp_text(mask) == "lookup(9 * k_idx) == lookup(q_idx - 5)"
    with pytest.raises(SpecError, match="give values"):
        symbols.evaluate(mask, {"q_idx": 0, "k_idx": 0})
    assert symbols.evaluate(mask, {"q_idx": 0, "k_idx": 0, "table": TABLE}) is True


def test_bounds_of_the_common_masks():
    causal = bounds.k_bounds("k_idx <= q_idx")
    assert (causal.lower, causal.upper, causal.exact) == ((), (symbols.Q + 1,), True)
    window = bounds.k_bounds("(k_idx <= q_idx) & (k_idx > q_idx - 256)")
    assert (window.lower, window.upper, window.exact) == ((symbols.Q - 255,), (symbols.Q + 1,), True)
    assert not bounds.k_bounds("(k_idx <= q_idx) | (k_idx <= 3)").exact
    assert not bounds.k_bounds("k_idx != 3").exact
    assert bounds.bounds("k_idx <= q_idx", symbols.Q).lower == (symbols.K,)


# Conjunctions of what bounds can solve (straight lines, rising and falling, and blocks) and of what it may not.
solvable = st.lists(st.one_of(lines, lines, comparisons), min_size=1, max_size=3).map(" & ".join)


@given(solvable, st.sampled_from([symbols.K, symbols.Q]), st.integers(2, 9), st.integers(2, 9), st.integers(1, 4))
@settings(max_examples=100)
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
                        dict(FUNCTIONS),
                        {"q_len": q_len, "k_len": k_len, "batch": 1, "head": 2, index.name: position, other.name: o},
                    )
                )
                for o in range(first, last + 1)
            ]
            assert position in needed or not any(seen), (text, limits, first, last, position)
            assert position not in full or all(seen), (text, limits, first, last, position)
