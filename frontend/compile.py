"""``tilewright.compile``: capture, raise, rewrite, validate, lower."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from ..passes.base import Pass
from ..passes.manager import check_needs
from ..runtime.announce import announce
from ..runtime.errors import BadArgument, BadExampleInputs, CaptureError
from .backend import require_changes
from .cached_program import cache_pass
from .capture import check_example_inputs, first_line, untouched
from .choices import Memory, Rest, Target
from .compiled import CompiledModule
from .cross_cache import CrossForm, is_encoder_decoder
from .decode_form import DecodeForm, named_call
from .options import Options

Call = tuple[tuple[Any, ...], dict[str, Any]]


def compile(
    model: torch.nn.Module,
    passes: Sequence[Pass] | str = (),
    example_inputs: tuple[Any, ...] | None = None,
    example_kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    target: Target = "auto",
    rest: Rest = "auto",
    strict: bool = False,
    validate: bool = True,
    calibration: Sequence[Any] | None = None,
    memory: Memory = "system",
) -> CompiledModule:
    """Rewrite ``model`` with ``passes`` and return a module that is called the same way.

    model: any ``nn.Module``; it is not modified, and its weights are shared, not copied.
    passes: pass objects, or text such as ``"two-pass-softmax,sigmoid-attention{bias=-1.5}"``. They are sorted by what
        they require; an illegal combination is refused in a sentence.
    example_inputs, example_kwargs: positional and keyword inputs. With them the model is captured now, whole, by
        ``torch.export``; where that fails, and without them, at the first call through Dynamo.
    dynamic_shapes: as for ``torch.export.export``. None lets every input size vary that the model allows to.
    target: what runs the canonical ops. ``auto``: Triton for CUDA tensors, C++ for CPU tensors where there is a
        kernel, else the reference form. ``triton-interpret`` runs the Triton kernels on the CPU, slowly.
    rest: what runs everything else: Torch Inductor, or eager PyTorch. ``auto`` is Inductor, except for decoders with a
        KV cache on the CPU in which next to nothing else is left: C++ runs those operator by operator.
    strict: raise when a pass changed nothing.
    validate: run every rewritten site before and after on the example inputs, and measure the whole model's error.
    calibration: batches for passes that fit themselves to activations, each a tensor, a tuple or a dict of inputs.
        The first one serves as example inputs when there are none.
    memory: ``pool`` keeps the memory of the graph's big CPU tensors, in huge pages, for the next call instead of
        returning it to the system (:mod:`tilewright.runtime.memory`). Outputs of our own kernels always do that.

    Raises a :class:`~tilewright.runtime.errors.TilewrightError` before anything is changed: ``UnknownPass``,
    ``BadPassOption``, ``IllegalPassCombination``, ``BadArgument``, ``BadExampleInputs``, ``CalibrationNeeded``,
    ``CaptureError``, ``PassChangedNothing`` (strict), ``ValidationError``.
    """
    if not isinstance(model, torch.nn.Module):
        raise BadArgument(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, CompiledModule):
        raise BadArgument("this module is compiled already: compile the original model with all passes at once")
    options = Options.make(passes, target, rest, strict, validate, memory)
    batches = [as_call(batch) for batch in calibration or ()]
    check_needs(options.passes, batches)
    if example_inputs is None and example_kwargs is None and batches:
        example_inputs, example_kwargs = batches[0]
    compiled = CompiledModule(model, options)
    if cache_pass(options.passes) is not None:
        if dynamic_shapes is not None:
            raise BadArgument("with a KV cache every size varies that can: leave dynamic_shapes out")
        _capture_decoder(compiled, model, example_inputs, example_kwargs, batches)
        return compiled
    if example_inputs is None and example_kwargs is None:
        if dynamic_shapes is not None:
            raise BadArgument("dynamic_shapes describes example inputs: give example_inputs or example_kwargs too")
        return compiled
    args, kwargs = check_example_inputs(model, () if example_inputs is None else example_inputs, example_kwargs or {})
    for batch_args, batch_kwargs in batches:
        check_example_inputs(model, batch_args, batch_kwargs)
    try:
        compiled.capture_export(args, kwargs, dynamic_shapes, batches)
    except CaptureError as error:
        _check_runs(model, args, kwargs, error)
        compiled.fallback_reason = str(error)
        announce(f"{type(model).__name__}: {error}; capturing through Dynamo instead", key=f"door:{error}")
        compiled.calibrate_from(batches)
        with untouched(model):
            compiled(*copy.deepcopy(args), **copy.deepcopy(kwargs))
        return compiled
    if strict:
        require_changes(options, compiled.records)
    return compiled


def _capture_decoder(
    compiled: CompiledModule, model: torch.nn.Module, args: Any, kwargs: dict[str, Any] | None, batches: list[Call]
) -> None:
    """Bring example inputs and calibration batches into the form that decoders are captured in, and capture."""
    args, kwargs = check_example_inputs(model, () if args is None else args, kwargs or {}, partly=True)
    named = named_call(model, args, kwargs)
    form: DecodeForm
    if is_encoder_decoder(model):
        form = CrossForm.of(model, named)
        if batches:
            raise BadArgument("passes are calibrated on decoders: an encoder-decoder with a KV cache takes none")
    else:
        form = DecodeForm.of(model, named)
    calibration = [((), form.complete(named_call(model, *batch))) for batch in batches]
    compiled.capture_decoder(form, form.captured(model, named), calibration)
    if compiled.options.strict:
        require_changes(compiled.options, compiled.records)


def as_call(batch: Any) -> Call:
    """A calibration batch as (args, kwargs). Raises :class:`BadArgument` for anything but tensor, tuple or mapping."""
    if isinstance(batch, torch.Tensor):
        return (batch,), {}
    if isinstance(batch, dict) or hasattr(batch, "keys"):  # transformers' BatchEncoding is a mapping, not a dict
        return (), dict(batch)
    if isinstance(batch, tuple | list):
        if len(batch) == 2 and isinstance(batch[0], tuple) and isinstance(batch[1], dict):
            return batch[0], dict(batch[1])
        return tuple(batch), {}
    raise BadArgument(f"a calibration batch is a tensor, a tuple or a dict of inputs, not {type(batch).__name__}")


def _check_runs(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], cause: CaptureError) -> None:
    """Tell inputs the model refuses from a model that export refuses."""
    try:
        with untouched(model), torch.no_grad():
            model(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    except Exception as error:  # whatever the model raises on its own inputs is the user's to see
        raise BadExampleInputs(
            f"{type(model).__name__} itself fails on the example inputs: {first_line(error)}"
        ) from error
    if cause.__cause__ is None:
        raise cause
