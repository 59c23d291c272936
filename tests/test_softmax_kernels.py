"""Row-softmax kernels under the Triton interpreter against float64, over several tiles, rows and layouts."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.codegen.softmax import ALGORITHMS, SPLITTABLE, collapse
from tilewright.runtime.load import load
from tilewright.runtime.ops import softmax as ops

INF = math.inf
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TARGET = "triton-interpret"


def run(
    x, dim, bias=None, *, scale=1.0, log=False, algorithm="two_pass", dtype=None, tile=None, splits=1, target=TARGET
):
    """The kernel for a call, with a small tile so that small tensors span several (native kernels have one tile)."""
    spec = ops.spec(x, dim, bias, scale=scale, log=log, algorithm=algorithm, dtype=dtype, target=target)
    if target == "cpp":
        return load(spec, target).launch(x, bias, dim, scale)
    changes = {}
    if tile is not None:
        rows, cols = tile
        changes["block_rows"] = rows
        if algorithm != "one_read":
            changes |= {"block_cols": cols, "splits": splits if algorithm in SPLITTABLE else 1}
    return load(dataclasses.replace(spec, **changes), TARGET).launch(x, bias, dim, scale)


def check(actual, x, dim, bias=None, *, scale=1.0, log=False, dtype=None, target=TARGET):
    """Within the op's tolerance of the reference in float64; softmax relative to each value, however small it is."""
    wide = bias.double() if bias is not None and bias.dtype != torch.bool else bias
    expected = ops.reference(x.double(), dim, wide, scale=scale, log=log)
    tolerance = ops.TOLERANCE[actual.dtype]
    # Triton's interpreter truncates to bfloat16 where a GPU rounds to nearest: an error of 2 u = 2^-7 instead of u.
    truncated = actual.dtype == torch.bfloat16 and target == TARGET
    rtol = 2.0**-7 + 2.0**-16 if truncated else tolerance.rtol
    # Below the normal range only absolute accuracy is left: 2^-126 (2^-14 with a step of 2^-24 in float16).
    tiny = 2.0**-24 if actual.dtype == torch.float16 else 2.0**-126
    atol = tolerance.atol if log else tiny
    assert actual.dtype == (dtype or ops.promoted_dtype(x, bias))
    assert actual.shape == x.shape and actual.is_contiguous()
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol, equal_nan=True)


def variants():
    for algorithm in ALGORITHMS:
        for log in (False, True):
            if algorithm == "three_pass_reload" and log:
                continue
            for splits in (1, 4) if algorithm in SPLITTABLE else (1,):
                yield pytest.param(algorithm, log, splits, id=f"{algorithm}-{'log' if log else 'plain'}-{splits}")


