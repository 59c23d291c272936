"""Self-attention on a GPU: our kernels beside torch's SDPA and FlexAttention, forward and backward.

Times are device events around one call, the L2 cache flushed before. The floor is the time of the products that the
mask leaves: a visible pair counts 4 D operations forward and 10 D backward (five products, the scores computed again).
Sigmoid has no peer in torch: there SDPA's softmax is timed beside it, for scale only, and checked as softmax.

Masks of block_sparse.py (window, sinks and window, packed documents) run beside FlexAttention with the same block mask,
made before. ``ours`` computes its ranges in the kernel; ``ours lists`` reads block lists, made before as well, and so
does ``ours`` for documents. Random lists of some share of the causal tiles run beside SDPA's dense causal attention,
and so do selectors, their choice of blocks included.
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
from ...runtime.ops.block_lists import block_lists
from ..harness import Case, Contender, Problem, Suite
from ..machine import dtype_name
from ..measure import Call
from ..peers import inductor
from ..record import Kind
from . import block_sparse
from .attention import BOUND, CAUSAL, Sample, pairs, projected
from .block_sparse import BLOCK, Static

CHECKED = 1000  # tokens of the problem that gradients are compared on; no multiple of a tile


@dataclass(frozen=True)
class Shape:
    """Self-attention of ``length`` tokens. window: keys that a query sees, 0 for no limit (needs causal). pattern: in
    place of both, a mask of block_sparse.py by its name."""

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
    pattern: str = ""

    @property
    def mask(self) -> str:
        return self.static(self.length).text

    def static(self, length: int, device: str = "cpu") -> Static:
        """The mask over ``length`` tokens, its table on the device."""
        if self.pattern:
            one = block_sparse.static(self.pattern, length)
            if one.table is None:
                return one
            ids = one.table.to(device)
            return Static(one.text, lambda row, column: (column <= row) & (ids[row] == ids[column]), ids)
        if self.window:
            text = f"(k_idx <= q_idx) & (k_idx > q_idx - {self.window})"
            return Static(text, lambda row, column: (column <= row) & (column > row - self.window))
        return Static(CAUSAL if self.causal else "", lambda row, column: column <= row)

    @property
    def pairs(self) -> int:
        if self.pattern:
            return block_sparse.visible_pairs(self.pattern, self.length)
        return pairs(self.length, self.causal, self.window)

    @property
    def dense(self) -> bool:
        """Whether SDPA computes it without a mask in memory."""
        return not self.window and not self.pattern


SHAPES: tuple[Shape, ...] = (
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
SHAPES += (Shape("causal-64k", 1, 16, 65536), Shape("causal-128k", 1, 8, 131072))
SHAPES += tuple(
    Shape(f"{pattern}-{length // 1024}k", batch, heads, length, pattern=pattern)
    for pattern in ("window", "sinks", "documents")
    for length, batch, heads in ((4096, 4, 16), (16384, 1, 16), (65536, 1, 16), (131072, 1, 8))
)
QUICK = ("causal-4k", "window-1k-of-16k", "sigmoid-causal-4k", "sinks-16k", "documents-16k", "lists-32k-12%")
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def inputs(case: Shape, batch: int, length: int, device: str) -> list[Tensor]:
    torch.manual_seed(0)
    heads = (case.heads, case.key_heads or case.heads, case.key_heads or case.heads)
    return [projected(batch, h, length, case.dim, case.dtype, device).requires_grad_() for h in heads]


def ours(case: Shape, length: int, device: str, target: str, lists: bool = False) -> Attention:
    """lists: by block lists, made before, in place of ranges; a mask that looks a table up has no other way."""
    shift = torch.full((1,), -math.log(length), device=device) if case.normalizer == "sigmoid" else None
    mask = case.static(length, device)
    options: dict[str, Any] = {"scale": case.dim**-0.5, "mask": mask.text, "normalizer": case.normalizer}
    if lists or mask.table is not None:
        empty = torch.empty(1, 1, length, 0, device=device)
        found = block_sparse.lists_of(empty, empty, mask.text, mask.table)
        return listed(found, options, mask.table, target)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.tilewright.attention(q, k, v, None, shift, **options, target=target)

    return call


def listed(lists: tuple[Tensor, Tensor], options: dict[str, Any], table: Tensor | None, target: str) -> Attention:
    blocks = {"block_q": BLOCK, "block_k": BLOCK}

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.tilewright.block_attention(q, k, v, *lists, table=table, **options, **blocks, target=target)

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

    compiled, block, mask = inductor(flex_attention), None, case.static(length, device)
    if mask.text:
        block = create_block_mask(lambda b, h, q, k: mask.visible(q, k), None, None, length, length, device=device)

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
    if case.pattern and case.static(1).table is None:
        makers["ours lists"] = (Kind.OURS, lambda length: ours(case, length, device, target, lists=True))
    if case.dense:
        # Beside sigmoid it computes another function: there it is timed for scale only.
        kind = Kind.PEER if case.normalizer == "softmax" else Kind.CONTEXT
        makers["sdpa"] = (kind, lambda length: sdpa(case))
    if case.normalizer == "softmax":
        makers["flex"] = (Kind.PEER, lambda length: flex(case, length, device))
    visible = case.static(case.length, device).visible if case.causal else None
    q, k, v = (t.detach() for t in args)
    sample = Sample(q, k, v, visible)
    products = case.batch * case.heads * case.dim * case.pairs
    contenders: list[Contender]
    if backward:
        contenders, expected = _backward(case, makers, args, device)
        of: Callable[[Any], Any] = lambda result: result  # noqa: E731
    else:
        shift = -math.log(case.length) if case.normalizer == "sigmoid" else 0.0
        contenders = []
        for name, (kind, make) in makers.items():
            # SDPA beside sigmoid computes a softmax.
            kept = name.startswith("ours")
            own = functools.partial(sample.expected, case.normalizer, shift) if kept else sample.expected
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
            mask = case.static(length, device)
            options: dict[str, Any] = {"scale": case.dim**-0.5, "mask": mask.text, "normalizer": normalizer}
            if mask.table is None:
                out = ops.reference(q, k, v, None, shift, **options)
            else:
                rows, columns = torch.arange(length, device=device)[:, None], torch.arange(length, device=device)
                bias = mask.visible(rows, columns)[None, None]
                out = ops.reference(q, k, v, bias, shift, **(options | {"mask": ""}))
        return torch.autograd.grad(out, exact, grads[1].double())

    found = []
    for name, (kind, make) in makers.items():
        normalizer = case.normalizer if name.startswith("ours") else "softmax"
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


def lists_problem(
    length: int, heads: int, percent: int, dim: int = 128, device: str = "cuda", target: str = "triton"
) -> Problem:
    """Random lists of ``percent`` of the causal tiles, beside dense causal SDPA, which computes another function."""
    case = Shape("lists", 1, heads, length, dim, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    q, k, v = (t.detach() for t in inputs(case, 1, length, device))
    states = block_sparse.random_lists(heads, length, percent).to(device)
    counts, indices = block_lists(states)
    lists = (counts, indices[..., : int(counts.max())].contiguous())
    call = listed(lists, {"scale": dim**-0.5, "mask": CAUSAL}, None, target)

    def visible(row: Tensor, column: Tensor) -> Tensor:
        return (states[:, :, row[:, 0] // BLOCK][..., column // BLOCK] > 0) & (column <= row)

    sample, whole = Sample(q, k, v, visible), Sample(q, k, v, lambda row, column: column <= row)
    density = counts.double().mean().item() * 2 / (states.shape[-1] + 1)
    return Problem(
        "ours",
        [
            Contender("ours", Kind.OURS, lambda: call(q, k, v)),
            Contender("sdpa", Kind.PEER, lambda: sdpa(case)(q, k, v), expected=whole.expected),
        ],
        sample.expected,
        BOUND[case.dtype],
        sample.of,
        flops=round(density * 4 * heads * dim * pairs(length, True)),
        dtype=dtype_name(case.dtype),
        note=f"density {density:.4f}; sdpa is causal and dense",
    )


def _to(device: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.to(device), k.to(device), v.to(device)


def selector_problem(length: int, heads: int, name: str, device: str = "cuda") -> Problem:
    """Choosing the blocks and attending to them, beside dense causal SDPA. Tokens as in block_sparse.py's topics."""
    from ...passes.selectors import parse_selector
    from ._selection import whole_site

    q, k, v = given = _to(device, *block_sparse.topical(heads, length, torch.bfloat16))
    case = Shape("selector", 1, heads, length, q.shape[3])
    whole = Sample(q, k, v, lambda row, column: column <= row)
    chosen = block_sparse.SELECTORS[name]
    return Problem(
        "sdpa",
        [
            Contender("sdpa", Kind.PEER, lambda: sdpa(case)(q, k, v)),
            # Another function, and which one is the selector's choice: tests hold its parts to their references.
            Contender("sparse", Kind.FLOOR, make=lambda: whole_site(parse_selector(chosen), given, BLOCK)),
        ],
        whole.expected,
        BOUND[case.dtype],
        whole.of,
        dtype=dtype_name(case.dtype),
        note=f"{chosen}; sdpa is causal and dense",
    )


def _chosen(length: int, heads: int) -> list[Case]:
    """Lists and selectors at one length: the forward alone."""
    made: list[tuple[str, Callable[[], Problem]]] = [
        (f"lists-{length // 1024}k-{percent}%", functools.partial(lists_problem, length, heads, percent))
        for percent in block_sparse.DENSITIES
    ]
    for name in block_sparse.SELECTORS:
        made.append((f"{name}-{length // 1024}k", functools.partial(selector_problem, length, heads, name)))
    params = {"phase": "forward", "dtype": "bfloat16", "mask": CAUSAL, "normalizer": "softmax"}
    return [
        Case(f"{name}/forward", params | {"length": length, "part": name}, make, quick=name in QUICK)
        for name, make in made
    ]


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
    return found + _chosen(32768, 16) + _chosen(131072, 8)


SUITE = Suite(
    "gpu-attention",
    "Self-attention on a GPU, forward and backward.",
    cases,
    device="cuda",
    headline=("*",),
    compare=(("ours lists", "ours"),),
    plot_panels=("phase", "normalizer"),
)
