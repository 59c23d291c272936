"""The benchmark harness with a clock that measures nothing: what is timed, left out, and called wrong."""

from __future__ import annotations

import json
import math
import resource
import sys

import pytest
import torch
from benchmark_tools import SECONDS, FakeClock, problem, suite
from hypothesis import given
from hypothesis import strategies as st

from tilewright.benchmarks import harness, machine, measure
from tilewright.benchmarks import record as records
from tilewright.benchmarks.harness import Bound, Case, Contender, Options, Problem, Timed
from tilewright.benchmarks.measure import Limits, Quartiles, pair_ratios, race, repeats_for, rounds_for
from tilewright.benchmarks.record import Kind, Peaks, State
from tilewright.runtime.errors import BadArgument

# Statistics


def test_quartiles_interpolate() -> None:
    assert Quartiles.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Quartiles(2.0, 3.0, 4.0)
    assert Quartiles.of([1.0, 2.0]) == Quartiles(1.25, 1.5, 1.75)
    assert Quartiles.of([7.0]) == Quartiles(7.0, 7.0, 7.0)
    with pytest.raises(ValueError):
        Quartiles.of([])


def test_ratios_are_of_pairs_not_of_medians() -> None:
    """A machine that slows down by 10 in one round changes both times, and no ratio."""
    assert pair_ratios([2.0, 20.0, 2.2], [1.0, 10.0, 1.1]).median == pytest.approx(2.0)
    with pytest.raises(ValueError):
        pair_ratios([1.0], [1.0, 2.0])


@given(st.floats(1e-9, 100), st.floats(0.1, 10))
def test_repeats_and_rounds_stay_in_bounds(seconds: float, row_seconds: float) -> None:
    limits = Limits(row_seconds, 3, 20, 1e-3)
    assert 3 <= rounds_for(seconds, limits) <= 20
    assert 1 <= repeats_for(seconds, limits) <= 1000
    if repeats_for(seconds, limits) < 1000:
        assert seconds * repeats_for(seconds, limits) >= 0.999e-3


def named(*names: str):
    calls = {name: (lambda name=name: name) for name in names}
    return calls, lambda call: call()


