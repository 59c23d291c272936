"""Self-attention on a GPU: our kernels beside torch's SDPA and FlexAttention, forward and backward.

Times are device events around one call, the L2 cache flushed before. The floor is the time of the products that the
mask leaves: a visible pair counts 4 D operations forward and 10 D backward (five products, the scores computed again).
Sigmoid has no peer in torch: there SDPA's softmax is timed beside it, for scale only, and checked as softmax.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...runtime.ops import attention as ops
from ..harness import Case, Contender, Problem, Suite
from ..machine import dtype_name
from ..measure import Call
from ..peers import inductor
from ..record import Kind
from .attention import BOUND, CAUSAL, Sample, pairs, projected

CHECKED = 1000  # tokens of the problem that gradients are compared on; no multiple of a tile


@dataclass(frozen=True)
class Shape:
    """Self-attention of ``length`` tokens. window: keys that a query sees, 0 for no limit (needs causal)."""

    name: str
    batch: int
    heads: int
    length: int
    dim: int = 128
    key_heads: int = 0
    dtype: torch.dtype = torch.bfloat16
    causal: bool = True
    window: int = 0
    normalizer: str = "softmax"

    @property
    def mask(self) -> str:
        if self.window:
            return f"(k_idx <= q_idx) & (k_idx > q_idx - {self.window})"
        return CAUSAL if self.causal else ""

    def visible(self, row: Tensor, column: Tensor) -> Tensor:
        inside = column <= row
        return inside & (column > row - self.window) if self.window else inside


SHAPES = (
    Shape("causal-4k", 4, 16, 4096),
    Shape("causal-16k", 1, 16, 16384),
    Shape("causal-4k-64", 4, 32, 4096, dim=64),
    Shape("causal-4k-256", 4, 8, 4096, dim=256),
    Shape("causal-4k-fp16", 4, 16, 4096, dtype=torch.float16),
    Shape("causal-grouped-8k", 2, 32, 8192, key_heads=8),
    Shape("full-4k", 4, 16, 4096, causal=False),
    Shape("full-4k-80", 4, 16, 4096, dim=80, causal=False),
    Shape("window-1k-of-16k", 1, 16, 16384, window=1024),
    Shape("causal-2k-fp32", 2, 8, 2048, dim=64, dtype=torch.float32),
    Shape("sigmoid-causal-4k", 4, 16, 4096, normalizer="sigmoid"),
    Shape("sigmoid-causal-4k-64", 4, 32, 4096, dim=64, normalizer="sigmoid"),
    Shape("sigmoid-full-4k", 4, 16, 4096, causal=False, normalizer="sigmoid"),
)
QUICK = ("causal-4k", "window-1k-of-16k", "sigmoid-causal-4k")
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def inputs(case: Shape, batch: int, length: int, device: str) -> list[Tensor]:
    torch.manual_seed(0)
    heads = (case.heads, case.key_heads or case.heads, case.key_heads or case.heads)
    return [projected(batch, h, length, case.dim, case.dtype, device).requires_grad_() for h in heads]


def ours(case: Shape, length: int, device: str, target: str) -> Attention:
    shift = torch.full((1,), -math.log(length), device=device) if case.normalizer == "sigmoid" else None
    options: dict[str, Any] = {"scale": case.dim**-0.5, "mask": case.mask, "normalizer": case.normalizer}

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.tilewright.attention(q, k, v, None, shift, **options, target=target)

    return call


def sdpa(case: Shape) -> Attention:
    """The flash backend where it takes the dtype, else the one that torch chooses."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    half = case.dtype != torch.float32
    backends = [SDPBackend.FLASH_ATTENTION] if half else [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backends):
            return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=bool(case.key_heads))

    return call


def flex(case: Shape, length: int, device: str) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled, block = inductor(flex_attention), None
    if case.mask:
        block = create_block_mask(lambda b, h, q, k: case.visible(q, k), None, None, length, length, device=device)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled(q, k, v, block_mask=block, enable_gqa=bool(case.key_heads))

    return call


def gradients(make: Callable[[int], Attention], length: int, args: list[Tensor], grad: Tensor) -> Call:
    """Backward alone: the forward runs once, before."""
    q, k, v = args
    with torch.enable_grad():
        out = make(length)(q, k, v)
    return lambda: torch.autograd.grad(out, args, grad, retain_graph=True)


