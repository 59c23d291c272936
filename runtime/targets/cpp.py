"""The native CPU target: C++17 through g++ or clang++, loaded with ctypes.

A kernel is one shared object with one entry, ``tilewright_launch``, which takes plain pointers and numbers. The Python
side of a launch (allocating the outputs, reading pointers, sizes and strides) is the module of the kernel's kind in
``runtime/launchers``, which needs nothing but torch.

The object names ``libtorch_cpu`` and the OpenMP runtime without a folder, and both are in the process before it is
loaded, so the linker takes the very ones that torch uses: one pool of threads, one copy of ATen.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...codegen.spec import KernelSpec
from .. import cpu
from ..compilers import Compiler, find_cxx
from ..errors import BuildError, UnsupportedKernel

ENTRY = "tilewright_launch"
LIBRARY = "kernel.so"
# NaN and infinities keep their meaning: no -ffast-math.
FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
_BUILD_SECONDS = 300


@functools.cache
def _torch_folder() -> Path:
    import torch

    return Path(torch.__file__).parent


@functools.cache
def openmp_library() -> Path | None:
    """The file of the GNU OpenMP runtime that torch has loaded, None where there is none (or no /proc to look)."""
    import torch  # noqa: F401 - loads it

    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    found = sorted({line.split(maxsplit=5)[5] for line in lines if "/libgomp" in line})
    # Linking against a second copy would give every kernel a pool of threads that competes with torch's.
    mine = [path for path in found if Path(path).is_relative_to(_torch_folder().parent)]
    return Path((mine or found)[0]) if found else None


def commands(compiler: Compiler, isa: str, source: str = "kernel.cpp", output: str = LIBRARY) -> list[list[str]]:
    """The two commands, compile and link, that turn ``source`` into ``output`` in the current folder."""
    torch_folder = _torch_folder()
    openmp = openmp_library()
    clang = "clang" in compiler.version.lower()
    include = f"-I{torch_folder / 'include'}"
    compile_ = [*compiler.command, *FLAGS, *cpu.FLAGS[isa], include, "-c", source, "-o", "kernel.o"]
    link = [*compiler.command, "-shared", "kernel.o", "-o", output]
    # Asked for -fopenmp, the linker adds whichever libgomp the compiler came with; the name of torch's may differ.
    link += ["-fopenmp"] if openmp is None or clang else [str(openmp)]
    link += [f"-L{torch_folder / 'lib'}", "-Wl,--as-needed", "-ltorch_cpu", "-lc10", "-lpthread"]
    return [compile_, link]


class CppTarget:
    """Compiled ahead for this CPU's instruction set, or for the one that ``TILEWRIGHT_CPU_ISA`` names."""

    name = "cpp"
    source_name = "kernel.cpp"

    def toolchain(self) -> dict[str, str]:
        import torch

        isa = cpu.isa()
        return {
            "torch": torch.__version__,
            "compiler": find_cxx().version,
            "isa": isa,
            "flags": " ".join((*FLAGS, *cpu.FLAGS[isa])),
        }

    def build(self, folder: Path, spec: KernelSpec) -> None:
        for step in commands(find_cxx(), cpu.isa(), self.source_name):
            try:
                run = subprocess.run(step, cwd=folder, capture_output=True, text=True, timeout=_BUILD_SECONDS)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise BuildError(f"the compiler of the {spec.kind} kernel did not finish: {error}") from error
            if run.returncode:
                message = "\n".join(run.stderr.strip().splitlines()[:30])
                raise BuildError(f"the {spec.kind} kernel does not compile: {' '.join(step)}\n{message}")
        (folder / "kernel.o").unlink()

    def open(self, folder: Path, spec: KernelSpec, text: str, digest: str) -> Callable[..., Any]:
        import torch  # noqa: F401 - its libraries have to be in the process first

        from .. import memory, plans

        launcher = launcher_of(spec.kind)
        try:
            function = getattr(ctypes.CDLL(str(folder / LIBRARY)), ENTRY)
        except (OSError, AttributeError) as error:
            raise BuildError(f"the {spec.kind} kernel in {folder} cannot be loaded: {error}") from error
        function.argtypes = launcher.ARGTYPES
        function.restype = None
        fields = dataclasses.asdict(spec)
        return plans.remember(launcher.make_launch(function, fields, memory.empty), launcher, function, fields)

    def device(self) -> str | None:
        return f"{_cpu_name()} ({cpu.isa()})"


def launcher_of(kind: str) -> Any:
    """The module of ``runtime/launchers`` for a kind of kernel. Raises :class:`UnsupportedKernel` without one."""
    try:
        return importlib.import_module(f"...launchers.{kind}", __name__)
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.endswith(f"launchers.{kind}"):
            raise
        raise UnsupportedKernel(f"{kind} has no native launcher") from error


@functools.cache
def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "CPU"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


TARGETS = (CppTarget(),)
