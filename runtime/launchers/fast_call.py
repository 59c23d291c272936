"""The functions of ``fast_call.cpp.jinja``; it computes nothing, so ``launch`` hands them out."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

ARGTYPES = (ctypes.c_int, ctypes.c_void_p)
SIGNATURES = {
    "attach": ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_char_p),
    "install": ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
    "clear": ctypes.CFUNCTYPE(None, ctypes.c_int64),
    "set_pool": ctypes.CFUNCTYPE(None, ctypes.c_void_p),
    "count": ctypes.CFUNCTYPE(ctypes.c_int64),
    "serve_graphs": ctypes.CFUNCTYPE(None),
    "drop_graph": ctypes.CFUNCTYPE(None, ctypes.c_int64),
}


def make_launch(function: Any, spec: dict[str, Any], empty: Any) -> Callable[[], dict[str, Any]]:
    """``launch()`` gives the functions by name."""

    def launch() -> dict[str, Any]:
        table = (ctypes.c_void_p * len(SIGNATURES))()
        function(1, table)
        return {name: signature(address) for (name, signature), address in zip(SIGNATURES.items(), table, strict=True)}

    return launch
