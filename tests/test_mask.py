"""``tilewright.mask``: constructors, combinations, tables, pictures, and what is refused."""

from __future__ import annotations

import pickle

import pytest
import sympy
import torch
from hypothesis import given, settings
from mask_cases import TABLE, masks, visible
from test_mask_tiles import counted

import tilewright
from tilewright.codegen.symbols import MaskError, Table
from tilewright.runtime.errors import BadArgument
from tilewright.runtime.mask import Mask

mask = tilewright.mask

IDS = [0, 0, 0, 1, 1, 2, 2, 2, 2, 0, 3, 3]


def pairs(shape, condition):
    """bool tensor of the shape: ``condition(batch, head, q, k)`` pair by pair."""
    entries = [[[[condition(b, h, q, k) for k in range(shape[3])] for q in range(shape[2])] for h in range(shape[1])]
               for b in range(shape[0])]  # fmt: skip
    return torch.tensor(entries)


CONSTRUCTED = [
    (mask.causal(), lambda b, h, q, k: k <= q),
    (mask.window(3), lambda b, h, q, k: q - 3 < k <= q),
    (mask.window(3, 2), lambda b, h, q, k: q - 3 < k <= q + 2),
    (mask.sinks(2), lambda b, h, q, k: k < 2),
    (mask.prefix(4), lambda b, h, q, k: k <= q or k < 4),
    (mask.dilated(3), lambda b, h, q, k: (q - k) % 3 == 0),
    (mask.blocks(5), lambda b, h, q, k: q // 5 == k // 5),
    (mask.block_causal(5), lambda b, h, q, k: k // 5 <= q // 5),
    (mask.neighbourhood(3, 4, 1), lambda b, h, q, k: abs(q // 4 - k // 4) <= 1 and abs(q % 4 - k % 4) <= 1),
    (mask.documents(IDS), lambda b, h, q, k: IDS[q] == IDS[k]),
    (mask.documents([IDS, IDS[::-1]]), lambda b, h, q, k: (IDS, IDS[::-1])[b][q] == (IDS, IDS[::-1])[b][k]),
    (
        mask.segments([(1, 0), (3, 1)], ids=IDS),
        lambda b, h, q, k: IDS[q] == IDS[k] or (IDS[q], IDS[k]) in [(1, 0), (3, 1)],
    ),
    (
        mask.segments(torch.tensor([[False, True], [True, False]]), lengths=[5, 7]) & mask.causal(),
        lambda b, h, q, k: (q < 5) != (k < 5) and k <= q,
    ),
    (
        mask.segments([(0, 1)], ids=torch.tensor([[0, 1] * 6, [0] * 11 + [1]])),
        lambda b, h, q, k: (q % 2, k % 2) != (1, 0) if b == 0 else q < 11 or k == 11,
    ),
    (mask.bitmap(torch.eye(3, dtype=torch.bool), 4), lambda b, h, q, k: q // 4 == k // 4),
    (
        mask.bitmap(torch.tensor([[[True, False]], [[True, True]]]), (12, 6)),
        lambda b, h, q, k: h == 1 or k < 6,
    ),
    (
        mask.bitmap(torch.arange(2 * 2 * 2 * 2).view(2, 2, 2, 2) % 3 == 0, 6),
        lambda b, h, q, k: (8 * b + 4 * h + 2 * (q // 6) + k // 6) % 3 == 0,
    ),
    (
        mask.per_head([mask.causal(), mask.documents(IDS)]),
        lambda b, h, q, k: k <= q if h == 0 else IDS[q] == IDS[k],
    ),
    (mask.expression("table(q_idx) > k_idx", torch.tensor(IDS)), lambda b, h, q, k: IDS[q] > k),
    (mask.causal().at(5), lambda b, h, q, k: k <= q + 5),
    (mask.Mask.parse(""), lambda b, h, q, k: True),
]


@pytest.mark.parametrize(("made", "condition"), CONSTRUCTED)
def test_constructors_mean_their_equations(made, condition):
    seen = made.visible(12, 12, heads=2, batch=2)
    assert torch.equal(seen, pairs((2, 2, 12, 12), condition))
    assert torch.equal((~made).visible(12, 12, heads=2, batch=2), ~seen)
    again = pickle.loads(pickle.dumps(made))
    assert again == made and hash(again) == hash(made)
    assert Mask.parse(made.text, made.table) == made
    found = made.states(12, 12, (4, 3), heads=2, batch=2)
    expected = counted(seen, 4, 3)
    assert bool(((found == 1) | (found == expected)).all())


SORTED = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 4])


@pytest.mark.parametrize(
    "made",
    [
        mask.documents(SORTED),
        mask.documents(torch.stack([SORTED, SORTED // 2])),
        mask.segments([(1, 0), (3, 1), (4, 0), (4, 2)], ids=SORTED),
        mask.segments([(3, 0), (1, 2)], ids=torch.stack([SORTED, SORTED // 2])),
        mask.bitmap(torch.arange(9).view(3, 3) % 2 == 0, 4),
        mask.bitmap(torch.arange(2 * 2 * 4 * 3).view(2, 2, 4, 3) % 3 == 0, (3, 4)),
    ],
)
def test_tables_classify_tiles_exactly(made):
    """Documents and segments in order, and blocks: no tile is called partial without need."""
    for block in ((3, 3), (4, 2), (5, 12)):
        expected = counted(made.visible(12, 12, heads=2, batch=2), *block)
        assert torch.equal(made.states(12, 12, block, heads=2, batch=2).expand_as(expected), expected)


def test_text_and_python_agree():
    assert mask.causal() & (mask.window(256) | mask.sinks(4)) == Mask.parse("causal & (window(256) | sinks(4))")
    assert ~mask.causal() == Mask.parse("~causal") != mask.causal()
    assert mask.causal().end_aligned() == Mask.parse("end_aligned(causal)")
    q, k = sympy.symbols("q_idx k_idx")
    assert mask.expression((k <= q) & (k > q - 256)) == mask.window(256)
    assert mask.expression(sympy.Eq(sympy.Mod(q - k, 3), 0)) == mask.dilated(3)
    assert mask.expression(sympy.Eq(Table(q), Table(k)), torch.tensor(IDS)).text == "table(k_idx) == table(q_idx)"
    assert repr(mask.documents(IDS)).endswith(", table of 12 entries)")


def test_tables_follow_each_other_and_equal_ones_are_shared():
    a, b, edges = mask.documents(IDS), mask.documents([0] * 6 + [1] * 6), mask.segments([(0, 1)], lengths=[6, 6])
    both = a & (b | ~edges)
    expected = a.visible(12, 12) & (b.visible(12, 12) | ~edges.visible(12, 12))
    assert torch.equal(both.visible(12, 12), expected)
    assert both.table is not None and len(both.table) == 12 + (12 + 4)  # b's ids begin the table of the edges
    assert (a & ~a).hides_everything and len((a | a).table) == 12
    assert (a & b).implies(a) and a.implies(a | b) and not a.implies(b)
    assert a == mask.documents(torch.tensor(IDS, dtype=torch.int64)) != b


texts = masks.filter(lambda text: "table" in text)


@given(texts, texts)
@settings(max_examples=10)
def test_combined_tables_are_read_where_they_were(left, right):
    """Entries are only moved: indices inside the tables find what they found before."""
    a = Mask.parse("(table(q_idx) <= table(k_idx + 2)) & (k_idx < 8)", torch.tensor(TABLE))
    b = Mask.parse(left, torch.tensor(TABLE))
    c = Mask.parse(right, torch.tensor(TABLE))
    assert torch.equal((b | c).visible(6, 7, 2, 2), visible(f"({left}) or ({right})", 6, 7, 2, 2))
    assert torch.equal((a & ~b).visible(6, 7, 2, 2), a.visible(6, 7, 2, 2) & ~visible(left, 6, 7, 2, 2))


def test_cached_decoding_reads_the_last_rows():
    prompt = mask.causal() & (mask.window(5) | mask.sinks(2))
    full = prompt.visible(20, 20)
    assert torch.equal(prompt.end_aligned().visible(3, 20), full[:, :, 17:])
    assert torch.equal(prompt.at(8).visible(4, 20), full[:, :, 8:12])
    documents = mask.documents(IDS)
    assert torch.equal(documents.end_aligned().visible(2, 12), documents.visible(12, 12)[:, :, 10:])
    assert prompt.closed_form and prompt.end_aligned().closed_form and not documents.closed_form


def test_sizes_a_mask_was_made_for():
    documents, bitmap = mask.documents([IDS] * 2), mask.bitmap(torch.ones(3, 2, 2, dtype=torch.bool), 8)
    assert documents.why_not(12, 12, 1, 2) is None
    assert documents.why_not(1, 13, 1, 2) == "the mask was made for 12 positions, and there are 13"
    assert (documents & mask.causal()).why_not(12, 12, 1, 3) == "the mask was made for 2 batch entries, and there are 3"
    assert (~bitmap | mask.sinks(3)).why_not(16, 16, 4, 1) == "the mask was made for 3 heads, and there are 4"
    assert mask.causal().why_not(10**6, 10**6, 99, 99) is None
    # Beyond its positions a tensor says nothing, and nothing is seen.
    seen = documents.visible(14, 14, batch=2)
    assert not bool(seen[..., 12:, :].any()) and not bool(seen[..., 12:].any())
    assert not bool(bitmap.visible(18, 18)[..., 16:].any())


def test_density_counts_tiles_and_needs_no_pairs():
    made = mask.causal() & (mask.window(4096) | mask.sinks(4))
    assert made.density(2**20, 2**20, 2**14) == pytest.approx((64 + 63 + 62) / 64**2)
    assert mask.causal().density(256, 256, 64) == pytest.approx(10 / 16)
    assert mask.causal().density(0, 256) == 0.0
    heads = mask.per_head([mask.causal(), mask.Mask.parse("")])
    assert heads.density(256, 256, 64, heads=2) == pytest.approx((10 + 16) / 32)


def test_pictures_colour_the_tiles(tmp_path):
    made = mask.causal() & (mask.window(24) | mask.sinks(2))
    figure = made.show(64, 64, block=8)
    figure.savefig(tmp_path / "mask.png", dpi=40)
    assert (tmp_path / "mask.png").stat().st_size > 2000
    (axes,) = figure.axes
    image = torch.from_numpy(axes.images[0].get_array().data)
    states = made.states(64, 64, 8)[0, 0]
    seen = made.visible(64, 64)[0, 0]
    kinds = states.repeat_interleave(8, 0).repeat_interleave(8, 1) * 2 + seen
    colours = [{tuple(c) for c in image[kinds == kind].tolist()} for kind in (0, 2, 3, 5)]
    assert all(len(c) == 1 for c in colours) and len(set.union(*colours)) == 4  # empty, partial: hidden and shown, full
    (legend,) = figure.legends
    counts = [int((states == state).sum()) for state in (2, 1, 0)]
    assert [text.get_text() for text in legend.get_texts()] == [
        f"{name}: {count}" for name, count in zip(("full", "partial", "empty"), counts, strict=True)
    ]
    heads = mask.per_head([mask.causal(), mask.sinks(1)]).show(10, 500, head=1)
    assert "head 1" in heads.axes[0].get_title()
    assert mask.causal().show(2**17, 2**17, block=2**13).axes[0].images[0].get_array().shape[:2] == (16, 16)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: mask.window(0), "left is 0"),
        (lambda: mask.window(2.5), "left is 2.5"),
        (lambda: mask.window(True), "left is True"),
        (lambda: mask.window(4, -1), "right is -1"),
        (lambda: mask.sinks(0), "count is 0"),
        (lambda: mask.blocks(2**31), "does not fit 32 bits"),
        (lambda: mask.neighbourhood(8, 8, 1, 3), "block is 3, but must divide"),
        (lambda: mask.documents([]), "at least one entry"),
        (lambda: mask.documents([0.5]), "must be integers"),
        (lambda: mask.documents([[1, 2], [3]]), "must be integers"),
        (lambda: mask.documents(torch.zeros(1, 1, 1, dtype=torch.int32)), r"must be \(L,\) or \(batch, L\)"),
        (lambda: mask.documents([2**31]), "32 bits"),
        (lambda: mask.segments([(0, 1)]), "by their lengths, or by the ids"),
        (lambda: mask.segments([(0, 2)], lengths=[3, 4]), "from 0 to 1"),
        (lambda: mask.segments([], lengths=[3, -1]), "at least 0"),
        (lambda: mask.segments([], ids=[0, -1]), "go from -1"),
        (lambda: mask.segments(torch.ones(2, 2, dtype=torch.bool), ids=[0, 2]), "2 segments, and 3"),
        (lambda: mask.segments(torch.ones(2, 3, dtype=torch.bool), ids=[0, 1]), r"bool tensor \(S, S\)"),
        (lambda: mask.segments(torch.zeros(2, 2, dtype=torch.bool), ids=[0, 1]), "there are no edges"),
        (lambda: mask.bitmap(torch.zeros(2, 2, dtype=torch.bool), 8), "hides every block"),
        (lambda: mask.bitmap(torch.ones(2, 2), 8), "bool tensor"),
        (lambda: mask.bitmap(torch.ones(2, 2, dtype=torch.bool), 0), "positive int"),
        (lambda: mask.per_head([]), "at least one mask"),
        (lambda: mask.per_head(["causal"]), "at least one mask"),
        (lambda: mask.expression(sympy.Symbol("q_idx")), "condition"),
        (lambda: mask.expression(sympy.Symbol("q_idx") < sympy.Symbol("z")), "unknown symbol 'z'"),
        (lambda: mask.expression(sympy.Symbol("q_idx") < sympy.Symbol("k_idx") / 2), "is not a mask"),
        (lambda: mask.expression("causal & (k_idx > q_idx)"), "hides every pair"),
        (lambda: mask.expression("k_idx < 0"), "hides every pair"),
        (lambda: mask.expression("table(k_idx) < 0"), "give the table"),
        (lambda: mask.causal() and mask.causal(), "no truth value"),
        (lambda: mask.causal().at(1.5), "a position is an int"),
        (lambda: mask.causal().visible(2**20, 2**20), "too many"),
        (lambda: mask.causal().visible(-1, 2), "q_len is -1"),
        (lambda: mask.causal().states(8, 8, block=(4, 0)), "positive int"),
        (lambda: mask.causal().show(0, 4), "at least one query"),
        (lambda: Mask.parse(" & ".join(f"neighbourhood(9000, 9000, {i})" for i in range(30))), "more than 4096"),
    ],
)  # fmt: skip
def test_what_is_refused(build, says):
    with pytest.raises(BadArgument, match=says):
        build()


def test_text_that_does_not_parse_names_the_column():
    with pytest.raises(MaskError, match=r"unknown mask 'cousal'.*column 12") as caught:
        Mask.parse("sinks(4) & cousal")
    assert caught.value.column == 12
    with pytest.raises(TypeError):
        mask.causal() & "window(3)"
