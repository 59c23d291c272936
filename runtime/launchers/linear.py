"""How linear kernels are called: ``launch(x, weights, biases, residual, store)``."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch

# threads, layout, x, packed, residual, out
ARGTYPES = (ctypes.c_int, *(ctypes.c_void_p,) * 5)
_SIZE, _PACK, _RUN = range(3)
_KEPT = 1024

Store = Callable[[Sequence[torch.Tensor], str, int, Callable[[torch.Tensor], None]], torch.Tensor]


def rows_of(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The tensor, copied if need be, and how far apart its rows (all but the last dimension) are."""
    shape, strides = tensor.shape, tensor.stride()
    if tensor.is_contiguous():
        return tensor, shape[-1]
    if shape[-1] == 1 or strides[-1] == 1:
        step = None
        for size, stride in zip(reversed(shape[:-1]), reversed(strides[:-1]), strict=True):
            if size == 1:
                continue
            if step is None:
                step, reach = stride, stride * size
            elif stride == reach:
                reach *= size
            else:
                return tensor.contiguous(), shape[-1]
        return tensor, shape[-1] if step is None else step
    return tensor.contiguous(), shape[-1]


def make_launch(function: Any, spec: dict[str, Any], empty: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``launch(x, weights, biases, residual=None, store=None)``.

    x: (..., K). weights: (N_i, K) each; gated, the gate's and the other's, of one N. biases: (N_i,) or None each.
    residual: the result's shape. Returns (..., sum of N_i), gated (..., N), contiguous.
    store(weights, order, size, fill): packed weights of ``size`` bytes, uint8, made by ``fill(packed)`` when not at
    hand; without it the weights are packed for this call alone.
    """
    gated = spec["gated"]
    order = "linear gated" if gated else "linear"
    sizes: dict[tuple[int, ...], int] = {}

    def launch(
        x: torch.Tensor,
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor | None],
        residual: torch.Tensor | None = None,
        store: Store | None = None,
    ) -> torch.Tensor:
        x, x_row = rows_of(x)
        shape = x.shape
        K = shape[-1]
        M = x.numel() // K if K else shape[:-1].numel()
        threads = torch.get_num_threads()
        numbers = [_RUN, M, K, x_row, 0, len(weights)]
        held = []
        width = 0
        for weight, bias in zip(weights, biases, strict=True):
            if weight.stride(1) != 1 and weight.size(1) > 1:
                weight = weight.contiguous()
            if bias is not None and not bias.is_contiguous():
                bias = bias.contiguous()
            held.append((weight, bias))
            N = weight.size(0)
            numbers += (weight.data_ptr(), bias.data_ptr() if bias is not None else 0, N, weight.stride(0))
            width += N
        out = empty((*shape[:-1], width // 2 if gated else width), x.dtype)
        at = 0
        if residual is not None:
            residual, numbers[4] = rows_of(residual)
            at = residual.data_ptr()
        layout = (ctypes.c_int64 * len(numbers))(*numbers)
        key = (M, K, *numbers[8::4])
        size = sizes.get(key)
        if size is None:
            layout[0] = _SIZE
            function(threads, layout, None, None, None, None)
            size = layout[0]
            layout[0] = _RUN
            if len(sizes) >= _KEPT:
                sizes.clear()
            sizes[key] = size
        packed = None
        if size:

            def fill(buffer: torch.Tensor) -> None:
                layout[0] = _PACK
                function(threads, layout, None, buffer.data_ptr(), None, None)
                layout[0] = _RUN

            if store is None:
                packed = torch.empty(size, dtype=torch.uint8)
                fill(packed)
            else:
                packed = store(weights, order, size, fill)
        function(threads, layout, x.data_ptr(), packed.data_ptr() if packed is not None else None, at, out.data_ptr())
        return out

    return launch
