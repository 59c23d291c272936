"""What the suites of whole models share: the bundled models, their inputs, and ways to run them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...frontend.models import BUNDLED, LoadedModel, load_model
from ...frontend.text import evaluation_text
from ...runtime.errors import MissingDependency, UnknownModel
from ..harness import Bound, Skip
from ..measure import Call
from ..peers import call_model, inductor

# Hidden states and logits against the float32 eager model; bfloat16 rounds the weights, too.
BOUND = {torch.float32: Bound(1e-3, largest=True), torch.bfloat16: Bound(1e-1, largest=True)}


@functools.lru_cache(maxsize=4)
def loaded(name: str, dtype: torch.dtype) -> LoadedModel:
    """The bundled model; :class:`Skip` with the remedy when its package is missing."""
    try:
        import transformers

        transformers.utils.logging.set_verbosity_error()  # its remarks would stand between the tables
        return load_model(name, dtype=dtype)
    except (ImportError, UnknownModel, MissingDependency) as error:
        raise Skip(str(error)) from error


def encoder_inputs(name: str, batch: int, length: int) -> dict[str, Any]:
    """Real text; in a batch the sequences have half to all of ``length`` tokens, the rest is padding."""
    tokenizer = loaded(name, torch.float32).tokenizer
    ids = tokenizer(evaluation_text()[: 12 * batch * length], add_special_tokens=False, verbose=False)["input_ids"]
    tokens = torch.tensor(ids[: batch * length]).reshape(batch, length)
    lengths = torch.linspace(length, length // 2, batch).long() if batch > 1 else torch.tensor([length])
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"input_ids": tokens * mask, "attention_mask": mask}


def decoder_inputs(name: str, length: int) -> dict[str, Any]:
    """One sequence; logits of its last token only, as ``generate`` computes them."""
    tokenizer = loaded(name, torch.float32).tokenizer
    ids = tokenizer(evaluation_text()[: 12 * length], add_special_tokens=False, verbose=False)["input_ids"]
    return {"input_ids": torch.tensor(ids[:length])[None], "use_cache": False, "logits_to_keep": 1}


def model_inputs(name: str, batch: int, length: int) -> dict[str, Any]:
    return encoder_inputs(name, batch, length) if BUNDLED[name].kind == "encoder" else decoder_inputs(name, length)


def eager(model: torch.nn.Module, kwargs: dict[str, Any]) -> Call:
    return call_model(model, kwargs)


def compiled(model: torch.nn.Module, kwargs: dict[str, Any], freezing: bool = False) -> Call:
    return call_model(inductor(model, freezing=freezing), kwargs)


def ours(model: torch.nn.Module, kwargs: dict[str, Any]) -> Call:
    """Exact passes only: raised ops on our kernels, the rest in Inductor, sizes fixed as for the peers."""
    from ...frontend.compile import compile

    return call_model(compile(model, [], example_kwargs=kwargs, dynamic_shapes=static(kwargs)), kwargs)


def static(kwargs: dict[str, Any]) -> dict[str, Any]:
    """``torch.export``'s way to say that no size varies."""
    return {name: {} if isinstance(value, Tensor) else None for name, value in kwargs.items()}


def parameter_bytes(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def operations(model: torch.nn.Module, kwargs: dict[str, Any]) -> int:
    """Multiplications and additions of one call, counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(**kwargs)
    return counter.get_total_flops()


def gguf_file(name: str) -> Path:
    """The bundled model's GGUF, or :class:`Skip`."""
    import importlib.util

    bundled = BUNDLED[name]
    found = importlib.util.find_spec(bundled.module)
    if found is None or not found.submodule_search_locations or not bundled.gguf:
        raise Skip(f"the model {name} comes in a package that is not installed: {bundled.install}")
    return Path(next(iter(found.submodule_search_locations))) / bundled.folder / bundled.gguf
