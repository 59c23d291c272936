"""Matrix products by labelled dimensions: matmul, bmm, baddbmm and einsum are one thing to the attention rule."""

from __future__ import annotations

import string
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.fx

from ...passes.view import arguments, is_assertion, value
from .masks import Masks
from .rules import Facts

Node = torch.fx.Node
Label = Hashable
aten = torch.ops.aten


class Stopped(Exception):
    """The site stops being attention at ``node``."""

    def __init__(self, node: Node, reason: str) -> None:
        super().__init__(reason)
        self.node = node
        self.reason = reason


@dataclass(frozen=True)
class Product:
    """``out = alpha * sum(left * right) + beta * added``, over the labels of both operands that ``out`` lacks."""

    node: Node
    left_node: Node
    right_node: Node
    left: tuple[Label, ...]
    right: tuple[Label, ...]
    out: tuple[Label, ...]
    alpha: float = 1.0
    added: Node | None = None
    beta: float = 1.0

    def swapped(self) -> Product:
        """The same product with its operands exchanged."""
        return replace(self, left_node=self.right_node, right_node=self.left_node, left=self.right, right=self.left)

    @staticmethod
    def dims(labels: Sequence[Label], order: Sequence[Label]) -> tuple[int | None, ...]:
        """For each label of ``order`` the operand's dim that has it, None when it has not."""
        return tuple(labels.index(label) if label in labels else None for label in order)


PRODUCTS = (
    aten.matmul.default,
    aten.bmm.default,
    aten.mm.default,
    aten.baddbmm.default,
    aten.einsum.default,
)


def parse_product(node: Node, facts: Facts) -> Product | None:
    """The node as a product of two operands; None when it is another op, or sums in a way no label tells."""
    if node.op != "call_function" or node.target not in PRODUCTS:
        return None
    if node.target is aten.einsum.default:
        return _parse_einsum(node)
    given = arguments(node)
    if node.target is aten.baddbmm.default:
        left, right = given["batch1"], given["batch2"]
    else:
        left, right = given["self"], given["other" if node.target is aten.matmul.default else "mat2"]
    left_rank, right_rank = value(left).dim(), value(right).dim()
    if left_rank < 2 or right_rank < 2:
        return None
    rank = max(left_rank, right_rank)
    batch = [("batch", d) for d in range(rank - 2)]
    product = Product(
        node,
        left,
        right,
        (*batch[rank - left_rank :], "row", "inner"),
        (*batch[rank - right_rank :], "inner", "column"),
        (*batch, "row", "column"),
    )
    if node.target is aten.baddbmm.default:
        alpha, beta = Masks.of(facts).number(given["alpha"]), Masks.of(facts).number(given["beta"])
        if alpha is None or beta is None:
            raise Stopped(node, "alpha or beta is not known when compiling")
        # torch ignores the input, NaN and infinity included, when beta is 0.
        product = replace(product, alpha=float(alpha), beta=float(beta), added=given["self"] if beta != 0 else None)
    return product


def _parse_einsum(node: Node) -> Product | None:
    equation, operands = node.args[0], node.args[1]
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    left_text, comma, right_text = inputs.partition(",")
    if not arrow or not comma:
        return None
    texts = []
    free = [c for c in string.ascii_letters if c not in equation]
    for text, rank in ((left_text, value(operands[0]).dim()), (right_text, value(operands[1]).dim())):
        if "..." in text:
            count = rank - len(text) + 3
            # The ellipsis covers the last of the batch dims, aligned to the right as in broadcasting.
            text = text.replace("...", "".join(free[:8][8 - count :]) if 0 < count <= 8 <= len(free) else "")
        if len(set(text)) != len(text) or len(text) != rank:
            return None
        texts.append(text)
    left, right = texts
    if "..." in output:
        widest = max((t for t in texts), key=lambda t: sum(c in free[:8] for c in t))
        output = output.replace("...", "".join(c for c in widest if c in free[:8]))
    alone = (set(left) ^ set(right)) - set(output)
    if alone or len(set(output)) != len(output) or set(output) - set(left) - set(right):
        return None
    return Product(node, operands[0], operands[1], tuple(left), tuple(right), tuple(output))


def real_users(node: Node) -> list[Node]:
    """The nodes that compute with the node's value."""
    return [user for user in node.users if not is_assertion(user)]
