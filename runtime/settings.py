"""Settings of the runtime, read once from ``TILEWRIGHT_*`` environment variables.

=============================  =======================================================================  ============
variable                       meaning                                                                  default
=============================  =======================================================================  ============
``TILEWRIGHT_CACHE_DIR``       folder of the kernel cache                                               user cache
``TILEWRIGHT_NO_BUILD``        1: never build, only load what is in the cache (``NotBuilt`` otherwise)  0
``TILEWRIGHT_AUTOTUNE``        1: time the candidates of a kernel on the device at first use            0
``TILEWRIGHT_AUTOTUNE_SECONDS``  most seconds that tuning one kernel may take                           2.0
``TILEWRIGHT_ANNOUNCE``        0: do not warn about fallbacks (they stay in the report)                 1
``TILEWRIGHT_BUILD_JOBS``      kernels built at the same time                                           CPU count
``TILEWRIGHT_CPU_ISA``         instruction set of native kernels: amx, avx512, avx2, baseline, neon     auto
``TILEWRIGHT_LOCK_SECONDS``    longest wait for another process that builds the same kernel             600
``TILEWRIGHT_POOL_LIMIT``      most bytes of freed memory that the pool keeps for new CPU tensors       memory / 4
``TILEWRIGHT_FAST_CALLS``      0: launch native kernels from Python only (a few microseconds more)      1
=============================  =======================================================================  ============

A switch is ``1/true/yes/on`` or ``0/false/no/off``. Anything else raises :class:`~.errors.BadArgument` at first use.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from .errors import BadArgument

PREFIX = "TILEWRIGHT_"
_TRUE = frozenset({"1", "true", "yes", "on"})
CPU_ISAS = ("auto", "amx", "avx512", "avx2", "baseline", "neon")
_FALSE = frozenset({"0", "false", "no", "off"})


@dataclass(frozen=True)
class Settings:
    """One consistent set of settings. Frozen: change them through :func:`override` or the environment."""

    cache_dir: Path
    no_build: bool = False
    autotune: bool = False
    autotune_seconds: float = 2.0
    announce: bool = True
    build_jobs: int = 1
    lock_seconds: float = 600.0
    cpu_isa: str = "auto"
    pool_limit: int = 2**30
    fast_calls: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "cache_dir", Path(self.cache_dir).expanduser().absolute())
        for name in ("autotune_seconds", "lock_seconds"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise BadArgument(f"{PREFIX}{name.upper()} is {value!r}: give a positive number of seconds")
        if self.cpu_isa not in CPU_ISAS:
            raise BadArgument(f"{PREFIX}CPU_ISA is {self.cpu_isa!r}: choose one of {', '.join(CPU_ISAS)}")
        if self.pool_limit < 0:
            raise BadArgument(f"{PREFIX}POOL_LIMIT is {self.pool_limit!r}: give a number of bytes, 0 to keep nothing")
        if self.build_jobs < 1:
            raise BadArgument(f"{PREFIX}BUILD_JOBS is {self.build_jobs!r}: give a whole number of at least 1")


def default_cache_dir() -> Path:
    """The user's cache folder for Tilewright (``~/.cache/tilewright`` on Linux, ``XDG_CACHE_HOME`` respected)."""
    return Path(platformdirs.user_cache_dir("tilewright", appauthor=False))


def _memory() -> int:
    """Bytes of memory this process may use: the machine's, or less where its control group has a limit."""
    found = [2**34]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
            found.append(int(Path(path).read_text()))
    return min(found)


def from_environment(environ: Mapping[str, str] = os.environ) -> Settings:
    """Read the settings. Raises :class:`~.errors.BadArgument` naming the variable whose value makes no sense."""

    def read(name: str) -> str | None:
        value = environ.get(PREFIX + name, "").strip()
        return value or None

    def switch(name: str, default: bool) -> bool:
        value = read(name)
        if value is None:
            return default
        if value.lower() in _TRUE:
            return True
        if value.lower() in _FALSE:
            return False
        raise BadArgument(f"{PREFIX}{name} is {value!r}: set it to 1 or 0")

    def number(name: str, default: float) -> float:
        value = read(name)
        try:
            return default if value is None else float(value)
        except ValueError:
            raise BadArgument(f"{PREFIX}{name} is {value!r}: give a number") from None

    def whole(name: str, default: int) -> int:
        value = number(name, default)
        if not float(value).is_integer():  # false for infinity and NaN too
            raise BadArgument(f"{PREFIX}{name} is {value!r}: give a whole number")
        return int(value)

    cache_dir = read("CACHE_DIR")
    return Settings(
        cache_dir=Path(cache_dir) if cache_dir else default_cache_dir(),
        no_build=switch("NO_BUILD", False),
        autotune=switch("AUTOTUNE", False),
        autotune_seconds=number("AUTOTUNE_SECONDS", 2.0),
        announce=switch("ANNOUNCE", True),
        build_jobs=whole("BUILD_JOBS", os.cpu_count() or 1),
        lock_seconds=number("LOCK_SECONDS", 600.0),
        pool_limit=whole("POOL_LIMIT", _memory() // 4),
        fast_calls=switch("FAST_CALLS", True),
        cpu_isa=(read("CPU_ISA") or "auto").lower(),
    )


_current: Settings | None = None
_listeners: list[Callable[[], None]] = []


def get() -> Settings:
    """The settings in force. The environment is read at the first call; :func:`reload` reads it again."""
    global _current
    if _current is None:
        _current = from_environment()
    return _current


def reload() -> Settings:
    """Forget what was read and read the environment again."""
    global _current
    _current = None
    _changed()
    return get()


def on_change(listener: Callable[[], None]) -> None:
    """Have ``listener`` called whenever other settings come into force."""
    _listeners.append(listener)


def _changed() -> None:
    for listener in _listeners:
        listener()


@contextlib.contextmanager
def override(**changes: object) -> Iterator[Settings]:
    """Settings with some fields changed, for the duration of a ``with`` block (the whole process, not one thread).

    Kernels already loaded stay loaded: call :func:`tilewright.runtime.load.forget` to look at the cache again.
    """
    global _current
    before = get()
    unknown = sorted(set(changes) - {f.name for f in dataclasses.fields(Settings)})
    if unknown:
        raise BadArgument(f"there is no setting {unknown[0]!r}")
    _current = dataclasses.replace(before, **changes)  # type: ignore[arg-type]
    _changed()
    try:
        yield _current
    finally:
        _current = before
        _changed()
