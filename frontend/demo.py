"""``make demo``, ``tilewright demo``: two pretrained models, every pass, before and after.

On a machine with no GPU. A sentence encoder's similarities and a language model's perplexity and continuation are
measured before and after each pass; both doors decode token for token. Written to the output folder: ``index.html``
to open, the pictures, ``results.json``, and a dump of every compiled model (graphs, kernels, report).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..passes import Pass, SigmoidAttention, TwoPassSoftmax
from ..runtime import settings
from ..runtime.errors import BadArgument, TilewrightError
from . import demo_language as language
from . import demo_sentences as sentences
from .choices import Target
from .compiled import CompiledModule
from .demo_pages import language_picture, readable, sentence_picture, slug, write_page
from .models import LoadedModel, load_model
from .report import json_safe

VARIANTS: tuple[tuple[str, Pass], ...] = (
    # force: the profitability guard is right to decline rows this short; the demo wants to show the rewrite.
    ("two-pass softmax", TwoPassSoftmax(force=True)),
    ("sigmoid attention, bias -log n", SigmoidAttention(bias="-log_n")),
    ("sigmoid attention, calibrated", SigmoidAttention(bias="calibrated")),
)
EXACT = 0
"""The variant whose tokens must not change: it goes through both doors."""


class Stages:
    """Progress bars, one a stage; they go to standard error, so that ``--json`` stays clean."""

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )

    @contextmanager
    def stage(self, text: str, steps: int = 1) -> Iterator[Any]:
        """A bar of ``steps`` steps; yields the function that advances it by one."""
        task = self.progress.add_task(text, total=steps)
        yield lambda: self.progress.advance(task)
        self.progress.update(task, completed=steps)


def run_demo(
    output: str | Path = "demo-output",
    *,
    quick: bool = False,
    encoder: str = "minilm",
    language_model: str = "smollm2",
    target: Target | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run the demo and return what it measured, JSON-able (also written to ``output/results.json``).

    quick: one block of 1024 tokens and a short continuation in the place of eight blocks.
    encoder, language_model: any MODEL of the command line that is an encoder or a causal language model.
    target: what runs the rewritten sites. None: for the encoder the Triton kernels under Triton's interpreter, which
        is quick enough for short sentences; for the language model the reference forms.
    console: where progress and tables go; standard error when None.
    Raises :class:`~tilewright.runtime.errors.UnknownModel` with what to install when a model is missing, and
    :class:`~tilewright.runtime.errors.BadArgument` when ``output`` is no folder or a model is of another kind.
    """
    console = console or Console(stderr=True)
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise BadArgument(f"{folder} is a file: name a folder for the demo's output")
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    stages = Stages(console)
    # Which sites run their reference form, and why, stands in the reports that are printed and dumped below.
    with settings.override(announce=False), warnings.catch_warnings(), stages.progress:
        # numpy, which interprets the kernels, warns of -inf minus -inf in masked places; kernels discard those.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")
        study = _sentence_study(stages, encoder, target or "triton-interpret")
        spoken = _language_study(stages, language_model, target or "auto", quick)
        with stages.stage("pictures, page and dumps", 2 * len(VARIANTS) + 3) as advance:
            dumps = _dump_all(folder, study, spoken, advance)
            sentence_picture(study, folder / "sentences.png")
            advance()
            language_picture(spoken, folder / "language.png")
            advance()
            seconds = time.perf_counter() - start
            results = {
                "sentences": study.to_dict(),
                "language": spoken.to_dict(),
                "verdict": verdict(spoken),
                "dumps": {label: str(path.relative_to(folder)) for label, path in dumps.items()},
                "quick": quick,
                "seconds": round(seconds, 1),
            }
            (folder / "results.json").write_text(json.dumps(json_safe(results), indent=1) + "\n", encoding="utf-8")
            write_page(
                folder / "index.html",
                sentences=study,
                language=spoken,
                sentence_rows=[_sentence_row(r, study, dumps, folder) for r in study.results],
                language_rows=[_language_row(r, spoken, dumps, folder) for r in spoken.results],
                verdict=results["verdict"],
                quick=quick,
                interpreted=target in (None, "triton-interpret"),
                seconds=round(seconds),
                torch_version=torch.__version__,
                python_version=platform.python_version(),
            )
    show(console, study, spoken)
    console.print(f"\nOpen {folder / 'index.html'} in a browser ({seconds:.0f} s).", highlight=False)
    return json_safe(results)


