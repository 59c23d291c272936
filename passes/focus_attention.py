"""Focus: distant tokens attend only inside learned groups."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.fx

from ..codegen import symbols
from ..runtime.errors import BadPassOption
from ..runtime.ops import HELPERS, OPS
from ..runtime.ops.block_attention import SIZES
from ..runtime.ops.gated_attention import GATES
from ..runtime.ops.group_attention import CAUSAL, MOST_SETS, group_mask, window_mask
from ._hidden_states import token_features
from .base import Builder, Decline, Exactness, NearMiss, Needs, Pass, Rewrite, SiteContext
from .view import arguments, same_size, value

Node = torch.fx.Node
aten = torch.ops.aten

GROUP = "centroids"
"""What ``tilewright.tune(..., parameters=)`` calls the parameters of this pass."""
OFFSET_DECAY = 0.9


@dataclass(frozen=True)
class FocusAttention(Pass):
    """Let near tokens attend in full and distant ones only when they share a learned group.

    ::

        S_ic = normalise(W h_i) . normalise(C_c)               h: hidden states, C: (groups, channels) centroids
        g    = Sinkhorn(S / temperature)                       a token sums to one, every group weighs the same
        visible(i, j) = mask(i, j) and (|i - j| <= window or j < sinks
                                        or top_keep(g_i) and top_keep(g_j) have a group in common)

    Source: "Why Attend to Everything? Focus is the Key" (Yao et al. 2026, arXiv 2604.03260), section 2 and appendix D.
    W and C start at random: ``tilewright.tune(compiled, data, parameters="centroids")`` trains them and nothing else,
    with soft gates (``gate``); what runs outside of tuning is the hard choice above, exactly: distant pairs on tokens
    sorted by group with block lists, window pairs with closed-form limits, joined by their log-sum-exps.

    Deviations from the paper. (1) W h and C are normalised, so that ``temperature`` means the same on every model.
    (2) Where the hidden states cannot be traced back from the values, the values of all heads stand for them. (3) The
    two attentions split the pairs into distant and near, not into same group and cross-group window: the same union,
    and the window has closed-form limits. (4) The first ``sinks`` tokens are visible to all, without which models
    that park attention there (most do) fall apart under any window: docs/learned_selection.md; 0 is the paper's. (5)
    ``gate="weight"`` and ``balance="running"`` are ours. While tuning, the paper's gate, ``"score"`` (equation 2),
    leaves a factor of one half on scores of pairs that the hard choice then drops, so it trains a denser function
    than it runs; ``"weight"`` trains what runs, by straight-through gradients, which are rougher.

    **Sinkhorn looks ahead.** It balances each group over the whole sequence, so a token's groups depend on later
    tokens, and a causal model's perplexity under ``balance="sequence"`` (the paper's) is not one it could reach token
    by token. ``"running"`` balances with per-group offsets averaged while tuning (decay 0.9): nothing looks ahead, and
    a token gets the same groups in any length and batch. Padding counts as tokens under ``"sequence"``.

    Quality: another function; the report tells each site's error, docs/learned_selection.md the measurements.

    groups, keep: number of groups, and how many each token belongs to. window: how far tokens always see each other,
    to each side. sinks: see above. channels: of the space in which tokens meet centroids (16 suffice in the paper).
    temperature, iterations: Sinkhorn's. gate: how pairs are softened while tuning. steepness: of the ``score`` gate;
    the paper does not tell its own. balance: see above. block_size: of the block lists, less where the example inputs
    are short. seed: of the random start.
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    needs: ClassVar[Needs] = Needs.TRAINING
    ops: ClassVar[tuple[str, ...]] = ("attention",)

    groups: int = 4
    keep: int = 2
    window: int = 128
    sinks: int = 4
    channels: int = 16
    temperature: float = 0.1
    iterations: int = 10
    gate: Literal["score", "weight"] = "score"
    steepness: float = 10.0
    balance: Literal["sequence", "running"] = "sequence"
    block_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"groups": 1, "keep": 1, "window": 0, "sinks": 0, "channels": 1, "iterations": 1}
        for name, low in least.items():
            got = getattr(self, name)
            if not isinstance(got, int) or isinstance(got, bool) or got < low:
                raise BadPassOption(f"focus-attention: {name} is {got!r}, but must be a whole number of at least {low}")
        if self.keep > self.groups:
            raise BadPassOption(f"focus-attention: keep is {self.keep}, more than the {self.groups} groups")
        if math.comb(self.groups, self.keep) > MOST_SETS:
            raise BadPassOption(
                f"focus-attention: {self.keep} of {self.groups} groups make {math.comb(self.groups, self.keep)} "
                f"different sets, more than {MOST_SETS}: take fewer groups"
            )
        for name in ("temperature", "steepness"):
            got = getattr(self, name)
            if not isinstance(got, int | float) or isinstance(got, bool) or not 0 < got < math.inf:
                raise BadPassOption(f"focus-attention: {name} is {got!r}, but must be a positive number")
        for name, choices in (("gate", GATES), ("balance", ("sequence", "running")), ("block_size", SIZES)):
            if (got := getattr(self, name)) not in choices:
                raise BadPassOption(
                    f"focus-attention: {name} is {got!r}, but must be one of {', '.join(map(str, choices))}"
                )

    def rewrite(self, site: SiteContext) -> Rewrite | Decline | NearMiss:
        if (reason := why_not_grouped(site)) is not None:
            return Decline(reason)
        length = site.val("k").shape[2]
        if isinstance(length, int) and length <= self.window:
            return Decline(f"its {length} tokens are all inside a window of {self.window}")
        block = block_for(length, self.block_size)
        if block is None:
            return Decline("the example inputs have too few tokens to capture blocks of them: give more than 16")
        details = {
            "groups": self.groups,
            "keep": self.keep,
            "window": self.window,
            "sinks": self.sinks,
            "distant_pairs_at_random": round(_share(self.groups, self.keep), 3),
        }
        return Rewrite(lambda b: self._hard(b, site, block), details, training=lambda b: self._soft(b, site))

    def _log_groups(self, builder: Builder, site: SiteContext, training: bool) -> Node:
        """log g (B, L, groups), float32."""
        features, width = token_features(builder, site.arg("v"))
        generator = torch.Generator().manual_seed(site_seed(self.seed, site.site.id))
        device, dtype = value(features).device, value(features).dtype
        start = [torch.randn(n, self.channels, generator=generator) for n in (width, self.groups)]
        names = (f"{site.site.id}_focus_projection", f"{site.site.id}_focus_centroids")
        weight, centroids = (
            builder.parameter(name, tensor.to(device, dtype), group=GROUP)
            for name, tensor in zip(names, (start[0] * width**-0.5, start[1]), strict=True)
        )
        tokens = _normalised(builder, builder.call(aten.matmul.default, features, weight))
        centres = _normalised(builder, centroids)
        scores = builder.call(aten.matmul.default, tokens, builder.call(aten.t.default, centres))
        if self.balance == "sequence":
            return self._sinkhorn(builder, scores)[0]
        zeros = torch.zeros(self.groups, device=device, dtype=dtype)
        offsets = builder.parameter(f"{site.site.id}_focus_offsets", zeros, group=GROUP, trained=False)
        if training:
            log_g, found = self._sinkhorn(builder, scores)
            mean = builder.call(aten.mean.dim, builder.call(aten.detach.default, found), [0])
            builder.call(HELPERS["ema_update"], offsets, mean, decay=OFFSET_DECAY)
            return log_g
        scaled = builder.call(aten.div.Tensor, scores, float(self.temperature))
        return builder.call(aten.log_softmax.int, builder.call(aten.add.Tensor, scaled, offsets), -1)

    def _sinkhorn(self, builder: Builder, scores: Node) -> list[Node]:
        both = builder.call(
            HELPERS["sinkhorn"], scores, temperature=float(self.temperature), iterations=self.iterations
        )
        return [builder.call(operator.getitem, both, i) for i in range(2)]

    def _soft(self, builder: Builder, site: SiteContext) -> Node:
        log_g = self._log_groups(builder, site, training=True)
        named = arguments(site.node)
        q, k, v, bias = (named[name] for name in ("q", "k", "v", "bias"))
        return builder.call(
            HELPERS["gated_attention"],
            q,
            k,
            v,
            log_g,
            bias,
            scale=named["scale"],
            mask=named["mask"],
            window=self.window,
            keep=self.keep,
            gate=self.gate,
            steepness=float(self.steepness),
            sinks=self.sinks,
        )

    def _hard(self, builder: Builder, site: SiteContext, block: int) -> Node:
        members = builder.call(HELPERS["kept_groups"], self._log_groups(builder, site, training=False), keep=self.keep)
        both = builder.call(HELPERS["group_order"], members, keep=self.keep)
        order, inverse, table = (builder.call(operator.getitem, both, i) for i in range(3))
        named = arguments(site.node)
        mask = own_mask(named["mask"])
        sizes = {"block_q": block, "block_k": block}
        states = builder.call(
            HELPERS["group_states"], members, order, mask=mask, window=self.window, **sizes, sinks=self.sinks
        )
        lists = builder.call(HELPERS["block_lists"], states)
        counts, indices = (builder.call(operator.getitem, lists, i) for i in range(2))
        q, k, v, bias = (named[name] for name in ("q", "k", "v", "bias"))
        sorted_qkv = [builder.call(HELPERS["take_tokens"], x, order) for x in (q, k, v)]
        sorted_bias = None if bias is None else builder.call(HELPERS["take_tokens"], bias, order, dim=3)
        far = builder.call(
            OPS["block_attention_lse"].overload,
            *sorted_qkv,
            counts,
            indices,
            sorted_bias,
            table,
            scale=named["scale"],
            mask=symbols.mask_text(group_mask(mask, self.groups, self.keep, self.window, self.sinks)),
            **sizes,
        )
        near = builder.call(
            OPS["attention_lse"].overload,
            q,
            k,
            v,
            bias,
            scale=named["scale"],
            mask=symbols.mask_text(window_mask(mask, self.window, self.sinks)),
        )
        back = [builder.call(HELPERS["take_tokens"], builder.call(operator.getitem, far, i), inverse) for i in range(2)]
        ends = [builder.call(operator.getitem, near, i) for i in range(2)]
        merged = builder.call(OPS["merge_attention"].overload, *ends, *back)
        return builder.call(operator.getitem, merged, 0)


