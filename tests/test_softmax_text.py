"""Rendered softmax kernels: golden texts, what a spec refuses, and compilation for GPUs that are not here."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
from golden import check_golden

from tilewright.codegen.render import render
from tilewright.codegen.softmax import (
    ALGORITHMS,
    MAX_TILE,
    SoftmaxBackwardSpec,
    SoftmaxSpec,
    choose_splits,
    choose_tile,
    fits_on_chip,
)
from tilewright.codegen.spec import KernelSpec, SpecError
from tilewright.runtime import cross_compile as cross

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")

GOLDEN = {
    "softmax_one_read": SoftmaxSpec(algorithm="one_read", block_rows=2, block_cols=1024, num_warps=4),
    "softmax_two_pass_mask": SoftmaxSpec(bias="bool", scaled=True, in_dtype="bfloat16", outer_rank=1),
    "softmax_two_pass_split": SoftmaxSpec(splits=64, index_bits=64, bias="float16", outer_rank=2),
    "softmax_online_log_columns": SoftmaxSpec(
        algorithm="online", log=True, contiguous="rows", block_rows=64, block_cols=64
    ),
    "softmax_three_pass": SoftmaxSpec(algorithm="three_pass", out_dtype="float16"),
    "softmax_three_pass_reload": SoftmaxSpec(algorithm="three_pass_reload"),
    "softmax_backward": SoftmaxBackwardSpec(one_read=True, block_cols=2048, num_warps=8),
    "softmax_backward_log_split": SoftmaxBackwardSpec(log=True, splits=32, outer_rank=1, grad_dtype="bfloat16"),
}


NATIVE = {
    "softmax_one_read": SoftmaxSpec(algorithm="one_read", index_bits=64),
    "softmax_two_pass_mask": SoftmaxSpec(bias="bool", scaled=True, in_dtype="bfloat16", out_dtype="bfloat16"),
    "softmax_online_log_columns": SoftmaxSpec(algorithm="online", log=True, contiguous="rows"),
    "softmax_three_pass_reload": SoftmaxSpec(algorithm="three_pass_reload", in_dtype="float16"),
    "softmax_backward": SoftmaxBackwardSpec(one_read=True),
    "softmax_backward_log_columns": SoftmaxBackwardSpec(log=True, contiguous="rows", grad_dtype="bfloat16"),
}


@pytest.mark.parametrize("name", NATIVE)
def test_native_golden(name):
    spec = NATIVE[name]
    text = render(spec, "cpp")
    assert text == render(KernelSpec.from_dict(spec.to_dict()), "cpp")
    assert max(map(len, text.splitlines())) <= 120
    assert " \n" not in text and "\n\n\n\n" not in text
    check_golden(name, text, ".cpp.txt")


def test_native_texts_depend_on_nothing_but_the_function():
    """Tiles and index widths are Triton's: a native text that changed with them would be built again for nothing."""
    for other in ({"block_cols": 1024}, {"index_bits": 64}, {"outer_rank": 2}, {"num_warps": 4}, {"splits": 4}):
        for spec in (SoftmaxSpec(), SoftmaxBackwardSpec()):
            assert render(dataclasses.replace(spec, **other), "cpp") == render(spec, "cpp")


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    text = render(GOLDEN[name])
    assert text == render(KernelSpec.from_dict(GOLDEN[name].to_dict()))  # same spec, same bytes
    compile(text, name, "exec")
    assert "  \n" not in text and "\n\n\n\n" not in text
    check_golden(name, text)


def tiled(cls, n, contiguous="cols", one_read=False, **fields):
    held = 1
    if cls is SoftmaxBackwardSpec:
        held, fields["one_read"] = 2, one_read
    rows, cols, warps = choose_tile(n, 4096, contiguous, one_read, held)
    return cls(block_rows=rows, block_cols=cols, num_warps=warps, contiguous=contiguous, **fields)


