"""Write what the benchmarks measured into the pages, from the JSON files of benchmarks/results and from nothing else.

``python scripts/bench_tables.py`` rewrites the table in README.md, the whole tables in docs/benchmarks.md, those of
docs/block_sparse.md, docs/kv_cache.md, docs/quantized_cache.md and docs/quantize_quality.md, and the pictures in
docs/benchmarks/; ``--check`` only says whether the pages are up to date. A table stands between
``<!-- table: NAME -->`` and ``<!-- end: NAME -->``, as those of doc_tables.py do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from tilewright.benchmarks import cache_bytes, harness, kv_pages, plots, quant_pages, record, sparse_pages, tables
from tilewright.benchmarks.record import Record

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PICTURES = ROOT / "docs" / "benchmarks"
sys.path.insert(0, str(Path(__file__).resolve().parent))
from doc_tables import updated  # noqa: E402

DEVICES = ("cpu", "cuda")
STUDY = RESULTS / "quality" / "block_sparse.json"
BYTES = RESULTS / "quality" / "cache_bytes.json"
CACHES = RESULTS / "quality" / "kv_cache.json"
WEIGHTS = RESULTS / "quality" / "quantize.json"
QUALITY = PICTURES / "block_sparse_quality.png"
NONE_YET = "The study has not been run: `python -m tilewright.benchmarks.sparse_quality --work DIR --output FILE`."
NONE = "No run is on file yet: `tilewright bench SUITE` makes one."


def runs(folder: Path = RESULTS) -> list[Record]:
    """The newest whole run of each suite, CPU first."""
    return [run for device in DEVICES for _, run in sorted(record.latest(folder, device).items())]


def headline(found: list[Record]) -> str:
    """The README's table: the rows that each suite names, and what a suite's rows come to in all."""
    known = harness.suites()
    lines = [["", "ours", "best peer", "best peer / ours", "of the machine's limit"]]
    for run in found:
        suite = known.get(run.suite)
        if suite is None:
            continue
        shown = [row for row in run.rows if any(harness.matches(row.name, one) for one in suite.headline)]
        for row in shown:
            best, own, versus = row.best(), row.own, row.versus_best()
            lines.append(
                [
                    f"{run.suite} `{row.name}`",
                    tables.speed_text(row, own) if own is not None else tables.not_timed(row),
                    f"{best.name}, {tables.speed_text(row, best)}" if best is not None else tables.NOTHING,
                    tables.ratio_text(versus[1]) if versus else tables.NOTHING,
                    tables.share_text(row.floor_share(row.ours)),
                ]
            )
    if len(lines) == 1:
        return NONE
    sentences = [f"- `{run.suite}`: {tables.overview(run)}" for run in found if run.suite in known]
    machines = sorted({tables.conditions(run) for run in found})
    measured = "\n".join(f"Measured on: {machine}." for machine in machines)
    return "\n\n".join([tables.markdown(lines), "\n".join(sentences), measured])


def whole(found: list[Record]) -> str:
    """docs/benchmarks.md: every row of every suite."""
    known = harness.suites()
    parts = []
    for run in found:
        suite = known.get(run.suite)
        picture = f"![{run.suite}](benchmarks/{picture_name(run)})" if suite is not None else ""
        about = suite.about if suite is not None else ""
        parts += [f"### {run.suite}", *[text for text in (about, picture) if text], tables.page(run, suite)]
    return "\n\n".join(parts) or NONE


def picture_name(run: Record) -> str:
    return f"{run.suite}.png"


def _sparse(make: Callable[[Record], str]) -> Callable[[list[Record]], str]:
    """A table of the block_sparse suite's newest run."""

    def table(found: list[Record]) -> str:
        run = next((run for run in found if run.suite == "block_sparse"), None)
        return NONE if run is None else f"{make(run)}\n\nMeasured on: {tables.conditions(run)}."

    return table


def quality(found: list[Record]) -> str:
    """docs/block_sparse.md: what the study of quality found."""
    study = sparse_pages.read(STUDY)
    return NONE_YET if study is None else f"{sparse_pages.quality(study)}\n\n![quality](benchmarks/{QUALITY.name})"


def caches(found: list[Record]) -> str:
    """docs/quantized_cache.md: what the study of caches found."""
    study = sparse_pages.read(CACHES)
    return NONE_YET.replace("sparse_quality", "kv_quality") if study is None else kv_pages.quality(study)


def weights(found: list[Record]) -> str:
    """docs/quantize_quality.md: what the study of low-bit weights found."""
    study = sparse_pages.read(WEIGHTS)
    return NONE_YET.replace("sparse_quality", "quant_quality") if study is None else quant_pages.quality(study)


def bytes_of_cache(found: list[Record]) -> str:
    """docs/kv_cache.md: what a token takes."""
    study = sparse_pages.read(BYTES)
    return NONE_YET.replace("sparse_quality --work DIR", "cache_bytes") if study is None else cache_bytes.table(study)


SPARSE = ROOT / "docs" / "block_sparse.md"
TABLES = {
    "benchmarks": (ROOT / "README.md", headline),
    "results": (ROOT / "docs" / "benchmarks.md", whole),
    "sparse-quality": (SPARSE, quality),
    "sparse-static": (SPARSE, _sparse(sparse_pages.static_table)),
    "sparse-lists": (SPARSE, _sparse(sparse_pages.lists_table)),
    "sparse-selectors": (SPARSE, _sparse(sparse_pages.selector_table)),
    "cache-bytes": (ROOT / "docs" / "kv_cache.md", bytes_of_cache),
    "kv-quality": (ROOT / "docs" / "quantized_cache.md", caches),
    "quantize-quality": (ROOT / "docs" / "quantize_quality.md", weights),
    "sparse-long": (SPARSE, _sparse(sparse_pages.long_table)),
}


def main(arguments: list[str]) -> int:
    found, check, stale = runs(), "--check" in arguments, []
    for name, (page, make) in TABLES.items():
        text = page.read_text(encoding="utf-8")
        new = updated(text, name, make(found))
        if new != text:
            stale.append(page.name)
            if not check:
                page.write_text(new, encoding="utf-8")
    if not check:
        known = harness.suites()
        for run in found:
            if run.suite in known:
                plots.draw(run, known[run.suite], PICTURES)
        if (study := sparse_pages.read(STUDY)) is not None:
            sparse_pages.draw(study, QUALITY)
    if stale:
        print(f"{'out of date' if check else 'rewritten'}: {', '.join(stale)}")
    return 1 if stale and check else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
