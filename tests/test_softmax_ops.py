"""``tilewright::softmax`` as an operator: its definition, edge cases, gradients, and what has no kernel and why."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch.library import opcheck

from tilewright.codegen.softmax import MAX_TILE
from tilewright.runtime.errors import BadArgument, UnsupportedKernel
from tilewright.runtime.ops import OPS
from tilewright.runtime.ops import softmax as ops

INF = math.inf
op = torch.ops.tilewright.softmax
TARGET = "triton-interpret"
aten = torch.ops.aten


def edge_cases():
    x = torch.randn(6, 9)
    x[0] = -INF
    x[1, 2] = INF
    x[2, 3] = math.nan
    x[3, 4:] = -INF
    x[4] = 1e30
    return [x, torch.randn(()), torch.randn(3, 0), torch.randn(0, 3), torch.randn(4, 1), torch.randn(1)]


@pytest.mark.parametrize("target", ["reference", TARGET, "cpp"])
@pytest.mark.parametrize("log", [False, True])
def test_edge_cases_are_torchs(target, log):
    torch.manual_seed(0)
    for x in edge_cases():
        expected = (torch.log_softmax if log else torch.softmax)(x, -1)
        actual = op(x, -1, log=log, target=target)
        tolerance = ops.TOLERANCE[x.dtype]
        torch.testing.assert_close(actual, expected, atol=tolerance.atol, rtol=tolerance.rtol, equal_nan=True)


def test_a_hidden_row_is_nan_as_after_masked_fill():
    x, visible = torch.randn(3, 8), torch.ones(3, 1, dtype=torch.bool)
    visible[1] = False
    expected = torch.softmax(x.masked_fill(~visible, -INF), 1)
    for target in ("reference", TARGET, "cpp"):
        torch.testing.assert_close(op(x, 1, visible, target=target), expected, equal_nan=True)
    assert expected[1].isnan().all()


def test_reference_dissolves_to_aten():
    """What Inductor sees is ATen's softmax after scale and bias, and nothing of ours."""
    from torch.fx.experimental.proxy_tensor import make_fx

    x, bias = torch.randn(3, 8), torch.randn(8)
    for log, kernel in ((False, aten._softmax.default), (True, aten._log_softmax.default)):
        function = functools.partial(op, log=log, scale=0.5)
        graph = make_fx(lambda x, b: function(x, 1, b))(x, bias).graph  # noqa: B023
        targets = [node.target for node in graph.nodes if node.op == "call_function"]
        assert targets[:2] == [aten.mul.Tensor, aten.add.Tensor] and kernel in targets
        assert all(target.namespace == "aten" for target in targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_as_in_torch_softmax(dtype):
    x = torch.randn(2, 7).to(dtype)
    assert op(x, 1).dtype == dtype
    for wanted in (torch.float32, torch.float64, torch.float16):
        expected = torch.softmax(x, 1, dtype=wanted)
        actual = op(x, 1, dtype=wanted)
        assert actual.dtype == wanted and torch.equal(actual, expected)
    assert op(x, 1, torch.randn(7)).dtype == torch.promote_types(dtype, torch.float32)
    assert op(torch.arange(6).reshape(2, 3), 1, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("target", [TARGET, "cpp"])
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("kind", ["none", "additive", "mask"])
def test_gradients_against_float64(log, kind, target):
    torch.manual_seed(1)
    shape = (2, 3, 20)
    bias = {"none": None, "additive": torch.randn(3, 1), "mask": torch.rand(2, 1, 20) > 0.3}[kind]
    inputs = [torch.randn(shape)] + ([bias] if kind == "additive" else [])
    weight = torch.randn(shape)

    def gradients(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        y = function(*leaves)
        loss = (y.masked_fill(y == -INF, 0.0) * weight.to(dtype)).sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in first), leaves)
        return first, second

    def ours(x, b=bias):
        return op(x, 2, b, scale=0.7, log=log, target=target)

    def exact(x, b=bias):
        return ops.reference(x, 2, b, scale=0.7, log=log)

    # u = 2^-24 times: 3 roundings of scores below 8, 20 terms a sum (60 for the bias), each below 4; the second
    # derivative squares and sums again.
    for actual, expected, bound in zip(
        gradients(ours, torch.float32), gradients(exact, torch.float64), (400, 4000), strict=True
    ):
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.double(), e, rtol=0, atol=bound * 2.0**-24)


@pytest.mark.parametrize("target", [TARGET, "cpp"])
def test_half_gradients_come_back_in_the_inputs_dtype(target):
    x = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(8, dtype=torch.float16, requires_grad=True)
    y = op(x, 1, bias, scale=0.5, target=target)
    y.sum().backward()
    assert y.dtype == torch.float32 and x.grad.dtype == torch.bfloat16 and bias.grad.dtype == torch.float16


@pytest.mark.parametrize("target", ["reference", TARGET, "cpp"])
@pytest.mark.parametrize("log", [False, True])
def test_opcheck(target, log):
    x = torch.randn(3, 4, 10, requires_grad=True)
    for bias in (None, torch.randn(4, 1, requires_grad=True), torch.rand(10) > 0.2):
        opcheck(op.default, (x, -1, bias), {"scale": 0.5, "log": log, "target": target})


