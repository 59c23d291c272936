"""Triton texts: interpreted and compiled in one process, however triton was imported; cross-compiled within limits."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import warnings

import pytest
import runtime_toy
import torch
from runtime_toy import ROOT, ToySpec

from tilewright.runtime import cross_compile as cc
from tilewright.runtime import errors, load, settings
from tilewright.runtime.targets import triton_language

# float32 softmax rows: exp is within 2 ulp, a row's sum of at most 64 terms adds 6 roundings pairwise.
ATOL = 16 * torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def toys(fresh_cache, monkeypatch):
    monkeypatch.setattr(load, "render", runtime_toy.toy_text)


def check(kernel, rows=3, n=50):
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(n))
    expected = x.double().softmax(1)
    assert (kernel.launch(x).double() - expected).abs().max() <= ATOL


def test_interpreted():
    check(load.load(ToySpec(), "triton-interpret"))


def test_a_traceback_shows_the_kernel_file(monkeypatch):
    text = runtime_toy.TRITON_TEXT.replace("BLOCK_SIZE", "64").replace(
        "    y = torch", "    raise ArithmeticError\n    y = torch"
    )
    monkeypatch.setattr(load, "render", lambda spec, target: text)
    kernel = load.load(ToySpec(), "triton-interpret")
    with pytest.raises(ArithmeticError) as caught:
        kernel.launch(torch.ones(1, 2))
    last = caught.traceback[-1]
    assert str(last.path) == str(kernel.path) and str(last.statement).strip() == "raise ArithmeticError"


def test_what_runs_is_what_was_checked(monkeypatch):
    """Triton reads a kernel's source when it is decorated: not from a file that was changed after the check."""
    target = load.targets.get("triton-interpret")
    real = target.open

    def open_after_tampering(folder, spec, text, digest):
        (folder / "kernel.py").write_text(text.replace("tl.exp(", "tl.exp2("))
        return real(folder, spec, text, digest)

    monkeypatch.setattr(target, "open", open_after_tampering)
    check(load.load(ToySpec(), "triton-interpret"))


def test_the_kernel_file_imports_nothing_of_ours(fresh_cache):
    """Run with only the file's folder to import from: the kernel needs torch and triton alone."""
    path = load.load(ToySpec(), "triton-interpret").path
    code = (
        "import sys; sys.path[:] = [p for p in sys.path if p]\nimport kernel, torch\nx = torch.randn(2, 9)\n"
        "assert torch.allclose(kernel.launch(x), x.softmax(1))\n"
        "print([m for m in sys.modules if m.partition('.')[0] == 'tilewright'])\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(path.parent),
        "TRITON_INTERPRET": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, cwd=path.parent
    )
    assert run.stdout.strip().endswith("[]"), run.stderr


