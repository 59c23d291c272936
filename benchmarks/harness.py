"""From a suite's cases to rows: make the contenders, check each against the reference, time them interleaved.

A suite is one file in suites/ with a ``SUITE``. It lists cases; a case's ``prepare`` makes the tensors and returns a
:class:`Problem`: what is to be computed, the least work it takes, the expected values, and the contenders.
"""

from __future__ import annotations

import dataclasses
import datetime
import fnmatch
import gc
import importlib
import pkgutil
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..runtime import settings
from ..runtime.errors import BadArgument, UnsupportedKernel
from . import machine
from .measure import QUICK, Call, Limits, clock_for, race
from .record import Entry, Kind, Record, Row, State, file_name, results_folder, write

# What a contender may raise when it cannot run: told in its row, not a reason to stop the others.
ERRORS = (
    *(RuntimeError, ValueError, TypeError, AssertionError, AttributeError),
    *(LookupError, ArithmeticError, OSError, ImportError, UnsupportedKernel),
)


class Skip(Exception):
    """Raised while a contender is made: it is left out, and the message says why."""


@dataclass(frozen=True)
class Bound:
    """What a difference may be: ``atol + rtol * |expected|``; largest: atol is a share of the largest |expected|."""

    atol: float
    rtol: float = 0.0
    largest: bool = False

    def __str__(self) -> str:
        parts = [f"{self.atol:.1e} of the largest value" if self.largest else f"{self.atol:.1e}"] if self.atol else []
        parts += [f"{self.rtol:.1e} relative"] if self.rtol else []
        return " + ".join(parts)


@dataclass(frozen=True)
class Timed:
    """What a contender that measures itself returns (a subprocess, say)."""

    seconds: float
    value: Any


@dataclass(frozen=True)
class Contender:
    """One way to compute the problem: ``call``, or ``make``, which returns it and may raise :class:`Skip`.

    output: "reused" when each call writes into the same tensor, "fresh" when it returns a new one.
    answer: gives what is checked, where that is not the call's own result. bytes: what its algorithm moves.
    expected, bound: its own reference and tolerance, where these are not the problem's (another function, 4-bit
    weights).
    """

    name: str
    kind: Kind
    call: Call | None = None
    make: Callable[[], Call] | None = None
    output: str = "fresh"
    answer: Call | None = None
    bytes: int | None = None
    expected: Callable[[], Any] | None = None
    bound: Bound | None = None

    def ready(self) -> Call:
        if self.call is not None:
            return self.call
        assert self.make is not None, f"{self.name} has neither call nor make"
        return self.make()


@dataclass
class Problem:
    """ours: the contender ratios are taken to. expected: called once; compared with ``sample(result)`` of each.

    bytes, flops: the least that any algorithm moves and computes; traffic: which bandwidth bounds it, "read" or "copy".
    dtype: which matrix product bounds it. working_set: bytes touched, where that is not ``bytes``.
    rounds: for contenders that return :class:`Timed`; those run just so often, with nothing before.
    """

    ours: str
    contenders: list[Contender]
    expected: Callable[[], Any]
    bound: Bound
    sample: Callable[[Any], Any] = lambda result: result
    bytes: int = 0
    flops: int = 0
    traffic: str = "copy"
    dtype: str = "float32"
    working_set: int = 0
    items: int = 0
    item: str = ""
    note: str = ""
    rounds: int = 0


@dataclass(frozen=True)
class Case:
    """name: unique in the suite, with slashes from coarse to fine. quick: part of ``--quick``, too."""

    name: str
    params: dict[str, Any]
    prepare: Callable[[], Problem]
    quick: bool = False
    limits: Limits | None = None


@dataclass(frozen=True)
class Suite:
    """about: one sentence. headline: patterns of the rows that the README shows. compare: pairs of our contenders whose
    ratio is a column (slower one first). plot_panels: the parameters whose values make a panel of the picture."""

    name: str
    about: str
    cases: Callable[[], list[Case]]
    device: str = "cpu"
    headline: tuple[str, ...] = ()
    compare: tuple[tuple[str, str], ...] = ()
    plot_panels: tuple[str, ...] = ()


@dataclass
class Options:
    """budget: seconds for the whole run; rows that would start after it are left out and named."""

    quick: bool = False
    filter: str = ""
    threads: int = 0
    budget: float = 0.0
    tune: bool = False
    output: Path | None = None
    tell: Callable[[str], None] = field(default=lambda text: None)
    show: Callable[[Row], None] = field(default=lambda row: None)


def suites() -> dict[str, Suite]:
    """Every suite by name: what the modules of suites/ call SUITE."""
    from . import suites as folder

    found = {}
    for module in pkgutil.iter_modules(folder.__path__):
        if not module.name.startswith("_"):
            suite: Suite = importlib.import_module(f"{folder.__name__}.{module.name}").SUITE
            found[suite.name] = suite
    return found


