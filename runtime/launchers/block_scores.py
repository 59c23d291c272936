"""Launch of the ``block_scores`` kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

ARGTYPES = (
    ctypes.c_int,  # threads
    *(ctypes.c_void_p,) * 3,  # q, k, out
    ctypes.c_double,  # scale
    ctypes.c_void_p,  # layout
)
MAX_LAYOUTS = 1024


def make_launch(function: Any, spec: dict[str, Any], empty: Callable[[Sequence[int], torch.dtype], Tensor]) -> Any:
    """``launch(q, k, scale, block_q, block_k) -> out``.

    q (B, Hq, M, C), k (B, Hk, N, C), any strides. out (B, Hq, ceil(M / block_q), ceil(N / block_k)) float32.
    """
    layouts: dict[Any, Any] = {}

    def launch(q: Tensor, k: Tensor, scale: float, block_q: int, block_k: int) -> Tensor:
        key = (q.shape, k.shape, q.stride(), k.stride(), block_q, block_k)
        layout = layouts.get(key)
        batch, heads, rows, channels = q.shape
        _, key_heads, columns, _ = k.shape
        if layout is None:
            if len(layouts) >= MAX_LAYOUTS:
                layouts.clear()
            numbers = [batch, heads, key_heads, rows, columns, channels, block_q, block_k, *q.stride(), *k.stride()]
            layout = layouts[key] = (ctypes.c_int64 * len(numbers))(*numbers)
        out = empty((batch, heads, -(-rows // block_q), -(-columns // block_k)), torch.float32)
        function(torch.get_num_threads(), q.data_ptr(), k.data_ptr(), out.data_ptr(), scale, layout)
        return out

    return launch
