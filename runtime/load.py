"""Four verbs for kernels: :func:`is_built`, :func:`try_load`, :func:`build`, :func:`load`.

    kernel = load(spec, "triton-interpret")
    out = kernel.launch(x)

A kernel is named by its content (see :mod:`.fingerprint`), kept in the user's cache folder (see :mod:`.cache`), built
once however many threads and processes ask for it at the same time, and never loaded unless every byte of it is
what was built.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..codegen.render import render
from ..codegen.spec import KernelSpec, SpecError
from . import cache, fingerprint, settings, targets
from .errors import BuildError, CacheError, NotBuilt, TilewrightError, UnsupportedKernel


@dataclass(frozen=True, eq=False, slots=True)
class Kernel:
    """A loaded kernel.

    spec, target: what was asked for.
    text: the rendered source; path: its file in the cache; digest: the content fingerprint (64 hex digits).
    launch: allocates the outputs, runs the kernel, returns the outputs; its signature is in the source.
    """

    spec: KernelSpec
    target: str
    text: str
    path: Path
    digest: str
    launch: Callable[..., Any]


@dataclass(frozen=True)
class _Order:
    """A spec and target worked out as far as needs no cache."""

    spec: KernelSpec
    target: targets.Target
    text: str
    parts: dict[str, Any]
    digest: str


_kernels: dict[tuple[KernelSpec, str], Kernel] = {}
_forget_listeners: list[Callable[[], None]] = []
_lock = threading.Lock()
_key_locks: dict[tuple[KernelSpec, str], threading.RLock] = {}


def _order(spec: KernelSpec, target: str) -> _Order:
    chosen = targets.get(target)
    try:
        text = render(spec, target)
    except SpecError as error:
        raise UnsupportedKernel(str(error)) from error
    parts = fingerprint.ingredients(spec, target, text, chosen.toolchain())
    return _Order(spec, chosen, text, parts, fingerprint.digest(parts))


def _key_lock(key: tuple[KernelSpec, str]) -> threading.RLock:
    with _lock:
        return _key_locks.setdefault(key, threading.RLock())


def is_built(spec: KernelSpec, target: str) -> bool:
    """Whether a valid entry is in the cache: every file present and unchanged. Builds and loads nothing.

    Raises :class:`~.errors.BadArgument` for an unknown target, :class:`~.errors.UnsupportedKernel` for a spec without
    a template for it, :class:`~.errors.MissingDependency` or :class:`~.errors.MissingCompiler`.
    """
    return _find(_order(spec, target)) is not None


def is_loaded(spec: KernelSpec, target: str) -> bool:
    """Whether :func:`load` has the kernel in memory. Looks at no file."""
    return (spec, target) in _kernels


def try_load(spec: KernelSpec, target: str) -> Kernel | None:
    """The kernel if it is loaded already or known valid in the cache, else None. Never builds.

    Raises as :func:`is_built`, and :class:`~.errors.BuildError` when a valid entry does not load.
    """
    key = (spec, target)
    kernel = _kernels.get(key)
    if kernel is not None:
        return kernel
    with _key_lock(key):
        kernel = _kernels.get(key)
        return kernel if kernel is not None else _open(key, _order(spec, target))


def build(spec: KernelSpec, target: str) -> Path:
    """Make sure a valid entry exists and return its folder. Does nothing when there is one.

    Holds the entry's file lock while building, so that of many processes one builds and the others wait for it.
    Where the cache folder cannot be written, says so once and builds in a folder private to this process.

    Raises :class:`~.errors.NotBuilt` when building is needed and forbidden, :class:`~.errors.BuildError`,
    :class:`~.errors.CacheError` when no folder at all can be written, and as :func:`is_built`.
    """
    return _build(_order(spec, target))


def load(spec: KernelSpec, target: str) -> Kernel:
    """The kernel, from memory, else from the cache, else built. Raises as :func:`build`.

    The same object for the same spec and target until :func:`forget`; from memory that takes microseconds.
    """
    key = (spec, target)
    kernel = _kernels.get(key)
    if kernel is not None:
        return kernel
    with _key_lock(key):
        kernel = _kernels.get(key)
        if kernel is not None:
            return kernel
        order = _order(spec, target)
        kernel = _open(key, order)
        if kernel is None:
            _build(order)
            kernel = _open(key, order)
        if kernel is None:  # damaged between the two: once more, where no other process can reach it
            cache.abandon(settings.get().cache_dir, "an entry was damaged as soon as it was built")
            _build(order)
            kernel = _open(key, order)
        if kernel is None:
            raise CacheError(
                f"the {spec.kind} kernel for {target} was built twice and could not be read back: something removes or "
                f"alters files in {settings.get().cache_dir} and in the temporary folder"
            )
        return kernel


@dataclass(frozen=True)
class BuildResult:
    """What became of one kernel of :func:`build_many`. path: its folder, or None and ``error`` says why.

    built: whether it had to be built (or waited for). seconds: wall time it took.
    """

    spec: KernelSpec
    target: str
    path: Path | None
    built: bool
    seconds: float
    error: Exception | None = None


def build_many(
    wanted: Iterable[tuple[KernelSpec, str]],
    on_done: Callable[[BuildResult], None] | None = None,
    jobs: int | None = None,
) -> list[BuildResult]:
    """:func:`build` for many (spec, target) pairs at once, each different pair once, in their order.

    on_done: called in the calling thread as each is finished, in the order they finish (for a progress bar).
    jobs: how many at the same time (default: the setting ``build_jobs``).
    A kernel that does not build is reported in its result and stops no other. What is no
    :class:`~.errors.TilewrightError` (a defect of ours) is raised after the others have finished.
    """
    pairs = list(dict.fromkeys(wanted))
    if not pairs:
        return []

    def one(pair: tuple[KernelSpec, str]) -> BuildResult:
        spec, target = pair
        start = time.perf_counter()
        found = None
        try:
            order = _order(spec, target)
            found = _find(order)
            path, error = found or _build(order), None
        except TilewrightError as caught:
            path, error = None, caught
        return BuildResult(spec, target, path, found is None and error is None, time.perf_counter() - start, error)

    jobs = min(len(pairs), jobs or settings.get().build_jobs)
    results: dict[tuple[KernelSpec, str], BuildResult] = {}
    with ThreadPoolExecutor(max_workers=jobs, thread_name_prefix="tilewright-build") as pool:
        for future in as_completed([pool.submit(one, pair) for pair in pairs]):
            result = future.result()
            results[(result.spec, result.target)] = result
            if on_done is not None:
                on_done(result)
    return [results[pair] for pair in pairs]


def forget() -> None:
    """Drop all loaded kernels, so that the next :func:`load` looks at the cache again."""
    with _lock:
        _kernels.clear()
        _key_locks.clear()
    launches_changed()


_launch_keepers: list[Callable[[], None]] = []


def on_forget(callback: Callable[[], None]) -> None:
    """Have ``callback`` called when loaded kernels change: for whoever keeps their launches."""
    _launch_keepers.append(callback)


def launches_changed() -> None:
    """Make everybody who keeps launches of loaded kernels ask for them again."""
    for callback in _launch_keepers:
        callback()


def _after_fork() -> None:
    """A lock that another thread of the parent held stays locked in the child for ever: make new ones."""
    global _lock
    _lock = threading.Lock()
    _key_locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _find(order: _Order) -> Path | None:
    for store in cache.stores(settings.get().cache_dir):
        if store.check(order.digest) is None:
            return store.entry(order.digest)
    return None


def _open(key: tuple[KernelSpec, str], order: _Order) -> Kernel | None:
    folder = _find(order)
    if folder is None:
        return None
    try:
        launch = order.target.open(folder, order.spec, order.text, order.digest)
    except OSError as error:
        if _find(order) != folder:  # cleared or damaged by another process since it was checked
            return None
        raise BuildError(f"the {order.spec.kind} kernel in {folder} cannot be loaded: {error}") from error
    kernel = Kernel(order.spec, key[1], order.text, folder / order.target.source_name, order.digest, launch)
    _kernels[key] = kernel
    return kernel


def _build(order: _Order) -> Path:
    folder = _find(order)
    if folder is not None:
        return folder
    now = settings.get()
    if now.no_build:
        raise NotBuilt(
            f"the {order.spec.kind} kernel for {order.target.name} is not in {now.cache_dir} and TILEWRIGHT_NO_BUILD "
            "forbids building it: unset it, or run once with building allowed and the same cache folder"
        )

    def fill(folder: Path) -> None:
        order.target.build(folder, order.spec)

    return cache.put(now.cache_dir, order.digest, order.target.source_name, order.text, order.parts, fill)
