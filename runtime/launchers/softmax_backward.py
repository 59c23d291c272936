"""The Python side of the softmax backward kernel: ``launch(grad, y, dim, scale)``. Needs torch and ctypes only."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

ARGTYPES = (
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_double,
    ctypes.c_void_p,
)
MOST_LAYOUTS = 1024
"""How many layouts a kernel remembers."""

Stride = tuple[int, ...]


def batch(sizes: list[int], strides: list[Stride]) -> list[tuple[int, Stride]]:
    """Batch dimensions as ``(size, stride in each tensor)``, innermost first, never empty.

    Dimensions of size 1 go; the others are sorted by the first tensor's stride, because rows are independent and
    neighbouring rows should be neighbours in memory; two that every tensor steps through evenly become one.
    """
    dims = [(size, step) for size, *step in zip(sizes, *strides, strict=True) if size != 1][::-1]
    dims.sort(key=lambda dim: (dim[1][0] == 0, dim[1][0]))
    merged: list[tuple[int, Stride]] = []
    for size, step in dims:
        if merged and all(s == merged[-1][0] * inner for s, inner in zip(step, merged[-1][1], strict=True)):
            merged[-1] = (merged[-1][0] * size, merged[-1][1])
        else:
            merged.append((size, tuple(step)))
    return merged or [(1, (0,) * len(strides))]


def layout(shape: Stride, dim: int, strides: list[Stride]) -> list[int]:
    """The kernel's ``layout``: n, the strides along a row of each tensor, the number of batch dimensions, and these."""
    rest = [d for d in range(len(shape)) if d != dim]
    dims = batch([shape[d] for d in rest], [tuple(steps[d] for d in rest) for steps in strides])
    found = [shape[dim], *(steps[dim] for steps in strides), len(dims)]
    for size, steps in dims:
        found += [size, *steps]
    return found


def contiguous(shape: Stride) -> Stride:
    """The strides of a contiguous tensor."""
    steps, step = [], 1
    for size in reversed(shape):
        steps.append(step)
        step *= size
    return tuple(reversed(steps))


def make_launch(function: Any, spec: dict[str, Any], empty: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """``launch(grad, y, dim, scale)``: dx, a new contiguous tensor of y's shape. grad, y: of one shape, any strides."""
    out_dtype = getattr(torch, spec["out_dtype"])
    layouts: dict[Any, Any] = {}
    threads = torch.get_num_threads

    def remember(key: Any, grad: torch.Tensor, y: torch.Tensor, dim: int) -> Any:
        shape = tuple(y.shape) or (1,)
        strides = [y.stride() or (1,), grad.stride() or (1,), contiguous(shape)]
        values = layout(shape, dim % len(shape), strides)
        if len(layouts) >= MOST_LAYOUTS:
            layouts.clear()
        found = layouts[key] = (ctypes.c_int64 * len(values))(*values) if y.numel() else None
        return found

    def launch(grad: torch.Tensor, y: torch.Tensor, dim: int, scale: float) -> torch.Tensor:
        shape = y.shape
        out = empty(shape, out_dtype)
        key = (shape, y.stride(), grad.stride(), dim)
        try:
            at = layouts[key]
        except KeyError:
            at = remember(key, grad, y, dim)
        if at is not None:
            function(threads(), y.data_ptr(), grad.data_ptr(), out.data_ptr(), scale, at)
        return out

    return launch
