"""Printing a :class:`~tilewright.frontend.report.Report`: one screen of 100 columns, equal sites in one row."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .report import Report, SiteError, worst_error

WIDTH = 100
_SITE_WIDTH = 46  # what a site gets at most before a long reason may squeeze it
_EXACTNESS_STYLE = {"exact": "green", "reassociated": "cyan", "approximate": "yellow"}


@dataclass
class SiteGroup:
    """Sites that differ in numbers of their path only, such as the 30 layers of a model."""

    site: str
    count: int
    rows: list[Any]


def group_sites(rows: Iterable[Any], key: Callable[[Any], Any] = lambda row: None) -> list[SiteGroup]:
    """Collapse rows (anything with a ``site``) whose ids differ in whole path numbers only and whose ``key`` agrees.

    ``layers.0.attn/softmax`` ... ``layers.29.attn/softmax`` become ``layers.{0-29}.attn/softmax``.
    """
    groups: dict[Any, list[Any]] = {}
    for row in rows:
        groups.setdefault((_skeleton(row.site), key(row)), []).append(row)
    return [SiteGroup(merge_sites([row.site for row in members]), len(members), members) for members in groups.values()]


_NUMBER = re.compile(r"(?<=[.#])\d+(?=[./#]|$)")


def _skeleton(site: str) -> str:
    return _NUMBER.sub("*", site)


def merge_sites(sites: list[str]) -> str:
    """One name for sites of the same skeleton, with the numbers that vary as ranges."""
    columns = list(zip(*(map(int, _NUMBER.findall(site)) for site in sites), strict=True))
    parts = _NUMBER.split(sites[0])
    pieces = [parts[0]]
    for numbers, rest in zip(columns, parts[1:], strict=True):
        distinct = sorted(set(numbers))
        pieces += [str(distinct[0]) if len(distinct) == 1 else "{" + _ranges(distinct) + "}", rest]
    return "".join(pieces)


def _ranges(numbers: list[int]) -> str:
    """``0-29``, ``0-4,7``, or the count when that would be long."""
    runs = []
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        members = [n for _, n in run]
        runs.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return ",".join(runs) if len(runs) <= 4 else f"{numbers[0]}..{numbers[-1]}"


def same_reason(reason: str) -> str:
    """A reason with the numbers of graph nodes (``softmax_12``) taken out, to group by."""
    return re.sub(r"(?<=[A-Za-z])_\d+\b", "_N", reason)


def short_source(source: str) -> str:
    """``modeling_bert.py:128`` of a full path."""
    return source.replace("\\", "/").rsplit("/", 1)[-1]


def format_number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def format_error(error: SiteError | None) -> str:
    """``rel 3.1e-07, max 2.4e-07, 130 dB``; ``not measured`` without one."""
    if error is None or not error.measured:
        return "not measured"
    if error.max_abs == 0:
        return "no difference"
    decibels = "" if error.sqnr_db is None else f", {error.sqnr_db:.0f} dB"
    return f"rel {format_number(error.rel_l2)}, max {format_number(error.max_abs)}{decibels}"


def brief_error(error: SiteError | None) -> str:
    """As :func:`format_error` without the maximum."""
    return ", ".join(part for part in format_error(error).split(", ") if not part.startswith("max "))


def plain(report: Report, width: int = WIDTH) -> str:
    """The report as text without colours."""
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None, force_terminal=False, legacy_windows=False, emoji=False)
    console.print(renderable(report))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def renderable(report: Report) -> RenderableType:
    """The report as a rich renderable."""
    parts: list[RenderableType] = [_header(report)]
    if report.passes:
        parts.append(_summary(report))
    else:
        parts.append(Text("No pass was requested: the model was captured, raised and lowered only.", style="dim"))
    for one in report.passes:
        parts += _sites(one)
    parts += _breaks(report)
    parts.append(_model_error(report))
    if report.cache:
        parts.append(Text(cache_line(report.cache)))
    if line := weights_line(report.weights):
        parts.append(Text(line))
    parts += _kernels(report)
    parts += _raising(report)
    parts += [Text(f"warning: {warning}", style="yellow") for warning in report.warnings]
    parts.append(_seconds(report))
    return Group(*parts)


def cache_line(cache: Mapping[str, float]) -> str:
    """What a KV cache takes, in a line."""
    line = f"KV cache: {cache['sites']:g} sites, {cache['bytes_per_token']:,.10g} bytes a token"
    if cache["fixed_bytes"]:
        line += f" and {cache['fixed_bytes']:,.10g} bytes that do not grow"
    if cache["tokens"] >= 2**31 - 1:
        return f"{line}, for text of any length"
    return f"{line}, room for {cache['tokens']:,.10g} tokens a sequence"


def weights_line(weights: Mapping[str, int]) -> str:
    """What the weights take before and after, in a line; empty where nothing changed."""
    before, after = weights.get("before", 0), weights.get("after", 0)
    if not before or before == after:
        return ""
    return f"weights: {after / 1e6:,.1f} MB, {before / 1e6:,.1f} MB as captured"


def _header(report: Report) -> Text:
    capture = report.capture
    text = Text("Tilewright report", style="bold")
    if report.model:
        text.append(f"  {report.model}", style="not bold")
    breaks = len(capture.graph_breaks)
    facts = [
        f"captured by {'torch.export' if capture.door == 'export' else 'Dynamo'}",
        _count(capture.graphs, "graph"),
        _count(capture.nodes, "node"),
        _count(breaks, "graph break"),
    ]
    text.append("\n" + ", ".join(facts), style="not bold")
    if capture.fallback_reason:
        text.append(f"\nnot torch.export: {capture.fallback_reason}", style="not bold yellow")
    return text


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _table(*columns: tuple[str, dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for name, options in columns:
        table.add_column(name, **options)
    return table


def _summary(report: Report) -> RenderableType:
    right = {"justify": "right", "no_wrap": True}
    table = _table(
        ("pass", {"no_wrap": True}),
        ("exactness", {"no_wrap": True}),
        ("matched", right),
        ("declined", right),
        ("near misses", right),
        ("worst site error", {}),
    )
    for one in report.passes:
        counts = [len(one.matched), len(one.declined), len(one.near_misses)]
        table.add_row(
            Text(one.name, style="bold"),
            Text(one.exactness, style=_EXACTNESS_STYLE.get(one.exactness, "")),
            Text(str(counts[0]), style="green" if counts[0] else "red"),
            *(str(c) for c in counts[1:]),
            Text(brief_error(one.worst()) if one.matched else "-"),
        )
    return Padding(table, (1, 0, 1, 0))


def _sites(one: Any) -> list[RenderableType]:
    if not (one.matched or one.declined or one.near_misses):
        return [Text(f"{one.name}: found no site it could be about", style="yellow")]
    longest = max(len(_skeleton(row.site)) + 6 for row in (*one.matched, *one.declined, *one.near_misses))
    table = _table(
        (one.name, {"no_wrap": True}),
        ("n", {"justify": "right"}),
        ("site", {"overflow": "fold", "min_width": min(longest, _SITE_WIDTH)}),
        ("what", {}),
    )
    for group in group_sites(one.matched, lambda r: (r.source, r.kernel)):
        if one.error is not None:  # no site is by itself: the graph was edited as a whole
            what = Text("validated on the model's outputs")
        else:
            what = Text(format_error(worst_error(r.error for r in group.rows)))
            what.append(f"\n{group.rows[0].kernel or 'reference form'}", style="dim")
        details = shared_details(group)
        if details:
            what.append("\n" + ", ".join(f"{k}={_brief(v)}" for k, v in details.items()), style="dim")
        table.add_row(Text("matched", style="green"), str(group.count), _where(group), what)
    for group in group_sites(one.declined, lambda r: (r.source, same_reason(r.reason))):
        table.add_row(Text("declined", style="yellow"), str(group.count), _where(group), Text(group.rows[0].reason))
    for group in group_sites(one.near_misses, lambda r: (r.source, same_reason(r.reason))):
        table.add_row(Text("near miss", style="magenta"), str(group.count), _where(group), _stopped(group.rows[0]))
    facts = pass_facts(one)
    shown = [Text(f"{one.name}: {', '.join(facts)}", style="dim")] if facts else []
    return [Padding(Group(table, *shown), (0, 0, 1, 0))]


def pass_facts(one: Any) -> list[str]:
    """What a pass tells about the whole graph, bytes of weights first."""
    facts = dict(one.facts)
    before, after = facts.pop("weight_bytes_before", None), facts.pop("weight_bytes", None)
    found = []
    if before and after:
        found.append(f"weights {before / 1e6:.1f} MB -> {after / 1e6:.1f} MB ({before / after:.2f} times less)")
    for key, item in facts.items():
        name = key.replace("_", " ")
        if isinstance(item, Mapping):
            sizes = key.endswith("_bytes")
            kept = {k: v for k, v in item.items() if not sizes or v >= 5e4}
            parts = [f"{k} {v / 1e6:.1f} MB" if sizes else f"{k} {_brief(v)}" for k, v in kept.items()]
            item = ", ".join(parts[:4])
            name = name.removesuffix(" bytes")
            found += [f"{name}: {item}"] if item else []
        elif item not in (None, "", [], (), False):
            found.append(f"{name} {_brief(item)}")
    return found


def shared_details(group: SiteGroup) -> dict[str, Any]:
    """Details that all sites of the group have in common, without the empty ones."""
    rows = group.rows
    return {
        key: item
        for key, item in rows[0].details.items()
        if item not in (None, "", [], (), {}) and all(row.details.get(key) == item for row in rows)
    }


def _brief(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _stopped(row: Any) -> Text:
    return Text(f"stopped at {row.stopped_at}: {row.reason}" if row.stopped_at else row.reason)


def _where(group: SiteGroup) -> Text:
    text = Text(group.site)
    if source := short_source(getattr(group.rows[0], "source", "")):
        text.append(f"\n{source}", style="dim")
    return text


def _breaks(report: Report) -> list[RenderableType]:
    return [
        Text(f"graph break at {one.get('source') or 'unknown line'}: {one.get('reason', '')}", style="yellow")
        for one in report.capture.graph_breaks
    ]


def model_error_facts(error: Any) -> list[tuple[str, str]]:
    """(name, value) pairs of the model error that were measured, ready to print."""
    facts = [("outputs", format_error(error))]
    if error.kl is not None:
        facts.append(("KL", f"{error.kl:.3g} nats"))
    if error.top1_agreement is not None:
        facts.append(("top-1 agreement", f"{100 * error.top1_agreement:.2f} %"))
    if error.perplexity_before is not None and error.perplexity_after is not None:
        facts.append(("perplexity", f"{error.perplexity_before:.4g} -> {error.perplexity_after:.4g}"))
    if error.tokens_worse is not None:
        facts.append(("tokens made worse", f"{100 * error.tokens_worse:.1f} %"))
    return facts


def _model_error(report: Report) -> Text:
    text = Text("model error: ", style="bold")
    if report.model_error is None:
        return text.append("not measured", style="not bold")
    facts = model_error_facts(report.model_error)
    return text.append("; ".join(v if k == "outputs" else f"{k} {v}" for k, v in facts), style="not bold")


def _kernels(report: Report) -> list[RenderableType]:
    used: dict[Any, list[Any]] = {}
    fallen: dict[Any, list[Any]] = {}
    for kernel in report.kernels:
        if kernel.reason or not kernel.digest:
            fallen.setdefault(_without_op(kernel), []).append(kernel)
        else:
            used.setdefault((kernel.kind, kernel.target, kernel.digest), []).append(kernel)
    parts: list[RenderableType] = []
    if used:
        table = _table(
            ("kernel", {"no_wrap": True}), ("target", {}), ("n", {"justify": "right"}), ("sites", {"ratio": 1})
        )
        for (_, target, _), members in used.items():
            names = "; ".join(group.site for group in group_sites(members))
            table.add_row(members[0].name, target, str(len(members)), Text(names))
        parts.append(Padding(table, (1, 0, 1, 0)))
    for members in fallen.values():
        counts: dict[str, int] = {}
        for kernel in members:
            counts[kernel.op] = counts.get(kernel.op, 0) + 1
        reason = members[0].reason if len(counts) == 1 else members[0].reason.replace(members[0].op, "them")
        text = Text("reference form runs " + ", ".join(f"{count} {op}" for op, count in counts.items()))
        if reason:
            text.append(f": {reason}", style="dim")
        parts.append(text)
    return parts


def _without_op(kernel: Any) -> str:
    """The reason with the op's name taken out, so that one line tells it for all ops."""
    return same_reason(kernel.reason).replace(kernel.op, "*")


def _raising(report: Report) -> list[RenderableType]:
    raising = report.raising
    parts: list[RenderableType] = []
    if raising.sites:
        counts: dict[str, int] = {}
        for site in raising.sites:
            counts[site["op"]] = counts.get(site["op"], 0) + 1
        parts.append(Text("found: " + ", ".join(f"{n} {op}" for op, n in sorted(counts.items()))))
    for label, rows in (("not raised", raising.declined), ("almost raised", raising.near_misses)):
        for group in group_sites(rows, lambda r: same_reason(r.reason)):
            text = Text(f"{label}: {group.site} ({group.count}) ", style="magenta" if label[0] == "a" else "yellow")
            row = group.rows[0]
            text.append(str(_stopped(row)) if label[0] == "a" else row.reason, style="default")
            parts.append(text)
    return parts


def _seconds(report: Report) -> Text:
    total = sum(report.seconds.values())
    text = Text("seconds: ", style="bold")
    parts = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in report.seconds.items())
    return text.append(f"{parts} (total {total:.2f})", style="not bold")
