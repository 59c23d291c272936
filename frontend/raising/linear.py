"""linear: ``aten.linear``, and ``addmm``, ``mm`` and ``matmul`` with a weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from ...passes.view import GraphView, arguments, peel, value
from .rules import Builder, Decline, Facts, NearMiss, Raised, RaiseRule, is_call, is_dim, is_vector

Node = torch.fx.Node
aten = torch.ops.aten


class Linear:
    """``x @ weight.T + bias``. GPT-2's Conv1D multiplies by the weight as it is: the op gets its transpose."""

    op = "linear"
    anchors = (aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default)

    def match(self, node: Node, view: GraphView, facts: Facts) -> Raised | NearMiss | Decline | None:
        given = arguments(node)
        if node.target is aten.linear.default:
            if facts.rank(given["weight"]) != 2:
                return None
            return Raised("linear", (given["input"], given["weight"], given["bias"]), {}, (node,), node)
        bias = None
        if node.target is aten.addmm.default:
            x, right, bias = given["mat1"], given["mat2"], given["self"]
        elif node.target is aten.mm.default:
            x, right = given["self"], given["mat2"]
        else:
            x, right = given["self"], given["other"]
        found = _weight(right, facts, bias)
        if found is None or facts.rank(x) < 2:
            return None
        weight, transposed = found
        if node.target is aten.addmm.default:
            if given["beta"] != 1 or given["alpha"] != 1:
                return NearMiss(node, f"addmm scales by beta={given['beta']}, alpha={given['alpha']}")
            if not is_vector(bias, value(right).shape[1]):
                return NearMiss(node, "what addmm adds is not a bias of one value per output")
        if transposed:
            return Raised("linear", (x, weight, bias), {}, (node,), node)

        def before(builder: Builder) -> dict[str, Any]:
            return {"weight": builder.call(aten.t.default, weight)}

        return Raised("linear", (x, None, bias), {}, (node,), node, before=before)


def _weight(item: Any, facts: Facts, bias: Any) -> tuple[Node, bool] | None:
    """The two-dimensional weight behind ``item`` and whether ``item`` is its transpose."""
    node = peel(item)
    if facts.rank(node) != 2:
        return None
    if _is_weight(node, facts, bias):
        return node, False
    if is_call(node, aten.t.default, aten.mT.default, aten.numpy_T.default):
        transposed = True
    elif is_call(node, aten.transpose.int):
        transposed = is_dim(node.args[1], 0, 2) != is_dim(node.args[2], 0, 2)
    elif is_call(node, aten.permute.default):
        transposed = is_dim(node.args[1][0], 1, 2) and is_dim(node.args[1][1], 0, 2)
    else:
        transposed = False
    source = peel(node.args[0]) if transposed else None
    return (source, True) if source is not None and _is_weight(source, facts, bias) else None


def _is_weight(item: Node, facts: Facts, bias: Any) -> bool:
    """Of two graph inputs, one added as a vector and one multiplied by, the model owns both."""
    if facts.is_weight(item):
        return True
    return item.op == "placeholder" and isinstance(bias, Node) and bias.op == "placeholder" and facts.rank(bias) == 1


RULES: tuple[RaiseRule, ...] = (Linear(),)
