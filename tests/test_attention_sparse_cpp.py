"""The native attention kernel, forward, under segments, block lists and tables, against float64.

Bounds: attention_bounds.py. Many specs and every instruction set: ``make grid``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from attention_bounds import Expected, close, make_inputs, weights_bound
from golden import check_golden
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention_cpp import kernel
from torch import Tensor

from tilewright.codegen import symbols
from tilewright.codegen.attention import CPP_TILES, AttentionSpec
from tilewright.codegen.render import render

INF = math.inf
CAUSAL, END = "k_idx <= q_idx", "k_idx <= q_idx + k_len - q_len"
WINDOW = "(k_idx <= q_idx) & (k_idx > q_idx - 70)"
SINKS = "(k_idx <= q_idx) & ((k_idx < 5) | (k_idx > q_idx - 40))"
THREE = "(k_idx <= q_idx) & ((k_idx < 20) | ((k_idx >= 100) & (k_idx < 137)) | (k_idx > q_idx - 33))"
DOCUMENTS = "(k_idx <= q_idx) & (table(q_idx) == table(k_idx))"
BOTH = "(k_idx <= q_idx) & ((k_idx < 5) | (table(q_idx) == table(k_idx)))"
HALF, SIGMOID = {"dtype": "bfloat16"}, {"normalizer": "sigmoid"}
TABLE = 400


def make_spec(**fields) -> AttentionSpec:
    fields["mask"] = symbols.mask_text(fields.get("mask", ""))
    return AttentionSpec(**fields).with_tiles(CPP_TILES)


# Without lists: what a query needs are up to four ranges of keys, or what a table says.
PLAIN = {
    "sinks": make_spec(head_dim=16, value_dim=16, mask=SINKS, group=2),
    "window_half": make_spec(head_dim=32, value_dim=32, mask=WINDOW, **HALF),
    "three_half": make_spec(head_dim=20, value_dim=36, mask=THREE, **HALF, bias="bool"),
    "window": make_spec(head_dim=24, value_dim=12, mask=WINDOW, bias="float32"),
    "three_sigmoid": make_spec(head_dim=8, value_dim=8, mask=THREE, **SIGMOID, shift=True),
    "documents": make_spec(head_dim=16, value_dim=16, mask=DOCUMENTS, group=2),
    "documents_half": make_spec(head_dim=64, value_dim=16, mask=DOCUMENTS, **HALF),
}
LISTS = {
    "small_half": make_spec(head_dim=32, value_dim=48, block_q=16, block_k=16, mask=CAUSAL, group=2, **HALF),
    "large": make_spec(head_dim=16, value_dim=20, block_q=128, block_k=64, mask=BOTH, bias="bool", group=2),
    "large_half": make_spec(block_q=64, block_k=128, **HALF, bias="float32"),
    "tall": make_spec(head_dim=24, value_dim=9, block_q=256, block_k=16, mask=END, bias="float32"),
    "wide": make_spec(head_dim=5, value_dim=70, block_q=16, block_k=256, mask=DOCUMENTS),
    "sigmoid": make_spec(head_dim=12, value_dim=8, block_q=32, block_k=32, **SIGMOID, shift=True, mask=CAUSAL, group=3),
    "sigmoid_half": make_spec(head_dim=40, value_dim=16, block_q=32, block_k=64, **SIGMOID, bias="bool", **HALF),
}
SPECS = PLAIN | LISTS
# The rest is in the grid.
DEFAULT = [("small_half", "amx"), ("large", "avx512")]
ISAS = ["amx", "avx512", "avx2", "baseline"]
BUILDS = [
    pytest.param(name, isa, marks=() if (name, isa) in DEFAULT else pytest.mark.grid) for name in SPECS for isa in ISAS
]
builds = pytest.mark.parametrize(("name", "isa"), BUILDS)
list_builds = pytest.mark.parametrize(("name", "isa"), [build for build in BUILDS if build.values[0] in LISTS])


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def draw_lists(
    spec: AttentionSpec, lengths: tuple[int, int], shape: tuple[int, int], density: float, seed: int
) -> tuple[Tensor, Tensor]:
    """counts and indices of random blocks, a quarter of them full whatever the mask says; shape: (Bl, Hl)."""
    generator = torch.Generator().manual_seed(seed)
    blocks, keys = -(-lengths[0] // spec.block_q), -(-lengths[1] // spec.block_k)
    listed = torch.rand(*shape, blocks, keys, generator=generator) < density
    entries = 2 * torch.arange(keys) + (torch.rand(listed.shape, generator=generator) < 0.25)
    counts = listed.sum(-1)
    order = torch.sort(~listed, dim=-1, stable=True).indices
    indices = entries.gather(-1, order).masked_fill(torch.arange(keys) >= counts[..., None], -1)
    width = int(counts.max()) if counts.numel() else 0
    return counts.int(), indices[..., :width].int().contiguous()


def visible(spec: AttentionSpec, q: Tensor, k: Tensor, lists: tuple[Tensor, Tensor] | None, table: Tensor) -> Tensor:
    """(B, Hq, Lq, Lk): which pairs the mask and the lists show."""
    q_len, k_len = q.shape[2], k.shape[2]
    sizes = {"q_len": q_len, "k_len": k_len}
    indices = {"q_idx": torch.arange(q_len)[:, None], "k_idx": torch.arange(k_len)}
    shown = torch.ones(1, dtype=torch.bool)
    if spec.mask:
        shown = symbols.evaluate(spec.mask, {**sizes, **indices, "table": table})
    shown = shown.expand(q.shape[0], q.shape[1], q_len, k_len)
    if lists is None:
        return shown
    counts, entries = (x.expand(*q.shape[:2], *x.shape[2:]).long() for x in lists)
    tiles = torch.zeros(*counts.shape, -(-k_len // spec.block_k) + 1, dtype=torch.long)
    tiles.scatter_(-1, torch.where(entries < 0, tiles.shape[-1] - 1, entries // 2), 1 + entries.clamp(min=0) % 2)
    rows, columns = torch.arange(q_len) // spec.block_q, torch.arange(k_len) // spec.block_k
    states = tiles[..., :-1][:, :, rows][..., columns]
    return (states == 2) | ((states == 1) & shown)


def check(
    spec: AttentionSpec, isa: str, inputs: list[Tensor | None], lists: tuple[Tensor, Tensor] | None, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's out and lse, within their bounds, and which pairs were visible."""
    table = torch.randint(0, 3, (TABLE,), generator=torch.Generator().manual_seed(seed)).sort().values.int()
    out, lse = kernel(spec, isa)(*inputs, 0.3, *(lists or (None, None)), table if spec.table else None)
    q, k, v, bias, shift = inputs
    shown = visible(spec, q, k, lists, table)
    if bias is None or bias.dtype == torch.bool:
        bias_shown = shown if bias is None else shown & bias
    else:
        bias_shown = bias.expand(shown.shape).masked_fill(~shown, -INF)
    expected = Expected([q, k, v, bias_shown, shift], torch.zeros(out.shape, dtype=out.dtype), 0.3, "", spec.normalizer)
    close("out", out, expected.out, expected.out_bound)
    if spec.normalizer == "softmax":
        close("lse", lse, expected.lse, expected.lse_bound + weights_bound(spec.dtype, k.shape[2]))
    return out, lse, shown


