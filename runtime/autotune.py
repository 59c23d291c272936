"""Bounded autotuning: time a handful of candidates on the device at hand, keep the winner.

A spec offers its candidates itself (``spec.candidates(target)``, the shipped default first). With tuning off (the
default), on no device worth timing, or when time runs out before every candidate was timed, the default is used, so
nothing ever waits for tuning that did not ask for it. Rounds are interleaved (A B C A B C ...), because clocks and
caches drift, and medians are compared, because single runs have outliers.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..codegen.spec import KernelSpec, SpecError
from . import cache, fingerprint, settings, targets
from .errors import BadArgument, BuildError, CacheError
from .load import Kernel, load

_log = logging.getLogger("tilewright.autotune")
MAX_ROUNDS = 25
# A candidate has to beat the shipped default by this factor: below it, the difference is noise.
MARGIN = 1.02


@dataclass(frozen=True)
class Tuning:
    """The outcome for one spec on one device.

    winner: the candidate to use. why: ``tuned``, ``stored``, or the reason for the default.
    medians: seconds of a launch per candidate, in the order of ``spec.candidates``; None for one that did not run.
    failures: message per candidate index that did not build or launch. rounds: interleaved rounds timed.
    """

    winner: KernelSpec
    why: str
    medians: tuple[float | None, ...] = ()
    failures: dict[int, str] = field(default_factory=dict)
    rounds: int = 0


# Keyed with the setting, so that turning tuning on is noticed.
_outcomes: dict[tuple[KernelSpec, str, bool], Tuning] = {}


def time_launch(kernel: Kernel, inputs: tuple[Any, ...]) -> float:
    """Seconds of one launch: by CUDA events where the inputs are on a GPU, else by the wall clock."""
    import torch

    device = next((x.device for x in inputs if isinstance(x, torch.Tensor)), torch.device("cpu"))
    if device.type != "cuda":
        start = time.perf_counter()
        kernel.launch(*inputs)
        return time.perf_counter() - start
    with torch.cuda.device(device):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        kernel.launch(*inputs)
        end.record()
        end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def tune(
    spec: KernelSpec,
    target: str,
    make_inputs: Callable[[], tuple[Any, ...]],
    budget_s: float | None = None,
    *,
    timer: Callable[[Kernel, tuple[Any, ...]], float] = time_launch,
    clock: Callable[[], float] = time.monotonic,
    loader: Callable[[KernelSpec, str], Kernel] = load,
) -> Tuning:
    """Time the candidates, or take the stored winner, or the default, and say which.

    make_inputs: the arguments of ``launch`` on the device, called once and only when timing really happens.
    budget_s: most seconds to spend, building included (default: the setting ``autotune_seconds``). A launch that is
        under way is not interrupted.
    timer, clock, loader: for tests.

    The outcome is kept in memory. A winner found by timing is kept in the cache too, keyed by spec, candidates,
    target, device and versions; one that is not among the candidates any more is timed again.
    Raises :class:`~.errors.BadArgument` for an empty list of candidates or a budget that is not positive. A candidate
    that fails to build or launch is left out and recorded; if none is left, the default is the outcome, and the
    launch that follows raises its error.
    """
    now = settings.get()
    key = (spec, target, now.autotune)
    if key not in _outcomes:
        budget = now.autotune_seconds if budget_s is None else budget_s
        if not budget > 0:
            raise BadArgument(f"the autotuning budget is {budget!r} s: give a positive number")
        _outcomes[key] = _decide(spec, target, make_inputs, budget, timer, clock, loader)
    return _outcomes[key]


def load_best(spec: KernelSpec, target: str, make_inputs: Callable[[], tuple[Any, ...]]) -> Kernel:
    """The winner of :func:`tune`, loaded: what an operator calls in place of ``load(spec, target)``.

    From the second call on it costs two look-ups, with tuning on or off. Raises as :func:`tune` and
    :func:`~.load.load`.
    """
    return load(tune(spec, target, make_inputs).winner, target)


def _decide(
    spec: KernelSpec,
    target: str,
    make_inputs: Callable[[], tuple[Any, ...]],
    budget: float,
    timer: Callable[[Kernel, tuple[Any, ...]], float],
    clock: Callable[[], float],
    loader: Callable[[KernelSpec, str], Kernel],
) -> Tuning:
    now = settings.get()
    candidates = spec.candidates(target)
    if not candidates:
        raise BadArgument(f"{spec.kind} offers no candidates for {target}: the shipped default has to be the first")
    if len(candidates) == 1:
        return Tuning(candidates[0], "there is one candidate")
    if not now.autotune:
        return Tuning(candidates[0], "autotuning is off (TILEWRIGHT_AUTOTUNE=1 turns it on)")
    device = targets.get(target).device()
    if device is None:
        return Tuning(candidates[0], f"no device of this machine makes timing {target} kernels meaningful")
    name = _key(spec, candidates, target, device)
    tuning = _read(now.cache_dir, name, candidates)
    if tuning is None:
        tuning = _time(candidates, target, make_inputs, budget, timer, clock, loader)
        if tuning.why == "tuned":
            _store(now.cache_dir, name, spec, target, device, tuning)
    return tuning


def forget() -> None:
    """Drop the outcomes kept in memory."""
    _outcomes.clear()


def _key(spec: KernelSpec, candidates: list[KernelSpec], target: str, device: str) -> str:
    parts = {
        "spec": spec.to_json(),
        "candidates": [candidate.to_json() for candidate in candidates],
        "device": device,
        "target": target,
        "toolchain": targets.get(target).toolchain(),
    }
    return fingerprint.digest(parts)[:32]


def _time(
    candidates: list[KernelSpec],
    target: str,
    make_inputs: Callable[[], tuple[Any, ...]],
    budget: float,
    timer: Callable[[Kernel, tuple[Any, ...]], float],
    clock: Callable[[], float],
    loader: Callable[[KernelSpec, str], Kernel],
) -> Tuning:
    deadline = clock() + budget
    inputs = make_inputs()
    ready: list[tuple[int, Kernel]] = []
    failures: dict[int, str] = {}
    for index, candidate in enumerate(candidates):
        if clock() >= deadline:
            return Tuning(candidates[0], f"{budget:g} s passed before every candidate was built", failures=failures)
        try:
            kernel = loader(candidate, target)
            kernel.launch(*inputs)  # compiles, and warms the caches
        except (BuildError, RuntimeError, ValueError) as error:
            # Too much shared memory, too many registers: Triton's errors are RuntimeErrors or ValueErrors. Such a
            # candidate is none on this device.
            failures[index] = f"{type(error).__name__}: {error}"
            continue
        except Exception as error:
            if type(error).__module__.partition(".")[0] != "triton":  # OutOfResources derives from Exception alone
                raise
            failures[index] = f"{type(error).__name__}: {error}"
            continue
        ready.append((index, kernel))
    if not ready:
        return Tuning(candidates[0], "no candidate could be launched", failures=failures)
    times: dict[int, list[float]] = {index: [] for index, _ in ready}
    rounds = 0
    while rounds < MAX_ROUNDS:
        for index, kernel in ready:
            if clock() >= deadline and rounds < 1:
                return Tuning(candidates[0], f"{budget:g} s passed before every candidate was timed", failures=failures)
            times[index].append(timer(kernel, inputs))
        rounds += 1
        if clock() >= deadline:
            break
    medians = {index: statistics.median(values) for index, values in times.items()}
    winner = min(medians, key=lambda index: (medians[index], index))
    if 0 in medians and medians[winner] * MARGIN > medians[0]:
        winner = 0
    return Tuning(candidates[winner], "tuned", tuple(medians.get(i) for i in range(len(candidates))), failures, rounds)


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def _read(root: Path, name: str, candidates: list[KernelSpec]) -> Tuning | None:
    """The stored winner, or None when there is none that can be used."""
    for store in cache.stores(root):
        path = _file(store.root / "tuning", name)
        try:
            data = json.loads(path.read_bytes())
            index = [candidate.to_dict() for candidate in candidates].index(
                KernelSpec.from_dict(data["winner"]).to_dict()
            )
            medians = tuple(None if value is None else float(value) for value in data["medians"])
            return Tuning(candidates[index], "stored", medians, rounds=int(data["rounds"]))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError, SpecError) as error:
            _log.warning("the tuning result %s cannot be used and is made again: %s", path, error)
    return None


def _store(root: Path, name: str, spec: KernelSpec, target: str, device: str, tuning: Tuning) -> None:
    data = {
        "spec": spec.to_dict(),
        "winner": tuning.winner.to_dict(),
        "medians": tuning.medians,
        "failures": {str(index): message for index, message in tuning.failures.items()},
        "rounds": tuning.rounds,
        "target": target,
        "device": device,
    }
    try:
        folder = cache.working_folder(root, "tuning")
        cache.write_atomic(_file(folder, name), (json.dumps(data, sort_keys=True, indent=2) + "\n").encode())
    except (OSError, CacheError) as error:  # the winner is in memory; only the next process has to time again
        _log.warning("the tuning result for %s could not be kept: %s", spec.kind, error)
