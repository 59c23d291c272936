"""Launch of the ``rope`` kernels: rotary position embedding and its gradient."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

ARGTYPES = (
    ctypes.c_int,  # threads
    *(ctypes.c_void_p,) * 4,  # x, cos, sin, out
    ctypes.c_int64,  # n
    ctypes.c_int64,  # rank
    ctypes.c_void_p,  # layout
)
MAX_RANK = 8
MAX_LAYOUTS = 1024


def make_launch(function: Any, spec: dict[str, Any], empty: Callable[[Sequence[int], torch.dtype], Tensor]) -> Any:
    """``launch(x, cos, sin) -> out``, contiguous, in the shape the three broadcast to. Any strides."""
    out_dtype = getattr(torch, spec["out_dtype"])
    layouts: dict[Any, Any] = {}

    def prepare(tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """The result's shape and the C array of batch sizes and strides; None where the kernel cannot walk the rows."""
        shape = torch.broadcast_shapes(*(t.shape for t in tensors))
        strides = [t.expand(shape).stride() for t in tensors]
        walkable = 0 in shape or (len(shape) - 1 <= MAX_RANK and all(s[-1] == 1 for s in strides))
        numbers = [*shape[:-1], *(step for s in strides for step in s[:-1])]
        if len(layouts) >= MAX_LAYOUTS:
            layouts.clear()
        return shape, (ctypes.c_int64 * max(len(numbers), 1))(*numbers) if walkable else None

    def launch(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        key = x.shape, x.stride(), cos.shape, cos.stride(), sin.shape, sin.stride()
        found = layouts.get(key)
        if found is None:
            found = layouts[key] = prepare((x, cos, sin))
        shape, layout = found
        if layout is None:
            flat = [t.expand(shape).contiguous().view(-1, shape[-1]) for t in (x, cos, sin)]
            return launch(*flat).view(shape)
        out = empty(shape, out_dtype)
        if out.numel():
            function(
                torch.get_num_threads(),
                x.data_ptr(),
                cos.data_ptr(),
                sin.data_ptr(),
                out.data_ptr(),
                shape[-1],
                len(shape) - 1,
                layout,
            )
        return out

    return launch
