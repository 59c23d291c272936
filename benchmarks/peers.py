"""Contenders from torch itself and from optional packages. A missing package is a word in the row, not an error."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .harness import Skip
from .measure import Call

INSTALL = "pip install 'tilewright[bench]'"


def need(module: str, install: str = INSTALL) -> Any:
    """The module, or :class:`Skip` with how to get it."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise Skip(f"{module} is not installed: {install}")
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise Skip(f"{module} does not import: {str(error).splitlines()[0]}") from error


def inductor(function: Callable[..., Any], *, dynamic: bool | None = False, freezing: bool = False) -> Any:
    """``torch.compile``. freezing: weights become constants that may be laid out anew, for inference only."""
    options: dict[str, str | int | bool | Callable[..., Any]] | None = {"freezing": True} if freezing else None
    return torch.compile(function, dynamic=dynamic, options=options)


def call_model(model: Any, kwargs: dict[str, Any]) -> Call:
    """The first tensor of ``model(**kwargs)``: last hidden states or logits."""

    def call() -> Tensor:
        return first_tensor(model(**kwargs))

    return call


def first_tensor(out: Any) -> Tensor:
    if isinstance(out, Tensor):
        return out
    for name in ("logits", "last_hidden_state"):
        if getattr(out, name, None) is not None:
            return getattr(out, name)
    return out[0]


# OpenVINO


class _FirstOutput(torch.nn.Module):
    """Positional inputs and one tensor out: what OpenVINO's converter traces without trouble."""

    def __init__(self, model: torch.nn.Module, names: tuple[str, ...], constants: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.names, self.constants = model, names, constants

    def forward(self, *inputs: Tensor) -> Tensor:
        return first_tensor(self.model(**dict(zip(self.names, inputs, strict=True)), **self.constants))


@functools.cache
def _core(threads: int) -> Any:
    core = need("openvino").Core()
    core.set_property("CPU", {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"})
    return core


def openvino_model(model: torch.nn.Module, kwargs: dict[str, Any], precision: str, threads: int) -> Call:
    """The float32 ``model`` converted for these very shapes; precision: "f32" or "bf16", OpenVINO's inference hint.

    The call takes the numpy views of the inputs and gives the first output as a tensor.
    """
    openvino = need("openvino")
    tensors = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
    constants = {name: value for name, value in kwargs.items() if not isinstance(value, Tensor)}
    wrapped = _FirstOutput(model, tuple(tensors), constants).eval()
    example = tuple(tensors.values())
    with torch.no_grad():
        exported = torch.export.export(wrapped, example, strict=False)
    converted = openvino.convert_model(exported)
    compiled = _core(threads).compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    request = compiled.create_infer_request()
    arrays = {number: value.numpy() for number, value in enumerate(example)}

    def call() -> Tensor:
        request.infer(arrays, share_inputs=True, share_outputs=True)
        return torch.from_numpy(request.get_output_tensor(0).data)

    return call


class _CachedStep(torch.nn.Module):
    """One token behind a cache whose keys and values come in and go out as tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, token: Tensor, position: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        cache: Any = DynamicCache(config=self.model.config)
        for number, layer in enumerate(cache.layers):
            keys, values = past[2 * number : 2 * number + 2]
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        out = self.model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True)
        return out.logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))


def openvino_decoder(model: Any, past: list[Tensor], tokens: Tensor, precision: str, threads: int) -> Call:
    """Feed ``tokens`` (1, steps) one at a time behind ``past`` (keys, values of each layer: (1, heads, length, dim)).

    The cache is the compiled model's own state, which grows; a call sets it back to ``past``. Gives logits
    (1, steps, vocabulary).
    """
    openvino = need("openvino")
    make_stateful = need("openvino._offline_transformations").apply_make_stateful_transformation
    start = past[0].shape[2]
    example = (tokens[:, :1], torch.tensor([[start]]), past)
    free = [{2: torch.export.Dim.AUTO} for _ in past]
    with torch.no_grad():
        exported = torch.export.export(_CachedStep(model), example, dynamic_shapes=({}, {}, free), strict=False)
    converted = openvino.convert_model(exported)
    names = {f"past{number}": f"present{number}" for number in range(len(past))}
    for number, (old, new) in enumerate(names.items()):
        converted.inputs[2 + number].get_tensor().set_names({old})
        converted.outputs[1 + number].get_tensor().set_names({new})
    make_stateful(converted, names)
    request = (
        _core(threads).compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": precision}).create_infer_request()
    )
    arrays = [tensor.float().contiguous().numpy() for tensor in past]

    def call() -> Tensor:
        for state in request.query_state():
            number = int(state.name.partition("present")[0].removeprefix("past"))
            state.state = openvino.Tensor(arrays[number])
        logits = []
        for step, token in enumerate(tokens[0].tolist()):
            request.infer([[[token]], [[start + step]]])
            logits.append(torch.from_numpy(request.get_output_tensor(0).data.copy()))
        return torch.cat(logits, dim=1)

    return call


# llama.cpp


def llama_cpp(path: Path, threads: int, length: int) -> Any:
    """A ``llama_cpp.Llama`` on the GGUF file, with a context of ``length`` tokens, the last position's logits only."""
    package = need("llama_cpp", "pip install llama-cpp-python (docs/benchmarks.md says how to build it with AMX)")
    many = {"n_threads": threads, "n_threads_batch": threads}
    return package.Llama(str(path), n_ctx=length, n_batch=512, logits_all=False, verbose=False, **many)
