"""Other quantizers on the same model, bits and groups, where they run on a CPU."""

from __future__ import annotations

import copy
import importlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Batches = Sequence[Mapping[str, Tensor]]
"""Calibration inputs: keyword arguments of the model, (B, L) each."""
# As peers say that they do not take a model or a format; the table shows what they said. Others are bugs, and stop.
_FAILURES = (RuntimeError, ValueError, AssertionError, NotImplementedError, AttributeError, TypeError)


class Unavailable(Exception):
    """The reason that a peer has no result."""


def torchao(model: nn.Module, bits: int, group: int, activations: int | None, batches: Batches = ()) -> nn.Module:
    """torchao's post-training formats: integers of ``bits`` with a symmetric scale a group, or a row for 0.

    A copy of ``model`` whose linear layers but the head are quantized; 8-bit activations are dynamic, a scale a token.
    Raises :class:`Unavailable` where torchao is not installed or refuses.
    """
    try:
        ao: Any = importlib.import_module("torchao.quantization")
    except ImportError as error:
        raise Unavailable(f"not installed ({error}): pip install --no-deps torchao") from error
    granularity = ao.PerGroup(group) if group else ao.PerAxis(0)
    dtype = getattr(torch, f"int{bits}")
    config: Any
    if activations == 8 and bits == 8 and not group:
        config = ao.Int8DynamicActivationInt8WeightConfig()
    elif activations == 8:
        config = ao.Int8DynamicActivationIntxWeightConfig(weight_dtype=dtype, weight_granularity=granularity)
    elif activations is None:
        config = ao.IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity)
    else:
        raise Unavailable(f"it has no {activations}-bit activations")
    narrow = [f"{name} has {m.in_features} columns" for name, m in _linears(model) if group and m.in_features % group]
    if narrow:
        raise Unavailable(f"it has no short last group, and {narrow[0]}")
    made = copy.deepcopy(model)
    heads = {id(m) for m in (_head(made),) if m is not None}
    try:
        ao.quantize_(made, config, filter_fn=lambda m, name: isinstance(m, nn.Linear) and id(m) not in heads)
        with torch.no_grad():
            next(m for name, m in _linears(made))(torch.zeros(1, 1, next(m for _, m in _linears(made)).in_features))
    except _FAILURES as error:
        raise _unavailable(error) from error
    return made


def llm_compressor(
    model: nn.Module, bits: int, group: int, activations: int | None, batches: Batches = ()
) -> nn.Module:
    """llm-compressor's GPTQ with its defaults, layer by layer on ``batches``; symmetric grids, a scale a group or row.

    A copy of ``model`` that computes with rounded weights and, with ``activations``, dynamic integers a token. The head
    stays as it is. Raises :class:`Unavailable` where llm-compressor is not installed or refuses.
    """
    try:
        entry: Any = importlib.import_module("llmcompressor")
        modifiers: Any = importlib.import_module("llmcompressor.modifiers.quantization")
        schemes: Any = importlib.import_module("compressed_tensors.quantization")
    except ImportError as error:
        raise Unavailable(f"not installed ({error}): pip install --no-deps llmcompressor compressed-tensors") from error
    numbers: Any = {"type": "int", "symmetric": True}
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    made: Any = copy.deepcopy(model)
    head = _head(made)
    names = [name for name, module in made.named_modules() if module is head]
    samples: Any = list(batches)
    try:
        weights = schemes.QuantizationArgs(num_bits=bits, **numbers, **strategy)
        inputs = None
        if activations:
            inputs = schemes.QuantizationArgs(num_bits=activations, strategy="token", dynamic=True, **numbers)
        scheme = schemes.QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
        recipe = modifiers.GPTQModifier(config_groups={"all": scheme}, ignore=names)
        # What GGUF files held is in floats by now, which the config of a model that was read from one does not say.
        vars(made.config).pop("quantization_config", None)
        with tempfile.TemporaryDirectory() as folder:  # it reads the model's config from a folder
            made.config.save_pretrained(folder)
            made.config.name_or_path = folder
            entry.oneshot(
                model=made,
                dataset=torch.utils.data.DataLoader(samples, batch_size=None),
                recipe=recipe,
                processor=object(),  # nothing is to be tokenized
                num_calibration_samples=len(batches),
            )
    except _FAILURES as error:
        raise _unavailable(error) from error
    rounded: nn.Module = made
    return rounded


def _unavailable(error: Exception) -> Unavailable:
    """With the error's first sentence."""
    return Unavailable(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0].split('. ')[0]}")


def _head(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    return find() if callable(find) else None


def _linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    head = _head(model)
    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]


PEERS: dict[str, Callable[[nn.Module, int, int, int | None, Batches], nn.Module]] = {
    "torchao": torchao,
    "llm-compressor": llm_compressor,
}
