"""How a decoder is captured for a cache, and how its calls are read.

The graph is captured without a cache on inputs we choose: token ids (B, L), the padding mask, positions, and the rows
to compute logits for as an index tensor, each where ``forward`` has it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..runtime.errors import BadArgument, BadExampleInputs
from .inputs import by_name

SAMPLE = (2, 16)
"""Sequences and tokens of the inputs we make when there are none."""
# What a call may say besides tensors, and what a compiled decoder does about it.
_IGNORED = frozenset({"cache_position", "use_cache", "return_dict", "past_key_values", "labels", "num_items_in_batch"})
_REFUSED = ("output_attentions", "output_hidden_states", "inputs_embeds")


@dataclass
class DecodeCall:
    """One call, read. tensors: by name. keep: logits_to_keep. loss: labels and what its function is given, or empty."""

    tensors: dict[str, Any]
    cache: Any = None
    use_cache: bool | None = None
    keep: Any = 0
    return_dict: bool | None = None
    loss: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DecodeForm:
    """How one decoder is called.

    tokens: the input that holds token ids. parameters: forward's, in order. constants: other arguments it was captured
    with. vocabulary: number of token ids. keeps_logits, has_positions, has_mask: what forward takes.
    extra: further tensors of the example inputs.
    """

    tokens: str
    parameters: tuple[str, ...]
    constants: Mapping[str, Any]
    vocabulary: int
    has_mask: bool
    has_positions: bool
    keeps_logits: bool
    takes_use_cache: bool
    extra: tuple[str, ...] = ()

    @staticmethod
    def of(model: torch.nn.Module, named: Mapping[str, Any]) -> DecodeForm:
        """named: example inputs, perhaps none. Raises :class:`BadExampleInputs`."""
        signature = inspect.signature(model.forward)
        parameters = tuple(signature.parameters)
        if not parameters:
            raise BadExampleInputs(f"{type(model).__name__}.forward takes no token ids")
        tokens = "input_ids" if "input_ids" in parameters else parameters[0]
        get_embedding: Any = getattr(model, "get_input_embeddings", None)
        embedding: Any = get_embedding() if callable(get_embedding) else None
        if embedding is None:
            embedding = next((m for m in model.modules() if isinstance(m, torch.nn.Embedding)), None)
        vocabulary = int(getattr(embedding, "num_embeddings", 0))
        ids = named.get(tokens)
        if ids is not None and not (isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point()):
            raise BadExampleInputs(f"{tokens} must be token ids of shape (batch, tokens)")
        if not vocabulary:
            if ids is None:
                raise BadExampleInputs("the model has no embedding to draw token ids from: give example_inputs")
            vocabulary = int(ids.max()) + 1
        known = {tokens, "attention_mask", "position_ids", "logits_to_keep"} | _IGNORED
        extra = tuple(n for n, v in named.items() if n not in known and isinstance(v, Tensor))
        constants = {n: v for n, v in named.items() if n not in known and not isinstance(v, Tensor) and v is not None}
        for name in _REFUSED:
            if named.get(name) is not None and named.get(name) is not False:
                raise BadExampleInputs(f"a module with a KV cache does not take {name}")
        return DecodeForm(
            tokens,
            parameters,
            constants,
            vocabulary,
            "attention_mask" in parameters,
            "position_ids" in parameters,
            "logits_to_keep" in parameters,
            "use_cache" in parameters,
            extra,
        )

    def example(self, model: torch.nn.Module, device: torch.device | None = None) -> dict[str, Any]:
        """Random token ids of :data:`SAMPLE`, with all that goes with them."""
        if device is None:
            device = next((p.device for p in model.parameters()), torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.vocabulary, SAMPLE, generator=generator).to(device)
        named: dict[str, Any] = {self.tokens: ids}
        return self.complete(named)

    def complete(self, named: Mapping[str, Any], keep: Any = 0) -> dict[str, Any]:
        """The arguments a graph is captured with and called with as a whole, by name in forward's order."""
        ids = named[self.tokens]
        batch, count = ids.shape
        found: dict[str, Any] = {self.tokens: ids}
        mask = named.get("attention_mask")
        if self.has_mask:
            found["attention_mask"] = torch.ones_like(ids) if mask is None else mask
        if self.has_positions:
            positions = named.get("position_ids")
            if positions is None:
                positions = torch.arange(count, device=ids.device).expand(batch, count)
                if mask is not None and mask.dim() == 2:
                    positions = ((mask != 0).cumsum(1) - 1).clamp_min(0)
            found["position_ids"] = positions.expand(batch, count).contiguous()
        if self.keeps_logits:
            keep = named.get("logits_to_keep", keep)
            if not isinstance(keep, Tensor):
                keep = torch.arange(count - keep if 0 < keep < count else 0, count, device=ids.device)
            found["logits_to_keep"] = keep
        if self.takes_use_cache:
            found["use_cache"] = False
        found |= {name: named[name] for name in self.extra if name in named}
        found |= self.constants
        order = {name: place for place, name in enumerate(self.parameters)}
        return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))

    def captured(self, model: torch.nn.Module, named: Mapping[str, Any]) -> dict[str, Any]:
        """The example inputs in the form to capture: at least two sequences of some tokens, so that sizes stay open."""
        if named.get(self.tokens) is None:
            return self.example(model)
        ids = named[self.tokens]
        whole = self.complete(named)
        if ids.shape[0] > 1 and ids.shape[1] > 2:
            return whole
        rows, columns = max(1, 2 // max(1, ids.shape[0])), -(-SAMPLE[1] // max(1, ids.shape[1]))
        if ids.shape[1] > 2:
            return {n: _stack(t, rows, ids.shape[0]) if n != "logits_to_keep" else t for n, t in whole.items()}
        if self.extra:
            raise BadExampleInputs(f"give example inputs of at least 3 tokens a sequence, not {ids.shape[1]}")
        return self.complete({self.tokens: ids.repeat(2, columns)[:, : SAMPLE[1]]})

    def cut(self, name: str, value: Any, rows: int, start: int, count: int) -> Any:
        """An argument of :meth:`example` for tokens ``start .. start + count`` of the first ``rows`` sequences."""
        if name == "logits_to_keep":
            return torch.arange(count, device=value.device)
        return value[:rows, start : start + count] if isinstance(value, Tensor) and value.dim() == 2 else value

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> DecodeCall:
        """A call's arguments. Raises :class:`~tilewright.runtime.errors.BadArgument` for those it cannot follow."""
        if args:
            named = dict(zip(self.parameters, args, strict=False))
            if len(args) > len(self.parameters) or named.keys() & kwargs.keys():
                raise BadArgument("the call does not fit the model's signature")
            named.update(kwargs)
        else:
            named = dict(kwargs)
        ids = named.get(self.tokens)
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise BadArgument(f"the call needs {self.tokens}: token ids of shape (batch, tokens)")
        if not ids.shape[1] or not ids.shape[0]:
            raise BadArgument(f"{self.tokens} has shape {tuple(ids.shape)}: there must be a token")
        call = DecodeCall({self.tokens: ids})
        labels = None
        for name, value in named.items():
            if value is None or name in ("cache_position", self.tokens):
                continue
            if name in ("attention_mask", "position_ids") or name in self.extra:
                call.tensors[name] = value
            elif name == "past_key_values":
                call.cache = value
            elif name == "use_cache":
                call.use_cache = bool(value)
            elif name == "logits_to_keep":
                call.keep = value
            elif name == "return_dict":
                call.return_dict = bool(value)
            elif name == "labels":
                labels = value
            elif name == "num_items_in_batch":
                call.loss[name] = value
            elif name in self.constants and self.constants[name] == value:
                continue
            elif value is not False or isinstance(value, Tensor):
                raise BadArgument(f"a module with a KV cache was not compiled for {name}={_brief(value)}")
        if labels is None:
            call.loss = {}
        else:
            call.loss["labels"] = labels
        return call

    def with_loss(self, model: torch.nn.Module, out: Any, call: DecodeCall) -> Any:
        """The output with the loss that the model itself would compute."""
        function = getattr(model, "loss_function", None)
        logits = getattr(out, "logits", None)
        if function is None or logits is None:
            raise BadArgument("the model has no loss_function to give labels to: compute the loss from the logits")
        out["loss"] = function(logits=logits, vocab_size=logits.shape[-1], **call.loss)
        return out


def _stack(value: Any, times: int, batch: int) -> Any:
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == batch:
        return value.repeat(times, *[1] * (value.dim() - 1))
    return value


def _brief(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def named_call(model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by name. Raises :class:`BadExampleInputs` when ``forward`` does not take them."""
    try:
        return by_name(inspect.signature(model.forward).bind_partial(*args, **kwargs))
    except TypeError as error:
        raise BadExampleInputs(f"{type(model).__name__}.forward does not accept the example inputs: {error}") from error
