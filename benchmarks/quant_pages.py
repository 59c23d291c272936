"""The tables of docs/quantize_quality.md, from the JSON of the study quant_quality."""

from __future__ import annotations

from typing import Any

from . import tables

Row = dict[str, Any]
YARDSTICK = "rtn"


def quality(study: dict[str, Any]) -> str:
    """The language model's table, the encoder's, and how they were made."""
    rows = study["rows"]
    text = [row for row in rows if "perplexity" in row or (row["model"] == "smollm2" and "unavailable" in row)]
    sentences = [row for row in rows if row["model"] == "minilm" and ("cosine" in row or "unavailable" in row)]
    parts = []
    if text:
        parts += [
            f"SmolLM2, {study['sequences']} x {study['length']:,} tokens, float32; KL over every {study['every']}th.",
            tables.markdown(_text(text)),
        ]
    if sentences:
        parts += [
            f"MiniLM, {study['sentences']} sentences: cosine with the model's own embeddings, and the share of each "
            f"sentence's {study['nearest']} nearest that stay.",
            tables.markdown(_sentences(sentences)),
        ]
    missing = sorted(
        {f"{row['method']}, {row['setting']}: {row['unavailable']}" for row in rows if "unavailable" in row}
    )
    if missing:
        parts.append("No result of " + "; ".join(missing) + ".")
    if study.get("not_run"):
        parts.append("Not run: " + "; ".join(study["not_run"]) + ".")
    parts.append(
        f"Calibrated with seed {study['seed']} within the given seconds. {study['device']}, "
        f"{study['threads'] or 'all'} threads, {study['date'][:10]}, torch {study['versions'].get('torch', '')}."
    )
    return "\n\n".join(parts)


def _text(rows: list[Row]) -> list[list[str]]:
    lines = [["weights", "method", "perplexity", "KL", "top-1", "calibration", "beats rtn"]]
    for row in rows:
        if "perplexity" not in row:
            continue
        base = _yardstick(rows, row)
        better = tables.NOTHING
        if base is not None and row is not base and "kl" in row:
            better = "yes" if row["kl"] < base["kl"] else "no"
        lines.append(
            [
                row["setting"],
                row["method"].replace("|", "/") if "kl" in row else tables.NOTHING,
                f"{row['perplexity']:,.2f}" if row["perplexity"] < 1e5 else f"{row['perplexity']:.1e}",
                f"{abs(row['kl']):.4f}" if "kl" in row else tables.NOTHING,
                f"{row['top1']:.1%}" if "top1" in row else tables.NOTHING,
                _seconds(row),
                better,
            ]
        )
    return lines


def _sentences(rows: list[Row]) -> list[list[str]]:
    lines = [["weights", "method", "cosine, mean", "cosine, least", "ranking", "calibration"]]
    for row in rows:
        if "cosine" in row:
            numbers = [f"{row['cosine']:.5f}", f"{row['least_cosine']:.5f}", f"{row['ranking']:.1%}"]
            lines.append([row["setting"], row["method"], *numbers, _seconds(row)])
    return lines


def _yardstick(rows: list[Row], row: Row) -> Row | None:
    return next((one for one in rows if one["setting"] == row["setting"] and one["method"] == YARDSTICK), None)


def _seconds(row: Row) -> str:
    if "calibration_seconds" not in row:
        return tables.NOTHING
    cut = ", cut off" if row.get("stopped_early") else ""
    return f"{row['calibration_seconds']:,.0f} s{cut}"
