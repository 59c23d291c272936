"""Decoding through a KV cache on a GPU: the attention of a step, by how the cache keeps its keys and values.

A call attends to a cache that holds the step's own tokens already, as a captured decoding loop does: it reads the
length on the device. torch's SDPA gets the same keys and values as plain tensors of just that length, rebuilt and
dequantized beforehand. ``append`` is the kernel that writes the step's tokens. Bytes are what has to be read of the
cache.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...codegen.cache_format import CacheFormat, is_recent
from ...runtime.load import load
from ...runtime.ops import cache_store, cached_kernel
from ..harness import Case, Contender, Problem, Suite
from ..machine import dtype_name
from ..record import Kind
from .attention import BOUND, Sample

TURNED: dict[str, Any] = {"latent": True, "rotate": "rotate_half"}
BEHIND = 9
"""Tokens that the length stays behind the capacity, which is a multiple of a group."""


@dataclass(frozen=True)
class Shape:
    """``batch`` sequences of ``keys`` tokens. rank: channels of what is kept for the keys, 0 for ``dim``."""

    name: str
    keys: int
    batch: int = 1
    heads: int = 32
    key_heads: int = 8
    dim: int = 128
    queries: int = 1
    form: CacheFormat = CacheFormat()
    rank: int = 0
    left: int = 0
    dtype: torch.dtype = torch.bfloat16

    @property
    def mask(self) -> str:
        return f"(k_idx <= q_idx) & (k_idx > q_idx - {self.left})" if self.left else "k_idx <= q_idx"

    @property
    def kept(self) -> tuple[int, int]:
        """Heads and channels of what is kept for the keys."""
        return (1 if self.form.latent else self.key_heads), self.rank or self.dim


FORMATS: dict[str, tuple[CacheFormat, int]] = {
    "whole": (CacheFormat(), 0),
    "paged": (CacheFormat(page=256), 0),
    "8-bit": (CacheFormat(8, 8), 0),
    "4-bit": (CacheFormat(4, 4), 0),
    "2-bit": (CacheFormat(2, 2), 0),
    "gear": (CacheFormat(2, 2, correction=4, outliers=64), 0),
    "latent": (CacheFormat(**TURNED, rotary=128), 256),
    "latent-4-bit": (CacheFormat(4, 4, **TURNED, rotary=128), 256),
}
SHAPES: tuple[Shape, ...] = tuple(
    Shape(f"{name}-{keys // 1024}k", keys, form=form, rank=rank)
    for name, (form, rank) in FORMATS.items()
    for keys in (4096, 32768, 131072)
)
SHAPES += tuple(
    Shape(f"{name}-8k-batch-16", 8192, batch=16, form=form, rank=rank) for name, (form, rank) in FORMATS.items()
)
SHAPES += tuple(Shape(f"{name}-32k-4-queries", 32768, queries=4, form=FORMATS[name][0]) for name in ("whole", "4-bit"))
SHAPES += (
    Shape("absorbed-32k", 32768, heads=12, key_heads=12, dim=64, rank=16),
    Shape("smollm2-32k", 32768, heads=9, key_heads=3, dim=64),
    Shape("smollm2-latent-32k", 32768, heads=9, key_heads=3, dim=64, form=CacheFormat(**TURNED, rotary=64), rank=48),
    Shape("window-4k-of-128k", 131072, left=4096),
    Shape("whole-32k-fp32", 32768, dtype=torch.float32),
)
QUICK = ("whole-32k", "4-bit-32k", "latent-32k", "whole-8k-batch-16")


class Step:
    """A filled cache and the attention of a step to it. keys, values: what it then holds, whole."""

    def __init__(self, case: Shape, device: str, target: str) -> None:
        form, dtype = case.form, case.dtype
        heads, dim = case.kept
        room = -(-case.keys // 64) * 64
        self.total = room - BEHIND
        width = case.dim if form.latent else dim
        self.q = torch.randn(case.batch, case.queries, case.heads, width, device=device).to(dtype).transpose(1, 2)
        k, v = (
            torch.randn(case.batch, h, self.total, d, device=device).to(dtype)
            for h, d in ((heads, dim), (case.key_heads, case.dim))
        )
        each = room // form.page if form.page else 0
        shapes = form.store(
            case.batch, room, heads, dim, case.key_heads, case.dim, dtype_name(dtype), each * case.batch
        )
        self.store = [torch.zeros(shape, dtype=getattr(torch, kind), device=device) for shape, kind in shapes.values()]
        order = torch.randperm(each * case.batch, device=device) if each else None
        self.pages = None if order is None else order.view(case.batch, each).to(torch.int32)
        self.first = torch.zeros(case.batch, dtype=torch.int32, device=device)
        self.length = torch.full_like(self.first, self.total - case.queries)
        self.rebuild = _rebuild(case, self.total, device) if form.latent else []
        self.scale = width**-0.5
        spec = cached_kernel.spec(
            self.q, k, v, scale=self.scale, mask=case.mask, format=form.text(), target=target
        )  # says why, where there is no kernel
        self.attend = load(spec, target).launch
        self.append = load(cached_kernel.append_spec(spec), target).launch
        self.append(k, v, self.store, torch.zeros_like(self.first), self.first, self.pages)
        self.fresh = k[:, :, -case.queries :], v[:, :, -case.queries :]
        self.form, self.room = form, room
        ends = torch.full_like(self.first, self.total)
        keys, values = cache_store.read(cache_store.named(self.store, form), ends, self.pages, form)
        positions = torch.arange(self.total, device=device).expand(case.batch, self.total)
        self.keys = cache_store.rebuild_keys(keys.to(dtype), self.rebuild, positions, form).contiguous()
        self.values = values.to(dtype).contiguous()

    def __call__(self) -> Tensor:
        return self.attend(self.q, self.rebuild, self.store, self.length, self.first, self.pages, self.scale)

    def written(self) -> tuple[Tensor, ...]:
        """The step's tokens once more, where they are already."""
        self.append(*self.fresh, self.store, self.length, self.first, self.pages)
        return tuple(self.store)

    def bytes(self, share: float) -> int:
        """What is read of the cache where a step needs ``share`` of its tokens."""
        found = 0.0
        for name, tensor in zip(self.form.names(), self.store, strict=True):
            found += tensor.numel() * tensor.element_size() * (1.0 if is_recent(name) else share)
        return round(found)


