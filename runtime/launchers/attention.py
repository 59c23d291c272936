"""Launch of the ``attention`` kernels, forward."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

ARGTYPES = (
    ctypes.c_int,  # threads
    *(ctypes.c_void_p,) * 10,  # q, k, v, bias, shift, out, lse, counts, indices, table
    ctypes.c_double,  # scale
    ctypes.c_void_p,  # layout
)
MAX_LAYOUTS = 1024


def make_launch(function: Any, spec: dict[str, Any], empty: Callable[[Sequence[int], torch.dtype], Tensor]) -> Any:
    """``launch(q, k, v, bias, shift, scale, counts, indices, table) -> (out, lse)``.

    q (B, Hq, Lq, D), k (B, Hk, Lk, D), v (B, Hk, Lk, Dv), any strides. bias four-dimensional and broadcastable to
    (B, Hq, Lq, Lk), or None; shift float32, four-dimensional and broadcastable to (B, Hq, Lq, 1), or None. out
    (B, Hq, Lq, Dv) lies in memory as (B, Lq, Hq, Dv); lse float32 is (B, Hq, Lq), for sigmoid (B, Hq, 0).
    counts (B or 1, Hq or 1, blocks of queries) and indices (.., .., .., width) int32, contiguous, where the spec has
    block_q and block_k, else None: see codegen/attention.py. table int32, one-dimensional and contiguous, where the
    mask looks entries of one up, else None.
    """
    dtype = getattr(torch, spec["dtype"])
    value_dim, softmax = spec["value_dim"], spec["normalizer"] == "softmax"
    layouts: dict[Any, Any] = {}

    def layout_of(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        shift: Tensor | None,
        indices: Tensor | None,
        table: Tensor | None,
    ) -> Any:
        batch, heads, length, _ = q.shape
        numbers = [batch, heads, k.shape[1], length, k.shape[2], *q.stride(), *k.stride(), *v.stride()]
        numbers += [length * heads * value_dim, value_dim, heads * value_dim, 1]
        for tensor, dims in ((bias, 4), (shift, 3)):
            sizes, steps = ((1,) * 4, (0,) * 4) if tensor is None else (tensor.shape, tensor.stride())
            numbers += [0 if size == 1 else step for size, step in zip(sizes[:dims], steps[:dims], strict=True)]
        if indices is None:
            numbers += [0, 0, 0]
        else:
            batches, list_heads, blocks, width = indices.shape
            numbers += [list_heads * blocks if batches > 1 else 0, blocks if list_heads > 1 else 0, width]
        numbers.append(0 if table is None else table.shape[0])
        if len(layouts) >= MAX_LAYOUTS:
            layouts.clear()
        return (ctypes.c_int64 * len(numbers))(*numbers)

    def launch(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        shift: Tensor | None,
        scale: float,
        counts: Tensor | None = None,
        indices: Tensor | None = None,
        table: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        shape = q.shape
        key: tuple[Any, ...] = (shape, k.shape, q.stride(), k.stride(), v.stride())
        if bias is not None:
            key += (bias.shape, bias.stride())
        if shift is not None:
            key += (None, shift.shape, shift.stride())
        if indices is not None:
            key += (indices.shape,)
        if table is not None:
            key += (table.shape[0],)
        layout = layouts.get(key)
        if layout is None:
            layout = layouts[key] = layout_of(q, k, v, bias, shift, indices, table)
        batch, heads, length, _ = shape
        out = empty((batch, length, heads, value_dim), dtype)
        lse = empty((batch, heads, length if softmax else 0), torch.float32)
        function(
            torch.get_num_threads(),
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            None if bias is None else bias.data_ptr(),
            None if shift is None else shift.data_ptr(),
            out.data_ptr(),
            lse.data_ptr() if softmax else None,
            None if counts is None else counts.data_ptr(),
            None if indices is None else indices.data_ptr(),
            None if table is None else table.data_ptr(),
            scale,
            layout,
        )
        return out.transpose(1, 2), lse

    return launch
