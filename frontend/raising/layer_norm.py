"""layer_norm: ``aten.layer_norm``, ``aten.native_layer_norm`` and hand-written mean and variance."""

from __future__ import annotations

import operator
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
from .rules import (
    Decline,
    Facts,
    NearMiss,
    Raised,
    RaiseRule,
    chain_to,
    is_call,
    is_dim,
    last_size,
    peel_widening,
    readers,
)

Node = torch.fx.Node
aten = torch.ops.aten


class AtenLayerNorm:
    """``torch.nn.LayerNorm`` and ``torch.nn.functional.layer_norm``."""

    op = "layer_norm"
    anchors = (aten.layer_norm.default, aten.native_layer_norm.default)

    def match(self, node: Node, view: GraphView, facts: Facts) -> Raised | NearMiss | Decline | None:
        given = arguments(node)
        args = tuple(given[name] for name in ("input", "normalized_shape", "weight", "bias", "eps"))
        if node.target is aten.layer_norm.default:
            return Raised("layer_norm", args, {}, (node,), node)
        outputs = [user for user in readers(node) if user.target is operator.getitem]
        if len(outputs) != 1 or outputs[0].args[1] != 0 or len(readers(node)) != 1:
            return Decline("the mean or the reciprocal of the standard deviation is used too")
        return Raised("layer_norm", args, {}, (node, outputs[0]), node, root=outputs[0])


class WrittenLayerNorm:
    """``(x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * weight + bias``, or with ``var(x, unbiased=False)``."""

    op = "layer_norm"
    anchors = ANCHORS

    def match(self, node: Node, view: GraphView, facts: Facts) -> Raised | NearMiss | Decline | None:
        scaled = find_scaled(node, facts)
        if scaled is None:
            return None
        if isinstance(scaled, NearMiss):
            return None  # rms_norm shares the anchors and has told
        x = centred(scaled.numerator)
        if x is None:
            return None
        moment = _variance(scaled.moment, x)
        if moment is None or isinstance(moment, NearMiss):
            return moment
        if (decline := too_narrow(peel(scaled.moment)) or too_narrow(scaled.node)) is not None:
            return decline
        affine = find_affine(scaled.node, facts, with_bias=True)
        if affine.offset:
            return NearMiss(affine.root, f"{affine.offset} is added to the weight")
        stored, dtype = peel_widening(x), Facts.dtype(affine.root)
        if affine.weight is not None and Facts.dtype(affine.operand) != Facts.dtype(scaled.node):
            return NearMiss(affine.operand, "it is rounded before the weight")
        source = next((s for s in (stored, x) if Facts.dtype(s) == dtype), None)
        if source is None:
            return NearMiss(affine.root, f"the result has {dtype}, but x has {Facts.dtype(stored)}")
        size = last_size(source)
        if not isinstance(size, int):
            return NearMiss(scaled.node, "the size of the last dimension is not known when compiling")
        return Raised(
            "layer_norm",
            (source, [size], weight_as_stored(affine.weight), weight_as_stored(affine.bias), scaled.eps),
            {},
            (*scaled.covered, *moment, *_centring(scaled.numerator), *affine.covered),
            node,
            root=affine.root,
        )


def _variance(item: Any, x: Any) -> list[Node] | NearMiss | None:
    """The nodes covered when ``item`` is the biased variance of ``x`` over the last dimension, kept."""
    node = peel(item)
    if is_call(node, aten.var.correction, aten.var.dim):
        given = arguments(node)
        if peel_widening(given["self"]) is not peel_widening(x):
            return NearMiss(node, "the variance is another tensor's")
        if not is_dim(given["dim"], -1, Facts.rank(given["self"])):
            return NearMiss(node, f"the variance is over dimension {given['dim']}, not over the last one")
        if not given["keepdim"]:
            return NearMiss(node, "the variance does not keep its dimension")
        biased = given["unbiased"] is False if "unbiased" in given else given["correction"] == 0
        if not biased or given.get("correction") is False:
            return NearMiss(node, "the variance divides by N - 1, layer_norm's by N")
        return [*chain_to(item, node), node]
    if is_call(node, aten.var.default):
        return NearMiss(node, "the variance is over all elements, not over the last dimension")
    square = squared(node.args[0])
    if square is None:
        return NearMiss(node, "it averages something else than the squares of x - mean(x)")
    of = centred(square[0])
    if of is None or peel_widening(of) is not peel_widening(x):
        return NearMiss(node, "the squares averaged are not those of x - mean(x)")
    mean = averaged(item, "the squares")
    if mean is None or isinstance(mean, NearMiss):
        return mean
    return [*mean[1], *square[1], *_centring(square[0])]


def _centring(item: Any) -> list[Node]:
    """The nodes of ``x - mean(x)``, x excluded."""
    difference = peel_widening(item)
    mean = peel(difference.args[1])
    return [*chain_to(item, difference), difference, *chain_to(difference.args[1], mean), mean]


RULES: tuple[RaiseRule, ...] = (AtenLayerNorm(), WrittenLayerNorm())
