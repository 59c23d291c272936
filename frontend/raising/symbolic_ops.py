"""How each operator that masks are built from acts on one element: the rules of :mod:`.symbolic`."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import sympy
import torch
import torch.fx
from sympy.logic.boolalg import Boolean

from ...passes.view import arguments, value
from .symbolic_values import (
    MAX_CASES,
    Cases,
    Element,
    Index,
    Opaque,
    Unsupported,
    bool_cases,
    broadcast_index,
    fresh,
    is_number,
    is_one,
    make_cases,
    python_number,
    remainder,
    reshape_index,
    size_expr,
)

if TYPE_CHECKING:
    from .symbolic import Interpreter

Node = torch.fx.Node
aten = torch.ops.aten

# Rules: target -> function(interpreter, node, index) -> element.

Rule = Callable[["Interpreter", Node, Index], Element]
RULES: dict[Any, Rule] = {}


def _rule(*targets: Any) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for target in targets:
            RULES[target] = function
        return function

    return register


def _shape(node: Node) -> Sequence[Any]:
    known = value(node)
    if not isinstance(known, torch.Tensor):
        raise Unsupported("not a tensor")
    return known.shape


@_rule(aten.alias.default, aten.contiguous.default, aten.clone.default, aten.detach.default,
    aten.detach_.default, aten.lift_fresh.default,
       aten.lift_fresh_copy.default, aten.dropout.default)  # fmt: skip
def _same(it: Interpreter, node: Node, index: Index) -> Element:
    if node.target is aten.dropout.default and (node.args[2] or len(node.args) < 3):
        raise Unsupported("active dropout")
    return it.element(node.args[0], index)


@_rule(aten.unsqueeze.default)
def _unsqueeze(it: Interpreter, node: Node, index: Index) -> Element:
    dim = node.args[1] % len(index)
    return it.element(node.args[0], index[:dim] + index[dim + 1 :])


@_rule(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.view.default, aten.reshape.default,
       aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int, aten.view_as.default,
       aten.reshape_as.default)  # fmt: skip
def _reshape(it: Interpreter, node: Node, index: Index) -> Element:
    return it.element(node.args[0], reshape_index(_shape(node.args[0]), _shape(node), index))


@_rule(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
def _expand(it: Interpreter, node: Node, index: Index) -> Element:
    return it.element(node.args[0], broadcast_index(_shape(node.args[0]), index))


@_rule(aten.transpose.int)
def _transpose(it: Interpreter, node: Node, index: Index) -> Element:
    a, b = (d % len(index) for d in node.args[1:3])
    swapped = list(index)
    swapped[a], swapped[b] = swapped[b], swapped[a]
    return it.element(node.args[0], swapped)


@_rule(aten.t.default, aten.numpy_T.default, aten.mT.default)
def _t(it: Interpreter, node: Node, index: Index) -> Element:
    if node.target is aten.mT.default:
        return it.element(node.args[0], (*index[:-2], index[-1], index[-2]))
    return it.element(node.args[0], index[::-1])


@_rule(aten.permute.default)
def _permute(it: Interpreter, node: Node, index: Index) -> Element:
    source = [sympy.Integer(0)] * len(index)
    for position, dim in enumerate(node.args[1]):
        source[dim % len(index)] = index[position]
    return it.element(node.args[0], source)


@_rule(aten.slice.Tensor)
def _slice(it: Interpreter, node: Node, index: Index) -> Element:
    given = arguments(node)
    source = given["self"]
    dim, step = given["dim"] % len(index), given["step"]
    start = it.scalar(0 if given["start"] is None else given["start"])
    size = size_expr(_shape(source)[dim])
    if start.is_negative:
        start = start + size
        # torch clamps: a start before the beginning is the beginning.
        if start.is_negative:
            start = sympy.Integer(0)
    if not start.is_nonnegative:
        raise Unsupported("the slice's start may be clamped")
    moved = list(index)
    moved[dim] = start + it.scalar(step) * index[dim]
    return it.element(source, moved)


@_rule(aten.select.int)
def _select(it: Interpreter, node: Node, index: Index) -> Element:
    source, dim, position = node.args
    dim = dim % (len(index) + 1)
    at = it.scalar(position)
    if at.is_negative:
        at = at + size_expr(_shape(source)[dim])
    if not at.is_nonnegative:
        raise Unsupported("the position's sign is unknown")
    return it.element(source, (*index[:dim], at, *index[dim:]))


@_rule(aten.index.Tensor)
def _index(it: Interpreter, node: Node, index: Index) -> Element:
    """Advanced indexing by integer tensors, as in ``attention_mask[batch_idx, kv_idx]``."""
    source, indices = node.args
    indices = [*indices, *[None] * (len(_shape(source)) - len(indices))]
    used = [d for d, i in enumerate(indices) if i is not None]
    if any(value(indices[d]).dtype in (torch.bool, torch.uint8) for d in used):
        raise Unsupported("indexing by a mask")
    rank = max(value(indices[d]).dim() for d in used)
    # The broadcast dims of the index tensors come where the first index is, or in front when they are not adjacent.
    adjacent = used == list(range(used[0], used[-1] + 1))
    front = used[0] if adjacent else 0
    common, others = index[front : front + rank], iter(index[:front] + index[front + rank :])
    at: list[sympy.Expr] = []
    for d, item in enumerate(indices):
        if item is None:
            at.append(next(others))
            continue
        position = it.cases(item, common).single
        if position is None or position.is_nonnegative is not True:
            raise Unsupported("an index that may be negative or has cases")
        at.append(sympy.Integer(0) if is_one(_shape(source)[d]) else position)
    return it.element(source, at)


@_rule(aten.arange.default, aten.arange.start, aten.arange.start_step)
def _arange(it: Interpreter, node: Node, index: Index) -> Element:
    given = arguments(node)
    if value(node).dtype not in (torch.int64, torch.int32):
        raise Unsupported("not an integer range")
    start, step = it.scalar(given.get("start", 0)), it.scalar(given.get("step", 1))
    return Cases(((start + step * index[0], sympy.true),))


@_rule(aten.full.default, aten.full_like.default, aten.new_full.default, aten.scalar_tensor.default)
def _full(it: Interpreter, node: Node, index: Index) -> Element:
    given = arguments(node)
    fill = given.get("fill_value", given.get("s"))
    if (number := it.number(fill)) is None and not isinstance(fill, bool):
        raise Unsupported("the fill is not known")
    return it.constant(fill if number is None else number, value(node).dtype)


@_rule(aten.ones.default, aten.ones_like.default, aten.new_ones.default)
def _ones(it: Interpreter, node: Node, index: Index) -> Element:
    return it.constant(1, value(node).dtype)


@_rule(aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
def _zeros(it: Interpreter, node: Node, index: Index) -> Element:
    return it.constant(0, value(node).dtype)


@_rule(aten.tril.default, aten.triu.default, aten.tril_.default, aten.triu_.default)
def _triangle(it: Interpreter, node: Node, index: Index) -> Element:
    given = arguments(node)
    row, column, diagonal = index[-2], index[-1], it.scalar(given["diagonal"])
    lower = node.target in (aten.tril.default, aten.tril_.default)
    kept = sympy.Le(column, row + diagonal) if lower else sympy.Ge(column, row + diagonal)
    inside = it.element(given["self"], index)
    if isinstance(inside, Opaque):
        raise Unsupported("data")
    if not isinstance(inside, Cases):
        return sympy.And(kept, inside)
    zero = 0.0 if value(node).dtype.is_floating_point else sympy.Integer(0)
    return _select_element(kept, inside, Cases(((zero, sympy.true),)))


@_rule(aten.cumsum.default)
def _cumsum(it: Interpreter, node: Node, index: Index) -> Element:
    """The sum of a constant ``c`` is ``c * (i + 1)``; any other sum is data."""
    given = arguments(node)
    dim = given["dim"] % len(index)
    each = it.cases(given["self"], (*index[:dim], fresh("i"), *index[dim + 1 :])).single
    if each is None or not is_number(each) or isinstance(each, float) or value(node).dtype != torch.int64:
        raise Unsupported("the sum is not of a constant")
    return Cases(((int(each) * (index[dim] + 1), sympy.true),))


@_rule(aten.diff.default)
def _diff(it: Interpreter, node: Node, index: Index) -> Element:
    given = arguments(node)
    source, before = given["self"], given["prepend"]
    if given["n"] != 1 or given["append"] is not None or value(node).dtype != torch.int64:
        raise Unsupported("not a first difference of integers")
    dim = given["dim"] % len(index)

    def at(tensor: Node, position: sympy.Expr) -> sympy.Expr:
        item = it.cases(tensor, (*index[:dim], position, *index[dim + 1 :])).single
        if item is None or isinstance(item, bool):
            raise Unsupported("cases")
        return item

    i = index[dim]
    if before is None:
        return Cases(((sympy.expand(at(source, i + 1) - at(source, i)), sympy.true),))
    if not is_one(_shape(before)[dim]):
        raise Unsupported("prepends more than one")
    j = fresh("j")
    first = sympy.expand(at(source, sympy.Integer(0)) - at(before, sympy.Integer(0)))
    # i - 1 is a position for i >= 1 only, where j = i - 1 is not negative.
    later = sympy.expand(at(source, j + 1) - at(source, j)).xreplace({j: i - 1})
    return make_cases([(first, sympy.Eq(i, 0)), (later, sympy.Ne(i, 0))])


def _select_element(condition: Boolean, yes: Element, no: Element) -> Element:
    """``where(condition, yes, no)`` of elements of one dtype."""
    if condition == sympy.true:
        return yes
    if condition == sympy.false:
        return no
    if isinstance(yes, Opaque) or isinstance(no, Opaque):
        raise Unsupported("data")
    if not isinstance(yes, Cases) or not isinstance(no, Cases):
        if isinstance(yes, Cases) or isinstance(no, Cases):
            raise Unsupported("mixed")
        return sympy.Or(sympy.And(condition, yes), sympy.And(sympy.Not(condition), no))
    items = [(item, sympy.And(condition, c)) for item, c in yes.items]
    items += [(item, sympy.And(sympy.Not(condition), c)) for item, c in no.items]
    return make_cases(items)


@_rule(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def _where(it: Interpreter, node: Node, index: Index) -> Element:
    given = arguments(node)
    dtype = value(node).dtype
    condition = it.condition(given["condition"], index)
    yes = _in_dtype(it, given["self"], index, dtype) if condition != sympy.false else sympy.false
    no = _in_dtype(it, given["other"], index, dtype) if condition != sympy.true else sympy.false
    return _select_element(condition, yes, no)


@_rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.masked_fill_.Scalar, aten.masked_fill_.Tensor)
def _masked_fill(it: Interpreter, node: Node, index: Index) -> Element:
    given = arguments(node)
    dtype = value(node).dtype
    condition = it.condition(given["mask"], index)
    yes = _in_dtype(it, given["value"], index, dtype) if condition != sympy.false else sympy.false
    no = _in_dtype(it, given["self"], index, dtype) if condition != sympy.true else sympy.false
    return _select_element(condition, yes, no)


def _in_dtype(it: Interpreter, item: Any, index: Index, dtype: torch.dtype) -> Element:
    """An operand cast to ``dtype``."""
    element = it.operand(item, index)
    source = value(item).dtype if isinstance(value(item), torch.Tensor) else None
    if source == dtype:
        return element
    if dtype is torch.bool:
        return it.condition(item, index)
    if isinstance(element, Opaque):
        raise Unsupported("a cast of data")
    cases = element if isinstance(element, Cases) else bool_cases(element)
    return make_cases([(_cast(item, dtype), condition) for item, condition in cases.items])


def _cast(item: Any, dtype: torch.dtype) -> Any:
    if is_number(item):
        cast = torch.tensor(python_number(item)).to(dtype).item()
        return sympy.Integer(cast) if isinstance(cast, int) else cast
    if dtype in (torch.int64, torch.int32):
        return item
    raise Unsupported(f"a cast of an unknown integer to {dtype}")


@_rule(aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten._to_copy.default, aten.type_as.default)
def _to(it: Interpreter, node: Node, index: Index) -> Element:
    return _in_dtype(it, node.args[0], index, value(node).dtype)


def _compare(name: str, left: sympy.Expr, right: sympy.Expr) -> Boolean:
    """A comparison; ``|x| <= c`` and those of Max and Min are taken apart into plain ones."""
    difference = left - right
    bends = [e for e in difference.atoms(sympy.Abs, sympy.Max, sympy.Min) if difference.coeff(e) in (1, -1)]
    if not bends:
        return _RELATIONS[name](left, right)
    if name == "eq":
        return sympy.And(_compare("le", left, right), _compare("ge", left, right))
    if name == "ne":
        return sympy.Not(_compare("eq", left, right))
    bend = bends[0]
    values = (bend.args[0], -bend.args[0]) if isinstance(bend, sympy.Abs) else bend.args
    largest = isinstance(bend, sympy.Max | sympy.Abs)
    # The largest is below c when all are; the smallest when one is.
    below = (name in ("lt", "le")) == (difference.coeff(bend) == 1)
    join = sympy.And if largest == below else sympy.Or
    return join(*(_compare(name, difference.xreplace({bend: v}), sympy.Integer(0)) for v in values))


def _floor_divide(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    if not b.is_positive:
        raise Unsupported("division by what may be zero or negative")
    return sympy.floor(a / b)


def _remainder(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    if not b.is_positive:
        raise Unsupported("division by what may be zero or negative")
    return remainder(a, b)


_RELATIONS: dict[str, Callable[[sympy.Expr, sympy.Expr], Boolean]] = {
    "lt": sympy.Lt, "le": sympy.Le, "gt": sympy.Gt, "ge": sympy.Ge, "eq": sympy.Eq, "ne": sympy.Ne,
}  # fmt: skip
_ARITHMETIC: dict[str, Callable[..., sympy.Expr]] = {
    "add": operator.add,
    "sub": operator.sub,
    "rsub": lambda a, b: b - a,
    "mul": operator.mul,
    "neg": operator.neg,
    "abs": sympy.Abs,
    "maximum": sympy.Max,
    "minimum": sympy.Min,
    "floor_divide": _floor_divide,
    "remainder": _remainder,
}
# Computed by torch itself when every operand is a known number.
_CONCRETE = ("div", "sqrt", "rsqrt", "log", "exp", "relu", "clamp", "bitwise_not", "bitwise_and",
             "bitwise_or", "bitwise_xor", "logical_not", "logical_and", "logical_or", "logical_xor", "__and__",
             "__or__", "__xor__", "sign", "pow", "reciprocal", "nan_to_num", "clamp_min", "clamp_max")  # fmt: skip


def _pointwise(it: Interpreter, node: Node, index: Index) -> Element:
    """Evaluate a pointwise op case by case: by torch where all operands are numbers, else as integer expressions."""
    given = arguments(node)
    name = node.target._schema.name.split("::")[1].rstrip("_") if not node.target._opname.startswith("__") else (
        node.target._opname
    )  # fmt: skip
    names = [a.name for a in node.target._schema.arguments]
    tensors = [n for n in names if isinstance(value(given.get(n)), torch.Tensor) or n in ("self", "other")]
    tensors = [n for n in tensors if n in given]
    operands = [it.cases(given[n], index).items for n in tensors]
    dtype = value(node).dtype
    results: list[tuple[Any, Boolean]] = []
    if math.prod(map(len, operands)) > MAX_CASES**2:
        raise Unsupported("too many cases")
    for combination in itertools.product(*operands):
        condition = sympy.And(*(c for _, c in combination))
        if condition == sympy.false:
            continue
        items = [item for item, _ in combination]
        if all(map(is_number, items)):
            results.append((_compute(node, given, tensors, items), condition))
        else:
            results.append((_express(name, given, tensors, items, dtype), condition))
    if dtype is torch.bool:
        return sympy.Or(*(sympy.And(c, item if isinstance(item, Boolean) else bool(item)) for item, c in results))
    return make_cases(results)


def _compute(node: Node, given: dict[str, Any], tensors: Sequence[str], items: Sequence[Any]) -> Any:
    """The op on numbers, in the operands' dtypes and with their ranks, which decide how torch promotes."""
    arguments_ = dict(given)
    for name, item in zip(tensors, items, strict=True):
        known = value(given[name])
        if isinstance(known, torch.Tensor):
            shape = [1] if known.dim() else []
            arguments_[name] = torch.full(shape, python_number(item), dtype=known.dtype)
        else:
            arguments_[name] = python_number(item)
    if any(isinstance(a, Node) for a in arguments_.values()):
        raise Unsupported("an argument is not a number")
    positional = {a.name: arguments_[a.name] for a in node.target._schema.arguments if a.name in arguments_}
    result = node.target(**positional)
    if result.dtype != value(node).dtype:
        raise Unsupported("promotion")
    number = result.reshape(()).item()
    return sympy.Integer(number) if type(number) is int else number