def test_every_round_times_each_once_in_changing_order() -> None:
    calls, label = named("a", "b", "c")
    clock = FakeClock({"a": 0.01, "b": 0.02, "c": 0.03}, label)
    result = race(calls, clock, Limits(seconds=0.6, least_rounds=2, most_rounds=50))
    rounds = len(result.seconds["a"])
    assert rounds in (9, 10)  # 0.06 s a round
    timed = [name for name, _ in clock.samples][-3 * rounds :]
    orders = [tuple(timed[i : i + 3]) for i in range(0, len(timed), 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(set(orders)) > 1
    assert {len(v) for v in result.seconds.values()} == {rounds}


def test_short_calls_are_repeated_within_a_sample() -> None:
    calls, label = named("short", "long")
    clock = FakeClock({"short": 1e-5, "long": 1e-2}, label)
    race(calls, clock, Limits(sample_seconds=1e-3))
    assert dict(clock.samples) == {"short": 100, "long": 1}


def test_a_time_does_not_depend_on_the_depth_of_the_stack() -> None:
    """Called where one of CPython's chunks of frames ends, each call would map and unmap memory, a page fault each."""

    def faults(depth: int, run) -> int:
        if depth:
            return faults(depth - 1, run)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        run()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    def small(x: int) -> int:
        return x

    def calls() -> None:
        for number in range(200):
            small(number)

    def most(run) -> int:
        return max(faults(depth, run) for depth in range(300))

    if sys.implementation.name == "cpython" and sys.version_info < (3, 14):
        assert most(calls) >= 200, "this is what the clock has to avoid"
    assert most(lambda: measure.CpuClock().sample(calls, 1)) < 100


def test_a_slow_contender_is_left_out_unless_it_is_ours() -> None:
    calls, label = named("ours", "peer", "slow")
    clock = FakeClock({"ours": 5.0, "peer": 0.1, "slow": 3.0}, label)
    result = race(calls, clock, Limits(seconds=1.0, least_rounds=2, most_rounds=2), keep="ours")
    assert list(result.slow) == ["slow"] and set(result.seconds) == {"ours", "peer"}


# Checking


def test_difference() -> None:
    inf, nan = math.inf, math.nan
    e = torch.tensor([1.0, -4.0, inf, nan])
    assert harness.difference(e.clone(), e, Bound(1e-3)) == (0.0, 0.0)
    off, share = harness.difference(torch.tensor([1.1, -4.0]), e[:2], Bound(0.1, 0.1))
    assert off == pytest.approx(0.1) and share == pytest.approx(0.5)
    assert harness.difference(torch.tensor([1.4, -4.0]), e[:2], Bound(0.1, largest=True))[1] == pytest.approx(1.0)
    assert harness.difference((e[:1], e[1:2] + 1), (e[:1], e[1:2]), Bound(1.0)) == (1.0, 1.0)
    for wrong in (e[:3], torch.tensor([1.0, -4.0, nan, inf]), torch.tensor([1.0, nan, inf, nan])):
        with pytest.raises(ValueError):
            harness.difference(wrong, e, Bound(1e9))
    with pytest.raises(ValueError):
        harness.difference(e, (e, e), Bound(1.0))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every contender takes what the table says; nothing is pinned, and the machine's limits are made up."""

    def label(call) -> str:
        result = call()
        return next(
            name
            for name, factor in {"floor": None, "ours": 2.0, "other": 3.0}.items()
            if (result is None if factor is None else torch.equal(result, factor * torch.arange(4.0)))
        )

    peaks = Peaks([[1 << 10, 1e9]], [[1 << 10, 1e9]], {"float32": 1e8})
    seconds = {"floor": SECONDS["floor"], "ours": SECONDS["ours"], "other": SECONDS["other"]}
    monkeypatch.setattr(harness, "clock_for", lambda device: FakeClock(seconds, label))
    monkeypatch.setattr(machine, "pin", lambda threads: [0])
    monkeypatch.setattr(machine, "measure_peaks", lambda *_: peaks)


def run(tmp_path, one=None, **options):
    return harness.run_suite(one or suite(), Options(output=tmp_path / "out.json", threads=1, **options))


@pytest.mark.usefixtures("clock")
def test_each_contender_has_its_state_and_word(tmp_path) -> None:
    record, path = run(tmp_path, quick=True)
    (row,) = record.rows
    states = {entry.name: entry.state for entry in row.entries}
    assert states == {
        "floor": State.OK,
        "peer": State.OK,
        "slow peer": State.OK,
        "wrong peer": State.WRONG,
        "missing peer": State.SKIPPED,
        "broken peer": State.FAILED,
        "ours": State.OK,
        "unsupported": State.SKIPPED,
        "other": State.OK,
    }
    words = {entry.name: entry.word for entry in row.entries if entry.word}
    assert words["missing peer"] == "nothing is not installed: pip install nothing"
    assert words["unsupported"] == "no kernel doubles"
    assert words["broken peer"] == "RuntimeError: out of luck"
    assert "times what 1.0e-06 + 1.0e-06 relative allows" in words["wrong peer"]
    assert all(bool(entry.seconds) == (entry.state is State.OK) for entry in row.entries), "what is wrong is not timed"
    assert [entry.name for _, entry in record.bad] == ["wrong peer"]
    # 2^20 bytes at 1e9 B/s are 1 ms; 10^6 operations at 1e8 a second are 10 ms.
    assert row.floor == pytest.approx(1e-2) and row.bound == "matmul float32"
    assert records.read(path).to_json() == record.to_json()


@pytest.mark.usefixtures("clock")
def test_the_file_is_written_after_every_row_and_the_budget_is_kept(tmp_path, monkeypatch) -> None:
    seen = []

    def show(row) -> None:
        on_disk = records.read(tmp_path / "out.json")
        seen.append((len(on_disk.rows), on_disk.complete))

    record, _ = run(tmp_path, show=show)
    assert seen == [(1, False), (2, False)] and record.complete and record.is_whole
    ticks = iter(range(0, 1000, 10))
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(ticks))
    record, _ = run(tmp_path, budget=15.0)
    assert [row.name for row in record.rows] == ["double/1"] and record.options["left_out"] == ["double/2"]


@pytest.mark.usefixtures("clock")
def test_filters(tmp_path) -> None:
    assert [row.name for row in run(tmp_path, filter="le/2")[0].rows] == ["double/2"]
    assert [row.name for row in run(tmp_path, filter="*/2, *e/1")[0].rows] == ["double/1", "double/2"]
    with pytest.raises(BadArgument, match="double/1"):
        run(tmp_path, filter="triple")


@pytest.mark.usefixtures("clock")
def test_a_case_that_cannot_be_prepared_is_told(tmp_path) -> None:
    def missing() -> Problem:
        raise harness.Skip("no such model")

    def broken() -> Problem:
        raise RuntimeError("no memory")

    cases = [Case("a", {}, missing), Case("b", {}, broken)]
    record, _ = run(tmp_path, suite(cases=lambda: cases))
    assert [row.note for row in record.rows] == ["left out: no such model", "failed: no memory"]
    assert [row.name for row, _ in record.bad] == ["b"]


@pytest.mark.usefixtures("clock")
def test_contenders_that_measure_themselves(tmp_path) -> None:
    x = torch.ones(3)
    calls = {"ours": iter([0.5, 0.7, 0.6]), "peer": iter([1.0, 2.1, 1.2])}

    def timed() -> Problem:
        def call(name: str, value: torch.Tensor):
            return lambda: Timed(next(calls.get(name, iter([1.0]))), value)

        found = [Contender(name, kind, call(name, x)) for name, kind in (("ours", Kind.OURS), ("peer", Kind.PEER))]
        found.append(Contender("wrong", Kind.PEER, call("wrong", x + 1)))
        return Problem("ours", found, lambda: x, Bound(1e-6), rounds=3)

    record, _ = run(tmp_path, suite(cases=lambda: [Case("first", {}, timed)]))
    (row,) = record.rows
    assert row.entry("ours").seconds == [0.5, 0.7, 0.6] and row.entry("peer").seconds == [1.0, 2.1, 1.2]
    assert row.ratio("peer").median == pytest.approx(2.0) and row.entry("wrong").state is State.WRONG


def test_a_gpu_suite_says_what_it_needs(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadArgument, match="needs a GPU"):
        run(tmp_path, suite(device="cuda"))


# The machine


def test_bandwidth_between_measured_sizes() -> None:
    points = [[1024.0, 100.0], [4096.0, 50.0]]
    assert machine.bandwidth(points, 10) == 100 and machine.bandwidth(points, 1 << 30) == 50
    assert machine.bandwidth(points, 2048) == pytest.approx(75)
    assert machine.bandwidth([], 2048) is None


def test_place() -> None:
    levels = {"L2": 1000, "L3": 5000}
    assert [machine.place(n, 2, levels) for n in (2000, 2001, 5001)] == ["L2", "L3", "memory"]
    assert machine.place(1, 1, {}) == ""


def test_facts_are_json() -> None:
    facts = machine.describe("cpu", 2, [0, 1])
    assert json.loads(json.dumps(facts)) == facts
    assert facts["slug"] == f"{machine.slug(facts['isa'])}-2-threads"
    assert machine.describe("cpu", 1, [])["slug"].endswith("-1-thread")
    assert "torch" in machine.versions()
    state = machine.commit()
    assert state is None or len(state["id"]) == 40


def test_peaks_come_from_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that says one millisecond for everything makes rates of the sizes alone."""
    monkeypatch.setattr(machine, "SIZES", (1 << 12, 1 << 14))

    class Millisecond:
        def sample(self, call, repeats: int) -> float:
            call()
            return 1e-3

    monkeypatch.setattr(machine, "_products", lambda device, quick: [("float32", lambda: None, 10**6)])
    peaks = machine.measure_peaks("cpu", quick=True, clock=Millisecond())
    assert peaks.read == [[1 << 12, (1 << 12) * 1e3], [1 << 14, (1 << 14) * 1e3]] == peaks.copy
    assert peaks.matmul == {"float32": pytest.approx(1e9)}


def test_products_measure_what_they_say() -> None:
    for name, _, operations in machine._products("cpu", quick=True):
        assert operations == 2 * 1024**3
        assert name in ("float32", "bfloat16", "int8")
    assert isinstance(measure.clock_for("cpu"), measure.CpuClock)
    assert problem().ours == "ours"
