"""Other quantizers on the same model, bits and groups, where they run on a CPU."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Unavailable(Exception):
    """The reason that a peer has no result."""


def torchao(model: nn.Module, bits: int, group: int, activations: int | None) -> nn.Module:
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
    except (RuntimeError, ValueError, AssertionError, NotImplementedError, AttributeError, TypeError) as error:
        raise Unavailable(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error
    return made


def _head(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    return find() if callable(find) else None


def _linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    head = _head(model)
    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]


PEERS: dict[str, Callable[[nn.Module, int, int, int | None], nn.Module]] = {"torchao": torchao}
