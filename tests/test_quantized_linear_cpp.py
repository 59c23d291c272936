"""Linear layers with packed weights on the native kernel, few rows: float64 with bounds, every format, every ISA.

The bound of a sum. Let w be the exact weight, c = scale * (code - middle) its part that the kernel multiplies by x, and
s = w - c the rest, which multiplies the sum of x over the group. All sums are float32: n terms err by at most
(n + 8) u32 of the sum of their magnitudes. Where x is written as integers, each of them is off by at most 2^-22
(float32) or 2^-14 (bfloat16) of the largest of its block, and the block is part of a group. With more than FEW rows
of bfloat16 the matrix unit multiplies weights rounded to bfloat16, each off by at most 2^-8 of itself.
"""

from __future__ import annotations

import math

import pytest
import torch
from golden import check_golden
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.codegen.quantized_linear import FEW, QuantizedLinearSpec
from tilewright.codegen.render import render
from tilewright.codegen.weight_format import WeightFormat
from tilewright.runtime import errors, fast_call, load
from tilewright.runtime.ops import gated_mlp, quantized_linear, quantized_weight

U32 = 2.0**-24
STEP = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-14}
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
SLOPE = 1.13  # of an activation, at most

QUICK = {"4-offset": QuantizedLinearSpec("float32", 4, 32, "offset")}
GRID = {
    "3-point": QuantizedLinearSpec("bfloat16", 3, 64, "point", activation="silu", gated=True),
}
GRID |= {
    f"{dtype}-{bits}-{zero}-{group}": QuantizedLinearSpec(dtype, bits, group, zero, scales)
    for dtype, bits, zero, group, scales in (
        ("float32", 8, "middle", 0, "float32"),
        ("float32", 8, "point", 96, "float16"),
        ("float32", 4, "middle", 128, "float16"),
        ("float32", 3, "offset", 64, "float16"),
        ("float32", 2, "middle", 32, "float32"),
        ("float32", 2, "point", 544, "float16"),
        ("bfloat16", 8, "offset", 32, "float16"),
        ("bfloat16", 4, "point", 0, "float16"),
        ("bfloat16", 4, "middle", 64, "float32"),
        ("bfloat16", 2, "offset", 64, "float16"),
    )
}


def format_of(spec):
    return WeightFormat(spec.bits, spec.group, spec.zero, spec.scales, spec.activations, "panels")


def weight(fmt, N, K, generator):
    """codes, scale, zero in the layout ``panels``."""
    plain = fmt.changed(layout="plain")
    codes = torch.randint(0, 2**fmt.bits, (N, K), generator=generator, dtype=torch.uint8)
    shape, scales = (N, fmt.groups(K)), getattr(torch, fmt.scales)
    scale = ((torch.rand(shape, generator=generator) + 0.1) / fmt.levels / math.sqrt(max(K, 1))).to(scales)
    zero = None
    if fmt.zero == "point":
        zero = torch.randint(0, 2**fmt.bits, shape, generator=generator, dtype=torch.uint8)
    elif fmt.zero == "offset":
        zero = (torch.randn(shape, generator=generator) / math.sqrt(max(K, 1))).to(scales)
    packed = quantized_weight.pack(codes, plain)
    return quantized_weight.to_layout(packed, scale, zero, plain, N, K, "panels")


def sums_of(x, codes, scale, zero, fmt, N, K):
    """x W^T in float64 and the bound of a kernel's."""
    exact = quantized_weight.dequantize(codes, scale, zero, fmt, N, K, torch.float64)
    centred = fmt.changed(zero="middle")
    product = quantized_weight.dequantize(codes, scale, None, centred, N, K, torch.float64).abs()
    rest = (exact - quantized_weight.dequantize(codes, scale, None, centred, N, K, torch.float64)).abs()
    size = x.double().abs()
    padded = torch.nn.functional.pad(size, (0, -K % (fmt.group or max(K, 1))))
    most = (
        padded.unflatten(-1, (-1, fmt.group or max(K, 1)))
        .amax(-1, keepdim=True)
        .expand(-1, -1, fmt.group or max(K, 1))
        .flatten(1)[:, :K]
        if K
        else size
    )
    terms = (K + 8) * U32 * (size @ (product + 2 * rest).T)
    if x.dtype == torch.bfloat16 and x.shape[0] > FEW:
        terms = terms + UNIT[x.dtype] * (size @ exact.abs().T)
    return x.double() @ exact.T, terms + STEP[x.dtype] * (most @ product.T)