def _rebuild(case: Shape, length: int, device: str) -> list[Tensor]:
    up = torch.randn(case.key_heads, case.dim, case.rank, device=device) * case.rank**-0.5
    angles = torch.arange(length, device=device)[:, None] * 10000.0 ** (
        -torch.arange(0, case.dim, 2, device=device) / case.dim
    )
    return [up.to(case.dtype), angles.cos(), angles.sin()]


def problem(case: Shape, device: str = "cuda", target: str = "triton") -> Problem:
    torch.manual_seed(0)
    step = Step(case, device, target)
    held, total = step.total - case.queries, step.total

    def visible(row: Tensor, column: Tensor) -> Tensor:
        seen = column <= row + held
        return seen & (column > row + held - case.left) if case.left else seen

    sample = Sample(step.q, step.keys, step.values, visible)
    # One query sees what SDPA is given; a window is cut out beforehand.
    cut = slice(-case.left, None) if case.left else slice(None)
    k, v = step.keys[:, :, cut].contiguous(), step.values[:, :, cut].contiguous()
    mask = torch.ones(case.queries, total, dtype=torch.bool, device=device).tril(held) if case.queries > 1 else None

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(
            step.q, k, v, attn_mask=mask, scale=step.scale, enable_gqa=k.shape[1] < case.heads
        )

    return Problem(
        "ours",
        [
            Contender("sdpa", Kind.PEER, sdpa, bytes=sum(t.numel() * t.element_size() for t in (k, v))),
            Contender("ours", Kind.OURS, step),
            Contender("append", Kind.CONTEXT, step.written, answer=step),
        ],
        sample.expected,
        BOUND[case.dtype],
        sample.of,
        bytes=step.bytes(min(total, case.left or total) / step.room),
        traffic="read",
        dtype=dtype_name(case.dtype),
    )


def cases() -> list[Case]:
    return [
        Case(
            case.name,
            {"dtype": dtype_name(case.dtype), "keys": case.keys, "batch": case.batch, "cache": case.form.text()}
            | {"heads": case.heads, "key_heads": case.key_heads, "dim": case.dim, "queries": case.queries},
            functools.partial(problem, case),
            quick=case.name in QUICK,
        )
        for case in SHAPES
    ]


SUITE = Suite(
    "gpu-decode-cache",
    "A step of attention through a KV cache on a GPU: whole, paged, quantized, latent.",
    cases,
    device="cuda",
    headline=("*",),
    plot_panels=("dtype",),
)
