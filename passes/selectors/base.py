"""What a selector is: the choice, at run time and from the queries and keys, of the key blocks a query block reads.

A selector is one frozen dataclass in one file, with its options as fields. It writes the choice into the graph as ATen
operations and the canonical ops ``block_scores`` and ``select_blocks``, so that every step can be read in the graph and
sizes stay symbolic: nothing of size (queries x keys) is made, only pooled or strided forms of it. What it may choose
from is ``states``, what the site's mask says of every tile. The first visible block of a row (the attention sink) and
the one at the diagonal are always kept.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx

from ...codegen import mask_logic
from ...runtime.errors import BadPassOption
from ...runtime.ops import OPS
from ..base import Builder, SiteContext
from ..view import is_cast, peel, same_size, value
from . import masks

Node = torch.fx.Node
Size = int | Node
aten = torch.ops.aten

EVERYTHING = 2**30
"""A budget that no row of blocks exhausts."""

CAUSAL = ("k_idx <= q_idx", "k_idx <= q_idx + k_len - q_len")


@dataclass(frozen=True)
class SelectorInputs:
    """One attention, in nodes.

    q (B, Hq, Lq, D), k (B, Hk, Lk, D), v (B, Hk, Lk, Dv). states: uint8 (1 or B, 1 or Hq, NQ, NK), 0, 1 or 2 where
    ``mask`` hides all, some or nothing of a tile. mask: text of codegen/symbols.py; table: what it looks up, or None.
    block_q, block_k: queries and keys in a block.
    """

    q: Node
    k: Node
    v: Node
    states: Node
    mask: str
    table: Node | None
    scale: float
    block_q: int
    block_k: int


@dataclass(frozen=True)
class Selected:
    """The chosen blocks, and the attention to run over them.

    counts, indices: block lists (runtime/ops/block_lists.py). q, k, v, mask, table: as given, or permuted, with the
    mask over the permuted positions. finish: puts the attention's output back in order.
    """

    counts: Node
    indices: Node
    q: Node
    k: Node
    v: Node
    mask: str
    table: Node | None
    finish: Callable[[Builder, Node], Node] = lambda builder, out: out

    @classmethod
    def unchanged(cls, inputs: SelectorInputs, counts: Node, indices: Node) -> Selected:
        """Lists over the attention as it was."""
        return cls(counts, indices, inputs.q, inputs.k, inputs.v, inputs.mask, inputs.table)


@dataclass(frozen=True)
class Selector:
    """Base of every selector. ``needs_softmax``: the choice is by shares of a row's softmax."""

    name: ClassVar[str] = ""
    needs_softmax: ClassVar[bool] = False

    def build(self, builder: Builder, inputs: SelectorInputs) -> Selected:
        """Write the choice into the graph."""
        raise NotImplementedError(f"{type(self).__name__} must define build()")

    def why_not(self, site: SiteContext, blocks: int | tuple[int, int] = 128) -> str | None:
        """The reason to leave the site's attention alone, or None. A selector adds its own to these.

        blocks: queries and keys in a block, one number for both or two.
        """
        if self.needs_softmax and site.arg("normalizer") != "softmax":
            return f"{self.name} chooses by shares of a softmax, and this attention is {site.arg('normalizer')}"
        if why := cross_attention(site):
            return f"{self.name} selects for self-attention: {why}"
        queries, keys, size = site.val("q").shape[2], site.val("k").shape[2], pair(blocks)[1]
        if isinstance(queries, int) and queries == 1:
            return f"{self.name} selects for many queries at once, and this is decoding with one: it stays dense"
        if isinstance(keys, int) and (count := -(-keys // size)) <= 2:
            return f"its {keys} keys are {count} blocks of {size}, and the first and the last are kept anyway"
        return None

    def __str__(self) -> str:
        """As ``parse_selector`` reads it."""
        options = ", ".join(f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self))
        return f"{self.name}({options})"

    def _require(self, condition: bool, option: str, must: str) -> None:
        """Raise :class:`~tilewright.runtime.errors.BadPassOption` unless ``condition`` holds."""
        if not condition:
            raise BadPassOption(f"{self.name}: {option} is {getattr(self, option)!r}, but must be {must}")


def pair(blocks: int | tuple[int, int]) -> tuple[int, int]:
    """Queries and keys in a block."""
    return (blocks, blocks) if isinstance(blocks, int) else blocks


def is_count(number: Any, least: int = 1) -> bool:
    """Whether ``number`` is an int, not a bool, and at least ``least``."""
    return isinstance(number, int) and not isinstance(number, bool) and number >= least


def is_share(number: Any) -> bool:
    """Whether ``number`` is above 0 and at most 1."""
    return isinstance(number, int | float) and not isinstance(number, bool) and 0 < number <= 1


# ----------------------------------------------------------------------------------------- what kind of attention it is


def coarse_mask(inputs: SelectorInputs, mask: str, stride: int) -> str:
    """``mask`` over groups of ``stride`` queries and keys."""
    lengths = (value(x).shape[2] for x in (inputs.q, inputs.k))
    queries, keys = (length if isinstance(length, int) else None for length in lengths)
    return masks.coarsen(mask, stride, queries, keys, aligned=aligned(inputs))


def aligned(inputs: SelectorInputs) -> bool:
    """Whether queries and keys are provably equally many."""
    return same_size(value(inputs.q).shape[2], value(inputs.k).shape[2])


def is_causal(mask: str) -> bool:
    """Whether it is proven that no query sees keys after its own position."""
    return any(mask_logic.implies(mask, causal) for causal in CAUSAL)


def cross_attention(site: SiteContext) -> str | None:
    """Why the site looks like cross-attention, or None.

    Attention under a causal mask is self-attention, with or without a cache of earlier keys. Otherwise queries and keys
    have to be equally many, and where both can be followed back to a linear layer, to have one input.
    """
    if is_causal(site.arg("mask")):
        return None
    if not same_size(site.val("q").shape[2], site.val("k").shape[2]):
        return "queries and keys differ in number and no causal mask relates them, so this is cross-attention"
    left, right = (_activation(site.arg(name)) for name in ("q", "k"))
    if left is not None and right is not None and left is not right:
        return "queries and keys are projected from different tensors, so this is cross-attention"
    return None


_THROUGH = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.transpose.int,
        aten.permute.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.slice.Tensor,
        aten.select.int,
        aten.unbind.int,
        aten.chunk.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.cat.default,
        aten.mul.Tensor,
        aten.div.Tensor,
        operator.getitem,
        OPS["rope"].overload,
    }
)
_NORMS = frozenset(OPS[name].overload for name in ("layer_norm", "rms_norm"))
_LINEAR = frozenset({OPS["linear"].overload, aten.linear.default, aten.matmul.default, aten.mm.default})


