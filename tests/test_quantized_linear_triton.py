"""Triton kernels of linear layers with packed weights: interpreted, against float64 with a bound; cross-compiled."""

from __future__ import annotations

import ast
import dataclasses
import itertools

import pytest
import torch
from attention_bounds import DTYPES, close
from golden import check_golden
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_cases import Case, expected, make_call

import tilewright as tw
from tilewright.codegen.linear import ACTIVATIONS
from tilewright.codegen.quantized_triton import QuantizedLinearTritonSpec, least_columns, tiles
from tilewright.codegen.render import render
from tilewright.codegen.spec import KernelSpec, SpecError
from tilewright.codegen.weight_format import WeightFormat
from tilewright.passes.quantize import Quantize
from tilewright.runtime.cross_compile import DEFAULT_TARGETS, cross_compile
from tilewright.runtime.errors import UnsupportedKernel
from tilewright.runtime.load import load
from tilewright.runtime.ops.quantized_linear import TOLERANCE

INTERPRETED = "triton-interpret"
FLOAT8 = WeightFormat(8, 0, kind="float8_e4m3fn")


def spec_of(case: Case, **fields) -> QuantizedLinearTritonSpec:
    """Small tiles, so that small calls have several."""
    form = case.form
    made = QuantizedLinearTritonSpec(
        case.dtype, form.bits, form.group, form.zero, form.scales, form.activations, form.kind, case.activation,
        case.gated, block_m=16, block_n=16,
    )  # fmt: skip
    return dataclasses.replace(made, **{"block_k": least_columns(made), **fields})


def check(case: Case, splits: int | None = None, seed: int = 0, **fields) -> torch.Tensor:
    call = make_call(case, seed)
    out = load(spec_of(case, **fields), INTERPRETED).launch(*call.arguments(), splits=splits)
    assert out.dtype == DTYPES[case.dtype] and out.is_contiguous()
    close("out", out, *expected(call))
    return out


# One row is a kernel of its own, up to 16 share their columns among programs or not, and more are tiles.
ROWS = ((1, None), (3, 3), (5, 1), (17, None))
FORMATS = {
    "4": WeightFormat(4, 64),
    "4_point": WeightFormat(4, 32, "point", "float32"),
    "3_offset": WeightFormat(3, 96, "offset"),
    "2_point": WeightFormat(2, 64, "point"),
    "8": WeightFormat(8, 0),
    "8_8": WeightFormat(8, 0, activations=8),
    "4_8_point": WeightFormat(4, 32, "point", activations=8),
    "8_4_offset": WeightFormat(8, 0, "offset", activations=4),
    "float8": FLOAT8,
}


@pytest.mark.parametrize(("rows", "splits"), ROWS)
@pytest.mark.parametrize("name", FORMATS)
def test_every_kernel_of_every_format(name: str, rows: int, splits: int | None) -> None:
    check(Case(FORMATS[name], rows=rows, widths=(17,), columns=100), splits)


@pytest.mark.grid
@pytest.mark.parametrize(
    ("bits", "zero", "group", "activations"),
    list(itertools.product((8, 4, 3, 2), ("middle", "point", "offset"), (0, 32, 64, 96, 256), (0, 8, 4))),
)
def test_every_format(bits: int, zero: str, group: int, activations: int) -> None:
    for rows, splits in ROWS:
        check(Case(WeightFormat(bits, group, zero, activations=activations), rows=rows, columns=300), splits)


@pytest.mark.grid
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_epilogue(activation: str, gated: bool, dtype: str) -> None:
    for form, (rows, splits) in itertools.product((FORMATS["3_offset"], FORMATS["4_8_point"], FLOAT8), ROWS):
        check(Case(form, dtype, rows, (21, 21), activation=activation, gated=gated), splits)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, int | None, dict[str, int]]:
    bits, activations = draw(st.sampled_from((4, 8, 3, 2))), draw(st.sampled_from((0, 8, 0, 4)))
    kind = draw(st.sampled_from(("int", "float8_e4m3fn"))) if bits == 8 else "int"
    zero = draw(st.sampled_from(("middle", "point", "offset"))) if kind == "int" else "middle"
    group, scales = draw(st.sampled_from((0, 32, 64, 96))), draw(st.sampled_from(("float16", "float32")))
    gated, rows = draw(st.booleans()), draw(st.sampled_from((1, 2, 16, 17, 40)))
    widths = (draw(st.integers(1, 40)),)
    widths = widths * 2 if gated else widths + ((draw(st.integers(0, 20)),) if draw(st.booleans()) else ())
    case = Case(
        WeightFormat(bits, group, zero, scales, activations, kind=kind),
        draw(st.sampled_from(tuple(DTYPES))),
        rows,
        widths,
        draw(st.integers(1, 150)),
        draw(st.sampled_from(ACTIVATIONS)),
        gated,
        draw(st.booleans()),
        draw(st.booleans()),
    )
    splits = draw(st.sampled_from((None, 1, 2, 5))) if rows <= 16 else None
    least = least_columns(spec_of(case))
    return case, splits, {"block_k": draw(st.sampled_from((least, 2 * least)))}


