"""Specs of the kernels that work on a KV cache: what appends a call's tokens, and what attends to few queries.

Split over the keys with partial results merged by their maxima and sums: Dao et al., "Flash-Decoding for long-context
inference" (2023). Normalizers as in codegen/attention.py; what a cache holds: codegen/cache_format.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Self

import sympy

from . import cache_triton
from .attention import MAX_HEAD_DIM, NORMALIZERS
from .cache_format import CacheFormat, parse_format
from .mask_logic import implies
from .spec import DTYPES, KernelSpec, SpecError, require, require_choice, require_power_of_two
from .symbols import K_LEN, Q_LEN, K, Q, canonical, parse_mask

TILE = 64
"""Tokens that a kernel reads at once; a tile begins at a multiple of it and lies in one page."""
MAX_QUERIES = 8
"""Queries of a call that the decode kernel takes."""
MAX_KEY_DIM = 2048
"""Channels of what is kept for the keys, which a latent or absorbed key may have more of than a head."""


@dataclass(frozen=True)
class _CacheSpec(KernelSpec):
    """What both kernels share.

    dtype: of q, k, v, the whole tensors of the store and the output. key_dim, value_dim: channels of what is kept for
    the keys, and of the values. format: canonical text of codegen/cache_format.py. Numbers of sequences, heads and
    tokens, the capacity and all strides are arguments of a launch.
    """

    dtype: str = "float32"
    key_dim: int = 64
    value_dim: int = 64
    format: str = ""

    def check(self) -> None:
        require_choice("dtype", self.dtype, DTYPES)
        for name, most in (("key_dim", MAX_KEY_DIM), ("value_dim", MAX_HEAD_DIM)):
            value = getattr(self, name)
            require(
                isinstance(value, int) and 1 <= value <= most,
                f"{name} is {value}, but must be an int from 1 to {most}",
            )
        canonical = self.cache.text()
        require(self.format == canonical, f"format is {self.format!r}, but its canonical text is {canonical!r}")
        # Raises for widths that the format cannot hold.
        span = self.cache.page or self.cache.group
        self.cache.store(1, span, 1, self.key_dim, 1, self.value_dim, self.dtype)

    @property
    def cache(self) -> CacheFormat:
        """The format as a value."""
        return parse_format(self.format)

    @property
    def store_names(self) -> tuple[str, ...]:
        """The names of the store's tensors, in order."""
        return self.cache.names()

    def context(self, target: str) -> dict[str, Any]:
        return {"cache": self.cache, "store_names": self.store_names, "tile": TILE, "max_queries": MAX_QUERIES}


@dataclass(frozen=True)
class CacheAppendSpec(_CacheSpec):
    """Appends the tokens of a call, k (B, Hs, L, key_dim) and v (B, Hv, L, value_dim), to the store.

    Token i of sequence b gets the index length[b] + i. Quantizes the groups that become complete, from the recent
    tokens and the call's own.
    """

    kind: ClassVar[str] = "cache_append"
    templates: ClassVar[dict[str, str]] = {
        "triton": "triton/cache_append.py.jinja",
        "cpp": "cpp/cache_append.cpp.jinja",
    }

    def context(self, target: str) -> dict[str, Any]:
        return super().context(target) | (cache_triton.append_context(self) if target == "triton" else {})


@dataclass(frozen=True)
class CachedAttentionSpec(_CacheSpec):
    """Attention of up to MAX_QUERIES queries a sequence to a store that holds their own tokens already.

    head_dim: channels of q; equal to key_dim unless the keys are latent. left: 0, every query sees all keys up to its
    own; w, the newest w of them: q - w < k <= q. sinks: with left, keys k < sinks are seen too. normalizer: softmax or
    sigmoid. block_n: keys in a tile, num_warps, num_stages: what a Triton program has; native kernels have tiles of
    TILE keys.
    """

    kind: ClassVar[str] = "cached_attention"
    templates: ClassVar[dict[str, str]] = {
        "triton": "triton/cached_attention.py.jinja",
        "cpp": "cpp/cached_attention.cpp.jinja",
    }

    head_dim: int = 64
    normalizer: str = "softmax"
    left: int = 0
    sinks: int = 0
    block_n: int = 64
    num_warps: int = 4
    num_stages: int = 1

    def check(self) -> None:
        super().check()
        require_choice("normalizer", self.normalizer, NORMALIZERS)
        most = MAX_HEAD_DIM if self.cache.latent else MAX_KEY_DIM
        require(
            isinstance(self.head_dim, int) and 1 <= self.head_dim <= most,
            f"head_dim is {self.head_dim}, but must be an int from 1 to {most}",
        )
        require(
            self.cache.latent or self.head_dim == self.key_dim,
            f"head_dim is {self.head_dim} and key_dim {self.key_dim}, but only latent keys may differ in width",
        )
        require(
            self.cache.rotary <= self.head_dim,
            f"rotary is {self.cache.rotary}, but a head has {self.head_dim} channels",
        )
        for name in ("left", "sinks"):
            value = getattr(self, name)
            require(isinstance(value, int) and value >= 0, f"{name} is {value}, but must be an int of at least 0")
        require(self.left > 0 or self.sinks == 0, f"sinks is {self.sinks}, but left is 0: all keys are seen anyway")
        require_power_of_two("block_n", self.block_n, 16, 256)
        require_power_of_two("num_warps", self.num_warps, 1, 16)
        require(
            isinstance(self.num_stages, int) and 1 <= self.num_stages <= 5,
            f"num_stages is {self.num_stages}, but must be 1 to 5",
        )

    def context(self, target: str) -> dict[str, Any]:
        return super().context(target) | (cache_triton.attention_context(self) if target == "triton" else {})

    def candidates(self, target: str) -> list[Self]:
        return cache_triton.candidates(self) if target == "triton" else [self]


@lru_cache(maxsize=256)
def window_of(mask: str) -> tuple[int, int]:
    """(left, sinks) of a mask that shows ``k <= q``, ``q - left < k <= q``, or that and ``k <= q`` for ``k < sinks``.

    mask: text of codegen/symbols.py over indices in the cache, where q_len and k_len are one number. Raises
    :class:`~tilewright.codegen.spec.SpecError` for every other mask.
    """
    expression = canonical(parse_mask(mask).subs(Q_LEN, K_LEN))
    constants = sorted({abs(int(number)) + more for number in expression.atoms(sympy.Integer) for more in (0, 1)})
    causal = K <= Q
    for left in (0, *constants):
        for sinks in (0, *constants) if left else (0,):
            seen = causal & ((K > Q - left) | (K < sinks)) if left else causal
            if implies(seen, expression) and implies(expression, seen):
                return left, sinks
    raise SpecError(f"the decode kernel knows causal masks, windows and sinks, not {mask!r}")
