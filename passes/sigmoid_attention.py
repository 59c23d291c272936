"""Sigmoid attention in the place of softmax attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..runtime.errors import BadPassOption, CalibrationNeeded
from ..runtime.ops.visible_keys import VISIBLE_KEYS
from ._sigmoid_fit import Fit, Sample, fit_biases
from .base import Builder, Decline, Exactness, NearMiss, Needs, Pass, Rewrite, SiteContext
from .view import arguments, value

Node = torch.fx.Node
aten = torch.ops.aten

CONSTANT_GAIN = 0.05
"""A head's bias without -log(n) is taken only when it lowers the error by this share: it does not follow the length."""


@dataclass(frozen=True)
class SigmoidAttention(Pass):
    """Replace the row softmax of attention by an element-wise sigmoid: no running maximum, no row sum.

    ::

        softmax_k(s q.k + bias) v   ->   sum_k sigmoid(s q.k + bias + b) v      masked pairs weigh 0

    Source: "Theory, Analysis, and Best Practices for Sigmoid Self-Attention", Ramapuram et al. 2024 (arXiv 2409.04431),
    section 2. There n is the sequence length; here it is the number of keys the row sees, so that causal and padded
    rows start at a sum of one too.

    Quality: another function. Models *trained* with it match softmax; weights trained with softmax need fine-tuning. On
    such weights ``-log_n`` puts the outputs off by more than their own size, a calibrated bias by less; docs/
    sigmoid_attention.md has the measurements. The report tells each site's error.

    bias: b. A number; ``"-log_n"``: -log of the number of visible keys, a different one for each row; ``"calibrated"``:
        fitted for each head on calibration inputs, so that a row's weights sum to one on average.
    follow_queries: with ``"calibrated"``, let the bias be linear in the query too (D more numbers a head and one small
        matrix product), fitted by ridge regression of the rows' log-sum-exp and kept within the range that the
        calibration inputs span. Not from the paper.
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    ops: ClassVar[tuple[str, ...]] = ("attention",)

    bias: float | Literal["-log_n", "calibrated"] = "-log_n"
    follow_queries: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.bias, int | float) and not isinstance(self.bias, bool):
            good = math.isfinite(self.bias)
        else:
            good = self.bias in ("-log_n", "calibrated")
        if not good:
            raise BadPassOption(
                f"sigmoid-attention: bias is {self.bias!r}, but must be a finite number, '-log_n' or 'calibrated'"
            )
        if not isinstance(self.follow_queries, bool):
            raise BadPassOption(f"sigmoid-attention: follow_queries is {self.follow_queries!r}, not True or False")
        if self.follow_queries and self.bias != "calibrated":
            raise BadPassOption("sigmoid-attention: follow_queries is fitted on activations: use bias='calibrated'")

    def current_needs(self) -> Needs:
        return Needs.CALIBRATION if self.bias == "calibrated" else Needs.NOTHING

    def observe(self, site: SiteContext, values: Mapping[str, Any]) -> None:
        """Keep a bounded, seeded sample of the rows (see :class:`Sample`)."""
        if "sample" not in site.state:
            site.state["sample"] = Sample(site.site.id, regress=self.follow_queries)
        site.state["sample"].observe(values)

    def rewrite(self, site: SiteContext) -> Rewrite | Decline | NearMiss:
        if site.arg("normalizer") != "softmax":
            return Decline(f"its normalizer is {site.arg('normalizer')} already")
        q, k, v = (site.val(name) for name in ("q", "k", "v"))
        if any(isinstance(size, int) and size == 0 for t in (q, k, v) for size in t.shape):
            return Decline("it has no elements")
        if self.bias != "calibrated":
            return Rewrite(lambda builder: self._build(builder, site, None), {"bias": self.bias})
        sample = site.state.get("sample")
        if sample is None:
            raise CalibrationNeeded(
                "sigmoid-attention{bias=calibrated} saw no activations of this attention: give calibration inputs",
                site=site.site.id,
                source=site.site.source,
            )
        fits = fit_biases(sample)
        if not fits:
            return Decline("no row of the calibration inputs sees a key")
        fit = self._choose(fits[1:])
        return Rewrite(lambda builder: self._build(builder, site, fit), _details(sample, fits[0], fit))

    def _choose(self, fits: list[Fit]) -> Fit:
        first, *others = fits
        return next((fit for fit in others if fit.rel_l2 < (1 - CONSTANT_GAIN) * first.rel_l2), first)

    def _build(self, builder: Builder, site: SiteContext, fit: Fit | None) -> Node:
        named = arguments(site.node)
        q = named["q"]
        if fit is not None:
            shift = _fitted(builder, named, site.site.id, fit)
        elif isinstance(self.bias, str):
            shift = negative_log_count(builder, named)
        else:
            shift = _scalar(builder, q, self.bias)
        return builder.call(site.node.target, **(named | {"normalizer": "sigmoid", "shift": shift}))


def _details(sample: Sample, before: Fit, fit: Fit) -> dict[str, Any]:
    def number(x: Any) -> float:
        return round(float(x), 6)

    return {
        "bias": "calibrated",
        "form": fit.form,
        "head_bias": {"min": number(fit.head.min()), "mean": number(fit.head.mean()), "max": number(fit.head.max())},
        "row_sum": {"-log_n": number(before.row_sum), "calibrated": number(fit.row_sum)},
        "row_sum_std": {"-log_n": number(before.row_sum_std), "calibrated": number(fit.row_sum_std)},
        "calibration_rel_l2": {"-log_n": number(before.rel_l2), "calibrated": number(fit.rel_l2)},
        "sampled": {
            "sequences": len(sample.kept),
            "of": sample.seen,
            "rows": sum(rows.q.shape[1] for _, rows in sample.kept),
        },
    }


def _scalar(builder: Builder, q: Node, number: float) -> Node:
    """A (1, 1, 1, 1) float32 tensor on the queries' device."""
    return builder.call(aten.new_full.default, q, [1, 1, 1, 1], float(number), dtype=torch.float32)


