"""Memory for CPU tensors that is used again.

torch's CPU allocator returns a big block to the system as soon as its tensor dies, so every new output of some
megabytes pays a page fault for each 4 KiB: more time than a softmax of the same memory takes. The pool keeps such
blocks, in huge pages, for the next tensor of about their size.

- :func:`empty` makes the outputs of our native kernels; the big ones come from the pool.
- ``with pool():`` makes every big CPU tensor that this thread allocates inside come from the pool, so also the
  intermediates of a compiled graph (``tilewright.compile(..., memory="pool")``).

A block comes back when the last tensor, view or array that shows it is gone, on whichever thread. What is kept is
bounded by the setting ``TILEWRIGHT_POOL_LIMIT``; :func:`release` gives it all back to the system. Outside of ``pool()``
no tensor but ours is touched. Where the pool cannot be built, everything here works with torch's own allocator.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..codegen.native import MemoryPoolSpec
from . import settings
from .launchers.memory_pool import STATISTICS
from .native import NativeModule

THRESHOLD = 2**20
"""Bytes from which a tensor comes from the pool; the C library keeps smaller blocks itself."""

Functions = dict[str, Any]


@dataclass(frozen=True)
class Statistics:
    """The pool as it stands. Bytes are whole blocks, so somewhat more than the tensors in them.

    used_bytes, used_blocks: held by tensors. free_bytes, free_blocks: kept for the next ones.
    reused, mapped: requests served with a kept block and with new memory. unmapped: blocks returned to the system.
    limit: most free bytes.
    """

    used_bytes: int = 0
    used_blocks: int = 0
    free_bytes: int = 0
    free_blocks: int = 0
    reused: int = 0
    mapped: int = 0
    unmapped: int = 0
    limit: int = 0


def _open(launch: Callable[[], Functions]) -> Functions:
    functions = launch()
    functions["set_limit"](settings.get().pool_limit)
    return functions


_module: NativeModule[Functions] = NativeModule(
    MemoryPoolSpec(), _open, "big outputs are allocated afresh at every call, which costs page faults"
)


def _new_limit() -> None:
    if _module.made is not None:
        _module.made["set_limit"](settings.get().pool_limit)


settings.on_change(_new_limit)

# What Inductor's code allocates with: a quarter of torch.empty's time.
_empty_strided: Callable[..., torch.Tensor] = getattr(torch._C._dynamo.guards, "_empty_strided_cpu", None) or (
    lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device="cpu")
)


@functools.lru_cache(maxsize=4096)
def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised contiguous CPU tensor, from the pool when it is big. For outputs that a kernel fills.

    The first big one loads the pool, or starts to build it; until it is there, torch's own allocator serves.
    """
    shape = tuple(shape)
    if math.prod(shape) * dtype.itemsize < THRESHOLD or (functions := _module.get()) is None:
        return _empty_strided(shape, _contiguous(shape), dtype)
    functions["enter"]()
    try:
        return _empty_strided(shape, _contiguous(shape), dtype)
    finally:
        functions["leave"]()


_HUGE_ADVICE = 14  # MADV_HUGEPAGE of Linux


def lasting_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """A tensor of zeros that is going to stay and be read from end to end: on Linux in huge pages where it is big.

    The CPU reads from those up to twice as fast: with pages of 4 KiB it waits for the addresses of pages.
    """
    tensor = torch.empty(tuple(shape), dtype=dtype, device=device)
    size = tensor.numel() * tensor.element_size()
    if tensor.device.type == "cpu" and size >= THRESHOLD and sys.platform.startswith("linux"):
        page = mmap.PAGESIZE
        begin = tensor.data_ptr() // page * page
        # Advice only, and no harm to what lies beside the tensor: the answer does not matter.
        _libc().madvise(begin, tensor.data_ptr() + size - begin, _HUGE_ADVICE)
    return tensor.zero_()


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return libc


@contextlib.contextmanager
def pool() -> Iterator[None]:
    """Inside, every CPU tensor of 1 MiB or more that this thread allocates comes from the pool. Nests.

    Builds the pool if need be. Where it cannot be built, says so once and changes nothing.
    """
    functions = _module.wait()
    if functions is None:
        yield
        return
    functions["enter"]()
    try:
        yield
    finally:
        functions["leave"]()


def pooled(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` with its body inside :func:`pool`. What ``memory="pool"`` does to a compiled graph."""
    prepare()

    @functools.wraps(run)
    def inside(*args: Any, **kwargs: Any) -> Any:
        functions = _module.made
        if functions is None:
            return run(*args, **kwargs)
        functions["enter"]()
        try:
            return run(*args, **kwargs)
        finally:
            functions["leave"]()

    return inside


def prepare() -> bool:
    """Build and load the pool now, unless it is there. Whether it is."""
    return _module.wait() is not None


def statistics() -> Statistics:
    """The pool as it stands; all zero while there is none."""
    if _module.made is None:
        return Statistics()
    values = (ctypes.c_int64 * len(STATISTICS))()
    _module.made["statistics"](values)
    return Statistics(**dict(zip(STATISTICS, values, strict=True)))


def release() -> int:
    """Give all free blocks back to the system. Returns how many bytes that were."""
    return int(_module.made["trim"](0)) if _module.made is not None else 0


def allocator() -> int:
    """Address of the ``c10::Allocator`` that serves from the pool, 0 while there is none. Starts its build."""
    functions = _module.get()
    return int(functions["allocator"]()) if functions is not None else 0
