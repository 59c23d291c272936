"""One attention site's share of a cache of fixed size, beside :class:`tilewright.runtime.kv_cache.CacheSite`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..codegen.cache_format import CacheFormat
from .ops import streaming_attention


@dataclass(frozen=True)
class StreamingSite:
    """name: the site's id in the report. Heads and channels of keys and values; dtype of both.

    window, sinks: tokens kept; far: whether the first ones are also kept as at position 0. See
    :mod:`tilewright.runtime.ops.streaming_attention`.
    """

    name: str
    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    window: int
    sinks: int
    far: bool

    @property
    def layout(self) -> CacheFormat:
        """What a state asks of every site: no pages, nothing quantized."""
        return CacheFormat()

    def names(self) -> tuple[str, ...]:
        """The store's tensors, in order."""
        return tuple(self.store(1, 0, 0))

    def store(self, batch: int, capacity: int, pages: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The store's tensors in order: name -> (shape, dtype). No capacity changes them."""
        found = streaming_attention.layout(
            batch,
            self.heads,
            self.key_dim,
            self.value_dim,
            str(self.dtype).removeprefix("torch."),
            window=self.window,
            sinks=self.sinks,
            far=self.far,
        )
        return {name: (shape, getattr(torch, dtype)) for name, (shape, dtype) in found.items()}

    def why_not_back(self, held: int, keep: int) -> str:
        """The reason why a store of ``held`` tokens cannot become one of the first ``keep``; empty when it can."""
        ring, most = self.window + streaming_attention.SPARE, streaming_attention.SPARE + 1
        if held - keep <= most or held <= ring or not keep:
            return ""
        return (
            f"a cache of fixed size can give up its newest {most} tokens (or all of them), not {held - keep}: the "
            "tokens that queries saw before them are gone"
        )
