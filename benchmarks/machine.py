"""The machine of a run: what it is, what it was pinned to, and its measured limits.

The limits are measured in the same process right before the rows: read bandwidth (a sum) and copy bandwidth (read and
written bytes both counted) by size of the working set, from inside the caches to memory, and the rate of a large matrix
product in float32, bfloat16 and int8.
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
import os
import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..runtime import cpu
from ..runtime.compilers import find_cxx
from ..runtime.errors import MissingCompiler, UnsupportedKernel
from .measure import Clock, clock_for
from .record import Peaks

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20
SIZES = (MIB // 2, 2 * MIB, 8 * MIB, 32 * MIB, 128 * MIB, 512 * MIB)
PACKAGES = (
    *("tilewright", "torch", "triton", "numpy", "transformers"),
    *("openvino", "llama-cpp-python", "onnxruntime-genai", "torchao"),
)


def pin(threads: int) -> list[int]:
    """Give this process ``threads`` processors and torch as many threads; returns the processors' numbers.

    The process is pinned, not each thread: contenders bring thread pools of their own.
    """
    torch.set_num_threads(threads)
    if not hasattr(os, "sched_setaffinity"):
        return []
    allowed = sorted(os.sched_getaffinity(0))[:threads]
    os.sched_setaffinity(0, allowed)
    return allowed


def describe(device: str, threads: int, affinity: list[int]) -> dict[str, Any]:
    """JSON-safe facts. ``slug`` names result files: the instruction set and the threads, or the GPU's name."""
    isa = instruction_set()
    facts: dict[str, Any] = {
        "cpu": cpu_model(),
        "architecture": platform.machine(),
        "flags": cpu_flags(),
        "isa": isa,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "processors": os.cpu_count() or 1,
        "threads": threads,
        "affinity": affinity,
        "caches": caches(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,  # others on the machine
        "huge_pages": _first_line(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
        facts["slug"] = slug(facts["gpu"])
    else:
        facts["slug"] = f"{slug(isa)}-{threads}-thread{'s' if threads > 1 else ''}"
    return facts


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def cpu_model() -> str:
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """The flags that decide which kernels run."""
    wanted = re.compile(r"^(avx|amx|fma|f16c|sse4|asimd|sve|bf16|i8mm|neon)")
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith(("flags", "Features")):
            return sorted({flag for flag in line.partition(":")[2].split() if wanted.match(flag)})
    return []


def instruction_set() -> str:
    """What kernels of target cpp are built for here: the setting ``TILEWRIGHT_CPU_ISA``, else the CPU's best."""
    try:
        return cpu.isa()
    except UnsupportedKernel:  # another architecture
        return platform.machine().lower()


def caches() -> dict[str, int]:
    """Bytes of one cache of each level: L1d, L2, L3."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind, level, size = (_first_line(index / name) for name in ("type", "level", "size"))
        if kind != "Instruction" and (match := re.fullmatch(r"(\d+)([KM])", size)):
            found["L1d" if level == "1" else f"L{level}"] = int(match[1]) * (1024 if match[2] == "K" else MIB)
    return found


def place(working_set: int, threads: int, levels: dict[str, int]) -> str:
    """Where a working set lives: "L2" (each thread has its own), "L3", "memory"; "" when the caches are unknown.

    A shared L3 of a virtual machine is far from its processors, so "out of cache" is said of everything beyond L2.
    """
    if not levels.get("L2"):
        return ""
    if working_set <= levels["L2"] * threads:
        return "L2"
    return "L3" if working_set <= levels.get("L3", 0) else "memory"


def versions() -> dict[str, str]:
    """Installed packages that take part; the C++ compiler where there is one."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    try:
        found["compiler"] = find_cxx().version.partition("\n")[0]
    except MissingCompiler:
        pass
    return found


def commit() -> dict[str, Any] | None:
    """The checkout's commit; dirty: tracked files differ from it. None where this is no checkout."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        top = subprocess.run(["git", "rev-parse", "--show-toplevel"], cwd=ROOT, capture_output=True, text=True)
        status = ["git", "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.run(status, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    if head.returncode != 0 or Path(top.stdout.strip()) != ROOT:
        return None
    # Results that this very run writes change nothing of what is measured.
    files = [line[3:] for line in changed.stdout.splitlines()]
    return {"id": head.stdout.strip(), "dirty": any(not f.startswith("benchmarks/results/") for f in files)}


def measure_peaks(
    device: str, quick: bool = False, tell: Callable[[str], None] = lambda text: None, clock: Clock | None = None
) -> Peaks:
    """About five seconds on two cores, one with ``quick``."""
    clock = clock or clock_for(device)
    peaks = Peaks()
    sizes = SIZES if device == "cpu" else (2048 * MIB,)
    for size in sizes:
        tell(f"measuring bandwidth, {size // MIB or 0.5} MiB")
        peaks.read.append([size, size / _seconds(_reader(size, device), clock, quick)])
        peaks.copy.append([size, size / _seconds(_copier(size, device), clock, quick)])
    for name, call, operations in _products(device, quick):
        tell(f"measuring matrix products, {name}")
        try:
            peaks.matmul[name] = operations / _seconds(call, clock, quick)
        except RuntimeError:  # no such product on this device
            continue
    return peaks


def _seconds(call: Callable[[], Any], clock: Clock, quick: bool) -> float:
    """The best of settled calls, as a limit should be, in at most half a second; a third of that with ``quick``."""
    call()
    first = clock.sample(call, 1)
    repeats = max(1, min(200, int(2e-3 / max(first, 1e-7))))
    most = 0.15 if quick else 0.5
    count = max(3, min(15, int(most / max(first * repeats, 1e-7))))
    return min(clock.sample(call, repeats) for _ in range(count))


def _reader(size: int, device: str) -> Callable[[], Any]:
    data = torch.ones(size // 4, device=device)
    return data.sum


def _copier(size: int, device: str) -> Callable[[], Any]:
    """``size`` bytes of working set: half is read, half written."""
    source = torch.ones(size // 8, device=device)
    target = torch.ones_like(source)
    return lambda: target.copy_(source)


def _products(device: str, quick: bool) -> list[tuple[str, Callable[[], Any], int]]:
    n = 8192 if device == "cuda" else 1024 if quick else 2048
    found: list[tuple[str, Callable[[], Any], int]] = []
    kinds = (torch.float32, torch.bfloat16, torch.float16) if device == "cuda" else (torch.float32, torch.bfloat16)
    for dtype in kinds:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        found.append((dtype_name(dtype), functools.partial(torch.mm, a, b, out=out), 2 * n**3))
    if device == "cpu":
        i, j = (torch.randint(-127, 127, (n, n), dtype=torch.int8) for _ in range(2))
        found.append(("int8", lambda: torch._int_mm(i, j), 2 * n**3))
    return found


def bandwidth(points: list[list[float]], working_set: int) -> float | None:
    """Bytes a second at a working set, from measured [bytes, rate] points: linear in the logarithm of the size."""
    if not points:
        return None
    points = sorted(points)
    if working_set <= points[0][0]:
        return points[0][1]
    for (small, low), (large, high) in zip(points, points[1:], strict=False):
        if working_set <= large:
            share = math.log(working_set / small) / math.log(large / small)
            return low + share * (high - low)
    return points[-1][1]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _first_line(path: Path) -> str:
    return next(iter(_lines(path)), "").strip()
