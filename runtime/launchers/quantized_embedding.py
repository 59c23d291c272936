"""Launch of the ``quantized_embedding`` kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

ARGTYPES = (
    ctypes.c_int,  # threads
    *(ctypes.c_void_p,) * 5,  # ids, codes, scale, zero, out
    *(ctypes.c_int64,) * 3,  # count, rows, columns
    ctypes.c_void_p,  # bad
)


def make_launch(function: Any, spec: dict[str, Any], empty: Callable[[Sequence[int], torch.dtype], Tensor]) -> Any:
    """``launch(ids, codes, scale, zero, rows, columns) -> out``.

    ids: integers of any shape. codes, scale, zero (None without): of a table (rows, columns), contiguous, in the layout
    of the spec. out: (*ids.shape, columns), contiguous. Raises IndexError for an id that is no row, as torch does.
    """
    dtype = getattr(torch, spec["dtype"])

    def launch(ids: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, rows: int, columns: int) -> Tensor:
        wanted = ids.to(torch.int64).contiguous()
        table = [None if t is None else t.contiguous() for t in (codes, scale, zero)]
        out = empty((*ids.shape, columns), dtype)
        bad = ctypes.c_int64(0)
        function(
            torch.get_num_threads(),
            wanted.data_ptr(),
            *(None if t is None else t.data_ptr() for t in table),
            out.data_ptr(),
            wanted.numel(),
            rows,
            columns,
            ctypes.addressof(bad),
        )
        if bad.value:
            found = int(wanted.reshape(-1)[bad.value - 1])
            raise IndexError(f"index out of range: id {found} in a table of {rows} rows")
        return out

    return launch
