"""Launch of the ``cached_attention`` kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

STORE, REBUILD = 16, 5
"""Tensors of a store and of what rebuilds latent keys, at most; a kernel takes null for those that a format lacks."""
ARGTYPES = (
    ctypes.c_int,  # threads
    *(ctypes.c_void_p,) * 5,  # q, out, length, first, pages
    *(ctypes.c_void_p,) * (STORE + REBUILD),
    ctypes.c_double,  # scale
    ctypes.c_void_p,  # layout
)
MAX_LAYOUTS = 1024


def make_launch(function: Any, spec: dict[str, Any], empty: Callable[[Sequence[int], torch.dtype], Tensor]) -> Any:
    """``launch(q, rebuild, store, length, first, pages, scale) -> out``.

    q (B, Hq, L, D), any strides; L at most 8. store: the tensors of the format in order (codegen/cache_format.py),
    contiguous below their third dimension, with length[b] + L tokens of sequence b. rebuild: what rebuilds latent
    keys, contiguous. length, first int32 (B,); pages int32 (B, S / page) or None; all contiguous. out (B, Hq, L, Dv),
    contiguous.
    """
    dtype = getattr(torch, spec["dtype"])
    value_dim = spec["value_dim"]
    layouts: dict[Any, Any] = {}

    def layout_of(q: Tensor, rebuild: Sequence[Tensor], store: Sequence[Tensor], pages: Tensor | None) -> Any:
        batch, heads, length, _ = q.shape
        pages_wide = 0 if pages is None else pages.shape[1]
        numbers = [batch, heads, store[0].shape[1], store[-1].shape[1], length, pages_wide]
        numbers += [*q.stride(), heads * length * value_dim, length * value_dim, value_dim, 1]
        for tensor in store:
            if tensor.numel() and not tensor[0, 0, 0].is_contiguous():
                raise ValueError("the tensors of a cache must be contiguous below their third dimension")
            numbers += tensor.stride()[:3]
        for tensor in rebuild:
            if not tensor.is_contiguous():
                raise ValueError("what rebuilds latent keys must be contiguous")
            numbers.append(tensor.shape[0])
        if len(layouts) >= MAX_LAYOUTS:
            layouts.clear()
        return (ctypes.c_int64 * len(numbers))(*numbers)

    def launch(
        q: Tensor,
        rebuild: Sequence[Tensor],
        store: Sequence[Tensor],
        length: Tensor,
        first: Tensor,
        pages: Tensor | None,
        scale: float,
    ) -> Tensor:
        shape = q.shape
        key = (shape, q.stride(), *[(t.shape, t.stride()) for t in store], *[t.shape for t in rebuild])
        if pages is not None:
            key += (pages.shape,)
        layout = layouts.get(key)
        if layout is None:
            layout = layouts[key] = layout_of(q, rebuild, store, pages)
        batch, heads, queries, _ = shape
        out = empty((batch, heads, queries, value_dim), dtype)
        function(
            torch.get_num_threads(),
            q.data_ptr(),
            out.data_ptr(),
            length.data_ptr(),
            first.data_ptr(),
            None if pages is None else pages.data_ptr(),
            *[t.data_ptr() for t in store],
            *(None,) * (STORE - len(store)),
            *[t.data_ptr() for t in rebuild],
            *(None,) * (REBUILD - len(rebuild)),
            scale,
            layout,
        )
        return out

    return launch
