"""The table of docs/quantized_cache.md, from the JSON of the study kv_quality."""

from __future__ import annotations

from typing import Any

from . import tables


def quality(study: dict[str, Any]) -> str:
    """One line a setting: bytes as allocated, and what they cost in quality beside the model as it is."""
    lines = [
        [
            "cache",
            "keys, bytes a token",
            "values, bytes a token",
            "constant, KiB",
            "smaller by (keys; all)",
            "perplexity",
            "KL",
            "top-1",
            "needle",
            "its log-probability",
        ]
    ]
    rows = study["rows"]
    base = next((row["perplexity"] for row in rows if not row["passes"] and "perplexity" in row), None)
    whole = next((row for row in rows if row["setting"] == "whole" and "key_bytes" in row), None)
    for row in rows:
        lines.append(
            [
                row["setting"],
                *(_text(row, name, "{:,.0f}") for name in ("key_bytes", "value_bytes")),
                f"{(row['key_constant'] + row['value_constant']) / 1024:,.0f}"
                if "key_bytes" in row
                else tables.NOTHING,
                _smaller(row, whole),
                _perplexity(row, base),
                f"{abs(row['kl']):.5f}" if "kl" in row else tables.NOTHING,  # rounding may leave -1e-10 of nothing
                _text(row, "top1", "{:.1%}"),
                f"{row['exact']} of {row['needles']}" if row.get("needles") else tables.NOTHING,
                _text(row, "log", "{:.2f}"),
            ]
        )
    step = "one token" if study["step"] == 1 else f"{study['step']} tokens"
    about = (
        f"{study['model']}, {study['sequences']} x {study['length']:,} tokens, {step} a call after {study['prompt']}, "
        f"float32; bytes of one sequence in bfloat16. {study['device']}, {study['date'][:10]}, "
        f"torch {study['versions'].get('torch', '')}."
    )
    return f"{tables.markdown(lines)}\n\n{about}"


def _text(row: dict[str, Any], name: str, form: str) -> str:
    return form.format(row[name]) if name in row else tables.NOTHING


def _smaller(row: dict[str, Any], whole: dict[str, Any] | None) -> str:
    """How many times fewer bytes a token than whole ones; a cache that does not grow has none."""
    if whole is None or "key_bytes" not in row or not row["key_bytes"]:
        return tables.NOTHING
    both = (whole["key_bytes"] + whole["value_bytes"]) / (row["key_bytes"] + row["value_bytes"])
    return f"{whole['key_bytes'] / row['key_bytes']:.1f}; {both:.1f}"


def _perplexity(row: dict[str, Any], base: float | None) -> str:
    if "perplexity" not in row:
        return tables.NOTHING
    change = f" ({100 * (row['perplexity'] / base - 1):+.2f} %)" if base is not None and row["passes"] else ""
    return f"{row['perplexity']:.3f}{change}"
