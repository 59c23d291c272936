"""The native attention backward kernel against float64, within the bounds of attention_bounds.py, for each instruction
set of this CPU. out and lse come from float64, so that the forward kernel has no part in it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attention_bounds import Expected, close, make_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tilewright.codegen.attention import CPP_TILES, AttentionBackwardSpec
from tilewright.runtime import cpu
from tilewright.runtime import settings as runtime_settings
from tilewright.runtime.load import load

CAUSAL, END = "k_idx <= q_idx", "k_idx <= q_idx + k_len - q_len"
WINDOW = "(k_idx <= q_idx) & (k_idx > q_idx - 21)"
MASKS = [
    "",
    CAUSAL,
    END,
    WINDOW,
    "(k_idx <= 2) | (k_idx > q_idx - 5)",
    "k_idx // 8 == q_idx // 8",
    "k_idx != q_idx + head",
]
ISAS = ("amx", "avx512", "avx2", "baseline", "neon")
Inputs = list[Tensor | None]


def make_spec(**fields) -> AttentionBackwardSpec:
    return AttentionBackwardSpec(**fields).with_tiles(CPP_TILES)


def launch(spec: AttentionBackwardSpec, isa: str, *arguments) -> tuple:
    if isa not in cpu.supported():
        pytest.skip(f"this CPU has no {isa}")
    with runtime_settings.override(cpu_isa=isa):
        return kernel(spec, isa)(*arguments)


_LOADED: dict = {}


def kernel(spec: AttentionBackwardSpec, isa: str):
    """Loaded kernels are kept by spec and target alone, not by instruction set."""
    if (spec, isa) not in _LOADED:
        from tilewright.runtime.load import forget

        forget()
        _LOADED[spec, isa] = load(spec, "cpp").launch
        forget()
    return _LOADED[spec, isa]


def check(
    spec: AttentionBackwardSpec, inputs: Inputs, isa: str, scale: float = 0.3, grad: Tensor | None = None
) -> tuple:
    """All gradients of ``spec`` against float64."""
    q, v = inputs[0], inputs[2]
    if grad is None:
        generator = torch.Generator().manual_seed(7)
        grad = torch.randn(*q.shape[:3], v.shape[3], generator=generator).to(q.dtype)
    expected = Expected(inputs, grad, scale, spec.mask, spec.normalizer)
    found = launch(spec, isa, grad, *inputs, expected.out.to(q.dtype), expected.lse.float(), scale)
    dq, dk, dv, dbias, dshift = found
    close("dq", dq, expected.dq, expected.dq_bound)
    close("dk", dk, expected.dk, expected.dk_bound)
    close("dv", dv, expected.dv, expected.dv_bound)
    assert (dbias is not None, dshift is not None) == (spec.grad_bias, spec.grad_shift)
    if spec.grad_bias:
        close("dbias", dbias, expected.dbias, expected.dz_bound.sum_to_size(inputs[3].shape))
    if spec.grad_shift:
        dshift = dshift[..., None].sum_to_size(inputs[4].shape)
        close("dshift", dshift, expected.dshift, expected.dz_bound.sum(-1, keepdim=True).sum_to_size(inputs[4].shape))
    return found


SPECS = [
    make_spec(head_dim=24, value_dim=9, mask=CAUSAL, group=2),
    make_spec(head_dim=33, value_dim=64, dtype="bfloat16", mask=WINDOW),
    make_spec(head_dim=5, value_dim=16, dtype="float16", normalizer="sigmoid", mask=MASKS[4], group=2),
    make_spec(head_dim=64, value_dim=40, dtype="bfloat16", normalizer="sigmoid", shift=True, grad_shift=True, mask=END),
    make_spec(head_dim=16, value_dim=16, bias="bool", mask=MASKS[5], group=2),
    make_spec(head_dim=80, value_dim=80, dtype="bfloat16", bias="bool"),
    make_spec(head_dim=16, value_dim=24, bias="float32", grad_bias=True, mask=MASKS[6]),
    make_spec(head_dim=16, value_dim=32, dtype="bfloat16", bias="bfloat16", grad_bias=True, mask=CAUSAL, group=2),
    make_spec(head_dim=8, value_dim=8, dtype="bfloat16", normalizer="sigmoid", shift=True, bias="float32", grad_bias=True, grad_shift=True),
]  # fmt: skip
# Tiles hold 64 queries and 192 keys, or 128 of both.
LENGTHS = [0, 1, 2, 13, 31, 64, 65, 128, 129, 193, 260]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.dtype}-{spec.normalizer}-{spec.bias}-{spec.head_dim}")
@given(data=st.data())
@settings(max_examples=8)
def test_matches_float64(spec, isa, data):
    lengths = data.draw(st.tuples(st.sampled_from(LENGTHS), st.sampled_from(LENGTHS)), label="lengths")
    layout = data.draw(st.sampled_from(["plain", "heads_last", "transposed", "strided"]), label="layout")
    batch, heads = data.draw(st.sampled_from([(1, 1), (2, 1), (1, 3)]), label="batch, key heads")
    check(spec, make_inputs(spec, lengths, batch, heads, layout, data.draw(st.integers(0, 99), label="seed")), isa)
