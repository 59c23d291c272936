"""``past_key_values`` of a compiled decoder: what ``transformers`` asks of a cache, on top of our state.

The class below needs no transformers. Where that is loaded, :func:`cache_class` derives from its ``Cache`` too, so that
``generate`` takes it for one.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..runtime import kv_cache_file
from ..runtime.errors import CacheMismatch, SaveError
from ..runtime.kv_cache import KVState

if TYPE_CHECKING:
    from .cached_program import CacheOwner


class DecoderCache:
    """The keys and values of the tokens seen so far, for one compiled module.

    Made by ``compiled.new_cache()``, by ``generate`` or by a first call with ``use_cache``; memory is taken when the
    first call says how many sequences there are. ``copy.deepcopy`` gives an independent cache, to go on from one prefix
    in several ways.
    """

    def __init__(self, owner: CacheOwner) -> None:
        self.owner = owner
        self.state: KVState | None = None
        self.layers: list[Any] = []
        self.layer_class_to_replicate = None
        self.offloading = False

    def __repr__(self) -> str:
        held = "empty" if self.state is None else f"{self.state.tokens} tokens of {self.state.batch} sequences"
        return f"{type(self).__name__}({held}, at most {self.owner.max_length})"

    def __len__(self) -> int:
        return len(self.owner.sites)

    def __deepcopy__(self, memo: dict[int, Any]) -> DecoderCache:
        other = type(self)(self.owner)
        other.state = None if self.state is None else self.state.clone()
        memo[id(self)] = other
        return other

    # What was seen.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens held of each sequence, padding included."""
        return 0 if self.state is None else self.state.tokens

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Tokens that there is room for."""
        return self.owner.max_length

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """The same, by its older name."""
        return self.owner.max_length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Keys that queries of the next call see, and the index of the first of them."""
        return self.get_seq_length() + int(query_length), 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length()

    @property
    def batch_size(self) -> int:
        """Sequences; -1 before the first call."""
        return -1 if self.state is None else self.state.batch

    @property
    def nbytes(self) -> int:
        """Bytes of memory taken."""
        return 0 if self.state is None else self.state.nbytes

    @property
    def is_compileable(self) -> bool:
        return False  # for transformers' own torch.compile of the model; this module is compiled already

    @property
    def is_initialized(self) -> bool:
        return self.state is not None

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self)

    @property
    def is_linear(self) -> list[bool]:
        return [False] * len(self)

    @property
    def is_dummy(self) -> list[bool]:
        return [False] * len(self)

    def is_recording_past(self, layer_idx: int = 0) -> bool:
        return True

    def activate_past_recording(self) -> None:
        """Every token is kept until it is cropped."""

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.get_seq_length() > 0

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the tokens held to a file that ``compiled.new_cache(path)`` reads; return its path.

        Raises :class:`~tilewright.runtime.errors.SaveError` for an empty cache and a file that cannot be written.
        """
        if self.state is None:
            raise SaveError("the cache is empty: call the module with it first")
        return kv_cache_file.write(self.state, path, self.owner.fingerprint())

    # Changing it between calls.

    def crop(self, tokens: int) -> None:
        """Forget tokens: all but the first ``tokens`` of each sequence, or the last ``-tokens`` when negative.

        Raises :class:`~tilewright.runtime.errors.CacheMismatch` for more tokens than there are.
        """
        held = self.get_seq_length()
        keep = held + tokens if tokens <= 0 else min(tokens, held)
        if keep < 0:
            raise CacheMismatch(f"the cache holds {held} tokens, and {-tokens} of them cannot be forgotten")
        if self.state is not None and keep < held:
            self.state.crop(keep)

    def reset(self) -> None:
        """Forget all tokens and keep the memory."""
        if self.state is not None:
            self.state.crop(0)
            self.state.broken = ""
            self.state.fixed = []

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Sequence i becomes a copy of sequence ``beam_idx[i]``."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these sequences, in this order; one may come several times."""
        if self.state is not None:
            self.state.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence ``repeats`` times, side by side."""
        if self.state is not None:
            self.state.select(torch.arange(self.state.batch, device=self.state.device).repeat_interleave(repeats))

    # What a model's own forward would call; here the compiled graph writes.

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise CacheMismatch(
            "this cache belongs to a compiled module, whose graph writes to it: give it to that module, not to a model"
        )

    def early_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Memory is taken at the first call."""


@functools.cache
def _derived(base: type) -> type[DecoderCache]:
    return type("DecoderCache", (DecoderCache, base), {"__module__": __name__, "__doc__": DecoderCache.__doc__})


def cache_class() -> type[DecoderCache]:
    """The class to make caches of: also a transformers ``Cache`` where transformers is loaded."""
    if "transformers" not in sys.modules:
        return DecoderCache
    from transformers.cache_utils import Cache

    return _derived(Cache)
