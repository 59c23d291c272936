"""The native attention backward kernel against float64, within the bounds of attention_bounds.py, for each instruction
set of this CPU. out and lse come from float64, so that the forward kernel has no part in it."""

from __future__ import annotations

import contextlib

import pytest
import torch
from attention_bounds import Expected, close, make_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tilewright.codegen.attention import CPP_TILES, AttentionBackwardSpec
from tilewright.runtime import cpu
from tilewright.runtime import settings as runtime_settings
from tilewright.runtime.load import forget, load
from tilewright.runtime.ops.attention import reference

CAUSAL, END = "k_idx <= q_idx", "k_idx <= q_idx + k_len - q_len"
WINDOW = "(k_idx <= q_idx) & (k_idx > q_idx - 21)"
SINKS, BLOCKS, HOLES = "(k_idx <= 2) | (k_idx > q_idx - 5)", "k_idx // 8 == q_idx // 8", "k_idx != q_idx + head"
Inputs = list[Tensor | None]


def make_spec(**fields) -> AttentionBackwardSpec:
    return AttentionBackwardSpec(**fields).with_tiles(CPP_TILES)


def launch(spec: AttentionBackwardSpec, isa: str, *arguments) -> tuple:
    with runtime_settings.override(cpu_isa=isa):
        return kernel(spec, isa)(*arguments)


@contextlib.contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_LOADED: dict = {}


def kernel(spec: AttentionBackwardSpec, isa: str):
    """Loaded kernels are kept by spec and target alone, not by instruction set."""
    if (spec, isa) not in _LOADED:
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
    make_spec(head_dim=5, value_dim=16, dtype="float16", normalizer="sigmoid", mask=SINKS, group=2),
    make_spec(head_dim=64, value_dim=40, dtype="bfloat16", normalizer="sigmoid", shift=True, grad_shift=True, mask=END),
    make_spec(head_dim=16, value_dim=16, bias="bool", mask=BLOCKS, group=2),
    make_spec(head_dim=80, value_dim=80, dtype="bfloat16", bias="bool"),
    make_spec(head_dim=16, value_dim=24, bias="float32", grad_bias=True, mask=HOLES),
    make_spec(head_dim=16, value_dim=32, dtype="bfloat16", bias="bfloat16", grad_bias=True, mask=CAUSAL, group=2),
    # So wide that the cache holds one tile of keys at once.
    make_spec(head_dim=256, value_dim=200, dtype="bfloat16", mask=CAUSAL),
    make_spec(head_dim=200, value_dim=256, normalizer="sigmoid", mask=WINDOW, group=2),
    make_spec(
        head_dim=8, value_dim=8, dtype="bfloat16", normalizer="sigmoid", shift=True, bias="float32", grad_bias=True,
        grad_shift=True,
    ),
]  # fmt: skip
# Tiles hold 64 queries and 192 keys, or 128 of both.
LENGTHS = [0, 1, 2, 13, 31, 64, 65, 128, 129, 193, 260]


# Only bfloat16 has tiles of its own for AMX.
PAIRS = [(spec, isa) for spec in SPECS for isa in cpu.supported() if isa != "amx" or spec.dtype == "bfloat16"]


@pytest.mark.parametrize(
    ("spec", "isa"), PAIRS, ids=lambda it: it if isinstance(it, str) else f"{it.dtype}-{it.normalizer}-{it.head_dim}"
)
@given(data=st.data())
@settings(max_examples=5)
def test_matches_float64(spec, isa, data):
    lengths = data.draw(st.tuples(st.sampled_from(LENGTHS), st.sampled_from(LENGTHS)), label="lengths")
    layout = data.draw(st.sampled_from(["plain", "heads_last", "transposed", "strided"]), label="layout")
    batch, heads = data.draw(st.sampled_from([(1, 1), (2, 1), (1, 3)]), label="batch, key heads")
    with threads(data.draw(st.sampled_from([1, 2, 3]), label="threads")):
        check(spec, make_inputs(spec, lengths, batch, heads, layout, data.draw(st.integers(0, 99), label="seed")), isa)


