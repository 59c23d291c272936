"""Launch of the ``gated_mlp_backward`` kernels: the gradients of act(gate) * up."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

ARGTYPES = (
    ctypes.c_int,  # threads
    *(ctypes.c_void_p,) * 5,  # grad, gate, up, dgate, dup
    ctypes.c_int64,  # rank
    ctypes.c_void_p,  # layout
)
MAX_RANK = 8
MAX_LAYOUTS = 1024


def make_launch(function: Any, spec: dict[str, Any], empty: Callable[[Sequence[int], torch.dtype], Tensor]) -> Any:
    """``launch(grad, gate, up) -> (dgate, dup)``, contiguous, in the shape of grad, to which gate and up broadcast."""
    gate_dtype, up_dtype = getattr(torch, spec["gate_dtype"]), getattr(torch, spec["up_dtype"])
    layouts: dict[Any, Any] = {}

    def prepare(tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """The result's shape and the C array of sizes and strides; None where the kernel cannot walk the tensors."""
        shape = tensors[0].shape
        strides = [t.expand(shape).stride() for t in tensors]
        # A last size of 1 merges with nothing, and the elements before it may be far apart.
        plain = 1 <= len(shape) <= MAX_RANK and shape[-1] > 1 and all(s[-1] == 1 for s in strides)
        walkable = plain or 0 in shape or shape == (1,)
        numbers = [*shape, *(step for s in strides for step in s)]
        if len(layouts) >= MAX_LAYOUTS:
            layouts.clear()
        return shape, (ctypes.c_int64 * len(numbers))(*numbers) if walkable else None

    def launch(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        key = grad.shape, grad.stride(), gate.shape, gate.stride(), up.shape, up.stride()
        found = layouts.get(key)
        if found is None:
            found = layouts[key] = prepare((grad, gate, up))
        shape, layout = found
        if layout is None:
            flat = [t.expand(shape).contiguous().view(-1) for t in (grad, gate, up)]
            dgate, dup = launch(*flat)
            return dgate.view(shape), dup.view(shape)
        dgate, dup = empty(shape, gate_dtype), empty(shape, up_dtype)
        if dgate.numel():
            function(
                torch.get_num_threads(),
                grad.data_ptr(),
                gate.data_ptr(),
                up.data_ptr(),
                dgate.data_ptr(),
                dup.data_ptr(),
                len(shape),
                layout,
            )
        return dgate, dup

    return launch
