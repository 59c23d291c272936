"""Linear layers and embeddings with packed weights on a GPU, compiled for real with the shipped tiles."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attention_bounds import DTYPES, close
from quantized_cases import Call, Case, expected, make_call
from test_quantized_embedding import FORMS
from test_quantized_embedding import check as check_embedding
from test_quantized_linear_triton import FORMATS

from tilewright.codegen.weight_format import WeightFormat
from tilewright.runtime.load import load
from tilewright.runtime.ops import quantized_linear

pytestmark = pytest.mark.gpu
DEVICE, TARGET = "cuda", "triton"


def on_gpu(call: Call) -> Call:
    def moved(given: list) -> list:
        return [None if t is None else t.to(DEVICE) for t in given]

    residual = None if call.residual is None else call.residual.to(DEVICE)
    lists = (moved(call.codes), moved(call.scales), moved(call.zeros), moved(call.biases))
    return Call(call.case, call.x.to(DEVICE), *lists, residual)


def launch_of(call: Call):
    case = call.case
    given = call.arguments()[:6]
    more = {"rows": list(case.widths), "format": case.form.text(), "activation": case.activation, "gated": case.gated}
    return load(quantized_linear.spec(*given, **more, target=TARGET), TARGET).launch


def check(case: Case, splits: int | None = None) -> None:
    call = make_call(case)
    given = on_gpu(call)
    out = launch_of(given)(*given.arguments(), splits=splits)
    close("out", out.cpu(), *expected(call))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 130])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format(name: str, rows: int, dtype: str) -> None:
    """Odd sizes (scalar reads) and sizes whose reads are wide."""
    check(Case(FORMATS[name], dtype, rows, (137, 61), 459))
    check(Case(FORMATS[name], dtype, rows, (256,), 2048, bias=False))


@pytest.mark.parametrize("splits", [1, 2, 7])
@pytest.mark.parametrize("name", ["4", "8_8", "4_8_point", "3_offset"])
def test_columns_are_shared_among_programs(name: str, splits: int) -> None:
    for rows in (1, 5, 16):
        check(Case(FORMATS[name], "bfloat16", rows, (200,), 1500), splits)


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "silu", "relu", "sigmoid"])
@pytest.mark.parametrize("rows", [1, 9, 70])
@pytest.mark.parametrize("gated", [False, True])
def test_every_epilogue(gated: bool, rows: int, activation: str) -> None:
    for name in ("4_point", "8_8", "float8"):
        check(Case(FORMATS[name], "bfloat16", rows, (96, 96), 320, activation=activation, gated=gated))


@pytest.mark.parametrize("name", ["4", "2_point", "8_8", "float8"])
def test_a_large_layer(name: str) -> None:
    case = Case(FORMATS[name], "bfloat16", 1, (4096,), 4096, residual=False)
    check(case)
    check(dataclasses.replace(case, rows=8))
    check(dataclasses.replace(case, rows=300))


@pytest.mark.parametrize("rows", [1, 8])
def test_a_captured_graph_reads_x_as_it_is_then(rows: int) -> None:
    """Nothing of a launch waits for the device, and the sums of shared columns are its own."""
    call = on_gpu(make_call(Case(WeightFormat(4, 64), "bfloat16", rows, (512,), 1024)))
    launch = launch_of(call)
    launch(*call.arguments())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = launch(*call.arguments())
    for _ in range(3):
        call.x.normal_()
        graph.replay()
        assert torch.equal(captured, launch(*call.arguments()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMS)
def test_embeddings(name: str, dtype: str) -> None:
    check_embedding(FORMS[name], dtype, TARGET, device=DEVICE)
    check_embedding(FORMS[name], dtype, TARGET, columns=1000, rows=300, device=DEVICE)
