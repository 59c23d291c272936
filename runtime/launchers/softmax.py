"""The Python side of the softmax kernel: ``launch(x, bias, dim, scale)``. Needs torch and ctypes only."""

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
    """``launch(x, bias, dim, scale)``: a new contiguous tensor of x's shape. x, bias: any strides; bias broadcasts."""
    out_dtype = getattr(torch, spec["out_dtype"])
    biased = spec["bias"] != "none"
    layouts: dict[Any, Any] = {}
    threads = torch.get_num_threads

    def remember(key: Any, x: torch.Tensor, bias: torch.Tensor | None, dim: int) -> Any:
        shape = tuple(x.shape) or (1,)
        strides = [x.stride() or (1,)]
        if biased and bias is not None:
            strides.append(bias.expand(x.shape).stride() or (1,))
        values = layout(shape, dim % len(shape), [*strides, contiguous(shape)])
        if len(layouts) >= MOST_LAYOUTS:
            layouts.clear()
        found = layouts[key] = (ctypes.c_int64 * len(values))(*values) if x.numel() else None
        return found

    def launch(x: torch.Tensor, bias: torch.Tensor | None, dim: int, scale: float) -> torch.Tensor:
        shape = x.shape
        out = empty(shape, out_dtype)
        if bias is None:
            key: Any = (shape, x.stride(), dim)
        else:
            key = (shape, x.stride(), dim, bias.shape, bias.stride())
        try:
            at = layouts[key]
        except KeyError:
            at = remember(key, x, bias, dim)
        if at is not None:
            address = bias.data_ptr() if bias is not None else None
            function(threads(), x.data_ptr(), address, out.data_ptr(), scale, at)
        return out

    return launch
