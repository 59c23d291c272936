"""A toy native kernel, its launcher, and kernel ops made of it."""

from __future__ import annotations

import ctypes
import itertools
import subprocess
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tilewright.runtime import compilers, fast_call, memory, plans
from tilewright.runtime.ops.registry import LIBRARY

# out[i] = scale * x[i] + shift + bias[i] over a strided x of up to 4 dimensions, and who computed it.
SOURCE = """
#include <cstdint>
extern "C" void tilewright_launch(
    int threads, const float* x, const float* bias, float* out, float* who, const int64_t* layout, double scale,
    float shift, int64_t a, int64_t b, int64_t c, int64_t d, int64_t e, bool negate) {
  const int64_t rank = layout[0];
  int64_t count = 1;
  for (int64_t k = 0; k < rank; ++k) count *= layout[1 + k];
  for (int64_t i = 0; i < count; ++i) {
    int64_t left = i, at = 0, bias_at = 0;
    for (int64_t k = rank - 1; k >= 0; --k) {
      at += left % layout[1 + k] * layout[1 + rank + k];
      bias_at += left % layout[1 + k] * layout[1 + 2 * rank + k];
      left /= layout[1 + k];
    }
    const double value = scale * x[at] + shift + (bias ? bias[bias_at] : 0);
    out[i] = static_cast<float>(negate ? -value : value);
  }
  who[0] = static_cast<float>(threads);
  who[1] = static_cast<float>(a + 10 * b + 100 * c + 1000 * d + 10000 * e);
}
"""
ARGTYPES = (
    ctypes.c_int,
    *(ctypes.c_void_p,) * 5,
    ctypes.c_double,
    ctypes.c_float,
    *(ctypes.c_int64,) * 5,
    ctypes.c_bool,
)
SHIFT = 0.375


def build(folder: Path) -> Any:
    """The toy kernel's entry."""
    (folder / "toy.cpp").write_text(SOURCE)
    command = [*compilers.find_cxx().command, "-std=c++17", "-O1", "-shared", "-fPIC", "toy.cpp", "-o", "toy.so"]
    subprocess.run(command, cwd=folder, check=True)
    entry = ctypes.CDLL(str(folder / "toy.so")).tilewright_launch
    entry.argtypes, entry.restype = ARGTYPES, None
    return entry


def make_launch(function: Any, spec: dict[str, Any], empty: Callable[..., Tensor]) -> Callable[..., Any]:
    """``launch(x, bias, scale, negate) -> (out, who)``; out is a transposed view, who the middle of a buffer."""

    def launch(x: Tensor, bias: Tensor | None, scale: float, negate: bool) -> tuple[Tensor, Tensor]:
        shape, steps = tuple(x.shape), x.stride()
        other = (0,) * x.dim() if bias is None else bias.expand(shape).stride()
        numbers = (x.dim(), *shape, *steps, *other)
        out = empty(shape, torch.float32)
        scratch = empty((4,), torch.float32)
        who = scratch[1:3]
        function(
            torch.get_num_threads(),
            x.data_ptr(),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            who.data_ptr() if spec.get("inside") else scratch.data_ptr(),
            (ctypes.c_int64 * len(numbers))(*numbers),
            scale,
            SHIFT,
            *(1, 2, 3, 4, 5),
            negate,
        )
        return (out.transpose(0, -1) if spec.get("view", True) else out), scratch[:2] if not spec.get("inside") else who

    return launch


LAUNCHER = types.SimpleNamespace(ARGTYPES=ARGTYPES, make_launch=make_launch)
SCHEMA = 'Tensor x, Tensor? bias, float scale, str mode, *, bool negate=False, str target="cpp") -> (Tensor, Tensor)'
PASSES = ("x", "bias", "scale", "negate")
_numbers = itertools.count()


def native(function: Any, launcher: Any = LAUNCHER, **fields: Any) -> Callable[..., Any]:
    """A launch function as target cpp makes one."""
    launch = launcher.make_launch(function, fields, memory.empty)
    return plans.remember(launch, launcher, function, fields)


def define(choose: Callable[..., Any], schema: str = SCHEMA, passes: tuple[str, ...] = PASSES) -> Any:
    """A new kernel op, with a fake and a gradient for x."""
    name = f"toy_call_{next(_numbers)}"
    LIBRARY.define(f"{name}({schema}")
    fast_call.implement(name, choose, passes=passes)

    def fake(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return torch.empty(x.shape, dtype=torch.float32).transpose(0, -1), torch.empty(2)

    def save(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
        ctx.factor = inputs[2] * (-1 if keyword_only_inputs["negate"] else 1)

    def gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
        return grad.transpose(0, -1) * ctx.factor, None, None, None

    torch.library.register_fake(f"tilewright::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd(f"tilewright::{name}", gradient, setup_context=save, lib=LIBRARY)
    return getattr(torch.ops.tilewright, name).default


def expected(x: Tensor, bias: Tensor | None, scale: float, negate: bool = False) -> Tensor:
    value = (x.double() * scale + SHIFT + (0 if bias is None else bias.double())) * (-1 if negate else 1)
    return value.float().transpose(0, -1)


def fast(call: Callable[[], Any], times: int = 3 * fast_call.TRY_EVERY) -> int:
    """How many of some calls did not enter Python, after as many as it takes to lay the way."""
    for _ in range(times):
        call()
    before = fast_call.calls_without_python()
    for _ in range(times):
        call()
    return fast_call.calls_without_python() - before
