"""The files by which a dumped native kernel runs on its own: its C++, its launcher, and what builds and joins them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from types import ModuleType

from ..runtime import cpu
from ..runtime.load import Kernel
from ..runtime.targets import cpp
from .page import template


def native_files(kernel: Kernel) -> Iterator[tuple[str, str]]:
    """(name, text) of ``kernel.cpp`` (the rendered source, unchanged), ``launcher.py`` and ``kernel.py``."""
    yield "kernel.cpp", kernel.text
    yield "launcher.py", _alone(cpp.launcher_of(kernel.spec.kind))
    yield (
        "kernel.py",
        template("native_kernel.py.jinja").render(
            kind=kernel.spec.kind,
            entry=cpp.ENTRY,
            flags=repr(cpp.FLAGS),
            isa_flags={repr(name): repr(values) for name, values in cpu.FLAGS.items()},
            isas="|".join(cpu.FLAGS),
        ),
    )


def _alone(launcher: ModuleType) -> str:
    """A launcher's source with the functions and numbers that it imports from the package in their imports' place."""

    def inlined(line: re.Match[str]) -> str:
        found = {name: getattr(launcher, name) for name in line[1].split(", ")}
        return "\n\n".join(inspect.getsource(o) if callable(o) else f"{n} = {o!r}\n" for n, o in found.items())

    return re.sub(r"^from \.[\w.]* import (.+)\n", inlined, inspect.getsource(launcher), flags=re.MULTILINE)
