"""The functions of the memory pool (``memory_pool.cpp.jinja``); it computes nothing, so ``launch`` hands them out."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

ARGTYPES = (ctypes.c_int, ctypes.c_void_p)
SIGNATURES = {
    "enter": ctypes.CFUNCTYPE(None),
    "leave": ctypes.CFUNCTYPE(None),
    "trim": ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64),
    "set_limit": ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64),
    "statistics": ctypes.CFUNCTYPE(None, ctypes.c_void_p),
    "allocator": ctypes.CFUNCTYPE(ctypes.c_void_p),
}
STATISTICS = (
    "used_bytes",
    "used_blocks",
    "free_bytes",
    "free_blocks",
    "reused",
    "mapped",
    "unmapped",
    "limit",
)


def make_launch(function: Any, spec: dict[str, Any], empty: Any) -> Callable[[], dict[str, Any]]:
    """``launch()`` gives the functions by name. ``statistics`` fills as many int64 as :data:`STATISTICS` names."""

    def launch() -> dict[str, Any]:
        table = (ctypes.c_void_p * len(SIGNATURES))()
        function(1, table)
        return {name: signature(address) for (name, signature), address in zip(SIGNATURES.items(), table, strict=True)}

    return launch
