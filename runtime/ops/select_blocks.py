"""``tilewright::select_blocks``: which blocks of keys every block of queries reads, chosen by score.

A row is one block of queries of one head; its candidates are the blocks of keys whose state is not 0 (empty). Its
candidates are put in order: those that are always kept first (``sinks`` and ``local``), then the others, each part by
falling score; equal scores by rising index, NaN last. Of this order the row keeps the shortest beginning that

    holds all that is always kept, and at least one block, and
    holds the share ``threshold`` of the mass of all candidates   (without a budget)
    or ``budget`` blocks                                          (with one)

cut to ``most`` blocks. That is how XAttention (Xu et al. 2025, section 2.2) finds the fewest blocks whose mass reaches
a threshold, and how fixed budgets (top-k) and budgets per head (ProxyAttn) are spent.

A candidate's mass is its score, 0 for what is negative or NaN. So that every target selects the same blocks, masses
are added as integers, in which the order of a sum does not matter: a score of mantissa m (24 bits) and exponent e
counts ``m * 2^16 >> (e_max - e)``, e_max being the row's largest; so scores below 2^-40 of the largest count nothing.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ...codegen.select_blocks import MAX_CAPACITY, SelectBlocksSpec
from .. import fast_call
from ..autotune import load_best
from ..errors import BadArgument, UnsupportedKernel
from .registry import LIBRARY, Tolerance, canonical
from .softmax import hint

_DEVICES = {"triton": "cuda", "triton-interpret": "cpu", "cpp": "cpu"}

# Integers: a kernel selects the very blocks that the reference does.
TOLERANCE = dict.fromkeys((torch.float64, torch.float32, torch.float16, torch.bfloat16), Tolerance(0.0, 0.0))


def check_arguments(
    scores: Tensor,
    states: Tensor,
    budget: Tensor | None,
    threshold: float,
    most: int,
    sinks: int,
    local: int,
    block_q: int,
    block_k: int,
) -> None:
    """Raise :class:`~tilewright.runtime.errors.BadArgument` for a call that has no meaning."""
    for name, tensor, dims in (("scores", scores, 4), ("states", states, 4), ("budget", budget, 3)):
        if tensor is not None and (tensor.dim() > dims or (tensor.dim() < dims and name != "budget")):
            raise BadArgument(f"select_blocks: {name} has {tensor.dim()} dimensions, but needs {dims}")
    if not scores.dtype.is_floating_point:
        raise BadArgument(f"select_blocks: scores are {scores.dtype}, which is not floating")
    if states.dtype != torch.uint8:
        raise BadArgument(f"select_blocks: states are {states.dtype}, but must be uint8 (0 empty, 1 partial, 2 full)")
    if budget is not None and budget.dtype != torch.int32:
        raise BadArgument(f"select_blocks: the budget is {budget.dtype}, but must be int32")
    if not 0.0 <= threshold <= 1.0:
        raise BadArgument(f"select_blocks: threshold is {threshold}, but is a share, from 0 to 1")
    for name, number, least in (
        ("most", most, 0),
        ("sinks", sinks, 0),
        ("local", local, 0),
        ("block_q", block_q, 1),
        ("block_k", block_k, 1),
    ):
        if not number >= least:
            raise BadArgument(f"select_blocks: {name} is {number}, but must be at least {least}")
    shapes = [tuple(scores.shape), tuple(states.shape)] + ([] if budget is None else [(*budget.shape, 1)])
    try:
        torch.broadcast_shapes(*shapes)
    except RuntimeError:
        words = " and ".join(f"{name} {tuple(t.shape)}" for name, t in (("scores", scores), ("states", states)))
        words += "" if budget is None else f" and a budget {tuple(budget.shape)}"
        raise BadArgument(f"select_blocks: {words} do not broadcast") from None


def _together(scores: Tensor, states: Tensor, budget: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three, expanded to (B, H, NQ, NK) and (B, H, NQ)."""
    shape = torch.broadcast_shapes(scores.shape, states.shape, *(() if budget is None else ((*budget.shape, 1),)))
    return scores.expand(shape), states.expand(shape), None if budget is None else budget.expand(shape[:3])


def _width(blocks: Any, most: int) -> Any:
    """Entries that a row of the lists has room for."""
    return blocks if most == 0 else torch.sym_min(blocks, most)