def shipped():
    """What is shipped for short and long rows of every kind, at the limits of the tile."""
    yield (
        "one-read-longest",
        tiled(SoftmaxSpec, MAX_TILE, one_read=True, algorithm="one_read", bias="float32", scaled=True),
    )
    yield "one-read-short", tiled(SoftmaxSpec, 64, one_read=True, algorithm="one_read", in_dtype="float16", log=True)
    yield "one-read-columns", tiled(SoftmaxSpec, 1000, "rows", True, algorithm="one_read", out_dtype="bfloat16")
    for algorithm in ALGORITHMS[1:]:
        for contiguous in ("cols", "rows"):
            yield f"{algorithm}-{contiguous}", tiled(SoftmaxSpec, 1 << 17, contiguous, algorithm=algorithm)
    wide = {"index_bits": 64, "in_dtype": "bfloat16", "out_dtype": "bfloat16", "bias": "bool", "scaled": True}
    yield "two-pass-split", tiled(SoftmaxSpec, 1 << 27, algorithm="two_pass", splits=256, outer_rank=3, **wide)
    yield "online-split", tiled(SoftmaxSpec, 1 << 27, algorithm="online", splits=64, log=True, **wide)
    yield "backward-longest", tiled(SoftmaxBackwardSpec, MAX_TILE // 2, one_read=True)
    yield "backward-columns", tiled(SoftmaxBackwardSpec, 1000, "rows", one_read=True, log=True)
    yield "backward", tiled(SoftmaxBackwardSpec, 1 << 17, in_dtype="float16", grad_dtype="bfloat16")
    yield "backward-split", tiled(SoftmaxBackwardSpec, 1 << 27, splits=64, index_bits=64, outer_rank=2)


@pytest.mark.parametrize(("name", "spec"), list(shipped()), ids=[name for name, _ in shipped()])
def test_compiles_for_gpus_without_spilling(name, spec):
    text = render(spec)
    kernels = 1 if spec.splits == 1 else 2
    for target in TARGETS:
        compiled = cross.cross_compile(text, target)  # raises above the target's shared memory
        assert len(compiled) == kernels
        for info in compiled:
            assert not info.stack_bytes, f"{info.kernel} for {target} spills {info.stack_bytes} bytes a thread"


def wide_loads(info) -> int:
    """How many loads of four 32-bit words from global memory the PTX has."""
    return sum("ld.global" in line and ".v4.b32" in line for line in info.asm["ptx"].splitlines())


@pytest.mark.parametrize("contiguous", ["cols", "rows"])
def test_loads_are_wide_along_the_contiguous_axis(contiguous):
    for algorithm in ("one_read", "two_pass"):
        n = 1024 if algorithm == "one_read" else 1 << 17
        spec = tiled(SoftmaxSpec, n, contiguous, algorithm == "one_read", algorithm=algorithm)
        (info,) = cross.cross_compile(render(spec), "sm_90")
        assert wide_loads(info) > 0


def test_sixty_four_bit_offsets_are_in_the_code():
    for bits in (32, 64):
        (info,) = cross.cross_compile(render(SoftmaxSpec(index_bits=bits)), "sm_90")
        assert ("i64" in str(info.asm["ttir"]).split("tt.load")[0]) is (bits == 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_cols": 1000}, "block_cols is 1000, but must be a power of two"),
        ({"block_cols": 65536}, "from 1 to 32768"),
        ({"block_rows": 16}, "at most 32768"),
        ({"algorithm": "auto"}, "algorithm is 'auto'"),
        ({"algorithm": "three_pass", "splits": 2}, "three_pass handles a row in one program"),
        ({"algorithm": "three_pass_reload", "log": True}, "no way to compute log_softmax"),
        ({"algorithm": "three_pass_reload", "out_dtype": "float16"}, "round them twice"),
        ({"in_dtype": "float64"}, "in_dtype is 'float64'"),
        ({"bias": "int32"}, "bias is 'int32'"),
        ({"outer_rank": 9}, "outer_rank is 9"),
        ({"index_bits": 16}, "index_bits is 16"),
        ({"log": 1}, "log is 1"),
        ({"scaled": "x); import os"}, "must be True or False"),
    ],
)
def test_a_spec_out_of_range_is_refused(changes, message):
    with pytest.raises(SpecError, match=message.replace("(", r"\(").replace(")", r"\)")):
        dataclasses.replace(SoftmaxSpec(block_cols=4096), **changes)


def test_tiles_and_splits_hold_their_limits():
    for n in (1, 2, 63, 64, 1000, 4096, 4097, 32768, 1 << 27):
        for rows in (1, 3, 4096):
            for contiguous in ("cols", "rows"):
                for held in (1, 2):
                    for one_read in (False, True):
                        if one_read and not fits_on_chip(n, contiguous, held):
                            continue
                        height, cols, warps = choose_tile(n, rows, contiguous, one_read, held)
                        SoftmaxSpec(block_rows=height, block_cols=cols, num_warps=warps)
                        assert not one_read or cols >= n
                        assert height < 2 * rows
    assert choose_splits(1 << 27, 1, 4096, 132) == 256
    assert choose_splits(1 << 27, 1000, 4096, 132) == 1
    assert choose_splits(50_000, 1, 4096, 132) == 2
    assert choose_splits(4096, 1, 4096, 132) == 1


def test_candidates_are_few_and_compile():
    for _, spec in shipped():
        found = spec.candidates("triton")
        assert found[0] == spec and len(found) == len(set(found)) <= 5
        assert all(c.block_cols == spec.block_cols for c in found) or not spec._holds_row()
        assert spec.candidates("triton-interpret") == [spec]
    for candidate in SoftmaxSpec(splits=2).candidates("triton"):
        for info in cross.cross_compile(render(candidate), "sm_90"):
            assert not info.stack_bytes


def test_the_text_runs_without_tilewright(tmp_path):
    """The kernel file and a few lines around it, in a process that cannot import Tilewright."""
    spec = SoftmaxSpec(algorithm="two_pass", block_rows=4, block_cols=32, splits=2, scaled=True)
    (tmp_path / "kernel.py").write_text(render(spec))
    (tmp_path / "check.py").write_text(
        "import os; os.environ['TRITON_INTERPRET'] = '1'\n"
        "import sys; sys.modules['tilewright'] = None\n"
        "import torch, kernel\n"
        "x = torch.linspace(-9, 9, 300).reshape(3, 100)\n"
        "torch.testing.assert_close(kernel.launch(x, None, 1, 0.5), torch.softmax(0.5 * x, 1))\n"
        "print(kernel.SPEC['kind'], len(kernel.COMPILE))\n"
    )
    done = subprocess.run([sys.executable, "check.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["softmax", "2"]
