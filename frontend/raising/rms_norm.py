"""rms_norm: ``aten.rms_norm`` and hand-written (Llama, T5, Gemma, and without a weight)."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from ...passes.view import GraphView, arguments, peel
from .norm_parts import (
    ANCHORS,
    averaged,
    centred,
    find_affine,
    find_scaled,
    squared,
    too_narrow,
    weight_as_stored,
)
from .rules import Decline, Facts, NearMiss, Raised, RaiseRule, peel_widening

Node = torch.fx.Node
aten = torch.ops.aten


class AtenRmsNorm:
    """``torch.nn.RMSNorm`` and ``torch.rms_norm``."""

    op = "rms_norm"
    anchors = (aten.rms_norm.default,)

    def match(self, node: Node, view: GraphView, facts: Facts) -> Raised | NearMiss | Decline | None:
        given = arguments(node)
        dims = len(given["normalized_shape"])
        if dims != 1:
            return Decline(f"it normalises over the last {dims} dimensions, the canonical op over the last one")
        eps, dtype = given["eps"], Facts.dtype(given["input"])
        if eps is None:
            if dtype is None:
                return None
            eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        return Raised("rms_norm", (given["input"], given["weight"], float(eps)), {}, (node,), node)


class WrittenRmsNorm:
    """``x * rsqrt(mean(x^2) + eps) * weight`` in the orders and with the casts that models use."""

    op = "rms_norm"
    anchors = ANCHORS

    def match(self, node: Node, view: GraphView, facts: Facts) -> Raised | NearMiss | Decline | None:
        scaled = find_scaled(node, facts)
        if scaled is None or isinstance(scaled, NearMiss):
            return scaled
        moment = peel(scaled.moment)
        square = squared(moment.args[0])
        if square is None or centred(square[0]) is not None:
            return None  # nothing alike, or layer_norm
        mean = averaged(scaled.moment, "the squares")
        if mean is None or isinstance(mean, NearMiss):
            return mean
        wide, x = square[0], peel_widening(square[0])
        if centred(scaled.numerator) is not None:
            return None  # layer_norm tells
        if peel_widening(scaled.numerator) is not x:
            return NearMiss(scaled.node, "the tensor that is scaled is not the one whose squares are averaged")
        if (decline := too_narrow(moment) or too_narrow(scaled.node)) is not None:
            return decline
        affine = find_affine(scaled.node, facts, with_bias=False)
        # The op's result, or what it multiplies the weight with, has x's dtype: take x before or after its cast.
        dtype = Facts.dtype(affine.operand if affine.rounded else affine.root)
        source = next((s for s in (x, wide) if Facts.dtype(s) == dtype), None)
        if source is None:
            return NearMiss(affine.root, f"it is rounded to {dtype}, but x has {Facts.dtype(x)}")
        kwargs: dict[str, Any] = {}
        if affine.offset:
            kwargs["weight_offset"] = affine.offset
        if affine.rounded and affine.weight is not None:
            kwargs["round_before_weight"] = True
        return Raised(
            "rms_norm",
            (source, affine.weight if affine.rounded else weight_as_stored(affine.weight), scaled.eps),
            kwargs,
            (*scaled.covered, *mean[1], *square[1], *affine.covered),
            node,
            root=affine.root,
        )


RULES: tuple[RaiseRule, ...] = (AtenRmsNorm(), WrittenRmsNorm())
