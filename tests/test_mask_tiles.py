"""States of tiles from interval analysis, and the lists made of them, against the mask evaluated pair by pair."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mask_cases import TABLE, combined, comparisons, limited, lines, masks, visible
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tilewright.runtime.errors import BadArgument
from tilewright.runtime.mask_tiles import tile_states
from tilewright.runtime.ops.block_lists import block_lists, list_states, transposed_lists

table_entries = torch.tensor(TABLE, dtype=torch.int32)
lengths = st.integers(0, 13)
sizes = st.sampled_from([1, 2, 3, 4, 8])


def counted(seen, block_q, block_k):
    """0, 1 or 2 for every tile: how much of it is visible, counted pair by pair."""
    batch, heads, q_len, k_len = seen.shape
    found = torch.zeros(batch, heads, math.ceil(q_len / block_q), math.ceil(k_len / block_k), dtype=torch.uint8)
    for i in range(found.shape[2]):
        for j in range(found.shape[3]):
            tile = seen[:, :, i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k].flatten(2)
            found[:, :, i, j] = tile.any(-1).to(torch.uint8) + tile.all(-1).to(torch.uint8)
    return found


def states_of(text, q_len, k_len, block_q, block_k, heads=3, batch=2, entries=table_entries):
    return tile_states(
        text, q_len=q_len, k_len=k_len, block_q=block_q, block_k=block_k, heads=heads, batch=batch, table=entries
    )


def check_states(text, q_len, k_len, block_q, block_k, exact=False):
    found = states_of(text, q_len, k_len, block_q, block_k)
    expected = counted(visible(text, q_len, k_len, 2, 3), block_q, block_k)
    assert found.dtype == torch.uint8 and found.is_contiguous()
    assert found.shape[0] in (1, 2) and found.shape[1] in (1, 3)
    found = found.expand_as(expected)
    wrong = (found != expected) if exact else (found != 1) & (found != expected)
    assert not bool(wrong.any()), (text, q_len, k_len, block_q, block_k, found[wrong], expected[wrong], wrong.nonzero())


congruences = st.tuples(
    st.sampled_from(["q_idx - k_idx", "k_idx", "q_idx + k_idx", "q_idx // 2 - k_idx"]),
    st.integers(1, 6),
    st.sampled_from(["==", "!="]),
    st.sampled_from(["0", "1", "5", "head", "q_len - k_len", "q_idx % 3", "k_idx % 2"]),
).map(lambda t: f"(({t[0]}) % {t[1]} {t[2]} {t[3]})")
lookups = st.tuples(
    st.sampled_from(
        [
            "q_idx",
            "k_idx // 2",
            "3 * q_idx + k_idx - 4",
            "table(q_idx) + 4 * table(k_idx)",
            "3 * (q_idx // 2) + k_idx // 3",
            "k_idx - 2 * q_idx + head",
            "5 - k_idx",
            "q_idx * k_idx",
        ]
    ),
    st.sampled_from(["<=", ">", "==", "!="]),
    st.sampled_from(["0", "1", "table(k_idx)", "table(q_idx)", "k_idx - 3", "table(head)"]),
).map(lambda t: f"(table({t[0]}) {t[1]} {t[2]})")
tiled = combined(st.one_of(comparisons, lines, congruences, lookups), 4)


@given(tiled, lengths, lengths, sizes, sizes)
@example("(table(table(q_idx) + 4 * table(k_idx)) > 0)", 13, 13, 4, 4)
@example("((q_idx - k_idx) % 3 == k_idx % 2)", 7, 7, 2, 2)
@settings(max_examples=80)
def test_states_are_sound(text, q_len, k_len, block_q, block_k):
    check_states(text, q_len, k_len, block_q, block_k)


@pytest.mark.grid
@given(st.one_of(tiled, masks, limited), st.integers(0, 30), st.integers(0, 30), sizes, sizes)
@settings(max_examples=4000)
def test_states_of_many_masks_are_sound(text, q_len, k_len, block_q, block_k):
    check_states(text, q_len, k_len, block_q, block_k)


DOCUMENTS = torch.tensor([0] * 5 + [1] * 3 + [2] * 9 + [3] + [4] * 14, dtype=torch.int32)  # 32 tokens
EXACT = [
    "",
    "causal",
    "~causal",
    "window(5)",
    "window(1)",
    "window(3, 2)",
    "causal & (window(5) | sinks(3))",
    "causal & (window(9) | sinks(3))",
    "end_aligned(causal & (window(5) | sinks(2)))",
    "prefix(6)",
    "blocks(4)",
    "blocks(6)",
    "~blocks(6)",
    "block_causal(5)",
    "end_aligned(block_causal(5))",
    "dilated(3)",
    "dilated(11)",
    "q_idx % 11 == k_idx % 11",
    "per_head(window(5), causal, blocks(4))",
    "k_idx // 3 != q_idx // 4",
    "neighbourhood(4, 8, 1, 4)",
    "neighbourhood(8, 4, 1)",
]


@pytest.mark.parametrize("text", EXACT)
def test_states_of_named_masks_are_exact(text):
    """No tile of these is called partial without need, whatever the lengths and blocks."""
    for q_len, k_len, block_q, block_k in ((32, 32, 4, 4), (29, 31, 8, 4), (17, 40, 3, 8), (30, 7, 4, 2), (1, 9, 4, 4)):
        check_states(text, q_len, k_len, block_q, block_k, exact=True)


def test_states_of_documents_and_edges_are_exact():
    entries = torch.cat([DOCUMENTS, torch.eye(5, dtype=torch.int32).flatten() + 0])
    for text in ("table(q_idx) == table(k_idx)", "table(5 * table(q_idx) + table(k_idx) + 32) > 0"):
        for block_q, block_k in ((4, 4), (8, 4), (3, 8)):
            found = states_of(text, 32, 32, block_q, block_k, entries=entries)
            assert torch.equal(found, counted(visible(text, 32, 32, entries=entries), block_q, block_k))


def test_tables_per_batch_entry_and_out_of_range():
    entries = torch.tensor([0, 0, 1, 1, 0, 1, 1, 1], dtype=torch.int32)
    text = "table(4 * batch + q_idx) == table(4 * batch + k_idx)"
    found = states_of(text, 4, 4, 2, 2, entries=entries)
    assert found.shape == (2, 1, 2, 2)
    assert torch.equal(found, counted(visible(text, 4, 4, 2, 1, entries), 2, 2))
    # Rows and columns beyond the table see its last entries: nothing is claimed about them that is not so.
    for q_len, k_len in ((9, 6), (0, 5), (5, 0)):
        found = states_of("table(4 * q_idx + k_idx) > 0", q_len, k_len, 2, 2, entries=entries)
        expected = counted(visible("table(4 * q_idx + k_idx) > 0", q_len, k_len, entries=entries), 2, 2)
        assert found.shape == expected.shape and bool(((found == 1) | (found == expected)).all())
    with pytest.raises(BadArgument, match="give it"):
        states_of(text, 4, 4, 2, 2, entries=None)


def test_states_cost_no_pairs():
    """Hundreds of tiles in each direction, a million million pairs."""
    found = states_of("causal & (window(4096) | sinks(4))", 2**20, 2**20, 2**12, 2**12)
    assert found.shape == (1, 1, 256, 256) and int((found > 0).sum()) == 256 + 255 + 254
    entries = torch.arange(2**17, dtype=torch.int32) // 2**12
    found = states_of("table(q_idx) == table(k_idx)", 2**17, 2**17, 2**8, 2**9, entries=entries)
    assert found.shape == (1, 1, 512, 256)
    assert int((found == 2).sum()) == 32 * 16 * 8 and int((found == 1).sum()) == 0


# ------------------------------------------------------------------------------------------------------------ lists


@given(st.integers(0, 5), st.integers(0, 7), st.randoms(use_true_random=False))
@settings(max_examples=20)
def test_lists_hold_what_the_states_say(nq, nk, random):
    states = torch.tensor([random.choice((0, 0, 1, 2)) for _ in range(2 * 3 * nq * nk)], dtype=torch.uint8)
    states = states.view(2, 3, nq, nk)
    counts, indices = block_lists(states)
    assert counts.dtype == indices.dtype == torch.int32 and indices.is_contiguous() and counts.is_contiguous()
    for row, count, listed in (
        zip(states.reshape(-1, nk).tolist(), counts.flatten().tolist(), indices.reshape(-1, nk).tolist(), strict=True)
        if nk
        else ()
    ):
        expected = [2 * block + (state == 2) for block, state in enumerate(row) if state]
        assert listed == expected + [-1] * (nk - len(expected)) and count == len(expected)
    assert torch.equal(list_states(counts, indices, nk), states)
    counts_t, indices_t = transposed_lists(counts, indices, nk)
    expected_t = block_lists(states.transpose(-1, -2).contiguous())
    assert torch.equal(counts_t, expected_t[0]) and torch.equal(indices_t, expected_t[1])


class Lists(torch.nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, q, k, table):
        states = torch.ops.tilewright.block_states(q, k, table, mask=self.mask, block_q=16, block_k=32)
        return states, *torch.ops.tilewright.block_lists(states)


TRACED = [
    "end_aligned(causal & (window(50) | sinks(4))) | (head == 1)",
    "(table(q_idx) == table(k_idx)) & causal",
    "(table(4 * table(q_idx) + table(k_idx)) > 0) | (batch == 0) & dilated(96)",
]


def sized(batch, q_len, k_len):
    table = torch.arange(300, dtype=torch.int32) // 40
    return torch.empty(batch, 2, q_len, 8), torch.empty(batch, 1, k_len, 8), table


def test_one_trace_serves_all_sizes():
    """Traced with symbolic lengths and batch, the ATen operations give what the eager op gives for every size."""
    module = Lists("end_aligned(block_causal(40)) & (table(q_idx) == table(k_idx)) | (head == 1) & (batch == 0)")
    traced = make_fx(module, tracing_mode="symbolic")(*sized(3, 100, 130))
    assert not any("tilewright" in str(node.target) for node in traced.graph.nodes)
    for sizes in ((3, 100, 130), (2, 33, 64), (5, 300, 300), (1, 5, 7), (2, 1, 50)):
        for found, expected in zip(traced(*sized(*sizes)), module(*sized(*sizes)), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.grid
@pytest.mark.parametrize("text", TRACED)
def test_one_exported_program_serves_all_lengths(text):
    # Broadcasting puts a guard on more than one tile, though the operations are right for one.
    dynamic = {0: torch.export.Dim("batch", max=64), 2: torch.export.Dim.AUTO}
    module = Lists(text)
    exported = torch.export.export(module, sized(3, 100, 130), dynamic_shapes=(dynamic, dynamic, None))
    assert any("block_states" in str(node.target) for node in exported.graph.nodes)
    dissolved = exported.run_decompositions()
    assert not any("tilewright" in str(node.target) for node in dissolved.graph.nodes)
    for graph in (exported, dissolved):
        for sizes in ((3, 100, 130), (2, 33, 64), (5, 300, 300)):
            for found, expected in zip(graph.module()(*sized(*sizes)), module(*sized(*sizes)), strict=True):
                assert torch.equal(found, expected)


def test_fake_tensors_give_shapes():
    with FakeTensorMode():
        q, k, table = torch.empty(2, 4, 100, 8), torch.empty(2, 2, 130, 8), torch.empty(40, dtype=torch.int32)
        for text in TRACED:
            states = torch.ops.tilewright.block_states(q, k, table, mask=text, block_q=16, block_k=32)
            assert states.shape[2:] == (7, 5) and states.dtype == torch.uint8


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"mask": "table(q_idx) > 0"}, "give it"),
        ({"mask": "causal", "table": torch.zeros(3)}, "row of integers"),
        ({"mask": "causal", "block_q": 0}, "at least one"),
        ({"mask": "cousal"}, "unknown mask"),
    ],
)
def test_bad_arguments_are_named(arguments, says):
    q = torch.empty(1, 1, 32, 8)
    with pytest.raises(ValueError, match=says):
        torch.ops.tilewright.block_states(q, q, **({"block_q": 16, "block_k": 16} | arguments))