LENGTHS = [1, 3, 8, 15, 16, 17, 33, 64, 100, 128, 129, 255, 300, 390]


def cases(spec: AttentionSpec) -> st.SearchStrategy[Callable[[str], None]]:
    @st.composite
    def draw_case(draw: st.DrawFn) -> Callable[[str], None]:
        lengths = draw(st.sampled_from(LENGTHS)), draw(st.sampled_from(LENGTHS))
        batch, heads = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 5]))
        seed = draw(st.integers(0, 99))
        inputs = make_inputs(spec, lengths, batch, heads, draw(st.sampled_from(["heads_last", "strided"])), seed)
        lists = None
        if spec.lists:
            shape = draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads * spec.group]))
            lists = draw_lists(spec, lengths, shape, draw(st.sampled_from([0.0, 0.1, 0.4, 1.0])), seed)
        return lambda isa: check(spec, isa, inputs, lists, seed) and None

    return draw_case()


@builds
def test_matches_float64(name, isa):
    spec = SPECS[name]
    kernel(spec, isa)

    @given(cases(spec), st.sampled_from([1, 2, 3]))
    @settings(max_examples=10)
    def run(case, threads):
        torch.set_num_threads(threads)
        case(isa)

    run()


@builds
def test_long_rows(name, isa):
    """Many blocks of queries: threads walk over runs of them, take turns in stores or own one; many keys, few rows."""
    spec = SPECS[name]
    for lengths, heads, threads in [((700, 900), 1, 2), ((300, 500), 9, 2), ((2, 1100), 1, 3), ((9, 1100), 1, 2)]:
        torch.set_num_threads(threads)
        inputs = make_inputs(spec, lengths, 1, heads, "heads_last", 1)
        lists = draw_lists(spec, lengths, (1, heads * spec.group), 0.3, 1) if spec.lists else None
        check(spec, isa, inputs, lists)


@list_builds
def test_rows_that_see_nothing(name, isa):
    spec = SPECS[name]
    for q_len in (2, 200):
        inputs = make_inputs(spec, (q_len, 300), 1, 1, "plain", 3)
        counts, indices = draw_lists(spec, (q_len, 300), (1, 1), 0.5, 3)
        counts[..., 0] = 0
        indices[..., 0, :] = -1
        out, lse, shown = check(spec, isa, inputs, (counts, indices))
        first = min(q_len, spec.block_q)
        assert not shown[:, :, :first].any() and not out[:, :, :first].any()
        assert spec.normalizer == "sigmoid" or bool((lse[:, :, :first] == -INF).all())


@pytest.mark.parametrize("name", ["large_half"])
def test_golden(name):
    check_golden("attention_forward_native_lists", render(SPECS[name], "cpp"), ".cpp.txt")


def test_text_fits_a_page():
    for name, spec in [(n, LISTS[n]) for n in ("small_half", "large_half", "sigmoid")]:
        assert max(map(len, render(spec, "cpp").splitlines())) <= 120, name
