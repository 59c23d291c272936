"""How a rendered kernel becomes something that can be launched, one class a target.

A target plugs into the loader by having the attributes of :class:`Target` and a line in ``_MODULES`` (or a call of
:func:`register`). Its module is imported at first use, so that naming a target costs nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ...codegen.spec import KernelSpec
from ..errors import BadArgument


class Target(Protocol):
    """What the loader needs from a target.

    name: what users write, such as ``triton-interpret``.
    source_name: the file name of the rendered text inside a cache entry, such as ``kernel.py``.
    """

    name: str
    source_name: str

    def toolchain(self) -> dict[str, str]:
        """The target's part of the fingerprint: versions, capability and flags that decide the result.

        Raises :class:`~..errors.MissingCompiler` or :class:`~..errors.MissingDependency` when this machine cannot
        build or run the target at all.
        """
        ...

    def build(self, folder: Path, spec: KernelSpec) -> None:
        """Turn ``folder/source_name`` into what :meth:`open` needs, writing new files beside it.

        Runs in a temporary folder that is renamed afterwards: nothing written may contain the folder's path.
        Raises :class:`~..errors.BuildError` with the tool's own message.
        """
        ...

    def open(self, folder: Path, spec: KernelSpec, text: str, digest: str) -> Callable[..., Any]:
        """The ``launch`` function of a verified entry. ``text`` is the verified source.

        Raises :class:`~..errors.BuildError` when the entry is sound and still cannot be loaded.
        """
        ...

    def device(self) -> str | None:
        """Name of the device whose timings decide autotuning, None where timing a kernel means nothing."""
        ...


_MODULES = {"triton": ".triton", "triton-interpret": ".triton", "cpp": ".cpp"}
_targets: dict[str, Target] = {}


def register(target: Target) -> None:
    """Make a target known under its name, replacing the one of that name."""
    _targets[target.name] = target


def get(name: str) -> Target:
    """The target of that name. Raises :class:`~..errors.BadArgument` naming the known ones."""
    if name not in _targets and name in _MODULES:
        for target in importlib.import_module(_MODULES[name], __name__).TARGETS:
            _targets.setdefault(target.name, target)
    if name not in _targets:
        raise BadArgument(f"no kernels are built for target {name!r}: choose one of {', '.join(names())}")
    return _targets[name]


def names() -> list[str]:
    """The targets kernels can be built for."""
    return sorted({*_MODULES, *_targets})
