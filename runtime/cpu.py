"""The CPU's instruction sets, as the native kernels of target ``cpp`` are built for them.

======== ==================================================================== =====================================
name     what a kernel may use                                                ATen's ``Vectorized<float>``
======== ==================================================================== =====================================
amx      AVX-512 F, BW, DQ, VL, BF16, VNNI and the AMX tiles (bf16, int8)     16 lanes
avx512   AVX-512 F, BW, DQ, VL                                                16 lanes
avx2     AVX2, FMA, F16C                                                      8 lanes
baseline plain x86-64 (SSE2)                                                  arrays of 8 that the compiler vectorises
neon     aarch64 with Advanced SIMD                                           as ATen's headers choose
======== ==================================================================== =====================================

The best that this CPU has is used, unless the setting ``TILEWRIGHT_CPU_ISA`` names another one of its own.
"""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

from . import settings
from .errors import BadArgument, UnsupportedKernel

_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512")
_CAPABILITY_512 = ("-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512")
_PLAIN = ("-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT")
_AMX = ("-mavx512bf16", "-mavx512vnni", "-mamx-tile", "-mamx-bf16", "-mamx-int8", "-DTILEWRIGHT_AMX")
# Best first.
FLAGS: dict[str, tuple[str, ...]] = {
    "amx": (*_AVX512, *_AMX, *_CAPABILITY_512),
    "avx512": (*_AVX512, *_CAPABILITY_512),
    "avx2": ("-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"),
    "baseline": _PLAIN,
    # The headers return vectors in pairs; that GCC 10 changed how is nobody's concern inside one process.
    "neon": (*_PLAIN, "-Wno-psabi"),
}


@functools.cache
def supported() -> tuple[str, ...]:
    """The instruction sets of this CPU, best first. Asks the kernel for AMX's registers, once a process."""
    import torch

    machine = platform.machine().lower()
    if machine in ("aarch64", "arm64"):
        return ("neon",)
    if machine not in ("x86_64", "amd64"):
        raise UnsupportedKernel(f"native kernels are written for x86-64 and aarch64, and this CPU is {machine}")
    found = ["baseline"]
    if torch.cpu._is_avx2_supported():
        found.insert(0, "avx2")
    if torch.cpu._is_avx512_supported():
        found.insert(0, "avx512")
        bf16 = torch.cpu._is_avx512_bf16_supported() and torch.cpu._is_vnni_supported()
        if bf16 and torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx():
            found.insert(0, "amx")
    return tuple(found)


def isa() -> str:
    """The instruction set kernels are built for: the setting's, else the best of this CPU.

    Raises :class:`~.errors.BadArgument` for a setting that this CPU lacks.
    """
    wanted = settings.get().cpu_isa
    if wanted == "auto":
        return supported()[0]
    if wanted not in supported():
        raise BadArgument(f"TILEWRIGHT_CPU_ISA is {wanted!r}, and this CPU runs {', '.join(supported())}")
    return wanted


@functools.cache
def cache_bytes() -> int:
    """Size of a core's second-level cache; 1 MiB where the system does not say."""
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, size = (index / "level").read_text().strip(), (index / "size").read_text().strip()
        except OSError:
            continue  # containers may hide single files
        if level == "2" and size[:-1].isdigit():
            return int(size[:-1]) * {"K": 1 << 10, "M": 1 << 20}.get(size[-1], 1)
    try:
        found = os.sysconf("SC_LEVEL2_CACHE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows, macOS: no such function or name
        found = 0
    return found if found > 0 else 1 << 20
