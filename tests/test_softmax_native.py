"""Native softmax kernels on every instruction set of this CPU: numerics against float64, layouts, threads, launch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from test_softmax_kernels import calls, check, edge_rows, every_exponent, run

import tilewright as tw
from tilewright.codegen.softmax import ALGORITHMS, SoftmaxSpec
from tilewright.passes import TwoPassSoftmax
from tilewright.runtime import cpu
from tilewright.runtime.load import load
from tilewright.runtime.ops import softmax as ops

ROW_KERNELS = True  # conftest.py leaves two of the four instruction sets to `make grid`

INF = math.inf
op = torch.ops.tilewright.softmax


def native(x, dim, bias=None, **kwargs):
    """Run and check one call; the result."""
    function = {name: kwargs[name] for name in ("scale", "log", "dtype") if name in kwargs}
    actual = run(x, dim, bias, target="cpp", **kwargs)
    check(actual, x, dim, bias, target="cpp", **function)
    return actual


def forms(cpu_isa=None):
    """(algorithm, log): all on the best instruction set; on the others two that use every vector helper."""
    if cpu_isa not in (None, cpu.supported()[0]):
        return [("one_read", False), ("two_pass", False)]
    return [(a, log) for a in ALGORITHMS for log in (False, True) if not (log and a == "three_pass_reload")]


# What is tested with lanes across rows, too: each is a kernel of its own, and building one takes seconds.
ACROSS = (("two_pass", False), ("one_read", True), ("online", False))


def test_edge_rows(cpu_isa):
    torch.manual_seed(0)
    for algorithm, log in forms(cpu_isa):
        for n in (150, 700):
            x = edge_rows(n)
            native(x, 1, algorithm=algorithm, log=log)
            if (algorithm, log) in ACROSS:
                native(x.t().contiguous(), 0, algorithm=algorithm, log=log)
                native(x.t().contiguous().t(), 1, algorithm=algorithm, log=log)


@pytest.mark.parametrize(("algorithm", "log"), [("one_read", False), ("two_pass", True)])
def test_bias_scale_and_mask(algorithm, log):
    torch.manual_seed(1)
    x = torch.randn(2, 2, 5, 300)
    padding = torch.zeros(2, 1, 1, 300)
    padding[1, ..., 40:] = -INF
    visible = torch.rand(5, 300) > 0.3
    visible[2] = False
    native(x, 3, padding, scale=0.3, algorithm=algorithm, log=log)
    native(x, 3, visible, scale=-0.125, algorithm=algorithm, log=log)
    if log:
        native(x.transpose(2, 3).contiguous(), 2, visible.t(), scale=0.5, algorithm=algorithm, log=log)
    native(x, 3, torch.randn(2, 1, 1), scale=2.0, algorithm=algorithm, log=log)
    native(x, 3, torch.randn(()), scale=0.0, algorithm=algorithm, log=log)


def test_masks_on_every_instruction_set(cpu_isa):
    torch.manual_seed(1)
    x, visible = torch.randn(4, 300), torch.rand(4, 300) > 0.3
    visible[2] = False
    native(x, 1, visible, scale=-0.5)
    native(x[:, ::2], 1, visible[:, ::2], scale=-0.5)


def test_accuracy_over_the_whole_exponent_range(cpu_isa):
    """Rows of growing magnitude, so that every exponent is once the greatest of its row; in units of 2^-23."""
    values = every_exponent()
    rows = []
    for limit in torch.logspace(-40, 38, 160, dtype=torch.float64):
        small = values[values.abs() <= limit]
        rows.append(small[torch.linspace(0, len(small) - 1, 64).long()])
    z = torch.linspace(-86, 86, 6400).reshape(100, 64)
    noise = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    x = torch.cat([torch.stack(rows), z, noise, noise * 10])
    expected = torch.softmax(x.double(), 1)
    normal = expected >= 2.0**-125
    distance = (x.double() - x.double().amax(1, keepdim=True)).abs()[normal]
    for algorithm, log in forms(cpu_isa):
        actual = native(x, 1, algorithm=algorithm, log=log)
        if log:
            continue
        relative = (actual.double()[normal] / expected[normal] - 1).abs() * 2.0**23
        # Two exponentials (0.9 each), their sum, a product: below 2.75; online multiplies sums with exponentials too.
        # All but two_pass round z - top first, half an ulp of a distance of up to 87, as PyTorch does.
        if algorithm != "two_pass":
            relative -= distance / 2
        assert relative.max() < (3.25 if algorithm == "online" else 2.75), (algorithm, relative.max())


def test_layouts_and_widths(cpu_isa):
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
        (torch.randn(()), -1),
        (torch.randn(3, 0), 1),
        (torch.randn(0, 3), 1),
        (torch.randn(3, 0, 2), 0),
        (torch.randn(1, 1), 0),
        (torch.randn(3, 100, 70), 1),
        (torch.randn(130, 3, 66).transpose(0, 2), 2),
        (torch.randn(40, 300)[:, ::3], 1),
    ]
    layouts += [(torch.randn(3, n), 1) for n in (1, 15, 16, 17, 63, 64, 65, 127, 129, 191, 255, 256, 257, 1025)]
    for algorithm, log in forms(cpu_isa):
        for x, dim in layouts:
            spec = ops.spec(x, dim, algorithm=algorithm, log=log, target="cpp")
            if spec.contiguous == "cols" or (algorithm, log) in ACROSS:
                native(x, dim, algorithm=algorithm, log=log)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(cpu_isa, dtype):
    torch.manual_seed(2)
    best = cpu_isa == cpu.supported()[0]
    for n in (100, 400):
        x = (torch.randn(5, n) * 4).to(dtype)
        native(x, 1)
        if best:
            native(x, 1, algorithm="two_pass", dtype=torch.float32)
    bias, x = torch.randn(100), x[:, :100]
    if best and dtype == torch.float16:
        actual = run(x, 1, bias, scale=0.3, target="cpp")
        check(actual, x, 1, bias, scale=0.3, dtype=torch.float32, target="cpp")


@settings(max_examples=10)  # most draw a kernel of their own, which is built
@given(call=calls())
def test_any_call(call):
    function = {name: call[name] for name in ("scale", "log", "algorithm")}
    if call["algorithm"] == "three_pass_reload":
        function["log"] = False
    native(call["x"], call["dim"], call["bias"], **function)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_threads_agree(algorithm):
    """Rows shared out among threads, and long rows that threads work on together, some beyond the caches."""
    torch.manual_seed(4)
    shapes = [((1, 150_001), 1), ((3, 70_000), 1), ((5, 33_333), 1), ((130, 700), 1)]
    shapes += [((2, 9000, 66), 1), ((2, 1100, 1024), 1)] if (algorithm, False) in ACROSS else []
    shapes += [((1, 1 << 20), 1), ((1100, 1999), 1)]
    for shape, dim in shapes:
        x = torch.randn(shape) * 3
        x.view(-1)[x.numel() // 2] = 3000.0  # beyond the exact exponents
        for log in [log for name, log in forms() if name == algorithm]:
            two = native(x, dim, algorithm=algorithm, log=log)
            before = torch.get_num_threads()
            try:
                torch.set_num_threads(1)
                one = run(x, dim, algorithm=algorithm, log=log, target="cpp")
            finally:
                torch.set_num_threads(before)
            torch.testing.assert_close(one, two, rtol=2.0**-21, atol=2.0**-126 if not log else 2.0**-20)


def test_long_sums_lose_no_more_than_short_ones():
    """Equal elements, whose sum in one float each lane would stop growing or drift: 1/n, to 2 ulps."""
    for n in (1 << 12, 1 << 16, (1 << 22) + 3):
        x = torch.full((1, n), 0.3)
        for algorithm in ("two_pass", "online", "three_pass"):
            y = run(x, 1, algorithm=algorithm, target="cpp")
            assert ((y.double() * n - 1).abs() < 2.0**-22).all()
    # Without compensation, a column that one lane adds up alone would be off by thousands of ulps.
    x = torch.randn(1 << 16, 5, generator=torch.Generator().manual_seed(0)) * 4
    for algorithm in ("two_pass", "online"):
        native(x, 0, algorithm=algorithm)


def test_one_kernel_serves_every_shape():
    specs = {ops.spec(torch.randn(shape), -1, target="cpp") for shape in ((3, 5), (100, 700), (2, 3, 4000), (1, 1))}
    assert specs == {SoftmaxSpec(algorithm="one_read", index_bits=64)}
    with torch._subclasses.FakeTensorMode():
        assert ops.spec(torch.empty(1, 1 << 24), -1, target="cpp").algorithm == "two_pass"
    columns = ops.spec(torch.randn(3, 40, 50), 1, target="cpp")
    assert (columns.contiguous, columns.algorithm) == ("rows", "one_read")


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward(cpu_isa, log, dtype):
    torch.manual_seed(5)
    shapes = [((3, 40, 7), 2), ((5, 700), 1), ((), 0), ((0, 3), 1)]
    if cpu_isa == cpu.supported()[0]:
        shapes += [((3, 70_001), 1), ((1100, 1999), 1), ((1, 400_000), 1)]
        if log != (dtype == torch.bfloat16):
            shapes += [((3, 40, 7), 0), ((3, 40, 7), 1), ((2, 90, 130), 1), ((3, 9000, 66), 1)]
    elif log != (dtype == torch.bfloat16):
        return  # two of the four kernels use every helper
    for shape, dim in shapes:
        grad = torch.randn(shape).to(dtype)
        y = (torch.log_softmax if log else torch.softmax)(torch.randn(shape).double() * 3, dim).to(dtype)
        for g in (grad, torch.ones((), dtype=dtype).expand(shape)):
            spec = ops.backward_spec(g, y, dim, dtype=dtype, log=log, target="cpp")
            actual = load(spec, "cpp").launch(g, y, dim, 0.7)
            wide, p = g.double(), y.double()
            if log:
                expected = 0.7 * (wide - p.exp() * wide.sum(dim, keepdim=True))
                size = wide.abs() + p.exp() * wide.abs().sum(dim, keepdim=True)
            else:
                expected = 0.7 * (p * (wide - (wide * p).sum(dim, keepdim=True)))
                size = p * (wide.abs() + (wide * p).abs().sum(dim, keepdim=True))
            # Sixteen terms are added plainly, then sums of sums: fewer than 40 roundings, each relative to size.
            u = 40 * 2.0**-24 + (2.0**-8 if dtype == torch.bfloat16 else 0)
            assert actual.dtype == dtype and actual.shape == y.shape and actual.is_contiguous()
            assert ((actual.double() - expected).abs() <= u * size + 2.0**-126).all()


def test_launch_remembers_layouts_and_no_values():
    x = torch.randn(4, 300)
    kernel = load(ops.spec(x, 1, target="cpp"), "cpp")
    for tensor, dim in ((x, 1), (x, -1), (x[:2], 1), (x[:, ::2], 1), (x + 1, 1), (x.t().contiguous().t(), 1)):
        for _ in range(2):
            expected = torch.softmax(tensor, dim)
            torch.testing.assert_close(kernel.launch(tensor, None, dim, 1.0), expected, rtol=2.0**-17, atol=0)


def test_the_pass_ends_in_a_native_kernel():
    """Rows beyond the cache, with a scale and a mask in front, which become part of the kernel."""

    class Scores(torch.nn.Module):
        def forward(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
            return torch.softmax((x * 0.5).masked_fill(hidden, -INF), -1)

    n = cpu.cache_bytes() // 4 + 64
    x, hidden = torch.randn(2, n) * 3, torch.rand(2, n) > 0.7
    compiled = tw.compile(Scores(), [TwoPassSoftmax()], (x, hidden), rest="eager")
    (row,) = compiled.report.kernels
    assert (row.op, row.target) == ("softmax", "cpp")
    check(compiled(x, hidden), x, -1, ~hidden, scale=0.5, target="cpp")
