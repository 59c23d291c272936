"""DHSA: chunks of varying length, found where the keys change, score the blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..base import Builder
from .base import Emit, Node, Selected, Selector, SelectorInputs, Size, aten, is_count


@dataclass(frozen=True)
class DHSA(Selector):
    """Score chunks of keys by length-scaled means, spread the scores over their tokens, keep the best blocks.

    ::

        chunks C_c: cut where the keys change most, L / ``chunk`` of them, of any length
        k_c = sqrt(|C_c|) mean of K over C_c,      q_i = mean of Q over query block i
        S[i, c] = q_i . k_c,      score of token t: S[i, chunk of t],      of a block: the mean over its tokens
        kept: ``budget`` tokens' worth of blocks in every row, the first and the diagonal one among them

    Source: Xiong, Zou, Fekri, Cho, "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device
    LLMs" (arXiv:2510.24606), the method section, and the authors' code (xiongsiheng/DHSA, ``legacy``).

    Deviations: the paper's boundary predictor is a small network trained for each model; here a boundary is where the
    cosine between the mean keys of the ``window`` tokens before and after it is lowest, all heads together: the
    similarity of left and right context is one of that predictor's features. Boundaries within ``apart`` of a better
    one are dropped in one step (the code goes through them greedily), so fewer chunks may come out. Blocks rather than
    tokens are kept. Queries are pooled over their blocks, as in the code (the paper pools both sides over chunks). With
    ``per_head`` every head has scores of its own; the code averages the heads and gives all of them one choice.

    budget: keys that a row keeps, in tokens. chunk: mean length of a chunk. window: a power of two. apart: likewise.
    """

    name: ClassVar[str] = "dhsa"

    budget: int = 1024
    chunk: int = 64
    window: int = 4
    apart: int = 8
    per_head: bool = True

    def __post_init__(self) -> None:
        self._require(is_count(self.budget), "budget", "a whole number from 1")
        self._require(is_count(self.chunk), "chunk", "a whole number from 1")
        for option in ("window", "apart"):
            number = getattr(self, option)
            self._require(is_count(number) and number & (number - 1) == 0, option, "a power of two")
        self._require(isinstance(self.per_head, bool), "per_head", "True or False")

    def build(self, builder: Builder, inputs: SelectorInputs) -> Selected:
        emit = Emit(builder)
        length = emit.size(inputs.k, 2)
        chunks = emit.ceil(length, self.chunk)
        chunk = self._chunks(emit, inputs.k, length, chunks)
        scores = self._scores(emit, inputs, chunk, chunks)
        counts, indices = emit.select(inputs, scores, inputs.states, budget=-(-self.budget // inputs.block_k))
        return Selected.unchanged(inputs, counts, indices)

    def _chunks(self, emit: Emit, k: Node, length: Size, chunks: Size) -> Node:
        """int64 (B, Lk): the chunk of every key."""
        change = self._change(emit, k, length)
        # The largest change within ``apart`` tokens on both sides.
        nearby = self._running(emit, change, 1, self.apart, aten.maximum.default)
        centre = emit.arange(k, length)
        before = self._shifted(emit, nearby, 1, emit.call(aten.sub.Scalar, centre, self.apart))
        after = self._shifted(emit, nearby, 1, emit.call(aten.add.Scalar, centre, 1))
        peak = emit.call(aten.ge.Tensor, change, emit.call(aten.maximum.default, before, after))
        peak = emit.call(aten.logical_and.default, peak, emit.call(aten.ge.Scalar, change, 0))
        ranked = emit.call(aten.where.ScalarOther, peak, change, -1.0)
        _, order = emit.first(emit.call(aten.sort.stable, ranked, stable=True, dim=-1, descending=True))
        best = emit.call(aten.lt.Scalar, emit.arange(k, length), emit.plus(chunks, -1))
        best = emit.call(aten.expand_as.default, best, order)
        cut = emit.call(aten.scatter.src, emit.call(aten.zeros_like.default, best), 1, order, best)
        return emit.call(aten.cumsum.default, emit.call(aten.logical_and.default, cut, peak), 1)

    def _change(self, emit: Emit, k: Node, length: Size) -> Node:
        """float32 (B, Lk): 1 - cosine of the keys before and from each token on; -1 at the ends."""
        keys = emit.call(aten.to.dtype, k, torch.float32)
        sums = self._running(emit, keys, 2, self.window, aten.add.Tensor)
        place = emit.arange(k, length)
        back = emit.call(aten.sub.Scalar, place, self.window)
        square = emit.call(aten.sum.dim_IntList, emit.call(aten.mul.Tensor, sums, sums), [1, 3])
        product = emit.call(aten.mul.Tensor, sums, self._shifted(emit, sums, 2, back))
        product = emit.call(aten.sum.dim_IntList, product, [1, 3])
        squares = emit.call(aten.mul.Tensor, square, self._shifted(emit, square, 1, back))
        norm = emit.call(aten.rsqrt.default, emit.call(aten.clamp_min.default, squares, 1e-30))
        change = emit.call(aten.rsub.Scalar, emit.call(aten.mul.Tensor, product, norm), 1)
        end = emit.plus(length, -self.window)
        inside = emit.call(aten.ge.Scalar, place, self.window)
        inside = emit.call(aten.logical_and.default, inside, emit.call(aten.le.Scalar, place, end))
        return emit.call(aten.where.ScalarOther, inside, change, -1.0)

    def _running(self, emit: Emit, x: Node, dim: int, width: int, together: object) -> Node:
        """x combined with the next ``width - 1`` entries along ``dim``, by doubling; the last entry stands in past the
        end."""
        step = 1
        place = emit.arange(x, emit.size(x, dim))
        while step < width:
            x = emit.call(together, x, self._shifted(emit, x, dim, emit.call(aten.add.Scalar, place, step)))
            step *= 2
        return x

    def _shifted(self, emit: Emit, x: Node, dim: int, index: Node) -> Node:
        last = emit.plus(emit.size(x, dim), -1)
        index = emit.call(aten.clamp_max.default, emit.call(aten.clamp_min.default, index, 0), last)
        return emit.call(aten.index_select.default, x, dim, index)

    def _scores(self, emit: Emit, inputs: SelectorInputs, chunk: Node, chunks: Size) -> Node:
        """float32 (B, Hq or 1, NQ, NK)."""
        q = emit.means(inputs.q, emit.ceil(emit.size(inputs.q, 2), inputs.block_q), inputs.block_q)
        k = self._pooled(emit, inputs.k, chunk, chunks)
        if not self.per_head:
            q, k = (emit.call(aten.mean.dim, x, [1], True) for x in (q, k))
        blocks = emit.ceil(emit.size(inputs.k, 2), inputs.block_k)
        tokens = self._overlap(emit, inputs, chunk, chunks, blocks)
        spread = emit.call(aten.matmul.default, emit.grouped(q, k), tokens)
        return emit.call(
            aten.div.Tensor, spread, emit.lengths(inputs.k, emit.size(inputs.k, 2), blocks, inputs.block_k)
        )

    def _rows(self, emit: Emit, chunk: Node, chunks: Size) -> Node:
        """(B * Lk): the row of each key's chunk among the chunks of all sequences."""
        starts = emit.call(aten.mul.Scalar, emit.arange(chunk, emit.size(chunk, 0)), chunks)
        rows = emit.call(aten.add.Tensor, chunk, emit.call(aten.unsqueeze.default, starts, -1))
        return emit.call(aten.reshape.default, rows, [-1])

    def _pooled(self, emit: Emit, k: Node, chunk: Node, chunks: Size) -> Node:
        """float32 (B, Hk, chunks, D): sum / sqrt(length), which is sqrt(length) times the mean."""
        batch, heads, length, channels = (emit.size(k, dim) for dim in range(4))
        rows, count = self._rows(emit, chunk, chunks), emit.times(batch, chunks)
        flat = emit.call(aten.to.dtype, emit.call(aten.transpose.int, k, 1, 2), torch.float32)
        flat = emit.call(aten.reshape.default, flat, [emit.times(batch, length), emit.times(heads, channels)])
        empty = emit.call(aten.new_zeros.default, flat, [count, emit.times(heads, channels)])
        sums = emit.call(aten.index_add.default, empty, 0, rows, flat)
        ones = emit.call(aten.new_ones.default, flat, [emit.times(batch, length)])
        lengths = emit.call(aten.index_add.default, emit.call(aten.new_zeros.default, flat, [count]), 0, rows, ones)
        scale = emit.call(aten.rsqrt.default, emit.call(aten.clamp_min.default, lengths, 1))
        pooled = emit.call(aten.mul.Tensor, sums, emit.call(aten.unsqueeze.default, scale, -1))
        pooled = emit.call(aten.reshape.default, pooled, [batch, chunks, heads, channels])
        return emit.call(aten.transpose.int, pooled, 1, 2)

    def _overlap(self, emit: Emit, inputs: SelectorInputs, chunk: Node, chunks: Size, blocks: Size) -> Node:
        """float32 (B, 1, chunks, NK): tokens that a chunk and a block have in common."""
        batch, length = emit.size(chunk, 0), emit.size(chunk, 1)
        block = emit.call(aten.floor_divide.Scalar, emit.arange(chunk, length), inputs.block_k)
        rows = emit.call(aten.reshape.default, self._rows(emit, chunk, chunks), [batch, length])
        place = emit.call(aten.add.Tensor, emit.call(aten.mul.Scalar, rows, blocks), block)
        place = emit.call(aten.reshape.default, place, [-1])
        device, count = {"device": inputs.q.meta["val"].device}, emit.times(batch, emit.times(chunks, blocks))
        zeros = emit.call(aten.zeros.default, [count], dtype=torch.float32, **device)
        ones = emit.call(aten.ones.default, [emit.times(batch, length)], dtype=torch.float32, **device)
        shared = emit.call(aten.index_add.default, zeros, 0, place, ones)
        return emit.call(aten.reshape.default, shared, [batch, 1, chunks, blocks])
