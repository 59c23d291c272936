"""``tilewright.tune``: train the few parameters that passes declared, and nothing else."""

from __future__ import annotations

import hashlib
import inspect
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree

from ..passes.base import PARAMETER_GROUP
from ..passes.manager import run_pass
from ..runtime.errors import BadArgument, TuningError
from . import tune_checkpoint
from .capture import copy_module
from .compile import as_call
from .inputs import by_name
from .lower import lower
from .tune_checkpoint import Progress

if TYPE_CHECKING:
    from .compiled import CompiledModule
    from .exported import ExportedProgram

_log = logging.getLogger("tilewright.tune")

Loss = Callable[[Any, Mapping[str, Any]], torch.Tensor]


@dataclass(frozen=True)
class _Batch:
    """call: the keyword arguments that the captured graph takes. named: what the user gave, for the loss."""

    call: dict[str, Any]
    named: dict[str, Any]


@dataclass(frozen=True)
class TuneResult:
    """What a tuning run did.

    parameters: the group that was tuned. names: its tensors in the graphs. steps: taken so far, earlier runs of the
    same checkpoint folder included. losses: training loss of each step. checks: (step, loss) pairs that decided about
    the best parameters. best, best_step: the lowest of them. seconds: of this call; total_seconds: of all runs.
    finished: whether all steps were taken; False when ``seconds`` ran out.
    """

    parameters: str
    names: tuple[str, ...]
    steps: int
    best: float | None
    best_step: int
    seconds: float
    total_seconds: float
    finished: bool
    losses: list[float] = field(repr=False)
    checks: list[tuple[int, float]] = field(repr=False)


def tune(
    compiled: CompiledModule,
    data: Sequence[Any],
    parameters: str,
    *,
    steps: int = 100,
    lr: float = 1e-2,
    accumulate: int = 1,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    optimizer_options: Mapping[str, Any] | None = None,
    loss: Loss | None = None,
    validation: Sequence[Any] | None = None,
    check_every: int = 10,
    seconds: float | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = True,
    seed: int = 0,
    progress: bool | None = None,
) -> TuneResult:
    """Train the parameters that the passes of ``compiled`` declared under the name ``parameters``; all else is frozen.

    The model's own weights are not touched, and ``compiled`` is left with the best parameters found, whatever ends the
    run. What is trained is each pass's training form (soft gates instead of a hard choice, say); what ``compiled``
    computes afterwards is its usual form.

    data: a list (anything with a length and indices) of batches, each what the model is called with: a dict of keyword
        arguments, a tuple, or one tensor. Keyword arguments that are no tensors may be left out where the example
        inputs had them. Every epoch goes through the data in another order, drawn from ``seed``.
    parameters: the declared name, such as ``"centroids"``.
    steps, accumulate: steps of the optimizer, and batches a step (their mean loss counts).
    optimizer, lr, optimizer_options: ``optimizer(parameters, lr=lr, **optimizer_options)``; any of ``torch.optim``.
    loss: ``loss(output, batch) -> scalar`` from the model's output and the batch as keyword arguments by name. By
        default a language model's: cross-entropy of the logits with the batch's ``labels`` (-100 is ignored), or with
        its ``input_ids`` where ``attention_mask`` is not 0, shifted by one.
    validation: batches to choose the best parameters by, with the compiled module's usual form, every ``check_every``
        steps and before the first one. Without it the mean training loss since the last check decides.
    seconds: stop this call, at a step's end, after so many seconds (None: only when the steps are done).
    checkpoint: a folder for safetensors and JSON, written at every check and at the end. With ``resume`` a run goes on
        from it and gives what an uninterrupted run gives; without, it is replaced.
    progress: show a bar on stderr; by default where that is a terminal.

    Raises ``BadArgument`` (a name that no pass declared, empty data, numbers out of range), ``TuningError`` (a loss
    that is not finite, a checkpoint of another run), both with the remedy.
    """
    _check_numbers(steps=steps, accumulate=accumulate, check_every=check_every, lr=lr, seconds=seconds)
    program = _program(compiled)
    batches = _batches(program, compiled, data, "data")
    held_out = _batches(program, compiled, validation, "validation") if validation is not None else None
    _check_group(program, parameters)
    graph = _training_graph(compiled, program, parameters)
    run = _Run(compiled, program, graph, batches, held_out, loss or language_model_loss, parameters)
    kind = getattr(optimizer, "__name__", type(optimizer).__name__)
    run.settings = {
        "parameters": {name: list(t.shape) for name, t in graph.tensors.items()},
        "passes": [repr(one) for one in compiled.options.passes],
        "lr": lr,
        "accumulate": accumulate,
        "optimizer": [kind, repr(sorted((optimizer_options or {}).items()))],
        "check_every": check_every,
        "seed": seed,
        "data": _digest(batches),
        "validation": None if held_out is None else _digest(held_out),
    }
    if graph.trained:
        run.optimizer = optimizer(list(graph.trained.values()), lr=lr, **(optimizer_options or {}))
    run.folder = Path(checkpoint) if checkpoint is not None else None
    if run.folder is not None and resume:
        run.load()
    start = run.progress.step
    begin = time.perf_counter()
    earlier = run.progress.seconds
    try:
        with _bar(steps, start, parameters, progress) as show:
            if run.progress.step == 0:
                run.check(first=True)
            while run.progress.step < steps:
                run.step(accumulate, seed)
                run.progress.seconds = earlier + time.perf_counter() - begin
                if run.progress.step % check_every == 0 or run.progress.step == steps:
                    run.check()
                    run.save()
                show(run.progress)
                if seconds is not None and time.perf_counter() - begin >= seconds:
                    break
        run.save()
    finally:
        run.leave()
    done = run.progress
    return TuneResult(
        parameters,
        tuple(graph.tensors),
        done.step,
        done.best,
        done.best_step,
        time.perf_counter() - begin,
        done.seconds,
        done.step >= steps,
        list(done.losses),
        list(done.checks),
    )