def _fitted(builder: Builder, named: Mapping[str, Any], site: str, fit: Fit) -> Node:
    head = builder.constant(f"{site}_head_bias", fit.head.reshape(1, -1, 1, 1))
    if fit.form == "constant":
        return head
    shift = builder.call(aten.add.Tensor, negative_log_count(builder, named), head)
    if fit.query is None or fit.query_range is None:
        return shift
    q = named["q"]
    if value(q).dtype != torch.float32:
        q = builder.call(aten.to.dtype, q, torch.float32)
    weight = builder.constant(f"{site}_query_weight", fit.query[:, :, None])
    limits = [
        builder.constant(f"{site}_query_{end}", limit.reshape(1, -1, 1, 1))
        for end, limit in zip(("least", "most"), fit.query_range, strict=True)
    ]
    linear = builder.call(aten.clamp.Tensor, builder.call(aten.matmul.default, q, weight), *limits)
    return builder.call(aten.sub.Tensor, shift, linear)


# ------------------------------------------------------------------------------------------ the number of visible keys


def negative_log_count(builder: Builder, named: Mapping[str, Any]) -> Node:
    """-log(max(1, number of visible keys)) of each row of an attention, float32, broadcastable to (B, Hq, Lq, 1).

    Attentions with the same mask, bias and sizes share one node. ``named``: the attention's arguments by name.
    """
    q, k, bias, mask = (named[name] for name in ("q", "k", "bias", "mask"))
    length = value(k).shape[2]
    if bias is None and not mask and isinstance(length, int):
        return _scalar(builder, q, -math.log(max(1, length)))
    count = _earlier_count(builder, q, k, bias, mask)
    if count is None:
        count = builder.call(VISIBLE_KEYS, q, k, bias, mask=mask)
    floats = _shared(builder, aten.to.dtype, count, torch.float32)
    # A row without keys has weights of 0 whatever its bias; 1 keeps the logarithm finite.
    logarithm = _shared(builder, aten.log.default, _shared(builder, aten.clamp_min.default, floats, 1.0))
    return _shared(builder, aten.neg.default, logarithm)


def _earlier_count(builder: Builder, q: Node, k: Node, bias: Node | None, mask: str) -> Node | None:
    """A ``visible_keys`` node before the builder's place that counts the same thing."""
    if bias is not None and any(_writes(user) for user in bias.users):
        return None  # its contents may have changed in between
    for node in builder.view.graph.find_nodes(op="call_function", target=VISIBLE_KEYS, sort=False):
        other = arguments(node)
        if not (node < builder.before and other["bias"] is bias and other["mask"] == mask):
            continue
        # Of q and k only sizes and device matter; with a bias the batch and heads come from it and the mask.
        if _same_sizes(value(other["q"]), value(q)) and _same_sizes(value(other["k"]), value(k)):
            return node
    return None


def _same_sizes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.device == b.device and all(
        statically_known_true(x == y) for x, y in zip(a.shape[:3], b.shape[:3], strict=True)
    )


def _shared(builder: Builder, target: Any, argument: Node, *rest: Any) -> Node:
    """``target(argument, *rest)``: the node before the builder's place that computes it already, or a new one."""
    for user in argument.users:
        if user.target is target and user.args == (argument, *rest) and not user.kwargs and user < builder.before:
            return user
    return builder.call(target, argument, *rest)


def _writes(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
