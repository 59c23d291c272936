"""Bytes of KV cache a token, as allocated, of four models and four ways to keep it.

    python -m tilewright.benchmarks.cache_bytes --output benchmarks/results/quality/cache_bytes.json

SmolLM2 with its weights; GPT-2 small, Llama-7B and Mistral-7B by their shapes with random weights, the two large ones
with LAYERS of their 32 layers: every layer's cache is alike, and the page multiplies. Models are in bfloat16. Nothing
is calibrated: the rank decides the bytes, whatever the factors. A cache is allocated for one sequence and its tensors'
bytes are counted; what does not grow with the tokens (rings of newest tokens) is counted apart.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..frontend.compile import compile
from ..frontend.models import load_model
from ..passes import FactorKeys, KVCache, Pass, QuantizeKV
from . import machine

LAYERS = 1
LENGTH = 1024
# Name: (layers of the whole model, layers measured, channels of all its keys, the model).
Model = tuple[int, int, int, Callable[[], torch.nn.Module]]


def _random(config: str, model: str, **sizes: Any) -> torch.nn.Module:
    import transformers

    torch.manual_seed(0)
    made: torch.nn.Module = getattr(transformers, model)(getattr(transformers, config)(**sizes))
    return made.to(torch.bfloat16).eval()


def _llama(key_heads: int, **more: Any) -> torch.nn.Module:
    kind = "Mistral" if more else "Llama"
    return _random(
        f"{kind}Config",
        f"{kind}ForCausalLM",
        vocab_size=256,  # no part of the cache
        hidden_size=4096,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        num_key_value_heads=key_heads,
        **more,
    )


MODELS: dict[str, Model] = {
    "SmolLM2-135M": (30, 30, 192, lambda: load_model("smollm2", dtype=torch.bfloat16).model),
    "GPT-2 small": (12, 12, 768, lambda: _random("GPT2Config", "GPT2LMHeadModel", bos_token_id=0, eos_token_id=0)),
    "Llama-7B": (32, LAYERS, 4096, lambda: _llama(32)),
    "Mistral-7B": (32, LAYERS, 1024, lambda: _llama(8, sliding_window=4096)),
}


def ways(channels: int) -> dict[str, list[Pass]]:
    """A quarter of the keys' channels is the rank. Name -> the passes behind KVCache."""
    thin: Pass = FactorKeys(rank=channels // 4, weighting="none")
    return {"whole": [], "keys at d/4": [thin], "4 bits": [QuantizeKV(bits=4)], "both": [thin, QuantizeKV(bits=4)]}


def measure(name: str) -> list[dict[str, Any]]:
    """A row for each way: bytes of keys and of values a token, over all layers, and what does not grow."""
    whole, layers, channels, make = MODELS[name]
    model, rows = make(), []
    for way, passes in ways(channels).items():
        compiled = compile(
            model, [KVCache(max_length=LENGTH), *passes], rest="eager", target="reference", validate=False
        )
        cache = compiled.new_cache()
        compiled(input_ids=torch.zeros(1, 1, dtype=torch.int64), past_key_values=cache)
        assert cache.state is not None
        found = {"k": 0, "v": 0, "fixed": 0}
        names = [part for site in cache.state.sites for part in site.names()]
        for part, grows, tensor in zip(names, cache.state.grows, cache.state.flat, strict=True):
            found[part[0] if grows else "fixed"] += tensor.nbytes
        scale = whole / layers
        rows.append(
            {
                "model": name,
                "way": way,
                "layers": whole,
                "layers_measured": layers,
                "key_bytes": found["k"] * scale / LENGTH,
                "value_bytes": found["v"] * scale / LENGTH,
                "fixed_bytes": found["fixed"] * scale,
            }
        )
        print(rows[-1], flush=True)
    return rows


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tilewright.benchmarks.cache_bytes", description=__doc__)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    rows = [row for name in MODELS for row in measure(name)]
    study = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "versions": machine.versions(),
        "commit": machine.commit(),
        "rows": rows,
    }
    if options.output:
        options.output.write_text(json.dumps(study, indent=1) + "\n", encoding="utf-8")
    return 0


def table(study: dict[str, Any]) -> str:
    """Markdown: bytes a token over all layers, and how often the whole cache is larger."""
    lines = [
        "| model | cache | keys, bytes a token | values | all | whole / this | keys saved | fixed |",
        "|" + " --- |" * 8,
    ]
    base: dict[str, Any] = {}
    for row in study["rows"]:
        base = row if row["way"] == "whole" else base
        everything, before = (one["key_bytes"] + one["value_bytes"] for one in (row, base))
        saved = 100 * (1 - row["key_bytes"] / base["key_bytes"])
        cells = [
            row["model"],
            row["way"],
            f"{row['key_bytes']:,.0f}",
            f"{row['value_bytes']:,.0f}",
            f"{everything:,.0f}",
        ]
        cells += [f"{before / everything:.2f}x", f"{saved:.1f} %", f"{row['fixed_bytes'] / 1024:,.0f} KiB"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
