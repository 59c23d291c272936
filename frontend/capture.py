"""Capture: a model becomes one flat ``torch.fx.GraphModule`` of pre-dispatch ATen ops, through one of two doors.

Door one, :func:`export_model`, is ``torch.export`` on example inputs: the whole model in one graph. Door two,
:func:`retrace`, takes a graph Dynamo found and traces it again below ``torch.compile``'s guards, so that both doors
hand the same kind of graph to raising. Parameters are ``get_attr`` nodes behind door one and placeholders behind
door two.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import io
import itertools
import logging
import math
import operator
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
import torch.utils._pytree as pytree
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import make_fx

from ..passes.execute import run
from ..passes.metrics import tensor_error
from ..runtime.errors import BadExampleInputs, CaptureError
from .quantized_modules import PackedWeight
from .raising.rules import PARAMETER


@dataclass
class Captured:
    """A model captured through door one.

    module: flat graph module; parameters and buffers are the model's own tensors (tied ones stay tied).
    in_spec, out_spec: pytree specs of ``(args, kwargs)`` and of the output.
    dynamic: whether any input size is symbolic.
    """

    module: torch.fx.GraphModule
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    dynamic: bool


def export_model(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any = None
) -> Captured:
    """Capture ``model`` with ``torch.export`` (pre-dispatch, non-strict).

    dynamic_shapes: as for ``torch.export.export``; None makes every size of every input dynamic where the model
    allows it. Export cannot leave a size of 1 open, so a batch of 1 is doubled for tracing, and what comes out must
    agree with the model on the batch of 1. Raises :class:`CaptureError` when export fails; the message is export's
    own first line.
    """
    register_pytrees(model)
    try:
        if dynamic_shapes is not None:
            return _export(model, args, kwargs, dynamic_shapes)
        if _is_single_batch((args, kwargs)):
            more, named = pytree.tree_map_only(torch.Tensor, _double, (args, kwargs))
            with contextlib.suppress(Exception):  # whatever goes wrong with a batch of 2, the given one decides
                captured = _export(model, more, named, _all_dynamic(model, more, named))
                if disagreement(model, captured, args, kwargs) is None:
                    return captured
        return _export(model, args, kwargs, _all_dynamic(model, args, kwargs))
    except Exception as error:  # export has no common error class; the reason goes into the report
        raise CaptureError(f"torch.export failed: {first_line(error)}") from error


def _export(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> Captured:
    # When export fails it prints the graph so far to stderr; the reason is what the report tells.
    with _quiet(*_NOISY), contextlib.redirect_stderr(io.StringIO()):
        program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    flat = flatten_regions(_unlift(program))
    sizes = itertools.chain.from_iterable(
        getattr(node.meta.get("val"), "shape", ()) for node in flat.graph.nodes if node.op == "placeholder"
    )
    dynamic = any(isinstance(size, torch.SymInt) for size in sizes)
    return Captured(flat, program.call_spec.in_spec, program.call_spec.out_spec, dynamic)


def disagreement(
    model: torch.nn.Module, captured: Captured, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    """How the captured graph's outputs differ from the model's own, or None when they agree.

    For inputs that export did not promise: sizes of 1, where a model may take another branch. Runs both once; random
    numbers, buffers and inputs are as before afterwards.
    """
    flat = pytree.tree_leaves((args, kwargs))
    got = pytree.tree_leaves(run(captured.module, flat))
    own_args, own_kwargs = copy.deepcopy((args, kwargs))
    with untouched(model), torch.no_grad():
        want = pytree.tree_leaves(model(*own_args, **own_kwargs))
    for after, before in zip(got, want, strict=True):
        if not isinstance(before, torch.Tensor):
            if after != before:
                return f"{after!r} instead of {before!r}"
        elif after.shape != before.shape:
            return f"shape {tuple(after.shape)} instead of {tuple(before.shape)}"
        elif before.dtype.is_floating_point:
            # Another branch of the model is off by far more than rounding.
            error = tensor_error(after, before)["rel_l2"]
            if not error <= math.sqrt(torch.finfo(before.dtype).eps):
                return f"relative error {error:.2g}"
        elif not torch.equal(after, before):
            return "other integers"
    return None


@contextlib.contextmanager
def untouched(model: torch.nn.Module) -> Iterator[None]:
    """Whatever runs inside, the model's buffers (batch norm statistics) and the random numbers are as before after."""
    packed = {id(held) for part in model.modules() if isinstance(part, PackedWeight) for held in part.buffers()}
    buffers = {name: held.detach().clone() for name, held in model.named_buffers() if id(held) not in packed}
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for name, before in buffers.items():
                    model.get_buffer(name).copy_(before)


