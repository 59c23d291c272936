"""Door one's program: an exported graph, rewritten, and called with the model's signature."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree

from ..runtime import memory
from ..runtime.errors import BadArgument
from . import assemble
from .capture import Captured, disagreement, export_model
from .decode_form import DecodeForm
from .inputs import CallForm, by_name, check_inputs, describe_inputs, single_sizes, takes_names
from .options import Options
from .pipeline import GraphRecord, Stopwatch, process
from .report import ModelError
from .rest import through_inductor

Call = tuple[tuple[Any, ...], dict[str, Any]]


class ExportedProgram:
    """One exported graph made callable.

    record: what was done to it. captured: its pytree specs. call: how calls are written. inputs: what it was made for.
    """

    def __init__(
        self, model: torch.nn.Module, record: GraphRecord, captured: Captured, call: CallForm, options: Options
    ) -> None:
        self.model = model
        self.record = record
        self.captured = captured
        self.call = call
        self.inputs = describe_inputs(record.captured, captured.in_spec)
        # Which dynamic sizes were 1 in calls that were compared with the model.
        self.compared: set[tuple[tuple[int, int], ...]] = {()}
        self.seconds: dict[str, float] = {}
        self.model_error: ModelError | None = None
        self.form: DecodeForm | None = None
        """How to complete a decoder's calls, of a module with a KV cache."""
        if options.rest != "eager":
            # Compiled at the first call. Dynamo guards the sizes that Inductor specializes on.
            self.run: Any = through_inductor(record.lowered, True if captured.dynamic else None)
        else:
            self.run = record.lowered
        if options.memory == "pool":
            self.run = memory.pooled(self.run)

    @staticmethod
    def make(
        model: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        dynamic_shapes: Any,
        options: Options,
        calibration: Sequence[Call],
    ) -> ExportedProgram:
        """Export ``model`` on the example inputs and take it through all stages. Raises as :func:`export_model`."""
        signature = inspect.signature(model.forward)
        named = by_name(signature.bind(*args, **kwargs))
        keywords = takes_names(signature)
        watch = Stopwatch()
        with watch.stage("capture"):
            captured = export_model(model, *(((), named) if keywords else (args, kwargs)), dynamic_shapes)
        call = CallForm.of(signature, list(named), keywords)
        record = process(
            captured.module,
            options,
            example_values=call.flatten(args, kwargs, captured.in_spec),
            calibration=[call.flatten(*batch, captured.in_spec) for batch in calibration],
        )
        program = ExportedProgram(model, record, captured, call, options)
        program.model_error = assemble.model_error(record, named, captured.out_spec)
        program.seconds = watch.seconds
        # Only the errors are wanted; a language model's logits are large.
        record.outputs_before = record.outputs_after = None
        return program

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The call's leaves in the graph's order. Raises ``BadArgument`` where the capture does not cover the call."""
        if self.form is not None:
            call = self.form.read(args, kwargs)
            args, kwargs = (), self.form.complete(call.tensors, call.keep)
        flat = self.call.flatten(args, kwargs, self.captured.in_spec)
        check_inputs(flat, self.inputs)
        ones = single_sizes(flat, self.inputs)
        if ones not in self.compared:
            self._compare(flat, ones)
        return flat

    def _compare(self, flat: list[Any], ones: tuple[tuple[int, int], ...]) -> None:
        """Export promises its graph for sizes of 2 and more; a size of 1 is compared with the model, once."""
        args, kwargs = pytree.tree_unflatten(flat, self.captured.in_spec)
        if (reason := disagreement(self.model, self.captured, args, kwargs)) is not None:
            index, dim = ones[0]
            raise BadArgument(
                f"{self.inputs[index].path} has size 1 in dim {dim}, for which the model computes something else than "
                f"the graph captured with larger sizes ({reason}): compile with such example inputs"
            )
        self.compared.add(ones)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self.run(*self.flatten(args, kwargs))
        return pytree.tree_unflatten(list(outputs), self.captured.out_spec)