# ------------------------------------------------------------------------------------------------------ the run itself


class _Run:
    """One run: the graph that is trained, the module it is for, and how far it is."""

    def __init__(
        self,
        compiled: CompiledModule,
        program: ExportedProgram,
        graph: _TrainingGraph,
        batches: list[_Batch],
        held_out: list[_Batch] | None,
        loss: Loss,
        parameters: str,
    ) -> None:
        self.compiled, self.program, self.graph = compiled, program, graph
        self.batches, self.held_out, self.loss, self.parameters = batches, held_out, loss, parameters
        self.progress = Progress()
        self.best = graph.values()
        self.optimizer: torch.optim.Optimizer | None = None
        self.folder: Path | None = None
        self.settings: dict[str, Any] = {}
        self.since = 0  # step of the last check

    def step(self, accumulate: int, seed: int) -> None:
        """One step of the optimizer. Raises ``TuningError`` when the loss is not finite."""
        number = self.progress.step
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        # Random numbers (dropout) depend on the step alone, so that a resumed run draws the same ones.
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices=devices), torch.set_grad_enabled(self.optimizer is not None):
            torch.manual_seed(seed * 1_000_003 + number)
            for position in range(number * accumulate, (number + 1) * accumulate):
                batch = self.batches[_drawn(position, len(self.batches), seed)]
                value = self._loss(self.graph.module(*self.program.flatten((), batch.call)), batch) / accumulate
                total += float(value.detach())
                if not math.isfinite(total):
                    raise TuningError(
                        f"the loss is {total} at step {number + 1} of tuning {self.parameters!r}: lower lr, or look "
                        "for infinities in the data; the compiled module keeps the best parameters so far"
                    )
                if self.optimizer is not None:
                    value.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        self.progress.step += 1
        self.progress.losses.append(total)

    def _loss(self, outputs: Any, batch: _Batch) -> torch.Tensor:
        output = pytree.tree_unflatten(list(outputs), self.program.captured.out_spec)
        value = self.loss(output, batch.named)
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            raise BadArgument(f"loss must return one number as a tensor, not {type(value).__name__}")
        return value.reshape(())

    def check(self, *, first: bool = False) -> None:
        """Keep the parameters when they are the best so far."""
        progress = self.progress
        if self.held_out is not None:
            self.compiled.set_tuned(self.graph.values())
            with torch.no_grad():
                losses = [self._loss(self.program.run(*self.program.flatten((), b.call)), b) for b in self.held_out]
            score = float(torch.stack(losses).double().mean())
        elif first:
            return
        else:
            window = progress.losses[self.since :]
            score = math.fsum(window) / len(window)
        self.since = progress.step
        progress.checks.append((progress.step, score))
        if math.isfinite(score) and (progress.best is None or score < progress.best):
            progress.best, progress.best_step = score, progress.step
            self.best = self.graph.values()
        _log.info("step %d: %s %.4f", progress.step, "training loss" if self.held_out is None else "validation", score)

    def load(self) -> None:
        assert self.folder is not None
        saved = tune_checkpoint.read(self.folder, self.settings)
        if saved is None:
            return
        self.progress, self.best = saved.progress, saved.best
        self.since = saved.progress.checks[-1][0] if saved.progress.checks else 0
        with torch.no_grad():
            for name, tensor in self.graph.tensors.items():
                tensor.copy_(saved.now[name])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(saved.optimizer)

    def save(self) -> None:
        if self.folder is not None:
            tune_checkpoint.write(
                self.folder, self.progress, self.settings, self.graph.values(), self.best, self.optimizer
            )

    def leave(self) -> None:
        """Give the compiled module the best parameters; without any check, the ones at hand."""
        self.compiled.set_tuned(self.best if self.progress.checks else self.graph.values())