def _unlift(program: Any) -> torch.fx.GraphModule:
    # torch 2.11 and later both have check_guards; guards of input shapes would refuse sizes that work.
    if "check_guards" in inspect.signature(program.module).parameters:
        return program.module(check_guards=False)
    return program.module()


_NOISY = ("torch._export", "torch.export", "torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor")


def _all_dynamic(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def sizes(leaf: Any) -> Any:
        return dict.fromkeys(range(leaf.dim()), torch.export.Dim.AUTO) if isinstance(leaf, torch.Tensor) else None

    return pytree.tree_map(sizes, dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments))


def _is_single_batch(inputs: Any) -> bool:
    """Whether every tensor input has a leading size of 1, which then is taken for the batch."""
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    return bool(tensors) and all(t.dim() >= 2 and t.shape[0] == 1 for t in tensors)


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, tensor])


@contextlib.contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Silence export's warnings about sizes it specialized: a call that does not fit is refused with a sentence."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def register_pytrees(model: torch.nn.Module) -> None:
    """Let export see through transformers' caches. Registering twice is harmless."""
    if "transformers" not in sys.modules or not type(model).__module__.startswith("transformers"):
        return
    if importlib.util.find_spec("transformers.integrations.executorch") is None:
        return
    from transformers.integrations import executorch

    if hasattr(executorch, "register_dynamic_cache_export_support"):
        executorch.register_dynamic_cache_export_support()


