"""Weights in the order in which a kernel reads them, made once and kept beside the weights.

A packed weight is one more copy: as many bytes as the weight for bfloat16, one and a half times as many for float32
(three bfloat16 slices a number). It is made at the first call with enough rows to need it, and goes with the weight.

Whether it still holds is asked at every call: the same memory, sizes and strides, a storage that has not died since,
and the version that torch counts up at every write in place (``load_state_dict``, ``copy_``, optimizer steps). Writes
that torch does not count (through ``.data``, numpy, another process) are found by the kernel, which compares 64 samples
of each weight; one that touches few elements may be missed: call :func:`forget` after it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from . import memory


@dataclass(frozen=True, slots=True)
class _Entry:
    """versions, storages: of the weights when they were packed. buffer: uint8."""

    versions: tuple[int, ...]
    storages: tuple[StorageWeakRef, ...]
    buffer: Tensor

    def alive(self) -> bool:
        return not any(storage.expired() for storage in self.storages)


_entries: dict[Any, _Entry] = {}


def packed(weights: Sequence[Tensor], order: str, size: int, fill: Callable[[Tensor], None]) -> Tensor:
    """The weights in a kernel's order, packed now unless an earlier result still holds.

    order: what tells this order from others of the same weights. size: bytes. fill(buffer): packs the weights as they
    are.
    Inference tensors have no version, so theirs are packed at every call.
    """
    key = (order, size, *((w.data_ptr(), w.shape, w.stride(), w.dtype) for w in weights))
    entry = _entries.get(key)
    try:
        versions = tuple(w._version for w in weights)
    except RuntimeError:
        return _pack(size, fill)
    if entry is not None and entry.versions == versions and entry.alive():
        return entry.buffer
    if entry is None or not entry.alive():
        _sweep()
        for weight in weights:
            if not weight._is_view():  # a view's Python object may live for one call only
                weakref.finalize(weight, _entries.pop, key, None).atexit = False
    buffer = _pack(size, fill)
    _entries[key] = _Entry(versions, tuple(StorageWeakRef(w.untyped_storage()) for w in weights), buffer)
    return buffer


def _pack(size: int, fill: Callable[[Tensor], None]) -> Tensor:
    buffer = memory.empty((size,), torch.uint8)
    fill(buffer)
    return buffer


def _sweep() -> None:
    for key in [key for key, entry in list(_entries.items()) if not entry.alive()]:
        _entries.pop(key, None)


def kept_bytes() -> int:
    """Memory that packed weights take now."""
    _sweep()
    return sum(entry.buffer.numel() for entry in list(_entries.values()))


def forget() -> None:
    """Drop all packed weights; the next calls pack again."""
    _entries.clear()
