"""BiFormer: every region of queries reads the few regions of keys that its mean query matches best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..base import Builder
from .base import Emit, Selected, Selector, SelectorInputs, aten, is_count


@dataclass(frozen=True)
class BiFormer(Selector):
    """Region-to-region routing: the ``topk`` regions with the largest product of mean query and mean key.

    ::

        A_r = Q_r K_r^T        Q_r, K_r: means over the regions, all heads side by side
        I_r = topk(A_r)        one choice for all heads

    Source: Zhu, Wang, Ke, Zhang, Lau, "BiFormer: Vision Transformer with Bi-Level Routing Attention" (CVPR 2023,
    arXiv:2303.08810), section 3.2, and the authors' code (rayleizhu/BiFormer, ``TopkRouting``).

    Deviations: a region is a block of neighbouring tokens in the sequence; the paper's are windows of a 2-D grid, 7 x 7
    of them, which an attention does not know of. The first and the diagonal block are always kept, within ``topk``. The
    paper's models are trained with the routing, with another k for every stage (1, 4, 16, all) and a depthwise
    convolution of the values; here it is put on a dense model, with one k and without the convolution.

    topk: regions that a region of queries reads.
    """

    name: ClassVar[str] = "biformer"

    topk: int = 8

    def __post_init__(self) -> None:
        self._require(is_count(self.topk), "topk", "a whole number from 1")

    def build(self, builder: Builder, inputs: SelectorInputs) -> Selected:
        emit = Emit(builder)
        q = emit.means(inputs.q, emit.ceil(emit.size(inputs.q, 2), inputs.block_q), inputs.block_q)
        k = emit.means(inputs.k, emit.ceil(emit.size(inputs.k, 2), inputs.block_k), inputs.block_k)
        # The product over heads side by side is the sum of the heads' products.
        scores = emit.call(aten.sum.dim_IntList, emit.grouped(q, k), [1], True)
        counts, indices = emit.select(inputs, scores, inputs.states, budget=self.topk)
        return Selected.unchanged(inputs, counts, indices)
