"""The JSON of a run. Everything that tables and plots show comes from it; nothing is typed by hand.

A file is written whole after every row, so a run that is stopped keeps what it has (``complete`` is false then).
Reading is strict: an unknown or missing field, or another schema number, is an error that names the file.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import types
import typing
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from ..runtime.errors import BadArgument
from .measure import Quartiles, pair_ratios

SCHEMA = 1
ENVIRONMENT = "TILEWRIGHT_BENCHMARK_RESULTS"


class State(StrEnum):
    """OK: timed, and right. SKIPPED: not run, the word says why. FAILED: raised. WRONG: over its tolerance."""

    OK = "ok"
    SKIPPED = "skipped"
    FAILED = "failed"
    WRONG = "wrong"


class Kind(StrEnum):
    """OURS and PEER compute the row's function. The others are shown and never count as the best peer: a FLOOR does
    less, such as a copy, and is not checked; CONTEXT does something else, such as the model with 4-bit weights."""

    OURS = "ours"
    PEER = "peer"
    FLOOR = "floor"
    CONTEXT = "context"


@dataclass
class Entry:
    """One contender in one row.

    seconds: one number a round, for one call. output: "reused" (written into the same tensor each time) or "fresh".
    error: largest absolute difference from the reference; of_tolerance: the share of what is allowed (over 1: wrong).
    bytes: what its algorithm moves, where that differs from the row's least.
    """

    name: str
    kind: Kind
    state: State
    word: str = ""
    output: str = "fresh"
    seconds: list[float] = field(default_factory=list)
    error: float | None = None
    of_tolerance: float | None = None
    bytes: int | None = None

    @property
    def quartiles(self) -> Quartiles:
        return Quartiles.of(self.seconds)

    @property
    def timed(self) -> bool:
        return self.state is State.OK and bool(self.seconds)


@dataclass
class Row:
    """One case. Its contenders were timed in the same rounds.

    params: what the case is (dtype, sizes ...). bytes, flops: the least that any algorithm moves and computes.
    rate: bytes or operations per second that the floor assumes, bound: "read", "copy" or "matmul NAME".
    floor: seconds, the larger of bytes / bandwidth and flops / matmul peak; None where it means nothing.
    items, item: how many of what one call handles, such as 16 tokens. tolerance: in words.
    ours: the contender that ratios are taken to.
    """

    name: str
    params: dict[str, Any]
    ours: str
    entries: list[Entry]
    bytes: int = 0
    flops: int = 0
    floor: float | None = None
    rate: float | None = None
    bound: str = ""
    place: str = ""
    items: int = 0
    item: str = ""
    tolerance: str = ""
    note: str = ""

    def entry(self, name: str) -> Entry | None:
        return next((entry for entry in self.entries if entry.name == name), None)

    @property
    def own(self) -> Entry | None:
        """The contender that ratios are taken to, when it was timed."""
        entry = self.entry(self.ours)
        return entry if entry is not None and entry.timed else None

    def ratio(self, name: str, to: str | None = None) -> Quartiles | None:
        """Time of contender ``name`` over the time of ``to`` (ours), round by round: above 1, ``to`` is faster."""
        above, below = self.entry(name), self.entry(to) if to else self.own
        if above is None or below is None or not (above.timed and below.timed):
            return None
        return pair_ratios(above.seconds, below.seconds)

    def best(self, kind: Kind = Kind.PEER, without: tuple[str, ...] = ()) -> Entry | None:
        """The contender of ``kind`` with the smallest median."""
        timed = [e for e in self.entries if e.kind is kind and e.timed and e.name not in without]
        return min(timed, key=lambda e: e.quartiles.median, default=None)

    def versus_best(self) -> tuple[str, Quartiles] | None:
        """(name, ratio) of the best peer to ours."""
        peer = self.best()
        ratio = self.ratio(peer.name) if peer is not None else None
        return (peer.name, ratio) if peer is not None and ratio is not None else None

    def floor_share(self, name: str) -> float | None:
        """The floor over the contender's median: 1 is as fast as the machine allows."""
        entry = self.entry(name)
        if entry is None or not entry.timed or not self.floor:
            return None
        return self.floor / entry.quartiles.median


