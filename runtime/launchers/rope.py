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
    """``launch(x, cos, sin) -> out``, in the shape the three broadcast to. Any strides.

    Where that is x's own shape, out has the strides of ``torch.empty_like(x)``, else it is contiguous.
    """
    out_dtype = getattr(torch, spec["out_dtype"])
    layouts: dict[Any, Any] = {}

    def prepare(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Any, ...]:
        """The result's shape and strides (None: contiguous), and the C array of batch sizes and strides.

        The array is None where the kernel cannot walk the rows, and of length 0 where there are none.
        """
        shape = torch.broadcast_shapes(x.shape, cos.shape, sin.shape)
        out = torch.empty_like(x, device="meta") if x.shape == shape else torch.empty(shape, device="meta")
        kept = None if out.stride() == torch.empty(shape, device="meta").stride() else out.stride()
        strides = [t.expand(shape).stride() for t in (x, cos, sin, out)]
        if len(layouts) >= MAX_LAYOUTS:
            layouts.clear()
        if out.numel() == 0:
            return shape, kept, ()
        if len(shape) - 1 > MAX_RANK or any(s[-1] != 1 for s in strides):
            return shape, kept, None
        # Rows in the order in which they lie in memory.
        dims = sorted(range(len(shape) - 1), key=out.stride().__getitem__, reverse=True)
        numbers = [*(shape[d] for d in dims), *(s[d] for s in strides for d in dims)]
        return shape, kept, (ctypes.c_int64 * max(len(numbers), 1))(*numbers)

    def launch(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        key = x.shape, x.stride(), cos.shape, cos.stride(), sin.shape, sin.stride()
        found = layouts.get(key)
        if found is None:
            found = layouts[key] = prepare(x, cos, sin)
        shape, strides, layout = found
        if layout is None:
            flat = [t.expand(shape).contiguous().view(-1, shape[-1]) for t in (x, cos, sin)]
            out = launch(*flat).view(shape)
            return out if strides is None else torch.empty_strided(shape, strides, dtype=out_dtype).copy_(out)
        out = empty(shape, out_dtype)
        if strides is not None:
            out = out.as_strided(shape, strides)
        if layout:
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
