"""What thin keys cost SmolLM2 in perplexity, and what a short tuning of queries and keys gives back.

    python -m tilewright.benchmarks.thin_keys --work DIR --rank 96 --rank 48                # untrained: minutes
    python -m tilewright.benchmarks.thin_keys --work DIR --rank 0 --rank 96 --rank 48 --tune 900     # seconds each

Rank 0 is the model with whole keys. Perplexity is that of the first 8 x 1,024 tokens of ``pydoc_data.topics``, by a
model with a KV cache, float32. Factors are calibrated on other blocks of that text, and ``--tune SECONDS`` trains the
factors and the query projections on yet others (``tilewright.tune``), the whole model's query and key projections by
the same steps: text of the same kind lowers perplexity by itself, so a tuned model is to be compared with a tuned one.
Tuning stops after STEPS steps or the seconds, keeps checkpoints in DIR and goes on from them. Results are appended to
DIR/results.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..frontend.compile import compile
from ..frontend.models import LoadedModel, load_model
from ..frontend.text import perplexity, token_blocks
from ..frontend.tune import tune
from ..passes import Builder, Decline, Exactness, FactorKeys, KVCache, Pass, Rewrite, SiteContext
from ..passes._key_factors import Weighting
from ..passes._key_projection import Projection, constant, find_projection
from ..passes.view import arguments
from . import machine

MODEL, LENGTH, EVALUATED = "smollm2", 1024, 8
CALIBRATED = (12, 20, 28, 36, 44, 76, 84, 92)
"""Blocks of 1,024 tokens; none of them is evaluated or tuned on."""
TUNED = tuple(n for n in range(EVALUATED, 104) if n not in CALIBRATED)
PIECE = 512  # tokens of a step
STEPS, RATE = 200, 5e-4


@dataclass(frozen=True)
class WholeKeys(Pass):
    """The same attention with query and key projections that tuning may change: the yardstick."""

    exactness: ClassVar[Exactness] = Exactness.EXACT
    ops: ClassVar[tuple[str, ...]] = ("cached_attention",)
    after: ClassVar[frozenset[str]] = frozenset({"kv-cache"})

    def rewrite(self, site: SiteContext) -> Rewrite | Decline:
        found = {name: find_projection(site.arg(name)) for name in "qk"}
        missing = [reason for reason in found.values() if isinstance(reason, str)]
        if missing:
            return Decline(missing[0])

        def build(builder: Builder) -> torch.fx.Node:
            changed: dict[str, Any] = {}
            for name, projection in found.items():
                assert isinstance(projection, Projection)
                named = arguments(projection.linear)
                weight = constant(site.view, named["weight"])
                assert weight is not None
                held = builder.parameter(f"{site.site.id}_{name}", weight, group="qk")
                linear = builder.call(projection.linear.target, named["x"], held, named["bias"])
                changed[name] = projection.replay(builder, linear)
            return builder.call(site.node.target, **(arguments(site.node) | changed))

        return Rewrite(build)


def blocks(loaded: LoadedModel, numbers: tuple[int, ...]) -> list[torch.Tensor]:
    every = token_blocks(loaded.tokenizer, max(numbers) + 1, LENGTH)
    return [every[number] for number in numbers]


def compiled_of(loaded: LoadedModel, rank: int, weighting: Weighting) -> Any:
    thin: Pass = WholeKeys() if rank == 0 else FactorKeys(rank=rank, weighting=weighting)
    calibration = [{"input_ids": block} for block in blocks(loaded, CALIBRATED)]
    return compile(
        loaded.model, passes=[KVCache(max_length=LENGTH), thin], calibration=calibration, rest="eager", validate=False
    )


def run(loaded: LoadedModel, rank: int, weighting: Weighting, seconds: float, work: Path) -> dict[str, Any]:
    begin = time.perf_counter()
    model = compiled_of(loaded, rank, weighting)
    row: dict[str, Any] = {"rank": rank, "weighting": weighting, "seconds": round(time.perf_counter() - begin, 1)}
    row["perplexity"] = perplexity(model, loaded.tokenizer, EVALUATED)
    if seconds:
        data = [{"input_ids": piece} for block in blocks(loaded, TUNED) for piece in block.split(PIECE, 1)]
        done = tune(
            model,
            data,
            "qk",
            steps=STEPS,
            lr=RATE,
            optimizer_options={"weight_decay": 0.0, "betas": (0.9, 0.95)},
            seconds=seconds,
            checkpoint=work / f"rank{rank}-{weighting}",
        )
        row |= {"steps": done.steps, "tuning_seconds": done.total_seconds}
        row["tuned_perplexity"] = perplexity(model, loaded.tokenizer, EVALUATED)
    return row


def main(given: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="the folder that keeps checkpoints and results")
    parser.add_argument("--rank", type=int, action="append", required=True, help="0 for whole keys; repeat it")
    parser.add_argument("--weighting", default="scores", choices=("scores", "activations", "none"))
    parser.add_argument("--tune", type=float, default=0.0, help="seconds of tuning in this run; 0 for none")
    options = parser.parse_args(given)
    options.work.mkdir(parents=True, exist_ok=True)
    path = options.work / "results.json"
    loaded = load_model(MODEL)
    for rank in options.rank:
        row = run(loaded, rank, options.weighting, options.tune, options.work)
        rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        rows.append(row | {"versions": machine.versions(), "commit": machine.commit()})
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
