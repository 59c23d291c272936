"""Packing of quantized weights: the two layouts, and the way back to numbers."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tilewright.codegen.spec import SpecError
from tilewright.codegen.weight_format import WeightFormat, parse_weight_format
from tilewright.runtime.errors import BadArgument
from tilewright.runtime.ops import OPS, quantized_weight

FORMATS = st.builds(
    WeightFormat,
    bits=st.sampled_from([8, 4, 3, 2]),
    group=st.sampled_from([0, 32, 64]),
    zero=st.sampled_from(["middle", "point", "offset"]),
    scales=st.sampled_from(["float16", "float32"]),
)


def drawn(fmt: WeightFormat, rows: int, columns: int, seed: int = 0):
    """Codes (N, K), scale, zero by rows, of a random weight in ``fmt``."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, fmt.levels, (rows, columns), generator=g, dtype=torch.uint8)
    shape = (rows, fmt.groups(columns))
    scale = (torch.rand(shape, generator=g) / 100 + 1e-3).to(getattr(torch, fmt.scales))
    if fmt.zero == "middle":
        return codes, scale, None
    if fmt.zero == "point":
        return codes, scale, torch.randint(0, fmt.levels, shape, generator=g, dtype=torch.uint8)
    return codes, scale, torch.randn(shape, generator=g).to(scale.dtype)


def packed(fmt: WeightFormat, rows: int, columns: int, seed: int = 0):
    codes, scale, zero = drawn(fmt.changed(layout="plain"), rows, columns, seed)
    plain = fmt.changed(layout="plain")
    return quantized_weight.to_layout(
        quantized_weight.pack(codes, plain), scale, zero, plain, rows, columns, fmt.layout
    )


@given(FORMATS, st.integers(1, 40), st.integers(1, 100), st.sampled_from(["plain", "panels"]))
def test_codes_and_numbers_survive_packing(fmt, rows, columns, layout):
    fmt = fmt.changed(layout=layout)
    codes, scale, zero = drawn(fmt, rows, columns)
    parts = packed(fmt, rows, columns)
    shapes = fmt.shapes(rows, columns)
    for part, name in zip(parts, ("codes", "scale", "zero"), strict=True):
        assert (part is None) == (name not in shapes)
        if part is not None:
            assert (tuple(part.shape), str(part.dtype)) == (shapes[name][0], f"torch.{shapes[name][1]}")
    assert torch.equal(quantized_weight.unpack(parts[0], fmt, rows, columns), codes)
    per_column = [t if t is None else t.double() for t in (scale, zero)]
    wanted = torch.empty(rows, columns, dtype=torch.float64)
    for k in range(columns):
        g = k // fmt.group if fmt.group else 0
        s, z = per_column[0][:, g], None if zero is None else per_column[1][:, g]
        code = codes[:, k].double()
        wanted[:, k] = {
            "middle": lambda s=s, z=z, c=code: s * (c - fmt.middle),
            "point": lambda s=s, z=z, c=code: s * (c - z),
            "offset": lambda s=s, z=z, c=code: s * c + z,
        }[fmt.zero]()
    got = quantized_weight.dequantize(*parts, fmt, rows, columns, torch.float64)
    assert torch.equal(got, wanted)
    back = quantized_weight.to_layout(*parts, fmt, rows, columns, "plain")
    assert torch.equal(quantized_weight.unpack(back[0], fmt.changed(layout="plain"), rows, columns), codes)
    assert torch.equal(back[1], scale) and (zero is None or torch.equal(back[2], zero))


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_where_a_code_lies_in_a_panel(bits):
    """Byte b of word c of a vector, written out for one code."""
    fmt = WeightFormat(bits=bits, layout="panels")
    row, column = 21, 32 + 27
    codes = torch.zeros(40, 70, dtype=torch.uint8)
    codes[row, column] = fmt.levels - 1
    unit = quantized_weight.pack(codes, fmt)[1, 1].reshape(bits, 16, 4)[:, row % 16]
    v, b = 27 // 4, 27 % 4
    wanted = torch.zeros_like(unit)
    if bits == 8:
        wanted[v, b] = 255
    elif bits == 4:
        wanted[v // 2, b] = 15 << 4 * (v % 2)
    else:
        wanted[v // 4, b] = 3 << 2 * (v % 4)
        if bits == 3:
            wanted[2, b] = 1 << v
    assert torch.equal(unit, wanted)


@given(FORMATS, st.integers(1, 40), st.integers(1, 70), st.sampled_from(["plain", "panels"]), st.data())
def test_an_embedding_takes_rows(fmt, rows, columns, layout, data):
    fmt = fmt.changed(layout=layout)
    ids = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=0, max_size=5)), dtype=torch.int64)
    parts = packed(fmt, rows, columns)
    whole = quantized_weight.dequantize(*parts, fmt, rows, columns, torch.float32)
    got = torch.ops.tilewright.quantized_embedding(
        ids.reshape(1, -1), *parts, rows=rows, columns=columns, format=fmt.text(), dtype=torch.bfloat16
    )
    assert got.dtype == torch.bfloat16 and torch.equal(got, whole[ids].to(torch.bfloat16)[None])


