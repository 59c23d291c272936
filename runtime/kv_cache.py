"""The state behind a compiled decoder: the stores of all its sites, and how many tokens they hold.

All sites hold the same tokens of the same sequences, so they share ``length``, ``first`` and the page table. Every row
of a batch holds the same number of tokens, padding included. What a store's tensors are:
:mod:`tilewright.codegen.cache_format`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..codegen.cache_format import CacheFormat, parse_format
from . import memory
from .errors import CacheFull, CacheMismatch
from .ops import cache_store
from .streaming_site import StreamingSite


@dataclass(frozen=True)
class CacheSite:
    """One attention site's share of a cache.

    name: the site's id in the report. format: canonical text of its
    :class:`~tilewright.codegen.cache_format.CacheFormat`. Heads and channels of what is kept of keys and of values;
    dtype of what is kept whole.
    """

    name: str
    format: str
    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int
    dtype: torch.dtype

    @property
    def layout(self) -> CacheFormat:
        return parse_format(self.format)

    def names(self) -> tuple[str, ...]:
        """The store's tensors, in order."""
        return self.layout.names()

    def why_not_back(self, held: int, keep: int) -> str:
        """The reason why a store of ``held`` tokens cannot become one of the first ``keep``; empty when it can."""
        return ""

    def store(self, batch: int, capacity: int, pages: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The store's tensors in order: name -> (shape, dtype)."""
        sizes = (self.key_heads, self.key_dim, self.value_heads, self.value_dim)
        named = self.layout.store(batch, capacity, *sizes, str(self.dtype).removeprefix("torch."), pages)
        return {name: (shape, getattr(torch, dtype)) for name, (shape, dtype) in named.items()}


AnySite = CacheSite | StreamingSite


class KVState:
    """Tokens of ``batch`` sequences.

    tokens: held by each of them. length: the same as int32 (batch,). first: int32 (batch,), the index of the first
    token that is no (left) padding. pages: int32 (batch, capacity / page) or None. flat: the tensors of all sites in
    order. limit: most tokens a sequence may have. fixed: tensors with a row a sequence that no call changes, such as
    the keys and values of an encoder's states; empty before the first call.
    """

    def __init__(self, sites: Sequence[AnySite], limit: int, batch: int, device: torch.device | str = "cpu") -> None:
        self.sites = tuple(sites)
        self.limit = limit
        self.device = torch.device(device)
        layouts = [site.layout for site in self.sites]
        self.page = max((layout.page for layout in layouts), default=0)
        if any(layout.page != self.page for layout in layouts):
            raise CacheMismatch("all sites of a cache have pages of one size")
        grain = math.lcm(64, self.page or 1, *(layout.group for layout in layouts if layout.quantized))
        self.capacity = -(-limit // grain) * grain
        self.tokens = 0
        self.broken = ""
        self._set_batch(batch)
        self.first = torch.zeros(batch, dtype=torch.int32, device=self.device)
        self.padded = False
        self.pages: Tensor | None = None
        self._free: list[int] = []
        self._shared: list[int] = []
        if self.page:
            self.pages = torch.full((batch, self.capacity // self.page), -1, dtype=torch.int32, device=self.device)
        self.fixed: list[Tensor] = []
        self.flat: list[Tensor] = []
        self.grows: list[bool] = []
        """Which tensors have an entry for each token there is room for; the others have a row a sequence."""
        for site in self.sites:
            larger = site.store(batch, 2 * self.capacity, 1)
            for name, (shape, dtype) in site.store(batch, self.capacity, 0).items():
                self.grows.append(larger[name][0] != shape)
                # Zeros: what a kernel reads beside the tokens must be finite.
                self.flat.append(memory.lasting_zeros(shape, dtype, self.device))

    def _set_batch(self, batch: int) -> None:
        self.batch = batch
        self.length = torch.full((batch,), self.tokens, dtype=torch.int32, device=self.device)

    # One call.

    def reserve(self, count: int) -> None:
        """Make room for ``count`` more tokens a sequence, before anything is written.

        Raises :class:`~tilewright.runtime.errors.CacheFull` past the limit.
        """
        if self.tokens + count > self.limit:
            raise CacheFull(
                f"the cache holds {self.tokens} tokens a sequence and has room for {self.limit}, so {count} more do "
                "not fit: compile with a larger max_length, or crop the cache"
            )
        if self.broken:
            raise CacheMismatch(self.broken)
        if self.page:
            self._reserve_pages(self.tokens, self.tokens + count)

    def advance(self, count: int) -> None:
        """The call that appended ``count`` tokens has succeeded."""
        self.tokens += count
        self.length.add_(count)

    def failed(self) -> None:
        """A call broke off after it may have written: tokens that stay whole in a ring may be lost."""
        if not all(self.grows):
            self.broken = "a call with this cache broke off half-way, and its newest tokens are lost: start a new cache"

    def set_first(self, first: Tensor) -> None:
        """first: int (batch,)."""
        self.first.copy_(first)
        self.padded = bool((self.first > 0).any())

    # Between calls.

    def crop(self, tokens: int) -> None:
        """Forget all but the first ``tokens`` tokens of every sequence."""
        if not 0 <= tokens <= self.tokens:
            raise CacheMismatch(f"the cache holds {self.tokens} tokens and cannot be cropped to {tokens}")
        if reason := next(filter(None, (site.why_not_back(self.tokens, tokens) for site in self.sites)), ""):
            raise CacheMismatch(reason)
        self._take_back(tokens)
        self.tokens = tokens
        self.length.fill_(tokens)
        if self.pages is not None:
            keep = -(-tokens // self.page)
            for row in self.pages[:, keep:].tolist():
                for page in row:
                    self._release(page)
            self.pages[:, keep:] = -1

    def _take_back(self, tokens: int) -> None:
        """Tokens that are among the newest again come back to the rings, as their codes hold them."""
        start = 0
        for site in self.sites:
            names = site.names()
            store = dict(zip(names, self.flat[start : start + len(names)], strict=True))
            start += len(names)
            if site.layout.quantized:
                after = torch.full_like(self.length, tokens)
                cache_store.restore_recent(store, self.length, after, self.pages, site.layout)

    def select(self, indices: Tensor) -> None:
        """Sequence i of the new batch is sequence ``indices[i]`` of this one: int (new batch,)."""
        indices = indices.to(device=self.device, dtype=torch.int64)
        batch = len(indices)
        if batch == self.batch and torch.equal(indices, torch.arange(batch, device=self.device)):
            return
        for index, (grows, tensor) in enumerate(zip(self.grows, self.flat, strict=True)):
            if self.page and grows:
                continue
            used = -(-self.tokens * tensor.shape[2] // self.capacity) if grows else tensor.shape[2]
            chosen = tensor[:, :, :used].index_select(0, indices)
            if batch != self.batch:
                tensor = memory.lasting_zeros((batch, *tensor.shape[1:]), tensor.dtype, self.device)
                self.flat[index] = tensor
            tensor[:, :, :used] = chosen
        self.fixed = [tensor.index_select(0, indices) for tensor in self.fixed]
        if self.pages is not None:
            old = self.pages
            self.pages = old.index_select(0, indices)
            for page in self.pages[self.pages >= 0].tolist():
                self._shared[page] += 1
            for page in old[old >= 0].tolist():
                self._release(page)
        first = self.first.index_select(0, indices)
        if batch != self.batch:
            self._set_batch(batch)
            self.first = first
        else:
            self.first.copy_(first)

    def clone(self) -> KVState:
        """An independent state with the same tokens."""
        other = object.__new__(KVState)
        other.__dict__.update(self.__dict__)
        other.flat = [tensor.clone() for tensor in self.flat]
        other.fixed = [tensor.clone() for tensor in self.fixed]
        other.length, other.first = self.length.clone(), self.first.clone()
        other.pages = None if self.pages is None else self.pages.clone()
        other._free, other._shared = list(self._free), list(self._shared)
        return other

    # Pages. Several sequences may share a page; who writes into a shared one gets a copy first.

    def _reserve_pages(self, start: int, stop: int) -> None:
        assert self.pages is not None
        first, last = start // self.page, -(-stop // self.page)
        table = self.pages[:, first:last].tolist()
        missing = [(b, i) for b, row in enumerate(table) for i, page in enumerate(row) if page < 0]
        held = [(b, i, page) for b, row in enumerate(table) for i, page in enumerate(row) if page >= 0]
        shared = [(b, i, page) for b, i, page in held if self._shared[page] > 1]
        if not missing and not shared:
            return
        self._grow(len(missing) + len(shared))
        for b, i in missing:
            self.pages[b, first + i] = self._take()
        for b, i, page in shared:
            if self._shared[page] > 1:
                own = self._take()
                for grows, tensor in zip(self.grows, self.flat, strict=True):
                    if grows:
                        tensor[own] = tensor[page]
                self._shared[page] -= 1
                self.pages[b, first + i] = own

    def _grow(self, wanted: int) -> None:
        """Have ``wanted`` free pages; a pool that is too small at least doubles."""
        have = len(self._shared)
        if wanted <= len(self._free):
            return
        room = self.batch * (self.capacity // self.page) - have
        more = max(wanted - len(self._free), min(have, room), 1 if have else 2)
        for index, (grows, tensor) in enumerate(zip(self.grows, self.flat, strict=True)):
            if not grows:
                continue
            larger = memory.lasting_zeros((have + more, *tensor.shape[1:]), tensor.dtype, self.device)
            larger[:have] = tensor
            self.flat[index] = larger
        self._free.extend(range(have + more - 1, have - 1, -1))
        self._shared.extend([0] * more)

    def _take(self) -> int:
        page = self._free.pop()
        self._shared[page] = 1
        return page

    def _release(self, page: int) -> None:
        if page < 0:
            return
        self._shared[page] -= 1
        if not self._shared[page]:
            self._free.append(page)

    # Figures.

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as allocated."""
        small = [self.length, self.first] + ([] if self.pages is None else [self.pages])
        return sum(tensor.nbytes for tensor in (*self.flat, *self.fixed, *small))

    def bytes_per_token(self) -> float:
        """Allocated bytes a token of one sequence, the rings of recent tokens left out: they do not grow."""
        growing = [tensor.nbytes for grows, tensor in zip(self.grows, self.flat, strict=True) if grows]
        room = len(self._shared) * self.page if self.page else self.batch * self.capacity
        return sum(growing) / room if room else 0.0
