"""The native attention backward kernel over ranges and over block lists against float64, within attention_bounds.py.

out and lse come from float64, so that the forward kernel has no part in it.
"""

from __future__ import annotations

import pytest
import sympy
import torch
from attention_bounds import Expected, close, listed_pairs, make_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_cases import TABLE, limited
from test_attention_backward_cpp import BEST, TWO, launch, threads
from torch import Tensor

from tilewright.codegen import symbols
from tilewright.codegen.attention import CPP_TILES, AttentionBackwardSpec
from tilewright.runtime import cpu
from tilewright.runtime.ops.attention import visible_pairs
from tilewright.runtime.ops.block_lists import block_lists, transposed_lists

Lists = tuple[Tensor, Tensor]


def make_spec(**fields) -> AttentionBackwardSpec:
    fields["mask"] = symbols.mask_text(fields.get("mask", ""))
    return AttentionBackwardSpec(**({"head_dim": 16, "value_dim": 16} | fields)).with_tiles(CPP_TILES)


def check(
    spec: AttentionBackwardSpec,
    inputs: list[Tensor | None],
    isa: str = BEST,
    lists: Lists | None = None,
    table: Tensor | None = None,
    scale: float = 0.3,
) -> tuple:
    """All gradients of ``spec`` against float64; lists: counts and indices."""
    q, k, v = inputs[:3]
    lengths = (q.shape[2], k.shape[2])
    pairs = visible_pairs(q, k, spec.mask, table)
    more: tuple = (None, None, None, None, table)
    if lists is not None:
        pairs = torch.ones(1, 1, 1, 1, dtype=torch.bool) if pairs is None else pairs
        pairs = listed_pairs(*lists, (spec.block_q, spec.block_k), pairs[(None,) * (4 - pairs.dim())], lengths)
        more = (*lists, *transposed_lists(*lists, -(-lengths[1] // spec.block_k)), table)
    grad = torch.randn(*q.shape[:3], v.shape[3], generator=torch.Generator().manual_seed(7)).to(q.dtype)
    expected = Expected(inputs, grad, scale, "", spec.normalizer, pairs)
    arguments = (grad, *inputs, expected.out.to(q.dtype), expected.lse.float(), scale, None, *more)
    found = launch(spec, isa, *arguments)
    dq, dk, dv, dbias, dshift = found
    close("dq", dq, expected.dq, expected.dq_bound)
    close("dk", dk, expected.dk, expected.dk_bound)
    close("dv", dv, expected.dv, expected.dv_bound)
    assert (dbias is not None, dshift is not None) == (spec.grad_bias, spec.grad_shift)
    if spec.grad_bias:
        close("dbias", dbias, expected.dbias, expected.dz_bound.sum_to_size(inputs[3].shape))
    if spec.grad_shift:
        bound = expected.dz_bound.sum(-1, keepdim=True).sum_to_size(inputs[4].shape)
        close("dshift", dshift[..., None].sum_to_size(inputs[4].shape), expected.dshift, bound)
    if pairs is not None:
        hidden = ~pairs.expand(*q.shape[:3], lengths[1])
        assert not dq[hidden.all(-1)].any(), "queries that see nothing have no gradient"
        unseen = hidden.all(-2).unflatten(1, (k.shape[1], -1)).all(2)
        assert not dk[unseen].any() and not dv[unseen].any(), "keys that nobody sees have no gradient"
    return found


def random_lists(
    spec: AttentionBackwardSpec, lengths: tuple[int, int], density: float, seed: int, heads=(1, 1)
) -> Lists:
    """Lists of some blocks, some of which call themselves full; some query blocks and key blocks have none."""
    generator = torch.Generator().manual_seed(seed)
    blocks = (-(-lengths[0] // spec.block_q), -(-lengths[1] // spec.block_k))
    listed = torch.rand(*heads, *blocks, generator=generator) < density
    full = torch.rand(listed.shape, generator=generator) < 0.3
    if blocks[0] > 2:
        listed[..., 1, :] = False
    if blocks[1] > 2:
        listed[..., 1] = False
    return block_lists((listed * (1 + full)).to(torch.uint8))


EDGES = "table(4 * table(q_idx) + table(k_idx) + q_len + k_len) > 0"
MASKS = {
    "all": "",
    "causal": "causal",
    "window": "causal & window(150)",
    "two-sided": "window(40, 33)",
    "sinks": "causal & (window(21) | sinks(4))",
    "prefix": "prefix(20)",
    "dilated": "causal & dilated(3)",
    "blocks": "blocks(24)",
    "block-causal": "block_causal(48)",
    "neighbourhood": "neighbourhood(16, 8, 2)",
    "documents": "causal & (table(q_idx) == table(k_idx))",
    "edges": EDGES,
    "per-head": "causal & ((k_idx > q_idx - 24 * head - 5) | (k_idx < 3 + head))",
    "per-batch": "k_idx <= q_idx + 40 * batch",
    "bitmap": "table(9 * (q_idx // 64) + k_idx // 64) > 1",
    "not-window": "causal & ~window(30)",
    "not-causal": "~causal",
    "four": "(k_idx == q_idx) | (k_idx == q_idx - 30) | ((k_idx < 18) & (q_idx > 133)) | (k_idx > q_idx + 60)",
    "two-of-one-tile": "(k_idx == q_idx - 2) | (k_idx == q_idx - 5) | (k_idx == q_idx + 90)",
    "one-head": "window(4) & (q_idx > 20) & (head > 0)",
}


def make_table(spec: AttentionBackwardSpec, lengths: tuple[int, int], seed: int) -> Tensor | None:
    """Document numbers of the positions, then what EDGES says of each pair of documents."""
    if not spec.table:
        return None
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randint(0, 4, (sum(lengths),), generator=generator).sort()[0]
    return torch.cat([positions, torch.randint(0, 2, (16,), generator=generator)]).to(torch.int32)


def run_some(spec: AttentionBackwardSpec, isa: str, cases: list[tuple[int, int]], seed: int) -> None:
    """One kernel under several lengths, layouts, numbers of heads and of threads, and draws of its lists."""
    for n, lengths in enumerate(cases):
        batch, key_heads = ((1, 1), (2, 1), (1, 2))[(n + seed) % 3]
        layout = ("plain", "heads_last", "transposed", "strided")[(n + seed) % 4]
        inputs = make_inputs(spec, lengths, batch, key_heads, layout, n + seed)
        lists = None
        if spec.lists:
            heads = ((1, 1), (batch, 1), (1, key_heads * spec.group), (batch, key_heads * spec.group))[(n + seed) % 4]
            lists = random_lists(spec, lengths, (0.15, 0.4, 0.9)[n % 3], n + seed, heads)
        with threads((1, 3)[n % 2]):
            check(spec, inputs, isa, lists, make_table(spec, lengths, n + seed))


# Tiles hold 128 queries and keys, or 64 queries and 192 keys.
LENGTHS = [(0, 5), (13, 1), (70, 300), (400, 400), (385, 129), (130, 520)]
BLOCKS = [(16, 16), (32, 128), (128, 64), (64, 256), (256, 32), (128, 128)]
SOME = [
    make_spec(mask=MASKS["sinks"], dtype="bfloat16", group=2),
    make_spec(
        mask=MASKS["documents"], dtype="bfloat16", group=2, bias="float32", grad_bias=True, block_q=16, block_k=32
    ),
    pytest.param(
        make_spec(mask=MASKS["per-head"], normalizer="sigmoid", shift=True, grad_shift=True, block_q=128, block_k=64),
        marks=pytest.mark.grid,
    ),
]


@pytest.mark.parametrize("spec", SOME, ids=lambda spec: f"{spec.dtype}-{spec.block_q}")
def test_gradients(spec: AttentionBackwardSpec) -> None:
    run_some(spec, BEST, LENGTHS, 0)


@pytest.mark.grid
@pytest.mark.parametrize("lists", [False, True], ids=["ranges", "lists"])
@pytest.mark.parametrize("name", MASKS)
def test_gradients_under_every_mask(name: str, lists: bool) -> None:
    number = list(MASKS).index(name)
    dtype = ("bfloat16", "float32", "bfloat16", "float16")[(number + lists) % 4]
    fields = {"mask": MASKS[name], "dtype": dtype, "group": 1 + number % 2}
    fields |= {"head_dim": (16, 40, 64)[number % 3], "value_dim": (24, 64, 16)[number % 3]}
    if lists:
        fields |= dict(zip(("block_q", "block_k"), BLOCKS[number % 6], strict=True))
    if number % 5 == 1:
        fields |= {"normalizer": "sigmoid", "shift": True, "grad_shift": True}
    if number % 4 == 3:
        fields |= {"bias": "float32", "grad_bias": True}
    elif number % 4 == 1:
        fields |= {"bias": "bool"}
    run_some(make_spec(**fields), BEST, LENGTHS, number)


@pytest.mark.grid
@pytest.mark.parametrize("isa", cpu.supported())
@pytest.mark.parametrize("mask", ["sinks", "documents", "not-window"])
@pytest.mark.parametrize("lists", [False, True], ids=["ranges", "lists"])
def test_gradients_on_every_instruction_set(mask: str, lists: bool, isa: str) -> None:
    blocks = {"block_q": 32, "block_k": 16} if lists else {}
    dtype = "bfloat16" if isa == "amx" or mask == "documents" else "float32"
    run_some(make_spec(mask=MASKS[mask], dtype=dtype, group=2, **blocks), isa, LENGTHS, 1)


@pytest.mark.grid
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("blocks", [(q, k) for q in (16, 32, 64, 128, 256) for k in (16, 32, 64, 128, 256)])
def test_gradients_with_blocks_of_every_size(blocks: tuple[int, int], dtype: str) -> None:
    spec = make_spec(mask=MASKS["window"], dtype=dtype, block_q=blocks[0], block_k=blocks[1])
    run_some(spec, BEST, LENGTHS, sum(blocks))


@pytest.mark.grid
@pytest.mark.parametrize("isa", TWO)
@given(data=st.data())
@settings(max_examples=10)
def test_drawn_masks(isa: str, data: st.DataObject) -> None:
    mask = symbols.parse_mask(data.draw(limited))
    if mask == sympy.false:
        return
    lists = data.draw(st.booleans(), label="lists")
    blocks = {"block_q": 32, "block_k": 64} if lists else {}
    dtype = data.draw(st.sampled_from(["float32", "bfloat16"]), label="dtype")
    spec = make_spec(mask=mask, dtype=dtype, **blocks)
    inputs = make_inputs(spec, (150, 170), 2, 3, "heads_last", 2)
    table = torch.tensor(TABLE, dtype=torch.int32) if spec.table else None
    check(spec, inputs, isa, random_lists(spec, (150, 170), 0.5, 3, (1, 3)) if lists else None, table)
