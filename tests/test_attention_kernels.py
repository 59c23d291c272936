"""The attention kernels under Triton's interpreter against float64, within the bounds of attention_bounds.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attention_bounds import Expected, close, make_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.codegen.attention import AttentionBackwardSpec, AttentionSpec
from tilewright.runtime.load import load

TILE = 16
CAUSAL, END = "k_idx <= q_idx", "k_idx <= q_idx + k_len - q_len"
WINDOW = "(k_idx <= q_idx) & (k_idx > q_idx - 21)"
MASKS = ["", CAUSAL, END, WINDOW, "(k_idx <= 2) | (k_idx > q_idx - 5)", "k_idx // 8 == q_idx // 8"]


def forward(spec, inputs, scale=0.3):
    return load(spec, "triton-interpret").launch(*inputs, scale)


def check(spec: AttentionSpec, inputs, scale=0.3, **gradients) -> None:
    """Forward and backward of the kernels of ``spec`` against float64."""
    out, lse = forward(spec, inputs, scale)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    expected = Expected(inputs, grad, scale, spec.mask, spec.normalizer)
    close("out", out, expected.out, expected.out_bound)
    if spec.normalizer == "softmax":
        close("lse", lse, expected.lse, expected.lse_bound)
    if not gradients:
        return
    backward = AttentionBackwardSpec(
        **dataclasses.asdict(spec), **{k: v for k, v in gradients.items() if v is not None}
    )
    dq, dk, dv, dbias, dshift = load(backward, "triton-interpret").launch(grad, *inputs, out, lse, scale)
    close("dq", dq, expected.dq, expected.dq_bound)
    close("dk", dk, expected.dk, expected.dk_bound)
    close("dv", dv, expected.dv, expected.dv_bound)
    if backward.grad_bias:
        close("dbias", dbias, expected.dbias, expected.dz_bound.sum_to_size(inputs[3].shape))
    if backward.grad_shift:
        dshift = dshift[..., None].sum_to_size(inputs[4].shape)
        close("dshift", dshift, expected.dshift, expected.dz_bound.sum(-1, keepdim=True).sum_to_size(inputs[4].shape))


@st.composite
def cases(draw, biases=("none", "bool", "float32", "same")):
    """A spec with tiles of 16 and inputs around its edges: lengths 0, 1, odd and over a tile, padded head dims."""
    dtype = draw(st.sampled_from(["float32", "float32", "bfloat16", "float16"]))
    normalizer = draw(st.sampled_from(["softmax", "sigmoid"]))
    bias = draw(st.sampled_from(biases))
    spec = AttentionSpec(
        head_dim=draw(st.sampled_from([5, 16, 24])),
        value_dim=draw(st.sampled_from([16, 9])),
        dtype=dtype,
        normalizer=normalizer,
        mask=draw(st.sampled_from(MASKS)),
        bias=dtype if bias == "same" else bias,
        bias_rows=bias == "none" or draw(st.booleans()),
        shift=normalizer == "sigmoid" and draw(st.booleans()),
        group=draw(st.sampled_from([1, 2])),
        block_m=TILE,
        block_n=TILE,
        wide=draw(st.booleans()),
    )
    length = st.sampled_from([0, 1, 2, 13, 16, 17, 31, 37])
    lengths = (draw(length), draw(length))
    layout = draw(st.sampled_from(["plain", "heads_last", "transposed", "strided"]))
    return spec, make_inputs(spec, lengths, draw(st.sampled_from([1, 2])), 1, layout, draw(st.integers(0, 99)))


@given(cases())
@settings(max_examples=25)
def test_forward_matches_float64(case):
    check(*case)


@given(cases(biases=("none", "bool")))
@settings(max_examples=12)
def test_backward_matches_float64(case):
    spec, inputs = case
    check(spec, inputs, grad_shift=spec.shift)


@pytest.mark.parametrize("head_dim", [16, 80, 96])
@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid"])
def test_head_dims_that_are_padded(head_dim, normalizer):
    spec = AttentionSpec(
        head_dim=head_dim, value_dim=head_dim, normalizer=normalizer, mask=CAUSAL, block_m=TILE, block_n=TILE
    )
    check(spec, make_inputs(spec, (19, 21), 1, 1, "heads_last", 1), grad_shift=False)


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    "shape",
    [(2, 4, 19, 21), (1, 4, 19, 21), (2, 1, 19, 21), (1, 1, 19, 21), (2, 4, 1, 21), (1, 1, 1, 21)],
    ids=["full", "batch", "heads", "batch-heads", "queries", "all"],
)
def test_bias_gradient_is_summed_over_what_is_broadcast(shape, normalizer):
    rows = shape[2] != 1
    spec = AttentionSpec(
        head_dim=16, value_dim=16, normalizer=normalizer, mask="k_idx <= q_idx + 4", group=2, bias="float32",
        bias_rows=rows, block_m=TILE, block_n=TILE,
    )  # fmt: skip
    inputs = make_inputs(spec, (19, 21), 2, 2, "heads_last", 3)
    inputs[3] = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    check(spec, inputs, grad_bias=True, grad_bias_rows=rows)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 4, 1, 1), (2, 4, 19, 1)])
def test_shift_gradient(shape):
    spec = AttentionSpec(
        head_dim=16, value_dim=16, normalizer="sigmoid", shift=True, group=2, block_m=TILE, block_n=TILE
    )
    inputs = make_inputs(spec, (19, 21), 2, 2, "plain", 3)
    inputs[4] = torch.randn(shape, generator=torch.Generator().manual_seed(5)) - 3
    check(spec, inputs, grad_shift=True)


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid"])
@pytest.mark.parametrize("how", ["bool", "float", "mask"])
def test_queries_that_see_nothing_give_zeros(how, normalizer):
    """SDPA's convention: zeros, lse -inf, and no gradient; never NaN."""
    kind = {"bool": "bool", "float": "float32", "mask": "none"}[how]
    spec = AttentionSpec(
        head_dim=16, value_dim=16, normalizer=normalizer, mask="q_idx > 4" if how == "mask" else "", bias=kind,
        block_m=TILE, block_n=TILE,
    )  # fmt: skip
    inputs = make_inputs(spec, (20, 18), 1, 1, "plain", 3)
    if how == "bool":
        inputs[3][:, :, :5] = False
    elif how == "float":
        inputs[3][:, :, :5] = float("-inf")
    check(spec, inputs, grad_shift=False)
    out, lse = forward(spec, inputs)
    assert not out[:, :, :5].any() and bool(out[:, :, 5:].any())
    if normalizer == "softmax":
        assert bool((lse[:, :, :5] == float("-inf")).all())


