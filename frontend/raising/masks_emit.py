"""Builds the tensors that are left of a mask: conditions and reads laid out as (B or 1, H or 1, Q or 1, K or 1)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.fx
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from sympy.logic.boolalg import And, Boolean, Not, Or

from ...codegen import symbols
from ...passes.view import value
from .rules import Builder
from .symbolic import Index, Interpreter, Unsupported, is_one, size_expr

Node = torch.fx.Node
aten = torch.ops.aten

BATCH, HEAD, Q, K = symbols.BATCH, symbols.HEAD, symbols.Q, symbols.K
AXES = (BATCH, HEAD, Q, K)


@dataclass(frozen=True)
class Geometry:
    """The scores' canonical shape (B, H, Q, K), as sizes, and what their bias has to look like."""

    sizes: tuple[Any, Any, Any, Any]
    dtype: torch.dtype
    device: torch.device

    @functools.cached_property
    def exprs(self) -> tuple[sympy.Expr, ...]:
        return tuple(size_expr(size) for size in self.sizes)

    @property
    def key(self) -> Any:
        return (self.exprs, self.dtype, self.device)


def _merged(geometry: Geometry) -> sympy.Expr | None:
    """The index of a dimension that holds batch and heads, as in (B * H, Q, K)."""
    return None if is_one(geometry.sizes[1]) else sympy.expand(BATCH * geometry.exprs[1] + HEAD)


def layout(index: Index, geometry: Geometry) -> list[int] | None:
    """Which axes a tensor read at ``index`` has, in its own order; None when it is read in any other way."""
    merged, axes = _merged(geometry), []
    for item in map(sympy.expand, index):
        if item == merged:
            axes += [0, 1]
        elif item in AXES:
            axes.append(AXES.index(item))
        elif not item.is_Integer or item < 0:
            return None
    return axes if len(set(axes)) == len(axes) else None