def always_kept(candidates: Tensor, sinks: int, local: int, causal: bool, block_q: int, block_k: int) -> Tensor:
    """Bool (B, H, NQ, NK): the candidates that are kept whatever they score."""
    rows, columns = candidates.shape[2], candidates.shape[3]
    before = candidates.long().cumsum(-1)
    sink = before <= sinks
    if causal:
        near = before > before[..., -1:] - local
    else:
        index = torch.arange(columns, device=candidates.device)
        own = (torch.arange(rows, device=candidates.device) * block_q // block_k)[:, None]
        # Twice the distance, and one more on the right: no two blocks are equally near.
        distance = 2 * (index - own).abs() + (index > own).long()
        order = distance.masked_fill(~candidates, 2**40).argsort(-1)
        near = order.argsort(-1) < local
    return candidates & (sink | near)


def masses(scores: Tensor, candidates: Tensor) -> Tensor:
    """int64 masses of float32 scores that are not NaN, 0 for no candidate; relative to the row's largest."""
    bits = scores.masked_fill(~(candidates & (scores > 0)), 0.0).view(torch.int32).long()
    exponent = bits >> 23
    mantissa = (bits & 0x7FFFFF) | 0x800000
    below = (exponent.amax(-1, keepdim=True) - exponent).clamp(max=62)
    # Of exponent 0 are zero and what processors may round to zero.
    return ((mantissa << 16) >> below).masked_fill(exponent == 0, 0)


def reference(
    scores: Tensor,
    states: Tensor,
    budget: Tensor | None = None,
    *,
    threshold: float = 1.0,
    most: int = 0,
    sinks: int = 1,
    local: int = 1,
    causal: bool = True,
    block_q: int,
    block_k: int,
) -> tuple[Tensor, Tensor]:
    """The block lists that keep the best-scoring candidates of every row.

    scores: (B, H, NQ, NK), floating, compared in float32. states: uint8 (B, H, NQ, NK): 0 empty, 1 partial, 2 full.
    budget: int32 (B, H, NQ), blocks that a row keeps, instead of ``threshold``. All three broadcast. threshold: the
    share of a row's mass to keep, 0 to 1. most: blocks that a row keeps at most, also of those always kept; 0: no
    limit. sinks: the row's first so many candidates are always kept. local: and so many of its last ones when
    ``causal``, else of those nearest to block ``i * block_q // block_k`` for row i; block_q, block_k: queries and keys
    in a block.
    Returns counts int32 (B, H, NQ) and indices int32 (B, H, NQ, W), W = NK or the smaller of NK and ``most``: the kept
    blocks ascending, each as ``2 * block + (state == 2)``, then -1. Raises BadArgument.
    """
    check_arguments(scores, states, budget, threshold, most, sinks, local, block_q, block_k)
    scores, states, budget = _together(scores.detach(), states, budget)
    columns = scores.shape[3]
    if isinstance(columns, int) and columns == 0:
        counts = states.new_zeros(states.shape[:3], dtype=torch.int32)
        return counts, counts.new_empty((*counts.shape, 0))
    scores = scores.to(torch.float32)
    candidates = states > 0
    kept_anyway = always_kept(candidates, sinks, local, causal, block_q, block_k)
    hidden = scores.isnan()
    scores = torch.where(hidden | (scores == 0), 0.0, scores)  # also -0 as 0
    weights = masses(scores, candidates)

    # One integer that orders a row: what is kept anyway, then the score's bits, which rise as the score does.
    bits = scores.view(torch.int32)
    rank = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() + 2**31
    rank = rank.masked_fill(hidden, 0) + kept_anyway.long() * 2**33
    order = rank.masked_fill(~candidates, -1).sort(dim=-1, descending=True, stable=True)[1]

    sorted_weights = weights.gather(-1, order)
    before = sorted_weights.cumsum(-1) - sorted_weights
    place = torch.arange(columns, device=scores.device)
    least = kept_anyway.long().sum(-1, keepdim=True)
    if budget is None:
        total = weights.sum(-1, keepdim=True)
        needed = (total.to(torch.float64) * threshold).ceil().long().minimum(total)
    else:
        least = torch.maximum(least, budget[..., None].long())
        needed = torch.zeros_like(least)
    chosen = (place < least.clamp(min=1)) | (before < needed)
    if most:
        chosen = chosen & (place < most)
    kept = torch.zeros_like(candidates).scatter(-1, order, chosen) & candidates
    entries = torch.where(kept, 2 * place + (states == 2).long(), 2**40).sort(-1)[0]
    entries = entries.masked_fill(entries == 2**40, -1)[..., : _width(columns, most)]
    return kept.sum(-1).to(torch.int32), entries.to(torch.int32)


def _composite(
    scores: Tensor,
    states: Tensor,
    budget: Tensor | None = None,
    *,
    threshold: float = 1.0,
    most: int = 0,
    sinks: int = 1,
    local: int = 1,
    causal: bool = True,
    block_q: int,
    block_k: int,
    target: str = "reference",
) -> tuple[Tensor, Tensor]:
    options: dict[str, Any] = {
        "threshold": threshold,
        "most": most,
        "sinks": sinks,
        "local": local,
        "causal": causal,
        "block_q": block_q,
        "block_k": block_k,
    }
    if target == "reference":
        return reference(scores, states, budget, **options)
    check_arguments(scores, states, budget, threshold, most, sinks, local, block_q, block_k)
    scores, states, budget = _together(scores.detach().to(torch.float32), states, budget)
    return torch.ops.tilewright.select_blocks_forward(scores, states, budget, **options, target=target)


def spec(
    scores: Tensor, states: Tensor, budget: Tensor | None = None, *, target: str = "cpp", **_: Any
) -> SelectBlocksSpec:
    """The kernel for a call, from tensors or fake tensors; symbolic sizes count as they were when captured.

    Raises :class:`~tilewright.runtime.errors.UnsupportedKernel` with the reason when ``target`` has none.
    """
    if target not in _DEVICES:
        raise UnsupportedKernel(f"there is no select_blocks kernel for target {target!r}")
    for name, tensor in (("scores", scores), ("states", states), ("budget", budget)):
        if tensor is not None and tensor.device.type != _DEVICES[target]:
            raise UnsupportedKernel(
                f"{target} kernels take {_DEVICES[target]} tensors, and {name} is on {tensor.device.type}"
            )
    return _spec(0 if target == "cpp" else hint(scores.shape[3]), budget is not None, target)


@functools.lru_cache(maxsize=1024)
def _spec(blocks: int, budget: bool, target: str) -> SelectBlocksSpec:
    if target == "cpp":
        return SelectBlocksSpec(budget=budget)
    capacity = max(16, 1 << (blocks - 1).bit_length())
    if capacity > MAX_CAPACITY:
        raise UnsupportedKernel(f"a row has {blocks} blocks, and a triton program holds {MAX_CAPACITY}")
    return SelectBlocksSpec(capacity, budget, num_warps=1 if capacity <= 256 else 4 if capacity <= 2048 else 16)


LIBRARY.define(
    "select_blocks_forward(Tensor scores, Tensor states, Tensor? budget, *, float threshold, int most, int sinks,"
    " int local, bool causal, int block_q, int block_k, str target) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _kernel(
    scores: Tensor,
    states: Tensor,
    budget: Tensor | None,
    *,
    threshold: float,
    most: int,
    sinks: int,
    local: int,
    causal: bool,
    block_q: int,
    block_k: int,
    target: str,
) -> fast_call.Launch:
    chosen = spec(scores, states, budget, target=target)
    inputs = (scores, states, budget, threshold, most, sinks, local, causal, block_q, block_k)
    return load_best(chosen, target, lambda: inputs).launch


fast_call.implement(
    "select_blocks_forward",
    _kernel,
    passes=("scores", "states", "budget", "threshold", "most", "sinks", "local", "causal", "block_q", "block_k"),
)


@torch.library.register_fake("tilewright::select_blocks_forward", lib=LIBRARY)
def _fake(scores, states, budget, *, threshold, most, sinks, local, causal, block_q, block_k, target):
    counts = scores.new_empty(scores.shape[:3], dtype=torch.int32)
    return counts, counts.new_empty((*scores.shape[:3], _width(scores.shape[3], most)))


select_blocks = canonical(
    "select_blocks(Tensor scores, Tensor states, Tensor? budget=None, *, float threshold=1.0, int most=0, int sinks=1,"
    " int local=1, bool causal=True, int block_q, int block_k, str target='reference') -> (Tensor, Tensor)",
    reference=reference,
    composite=_composite,
    tolerance=TOLERANCE,
    spec=spec,
)