@dataclass
class Peaks:
    """Measured limits. read, copy: [working set in bytes, bytes a second] by size; matmul: operations a second."""

    read: list[list[float]] = field(default_factory=list)
    copy: list[list[float]] = field(default_factory=list)
    matmul: dict[str, float] = field(default_factory=dict)


@dataclass
class Record:
    """One run of one suite."""

    suite: str
    device: str
    date: str
    machine: dict[str, Any]
    versions: dict[str, str]
    commit: dict[str, Any] | None
    options: dict[str, Any]
    peaks: Peaks
    rows: list[Row] = field(default_factory=list)
    complete: bool = False
    seconds: float = 0.0
    schema: int = SCHEMA

    @property
    def bad(self) -> list[tuple[Row, Entry]]:
        """What is wrong, and what failed of ours."""
        return [
            (row, entry)
            for row in self.rows
            for entry in row.entries
            if entry.state is State.WRONG or (entry.state is State.FAILED and entry.kind is Kind.OURS)
        ]

    @property
    def is_whole(self) -> bool:
        """A complete run of every row: what the README may show."""
        return self.complete and not self.options.get("quick") and not self.options.get("filter")

    def to_json(self) -> str:
        return json.dumps(_plain(self), indent=1, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str, where: str = "the record") -> Record:
        """Raises :class:`BadArgument` naming ``where`` for anything that :meth:`to_json` did not write."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise BadArgument(f"{where} is no JSON: {error}") from error
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema != SCHEMA:
            raise BadArgument(f"{where} has schema {schema!r}, but this version reads {SCHEMA}: run the suite again")
        record: Record = _typed(Record, data, where)
        return record


def write(record: Record, path: Path) -> None:
    """Atomically: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".new")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(record.to_json())
    os.chmod(name, 0o644)
    os.replace(name, path)


def read(path: Path) -> Record:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadArgument(f"cannot read {path}: {error.strerror or error}") from error
    return Record.from_json(text, str(path))


def results_folder() -> Path:
    """``$TILEWRIGHT_BENCHMARK_RESULTS``; else the checkout's benchmarks/results; else ./tilewright-bench."""
    given = os.environ.get(ENVIRONMENT)
    if given:
        return Path(given)
    here = Path(__file__).resolve().parent
    if (here.parent / "pyproject.toml").is_file():
        return here / "results"
    return Path.cwd() / "tilewright-bench"


def file_name(record: Record) -> str:
    """``softmax.amx-2-threads.json``; a quick or filtered run is ``.part.json`` and never shown in the README."""
    whole = not record.options.get("quick") and not record.options.get("filter")
    return f"{record.suite}.{record.machine['slug']}{'' if whole else '.part'}.json"


def latest(folder: Path, device: str = "cpu") -> dict[str, Record]:
    """Suite -> its newest whole run on the device."""
    found: dict[str, Record] = {}
    for path in sorted(folder.glob("*.json")):
        if path.name.endswith(".part.json"):
            continue
        record = read(path)
        if not record.is_whole or record.device != device:
            continue
        if record.suite not in found or found[record.suite].date < record.date:
            found[record.suite] = record
    return found


# dataclass <-> JSON


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, float):
        return float(f"{value:.5g}")  # five digits are beyond what any timing here means
    return value


def _typed(kind: Any, value: Any, where: str) -> Any:
    """``value`` as ``kind``: dataclasses, enumerations, lists and plain JSON."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _typed(next(a for a in arguments if a is not type(None)), value, where)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise BadArgument(f"{where} must be an object, not {type(value).__name__}")
        names = {f.name for f in dataclasses.fields(kind)}
        if names != set(value):
            odd = sorted(names ^ set(value))
            raise BadArgument(f"{where}: the fields {', '.join(odd)} are missing or unknown")
        hints = typing.get_type_hints(kind)
        return kind(**{name: _typed(hints[name], item, f"{where}: {name}") for name, item in value.items()})
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        try:
            return kind(value)
        except ValueError:
            raise BadArgument(f"{where} is {value!r}, but must be one of {', '.join(kind)}") from None
    if origin is list:
        if not isinstance(value, list):
            raise BadArgument(f"{where} must be a list, not {type(value).__name__}")
        return [_typed(arguments[0], item, where) for item in value]
    if kind in (int, float, str, bool) and not isinstance(value, (int, float) if kind is float else kind):
        raise BadArgument(f"{where} is {value!r}, but must be {kind.__name__}")
    return value
