"""Gradients of the attention ops under every mask: the references by torch's gradcheck in float64, then the native
kernels, forward and backward together, through the public ops against those gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from tilewright.codegen import symbols
from tilewright.runtime.ops.block_lists import block_lists

OPS = torch.ops.tilewright
SCALE = 0.4
MASKS = {
    "all": "",
    "causal": "causal",
    "window": "causal & window(5)",
    "two-sided": "window(4, 3)",
    "sinks": "causal & (window(5) | sinks(2))",
    "prefix": "prefix(4)",
    "dilated": "causal & dilated(3)",
    "blocks": "blocks(4)",
    "block-causal": "block_causal(6)",
    "neighbourhood": "neighbourhood(4, 4, 1)",
    "per-head": "causal & ((k_idx > q_idx - 3 * head - 2) | (k_idx < 1 + head))",
    "not-window": "causal & ~window(4)",
    "not-causal": "~causal",
    # Queries and keys that see nothing and that nobody sees.
    "few": "window(2) & (q_idx > 3) & (head > 0)",
}
TABLE_MASKS = {
    "documents": "causal & (table(q_idx) == table(k_idx))",
    "edges": "table(3 * table(q_idx) + table(k_idx) + q_len + k_len) > 0",
    "bitmap": "table(3 * (q_idx // 8) + k_idx // 16 + 2) > 1",
}


def make_leaves(
    q_len: int, k_len: int, dim: int = 2, value_dim: int = 3, batch: int = 1, group: int = 2
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(q_len + k_len)

    def leaf(heads: int, length: int, channels: int) -> Tensor:
        shape = (batch, heads, length, channels)
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    return [leaf(2 * group, q_len, dim), leaf(2, k_len, dim), leaf(2, k_len, value_dim)]


def make_table(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    documents = torch.randint(0, 3, (length,), generator=generator).sort()[0]
    return torch.cat([documents, torch.randint(0, 2, (9,), generator=generator)]).to(torch.int32)


def draw_states(q: Tensor, k: Tensor, block_q: int, block_k: int, heads: int, seed: int = 0) -> Tensor:
    """Some tiles empty, some partial and some full; where there are three of them, a column is empty."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, heads, -(-q.shape[2] // block_q), -(-k.shape[2] // block_k))
    states = torch.randint(0, 3, shape, generator=generator, dtype=torch.uint8)
    if shape[3] > 2:
        states[..., 1] = 0
    return states


