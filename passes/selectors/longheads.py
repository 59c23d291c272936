"""LongHeads: every head reads the first chunk, its latest ones and those it matches best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...runtime.ops import OPS
from ..base import Builder, SiteContext
from ..view import same_size
from .base import Emit, Node, Selected, Selector, SelectorInputs, aten, is_count


@dataclass(frozen=True)
class LongHeads(Selector):
    """Each head keeps ``chunks`` chunks of keys; a chunk is a block.

    ::

        o = attention inside the chunk,   c_q = mean of o over the chunk
        c = softmax(c_q K_chunk^T scale) K_chunk                   what stands for the chunk
        kept: the first chunk, the query's own and the one before it, then those with the largest q . c

    Source: Lu, Zhou, He, Zhao, Ji, Gui, Zhang, Huang, "LongHeads: Multi-Head Attention is Secretly a Long Context
    Processor" (arXiv:2402.10685), section 2, and the authors' code (LuLuLuyi/LongHeads, ``modeling_llama.py``).

    Deviations: the paper gives the kept chunks positions next to each other, so that a model reads further than it was
    trained for; here keys keep their positions, which the attention cannot change, so within the trained length this is
    the paper's choice of chunks and beyond it the model is as lost as before. Queries and keys are rotated to their
    positions wherever they meet (the code rotates within the chunk, and leaves the choosing queries unrotated). A block
    of queries chooses together, by its mean query; the paper lets every query choose.

    chunks: chunks that a head reads, those always kept among them. The authors read 16 of 256 tokens.
    """

    name: ClassVar[str] = "longheads"

    chunks: int = 16

    def __post_init__(self) -> None:
        self._require(is_count(self.chunks, 3), "chunks", "a whole number from 3: the first and the last two are kept")

    def why_not(self, site: SiteContext, blocks: int | tuple[int, int] = 128) -> str | None:
        if why := super().why_not(site, blocks):
            return why
        q, k, v = (site.val(name) for name in ("q", "k", "v"))
        if not same_size(q.shape[2], k.shape[2]):
            return "longheads needs the queries of every chunk of keys, and those of cached keys are gone"
        if not same_size(k.shape[3], v.shape[3]):
            return "longheads matches values with keys, and here they have different numbers of channels"
        return None

    def build(self, builder: Builder, inputs: SelectorInputs) -> Selected:
        emit = Emit(builder)
        count = emit.ceil(emit.size(inputs.k, 2), inputs.block_k)
        c = self._representations(emit, inputs, count)
        rows = emit.means(inputs.q, emit.ceil(emit.size(inputs.q, 2), inputs.block_q), inputs.block_q)
        scores = emit.call(aten.matmul.default, rows, emit.call(aten.transpose.int, c, -1, -2))
        counts, indices = emit.select(inputs, scores, inputs.states, budget=self.chunks, local=2)
        return Selected.unchanged(inputs, counts, indices)

    def _representations(self, emit: Emit, inputs: SelectorInputs, count: Node | int) -> Node:
        """float32 (B, Hq, NK, D): what stands for every chunk."""
        size = inputs.block_k
        inside = emit.call(
            OPS["attention"].overload,
            inputs.q,
            inputs.k,
            inputs.v,
            scale=inputs.scale,
            mask=f"k_idx // {size} == q_idx // {size}",
        )
        q = emit.means(inside, count, size)
        batch, heads, _, channels = (emit.size(q, dim) for dim in range(4))
        key_heads, length = emit.size(inputs.k, 1), emit.size(inputs.k, 2)
        k = emit.call(aten.to.dtype, emit.blocks(inputs.k, count, size), q.meta["val"].dtype)
        # The heads of a group stand below each other before the keys that they share.
        q = emit.call(aten.reshape.default, q, [batch, key_heads, -1, count, channels])
        q = emit.call(aten.transpose.int, q, 2, 3)
        raw = emit.call(aten.matmul.default, q, emit.call(aten.transpose.int, k, -1, -2))
        raw = emit.call(aten.mul.Tensor, raw, inputs.scale)
        outside = emit.call(aten.ge.Scalar, emit.arange(k, emit.times(count, size)), length)
        outside = emit.call(aten.reshape.default, outside, [count, 1, size])
        raw = emit.call(aten.masked_fill.Scalar, raw, outside, float("-inf"))
        c = emit.call(aten.matmul.default, emit.call(aten.softmax.int, raw, -1), k)
        return emit.call(aten.reshape.default, emit.call(aten.transpose.int, c, 2, 3), [batch, heads, count, channels])
