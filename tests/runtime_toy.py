"""A kernel spec and a target small enough to test the runtime itself with, also from other processes.

``ToySpec`` has a template that needs no file; ``CountingTarget`` appends a line to ``$TOY_LOG`` for every build and
needs neither torch nor triton, so that eight processes start in a second.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tilewright.codegen.spec import KernelSpec, require
from tilewright.runtime import load, targets
from tilewright.runtime.errors import BuildError

ROOT = Path(__file__).resolve().parent.parent

TRITON_TEXT = '''"""Softmax of each row of x (rows, n); n is at most BLOCK."""

import torch
import triton
import triton.language as tl


@triton.jit
def helper(values):
    return tl.sum(tl.exp(values - tl.max(values, 0)), 0)


@triton.jit
def rows(x, y, n, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    row = x + tl.program_id(0).to(tl.int64) * n
    values = tl.load(row + columns, mask=columns < n, other=float("-inf"))
    total = helper(values)
    weights = tl.exp(values - values.max(0)) / total
    # Library functions of every sort: scan, elementwise, integer, and as a member of the tensor.
    weights += 0 * (tl.cumsum(weights, 0) + tl.sigmoid(weights) + tl.cdiv(n, BLOCK) + tl.zeros([BLOCK], tl.float32))
    tl.store(y + tl.program_id(0).to(tl.int64) * n + columns, weights, mask=columns < n)


COMPILE = [
    {
        "kernel": "rows",
        "signature": {"x": "*fp32", "y": "*fp32", "n": "i32", "BLOCK": "constexpr"},
        "constexprs": {"BLOCK": BLOCK_SIZE},
        "num_warps": 4,
        "num_stages": 1,
    }
]


def launch(x):
    y = torch.empty_like(x)
    rows[(x.shape[0],)](x, y, x.shape[1], BLOCK=BLOCK_SIZE)
    return y
'''


@dataclass(frozen=True)
class ToySpec(KernelSpec):
    """block: columns of a tile. note: any ASCII letters, so that there are as many specs as a test wants."""

    templates: ClassVar[dict[str, str]] = {"triton": "none"}
    block: int = 64
    note: str = "a"

    def check(self) -> None:
        require(self.block > 0, f"block is {self.block}, but must be positive")
        require(self.note.isalnum(), f"note is {self.note!r}, but must be letters and digits")

    def candidates(self, target: str) -> list[ToySpec]:
        return [ToySpec(block, self.note) for block in (64, 128, 256)]


ToySpec.kind = "toy"  # after the class statement: not in SPECS, where tests of all shipped kinds would find it


def toy_text(spec: KernelSpec, target: str) -> str:
    assert isinstance(spec, ToySpec)
    if target == "counting":
        return f"def launch(x):\n    return ({spec.block}, {spec.note!r}, x)\n"
    return TRITON_TEXT.replace("BLOCK_SIZE", str(spec.block))


class CountingTarget:
    """Counts builds in ``$TOY_LOG``, takes ``$TOY_SECONDS``, fails for the note "broken"."""

    name = "counting"
    source_name = "kernel.py"

    def __init__(self, version: str = "1") -> None:
        self.version = version

    def toolchain(self) -> dict[str, str]:
        return {"counter": self.version}

    def build(self, folder: Path, spec: KernelSpec) -> None:
        if log := os.environ.get("TOY_LOG"):
            with open(log, "a") as file:
                file.write(f"{os.getpid()} {spec.to_json()}\n")
        time.sleep(float(os.environ.get("TOY_SECONDS", "0")))
        if getattr(spec, "note", "") == "broken":
            raise BuildError("the toy compiler found the note broken")
        (folder / "kernel.bin").write_bytes(b"machine code" * 100)

    def open(self, folder: Path, spec: KernelSpec, text: str, digest: str) -> Callable[..., Any]:
        if (folder / "kernel.bin").read_bytes() != b"machine code" * 100:
            raise AssertionError("a damaged entry was opened")
        names: dict[str, Any] = {}
        exec(compile(text, str(folder / self.source_name), "exec"), names)
        return names["launch"]

    def device(self) -> str | None:
        return "toy device"


def install() -> None:
    """Make this process render toys and know the counting target (for processes of their own)."""
    load.render = toy_text
    targets.register(CountingTarget())


def environment(cache: Path, **extra: str) -> dict[str, str]:
    """The environment of a child process: this checkout importable, that cache, no interpreter switch."""
    drop = ("TRITON_INTERPRET", "TRITON_CACHE_DIR")
    kept = {key: value for key, value in os.environ.items() if key not in drop and not key.startswith("TILEWRIGHT_")}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return {**kept, "PYTHONPATH": path, "TILEWRIGHT_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1", **extra}
