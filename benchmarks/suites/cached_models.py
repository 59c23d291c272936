"""SmolLM2 at batch 1 with an inserted KV cache on the CPU: prefill and decode, whole, factored, quantized, both.

A decode call feeds 16 given tokens, one at a time, behind a prompt of 128 or 4,096; a prefill call feeds the prompt to
an empty cache. Beside transformers, eager and compiled with its static cache. Whole caches are compared with the
float32 model; compressed ones are other functions, whose error is measured by ``tilewright.benchmarks.kv_quality``:
here they are only held to give logits of the right size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...passes import FactorKeys, KVCache, Pass, QuantizeKV
from ..harness import Bound, Case, Contender, Problem, Suite
from ..machine import dtype_name
from ..measure import Call, Limits
from ..peers import first_tensor, inductor
from ..record import Kind
from . import _models

STEPS, CAPACITY, CALIBRATION = 16, 4608, 512
PROMPTS = (128, 4096)
OTHER = Bound(3.0, largest=True)
VARIANTS: dict[str, Callable[[], list[Pass]]] = {
    "whole": list,
    "keys at rank 96": lambda: [FactorKeys(rank=96)],
    "4 bits": lambda: [QuantizeKV(bits=4)],
    "rank 96, 4 bits": lambda: [FactorKeys(rank=96), QuantizeKV(bits=4)],
}


@functools.lru_cache(maxsize=8)
def compiled(variant: str, dtype: torch.dtype) -> Any:
    """Ours, with a cache of CAPACITY tokens. Calibrated on text behind what the rows feed."""
    from ...frontend.compile import compile

    tokens = _models.decoder_inputs("smollm2", 2 * CAPACITY)["input_ids"][:, CAPACITY:]
    batches = [{"input_ids": block} for block in tokens.split(CALIBRATION, dim=1)[:8]]
    passes: list[Pass] = [KVCache(max_length=CAPACITY), *VARIANTS[variant]()]
    return compile(_models.loaded("smollm2", dtype).model, passes, calibration=batches, validate=False)


def peer_cache(model: Any, static: bool) -> Any:
    from transformers import DynamicCache, StaticCache

    return StaticCache(config=model.config, max_cache_len=CAPACITY) if static else DynamicCache()


class Decode:
    """The prompt is in the cache; a call feeds the steps' tokens and gives their logits (1, STEPS, V)."""

    def __init__(self, forward: Any, prefill: Any, tokens: Tensor, prompt: int, cache: Any) -> None:
        self.forward, self.cache, self.prompt = forward, cache, prompt
        self.tokens = [tokens[:, prompt + i : prompt + i + 1] for i in range(STEPS)]
        out = prefill(input_ids=tokens[:, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values

    def __call__(self) -> Tensor:
        rewind(self.cache, self.prompt)
        steps = [self.forward(input_ids=t, past_key_values=self.cache, use_cache=True) for t in self.tokens]
        return torch.cat([first_tensor(out) for out in steps], dim=1)


def rewind(cache: Any, length: int) -> None:
    """The cache as it was with ``length`` tokens; transformers' static one has no way to ask for it."""
    if type(cache).__name__ == "StaticCache":
        for layer in cache.layers:
            layer.cumulative_length.fill_(length)
    elif extra := cache.get_seq_length() - length:
        cache.crop(-extra)


def decode(dtype: torch.dtype, prompt: int) -> Problem:
    model: Any = _models.loaded("smollm2", dtype).model
    exact: Any = _models.loaded("smollm2", torch.float32).model
    tokens = _models.decoder_inputs("smollm2", prompt + STEPS)["input_ids"]

    def peer(forward: Any, static: bool) -> Call:
        return Decode(forward, model, tokens, prompt, peer_cache(model, static))

    def own(variant: str) -> Call:
        made = compiled(variant, dtype)
        return Decode(made, made, tokens, prompt, None)

    return Problem(
        "whole",
        [
            Contender("eager", Kind.PEER, make=lambda: peer(model, static=False)),
            Contender("compile", Kind.PEER, make=lambda: peer(inductor(model), static=True)),
            *contenders(own),
        ],
        lambda: first_tensor(exact(input_ids=tokens, use_cache=False, logits_to_keep=STEPS)),
        _models.BOUND[dtype],
        bytes=STEPS * _models.parameter_bytes(model),
        working_set=_models.parameter_bytes(model),
        traffic="read",
        items=STEPS,
        item="tokens",
        note="floor: every weight read once a token",
    )


def contenders(make: Callable[[str], Call]) -> list[Contender]:
    return [
        Contender(
            variant,
            Kind.OURS,
            make=functools.partial(make, variant),
            bound=None if variant == "whole" else OTHER,
        )
        for variant in VARIANTS
    ]


def prefill(dtype: torch.dtype, prompt: int) -> Problem:
    model: Any = _models.loaded("smollm2", dtype).model
    exact: Any = _models.loaded("smollm2", torch.float32).model
    tokens = _models.decoder_inputs("smollm2", prompt)["input_ids"]

    def feed(forward: Any, cache: Callable[[], Any]) -> Call:
        held = [cache()]

        def call() -> Tensor:
            if held[0] is not None:
                rewind(held[0], 0)
            out = forward(input_ids=tokens, past_key_values=held[0], use_cache=True, logits_to_keep=1)
            held[0] = out.past_key_values
            return first_tensor(out)

        return call

    return Problem(
        "whole",
        [
            Contender("eager", Kind.PEER, make=lambda: feed(model, lambda: peer_cache(model, static=False))),
            Contender("compile", Kind.PEER, make=lambda: feed(inductor(model), lambda: peer_cache(model, static=True))),
            *contenders(lambda variant: feed(compiled(variant, dtype), lambda: None)),
        ],
        lambda: first_tensor(exact(input_ids=tokens, use_cache=False, logits_to_keep=1)),
        _models.BOUND[dtype],
        bytes=_models.parameter_bytes(model),
        flops=_models.operations(exact, {"input_ids": tokens, "use_cache": False, "logits_to_keep": 1}),
        traffic="read",
        dtype=dtype_name(dtype),
        items=prompt,
        item="tokens",
    )


def cases() -> list[Case]:
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        for kind, make in (("decode", decode), ("prefill", prefill)):
            for prompt in PROMPTS if kind == "decode" else (512, 2048):
                found.append(
                    Case(
                        f"{kind}/{dtype_name(dtype)}/{prompt}",
                        {"work": kind, "dtype": dtype_name(dtype), "prompt": prompt},
                        functools.partial(make, dtype, prompt),
                        quick=(kind, prompt, dtype) == ("decode", 128, torch.bfloat16),
                        limits=Limits(seconds=12.0, least_rounds=3, most_rounds=9),
                    )
                )
    return found


SUITE = Suite(
    "cached-models",
    "SmolLM2 with an inserted KV cache at batch 1, whole, factored and quantized: prefill and decode.",
    cases,
    headline=("decode/*", "prefill/*"),
    compare=(("eager", "whole"), ("compile", "whole"), ("whole", "rank 96, 4 bits")),
    plot_panels=("work", "dtype"),
)
