"""SmolLM2 with the packed weights of its own 4-bit file at batch 1 on the CPU, beside llama.cpp on that very file.

A decode call feeds 16 given tokens, one at a time, behind a prompt of 128; a prefill call feeds 512 to an empty cache.
Ours keeps activations as they are, or rounds each token to 8-bit integers before a layer (``a8``), which is also what
llama.cpp does, by groups of 32. transformers runs the same weights dequantized. All are compared with those in float32.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ...passes import KVCache
from ..harness import Bound, Case, Contender, Problem, Skip, Suite
from ..machine import dtype_name
from ..measure import Call, Limits
from ..peers import first_tensor, inductor, llama_cpp
from ..record import Kind
from . import _models
from .cached_models import STEPS, Decode, peer_cache, rewind
from .decode import GGUF_BOUND, GGUF_BYTES

PROMPT, PREFILL, CAPACITY = 128, 512, 1024
ROUNDED = Bound(0.3, largest=True)


@functools.lru_cache(maxsize=4)
def packed(dtype: torch.dtype, activations: int) -> Any:
    """The file's weights behind our kernels, with a cache of CAPACITY tokens."""
    from ...frontend.compile import compile
    from ...frontend.import_checkpoint import load_quantized

    checkpoint = load_quantized("smollm2", dtype=dtype, activations=activations or None)
    ids = _models.decoder_inputs("smollm2", 32)["input_ids"]
    return compile(checkpoint.model, [KVCache(max_length=CAPACITY)], example_inputs=(ids,), validate=False)


def _llama(tokens: Tensor, prompt: int) -> Call:
    """prompt: tokens that are in the cache; the others are fed one at a time, or all at once without any."""
    import numpy

    model = llama_cpp(_models.gguf_file("smollm2"), torch.get_num_threads(), CAPACITY)
    ids = tokens[0].tolist()
    if prompt:
        model.eval(ids[:prompt])
    fed = [[token] for token in ids[prompt:]] if prompt else [ids]

    def call() -> Tensor:
        model.n_tokens = prompt
        logits = []
        for step in fed:
            model.eval(step)
            logits.append(numpy.ctypeslib.as_array(model._ctx.get_logits(), shape=(model.n_vocab(),)).copy())
        return torch.from_numpy(numpy.stack(logits))[None]

    return call


class Prefill:
    """A call feeds the prompt to an empty cache and gives the last token's logits (1, 1, V)."""

    def __init__(self, forward: Any, tokens: Tensor, cache: Any) -> None:
        self.forward, self.tokens, self.cache = forward, tokens, cache

    def __call__(self) -> Tensor:
        if self.cache is not None:
            rewind(self.cache, 0)
        out = self.forward(input_ids=self.tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        return first_tensor(out)


def problem(work: str, dtype: torch.dtype) -> Problem:
    model: Any = _models.loaded("smollm2", dtype).model
    exact: Any = _models.loaded("smollm2", torch.float32).model
    count = PROMPT + STEPS if work == "decode" else PREFILL
    tokens = _models.decoder_inputs("smollm2", count)["input_ids"]
    keep = STEPS if work == "decode" else 1

    def run(forward: Any, prefill: Any, cache: Any) -> Call:
        if work == "decode":
            return Decode(forward, prefill, tokens, PROMPT, cache)
        return Prefill(forward, tokens, cache)

    def own(activations: int) -> Call:
        made = packed(dtype, activations)
        return run(made, made, None)

    def llama() -> Call:
        if dtype is not torch.float32:
            raise Skip("has no dtype of its own: timed in the float32 rows")
        return _llama(tokens, PROMPT if work == "decode" else 0)

    return Problem(
        "ours",
        [
            Contender("eager", Kind.PEER, make=lambda: run(model, model, peer_cache(model, static=False))),
            Contender("compile", Kind.PEER, make=lambda: run(inductor(model), model, peer_cache(model, static=True))),
            Contender("llama.cpp", Kind.PEER, make=llama, bound=GGUF_BOUND),
            Contender("ours", Kind.OURS, make=lambda: own(0)),
            Contender("ours, a8", Kind.OURS, make=lambda: own(8), bound=ROUNDED),
        ],
        lambda: first_tensor(exact(input_ids=tokens, use_cache=False, logits_to_keep=keep)),
        _models.BOUND[dtype],
        bytes=(STEPS if work == "decode" else 1) * GGUF_BYTES,
        flops=0
        if work == "decode"
        else _models.operations(exact, {"input_ids": tokens, "use_cache": False, "logits_to_keep": 1}),
        working_set=GGUF_BYTES,
        traffic="read",
        dtype=dtype_name(dtype),
        items=STEPS if work == "decode" else PREFILL,
        item="tokens",
        note="floor: the file's bytes read once a token" if work == "decode" else "",
    )


def cases() -> list[Case]:
    return [
        Case(
            f"{work}/{dtype_name(dtype)}",
            {"work": work, "dtype": dtype_name(dtype)},
            functools.partial(problem, work, dtype),
            quick=(work, dtype) == ("decode", torch.float32),
            limits=Limits(seconds=15.0, least_rounds=5, most_rounds=11),
        )
        for work in ("decode", "prefill")
        for dtype in (torch.float32, torch.bfloat16)
    ]


SUITE = Suite(
    "quantized-models",
    "SmolLM2 from its own 4-bit file at batch 1: prefill and decode beside llama.cpp on the same file.",
    cases,
    headline=("decode/*", "prefill/*"),
    compare=(("ours", "ours, a8"),),
    plot_panels=("work", "dtype"),
)
