"""The command ``bench``: run a suite of benchmarks, or show a run that was written before."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_output import EXIT_FOUND_BAD, AsJson, err, out, print_json, progress

if TYPE_CHECKING:
    from rich.console import Console

    from ..benchmarks.harness import Suite
    from ..benchmarks.record import Record

QUICK_BUDGET, FULL_BUDGET = 170.0, 570.0


def bench(
    suite: Annotated[str | None, typer.Argument(metavar="[SUITE]", help="Without one, list them.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few rows and rounds: under three minutes.")] = False,
    filter: Annotated[
        str,
        typer.Option(metavar="TEXT", help="Only rows whose name contains it, or matches it with *; commas separate."),
    ] = "",
    threads: Annotated[int, typer.Option(min=0, help="Processors and threads; 0: as torch chooses.")] = 0,
    budget: Annotated[
        float | None,
        typer.Option(
            min=0, metavar="SECONDS", help="No row starts later than that; 0: no limit. [default: 570, quick 170]"
        ),
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Let autotuning choose tiles, not the shipped defaults.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="The JSON to write.")] = None,
    plots: Annotated[Path | None, typer.Option(metavar="DIR", help="Draw pictures, too.")] = None,
    show: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Run nothing: show a run that was written before.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time ours and peers side by side, each checked against a reference first. Exit status 1 when something is wrong.

    The run is written as JSON after every row; docs/benchmarks.md says what is measured and how.
    """
    with progress("importing torch"):
        from ..benchmarks import harness, record
        from ..runtime.errors import BadArgument

        known = harness.suites()
    if show is not None:
        run = record.read(show)
        _finish(run, known.get(run.suite), show, plots, as_json)
        return
    if suite is None:
        _list(known, as_json)
        return
    if suite not in known:
        import difflib

        close = difflib.get_close_matches(suite, known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise BadArgument(f"there is no suite {suite!r}: {hint}The suites are {', '.join(sorted(known))}")
    if budget is None:
        budget = QUICK_BUDGET if quick else FULL_BUDGET
    with progress(suite) as stage:
        from ..benchmarks import tables

        options = harness.Options(quick, filter, threads, budget, tune, output, stage)
        if not as_json:
            options = dataclasses.replace(options, show=lambda row: _wide().print(tables.row_table(row)))
        run, path = harness.run_suite(known[suite], options)
    _finish(run, known[suite], path, plots, as_json)


def _finish(run: Record, suite: Suite | None, path: Path, plots: Path | None, as_json: bool) -> None:
    from ..benchmarks import tables
    from ..benchmarks.plots import draw

    drawn = draw(run, suite, plots) if plots is not None and suite is not None else []
    bad = run.bad
    if as_json:
        print(run.to_json(), end="")
    else:
        console = _wide()
        console.print(tables.summary_table(run, suite))
        console.print(f"{tables.overview(run)}\n{tables.conditions(run)}\nlimits: {tables.limits(run)}", soft_wrap=True)
        if left := run.options.get("left_out"):
            console.print(f"left out, as the time was up: {', '.join(left)}", soft_wrap=True)
        for name in (path, *drawn):
            console.print(f"{name}", soft_wrap=True)
    for row, entry in bad:
        err().print(f"{row.name}: {entry.name} is {entry.state.value}: {entry.word}", style="red", markup=False)
    if bad:
        raise typer.Exit(EXIT_FOUND_BAD)


def _wide() -> Console:
    """Names of rows and words of what was left out need more than 100 columns where no terminal sets the width."""
    console = out()
    console.width = max(console.width, 150)
    return console


def _list(known: dict[str, Suite], as_json: bool) -> None:
    rows: list[dict[str, Any]] = [
        {"suite": name, "device": one.device, "rows": len(one.cases()), "about": one.about}
        for name, one in sorted(known.items())
    ]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        line = f"[bold]{row['suite']:14}[/bold] {row['device']:5} {row['rows']:3} rows  {row['about']}"
        out().print(line, soft_wrap=True)