def _drawn(position: int, count: int, seed: int) -> int:
    """Which batch comes at this position of the endless, seeded order."""
    epoch, place = divmod(position, count)
    generator = torch.Generator().manual_seed(seed * 7919 + epoch)
    return int(torch.randperm(count, generator=generator)[place])


@dataclass
class _TrainingGraph:
    """module: called with flat inputs. tensors: the group's, by name; trained: those that gradients move."""

    module: torch.fx.GraphModule
    tensors: dict[str, torch.Tensor]
    trained: dict[str, torch.nn.Parameter]

    def values(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.tensors.items()}


def _training_graph(compiled: CompiledModule, program: ExportedProgram, parameters: str) -> _TrainingGraph:
    """The passes' training forms in a graph of their own, on copies of the declared parameters and frozen weights."""
    record = program.record
    module = copy_module(record.raised)
    calibration = [program.flatten(*batch) for batch in compiled.example_call()[1]]
    for one in compiled.options.passes:
        run_pass(module, one, copy_module, calibration, training=True)
    groups = declared(module)
    now = dict(record.lowered.named_buffers())
    for name, tensor in _tensors(module).items():
        # Detached, so that no gradient is computed for a weight; its requires_grad, the user's, stays as it is.
        owner, last = _owner(module, name)
        value = now[name].detach().clone() if name in groups and name in now else tensor.detach()
        owner._parameters.pop(last, None)
        owner._buffers[last] = value
    tensors: dict[str, torch.Tensor] = {}
    trained: dict[str, torch.nn.Parameter] = {}
    for name, (group, by_gradient) in groups.items():
        if group != parameters:
            continue
        if by_gradient:
            start = module.get_buffer(name)
            delattr(module, name)
            trained[name] = torch.nn.Parameter(start)
            module.register_parameter(name, trained[name])
        tensors[name] = module.get_parameter(name) if by_gradient else module.get_buffer(name)
    lower(module, compiled.options.target, "eager")
    return _TrainingGraph(module, tensors, trained)


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by every name it has."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _owner(module: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    path, _, last = name.rpartition(".")
    return module.get_submodule(path), last


def declared(module: torch.fx.GraphModule) -> dict[str, tuple[str, bool]]:
    """Buffer name -> (group, trained by gradients) of everything that passes declared in a graph."""
    found = {}
    for node in module.graph.nodes:
        if node.op == "get_attr" and PARAMETER_GROUP in node.meta:
            found[str(node.target)] = node.meta[PARAMETER_GROUP]
    return found


# ------------------------------------------------------------------------------------------------------------- the loss


