"""gated_mlp: ``act(gate) * up`` where gate and up come from linear layers, or are the parts of one layer's result."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.fx

from ...passes.matcher import Match, Matcher, Number, Var, call
from ...passes.view import GraphView, arguments, is_identity, peel
from .rules import (
    Builder,
    Decline,
    Facts,
    NearMiss,
    Raised,
    RaiseRule,
    is_call,
    is_dim,
    last_size,
    other_operand,
    past_identities,
    readers,
    sole_reader,
)

Node = torch.fx.Node
aten = torch.ops.aten

_ACTIVATIONS = {
    aten.silu.default: "silu",
    aten.gelu.default: "gelu",
    aten.relu.default: "relu",
    aten.sigmoid.default: "sigmoid",
}
_LINEARS = (
    aten.linear.default,
    aten.addmm.default,
    aten.mm.default,
    torch.ops.tilewright.linear.default,
    torch.ops.tilewright.quantized_linear.default,
)
_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.transpose.int)
_PARTS = (aten.chunk.default, aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.unbind.int)

# 0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))), "Gaussian Error Linear Units", Hendrycks and Gimpel 2016.
_x = Var("x")
_INNER = call(
    aten.mul.Tensor,
    call(
        aten.add.Tensor,
        _x,
        call(aten.mul.Tensor, call(aten.pow.Tensor_Scalar, _x, 3.0), Number("cubic"), commutes=True),
        commutes=True,
    ),
    Number("scale"),
    commutes=True,
)
_GELU_TANH = call(
    aten.mul.Tensor,
    call(aten.mul.Tensor, _x, Number("half"), commutes=True),
    call(aten.add.Tensor, call(aten.tanh.default, _INNER), Number("one"), commutes=True),
    commutes=True,
)
_GELU_NUMBERS = {"cubic": 0.044715, "scale": math.sqrt(2 / math.pi), "half": 0.5, "one": 1.0}


class GatedMlp:
    op = "gated_mlp"
    anchors = tuple(_ACTIVATIONS)

    def match(self, node: Node, view: GraphView, facts: Facts) -> Raised | NearMiss | Decline | None:
        activation, gate, act, covered = _ACTIVATIONS[node.target], node.args[0], node, [node]
        if activation == "gelu" and arguments(node)["approximate"] == "tanh":
            activation = "gelu_tanh"
        if activation == "sigmoid":
            # x * sigmoid(x) is silu written by hand.
            top, chain = past_identities(node)
            user = sole_reader(top)
            if user is not None and is_call(user, aten.mul.Tensor) and peel(other_operand(user, top)) is peel(gate):
                activation, act, covered = "silu", user, [node, *chain, user]
        return _gated(activation, gate, act, covered)


class WrittenGelu:
    """The tanh form of GELU written by hand, as T5 v1.1 does; only in float32, where its rounding does not matter."""

    op = "gated_mlp"
    anchors = (aten.tanh.default,)

    def match(self, node: Node, view: GraphView, facts: Facts) -> Raised | NearMiss | Decline | None:
        top = node
        for _ in range(2):
            top, _chain = past_identities(top)
            user = sole_reader(top)
            if user is None:
                return None
            top = user
        match = Matcher(view, skip=is_identity).match(_GELU_TANH, top)
        if not isinstance(match, Match) or not isinstance(match["x"], Node):
            return None
        outcome = _gated("gelu_tanh", match["x"], top, list(match.covered))
        if not isinstance(outcome, Raised):
            return outcome
        for name, wanted in _GELU_NUMBERS.items():
            # Models write sqrt(2 / pi) with eight digits or more.
            if not math.isclose(match[name], wanted, rel_tol=1e-7):
                return NearMiss(node, f"the constant {match[name]} is not the {wanted} of the tanh form of GELU")
        if facts.dtype(top) not in (torch.float32, torch.float64):
            return Decline(f"GELU is written by hand and rounds to {facts.dtype(top)} at every step")
        return outcome


class AtenGlu:
    """``torch.nn.functional.glu``: the first half times the sigmoid of the second."""

    op = "gated_mlp"
    anchors = (aten.glu.default,)

    def match(self, node: Node, view: GraphView, facts: Facts) -> Raised | NearMiss | Decline | None:
        given = arguments(node)
        x, size = given["self"], last_size(given["self"])
        if not is_dim(given["dim"], -1, facts.rank(x)) or not isinstance(size, int) or not from_linear(x):
            return None

        def before(builder: Builder) -> dict[str, Any]:
            up = builder.call(aten.slice.Tensor, x, -1, 0, size // 2)
            return {"gate": builder.call(aten.slice.Tensor, x, -1, size // 2, size), "up": up}

        return Raised("gated_mlp", (), {"activation": "sigmoid"}, (node,), node, before=before)


def _gated(activation: str, gate: Any, act: Node, covered: list[Node]) -> Raised | NearMiss | None:
    """``act``, the activation of ``gate``, times something else that comes from a linear layer."""
    if not from_linear(gate):
        return None
    top, chain = past_identities(act)
    products = [user for user in readers(top) if is_call(user, aten.mul.Tensor)]
    if not products:
        return None
    product = products[0]
    up = other_operand(product, top)
    if not isinstance(up, Node):
        return None
    other = peel(up)
    if other is peel(gate) or (is_call(other, *_ACTIVATIONS) and peel(other.args[0]) is peel(gate)):
        return None  # a function of one tensor, such as the square of relu
    if not from_linear(up):
        return NearMiss(product, f"{activation}(gate) is multiplied by what no linear layer made")
    return Raised(
        "gated_mlp", (gate, up), {"activation": activation}, (*covered, *chain, product), product, root=product
    )


def from_linear(item: Any) -> bool:
    """Whether a linear layer made ``item``, reshaped or cut into parts at most."""
    while isinstance(item, Node):
        if item.target in _LINEARS:
            return True
        if is_call(item, aten.matmul.default):
            return Facts.rank(item.args[1]) == 2
        if not (is_identity(item) or is_call(item, operator.getitem, aten.slice.Tensor, *_PARTS, *_RESHAPES)):
            return False
        item = item.args[0]
    return False


RULES: tuple[RaiseRule, ...] = (GatedMlp(), WrittenGelu(), AtenGlu())
