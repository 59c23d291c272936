"""Rendered attention kernels: golden texts, what a spec refuses, and compilation for GPUs that are not here."""

from __future__ import annotations

import ast
import dataclasses
import itertools

import pytest
from golden import check_golden

from tilewright.codegen.attention import (
    INTERPRETER_TILES,
    AttentionBackwardSpec,
    AttentionSpec,
    Tiles,
    default_tiles,
    padded,
)
from tilewright.codegen.render import render
from tilewright.codegen.spec import KernelSpec, SpecError
from tilewright.runtime.cross_compile import cross_compile

CAUSAL = "k_idx <= q_idx"
WINDOW = "(k_idx <= q_idx) & (k_idx > q_idx - 256)"

GOLDEN = {
    "attention_forward_causal": AttentionSpec(dtype="bfloat16", mask=CAUSAL).with_tiles(Tiles(128, 64, 4, 3)),
    "attention_forward_window_padding": AttentionSpec(
        head_dim=80, value_dim=80, dtype="float16", mask=WINDOW, bias="bool", bias_rows=False, group=3
    ),
    "attention_forward_sigmoid": AttentionSpec(normalizer="sigmoid", shift=True, bias="float32", wide=True),
    "attention_backward_causal": AttentionBackwardSpec(dtype="bfloat16", mask=CAUSAL, group=4),
    "attention_backward_sigmoid": AttentionBackwardSpec(
        normalizer="sigmoid", shift=True, grad_shift=True, mask=WINDOW, bias="float32", grad_bias=True
    ),
    "attention_backward_key_bias": AttentionBackwardSpec(
        bias="float32", bias_rows=False, grad_bias=True, grad_bias_rows=False, mask="(k_idx <= 3) | (k_idx > q_idx - 9)"
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    check_golden(name, render(GOLDEN[name]))


@pytest.mark.parametrize("name", GOLDEN)
def test_same_spec_same_bytes_and_back(name):
    spec = GOLDEN[name]
    again = KernelSpec.from_dict(spec.to_dict())
    assert again == spec and render(again) == render(spec)
    module = ast.parse(render(spec))
    literals = {n.targets[0].id: n.value for n in module.body if isinstance(n, ast.Assign)}
    assert ast.literal_eval(literals["SPEC"]) == spec.to_dict()
    defined = {n.name: [a.arg for a in n.args.args] for n in module.body if isinstance(n, ast.FunctionDef)}
    for entry in ast.literal_eval(literals["COMPILE"]):
        assert defined[entry["kernel"]] == list(entry["signature"])
    imports = {n.names[0].name for n in module.body if isinstance(n, ast.Import)}
    assert imports == {"torch", "triton", "triton.language"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"head_dim": 257}, "head_dim is 257"),
        ({"value_dim": 0}, "value_dim is 0"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"normalizer": "relu"}, "normalizer is 'relu'"),
        ({"bias": "float"}, "bias is 'float'"),
        ({"bias_rows": False}, "there is no bias"),
        ({"shift": True}, "softmax does not feel it"),
        ({"group": 0}, "group is 0"),
        ({"block_m": 48}, "block_m is 48"),
        ({"num_stages": 9}, "num_stages is 9"),
        ({"dot_precision": "fast"}, "dot_precision is 'fast'"),
        ({"mask": "q_idx >= k_idx"}, "canonical text is 'k_idx <= q_idx'"),
        ({"mask": "k_idx <= q_idx\n; import os"}, "not an expression"),
        ({"mask": "False"}, "hides every pair"),
    ],
)
def test_specs_out_of_range_are_refused(change, says):
    with pytest.raises(SpecError, match=says):
        AttentionSpec(**change)


def test_gradients_without_their_inputs_are_refused():
    with pytest.raises(SpecError, match="no additive bias"):
        AttentionBackwardSpec(bias="bool", grad_bias=True)
    with pytest.raises(SpecError, match="there is no shift"):
        AttentionBackwardSpec(normalizer="sigmoid", grad_shift=True)


def test_bool_or_row_bias_is_one_row_of_loads():
    """A key-padding mask must not be read as a (BLOCK_M, BLOCK_N) tile."""
    rows = render(AttentionSpec(bias="bool", bias_rows=True))
    row = render(AttentionSpec(bias="bool", bias_rows=False))
    assert "q_off * bias_row" in rows and "q_off * bias_row" not in row


def test_loops_follow_the_mask():
    causal = render(AttentionSpec(mask=CAUSAL))
    assert "end = tl.minimum(end, last + 1)" in causal and "begin = 0" in causal
    window = render(AttentionSpec(mask=WINDOW))
    assert "begin = first - 255" in window and window.count("for k_start in") == 3
    assert render(AttentionSpec()).count("for k_start in") == 2
    assert render(AttentionSpec(mask="(k_idx <= 3) | (k_idx > q_idx - 9)")).count("for k_start in") == 1