def _activation(item: Any) -> Node | None:
    """What the linear layer behind queries or keys reads, before its norm; None when there is no telling."""
    while isinstance(item, Node):
        item = peel(item)
        if item.target in _LINEAR or item.target is aten.addmm.default:
            item = peel(item.args[item.target is aten.addmm.default])
            while isinstance(item, Node) and (item.target in _NORMS or item.target in _THROUGH):
                item = peel(_first(item))
            return item if isinstance(item, Node) else None
        if not (is_cast(item) or item.target in _NORMS or item.target in _THROUGH):
            return None
        item = _first(item)
    return None


def _first(node: Node) -> Any:
    """A node's first operand; of a concatenation the last, where the new keys stand behind the cached ones."""
    first = node.args[0]
    return first[-1] if isinstance(first, list | tuple) and first else first


# ------------------------------------------------------------------------------------------------- writing into a graph


class Emit:
    """Writes nodes with a :class:`Builder`. Sizes are ints where they are known and nodes where they are symbols.

    Rows beyond the end are read from the last one and multiplied by zero: unlike a pad, that takes no decision on
    symbolic sizes, so that one graph serves every length.
    """

    def __init__(self, builder: Builder) -> None:
        self.builder = builder
        builder.repeats = True
        self._sizes: dict[tuple[Node, int], Size] = {}

    def call(self, target: Any, /, *args: Any, **kwargs: Any) -> Node:
        return self.builder.call(target, *args, **kwargs)

    def size(self, node: Node, dim: int) -> Size:
        key = (node, dim)
        if key not in self._sizes:
            size = value(node).shape[dim]
            self._sizes[key] = size if isinstance(size, int) else self.call(aten.sym_size.int, node, dim)
        return self._sizes[key]

    def _fold(self, function: Callable[[Any, Any], Any], a: Size, b: Size) -> Size:
        if isinstance(a, int) and isinstance(b, int):
            return int(function(a, b))
        return self.call(function, a, b)

    def plus(self, a: Size, b: Size) -> Size:
        return a if isinstance(b, int) and b == 0 else self._fold(operator.add, a, b)

    def times(self, a: Size, b: Size) -> Size:
        return a if isinstance(b, int) and b == 1 else self._fold(operator.mul, a, b)

    def over(self, a: Size, b: int) -> Size:
        """a // b."""
        return a if b == 1 else self._fold(operator.floordiv, a, b)

    def ceil(self, a: Size, b: int) -> Size:
        """a / b, rounded up."""
        return self.over(self.plus(a, b - 1), b)

    def first(self, node: Node) -> tuple[Node, Node]:
        """Both results of an op that has two."""
        return self.call(operator.getitem, node, 0), self.call(operator.getitem, node, 1)

    def arange(self, like: Node, count: Size) -> Node:
        """0 .. count - 1, int64, on the device of ``like``."""
        return self.call(aten.arange.default, count, dtype=torch.int64, device=value(like).device)

    def rows(self, x: Node, index: Node) -> Node:
        """x's rows (dim 2) at ``index``; zeros where it lies beyond the end."""
        length = self.size(x, 2)
        found = self.call(
            aten.index_select.default, x, 2, self.call(aten.clamp_max.default, index, self.plus(length, -1))
        )
        inside = self.call(aten.to.dtype, self.call(aten.lt.Scalar, index, length), value(x).dtype)
        return self.call(aten.mul.Tensor, found, self.call(aten.unsqueeze.default, inside, -1))

    def blocks(self, x: Node, count: Size, block: int) -> Node:
        """x (B, H, L, D) in ``count`` blocks of rows: (B, H, count, block, D), zeros beyond the end."""
        rows = self.rows(x, self.arange(x, self.times(count, block)))
        shape = [self.size(x, 0), self.size(x, 1), count, block, self.size(x, 3)]
        return self.call(aten.reshape.default, rows, shape)

    def lengths(self, like: Node, length: Size, count: Size, block: int) -> Node:
        """How many of ``length`` rows are in each of ``count`` blocks, float32 (count,), at least 1."""
        starts = self.call(aten.mul.Scalar, self.arange(like, count), block)
        rest = self.call(aten.add.Scalar, self.call(aten.neg.default, starts), length)
        return self.call(aten.to.dtype, self.call(aten.clamp.default, rest, 1, block), torch.float32)

    def means(self, x: Node, count: Size, block: int) -> Node:
        """The mean row of every block, float32 (B, H, count, D)."""
        total = self.call(aten.sum.dim_IntList, self.blocks(x, count, block), [3], dtype=torch.float32)
        each = self.call(aten.unsqueeze.default, self.lengths(x, self.size(x, 2), count, block), -1)
        return self.call(aten.div.Tensor, total, each)

    def grouped(self, q: Node, k: Node) -> Node:
        """q (B, Hq, N, D) times the transpose of k (B, Hk, M, D), heads in groups: (B, Hq, N, M)."""
        batch, heads, n, channels = (self.size(q, dim) for dim in range(4))
        key_heads, m = self.size(k, 1), self.size(k, 2)
        keys = self.call(aten.transpose.int, k, -1, -2)
        if same_size(value(q).shape[1], value(k).shape[1]):
            return self.call(aten.matmul.default, q, keys)
        group = self._fold(operator.floordiv, heads, key_heads)
        rows = self.call(aten.reshape.default, q, [batch, key_heads, self.times(group, n), channels])
        return self.call(aten.reshape.default, self.call(aten.matmul.default, rows, keys), [batch, heads, n, m])

    def take(self, x: Node, dim: int, count: Size) -> Node:
        """The first ``count`` of x along ``dim``; ``count`` is at most its size."""
        return self.call(aten.index_select.default, x, dim, self.arange(x, count))

    def last_queries(self, inputs: SelectorInputs) -> tuple[Node, str]:
        """The last block_q queries and the mask over them; where there are fewer, the first stands in for the rest."""
        length = self.size(inputs.q, 2)
        index = self.call(aten.add.Scalar, self.arange(inputs.q, inputs.block_q), self.plus(length, -inputs.block_q))
        queries = self.call(aten.index_select.default, inputs.q, 2, self.call(aten.clamp_min.default, index, 0))
        return queries, masks.last_queries(inputs.mask, aligned=aligned(inputs))

    def select(
        self,
        inputs: SelectorInputs,
        scores: Node,
        states: Node,
        *,
        budget: Node | int | None = None,
        threshold: float = 1.0,
        local: int = 1,
    ) -> tuple[Node, Node]:
        """counts and indices of the best-scored blocks that ``states`` lets through.

        Always kept: the first one and the ``local`` last ones, or nearest to the diagonal without a causal mask.
        budget: how many to keep, those included; otherwise the fewest that hold the share ``threshold`` of the scores.
        """
        if budget is None and threshold >= 1:
            budget = EVERYTHING  # a share of 1 leaves out blocks whose scores are 0
        if isinstance(budget, int):
            device = value(scores).device
            budget = self.call(aten.full.default, [1, 1, 1], budget, dtype=torch.int32, device=device)
        found = self.call(
            OPS["select_blocks"].overload,
            scores,
            states,
            budget,
            threshold=threshold,
            sinks=1,
            local=local,
            causal=is_causal(inputs.mask),
            block_q=inputs.block_q,
            block_k=inputs.block_k,
        )
        return self.first(found)
