"""Finds attention, ``softmax(scale * q k^T, changed by masks and biases) v``: SDPA and the hand-written spellings.

The rule is anchored at the softmax. It walks up to the product of queries and keys, collecting the scale and every
change of the scores in order, and down to the product with the values; each step is one operator that it knows. Then it
strips the operands: transposes, repeated key heads, scales on one side. A step it does not know is a near miss at
that node. Numbers are captured, never assumed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx

from ...codegen import symbols
from ...passes.view import GraphView, arguments, value
from .attention_operands import Layout, Operand, Operands
from .attention_products import Product, Stopped
from .attention_scores import walk_down, walk_up
from .masks import Change, Emitter, Geometry, MaskPlan, Masks, NotAMask, with_notes
from .rules import Builder, Decline, Facts, NearMiss, Raised
from .symbolic import Unsupported, is_one

Node = torch.fx.Node
aten = torch.ops.aten

_FUSED = {
    name: getattr(aten, name).default
    for name in ("_native_multi_head_attention", "_transformer_encoder_layer_fwd", "_triton_multi_head_attention")
    if hasattr(aten, name)
}


class AttentionRule:
    """See :mod:`tilewright.frontend.raising.attention`."""

    op = "attention"
    anchors = (
        aten.scaled_dot_product_attention.default,
        aten.softmax.int,
        aten._softmax.default,
        aten._safe_softmax.default,
        *_FUSED.values(),
    )

    def match(self, node: Node, view: GraphView, facts: Facts) -> Raised | NearMiss | Decline | None:
        if node.target in _FUSED.values():
            return Decline("the projections and the attention are one fused operator, from torch's inference fast path")
        try:
            if node.target is aten.scaled_dot_product_attention.default:
                return self._fused(node, facts)
            return self._written(node, facts)
        except Stopped as stop:
            return NearMiss(stop.node, stop.reason)
        except NotAMask as stop:
            return NearMiss(stop.node, str(stop))
        except Unsupported as stop:
            return NearMiss(node, str(stop))

    def _fused(self, node: Node, facts: Facts) -> Raised | Decline | NearMiss | None:
        """``scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)``."""
        given = arguments(node)
        dropout = Masks.of(facts).number(given["dropout_p"])
        if dropout is None or dropout != 0:
            return Decline(f"dropout is active (p={given['dropout_p']})")
        q, k, v = given["query"], given["key"], given["value"]
        rank = value(q).dim()
        if not value(k).dim() == value(v).dim() == rank or not 2 <= rank <= 5:
            return NearMiss(node, f"queries, keys and values have {rank}, {value(k).dim()} and {value(v).dim()} dims")
        batch = rank - 2
        scores = (*value(q).shape[:-1], value(k).shape[-2])
        layout = Layout(scores)
        dims = tuple(range(rank))
        operands = Operands(
            Operand(q, dims, layout), Operand(k, dims, layout), Operand(v, dims, layout), value(node).dtype, facts
        )
        operands.strip(scales=False)
        scale = given["scale"]
        if scale is None:
            width = value(q).shape[-1]
            if not isinstance(width, int):
                return NearMiss(q, "the default scale needs a head dim that is known when compiling")
            scale = 1 / math.sqrt(width)
        elif (scale := Masks.of(facts).number(scale)) is None:
            return NearMiss(node, "the scale is not known when compiling")
        changes = []
        if (bias := given["attn_mask"]) is not None:
            kind = "visible" if value(bias).dtype is torch.bool else "add"
            changes.append(Change(kind, bias, layout.index(scores)))
        if given["is_causal"] and changes:
            return NearMiss(node, "is_causal and a mask at once")
        return self._raised(
            operands,
            layout,
            float(scale),
            changes,
            facts,
            (node,),
            node,
            node,
            range(batch + 2),
            bool(given["is_causal"]),
        )

    def _written(self, node: Node, facts: Facts) -> Raised | Decline | NearMiss | None:
        """A softmax between two products."""
        down = walk_down(node, facts)
        up = walk_up(node, facts)
        if down is None or up is None:
            # One product is no attention: a classifier, a router, attention pooling by a linear layer.
            return None
        if isinstance(up, Stopped):
            raise up
        if isinstance(down, Stopped):
            raise down
        if down.decline is not None:
            return Decline(down.decline)
        for inner in (*up.covered, node, *down.covered):
            if value(inner).dtype.itemsize < value(down.product.node).dtype.itemsize:
                raise Stopped(inner, f"scores or weights are rounded to {value(inner).dtype} on the way")
        first, second = up.product, down.product
        rank = value(first.node).dim()
        if len(first.out) != rank or first.out[-1] in first.left:
            first = first.swapped()
        key_label, query_label = first.out[-1], first.out[-2]
        batch = first.out[:-2]
        summed_over = [label for label in first.left if label not in first.out]
        if (
            key_label in first.left
            or query_label in first.right
            or key_label not in first.right
            or len(summed_over) != 1
        ):
            raise Stopped(first.node, "the softmax does not run over the keys of this product")
        weights = value(second.left_node if down.side == 0 else second.right_node).shape
        layout = Layout(*up.shapes, weights, grouped=len(batch) == 3 and _broadcasts(first, batch[2]))
        q = Operand(first.left_node, first.dims(first.left, [*batch, query_label, *summed_over]), layout, first.node)
        k = Operand(first.right_node, first.dims(first.right, [*batch, key_label, *summed_over]), layout, first.node)

        # The weights come in as (batch..., query, key); the values bring the keys back.
        if down.side != 0:
            second = second.swapped()
        w = second.left
        summed = [label for label in w if label not in second.out]
        if summed != [w[-1]] or w[-1] not in second.right:
            raise Stopped(second.node, "the product with the values does not sum over the keys")
        width = [label for label in second.right if label not in w]
        if len(width) != 1 or w[-2] in second.right or w[-2] not in second.out or width[0] not in second.out:
            raise Stopped(second.node, "the product with the values keeps other dims than queries and channels")
        if any(label not in second.out for label in w[:-2]):
            raise Stopped(second.node, "the product with the values sums over a batch dim")
        order = [*w[:-2], w[-2], width[0]]
        v_layout = Layout(weights, canonical=layout)
        v = Operand(second.right_node, second.dims(second.right, [*w[:-2], w[-1], width[0]]), v_layout, second.node)
        operands = Operands(q, k, v, value(second.node).dtype, facts, value(first.node).dtype)
        operands.strip(scales=True)
        scale = up.factor * operands.scale
        changes = [change(layout) for change in reversed(up.changes)]
        covered = (*up.covered, node, *down.covered)
        permuted = [order.index(label) for label in second.out]
        return self._raised(operands, v_layout, scale, changes, facts, covered, node, second.node, permuted, False)

    def _raised(
        self,
        operands: Operands,
        layout: Layout,
        scale: float,
        changes: Sequence[Change],
        facts: Facts,
        covered: Sequence[Node],
        origin: Node,
        root: Node,
        permuted: Sequence[int],
        causal: bool,
    ) -> Raised:
        """layout: of the product with the values; permuted: which of its dims each dim of the root is."""
        if scale == 0 or not math.isfinite(scale):
            raise Stopped(root, f"the scale is {scale}")
        masks = Masks.of(facts)
        operands.check(masks.interpreter.mutated)
        geometry = Geometry(operands.sizes, operands.dtype, value(root).device)
        if causal:
            plan = MaskPlan(symbols.mask_text(symbols.causal()), notes=["is_causal"])
        else:
            plan = masks.plan(changes, geometry)

        def before(builder: Builder) -> dict[str, Any]:
            made = operands.build(builder)
            if scale < 0:
                # torch's fused causal kernel hides pairs by -inf before it scales: NaN for a negative scale.
                made["q"] = builder.call(aten.neg.default, made["q"])
            if plan.build is not None:
                made["bias"] = _emit(plan, plan.build, builder, masks, geometry, (made["q"], made["k"]))
            return made

        def after(builder: Builder, result: Node) -> Node:
            result = layout.restore(builder, result)
            if list(permuted) != list(range(len(permuted))):
                result = builder.call(aten.permute.default, result, list(permuted))
            if value(result).dtype != value(root).dtype:
                result = builder.call(aten.to.dtype, result, value(root).dtype)
            return result

        kwargs = {"scale": abs(scale), "mask": plan.text, "normalizer": "softmax"}
        nodes = tuple(dict.fromkeys(covered))
        return Raised(self.op, (), kwargs, nodes, origin, before, root, after, with_notes(plan))


def _broadcasts(product: Product, label: Any) -> bool:
    """Whether only the queries have this batch dim: the groups of (B, Hk, G, Q, D) against (B, Hk, 1, K, D)."""
    if label not in product.right:
        return True
    return bool(is_one(value(product.right_node).shape[product.right.index(label)]))


def _emit(plan: MaskPlan, build: Any, builder: Builder, masks: Masks, geometry: Geometry, operands: Any) -> Node:
    """The bias, built once for all the sites that share it: the first site in graph order builds it."""
    ready = plan.emitted
    if ready is not None and not ready._erased and ready.graph is builder.view.graph and ready < builder.before:
        return ready
    made: dict[int, Any] = {}

    def size(axis: int) -> Any:
        if isinstance(geometry.sizes[axis], int):
            return geometry.sizes[axis]
        if axis not in made:
            node, dim = (operands[1], 2) if axis == 3 else (operands[0], axis)
            made[axis] = builder.call(aten.sym_size.int, node, dim)
        return made[axis]

    plan.emitted = build(Emitter(builder, masks.interpreter, geometry, size))
    return plan.emitted


RULES = [AttentionRule()]
