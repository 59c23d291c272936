"""ProxyAttn: the scores of a few pooled heads rank the blocks of all heads, each with a budget of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...runtime.ops import OPS
from ...runtime.ops.attention_parts import ATTENTION_SCORES
from ..base import Builder, SiteContext
from .base import Emit, Node, Selected, Selector, SelectorInputs, Size, aten, coarse_mask, is_count, is_share, pair


@dataclass(frozen=True)
class ProxyAttn(Selector):
    """Token-level scores of ``proxies`` pooled heads rank the blocks; every head takes as many as it needs.

    ::

        Q_g, K_g = mean over the heads of group g                                          unified scores
        A = maxpool(softmax(Q_g K_g^T scale)) over the tiles, every ``stride``-th query and key
        a_i = avgpool(softmax(Q_i[last block] K_i^T scale)), sorted and normalised         budget of head i
        b_i = the fewest blocks with sum a_i >= threshold
        head i keeps the b_i best blocks of A of its group in every row

    Source: Wang, Huang, Bao, Wu, Wang, Zhu, Che, "ProxyAttn: Guided Sparse Attention via Representative Heads"
    (ICLR 2026, arXiv:2509.24745), the method section, as public notes on it print its equations: paper and code
    (wyxstriker/ProxyAttn) were not at hand.

    Deviations: the first and the diagonal block are always kept, beside the budget; the last block's queries see what
    the site's own mask shows them; any mask, batch and length. The strided scores of the proxies, (queries / stride) x
    (keys / stride) float32 for each of them, lie in memory, because a maximum over tiles is wanted rather than a sum.

    threshold: the paper's gamma, 0.95 or 0.9 there; 1 keeps everything.
    proxies: number of groups, a divisor of the number of key heads; 1 for Llama and 4 for Qwen in the paper.
    stride: every so many queries and keys are looked at; a divisor of the block size.
    least: keys that a row keeps at least, in tokens.
    """

    name: ClassVar[str] = "proxyattn"
    needs_softmax: ClassVar[bool] = True

    threshold: float = 0.95
    proxies: int = 1
    stride: int = 4
    least: int = 2048

    def __post_init__(self) -> None:
        self._require(is_share(self.threshold), "threshold", "above 0 and at most 1")
        self._require(is_count(self.proxies), "proxies", "a whole number from 1")
        self._require(is_count(self.stride), "stride", "a whole number from 1")
        self._require(is_count(self.least, 0), "least", "a whole number from 0")

    def why_not(self, site: SiteContext, blocks: int | tuple[int, int] = 128) -> str | None:
        if any(size % self.stride for size in pair(blocks)):
            return f"blocks of {min(pair(blocks))} are no whole number of strides of {self.stride}"
        if (heads := site.val("k").shape[1]) % self.proxies:
            return f"its {heads} key heads do not split into {self.proxies} groups, one for each proxy"
        return super().why_not(site, blocks)

    def build(self, builder: Builder, inputs: SelectorInputs) -> Selected:
        emit = Emit(builder)
        scores = self._scores(emit, inputs)
        budget = None if self.threshold >= 1 else self._budget(emit, inputs)
        counts, indices = emit.select(inputs, scores, inputs.states, budget=budget)
        return Selected.unchanged(inputs, counts, indices)

    def _scores(self, emit: Emit, inputs: SelectorInputs) -> Node:
        """float32 (B, Hq, NQ, NK), or (B, 1, NQ, NK) with one proxy."""
        q, k = (self._proxies(emit, x) for x in (inputs.q, inputs.k))
        mask = coarse_mask(inputs, inputs.mask, self.stride)
        raw = emit.call(ATTENTION_SCORES, q, k, scale=inputs.scale, mask=mask)
        shares = emit.call(aten.nan_to_num.default, emit.call(aten.softmax.int, raw, -1, torch.float32))
        # Rows first: what is left has one row a block.
        rows = self._largest(emit, shares, 2, emit.ceil(emit.size(inputs.q, 2), inputs.block_q), inputs.block_q)
        tiles = self._largest(emit, rows, 3, emit.ceil(emit.size(inputs.k, 2), inputs.block_k), inputs.block_k)
        if self.proxies == 1:
            return tiles
        batch, heads, n, m = emit.size(tiles, 0), emit.size(inputs.q, 1), emit.size(tiles, 2), emit.size(tiles, 3)
        share = emit.over(heads, self.proxies)
        apart = emit.call(aten.unsqueeze.default, tiles, 2)
        spread = emit.call(aten.expand.default, apart, [batch, self.proxies, share, n, m])
        return emit.call(aten.reshape.default, spread, [batch, heads, n, m])

    def _proxies(self, emit: Emit, x: Node) -> Node:
        """Every ``stride``-th row of x (B, H, L, D), the heads of a group averaged: (B, proxies, L / stride, D)."""
        index = emit.arange(x, emit.ceil(emit.size(x, 2), self.stride))
        few = emit.call(aten.index_select.default, x, 2, emit.call(aten.mul.Scalar, index, self.stride))
        batch, heads, rows, channels = (emit.size(few, dim) for dim in range(4))
        groups = [batch, self.proxies, emit.over(heads, self.proxies), rows, channels]
        return emit.call(aten.mean.dim, emit.call(aten.reshape.default, few, groups), [2])

    def _largest(self, emit: Emit, x: Node, dim: int, count: Size, block: int) -> Node:
        """The maximum over every block along ``dim``, which has one entry for each ``stride`` tokens."""
        each = block // self.stride
        index = emit.arange(x, emit.times(count, each))
        # Past the end the last entry again, which changes no maximum.
        within = emit.call(aten.clamp_max.default, index, emit.plus(emit.size(x, dim), -1))
        shape = [emit.size(x, d) for d in range(4)]
        shape[dim : dim + 1] = [count, each]
        found = emit.call(aten.index_select.default, x, dim, within)
        return emit.call(aten.amax.default, emit.call(aten.reshape.default, found, shape), [dim + 1])

    def _budget(self, emit: Emit, inputs: SelectorInputs) -> Node:
        """int32 (B, Hq, 1): blocks that each head keeps."""
        queries, mask = emit.last_queries(inputs)
        shares = emit.call(
            OPS["block_scores"].overload,
            queries,
            inputs.k,
            scale=inputs.scale,
            mask=mask,
            block_q=inputs.block_q,
            block_k=inputs.block_k,
        )
        ordered, _ = emit.first(emit.call(aten.sort.default, shares, -1, True))
        before = emit.call(aten.sub.Tensor, emit.call(aten.cumsum.default, ordered, -1), ordered)
        total = emit.call(aten.sum.dim_IntList, ordered, [-1], True)
        needed = emit.call(aten.lt.Tensor, before, emit.call(aten.mul.Tensor, total, self.threshold))
        count = emit.call(aten.sum.dim_IntList, needed, [-1], dtype=torch.int32)
        count = emit.call(aten.clamp_min.default, count, -(-self.least // inputs.block_k))
        return emit.call(aten.add.Scalar, count, 2)  # the two that are always kept
