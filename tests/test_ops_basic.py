"""rms_norm, layer_norm, rope, gated_mlp and linear: values, gradients, torch.library contracts, symbolic sizes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tilewright.runtime import errors, ops

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
N = 32


def angles(rows, layout="rotate_half"):
    half = torch.rand(rows, N // 2, dtype=torch.float64) * 6.3
    return torch.cat([half, half], -1) if layout == "rotate_half" else half.repeat_interleave(2, -1)


def normal(*shape):
    return torch.randn(*shape)


def scale():
    return torch.rand(N) + 0.5


# Name -> op name, tensors for ``r`` rows, the other arguments.
CASES = {
    "rms_norm": ("rms_norm", lambda r: (normal(r, N), scale()), (1e-6,), {}),
    "rms_norm-llama": (
        "rms_norm",
        lambda r: (normal(r, N), scale()),
        (1e-6,),
        {"round_before_weight": True},
    ),
    "rms_norm-gemma": ("rms_norm", lambda r: (normal(r, N), torch.rand(N)), (1e-6,), {"weight_offset": 1.0}),
    "rms_norm-no-weight": ("rms_norm", lambda r: (normal(r, N), None), (1e-5,), {}),
    "layer_norm": (
        "layer_norm",
        lambda r: (normal(r, N) + 3, [N], scale(), torch.randn(N)),
        (1e-5,),
        {},
    ),
    "layer_norm-bare": ("layer_norm", lambda r: (normal(r, N), [N]), (), {}),
    "rope": ("rope", lambda r: (normal(r, N), (a := angles(r)).cos(), a.sin()), (), {}),
    "rope-interleaved": (
        "rope",
        lambda r: (normal(r, N), (a := angles(r, "interleaved")).cos(), a.sin()),
        (),
        {"layout": "interleaved"},
    ),
    **{
        f"gated_mlp-{name}": (
            "gated_mlp",
            lambda r: (normal(r, N) * 2, torch.randn(r, N)),
            (),
            {"activation": name},
        )
        for name in ("silu", "gelu", "gelu_tanh", "relu", "sigmoid")
    },
    "linear": ("linear", lambda r: (normal(r, N), torch.randn(8, N) / N**0.5, torch.randn(8)), (), {}),
    "linear-no-bias": ("linear", lambda r: (normal(r, N), torch.randn(8, N) / N**0.5), (), {}),
}
cases = pytest.mark.parametrize("case", CASES)


def call_arguments(case, dtype, rows=4):
    name, make, rest, kwargs = CASES[case]
    cast = lambda x: x.to(dtype) if isinstance(x, torch.Tensor) else x  # noqa: E731
    return ops.OPS[name], (*map(cast, make(rows)), *rest), kwargs


def widened(args):
    return tuple(a.double() if isinstance(a, torch.Tensor) else a for a in args)


def assert_within(op, actual, expected):
    tolerance = op.tolerance[actual.dtype]
    error, bound = (actual.double() - expected).abs(), tolerance.atol + tolerance.rtol * expected.abs()
    assert (error <= bound).all(), f"{(error - bound).max():.3g} over the bound"


@cases
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(rows=st.integers(0, 9), seed=st.integers(0, 2**31))
def test_within_tolerance_of_the_reference_in_float64(case, dtype, rows, seed):
    torch.manual_seed(seed)
    op, args, kwargs = call_arguments(case, dtype, rows)
    actual = op.overload(*args, **kwargs)
    assert actual.dtype == dtype
    assert_within(op, actual, op.reference(*widened(args), **kwargs))


@cases
def test_opcheck(case):
    op, args, kwargs = call_arguments(case, torch.float32)
    args = tuple(a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in args)
    torch.library.opcheck(op.overload, args, kwargs)


@cases
def test_gradients(case):
    op, args, kwargs = call_arguments(case, torch.float64, rows=2)
    args = tuple(a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in args)
    assert torch.autograd.gradcheck(lambda *a: op.overload(*a, **kwargs), args)


@cases
def test_no_target_but_the_reference(case):
    op, args, kwargs = call_arguments(case, torch.float32)
    with pytest.raises(errors.UnsupportedKernel, match=f"{op.name} has no kernel for target 'triton'"):
        op.overload(*args, **kwargs, target="triton")


@cases
def test_symbolic_sizes_and_dissolving_below_autograd(case, fresh_dynamo):
    op, args, kwargs = call_arguments(case, torch.float32)
    compiled = torch.compile(lambda *a: op.overload(*a, **kwargs), backend="aot_eager", dynamic=True, fullgraph=True)
    for rows in (4, 7):
        torch.manual_seed(rows)
        args = call_arguments(case, torch.float32, rows)[1]
        torch.testing.assert_close(compiled(*args), op.overload(*args, **kwargs), rtol=1e-6, atol=1e-6)


def test_rms_norm_equals_torch():
    x, weight = torch.randn(5, N), torch.rand(N)
    torch.testing.assert_close(ops.rms_norm.op.overload(x, weight, 1e-5), torch.rms_norm(x, [N], weight, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_is_llamas_and_gemmas_bit_for_bit(dtype):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama").LlamaRMSNorm(N, eps=1e-6).to(dtype)
    gemma = pytest.importorskip("transformers.models.gemma.modeling_gemma").GemmaRMSNorm(N, eps=1e-6).to(dtype)
    with torch.no_grad():
        llama.weight.normal_()
        gemma.weight.normal_()
    x = torch.randn(7, N, dtype=dtype)
    rms_norm = ops.rms_norm.op.overload
    assert torch.equal(rms_norm(x, llama.weight, 1e-6, round_before_weight=True), llama(x))
    assert torch.equal(rms_norm(x, gemma.weight, 1e-6, weight_offset=1.0), gemma(x))


@pytest.mark.parametrize("layout", ops.rope.LAYOUTS)
def test_rope_is_complex_multiplication(layout):
    x = torch.randn(6, N, dtype=torch.float64)
    half = torch.rand(6, N // 2, dtype=torch.float64) * 6.3
    if layout == "rotate_half":
        pairs, wide = torch.complex(x[:, : N // 2], x[:, N // 2 :]), torch.cat([half, half], -1)
    else:
        pairs, wide = torch.view_as_complex(x.reshape(6, N // 2, 2)), half.repeat_interleave(2, -1)
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(half), half))
    expected = torch.cat([turned[..., 0], turned[..., 1]], -1) if layout == "rotate_half" else turned.flatten(-2)
    torch.testing.assert_close(ops.rope.op.overload(x, wide.cos(), wide.sin(), layout=layout), expected)


def test_rope_broadcasts_over_heads():
    x, angle = torch.randn(2, 3, 5, N), torch.rand(1, 1, 5, N)
    out = ops.rope.op.overload(x, angle.cos(), angle.sin())
    assert out.shape == x.shape


def test_unknown_names_are_refused():
    x = torch.randn(2, N)
    with pytest.raises(errors.BadArgument, match="rope has no layout 'spiral'; use one of rotate_half, interleaved"):
        ops.rope.op.overload(x, x, x, layout="spiral")
    with pytest.raises(errors.BadArgument, match="gated_mlp has no activation 'mish'"):
        ops.gated_mlp.op.overload(x, x, activation="mish")


def test_a_linear_in_half_precision_accumulates_in_float32():
    # 4096 ones sum to 4096; accumulated in bfloat16 the sum would stall at 256.
    ones = torch.ones(1, 4096, dtype=torch.bfloat16)
    assert ops.linear.op.overload(ones, ones).item() == 4096