class Emitter:
    """Builds conditions and reads as four-dimensional tensors (B or 1, H or 1, Q or 1, K or 1)."""

    def __init__(
        self, builder: Builder, interpreter: Interpreter, geometry: Geometry, size: Callable[[int], Any]
    ) -> None:
        """size: the size of an axis (0 to 3) as an int or a node."""
        self.builder = builder
        self.interpreter = interpreter
        self.geometry = geometry
        self.size = size

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        return self.builder.call(target, *args, **kwargs)

    def condition(self, condition: Boolean | None, fallback: Callable[[Emitter], Node]) -> Node:
        if condition is not None:
            before = len(self.builder.inserted)
            try:
                return self.boolean(condition)
            except Unsupported:
                # Half of an expression may have been built: nothing uses it.
                for node in reversed(self.builder.inserted[before:]):
                    self.builder.view.erase(node)
                del self.builder.inserted[before:]
        return fallback(self)

    def boolean_of(self, node: Node) -> Node:
        return node if value(node).dtype is torch.bool else self.call(aten.ne.Scalar, node, 0)

    def boolean(self, condition: Boolean) -> Node:
        """A condition as a bool tensor. Raises :class:`Unsupported`."""
        if isinstance(condition, And | Or):
            op = aten.logical_and.default if isinstance(condition, And) else aten.logical_or.default
            parts = [self.boolean(part) for part in sorted(condition.args, key=str)]
            return functools.reduce(lambda a, b: self.call(op, a, b), parts)
        if isinstance(condition, Not):
            return self.call(aten.logical_not.default, self.boolean(condition.args[0]))
        if not isinstance(condition, Relational):
            raise Unsupported(str(condition))
        left, right = condition.lhs, condition.rhs
        if isinstance(left, AppliedUndef) and right == 0 and condition.rel_op in ("!=", "=="):
            node = self._function(left)
            if value(node).dtype is torch.bool:
                return node if condition.rel_op == "!=" else self.call(aten.logical_not.default, node)
            name = "ne" if condition.rel_op == "!=" else "eq"
            return self.call(getattr(aten, name).Scalar, node, 0)
        name = {"<": "lt", "<=": "le", ">": "gt", ">=": "ge", "==": "eq", "!=": "ne"}[condition.rel_op]
        if left.is_Integer:
            left, right = right, left
            name = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}.get(name, name)
        if right.is_Integer:
            return self.call(getattr(aten, name).Scalar, self.integer(left), int(right))
        return self.call(getattr(aten, name).Tensor, self.integer(left), self.integer(right))

    def integer(self, expression: sympy.Expr) -> Node:
        """An integer expression as an int64 tensor. Raises :class:`Unsupported`."""
        if expression in AXES:
            dim = AXES.index(expression)
            node = self.call(aten.arange.default, self.size(dim), device=self.geometry.device)
            return self._place(node, [dim])
        if isinstance(expression, AppliedUndef):
            node = self._function(expression)
            return node if value(node).dtype is torch.int64 else self.call(aten.to.dtype, node, torch.int64)
        if expression.is_Add or expression.is_Mul:
            op = aten.add if expression.is_Add else aten.mul
            number, rest = expression.as_coeff_Add() if expression.is_Add else expression.as_coeff_Mul()
            if not number.is_Integer:
                raise Unsupported(str(expression))
            terms = (rest.args if rest.func is expression.func else (rest,)) if rest != 1 else ()
            node = functools.reduce(lambda a, b: self.call(op.Tensor, a, b), map(self.integer, sorted(terms, key=str)))
            neutral = 0 if expression.is_Add else 1
            return node if number == neutral else self.call(op.Tensor, node, int(number))
        raise Unsupported(str(expression))

    def _function(self, element: AppliedUndef) -> Node:
        return self.read(self.interpreter.reads[element.func.__name__], element.args)

    def read(self, node: Node, index: Index) -> Node:
        """``node`` laid out as (B or 1, H or 1, Q or 1, K or 1), given its index. Raises :class:`Unsupported`."""
        if (placed := self._in_place(node, index)) is not None:
            return placed
        merged = _merged(self.geometry)
        axes = layout(index, self.geometry)
        if axes is None:
            raise Unsupported(f"{node.name} is read at {index}")
        result, dim = node, 0
        for item in map(sympy.expand, index):
            if item == merged:
                result = self.call(aten.unflatten.int, result, dim, [self.size(0), self.size(1)])
                dim += 2
            elif item.is_Integer:
                result = self.call(aten.select.int, result, dim, int(item))
            else:
                axis = AXES.index(item)
                if sympy.expand(size_expr(value(result).shape[dim]) - self.geometry.exprs[axis]) != 0:
                    result = self.call(aten.slice.Tensor, result, dim, 0, self.size(axis))
                dim += 1
        return self._place(result, axes)

    def _in_place(self, node: Node, index: Index) -> Node | None:
        """A tensor of four dimensions in the right order already: at most cut to the axes, or to size 1."""
        if len(index) != 4 or any(i != axis and not i.is_Integer for i, axis in zip(index, AXES, strict=True)):
            return None
        for dim, item in enumerate(index):
            size = size_expr(value(node).shape[dim])
            if item.is_Integer and size != 1:
                node = self.call(aten.slice.Tensor, node, dim, int(item), int(item) + 1)
            elif not item.is_Integer and sympy.expand(size - self.geometry.exprs[dim]) != 0:
                node = self.call(aten.slice.Tensor, node, dim, 0, self.size(dim))
        return node

    def _place(self, node: Node, axes: Sequence[int]) -> Node:
        """A tensor whose dims are these axes, with size 1 for the others. A tensor in place already is left alone."""
        order = sorted(range(len(axes)), key=axes.__getitem__)
        if order != list(range(len(axes))):
            node = self.call(aten.permute.default, node, order)
        for axis in range(4):
            if axis not in axes:
                node = self.call(aten.unsqueeze.default, node, axis)
        return node
