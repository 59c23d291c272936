"""Attention kernels on a GPU, compiled for real with the shipped tiles: ranges, lists, few queries, long inputs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attention_bounds import Expected, close, listed_pairs, make_inputs
from test_attention_sparse_triton import DOCUMENTS, RANGES, drawn_lists, table_of
from torch import Tensor

from tilewright.codegen import symbols
from tilewright.codegen.attention import AttentionSpec
from tilewright.runtime.load import load
from tilewright.runtime.ops import attention_kernel
from tilewright.runtime.ops.attention import TOLERANCE, visible_pairs
from tilewright.runtime.ops.block_lists import block_lists, transposed_lists
from tilewright.runtime.ops.block_states import BLOCK_STATES

pytestmark = pytest.mark.gpu
DEVICE, TARGET = "cuda", "triton"
END = symbols.mask_text("k_idx <= q_idx + k_len - q_len")


def on_gpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(DEVICE)


def check(mask: str, dtype: str, dim: int, lengths=(300, 417), blocks=(0, 0), **fields) -> None:
    """Forward and backward as a model gets them, against float64 on the CPU."""
    group, normalizer = fields.pop("group", 1), fields.pop("normalizer", "softmax")
    form = AttentionSpec(head_dim=dim, value_dim=dim, dtype=dtype, normalizer=normalizer, group=group, **fields)
    inputs = make_inputs(form, lengths, 2, 2, "heads_last", 1)
    given = [on_gpu(tensor) for tensor in inputs]
    table = table_of(max(lengths)) if "table(" in mask else None
    mask = symbols.mask_text(mask)
    pairs, lists, both = visible_pairs(*inputs[:2], mask, table), (None, None), (None,) * 4
    if blocks[0]:
        lists = drawn_lists(mask, table, (2, 1, *lengths), blocks, 1, 0.6)
        pairs = torch.ones(1, 1, dtype=torch.bool) if pairs is None else pairs
        pairs = listed_pairs(*lists, blocks, pairs[(None,) * (4 - pairs.dim())], lengths)
        both = tuple(on_gpu(t) for t in (*lists, *transposed_lists(*lists, -(-lengths[1] // blocks[1]))))
    options = {"mask": mask, "normalizer": normalizer, "target": TARGET}
    forward = attention_kernel.spec(*given, **options, blocks=blocks)
    backward = attention_kernel.backward_spec(
        forward, grad_bias=forward.additive, grad_bias_rows=forward.bias_rows, grad_shift=forward.shift,
        target=TARGET, large=attention_kernel.large_shared_memory(given[0].device),
    )  # fmt: skip
    out, lse = load(forward, TARGET).launch(*given, 0.3, *both[:2], on_gpu(table))
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    expected = Expected(inputs, grad, 0.3, "", normalizer, pairs)
    found = load(backward, TARGET).launch(grad.to(DEVICE), *given, out, lse, 0.3, None, *both, on_gpu(table))
    close("out", out.cpu(), expected.out, expected.out_bound)
    if normalizer == "softmax":
        close("lse", lse.cpu(), expected.lse, expected.lse_bound)
    for name, tensor in zip(("dq", "dk", "dv"), found[:3], strict=True):
        close(name, tensor.cpu(), getattr(expected, name), getattr(expected, f"{name}_bound"))
    if forward.additive:
        close("dbias", found[3].cpu(), expected.dbias, expected.dz_bound.sum_to_size(inputs[3].shape))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mask", ["", "k_idx <= q_idx", *RANGES.values()])
def test_ranges(mask: str, dtype: str) -> None:
    check(mask, dtype, 64, group=2)
    check(mask, dtype, 128)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("blocks", [(128, 128), (64, 32), (16, 256)])
@pytest.mark.parametrize("mask", ["", "k_idx <= q_idx", DOCUMENTS])
def test_block_lists(mask: str, blocks: tuple[int, int], dtype: str) -> None:
    check(mask, dtype, 64, blocks=blocks, group=2)
    check(mask, dtype, 128, blocks=blocks, bias="float32")
    check(mask, dtype, 80, blocks=blocks, normalizer="sigmoid", shift=True)


@pytest.mark.parametrize("lists", [False, True])
@pytest.mark.parametrize("queries", [1, 5, 16])
def test_few_queries(queries: int, lists: bool) -> None:
    form = AttentionSpec(dtype="bfloat16", mask=END, group=4, block_q=128 * lists, block_k=128 * lists)
    inputs = make_inputs(form, (queries, 5000), 1, 2, "plain", 1)
    given = [on_gpu(tensor) for tensor in inputs]
    found = drawn_lists(END, None, (1, 1, queries, 5000), (128, 128), 1, 0.5) if lists else (None, None)
    pairs = visible_pairs(*inputs[:2], END)
    if lists:
        pairs = listed_pairs(*found, (128, 128), pairs[None, None], (queries, 5000))
    spec = attention_kernel.spec(*given, mask=END, normalizer="softmax", target=TARGET, blocks=(128 * lists,) * 2)
    launch = load(spec.for_few_queries(), TARGET).launch
    out, lse = launch(*given, 0.3, *(on_gpu(t) for t in found))
    expected = Expected(inputs, torch.zeros_like(inputs[0]), 0.3, "", "softmax", pairs)
    close("out", out.cpu(), expected.out, expected.out_bound)
    close("lse", lse.cpu(), expected.lse, expected.lse_bound)


@pytest.mark.parametrize("mask", ["(k_idx <= q_idx) & ((k_idx < 4) | (k_idx > q_idx - 256))", "k_idx <= q_idx"])
def test_lists_of_a_mask_are_its_ranges_at_a_hundred_thousand_tokens(mask: str) -> None:
    length, mask = 100_000, symbols.mask_text(mask)
    generator = torch.Generator(DEVICE).manual_seed(0)
    q, k, v = (
        torch.randn(1, 2, length, 64, device=DEVICE, generator=generator).bfloat16().requires_grad_() for _ in range(3)
    )
    lists = block_lists(BLOCK_STATES(q, k, mask=mask, block_q=128, block_k=128))
    options = {"scale": 0.125, "mask": mask, "target": TARGET}
    one = torch.ops.tilewright.attention(q, k, v, **options)
    other = torch.ops.tilewright.block_attention(q, k, v, *lists, **options, block_q=128, block_k=128)
    grad = torch.randn(one.shape, device=DEVICE, generator=generator).to(one.dtype)
    tolerance = dataclasses.asdict(TOLERANCE[torch.bfloat16])
    torch.testing.assert_close(one, other, **tolerance)
    gradients = (torch.autograd.grad(out, (q, k, v), grad) for out in (one, other))
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() <= 2e-2 * b.abs().max()