def _express(name: str, given: dict[str, Any], tensors: Sequence[str], items: Sequence[Any], dtype: torch.dtype) -> Any:
    """The op on integer expressions."""
    for operand in tensors:
        known = value(given[operand])
        if isinstance(known, torch.Tensor) and known.dtype not in (torch.int64, torch.int32, torch.bool):
            raise Unsupported("integers that may wrap")
    if any(isinstance(item, float) for item in items):
        raise Unsupported("an integer against a float")
    items = [sympy.Integer(int(item)) if isinstance(item, bool) else item for item in items]
    if name in _RELATIONS:
        return _compare(name, *items)
    if name == "div" and given.get("rounding_mode") == "floor":
        return _floor_divide(*items)
    if name == "logical_not":
        return sympy.Eq(items[0], 0)
    if name not in _ARITHMETIC or dtype not in (torch.int64, torch.int32) or given.get("alpha", 1) != 1:
        raise Unsupported(name)
    return sympy.expand(_ARITHMETIC[name](*items))


def _logical(function: Callable[..., Boolean], names: Sequence[str]) -> Rule:
    def rule(it: Interpreter, node: Node, index: Index) -> Element:
        given = arguments(node)
        if value(node).dtype is not torch.bool:
            return _pointwise(it, node, index)
        return function(*(it.condition(given[name], index) for name in names))

    return rule


def _overloads(names: Sequence[str]) -> list[Any]:
    found = []
    for name in names:
        for spelled in (name, name + "_"):
            packet = getattr(aten, spelled, None)
            if packet is not None:
                found += [getattr(packet, o) for o in packet.overloads() if not o.endswith("out")]
    return found


for _target in _overloads([*_RELATIONS, *_ARITHMETIC, *_CONCRETE]):
    RULES.setdefault(_target, _pointwise)
for _name, _function in {"and": sympy.And, "or": sympy.Or, "xor": sympy.Xor}.items():
    for _target in _overloads([f"__{_name}__", f"bitwise_{_name}", f"logical_{_name}"]):
        RULES[_target] = _logical(_function, ("self", "other"))
for _target in _overloads(["bitwise_not", "logical_not"]):
    RULES[_target] = _logical(sympy.Not, ("self",))
