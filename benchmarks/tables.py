"""Tables of a run: rich ones for the terminal, Markdown for the pages. Both are made of the record alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .measure import Quartiles
from .record import Entry, Kind, Record, Row, State

if TYPE_CHECKING:
    from rich.table import Table

    from .harness import Suite

NOTHING = "-"


def time_text(seconds: float) -> str:
    """Three digits with a unit: ``12.3 ms``."""
    for factor, unit in ((1e6, "us"), (1e3, "ms")):
        if seconds * factor < 999.5:
            return f"{_digits(seconds * factor)} {unit}"
    return f"{_digits(seconds)} s"


def _digits(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def ratio_text(ratio: Quartiles | None) -> str:
    """Median and quartiles: ``1.42x (1.39-1.45)``."""
    if ratio is None:
        return NOTHING
    return f"{_digits(ratio.median)}x ({_digits(ratio.q1)}-{_digits(ratio.q3)})"


def speed_text(row: Row, entry: Entry) -> str:
    """The median time, or items a second where the row counts items."""
    median = entry.quartiles.median
    if row.items:
        return f"{row.items / median:,.0f} {row.item}/s"
    return time_text(median)


def share_text(share: float | None) -> str:
    return NOTHING if share is None else f"{share:.0%}"


# The terminal


def row_table(row: Row) -> Table:
    """One row: a line for each contender."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    facts = [row.place and f"in {row.place}", row.floor and f"floor {time_text(row.floor)} ({row.bound})", row.note]
    title = f"{row.name}  [dim]{', '.join(str(f) for f in facts if f)}[/dim]"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name in ("", "median", "quartiles", "time / ours", "of floor", "of tolerance", "output", ""):
        table.add_column(name, justify="left" if name in ("", "output") else "right", no_wrap=name != "")
    for entry in row.entries:
        style = {Kind.OURS: "bold", Kind.FLOOR: "dim", Kind.CONTEXT: "dim"}.get(entry.kind, "")
        error = share_text(entry.of_tolerance)
        if not entry.timed:
            color = "dim" if entry.state is State.SKIPPED else "red"
            word = Text(f"{entry.state.value}: {entry.word}", style=color)
            table.add_row(Text(entry.name, style=style), *[""] * 4, error, "", word)
            continue
        spread = f"{time_text(entry.quartiles.q1)} - {time_text(entry.quartiles.q3)}"
        speed = speed_text(row, entry) if row.items else ""
        share = share_text(row.floor_share(entry.name))
        cells = (time_text(entry.quartiles.median), spread, ratio_text(row.ratio(entry.name)), share, error)
        table.add_row(Text(entry.name, style=style), *cells, entry.output, speed)
    return table


def summary_table(record: Record, suite: Suite | None = None) -> Table:
    """One line a row."""
    from rich import box
    from rich.table import Table

    header, *lines = summary(record, suite)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left", overflow="fold", no_wrap=not number)
    for line in lines:
        table.add_row(*line)
    return table


# The facts of both


def summary(record: Record, suite: Suite | None = None) -> list[list[str]]:
    """A header and a line for each row: ours, the best peer, their ratio, the share of the floor, own comparisons."""
    pairs = suite.compare if suite is not None else ()
    placed = any(row.place for row in record.rows)
    header = ["row", *(["working set in"] if placed else []), "ours", "best peer", "best peer / ours", "of floor"]
    header += [f"{slow} / {fast}" for slow, fast in pairs]
    lines = [header]
    for row in record.rows:
        best, own = row.best(), row.own
        versus = row.versus_best()
        line = [row.name, *([row.place or NOTHING] if placed else [])]
        line.append(speed_text(row, own) if own is not None else not_timed(row))
        line.append(f"{best.name}, {speed_text(row, best)}" if best is not None else NOTHING)
        line += [ratio_text(versus[1]) if versus else NOTHING, share_text(row.floor_share(row.ours))]
        line += [ratio_text(row.ratio(slow, fast)) for slow, fast in pairs]
        lines.append(line)
    return lines


def not_timed(row: Row) -> str:
    """Why there is no time of ours."""
    entry = row.entry(row.ours)
    if entry is None:
        return row.note or NOTHING
    return f"{entry.state.value}: {entry.word}"


def detail(record: Record) -> list[list[str]]:
    """A header and a line for each row with every contender's median; those that were not timed are left empty."""
    names = list(dict.fromkeys(entry.name for row in record.rows for entry in row.entries))
    lines = [["row", "floor", *names]]
    for row in record.rows:
        cells = []
        for name in names:
            entry = row.entry(name)
            cells.append(speed_text(row, entry) if entry is not None and entry.timed else NOTHING)
        lines.append([row.name, time_text(row.floor) if row.floor else NOTHING, *cells])
    return lines


def overview(record: Record) -> str:
    """One sentence: on how many rows ours was at least as fast as the best peer, and the range of the ratios."""
    ratios = [versus[1].median for row in record.rows if (versus := row.versus_best()) is not None]
    if not ratios:
        return f"{len(record.rows)} rows; nothing of ours was timed beside a peer"
    ahead = sum(1 for ratio in ratios if ratio >= 1.0)
    return (
        f"{len(ratios)} rows; at least as fast as the best peer on {ahead}; best peer / ours: "
        f"median {_digits(statistics.median(ratios))}x, from {_digits(min(ratios))}x to {_digits(max(ratios))}x"
    )


def conditions(record: Record) -> str:
    """The machine and the versions in one sentence."""
    machine, versions = record.machine, record.versions
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads, kernels for {machine['isa']}"
    peers = ", ".join(f"{name} {versions[name]}" for name in sorted(versions) if name not in ("tilewright", "compiler"))
    state = record.commit
    code = f"commit {state['id'][:10]}{' with local changes' if state['dirty'] else ''}" if state else "no checkout"
    return f"{where}; {peers}; {code}, {record.date[:10]}"


def limits(record: Record) -> str:
    """The measured limits in one sentence."""
    peaks = record.peaks

    def rates(points: list[list[float]]) -> str:
        return ", ".join(f"{rate / 1e9:.0f} GB/s at {size / 2**20:g} MiB" for size, rate in points)

    products = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in peaks.matmul.items())
    return (
        f"read {rates(peaks.read)}; copy (read and written bytes) {rates(peaks.copy)}; "
        f"matrix products {products} G(FL)OP/s"
    )


# Markdown


def markdown(lines: Sequence[Sequence[Any]]) -> str:
    """A header and lines as a table; ``|`` in a cell is escaped."""
    rows = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    text = [f"| {' | '.join(rows[0])} |", f"| --- |{' ---: |' * (len(rows[0]) - 1)}"]
    return "\n".join(text + [f"| {' | '.join(row)} |" for row in rows[1:]])


def page(record: Record, suite: Suite | None = None) -> str:
    """The whole run: conditions, limits, the summary and every median."""
    left_out = record.options.get("left_out") or []
    parts = [
        f"{conditions(record)}.",
        f"Measured limits: {limits(record)}.",
        f"{overview(record)}.",
        *([f"Left out, as the time was up: {', '.join(left_out)}."] if left_out else []),
        markdown(summary(record, suite)),
        "Medians of every contender:",
        markdown(detail(record)),
    ]
    words = sorted({f"{e.name}: {e.word}" for row in record.rows for e in row.entries if e.word})
    if words:
        parts += ["Not timed everywhere:", "\n".join(f"- {word}" for word in words)]
    return "\n\n".join(parts)