@settings(max_examples=8)
@given(cases(), st.integers(0, 9))
def test_drawn(drawn: tuple[Case, int | None, dict[str, int]], seed: int) -> None:
    case, splits, fields = drawn
    check(case, splits, seed, **fields)


@pytest.mark.grid
@settings(max_examples=300)
@given(cases(), st.integers(0, 99))
def test_many_drawn(drawn: tuple[Case, int | None, dict[str, int]], seed: int) -> None:
    case, splits, fields = drawn
    check(case, splits, seed, **fields)


@pytest.mark.parametrize("form", [FORMATS["4"], FORMATS["8_8"]], ids=["4", "8_8"])
def test_nan_and_infinity_stay_in_their_row(form: WeightFormat) -> None:
    case = Case(form, rows=4, columns=70, residual=False)
    call = make_call(case)
    plain = load(spec_of(case), INTERPRETED).launch(*call.arguments())
    call.x[1, 3], call.x[2, 69] = torch.nan, torch.inf
    out = load(spec_of(case), INTERPRETED).launch(*call.arguments())
    assert torch.equal(out[[0, 3]], plain[[0, 3]])
    assert out[1].isnan().all() and not out[2].isfinite().any()


def test_the_op_takes_any_strides_and_no_rows() -> None:
    form = FORMATS["4_point"]
    call = make_call(Case(form, widths=(8, 2), columns=75))
    given, more = call.arguments()[1:5], {"rows": [8, 2], "format": form.text(), "activation": "gelu"}
    apart = torch.randn(3, 2, 150, generator=torch.Generator().manual_seed(1))
    call_op = torch.ops.tilewright.quantized_linear
    for x in (apart[..., ::2].transpose(0, 1), apart[:0, :, :75], apart[0, 0, 75:]):
        residual = torch.ones(10).expand(*x.shape[:-1], 10)
        ours, theirs = (call_op(x, *given, residual, **more, target=t) for t in (INTERPRETED, "reference"))
        tolerance = TOLERANCE[torch.float32]
        torch.testing.assert_close(ours, theirs, rtol=tolerance.rtol, atol=tolerance.atol)


def test_what_has_no_kernel_says_why() -> None:
    call = make_call(Case(WeightFormat(4, 64)))
    x, codes, scales, zeros, biases, _, rows = call.arguments()
    op = torch.ops.tilewright.quantized_linear

    def run(x: torch.Tensor, form: WeightFormat, target: str) -> None:
        op(x, codes, scales, zeros, [None], rows=rows, format=form.text(), target=target)

    with pytest.raises(UnsupportedKernel, match="layout 'plain'"):
        run(x, WeightFormat(4, 64, layout="panels"), INTERPRETED)
    with pytest.raises(UnsupportedKernel, match="x is float64"):
        run(x.double(), call.case.form, INTERPRETED)
    with pytest.raises(UnsupportedKernel, match="take cuda tensors"):
        run(x, call.case.form, "triton")
    with pytest.raises(RuntimeError, match="codes has shape"):
        run(torch.zeros(2, 99), call.case.form, INTERPRETED)


class TwoLayers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(50, 64)
        self.first, self.second = torch.nn.Linear(64, 96), torch.nn.Linear(96, 40, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.second(torch.nn.functional.silu(self.first(self.table(ids))))


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4, "group_size": 64, "activations": 8},
        pytest.param({"bits": 8, "kind": FLOAT8.kind}, marks=pytest.mark.grid),
    ],
)
def test_a_compiled_model_runs_them(options: dict) -> None:
    torch.manual_seed(0)
    model, ids = TwoLayers().eval(), torch.arange(12).view(2, 6)
    quantize = [Quantize(**options, embeddings=True)]
    ours, plain = (
        tw.compile(model, quantize, example_inputs=(ids,), target=target, rest="eager")
        for target in (INTERPRETED, "reference")
    )
    kinds = sorted(use.spec.kind for use in ours.kernels)
    assert kinds == ["quantized_embedding", "quantized_linear_triton", "quantized_linear_triton"]
    assert [use.spec.activation for use in ours.kernels if use.op == "quantized_linear"] == ["silu", "none"]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), plain(ids), rtol=1e-3, atol=1e-4)
        assert (ours(ids) - model(ids)).abs().max() > 1e-3  # it is quantized


