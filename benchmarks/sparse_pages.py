"""Tables and the picture of docs/block_sparse.md, from a run of the suite block_sparse and the quality study's JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from . import tables
from .plots import COLORS
from .record import Record, Row


def read(path: Path) -> dict[str, Any] | None:
    """The study's JSON, or None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def quality(study: dict[str, Any]) -> str:
    """One line a setting."""
    lines = [
        ["method", "setting", "density", "perplexity", "KL", "top-1", "site error", "needle", "its log-probability"]
    ]
    for row in study["rows"]:
        found = f"{row['found']} of {row['needles']}" if row["needles"] else tables.NOTHING
        error = f"{row['error']:.3f} (most {row['error_most']:.2f})" if "error" in row else tables.NOTHING
        lines.append(
            [
                row["method"],
                row["setting"] or tables.NOTHING,
                f"{row['density']:.0%}" if "density" in row else tables.NOTHING,
                f"{row['perplexity']:.2f}" if "perplexity" in row else tables.NOTHING,
                f"{row['kl']:.4f}" if row.get("kl") is not None else tables.NOTHING,
                f"{row['top1']:.1%}" if "top1" in row else tables.NOTHING,
                error,
                found,
                f"{row['log']:.2f}" if "log" in row else tables.NOTHING,
            ]
        )
    parts = [tables.markdown(lines)]
    missing = [
        f"{row['method']} {row['setting']}: {row['sequences']} of {study['sequences']}"
        for row in study["rows"]
        if row["sequences"] < study["sequences"]
    ]
    if missing:
        parts.append(f"Fewer sequences went into {'; '.join(missing)}.")
    return "\n\n".join(parts)


def draw(study: dict[str, Any], path: Path) -> None:
    """Perplexity, KL and the needle's log-probability against density, a line for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = (
        ("perplexity", "perplexity"),
        ("kl", "KL to dense, nats"),
        ("log", "needle: log-probability of the answer"),
    )
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 4), layout="constrained")
    methods = list(dict.fromkeys(row["method"] for row in study["rows"] if row["method"] != "dense"))
    dense: dict[str, Any] = next((row for row in study["rows"] if row["method"] == "dense"), {})
    for axis, (name, title) in zip(axes, panels, strict=True):
        for method, color in zip(methods, COLORS, strict=False):
            points = sorted(
                (100 * row["density"], row[name])
                for row in study["rows"]
                if row["method"] == method and "density" in row and name in row
            )
            if points:
                axis.plot(*zip(*points, strict=True), "o-", color=color, label=method)
        if name in dense and name != "kl":
            axis.axhline(dense[name], color="black", linestyle=":", linewidth=1, label="dense")
        if name == "kl":
            axis.set_yscale("log")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("density, % of causal tiles")
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=9, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": ""})
    pyplot.close(figure)


def _density(row: Row) -> float:
    found = re.match(r"density ([\d.]+)", row.note)
    return float(found[1]) if found else 1.0


def static_table(record: Record) -> str:
    """Rows with static masks: beside FlexAttention, and beside our dense kernel times the density."""
    lines = [["mask, dtype, tokens", "density", "ours", "flex / ours", "flex+mask / ours", "ours / (density x dense)"]]
    for row in record.rows:
        if row.name.partition("/")[0] in ("lists", "select", "long") or row.own is None:
            continue
        part = row.ratio("ours", "dense")
        share = tables.NOTHING if part is None else f"{part.median / _density(row):.2f}"
        lines.append(
            [
                row.name,
                f"{_density(row):.1%}",
                tables.speed_text(row, row.own),
                tables.ratio_text(row.ratio("flex")),
                tables.ratio_text(row.ratio("flex+mask")),
                share,
            ]
        )
    return tables.markdown(lines)


def lists_table(record: Record) -> str:
    """Rows with random block lists: the speed-up over dense causal SDPA, and what share of 1 / density it is."""
    lines = [["dtype, tokens, density", "ours", "sdpa / ours", "x density"]]
    for row in record.rows:
        ratio = row.ratio("sdpa")
        if not row.name.startswith("lists/") or row.own is None or ratio is None:
            continue
        share = f"{ratio.median * _density(row):.2f}"
        lines.append(
            [row.name.removeprefix("lists/"), tables.speed_text(row, row.own), tables.ratio_text(ratio), share]
        )
    return tables.markdown(lines)


def selector_table(record: Record) -> str:
    """Rows of selectors: the choice's time as a share of the dense attention's, and the whole beside dense."""
    lines = [["selector, dtype, tokens", "selection", "of our dense", "of sdpa", "dense / sparse", "note"]]
    for row in record.rows:
        if not row.name.startswith("select/") or row.own is None:
            continue
        shares = [row.ratio("selection", name) for name in ("dense", "sdpa")]
        lines.append(
            [
                row.name.removeprefix("select/"),
                tables.time_text(row.own.quartiles.median),
                *(tables.NOTHING if share is None else f"{share.median:.0%}" for share in shares),
                tables.ratio_text(row.ratio("dense", "sparse")),
                row.note.rpartition("; ")[2],
            ]
        )
    return tables.markdown(lines)


def long_table(record: Record) -> str:
    """A window over long inputs: time for a token, and memory."""
    lines = [["dtype, tokens", "ours", "nanoseconds a token", "memory"]]
    for row in record.rows:
        if row.name.startswith("long/") and row.own is not None:
            median = row.own.quartiles.median
            each = f"{1e9 * median / row.params['length']:.0f}"
            lines.append([row.name.removeprefix("long/"), tables.time_text(median), each, row.note])
    return tables.markdown(lines)
