"""Launch of the ``cache_append`` kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

STORE = 16
"""Tensors of a store, at most; a kernel takes null for those that a format lacks."""
ARGTYPES = (
    ctypes.c_int,  # threads
    *(ctypes.c_void_p,) * 4,  # k, v, length, pages
    *(ctypes.c_void_p,) * STORE,
    ctypes.c_void_p,  # layout
)
MAX_LAYOUTS = 1024


def make_launch(function: Any, spec: dict[str, Any], empty: Callable[[Sequence[int], torch.dtype], Tensor]) -> Any:
    """``launch(k, v, store, length, first, pages) -> None``.

    k (B, Hs, L, Ds), v (B, Hv, L, Dv), any strides: what is kept of the tokens length[b] to length[b] + L - 1. store:
    the tensors of the format in order (codegen/cache_format.py), contiguous below their third dimension; written in
    place. length int32 (B,); pages int32 (B, S / page) or None; contiguous. first is not looked at.
    """
    layouts: dict[Any, Any] = {}

    def layout_of(k: Tensor, v: Tensor, store: Sequence[Tensor], pages: Tensor | None) -> Any:
        numbers = [k.shape[0], k.shape[1], v.shape[1], k.shape[2], 0 if pages is None else pages.shape[1]]
        numbers += [*k.stride(), *v.stride()]
        for tensor in store:
            if tensor.numel() and not tensor[0, 0, 0].is_contiguous():
                raise ValueError("the tensors of a cache must be contiguous below their third dimension")
            numbers += tensor.stride()[:3]
        if len(layouts) >= MAX_LAYOUTS:
            layouts.clear()
        return (ctypes.c_int64 * len(numbers))(*numbers)

    def launch(
        k: Tensor, v: Tensor, store: Sequence[Tensor], length: Tensor, first: Tensor, pages: Tensor | None
    ) -> None:
        key = (k.shape, k.stride(), v.shape, v.stride(), *[(t.shape, t.stride()) for t in store])
        if pages is not None:
            key += (pages.shape,)
        layout = layouts.get(key)
        if layout is None:
            layout = layouts[key] = layout_of(k, v, store, pages)
        function(
            torch.get_num_threads(),
            k.data_ptr(),
            v.data_ptr(),
            length.data_ptr(),
            None if pages is None else pages.data_ptr(),
            *[t.data_ptr() for t in store],
            *(None,) * (STORE - len(store)),
            layout,
        )

    return launch