def test_threads_interpret_side_by_side():
    kernel, wrong = load.load(ToySpec(), "triton-interpret"), []

    def work(n):
        try:
            check(kernel, rows=2, n=n)
        except BaseException as error:  # noqa: BLE001 - handed to the test's own thread
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in (5, 17, 40, 64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def language() -> dict:
    """Every name of the triton language, by identity, and the switches."""
    from triton import knobs

    modules, classes = triton_language._scopes()
    names = {(id(scope), name): id(value) for scope in (*modules, *classes) for name, value in vars(scope).items()}
    return {"names": names, "knob": dict(knobs.runtime.__dict__), "env": dict(os.environ)}


def changed(before: dict, after: dict) -> list:
    lost = [key for key, value in before["names"].items() if after["names"].get(key) != value]
    return lost + [name for name in ("knob", "env") if before[name] != after[name]]


def test_the_language_is_put_back_after_a_launch_and_after_an_error():
    kernel = load.load(ToySpec(), "triton-interpret")
    before = language()
    check(kernel)
    assert not changed(before, language())
    with pytest.raises(Exception, match="BLOCK|shape|size|broadcast|index"):
        kernel.launch(torch.ones(3))  # one dim too few: fails in launch
    assert not changed(before, language())
    for interpret in (True, False):
        with pytest.raises(ZeroDivisionError), triton_language.language_mode(interpret):
            raise ZeroDivisionError
        assert not changed(before, language())


def test_modes_nest():
    import triton
    from triton import knobs
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    with triton_language.language_mode(interpret=True):
        with triton_language.language_mode(interpret=False):
            assert isinstance(triton.language.sum, JITFunction) and not knobs.runtime.interpret
        assert isinstance(triton.language.sum, InterpretedFunction) and knobs.runtime.interpret


BOTH = """
import hashlib, os, shutil, sys, warnings
warnings.simplefilter("ignore")
import triton, torch
import runtime_toy, test_runtime_triton as t
runtime_toy.install()
from tilewright.runtime import load, cross_compile as cc
from tilewright.runtime.targets import triton_language
print("imported interpreted:", triton_language.imported_interpreted())
spec = runtime_toy.ToySpec()
text = runtime_toy.toy_text(spec, "triton")
def compiled():
    for name in ("sm_90", "gfx942"):
        shutil.rmtree(os.environ["TILEWRIGHT_CACHE_DIR"] + "/triton", ignore_errors=True)  # compile, do not look up
        (info,) = cc.cross_compile(text, name)
        print(name, info.shared_bytes, hashlib.sha256(info.asm["ttir"].encode()).hexdigest())
def interpreted():
    t.check(load.load(spec, "triton-interpret"))
before = t.language()
for step in sys.argv[1]:
    {"c": compiled, "i": interpreted}[step]()
assert not t.changed(before, t.language()), t.changed(before, t.language())
# A kernel of the user's own, outside of ours, is as it would be without us.
fresh = triton.jit(t.user_kernel)
print(type(fresh).__name__)
"""


def user_kernel(x):
    pass


def both(tmp_path, steps: str, **environment: str) -> list[str]:
    run = subprocess.run(
        [sys.executable, "-c", BOTH, steps],
        env=runtime_toy.environment(tmp_path / steps, **environment),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_both_ways_of_importing_triton_interpret_and_compile_the_same(tmp_path):
    """Compiled code is the same with and without TRITON_INTERPRET, before and after interpreting."""
    alone = both(tmp_path, "c")
    without = both(tmp_path, "ici")
    given = both(tmp_path, "ciic", TRITON_INTERPRET="1")
    assert alone[0] == without[0] == "imported interpreted: False"
    assert given[0] == "imported interpreted: True"
    assert alone[-1] == without[-1] == "JITFunction" and given[-1] == "InterpretedFunction"
    assert alone[1:-1] == without[1:-1]
    assert given[1:-1] == alone[1:-1] * 2


# Cross-compilation.


@pytest.mark.parametrize("target", cc.DEFAULT_TARGETS)
@pytest.mark.parametrize("aligned", [True, False])
def test_cross_compiles(target, aligned):
    (info,) = cc.cross_compile(load.load(ToySpec(), "triton-interpret"), target, aligned=aligned)
    assert (info.kernel, info.target, info.num_warps, info.num_stages) == ("rows", target, 4, 1)
    assert ("cubin" if target.startswith("sm") else "hsaco") in info.kinds
    assert 0 < info.registers <= cc.GPU_TARGETS[target].registers
    assert info.stack_bytes == 0
    assert 0 <= info.shared_bytes <= cc.GPU_TARGETS[target].shared_bytes


def test_registers_are_what_ptxas_says(tmp_path):
    from triton import knobs

    (info,) = cc.cross_compile(runtime_toy.toy_text(ToySpec(256), "triton"), "sm_80")
    (tmp_path / "kernel.ptx").write_text(info.asm["ptx"])
    command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_80", "kernel.ptx", "-o", "kernel.cubin"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert int(re.search(r"Used (\d+) registers", run.stderr)[1]) == info.registers
    assert int(re.search(r"(\d+) bytes stack frame", run.stderr)[1]) == info.stack_bytes
    assert cc.cubin_usage(b"no ELF file") == (None, None)


DOT = """
import triton
import triton.language as tl

@triton.jit
def product(a, b, c, n, B: tl.constexpr, K: tl.constexpr):
    rows = tl.arange(0, B)
    inner = tl.arange(0, K)
    total = tl.zeros([B, B], tl.float32)
    for start in range(0, n, K):
        left = tl.load(a + rows[:, None] * n + start + inner[None, :])
        right = tl.load(b + (start + inner)[:, None] * B + rows[None, :])
        total = tl.dot(left, right, total)
    tl.store(c + rows[:, None] * B + rows[None, :], total)

COMPILE = [{"kernel": "product", "signature": {"a": "*fp16", "b": "*fp16", "c": "*fp32", "n": "i32",
    "B": "constexpr", "K": "constexpr"}, "constexprs": {"B": 128, "K": 64}, "num_warps": 8, "num_stages": STAGES}]

def launch(a, b):
    ...
"""


def test_shared_memory_is_held_against_the_limit():
    """A stage is 128 x 64 and 64 x 128 float16, 32 KiB. Ampere keeps one stage in registers: seven need 192 KiB."""
    for target in ("sm_80", "sm_90", "gfx942"):
        (info,) = cc.cross_compile(DOT.replace("STAGES", "2"), target)
        assert info.shared_bytes >= 32 << 10
    (hopper,) = cc.cross_compile(DOT.replace("STAGES", "7"), "sm_90")
    assert hopper.shared_bytes == 7 * 32 << 10
    with pytest.raises(
        errors.BuildError, match="kernel product for sm_80 needs 196608 bytes of shared memory.* 166912"
    ):
        cc.cross_compile(DOT.replace("STAGES", "7"), "sm_80")


def test_the_aligned_case_is_the_one_that_needs_memory():
    """Unaligned loads are not pipelined through shared memory, so a check of that case alone would pass wrongly."""
    text = DOT.replace("STAGES", "7")
    (general,) = cc.cross_compile(text, "sm_80", aligned=False)
    assert general.shared_bytes < 163 << 10
    unaligned = text.replace('"num_warps"', '"unaligned": ["n"], "num_warps"')
    assert cc.cross_compile(unaligned, "sm_80")[0].shared_bytes < 163 << 10


def test_too_many_warps_are_refused():
    text = runtime_toy.toy_text(ToySpec(), "triton").replace('"num_warps": 4', '"num_warps": 32')
    assert cc.cross_compile(text, "sm_80")[0].num_warps == 32
    with pytest.raises(errors.BuildError, match="rows for gfx942"):
        cc.cross_compile(text, "gfx942")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("COMPILE = ", "TABLE = ", "no COMPILE table"),
        ('"kernel": "rows"', '"kernel": "columns"', "'columns', which the file does not define"),
        ('"n": "i32", ', "", "disagree about the argument 'n'"),
        ('"constexprs": {"BLOCK": 64},', "", "lacks 'constexprs'"),
        ("tl.cumsum(", "tl.cumsun(", "kernel rows for sm_90 does not compile.*cumsun"),
    ],
)
def test_what_does_not_compile_is_said(old, new, message):
    text = runtime_toy.toy_text(ToySpec(), "triton")
    assert old in text
    with pytest.raises(errors.BuildError, match=re.compile(message, re.DOTALL)):
        cc.cross_compile(text.replace(old, new), "sm_90")


