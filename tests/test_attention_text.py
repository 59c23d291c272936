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
from tilewright.codegen.symbols import mask_text
from tilewright.runtime.cross_compile import cross_compile

CAUSAL = "k_idx <= q_idx"
END = mask_text("k_idx <= q_idx + k_len - q_len")
WINDOW = "(k_idx <= q_idx) & (k_idx > q_idx - 256)"
SINKS = mask_text("(k_idx <= q_idx) & ((k_idx < 4) | (k_idx > q_idx - 256))")
DOCUMENTS = mask_text("(k_idx <= q_idx) & (table(q_idx) == table(k_idx))")

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
    "attention_forward_ranges": AttentionSpec(dtype="bfloat16", mask=SINKS).with_tiles(Tiles(128, 64, 4, 3)),
    "attention_forward_blocks": AttentionSpec(dtype="bfloat16", mask=DOCUMENTS, block_q=128, block_k=64),
    "attention_backward_blocks": AttentionBackwardSpec(
        dtype="bfloat16", mask=CAUSAL, block_q=64, block_k=64, bias="bfloat16", grad_bias=True, group=2
    ),
    "attention_split": AttentionSpec(dtype="bfloat16", mask=END, group=4)
    .with_tiles(Tiles(128, 64, 4, 3))
    .for_few_queries(),
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
    assert render(AttentionSpec(mask="(k_idx > 4) | (q_idx * k_idx <= 9)")).count("for k_start in") == 1


def test_several_ranges_are_one_loop_of_whole_tiles_and_one_of_ends():
    text = render(AttentionSpec(mask=SINKS))
    assert text.count("attend(acc, total, peak, queries") == 2 and "begin_1 = first - 255" in text
    assert "begin_2" not in text and text.count("= in_order(") == 1
    three = render(AttentionSpec(mask=mask_text(f"({SINKS}) | (q_idx < 3)")))
    assert "begin_2" in three and three.count("= in_order(") == 3


def test_lists_replace_limits_and_evaluate_the_mask_where_a_block_is_partial():
    text = render(AttentionSpec(mask=CAUSAL, block_q=64, block_k=32))
    assert "for step in" in text and "last + 1" not in text and "if (full == 0)" in text
    assert "entry & 1" in text and "entry & 1" not in render(AttentionSpec(block_q=64, block_k=32))
    assert "tiles_of_block" not in text and "tiles_of_block" in render(AttentionSpec(block_q=64, block_k=64))
    assert all(spec.in_blocks for spec in AttentionBackwardSpec(block_q=64, block_k=32).candidates("triton"))


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
    tiles = default_tiles(head_dim, head_dim, dtype, backward=backward, large=large)
    block_q, block_k = spec.block_q or 256, spec.block_k or 256
    return spec.with_tiles(
        dataclasses.replace(tiles, block_m=min(tiles.block_m, block_q), block_n=min(tiles.block_n, block_k))
    )


# sm_80, sm_90 and sm_100 give a block over 160 KiB of shared memory; the others get the tiles for 64 KiB.
LARGE = {"sm_80": True, "sm_90": True, "sm_100": True, "gfx942": False, "sm_89": False}
RICH = {"normalizer": "sigmoid", "shift": True, "bias": "float32", "mask": WINDOW, "group": 2}
BLOCKS = {"mask": DOCUMENTS, "block_q": 128, "block_k": 128}
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
    (128, "bfloat16", False, "sm_90", BLOCKS),
    (64, "bfloat16", True, "sm_80", BLOCKS),
    (64, "float16", False, "gfx942", {"mask": SINKS}),
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
    """Every head dim, dtype, target and kind of site. One of each head dim, for the targets in turn, runs always; the
    others carry the marker ``grid`` (``make grid``)."""
    axes = [16, 32, 64, 80, 96, 128, 192, 256], ["float32", "bfloat16", "float16"], list(LARGE), [False, True]
    for places in itertools.product(*(range(len(axis)) for axis in axes)):
        head, dtype, target, rich = places
        always = target == head % len(LARGE) and (head + dtype) % 3 == 0 and rich == dtype % 2
        values = [axis[place] for axis, place in zip(axes, places, strict=True)]
        yield pytest.param(*values, marks=pytest.mark.slow if always else [pytest.mark.slow, pytest.mark.grid])


@pytest.mark.parametrize(("head_dim", "dtype", "target", "rich"), list(grid()))
def test_every_head_dim_cross_compiles(head_dim, dtype, target, rich):
    for backward in (False, True):
        fields = (RICH_BACKWARD if backward else RICH) if rich else {"mask": CAUSAL}
        cross_compile(render(shipped(head_dim, dtype, backward, LARGE[target], **fields)), target)


SPARSE = {
    "ranges": {"mask": SINKS, "group": 4},
    "four_ranges": {"mask": mask_text(f"({SINKS}) | (q_idx < 3) | (k_idx == q_idx + 5)")},
    "blocks": BLOCKS | {"group": 4},
    "uneven": BLOCKS | {"block_q": 16, "block_k": 256, "bias": "bool"},
    "rich": RICH | {"mask": DOCUMENTS, "block_q": 64, "block_k": 64},
}


@pytest.mark.grid
@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize("target", LARGE)
@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(64, "bfloat16"), (128, "bfloat16"), (256, "float16"), (64, "float32")]
)
def test_sparse_kernels_cross_compile(head_dim, dtype, target, kind):
    for backward in (False, True):
        rich = {"grad_bias": True, "grad_shift": True} if backward and kind == "rich" else {}
        spec = shipped(head_dim, dtype, backward, LARGE[target], **SPARSE[kind], **rich)
        cross_compile(render(spec), target)
        if not backward:
            cross_compile(render(spec.for_few_queries()), target)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_kernels_for_few_queries_cross_compile(target):
    spec = shipped(128, "bfloat16", False, LARGE[target], mask=END, group=4).for_few_queries()
    assert [info.kernel for info in cross_compile(render(spec), target)] == ["attention_part", "attention_merge"]


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
