"""Launch of the ``norm`` kernels: rms_norm and layer_norm, with or without a residual."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

ARGTYPES = (
    ctypes.c_int,  # threads
    *(ctypes.c_void_p,) * 6,  # x, residual, weight, bias, out, sum
    ctypes.c_int64,  # n
    ctypes.c_int64,  # rank
    ctypes.c_void_p,  # layout
    ctypes.c_double,  # eps
    ctypes.c_double,  # weight_offset
)
MAX_RANK = 8
MAX_LAYOUTS = 1024


def make_launch(function: Any, spec: dict[str, Any], empty: Callable[[Sequence[int], torch.dtype], Tensor]) -> Any:
    """``launch(x, residual, weight, bias, eps, weight_offset) -> out``, and the sum where the spec keeps it.

    x, residual: (..., n), any strides. weight, bias: n elements, or None.
    """
    in_dtype, out_dtype = getattr(torch, spec["in_dtype"]), getattr(torch, spec["out_dtype"])
    keep_sum = spec["keep_sum"]
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
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        weight_offset: float = 0.0,
    ) -> Any:
        shape, steps = x.shape, x.stride()
        key = (shape, steps) if residual is None else (shape, steps, residual.stride())
        layout = layouts.get(key, layouts)
        if layout is layouts:
            layout = layouts[key] = layout_of(*key)
        if layout is None:
            x = x.contiguous().view(-1, shape[-1])
            residual = None if residual is None else residual.contiguous().view(-1, shape[-1])
            results = launch(x, residual, weight, bias, eps, weight_offset)
            return tuple(result.view(shape) for result in results) if keep_sum else results.view(shape)
        weight = weight if weight is None or weight.is_contiguous() else weight.contiguous()
        bias = bias if bias is None or bias.is_contiguous() else bias.contiguous()
        out = empty(shape, out_dtype)
        total = empty(shape, in_dtype) if keep_sum else None
        function(
            torch.get_num_threads(),
            x.data_ptr(),
            None if residual is None else residual.data_ptr(),
            None if weight is None else weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            None if total is None else total.data_ptr(),
            shape[-1],
            *layout,
            eps,
            weight_offset,
        )
        return out if total is None else (out, total)

    return launch
