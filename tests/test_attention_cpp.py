"""The native attention kernel, forward, for every instruction set against float64 (bounds: attention_bounds.py)."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from attention_bounds import DTYPES, Expected, close, make_inputs, weights_bound
from golden import check_golden
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.codegen.attention import CPP_TILES, AttentionSpec
from tilewright.codegen.render import render
from tilewright.runtime import cpu
from tilewright.runtime import settings as runtime_settings
from tilewright.runtime.load import forget, load
from tilewright.runtime.ops.attention import reference

CAUSAL, END = "k_idx <= q_idx", "k_idx <= q_idx + k_len - q_len"
WINDOW = "(k_idx <= q_idx) & (k_idx > q_idx - 150)"
NAN, INF = math.nan, math.inf


def make_spec(**fields) -> AttentionSpec:
    return AttentionSpec(**fields).with_tiles(CPP_TILES)


# Few texts, since each is built for each instruction set; together they hold every dtype, bias and kind of mask.
SINKS = "(k_idx <= 3) | (k_idx > q_idx - 50)"
HALF, FLOAT16 = {"dtype": "bfloat16"}, {"dtype": "float16"}
SIGMOID = {"normalizer": "sigmoid"}
SPECS = {
    "causal_end": make_spec(head_dim=24, value_dim=9, mask=END, group=2),
    "window_half": make_spec(head_dim=64, value_dim=64, **HALF, mask=WINDOW, bias="bool", group=3),
    "sinks": make_spec(head_dim=33, value_dim=17, **HALF, mask=SINKS, group=2),
    "bias": make_spec(head_dim=5, value_dim=70, bias="float32"),
    "bias_half": make_spec(head_dim=32, value_dim=32, **HALF, bias="bfloat16"),
    "bias_fp16": make_spec(head_dim=16, value_dim=20, **FLOAT16, bias="float16", mask="k_idx // 8 <= q_idx // 8"),
    "sigmoid": make_spec(head_dim=64, value_dim=32, **SIGMOID, shift=True, mask="(k_idx + head) % 3 != 1", group=2),
    "sigmoid_half": make_spec(**HALF, **SIGMOID, shift=True, mask=CAUSAL, bias="float32", group=2, head_dim=80),
    "sigmoid_bool": make_spec(head_dim=12, value_dim=12, **SIGMOID, bias="bool", mask="q_idx <= k_len - batch"),
}
GOLDEN = {
    "attention_forward_native": make_spec(dtype="bfloat16", mask=WINDOW, bias="bool", group=3),
    "attention_forward_native_sigmoid": make_spec(normalizer="sigmoid", shift=True, bias="float32"),
}

_loaded: dict = {}


def kernel(spec: AttentionSpec, isa: str):
    """The launch of a spec for an instruction set; ``load`` itself keeps one a spec."""
    if isa not in cpu.supported():
        pytest.skip(f"this CPU has no {isa}")
    if (spec, isa) not in _loaded:
        with runtime_settings.override(cpu_isa=isa):
            forget()
            _loaded[spec, isa] = load(spec, "cpp").launch
            forget()
    return _loaded[spec, isa]


TWO_IN_TURN = tuple(SPECS)
isas = pytest.mark.parametrize("isa", ["amx", "avx512", "avx2", "baseline"])


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def check(spec: AttentionSpec, isa: str, inputs, scale: float = 0.3):
    out, lse = kernel(spec, isa)(*inputs, scale)
    grad = torch.zeros(out.shape, dtype=out.dtype)
    expected = Expected(inputs, grad, scale, spec.mask, spec.normalizer)
    assert out.dtype == inputs[0].dtype and out.transpose(1, 2).is_contiguous()
    close("out", out, expected.out, expected.out_bound)
    if spec.normalizer == "softmax":
        close("lse", lse, expected.lse, expected.lse_bound + weights_bound(spec.dtype, inputs[1].shape[2]))
    else:
        assert lse.shape == (*out.shape[:2], 0)
    return out, lse


# Around a vector, a strip (4 to 64 queries), a chunk, a tile (64 or 128 keys) and a block of queries (128).
LENGTHS = [0, 1, 2, 3, 7, 13, 16, 17, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 191, 200, 257, 300]


@st.composite
def inputs_of(draw, spec: AttentionSpec):
    if draw(st.booleans()):
        spec = dataclasses.replace(spec, bias_rows=spec.bias == "none" or draw(st.booleans()))
    lengths = draw(st.sampled_from(LENGTHS)), draw(st.sampled_from(LENGTHS))
    layout = draw(st.sampled_from(["plain", "heads_last", "transposed", "strided"]))
    batch, heads = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2]))
    return make_inputs(spec, lengths, batch, heads, layout, draw(st.integers(0, 99)))


@isas
@pytest.mark.parametrize("name", SPECS)
def test_matches_float64(name, isa):
    spec = SPECS[name]
    kernel(spec, isa)

    @given(inputs_of(spec), st.sampled_from([1, 2, 3]), st.sampled_from([0.3, 0.3, 0.05]))
    @settings(max_examples=20)
    def run(inputs, threads, scale):
        torch.set_num_threads(threads)
        check(spec, isa, inputs, scale)

    run()


@isas
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("name", "lengths", "batch", "heads"),
    [
        ("causal_end", (300, 500), 1, 1),  # keys packed by all threads, then blocks of queries
        ("causal_end", (300, 333), 2, 5),  # a thread packs the keys of the heads it owns
        ("causal_end", (50, 1500), 1, 1),  # one block of queries: keys split over threads, partial sums merged
        ("causal_end", (1, 3001), 1, 1),  # few rows: channels across the lanes
        ("sinks", (300, 500), 1, 1),
        ("sinks", (3, 2000), 1, 3),
        ("window_half", (50, 1500), 1, 1),
        ("window_half", (2, 1100), 1, 1),
        ("window_half", (300, 1500), 1, 2),  # few keys a query: threads walk over runs of queries, two heads in turn
        ("bias", (8, 777), 1, 1),
        ("bias", (9, 777), 1, 1),
        ("bias_half", (260, 260), 1, 2),
        ("sigmoid", (300, 500), 1, 1),
        ("sigmoid_half", (3, 2000), 1, 1),
        ("sigmoid_half", (60, 1500), 1, 1),
    ],
)  # fmt: skip
def test_every_way_to_share_the_work(name, lengths, batch, heads, threads, isa):
    torch.set_num_threads(threads)
    check(SPECS[name], isa, make_inputs(SPECS[name], lengths, batch, heads, "heads_last", 1))


def test_heads_taken_in_turn_give_what_each_gives_alone():
    """So many rows that a thread walks over those of heads that lie side by side together."""
    spec = SPECS["window_half"]
    launch = kernel(spec, cpu.supported()[0])
    torch.set_num_threads(1)
    q, k, v, _, _ = make_inputs(spec, (5500, 5500), 1, 2, "heads_last", 1)
    bias = (torch.arange(5500) % 7 != 3).expand(1, 1, 1, 5500)
    out, lse = launch(q, k, v, bias, None, 0.3)
    for head in range(2):
        rows = slice(3 * head, 3 * head + 3)
        alone = launch(q[:, rows], k[:, head : head + 1], v[:, head : head + 1], bias, None, 0.3)
        assert torch.equal(out[:, rows], alone[0]) and torch.equal(lse[:, rows], alone[1])
    last = slice(5300, 5500)
    inputs = [q[:, :, last], *(t[:, :, 5100:] for t in (k, v)), bias[..., 5100:], None]
    shown = torch.arange(400) <= torch.arange(200)[:, None] + 200
    shown = shown & (torch.arange(400) > torch.arange(200)[:, None] + 200 - 150) & inputs[3]
    exact = reference(*(t.double() for t in inputs[:3]), shown.expand(1, 1, 200, 400), None, scale=0.3)
    torch.testing.assert_close(out[:, :, last].double(), exact, atol=3e-2, rtol=3e-2)


@isas
@pytest.mark.parametrize("name", ["bias", "bias_half", "sigmoid_half", "bias_fp16"])
@pytest.mark.parametrize("q_len", [2, 40])
def test_queries_that_see_nothing_give_zeros(name, q_len, isa):
    spec = SPECS[name]
    inputs = make_inputs(spec, (q_len, 150), 1, 1, "plain", 3)
    inputs[3] = inputs[3].expand(1, spec.group, q_len, 150).clone()
    inputs[3][:, :, 1] = -INF
    inputs[3][..., 100:] = -INF
    out, lse = check(spec, isa, inputs)
    assert not out[:, :, 1].any() and bool(out[:, :, 0].any())
    assert spec.normalizer == "sigmoid" or bool((lse[:, :, 1] == -INF).all())


@isas
@pytest.mark.parametrize("name", ["causal_end", "sinks", "bias_fp16", "sigmoid"])
@pytest.mark.parametrize("q_len", [3, 40])
def test_nan_and_infinity_stay_in_their_rows(name, q_len, isa):
    spec = SPECS[name]
    inputs = make_inputs(spec, (q_len, 90), 1, 1, "heads_last", 3)
    q, k, v, bias, shift = inputs
    clean = reference(*(x.double() if x is not None else None for x in inputs), scale=0.3, mask=spec.mask,
                      normalizer=spec.normalizer)  # fmt: skip
    q[:, 0, 1] = NAN
    out, _ = kernel(spec, isa)(q, k, v, bias, shift, 0.3)
    assert bool(out[:, 0, 1].isnan().all())
    rest = torch.ones(out.shape, dtype=torch.bool)
    rest[:, 0, 1] = False
    torch.testing.assert_close(out.double()[rest], clean[rest], atol=3e-2, rtol=3e-2)
    # An infinite value reaches the rows that see its key, and no other.
    q[:, 0, 1] = 1.0
    v[:, :, 5] = INF
    out, _ = kernel(spec, isa)(q, k, v, bias, shift, 0.3)
    expected = reference(*(x.double() if x is not None else None for x in inputs), scale=0.3, mask=spec.mask,
                         normalizer=spec.normalizer)  # fmt: skip
    finite = expected.isfinite()
    assert bool((out[expected == INF] == INF).all())
    torch.testing.assert_close(out.double()[finite & out.isfinite()], expected[finite & out.isfinite()],
                               atol=3e-2, rtol=3e-2)  # fmt: skip


@isas
@pytest.mark.parametrize("name", ["causal_end", "sinks", "sigmoid"])
@pytest.mark.parametrize("scale", [-0.3, 0.0, 60.0])
def test_scales(name, scale, isa):
    """Negative, zero, and so large that all weight is on one key (or sigmoid saturates)."""
    spec = SPECS[name]
    for q_len in (2, 70):
        inputs = make_inputs(spec, (q_len, 200), 1, 2, "heads_last", 3)
        out, _ = kernel(spec, isa)(*inputs, scale)
        exact = reference(*(x.double() if x is not None else None for x in inputs), scale=scale, mask=spec.mask,
                          normalizer=spec.normalizer)  # fmt: skip
        assert bool(out.isfinite().all())
        if scale < 60:
            torch.testing.assert_close(out.double(), exact, atol=4e-2, rtol=2e-2)
        elif spec.dtype == "float32":
            torch.testing.assert_close(out.double(), exact, atol=2e-2, rtol=2e-2)


@isas
def test_growing_scores_are_rescaled(isa):
    """Every tile's scores are far above those before, so that each raises the peak, also inside a tile."""
    spec = SPECS["causal_end"]
    q, k, v, _, _ = inputs = make_inputs(spec, (70, 700), 1, 1, "plain", 3)
    q[:] = q.abs()
    k[:] = torch.linspace(0, 20, 700)[:, None].expand(700, 24)
    out, lse = kernel(spec, isa)(*inputs, 1.0)
    exact = reference(q.double(), k.double(), v.double(), scale=1.0, mask=spec.mask)
    torch.testing.assert_close(out.double(), exact, atol=1e-3, rtol=1e-3)
    assert bool(lse.isfinite().all())