@pytest.mark.parametrize("target", [TARGET, "cpp"])
def test_opcheck_of_the_kernel_ops(target):
    x, bias = torch.randn(3, 10, requires_grad=True), torch.randn(10, requires_grad=True)
    forward = torch.ops.tilewright.softmax_forward.default
    opcheck(forward, (x, bias, 1, 2.0, torch.float32, False, "two_pass", target))
    opcheck(forward, (x.detach().bfloat16().t(), None, 0, 1.0, torch.bfloat16, True, "auto", target))
    y = torch.softmax(x, 1).detach().requires_grad_()
    grad = torch.randn(3, 10, requires_grad=True)
    opcheck(torch.ops.tilewright.softmax_backward.default, (grad, y, 1, 2.0, torch.float32, False, target))


@pytest.mark.parametrize("target", [TARGET, "cpp"])
def test_compiled_with_lengths_that_vary(fresh_dynamo, target):
    seen = []

    def backend(gm, inputs):
        seen.append(gm)
        return gm.forward

    compiled = torch.compile(lambda x: op(2 * x, -1, scale=0.5, target=target), backend=backend, dynamic=True)
    for n in (5, 9, 33):
        x = torch.randn(2, n)
        torch.testing.assert_close(compiled(x), torch.softmax(x, -1))
    assert len(seen) == 1


def no_kernel(match, *args, **kwargs):
    with pytest.raises(UnsupportedKernel, match=match):
        ops.spec(*args, **{"target": TARGET} | kwargs)


NATIVE_ONE_READ = {"algorithm": "one_read", "target": "cpp"}


def test_what_has_no_kernel_says_why():
    x = torch.randn(2, 5)
    no_kernel("x is float64", x.double(), 1)
    no_kernel("x is complex64", x.to(torch.complex64), 1)
    no_kernel("x is int64", x.long(), 1, dtype=torch.float32)
    no_kernel("bias is float64", x, 1, x.double())
    no_kernel("the result is float64", x, 1, dtype=torch.float64)
    no_kernel("dtype=float16 rounds the float32 scores", x, 1, dtype=torch.float16)
    no_kernel("target triton runs on cuda tensors, but x is on cpu", x, 1, target="triton")
    no_kernel("no softmax kernel for target tpu", x, 1, target="tpu")
    no_kernel("keeps a row in cache, and 2097152 elements do not fit", torch.empty(1, 1 << 21), 1, **NATIVE_ONE_READ)
    no_kernel("x is float64", x.double(), 1, target="cpp")
    no_kernel("three_pass_reload keeps float32", x.half(), 1, algorithm="three_pass_reload", target="cpp")
    no_kernel("do not fit", torch.empty(1, 2 * MAX_TILE), 1, algorithm="one_read")
    no_kernel("three_pass_reload keeps float32", x, 1, log=True, algorithm="three_pass_reload")
    with torch._subclasses.FakeTensorMode():
        gpu = torch.empty(2, 5, device="cuda")
        no_kernel("runs on cpu tensors, but x is on cuda:0", gpu, 1)
        no_kernel("but bias is on cpu", gpu, 1, torch.empty(5), target="triton")
        assert ops.spec(gpu, 1, target="triton").algorithm == "one_read"


def test_calls_without_a_meaning_raise():
    x = torch.randn(2, 5)
    for target in ("reference", TARGET, "cpp"):
        for match, args, kwargs in (
            ("algorithm is 'fast'", (x, 1), {"algorithm": "fast"}),
            ("dim is 2", (x, 2), {}),
            ("does not broadcast", (x, 1, torch.randn(3)), {}),
            ("does not broadcast", (x, 1, torch.randn(1, 2, 5)), {}),
            ("bias is torch.int64", (x, 1, torch.zeros(5, dtype=torch.long)), {}),
        ):
            with pytest.raises(BadArgument, match=match):
                op(*args, **kwargs, target=target)


def test_specs_of_gpu_tensors():
    """What would run on a GPU, from fake tensors: one huge row is split, offsets are 64 bits where they have to be."""
    with torch._subclasses.FakeTensorMode():

        def spec(*shape, dim=-1, dtype=torch.float16, **kwargs):
            return ops.spec(torch.empty(shape, device="cuda", dtype=dtype), dim, target="triton", **kwargs)

        huge = spec(1, 1 << 27)
        assert (huge.algorithm, huge.contiguous, huge.index_bits) == ("two_pass", "cols", 32) and huge.splits >= 128
        many = spec(4096, 1 << 20)
        assert (many.splits, many.index_bits) == (1, 64)
        assert spec(64, 1 << 20, 3).splits == 1
        columns = spec(8, 1 << 17, 64, dim=1)
        assert (columns.contiguous, columns.outer_rank, columns.block_rows) == ("rows", 1, 64)
        assert spec(8, 12, 128, 128).outer_rank == 0
        assert spec(8, 12, 128, 128, bias=torch.empty(8, 1, 1, 128, device="cuda")).outer_rank == 1
        short = spec(4096, 64)
        assert short.algorithm == "one_read" and short.block_rows == 32


def test_registered_with_tolerances():
    canonical = OPS["softmax"]
    assert canonical.overload is op.default and canonical.spec is ops.spec
    assert canonical.tolerance[torch.float32].rtol == 2.0**-17
