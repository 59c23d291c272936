"""The native target: what is built, for which CPU, against which libraries, and what is said when it cannot be."""

from __future__ import annotations

import ctypes
import dataclasses
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tilewright.codegen.spec import KernelSpec
from tilewright.runtime import compilers, cpu, settings
from tilewright.runtime.errors import BadArgument, BuildError, UnsupportedKernel
from tilewright.runtime.targets import cpp, get

GOLDEN = Path(__file__).parent / "golden"
PROBE = """
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <omp.h>
extern "C" void tilewright_launch(int threads, int* team, float* lanes) {
#pragma omp parallel num_threads(threads)
  team[omp_get_thread_num()] = omp_get_num_threads();
  *lanes = at::vec::Vectorized<float>::size();
#if defined(CPU_CAPABILITY_AVX512)
  at::native::cpublas::brgemm_release(false);
#endif
}
"""


@dataclasses.dataclass(frozen=True)
class Probe(KernelSpec):
    pass


def build(folder: Path, text: str = PROBE) -> ctypes.CDLL:
    (folder / "kernel.cpp").write_text(text)
    get("cpp").build(folder, Probe())
    return ctypes.CDLL(str(folder / cpp.LIBRARY))


def test_every_instruction_set_builds_and_runs(cpu_isa, tmp_path) -> None:
    entry = build(tmp_path).tilewright_launch
    team, lanes = (ctypes.c_int * 4)(), ctypes.c_float()
    entry(ctypes.c_int(2), team, ctypes.byref(lanes))
    assert list(team) == [2, 2, 0, 0]
    assert lanes.value == {"amx": 16, "avx512": 16}.get(cpu_isa, 8)
    assert {path.name for path in tmp_path.iterdir()} == {"kernel.cpp", cpp.LIBRARY}


def test_one_libtorch_and_one_openmp_in_the_process(tmp_path) -> None:
    """The kernel calls into the libraries torch has loaded, not into copies the compiler came with."""
    entry = build(tmp_path).tilewright_launch
    entry(ctypes.c_int(2), (ctypes.c_int * 4)(), ctypes.byref(ctypes.c_float()))
    files = {line.split(maxsplit=5)[5].strip() for line in open("/proc/self/maps") if line.count("/")}
    for name in ("libtorch_cpu.so", "libgomp", "libc10.so"):
        found = [path for path in files if Path(path).name.startswith(name)]
        assert len(found) == 1 and Path(found[0]).is_relative_to(Path(torch.__file__).parent.parent), found


def test_the_object_names_no_folder(tmp_path) -> None:
    build(tmp_path)
    assert str(tmp_path).encode() not in (tmp_path / cpp.LIBRARY).read_bytes()


def test_a_compile_error_is_shown(tmp_path) -> None:
    with pytest.raises(BuildError, match=r"does not compile: .*\n.*kernel.cpp:1:1: error: (.*\n)*.*nonsense;"):
        build(tmp_path, "nonsense;\n")


def test_a_library_without_the_entry(tmp_path, monkeypatch) -> None:
    build(tmp_path, 'extern "C" void other() {}\n')
    monkeypatch.setattr(cpp, "launcher_of", lambda kind: None)
    with pytest.raises(BuildError, match="cannot be loaded: .*tilewright_launch"):
        get("cpp").open(tmp_path, Probe(), "", "")


def test_a_kind_without_a_launcher() -> None:
    with pytest.raises(UnsupportedKernel, match="nothing_like_it has no native launcher"):
        cpp.launcher_of("nothing_like_it")


def test_a_launcher_that_does_not_import_is_not_called_missing(tmp_path, monkeypatch) -> None:
    from tilewright.runtime import launchers

    (tmp_path / "broken.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.setattr(launchers, "__path__", [str(tmp_path)])
    with pytest.raises(ModuleNotFoundError, match="a_package_that_nobody_has"):
        cpp.launcher_of("broken")


def test_the_best_instruction_set_is_the_default(monkeypatch) -> None:
    assert cpu.isa() == cpu.supported()[0]
    monkeypatch.setattr(cpu, "supported", lambda: ("avx2", "baseline"))
    assert cpu.isa() == "avx2"
    with settings.override(cpu_isa="avx512"), pytest.raises(BadArgument, match="'avx512', and this CPU runs avx2, "):
        cpu.isa()


def test_an_unknown_instruction_set_is_refused() -> None:
    assert settings.from_environment({"TILEWRIGHT_CPU_ISA": "AVX2"}).cpu_isa == "avx2"
    with pytest.raises(BadArgument, match="TILEWRIGHT_CPU_ISA is 'sse9': choose one of auto, amx, "):
        settings.from_environment({"TILEWRIGHT_CPU_ISA": "sse9"})


def test_the_instruction_set_is_part_of_the_fingerprint() -> None:
    seen = set()
    for isa in cpu.supported():
        with settings.override(cpu_isa=isa):
            parts = get("cpp").toolchain()
        assert parts["isa"] == isa and parts["torch"] == torch.__version__
        assert parts["compiler"] == compilers.find_cxx().version
        seen.add(tuple(sorted(parts.items())))
    assert len(seen) == len(cpu.supported())


@pytest.mark.parametrize(
    ("machine", "found"), [("aarch64", ("neon",)), ("arm64", ("neon",)), ("riscv64", None), ("x86_64", "baseline")]
)
def test_other_machines(monkeypatch, machine, found) -> None:
    monkeypatch.setattr(cpu.platform, "machine", lambda: machine)
    cpu.supported.cache_clear()
    try:
        if found is None:
            with pytest.raises(UnsupportedKernel, match="this CPU is riscv64"):
                cpu.supported()
        elif found == "baseline":
            assert cpu.supported()[-1] == "baseline"
        else:
            assert cpu.supported() == found
    finally:
        monkeypatch.undo()
        cpu.supported.cache_clear()


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.cpp*")), ids=lambda path: path.name)
def test_golden_kernels_compile_for_aarch64(path, tmp_path) -> None:
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("needs aarch64-linux-gnu-g++ (Debian, Ubuntu: apt install g++-aarch64-linux-gnu)")
    step, _ = cpp.commands(compilers.Compiler((compiler,), "cross"), "neon")
    shutil.copy(path, tmp_path / "kernel.cpp")
    done = subprocess.run(step, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
