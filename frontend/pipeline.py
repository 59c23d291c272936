"""One captured graph through raise, rewrite, validate and lower. Both doors end here."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx

from ..passes.execute import run
from ..passes.manager import PassRun, run_pass, validate
from ..passes.metrics import combine, tensor_error
from ..passes.site import Site
from . import policy
from .capture import copy_module
from .choices import Rest
from .constants import drop_unread, weight_bytes
from .lower import KernelUse, ReferenceUse, lower, retarget
from .options import Options
from .progress import pass_progress
from .raising import RaiseResult, raise_graph


@dataclass
class GraphRecord:
    """What happened to one captured graph.

    captured, raised, rewritten, lowered: the graph after each stage; they share parameters.
    runs: one per pass, in the order they ran. example_values: flat inputs the graph was validated on, or None.
    rest: what runs a decoder's graph between its kernels.
    weights: bytes of the tensors that the captured and the lowered graph read.
    outputs_before, outputs_after: flat tensors the captured and the lowered graph give for them.
    """

    index: int
    captured: torch.fx.GraphModule
    raised: torch.fx.GraphModule
    rewritten: torch.fx.GraphModule
    lowered: torch.fx.GraphModule
    raising: RaiseResult
    runs: list[PassRun] = field(default_factory=list)
    kernels: list[KernelUse] = field(default_factory=list)
    references: list[ReferenceUse] = field(default_factory=list)
    rest: Rest = "inductor"
    example_values: list[Any] | None = None
    error: dict[str, float] | None = None
    outputs_before: Any = None
    outputs_after: Any = None
    seconds: dict[str, float] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)

    @property
    def sites(self) -> list[Site]:
        return self.raising.sites


class Stopwatch:
    """Adds up wall-clock seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def process(
    captured: torch.fx.GraphModule,
    options: Options,
    *,
    example_values: Sequence[Any] | None = None,
    calibration: Sequence[Sequence[Any]] = (),
    index: int = 0,
) -> GraphRecord:
    """Raise, rewrite, validate and lower one flat graph; ``captured`` itself is left as it is.

    example_values: real flat inputs, for validation and the whole graph's error. calibration: more of them, a
    sequence a batch, for the passes that need it.
    """
    watch = Stopwatch()
    raised = copy_module(captured)
    with watch.stage("raise"):
        raising = raise_graph(raised)
    rewritten = copy_module(raised)
    runs = []
    for one in options.passes:
        with watch.stage("rewrite"), pass_progress(one.name) as progress:
            done = run_pass(rewritten, one, copy_module, calibration, progress=progress)
        runs.append(done)
        if options.validate and example_values is not None:
            with watch.stage("validate"):
                validate(
                    done, example_values, lambda module: retarget(copy_module(module), options.target, options.rest)
                )
    with watch.stage("build"):
        lowered, rest, kernels, references = _build(rewritten, options)
    drop_unread(lowered)
    record = GraphRecord(index, captured, raised, rewritten, lowered, raising, runs, kernels, references, rest)
    record.weights = {"before": weight_bytes(captured), "after": weight_bytes(lowered)}
    if options.validate and example_values is not None:
        record.example_values = list(example_values)
        with watch.stage("validate"):
            _measure(record)
    record.seconds = watch.seconds
    return record


def _build(
    rewritten: torch.fx.GraphModule, options: Options
) -> tuple[torch.fx.GraphModule, Rest, list[KernelUse], list[ReferenceUse]]:
    """The lowered graph, what runs its rest when it decodes, and the ops' kernels and reference forms."""
    if options.rest == "auto" and options.decodes and policy.may_run_alone(rewritten, options.target):
        lowered = copy_module(rewritten)
        kernels, references = lower(lowered, options.target, "eager")
        if policy.runs_alone(lowered):
            return lowered, "eager", kernels, references
    lowered = copy_module(rewritten)
    rest: Rest = "eager" if options.rest == "eager" else "inductor"
    return lowered, rest, *lower(lowered, options.target, rest)


def _measure(record: GraphRecord) -> None:
    """The whole graph's error: what will run against what was captured."""
    assert record.example_values is not None
    before = run(record.captured, record.example_values)
    after = run(record.lowered, record.example_values)
    record.outputs_before, record.outputs_after = before, after
    record.error = output_error(after, before)


def output_error(after: Any, before: Any) -> dict[str, float]:
    """The worst error over the floating-point outputs of two runs of a graph."""
    pairs = [
        (a, b)
        for a, b in zip(torch.utils._pytree.tree_leaves(after), torch.utils._pytree.tree_leaves(before), strict=True)
        if isinstance(b, torch.Tensor) and b.dtype.is_floating_point
    ]
    return combine([tensor_error(a, b) for a, b in pairs])