def select(cases: list[Case], options: Options) -> list[Case]:
    """The cases of a run. ``filter`` is a part of the name or a pattern with ``*``; commas separate several."""
    chosen = [case for case in cases if case.quick or not options.quick]
    if options.filter:
        wanted = [word.strip() for word in options.filter.split(",") if word.strip()]
        chosen = [case for case in chosen if any(matches(case.name, word) for word in wanted)]
    if not chosen:
        raise BadArgument(
            f"no row matches --filter {options.filter!r}: names are like {', '.join(c.name for c in cases[:3])}"
        )
    return chosen


def matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) if "*" in pattern else pattern in name


def run_suite(suite: Suite, options: Options) -> tuple[Record, Path]:
    """Run and write; returns the record and its file. Raises BadArgument when the device is not here."""
    if suite.device == "cuda" and not torch.cuda.is_available():
        raise BadArgument(f"suite {suite.name} needs a GPU, and torch.cuda.is_available() is False")
    chosen = select(suite.cases(), options)
    begin = time.perf_counter()
    threads = options.threads or torch.get_num_threads()
    affinity = machine.pin(threads)
    limits = QUICK if options.quick else Limits()
    record = Record(
        suite=suite.name,
        device=suite.device,
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        machine=machine.describe(suite.device, threads, affinity),
        versions=machine.versions(),
        commit=machine.commit(),
        options={
            "quick": options.quick,
            "filter": options.filter,
            "budget": options.budget,
            "tuned": options.tune,
            "row_seconds": limits.seconds,
            "rounds": [limits.least_rounds, limits.most_rounds],
            "left_out": [],
        },
        peaks=machine.measure_peaks(suite.device, options.quick, options.tell),
    )
    path = options.output or results_folder() / file_name(record)
    with settings.override(autotune=options.tune):
        for number, case in enumerate(chosen):
            if options.budget and time.perf_counter() - begin > options.budget:
                record.options["left_out"] = [late.name for late in chosen[number:]]
                break
            options.tell(f"{suite.name} {number + 1}/{len(chosen)}: {case.name}")
            row = run_case(case, suite.device, record, limits_of(case, options.quick))
            record.rows.append(row)
            record.seconds = time.perf_counter() - begin
            write(record, path)
            options.show(row)
    record.complete = True
    record.seconds = time.perf_counter() - begin
    write(record, path)
    return record, path


def limits_of(case: Case, quick: bool) -> Limits:
    """The case's own, else the run's; a quick run gives a case a third of the time that it asks for."""
    if case.limits is None:
        return QUICK if quick else Limits()
    own = case.limits
    return dataclasses.replace(own, seconds=own.seconds / 3, most_rounds=QUICK.most_rounds) if quick else own


def run_case(case: Case, device: str, record: Record, limits: Limits) -> Row:
    """Check and time one case. What raises is in the row, not in the air."""
    with _clean(device):
        row = Row(case.name, case.params, ours="", entries=[])
        try:
            problem = case.prepare()
            row.ours, row.note, row.tolerance = problem.ours, problem.note, str(problem.bound)
            row.items, row.item = problem.items, problem.item
            _floor(row, problem, record)
            if problem.rounds:
                _timed_entries(row, problem)
            else:
                _entries(row, problem, device, limits)
        except (Skip, *ERRORS) as error:
            row.note = f"left out: {first_line(error)}" if isinstance(error, Skip) else f"failed: {first_line(error)}"
            if not isinstance(error, Skip):
                row.entries.append(Entry("row", Kind.OURS, State.FAILED, first_line(error)))
    return row


@contextmanager
def _clean(device: str) -> Iterator[None]:
    """Rows do not feel each other: compiled code and garbage go, and none is collected while timing."""
    torch._dynamo.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    gc.disable()
    try:
        with torch.no_grad():
            yield
    finally:
        gc.enable()


def _entries(row: Row, problem: Problem, device: str, limits: Limits) -> None:
    expected = problem.expected()
    calls: dict[str, Call] = {}
    for contender in problem.contenders:
        entry = Entry(contender.name, contender.kind, State.OK, output=contender.output, bytes=contender.bytes)
        row.entries.append(entry)
        call = _checked(entry, contender, problem, expected)
        if call is not None:
            calls[contender.name] = call
    del expected
    if not calls:
        return
    gc.collect()
    result = race(calls, clock_for(device), limits, keep=problem.ours)
    for name, took in result.slow.items():
        slow = row.entry(name)
        assert slow is not None
        slow.state, slow.word = State.SKIPPED, f"one call takes {took:.1f} s, over the row's {limits.seconds:g} s"
    for name, seconds in result.seconds.items():
        timed = row.entry(name)
        assert timed is not None
        timed.seconds = seconds


