"""Pictures of a run, made from its record alone: times and ratios by size, one panel a group of rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .record import Kind, Record, Row

if TYPE_CHECKING:
    from .harness import Suite

COLORS = ("#4c72b0", "#dd8452", "#8172b3", "#937860", "#8c8c8c", "#ccb974")
OURS = ("#2a7f3f", "#55a868", "#8fcf9f", "#1b4f28", "#b5d6a0", "#6b8e23", "#3c6e71")
MOST_PANELS = 8


def groups(record: Record, suite: Suite) -> dict[str, list[Row]]:
    """Panel title -> rows, by the parameters that the suite names; rows without these are a panel of their own."""
    found: dict[str, list[Row]] = {}
    for row in record.rows:
        if not any(entry.timed for entry in row.entries):
            continue
        known = [name for name in suite.plot_panels if name in row.params]
        title = ", ".join(f"{name} {row.params[name]}" for name in known) or "all rows"
        if known and len(known) < len(suite.plot_panels):
            title = "other rows"
        found.setdefault(title, []).append(row)
    return found


def draw(record: Record, suite: Suite, folder: Path) -> list[Path]:
    """``SUITE.png``: for each row the ratio of each timed contender to ours, with quartiles. Returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = dict(list(groups(record, suite).items())[:MOST_PANELS])
    if not panels:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    colors = _colors(record)
    heights = [0.8 + 0.34 * len(rows) for rows in panels.values()]
    figure, axes = pyplot.subplots(
        len(panels),
        1,
        figsize=(9, sum(heights) + 1),
        squeeze=False,
        sharex=True,
        height_ratios=heights,
        layout="constrained",
    )
    for axis, (title, rows) in zip(axes[:, 0], panels.items(), strict=True):
        _panel(axis, title, rows, colors)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    for axis in axes[1:, 0]:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.suptitle(f"{suite.name}: time / ours (right of 1: ours is faster)", fontsize=11)
    path = folder / f"{record.suite}.png"
    figure.savefig(path, dpi=110, metadata={"Software": ""})
    pyplot.close(figure)
    return [path]


def _panel(axis: Any, title: str, rows: list[Row], colors: dict[str, str]) -> None:
    """A line for each row, a dot for each contender; the bar spans the quartiles of the per-round ratios."""
    drawn: set[str] = set()
    for place, row in enumerate(reversed(rows)):
        for entry in row.entries:
            ratio = row.ratio(entry.name, None if row.own else _yardstick(row))
            if ratio is None:
                continue
            label = None if entry.name in drawn else entry.name
            drawn.add(entry.name)
            spread = [[ratio.median - ratio.q1], [ratio.q3 - ratio.median]]
            marker = {Kind.OURS: "D", Kind.PEER: "o", Kind.FLOOR: "|", Kind.CONTEXT: "x"}[entry.kind]
            axis.errorbar(
                [ratio.median], [place], xerr=spread, fmt=marker, color=colors[entry.name], label=label, markersize=5
            )
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [row.name for row in reversed(rows)], fontsize=7)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.tick_params(axis="x", which="both", labelsize=7, labelbottom=True)
    axis.grid(axis="x", which="both", alpha=0.25)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.set_title(title, fontsize=9, loc="left")


def _yardstick(row: Row) -> str | None:
    """The best peer, where nothing of ours was timed."""
    best = row.best()
    return best.name if best is not None else None


def _colors(record: Record) -> dict[str, str]:
    found: dict[str, str] = {}
    counts = {True: 0, False: 0}
    for row in record.rows:
        for entry in row.entries:
            if entry.name not in found:
                own = entry.kind is Kind.OURS
                palette = OURS if own else COLORS
                found[entry.name] = palette[counts[own] % len(palette)]
                counts[own] += 1
    return found