# ----------------------------------------------------------------------------------------------- texts and compilers

GOLDEN = {
    "quantized_linear_4": QuantizedLinearTritonSpec("bfloat16", 4, 64, "point", gated=True, activation="silu"),
    "quantized_linear_8_8": QuantizedLinearTritonSpec("float16", 8, 0, activations=8, num_warps=8),
    "quantized_linear_float8": QuantizedLinearTritonSpec("bfloat16", 8, 128, weights="float8_e4m3fn"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str) -> None:
    text = render(GOLDEN[name])
    check_golden(name, text)
    assert render(KernelSpec.from_dict(GOLDEN[name].to_dict())) == text
    assert " \n" not in text and "\n\n\n\n" not in text
    module = ast.parse(text)
    literals = {n.targets[0].id: n.value for n in module.body if isinstance(n, ast.Assign)}
    defined = {n.name: [a.arg for a in n.args.args] for n in module.body if isinstance(n, ast.FunctionDef)}
    for entry in ast.literal_eval(literals["COMPILE"]):
        assert sorted(defined[entry["kernel"]]) == sorted(entry["signature"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"bits": 5}, "bits is 5"),
        ({"weights": "float8_e4m3fn"}, "has 8 bits"),
        ({"block_k": 32, "bits": 2}, "power of two from 64"),
        ({"block_k": 64, "bits": 3, "activations": 8}, "power of two from 128"),
        ({"block_n": 24}, "block_n is 24"),
        ({"num_stages": 9}, "num_stages is 9"),
    ],
)
def test_specs_out_of_range_are_refused(change: dict, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        QuantizedLinearTritonSpec(**change)


COMPILED = {
    "4": {"bits": 4, "group": 64},
    "4_point": {"bits": 4, "group": 32, "zero": "point"},
    "4_offset": {"bits": 4, "group": 128, "zero": "offset", "scales": "float32"},
    "3": {"bits": 3, "group": 64},
    "2": {"bits": 2, "group": 64},
    "2_point": {"bits": 2, "group": 64, "zero": "point"},
    "8": {"bits": 8, "dtype": "float16"},
    "float8": {"bits": 8, "group": 128, "weights": "float8_e4m3fn"},
    "8_8": {"bits": 8, "activations": 8},
    "8_8_offset": {"bits": 8, "activations": 8, "zero": "offset", "group": 64},
    "4_8": {"bits": 4, "group": 64, "activations": 8},
    "4_8_point": {"bits": 4, "group": 32, "activations": 8, "zero": "point"},
    "2_4": {"bits": 2, "group": 32, "activations": 4},
    "float32": {"bits": 4, "group": 64, "dtype": "float32"},
    "gated": {"bits": 4, "group": 64, "gated": True, "activation": "silu"},
    "gated_3": {"bits": 3, "group": 64, "gated": True, "activation": "gelu", "zero": "point"},
    "gated_8_8": {"bits": 8, "activations": 8, "gated": True, "activation": "gelu_tanh"},
}


@pytest.mark.parametrize(
    ("name", "target"),
    [
        pytest.param(n, t, marks=() if (n, t) == ("4", "sm_90") else pytest.mark.grid)
        for n in COMPILED
        for t in DEFAULT_TARGETS
    ],
)
def test_cross_compiles(name: str, target: str) -> None:
    """Within the target's limits, checked by cross_compile, hardly a register spilled."""
    spec = QuantizedLinearTritonSpec(**{"dtype": "bfloat16", **COMPILED[name]})
    infos = cross_compile(render(tiles(spec, large=target.startswith("sm_"))), target)
    kernels = ["round_rows"] * bool(spec.activations) + ["vector", "tiles", "tiles", "merge"]
    assert [info.kernel for info in infos] == kernels
    assert all((info.stack_bytes or 0) <= 16 for info in infos), infos
