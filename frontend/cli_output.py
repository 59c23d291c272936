"""What every command shares: tables and JSON on stdout, progress and notes on stderr, errors as one sentence."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text
from typer.core import TyperGroup

EXIT_ERROR = 2
EXIT_FOUND_BAD = 1

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]


def out() -> Console:
    """For results. Wide enough for the tables where it is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 100, highlight=False)


def err() -> Console:
    """For progress, notes and errors."""
    return Console(stderr=True, highlight=False)


def print_json(data: Any) -> None:
    print(json.dumps(data, indent=2, allow_nan=False))


class Commands(TyperGroup):
    """Turns Tilewright's errors into a sentence and exit status 2; ``--debug`` lets them through."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        self.wants_json = "--json" in args
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        if ctx.params.get("debug") or os.environ.get("TILEWRIGHT_DEBUG"):
            return super().invoke(ctx)
        from ..codegen.spec import SpecError
        from ..runtime.errors import TilewrightError

        try:
            with _notes():
                return super().invoke(ctx)
        except (TilewrightError, SpecError) as error:
            # A script that asked for JSON gets JSON, whatever happens.
            if self.wants_json:
                print_json({"error": {"type": type(error).__name__, "message": str(error)}})
            err().print(Text(f"error: {error}", style="bold red"), soft_wrap=True)
            raise typer.Exit(EXIT_ERROR) from None


@contextlib.contextmanager
def _notes() -> Iterator[None]:
    """Announcements as one line on stderr; what libraries warn about is no concern of the user's here."""
    from ..runtime.errors import TilewrightWarning

    def show(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, TilewrightWarning):
            err().print(Text(f"note: {message}", style="yellow"), soft_wrap=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", TilewrightWarning)
        warnings.showwarning = show
        yield


@contextlib.contextmanager
def progress(text: str) -> Iterator[Callable[[str], None]]:
    """A spinner with the time spent, on stderr; the function it gives changes its text. Silent where no one looks."""
    console = err()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(text)
        yield lambda new: bar.update(task, description=new)


def size_text(count: int) -> str:
    """Bytes as a reader likes them."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"
