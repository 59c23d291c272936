"""Door one's program: an exported graph, rewritten, and called with the model's signature."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree

from . import assemble
from .capture import Captured, export_model
from .inputs import CallForm, by_name, check_inputs, describe_inputs, takes_names
from .options import Options
from .pipeline import GraphRecord, Stopwatch, process
from .report import ModelError

Call = tuple[tuple[Any, ...], dict[str, Any]]


class ExportedProgram:
    """One exported graph made callable.

    record: what was done to it. captured: its pytree specs. call: how calls are written. inputs: what it was made for.
    """

    def __init__(self, record: GraphRecord, captured: Captured, call: CallForm, rest: str) -> None:
        self.record = record
        self.captured = captured
        self.call = call
        self.inputs = describe_inputs(record.captured, captured.in_spec)
        self.seconds: dict[str, float] = {}
        self.model_error: ModelError | None = None
        if rest == "inductor":
            # Compiled at the first call. Dynamo guards the sizes that Inductor specializes on.
            self.run: Any = torch.compile(record.lowered, dynamic=True if captured.dynamic else None, fullgraph=True)
        else:
            self.run = record.lowered

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
        program = ExportedProgram(record, captured, call, options.rest)
        program.model_error = assemble.model_error(record, named, captured.out_spec)
        program.seconds = watch.seconds
        # Only the errors are wanted; a language model's logits are large.
        record.outputs_before = record.outputs_after = None
        return program

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The call's leaves in the graph's order. Raises ``BadArgument`` where the capture does not cover the call."""
        flat = self.call.flatten(args, kwargs, self.captured.in_spec)
        check_inputs(flat, self.inputs)
        return flat

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self.run(*self.flatten(args, kwargs))
        return pytree.tree_unflatten(list(outputs), self.captured.out_spec)