def expected(spec, x, weights, biases, residual, rows):
    """In float64, and how far a kernel may be from it."""
    fmt, unit = format_of(spec), 2 * UNIT[x.dtype]
    values, bounds = [], []
    for (codes, scale, zero), bias, N in zip(weights, biases, rows, strict=True):
        value, bound = sums_of(x, codes, scale, zero, fmt, N, x.shape[-1])
        values.append(value if bias is None else value + bias.double())
        bounds.append(bound + unit * values[-1].abs())
    if not spec.gated:
        values, bounds = [torch.cat(values, -1)], [torch.cat(bounds, -1)]
    if spec.activation != "none":
        bounds[0] = SLOPE * bounds[0] + 4e-6 + 2 * unit * values[0].abs()
        values[0] = gated_mlp.ACTIVATIONS[spec.activation](values[0])
    out, bound = values[0], bounds[0]
    if spec.gated:
        out, bound = (
            out * values[1],
            bound * values[1].abs() + bounds[1] * (out.abs() + bound) + unit * (out * values[1]).abs(),
        )
    if residual is not None:
        out = out + residual.double()
        bound = bound + unit * out.abs()
    return out, bound + 1e-30


def operands(spec, M, K, N, parts, bias, residual, generator):
    dtype = getattr(torch, spec.dtype)
    rows = [N, N] if spec.gated else [N + i for i in range(parts)]
    weights = [weight(format_of(spec), n, K, generator) for n in rows]

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    biases = [normal(n) if bias and i % 2 == 0 else None for i, n in enumerate(rows)]
    width = N if spec.gated else sum(rows)
    return normal(M, K), weights, biases, normal(M, width) if residual else None, rows


def launch(spec, x, weights, biases, residual, rows):
    codes, scales, zeros = ([w[i] for w in weights if w[i] is not None] for i in range(3))
    return load.load(spec, "cpp").launch(x, codes, scales, zeros, biases, residual, rows)


def check(spec, x, weights, biases, residual, rows):
    out = launch(spec, x, weights, biases, residual, rows)
    flat = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    wanted, bound = expected(spec, flat, weights, biases, residual, rows)
    assert out.dtype == x.dtype and out.is_contiguous() and out.shape[:-1] == x.shape[:-1]
    error = (out.double().reshape(wanted.shape) - wanted).abs()
    assert (error <= bound).all(), f"worst {(error / bound).max():.3g} of the bound"


SIZES = {
    "M": [0, 1, 2, 3, 4, 7, 8, 9, 33],
    "K": [1, 31, 32, 33, 100, 160, 384, 577, 1100],
    "N": [1, 15, 16, 17, 64, 100],
}


def draw(spec, sizes, examples, check):
    """``check`` a kernel on calls drawn from ``sizes``, of one to three weights, with and without bias and residual."""

    @given(
        **{name: st.sampled_from(values) for name, values in sizes.items()},
        parts=st.integers(1, 3),
        bias=st.booleans(),
        residual=st.booleans(),
        seed=st.integers(0, 2**20),
    )
    @settings(max_examples=examples)
    def inner(M, K, N, parts, bias, residual, seed):
        check(spec, *operands(spec, M, K, N, parts, bias, residual, torch.Generator().manual_seed(seed)))

    inner()


@pytest.mark.parametrize("name", QUICK)
def test_kernel_against_float64(name):
    draw(QUICK[name], SIZES, 40, check)


@pytest.mark.grid
@pytest.mark.parametrize("name", {**QUICK, **GRID})
def test_kernel_against_float64_on_every_instruction_set(name, cpu_isa):
    draw({**QUICK, **GRID}[name], SIZES, 40, check)


