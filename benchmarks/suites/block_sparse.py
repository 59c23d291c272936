"""Block-sparse self-attention on the CPU: static masks beside FlexAttention, block lists beside SDPA, selectors.

- static: (1, 8, S, 64) under a window, sinks and window, packed documents, and a prefix, beside compiled FlexAttention
  with the same block mask made before (``flex``) and made in the call (``flex+mask``), and our own causal dense kernel.
  Documents go through block lists: ``ours`` has them made before, ``ours+lists`` makes them in the call.
- long: a window over up to 1,048,576 tokens of one head. Time and memory should be linear in the length.
- lists: random block lists of 50, 25, 12 and 6 % of the causal tiles, beside torch's causal SDPA.
- select: what choosing the blocks costs: ``selection`` alone and ``sparse`` with the attention, beside ``dense``, the
  attention it stands for. Every block of tokens has one of 16 topics, and tokens attend to their topic's.

A sample of query rows is compared with float64. The note of a row has its density: visible pairs, or for lists the
tiles read, as a share of what causal attention has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...runtime import memory
from ...runtime.ops.block_lists import EMPTY, FULL, block_lists
from ...runtime.ops.block_states import BLOCK_STATES
from ..harness import Bound, Case, Contender, Problem, Skip, Suite
from ..machine import dtype_name
from ..measure import Call, Limits
from ..peers import inductor
from ..record import Kind
from .attention import BOUND, CAUSAL, Sample, heads_for, pairs, projected
from .attention import flops as dense_flops

HEADS, DIM, BLOCK = 8, 64, 128
LENGTHS = (2048, 8192, 32768)
LONG = (65536, 262144, 1048576)
DENSITIES = (50, 25, 12, 6)
SELECTORS = {
    "xattention": "xattention(stride=16, threshold=0.9)",
    "proxyattn": "proxyattn(threshold=0.9)",
    "pbs": "pbs(threshold=0.9)",
    "dhsa": "dhsa(budget=1024)",
}
WINDOW, SINKS, DOCUMENTS, TOPICS = 256, 4, 8, 16
LIMITS = Limits(seconds=2.5, least_rounds=3, most_rounds=9)
SLOW = Limits(seconds=6.0, least_rounds=2, most_rounds=5)

Visible = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Static:
    """text: for our kernels. visible: the same of index tensors. table: what ``text`` looks up."""

    text: str
    visible: Visible
    table: Tensor | None = None


def static(kind: str, length: int) -> Static:
    """A mask by its name: window, sinks, documents or prefix."""
    if kind == "window":
        text = f"(k_idx <= q_idx) & (q_idx - k_idx < {WINDOW})"
        return Static(text, lambda q, k: (k <= q) & (q - k < WINDOW))
    if kind == "sinks":
        text = f"(k_idx <= q_idx) & ((q_idx - k_idx < {WINDOW}) | (k_idx < {SINKS}))"
        return Static(text, lambda q, k: (k <= q) & ((q - k < WINDOW) | (k < SINKS)))
    if kind == "prefix":
        prefix = length // 4
        return Static(f"(k_idx <= q_idx) | (k_idx < {prefix})", lambda q, k: (k <= q) | (k < prefix))
    ids = documents(length)
    text = "(k_idx <= q_idx) & (table(q_idx) == table(k_idx))"
    return Static(text, lambda q, k: (k <= q) & (ids[q] == ids[k]), ids)


def documents(length: int) -> Tensor:
    """int32 (length,): the document of each token; documents of unequal lengths, packed."""
    weights = torch.rand(DOCUMENTS, generator=torch.Generator().manual_seed(0)) + 0.2
    ends = (weights.cumsum(0) / weights.sum() * length).round().int()
    return torch.bucketize(torch.arange(length, dtype=torch.int32), ends[:-1], right=True).int()


def visible_pairs(kind: str, length: int) -> int:
    """Visible pairs of one head."""
    if kind == "window":
        return pairs(length, True, WINDOW)
    if kind == "sinks":
        return pairs(length, True, WINDOW) + sum(min(SINKS, q - WINDOW + 1) for q in range(WINDOW, length))
    if kind == "prefix":
        prefix = length // 4
        return pairs(length, True) + prefix * (prefix - 1) // 2
    sizes = documents(length).bincount().tolist()
    return sum(pairs(size, True) for size in sizes)


def tensors(heads: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = (projected(1, heads, length, DIM, dtype) for _ in range(3))
    return q, k, v


def topical(heads: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in which nearly all of a query's weight lies on the blocks of its own block's topic."""
    q, k, v = tensors(heads, length, dtype)
    topics = torch.randint(TOPICS, (heads, -(-length // BLOCK)))
    centers = 1.5 * torch.randn(TOPICS, DIM)[topics].repeat_interleave(BLOCK, 1)[None, :, :length]
    return (q + centers).to(dtype), (k + centers).to(dtype), v


def lists_of(q: Tensor, k: Tensor, mask: str, table: Tensor | None) -> tuple[Tensor, Tensor]:
    states = BLOCK_STATES(q, k, table, mask=mask, block_q=BLOCK, block_k=BLOCK)
    counts, indices = block_lists(states)
    return counts, indices[..., : int(counts.max())].contiguous()


def attention(q: Tensor, k: Tensor, v: Tensor, mask: str) -> Call:
    return lambda: torch.ops.tilewright.attention(q, k, v, scale=DIM**-0.5, mask=mask, target="cpp")


def listed(
    q: Tensor, k: Tensor, v: Tensor, lists: tuple[Tensor, Tensor], mask: str, table: Tensor | None = None
) -> Tensor:
    return torch.ops.tilewright.block_attention(
        q, k, v, *lists, table=table, scale=DIM**-0.5, mask=mask, block_q=BLOCK, block_k=BLOCK, target="cpp"
    )


def flex(q: Tensor, k: Tensor, v: Tensor, visible: Visible, counted: bool) -> Call:
    """FlexAttention, compiled; counted: its block mask is made in the call, compiled too, as its authors advise."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def mask_mod(b: Any, h: Any, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return visible(q_idx, kv_idx)

    length = q.shape[2]
    compiled = inductor(flex_attention)
    # Uncompiled it makes tensors of all pairs, of 8 bytes each.
    create = inductor(create_block_mask) if counted or length > 8192 else create_block_mask
    make = functools.partial(create, mask_mod, None, None, length, length, device="cpu")
    if counted:
        return lambda: compiled(q, k, v, block_mask=make())
    block = make()
    return lambda: compiled(q, k, v, block_mask=block)


def static_problem(kind: str, length: int, dtype: torch.dtype, with_dense: bool = True) -> Problem:
    """FlexAttention with its block mask made in the call is timed in bfloat16 only: each takes seconds to compile."""
    q, k, v = tensors(HEADS, length, dtype)
    mask = static(kind, length)
    sample, whole = Sample(q, k, v, mask.visible), Sample(q, k, v, lambda row, column: column <= row)
    if mask.table is None:
        own = [Contender("ours", Kind.OURS, attention(q, k, v, mask.text))]
    else:
        lists = lists_of(q, k, mask.text, mask.table)
        own = [
            Contender("ours", Kind.OURS, lambda: listed(q, k, v, lists, mask.text, mask.table)),
            Contender(
                "ours+lists",
                Kind.OURS,
                lambda: listed(q, k, v, lists_of(q, k, mask.text, mask.table), mask.text, mask.table),
            ),
        ]
    contenders = [
        Contender("flex", Kind.PEER, make=lambda: flex(q, k, v, mask.visible, False)),
        *own,
    ]
    if dtype is torch.bfloat16:
        contenders.append(Contender("flex+mask", Kind.CONTEXT, make=lambda: flex(q, k, v, mask.visible, True)))
    if with_dense:
        contenders.append(Contender("dense", Kind.CONTEXT, attention(q, k, v, CAUSAL), expected=whole.expected))
    seen = visible_pairs(kind, length)
    return Problem(
        "ours",
        contenders,
        sample.expected,
        BOUND[dtype],
        sample.of,
        bytes=4 * q.numel() * q.element_size(),
        flops=4 * HEADS * DIM * seen,
        dtype=dtype_name(dtype),
        note=f"density {seen / pairs(length, True):.4f}",
    )


def long_problem(length: int, dtype: torch.dtype) -> Problem:
    q, k, v = tensors(1, length, dtype)
    mask = static("window", length)
    call = attention(q, k, v, mask.text)
    sample = Sample(q, k, v, mask.visible)
    sample.rows = sample.rows[::8]  # a row has as many columns as there are tokens
    size = q.numel() * q.element_size()
    return Problem(
        "ours",
        [Contender("ours", Kind.OURS, call)],
        sample.expected,
        BOUND[dtype],
        sample.of,
        bytes=4 * size,
        flops=4 * DIM * visible_pairs("window", length),
        dtype=dtype_name(dtype),
        items=length,
        item="tokens",
        note=f"one call takes {peak_memory(call) / size:.2f} times the output's memory",
    )


def peak_memory(call: Call) -> int:
    """Bytes by which one call, the second, raises the process's largest resident set; its result included."""
    call()
    memory.release()  # what the pool keeps of the first call is resident already
    reset = Path("/proc/self/clear_refs")
    try:
        reset.write_text("5", encoding="ascii")  # the high-water mark starts anew
    except OSError as error:
        raise Skip(f"the largest resident set cannot be measured: {error}") from error
    before = _resident("VmRSS")
    result = call()
    peak = _resident("VmHWM")
    del result
    return peak - before


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    return 0


def random_lists(heads: int, length: int, percent: int) -> Tensor:
    """uint8 states (1, heads, N, N): the diagonal tile, and random earlier ones up to ``percent`` of the causal tiles.

    Rows get their share of what they may read, at least the diagonal.
    """
    count = -(-length // BLOCK)
    generator = torch.Generator().manual_seed(percent)
    scores = torch.rand(1, heads, count, count, generator=generator)
    index = torch.arange(count)
    scores = scores.masked_fill(index > index[:, None], -1.0).masked_fill(index == index[:, None], 2.0)
    rank = scores.argsort(-1, descending=True).argsort(-1)
    # Shares accumulate over the rows, so that rounding does not make many short rows longer.
    wanted = ((index + 1).cumsum(0) * percent / 100).round().diff(prepend=torch.zeros(1)).clamp_min(1)
    states = (rank < wanted[:, None]).to(torch.uint8) * FULL
    states[..., index, index] = 1
    return states


def lists_problem(length: int, percent: int, dtype: torch.dtype) -> Problem:
    heads = heads_for(length, DIM, True)
    q, k, v = tensors(heads, length, dtype)
    states = random_lists(heads, length, percent)
    counts, indices = block_lists(states)
    lists = (counts, indices[..., : int(counts.max())].contiguous())

    def visible(row: Tensor, column: Tensor) -> Tensor:
        return (states[:, :, row[:, 0] // BLOCK][..., column // BLOCK] > EMPTY) & (column <= row)

    sample, whole = Sample(q, k, v, visible), Sample(q, k, v, lambda row, column: column <= row)
    density = counts.double().mean().item() * 2 / (states.shape[-1] + 1)
    return Problem(
        "ours",
        [
            Contender(
                "sdpa",
                Kind.PEER,
                lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
                expected=whole.expected,
            ),
            Contender("ours", Kind.OURS, lambda: listed(q, k, v, lists, CAUSAL)),
        ],
        sample.expected,
        BOUND[dtype],
        sample.of,
        bytes=4 * q.numel() * q.element_size(),
        flops=round(density * dense_flops(1, heads, length, DIM, True)),
        dtype=dtype_name(dtype),
        note=f"density {density:.4f}; {heads} heads; sdpa is causal and dense",
    )


def selector_problem(name: str, length: int, dtype: torch.dtype) -> Problem:
    from ...passes.selectors import parse_selector
    from ._selection import selection, whole_site

    heads = heads_for(length, DIM, True)
    q, k, v = inputs = topical(heads, length, dtype)
    selector = parse_selector(SELECTORS[name])
    whole = Sample(q, k, v, lambda row, column: column <= row)
    select = selection(selector, inputs, BLOCK)
    counts = select()[0]
    kept = counts.double().mean().item() * 2 / (-(-length // BLOCK) + 1)

    def sampled(result: Any) -> Tensor:
        return result[0] if isinstance(result, tuple | list) else whole.of(result)

    return Problem(
        "selection",
        [
            Contender("sdpa", Kind.CONTEXT, lambda: _causal(q, k, v), expected=whole.expected),
            Contender("dense", Kind.CONTEXT, attention(q, k, v, CAUSAL), expected=whole.expected),
            Contender("selection", Kind.OURS, select, bound=Bound(0.5)),
            # Another function, and which one is the selector's choice: tests hold its parts to their references.
            Contender("sparse", Kind.FLOOR, make=lambda: whole_site(selector, inputs, BLOCK)),
        ],
        lambda: counts,
        BOUND[dtype],
        sampled,
        dtype=dtype_name(dtype),
        note=f"{SELECTORS[name]}; {heads} heads; keeps {kept:.3f} of the causal tiles of 16 topics",
    )


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def cases() -> list[Case]:
    """What a run out of time leaves out stands last."""
    found = [_static_case("window", n, dtype) for n in LENGTHS for dtype in (torch.float32, torch.bfloat16)]
    found += [
        _static_case(kind, n, dtype)
        for kind in ("sinks", "documents", "prefix")
        for n, dtype in ((8192, torch.float32), (8192, torch.bfloat16), (32768, torch.bfloat16))
    ]
    for n in (8192, 32768):
        for dtype in (torch.float32, torch.bfloat16):
            for percent in DENSITIES:
                found.append(_case(f"lists/{dtype_name(dtype)}/{n}/{percent}%", lists_problem, n, percent, dtype))
    for name in SELECTORS:
        for n, dtype in ((8192, torch.float32), (8192, torch.bfloat16), (32768, torch.bfloat16)):
            found.append(_case(f"select/{name}/{dtype_name(dtype)}/{n}", selector_problem, name, n, dtype))
    found += [_case(f"long/bfloat16/{n}", long_problem, n, torch.bfloat16) for n in LONG]
    return found


def _static_case(kind: str, length: int, dtype: torch.dtype) -> Case:
    with_dense = length < 32768 or dtype is torch.bfloat16 or kind == "window"
    return _case(f"{kind}/{dtype_name(dtype)}/{length}", static_problem, kind, length, dtype, with_dense)


def _case(name: str, make: Callable[..., Problem], *arguments: Any) -> Case:
    part = name.partition("/")[0]
    length = next(a for a in arguments if isinstance(a, int) and a > 100)
    dtype = next(dtype_name(a) for a in arguments if isinstance(a, torch.dtype))
    return Case(
        name,
        {"part": part, "dtype": dtype, "length": length},
        functools.partial(make, *arguments),
        quick=length in (2048, 8192) and dtype == "bfloat16" and not name.endswith(("50%", "12%")),
        limits=SLOW if length >= 32768 else LIMITS,
    )


SUITE = Suite(
    "block_sparse",
    "Block-sparse attention, 2,048 to 1,048,576 tokens: static masks, random block lists, selectors.",
    cases,
    headline=("window/*/8192", "documents/bfloat16/8192", "lists/bfloat16/8192/*"),
    compare=(("flex", "ours"), ("flex+mask", "ours"), ("dense", "ours"), ("dense", "selection"), ("dense", "sparse")),
    plot_panels=("part", "dtype"),
)
