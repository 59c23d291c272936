"""The demo's first half: a sentence encoder's similarities before and after each pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..passes import Pass
from .choices import Target
from .compile import compile as tilewright_compile
from .compiled import CompiledModule
from .models import LoadedModel
from .text import evaluation_text

SENTENCES = (
    "A man is eating food.",
    "Someone is having a meal.",
    "The girl plays the violin on stage.",
    "A young musician performs at a concert.",
    "The stock market fell sharply today.",
    "Shares lost much of their value this afternoon.",
)
"""Three pairs that mean nearly the same: each sentence's nearest neighbour is its pair."""


@dataclass
class SentenceResult:
    """What one pass did to the encoder.

    similarity: (S, S) cosines of the sentence embeddings, float32. max_change: largest change of one of them.
    same_nearest: how many of the S sentences keep their nearest neighbour.
    """

    label: str
    similarity: torch.Tensor
    max_change: float
    same_nearest: int
    compiled: CompiledModule
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "label": self.label,
            "similarity": [[round(float(x), 6) for x in row] for row in self.similarity],
            "max_change": self.max_change,
            "same_nearest": self.same_nearest,
            "seconds": round(self.seconds, 2),
            "report": self.compiled.report.to_dict(),
        }


@dataclass
class SentenceStudy:
    """The encoder before, and one :class:`SentenceResult` a pass."""

    name: str
    sentences: tuple[str, ...]
    before: torch.Tensor
    results: list[SentenceResult] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.name,
            "sentences": list(self.sentences),
            "before": [[round(float(x), 6) for x in row] for row in self.before],
            "passes": [result.to_dict() for result in self.results],
        }


def similarities(model: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cosines (S, S) between the mean-pooled token embeddings of S sentences, float32."""
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state.float()
    keep = inputs["attention_mask"][..., None].float()
    embeddings = torch.nn.functional.normalize((hidden * keep).sum(1) / keep.sum(1), dim=-1)
    return embeddings @ embeddings.T


def nearest(similarity: torch.Tensor) -> torch.Tensor:
    """Index of each sentence's nearest other sentence."""
    return similarity.masked_fill(torch.eye(len(similarity), dtype=torch.bool), -2.0).argmax(-1)


def calibration_batches(tokenizer: Any, count: int, size: int = 8) -> list[dict[str, torch.Tensor]]:
    """``count`` batches of ``size`` sentences of the evaluation text; none of them is in :data:`SENTENCES`."""
    text = " ".join(evaluation_text().split())
    sentences = [s.strip() + "." for s in text.split(". ") if 40 <= len(s) <= 160][: count * size]
    chunks = (sentences[i : i + size] for i in range(0, len(sentences), size))
    return [dict(tokenizer(chunk, return_tensors="pt", padding=True)) for chunk in chunks]


def compare(
    loaded: LoadedModel, label: str, passes: list[Pass], before: torch.Tensor, target: Target, calibration: list[Any]
) -> SentenceResult:
    """Compile the encoder with ``passes`` and measure what the sentences' similarities become."""
    inputs = dict(loaded.tokenizer(list(SENTENCES), return_tensors="pt", padding=True))
    compiled = tilewright_compile(
        loaded.model,
        passes=passes,
        example_kwargs=inputs,
        dynamic_shapes=loaded.dynamic_shapes,
        target=target,
        rest="eager",
        calibration=calibration,
    )
    after = similarities(compiled, inputs)
    same = int((nearest(after) == nearest(before)).sum())
    return SentenceResult(label, after, float((after - before).abs().max()), same, compiled)