@isas
@pytest.mark.parametrize("name", ["bias", "bias_half"])
@pytest.mark.parametrize("q_len", [6, 40])
def test_a_bias_at_the_dtypes_minimum_is_finite(name, q_len, isa):
    """Models hide keys with it; a query that sees nothing else gives the mean of the values, as in the model."""
    spec = SPECS[name]
    q, k, v, _, _ = make_inputs(spec, (q_len, 150), 1, 2, "plain", 3)
    bias = torch.zeros(1, 1, q_len, 150, dtype=DTYPES[spec.bias])
    bias[..., 2, :] = bias[..., 3, 1:] = torch.finfo(bias.dtype).min
    bias[..., 4, :] = -INF
    out, lse = kernel(spec, isa)(q, k, v, bias, None, 0.3)
    tolerance = {"rtol": 0, "atol": 1e-6 if spec.dtype == "float32" else 1e-2}
    torch.testing.assert_close(out[:, :, 2].float(), v.float().mean(2), **tolerance)
    torch.testing.assert_close(out[:, :, 3].float(), v[:, :, 0].float(), **tolerance)
    assert not out[:, :, 4].any() and bool((lse[:, :, [2, 4]] == -INF).all())


@isas
def test_lengths_and_heads_of_zero(isa):
    spec = SPECS["bias"]
    for q_shape, k_shape in [((1, 2, 0, 5), (1, 2, 9, 5)), ((0, 2, 3, 5), (0, 2, 9, 5)), ((1, 2, 3, 5), (1, 2, 0, 5))]:
        out, lse = kernel(spec, isa)(
            torch.randn(q_shape), torch.randn(k_shape), torch.randn(*k_shape[:3], 70), torch.zeros(1, 1, 1, k_shape[2]),
            None, 1.0,
        )  # fmt: skip
        assert out.shape == (*q_shape[:3], 70) and not out.any() and bool((lse == -INF).all())


WIDTHS = [(1, 1), (16, 256), (40, 24), (96, 96), (128, 128), (200, 200), (256, 16), (256, 256)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("head_dim", "value_dim"), WIDTHS)
def test_head_dims(head_dim, value_dim, dtype):
    spec = make_spec(head_dim=head_dim, value_dim=value_dim, dtype=dtype, mask=CAUSAL)
    for lengths in ((70, 90), (2, 300)):
        check(spec, cpu.supported()[0], make_inputs(spec, lengths, 1, 1, "heads_last", 1))


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    check_golden(name, render(GOLDEN[name], "cpp"), ".cpp.txt")


@pytest.mark.parametrize("name", SPECS)
def test_text_is_the_specs_alone_and_fits_a_page(name):
    text = render(SPECS[name], "cpp")
    assert text == render(dataclasses.replace(SPECS[name]), "cpp") and "{{" not in text and "{%" not in text
    assert max(map(len, text.splitlines())) <= 120
