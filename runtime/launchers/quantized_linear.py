"""How kernels of linear layers with packed weights are called."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...codegen.linear import MOST_WEIGHTS
from .linear import rows_of

# threads, layout, x, residual, out; of each weight codes, scales, zeros, bias; norm, eps
ARGTYPES = (ctypes.c_int, *(ctypes.c_void_p,) * (4 + 4 * MOST_WEIGHTS), ctypes.c_void_p, ctypes.c_double)
MAX_LAYOUTS = 1024


def make_launch(function: Any, spec: dict[str, Any], empty: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``launch(x, codes, scales, zeros, biases, residual, rows, norm, eps)``.

    x: (..., K). codes, scales: of each weight (N_i, K), in the layout ``panels`` (codegen/weight_format.py).
    zeros: likewise, or empty. biases: (N_i,) or None each. residual: the result's shape, or None. rows: the N_i.
    norm: (K,), what x is multiplied by once it is normalised, where the spec has a norm; eps: of the norm.
    Returns (..., sum of N_i), gated (..., N), contiguous.
    """
    gated = spec["gated"]
    layouts: dict[tuple[int, ...], Any] = {}

    def launch(
        x: torch.Tensor,
        codes: Sequence[torch.Tensor],
        scales: Sequence[torch.Tensor],
        zeros: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor | None],
        residual: torch.Tensor | None,
        rows: Sequence[int],
        norm: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> torch.Tensor:
        x, x_row = rows_of(x)
        shape = x.shape
        K = shape[-1]
        M = x.numel() // K if K else shape[:-1].numel()
        out = empty((*shape[:-1], rows[0] if gated else sum(rows)), x.dtype)
        residual_row = at = 0
        if residual is not None:
            residual, residual_row = rows_of(residual)
            at = residual.data_ptr()
        key = (M, K, x_row, residual_row, len(rows), *rows)
        layout = layouts.get(key)
        if layout is None:
            if len(layouts) >= MAX_LAYOUTS:
                layouts.clear()
            layout = layouts[key] = (ctypes.c_int64 * len(key))(*key)
        weights: list[int | None] = []
        held = []
        for i, (packed, scale, bias) in enumerate(zip(codes, scales, biases, strict=True)):
            zero = zeros[i] if zeros else None
            held.append([t if t is None or t.is_contiguous() else t.contiguous() for t in (packed, scale, zero, bias)])
            weights += [None if t is None else t.data_ptr() for t in held[-1]]
        weights += [None] * (4 * (MOST_WEIGHTS - len(held)))
        if norm is not None and not norm.is_contiguous():
            norm = norm.contiguous()
        normed = (None if norm is None else norm.data_ptr(), eps)
        function(torch.get_num_threads(), layout, x.data_ptr(), at or None, out.data_ptr(), *weights, *normed)
        return out

    return launch