def test_a_row_out_of_range_is_an_error():
    parts = packed(WeightFormat(layout="panels"), 16, 32)
    with pytest.raises(IndexError):
        torch.ops.tilewright.quantized_embedding(
            torch.tensor([16]),
            *parts,
            rows=16,
            columns=32,
            format=WeightFormat(layout="panels").text(),
            dtype=torch.float32,
        )


@given(FORMATS, st.sampled_from([0, 8, 4]), st.booleans(), st.sampled_from(["plain", "panels"]))
def test_the_reference_is_linear_on_the_numbers(fmt, activations, gated, layout):
    fmt = fmt.changed(layout=layout, activations=activations)
    columns, rows = 45, [20, 20]
    weights = [packed(fmt, n, columns, seed) for seed, n in enumerate(rows)]
    x = torch.randn(2, 3, columns, dtype=torch.float64)
    x[0, 0] = 0
    bias = torch.randn(20, dtype=torch.float64)
    width = 20 if gated else 40
    residual = torch.randn(2, 3, width, dtype=torch.float64)
    out = torch.ops.tilewright.quantized_linear(
        x,
        [w[0] for w in weights],
        [w[1] for w in weights],
        [] if fmt.zero == "middle" else [w[2] for w in weights],
        [bias, None],
        residual,
        rows=rows,
        format=fmt.text(),
        activation="silu",
        gated=gated,
    )
    if activations:
        most = 127 if activations == 8 else 7
        step = x.abs().amax(-1, keepdim=True) / most
        x = torch.where(step > 0, (x / step).round() * step, x)
    whole = [quantized_weight.dequantize(*w, fmt, 20, columns, torch.float64) for w in weights]
    first, second = x @ whole[0].T + bias, x @ whole[1].T
    act = torch.nn.functional.silu
    wanted = act(first) * second if gated else act(torch.cat([first, second], -1))
    assert torch.allclose(out, wanted + residual, atol=1e-10)


def test_opcheck():
    fmt = WeightFormat(group=32)
    codes, scale, _ = packed(fmt, 8, 64)
    x = torch.randn(3, 64)
    torch.library.opcheck(
        OPS["quantized_linear"].overload, (x, [codes], [scale], [], [None]), {"rows": [8], "format": fmt.text()}
    )


def test_counts_that_disagree_are_refused():
    fmt = WeightFormat(group=32, zero="offset")
    codes, scale, zero = packed(fmt, 8, 64)
    call = torch.ops.tilewright.quantized_linear
    x = torch.randn(3, 64)
    with pytest.raises(BadArgument, match="zeros"):
        call(x, [codes], [scale], [], [None], rows=[8], format=fmt.text())
    with pytest.raises(BadArgument, match="two weights"):
        call(x, [codes], [scale], [zero], [None], rows=[8], format=fmt.text(), gated=True)
    with pytest.raises(BadArgument, match="activation"):
        call(x, [codes], [scale], [zero], [None], rows=[8], format=fmt.text(), activation="tanh")


@pytest.mark.parametrize(
    "fields", [{"bits": 5}, {"group": 24}, {"zero": "left"}, {"kind": "float8_e4m3fn"}, {"activations": 2}, {"side": 1}]
)
def test_what_is_no_format_is_refused(fields):
    with pytest.raises(SpecError):
        parse_weight_format(json.dumps(fields))


def test_a_format_is_its_text():
    fmt = WeightFormat(bits=3, group=64, zero="point", layout="panels")
    assert parse_weight_format(fmt.text()) == fmt and parse_weight_format("{}") == WeightFormat()