def test_unknown_gpu():
    with pytest.raises(errors.BadArgument, match="'sm_42'.*sm_90"):
        cc.cross_compile("", "sm_42")


def test_binaries_are_kept_below_the_cache(fresh_cache):
    cc.cross_compile(runtime_toy.toy_text(ToySpec(), "triton"), "sm_90")
    assert list((fresh_cache / "triton").rglob("*.cubin"))


def test_cross_compiling_with_an_unusable_cache(tmp_path):
    (tmp_path / "file").write_text("")
    with settings.override(cache_dir=tmp_path / "file" / "cache"), pytest.warns(errors.TilewrightWarning):
        assert cc.cross_compile(runtime_toy.toy_text(ToySpec(), "triton"), "sm_80")


def test_a_compilation_at_first_launch_is_in_compiled_mode_and_below_our_cache(monkeypatch, fresh_cache):
    """The way a launch on a GPU compiles, up to the binary: Triton's warmup with a driver that only has a name."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Named:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    monkeypatch.setattr(triton_language, "_user_cache_dir", None)
    monkeypatch.setattr(driver, "_active", Named())
    kernel = load.load(ToySpec(), "triton")
    module = sys.modules[kernel.launch.__module__]
    before = language()
    assert triton_language.imported_interpreted() and knobs.runtime.interpret  # as conftest.py wants it
    compiled = module.rows.warmup(torch.float32, torch.float32, 50, BLOCK=64, grid=(1,))
    assert "cubin" in compiled.asm
    assert [path.name for path in (fresh_cache / "triton").rglob("*.cubin")] == ["rows.cubin"]
    assert not changed(before, language())
    monkeypatch.setattr(triton_language, "_user_cache_dir", "/the/user/said/so")
    with triton_language.compile_mode():
        assert "dir" not in knobs.cache.__dict__


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_compiled_target_loads_and_says_so_at_launch():
    kernel = load.load(ToySpec(), "triton")
    assert kernel.text == runtime_toy.toy_text(ToySpec(), "triton")
    with pytest.raises(errors.UnsupportedKernel, match="triton-interpret"):
        kernel.launch(torch.ones(2, 3))


@pytest.mark.gpu
def test_on_the_gpu():
    kernel = load.load(ToySpec(), "triton")
    x = torch.randn(5, 40, device="cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = kernel.launch(x)
    assert (out.double() - x.double().softmax(1)).abs().max() <= ATOL
    assert list((settings.get().cache_dir / "triton").rglob("*.cubin"))
    check(load.load(ToySpec(), "triton-interpret"))
    assert (kernel.launch(x) == out).all()
