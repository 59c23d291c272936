"""Decoding at batch 1 on the CPU: attention of one query over long keys, and SmolLM2's tokens per second.

A whole-model call feeds 16 given tokens, one at a time, behind a prompt of 128, and its logits are compared with those
of the float32 model fed everything at once. Weights differ: llama.cpp runs the 4-bit file itself.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..harness import Bound, Case, Contender, Problem, Skip, Suite
from ..machine import dtype_name
from ..measure import Call, Limits
from ..peers import first_tensor, inductor, llama_cpp, openvino_decoder
from ..record import Kind
from . import _models
from .attention import BOUND, Sample, ours

PROMPT, STEPS, CONTEXT = 128, 16, 256
GGUF_BYTES, GGUF_BOUND = 92_000_000, Bound(0.2, largest=True)  # its activations are rounded to 8 bits, too
# (keys, query heads, key heads, head dim)
SHAPES = tuple(
    (keys, *heads) for keys in (1024, 4096, 32768, 131072) for heads in ((8, 8, 64), (9, 3, 64), (32, 8, 128))
)


def attention(keys: int, heads: int, key_heads: int, dim: int, dtype: torch.dtype) -> Problem:
    torch.manual_seed(0)
    q = torch.randn(1, heads, 1, dim).to(dtype)
    k, v = (torch.randn(1, key_heads, keys, dim).to(dtype) for _ in range(2))  # as a cache lies in memory
    sample = Sample(q, k, v, None)

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=heads > key_heads)

    return Problem(
        "ours",
        [
            Contender("sdpa", Kind.PEER, sdpa),
            Contender("ours", Kind.OURS, make=lambda: ours(q, k, v, "", "softmax", "cpp", None)),
        ],
        sample.expected,
        BOUND[dtype],
        bytes=sum(t.numel() * t.element_size() for t in (k, v)),
        traffic="read",
    )


class Steps:
    """The model behind a cache that holds the prompt; a call feeds the steps' tokens and gives their logits.

    static: a cache of fixed size, as compiled decoding needs; else one that grows, as eager transformers use.
    """

    def __init__(self, model: Any, forward: Any, tokens: Tensor, static: bool) -> None:
        from transformers import DynamicCache, StaticCache

        self.forward, self.tokens = forward, [tokens[:, PROMPT + i : PROMPT + i + 1] for i in range(STEPS)]
        self.cache: Any = StaticCache(config=model.config, max_cache_len=CONTEXT) if static else DynamicCache()
        self.static = static
        model(input_ids=tokens[:, :PROMPT], past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def __call__(self) -> Tensor:
        if self.static:
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(PROMPT)
        elif extra := self.cache.get_seq_length() - PROMPT:
            self.cache.crop(-extra)
        steps = [self.forward(input_ids=t, past_key_values=self.cache, use_cache=True) for t in self.tokens]
        return torch.cat([first_tensor(out) for out in steps], dim=1)


def _llama(tokens: Tensor) -> Call:
    import numpy

    model = llama_cpp(_models.gguf_file("smollm2"), torch.get_num_threads(), CONTEXT)
    ids = tokens[0].tolist()
    model.eval(ids[:PROMPT])

    def call() -> Tensor:
        model.n_tokens = PROMPT
        logits = []
        for token in ids[PROMPT : PROMPT + STEPS]:
            model.eval([token])
            logits.append(numpy.ctypeslib.as_array(model._ctx.get_logits(), shape=(model.n_vocab(),)).copy())
        return torch.from_numpy(numpy.stack(logits))[None]

    return call


def decode(dtype: torch.dtype) -> Problem:
    model: Any = _models.loaded("smollm2", dtype).model
    exact: Any = _models.loaded("smollm2", torch.float32).model
    tokens = _models.decoder_inputs("smollm2", PROMPT + STEPS)["input_ids"]

    def own() -> Call:
        return Steps(model, torch.compile(model, backend="tilewright", dynamic=False), tokens, static=True)

    def llama() -> Call:
        if dtype is not torch.float32:
            raise Skip("runs the 4-bit file, timed in the float32 row")
        return _llama(tokens)

    def openvino() -> Call:
        from transformers import DynamicCache

        cache: Any = DynamicCache()
        exact(input_ids=tokens[:, :PROMPT], past_key_values=cache, use_cache=True, logits_to_keep=1)
        past = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
        return openvino_decoder(exact, past, tokens[:, PROMPT:], precision, torch.get_num_threads())

    return Problem(
        "ours",
        [
            Contender("eager", Kind.PEER, make=lambda: Steps(model, model, tokens, static=False)),
            Contender("compile", Kind.PEER, make=lambda: Steps(model, inductor(model), tokens, static=True)),
            Contender(
                "compile, frozen",
                Kind.PEER,
                make=lambda: Steps(model, inductor(model, freezing=True), tokens, static=True),
            ),
            Contender("openvino", Kind.PEER, make=openvino),
            Contender("llama.cpp, 4-bit", Kind.CONTEXT, make=llama, bytes=STEPS * GGUF_BYTES, bound=GGUF_BOUND),
            Contender("ours", Kind.OURS, make=own),
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


def cases() -> list[Case]:
    found = [
        Case(
            f"attention/{dtype_name(dtype)}/{keys}x{heads}-{key_heads}x{dim}",
            {"dtype": dtype_name(dtype), "keys": keys, "heads": heads, "key_heads": key_heads, "dim": dim},
            functools.partial(attention, keys, heads, key_heads, dim, dtype),
            quick=(keys, heads) in ((4096, 8), (32768, 8), (32768, 9)),
        )
        for dtype in (torch.float32, torch.bfloat16)
        for keys, heads, key_heads, dim in SHAPES
    ]
    for dtype in (torch.float32, torch.bfloat16):
        params = {"model": "smollm2", "dtype": dtype_name(dtype), "prompt": PROMPT, "tokens": STEPS}
        limits = Limits(seconds=12.0, least_rounds=3, most_rounds=9)
        name = f"smollm2/{dtype_name(dtype)}"
        found.append(Case(name, params, functools.partial(decode, dtype), dtype is torch.float32, limits))
    return found


SUITE = Suite(
    "decode",
    "Batch 1: attention of one query over 1,024 to 131,072 keys, and SmolLM2's tokens per second.",
    cases,
    headline=("attention/*/32768x8-8x64", "smollm2/*"),
    compare=(("ours", "llama.cpp, 4-bit"),),
    plot_panels=("dtype", "heads"),
)