def finite(lse: Tensor) -> Tensor:
    return lse.masked_fill(lse == -math.inf, 0.0)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_attention(mask: str) -> None:
    def every(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out, lse = OPS.attention_lse(q, k, v, scale=SCALE, mask=mask)
        sigmoid = OPS.attention(q, k, v, scale=SCALE, mask=mask, normalizer="sigmoid")
        return OPS.attention(q, k, v, scale=SCALE, mask=mask), out, finite(lse), sigmoid

    assert gradcheck(every, make_leaves(7, 9), fast_mode=True)


@pytest.mark.grid
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_attention_input_by_input(mask: str) -> None:
    assert gradcheck(lambda q, k, v: OPS.attention(q, k, v, scale=SCALE, mask=mask), make_leaves(7, 9))


@pytest.mark.parametrize("mask", (MASKS | TABLE_MASKS).values(), ids=MASKS | TABLE_MASKS)
def test_block_attention(mask: str) -> None:
    q, k, v = leaves = make_leaves(20, 35)
    table = make_table(55) if "table" in mask else None
    lists = block_lists(draw_states(q, k, 16, 16, 4))
    options = {"scale": SCALE, "mask": mask, "block_q": 16, "block_k": 16}

    def every(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out, lse = OPS.block_attention_lse(q, k, v, *lists, table=table, **options)
        sigmoid = OPS.block_attention(q, k, v, *lists, table=table, normalizer="sigmoid", **options)
        return OPS.block_attention(q, k, v, *lists, table=table, **options), out, finite(lse), sigmoid

    assert gradcheck(every, leaves, fast_mode=True)


def test_bias_and_shift() -> None:
    q, k, v = make_leaves(20, 35)
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(1, 1, 20, 35, generator=generator, dtype=torch.float64).requires_grad_()
    shift = torch.randn(1, 4, 1, 1, generator=generator, dtype=torch.float64).requires_grad_()
    lists = block_lists(draw_states(q, k, 16, 16, 1))
    options = {"scale": SCALE, "mask": "causal", "block_q": 16, "block_k": 16}

    def softmax(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return OPS.block_attention(q, k, v, *lists, bias, **options)

    def sigmoid(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
        return OPS.block_attention(q, k, v, *lists, bias, shift, normalizer="sigmoid", **options)

    assert gradcheck(softmax, (q, k, v, bias), fast_mode=True)
    assert gradcheck(sigmoid, (q, k, v, bias, shift), fast_mode=True)


def test_merge_attention() -> None:
    q, k, v = leaves = make_leaves(20, 35)
    states = draw_states(q, k, 16, 16, 1)
    parts = [block_lists(torch.where(keep, states, 0)) for keep in halves(states)]
    options = {"scale": SCALE, "mask": "causal", "block_q": 16, "block_k": 16}

    def merged(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        first, second = (OPS.block_attention_lse(q, k, v, *lists, **options) for lists in parts)
        out, lse = OPS.merge_attention(*first, *second)
        return out, finite(lse)

    assert gradcheck(merged, leaves, fast_mode=True)


def halves(states: Tensor) -> tuple[Tensor, Tensor]:
    """Every other tile of a row, and the rest."""
    even = torch.arange(states.shape[-1]) % 2 == 0
    return even.expand(states.shape), ~even.expand(states.shape)


# -------------------------------------------------------------------------------------------------- native kernels


def compare(
    function: Callable[..., tuple[Tensor, ...]], leaves: list[Tensor], tolerance: float, dtype: torch.dtype
) -> None:
    """Outputs and gradients of ``function(target, *inputs)`` in ``dtype`` on native kernels and in float64."""
    results = []
    for target, kind in (("reference", torch.float64), ("cpp", dtype)):
        inputs = [leaf.detach().to(dtype).to(kind).requires_grad_() for leaf in leaves]
        outputs = function(target, *inputs)
        generator = torch.Generator().manual_seed(3)
        grads = [
            torch.randn(out.shape, generator=generator, dtype=torch.float64).to(dtype).to(out.dtype) for out in outputs
        ]
        results.append((*outputs, *torch.autograd.grad(outputs, inputs, grads)))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def wide_mask(mask: str) -> str:
    """The mask with longer windows, which leave something to see in tiles and blocks of every size."""
    return mask.replace("(5)", "(69)").replace("(4)", "(55)").replace("window(4, 3)", "window(90, 33)")


def merged_halves(mask: str, table: Tensor | None, block_q: int, block_k: int) -> Callable[..., tuple[Tensor, ...]]:
    """Attention over lists, and the same lists cut into two halves and merged: outputs and lse of both."""

    def function(target: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        states = draw_states(q, k, block_q, block_k, q.shape[1], seed=2)
        options = {"scale": SCALE, "mask": mask, "block_q": block_q, "block_k": block_k, "target": target}
        first, second = (
            OPS.block_attention_lse(q, k, v, *block_lists(torch.where(keep, states, 0)), table=table, **options)
            for keep in halves(states)
        )
        out, lse = OPS.merge_attention(*first, *second)
        return OPS.block_attention(q, k, v, *block_lists(states), table=table, **options), out, finite(lse)

    return function


def test_block_attention_and_merge_on_native_kernels() -> None:
    """Fully masked rows, lists of each head, a table, log-sum-exps that are merged and have a gradient of their own."""
    table = make_table(470)
    function = merged_halves(TABLE_MASKS["documents"], table, 32, 64)
    for lengths in ((200, 270), (270, 200), (5, 300)):
        compare(function, make_leaves(*lengths, 16, 24, batch=2), 3e-5, torch.float32)


@pytest.mark.grid
def test_attention_and_its_lse_on_native_kernels() -> None:
    def function(target: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        options = {"scale": SCALE, "mask": "causal & (window(70) | sinks(4)) & (q_idx > 2)", "target": target}
        out, lse = OPS.attention_lse(q, k, v, **options)
        return OPS.attention(q, k, v, **options), out, finite(lse)

    for lengths in ((200, 270), (270, 200)):
        compare(function, make_leaves(*lengths, 16, 24), 3e-5, torch.float32)


@pytest.mark.grid
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_attention_on_native_kernels(mask: str, dtype: torch.dtype) -> None:
    def function(target: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out, lse = OPS.attention_lse(q, k, v, scale=SCALE, mask=wide_mask(mask), target=target)
        return out, finite(lse)

    for lengths in ((200, 270), (270, 200)):
        compare(function, make_leaves(*lengths, 16, 24), 3e-5 if dtype == torch.float32 else 0.06, dtype)


@pytest.mark.grid
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", (MASKS | TABLE_MASKS).values(), ids=MASKS | TABLE_MASKS)
def test_block_attention_on_native_kernels(mask: str, dtype: torch.dtype) -> None:
    blocks = ((16, 32), (64, 128), (128, 64))[len(mask) % 3]
    function = merged_halves(wide_mask(mask), make_table(470) if "table" in mask else None, *blocks)
    for lengths in ((200, 270), (270, 200)):
        leaves = make_leaves(*lengths, 16, 24, batch=2)
        compare(function, leaves, 3e-5 if dtype == torch.float32 else 0.06, dtype)


def test_masks_differ_where_they_are_checked() -> None:
    """A sweep over masks that came out alike would check one mask many times."""
    texts = [symbols.mask_text(mask) for mask in (MASKS | TABLE_MASKS).values()]
    assert len(set(texts)) == len(texts)