def test_expanded_and_strided_bias_is_read_in_place():
    spec = AttentionSpec(head_dim=16, value_dim=16, bias="float32", bias_rows=False, block_m=TILE, block_n=TILE)
    inputs = make_inputs(spec, (18, 20), 2, 2, "plain", 3)
    row = torch.randn(2, 1, 1, 40)[..., ::2]
    inputs[3] = row.expand(2, 2, 18, 20)
    out, _ = forward(spec, inputs)
    inputs[3] = row.contiguous()
    assert torch.equal(out, forward(spec, inputs)[0])


def test_large_scores_do_not_overflow():
    spec = AttentionSpec(head_dim=16, value_dim=16, block_m=TILE, block_n=TILE)
    inputs = make_inputs(spec, (18, 20), 1, 1, "plain", 3)
    inputs[0] *= 1e3
    out, _ = forward(spec, inputs, 10.0)
    assert bool(out.isfinite().all())
    hidden = dataclasses.replace(spec, normalizer="sigmoid")
    assert bool(forward(hidden, inputs, 10.0)[0].isfinite().all())


def test_gradient_of_lse():
    """The backward takes a gradient by lse as well: what merging partial attentions needs."""
    spec = AttentionSpec(head_dim=16, value_dim=16, mask=CAUSAL, block_m=TILE, block_n=TILE)
    q, k, v, _, _ = inputs = make_inputs(spec, (18, 20), 1, 1, "plain", 3)
    out, lse = forward(spec, inputs)
    grad, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    backward = AttentionBackwardSpec(**dataclasses.asdict(spec))
    launch = load(backward, "triton-interpret").launch
    dq, dk, dv, _, _ = launch(grad, *inputs, out, lse, 0.3, grad_lse)
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    scores = (0.3 * exact[0] @ exact[1].mT).masked_fill(~torch.ones(18, 20).tril().bool(), float("-inf"))
    loss = (scores.softmax(-1) @ exact[2] * grad).sum() + (scores.logsumexp(-1) * grad_lse).sum()
    for found, expected in zip((dq, dk, dv), torch.autograd.grad(loss, exact), strict=True):
        torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_at_the_dtypes_minimum_is_finite(dtype: torch.dtype) -> None:
    """Models hide keys with it; a query that sees nothing else gives the mean of the values, as in the model."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 2, 20, 16, generator=generator).to(dtype) for _ in range(3))
    bias = torch.zeros(1, 1, 20, 20)
    bias[..., 2, :] = bias[..., 3, 1:] = torch.finfo(dtype).min
    bias[..., 4, :] = -torch.inf
    spec = AttentionSpec(
        head_dim=16, value_dim=16, dtype=str(dtype).removeprefix("torch."), bias="float32", bias_rows=True,
        block_m=TILE, block_n=TILE,
    )  # fmt: skip
    out, lse = forward(spec, (q, k, v, bias, None))
    tolerance = {"rtol": 0, "atol": 1e-6 if dtype is torch.float32 else 2e-2}
    torch.testing.assert_close(out[:, :, 2].float(), v.float().mean(2), **tolerance)
    torch.testing.assert_close(out[:, :, 3].float(), v[:, :, 0].float(), **tolerance)
    assert not out[:, :, 4].any()
    backward = AttentionBackwardSpec(**dataclasses.asdict(spec))
    gradients = load(backward, "triton-interpret").launch(torch.ones_like(out), q, k, v, bias, None, out, lse, 0.3)
    assert all(torch.isfinite(gradient.float()).all() for gradient in gradients[:3])
    assert not gradients[0][:, :, [2, 4]].any()