def _gradients(make: Callable[[int], Attention], length: int, args: list[Tensor], grad: Tensor) -> Any:
    return gradients(make, length, args, grad)()


def problem(case: Shape, backward: bool, device: str = "cuda", target: str = "triton") -> Problem:
    args = inputs(case, case.batch, case.length, device)
    makers: dict[str, tuple[Kind, Callable[[int], Attention]]] = {
        "ours": (Kind.OURS, lambda length: ours(case, length, device, target))
    }
    if not case.window:
        # Beside sigmoid it computes another function: there it is timed for scale only.
        kind = Kind.PEER if case.normalizer == "softmax" else Kind.CONTEXT
        makers["sdpa"] = (kind, lambda length: sdpa(case))
    if case.normalizer == "softmax":
        makers["flex"] = (Kind.PEER, lambda length: flex(case, length, device))
    visible = case.visible if case.causal else None
    q, k, v = (t.detach() for t in args)
    sample = Sample(q, k, v, visible)
    products = case.batch * case.heads * case.dim * pairs(case.length, case.causal, case.window)
    contenders: list[Contender]
    if backward:
        contenders, expected = _backward(case, makers, args, device)
        of: Callable[[Any], Any] = lambda result: result  # noqa: E731
    else:
        shift = -math.log(case.length) if case.normalizer == "sigmoid" else 0.0
        contenders = []
        for name, (kind, make) in makers.items():
            # SDPA beside sigmoid computes a softmax.
            own = functools.partial(sample.expected, case.normalizer, shift) if name == "ours" else sample.expected
            call = functools.partial(_forward, make, case.length, args)
            contenders.append(Contender(name, kind, make=call, expected=own))
        expected, of = sample.expected, sample.of
    return Problem(
        "ours",
        contenders,
        expected,
        BOUND[case.dtype],
        of,
        flops=(10 if backward else 4) * products,
        dtype=dtype_name(case.dtype),
    )


def _forward(make: Callable[[int], Attention], length: int, args: list[Tensor]) -> Call:
    call, (q, k, v) = make(length), args
    return lambda: call(q, k, v)


def _backward(
    case: Shape, makers: dict[str, tuple[Kind, Callable[[int], Attention]]], args: list[Tensor], device: str
) -> tuple[list[Contender], Call]:
    """Gradients are compared on a problem of one batch and at most :data:`CHECKED` tokens."""
    length = min(case.length, CHECKED)
    small = inputs(case, 1, length, device)
    q, k, v = exact = [t.detach().double().requires_grad_() for t in small]
    grads = [
        torch.randn(b, n, case.heads, case.dim, device=device).to(case.dtype).transpose(1, 2)
        for b, n in ((case.batch, case.length), (1, length))
    ]

    def expected(normalizer: str) -> tuple[Tensor, ...]:
        shift = torch.full((1,), -math.log(length), device=device) if normalizer == "sigmoid" else None
        with torch.enable_grad():
            options: dict[str, Any] = {"scale": case.dim**-0.5, "mask": case.mask, "normalizer": normalizer}
            out = ops.reference(q, k, v, None, shift, **options)
        return torch.autograd.grad(out, exact, grads[1].double())

    found = []
    for name, (kind, make) in makers.items():
        normalizer = case.normalizer if name == "ours" else "softmax"
        found.append(
            Contender(
                name,
                kind,
                make=functools.partial(gradients, make, case.length, args, grads[0]),
                answer=functools.partial(_gradients, make, length, small, grads[1]),
                expected=functools.partial(expected, normalizer),
            )
        )
    return found, functools.partial(expected, case.normalizer)


def cases() -> list[Case]:
    found = []
    for case in SHAPES:
        for backward in (False, True):
            phase = "backward" if backward else "forward"
            params = {
                "phase": phase,
                "shape": [case.batch, case.heads, case.key_heads or case.heads, case.length, case.dim],
                "dtype": dtype_name(case.dtype),
                "mask": case.mask,
                "normalizer": case.normalizer,
            }
            make = functools.partial(problem, case, backward)
            found.append(Case(f"{case.name}/{phase}", params, make, quick=case.name in QUICK))
    return found


SUITE = Suite(
    "gpu-attention",
    "Self-attention on a GPU, forward and backward.",
    cases,
    device="cuda",
    headline=("*",),
    plot_panels=("phase", "normalizer"),
)
