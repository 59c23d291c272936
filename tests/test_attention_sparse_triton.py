"""Attention over ranges and over block lists under Triton's interpreter against float64, within attention_bounds.py."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_bounds import Expected, close, listed_pairs, make_inputs
from torch import Tensor

from tilewright.codegen import symbols
from tilewright.codegen.attention import AttentionBackwardSpec, AttentionSpec
from tilewright.runtime.load import load
from tilewright.runtime.ops import attention_kernel
from tilewright.runtime.ops.attention import visible_pairs
from tilewright.runtime.ops.block_lists import block_lists, transposed_lists

TILE = 16
GROUPED: dict[str, Any] = {"group": 2}
SHIFTED: dict[str, Any] = {"group": 2, "normalizer": "sigmoid", "shift": True}
SINKS = "(k_idx <= q_idx) & ((k_idx < 4) | (k_idx > q_idx - 21))"
PER_HEAD = "(k_idx <= q_idx) & ((k_idx > q_idx - 24 * head - 5) | (k_idx < 3 + head))"
PREFIX = "(k_idx <= q_idx) | (k_idx < 20)"
TWO_SIDED = "((k_idx > q_idx - 9) & (k_idx < q_idx + 13)) | (k_idx < 2) | (q_idx < 2)"
FOUR = "(k_idx == q_idx) | (k_idx == q_idx - 12) | ((k_idx < 18) & (q_idx > 33)) | (k_idx > q_idx + 60)"
GAPS = "(k_idx <= q_idx) & (k_idx > q_idx - 4) & (q_idx > 20) & (head > 0)"
RANGES = {
    "sinks": SINKS,
    "per_head": PER_HEAD,
    "prefix": PREFIX,
    "two_sided": TWO_SIDED,
    "four": FOUR,
    "gaps": GAPS,
}


def attention(**fields) -> AttentionSpec:
    mask = symbols.mask_text(fields.pop("mask", ""))
    return AttentionSpec(**({"head_dim": 16, "value_dim": 16, "block_m": TILE, "block_n": TILE, "mask": mask} | fields))


def check(spec: AttentionSpec, inputs, lists=None, table=None, scale=0.3, **gradients) -> tuple[Tensor, Tensor]:
    """Forward, and backward where gradients are named, against float64. lists: counts, indices. -> out, lse"""
    q, k = inputs[:2]
    lengths = (q.shape[2], k.shape[2])
    pairs = visible_pairs(q, k, spec.mask, table)
    forward, backward = (None, None, table), (None, None, None, None, table)
    if lists is not None:
        pairs = torch.ones(1, 1, 1, 1, dtype=torch.bool) if pairs is None else pairs
        pairs = listed_pairs(*lists, (spec.block_q, spec.block_k), pairs[(None,) * (4 - pairs.dim())], lengths)
        forward = (*lists, table)
        backward = (*lists, *transposed_lists(*lists, -(-lengths[1] // spec.block_k)), table)
    out, lse = load(spec, "triton-interpret").launch(*inputs, scale, *forward)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    expected = Expected(inputs, grad, scale, "", spec.normalizer, pairs)
    close("out", out, expected.out, expected.out_bound)
    if spec.normalizer == "softmax":
        close("lse", lse, expected.lse, expected.lse_bound)
    if not gradients:
        return out, lse
    wanted = {name: value for name, value in gradients.items() if value is not None}
    launch = load(AttentionBackwardSpec(**dataclasses.asdict(spec), **wanted), "triton-interpret").launch
    dq, dk, dv, dbias, dshift = launch(grad, *inputs, out, lse, scale, None, *backward)
    close("dq", dq, expected.dq, expected.dq_bound)
    close("dk", dk, expected.dk, expected.dk_bound)
    close("dv", dv, expected.dv, expected.dv_bound)
    if wanted.get("grad_bias"):
        close("dbias", dbias, expected.dbias, expected.dz_bound.sum_to_size(inputs[3].shape))
    if wanted.get("grad_shift"):
        bound = expected.dz_bound.sum(-1, keepdim=True).sum_to_size(inputs[4].shape)
        close("dshift", dshift[..., None].sum_to_size(inputs[4].shape), expected.dshift, bound)
    return out, lse


# --------------------------------------------------------------------------------------------------------- ranges


@pytest.mark.parametrize(
    ("name", "fields"), [("two_sided", {"normalizer": "sigmoid"}), ("four", {}), ("gaps", GROUPED)]
)
def test_ranges(name: str, fields: dict[str, Any]) -> None:
    spec = attention(mask=RANGES[name], **fields)
    check(spec, make_inputs(spec, (37, 50), 1, 1, "heads_last", 1), grad_bias=False)


LENGTHS = [(0, 5), (5, 0), (1, 90), (50, 33), (49, 64)]


@pytest.mark.grid
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", RANGES)
def test_ranges_at_many_lengths(name: str, lengths: tuple[int, int]) -> None:
    kinds = (GROUPED, {"bias": "float32", "bias_rows": False}, {"normalizer": "sigmoid", "shift": True})
    spec = attention(mask=RANGES[name], **kinds[(sum(lengths) + len(name)) % 3])
    wanted = {"grad_bias": spec.additive, "grad_bias_rows": not spec.additive, "grad_shift": spec.shift}
    check(spec, make_inputs(spec, lengths, 2, 1, "plain", 2), **wanted)


@pytest.mark.grid
@pytest.mark.parametrize("fields", [{}, SHIFTED], ids=["softmax", "sigmoid"])
def test_a_table_without_lists(fields: dict[str, Any]) -> None:
    spec = attention(mask=f"({DOCUMENTS}) | (k_idx < 2)", **fields)
    check(spec, make_inputs(spec, (50, 33), 1, 1, "plain", 2), None, table_of(50), grad_shift=spec.shift)


def test_what_lies_between_ranges_is_not_read() -> None:
    """Values that nobody needs are NaN: a visit would show, since 0 times NaN is NaN."""
    never = "(k_idx > 60) & (k_idx < 120) & (q_idx > 40)"
    spec = attention(mask=f"(k_idx < 3) | ((k_idx > q_idx + 150) & (k_idx < q_idx + 190)) | ({never})")
    inputs = make_inputs(spec, (5, 220), 1, 1, "plain", 1)
    inputs[1][:, :, TILE:144] = inputs[2][:, :, TILE:144] = torch.nan
    inputs[1][:, :, 208:] = inputs[2][:, :, 208:] = torch.nan
    out, lse = load(spec, "triton-interpret").launch(*inputs, 0.3)
    assert bool(out.isfinite().all())
    grads = load(AttentionBackwardSpec(**dataclasses.asdict(spec)), "triton-interpret").launch(
        torch.ones_like(out), *inputs, out, lse, 0.3
    )
    assert bool(grads[0].isfinite().all())


# ---------------------------------------------------------------------------------------------------- block lists


def drawn_lists(
    mask: str, table: Tensor | None, sizes: tuple[int, int, int, int], blocks: tuple[int, int], seed: int, keep: float
) -> tuple[Tensor, Tensor]:
    """Lists of about ``keep`` of the blocks, full where the mask shows a whole block. sizes: Bl, Hl, Lq, Lk."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads, q_len, k_len = sizes
    (block_q, block_k), grid = blocks, (-(-q_len // blocks[0]), -(-k_len // blocks[1]))
    q, k = torch.empty(batch, heads, q_len, 1), torch.empty(batch, heads, k_len, 1)
    visible = visible_pairs(q, k, mask, table)
    visible = torch.ones(q_len, k_len, dtype=torch.bool) if visible is None else visible
    padded = torch.ones(batch, heads, grid[0] * block_q, grid[1] * block_k, dtype=torch.bool)
    padded[:, :, :q_len, :k_len] = visible
    full = padded.view(batch, heads, grid[0], block_q, grid[1], block_k).all(5).all(3)
    listed = torch.rand(batch, heads, *grid, generator=generator) < keep
    # Some entries say partial of a block that is full: nothing may hang on it.
    lazy = torch.rand(batch, heads, *grid, generator=generator) < 0.3
    states = listed.to(torch.uint8) * (1 + (full & ~lazy).to(torch.uint8))
    counts, indices = block_lists(states)
    return counts, indices[..., : max(1, int(counts.max())) if counts.numel() else 1].contiguous()


DOCUMENTS = "(table(q_idx) == table(k_idx)) & (k_idx <= q_idx)"
GRAPH = "(table(5 * table(q_idx) + table(k_idx) + 100) > 0) & (head + k_idx < 30)"


def table_of(length: int) -> Tensor:
    """Which of up to five segments a token belongs to, then from 100 on which segment sees which."""
    sees = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 1], [1, 0, 0, 0, 1]])
    return torch.cat([torch.arange(100) * 5 // max(length, 20) % 5, sees.flatten()]).to(torch.int32)


LISTS = {
    # mask, blocks, batch, key heads, lists for (batches, heads), fields
    "plain": ("", (32, 16), 1, 1, (1, 2), GROUPED),
    "ahead": ("k_idx > q_idx - 12", (16, 32), 2, 1, (2, 1), {}),
    "documents": (DOCUMENTS, (32, 32), 1, 1, (1, 1), SHIFTED | {"bias": "float32"}),
    "segments": (GRAPH, (16, 16), 2, 1, (1, 1), {"bias": "float32", "bias_rows": False}),
}


def check_lists(name: str, lengths: tuple[int, int], backward: bool, seed: int = 2, keep: float = 0.6) -> None:
    mask, blocks, batch, key_heads, (batches, heads), fields = LISTS[name]
    spec = attention(mask=mask, block_q=blocks[0], block_k=blocks[1], **fields)
    inputs = make_inputs(spec, lengths, batch, key_heads, "heads_last", seed)
    table = table_of(max(lengths)) if spec.table else None
    lists = drawn_lists(spec.mask, table, (batches, heads, *lengths), blocks, seed, keep)
    wanted = {"grad_bias": spec.additive, "grad_bias_rows": spec.bias_rows, "grad_shift": spec.shift}
    check(spec, inputs, lists, table, **(wanted if backward else {}))


@pytest.mark.parametrize("name", LISTS)
def test_lists(name: str) -> None:
    check_lists(name, (35, 41), True)


@pytest.mark.grid
@pytest.mark.parametrize("keep", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", LISTS)
def test_lists_at_many_lengths(name: str, lengths: tuple[int, int], keep: float) -> None:
    check_lists(name, lengths, True, seed=3, keep=keep)


def test_blocks_that_are_not_listed_are_not_read() -> None:
    spec = attention(block_q=16, block_k=16)
    inputs = make_inputs(spec, (40, 64), 1, 1, "plain", 1)
    inputs[1][:, :, 16:32] = inputs[2][:, :, 16:32] = torch.nan
    states = torch.tensor([[[2, 0, 2, 0], [0, 0, 0, 0], [0, 0, 0, 2]]], dtype=torch.uint8)[None]
    out, lse = load(spec, "triton-interpret").launch(*inputs, 0.3, *block_lists(states))
    assert bool(out.isfinite().all()) and not out[:, :, 16:32].any() and bool(out[:, :, 32:].any())
    assert bool((lse[:, :, 16:32] == -torch.inf).all())


# ------------------------------------------------------------------------------------- few queries and many keys


@pytest.mark.parametrize(("name", "splits"), [("sinks", 5), ("causal", 1), ("list", 3), ("additive", 5)])
def test_programs_that_share_keys(name: str, splits: int) -> None:
    """Parts without a visible key, parts that only reach into a range, and rows that see nothing."""
    end = "k_idx <= q_idx + k_len - q_len"
    fields = {
        "sinks": {"mask": f"({end}) & ((k_idx < 4) | (k_idx > q_idx + k_len - q_len - 40))", "group": 2},
        "causal": {"mask": f"({end}) & (q_idx > 0)"},
        "list": {"mask": end, "block_q": 16, "block_k": 32, "normalizer": "sigmoid"},
        "additive": {"bias": "float32"},
    }[name]
    spec = attention(**fields)
    inputs = make_inputs(spec, (3, 100), 1, 1, "plain", 1)
    lists = drawn_lists(spec.mask, None, (1, 1, 3, 100), (16, 32), 1, 0.8) if spec.lists else None
    if spec.additive:
        inputs[3][:, :, 1] = torch.finfo(torch.float32).min
        inputs[3][:, :, 2, :40] = -torch.inf
    split = spec.for_few_queries()
    launch = load(split, "triton-interpret").launch
    out, lse = launch(*inputs, 0.3, *(lists or (None, None)), None, splits=splits)
    whole, whole_lse = load(spec, "triton-interpret").launch(*inputs, 0.3, *(lists or (None, None)))
    torch.testing.assert_close(out, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("lengths", "target", "shared"),
    [
        ((1, 1024), "triton-interpret", True),
        ((16, 5000), "triton-interpret", True),
        ((17, 5000), "triton-interpret", False),
        ((1, 1023), "triton-interpret", False),
        ((1, 5000), "cpp", False),
    ],
)
def test_calls_with_few_queries_and_many_keys_choose_it(lengths, target, shared, monkeypatch) -> None:
    chosen = []

    def remember(spec: AttentionSpec, *rest: Any) -> SimpleNamespace:
        chosen.append(spec)
        return SimpleNamespace(launch=None)

    monkeypatch.setattr(attention_kernel, "load_best", remember)
    q, k = torch.empty(1, 4, lengths[0], 64), torch.empty(1, 2, lengths[1], 64)
    options = {"scale": 0.1, "mask": "k_idx <= q_idx", "normalizer": "softmax", "target": target}
    attention_kernel._forward_kernel(q, k, k, None, None, **options)
    assert chosen[0].split == shared and chosen[0].group == 2 and chosen[0].mask == "k_idx <= q_idx"
