"""The kernels behind ``tilewright::cached_attention_step``: which ones a call gets, and their launch.

A call with few queries (decoding, speculative decoding) runs two kernels: ``cache_append`` and ``cached_attention``,
which reads the store as it is. One with more (prefill, chunks) runs ``cache_append``, then reads older tokens back
whole and leaves the rest to the ``attention`` kernels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...codegen import cache_triton
from ...codegen.attention import MAX_HEAD_DIM
from ...codegen.cache_format import CacheFormat, parse_format
from ...codegen.cached_attention import MAX_QUERIES, CacheAppendSpec, CachedAttentionSpec, window_of
from ...codegen.spec import SpecError
from .. import fast_call, plans
from ..autotune import load_best
from ..errors import UnsupportedKernel
from ..load import load
from .attention_kernel import large_shared_memory

_DEVICES = {"triton": "cuda", "triton-interpret": "cpu", "cpp": "cpu"}
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def spec(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    rebuild: Sequence[Tensor] = (),
    *,
    scale: float,
    mask: str,
    normalizer: str = "softmax",
    format: str = "",
    target: str,
) -> CachedAttentionSpec:
    """The decode kernel for a site, from tensors or fake tensors.

    Raises :class:`~tilewright.runtime.errors.UnsupportedKernel` with the reason when ``target`` has none.
    """
    if target not in _DEVICES:
        raise UnsupportedKernel(f"there is no cached_attention kernel for target {target!r}")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.device.type != _DEVICES[target]:
            raise UnsupportedKernel(
                f"{target} kernels take {_DEVICES[target]} tensors, and {name} is on {tensor.device.type}"
            )
        if tensor.dtype != q.dtype or tensor.dtype not in _DTYPE_NAMES:
            raise UnsupportedKernel(
                f"cached_attention kernels compute float32, bfloat16 and float16, and {name} is {tensor.dtype}"
            )
    chosen = _attention_spec(_dim(q), _dim(k), _dim(v), _DTYPE_NAMES[q.dtype], mask, normalizer, format, target)
    return _tiled(chosen, large_shared_memory(q.device)) if target == "triton" else chosen


def append_spec(attention: CachedAttentionSpec) -> CacheAppendSpec:
    """The kernel that appends to the store which ``attention`` reads."""
    return CacheAppendSpec(attention.dtype, attention.key_dim, attention.value_dim, attention.format)


def few(queries: int, form: CacheFormat) -> bool:
    """Whether the decode kernel takes a call of so many queries: none may need a token whole that is quantized."""
    return queries <= MAX_QUERIES and not (form.quantized and queries > form.window)


def many_target(q: Tensor, target: str) -> str:
    """Who computes attention of many queries: the kernels of ``target``, but none takes keys as wide as absorbed ones
    can be."""
    return target if q.shape[3] <= MAX_HEAD_DIM else "reference"


def _dim(tensor: Tensor) -> int:
    size = tensor.shape[3]
    if not isinstance(size, int):
        raise UnsupportedKernel("cached_attention kernels need fixed numbers of channels, and one is symbolic")
    return size


@functools.lru_cache(maxsize=1024)
def _attention_spec(
    head_dim: int, key_dim: int, value_dim: int, dtype: str, mask: str, normalizer: str, format: str, target: str
) -> CachedAttentionSpec:
    try:
        left, sinks = window_of(mask)
        chosen = CachedAttentionSpec(
            dtype=dtype,
            key_dim=key_dim,
            value_dim=value_dim,
            format=parse_format(format).text(),
            head_dim=head_dim,
            normalizer=normalizer,
            left=left,
            sinks=sinks,
        )
        if target != "cpp":
            cache_triton.check(chosen)
    except SpecError as error:
        raise UnsupportedKernel(str(error)) from error
    return chosen


@functools.lru_cache(maxsize=1024)
def _tiled(chosen: CachedAttentionSpec, large: bool) -> CachedAttentionSpec:
    options: dict[str, Any] = dict(cache_triton.tiles(chosen, large=large))
    return dataclasses.replace(chosen, **options)


def step_launches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rebuild: list[Tensor],
    store: list[Tensor],
    length: Tensor,
    first: Tensor,
    pages: Tensor | None,
    *,
    scale: float,
    mask: str,
    normalizer: str,
    format: str,
    target: str,
) -> tuple[fast_call.Launch, fast_call.Launch | None]:
    """The launches of a call: ``append(k, v, store, length, first, pages)`` and, for few queries,
    ``attend(q, rebuild, store, length, first, pages, scale)``, else None."""
    chosen = spec(q, k, v, None, rebuild, scale=scale, mask=mask, normalizer=normalizer, format=format, target=target)
    append = load(append_spec(chosen), target).launch
    if not few(q.shape[2], chosen.cache):
        return append, None
    return append, load_best(chosen, target, lambda: (q, rebuild, store, length, first, pages, scale)).launch


def both(append: fast_call.Launch, attend: fast_call.Launch) -> fast_call.Launch:
    """One launch of the two: ``launch(q, k, v, rebuild, store, length, first, pages, scale) -> out``."""
    return plans.joined(_one_after_the_other, append, attend)


def _one_after_the_other(append: fast_call.Launch, attend: fast_call.Launch) -> fast_call.Launch:
    def launch(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rebuild: list[Tensor],
        store: list[Tensor],
        length: Tensor,
        first: Tensor,
        pages: Tensor | None,
        scale: float,
    ) -> Tensor:
        append(k, v, store, length, first, pages)
        return attend(q, rebuild, store, length, first, pages, scale)

    return launch
