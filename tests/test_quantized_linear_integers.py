"""Rows of x rounded to integers: dot products of integers and tiles of bytes against float64, within bounds."""

from __future__ import annotations

import math

import pytest
import torch
from test_quantized_linear_cpp import draw, format_of, launch, operands
from test_quantized_linear_tiles import check

from tilewright.codegen.quantized_linear import QuantizedLinearSpec
from tilewright.runtime import cpu, load
from tilewright.runtime import settings as runtime_settings
from tilewright.runtime.ops import quantized_linear

QUICK = {"8-point": QuantizedLinearSpec("float32", 8, 0, "point", activations=8)}
GRID = {
    f"{dtype}-{bits}-{zero}-{group}-{activations}": QuantizedLinearSpec(
        dtype, bits, group, zero, scales, activations=activations
    )
    for dtype, bits, zero, group, scales, activations in (
        ("bfloat16", 8, "middle", 0, "float32", 8),
        ("bfloat16", 4, "middle", 128, "float16", 8),
        ("bfloat16", 4, "point", 32, "float16", 8),
        ("bfloat16", 4, "offset", 128, "float16", 4),
        ("bfloat16", 3, "point", 192, "float16", 8),
        ("bfloat16", 2, "offset", 64, "float16", 8),
        ("float32", 8, "offset", 96, "float16", 8),
        ("float32", 4, "middle", 32, "float16", 4),
        ("float32", 3, "offset", 64, "float32", 8),
        ("float32", 2, "middle", 0, "float16", 8),
    )
} | {
    "gated": QuantizedLinearSpec("bfloat16", 4, 128, "point", activations=8, activation="silu", gated=True),
    "gated-32": QuantizedLinearSpec("float32", 8, 32, activations=8, activation="gelu", gated=True),
}

# More columns than a chunk of them, and more rows than a block.
SIZES = {
    "M": [0, 1, 2, 3, 4, 7, 9, 16, 17, 33, 70, 530],
    "K": [1, 31, 33, 64, 100, 577, 1100, 2100],
    "N": [1, 15, 16, 17, 33, 100],
}


def test_integers_against_float64():
    draw(QUICK["8-point"], SIZES, 30, check)


def test_integers_without_integer_instructions():
    if "baseline" not in cpu.supported():
        pytest.skip("this CPU has no baseline kernels")
    load.forget()
    try:
        with runtime_settings.override(cpu_isa="baseline"):
            draw(QUICK["8-point"], SIZES, 15, check)
    finally:
        load.forget()


@pytest.mark.grid
@pytest.mark.parametrize("name", {**QUICK, **GRID})
def test_every_format_against_float64(name, cpu_isa):
    draw({**QUICK, **GRID}[name], SIZES, 40, check)


@pytest.mark.parametrize("rows", [3, 40])
def test_numbers_between_two_integers_go_to_the_even_one(rows):
    """The step is 1 / 8, which the kernel has to find: a row's largest number is 127 / 8."""
    spec = QUICK["8-point"]
    _, weights, biases, _, counts = operands(spec, rows, 64, 20, 1, False, False, torch.Generator().manual_seed(0))
    x = (torch.randint(-126, 126, (rows, 64), generator=torch.Generator().manual_seed(1)) + 0.5) / 8
    x[:, 0] = 127 / 8
    check(spec, x, weights, biases, None, counts)


@pytest.mark.parametrize("rows", [4, 40])
def test_rows_that_are_not_finite_are_nan_and_rows_of_zeros_are_the_bias(rows):
    spec = QUICK["8-point"]
    x, weights, _, _, counts = operands(spec, rows, 100, 20, 1, False, False, torch.Generator().manual_seed(2))
    bias = torch.randn(20)
    x[0, 5], x[1, 99], x[2], x[3] = math.nan, -math.inf, 0.0, x[3] * 1e-42
    out = launch(spec, x, weights, [bias], None, counts)
    assert out[:2].isnan().all()
    assert torch.equal(out[2], bias)
    codes, scales, zeros = ([w[i] for w in weights] for i in range(3))
    wanted = quantized_linear.reference(x, codes, scales, zeros, [bias], rows=counts, format=format_of(spec).text())
    torch.testing.assert_close(out, wanted, equal_nan=True, atol=1e-5, rtol=1e-5)


def test_long_rows_of_the_largest_integers_do_not_overflow():
    """127 times a code of 255 exceeds 2^31 after 66,310 columns."""
    spec = QUICK["8-point"]
    K = 70_000
    _, weights, biases, _, counts = operands(spec, 1, K, 16, 1, False, False, torch.Generator().manual_seed(0))
    codes, scale, zero = weights[0]
    weights = [(torch.full_like(codes, 255), scale, torch.zeros_like(zero))]
    for rows in (1, 20):
        check(spec, torch.ones(rows, K), weights, biases, None, counts)
