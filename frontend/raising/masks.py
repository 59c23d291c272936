"""What the additions and fills between the scores and the softmax amount to: a mask text and a small bias.

Every modification is split in two. What only depends on positions becomes the ``mask`` text of the canonical op
(causal, windows, any boolean of ``q_idx``, ``k_idx`` and the lengths); what depends on data stays a tensor, as small as
can be proven to be enough: key padding needs (B, 1, 1, K), not (B, 1, Q, K).

**Rows that see no key.** Hiding a pair with ``-inf`` and adding a large finite number are two functions: in a row where
every key is hidden, the finite number cancels and the row still attends, while a masked row gives zeros. So a finite
fill becomes a mask only when every row provably sees a key; otherwise it stays the bias that it is.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
import torch.fx
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import And, Boolean, Not, Or, to_nnf

from ...codegen import symbols
from ...passes.view import arguments, value
from .masks_emit import AXES, HEAD, Emitter, Geometry, Q, layout
from .masks_proof import Ranges, is_learned
from .rules import Facts
from .symbolic import Cases, Index, Interpreter, Mutated, Opaque, Unsupported, broadcast_index, is_one, truth

Node = torch.fx.Node
aten = torch.ops.aten

HIDES = -1e9
"""An added number at or below this (or at its dtype's minimum) outweighs every score: the pair's weight is exactly 0
beside a visible key, as long as scores stay above half of it."""
REPLACES = -1e4
"""The same for scores that are replaced, not added to: their own size does not matter then."""


@dataclass(frozen=True)
class Change:
    """One step between the scaled scores and the softmax, from the inside out.

    kind: ``add``: scores + factor * node; ``fill``: scores become ``fill`` where ``node`` is true (``inverted``: where
        it is false); ``visible``: node says which pairs are visible.
    node, index: the tensor, and its index in terms of :data:`AXES`, one expression per dimension of the scores there.
    """

    kind: str
    node: Node
    index: Index
    factor: float = 1.0
    fill: float = -math.inf
    inverted: bool = False


_Fallback = Callable[[Emitter], Node]


def _hides(number: float, dtype: torch.dtype) -> bool:
    """Whether adding the number hides a pair beside a visible one."""
    return number <= HIDES or (dtype.is_floating_point and number <= torch.finfo(dtype).min)


class NotAMask(Exception):
    """The change has no form in ``tilewright::attention``; says why."""

    def __init__(self, node: Node, reason: str) -> None:
        super().__init__(reason)
        self.node = node


@dataclass
class MaskPlan:
    """The mask text and how to build the bias (None: there is none). ``notes`` say what was proven, or why not."""

    text: str = ""
    build: Callable[[Emitter], Node] | None = None
    notes: list[str] = field(default_factory=list)
    emitted: Node | None = None


_MEMO = "tilewright::attention masks"


class Masks:
    """Plans masks for one graph; sites that share their changes share the plan and the bias's nodes."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.interpreter = Interpreter(facts.view.graph, facts.number)
        self.plans: dict[Any, MaskPlan] = {}

    @classmethod
    def of(cls, facts: Facts) -> Masks:
        """The one of this graph."""
        if _MEMO not in facts.memo:
            facts.memo[_MEMO] = cls(facts)
        return facts.memo[_MEMO]

    def number(self, item: Any) -> float | None:
        """A Python number, or the value of a 0-dim tensor made of constants; None when it is only known at run time."""
        if not isinstance(item, Node) or not isinstance(value(item), torch.Tensor):
            return self.facts.number(item)
        # The interpreter rounds a constant to its tensor's dtype.
        if value(item).dim() != 0:
            return None
        try:
            element = self.interpreter.element(item, ())
        except Mutated:
            return None
        single = element.single if isinstance(element, Cases) else None
        if isinstance(single, sympy.Integer):
            return int(single)
        return single if isinstance(single, float) else None

    def plan(self, changes: Sequence[Change], geometry: Geometry) -> MaskPlan:
        """The plan for changes in order. Raises :class:`NotAMask`."""
        key = (tuple(changes), geometry.key)
        if key not in self.plans:
            self.plans[key] = _Planner(self.interpreter, geometry).plan(changes)
        return self.plans[key]


# ------------------------------------------------------------------------------------------------------- planning


@dataclass
class _Condition:
    """Which pairs one change leaves visible, split into conjuncts; ``fallback`` builds the whole of it as a tensor."""

    positional: list[Boolean]
    data: list[Boolean]
    fallback: _Fallback
    source: Opaque

    @property
    def all(self) -> Boolean:
        return And(*self.positional, *self.data)


class _Planner:
    def __init__(self, interpreter: Interpreter, geometry: Geometry) -> None:
        self.interpreter = interpreter
        self.geometry = geometry
        self.ranges = Ranges(geometry)
        self.hard: list[_Condition] = []
        self.soft: list[_Condition] = []
        self.notes: list[str] = []

    def plan(self, changes: Sequence[Change]) -> MaskPlan:
        # First what each change is, then what can be proven about all of them together.
        steps: list[tuple[Change, list[Any]]] = [(change, self._terms(change)) for change in changes]
        self.steps = steps
        tensors = [term for _, terms in steps for term in terms if isinstance(term, Opaque | _Constant)]
        proven = bool(self.soft) and self._every_row_sees(tensors)
        bias: list[Callable[[Emitter, Node | None], Node]] = []
        for change, terms in steps:
            bias += self._biases(change, terms, proven)
        hard = [*self.hard, *(self.soft if proven else [])]
        text, untold = self._text([p for condition in hard for p in condition.positional])
        # A position that has no text is data like any other.
        left = [(And(*c.data, *(p for p in c.positional if p in untold)), c) for c in hard]
        data = [(condition, c.fallback) for condition, c in left if condition != sympy.true]
        for condition, c in left:
            if condition != sympy.true:
                self._check_layout(c.source)
        written = any(change.kind != "visible" for change in changes)
        if written and data and not bias:
            self.notes.append("a query that sees no key gets zeros, as in SDPA, where a plain softmax gives NaN")
        if text:
            self.notes.append(f"positions proven: {text}")
        return MaskPlan(text, self._build(bias, data), self.notes)

    def _terms(self, change: Change) -> list[Any]:
        """What a change consists of: conditions (registered as hard or soft), constants and opaque tensors."""
        it, node = self.interpreter, change.node
        try:
            index = broadcast_index(value(node).shape, change.index)
            element = it.element(node, index)
        except Mutated:
            self.notes.append(f"{node.name} or what it is made of changes in place: it stays a tensor")
            index = broadcast_index(value(node).shape, change.index)
            element = it.read(node, index)
        if change.kind == "add":
            if not value(node).dtype.is_floating_point:
                raise NotAMask(node, f"a tensor of {value(node).dtype} is added to the scores")
            return self._addition(change, element, Opaque(node, index))
        if isinstance(element, Opaque):
            raise NotAMask(node, "a condition that is no boolean")
        visible = truth(element) if isinstance(element, Cases) else element
        if change.kind == "fill" and not change.inverted:
            visible = Not(visible)
        flip = change.kind == "fill" and not change.inverted

        def fallback(emit: Emitter) -> Node:
            shown = emit.read(node, self._shrink(index, visible))
            return emit.call(aten.logical_not.default, shown) if flip else emit.boolean_of(shown)

        condition = self._split(visible, fallback, Opaque(node, index))
        if change.kind == "visible" or change.fill == -math.inf:
            self.hard.append(condition)
            return [condition]
        if not change.fill <= REPLACES:
            raise NotAMask(node, f"scores are replaced by {change.fill:g}, which does not hide them")
        self.soft.append(condition)
        return [condition]

    def _addition(self, change: Change, element: Any, whole: Opaque, shown_by: _Fallback | None = None) -> list[Any]:
        """shown_by: builds where the element is 0, when its own node does not hold it."""
        if isinstance(element, Opaque):
            parts = self._parts(element) if change.factor == 1.0 else None
            if parts is None:
                # The tensor behind the views is smaller where they expand it.
                return [whole if layout(element.index, self.geometry) is None else element]
            return [term for part in parts for term in self._addition(change, *part)]
        dtype = value(whole.node).dtype
        scaled = [(v * change.factor if v else 0.0, c) for v, c in element.items]
        shown = Or(*(c for v, c in scaled if v == 0.0))
        others = [v for v, c in scaled if v != 0.0 and self.ranges.simplify(c) != sympy.false]
        if not others:
            self.notes.append(f"{whole.node.name} adds 0 everywhere")
            return []

        def compare(emit: Emitter) -> Node:
            return emit.call(aten.eq.Scalar, emit.read(whole.node, self._shrink(whole.index, shown)), 0)

        if all(v == -math.inf for v in others):
            condition = self._split(shown, shown_by or compare, whole)
            self.hard.append(condition)
            return [condition]
        if all(_hides(v / change.factor, dtype) and v < 0 for v in others):
            condition = self._split(shown, shown_by or compare, whole)
            self.soft.append(condition)
            return [_Added(condition, whole, element)]
        return [_Constant(whole, element, all(REPLACES < v < math.inf for v in others))]

    def _parts(self, element: Opaque) -> list[tuple[Any, ...]] | None:
        """A sum of a mask and a bias as two terms: ``bias + mask``, or ``where(visible, bias, -inf)``, as T5 adds."""
        node, given = element.node, arguments(element.node)
        try:
            if node.target is aten.add.Tensor and given["alpha"] == 1:
                found = [self._operand(operand, element.index) for operand in node.args[:2]]
                return found if any(not isinstance(part[0], Opaque) for part in found) else None
            if node.target in (aten.where.self, aten.where.ScalarOther):
                return self._selected(node, given["condition"], given["self"], given["other"], False, element.index)
            if node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
                return self._selected(node, given["mask"], given["self"], given["value"], True, element.index)
        except (Mutated, Unsupported):
            return None
        return None

    def _operand(self, operand: Any, index: Index) -> tuple[Any, Opaque]:
        if not isinstance(operand, Node) or not isinstance(value(operand), torch.Tensor):
            raise Unsupported("not a tensor")
        index = broadcast_index(value(operand).shape, index)
        return self.interpreter.element(operand, index), Opaque(operand, index)

    def _selected(
        self, node: Node, mask: Node, bias: Any, fill: Any, inverted: bool, index: Index
    ) -> list[tuple[Any, ...]] | None:
        number = self.interpreter.cases(fill, index).single
        if (
            not isinstance(number, float)
            or not _hides(number, value(node).dtype)
            or value(bias).dtype != value(node).dtype
        ):
            return None
        visible, source = self._operand(mask, index)
        if isinstance(visible, Opaque):
            return None
        shown = truth(visible) if isinstance(visible, Cases) else visible
        shown = Not(shown) if inverted else shown

        def build(emit: Emitter) -> Node:
            read = emit.boolean_of(emit.read(mask, self._shrink(source.index, shown)))
            return emit.call(aten.logical_not.default, read) if inverted else read

        mask_term = (Cases(((0.0, shown), (number, Not(shown)))), source, build)
        return [self._operand(bias, index), mask_term]

    def _split(self, visible: Boolean, fallback: _Fallback, source: Opaque) -> _Condition:
        simple = self.ranges.simplify(to_nnf(visible, simplify=False))
        if simple == sympy.false:
            return _Condition([], [simple], fallback, source)
        conjuncts = [] if simple == sympy.true else list(simple.args) if isinstance(simple, And) else [simple]
        conjuncts.sort(key=str)
        data = [c for c in conjuncts if c.atoms(AppliedUndef)]
        return _Condition([c for c in conjuncts if c not in data], data, fallback, source)

    def _shrink(self, index: Index, visible: Boolean) -> Index:
        """The index with 0 for the query and the head where the condition provably does not depend on them."""
        free = self.ranges.simplify(to_nnf(visible, simplify=False)).free_symbols
        zero = {axis: sympy.Integer(0) for axis in (HEAD, Q) if axis not in free}
        return tuple(i.xreplace(zero) for i in index)

    # What is provable.

    def _every_row_sees(self, tensors: Sequence[Any]) -> bool:
        """Whether each query provably sees a key, whatever the data: then a finite fill is a mask."""
        conditions = [*self.hard, *self.soft]
        if any(condition.data for condition in conditions):
            self.notes.append("the fill is finite and depends on data: a row may see no key, so it stays a bias")
            return False
        for term in tensors:
            source = term.source if isinstance(term, _Constant) else term
            if not (term.finite if isinstance(term, _Constant) else is_learned(source.node)):
                self.notes.append(f"{source.node.name} is added too and may hide keys, so the finite fill stays a bias")
                return False
        visible = And(*(p for condition in conditions for p in condition.positional))
        if (witness := self.ranges.seen_key(visible)) is not None:
            self.notes.append(f"every query sees key {witness}: the finite fill hides exactly what -inf would")
            return True
        self.notes.append("no key is provably visible to every query, so the finite fill stays a bias")
        return False

    def _text(self, conjuncts: Sequence[Boolean]) -> tuple[str, list[Boolean]]:
        """The mask text of positional conjuncts, and those that cannot be told in the mask's symbols."""
        names = self._length_names()
        told, untold = [], []
        for conjunct in conjuncts:
            renamed = conjunct.xreplace(names)
            try:
                if renamed.free_symbols - set(symbols.SYMBOLS.values()):
                    raise symbols.SpecError("a length that is neither the queries' nor the keys'")
                symbols.mask_text(renamed)
                told.append(renamed)
            except symbols.SpecError as error:
                self.notes.append(f"{conjunct} stays a tensor: {error}")
                untold.append(conjunct)
        return symbols.mask_text(And(*told)), untold

    def _length_names(self) -> dict[sympy.Expr, sympy.Expr]:
        """Size symbols of the graph in terms of ``q_len`` and ``k_len``, where two equations determine them."""
        names: dict[sympy.Expr, sympy.Expr] = {}
        for length, name in ((self.geometry.exprs[2], symbols.Q_LEN), (self.geometry.exprs[3], symbols.K_LEN)):
            unknown = sorted(length.free_symbols - set(names), key=str)
            for symbol in unknown:
                slope = length.coeff(symbol, 1)
                rest = sympy.expand(length - slope * symbol)
                if abs(slope) == 1 and not rest.free_symbols - set(names):
                    names[symbol] = sympy.expand((name - rest.xreplace(names)) / slope)
                    break
        return names

    # The bias that remains.

    def _biases(
        self, change: Change, terms: Sequence[Any], proven: bool
    ) -> list[Callable[[Emitter, Node | None], Node]]:
        steps: list[Callable[[Emitter, Node | None], Node]] = []
        if change.kind == "add":
            kept = [t for t in terms if not isinstance(t, _Condition) and not (proven and isinstance(t, _Added))]
            if len(kept) == len(terms) > 1:
                # Nothing was taken out of the sum: it is already there.
                kept = [Opaque(change.node, broadcast_index(value(change.node).shape, change.index))]
            for term in kept:
                self._check_layout(term if isinstance(term, Opaque) else term.source)
                steps.append(functools.partial(self._add, term, change.factor))
        elif any(terms[0] is condition for condition in self.soft) and not proven:
            steps.append(self._kept_fill(change, terms[0]))
        return steps

    def _kept_fill(self, change: Change, condition: _Condition) -> Callable[[Emitter, Node | None], Node]:
        # scores + finfo.min is finfo.min, whatever the score: a row that sees no key weighs all of them alike, as it
        # does when all its scores are replaced by one number.
        if self.geometry.dtype not in (torch.float32, torch.bfloat16, torch.float64):
            raise NotAMask(
                change.node,
                f"a row that sees no key attends to all keys alike, which no bias in {self.geometry.dtype} does",
            )
        if (reason := self._not_alone(change)) is not None:
            raise NotAMask(change.node, f"scores are replaced by {change.fill:g}, which may show: {reason}")
        self._check_layout(condition.source)
        self.notes.append(f"scores replaced by {change.fill:g} are kept as a bias at the dtype's minimum")
        return functools.partial(self._fill, condition)

    def _not_alone(self, fill: Change) -> str | None:
        """Why a row that sees no key may tell this fill from what else hides keys; None when it cannot.

        Only fills by the same number may hide keys too, and nothing but ``-inf`` may come after them.
        """
        seen = False
        for change, terms in self.steps:
            seen = seen or change is fill
            if change.kind == "fill" and change.fill == fill.fill:
                continue
            if seen and not (change.kind == "fill" and change.fill == -math.inf):
                return "the scores are changed again before the softmax"
            for term in terms:
                finite = term.finite if isinstance(term, _Constant) else False
                if isinstance(term, Opaque):
                    finite = is_learned(term.node)
                if not seen and not finite:
                    return f"{change.node.name} may hide keys as well"
        return None

    def _check_layout(self, source: Opaque) -> None:
        if layout(source.index, self.geometry) is None:
            raise NotAMask(source.node, "its layout has no form that broadcasts against (B, H, Q, K)")

    def _add(self, term: Any, factor: float, emit: Emitter, bias: Node | None) -> Node:
        source: Opaque = term if isinstance(term, Opaque) else term.source
        dtype = value(source.node).dtype
        node = None
        if not isinstance(term, Opaque):
            free = set().union(*(self.ranges.simplify(c).free_symbols for _, c in term.cases.items))
            if Q not in free and not is_one(self.geometry.sizes[2]):
                node = self._rebuilt(term.cases, dtype, emit)
                self.notes.append(f"{source.node.name} does not depend on the query")
                if node is None:
                    index = tuple(i.xreplace({Q: sympy.Integer(0)}) for i in source.index)
                    node = emit.read(source.node, index)
        if node is None:
            node = emit.read(source.node, source.index)
        if factor != 1.0:
            node = emit.call(aten.mul.Tensor, node, factor)
        return node if bias is None else emit.call(aten.add.Tensor, bias, node)

    def _rebuilt(self, cases: Cases, dtype: torch.dtype, emit: Emitter) -> Node | None:
        """A tensor with these cases, built from the data alone; None when their conditions cannot be built."""
        if not dtype.is_floating_point:
            return None
        first, *others = sorted(cases.items, key=lambda item: -item[0])
        node: Node | None = None
        try:
            for number, condition in others:
                shown = emit.boolean(Not(self.ranges.simplify(condition)))
                if node is None:
                    node = emit.call(aten.full.default, [], first[0], dtype=dtype, device=self.geometry.device)
                node = emit.call(aten.where.ScalarOther, shown, node, number)
        except Unsupported:
            return None
        return node

    def _fill(self, condition: _Condition, emit: Emitter, bias: Node | None) -> Node:
        dtype = self.geometry.dtype
        shown = emit.condition(condition.all, condition.fallback)
        if bias is None:
            bias = emit.call(aten.full.default, [], 0.0, dtype=dtype, device=self.geometry.device)
        elif (wide := torch.promote_types(value(bias).dtype, dtype)) != value(bias).dtype:
            bias = emit.call(aten.to.dtype, bias, wide)  # a narrower bias could not hold the minimum
        return emit.call(aten.where.ScalarOther, shown, bias, torch.finfo(dtype).min)

    def _build(
        self,
        steps: Sequence[Callable[[Emitter, Node | None], Node]],
        data: Sequence[tuple[Boolean, Callable[[Emitter], Node]]],
    ) -> Callable[[Emitter], Node] | None:
        if not steps and not data:
            return None

        def build(emit: Emitter) -> Node:
            bias: Node | None = None
            for step in steps:
                bias = step(emit, bias)
            shown: Node | None = None
            for condition, fallback in data:
                each = emit.condition(condition, fallback)
                shown = each if shown is None else emit.call(aten.logical_and.default, shown, each)
            if shown is None or bias is None:
                result = shown if bias is None else bias
                assert result is not None
                return result
            return emit.call(aten.where.ScalarOther, shown, bias, -math.inf)

        return build


@dataclass(frozen=True)
class _Constant:
    """An added tensor whose values are known and are no mask, such as a penalty of -5. finite: none of them hides."""

    source: Opaque
    cases: Cases
    finite: bool


@dataclass
class _Added:
    """A finite fill that is added."""

    condition: _Condition
    source: Opaque
    cases: Cases


def with_notes(plan: MaskPlan) -> dict[str, Any]:
    """The plan as facts for the report, without the interpreter's own names."""
    notes = [re.sub(r"\bread_", "", note) for note in dict.fromkeys(plan.notes)]
    return {"mask": plan.text, "notes": notes} if notes else {}


__all__ = ["AXES", "Change", "Emitter", "Geometry", "MaskPlan", "Masks", "NotAMask", "with_notes"]