def test_candidates_are_few_and_of_the_same_function():
    for spec in GOLDEN.values():
        found = spec.candidates("triton")
        assert found[0] == spec and 2 <= len(found) <= 6 and len(set(found)) == len(found)
        for other in found:
            assert spec.with_tiles(INTERPRETER_TILES) == other.with_tiles(INTERPRETER_TILES)
        assert spec.candidates("triton-interpret") == [spec]


def shipped(head_dim: int, dtype: str, backward: bool, large: bool, **fields) -> AttentionSpec | AttentionBackwardSpec:
    cls = AttentionBackwardSpec if backward else AttentionSpec
    spec = cls(head_dim=head_dim, value_dim=head_dim, dtype=dtype, **fields)
    return spec.with_tiles(default_tiles(head_dim, head_dim, dtype, backward=backward, large=large))


# sm_80, sm_90 and sm_100 give a block over 160 KiB of shared memory; the others get the tiles for 64 KiB.
LARGE = {"sm_80": True, "sm_90": True, "sm_100": True, "gfx942": False, "sm_89": False}
RICH = {"normalizer": "sigmoid", "shift": True, "bias": "float32", "mask": WINDOW, "group": 2}
RICH_BACKWARD = RICH | {"grad_bias": True, "grad_shift": True}

SOME = [
    (64, "bfloat16", False, "sm_80", {"mask": CAUSAL}),
    (64, "bfloat16", True, "sm_80", {"mask": CAUSAL}),
    (128, "float16", False, "sm_90", {"bias": "bool", "bias_rows": False}),
    (128, "bfloat16", True, "gfx942", {"mask": CAUSAL}),
    (256, "bfloat16", False, "gfx942", {"mask": CAUSAL}),
    (96, "float32", False, "gfx942", {}),
    (80, "float16", False, "sm_100", RICH),
    (16, "float16", True, "sm_100", RICH_BACKWARD),
    (256, "bfloat16", True, "sm_90", {}),
]


@pytest.mark.parametrize(
    ("head_dim", "dtype", "backward", "target", "fields"),
    SOME,
    ids=lambda value: str(value) if not isinstance(value, dict) else "rich" if len(value) > 2 else "-".join(value),
)
def test_cross_compiles(head_dim, dtype, backward, target, fields):
    """Within the target's shared memory, checked by cross_compile; the kernels the text promises, all of them."""
    spec = shipped(head_dim, dtype, backward, LARGE[target], **fields)
    compiled = cross_compile(render(spec), target)
    expected = ["attention_forward"]
    if backward:
        expected = ["attention_delta"] * (spec.normalizer == "softmax") + ["attention_dkdv", "attention_dq"]
        expected += ["attention_dbias"] * spec.grad_bias
    assert [info.kernel for info in compiled] == expected


def grid():
    """Every head dim, dtype, target and kind of site. A sixth of them, in which each head dim meets each target, runs
    always; the others carry the marker ``grid`` (``make grid``)."""
    axes = [16, 32, 64, 80, 96, 128, 192, 256], ["float32", "bfloat16", "float16"], list(LARGE), [False, True]
    for places in itertools.product(*(range(len(axis)) for axis in axes)):
        head, dtype, target, rich = places
        always = (head + dtype + target) % 3 == 0 and rich == (head + target) % 2
        values = [axis[place] for axis, place in zip(axes, places, strict=True)]
        yield pytest.param(*values, marks=pytest.mark.slow if always else [pytest.mark.slow, pytest.mark.grid])


@pytest.mark.parametrize(("head_dim", "dtype", "target", "rich"), grid())
def test_every_head_dim_cross_compiles(head_dim, dtype, target, rich):
    for backward in (False, True):
        fields = (RICH_BACKWARD if backward else RICH) if rich else {"mask": CAUSAL}
        cross_compile(render(shipped(head_dim, dtype, backward, LARGE[target], **fields)), target)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_unaligned_arguments_compile(target):
    for backward in (False, True):
        cross_compile(render(shipped(64, "bfloat16", backward, LARGE[target], mask=CAUSAL)), target, aligned=False)


def test_default_tiles_cover_every_head_dim():
    for dim, dtype, backward, large in itertools.product(
        range(1, 257), ["float32", "bfloat16"], [False, True], [False, True]
    ):
        tiles = default_tiles(dim, dim, dtype, backward=backward, large=large)
        assert tiles == default_tiles(padded(dim), 16, dtype, backward=backward, large=large)
    assert dataclasses.astuple(INTERPRETER_TILES)[0] >= 16
