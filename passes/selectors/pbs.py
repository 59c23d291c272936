"""PBS-Attn: keys put in order of importance within segments, so that the important ones share blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...codegen import symbols
from ...runtime.ops import OPS
from ..base import Builder, SiteContext
from ..view import value
from .base import Emit, Node, Selected, Selector, SelectorInputs, aten, is_causal, is_count, is_share, pair


@dataclass(frozen=True)
class PBS(Selector):
    """Sort the keys of every segment by what the last queries give them, then keep whole blocks of the sorted keys.

    ::

        s = sum over the last block's queries of softmax(Q_last K^T scale)
        K', V' = K, V with each segment of ``segment`` keys in falling order of s; a last incomplete one stays as it is
        A = softmax_j(mean Q_i . mean K'_j scale) over the blocks j of earlier segments
        kept: the query's own segment, the first token's block, then the best blocks until their sum is ``threshold``
        out = attention(Q, K', V') over the kept blocks, the mask looking up where each key stood

    Segments stay in their order and queries are not moved, so causality costs nothing beyond a query's own segment, and
    the output needs no inverse permutation: the paper's default (permuting queries too gained it little).

    Source: Wang et al., "Sparser Block-Sparse Attention via Token Permutation" (arXiv:2510.21270), the method section,
    and the authors' code (xinghaow99/pbs-attn).

    Deviations: the last queries score under the site's own mask (the code uses none); the first token is put first in
    its segment, so that the first block holds it; the mean of a short last block is over its own tokens (the code pads
    with zeros); in a last incomplete segment, where a query's own segment has fewer blocks, blocks before it are kept
    in their place; masks other than causal restrict further.

    segment: keys sorted together, a multiple of the block size. threshold: 1 keeps everything.
    shared: one order for all query heads of a key head (the paper's appendix on grouped heads), so that keys and values
        are moved once rather than copied for each query head.
    """

    name: ClassVar[str] = "pbs"
    needs_softmax: ClassVar[bool] = True

    segment: int = 256
    threshold: float = 0.9
    shared: bool = False

    def __post_init__(self) -> None:
        self._require(is_count(self.segment), "segment", "a whole number from 1")
        self._require(is_share(self.threshold), "threshold", "above 0 and at most 1")
        self._require(isinstance(self.shared, bool), "shared", "True or False")

    def why_not(self, site: SiteContext, blocks: int | tuple[int, int] = 128) -> str | None:
        if any(self.segment % size for size in pair(blocks)):
            return f"segments of {self.segment} keys are no whole number of blocks of {max(pair(blocks))}"
        if site.arg("bias") is not None:
            return "its bias belongs to the keys where they stand, and pbs moves them"
        if why := super().why_not(site, blocks):
            return why
        return None if is_causal(site.arg("mask")) else "pbs orders keys for causal attention, and this is not causal"

    def build(self, builder: Builder, inputs: SelectorInputs) -> Selected:
        emit = Emit(builder)
        order = self._order(emit, inputs)
        k, v = (self._moved(emit, x, order) for x in (inputs.k, inputs.v))
        states = self._states(emit, inputs)
        scores = self._scores(emit, inputs, k, states)
        local = self.segment // inputs.block_k
        counts, indices = emit.select(inputs, scores, states, threshold=self.threshold, local=local)
        mask, table = self._mask(emit, inputs, order)
        return Selected(counts, indices, inputs.q, k, v, mask, table)

    def _order(self, emit: Emit, inputs: SelectorInputs) -> Node:
        """int64 (B, H, Lk): where the key of each place stood. H is Hq, or Hk when heads share."""
        queries, mask = emit.last_queries(inputs)
        given = emit.call(
            OPS["block_scores"].overload,
            queries,
            inputs.k,
            scale=inputs.scale,
            mask=mask,
            block_q=inputs.block_q,
            block_k=1,
        )
        batch, heads, length = emit.size(inputs.k, 0), emit.size(inputs.q, 1), emit.size(inputs.k, 2)
        given = emit.call(aten.reshape.default, given, [batch, heads, length])
        if self.shared:
            key_heads = emit.size(inputs.k, 1)
            groups = [batch, key_heads, _ratio(inputs), length]
            given = emit.call(aten.sum.dim_IntList, emit.call(aten.reshape.default, given, groups), [2])
            heads = key_heads
        segments = emit.ceil(length, self.segment)
        place = emit.arange(inputs.k, emit.times(segments, self.segment))
        within = emit.call(aten.clamp_max.default, place, emit.plus(length, -1))
        score = emit.call(aten.index_select.default, given, 2, within)
        # Falling in an incomplete segment, which keeps its order so; above all for the first token.
        whole = emit.times(emit.over(length, self.segment), self.segment)
        falling = emit.call(aten.to.dtype, emit.call(aten.neg.default, place), value(score).dtype)
        score = emit.call(aten.where.self, emit.call(aten.lt.Scalar, place, whole), score, falling)
        score = emit.call(aten.masked_fill.Scalar, score, emit.call(aten.eq.Scalar, place, 0), float("inf"))
        score = emit.call(aten.reshape.default, score, [batch, heads, segments, self.segment])
        _, local = emit.first(emit.call(aten.sort.stable, score, stable=True, dim=-1, descending=True))
        starts = emit.call(aten.mul.Scalar, emit.arange(inputs.k, segments), self.segment)
        order = emit.call(aten.add.Tensor, local, emit.call(aten.unsqueeze.default, starts, -1))
        order = emit.call(aten.reshape.default, order, [batch, heads, emit.times(segments, self.segment)])
        return emit.take(order, 2, length)

    def _moved(self, emit: Emit, x: Node, order: Node) -> Node:
        """x (B, Hk, L, D) in ``order`` (B, H, L): (B, H, L, D)."""
        batch, key_heads, length, channels = (emit.size(x, dim) for dim in range(4))
        heads = emit.size(order, 1)
        count = emit.times(batch, key_heads)
        starts = emit.call(aten.mul.Scalar, emit.arange(x, count), length)
        rows = emit.call(aten.reshape.default, order, [count, -1])
        rows = emit.call(aten.add.Tensor, rows, emit.call(aten.unsqueeze.default, starts, -1))
        flat = emit.call(aten.reshape.default, x, [emit.times(count, length), channels])
        moved = emit.call(aten.index_select.default, flat, 0, emit.call(aten.reshape.default, rows, [-1]))
        return emit.call(aten.reshape.default, moved, [batch, heads, length, channels])

    def _states(self, emit: Emit, inputs: SelectorInputs) -> Node:
        """States over the moved keys: a whole segment is full or empty where all of its blocks are."""
        states, each = inputs.states, self.segment // inputs.block_k
        b, h, n, blocks = (emit.size(states, dim) for dim in range(4))
        segments = emit.ceil(blocks, each)
        block = emit.arange(states, emit.times(segments, each))
        within = emit.call(aten.clamp_max.default, block, emit.plus(blocks, -1))
        apart = emit.call(aten.index_select.default, states, 3, within)
        apart = emit.call(aten.reshape.default, apart, [b, h, n, segments, each])
        some = emit.call(aten.gt.Scalar, emit.call(aten.amax.default, apart, [-1], True), 0)
        every = emit.call(aten.eq.Scalar, emit.call(aten.amin.default, apart, [-1], True), 2)
        joint = emit.call(aten.add.Tensor, *(emit.call(aten.to.dtype, x, torch.uint8) for x in (some, every)))
        whole = emit.over(emit.size(inputs.k, 2), self.segment)
        complete = emit.call(aten.lt.Scalar, emit.arange(states, segments), whole)
        complete = emit.call(aten.unsqueeze.default, complete, -1)
        moved = emit.call(aten.where.self, complete, joint, apart)
        moved = emit.call(aten.reshape.default, moved, [b, h, n, emit.times(segments, each)])
        return emit.take(moved, 3, blocks)

    def _scores(self, emit: Emit, inputs: SelectorInputs, k: Node, states: Node) -> Node:
        """float32 (B, Hq, NQ, NK): a softmax over the candidates that are not kept anyway, which score 0."""
        rows = emit.means(inputs.q, emit.size(states, 2), inputs.block_q)
        columns = emit.means(k, emit.size(states, 3), inputs.block_k)
        raw = emit.call(aten.mul.Tensor, emit.grouped(rows, columns), inputs.scale)
        seen = emit.call(aten.gt.Scalar, states, 0)
        rank = emit.call(aten.cumsum.default, seen, -1)
        total = emit.call(aten.sum.dim_IntList, seen, [-1], True)
        earlier = emit.call(aten.add.Scalar, total, -(self.segment // inputs.block_k))
        off = emit.call(aten.logical_and.default, seen, emit.call(aten.le.Tensor, rank, earlier))
        raw = emit.call(aten.masked_fill.Scalar, raw, emit.call(aten.logical_not.default, off), float("-inf"))
        return emit.call(aten.nan_to_num.default, emit.call(aten.softmax.int, raw, -1))

    def _mask(self, emit: Emit, inputs: SelectorInputs, order: Node) -> tuple[str, Node]:
        """The mask with every key looked up where it stood, and the table it is looked up in."""
        heads, group = value(order).shape[1], _ratio(inputs) if self.shared else 1
        head = f"head // {group}" if group > 1 else "head"
        before, table = "", emit.call(aten.reshape.default, emit.call(aten.to.dtype, order, torch.int32), [-1])
        mask = inputs.mask
        if inputs.table is not None:
            # Ours goes behind the mask's own table, whose entries stay where they are.
            before = f"{int(value(inputs.table).shape[0])} + "
            table = emit.call(aten.cat.default, [inputs.table, table])
        stood = f"table({before}k_len * ({heads} * batch + {head}) + k_idx)"
        return symbols.mask_text(re.sub(r"\bk_idx\b", stood, symbols.mask_text(mask))), table


def _ratio(inputs: SelectorInputs) -> int:
    """Query heads of a key head."""
    return int(value(inputs.q).shape[1]) // int(value(inputs.k).shape[1])
