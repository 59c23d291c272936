"""Linear layers with packed weights and many rows of x: tiles of the matrix unit against float64, within bounds."""

from __future__ import annotations

import pytest
import torch
from quantized_linear_bounds import expected
from test_quantized_linear_cpp import draw, format_of, launch, operands

from tilewright.codegen.quantized_linear import QuantizedLinearSpec

QUICK = {"4-point": QuantizedLinearSpec("bfloat16", 4, 32, "point")}
GRID = {
    f"{dtype}-{bits}-{zero}-{group}": QuantizedLinearSpec(dtype, bits, group, zero, scales)
    for dtype, bits, zero, group, scales in (
        ("bfloat16", 8, "middle", 64, "float16"),
        ("bfloat16", 8, "offset", 0, "float16"),
        ("bfloat16", 4, "middle", 0, "float32"),
        ("bfloat16", 3, "offset", 96, "float16"),
        ("bfloat16", 3, "point", 0, "float16"),
        ("bfloat16", 2, "point", 32, "float32"),
        ("bfloat16", 2, "middle", 0, "float16"),
        ("float32", 8, "point", 64, "float16"),
        ("float32", 4, "offset", 96, "float32"),
        ("float32", 3, "middle", 544, "float16"),
        ("float32", 2, "point", 0, "float16"),
    )
} | {
    "bfloat16-gated": QuantizedLinearSpec("bfloat16", 4, 64, "offset", activation="silu", gated=True),
    "float32-gated": QuantizedLinearSpec("float32", 4, 32, "point", activation="gelu_tanh", gated=True),
}

# 530 columns are more than a chunk of them, 530 rows more than a block, 550 weights more than PAIRS of panels.
SIZES = {
    "M": [9, 16, 17, 31, 33, 70, 530],
    "K": [1, 31, 33, 64, 100, 530, 577, 1100],
    "N": [1, 15, 16, 17, 33, 100, 550],
}


def check(spec, x, weights, biases, residual, rows):
    out = launch(spec, x, weights, biases, residual, rows)
    wanted, bound = expected(spec, format_of(spec), x, weights, biases, residual, rows)
    assert out.shape == wanted.shape and out.dtype == x.dtype and out.is_contiguous()
    worst = ((out.double() - wanted).abs() / bound).max().item() if out.numel() else 0.0
    assert worst <= 1.0, f"{worst:.3g} of the bound"


@pytest.mark.parametrize("name", QUICK)
def test_tiles_against_float64(name):
    draw(QUICK[name], SIZES, 25, check)


@pytest.mark.grid
@pytest.mark.parametrize("name", GRID)
def test_every_format_against_float64(name):
    draw(GRID[name], SIZES, 40, check)


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_threads_share_panels_and_rows(threads):
    spec = QUICK["4-point"]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for M, K, N in ((530, 96, 40), (70, 600, 300)):
            check(spec, *operands(spec, M, K, N, 2, True, True, torch.Generator().manual_seed(M)))
    finally:
        torch.set_num_threads(before)
