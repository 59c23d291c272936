"""Self-attention on the CPU: our softmax and sigmoid attention beside torch's SDPA and, where it runs, FlexAttention.

q, k and v are laid out as models make them: (batch, length, heads, dim) in memory, seen as (batch, heads, length, dim).
The number of heads falls with the length, so that a call stays near a second. A sample of the query rows is compared
with float64. Sigmoid attention is another function; it has a reference of its own, and no peer in torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...runtime.ops import attention as ops
from ..harness import Bound, Case, Contender, Problem, Suite
from ..machine import dtype_name
from ..measure import Call, Limits
from ..peers import inductor
from ..record import Kind

CAUSAL = "k_idx <= q_idx"
BOUND = {
    torch.float32: Bound(1e-5, largest=True),
    torch.float16: Bound(4e-3, largest=True),
    torch.bfloat16: Bound(3e-2, largest=True),
}
LENGTHS = (128, 512, 2048, 8192, 16384)
DIMS = (32, 64, 128, 256)
LIMITS = Limits(seconds=3.0)  # there are many rows
MOST = 80e9  # multiplications and additions of one call


def heads_for(length: int, dim: int, causal: bool) -> int:
    """8, or as few as 2 where 8 are too slow."""
    for heads in (8, 4):
        if flops(1, heads, length, dim, causal) <= MOST:
            return heads
    return 2


def pairs(length: int, causal: bool, window: int = 0) -> int:
    """Visible (query, key) pairs of one head; a window counts the keys that a query sees, causally."""
    if window and window < length:
        return window * (window + 1) // 2 + (length - window) * window
    return length * (length + 1) // 2 if causal else length * length


def flops(batch: int, heads: int, length: int, dim: int, causal: bool) -> int:
    return 4 * batch * heads * dim * pairs(length, causal)


def projected(batch: int, heads: int, length: int, dim: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    return torch.randn(batch, length, heads, dim, device=device).to(dtype).transpose(1, 2)


class Sample:
    """Up to 64 query rows, the first and the last among them, computed in float64."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, visible: Callable[[Tensor, Tensor], Tensor] | None) -> None:
        self.q, self.k, self.v, self.visible = q, k, v, visible
        self.rows = torch.linspace(0, q.shape[2] - 1, min(64, q.shape[2]), device=q.device).round().long()

    def of(self, out: Tensor) -> Tensor:
        return out[:, :, self.rows]

    def expected(self, normalizer: str = "softmax", shift: float = 0.0) -> Tensor:
        group = self.q.shape[1] // self.k.shape[1]
        keys, values = (t.double().repeat_interleave(group, dim=1) for t in (self.k, self.v))
        scores = self.of(self.q).double() @ keys.transpose(-2, -1) * self.q.shape[-1] ** -0.5 + shift
        if self.visible is not None:
            columns = torch.arange(self.k.shape[2], device=scores.device)
            scores = scores.masked_fill(~self.visible(self.rows[:, None], columns), -math.inf)
        weights = scores.softmax(-1) if normalizer == "softmax" else scores.sigmoid()
        return weights @ values


def flex(q: Tensor, k: Tensor, v: Tensor, causal: bool, grouped: bool) -> Call:
    """FlexAttention, compiled, its block mask made before."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(b: Any, h: Any, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx <= q_idx

    block = create_block_mask(visible, None, None, q.shape[2], k.shape[2], device=q.device.type) if causal else None
    compiled = inductor(flex_attention)
    return lambda: compiled(q, k, v, block_mask=block, enable_gqa=grouped)


def ours(q: Tensor, k: Tensor, v: Tensor, mask: str, normalizer: str, target: str, shift: Tensor | None) -> Call:
    options: dict[str, Any] = {"scale": q.shape[-1] ** -0.5, "mask": mask, "normalizer": normalizer}
    ops.spec(q, k, v, None, shift, **options, target=target)  # says why, where there is no kernel
    return lambda: torch.ops.tilewright.attention(q, k, v, None, shift, **options, target=target)


def problem(length: int, dim: int, causal: bool, group: int, dtype: torch.dtype, with_flex: bool) -> Problem:
    heads = heads_for(length, dim, causal)
    torch.manual_seed(0)
    q = projected(1, heads, length, dim, dtype)
    k, v = (projected(1, heads // group, length, dim, dtype) for _ in range(2))
    sample = Sample(q, k, v, (lambda row, column: column <= row) if causal else None)
    mask, shift = CAUSAL if causal else "", torch.full((1,), -math.log(length))

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=group > 1)

    def own(normalizer: str) -> Call:
        return ours(q, k, v, mask, normalizer, "cpp", shift if normalizer == "sigmoid" else None)

    contenders = [
        Contender("sdpa", Kind.PEER, sdpa),
        Contender("ours", Kind.OURS, make=functools.partial(own, "softmax")),
        Contender(
            "ours sigmoid",
            Kind.OURS,
            make=functools.partial(own, "sigmoid"),
            expected=functools.partial(sample.expected, "sigmoid", -math.log(length)),
        ),
    ]
    if with_flex:
        contenders.insert(1, Contender("flex", Kind.PEER, make=lambda: flex(q, k, v, causal, group > 1)))
    return Problem(
        "ours",
        contenders,
        sample.expected,
        BOUND[dtype],
        sample.of,
        bytes=sum(t.numel() * t.element_size() for t in (q, q, k, v)),
        flops=flops(1, heads, length, dim, causal),
        dtype=dtype_name(dtype),
        note=f"{heads} heads" + (f", {heads // group} of keys" if group > 1 else ""),
    )


def grid() -> list[tuple[int, int, bool, int]]:
    """(length, dim, causal, query heads a key head): every length, dim and causal or not; grouped on a part."""
    plain = [(n, d, c, 1) for n in LENGTHS for d in DIMS for c in (True, False) if not (n > 8192 and d > 128)]
    return plain + [(n, d, True, 4) for n in (512, 2048, 8192) for d in (64, 128)] + [(2048, 64, False, 4)]


def cases() -> list[Case]:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for length, dim, causal, group in grid():
            params = {"dtype": dtype_name(dtype), "length": length, "dim": dim, "causal": causal, "group": group}
            kind = ("causal" if causal else "full") + ("-grouped" if group > 1 else "")
            main = dim == 64 and length in (2048, 8192)
            found.append(
                Case(
                    f"{dtype_name(dtype)}/{kind}/{length}x{dim}",
                    params,
                    functools.partial(problem, length, dim, causal, group, dtype, main and causal),
                    quick=main and (group == 1 or length == 2048) or (length == 128 and dim == 32),
                    limits=LIMITS,
                )
            )
    return found


SUITE = Suite(
    "attention",
    "Self-attention, 128 to 16,384 tokens, head dims 32 to 256, causal or not, grouped or not.",
    cases,
    headline=("*/causal/2048x64", "*/causal/8192x64", "bfloat16/full/2048x64"),
    compare=(("ours", "ours sigmoid"), ("sdpa", "ours sigmoid")),
    plot_panels=("dtype", "causal"),
)
