"""Routing Transformer: attention inside clusters that online k-means finds."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx

from ..codegen import symbols
from ..runtime.errors import BadPassOption
from ..runtime.ops import HELPERS, OPS
from ..runtime.ops.block_attention import SIZES
from ..runtime.ops.group_attention import window_mask
from ..runtime.ops.routed_attention import route_mask
from .base import Builder, Decline, Exactness, NearMiss, Needs, Pass, Rewrite, SiteContext
from .focus_attention import GROUP, block_for, own_mask, site_seed, why_not_grouped
from .view import arguments, value

Node = torch.fx.Node
aten = torch.ops.aten


@dataclass(frozen=True)
class RoutingTransformer(Pass):
    """Let near tokens attend in full and distant ones inside clusters of similar queries and keys.

    ::

        cluster c of a head     the w queries and the w keys nearest to its centroid, w = length / clusters
        out_i                   softmax over the window and over the keys of every cluster that holds query i
        centroid <- decay * centroid + (1 - decay) / 2 * (mean of its queries + mean of its keys)

    Source: Roy, Saffar, Vaswani, Grangier, "Efficient Content-Based Sparse Attention with Routing Transformers" (2020,
    arXiv 2003.05997), section 4.1 and algorithm 1. Nearest is by the product of queries, keys and centroids under layer
    norm without scale and bias, as there. The centroids start at random; ``tilewright.tune(compiled, data,
    parameters="centroids")`` moves them by running means, no gradients, while it shows the model's loss.

    Deviations from the paper, which trains models from scratch. (1) Attention itself keeps the model's own queries and
    keys: the paper shares one projection for both and normalises it, which a trained model would not survive. (2) The
    window attends in every head, the paper gives half of the heads to it; pairs inside it are left out of the clusters.
    (3) A query in several clusters gets one softmax over all their keys, joined by log-sum-exp, where a key that shares
    two clusters with it counts twice. (4) Grouped queries share their key head's centroids. (5) Means, not sums,
    update the centroids, so that the decay does not depend on the batch; one without tokens stays.

    **The choice looks ahead**, as in the paper: whether a token is among its cluster's nearest depends on later tokens,
    so a causal model's perplexity is not one that it could reach token by token.

    Quality: another function; the report tells each site's error, docs/learned_selection.md the measurements.

    clusters: a head. size: w, queries and keys a cluster; 0 for length / clusters. window: how far tokens always see
    each other, to each side. decay: of the running means. block_size: of the block lists, less where the
    example inputs are short. seed: of the random start.
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    needs: ClassVar[Needs] = Needs.TRAINING
    ops: ClassVar[tuple[str, ...]] = ("attention",)
    conflicts: ClassVar[frozenset[str]] = frozenset({"focus-attention"})
    why: ClassVar = {"focus-attention": "both decide which tokens attend to each other"}

    clusters: int = 8
    size: int = 0
    window: int = 128
    decay: float = 0.999
    block_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in {"clusters": 1, "size": 0, "window": 0}.items():
            got = getattr(self, name)
            if not isinstance(got, int) or isinstance(got, bool) or got < low:
                raise BadPassOption(
                    f"routing-transformer: {name} is {got!r}, but must be a whole number of at least {low}"
                )
        if not isinstance(self.decay, int | float) or isinstance(self.decay, bool) or not 0 <= self.decay < 1:
            raise BadPassOption(f"routing-transformer: decay is {self.decay!r}, but must be from 0 to below 1")
        if self.block_size not in SIZES:
            raise BadPassOption(
                f"routing-transformer: block_size is {self.block_size!r}, but must be one of "
                f"{', '.join(map(str, SIZES))}"
            )

    def rewrite(self, site: SiteContext) -> Rewrite | Decline | NearMiss:
        if (reason := why_not_grouped(site)) is not None:
            return Decline(reason)
        length = site.val("k").shape[2]
        if isinstance(length, int) and length <= max(self.window, self.clusters):
            return Decline(
                f"its {length} tokens are too few for {self.clusters} clusters and a window of {self.window}"
            )
        if not all(isinstance(site.val(name).shape[1], int) for name in ("q", "k")):
            return Decline("its number of heads is not known")
        width = -(-length // self.clusters) if not self.size else torch.sym_min(self.size, length)
        block = block_for(width, self.block_size)
        if block is None:
            return Decline("the example inputs have too few tokens for blocks of 16 in a cluster: give longer ones")
        details = {"clusters": self.clusters, "size": self.size or "length / clusters", "window": self.window}
        return Rewrite(
            lambda b: self._build(b, site, block), details, training=lambda b: self._build(b, site, block, update=True)
        )

    def _build(self, builder: Builder, site: SiteContext, block: int, *, update: bool = False) -> Node:
        named = arguments(site.node)
        q, k, v, bias = (named[name] for name in ("q", "k", "v", "bias"))
        q_heads, k_heads = int(value(q).shape[1]), int(value(k).shape[1])
        group = q_heads // k_heads
        generator = torch.Generator().manual_seed(site_seed(self.seed, site.site.id))
        start = torch.randn(k_heads, self.clusters, int(value(k).shape[3]), generator=generator)
        dtype = torch.float64 if value(q).dtype == torch.float64 else torch.float32
        centroids = builder.parameter(
            f"{site.site.id}_routing_centroids", start.to(value(q).device, dtype), group=GROUP, trained=False
        )
        chosen = [builder.call(HELPERS["route"], x, centroids, size=self.size) for x in (q, k)]
        rows = [
            builder.call(HELPERS["take_routed"], x, index, group=heads)
            for x, index, heads in ((q, chosen[0], group), (k, chosen[1], 1), (v, chosen[1], 1))
        ]
        mask, scale = own_mask(named["mask"]), named["scale"]
        states = builder.call(HELPERS["route_states"], *chosen, mask=mask, window=self.window, block=self.block_size)
        lists = builder.call(HELPERS["block_lists"], states)
        far = builder.call(
            OPS["block_attention_lse"].overload,
            *rows,
            *(builder.call(operator.getitem, lists, i) for i in range(2)),
            None if bias is None else self._bias(builder, bias, chosen[1], group),
            builder.call(HELPERS["route_table"], *chosen),
            scale=scale,
            mask=symbols.mask_text(route_mask(mask, q_heads, k_heads, self.clusters, self.window)),
            block_q=block,
            block_k=block,
        )
        back = builder.call(
            HELPERS["merge_routed"], *(builder.call(operator.getitem, far, i) for i in range(2)), chosen[0], k
        )
        near = builder.call(
            OPS["attention_lse"].overload,
            q,
            k,
            v,
            bias,
            scale=scale,
            mask=symbols.mask_text(window_mask(mask, self.window)),
        )
        parts = [builder.call(operator.getitem, pair, i) for pair in (near, back) for i in range(2)]
        if update:
            means = builder.call(HELPERS["cluster_means"], q, k, centroids)
            builder.call(HELPERS["ema_update"], centroids, means, decay=float(self.decay))
        return builder.call(operator.getitem, builder.call(OPS["merge_attention"].overload, *parts), 0)

    def _bias(self, builder: Builder, bias: Node, index: Node, group: int) -> Node:
        """A padding mask (B, 1 or Hq, 1, L) at the clusters' keys: (B, Hq * K, 1, w)."""
        rows = builder.call(aten.transpose.int, bias, 2, 3)
        if value(bias).shape[1] == 1:
            rows = builder.call(aten.expand.default, rows, [-1, int(value(index).shape[1]), -1, -1])
        else:  # the same for all queries of a group, or it is no padding mask
            rows = builder.call(aten.slice.Tensor, rows, 1, 0, 2**62, group)
        taken = builder.call(HELPERS["take_routed"], rows, index)
        again = builder.call(aten.repeat_interleave.self_int, taken, group, 1)
        return builder.call(aten.transpose.int, again, 2, 3)