DTYPES = ["float32", "bfloat16"]
# Most tests run the best instruction set of this CPU, or that and the least one.
BEST = cpu.supported()[0]
TWO = tuple(dict.fromkeys((BEST, cpu.supported()[-1])))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    "shape",
    [(2, 4, 70, 210), (1, 4, 70, 210), (2, 1, 70, 210), (1, 1, 70, 210), (2, 4, 1, 210), (1, 1, 1, 210)],
    ids=["full", "batch", "heads", "batch-heads", "queries", "all"],
)
def test_bias_gradient_is_summed_over_what_is_broadcast(shape, normalizer, dtype):
    """Where it is summed over heads or batch, threads share out the tiles of keys, and dq is joined from theirs."""
    rows = shape[2] != 1
    spec = make_spec(
        head_dim=16, value_dim=16, dtype=dtype, normalizer=normalizer, mask="k_idx <= q_idx + 140", group=2,
        bias="float32", grad_bias=True, grad_bias_rows=rows,
    )  # fmt: skip
    inputs = make_inputs(spec, (70, 210), 2, 2, "heads_last", 3)
    inputs[3] = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    for count in (1, 2, 5):
        with threads(count):
            first, again = (check(spec, inputs, BEST) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first[:4], again[:4], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 4, 1, 1), (2, 4, 19, 1)])
def test_shift_gradient(shape, dtype):
    spec = make_spec(head_dim=16, value_dim=16, dtype=dtype, normalizer="sigmoid", shift=True, grad_shift=True, group=2)
    inputs = make_inputs(spec, (19, 421), 2, 2, "plain", 3)
    inputs[4] = torch.randn(shape, generator=torch.Generator().manual_seed(5)) - 3
    for count in (1, 3, 16):
        with threads(count):
            check(spec, inputs, BEST)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", [CAUSAL, WINDOW, SINKS, ""])
def test_one_head_is_shared_by_threads_and_the_result_is_the_same_every_time(mask, dtype):
    spec = make_spec(head_dim=16, value_dim=16, dtype=dtype, mask=mask)
    inputs = make_inputs(spec, (300, 1100), 1, 1, "plain", 3)
    for count in (1, 2, 4):
        with threads(count):
            first, again = (check(spec, inputs, BEST) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3], strict=True))


@pytest.mark.parametrize("isa", TWO)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid"])
@pytest.mark.parametrize("how", ["bool", "float", "mask"])
def test_queries_that_see_nothing_have_zero_gradients(how, normalizer, dtype, isa):
    kind = {"bool": "bool", "float": "float32", "mask": "none"}[how]
    spec = make_spec(
        head_dim=16, value_dim=16, dtype=dtype, normalizer=normalizer, mask="q_idx > 4" if how == "mask" else "",
        bias=kind, grad_bias=how == "float",
    )  # fmt: skip
    inputs = make_inputs(spec, (20, 18), 1, 1, "plain", 3)
    if how == "bool":
        inputs[3][:, :, :5] = False
    elif how == "float":
        inputs[3][:, :, :5] = float("-inf")
    dq, _, _, dbias, _ = check(spec, inputs, isa)
    assert not dq[:, :, :5].any() and bool(dq[:, :, 5:].any())
    assert dbias is None or not dbias[:, :, :5].any()


@pytest.mark.parametrize("isa", TWO)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid"])
def test_nan_and_infinity_go_where_the_reference_sends_them(normalizer, dtype, isa):
    """Within a tile all pairs meet, hidden ones with weight zero: as in the reference, NaN reaches their sums too."""
    spec = make_spec(head_dim=16, value_dim=16, dtype=dtype, normalizer=normalizer)
    for name, position, value in ((0, 3, float("nan")), (1, 7, float("nan")), (2, 2, float("inf"))):
        inputs = make_inputs(spec, (20, 18), 1, 2, "plain", 3)
        inputs[name][0, 1, position, 2] = value
        q, k, v, bias, shift = inputs
        exact = [t.double().requires_grad_() for t in (q, k, v)]
        out = reference(*exact, scale=0.3, normalizer=normalizer)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(q.dtype)
        expected = torch.autograd.grad(out, exact, grad.double())
        lse = (0.3 * exact[0] @ exact[1].mT).logsumexp(-1).detach().float()
        found = launch(spec, isa, grad, q, k, v, bias, shift, out.detach().to(q.dtype), lse, 0.3)
        for own, other in zip(found[:3], expected, strict=True):
            assert torch.equal(own.isnan(), other.isnan()), (
                f"{name}: {own.isnan().sum()} NaN, not {other.isnan().sum()}"
            )
            assert torch.equal(own.isinf(), other.isinf())
            keep = other.isfinite()
            torch.testing.assert_close(own.double()[keep], other[keep], rtol=0.02, atol=0.02)


