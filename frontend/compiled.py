"""The compiled module: called like the model it was made from."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.fx
import torch.utils._pytree as pytree

from ..runtime.errors import BadArgument
from . import assemble
from .backend import GraphProgram, compile_graph, require_changes
from .bisect import Contribution, measure
from .capture import Captured, GraphBreaks, export_model
from .lower import KernelUse
from .options import Options
from .pipeline import GraphRecord, Stopwatch, process
from .report import CaptureReport, ModelError, Report


class CompiledModule(torch.nn.Module):
    """What :func:`tilewright.compile` returns: an ``nn.Module`` with the model's signature and output type.

    Weights are the model's own tensors, so training one trains the other; everything else of the model is reached
    through this object too (``compiled.config``, ``compiled.generate``). The model itself is not modified.

    Attributes:
        report: what was done, site by site. kernels: the kernels in use. records: the graphs at every stage.
        door: ``"export"`` (one whole graph) or ``"dynamo"`` (captured at the first call of each kind).
        options: the checked arguments of ``compile``. model: the user's module.
    """

    def __init__(self, model: torch.nn.Module, options: Options) -> None:
        super().__init__()
        self._orig_mod = model
        self.training = model.training
        self.options = options
        self.door = "dynamo"
        self.fallback_reason = ""
        self._breaks = GraphBreaks()
        self._programs: list[GraphProgram] = []
        self._exported: dict[bool, ExportedProgram] = {}
        self._example: tuple[tuple[Any, ...], dict[str, Any], Any] | None = None
        self._calibration: Sequence[tuple[tuple[Any, ...], dict[str, Any]]] = ()
        self._listeners: list[Any] = []
        self._dynamo_forward: Any = None
        self.forward = _same_signature(self._call, model)
        if callable(getattr(type(model), "generate", None)):
            # The model's own generate, run on this object, so that its steps go through the compiled forward.
            self.generate = types.MethodType(type(model).generate, self)

    @property
    def model(self) -> torch.nn.Module:
        return self._orig_mod

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_orig_mod":
                raise
            return getattr(super().__getattr__("_orig_mod"), name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's state dict, with the model's own keys."""
        return self._orig_mod.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load into the model's own weights, which are this module's too."""
        return self._orig_mod.load_state_dict(*args, **kwargs)

    # Door one.

    def capture_export(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        dynamic_shapes: Any,
        calibration: Sequence[tuple[tuple[Any, ...], dict[str, Any]]] = (),
    ) -> None:
        """Capture through ``torch.export`` now; raises :class:`~tilewright.runtime.errors.CaptureError`."""
        self._example = (args, kwargs, dynamic_shapes)
        self._calibration = calibration
        self._exported[self.training] = self._export()
        self.door = "export"

    def _export(self) -> ExportedProgram:
        assert self._example is not None
        args, kwargs, shapes = self._example
        return ExportedProgram.make(self._orig_mod, args, kwargs, shapes, self.options, self._calibration)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if self.door == "export":
            if self.training not in self._exported:  # train() and eval() are different graphs: dropout, batch norm
                self._exported[self.training] = self._export()
            return self._exported[self.training](*args, **kwargs)
        return self._call_dynamo(*args, **kwargs)

    # Door two.

    def calibrate_from(self, batches: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
        """Fit calibrated passes to the inputs of the calls that compile (Dynamo's graphs cannot be run alone)."""
        self._calibration = batches

    def _call_dynamo(self, *args: Any, **kwargs: Any) -> Any:
        if self._dynamo_forward is None:
            self._dynamo_forward = torch.compile(self._orig_mod, backend=self._backend)
        known = len(self._programs)
        with self._breaks.listening():
            result = self._dynamo_forward(*args, **kwargs)
        if len(self._programs) > known and self.options.strict:
            require_changes(self.options, self.records)
        return result

    def _backend(self, module: torch.fx.GraphModule, example_inputs: Sequence[Any], **extra: Any) -> GraphProgram:
        program = compile_graph(
            module, example_inputs, self.options, index=len(self._programs), calibrate=bool(self._calibration)
        )
        program.listeners = self._listeners
        self._programs.append(program)
        return program

    # What was done.

    @property
    def records(self) -> list[GraphRecord]:
        """One per captured graph, in the order they were captured."""
        if self.door == "export":
            return [program.record for program in self._exported.values()]
        return [program.record for program in self._programs]

    @property
    def kernels(self) -> list[KernelUse]:
        """The kernels in use: spec, source text, site, target."""
        return [use for record in self.records for use in record.kernels]

    @property
    def report(self) -> Report:
        """What was done so far. Through Dynamo, a graph is added when a call needs one."""
        capture = CaptureReport(
            door=self.door, graph_breaks=list(self._breaks.found), fallback_reason=self.fallback_reason
        )
        error: ModelError | None = None
        seconds: dict[str, float] = {}
        if self.door == "export":
            first = next(iter(self._exported.values()))
            error, seconds = first.model_error, first.seconds
        elif len(self.records) == 1 and self.records[0].error is not None:
            error = ModelError(**self.records[0].error)
        return assemble.assemble(
            type(self._orig_mod).__name__, self.options, self.records, capture, error, seconds=seconds
        )

    def dump(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write graphs, kernels, report and standalone checks to ``folder``; see :mod:`tilewright.frontend.dump`."""
        from .dump import dump

        return dump(self, folder, overwrite=overwrite)

    def bisect(self, *args: Any, **kwargs: Any) -> list[Contribution]:
        """Which pass and site add the most error on these inputs: one entry a rewritten site, the worst first.

        Each site is rewritten alone and the model's outputs compared with the original ones, so the figures show
        what a site does by itself; they need not add up to the error of all together.
        """
        found: list[Contribution] = []
        for record, inputs in self._graph_inputs(args, kwargs):
            found += measure(record, inputs)
        return sorted(found, key=lambda c: c.error["rel_l2"], reverse=True)

    def _graph_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[GraphRecord, list[Any]]]:
        if self.door == "export":
            self._call(*args, **kwargs)  # captures this mode if need be, and checks the inputs
            program = self._exported[self.training]
            return [(program.record, program.flatten(args, kwargs))]
        seen: list[tuple[GraphRecord, list[Any]]] = []
        with self._listening(lambda record, inputs: seen.append((record, [_detached(i) for i in inputs]))):
            self._call(*args, **kwargs)
        return seen

    @contextlib.contextmanager
    def _listening(self, listener: Any) -> Iterator[None]:
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


def _same_signature(call: Any, model: torch.nn.Module) -> Any:
    @functools.wraps(model.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    return forward


class ExportedProgram:
    """One exported graph made callable with the model's signature."""

    def __init__(
        self, record: GraphRecord, captured: Captured, names: Sequence[str], defaults: dict[str, Any], rest: str
    ) -> None:
        self.record = record
        self.captured = captured
        self.names = list(names)
        self.defaults = defaults
        self.seconds: dict[str, float] = {}
        self.model_error: ModelError | None = None
        self.placeholders = [node.meta.get("val") for node in record.lowered.graph.nodes if node.op == "placeholder"]
        self.paths = [pytree.keystr(path) for path, _ in _key_paths(captured.in_spec)]
        if rest == "inductor":
            # Compiled at the first call. Dynamo guards the sizes that Inductor specializes on.
            self.run = torch.compile(record.lowered, dynamic=True if captured.dynamic else None, fullgraph=True)
        else:
            self.run = record.lowered

    @staticmethod
    def make(
        model: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        dynamic_shapes: Any,
        options: Options,
        calibration: Sequence[tuple[tuple[Any, ...], dict[str, Any]]],
    ) -> ExportedProgram:
        signature = Signature(model)
        named = signature.bind(args, kwargs)
        watch = Stopwatch()
        with watch.stage("capture"), _without_autocast():
            captured = export_model(model, (), named, dynamic_shapes) if signature.by_name else export_model(
                model, args, kwargs, dynamic_shapes
            )
        inputs = ((), named) if signature.by_name else (args, kwargs)
        flat = pytree.tree_leaves(inputs)
        batches = [
            _flatten_as(captured.in_spec, ((), signature.bind(a, k)) if signature.by_name else (a, k), "calibration")
            for a, k in calibration
        ]
        record = process(captured.module, options, example_values=flat, calibration=batches)
        program = ExportedProgram(record, captured, list(named), signature.defaults, options.rest)
        program.signature = signature
        program.model_error = assemble.model_error(record, named, captured.out_spec)
        program.seconds = watch.seconds
        record.outputs_before = record.outputs_after = None
        return program

    signature: Signature

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The call's leaves in the graph's order. Raises :class:`BadArgument` where the capture does not cover it."""
        if not self.signature.by_name:
            return _flatten_as(self.captured.in_spec, (args, kwargs), "call")
        named = self.signature.bind(args, kwargs)
        for name in [name for name in named if name not in self.names]:
            default = self.defaults.get(name, inspect.Parameter.empty)
            if named[name] is default or (not isinstance(named[name], torch.Tensor) and named[name] == default):
                del named[name]
            else:
                raise BadArgument(
                    f"the model was captured without {name!r}: give it in example_kwargs when compiling, "
                    "or compile without example inputs"
                )
        for name in self.names:
            if name not in named:
                if name not in self.defaults:
                    raise BadArgument(f"the call lacks {name!r}")
                named[name] = self.defaults[name]
        return _flatten_as(self.captured.in_spec, ((), {name: named[name] for name in self.names}), "call")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        flat = self.flatten(args, kwargs)
        self._check(flat)
        outputs = self.run(*flat)
        return pytree.tree_unflatten(list(outputs), self.captured.out_spec)

    def _check(self, flat: list[Any]) -> None:
        """Refuse what the captured graph was not made for: other constants, dtypes, devices or fixed sizes."""
        sizes: dict[Any, int] = {}
        for got, expected, path in zip(flat, self.placeholders, self.paths, strict=True):
            if not isinstance(expected, torch.Tensor):
                if isinstance(got, torch.Tensor) or got != expected:
                    raise BadArgument(f"{path} is {got!r}, but the model was captured with {expected!r}: compile again")
                continue
            if not isinstance(got, torch.Tensor):
                raise BadArgument(f"{path} is {type(got).__name__}, but the model was captured with a tensor")
            if got.dtype != expected.dtype or got.device.type != expected.device.type or got.dim() != expected.dim():
                raise BadArgument(
                    f"{path} is a {got.dim()}-d {got.dtype} tensor on {got.device}, but the model was captured with "
                    f"a {expected.dim()}-d {expected.dtype} one on {expected.device}: compile again"
                )
            for dim, (size, want) in enumerate(zip(got.shape, expected.shape, strict=True)):
                if isinstance(want, int):
                    allowed = want
                else:
                    symbol = want.node.expr
                    allowed = sizes.setdefault(symbol, size) if symbol.is_Symbol else size
                if size != allowed:
                    raise BadArgument(
                        f"{path} has size {size} in dim {dim}, but the captured graph needs {allowed}: give example "
                        "inputs or dynamic_shapes that let this size vary, or compile without example inputs"
                    )


class Signature:
    """How a model's forward is called. by_name: every argument can be given by name, which makes calls comparable."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.signature = inspect.signature(model.forward)
        kinds = {p.kind for p in self.signature.parameters.values()}
        self.by_name = not kinds & {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL}
        self.defaults = {
            name: p.default for name, p in self.signature.parameters.items() if p.default is not inspect.Parameter.empty
        }

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments by name, in the signature's order. Raises TypeError as the call itself would."""
        bound = self.signature.bind(*args, **kwargs)
        named: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            kind = self.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                named.update(value)
            else:
                named[name] = value
        return named


def _flatten_as(spec: pytree.TreeSpec, inputs: Any, what: str) -> list[Any]:
    leaves, got = pytree.tree_flatten(inputs)
    if got != spec:
        raise BadArgument(
            f"the {what}'s inputs are nested another way than the example inputs the model was captured with: "
            f"{got} against {spec}"
        )
    return leaves


def _key_paths(spec: pytree.TreeSpec) -> list[tuple[Any, Any]]:
    filled = pytree.tree_unflatten([0] * spec.num_leaves, spec)
    args, kwargs = filled
    return pytree.tree_flatten_with_path(kwargs if not args else filled)[0]


@contextlib.contextmanager
def _without_autocast() -> Iterator[None]:
    """Capture the model in its own dtypes: an autocast around compile() is not one around the calls."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield

