"""Decoding through a KV cache on the CPU: one step of attention, by how the cache keeps its keys and values.

A call is a whole ``cached_attention_step``: it appends a token and attends to all. torch's attention gets the same keys
and values as plain tensors, already rebuilt and dequantized, and appends nothing. Bytes are what the step has to read
of the cache.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...codegen.cache_format import CacheFormat, is_recent
from ...codegen.cached_attention import CacheAppendSpec
from ...runtime import load, memory
from ...runtime.ops import cache_store
from ..harness import Case, Contender, Problem, Suite
from ..machine import dtype_name
from ..record import Kind
from .attention import BOUND, Sample

DIM, RANK = 64, 128
FORMATS = {
    "whole": CacheFormat(),
    "paged": CacheFormat(page=256),
    "8-bit": CacheFormat(bits_k=8, bits_v=8),
    "4-bit": CacheFormat(bits_k=4, bits_v=4),
    "2-bit": CacheFormat(bits_k=2, bits_v=2),
    "latent": CacheFormat(latent=True, rotate="rotate_half", rotary=DIM),
    "latent, 4-bit": CacheFormat(latent=True, rotate="rotate_half", rotary=DIM, bits_k=4, bits_v=4),
}
# (keys, format, query heads, key heads, queries)
ROWS = tuple((keys, name, 8, 8, 1) for keys in (4096, 32768, 131072) for name in FORMATS)
ROWS += tuple((keys, "whole", 8, 8, 1) for keys in (16384, 65536))
ROWS += tuple((32768, name, *heads) for name in ("whole", "4-bit") for heads in ((9, 3, 1), (32, 8, 1), (8, 8, 4)))
BEHIND = 9
"""Tokens that the step stays behind a multiple of 64: a call that completes a group quantizes it, one in 64 does."""


class Step:
    """A cache of ``keys - BEHIND`` tokens, and a call that appends ``queries`` more and attends.

    exact_keys, exact_values: what the store then holds, whole.
    """

    def __init__(
        self, keys: int, form: CacheFormat, heads: int, key_heads: int, queries: int, dtype: torch.dtype
    ) -> None:
        kept_heads, kept_dim = (1, RANK) if form.latent else (key_heads, DIM)
        self.held = keys - BEHIND
        total = self.held + queries
        self.q = torch.randn(1, heads, queries, DIM).to(dtype)
        k, v = (torch.randn(1, h, total, d).to(dtype) for h, d in ((kept_heads, kept_dim), (key_heads, DIM)))
        pages = -(-keys // form.page) if form.page else 0
        shapes = form.store(1, keys, kept_heads, kept_dim, key_heads, DIM, dtype_name(dtype), pages)
        self.store = [memory.lasting_zeros(shape, getattr(torch, kind)) for shape, kind in shapes.values()]
        self.pages = torch.randperm(pages).to(torch.int32)[None] if pages else None
        self.first, none = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        append = load.load(CacheAppendSpec(dtype_name(dtype), kept_dim, DIM, form.text()), "cpp").launch
        append(k[:, :, : self.held], v[:, :, : self.held], self.store, none, self.first, self.pages)
        self.length = torch.tensor([self.held], dtype=torch.int32)
        self.fresh = k[:, :, self.held :].contiguous(), v[:, :, self.held :].contiguous()
        self.rebuild = _rebuild(key_heads, total, dtype) if form.latent else []
        self.form, self.total, self.room = form, total, pages * form.page or keys
        self.options: dict[str, Any] = {"scale": DIM**-0.5, "mask": "k_idx <= q_idx", "format": form.text()}
        self()
        exact_keys, exact_values = cache_store.read(
            cache_store.named(self.store, form), torch.tensor([total]), self.pages, form
        )
        positions = torch.arange(total)[None]
        self.exact_keys = cache_store.rebuild_keys(exact_keys.to(dtype), self.rebuild, positions, form).contiguous()
        self.exact_values = exact_values.to(dtype).contiguous()

    def __call__(self) -> Tensor:
        rest = (self.store, self.length, self.first, self.pages)
        return torch.ops.tilewright.cached_attention_step(
            self.q, *self.fresh, self.rebuild, *rest, **self.options, target="cpp"
        )

    def bytes(self) -> int:
        """What is read of the store, which has room for a few tokens more."""
        names = self.form.names()
        whole = {name: t.numel() * t.element_size() for name, t in zip(names, self.store, strict=True)}
        return sum(size if is_recent(name) else size * self.total // self.room for name, size in whole.items())


def _rebuild(key_heads: int, length: int, dtype: torch.dtype) -> list[Tensor]:
    up = (torch.randn(key_heads, DIM, RANK) * RANK**-0.5).to(dtype)
    angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, DIM, 2) / DIM)
    return [up, angles.cos(), angles.sin()]


def problem(keys: int, name: str, heads: int, key_heads: int, queries: int, dtype: torch.dtype) -> Problem:
    torch.manual_seed(0)
    step = Step(keys, FORMATS[name], heads, key_heads, queries, dtype)
    k, v = step.exact_keys, step.exact_values
    sample = Sample(step.q, k, v, lambda q_idx, k_idx: k_idx <= q_idx + step.held)
    mask = torch.ones(queries, step.total, dtype=torch.bool).tril(step.held) if queries > 1 else None

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(step.q, k, v, attn_mask=mask, enable_gqa=heads > key_heads)

    found = [Contender("sdpa", Kind.PEER, sdpa)]
    if name != "whole":
        whole = Step(keys, FORMATS["whole"], heads, key_heads, queries, dtype)
        other = Sample(whole.q, whole.exact_keys, whole.exact_values, sample.visible)
        found.append(Contender("whole", Kind.OURS, whole, expected=other.expected, bytes=whole.bytes()))
    found.append(Contender("ours", Kind.OURS, step))
    return Problem("ours", found, sample.expected, BOUND[dtype], bytes=step.bytes(), traffic="read")


def cases() -> list[Case]:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for keys, name, heads, key_heads, queries in ROWS:
            params = {"dtype": dtype_name(dtype), "keys": keys, "cache": name, "heads": heads, "key_heads": key_heads}
            params |= {"dim": DIM, "queries": queries}
            shape = f"{keys}x{heads}-{key_heads}x{DIM}" + (f"x{queries}" if queries > 1 else "")
            prepare = functools.partial(problem, keys, name, heads, key_heads, queries, dtype)
            quick = keys == 32768 and (heads, queries) == (8, 1)
            found.append(Case(f"{dtype_name(dtype)}/{name.replace(', ', '-')}/{shape}", params, prepare, quick=quick))
    return found


SUITE = Suite(
    "decode_cache",
    "Batch 1: a step of attention through a KV cache of 4,096 to 131,072 tokens: whole, paged, quantized, latent.",
    cases,
    headline=("*/32768x8-8x64",),
    compare=(("whole", "ours"),),
    plot_panels=("dtype", "cache"),
)