def _checked(entry: Entry, contender: Contender, problem: Problem, expected: Any) -> Call | None:
    """Make the contender, run it once and compare. Returns its call when it may be timed."""
    try:
        call = contender.ready()
        result = (contender.answer or call)()
        if contender.answer is not None:
            call()  # compiled and warm, as the others
    except (Skip, UnsupportedKernel) as error:
        entry.state, entry.word = State.SKIPPED, first_line(error)
        return None
    except ERRORS as error:
        entry.state, entry.word = State.FAILED, f"{type(error).__name__}: {first_line(error)}"
        return None
    if contender.kind is Kind.FLOOR:
        return call
    if contender.expected is not None:
        expected = contender.expected()
    return call if judge(entry, problem.sample(result), expected, contender.bound or problem.bound) else None


def judge(entry: Entry, actual: Any, expected: Any, bound: Bound) -> bool:
    """Fill in the entry's errors, or say why it is wrong."""
    try:
        entry.error, entry.of_tolerance = difference(actual, expected, bound)
    except ValueError as error:
        entry.state, entry.word = State.WRONG, str(error)
        return False
    if entry.of_tolerance <= 1.0:
        return True
    entry.state = State.WRONG
    entry.word = f"off by {entry.error:.3g}, {entry.of_tolerance:.3g} times what {bound} allows"
    return False


def difference(actual: Any, expected: Any, bound: Bound) -> tuple[float, float]:
    """(largest absolute difference, largest share of the bound) of tensors, or of tuples of them.

    NaN and infinities have to be at the same places. Raises ValueError when shapes or these places differ.
    """
    if isinstance(expected, tuple | list):
        if not isinstance(actual, tuple | list) or len(actual) != len(expected):
            raise ValueError(f"gives {type(actual).__name__}, but {len(expected)} results are expected")
        pairs = [difference(a, e, bound) for a, e in zip(actual, expected, strict=True)]
        return max(p[0] for p in pairs), max(p[1] for p in pairs)
    if tuple(actual.shape) != tuple(expected.shape):
        raise ValueError(f"gives shape {tuple(actual.shape)}, but {tuple(expected.shape)} is expected")
    a, e = actual.detach().double(), expected.detach().double().to(actual.device)
    if not torch.equal(a.isnan(), e.isnan()) or not torch.equal(a.isinf(), e.isinf()):
        raise ValueError("gives NaN or infinity where the reference does not")
    finite = e.isfinite()
    if not bool(finite.any()):
        return 0.0, 0.0
    a, e = a[finite], e[finite]
    off = (a - e).abs()
    atol = bound.atol * float(e.abs().amax()) if bound.largest else bound.atol
    share = off / (atol + bound.rtol * e.abs()).clamp_min(1e-300)
    return float(off.amax()), float(share.amax())


def _timed_entries(row: Row, problem: Problem) -> None:
    """Contenders that measure themselves: interleaved too, every result checked, nothing run before."""
    expected, draw = problem.expected(), random.Random(0)
    calls: dict[str, Call] = {}
    bounds = {contender.name: contender.bound or problem.bound for contender in problem.contenders}
    for contender in problem.contenders:
        entry = Entry(contender.name, contender.kind, State.OK, output=contender.output)
        row.entries.append(entry)
        try:
            calls[contender.name] = contender.ready()
        except (Skip, *ERRORS) as error:
            skipped = isinstance(error, Skip | UnsupportedKernel)
            entry.state, entry.word = State.SKIPPED if skipped else State.FAILED, first_line(error)
    for _ in range(problem.rounds):
        order = list(calls)
        draw.shuffle(order)
        for name in order:
            timed_entry = row.entry(name)
            assert timed_entry is not None
            try:
                timed: Timed = calls[name]()
            except (Skip, *ERRORS) as error:
                skipped = isinstance(error, Skip | UnsupportedKernel)
                timed_entry.state = State.SKIPPED if skipped else State.FAILED
                timed_entry.word = first_line(error)
                del calls[name]
                continue
            if judge(timed_entry, problem.sample(timed.value), expected, bounds[name]):
                timed_entry.seconds.append(timed.seconds)
            else:
                del calls[name]


def _floor(row: Row, problem: Problem, record: Record) -> None:
    """The least time the machine needs: the larger of moving the bytes and multiplying."""
    row.bytes, row.flops = problem.bytes, problem.flops
    touched = problem.working_set or problem.bytes
    caches = record.machine.get("caches", {}) if record.device == "cpu" else {}
    row.place = machine.place(touched, record.machine["threads"], caches) if touched else ""
    times: list[tuple[float, float, str]] = []
    rate = machine.bandwidth(getattr(record.peaks, problem.traffic), touched)
    if problem.bytes and rate:
        times.append((problem.bytes / rate, rate, problem.traffic))
    peak = record.peaks.matmul.get(problem.dtype)
    if problem.flops and peak:
        times.append((problem.flops / peak, peak, f"matmul {problem.dtype}"))
    if times:
        row.floor, row.rate, row.bound = max(times)


def first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
