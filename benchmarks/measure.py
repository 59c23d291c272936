"""Interleaved timing: every round times each contender once, in an order drawn anew.

So clocks, neighbours and caches bear on all alike, and the ratio of two times of the *same* round means more than the
ratio of two medians. Times are seconds for one call. A call shorter than ``Limits.sample_seconds`` is repeated within a
sample, after one untimed call, so that what fits in a cache is in it.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

Call = Callable[[], Any]
T = TypeVar("T")
SETTLED = 0.5


@dataclass(frozen=True)
class Limits:
    """How long one row may take. seconds: timed seconds that are aimed at. A row stops at ``hard`` times that."""

    seconds: float = 4.0
    least_rounds: int = 5
    most_rounds: int = 25
    sample_seconds: float = 1e-3
    hard: float = 2.5


QUICK = Limits(seconds=1.2, least_rounds=3, most_rounds=9, sample_seconds=5e-4)


@dataclass(frozen=True)
class Quartiles:
    q1: float
    median: float
    q3: float

    @staticmethod
    def of(values: Sequence[float]) -> Quartiles:
        """Linear interpolation between values (the "inclusive" method). One value is all three."""
        if not values:
            raise ValueError("there are no quartiles of nothing")
        if len(values) == 1:
            return Quartiles(values[0], values[0], values[0])
        return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))

    def to_list(self) -> list[float]:
        return [self.q1, self.median, self.q3]


def pair_ratios(numerator: Sequence[float], denominator: Sequence[float]) -> Quartiles:
    """Quartiles of ``numerator[i] / denominator[i]``: two contenders' times of the same rounds."""
    return Quartiles.of([a / b for a, b in zip(numerator, denominator, strict=True)])


class Clock(Protocol):
    """Seconds for one call on a device, the work on the device finished."""

    def sample(self, call: Call, repeats: int) -> float: ...


def with_room(run: Callable[[], T]) -> T:
    """``run()`` with room for its Python frames, whatever the depth of the caller's stack.

    CPython keeps frames in chunks of 16 KiB. A function called where a chunk ends maps a new one, and unmaps it when it
    returns: on a virtual machine a tenth of a millisecond for every kernel that a compiled model calls from there.
    Where that is depends on who calls: under the command line's stack MiniLM took half as long again. A frame that
    claims more than a chunk gets one of twice its size, so what it calls does not come to the end of it.
    """
    return run()


with_room.__code__ = with_room.__code__.replace(co_stacksize=1 << 14)


class CpuClock:
    """Wall time of a call that returns when it is done."""

    def sample(self, call: Call, repeats: int) -> float:
        return with_room(lambda: self._sample(call, repeats))

    def _sample(self, call: Call, repeats: int) -> float:
        if repeats > 1:
            call()
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - begin) / repeats


class CudaClock:
    """CUDA (or HIP) events around one call; ``flush`` bytes are written before it, so that the L2 cache is cold."""

    def __init__(self, flush: int = 256 * 2**20) -> None:
        self._scratch = torch.empty(flush // 4, dtype=torch.int32, device="cuda") if flush else None

    def sample(self, call: Call, repeats: int) -> float:
        spent = 0.0
        for _ in range(repeats):
            if self._scratch is not None:
                self._scratch.zero_()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            end.synchronize()
            spent += begin.elapsed_time(end) * 1e-3
        return spent / repeats


def clock_for(device: str) -> Clock:
    return CudaClock() if device == "cuda" else CpuClock()


@dataclass(frozen=True)
class Race:
    """What was timed. seconds: one number a round for each contender. slow: left out, with what one call took."""

    seconds: dict[str, list[float]]
    slow: dict[str, float]


def race(calls: Mapping[str, Call], clock: Clock, limits: Limits, seed: int = 0, keep: str | None = None) -> Race:
    """Time the calls, each of which has run once before (compiled, caches filled).

    keep: the contender that is timed however slow it is. Any other whose single call takes longer than the whole row
    should is left out. At least two rounds are run, else as many as fit, between the limits' least and most.
    """
    once = {name: clock.sample(call, 1) for name, call in calls.items()}
    slow = {name: took for name, took in once.items() if took > limits.seconds and name != keep}
    left = [name for name in calls if name not in slow]
    repeats = {name: repeats_for(once[name], limits) for name in left}
    # A second, settled estimate, which is a warm-up too; calls of half a second have settled.
    once = {name: once[name] if once[name] > SETTLED else clock.sample(calls[name], repeats[name]) for name in left}
    repeats = {name: repeats_for(once[name], limits) for name in left}
    rounds = rounds_for(sum(once[name] * (repeats[name] + (repeats[name] > 1)) for name in left), limits)
    draw, order = random.Random(seed), list(left)
    seconds: dict[str, list[float]] = {name: [] for name in left}
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= 2 and time.perf_counter() - begin > limits.hard * limits.seconds:
            break
        draw.shuffle(order)
        for name in order:
            seconds[name].append(clock.sample(calls[name], repeats[name]))
    return Race(seconds, slow)


def repeats_for(seconds: float, limits: Limits) -> int:
    """Calls in one sample."""
    return max(1, min(1000, math.ceil(limits.sample_seconds / max(seconds, 1e-7))))


def rounds_for(round_seconds: float, limits: Limits) -> int:
    """As many rounds as fit into the row's time, between the least and the most."""
    fit = int(limits.seconds / max(round_seconds, 1e-9))
    return max(limits.least_rounds, min(limits.most_rounds, fit))
