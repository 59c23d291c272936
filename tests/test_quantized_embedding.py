"""Embeddings with packed weights: the native and the Triton kernels against the definition in float64."""

from __future__ import annotations

import ast

import pytest
import torch
from attention_bounds import DTYPES, U32, UNIT, close
from golden import check_golden
from quantized_cases import make_weight

from tilewright.codegen.quantized_embedding import QuantizedEmbeddingSpec
from tilewright.codegen.render import render
from tilewright.codegen.spec import KernelSpec, SpecError
from tilewright.codegen.weight_format import WeightFormat
from tilewright.runtime.cross_compile import DEFAULT_TARGETS, cross_compile
from tilewright.runtime.errors import BadArgument, UnsupportedKernel
from tilewright.runtime.ops import quantized_weight

INTERPRETED = "triton-interpret"
FLOAT8 = WeightFormat(8, 64, kind="float8_e4m3fn")
look_up = torch.ops.tilewright.quantized_embedding


def check(form: WeightFormat, dtype: str, target: str, columns: int = 107, rows: int = 37, device: str = "cpu") -> None:
    """Ids of another shape and dtype than usual, and twice the same, in a table of odd sizes."""
    generator = torch.Generator().manual_seed(form.bits)
    plain = form.changed(layout="plain")
    table = make_weight(rows, columns, plain, generator)
    ids = torch.randint(0, rows, (3, 5), generator=generator, dtype=torch.int32).T
    ids[0, 0] = ids[1, 1] = rows - 1
    exact = quantized_weight.dequantize(*table, plain, rows, columns, torch.float64)[ids.long()]
    # Where zero is an offset, what is added may cancel.
    none = None if table[2] is None else torch.zeros_like(table[2])
    size = quantized_weight.dequantize(table[0], table[1], none, plain, rows, columns, torch.float64)[ids.long()]
    given = quantized_weight.to_layout(*table, plain, rows, columns, form.layout)
    given = [None if t is None else t.to(device) for t in given]
    out = look_up(
        ids.to(device), *given, rows=rows, columns=columns, format=form.text(), dtype=DTYPES[dtype], target=target
    )
    assert out.dtype == DTYPES[dtype] and out.shape == (5, 3, columns)
    tiny = 2.0**-24 if dtype == "float16" else 0.0
    close("out", out.cpu(), exact, 2 * UNIT[DTYPES[dtype]] * exact.abs() + 4 * U32 * (size.abs() + exact.abs()) + tiny)


NATIVE = {
    "4_panels": (WeightFormat(4, 32, "point", layout="panels"), "bfloat16"),
    "3_panels": (WeightFormat(3, 64, "offset", "float32", layout="panels"), "float32"),
    "8": (WeightFormat(8, 0), "float32"),
    "2": (WeightFormat(2, 96, "point"), "float16"),
}
SOME = ("4_panels",)


@pytest.mark.parametrize("name", [n if n in SOME else pytest.param(n, marks=pytest.mark.grid) for n in NATIVE])
def test_native(name: str) -> None:
    check(*NATIVE[name], "cpp")


@pytest.mark.grid
@pytest.mark.parametrize("layout", ["plain", "panels"])
@pytest.mark.parametrize("zero", ["middle", "point", "offset"])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_native_with_every_instruction_set(bits: int, zero: str, layout: str, cpu_isa: str) -> None:
    check(WeightFormat(bits, 64, zero, layout=layout), "bfloat16" if zero == "point" else "float32", "cpp")


FORMS = {
    "4": WeightFormat(4, 32, "point"),
    "3": WeightFormat(3, 0),
    "2": WeightFormat(2, 96, "offset"),
    "8": WeightFormat(8, 64),
    "float8": FLOAT8,
}


@pytest.mark.parametrize(
    ("name", "dtype"), [("4", "bfloat16"), ("3", "float32"), ("2", "float16"), ("float8", "float32")]
)
def test_triton(name: str, dtype: str) -> None:
    check(FORMS[name], dtype, INTERPRETED)


@pytest.mark.grid
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMS)
def test_triton_with_several_programs_a_row(name: str, dtype: str) -> None:
    check(FORMS[name], dtype, INTERPRETED, columns=600, rows=1)


