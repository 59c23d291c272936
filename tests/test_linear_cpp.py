"""Linear layers on the native kernel: float64 on every instruction set, packed weights that change, torch's rules."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from golden import check_golden
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from tilewright.codegen.linear import LinearSpec
from tilewright.codegen.render import render
from tilewright.codegen.spec import SpecError
from tilewright.runtime import cpu, errors, load, packing
from tilewright.runtime.ops import gated_mlp, linear, linear_fused

SPECS = {
    "bf16": LinearSpec("bfloat16", "none"),
    "bf16-gelu": LinearSpec("bfloat16", "gelu"),
    "bf16-gated": LinearSpec("bfloat16", "gelu_tanh", gated=True),
    "f32-gelu": LinearSpec("float32", "gelu"),
    "f32-gated": LinearSpec("float32", "silu", gated=True),
    "f16-relu": LinearSpec("float16", "relu"),
}
MORE_SPECS = {
    f"{dtype}-{activation}": LinearSpec(dtype, activation)
    for dtype in ("bfloat16", "float32", "float16")
    for activation in ("silu", "gelu_tanh", "sigmoid", "relu")
}


def activation_of(spec):
    return gated_mlp.ACTIVATIONS.get(spec.activation, lambda y: y)


def expected(spec, x, weights, biases, residual):
    """In float64, rounded nowhere."""
    parts = [
        functional.linear(x.double(), w.double(), None if b is None else b.double())
        for w, b in zip(weights, biases, strict=True)
    ]
    act = activation_of(spec)
    out = act(parts[0]) * parts[1] if spec.gated else act(torch.cat(parts, -1))
    return out if residual is None else out + residual.double()


def check(spec, x, weights, biases, residual, store=None):
    out = load.load(spec, "cpp").launch(x, weights, biases, residual, *([] if store is None else [store]))
    wanted = expected(spec, x, weights, biases, residual)
    assert out.shape == wanted.shape and out.dtype == x.dtype and out.is_contiguous()
    bound = linear_fused.op.tolerance[x.dtype]
    torch.testing.assert_close(out.double(), wanted, atol=bound.atol, rtol=bound.rtol)


def operands(spec, M, K, N, parts, bias, residual, generator):
    dtype = getattr(torch, spec.dtype)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    count = 2 if spec.gated else parts
    weights = [(normal(N + (0 if spec.gated else i), K) / math.sqrt(max(K, 1))).to(dtype) for i in range(count)]
    biases = [normal(w.size(0)).to(dtype) if bias and i % 2 == 0 else None for i, w in enumerate(weights)]
    width = N if spec.gated else sum(w.size(0) for w in weights)
    return normal(M, K).to(dtype), weights, biases, normal(M, width).to(dtype) if residual else None


shapes = {
    "M": st.sampled_from([0, 1, 2, 4, 5, 16, 17, 33, 70, 300]),
    "K": st.sampled_from([0, 1, 2, 31, 32, 33, 100, 384, 577]),
    "N": st.sampled_from([0, 1, 15, 16, 17, 32, 33, 64, 100]),
    "parts": st.integers(1, 3),
    "bias": st.booleans(),
    "residual": st.booleans(),
    "seed": st.integers(0, 2**20),
}


@pytest.mark.parametrize("name", SPECS)
def test_kernel_against_float64_on_every_instruction_set(name, cpu_isa):
    @given(**shapes)
    @settings(max_examples=40)
    def inner(M, K, N, parts, bias, residual, seed):
        generator = torch.Generator().manual_seed(seed)
        check(SPECS[name], *operands(SPECS[name], M, K, N, parts, bias, residual, generator))

    inner()


@pytest.mark.parametrize("name", MORE_SPECS)
@pytest.mark.parametrize("rows", [3, 40])
def test_every_activation(name, rows):
    spec = MORE_SPECS[name]
    x, weights, biases, _ = operands(spec, rows, 70, 50, 1, True, False, torch.Generator().manual_seed(0))
    check(spec, x * 3, weights, biases, None)


@pytest.mark.parametrize("K", [384, 576, 1536])
@pytest.mark.parametrize("name", ["bf16-gelu", "f32-gated"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_sizes_of_models(name, K, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(SPECS[name], *operands(SPECS[name], 530, K, 192, 3, True, True, torch.Generator().manual_seed(K)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("name", ["bf16", "f32-gelu"])
def test_strides(name, rows):
    spec = SPECS[name]
    x, (weight,), _, _ = operands(spec, rows, 64, 48, 1, False, False, torch.Generator().manual_seed(1))
    bias, residual = weight[:, 3], torch.randn(rows, 96).to(x.dtype)
    for view in (
        x,
        x.t().contiguous().t(),
        torch.cat([x, x], 1)[:, 64:],
        x.expand(3, rows, 64),
        torch.stack([x, -x], 1)[:, 1],
        x.reshape(1, rows, 1, 64),
    ):
        wide = residual.expand(*view.shape[:-2], rows, 96) if view.dim() < 4 else residual.reshape(1, rows, 1, 96)
        for w in (weight, weight.t().contiguous().t(), torch.cat([weight, weight], 1)[:, :64]):
            check(spec, view, [w], [bias], wide[..., ::2])


SPECIAL = [math.inf, -math.inf, math.nan, 3.2e38, -1e-39]


@pytest.mark.parametrize("where", ["x", "weight", "both"])
@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("name", ["f32-gelu", "bf16-gelu"])
def test_values_that_are_not_finite_stay_where_they_belong(name, rows, where, cpu_isa):
    spec = LinearSpec(SPECS[name].dtype)
    x, (weight,), _, _ = operands(spec, rows, 40, 33, 1, False, False, torch.Generator().manual_seed(2))
    for i, value in enumerate(SPECIAL):
        if where != "weight":
            x[i % rows, 3 * i] = value
        if where != "x":
            weight[4 * i, 5 * i + 1] = value
    out = load.load(spec, "cpp").launch(x, [weight], [None])
    wanted = functional.linear(x.double(), weight.double()).to(x.dtype)
    torch.testing.assert_close(out, wanted, equal_nan=True, atol=2.0**-6, rtol=2.0**-6)


def test_float32_in_slices_is_as_exact_as_float32():
    """The matrix unit multiplies bfloat16: three slices a number have to give float32's error, at all exponents too."""
    generator = torch.Generator().manual_seed(3)
    x, (weight,), _, _ = operands(SPECS["f32-gelu"], 64, 1536, 64, 1, False, False, generator)
    x = x * 2.0 ** torch.randint(-40, 40, x.shape[:1], generator=generator)[:, None]
    exact = functional.linear(x.double(), weight.double())
    size = functional.linear(x.double().abs(), weight.double().abs())
    ours = load.load(LinearSpec("float32"), "cpp").launch(x, [weight], [None]).double()
    torchs = functional.linear(x, weight).double()
    error, bound = ((ours - exact).abs() / size).max().item(), ((torchs - exact).abs() / size).max().item()
    assert error <= max(2 * bound, 2.0**-22), f"{error:.2e} of the sum of magnitudes; torch {bound:.2e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_activation_bounds(dtype):
    """Every bfloat16 value through gelu, silu, tanh-gelu and sigmoid: K = 1 and a weight of one."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = bits[bits.isfinite() & (bits.abs() >= 2.0**-126)].to(dtype)[:, None]
    one = torch.ones(1, 1, dtype=dtype)
    for activation, reference in gated_mlp.ACTIVATIONS.items():
        out = load.load(LinearSpec(str(dtype)[6:], activation), "cpp").launch(x, [one], [None])
        wanted = reference(x.double())
        relative = 2.0**-8 + 2.0**-10 if dtype == torch.bfloat16 else 2.0**-20
        torch.testing.assert_close(out.double(), wanted, rtol=relative, atol=2e-6)


# Packed weights.

needs_tiles = pytest.mark.skipif("amx" not in cpu.supported(), reason="only the matrix unit reads packed weights")


@pytest.fixture
def layer():
    packing.forget()
    torch.manual_seed(4)
    yield torch.nn.Linear(64, 48)
    packing.forget()


def call(layer, x):
    with torch.no_grad():
        return torch.ops.tilewright.linear(x, layer.weight, layer.bias, target="cpp")


def changes(layer):
    other = torch.nn.Linear(64, 48)
    yield lambda: layer.load_state_dict(other.state_dict())
    yield lambda: layer.weight.requires_grad_(False).copy_(torch.randn(48, 64))
    yield lambda: layer.weight.requires_grad_(True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)

    def step():
        layer(torch.randn(5, 64)).square().sum().backward()
        optimizer.step()

    yield step
    yield lambda: layer.weight.data.mul_(2)  # torch's version stays
    yield lambda: layer.weight.data.copy_(torch.randn(48, 64))
    yield lambda: setattr(layer, "weight", torch.nn.Parameter(torch.randn(48, 64)))
    yield lambda: layer.weight.detach().numpy().fill(0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_changes_is_packed_again(layer, dtype):
    layer.to(dtype)
    x = torch.randn(40, 64, dtype=dtype)

    def check_call():
        wanted = functional.linear(x.double(), layer.weight.double(), layer.bias.double())
        bound = linear.TOLERANCE[dtype]
        size = max(layer.weight.abs().max().item(), 1.0)  # training makes the weights large
        torch.testing.assert_close(call(layer, x).double(), wanted, atol=8 * size * bound.atol, rtol=bound.rtol)

    for change in changes(layer) if dtype == torch.float32 else [lambda: layer.weight.data.mul_(-1)]:
        for _ in range(2):
            check_call()
        change()
    check_call()


@needs_tiles
def test_packed_once_and_freed_with_the_weight(layer, monkeypatch):
    x = torch.randn(40, 64)
    fills = []
    pack = packing._pack
    monkeypatch.setattr(packing, "_pack", lambda size, fill: fills.append(size) or pack(size, fill))
    for _ in range(3):
        call(layer, x)
    assert len(fills) == 1 and packing.kept_bytes() == fills[0] == 64 * 64 * 6 + 64
    call(layer, torch.randn(2, 64))
    assert len(fills) == 1  # few rows need none
    del layer.weight
    gc.collect()
    assert packing.kept_bytes() == 0


@needs_tiles
def test_another_weight_at_the_same_address_is_not_mistaken():
    packing.forget()
    memory = torch.randn(48 * 64)
    x = torch.randn(40, 64)
    for _ in range(3):
        weight = torch.frombuffer(memory.numpy(), dtype=torch.float32).view(48, 64)
        with torch.no_grad():
            out = torch.ops.tilewright.linear(x, weight, None, target="cpp")
        torch.testing.assert_close(out, x @ weight.T, atol=1e-4, rtol=1e-4)
        del weight
        gc.collect()
        memory.normal_()


def test_inference_tensors_have_no_version(layer):
    with torch.inference_mode():
        weight = torch.randn(48, 64)
        x = torch.randn(40, 64)
        for _ in range(2):
            out = torch.ops.tilewright.linear(x, weight, None, target="cpp")
            torch.testing.assert_close(out, x @ weight.T, atol=1e-4, rtol=1e-4)
            weight.mul_(2)


# The ops.


def test_training_runs_the_reference(layer):
    x = torch.randn(40, 64, requires_grad=True)
    torch.ops.tilewright.linear(x, layer.weight, layer.bias, target="cpp").sum().backward()
    wanted = torch.autograd.grad(layer(x).sum(), x)[0]
    assert torch.equal(x.grad, wanted) and layer.weight.grad is not None and packing.kept_bytes() == 0


def test_autocast_decides_the_dtype(layer):
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        out = torch.ops.tilewright.linear(torch.randn(40, 64), layer.weight, layer.bias, target="cpp")
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("gated", [False, True])
def test_opcheck(gated):
    weights = [torch.randn(16, 24), torch.randn(16, 24)]
    args = (torch.randn(2, 5, 24), weights, [torch.randn(16), None], torch.randn(2, 5, 16 if gated else 32))
    with torch.no_grad():
        torch.library.opcheck(torch.ops.tilewright.linear_forward.default, (*args, "silu", gated, "cpp"))
        for target in ("cpp", "reference"):
            more = {"activation": "gelu", "gated": gated, "target": target}
            torch.library.opcheck(torch.ops.tilewright.linear_fused.default, args, more)


def test_the_fused_op_is_its_reference():
    weights = [torch.randn(16, 24), torch.randn(16, 24)]
    x, biases, residual = torch.randn(40, 24), [None, torch.randn(16)], torch.randn(40, 16)
    with torch.no_grad():
        out = torch.ops.tilewright.linear_fused(
            x, weights, biases, residual, activation="silu", gated=True, target="cpp"
        )
    wanted = functional.silu(x @ weights[0].T) * (x @ weights[1].T + biases[1]) + residual
    torch.testing.assert_close(out, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(4, 24, dtype=torch.float64)}, "x is float64"),
        ({"weights": [torch.randn(16, 24).bfloat16()]}, "weight 0 is torch.bfloat16, but x is torch.float32"),
        ({"weights": [torch.randn(16, 24, 1)]}, "two dimensions"),
        ({"weights": [torch.randn(16, 24)] * 9, "biases": [None] * 9}, "one to 8"),
        ({"target": "triton"}, "target 'triton'"),
    ],
)
def test_calls_without_a_kernel_say_why(change, message):
    call = {"x": torch.randn(4, 24), "weights": [torch.randn(16, 24)], "biases": [None], "target": "cpp"} | change
    with pytest.raises(errors.UnsupportedKernel, match=message):
        linear_fused.spec(**call)


def test_sizes_that_disagree_raise_as_torch_does():
    with torch.no_grad(), pytest.raises(RuntimeError, match="x and weight disagree: 23 and 24"):
        torch.ops.tilewright.linear(torch.randn(4, 23), torch.randn(16, 24), None, target="cpp")
    with pytest.raises(errors.BadArgument, match="'selu'"):
        linear_fused.reference(torch.randn(4, 24), [torch.randn(16, 24)], [None], activation="selu")
    with pytest.raises(SpecError, match="activation is 'selu'"):
        LinearSpec("float32", "selu")


@pytest.mark.parametrize("name", ["bf16-gelu", "f32-gated"])
def test_golden(name):
    check_golden("linear_" + name.replace("-", "_"), render(SPECS[name], "cpp"), ".cpp.txt")
