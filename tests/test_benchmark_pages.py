"""Records read back as they were written; tables, pictures and pages come from them; README and docs are up to date."""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path

import pytest
from benchmark_tools import record, row, suite
from typer.testing import CliRunner

from tilewright.benchmarks import harness, plots, tables
from tilewright.benchmarks import record as records
from tilewright.benchmarks.measure import Quartiles
from tilewright.benchmarks.record import Entry, Kind, Record, State
from tilewright.frontend.cli import app
from tilewright.runtime.errors import BadArgument

ROOT = Path(__file__).resolve().parent.parent

# Records


def test_a_record_reads_back_as_written() -> None:
    one = record()
    assert Record.from_json(one.to_json()) == one


def edited(change) -> str:
    data = json.loads(record().to_json())
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.update(schema=0), "schema 0"),
        (lambda d: d.pop("rows"), "rows"),
        (lambda d: d.update(extra=1), "extra"),
        (lambda d: d["rows"][0]["entries"][0].update(state="fine"), "fine"),
        (lambda d: d["rows"][0]["entries"][0].update(seconds=3), "seconds must be a list"),
        (lambda d: d["rows"][0].update(entries={}), "entries must be a list"),
        (lambda d: d["rows"][0].update(floor="fast"), "floor"),
        (lambda d: d.update(rows=[3]), "must be an object"),
    ],
)
def test_what_is_no_record_is_refused(change, says: str) -> None:
    with pytest.raises(BadArgument, match=says):
        Record.from_json(edited(change), "a file")
    with pytest.raises(BadArgument, match="a file is no JSON"):
        Record.from_json("{", "a file")


def test_the_newest_whole_run_counts(tmp_path: Path) -> None:
    def put(name: str, **changes) -> None:
        records.write(record(**changes), tmp_path / name)

    put("a.json", date="2026-01-01T00:00:00Z")
    put("b.json", date="2026-02-01T00:00:00Z")
    put("c.json", date="2026-03-01T00:00:00Z", complete=False)
    put("d.json", date="2026-03-02T00:00:00Z", options={"quick": True})
    put("e.part.json", date="2026-03-03T00:00:00Z")
    put("f.json", date="2026-03-04T00:00:00Z", device="cuda")
    assert records.latest(tmp_path)["double"].date == "2026-02-01T00:00:00Z"
    assert list(records.latest(tmp_path, "cuda")) == ["double"]
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".json"], "no leftovers of atomic writes"


def test_file_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert records.file_name(record()) == "double.amx-2-threads.json"
    for options in ({"quick": True}, {"filter": "x"}):
        assert records.file_name(record(options=options)) == "double.amx-2-threads.part.json"
    assert records.results_folder() == ROOT / "benchmarks" / "results"
    monkeypatch.setenv(records.ENVIRONMENT, str(tmp_path))
    assert records.results_folder() == tmp_path


def test_ratios_of_a_row() -> None:
    one = row()
    assert one.ratio("peer") == Quartiles(1.9, 2.0, 2.1)
    assert one.ratio("ours").median == 1.0
    assert one.ratio("slow peer", "peer").median == pytest.approx(2.25)
    assert one.ratio("gone") is None and one.ratio("nobody") is None
    assert one.best().name == "peer" and one.best(without=("peer",)).name == "slow peer"
    assert one.versus_best() == ("peer", Quartiles(1.9, 2.0, 2.1))
    assert one.floor_share("ours") == pytest.approx(0.5) and one.floor_share("gone") is None
    one.entry("ours").state = State.WRONG
    assert one.own is None and one.versus_best() is None


# Tables and pictures


def test_texts() -> None:
    assert [tables.time_text(t) for t in (1.234e-6, 0.00099949, 0.0123, 0.9996, 12.3)] == [
        *("1.23 us", "999 us", "12.3 ms", "1.00 s", "12.3 s")
    ]
    assert tables.ratio_text(Quartiles(1.0, 1.234, 12.34)) == "1.23x (1.00-12.3)"
    counted = dataclasses.replace(row(), items=16, item="tokens")
    assert tables.speed_text(counted, counted.entry("ours")) == "8,000 tokens/s"


