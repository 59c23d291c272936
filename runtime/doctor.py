"""Facts for ``tilewright doctor``: what works on this machine, found by doing it, and the remedy for what does not."""

from __future__ import annotations

import dataclasses
import importlib
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from . import cache, settings
from .compilers import find_cxx
from .errors import BadArgument, TilewrightError

OLDEST = {"python": (3, 11), "torch": (2, 11), "triton": (3, 6)}

# Reduces with a library function, which is what an interpreter that was set up late gets wrong.
_PROBE = '''"""A row sum, to see whether Triton kernels run and compile here."""
import torch
import triton
import triton.language as tl


@triton.jit
def row_sum(x, out, n, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    row = tl.load(x + tl.program_id(0) * n + columns, mask=columns < n, other=0.0)
    tl.store(out + tl.program_id(0), tl.sum(row, 0))


COMPILE = [
    {"kernel": "row_sum", "signature": {"x": "*fp32", "out": "*fp32", "n": "i32", "BLOCK": "constexpr"},
     "constexprs": {"BLOCK": 64}, "num_warps": 1, "num_stages": 1},
]


def launch(x):
    out = torch.empty(x.shape[0], dtype=x.dtype, device=x.device)
    row_sum[(x.shape[0],)](x, out, x.shape[1], BLOCK=64)
    return out
'''


class State(StrEnum):
    OK = "ok"  # works
    LIMITED = "limited"  # absent or restricted; Tilewright works without it, in the way the remedy's sentence says
    BROKEN = "broken"  # Tilewright cannot work


@dataclass(frozen=True)
class Fact:
    """One thing examined. found: what is there. remedy: what to do about it, None when there is nothing to do."""

    name: str
    state: State
    found: str
    remedy: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """All facts. ``ok`` unless something is broken."""

    facts: tuple[Fact, ...]

    @property
    def ok(self) -> bool:
        return all(fact.state is not State.BROKEN for fact in self.facts)

    def to_dict(self) -> dict:
        facts = [{"name": f.name, "state": f.state.value, "found": f.found, "remedy": f.remedy} for f in self.facts]
        return {"ok": self.ok, "facts": facts}


def examine(on_fact: Callable[[Fact], None] | None = None) -> Diagnosis:
    """Examine the machine. ``on_fact`` hears each fact as it is found (a few take a second). Never raises."""
    facts: list[Fact] = []
    for name, check in _CHECKS:
        try:
            fact = check(name)
        except TilewrightError as error:
            fact = Fact(name, State.BROKEN, str(error), None)
        except Exception as error:  # noqa: BLE001 - a doctor that dies of the illness helps nobody: it is the finding
            fact = Fact(name, State.BROKEN, f"{type(error).__name__}: {error}", "please report this with its text")
        facts.append(fact)
        if on_fact is not None:
            on_fact(fact)
    return Diagnosis(tuple(facts))


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _python(name: str) -> Fact:
    found = f"{platform.python_version()} ({sys.executable}), {platform.system()} {platform.machine()}"
    if sys.version_info[:2] < OLDEST["python"]:
        return Fact(name, State.BROKEN, found, "use Python 3.11 or newer")
    return Fact(name, State.OK, found)


def _package(name: str, lacking: State, remedy: str) -> Fact:
    try:
        module = importlib.import_module(name)
    except Exception as error:  # noqa: BLE001 - a broken installation raises anything (OSError, AttributeError ...)
        return Fact(name, lacking, f"does not import: {type(error).__name__}: {error}", remedy)
    version = str(getattr(module, "__version__", "unknown"))
    if _number(version)[:2] < OLDEST[name]:
        oldest = ".".join(map(str, OLDEST[name]))
        return Fact(name, lacking, f"{version}, and {oldest} or newer is needed", f"pip install -U '{name}>={oldest}'")
    return Fact(name, State.OK, version)


def _torch(name: str) -> Fact:
    return _package(name, State.BROKEN, "pip install torch (https://pytorch.org says which build for your machine)")


