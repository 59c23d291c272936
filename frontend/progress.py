"""Show what takes long, building kernels and calibrating passes, where somebody is looking."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from ..codegen.spec import KernelSpec
from ..passes.base import Progress as Show
from ..runtime import load

if TYPE_CHECKING:
    from rich.progress import TaskID

_log = logging.getLogger("tilewright.build")
_calibration = logging.getLogger("tilewright.calibration")


class _Step(Protocol):
    def __call__(self, result: load.BuildResult) -> None: ...


def build_kernels(pairs: Sequence[tuple[KernelSpec, str]]) -> dict[tuple[KernelSpec, str], load.BuildResult]:
    """:func:`~tilewright.runtime.load.build_many` with a progress bar on a terminal, and a log line a kernel."""
    missing = [pair for pair in dict.fromkeys(pairs) if not load.is_loaded(*pair)]
    with _bar(len(missing)) as step:
        results = load.build_many(missing, on_done=step)
    return {(result.spec, result.target): result for result in results}


@contextmanager
def pass_progress(name: str) -> Iterator[Show]:
    """A bar for what one pass does, with the time left; it appears once the pass tells of a step. Else log lines."""
    if not sys.stderr.isatty():
        yield lambda done, total, text: _calibration.debug("%s: %s, %d of %d", name, text, done, total)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn(f"{name}: {{task.description}}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task: TaskID | None = None

    def show(done: int, total: int, text: str) -> None:
        nonlocal task
        if task is None:
            bar.start()
            task = bar.add_task(text, total=total)
        elif bar.tasks[0].description != text:  # the next thing has its own pace
            bar.reset(task, total=total, description=text, completed=done)
        bar.update(task, completed=done, total=total)

    try:
        yield show
    finally:
        bar.stop()


@contextmanager
def _bar(total: int) -> Iterator[_Step]:
    def log(result: load.BuildResult) -> None:
        if result.built:
            _log.info("built %s for %s in %.1f s", result.spec.kind, result.target, result.seconds)

    if not total or not sys.stderr.isatty():
        yield log
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("building kernels"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("build", total=total)

        def advance(result: load.BuildResult) -> None:
            log(result)
            progress.advance(task)

        yield advance