def language_model_loss(output: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """Mean next-token cross-entropy in nats; see :func:`tune`. Raises ``BadArgument`` for what is no language model."""
    logits = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    tokens = batch.get("input_ids")
    if not isinstance(logits, torch.Tensor) or logits.dim() != 3 or not isinstance(tokens, torch.Tensor):
        raise BadArgument(
            "the default loss needs a language model: input_ids in the batch and logits (batch, length, vocabulary) in "
            "the output; give loss=function(output, batch) for other models"
        )
    labels = batch.get("labels")
    if labels is None:
        labels = tokens
        mask = batch.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.shape == tokens.shape:
            labels = labels.masked_fill(mask == 0, -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)


# ------------------------------------------------------------------------------------------------------------ arguments


def _program(compiled: Any) -> ExportedProgram:
    from .compiled import CompiledModule

    if not isinstance(compiled, CompiledModule):
        raise BadArgument(f"tune() takes what tilewright.compile() returned, not a {type(compiled).__name__}")
    if compiled.door != "export":
        why = f" ({compiled.fallback_reason})" if compiled.fallback_reason else ""
        raise BadArgument(
            f"tune() needs the whole model in one graph, and this one is captured call by call through Dynamo{why}: "
            "compile it with example_inputs or example_kwargs"
        )
    return compiled.exported_program()


def _check_numbers(**given: Any) -> None:
    for name, got in given.items():
        whole = name in ("steps", "accumulate", "check_every")
        if name == "seconds" and got is None:
            continue
        kinds = int if whole else (int, float)
        if not isinstance(got, kinds) or isinstance(got, bool) or not 0 < got < math.inf:
            raise BadArgument(f"tune: {name} is {got!r}, but must be a positive {'whole ' if whole else ''}number")


def _check_group(program: ExportedProgram, parameters: str) -> None:
    groups = sorted({group for group, _ in declared(program.record.lowered).values()})
    if parameters in groups:
        return
    if not groups:
        raise BadArgument(
            f"no pass of this compilation declared parameters {parameters!r}, nor any others: compile with a pass that "
            "is tuned, such as FocusAttention, and look in the report for sites that it declined"
        )
    raise BadArgument(f"no pass declared parameters {parameters!r}: there are {', '.join(map(repr, groups))}")


def _batches(program: ExportedProgram, compiled: CompiledModule, data: Any, name: str) -> list[_Batch]:
    if isinstance(data, torch.Tensor | dict | str) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise BadArgument(f"tune: {name} must be a list of batches, not a {type(data).__name__}")
    if len(data) == 0:
        raise BadArgument(f"tune: {name} is empty: give at least one batch")
    example = compiled.example_call()[0]
    signature = inspect.signature(compiled.original_model.forward)
    found = []
    for index in range(len(data)):
        args, kwargs = as_call(data[index])
        # Constants such as use_cache need not be said again; labels may be there for the loss alone.
        labels = {} if "labels" in signature.parameters else {k: kwargs.pop(k) for k in ("labels",) if k in kwargs}
        try:
            named = by_name(signature.bind(*args, **kwargs))
        except TypeError as error:
            raise BadArgument(f"tune: the model does not accept batch {index} of {name}: {error}") from error
        call = {
            key: value for key, value in example.items() if key not in named and not isinstance(value, torch.Tensor)
        }
        call |= {key: value for key, value in named.items() if key != "labels" or key in example}
        batch = _Batch(call, named | labels)
        program.flatten((), call)  # says what does not fit, before anything is trained
        found.append(batch)
    return found


def _digest(batches: list[_Batch]) -> str:
    digest = hashlib.sha256()
    for leaf in pytree.tree_leaves([batch.named for batch in batches]):
        if isinstance(leaf, torch.Tensor):
            digest.update(str((leaf.dtype, tuple(leaf.shape))).encode())
            digest.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------- progress


@contextmanager
def _bar(steps: int, start: int, parameters: str, wanted: bool | None) -> Iterator[Callable[[Progress], None]]:
    """Show steps, loss and time left on stderr; nothing where nobody looks."""
    if not (sys.stderr.isatty() if wanted is None else wanted):
        yield lambda progress: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn(f"tuning {parameters}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}, best {task.fields[best]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("tune", total=steps, completed=start, loss="-", best="-")

        def show(progress: Progress) -> None:
            best = "-" if progress.best is None else f"{progress.best:.4f}"
            bar.update(task, completed=progress.step, loss=f"{progress.losses[-1]:.4f}", best=best)

        yield show
