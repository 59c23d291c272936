"""The demo's pictures and the page that shows them."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import matplotlib.figure
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from .compiled import CompiledModule
from .demo_language import LanguageStudy
from .demo_sentences import SentenceStudy

# Colours that stay apart for colour-blind readers (Okabe and Ito), one a pass, in order.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
BEFORE = "#555555"


def layer_errors(compiled: CompiledModule) -> list[float]:
    """The relative L2 errors of the rewritten sites, in graph order; sites without a measurement are left out."""
    sites = (site for one in compiled.report.passes for site in one.matched)
    return [site.error.rel_l2 for site in sites if site.error is not None and site.error.rel_l2 is not None]


def sentence_picture(study: SentenceStudy, path: Path) -> None:
    """Similarity matrices before and after each pass, and below them the change."""
    columns = len(study.results) + 1
    figure = matplotlib.figure.Figure(figsize=(3.1 * columns, 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, columns, squeeze=False)
    _matrix(axes[0][0], study.before, "before", 0.0, 1.0, "viridis")
    _legend(axes[1][0], study.sentences)
    top = max([r.max_change for r in study.results] + [1e-12])
    for axis, below, result in zip(axes[0][1:], axes[1][1:], study.results, strict=True):
        image = _matrix(axis, result.similarity, result.label, 0.0, 1.0, "viridis")
        change = result.similarity - study.before
        title = f"change, at most {result.max_change:.2g}"
        shift = _matrix(below, change, title, -top, top, "RdBu_r", number="{:+.2f}")
        if result is study.results[-1]:
            figure.colorbar(image, ax=axis, shrink=0.8, label="cosine similarity")
            figure.colorbar(shift, ax=below, shrink=0.8, label="after minus before")
    figure.suptitle(f"{study.name}: similarity of sentences before and after each pass")
    figure.savefig(path, dpi=110)


def _matrix(
    axis: Any, values: torch.Tensor, title: str, low: float, high: float, colours: str, number: str = "{:.2f}"
) -> Any:
    image = axis.imshow(values.numpy(), vmin=low, vmax=high, cmap=colours)
    axis.set_title(title, fontsize=10)
    ticks = range(len(values))
    axis.set_xticks(ticks, [str(i + 1) for i in ticks])
    axis.set_yticks(ticks, [str(i + 1) for i in ticks])
    for i in ticks:
        for j in ticks:
            red, green, blue, _ = image.cmap(image.norm(float(values[i, j])))
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            text = number.format(float(values[i, j])).replace("-0.00", "0.00").replace("+0.00", "0.00")
            axis.text(j, i, text, ha="center", va="center", fontsize=6.5, color="white" if dark else "black")
    return image


def _legend(axis: Any, sentences: tuple[str, ...]) -> None:
    axis.axis("off")
    lines = "\n\n".join(f"{i}  {_wrapped(text, 30)}" for i, text in enumerate(sentences, 1))
    axis.text(0.0, 1.0, lines, va="top", fontsize=8, transform=axis.transAxes)


def _wrapped(text: str, width: int) -> str:
    lines: list[str] = []
    for word in text.split():
        if lines and len(lines[-1]) + len(word) < width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n    ".join(lines)


def language_picture(study: LanguageStudy, path: Path) -> None:
    """Perplexity before and after each pass, and each attention's error by layer."""
    figure = matplotlib.figure.Figure(figsize=(11.5, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    labels = ["before", *(r.label for r in study.results)]
    values = [study.perplexity, *(r.perplexity for r in study.results)]
    colours = [BEFORE, *COLOURS[: len(study.results)]]
    bars = left.bar(range(len(values)), values, color=colours)
    left.bar_label(bars, [readable(v) for v in values], padding=2)
    left.set_yscale("log")
    left.set_ylim(1, max(values) * 6)
    left.set_xticks(range(len(values)), [_wrapped(label, 14).replace("\n    ", "\n") for label in labels])
    left.set_ylabel("perplexity (log scale)")
    left.set_title(f"{study.losses.numel():,} tokens of the evaluation text; lower is better", fontsize=10)
    for result, colour in zip(study.results, COLOURS, strict=False):
        errors = layer_errors(result.compiled)
        if errors:
            # A site without any error has no place on a log scale.
            shown = [max(e, 1e-9) for e in errors]
            right.plot(range(1, len(shown) + 1), shown, marker="o", ms=3, color=colour, label=result.label)
    right.set_yscale("log")
    right.set_xlabel("rewritten site, in the order of the layers")
    right.set_ylabel("relative L2 error of its output")
    right.set_title("error each site introduces by itself", fontsize=10)
    right.axhline(1.0, color="#999999", lw=0.8, ls=":")
    right.grid(True, axis="y", alpha=0.3)
    right.legend(fontsize=8)
    figure.suptitle(f"{study.name}: before and after each pass")
    figure.savefig(path, dpi=110)


def readable(value: float) -> str:
    """A perplexity in the digits that matter."""
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.2g}"


def slug(label: str) -> str:
    """A folder name for a label: lower case, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")


def write_page(path: Path, **facts: Any) -> None:
    """Render ``demo.html.jinja`` with ``facts``. Everything that is filled in is escaped."""
    source = resources.files(__package__).joinpath("templates", "demo.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["readable"] = readable
    path.write_text(environment.from_string(source).render(**facts), encoding="utf-8")