def check_example_inputs(
    model: torch.nn.Module, args: Any, kwargs: Any, *, partly: bool = False
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example inputs as (tuple, dict). Raises :class:`BadExampleInputs` when the signature does not accept them.

    partly: arguments may be missing; they are made later.
    """
    if isinstance(args, torch.Tensor):
        raise BadExampleInputs("example_inputs must be a tuple of the model's positional inputs: write (x,), not x")
    if not isinstance(args, tuple | list):
        raise BadExampleInputs(f"example_inputs must be a tuple, not {type(args).__name__}")
    if not isinstance(kwargs, dict) or not all(isinstance(key, str) for key in kwargs):
        raise BadExampleInputs("example_kwargs must be a dict of keyword arguments")
    try:
        signature = inspect.signature(model.forward)
        (signature.bind_partial if partly else signature.bind)(*args, **kwargs)
    except TypeError as error:
        raise BadExampleInputs(f"{type(model).__name__}.forward does not accept the example inputs: {error}") from error
    return tuple(args), dict(kwargs)


def retrace(module: torch.fx.GraphModule, fakes: Sequence[Any]) -> torch.fx.GraphModule:
    """Trace a Dynamo graph to pre-dispatch ATen: same inputs in the same order, symbolic sizes kept.

    fakes: the placeholders' fake tensors and symbolic ints. (``torch.export`` would refuse the symbolic ints.)
    """
    mode = next((f.fake_mode for f in fakes if hasattr(f, "fake_mode")), None)

    def run(*inputs: Any) -> Any:
        # The interpreter hands each node's stack trace and module path on to the nodes traced from it.
        return torch.fx.Interpreter(module).run(*inputs)

    # Dynamo has prepared a second fake mode for the backend; the placeholders live in the first. torch 2.11 needs
    # the Python dispatcher for composite operators on symbolic sizes.
    with (
        torch._guards.tracing(None),
        mode or contextlib.nullcontext(),
        enable_python_dispatcher(),
        torch.fx.traceback.preserve_node_meta(),
    ):
        traced = make_fx(run, tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True)(*fakes)
    for node, fake in zip(traced.graph.find_nodes(op="placeholder"), fakes, strict=True):
        if isinstance(fake, torch.nn.Parameter):  # which make_fx forgets, and a rule for linears asks
            node.meta[PARAMETER] = True
    return traced


def placeholder_values(module: torch.fx.GraphModule) -> list[Any]:
    """What stands behind each placeholder of a Dynamo graph: fake tensors, symbolic ints, constants."""
    return [
        node.meta["example_value"] if "example_value" in node.meta else node.meta.get("val")
        for node in module.graph.nodes
        if node.op == "placeholder"
    ]


def copy_module(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The same graph in a new module that shares parameters and buffers; node names and metadata are kept."""
    graph = torch.fx.Graph()
    mapping: dict[torch.fx.Node, torch.fx.Node] = {}
    output = graph.graph_copy(module.graph, mapping)
    old_output = module.graph.output_node()
    new_output = graph.output(output)
    new_output.meta = dict(old_output.meta)
    graph.set_codegen(module.graph._codegen)
    copied = torch.fx.GraphModule(module, graph)
    copied.meta = dict(getattr(module, "meta", {}))
    return copied


def flatten_regions(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A copy with flat inputs and outputs in which ``no_grad`` and autocast regions stand inline.

    Export wraps such regions in submodules, where no rule could see them. The results of a ``no_grad`` region are
    detached instead, which is the same for every caller's grad mode. Raises :class:`CaptureError` for a region that
    enables gradients.
    """
    graph = torch.fx.Graph()
    mapping: dict[torch.fx.Node, Any] = {}
    output = graph.output(_inline(module, graph, mapping))
    output.meta = dict(module.graph.output_node().meta)
    flat = torch.fx.GraphModule(module, graph)
    graph.eliminate_dead_code()
    for name in [n for n, child in flat.named_children() if isinstance(child, torch.fx.GraphModule)]:
        delattr(flat, name)
    flat.recompile()
    return flat


def _inline(module: torch.fx.GraphModule, graph: torch.fx.Graph, mapping: dict[torch.fx.Node, Any]) -> Any:
    """Copy ``module``'s nodes to the end of ``graph``; placeholders already in ``mapping`` are taken from there."""
    wrappers = torch.ops.higher_order

    def lookup(argument: Any) -> Any:
        return torch.fx.node.map_arg(argument, mapping.__getitem__)

    for node in module.graph.nodes:
        if node in mapping:
            continue
        if node.op == "call_function" and node.target is wrappers.wrap_with_set_grad_enabled:
            enabled, region, *inputs = node.args
            if enabled:
                raise CaptureError(f"{node.name} enables gradients inside no_grad, which an exported graph cannot keep")
            outputs = _inline_region(module, region, lookup(inputs), graph)
            mapping[node] = [_detach(graph, output) for output in outputs]
        elif node.op == "call_function" and node.target is wrappers.wrap_with_autocast:
            device, dtype, enabled, cached, region, *inputs = node.args
            amp = torch.amp.autocast_mode
            entered = graph.call_function(amp._enter_autocast, (device, dtype, enabled, cached))
            mapping[node] = _inline_region(module, region, lookup(inputs), graph)
            graph.call_function(amp._exit_autocast, (entered,))
        elif node.target is operator.getitem and isinstance(mapping.get(node.args[0]), list):
            mapping[node] = mapping[node.args[0]][node.args[1]]
        elif node.op == "output":
            return lookup(node.args[0])
        else:
            mapping[node] = graph.node_copy(node, mapping.__getitem__)
    raise CaptureError("the graph has no output")


def _inline_region(
    module: torch.fx.GraphModule, region: Any, inputs: Sequence[Any], graph: torch.fx.Graph
) -> list[Any]:
    body = getattr(module, region.target)
    placeholders = [node for node in body.graph.nodes if node.op == "placeholder"]
    outputs = _inline(body, graph, dict(zip(placeholders, inputs, strict=True)))
    return list(outputs) if isinstance(outputs, tuple | list) else [outputs]


def _detach(graph: torch.fx.Graph, node: Any) -> Any:
    if not isinstance(node, torch.fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return node
    detached = graph.call_function(torch.ops.aten.detach.default, (node,))
    detached.meta = dict(node.meta)
    return detached


def first_line(error: BaseException) -> str:
    """An error's type and the first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:400]


class GraphBreaks(logging.Handler):
    """Listens to Dynamo's graph-break log and keeps ``{"source": "file:line", "reason": ...}`` of each."""

    LOGGER = "torch._dynamo.symbolic_convert.__graph_breaks"

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.found: list[dict[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        place = re.search(r"user code at (.+):(\d+)", text)
        reason = re.search(r"Graph Break Reason: (.+)", text)
        if place is None:
            return
        entry = {"source": f"{place[1]}:{place[2]}", "reason": reason[1].strip() if reason else ""}
        if entry not in self.found:
            self.found.append(entry)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Attach for the time of one call; the logger is left as it was."""
        logger = logging.getLogger(self.LOGGER)
        level, propagate = logger.level, logger.propagate
        logger.addHandler(self)
        if not logger.isEnabledFor(logging.DEBUG):
            logger.setLevel(logging.DEBUG)
            logger.propagate = False
        try:
            yield
        finally:
            logger.removeHandler(self)
            logger.setLevel(level)
            logger.propagate = propagate