def _triton(name: str) -> Fact:
    return _package(name, State.LIMITED, "pip install triton; without it sites run their reference form")


def _compiler(name: str) -> Fact:
    try:
        compiler = find_cxx()
    except TilewrightError as error:
        return Fact(name, State.LIMITED, str(error), 'without one, rest="eager" works and Inductor on CPU does not')
    program = '#include <omp.h>\n#include <cstdio>\nint main() { std::printf("%d", omp_get_max_threads()); }\n'
    with tempfile.TemporaryDirectory(prefix="tilewright-doctor-") as folder:
        source, binary = Path(folder) / "probe.cpp", Path(folder) / "probe"
        source.write_text(program)
        command = [*compiler.command, "-std=c++17", "-fopenmp", str(source), "-o", str(binary)]
        built = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if built.returncode != 0:
            lines = built.stderr.strip().splitlines() or ["no message"]
            return Fact(
                name,
                State.LIMITED,
                f"{compiler.version}, which does not compile C++17 with OpenMP: {lines[0]}",
                "install the OpenMP run time (libgomp or libomp-dev) and the C++ standard library headers",
            )
        ran = subprocess.run([str(binary)], capture_output=True, text=True, timeout=30)
    if ran.returncode != 0:
        return Fact(name, State.LIMITED, f"{compiler.version}: its programs exit with {ran.returncode}", "reinstall it")
    return Fact(name, State.OK, f"{compiler.version}, {ran.stdout} OpenMP threads")


_NATIVE_PROBE = """// Adds up the OpenMP threads, through ATen's headers and library.
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <omp.h>
extern "C" void tilewright_launch(int threads, int* seen, float* tile) {
  using Vec = at::vec::Vectorized<float>;
  Vec(1.0f).store(tile);
#pragma omp parallel num_threads(threads)
#pragma omp atomic
  *seen += 1;
#if defined(CPU_CAPABILITY_AVX512)
  at::native::cpublas::brgemm_release(false);
#endif
}
"""


def _native(name: str) -> Fact:
    import ctypes

    import torch

    from . import cpu
    from .targets import cpp

    try:
        isa, compiler = cpu.isa(), find_cxx()
    except TilewrightError as error:
        return Fact(name, State.LIMITED, str(error), "CPU sites run their reference form")
    with tempfile.TemporaryDirectory(prefix="tilewright-doctor-") as folder:
        (Path(folder) / "kernel.cpp").write_text(_NATIVE_PROBE)
        for step in cpp.commands(compiler, isa):
            built = subprocess.run(step, cwd=folder, capture_output=True, text=True, timeout=300)
            if built.returncode != 0:
                lines = built.stderr.strip().splitlines() or ["no message"]
                remedy = "update the compiler (g++ 11, clang++ 14), or set TILEWRIGHT_CPU_ISA to a smaller set"
                return Fact(name, State.LIMITED, f"{compiler.version} builds no {isa} kernel: {lines[0]}", remedy)
        entry = ctypes.CDLL(str(Path(folder) / cpp.LIBRARY)).tilewright_launch
        seen, tile = ctypes.c_int(0), (ctypes.c_float * 16)()
        entry(ctypes.c_int(torch.get_num_threads()), ctypes.byref(seen), tile)
    if tile[0] != 1.0 or seen.value != torch.get_num_threads():
        found = f"{seen.value} threads ran where torch has {torch.get_num_threads()}"
        return Fact(name, State.LIMITED, found, "please report this with the output of this command")
    runtime = cpp.openmp_library()
    shared = f", torch's {runtime.name}" if runtime is not None else ""
    return Fact(name, State.OK, f"{isa} (this CPU runs {', '.join(cpu.supported())}), {seen.value} threads{shared}")


