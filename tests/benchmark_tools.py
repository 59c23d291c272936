"""A clock that measures nothing, and a suite, a machine and a record made up for the tests of the benchmarks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from tilewright.benchmarks.harness import Bound, Case, Contender, Problem, Skip, Suite
from tilewright.benchmarks.record import Entry, Kind, Peaks, Record, Row, State
from tilewright.runtime.errors import UnsupportedKernel


class FakeClock:
    """Calls what it is given and answers from a table: seconds by the call's label, growing a little each time."""

    def __init__(self, seconds: dict[str, float], label: Callable[[Any], str]) -> None:
        self.seconds, self.label = seconds, label
        self.samples: list[tuple[str, int]] = []
        self._step = itertools.count()

    def sample(self, call: Callable[[], Any], repeats: int) -> float:
        call()
        name = self.label(call)
        self.samples.append((name, repeats))
        return self.seconds[name] * (1 + 1e-6 * next(self._step))


def problem() -> Problem:
    """y = 2 x, by contenders that are right, wrong, missing, unsupported, broken, and a floor that computes nothing."""
    x = torch.arange(4.0)

    def missing() -> Any:
        raise Skip("nothing is not installed: pip install nothing")

    def unsupported() -> Any:
        raise UnsupportedKernel("no kernel doubles")

    def broken() -> Any:
        raise RuntimeError("out of luck\nand a long trace")

    return Problem(
        "ours",
        [
            Contender("floor", Kind.FLOOR, lambda: None),
            Contender("peer", Kind.PEER, lambda: x + x, output="reused"),
            Contender("slow peer", Kind.PEER, lambda: x * 2),
            Contender("wrong peer", Kind.PEER, lambda: x * 2.5),
            Contender("missing peer", Kind.PEER, make=missing),
            Contender("broken peer", Kind.PEER, broken),
            Contender("ours", Kind.OURS, lambda: 2 * x),
            Contender("unsupported", Kind.OURS, make=unsupported),
            Contender("other", Kind.OURS, lambda: 3 * x, expected=lambda: 3 * x.double()),
        ],
        lambda: 2 * x.double(),
        Bound(1e-6, 1e-6),
        bytes=1 << 20,
        flops=10**6,
        note="a note",
    )


SECONDS = {"floor": 1e-3, "peer": 4e-3, "slow peer": 9e-3, "ours": 2e-3, "other": 3e-3}


def suite(**changes: Any) -> Suite:
    cases = [Case(f"double/{n}", {"n": n, "dtype": "float32"}, problem, quick=n == 1) for n in (1, 2)]
    fields: dict[str, Any] = {"name": "double", "about": "Doubling.", "cases": lambda: cases, "headline": ("double/1",)}
    return Suite(**fields | {"compare": (("other", "ours"),), "plot_panels": ("dtype",)} | changes)


def row(name: str = "double/1", factor: float = 1.0) -> Row:
    """ours 2 ms, peer 4 ms, slow peer 9 ms, three rounds; the machine's floor is 1 ms."""
    entries = [
        Entry("peer", Kind.PEER, State.OK, "", "reused", [4e-3, 4.4e-3, 3.6e-3], 1e-8, 0.1),
        Entry("slow peer", Kind.PEER, State.OK, "", "fresh", [9e-3, 9e-3, 9e-3], 1e-8, 0.1),
        Entry("gone", Kind.PEER, State.SKIPPED, "gone is not installed"),
        Entry("4-bit", Kind.CONTEXT, State.OK, "", "fresh", [1.5e-3, 1.5e-3, 1.5e-3], 1e-2, 0.9),
        Entry("copy", Kind.FLOOR, State.OK, "", "reused", [1e-3, 1e-3, 1e-3]),
        Entry("ours", Kind.OURS, State.OK, "", "fresh", [2e-3 * factor] * 3, 1e-8, 0.1, 99),
    ]
    return Row(name, {"n": 1, "dtype": "float32"}, "ours", entries, 1 << 20, 0, 1e-3, 1e9, "copy", "L2")


def record(**changes: Any) -> Record:
    machine = {"slug": "amx-2-threads", "cpu": "A CPU", "threads": 2, "isa": "amx", "caches": {"L2": 1 << 20}}
    fields: dict[str, Any] = {
        "suite": "double",
        "device": "cpu",
        "date": "2026-01-02T03:04:05Z",
        "machine": machine,
        "versions": {"torch": "9.9"},
        "commit": {"id": "0123456789abcdef", "dirty": False},
        "options": {"quick": False, "filter": "", "left_out": []},
        "peaks": Peaks([[1 << 20, 1e10], [1 << 24, 5e9]], [[1 << 20, 1e10]], {"float32": 1e12}),
        "rows": [row()],
        "complete": True,
        "seconds": 1.5,
    }
    return Record(**fields | changes)