@pytest.mark.grid
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_more_threads_than_one(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for M, K, N in ((1, 576, 960), (3, 1536, 576), (1, 64, 48), (17, 577, 33)):
            check(
                QUICK["4-offset"],
                *operands(QUICK["4-offset"], M, K, N, 2, True, True, torch.Generator().manual_seed(M)),
            )
    finally:
        torch.set_num_threads(before)


def special(spec):
    """x whose rows have an infinity, NaN, a number that times a code overflows, and nothing but tiny numbers."""
    x, weights, biases, residual, rows = operands(spec, 6, 100, 33, 2, True, True, torch.Generator().manual_seed(2))
    for row, value in enumerate((math.inf, -math.inf, math.nan, 2.9e38)):
        x[row, 7 * row + 1] = value
    x[4] = x[4] * 1e-36
    x[5, 3], x[5, 40] = math.inf, -math.inf
    return x, weights, biases, residual, rows


@pytest.mark.parametrize("name", ["4-offset", pytest.param("3-point", marks=pytest.mark.grid)])
def test_values_that_are_not_finite_stay_where_they_belong(name):
    spec = {**QUICK, **GRID}[name]
    for take in (slice(0, 6), slice(0, 1), slice(2, 4), slice(4, 5)):
        x, weights, biases, residual, rows = special(spec)
        x = x[take]
        residual = residual[take]
        out = launch(spec, x, weights, biases, residual, rows)
        codes, scales, zeros = ([w[i] for w in weights if w[i] is not None] for i in range(3))
        wanted = quantized_linear.reference(
            x.double(),
            codes,
            scales,
            zeros,
            [None if b is None else b.double() for b in biases],
            residual.double(),
            rows=rows,
            format=format_of(spec).text(),
            activation=spec.activation,
            gated=spec.gated,
        ).to(x.dtype)
        torch.testing.assert_close(out, wanted, equal_nan=True, atol=2.0**-5, rtol=2.0**-5)


def test_strides():
    spec = QUICK["4-offset"]
    x, weights, biases, _, rows = operands(spec, 3, 64, 48, 1, True, False, torch.Generator().manual_seed(1))
    wanted = launch(spec, x, weights, biases, None, rows)
    for view in (
        x.t().contiguous().t(),
        torch.cat([x, x], 1)[:, 64:],
        x.reshape(1, 3, 1, 64),
        torch.stack([-x, x], 1)[:, 1],
    ):
        assert torch.equal(launch(spec, view, weights, biases, None, rows).reshape(3, 48), wanted)
    residual = torch.randn(3, 96)[:, ::2]
    out = launch(spec, x, weights, biases, residual, rows)
    assert torch.equal(out, launch(spec, x, weights, biases, residual.contiguous(), rows))


def call(spec, x, weights, biases, residual, rows, target="cpp", **changes):
    codes, scales, zeros = ([w[i] for w in weights if w[i] is not None] for i in range(3))
    given = {"codes": codes, "scales": scales, "zeros": zeros, "biases": biases, **changes}
    return torch.ops.tilewright.quantized_linear(
        x,
        given["codes"],
        given["scales"],
        given["zeros"],
        given["biases"],
        residual,
        rows=rows,
        format=format_of(spec).text(),
        activation=spec.activation,
        gated=spec.gated,
        target=target,
    )


def test_the_op():
    spec = QUICK["4-offset"]
    x, weights, biases, residual, rows = operands(spec, 3, 70, 33, 2, True, True, torch.Generator().manual_seed(3))
    codes, scales, zeros = ([w[i] for w in weights] for i in range(3))
    with torch.no_grad():
        ours, reference = (call(spec, x, weights, biases, residual, rows, target) for target in ("cpp", "reference"))
        torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-5)
        args = (x, codes, scales, zeros, biases, residual, rows, format_of(spec).text(), "none", False, "cpp")
        torch.library.opcheck(torch.ops.tilewright.quantized_linear_forward.default, args)
        for change, message in (
            ({"codes": [codes[0], codes[1][:, :1]]}, "codes has shape"),
            ({"scales": [scales[0].float(), scales[1]]}, "scale is torch.float32"),
        ):
            with pytest.raises(RuntimeError, match=message):
                call(spec, x, weights, biases, residual, rows, **change)
        with pytest.raises(errors.BadArgument, match="zeros"):
            call(spec, x, weights, biases, residual, rows, zeros=[])
    leaf = x.clone().requires_grad_()
    call(spec, leaf, weights, biases, residual, rows).sum().backward()
    assert leaf.grad is not None


def test_calls_skip_python_with_and_without_biases():
    assert fast_call.prepare()
    spec = QUICK["4-offset"]
    for bias, seed in ((True, 5), (False, 6)):
        x, weights, biases, residual, rows = operands(
            spec, 1, 64, 32, 2, bias, True, torch.Generator().manual_seed(seed)
        )
        codes, scales, zeros = ([w[i] for w in weights] for i in range(3))
        args = (codes, scales, zeros, biases, residual, rows, format_of(spec).text(), "none", False, "cpp")
        with torch.no_grad():
            for _ in range(2 * fast_call.TRY_EVERY):
                torch.ops.tilewright.quantized_linear_forward(x, *args)
            before = fast_call.calls_without_python()
            other = torch.randn_like(x)
            out = torch.ops.tilewright.quantized_linear_forward(other, *args)
        assert fast_call.calls_without_python() == before + 1
        assert torch.equal(out, launch(spec, other, weights, biases, residual, rows))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 64, dtype=torch.float64)}, "x is float64"),
        ({"x": torch.randn(2, 64, dtype=torch.float16)}, "float16 activations"),
        ({"format": WeightFormat(8, kind="float8_e4m3fn").text()}, "float8"),
        ({"format": WeightFormat(4).text()}, "layout 'panels'"),
        ({"biases": [torch.randn(32).bfloat16()]}, "bias 0 is torch.bfloat16, but x is torch.float32"),
        ({"target": "cuda"}, "target 'cuda'"),
    ],
)
def test_calls_without_a_kernel_say_why(change, message):
    fmt = WeightFormat(4, layout="panels")
    codes, scale, _ = weight(fmt, 32, 64, torch.Generator().manual_seed(0))
    given = {"x": torch.randn(2, 64), "codes": [codes], "scales": [scale], "zeros": [], "biases": [None]}
    given |= {"rows": [32], "format": fmt.text(), "target": "cpp"} | change
    with pytest.raises(errors.UnsupportedKernel, match=message):
        quantized_linear.spec(**given)


@pytest.mark.parametrize("name", ["4-offset", "3-point"])
def test_golden(name):
    check_golden("quantized_linear_" + name.replace("-", "_"), render({**QUICK, **GRID}[name], "cpp"), ".cpp.txt")