def _sentence_study(stages: Stages, name: str, target: Target) -> sentences.SentenceStudy:
    with stages.stage(f"load {name}"):
        loaded = _load(name, "encoder")
    inputs = dict(loaded.tokenizer(list(sentences.SENTENCES), return_tensors="pt", padding=True))
    before = sentences.similarities(loaded.model, inputs)
    study = sentences.SentenceStudy(name, sentences.SENTENCES, before)
    batches = sentences.calibration_batches(loaded.tokenizer, count=4)
    with stages.stage(f"{name}: each pass", len(VARIANTS)) as advance:
        for label, one in VARIANTS:
            clock = time.perf_counter()
            result = sentences.compare(loaded, label, [one], before, target, batches if _calibrated(one) else [])
            result.seconds = time.perf_counter() - clock
            study.results.append(result)
            advance()
    return study


def _language_study(stages: Stages, name: str, target: Target, quick: bool) -> language.LanguageStudy:
    count, steps = (1, 12) if quick else (language.EVALUATED_BLOCKS, 24)
    with stages.stage(f"load {name}"):
        loaded = _load(name, "causal-lm")
    blocks = language.evaluation_blocks(loaded, count)
    prompt = loaded.tokenizer(language.PROMPT, return_tensors="pt")["input_ids"]

    def said(model: Any) -> str:
        return loaded.tokenizer.decode(language.greedy(model, prompt, steps), skip_special_tokens=True)

    with stages.stage(f"{name}: before", count + 1) as advance:
        losses = language.losses_with_progress(loaded.model, blocks, advance)
        study = language.LanguageStudy(name, language.PROMPT, losses, said(loaded.model))
    for label, one in VARIANTS:
        with stages.stage(f"{name}: {label}", count + 2) as advance:
            clock = time.perf_counter()
            batches = language.calibration_blocks(loaded, 1 if quick else 2) if _calibrated(one) else []
            compiled = language.compile_for(loaded, [one], target, batches)
            advance()
            after = language.losses_with_progress(compiled, blocks, advance)
            worse = float((after > losses + language.ROUNDING).float().mean())
            result = language.LanguageResult(label, after, worse, said(compiled), compiled)
            result.seconds = time.perf_counter() - clock
            study.results.append(result)
    with stages.stage(f"{name}: both doors, token for token", 2) as advance:
        clock = time.perf_counter()
        for door in language.check_doors(loaded, study.results[EXACT].compiled, [VARIANTS[EXACT][1]], target, steps):
            door.seconds, clock = time.perf_counter() - clock, time.perf_counter()
            study.doors.append(door)
            advance()
    return study


def _load(name: str, kind: str) -> LoadedModel:
    loaded = load_model(name)
    if loaded.kind != kind:
        raise BadArgument(f"the demo needs a model of kind {kind} here, but {name} is of kind {loaded.kind}")
    return loaded


def _calibrated(one: Pass) -> bool:
    return one.current_needs().value == "calibration"


def _dump_all(
    folder: Path, study: sentences.SentenceStudy, spoken: language.LanguageStudy, advance: Any
) -> dict[str, Path]:
    """A dump of every compiled model, by ``model: label``."""
    dumps: dict[str, Path] = {}
    results: Sequence[tuple[str, str, CompiledModule]] = [
        *((study.name, r.label, r.compiled) for r in study.results),
        *((spoken.name, r.label, r.compiled) for r in spoken.results),
    ]
    for name, label, compiled in results:
        dumps[f"{name}: {label}"] = compiled.dump(folder / slug(name) / slug(label), overwrite=True)
        advance()
    return dumps


def verdict(study: language.LanguageStudy) -> str:
    """What the numbers say, in words."""
    exact, others = study.results[EXACT], [r for i, r in enumerate(study.results) if i != EXACT]
    drift = abs(exact.perplexity - study.perplexity) / study.perplexity
    text = (
        f"Two-pass softmax computes the same function: perplexity {readable(study.perplexity)} becomes "
        f"{readable(exact.perplexity)}, a relative change of {drift:.1e}."
    )
    if others:
        figures = " and ".join(f"{readable(r.perplexity)} ({r.label})" for r in others)
        ruined = min(r.perplexity for r in others) > 1.5 * study.perplexity
        text += f" Sigmoid attention is another function: perplexity becomes {figures}."
        if ruined:
            text += (
                " These weights were trained with softmax, and without fine-tuning the rewrite destroys the model's"
                " quality. It is meant for models that are trained with sigmoid attention from the start."
            )
    kernels = {site.kernel for r in study.results for one in r.compiled.report.passes for site in one.matched}
    if kernels == {None}:
        text += (
            " All sites of this model ran their reference form in PyTorch here, for want of native CPU kernels: its"
            " figures show what the rewrites do to the function, not the rounding of the Triton kernels."
        )
    return text


