"""Softmax kernels on a GPU, compiled for real: the numbers, long rows, and offsets beyond 31 bits."""

from __future__ import annotations

import math

import pytest
import torch

from tilewright.codegen.softmax import ALGORITHMS
from tilewright.runtime.ops import softmax as ops

pytestmark = pytest.mark.gpu
op = torch.ops.tilewright.softmax


def close(actual, expected, log=False):
    tolerance = ops.TOLERANCE[actual.dtype]
    # Values below 2^-126 are flushed to zero; float16 has steps of 2^-24 there.
    tiny = 2.0**-24 if actual.dtype == torch.float16 else 2.0**-125
    atol = tolerance.atol if log else tiny
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance.rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm(algorithm, log, dtype):
    if algorithm == "three_pass_reload" and (log or dtype != torch.float32):
        pytest.skip("three_pass_reload computes softmax in float32 only")
    torch.manual_seed(0)
    for shape, dim in (((37, 20000), 1), ((3, 1000, 65), 1), ((8, 5, 130), -1), ((2, 3), 0)):
        x = (torch.randn(shape, device="cuda") * 4).to(dtype)
        x.view(-1)[5] = -math.inf
        x[(0,) * x.dim()] = math.nan
        mask = torch.rand(shape[-1], device="cuda") > 0.3
        bias = torch.randn(shape[-1], device="cuda").to(dtype)
        for b in (None, mask, bias):
            wide = b.double() if b is bias else b
            expected = ops.reference(x.double(), dim, wide, scale=0.5, log=log)
            close(op(x, dim, b, scale=0.5, log=log, algorithm=algorithm, target="triton"), expected, log)


@pytest.mark.parametrize("algorithm", ["two_pass", "online", "three_pass"])
def test_magnitudes_beyond_exact_exponents(algorithm):
    rows = [torch.linspace(a, a + 90, 50000, device="cuda") for a in (-2900.0, 0.0, 2800.0, 1e5, 1e7)]
    x = torch.stack([*rows, rows[0] * 1e34, torch.full_like(rows[0], -math.inf)])
    for log in (False, True):
        close(op(x, 1, log=log, algorithm=algorithm, target="triton"), ops.reference(x.double(), 1, log=log), log)


@pytest.mark.parametrize("algorithm", ["two_pass", "online"])
def test_one_row_of_two_to_the_27(algorithm):
    x = torch.randn(1, 1 << 27, device="cuda") * 3
    close(op(x, 1, algorithm=algorithm, target="triton"), torch.softmax(x.double(), 1))


def test_offsets_beyond_31_bits():
    x = torch.randn((1 << 31) // 4096 + 8, 4096, device="cuda", dtype=torch.float16)
    actual = op(x, 1, target="triton")
    close(actual[-8:], torch.softmax(x[-8:].double(), 1))
    close(actual[:8], torch.softmax(x[:8].double(), 1))


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("shape", [(64, 1000), (3, 200000), (2, 5000, 40)])
def test_gradients(log, shape):
    x = torch.randn(shape, device="cuda", requires_grad=True)
    bias = torch.randn(shape[-1], device="cuda", requires_grad=True)
    weight = torch.randn(shape, device="cuda")
    results = []
    for kwargs, cast in (({"target": "triton"}, torch.Tensor.float), ({}, torch.Tensor.double)):
        y = op(cast(x), 1, cast(bias), scale=0.5, log=log, **kwargs)
        results.append(torch.autograd.grad(y, (x, bias), cast(weight)))
    # On the scale of the largest entry: sums of up to 200,000 float32 terms, added in a tree.
    for a, e in zip(*results, strict=True):
        assert (a - e).abs().max() <= 1e-4 * max(1.0, float(e.abs().max()))
