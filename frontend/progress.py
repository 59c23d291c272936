"""Show that kernels are being built, where somebody is looking."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from ..codegen.spec import KernelSpec
from ..runtime import load

_log = logging.getLogger("tilewright.build")


class _Step(Protocol):
    def __call__(self, result: load.BuildResult) -> None: ...


def build_kernels(pairs: Sequence[tuple[KernelSpec, str]]) -> dict[tuple[KernelSpec, str], load.BuildResult]:
    """:func:`~tilewright.runtime.load.build_many` with a progress bar on a terminal, and a log line a kernel."""
    missing = [pair for pair in dict.fromkeys(pairs) if not load.is_loaded(*pair)]
    with _bar(len(missing)) as step:
        results = load.build_many(missing, on_done=step)
    return {(result.spec, result.target): result for result in results}


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