def _gpu(name: str) -> Fact:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        found = "none that torch can use" if built else "none: this torch is built for the CPU"
        remedy = (
            "check the driver with nvidia-smi or rocm-smi"
            if built
            else "with a GPU, install a CUDA or ROCm build of torch"
        )
        return Fact(name, State.LIMITED, found, f"{remedy}; kernels run under the interpreter or as their reference")
    from .targets.triton import device_capability

    free, total = torch.cuda.mem_get_info()
    found = f"{torch.cuda.get_device_name()}, {device_capability()}, {free >> 20} of {total >> 20} MiB free"
    return Fact(name, State.OK, found)


def _interpreter(name: str) -> Fact:
    import torch

    from . import fingerprint
    from .targets.triton import import_text
    from .targets.triton_language import language_mode

    try:
        digest = fingerprint.sha256(_PROBE.encode())
        module = import_text(_PROBE, Path("<tilewright doctor>"), digest, interpret=True)
        with language_mode(interpret=True):
            right = module.launch(torch.ones(3, 5)).tolist() == [5.0, 5.0, 5.0]
    except ImportError as error:
        return Fact(name, State.LIMITED, f"cannot run: {error}", "pip install triton numpy")
    if not right:
        return Fact(name, State.BROKEN, "computes a wrong row sum", "reinstall triton; this version cannot be trusted")
    return Fact(name, State.OK, "runs a kernel on the CPU and gets the right result")


def _cross(name: str) -> Fact:
    from .cross_compile import DEFAULT_TARGETS, cross_compile

    works, fails = [], []
    for target in DEFAULT_TARGETS:
        try:
            cross_compile(_PROBE, target)
            works.append(target)
        except TilewrightError as error:
            fails.append(f"{target}: {error}")
    if fails:
        return Fact(
            name, State.LIMITED, f"works for {', '.join(works) or 'no target'}; {'; '.join(fails)}", "update triton"
        )
    return Fact(name, State.OK, ", ".join(works))


def _settings(name: str) -> Fact:
    try:
        now = settings.from_environment()
    except BadArgument as error:
        return Fact(name, State.BROKEN, str(error), "correct or unset the variable")
    names = {settings.PREFIX + field.name.upper() for field in dataclasses.fields(now)}
    given = sorted(key for key in os.environ if key.startswith(settings.PREFIX))
    strangers = [key for key in given if key not in names]
    if strangers:
        found = f"{strangers[0]} is set and means nothing"
        return Fact(name, State.LIMITED, found, f"unset it; known are {', '.join(sorted(names))}")
    parts = [f"{key}={os.environ[key]}" for key in given]
    if now.no_build:
        return Fact(name, State.LIMITED, "building kernels is forbidden", "unset TILEWRIGHT_NO_BUILD to build kernels")
    return Fact(name, State.OK, ", ".join(parts) or "all default")


def _cache(name: str) -> Fact:
    root = settings.get().cache_dir
    why = cache.why_unwritable(root)
    if why is not None:
        return Fact(
            name,
            State.LIMITED,
            f"{root} cannot be written: {why}; kernels are built in a temporary folder by every process",
            "free some space or mend the folder's permissions, or point TILEWRIGHT_CACHE_DIR elsewhere",
        )
    states = cache.verify(root)
    damaged = [state for state in states if not state.ok]
    total = sum(state.bytes for state in states)
    found = f"{root}, {len(states)} kernels, {total} bytes"
    if damaged:
        first = f"{damaged[0].name}: {damaged[0].problem}"
        return Fact(
            name, State.LIMITED, f"{found}, {len(damaged)} damaged ({first})", "tilewright cache clear --damaged"
        )
    return Fact(name, State.OK, found)


_CHECKS: tuple[tuple[str, Callable[[str], Fact]], ...] = (
    ("python", _python),
    ("torch", _torch),
    ("triton", _triton),
    ("C++ compiler", _compiler),
    ("native kernels", _native),
    ("GPU", _gpu),
    ("interpreter", _interpreter),
    ("cross-compilation", _cross),
    ("settings", _settings),
    ("cache", _cache),
)
