"""Launch of the ``norm_backward`` kernels: the gradients of rms_norm and layer_norm."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

ARGTYPES = (
    ctypes.c_int,  # threads
    *(ctypes.c_void_p,) * 8,  # grad, x, extra, weight, dx, dweight, dbias, parts
    ctypes.c_int64,  # blocks
    ctypes.c_int64,  # n
    ctypes.c_int64,  # rank
    ctypes.c_void_p,  # layout
    ctypes.c_double,  # eps
    ctypes.c_double,  # weight_offset
)
MAX_RANK = 8
MAX_LAYOUTS = 1024
MAX_BLOCKS = 64
"""Blocks of rows whose sums are kept apart; few rows make fewer, of 16 rows."""


def make_launch(function: Any, spec: dict[str, Any], empty: Callable[[Sequence[int], torch.dtype], Tensor]) -> Any:
    """``launch(grad, x, extra, weight, eps, weight_offset) -> (dx, dweight, dbias)``; of what is None, empty.

    grad, x, extra: (..., n), any strides. weight: n elements, or None. dweight, dbias: (n,).
    """
    in_dtype = getattr(torch, spec["in_dtype"])
    weight_dtype = None if spec["weight"] == "none" else getattr(torch, spec["weight"])
    bias_dtype = None if spec["bias"] == "none" else getattr(torch, spec["bias"])
    layouts: dict[Any, Any] = {}

    def layout_of(shape: Sequence[int], *strides: Sequence[int]) -> Any:
        """The number of batch dimensions, and the C array of their sizes and strides; None if they cannot be walked."""
        if len(layouts) >= MAX_LAYOUTS:
            layouts.clear()
        if 0 in shape:  # no row, whatever the strides
            return 1, (ctypes.c_int64 * (1 + len(strides)))()
        if len(shape) - 1 > MAX_RANK or any(s[-1] != 1 and shape[-1] > 1 for s in strides):
            return None
        numbers = [*shape[:-1], *(step for s in strides for step in s[:-1])]
        return len(shape) - 1, (ctypes.c_int64 * max(len(numbers), 1))(*numbers)

    def launch(
        grad: Tensor, x: Tensor, extra: Tensor | None, weight: Tensor | None, eps: float, weight_offset: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        shape = x.shape
        n = shape[-1]
        key = (shape, grad.stride(), x.stride(), *(() if extra is None else (extra.stride(),)))
        layout = layouts.get(key, layouts)
        if layout is layouts:
            layout = layouts[key] = layout_of(*key)
        if layout is None:
            grad, x = grad.contiguous().view(-1, n), x.contiguous().view(-1, n)
            extra = None if extra is None else extra.contiguous().view(-1, n)
            dx, dweight, dbias = launch(grad, x, extra, weight, eps, weight_offset)
            return dx.view(shape), dweight, dbias
        weight = weight if weight is None or weight.is_contiguous() else weight.contiguous()
        rows = x.numel() // n if n else 0
        blocks = -(-rows // max(16, -(-rows // MAX_BLOCKS)))
        dx = empty(shape, in_dtype)
        dweight = empty((0,) if weight_dtype is None else (n,), weight_dtype or torch.float32)
        dbias = empty((0,) if bias_dtype is None else (n,), bias_dtype or torch.float32)
        parts = empty((blocks, 2, n), torch.float32)
        function(
            torch.get_num_threads(),
            grad.data_ptr(),
            x.data_ptr(),
            None if extra is None else extra.data_ptr(),
            None if weight is None else weight.data_ptr(),
            dx.data_ptr(),
            dweight.data_ptr(),
            dbias.data_ptr(),
            parts.data_ptr(),
            blocks,
            n,
            *layout,
            eps,
            weight_offset,
        )
        return dx, dweight, dbias

    return launch
