"""The compiled module: called like the model it was made from."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.fx
from torch._dynamo.exc import BackendCompilerFailed

from ..runtime.errors import BadArgument, TilewrightError
from . import assemble, constants
from .backend import GraphProgram, compile_graph, require_changes
from .bisection import Contribution, measure
from .cached_program import CachedProgram
from .capture import GraphBreaks
from .cross_cache import CrossForm, CrossProgram, Decoder
from .decode_form import DecodeForm
from .decoder_cache import DecoderCache
from .exported import ExportedProgram
from .inputs import by_name
from .loaded import LoadedModule
from .lower import KernelUse
from .options import Options
from .pipeline import GraphRecord
from .report import CaptureReport, ModelError, Report
from .save import program_of
from .shell import KEPT, generate, shell_of, with_signature


class CompiledModule(torch.nn.Module):
    """What :func:`tilewright.compile` returns: an ``nn.Module`` with the model's signature and output type.

    Weights are the model's own tensors, so training one trains the other; everything else of the model is reached
    through this object too (``compiled.config``, ``compiled.generate``). The model itself is not modified.

    Attributes:
        report: what was done, site by site. kernels: the kernels in use. records: the graphs at every stage.
        door: ``"export"`` (one whole graph) or ``"dynamo"`` (captured at the first call of each kind).
        options: the checked arguments of ``compile``. original_model: the user's module.
    """

    def __init__(self, model: torch.nn.Module, options: Options) -> None:
        super().__init__()
        self._orig_mod = model
        self._part = model
        """What is captured: the model, or the decoder of an encoder-decoder with a KV cache."""
        self.training = model.training
        self.options = options
        self.door = "dynamo"
        self.fallback_reason = ""
        self._breaks = GraphBreaks()
        self._programs: list[GraphProgram] = []
        self._exported: dict[tuple[Any, ...], ExportedProgram] = {}
        self._example: tuple[tuple[Any, ...], dict[str, Any], Any] | None = None
        self._calibration: Sequence[tuple[tuple[Any, ...], dict[str, Any]]] = ()
        self._listeners: list[Any] = []
        self._tuned: dict[str, torch.Tensor] = {}
        self._dynamo_forward: Any = None
        self._form: DecodeForm | None = None
        self._decoders: dict[tuple[Any, ...], CachedProgram] = {}
        self.stored: LoadedModule | None = None
        """What runs after :meth:`release`."""
        self.forward = _same_signature(self._call, model)
        if callable(getattr(type(model), "generate", None)):
            self.generate = self._generate

    @property
    def original_model(self) -> torch.nn.Module:
        """The user's module."""
        self._refuse_released("there is no original model")
        return self._orig_mod

    @property
    def decodes(self) -> bool:
        """Whether a pass put a KV cache into the module, so that calls take and give ``past_key_values``."""
        return self._form is not None

    # Memory.

    def release(self) -> CompiledModule:
        """Let go of the model and of all graphs but the one that runs; returns this module.

        Float weights that passes replaced are freed as soon as nobody else holds the model either: ``del model``
        too. What is left is what :func:`tilewright.save` writes: calls, ``generate``, caches, ``report``, ``kernels``
        and ``dump`` (of the lowered graph) go on; ``bisect``, ``tune``, another mode (``train()``) and gradients
        through a KV cache need the model and say so.

        Raises :class:`~tilewright.runtime.errors.BadArgument` for a module captured by Dynamo, which reads its
        weights from the model, and for an encoder-decoder with a KV cache, whose encoder is the model's own.
        """
        if self.stored is not None:
            return self
        if self.door != "export":
            raise BadArgument(
                "a module captured by Dynamo reads its weights from the model: give compile() example inputs to "
                "release the model"
            )
        if isinstance(self._form, CrossForm):
            raise BadArgument("the encoder of an encoder-decoder runs as the model's own module: it cannot be released")
        decoder, program = self.decoder(), self._program()
        stored = LoadedModule(program_of(self), decoder.run if decoder is not None else program.run)
        shell = shell_of(self._orig_mod)
        self._exported, self._decoders, self._programs = {}, {}, []
        self._example, self._calibration, self._tuned, self._dynamo_forward = None, (), {}, None
        self._orig_mod = self._part = shell
        self.stored = stored

        self.forward = with_signature(stored, stored.program.call.signature)
        constants.give_memory_back()
        return self

    def _refuse_released(self, what: str) -> None:
        if self.stored is not None:
            raise BadArgument(f"{what}: release() let go of the model and of the graphs before lowering; compile again")

    def train(self, mode: bool = True) -> CompiledModule:
        """As for any module; after :meth:`release` only the mode that was compiled is left."""
        if self.stored is not None:
            self.stored.train(mode)
        return super().train(mode)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own ``generate``, its steps going through the compiled forward."""
        if self.stored is not None and self.stored.decodes:
            return self.stored.generate(*args, **kwargs)
        return generate(self._orig_mod, self.forward, self.decoder(), args, kwargs)

    def decoder(self) -> CachedProgram | None:
        """The program with a cache of the mode we are in; None without a cache."""
        return self._decoder() if self._form is not None else None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_orig_mod":
                raise
            if self.__dict__["_modules"].get("stored") is not None and name not in _SHELL:
                raise AttributeError(f"{name!r}: release() let go of the model, which had it") from None
            return getattr(super().__getattr__("_orig_mod"), name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's state dict, with the model's own keys; after :meth:`release` that of the lowered graph."""
        if self.stored is not None:
            return self.stored.state_dict(*args, **kwargs)
        return self._orig_mod.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load into the model's own weights, which are this module's too."""
        if self.stored is not None:
            return self.stored.load_state_dict(*args, **kwargs)
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
        self._program()
        self.door = "export"

    def capture_decoder(
        self,
        form: DecodeForm,
        named: dict[str, Any],
        calibration: Sequence[tuple[tuple[Any, ...], dict[str, Any]]] = (),
    ) -> None:
        """Capture for a KV cache. Raises ``CaptureError``, or ``NotADecoder`` where a part cannot have one."""
        self._form = form
        if isinstance(form, CrossForm):
            self._part = Decoder(self._orig_mod)
        self.capture_export((), named, None, calibration)
        self._decoder()

    def _decoder(self) -> CachedProgram:
        """The program with a cache of the mode we are in."""
        program = self._program()
        mode = _mode(self._orig_mod)
        if mode not in self._decoders:
            assert self._form is not None
            owner = next((other.owner for other in self._decoders.values()), None)
            make = CrossProgram.make if isinstance(self._form, CrossForm) else CachedProgram.make
            self._decoders[mode] = make(program, self._form, self.options, owner)
        return self._decoders[mode]

    def new_cache(self, path: str | Path | None = None) -> DecoderCache:
        """A ``past_key_values`` for calls of this module: empty, or what its ``save`` wrote to ``path``.

        Only with a pass that inserts a KV cache. Raises :class:`~tilewright.runtime.errors.CacheMismatch` for the
        file of another model's cache, :class:`~tilewright.runtime.errors.SaveError` for one that is damaged.
        """
        if self._form is None:
            raise BadArgument("this module has no KV cache: compile with passes=[KVCache(max_length=...)]")
        if self.stored is not None:
            return self.stored.new_cache(path)
        return self._decoder().new_cache(path)

    def _program(self) -> ExportedProgram:
        """The exported graph of the mode we are in; captured when a mode is met for the first time."""
        mode = _mode(self._orig_mod)
        if mode not in self._exported:
            assert self._example is not None
            args, kwargs, shapes = self._example
            self._exported[mode] = ExportedProgram.make(
                self._part, args, kwargs, shapes, self.options, self._calibration
            )
            self._exported[mode].form = self._form
            _write_buffers(self._exported[mode].record, self._tuned)
        return self._exported[mode]

    # What ``tilewright.tune`` needs.

    def exported_program(self) -> ExportedProgram:
        """The graph of the model's current mode. Only behind door ``"export"``, and before :meth:`release`."""
        self._refuse_released("there is no graph to work on")
        return self._program()

    def example_call(self) -> tuple[dict[str, Any], Sequence[tuple[tuple[Any, ...], dict[str, Any]]]]:
        """The example inputs by name, and the calibration batches."""
        self._refuse_released("there are no example inputs")
        assert self._example is not None
        bound = inspect.signature(self._part.forward).bind(*self._example[0], **self._example[1])
        return by_name(bound), self._calibration

    def set_tuned(self, values: Mapping[str, torch.Tensor]) -> None:
        """Give parameters that passes declared new values, by their names in the graphs, in every mode's graph."""
        self._tuned |= values
        for program in self._exported.values():
            _write_buffers(program.record, self._tuned)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if self._form is not None:
            return self._decoder()(*args, **kwargs)
        if self.door == "export":
            return self._program()(*args, **kwargs)
        return self._call_dynamo(*args, **kwargs)

    # Door two.

    def calibrate_from(self, batches: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
        """Fit calibrated passes to the inputs of the calls that compile (Dynamo's graphs cannot be run alone)."""
        self._calibration = batches

    def _call_dynamo(self, *args: Any, **kwargs: Any) -> Any:
        if self._dynamo_forward is None:
            self._dynamo_forward = torch.compile(self._orig_mod, backend=self._backend)
        known = len(self._programs)
        try:
            with self._breaks.listening():
                result = self._dynamo_forward(*args, **kwargs)
        except BackendCompilerFailed as error:
            # Dynamo wraps what a backend raises; our own errors are for the user as they are.
            if isinstance(error.inner_exception, TilewrightError):
                raise error.inner_exception from None
            raise
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
        """One per captured graph, in the order they were captured; after :meth:`release` only what runs."""
        if self.stored is not None:
            what_runs: Any = self.stored.records
            return what_runs
        if self.door == "export":
            return [program.record for program in self._exported.values()]
        return [program.record for program in self._programs]

    @property
    def kernels(self) -> list[KernelUse]:
        """The kernels in use: spec, source text, site, target."""
        if self.stored is not None:
            return self.stored.kernels
        return [use for record in self.records for use in record.kernels]

    @property
    def report(self) -> Report:
        """What was done so far. Through Dynamo, a graph is added when a call needs one."""
        if self.stored is not None:
            return self.stored.report
        capture = CaptureReport(
            door=self.door, graph_breaks=list(self._breaks.found), fallback_reason=self.fallback_reason
        )
        error: ModelError | None = None
        seconds: dict[str, float] = {}
        if self.door == "export":
            first = next(iter(self._exported.values()))
            error, seconds = first.model_error, first.seconds
        elif measured := [record.error for record in self.records if record.error is not None]:
            error = ModelError.of(max(measured, key=lambda e: e["rel_l2"]))
        report = assemble.assemble(
            type(self._orig_mod).__name__, self.options, self.records, capture, error, seconds=seconds
        )
        if self._decoders:
            report.cache = next(iter(self._decoders.values())).figures()
        return report

    def dump(self, folder: str | Path, *, overwrite: bool = False, backward: bool | None = None) -> Path:
        """Write graphs, kernels, report and standalone checks to ``folder``; see :mod:`tilewright.frontend.dump`."""
        from .dump import dump

        return dump(self, folder, overwrite=overwrite, backward=backward)

    def bisect(self, *args: Any, **kwargs: Any) -> list[Contribution]:
        """Which pass and site add the most error on these inputs: one entry a rewritten site, the worst first.

        Each site is rewritten alone and the model's outputs compared with the original ones, so the figures show
        what a site does by itself; they need not add up to the error of all together.
        """
        self._refuse_released("there is no original graph to compare with")
        found: list[Contribution] = []
        for record, inputs in self._graph_inputs(args, kwargs):
            found += measure(record, inputs)
        return sorted(found, key=lambda c: c.error["rel_l2"], reverse=True)

    def _graph_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[GraphRecord, list[Any]]]:
        if self.door == "export":
            self._call(*args, **kwargs)  # captures this mode if need be, and checks the inputs
            program = self._program()
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


_SHELL = frozenset(KEPT)


def _write_buffers(record: GraphRecord, values: Mapping[str, torch.Tensor]) -> None:
    """In place: the graphs of a record share their buffers."""
    known = dict(record.lowered.named_buffers())
    with torch.no_grad():
        for name, value in values.items():
            if name in known:
                known[name].copy_(value)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


def _same_signature(call: Any, model: torch.nn.Module) -> Any:
    @functools.wraps(model.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    return forward


def _mode(model: torch.nn.Module) -> tuple[Any, ...]:
    """What decides which graph a model has besides its inputs: training or not, and autocast, which moves dtypes."""
    autocast = tuple(
        (device, torch.get_autocast_dtype(device)) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)
    )
    return (model.training, *autocast)
