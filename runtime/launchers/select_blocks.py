"""Launch of the ``select_blocks`` kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

ARGTYPES = (
    ctypes.c_int,  # threads
    *(ctypes.c_void_p,) * 5,  # scores, states, budget, counts, indices
    ctypes.c_double,  # threshold
    ctypes.c_void_p,  # layout
)
MAX_LAYOUTS = 1024


def make_launch(function: Any, spec: dict[str, Any], empty: Callable[[Sequence[int], torch.dtype], Tensor]) -> Any:
    """``launch(scores, states, budget, threshold, most, sinks, local, causal, block_q, block_k) -> (counts, indices)``.

    scores float32 and states uint8 (B, H, NQ, NK), budget int32 (B, H, NQ) or None; any strides. counts int32
    (B, H, NQ), indices int32 (B, H, NQ, W), W = NK or the smaller of NK and ``most``.
    """
    layouts: dict[Any, Any] = {}

    def launch(
        scores: Tensor,
        states: Tensor,
        budget: Tensor | None,
        threshold: float,
        most: int,
        sinks: int,
        local: int,
        causal: bool,
        block_q: int,
        block_k: int,
    ) -> tuple[Tensor, Tensor]:
        shape = scores.shape
        width = min(shape[3], most) if most else shape[3]
        steps = (0, 0, 0) if budget is None else budget.stride()
        key = (shape, scores.stride(), states.stride(), steps, most, sinks, local, causal, block_q, block_k)
        layout = layouts.get(key)
        if layout is None:
            if len(layouts) >= MAX_LAYOUTS:
                layouts.clear()
            numbers = [*shape, width, most, sinks, local, int(causal), block_q, block_k]
            numbers += [*scores.stride(), *states.stride(), *steps]
            layout = layouts[key] = (ctypes.c_int64 * len(numbers))(*numbers)
        counts = empty(shape[:3], torch.int32)
        indices = empty((*shape[:3], width), torch.int32)
        function(
            torch.get_num_threads(),
            scores.data_ptr(),
            states.data_ptr(),
            None if budget is None else budget.data_ptr(),
            counts.data_ptr(),
            indices.data_ptr(),
            threshold,
            layout,
        )
        return counts, indices

    return launch