def test_summary_and_detail() -> None:
    slow = row("double/2", factor=4.0)
    alone = dataclasses.replace(row("double/3"), entries=[Entry("ours", Kind.OURS, State.SKIPPED, "no kernel")])
    one = record(rows=[row(), slow, alone])
    header, first, second, third = tables.summary(one, suite(compare=(("peer", "ours"),)))
    assert header == ["row", "working set in", "ours", "best peer", "best peer / ours", "of floor", "peer / ours"]
    assert first == ["double/1", "L2", "2.00 ms", "peer, 4.00 ms", "2.00x (1.90-2.10)", "50%", "2.00x (1.90-2.10)"]
    assert second[4].startswith("0.50x")
    assert third == ["double/3", "L2", "skipped: no kernel", "-", "-", "-", "-"]
    assert tables.detail(one)[0] == ["row", "floor", "peer", "slow peer", "gone", "4-bit", "copy", "ours"]
    assert tables.detail(one)[1] == ["double/1", "1.00 ms", "4.00 ms", "9.00 ms", "-", "1.50 ms", "1.00 ms", "2.00 ms"]
    assert tables.overview(one) == (
        "2 rows; at least as fast as the best peer on 1; best peer / ours: median 1.25x, from 0.50x to 2.00x"
    )
    page = tables.page(one, suite())
    assert "gone: gone is not installed" in page and "| double/1 |" in page and "0123456789" in page
    assert tables.markdown([["a", "b"], ["x|y", 1]]) == "| a | b |\n| --- | ---: |\n| x\\|y | 1 |"


def test_a_picture_is_drawn_from_the_record_alone(tmp_path: Path) -> None:
    one = Record.from_json(record(rows=[row(), row("double/2", 4.0)]).to_json())
    (path,) = plots.draw(one, suite(), tmp_path)
    assert path.name == "double.png" and path.read_bytes().startswith(b"\x89PNG")
    assert list(plots.groups(one, suite())) == ["dtype float32"]
    empty = record(rows=[dataclasses.replace(row(), entries=[])])
    assert plots.draw(empty, suite(), tmp_path) == []


# The command


def invoke(*arguments: str, code: int = 0):
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr, result.exception)
    return result


def test_the_command_lists_suites() -> None:
    names = {line["suite"] for line in json.loads(invoke("--json").stdout)}
    assert {"softmax", "attention", "decode", "models", "ops", "gpu-softmax", "gpu-attention"} <= names
    assert "softmax" in invoke().stdout


def test_the_command_shows_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    records.write(record(), path)
    shown = invoke("--show", str(path)).stdout
    assert "2.00x (1.90-2.10)" in shown and "A CPU" in shown
    assert Record.from_json(invoke("--show", str(path), "--json").stdout) == record()
    bad = record(rows=[row()])
    bad.rows[0].entry("ours").state, bad.rows[0].entry("ours").word = State.WRONG, "off by 7"
    records.write(bad, path)
    assert "off by 7" in invoke("--show", str(path), code=1).stderr


def test_the_command_refuses_in_a_sentence(tmp_path: Path) -> None:
    assert "did you mean 'softmax'?" in invoke("softmx", code=2).stderr
    assert "cannot read" in invoke("--show", str(tmp_path / "none.json"), code=2).stderr
    assert "no row matches" in invoke("softmax", "--filter", "nothing-like-it", code=2).stderr


# The suites and the pages


@pytest.mark.parametrize("one", harness.suites().values(), ids=lambda s: s.name)
def test_suites_are_well_formed(one: harness.Suite) -> None:
    cases = one.cases()
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    assert any(case.quick for case in cases), "a quick run has rows"
    for pattern in one.headline:
        assert any(harness.matches(name, pattern) for name in names), f"no row is called {pattern}"
    for case in cases:
        assert json.loads(json.dumps(case.params)) == case.params
    assert one.about.endswith(".")


def test_pages_are_up_to_date() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "bench_tables.py"))
    found = script["runs"]()
    for name, (page, make) in script["TABLES"].items():
        text = page.read_text(encoding="utf-8")
        fresh = script["updated"](text, name, make(found))
        assert fresh == text, f"run python scripts/bench_tables.py: {page.name} is stale"


def test_result_files_are_readable_and_whole() -> None:
    """What is committed is read by this version, and nothing of ours is wrong in it; a peer may be off."""
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        if not path.name.endswith(".part.json"):
            one = records.read(path)
            assert one.is_whole and path.name == records.file_name(one), path.name
            ours = [(r.name, e.name, e.word) for r, e in one.bad if e.kind is not Kind.PEER]
            assert not ours, ours


def test_the_page_without_results_says_how_to_get_them(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "bench_tables.py"))
    assert script["headline"](script["runs"](tmp_path)) == script["NONE"]
    records.write(record(suite="softmax"), tmp_path / "softmax.json")
    text = script["whole"](script["runs"](tmp_path))
    assert "### softmax" in text and "![softmax](benchmarks/softmax.png)" in text