def test_sigmoid_at_its_ends():
    """Scores of +-inf and far out have weights of exactly one or zero, and no gradient by the score."""
    spec = make_spec(head_dim=16, value_dim=16, normalizer="sigmoid", bias="float32", grad_bias=True)
    for isa in cpu.supported():
        inputs = make_inputs(spec, (20, 18), 1, 1, "plain", 3)
        inputs[3][0, 0, :, :6] = torch.tensor([float("-inf"), float("inf"), -1e30, 1e30, -3.4e38, -120.0])
        dbias = check(spec, inputs, isa)[3]
        assert not dbias[..., :5].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_at_float32s_minimum_is_finite(dtype):
    """A query that sees nothing else: its lse no longer tells keys apart, and it has no gradient."""
    spec = make_spec(head_dim=16, value_dim=16, dtype=dtype, bias="float32", grad_bias=True)
    inputs = make_inputs(spec, (20, 20), 1, 2, "plain", 3)
    inputs[3] = torch.zeros(1, 1, 20, 20)
    inputs[3][..., 2, :] = inputs[3][..., 3, 1:] = torch.finfo(torch.float32).min
    q, k, v, bias, _ = inputs
    scores = 0.3 * q.double() @ k.double().mT + bias
    out = scores.softmax(-1) @ v.double()
    for isa in cpu.supported():
        found = launch(spec, isa, torch.ones_like(q), *inputs, out.to(q.dtype), scores.logsumexp(-1).float(), 0.3)
        assert all(bool(gradient.isfinite().all()) for gradient in found[:4])
        assert not found[0][:, :, 2].any() and bool(found[0][:, :, 4:].any())


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_lse_and_an_expanded_gradient(dtype):
    spec = make_spec(head_dim=16, value_dim=16, dtype=dtype, mask=CAUSAL, group=2)
    q, k, v, _, _ = inputs = make_inputs(spec, (70, 70), 1, 2, "plain", 3)
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    scores = 0.3 * exact[0] @ exact[1].repeat_interleave(2, 1).mT
    scores = scores.masked_fill(~torch.ones(70, 70).tril().bool(), float("-inf"))
    out, lse = scores.softmax(-1) @ exact[2].repeat_interleave(2, 1), scores.logsumexp(-1)
    grad = torch.tensor(0.5).to(q.dtype).expand(out.shape)
    grad_lse = torch.randn(1, 4, 70, generator=torch.Generator().manual_seed(7))
    expected = torch.autograd.grad((out * grad).sum() + (lse * grad_lse).sum(), exact)
    found = launch(spec, BEST, grad, *inputs, out.detach().to(q.dtype), lse.detach().float(), 0.3, grad_lse)
    tolerance = 5e-5 if dtype == "float32" else 0.04
    for own, other in zip(found[:3], expected, strict=True):
        torch.testing.assert_close(own.double(), other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("change", [{}, {"normalizer": "sigmoid"}, {"mask": CAUSAL, "group": 2}, {"bias": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_training_through_the_operator(dtype, change):
    """Forward and backward through autograd, against the reference's gradients in float64."""
    normalizer, mask, group = (change.get(key, default) for key, default in KEYS)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, 45, 24, generator=generator).to(dtype).requires_grad_()
        for heads in (4, 4 // group, 4 // group)
    )
    bias = torch.randn(1, 4, 45, 45, generator=generator).requires_grad_() if change.get("bias") else None
    options = {"scale": 0.2, "mask": mask, "normalizer": normalizer}
    out = torch.ops.tilewright.attention(q, k, v, bias, **options, target="cpp")
    leaves = [q, k, v] + ([bias] if bias is not None else [])
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = reference(*exact, **options)
    grad = torch.randn(out.shape, generator=generator).to(dtype)
    tolerance = {torch.float32: 5e-5, torch.bfloat16: 0.06, torch.float16: 0.01}[dtype]
    torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=tolerance)
    expected = torch.autograd.grad(wanted, exact, grad.double())
    for own, other in zip(torch.autograd.grad(out, leaves, grad), expected, strict=True):
        torch.testing.assert_close(own.double(), other, rtol=tolerance, atol=tolerance)


KEYS = (("normalizer", "softmax"), ("mask", ""), ("group", 1))


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid"])
def test_opcheck(normalizer):
    q, k, v = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3))
    options = {"scale": 0.3, "mask": CAUSAL, "normalizer": normalizer, "target": "cpp"}
    torch.library.opcheck(torch.ops.tilewright.attention_forward, (q, k, v, None, None), options)
    with torch.no_grad():
        out, lse = torch.ops.tilewright.attention_forward(q, k, v, None, None, **options)
        arguments = (torch.randn_like(out), q.detach(), k.detach(), v.detach(), None, None, out, lse, None)
        more = {"grad_bias": False, "grad_shift": False}
        torch.library.opcheck(torch.ops.tilewright.attention_backward, arguments, options | more)
