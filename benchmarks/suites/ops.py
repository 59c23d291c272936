"""The small canonical ops and ``linear`` on the CPU, at the sizes of MiniLM and SmolLM2, beside eager and Inductor."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tilewright.runtime.ops as registered

from ..harness import Bound, Case, Contender, Problem, Suite
from ..machine import dtype_name
from ..measure import Call
from ..peers import inductor
from ..record import Kind

# What a user writes, and our op for the same function: (eager, own), each of (tensors..., target).
Pair = tuple[Callable[..., Tensor], Callable[..., Tensor]]


def _rotated(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def _llama_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def pairs() -> dict[str, Pair]:
    ops = torch.ops.tilewright
    return {
        "rms_norm": (
            _llama_norm,
            lambda x, w, target: ops.rms_norm(x, w, 1e-5, round_before_weight=True, target=target),
        ),
        "layer_norm": (
            lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b),
            lambda x, w, b, target: ops.layer_norm(x, x.shape[-1:], w, b, target=target),
        ),
        "rope": (
            lambda x, cos, sin: x * cos + _rotated(x) * sin,
            lambda x, cos, sin, target: ops.rope(x, cos, sin, target=target),
        ),
        "gated_mlp": (
            lambda gate, up: F.silu(gate) * up,
            lambda gate, up, target: ops.gated_mlp(gate, up, activation="silu", target=target),
        ),
        "linear": (F.linear, lambda x, w, target: ops.linear(x, w, target=target)),
    }


def inputs(op: str, sizes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """sizes: (tokens, width); rope: (heads, length, dim); linear: (tokens, in, out)."""
    torch.manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype)

    match op:
        case "rms_norm":
            return [normal(*sizes), normal(sizes[1])]
        case "layer_norm":
            return [normal(*sizes), normal(sizes[1]), normal(sizes[1])]
        case "gated_mlp":
            return [normal(*sizes), normal(*sizes)]
        case "rope":
            heads, length, dim = sizes
            angles = torch.outer(torch.arange(length), 1e4 ** (-torch.arange(0, dim, 2) / dim)).repeat(1, 2)
            x = normal(1, length, heads, dim).transpose(1, 2)
            return [x, angles.cos().to(dtype), angles.sin().to(dtype)]
        case "linear":
            tokens, width, wide = sizes
            return [normal(tokens, width), normal(wide, width) * width**-0.5]
    raise AssertionError(op)


SIZES: dict[str, tuple[tuple[int, ...], ...]] = {
    "rms_norm": ((1, 576), (512, 576), (2048, 4096), (16384, 4096)),
    "layer_norm": ((128, 384), (4096, 384), (16384, 4096)),
    "rope": ((9, 1, 64), (9, 512, 64), (32, 4096, 128)),
    "gated_mlp": ((1, 1536), (512, 1536), (4096, 11008)),
    "linear": ((1, 576, 576), (1, 576, 49152), (1, 4096, 4096), (512, 576, 1536), (4096, 384, 1536)),
}


def problem(op: str, sizes: tuple[int, ...], dtype: torch.dtype) -> Problem:
    tensors = inputs(op, sizes, dtype)
    eager, own = pairs()[op]
    result = eager(*tensors)
    canonical: Any = registered.OPS[op]
    tolerance = canonical.tolerance[dtype]

    def ours() -> Call:
        own(*tensors, target="cpp")  # raises UnsupportedKernel with the reason
        return lambda: own(*tensors, target="cpp")

    def compiled() -> Call:
        function = inductor(eager)
        return lambda: function(*tensors)

    moved = sum(t.numel() * t.element_size() for t in (*tensors, result))
    linear = op == "linear"
    return Problem(
        "ours",
        [
            Contender("eager", Kind.PEER, lambda: eager(*tensors)),
            Contender("inductor", Kind.PEER, make=compiled),
            Contender("ours", Kind.OURS, make=ours),
        ],
        lambda: eager(*(t.double() for t in tensors)),
        # The reference is eager in float64; an op's table speaks of the reference in its own dtype.
        Bound(4 * max(tolerance.atol, tolerance.rtol), 4 * tolerance.rtol),
        bytes=moved,
        flops=2 * tensors[0].numel() * tensors[1].shape[0] if linear else 0,
        traffic="read" if linear else "copy",
        dtype=dtype_name(dtype),
    )


def cases() -> list[Case]:
    return [
        Case(
            f"{op}/{dtype_name(dtype)}/{'x'.join(map(str, sizes))}",
            {"op": op, "dtype": dtype_name(dtype), "sizes": list(sizes)},
            functools.partial(problem, op, sizes, dtype),
            quick=sizes is SIZES[op][1],
        )
        for op in SIZES
        for dtype in (torch.float32, torch.bfloat16)
        for sizes in SIZES[op]
    ]


SUITE = Suite(
    "ops",
    "Norms, rope, gated activation and linear, at the sizes of MiniLM, SmolLM2 and a 7B model.",
    cases,
    headline=(),
    plot_panels=("op", "dtype"),
)