def _row(label: str, compiled: CompiledModule, name: str, dumps: dict[str, Path], folder: Path) -> dict[str, Any]:
    report = compiled.report.passes[0]
    worst = report.worst()
    dump = dumps.get(f"{name}: {label}")
    return {
        "label": label,
        "exactness": report.exactness,
        "matched": len(report.matched),
        "declined": len(report.declined) + len(report.near_misses),
        "worst": "not measured" if worst is None else f"{worst.rel_l2:.1e}",
        "dump": None if dump is None else dump.relative_to(folder).as_posix(),
    }


def _sentence_row(
    result: sentences.SentenceResult, study: sentences.SentenceStudy, dumps: dict[str, Path], folder: Path
) -> dict[str, Any]:
    row = _row(result.label, result.compiled, study.name, dumps, folder)
    return row | {"change": f"{result.max_change:.1e}", "same": result.same_nearest}


def _language_row(
    result: language.LanguageResult, study: language.LanguageStudy, dumps: dict[str, Path], folder: Path
) -> dict[str, Any]:
    return _row(result.label, result.compiled, study.name, dumps, folder) | {
        "perplexity": result.perplexity,
        "worse": result.perplexity > 1.5 * study.perplexity,
        "tokens_worse": f"{100 * result.tokens_worse:.0f} %",
        "continuation": result.continuation,
    }


def show(console: Console, study: sentences.SentenceStudy, spoken: language.LanguageStudy) -> None:
    """The results as tables, and the last report of each model in full."""
    table = Table(title=f"{study.name}: similarities of {len(study.sentences)} sentences", title_justify="left")
    for heading in ("pass", "sites", "worst site error", "largest change", "same nearest"):
        table.add_column(heading, justify="left" if heading == "pass" else "right")
    for one in study.results:
        row = _row(one.label, one.compiled, study.name, {}, Path())
        same = f"{one.same_nearest} of {len(study.sentences)}"
        table.add_row(one.label, str(row["matched"]), row["worst"], f"{one.max_change:.1e}", same)
    console.print(table)
    title = f"{spoken.name}: perplexity of {spoken.losses.numel():,} tokens, and what follows {spoken.prompt[-24:]!r}"
    table = Table(title=title, title_justify="left", show_lines=True)
    for heading in ("pass", "sites", "worst site error", "perplexity", "continuation"):
        table.add_column(heading, justify="left" if heading in ("pass", "continuation") else "right")
    table.add_row("before", "", "", readable(spoken.perplexity), one_line(spoken.continuation))
    for result in spoken.results:
        row = _row(result.label, result.compiled, spoken.name, {}, Path())
        table.add_row(
            result.label, str(row["matched"]), row["worst"], readable(result.perplexity), one_line(result.continuation)
        )
    console.print(table)
    for door in spoken.doors:
        console.print(f"{door.door}, {door.how}: {door.equal} of {door.steps} tokens equal the eager model's.")
    console.print()
    console.print(spoken.results[-1].compiled.report)
    console.print(verdict(spoken), highlight=False)


def one_line(text: str) -> str:
    """Text that a model made, for a table's cell: white space collapsed."""
    return " ".join(text.split())


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of ``python -m tilewright.frontend.demo``."""
    parser = argparse.ArgumentParser(prog="tilewright demo", description="Two pretrained models, every pass.")
    parser.add_argument("-o", "--output", default="demo-output", help="folder to write to (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="1,024 tokens instead of 8,192")
    parser.add_argument("--encoder", default="minilm", help="a sentence encoder (default: %(default)s)")
    parser.add_argument("--language-model", default="smollm2", help="a causal language model (default: %(default)s)")
    parser.add_argument("--target", help="what runs the rewritten sites of both models")
    parser.add_argument("--json", action="store_true", help="print what was measured as JSON")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("transformers") is None:
        print("The demo needs transformers: pip install 'tilewright[hf]'", file=sys.stderr)
        return 1
    try:
        results = run_demo(
            options.output,
            quick=options.quick,
            encoder=options.encoder,
            language_model=options.language_model,
            target=options.target,
        )
    except TilewrightError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
