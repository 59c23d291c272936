"""XAttention: antidiagonal sums score the blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...runtime.ops import OPS
from ..base import Builder, SiteContext
from ..view import value
from .base import Emit, Node, Selected, Selector, SelectorInputs, aten, coarse_mask, is_count, is_share, pair


@dataclass(frozen=True)
class XAttention(Selector):
    """Keep the fewest blocks whose antidiagonal mass reaches ``threshold``.

    ::

        A[r, c] = 1/S sum_{j<S} scale q[r S + S-1-j] . k[c S + j]        the antidiagonals of an S x S cell, summed
        P = softmax_c(A),   score of a block = sum of P over its cells
        kept: the first and the diagonal block, then the best until their share of the row reaches the threshold

    Source: Xu, Xiao, Huang, Guo, Han, "XAttention: Block Sparse Attention with Antidiagonal Scoring" (ICML 2025,
    arXiv:2503.16428), sections 2.1 and 2.2, and the authors' code (mit-han-lab/x-attention, ``xattn_estimate``).

    Deviations: cells are masked by the site's own mask, not by a causal one only; any length, batch, number of heads
    and grouping works (the code asks for one sequence and repeated key heads); attention without a causal mask keeps
    its first and diagonal blocks too. The per-head thresholds of section 2.3, found by a search offline, are left out.

    stride: S, a divisor of the block size. Larger is cheaper and coarser; the authors use 8 and 16.
    threshold: the share of a row's mass to keep; 1 keeps everything.
    """

    name: ClassVar[str] = "xattention"
    needs_softmax: ClassVar[bool] = True

    stride: int = 16
    threshold: float = 0.9

    def __post_init__(self) -> None:
        self._require(is_count(self.stride), "stride", "a whole number from 1")
        self._require(is_share(self.threshold), "threshold", "above 0 and at most 1")

    def why_not(self, site: SiteContext, blocks: int | tuple[int, int] = 128) -> str | None:
        if any(size % self.stride for size in pair(blocks)):
            return f"blocks of {min(pair(blocks))} are no whole number of strides of {self.stride}"
        return super().why_not(site, blocks)

    def build(self, builder: Builder, inputs: SelectorInputs) -> Selected:
        emit = Emit(builder)
        scores = antidiagonal_scores(emit, inputs, inputs.k, inputs.mask, self.stride)
        counts, indices = emit.select(inputs, scores, inputs.states, threshold=self.threshold)
        return Selected.unchanged(inputs, counts, indices)


def antidiagonal_scores(emit: Emit, inputs: SelectorInputs, k: Node, mask: str, stride: int) -> Node:
    """Softmax mass of every block, float32 (B, Hq, NQ, NK), from the cells' antidiagonals."""
    return emit.call(
        OPS["block_scores"].overload,
        _strided(emit, inputs.q, stride, backwards=True),
        _strided(emit, k, stride, backwards=False),
        scale=inputs.scale / stride,
        mask=coarse_mask(inputs, mask, stride),
        block_q=inputs.block_q // stride,
        block_k=inputs.block_k // stride,
    )


def _strided(emit: Emit, x: Node, stride: int, *, backwards: bool) -> Node:
    """x (B, H, L, D) with ``stride`` rows side by side: (B, H, ceil(L / stride), stride * D)."""
    groups = emit.ceil(emit.size(x, 2), stride)
    length = emit.size(x, 2)
    if isinstance(length, int) and length % stride == 0:  # nothing beyond the end: a view where x allows one
        sizes = [emit.size(x, dim) for dim in range(4)]
        if backwards:
            x = emit.call(aten.reshape.default, x, [*sizes[:2], groups, stride, sizes[3]])
            x = emit.call(aten.flip.default, x, [3])
        return emit.call(aten.reshape.default, x, [*sizes[:2], groups, emit.times(sizes[3], stride)])
    index = emit.arange(x, emit.times(groups, stride))
    if backwards:
        device = value(x).device
        order = emit.call(aten.arange.start_step, stride - 1, -1, -1, dtype=torch.int64, device=device)
        starts = emit.call(aten.mul.Scalar, emit.arange(x, groups), stride)
        cells = emit.call(aten.add.Tensor, emit.call(aten.unsqueeze.default, starts, -1), order)
        index = emit.call(aten.reshape.default, cells, [-1])
    shape = [emit.size(x, 0), emit.size(x, 1), groups, emit.times(emit.size(x, 3), stride)]
    return emit.call(aten.reshape.default, emit.rows(x, index), shape)