@pytest.mark.parametrize("target", ["cpp", INTERPRETED])
def test_bad_ids_and_tables(target: str) -> None:
    """A native kernel raises, call after call; a GPU cannot, and gives NaN for what the table does not have."""
    form = NATIVE["4_panels"][0].changed(layout="plain" if target == INTERPRETED else "panels")
    table = make_weight(20, 40, form.changed(layout="plain"), torch.Generator().manual_seed(0))
    table = quantized_weight.to_layout(*table, form.changed(layout="plain"), 20, 40, form.layout)
    given = {"rows": 20, "columns": 40, "format": form.text(), "dtype": torch.bfloat16, "target": target}
    good = look_up(torch.arange(3, 5), *table, **given)
    for ids in (torch.tensor([3, 20, 4]), torch.tensor([3, -1, 4])):
        for _ in range(20 if target == "cpp" else 0):
            with pytest.raises(IndexError, match=f"id {int(ids[1])} in a table of 20 rows"):
                look_up(ids, *table, **given)
        if target != "cpp":
            out = look_up(ids, *table, **given)
            assert torch.equal(out[[0, 2]], good) and out[1].isnan().all()
    assert look_up(torch.empty(0, 2, dtype=torch.int64), *table, **given).shape == (0, 2, 40)
    with pytest.raises(BadArgument, match="ids are torch.float32"):
        look_up(torch.zeros(2), *table, **given)
    with pytest.raises(BadArgument, match="a table"):
        look_up(torch.zeros(2, dtype=torch.int64), *table, **given | {"columns": 72})


def test_what_has_no_kernel_says_why() -> None:
    table = make_weight(4, 40, FLOAT8, torch.Generator().manual_seed(0))
    given = {"rows": 4, "columns": 40, "format": FLOAT8.text(), "dtype": torch.float32}
    ids = torch.zeros(1, dtype=torch.int64)
    for change, says in (
        ({"target": "cpp"}, "no float8_e4m3fn weights"),
        ({"target": INTERPRETED, "dtype": torch.float64}, "not float64"),
        ({"target": INTERPRETED, "format": WeightFormat(layout="panels").text()}, "layout 'plain'"),
    ):
        with pytest.raises(UnsupportedKernel, match=says):
            look_up(ids, *table, **given | change)


GOLDEN = {
    "quantized_embedding_3": (QuantizedEmbeddingSpec("bfloat16", 3, 64, "point"), "triton"),
    "quantized_embedding_native": (QuantizedEmbeddingSpec("bfloat16", 4, 64, layout="panels"), "cpp"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str) -> None:
    spec, target = GOLDEN[name]
    text = render(spec, target)
    assert render(KernelSpec.from_dict(spec.to_dict()), target) == text
    assert " \n" not in text and "\n\n\n\n" not in text
    check_golden(name, text, ".cpp.txt" if target == "cpp" else ".py.txt")
    if target == "triton":
        ast.parse(text)


@pytest.mark.parametrize(
    ("change", "target", "says"),
    [
        ({"layout": "panels"}, "triton", "layout 'plain'"),
        ({"bits": 8, "weights": "float8_e4m3fn"}, "cpp", "integer codes"),
        ({"group": 33}, "cpp", "multiple of 32"),
    ],
)
def test_specs_out_of_range_are_refused(change: dict, target: str, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        render(QuantizedEmbeddingSpec(**change), target)


@pytest.mark.parametrize(
    ("bits", "target"),
    [pytest.param(b, t, marks=() if (b, t) == (4, "sm_80") else pytest.mark.grid)
     for b in (8, 4, 3, 2) for t in DEFAULT_TARGETS],
)  # fmt: skip
def test_cross_compiles(bits: int, target: str) -> None:
    for fields in ({"zero": "point"}, *([{"weights": FLOAT8.kind}] if bits == 8 else [])):
        infos = cross_compile(render(QuantizedEmbeddingSpec("bfloat16", bits, 64, **fields)), target)
        assert not any(info.stack_bytes for info in infos), infos
