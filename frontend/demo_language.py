"""The demo's second half: a language model's continuation and perplexity before and after each pass, and both doors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ..passes import Pass
from .choices import Rest, Target
from .compile import compile as tilewright_compile
from .compiled import CompiledModule
from .models import LoadedModel
from .pipeline import GraphRecord
from .text import TOKENS_PER_BLOCK, token_blocks, token_losses

PROMPT = "The quick brown fox jumps over the lazy dog. Once upon a time, there was a"
EVALUATED_BLOCKS = 8
"""Blocks 0 to 7 are evaluated; calibration takes the blocks after them."""

ROUNDING = 1e-3
"""Nats: a loss that grows by less is not called worse. float32 rounding moves single losses by about 1e-5."""


@dataclass
class LanguageResult:
    """What one pass did to the language model.

    losses: next-token losses in nats, float32, of all evaluated tokens. continuation: greedy, as text.
    tokens_worse: share of tokens whose loss grew by more than :data:`ROUNDING`, 0 to 1.
    """

    label: str
    losses: torch.Tensor
    tokens_worse: float
    continuation: str
    compiled: CompiledModule
    seconds: float = 0.0

    @property
    def perplexity(self) -> float:
        return perplexity_of(self.losses)

    def to_dict(self) -> dict[str, Any]:
        return {
            "label": self.label,
            "perplexity": self.perplexity,
            "tokens_worse": self.tokens_worse,
            "continuation": self.continuation,
            "seconds": round(self.seconds, 2),
            "report": self.compiled.report.to_dict(),
        }


@dataclass
class DoorResult:
    """Greedy decoding through one door against the eager model. equal, steps: tokens that agree, of how many."""

    door: str
    how: str
    equal: int
    steps: int
    graphs: int
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "seconds": round(self.seconds, 2)}


@dataclass
class LanguageStudy:
    """The language model before, one :class:`LanguageResult` a pass, and the doors."""

    name: str
    prompt: str
    losses: torch.Tensor
    continuation: str
    results: list[LanguageResult] = field(default_factory=list)
    doors: list[DoorResult] = field(default_factory=list)

    @property
    def perplexity(self) -> float:
        return perplexity_of(self.losses)

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.name,
            "prompt": self.prompt,
            "tokens": self.losses.numel(),
            "perplexity_before": self.perplexity,
            "continuation_before": self.continuation,
            "passes": [result.to_dict() for result in self.results],
            "doors": [door.to_dict() for door in self.doors],
        }


def perplexity_of(losses: torch.Tensor) -> float:
    return math.exp(losses.double().mean().item())


def block_length(loaded: LoadedModel) -> int:
    """1024 tokens, or as many as the model takes."""
    limit = getattr(loaded.model.config, "max_position_embeddings", None) or TOKENS_PER_BLOCK
    return min(TOKENS_PER_BLOCK, int(limit))


def evaluation_blocks(loaded: LoadedModel, count: int) -> list[torch.Tensor]:
    return token_blocks(loaded.tokenizer, count, block_length(loaded))


def calibration_blocks(loaded: LoadedModel, count: int) -> list[dict[str, Any]]:
    """Keyword arguments with ``count`` blocks of text that is not evaluated."""
    blocks = token_blocks(loaded.tokenizer, count, block_length(loaded), start=EVALUATED_BLOCKS)
    return [{"input_ids": block, "use_cache": False} for block in blocks]


def losses_with_progress(
    model: Callable[..., Any], blocks: list[torch.Tensor], advance: Callable[[], None]
) -> torch.Tensor:
    """Next-token losses of all blocks; ``advance`` is called after each block."""
    found = []
    with torch.no_grad():
        for losses in token_losses(model, blocks, use_cache=False):
            found.append(losses)
            advance()
    return torch.cat(found)


def greedy(model: Callable[..., Any], ids: torch.Tensor, steps: int) -> torch.Tensor:
    """The ``steps`` likeliest next tokens one after the other, without a cache: int64 (steps,)."""
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(steps):
            logits = model(input_ids=ids, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids[0, start:]


def compile_for(
    loaded: LoadedModel, passes: list[Pass], target: Target, calibration: list[Any], rest: Rest = "eager"
) -> CompiledModule:
    """``tilewright.compile`` through ``torch.export``, with any batch and length."""
    return tilewright_compile(
        loaded.model,
        passes=passes,
        example_kwargs=loaded.kwargs,
        dynamic_shapes=loaded.dynamic_shapes,
        target=target,
        rest=rest,
        calibration=calibration,
    )


def check_doors(
    loaded: LoadedModel, compiled: CompiledModule, passes: list[Pass], target: Target, steps: int
) -> Iterator[DoorResult]:
    """Greedy decoding token for token: the exported model, then transformers' ``generate`` through torch.compile.

    ``passes`` must be those of ``compiled``, and none of them approximate: the tokens are expected to be the same.
    """
    inputs = loaded.tokenizer(PROMPT, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    expected = generate(loaded.model, inputs, steps)[0, length:]
    got = greedy(compiled, inputs["input_ids"], steps)
    yield DoorResult(
        "torch.export", "tilewright.compile, without a cache", int((got == expected).sum()), len(expected), 1
    )

    records: list[GraphRecord] = []
    options: dict[str, Any] = {
        "passes": passes,
        "target": target,
        "rest": "eager",
        "validate": False,
        "on_graph": records.append,
    }
    torch._dynamo.reset()
    # generate() calls the model's own forward, so that is what torch.compile has to replace.
    loaded.model.forward = torch.compile(loaded.model.forward, backend="tilewright", options=options)  # type: ignore[method-assign]
    try:
        got = generate(loaded.model, inputs, steps)[0, length:]
    finally:
        del loaded.model.forward  # the instance's attribute; the class's method shows again
    same = int((got == expected).sum()) if len(got) == len(expected) else 0
    yield DoorResult("torch.compile", "generate(), with a growing cache", same, len(expected), len(records))


def generate(model: Any, inputs: Any, steps: int) -> torch.Tensor:
    """Greedy ``generate`` of exactly ``steps`` new tokens: (1, prompt + steps)."""
    with torch.no_grad():
        return model.generate(
            **inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, pad_token_id=0, use_cache=True
        )