def edge_rows(n=150):
    """Thirteen rows whose exponentials, sums or maxima leave the range of floats, or that hold infinities or NaN."""
    x = torch.randn(13, n) * 5
    x[1] = -INF
    x[2, 3] = math.nan
    x[3, n - 50] = INF
    x[4, : n - 30] = -INF  # whole chunks with nothing in them
    x[5] *= 1e36
    x[6] = torch.linspace(1e7, 1e7 + 150, n)  # exponents beyond a float's exact integers
    x[7] = -3.4e38
    x[8] = torch.linspace(2800, 2900, n)  # crosses the limit of exact exponents
    x[9] = torch.linspace(-2900, -2800, n)
    x[10, : n // 2], x[10, n // 2 :] = 2839.0, 2841.0  # chunks on either side of the limit
    x[11] = math.nan
    x[12, 0], x[12, 1:] = -INF, INF
    return x


@pytest.mark.parametrize(("algorithm", "log", "splits"), variants())
def test_edge_rows(algorithm, log, splits):
    torch.manual_seed(0)
    x = edge_rows()
    check(run(x, -1, algorithm=algorithm, log=log, tile=(16, 32), splits=splits), x, -1, log=log)


@pytest.mark.parametrize(("algorithm", "log", "splits"), variants())
def test_bias_scale_and_mask(algorithm, log, splits):
    torch.manual_seed(1)
    x = torch.randn(2, 2, 5, 70)
    padding = torch.zeros(2, 1, 1, 70)
    padding[1, ..., 40:] = -INF
    visible = torch.rand(5, 70) > 0.3
    visible[2] = False
    for bias, scale in ((padding, 0.3), (visible, -0.125), (torch.randn(2, 1, 1), 1.0), (torch.randn(()), 0.0)):
        kwargs = {"scale": scale, "log": log}
        check(run(x, 3, bias, algorithm=algorithm, tile=(8, 32), splits=splits, **kwargs), x, 3, bias, **kwargs)


def every_exponent():
    """Finite float32 values of every exponent and sign."""
    exponents = torch.arange(-149, 128, dtype=torch.float64)
    values = torch.cat([2.0**exponents, 1.37 * 2.0**exponents])
    return torch.cat([values, -values]).float()


@pytest.mark.parametrize("algorithm", ["two_pass", "online", "one_read"])
def test_the_whole_exponent_range(algorithm):
    values = every_exponent()
    # Rows of growing magnitude, so that every exponent is once the greatest of its row, and rows relative to it.
    rows = []
    for limit in torch.logspace(-40, 38, 40, dtype=torch.float64):
        small = values[values.abs() <= limit]
        rows.append(small[torch.linspace(0, len(small) - 1, 64).long()])
    x = torch.stack(rows)
    for log in (False, True):
        check(run(x, 1, algorithm=algorithm, log=log, tile=(64, 16)), x, 1, log=log)


def test_mantissas_are_accurate():
    """exp as a pair, from one element at a time: rows (z, 0) give the logistic function."""
    z = torch.linspace(-86, 86, 3001)
    x = torch.stack([z, torch.zeros_like(z)], dim=1)
    actual = run(x, 1, tile=(1024, 2))[:, 0].double()
    expected = torch.sigmoid(z.double())
    # 1.6 u for the polynomial, 3 u for evaluating it, twice (numerator and sum), 3 for reciprocal and products.
    bound = 12 * 2.0**-24
    assert ((actual - expected).abs() / expected).max() < bound


@pytest.mark.parametrize("algorithm", ["one_read", "two_pass"])
@pytest.mark.parametrize("x_dtype", DTYPES)
def test_dtypes_and_output_dtype(algorithm, x_dtype):
    torch.manual_seed(2)
    x = (torch.randn(5, 100) * 4).to(x_dtype)
    for dtype in (None, torch.float32):
        check(run(x, 1, algorithm=algorithm, dtype=dtype, tile=(8, 64)), x, 1, dtype=dtype)
    bias = torch.randn(100)
    actual = run(x, 1, bias, algorithm=algorithm, scale=0.3, tile=(8, 64))
    check(actual, x, 1, bias, scale=0.3, dtype=torch.float32)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_layouts(algorithm):
    torch.manual_seed(3)
    base = torch.randn(2, 6, 4, 5)
    layouts = [
        (base, 1),
        (base.permute(3, 1, 0, 2), 2),
        (base.to(memory_format=torch.channels_last), 1),
        (base[:, ::2, 1:, ::3], 2),
        (base[..., :1].expand(2, 6, 4, 7), 3),
        (base[:1].expand(3, 6, 4, 5), 1),
        (base[:, :, 0, 0].t(), 0),
        (torch.randn(()), 0),
        (torch.randn(()), -1),
        (torch.randn(3, 0), 1),
        (torch.randn(0, 3), 1),
        (torch.randn(3, 0, 2), 0),
        (torch.randn(1, 1), 0),
        (torch.randn(4), 0),
    ]
    for x, dim in layouts:
        check(run(x, dim, algorithm=algorithm, tile=(64, 4), splits=2), x, dim)


@st.composite
def calls(draw):
    """A tensor of any layout, its softmax dimension, a bias that broadcasts, and how to compute it."""
    rank = draw(st.integers(1, 4))
    sizes = [draw(st.sampled_from([0, 1, 2, 3])) for _ in range(rank)]
    dim = draw(st.integers(0, rank - 1))
    sizes[dim] = draw(st.sampled_from([0, 1, 2, 15, 16, 17, 33, 50]))
    order = draw(st.permutations(range(rank)))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    steps = [draw(st.sampled_from([1, 1, 2])) for _ in range(rank)]
    x = torch.randn([s * step for s, step in zip(sizes, steps, strict=True)], generator=generator)
    x = x[tuple(slice(None, None, step) for step in steps)] * draw(st.sampled_from([1.0, 8.0]))
    x = x.permute(order).contiguous().permute([order.index(i) for i in range(rank)]) if draw(st.booleans()) else x
    x = x.to(dtype)
    special = draw(st.sampled_from([None, None, -INF, INF, math.nan]))
    if special is not None and x.numel():
        x = x.clone()
        x[torch.rand(x.shape, generator=generator) < draw(st.sampled_from([0.02, 0.5]))] = special
    kind = draw(st.sampled_from(["none", "bool", "float32", "same"]))
    bias = None
    if kind != "none":
        shape = [draw(st.sampled_from([1, s])) for s in sizes][draw(st.integers(0, rank)) :]
        noise = torch.randn(shape, generator=generator)
        bias = noise > -0.5 if kind == "bool" else noise.to(torch.float32 if kind == "float32" else dtype)
    return {
        "x": x,
        "dim": draw(st.sampled_from([dim, dim - rank])),
        "bias": bias,
        "scale": draw(st.sampled_from([1.0, 1.0, 0.5, -1.5])),
        "log": draw(st.booleans()),
        "algorithm": draw(st.sampled_from(["one_read", "two_pass", "two_pass", "three_pass", "online"])),
        "tile": draw(st.sampled_from([(4, 16), (16, 8), (8, 32)])),
        "splits": draw(st.sampled_from([1, 1, 2])),
    }


@settings(max_examples=60)
@given(call=calls())
def test_any_call(call):
    launch = {name: call[name] for name in ("algorithm", "tile", "splits")}
    function = {name: call[name] for name in ("scale", "log")}
    x, dim, bias = call["x"], call["dim"], call["bias"]
    check(run(x, dim, bias, **launch, **function), x, dim, bias, **function)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(("splits", "dim"), [(1, 0), (1, 1), (4, 1), (4, 2)])
def test_backward_kernel(log, splits, dim):
    torch.manual_seed(4)
    x = torch.randn(3, 40, 7, dtype=torch.float64, requires_grad=True)
    y = (torch.log_softmax if log else torch.softmax)(x * 0.7, dim)
    y32 = y.detach().float()
    for grad in (torch.randn(7, 3, 40).permute(1, 2, 0), torch.ones(()).expand(3, 40, 7)):
        (expected,) = torch.autograd.grad(y, x, grad.double(), retain_graph=True)
        spec = ops.backward_spec(grad, y32, dim, dtype=torch.float32, log=log, target=TARGET)
        assert spec.one_read
        small = dataclasses.replace(spec, one_read=False, block_rows=64, block_cols=16, splits=splits)
        for chosen in (spec, small):
            actual = load(chosen, TARGET).launch(grad, y32, dim, 0.7)
            # y is rounded (u |y|), the products and their sum over up to 40 terms too: 44 u on the scale of sum |g|.
            bound = 44 * 2.0**-24 * float(grad.abs().sum(dim).max())
            torch.testing.assert_close(actual.double(), expected, rtol=0, atol=bound)


def test_collapse_merges_what_every_tensor_steps_through_evenly():
    assert collapse([4, 3, 5], [15, 5, 1]) == [(60, (1,))]
    assert collapse([4, 3, 5], [15, 5, 1], [3, 1, 0]) == [(5, (1, 0)), (12, (5, 1))]
    assert collapse([2, 1, 3], [1, 99, 2]) == [(6, (1,))]  # sorted by stride first
    assert collapse([], [], []) == [(1, (0, 0))]
    assert collapse([2, 3], [0, 0], [3, 1]) == [(6, (0, 1))]  # expanded


def test_a_row_too_long_for_its_kernel_is_refused():
    x = torch.randn(2, 100)
    spec = ops.spec(x, 1, algorithm="one_read", target=TARGET)
    with pytest.raises(ValueError, match="rows of up to 128 elements, not 129"):
        load(spec, TARGET).launch(torch.randn(2, 129), None, 1, 1.0)