def why_not_grouped(site: SiteContext) -> str | None:
    """The reason that the site's tokens cannot be put into groups and sorted, or None."""
    q, k, bias = (site.val(name) for name in ("q", "k", "bias"))
    if site.arg("normalizer") != "softmax":
        return f"its normalizer is {site.arg('normalizer')}, and parts of it cannot be joined by log-sum-exp"
    if not same_size(q.shape[2], k.shape[2]):
        return "it has other queries than keys (cross-attention, or a cache): groups are of one sequence"
    if any(isinstance(size, int) and size == 0 for t in (q, k) for size in t.shape):
        return "it has no elements"
    if bias is not None and (bias.dtype != torch.bool or bias.dim() != 4 or not same_size(bias.shape[2], 1)):
        return "its bias differs between queries or is no padding mask: sorting it would cost as much as attention"
    if bias is not None and not same_size(bias.shape[3], k.shape[2]):
        return "its padding mask is of another length than its keys"
    if symbols.HEAD in symbols.parse_mask(own_mask(site.arg("mask"))).free_symbols:
        return "its mask differs between heads"
    return None


def block_for(length: Any, block_size: int) -> int | None:
    """The block size for sequences captured with ``length`` tokens, or None when there are too few to capture.

    A symbolic length must be traced with more than one block: one block would be all that the graph then takes.
    """
    if isinstance(length, int):
        return block_size
    return next((size for size in reversed(SIZES) if size <= block_size and size < length.node.hint), None)


def own_mask(mask: str) -> str:
    """A site's mask with one spelling of causal; q_len is k_len here."""
    text = symbols.mask_text(mask)
    return CAUSAL if text in (symbols.causal(), symbols.causal(end_aligned=True)) else text


def _normalised(builder: Builder, x: Node) -> Node:
    norm = builder.call(aten.linalg_vector_norm.default, x, 2, [-1], True)
    return builder.call(aten.div.Tensor, x, builder.call(aten.clamp_min.default, norm, 1e-6))


def _share(groups: int, keep: int) -> float:
    """The share of pairs with a common group when every set is as likely."""
    return 1.0 - math.comb(groups - keep, keep) / math.comb(groups, keep)


def site_seed(seed: int, site: str) -> int:
    """Another start at every site, the same in every process."""
    number = seed
    for byte in site.encode():
        number = (number * 257 + byte) % (2**61 - 1)
    return number
