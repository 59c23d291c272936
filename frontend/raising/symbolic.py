"""An abstract interpreter for the integer and boolean tensors that masks are built from.

:class:`Interpreter` evaluates one element of a tensor, at an index given as sympy expressions, by walking the graph
backwards: a view turns the index into another index, ``arange`` turns it into a number, a comparison into a
``sympy`` relation. What it cannot follow becomes a *read*: ``read_<node>(i, j, ...)``, an element of a tensor that is
only known when the model runs. So a causal mask built from twenty nodes comes out as ``k <= q``, and padding as
``read_attention_mask(b, k) != 0``.

Nothing here guesses. An element is one of

- a ``sympy`` Boolean, for bool tensors;
- :class:`Cases`: finitely many values, each under a condition, the conditions exclusive and exhaustive. Integer values
  are ``sympy`` expressions, floating-point values are Python floats that were computed by torch in the tensor's own
  dtype, so a cast or ``(1 - mask) * finfo.min`` rounds as it does in the model;
- :class:`Opaque`: a floating-point element that depends on data.

Integers are mathematical integers: expressions are only formed for int32 and int64, where positions do not overflow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
import torch.fx
from sympy.logic.boolalg import Boolean

from ...passes.view import arguments, is_assertion, value
from .symbolic_ops import RULES
from .symbolic_values import (
    Cases,
    Element,
    Index,
    Mutated,
    Opaque,
    Unsupported,
    bool_cases,
    broadcast_index,
    is_one,
    reshape_index,
    same_expr,
    size_expr,
    truth,
)

Node = torch.fx.Node
aten = torch.ops.aten

_MAX_DEPTH = 400


class Interpreter:
    """Evaluates elements of one graph's tensors. Results are kept, so that layers share the analysis of a mask.

    number: what a node without tensor semantics stands for, when known while compiling (``Facts.number``).
    """

    def __init__(self, graph: torch.fx.Graph, number: Callable[[Any], int | float | None]) -> None:
        self.number = number
        self.reads: dict[str, Node] = {}
        self._memo: dict[tuple[Node, Index], Element] = {}
        self._depth = 0
        self.mutated = mutated_nodes(graph)

    def element(self, node: Node, index: Sequence[sympy.Expr]) -> Element:
        """The element of ``node`` at ``index`` (one expression a dimension). Raises :class:`Mutated`."""
        index = tuple(index)
        key = (node, index)
        if key in self._memo:
            return self._memo[key]
        if node in self.mutated:
            raise Mutated(node.name)
        rule = RULES.get(node.target) if node.op == "call_function" else None
        self._depth += 1
        try:
            if self._depth > _MAX_DEPTH:
                raise Unsupported("too deep")
            if rule is None and (number := self.number(node)) is not None and node.op in ("call_function", "get_attr"):
                result: Element = self.constant(number, value(node).dtype)
            elif rule is None:
                raise Unsupported(str(node.target))
            else:
                result = rule(self, node, index)
        except Unsupported:
            result = self.read(node, index)
        finally:
            self._depth -= 1
        self._memo[key] = result
        return result

    def read(self, node: Node, index: Index) -> Element:
        """The element as data: nothing is known but where it is."""
        dtype = value(node).dtype
        if dtype.is_floating_point or dtype.is_complex:
            return Opaque(node, index)
        name = f"read_{node.name}"
        self.reads[name] = node
        element = sympy.Function(name, integer=True)(*index)
        return sympy.Ne(element, 0) if dtype is torch.bool else Cases(((element, sympy.true),))

    def scalar(self, item: Any) -> sympy.Expr:
        """An int argument of an op (a number, or a node that holds a SymInt) as an expression."""
        known = value(item)
        if isinstance(known, bool) or not isinstance(known, int | torch.SymInt):
            raise Unsupported(f"{item} is not an integer")
        return size_expr(known)

    def cases(self, item: Any, index: Index) -> Cases:
        """The element of an operand (a tensor node broadcast to ``index``, or a number) as cases."""
        element = self.operand(item, index)
        if isinstance(element, Opaque):
            raise Unsupported("data")
        if isinstance(element, Cases):
            return element
        return bool_cases(element)

    def operand(self, item: Any, index: Index) -> Element:
        """The element of an operand at the index of the op's result, broadcasting as torch does."""
        if isinstance(item, Node) and isinstance(value(item), torch.Tensor):
            return self.element(item, broadcast_index(value(item).shape, index))
        if isinstance(item, Node):
            return Cases(((self.scalar(item), sympy.true),))
        if isinstance(item, bool):
            return sympy.true if item else sympy.false
        if isinstance(item, int):
            return Cases(((sympy.Integer(item), sympy.true),))
        if isinstance(item, float):
            return Cases(((item, sympy.true),))
        raise Unsupported(f"operand {item!r}")

    def condition(self, item: Any, index: Index) -> Boolean:
        """The element of a boolean operand; a number is true when it is not zero."""
        element = self.operand(item, index)
        if isinstance(element, Opaque):
            raise Unsupported("data")
        return truth(element) if isinstance(element, Cases) else element

    @staticmethod
    def constant(number: int | float, dtype: torch.dtype) -> Element:
        if dtype is torch.bool:
            return sympy.true if number else sympy.false
        if dtype.is_floating_point:
            return Cases(((torch.tensor(number, dtype=dtype).item(), sympy.true),))
        if dtype.is_complex:
            raise Unsupported("complex")
        return Cases(((sympy.Integer(torch.tensor(number, dtype=dtype).item()), sympy.true),))


def mutated_nodes(graph: torch.fx.Graph) -> set[Node]:
    """Tensors that are written to after they were made while several nodes read them: what they hold depends on when.

    ``y = x.masked_fill_(...)`` where nothing else reads ``x`` or a view of it is as good as functional.
    """
    mutated: set[Node] = set()
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if not node.target._schema.is_mutable or is_assertion(node):
            continue
        given = arguments(node)
        for argument in node.target._schema.arguments:
            written = given.get(argument.name)
            if argument.alias_info is None or not argument.alias_info.is_write or not isinstance(written, Node):
                continue
            for alias in _aliases(written):
                if alias < node and sum(not is_assertion(user) for user in alias.users) > 1:
                    mutated.add(alias)
    return mutated


def _aliases(node: Node) -> set[Node]:
    """The node, what it may be a view of, and the views of that."""
    base = node
    while may_alias(base) and base.all_input_nodes:
        base = base.all_input_nodes[0]
    found, queue = {base}, [base]
    while queue:
        for user in queue.pop().users:
            if user not in found and may_alias(user) and not is_assertion(user):
                found.add(user)
                queue.append(user)
    return found


def may_alias(node: Node) -> bool:
    """Whether the node's result may share memory with its first input."""
    if node.op != "call_function":
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    returns = node.target._schema.returns
    return any(r.alias_info is not None for r in returns) or node.target in _MAYBE_VIEWS


_MAYBE_VIEWS = {
    aten.reshape.default,
    aten.contiguous.default,
    aten.flatten.using_ints,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
}

__all__ = [
    "Boolean",
    "Cases",
    "Element",
    "Index",
    "Interpreter",
    "Mutated",
    "Opaque",
    "Unsupported",
    "broadcast_index",
    "is_one",
    "mutated_nodes",
    "reshape_index",
    "same_expr",
    "size_expr",
    "truth",
]
