"""Specs of native code that computes nothing: what the runtime itself needs in C++, built and kept like kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .spec import KernelSpec


@dataclass(frozen=True)
class MemoryPoolSpec(KernelSpec):
    """The allocator that keeps freed blocks (runtime/memory.py)."""

    kind: ClassVar[str] = "memory_pool"
    templates: ClassVar[dict[str, str]] = {"cpp": "cpp/memory_pool.cpp.jinja"}


@dataclass(frozen=True)
class FastCallSpec(KernelSpec):
    """The dispatcher kernel that launches native kernels without entering Python (runtime/fast_call.py)."""

    kind: ClassVar[str] = "fast_call"
    templates: ClassVar[dict[str, str]] = {"cpp": "cpp/fast_call.cpp.jinja"}
