"""Launch of the ``gated_mlp`` kernels: act(gate) * up."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

ARGTYPES = (
    ctypes.c_int,  # threads
    *(ctypes.c_void_p,) * 3,  # gate, up, out
    ctypes.c_int64,  # rank
    ctypes.c_void_p,  # layout
)
MAX_RANK = 8
MAX_LAYOUTS = 1024


def make_launch(function: Any, spec: dict[str, Any], empty: Callable[[Sequence[int], torch.dtype], Tensor]) -> Any:
    """``launch(gate, up) -> out``, contiguous, in the shape the two broadcast to. Any strides."""
    out_dtype = getattr(torch, spec["out_dtype"])
    layouts: dict[Any, Any] = {}

    def prepare(tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """The result's shape and the C array of sizes and strides; None where the kernel cannot walk the tensors."""
        shape = torch.broadcast_shapes(*(t.shape for t in tensors))
        strides = [t.expand(shape).stride() for t in tensors]
        # A last size of 1 merges with nothing, and the elements before it may be far apart.
        plain = 1 <= len(shape) <= MAX_RANK and shape[-1] > 1 and all(s[-1] == 1 for s in strides)
        walkable = plain or 0 in shape or shape == (1,)
        numbers = [*shape, *(step for s in strides for step in s)]
        if len(layouts) >= MAX_LAYOUTS:
            layouts.clear()
        return shape, (ctypes.c_int64 * len(numbers))(*numbers) if walkable else None

    def launch(gate: Tensor, up: Tensor) -> Tensor:
        key = gate.shape, gate.stride(), up.shape, up.stride()
        found = layouts.get(key)
        if found is None:
            found = layouts[key] = prepare((gate, up))
        shape, layout = found
        if layout is None:
            flat = [t.expand(shape).contiguous().view(-1) for t in (gate, up)]
            return launch(*flat).view(shape)
        out = empty(shape, out_dtype)
        if out.numel():
            function(torch.get_num_threads(), gate.data_ptr(), up.data_ptr(), out.data_ptr(), len(shape), layout)
        return out

    return launch
