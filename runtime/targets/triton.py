"""The Triton targets: ``triton`` (CUDA and ROCm) and ``triton-interpret`` (the same text on the CPU, for numerics).

The kernel file is imported under a unique module name from the cache entry. Its text is put into ``linecache`` from
the verified bytes, so that what Triton's ``inspect.getsource`` reads and what tracebacks show is what was checked.
"""

from __future__ import annotations

import ast
import functools
import linecache
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...codegen.spec import KernelSpec
from ..errors import BuildError, MissingDependency, UnsupportedKernel


@functools.cache
def versions() -> dict[str, str]:
    """Versions of torch and triton. Raises :class:`~..errors.MissingDependency` when triton is not installed."""
    import torch

    try:
        import triton
    except ImportError as error:
        message = f"the triton targets need triton, which does not import ({error}): pip install triton"
        raise MissingDependency(message) from error
    return {"torch": torch.__version__, "triton": triton.__version__}


@functools.cache
def device_capability() -> str:
    """``sm_90``, ``gfx942`` or ``none``: the GPU that ``torch.cuda`` would run a kernel on."""
    import torch

    if not torch.cuda.is_available():
        return "none"
    if torch.version.hip:
        return torch.cuda.get_device_properties(torch.cuda.current_device()).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def import_text(text: str, path: Path, digest: str, interpret: bool) -> types.ModuleType:
    """Execute a kernel file's text as a module of its own, its kernels interpreted or compiled.

    Raises :class:`~..errors.BuildError` when the file does not execute or has no ``launch``.
    """
    from .triton_language import language_mode

    name = f"tilewright_kernel_{digest[:32]}_{'interpreted' if interpret else 'native'}"
    module = types.ModuleType(name)
    module.__file__ = str(path)
    # A time of None keeps linecache.checkcache from dropping the lines when the file on disk changes.
    linecache.cache[str(path)] = (len(text), None, text.splitlines(keepends=True), str(path))
    sys.modules[name] = module  # inspect and dataclasses look the module up by its name
    try:
        code = compile(text, str(path), "exec")
        with language_mode(interpret):
            exec(code, module.__dict__)
        if not callable(getattr(module, "launch", None)):
            raise BuildError(f"{path} defines no launch function")
    except BuildError:
        del sys.modules[name]
        raise
    except Exception as error:  # whatever a generated module's body raises is one mistake: the file is wrong
        del sys.modules[name]
        raise BuildError(f"the kernel file {path} does not import: {type(error).__name__}: {error}") from error
    return module


def _has_driver() -> bool:
    """Whether Triton finds a GPU driver that works. A kernel can be built, and cross-compiled, without one."""
    from triton.runtime import driver

    try:
        return driver.active is not None and driver.active.get_current_target() is not None
    except RuntimeError:  # "0 active drivers": Triton's way of saying that there is no GPU
        return False


def _no_gpu(*args: Any, **kwargs: Any) -> Any:
    raise UnsupportedKernel(
        "target triton launches on a GPU, and Triton finds none that works here (`tilewright doctor` says more): use "
        "target triton-interpret to run the same kernel slowly on the CPU"
    )


class _TritonTarget:
    source_name = "kernel.py"
    name: str

    def build(self, folder: Path, spec: KernelSpec) -> None:
        """Nothing to compile ahead: Triton compiles at the first launch, per argument types. Only check the syntax."""
        source = folder / self.source_name
        try:
            ast.parse(source.read_text(encoding="utf-8"))
        except SyntaxError as error:
            raise BuildError(
                f"the rendered {spec.kind} kernel is no Python, line {error.lineno}: {error.msg}"
            ) from error


class TritonTarget(_TritonTarget):
    """Compiled by Triton for the GPU at hand, at the first launch with each set of argument types."""

    name = "triton"

    def toolchain(self) -> dict[str, str]:
        return {**versions(), "capability": device_capability()}

    def device(self) -> str | None:
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else None

    def open(self, folder: Path, spec: KernelSpec, text: str, digest: str) -> Callable[..., Any]:
        from .triton_language import compile_below

        module = import_text(text, folder / self.source_name, digest, interpret=False)
        compile_below(module)
        return module.launch if _has_driver() else _no_gpu


class TritonInterpretTarget(_TritonTarget):
    """Run by Triton's interpreter with numpy on the CPU: slow, and the same text as on the GPU."""

    name = "triton-interpret"

    def toolchain(self) -> dict[str, str]:
        import numpy

        return {**versions(), "numpy": numpy.__version__}

    def device(self) -> str | None:
        """None: how long the interpreter takes says nothing about a GPU."""
        return None

    def open(self, folder: Path, spec: KernelSpec, text: str, digest: str) -> Callable[..., Any]:
        from .triton_language import language_mode

        launch = import_text(text, folder / self.source_name, digest, interpret=True).launch

        @functools.wraps(launch)
        def interpreted_launch(*args: Any, **kwargs: Any) -> Any:
            with language_mode(interpret=True):
                return launch(*args, **kwargs)

        return interpreted_launch


TARGETS = (TritonTarget(), TritonInterpretTarget())
