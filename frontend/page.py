"""The report as HTML: a fragment for notebooks, and one self-contained page with graphs and kernel sources.

Everything that comes from a model is escaped: Jinja's autoescape in the template, :func:`escape` in the pictures.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any

import jinja2
import torch.fx
from markupsafe import Markup
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import CppLexer, PythonLexer

from .condense import Box, Segment, condense_pair, merged_name
from .layout import layered
from .report import DeclinedSite, NearMissSite, Report, worst_error
from .report_print import (
    cache_line,
    format_error,
    group_sites,
    model_error_facts,
    pass_facts,
    same_reason,
    shared_details,
    short_source,
)

if TYPE_CHECKING:
    from .compiled import CompiledModule
    from .loaded import LoadedModule

MAX_GRAPHS = 6
MAX_VARIANTS = 6
_PASS_COLOURS = 5
_CHARACTER = 6.7  # width of a character of the pictures' 11 px monospace font
_LINE = 15.0


@dataclass(frozen=True)
class KernelSource:
    """A kernel to show. sites: where it runs, collapsed."""

    name: str
    target: str
    text: str
    sites: list[str]
    spec: Mapping[str, Any]


@dataclass(frozen=True)
class GraphPair:
    """Graphs before and after the passes; ``before`` is None when it was not kept."""

    title: str
    before: torch.fx.GraphModule | None
    after: torch.fx.GraphModule


@dataclass
class _Row:
    """Before and after of one segment, as SVG text."""

    name: str
    before: Markup | None
    after: Markup | None
    changed: int
    count: int = 1
    kept: bool = True

    @property
    def same(self) -> bool:
        """Whether one picture shows both."""
        return self.before is not None and self.before == self.after


def page_of(compiled: CompiledModule | LoadedModule) -> str:
    """The whole page for a compiled module."""
    pairs = [
        GraphPair(
            f"Graph {record.index}" if len(compiled.records) > 1 else "Graph",
            getattr(record, "raised", None),
            record.lowered,
        )
        for record in compiled.records
    ]
    texts: dict[str, KernelSource] = {}
    for use in compiled.kernels:
        if use.digest not in texts:
            sites = [k for k in compiled.report.kernels if k.digest == use.digest]
            names = [f"{group.count} x {group.site}" for group in group_sites(sites)]
            texts[use.digest] = KernelSource(use.name, use.target, use.text, names, use.spec.to_dict())
    return page(compiled.report, pairs, list(texts.values()))


def page(report: Report, graphs: Sequence[GraphPair] = (), kernels: Sequence[KernelSource] = ()) -> str:
    """One page that needs no network: summary, sites, graphs before and after, kernels, times."""
    import platform

    import torch

    from tilewright import __version__

    return template("report.html.jinja").render(
        report=report,
        versions=f"Tilewright {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        written=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        body=Markup(fragment(report, full=True)),
        times=Markup(_times(report)),
        style=Markup(_style()),
        graphs=[(pair.title, _graph_rows(pair, report)) for pair in graphs[:MAX_GRAPHS]],
        graphs_left_out=max(len(graphs) - MAX_GRAPHS, 0),
        legend=[(one.name, f"pass{index % _PASS_COLOURS}") for index, one in enumerate(report.passes) if one.matched],
        declined=any(one.declined or one.near_misses for one in report.passes),
        kernels=[(kernel, _highlighted(kernel)) for kernel in kernels],
    )


def fragment(report: Report, *, full: bool = False) -> str:
    """The report as a piece of HTML with its own style; ``full`` leaves the style to the page."""
    rows = []
    for index, one in enumerate(report.passes):
        found = []
        for group in group_sites(one.matched, lambda r: (r.source, r.kernel)):
            worst = format_error(worst_error(r.error for r in group.rows))
            found.append(("matched", group, worst, group.rows[0].kernel or "reference form", shared_details(group)))
        for group in group_sites(one.declined, lambda r: (r.source, same_reason(r.reason))):
            found.append(("declined", group, group.rows[0].reason, "", {}))
        for group in group_sites(one.near_misses, lambda r: (r.source, same_reason(r.reason))):
            row = group.rows[0]
            found.append(("near miss", group, row.reason, f"stopped at {row.stopped_at}" * bool(row.stopped_at), {}))
        rows.append((one, f"pass{index % _PASS_COLOURS}", found, format_error(one.worst()) if one.matched else "-"))
    kernels: dict[tuple[str, str, str], list[Any]] = {}
    for kernel in report.kernels:
        label = kernel.name or f"reference {kernel.op}"
        kernels.setdefault((label, kernel.target, same_reason(kernel.reason)), []).append(kernel)
    counts: dict[str, int] = {}
    for site in report.raising.sites:
        counts[site["op"]] = counts.get(site["op"], 0) + 1
    raising = [("not raised", g) for g in group_sites(report.raising.declined, lambda r: same_reason(r.reason))]
    raising += [("near miss", g) for g in group_sites(report.raising.near_misses, lambda r: same_reason(r.reason))]
    return template("fragment.html.jinja").render(
        report=report,
        pass_facts=pass_facts,
        passes=rows,
        facts=model_error_facts(report.model_error) if report.model_error is not None else [],
        cache=cache_line(report.cache) if report.cache else "",
        kernels=[(*key, len(ks), "; ".join(g.site for g in group_sites(ks))) for key, ks in kernels.items()],
        found=sorted(counts.items(), key=lambda item: -item[1]),
        raising=raising,
        times=Markup(_times(report)),
        short=short_source,
        style=None if full else Markup(_style()),
    )


def _times(report: Report) -> str:
    total = sum(report.seconds.values())
    seconds = [(name, value, 100 * value / (total or 1.0)) for name, value in report.seconds.items()]
    return template("times.html.jinja").render(seconds=seconds, total=total)


@functools.cache
def _environment() -> jinja2.Environment:
    root = resources.files(__package__) / "templates"
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (root / name).read_text(encoding="utf-8")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=lambda name: name is not None and ".html" in name,
        keep_trailing_newline=True,
    )


def template(name: str) -> jinja2.Template:
    """A template of this stage; HTML ones escape what they are given."""
    return _environment().get_template(name)


@functools.cache
def _style() -> str:
    css = (resources.files(__package__) / "templates" / "report.css").read_text(encoding="utf-8")
    return css + HtmlFormatter(style="friendly").get_style_defs(".tw pre.code")


def _highlighted(kernel: KernelSource) -> Markup:
    lexer = CppLexer() if kernel.target == "cpp" else PythonLexer()
    return Markup(highlight(kernel.text, lexer, HtmlFormatter(nowrap=True)))  # Pygments escapes


@dataclass
class _Marks:
    """Which pass rewrote a site, and which looked at it and left it alone with what reason."""

    passes: dict[str, tuple[int, str]] = field(default_factory=dict)
    declined: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of(report: Report) -> _Marks:
        marks = _Marks()
        for index, one in enumerate(report.passes):
            for row in one.matched:
                marks.passes[row.site] = (index % _PASS_COLOURS, f"{one.name}: {format_error(row.error)}")
            others: list[DeclinedSite | NearMissSite] = [*one.declined, *one.near_misses]
            for left in others:
                marks.declined.setdefault(left.site, f"{one.name}: {left.reason}")
        return marks

    def mark(self, site: str) -> str:
        """What must agree for two blocks to be drawn as one."""
        return f"pass {self.passes[site][0]}" if site in self.passes else "declined" if site in self.declined else ""


def _graph_rows(pair: GraphPair, report: Report) -> list[_Row]:
    marks = _Marks.of(report)
    rows = []
    for old, new in condense_pair(pair.before, pair.after, marks.mark):
        shown = new or old
        assert shown is not None
        name = merged_name(shown.members)
        if shown.count > 1:
            name += f" ({shown.count} alike)"
        changed = sum(1 for site in shown.sites if site in marks.passes)
        rows.append(_Row(name, _svg(old, marks), _svg(new, marks), changed, shown.count))
    # Of very many different blocks, those that were rewritten are shown first and the rest is folded.
    for index, row in enumerate(sorted(rows, key=lambda r: r.changed == 0)):
        row.kept = index < MAX_VARIANTS
    return rows


def _svg(segment: Segment | None, marks: _Marks) -> Markup | None:
    if segment is None or not segment.boxes:
        return None
    lines = {box.id: [text for text in (_clip(box.title), _clip(_second(box))) if text] for box in segment.boxes}
    sizes = {
        box.id: (max(map(len, lines[box.id])) * _CHARACTER + 18, len(lines[box.id]) * _LINE + 9)
        for box in segment.boxes
    }
    picture = layered(sizes, segment.edges)
    parts = []
    for (_, end), points in picture.routes.items():
        halves = [sizes[_][1] / 2, sizes[end][1] / 2]
        path = [(p.x, p.y) for p in points]
        path[0] = (path[0][0], path[0][1] + halves[0])
        path[-1] = (path[-1][0], path[-1][1] - halves[1] - 4)
        parts.append(f'<path class="edge" d="{_curve(path)}" marker-end="url(#tw-arrow)"/>')
    for box in segment.boxes:
        place, (width, height) = picture.positions[box.id], sizes[box.id]
        css, why = _look(box, marks)
        tip = "\n".join(text for text in ("; ".join(box.sites), box.detail, why) if text)
        x, y = place.x - width / 2, place.y - height / 2
        round_ = height / 2 if box.kind == "input" else 5
        parts.append(f'<g class="{css}"><title>{escape(tip)}</title>')
        parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{round_:.0f}"/>')
        for number, text in enumerate(lines[box.id]):
            baseline = y + 4.5 + _LINE * (number + 0.72)
            kind = "title" if number == 0 else "where"
            parts.append(f'<text class="{kind}" x="{place.x:.1f}" y="{baseline:.1f}">{escape(text)}</text>')
        parts.append("</g>")
    width, height = picture.width + 8, picture.height + 10
    return Markup(
        f'<svg viewBox="-4 -4 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" '
        f'xmlns="http://www.w3.org/2000/svg" role="img">{"".join(parts)}</svg>'
    )


def _second(box: Box) -> str:
    target = f" · {box.target}" if box.target and box.target != "reference" else ""
    return box.where + target


def _clip(text: str, length: int = 34) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _look(box: Box, marks: _Marks) -> tuple[str, str]:
    """CSS classes of a box and the sentence its tooltip ends with."""
    rewritten = [marks.passes[site] for site in box.sites if site in marks.passes]
    if rewritten:
        return f"box pass{rewritten[0][0]}", rewritten[0][1]
    left = [marks.declined[site] for site in box.sites if site in marks.declined]
    if left:
        return f"box {box.kind} declined", f"left alone by {left[0]}"
    return f"box {box.kind}", ""


def _curve(points: Sequence[tuple[float, float]]) -> str:
    """Vertical-ended Bezier curves through the points."""
    (x, y), *rest = points
    path = [f"M{x:.1f} {y:.1f}"]
    for nx_, ny in rest:
        middle = (y + ny) / 2
        path.append(f"C{x:.1f} {middle:.1f} {nx_:.1f} {middle:.1f} {nx_:.1f} {ny:.1f}")
        x, y = nx_, ny
    return "".join(path)
