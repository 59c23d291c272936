"""``tilewright::block_attention``: attention that reads only listed blocks of keys.

    softmax   out = softmax_k(scale * q.k + bias) v                 over the visible keys
    sigmoid   out = sum_k sigmoid(scale * q.k + bias + shift) v     over the visible keys

A pair (query, key) is visible when the lists of its query block hold its key block, and the entry is full or ``mask``
says so, and a boolean ``bias`` does not hide it. Lists: block_lists.py. ``block_attention_lse`` gives the rows'
log-sum-exp too, for merge_attention.py. Edge cases as in ``tilewright::attention``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...codegen.attention import AttentionSpec
from ..errors import BadArgument
from . import attention, attention_kernel
from .attention import TOLERANCE, check_arguments, visible_pairs
from .block_lists import FULL, PARTIAL, list_states
from .registry import canonical

SIZES = (16, 32, 64, 128, 256)
"""Queries or keys in a block."""


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    table: Tensor | None = None,
    *,
    scale: float,
    mask: str = "",
    normalizer: str = "softmax",
    block_q: int,
    block_k: int,
) -> Tensor:
    """Block-sparse attention by its definition, computed in float32 for half types and in the inputs' dtype otherwise.

    q (B, Hq, Lq, D), k (B, Hk, Lk, D), v (B, Hk, Lk, Dv), bias and shift as in ``tilewright::attention``. counts int32
    (1 or B, 1 or Hq, ceil(Lq / block_q)) and indices int32 (.., W): see block_lists.py. table: int32 (N,), what
    ``mask`` looks up. Returns (B, Hq, Lq, Dv) in q's dtype.
    """
    _check(q, k, v, counts, indices, bias, shift, table, mask, normalizer, block_q, block_k)
    visible = listed_pairs(q, k, counts, indices, table, mask, block_q, block_k)
    return attention.attend(q, k, v, bias, shift, visible, scale, normalizer)[0]


def reference_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    bias: Tensor | None = None,
    table: Tensor | None = None,
    *,
    scale: float,
    mask: str = "",
    block_q: int,
    block_k: int,
) -> tuple[Tensor, Tensor]:
    """:func:`reference` with softmax, and the rows' log-sum-exp (B, Hq, Lq) in float32 (float64 for float64)."""
    _check(q, k, v, counts, indices, bias, None, table, mask, "softmax", block_q, block_k)
    visible = listed_pairs(q, k, counts, indices, table, mask, block_q, block_k)
    return attention.attend(q, k, v, bias, None, visible, scale, "softmax")


