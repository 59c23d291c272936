"""Train a small character-level language model with softmax and with sigmoid attention, from the same weights.

    python examples/train_sigmoid_attention.py --steps 600 --plot loss.png

The text is Python's own help topics (``pydoc_data.topics``), so nothing is downloaded. Both models start from the same
seed and see the same batches. The level to get below is the text's bigram entropy: what the best model reaches that
looks at the current character alone, without attention.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tilewright as tw


class Block(nn.Module):
    """Pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class CharacterModel(nn.Module):
    """tokens (B, L) int64 -> logits (B, L, vocabulary)."""

    def __init__(self, vocabulary: int, context: int, width: int = 96, heads: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@dataclass(frozen=True)
class Text:
    """Character ids for training and, the last tenth, for evaluation; entropies in nats per character."""

    train: Tensor
    held_out: Tensor
    vocabulary: int
    bigram_entropy: float

    @staticmethod
    def load() -> Text:
        text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
        ids = {character: index for index, character in enumerate(sorted(set(text)))}
        data = torch.tensor([ids[character] for character in text])
        singles, pairs = Counter(text[:-1]), Counter(zip(text, text[1:], strict=False))
        entropy = -sum(n * math.log(n / singles[pair[0]]) for pair, n in pairs.items()) / (len(text) - 1)
        cut = len(data) * 9 // 10
        return Text(data[:cut], data[cut:], len(ids), entropy)


def train(model: nn.Module, text: Text, steps: int, batch: int, context: int, rate: float, name: str) -> list[float]:
    """Loss of every step, nats per character. Batches depend on the step alone, not on the model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / warmup, 0.05 + 0.95 * (1 + math.cos(math.pi * min(1.0, i / steps))) / 2),
    )
    draws = torch.Generator().manual_seed(1)
    losses = []
    for step in range(steps):
        starts = torch.randint(len(text.train) - context - 1, (batch, 1), generator=draws)
        window = text.train[starts + torch.arange(context + 1)]
        loss = F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if step % 100 == 99 or step == steps - 1:
            print(f"{name:>8}  step {step + 1:4d}  loss {sum(losses[-50:]) / len(losses[-50:]):.3f}", flush=True)
    return losses


@torch.no_grad()
def evaluate(model: nn.Module, text: Text, context: int, windows: int = 64) -> float:
    """Mean loss on evenly spaced windows of the held-out text."""
    starts = torch.linspace(0, len(text.held_out) - context - 2, windows).long()[:, None]
    window = text.held_out[starts + torch.arange(context + 1)]
    return float(F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten()))


def run(
    steps: int = 600, batch: int = 16, context: int = 64, rate: float = 3e-3, rest: str = "eager", seed: int = 0
) -> dict[str, object]:
    """Train both models and return their losses and the levels to compare them with."""
    text = Text.load()
    result: dict[str, object] = {"uniform": math.log(text.vocabulary), "bigram_entropy": text.bigram_entropy}
    for name in ("softmax", "sigmoid"):
        torch.manual_seed(seed)
        model: nn.Module = CharacterModel(text.vocabulary, context).train()
        trained = model
        if name == "sigmoid":
            example = torch.zeros(batch, context, dtype=torch.int64)
            trained = tw.compile(
                model,
                passes=[tw.passes.SigmoidAttention()],
                example_inputs=(example,),
                target="reference",
                rest=rest,
                strict=True,
            )
            print(trained.report)
        start = time.perf_counter()
        losses = train(trained, text, steps, batch, context, rate, name)
        seconds = time.perf_counter() - start
        result[name] = {"losses": losses, "held_out": evaluate(trained, text, context), "seconds": round(seconds, 1)}
    return result


def plot(result: dict[str, object], path: Path) -> None:
    """Loss curves, a running mean of 20 steps over the raw losses, and the two levels."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    for name, color in (("softmax", "tab:blue"), ("sigmoid", "tab:orange")):
        curve = result[name]
        losses = torch.tensor(curve["losses"])
        axes.plot(losses, color=color, alpha=0.2, linewidth=0.8)
        span = min(20, len(losses))
        smooth = losses.unfold(0, span, 1).mean(-1)
        label = f"{name} attention (held out {curve['held_out']:.3f})"
        axes.plot(range(span - 1, len(losses)), smooth, color=color, label=label)
    for level, label in (("uniform", "uniform guess"), ("bigram_entropy", "bigram entropy: best without attention")):
        axes.axhline(result[level], color="gray", linestyle="--" if level == "uniform" else ":", linewidth=1)
        text = f"{label}, {result[level]:.2f}"
        axes.annotate(text, (0.99, result[level]), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    axes.set(xlabel="step", ylabel="loss (nats per character)", title="Same initial weights, same batches")
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--rest", choices=["eager", "inductor"], default="eager", help="what runs the rest of the graph"
    )
    parser.add_argument("--plot", type=Path, default=Path("train_sigmoid_attention.png"))
    parser.add_argument("--json", type=Path, help="write losses and levels to this file")
    given = parser.parse_args()
    result = run(given.steps, rest=given.rest, seed=given.seed)
    print(f"uniform guess {result['uniform']:.3f}, bigram entropy {result['bigram_entropy']:.3f} nats per character")
    for name in ("softmax", "sigmoid"):
        curve = result[name]
        last = curve["losses"][-50:]
        print(
            f"{name:>8}: last 50 steps {sum(last) / len(last):.3f}, held out {curve['held_out']:.3f}, "
            f"{curve['seconds']} s of training"
        )
    plot(result, given.plot)
    print(f"loss curves: {given.plot}")
    if given.json:
        given.json.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
