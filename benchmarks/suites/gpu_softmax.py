"""Row softmax on a GPU: every algorithm beside torch eager and torch.compile, forward and backward.

Times are device events around one call, the L2 cache flushed before. Outputs are fresh, from torch's caching allocator.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...runtime.ops import softmax as ops
from ..harness import Bound, Case, Contender, Problem, Suite
from ..machine import dtype_name
from ..measure import Call
from ..peers import inductor
from ..record import Kind
from .softmax import TRAFFIC


@dataclass(frozen=True)
class Shape:
    """A tensor and a softmax over one of its dimensions. bias: "none", "additive" (shape of a slice) or "mask"."""

    name: str
    shape: tuple[int, ...]
    dim: int = -1
    dtype: torch.dtype = torch.float32
    log: bool = False
    bias: str = "none"
    scale: float = 1.0
    backward: bool = False


SHAPES = (
    Shape("short", (65536, 128)),
    Shape("medium", (16384, 2048), dtype=torch.bfloat16),
    Shape("vocabulary", (4096, 32768), dtype=torch.bfloat16),
    Shape("vocabulary-log", (4096, 50257), log=True),
    Shape("vocabulary-large", (2048, 131072), dtype=torch.bfloat16, log=True),
    Shape("long", (512, 1 << 20)),
    Shape("long-bf16", (512, 1 << 20), dtype=torch.bfloat16),
    Shape("one-row", (1, 1 << 27)),
    Shape("few-rows", (8, 1 << 24), dtype=torch.float16),
    Shape("columns", (16, 4096, 1024), dim=1),
    Shape("columns-long", (4, 1 << 17, 128), dim=1, dtype=torch.bfloat16),
    Shape("masked-scores", (16, 12, 1024, 1024), dtype=torch.bfloat16, bias="mask", scale=0.125),
    Shape("biased-scores", (16, 12, 1024, 1024), bias="additive", scale=0.125),
    Shape("medium-backward", (16384, 2048), dtype=torch.bfloat16, backward=True),
    Shape("long-backward", (512, 1 << 20), backward=True),
    Shape("log-backward", (4096, 50257), log=True, backward=True),
)
QUICK = ("short", "vocabulary", "long", "medium-backward")


def tensors(case: Shape, device: str) -> tuple[Tensor, Tensor | None, Tensor]:
    torch.manual_seed(0)
    x = (torch.randn(case.shape, device=device) * 4).to(case.dtype)
    bias = None
    if case.bias == "additive":
        bias = torch.randn(case.shape[-2:], device=device).to(case.dtype)
    elif case.bias == "mask":
        bias = torch.ones(case.shape[-2:], dtype=torch.bool, device=device).tril()
    return x, bias, torch.randn(case.shape, device=device).to(case.dtype)


def plain(case: Shape, x: Tensor, bias: Tensor | None) -> Tensor:
    """The same function as a user writes it."""
    z = x * case.scale if case.scale != 1.0 else x
    if bias is not None:
        z = z.masked_fill(~bias, float("-inf")) if bias.dtype == torch.bool else z + bias
    return (torch.log_softmax if case.log else torch.softmax)(z, case.dim)


def cut(case: Shape) -> tuple[slice, ...]:
    """Whole slices of up to 2^22 elements: what is compared with float64."""
    axis = 0 if case.dim % len(case.shape) != 0 else 1
    each = torch.Size(case.shape).numel() // case.shape[axis]
    few = max(1, min(case.shape[axis], (1 << 22) // max(each, 1)))
    return (slice(None),) * axis + (slice(0, few),)


def problem(case: Shape, device: str = "cuda", target: str = "triton") -> Problem:
    x, bias, grad = tensors(case, device)
    return backward(case, x, bias, grad, target) if case.backward else forward(case, x, bias, target)


def forward(case: Shape, x: Tensor, bias: Tensor | None, target: str) -> Problem:
    part, size = cut(case), x.numel() * x.element_size()
    tolerance = ops.TOLERANCE[x.dtype]

    def expected() -> Tensor:
        wide = bias.double() if bias is not None and bias.dtype != torch.bool else bias
        return ops.reference(x[part].double(), case.dim, wide, scale=case.scale, log=case.log)

    def compiled() -> Call:
        function = inductor(functools.partial(plain, case))
        return lambda: function(x, bias)

    def ours(algorithm: str) -> Call:
        options: dict[str, Any] = {"scale": case.scale, "log": case.log, "algorithm": algorithm, "target": target}
        ops.spec(x, case.dim, bias, **options)  # says why, where there is no kernel
        return lambda: torch.ops.tilewright.softmax(x, case.dim, bias, **options)

    # With scale or bias a peer rounds the scores to the dtype of x, which ours do not.
    rough = Bound(2**-6, 2**-6) if bias is not None else None
    contenders = [
        Contender("eager", Kind.PEER, lambda: plain(case, x, bias), bound=rough),
        Contender("inductor", Kind.PEER, make=compiled, bound=rough),
        Contender("ours", Kind.OURS, make=functools.partial(ours, "auto")),
    ]
    for algorithm, times in TRAFFIC.items():
        contenders.append(Contender(algorithm, Kind.OURS, make=functools.partial(ours, algorithm), bytes=times * size))
    extra = bias.numel() * bias.element_size() if bias is not None else 0
    bound = Bound(tolerance.atol, tolerance.rtol)
    return Problem("ours", contenders, expected, bound, lambda y: y[part], bytes=2 * size + extra)


def backward(case: Shape, x: Tensor, bias: Tensor | None, grad: Tensor, target: str) -> Problem:
    part, y, dim = cut(case), plain(case, x, bias), case.dim % x.dim()
    formula: Callable[..., Tensor] = (
        torch.ops.aten._log_softmax_backward_data if case.log else torch.ops.aten._softmax_backward_data
    )

    def expected() -> Tensor:
        out, g = y[part].double(), grad[part].double()
        total = (g if case.log else g * out).sum(case.dim, keepdim=True)
        return g - out.exp() * total if case.log else out * (g - total)

    def compiled() -> Call:
        function = inductor(lambda g, y: formula(g, y, dim, x.dtype))
        return lambda: function(grad, y)

    def ours() -> Call:
        ops.backward_spec(grad, y, case.dim, dtype=x.dtype, log=case.log, target=target)
        own = torch.ops.tilewright.softmax_backward
        return lambda: own(grad, y, case.dim, 1.0, x.dtype, case.log, target)

    tolerance = ops.TOLERANCE[x.dtype]
    return Problem(
        "ours",
        [
            Contender("eager", Kind.PEER, lambda: formula(grad, y, dim, x.dtype)),
            Contender("inductor", Kind.PEER, make=compiled),
            Contender("ours", Kind.OURS, make=ours),
        ],
        expected,
        # A gradient is a difference of sums over the row: its error is on the scale of the largest gradient.
        Bound(tolerance.atol + tolerance.rtol, largest=True),
        lambda result: result[part],
        bytes=3 * x.numel() * x.element_size(),
    )


def cases() -> list[Case]:
    return [
        Case(
            case.name,
            {"shape": list(case.shape), "dim": case.dim, "dtype": dtype_name(case.dtype), "log": case.log}
            | {"bias": case.bias, "backward": case.backward},
            functools.partial(problem, case),
            quick=case.name in QUICK,
        )
        for case in SHAPES
    ]


SUITE = Suite(
    "gpu-softmax",
    "Row softmax on a GPU, forward and backward.",
    cases,
    device="cuda",
    headline=("*",),
    compare=(("three_pass", "two_pass"), ("online", "two_pass")),
    plot_panels=("dtype",),
)