def listed_pairs(
    q: Tensor, k: Tensor, counts: Tensor, indices: Tensor, table: Tensor | None, mask: str, block_q: int, block_k: int
) -> Tensor:
    """Which pairs lists and mask let through, bool, broadcastable to (B, Hq, Lq, Lk)."""
    q_len, k_len = q.shape[2], k.shape[2]
    states = list_states(counts, indices, -(-k_len // block_k))
    # Not repeat_interleave: Inductor's loops (torch 2.13, CPU) go wrong where a slice of it follows.
    rows, columns = (torch.arange(size, device=states.device) for size in (q_len, k_len))
    pairs = states.index_select(2, rows // block_q).index_select(3, columns // block_k)
    visible = visible_pairs(q, k, mask, table)
    return pairs >= PARTIAL if visible is None else (pairs == FULL) | ((pairs == PARTIAL) & visible)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    table: Tensor | None,
    mask: str,
    normalizer: str,
    block_q: int,
    block_k: int,
) -> None:
    """Raise :class:`~tilewright.runtime.errors.BadArgument` for a call that has no meaning."""
    check_arguments(q, k, v, bias, shift, mask, normalizer)
    for name, size in (("block_q", block_q), ("block_k", block_k)):
        if size not in SIZES:
            raise BadArgument(f"block_attention: {name} is {size}, but must be one of {', '.join(map(str, SIZES))}")
    for name, tensor in (("counts", counts), ("indices", indices), ("table", table)):
        if tensor is not None and tensor.dtype != torch.int32:
            raise BadArgument(f"block_attention: {name} is {tensor.dtype}, but must be torch.int32")
    if counts.dim() != 3 or indices.dim() != 4 or indices.shape[:3] != counts.shape:
        raise BadArgument(
            f"block_attention: counts {tuple(counts.shape)} and indices {tuple(indices.shape)} must be "
            "(batch, heads, query blocks) and (batch, heads, query blocks, width)"
        )
    if counts.shape[0] not in (1, q.shape[0]) or counts.shape[1] not in (1, q.shape[1]):
        raise BadArgument(
            f"block_attention: lists for {counts.shape[0]} batch entries and {counts.shape[1]} heads do not "
            f"broadcast to {q.shape[0]} and {q.shape[1]}"
        )
    blocks = -(-q.shape[2] // block_q)
    if counts.shape[2] != blocks:
        raise BadArgument(
            f"block_attention: {q.shape[2]} queries are {blocks} blocks of {block_q}, but counts has {counts.shape[2]}"
        )


def spec(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    table: Tensor | None = None,
    *,
    scale: float,
    mask: str = "",
    normalizer: str = "softmax",
    block_q: int,
    block_k: int,
    target: str,
) -> AttentionSpec:
    """The forward kernel for this call, from tensors or fake tensors.

    Raises :class:`~tilewright.runtime.errors.UnsupportedKernel` with the reason when ``target`` has none.
    """
    _check(q, k, v, counts, indices, bias, shift, table, mask, normalizer, block_q, block_k)
    blocks = (block_q, block_k)
    return attention_kernel.spec(q, k, v, bias, shift, mask=mask, normalizer=normalizer, target=target, blocks=blocks)


def _spec_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    bias: Tensor | None = None,
    table: Tensor | None = None,
    *,
    scale: float,
    mask: str = "",
    block_q: int,
    block_k: int,
    target: str,
) -> AttentionSpec:
    return spec(
        q, k, v, counts, indices, bias, None, table,
        scale=scale, mask=mask, block_q=block_q, block_k=block_k, target=target,
    )  # fmt: skip


def _block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    table: Tensor | None = None,
    *,
    scale: float,
    mask: str = "",
    normalizer: str = "softmax",
    block_q: int,
    block_k: int,
    target: str = "reference",
) -> Tensor:
    _check(q, k, v, counts, indices, bias, shift, table, mask, normalizer, block_q, block_k)
    if target == "reference":
        visible = listed_pairs(q, k, counts, indices, table, mask, block_q, block_k)
        return attention.aten_visible(q, k, v, bias, shift, visible, scale, normalizer)
    bias, shift = attention.prepare(k, bias, shift)
    return torch.ops.tilewright.attention_forward(
        q, k, v, bias, shift, counts.contiguous(), indices.contiguous(), table,
        scale=scale, mask=mask, normalizer=normalizer, block_q=block_q, block_k=block_k, target=target,
    )[0]  # fmt: skip


def _block_attention_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    bias: Tensor | None = None,
    table: Tensor | None = None,
    *,
    scale: float,
    mask: str = "",
    block_q: int,
    block_k: int,
    target: str = "reference",
) -> tuple[Tensor, Tensor]:
    if target == "reference":
        sizes = {"block_q": block_q, "block_k": block_k}
        return reference_lse(q, k, v, counts, indices, bias, table, scale=scale, mask=mask, **sizes)
    _check(q, k, v, counts, indices, bias, None, table, mask, "softmax", block_q, block_k)
    bias, _ = attention.prepare(k, bias, None)
    return torch.ops.tilewright.attention_forward(
        q, k, v, bias, None, counts.contiguous(), indices.contiguous(), table,
        scale=scale, mask=mask, normalizer="softmax", block_q=block_q, block_k=block_k, target=target,
    )  # fmt: skip


BLOCK_ATTENTION = canonical(
    "block_attention(Tensor q, Tensor k, Tensor v, Tensor counts, Tensor indices, Tensor? bias=None, "
    "Tensor? shift=None, Tensor? table=None, *, float scale, str mask='', str normalizer='softmax', int block_q, "
    "int block_k, str target='reference') -> Tensor",
    reference=reference,
    composite=_block_attention,
    tolerance=TOLERANCE,
    spec=spec,
)
BLOCK_ATTENTION_LSE = canonical(
    "block_attention_lse(Tensor q, Tensor k, Tensor v, Tensor counts, Tensor indices, Tensor? bias=None, "
    "Tensor? table=None, *, float scale, str mask='', int block_q, int block_k, str target='reference') "
    "-> (Tensor, Tensor)",
    reference=reference_lse,
    composite=_block_attention_lse,
    tolerance=TOLERANCE,
    spec=_spec_lse,
)
