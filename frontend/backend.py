"""Door two: ``torch.compile(model, backend="tilewright", options={"passes": [...]})``.

Dynamo keeps its guards, graph breaks and dynamic shapes; every graph it finds is traced to pre-dispatch ATen, goes
through the same stages as an exported model, and ends in Inductor (or stays eager). ``generate()`` of transformers
works through it, with caches that grow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.fx
from torch._subclasses.fake_tensor import FakeTensor

from ..runtime import memory
from ..runtime.errors import BadArgument, PassChangedNothing
from .capture import placeholder_values, retrace
from .options import Options
from .pipeline import GraphRecord, Stopwatch, process

_last: list[GraphRecord] = []
_OPTIONS = ("passes", "target", "rest", "strict", "validate", "memory", "on_graph")


class GraphProgram:
    """What Dynamo calls in place of one of its graphs."""

    def __init__(self, record: GraphRecord, run: Callable[..., Any]) -> None:
        self.record = record
        self.run = run
        self.listeners: list[Callable[[GraphRecord, list[Any]], None]] = []

    def __call__(self, *inputs: Any) -> Any:
        for listener in self.listeners:
            listener(self.record, list(inputs))
        return self.run(*inputs)


def compile_graph(
    module: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    *,
    index: int = 0,
    calibrate: bool = False,
) -> GraphProgram:
    """Process one Dynamo graph and make it runnable.

    calibrate: fit the passes that need calibration to this call's inputs.
    """
    watch = Stopwatch()
    with watch.stage("capture"):
        captured = retrace(module, placeholder_values(module))
    real = not any(isinstance(value, FakeTensor) for value in example_inputs)
    values = [_concrete(value) for value in example_inputs] if real else None
    record = process(
        captured,
        options,
        example_values=values,
        calibration=[values] if calibrate and values is not None else (),
        index=index,
    )
    # The compiled code gets its own inputs at every call; keeping these would keep the user's batch and cache alive.
    record.example_values = record.outputs_before = record.outputs_after = None
    with watch.stage("lower"):
        run = _rest(record.lowered, example_inputs, options)
    for name, seconds in watch.seconds.items():
        record.seconds[name] = record.seconds.get(name, 0.0) + seconds
    return GraphProgram(record, run)


def _concrete(value: Any) -> Any:
    """A symbolic size as the number it has now; specializing would recompile for every length."""
    return value.node.hint if isinstance(value, torch.SymInt) else value


def _rest(lowered: torch.fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    if options.rest == "eager":
        run: Callable[..., Any] = lowered.forward
    else:
        from torch._inductor.compile_fx import compile_fx

        run = cast(Callable[..., Any], compile_fx(lowered, list(example_inputs)))
    return memory.pooled(run) if options.memory == "pool" else run


def tilewright_backend(
    module: torch.fx.GraphModule, example_inputs: Sequence[Any], *, options: dict[str, Any] | None = None, **extra: Any
) -> GraphProgram:
    """The backend registered with ``torch.compile`` under the name ``tilewright``.

    options: ``passes`` (a list, or text as on the command line), ``target``, ``rest``, ``strict``, ``validate``,
    ``memory`` as for :func:`tilewright.compile`, and ``on_graph``, called with the :class:`GraphRecord` of every graph.
    """
    given = dict(options or {})
    unknown = sorted(set(given) - set(_OPTIONS))
    if unknown:
        raise BadArgument(f"the backend has no option {unknown[0]!r}: it has {', '.join(_OPTIONS)}")
    on_graph = given.pop("on_graph", None)
    checked = Options.make(**given)
    program = compile_graph(module, example_inputs, checked, calibrate=True)
    if checked.strict:
        require_changes(checked, [program.record])
    _last[:] = [program.record]
    if on_graph is not None:
        on_graph(program.record)
    return program


def require_changes(options: Options, records: Sequence[GraphRecord]) -> None:
    """Raise :class:`PassChangedNothing` when a pass rewrote no site of any graph, with its commonest reason."""
    for position, one in enumerate(options.passes):
        runs = [record.runs[position] for record in records]
        if one.optional or any(run.rewrites or run.edited for run in runs):
            continue
        reasons = [reason for run in runs for _, reason in run.declined]
        reasons += [reason for run in runs for _, _, reason in run.near_misses]
        for record in records:
            reasons += [reason for site, reason in record.raising.declined if site.op in one.ops]
            reasons += [reason for site, _, reason in record.raising.near_misses if site.op in one.ops]
        why = max(set(reasons), key=reasons.count) if reasons else "the model has no site it is about"
        raise PassChangedNothing(f"strict: {one.name} changed nothing: {why}")


def last_record() -> GraphRecord | None:
    """The record of the graph this process compiled last through ``torch.compile``."""
    return _last[0] if _last else None
