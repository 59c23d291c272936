"""What is left of a model whose weights are gone: its class, its config, and ``generate`` around another forward.

``generate`` of transformers is the model's own code. It needs the class, ``config``, ``generation_config`` and a
``forward``; the weights it needs not at all. The same goes into files as transformers' own JSON.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..runtime.errors import BadArgument, SaveError

KEPT = ("config", "generation_config", "name_or_path", "warnings_issued", "loss_type")
PACKAGE = "transformers"


def shell_of(model: nn.Module) -> nn.Module:
    """An object of the model's class without parameters, buffers and submodules, with its config and mode."""
    shell: nn.Module = object.__new__(type(model))
    nn.Module.__init__(shell)
    shell.training = model.training
    for name in KEPT:
        if name in vars(model):
            vars(shell)[name] = vars(model)[name]
    return shell


def shell_to_json(model: nn.Module) -> dict[str, Any] | None:
    """``{"class", "config", "generation_config"}`` of a model whose class is transformers' own; None for others."""
    kind = type(model)
    config: Any = getattr(model, "config", None)
    if not kind.__module__.startswith(PACKAGE + ".") or not hasattr(config, "to_json_string"):
        return None
    row: dict[str, Any] = {
        "class": kind.__name__,
        "config_class": type(config).__name__,
        "config": json.loads(config.to_json_string(use_diff=False)),
        "generation_config": None,
    }
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        row["generation_config"] = json.loads(generation.to_json_string(use_diff=False))
    return row


def shell_from_json(row: Any, training: bool) -> nn.Module:
    """Undoes :func:`shell_to_json`; a plain module for None.

    Only public model classes of transformers are looked up, nothing else is run. Raises
    :class:`~tilewright.runtime.errors.SaveError` for a class that this transformers does not have.
    """
    if row is None:
        return nn.Module().train(training)
    try:
        package = importlib.import_module(PACKAGE)
    except ImportError as error:
        raise SaveError(f"the model is one of transformers, and {error}: pip install 'tilewright[hf]'") from error
    kind, config = (_class(package, row[name], base) for name, base in _BASES)
    shell: Any = object.__new__(kind)
    nn.Module.__init__(shell)
    shell.training = training
    shell.config = config.from_dict(row["config"])
    shell.warnings_issued = {}
    if row["generation_config"] is not None:
        shell.generation_config = package.GenerationConfig.from_dict(row["generation_config"])
    return shell


_BASES = (("class", "PreTrainedModel"), ("config_class", "PretrainedConfig"))


def _class(package: Any, name: Any, base: str) -> Any:
    found = getattr(package, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not isinstance(found, type) or not issubclass(found, getattr(package, base)):
        raise SaveError(f"this transformers ({package.__version__}) has no {base} named {name!r}")
    return found


def with_signature(call: Callable[..., Any], signature: inspect.Signature) -> Any:
    """A function that is ``call`` and has a signature of a model's forward, but nothing of the model."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    made: Any = forward
    made.__signature__ = signature
    return made


def generate(
    model: nn.Module,
    forward: Callable[..., Any],
    decoder: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    stand_in: torch.Tensor | None = None,
) -> Any:
    """The model's own ``generate``, its steps going through ``forward``.

    decoder: the :class:`CachedProgram` whose cache is used, or None. stand_in: has the dtype and device of weights
    that are gone. Raises :class:`~tilewright.runtime.errors.BadArgument` for a model that has no ``generate``.
    """
    if not callable(getattr(type(model), "generate", None)):
        raise BadArgument(f"{type(model).__name__} has no generate")
    own: dict[str, Any] = {"forward": forward}
    if decoder is not None:
        if len(args) > 1:  # generate(inputs, generation_config, ...)
            kwargs = {"generation_config": args[1]} | kwargs
            args = (args[0], kwargs["generation_config"], *args[2:])
        defaults = getattr(model, "generation_config", None)
        kwargs = decoder.for_generate(kwargs, getattr(defaults, "use_cache", None))
        if len(args) > 1:
            kwargs.pop("generation_config")
        if getattr(defaults, "cache_implementation", None) is not None:
            # A kind of cache that the model asks for by default: it has ours.
            own["generation_config"] = copy.copy(defaults)
            own["generation_config"].cache_implementation = None
    if stand_in is not None:
        own["_parameters"] = {"weight": nn.Parameter(stand_in.new_empty(0), requires_grad=False)}
    # generate() looks helpers up on type(self), so it needs an object of the model's class: one that shares
    # everything with the model but its forward.
    shell: Any = object.__new__(type(model))
    shell.__dict__.update(model.__dict__)
    shell.__dict__.update(own)
    return shell.generate(*args, **kwargs)
