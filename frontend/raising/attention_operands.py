"""Queries, keys and values as (B, H, L, D): layouts, and transposes and repeated heads stripped from the operands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
import torch.fx

from ...passes.view import arguments, same_size, same_sizes, value
from .attention_products import Stopped
from .attention_scores import is_cast, is_noise
from .masks import AXES, Index, Masks
from .rules import Builder, Facts
from .symbolic import Unsupported, is_one, reshape_index, same_expr, size_expr

Node = torch.fx.Node
aten = torch.ops.aten

BATCH, HEAD, Q, K = AXES


class Layout:
    """How the scores' dims at one product, (batch dims..., Q, K), relate to the canonical (B, H, Q, K).

    shapes: of the scores, the product's own first, then after every reshape of the batch dims on the way to the
    softmax. Of these the one with two batch dims is canonical: ``(B * H, Q, K)`` viewed as ``(B, H, Q, K)``.
    ``kind``: ``none`` (Q, K); ``batch`` (B, Q, K); ``same`` (B, H, Q, K); ``split`` (B * H, Q, K); ``flat``
    (A, B, H, Q, K); ``grouped`` (B, Hk, G, Q, K).
    """

    def __init__(self, *shapes: Sequence[Any], canonical: Layout | None = None, grouped: bool = False) -> None:
        own = tuple(shapes[0])
        batch = own[:-2]
        self.shape = own
        if len(batch) > 3:
            raise Unsupported("more than three batch dims")
        if canonical is not None:
            if not same_sizes(own[-2:], canonical.sizes[2:]):
                raise Unsupported("the weights do not have the scores' lengths")
            self.sizes, self.rank = canonical.sizes, canonical.rank
            grouped = canonical.kind == "grouped"
        elif len(batch) == 3:
            first = (batch[0], _mul(batch[1], batch[2])) if grouped else (_mul(batch[0], batch[1]), batch[2])
            self.sizes, self.rank = (*first, *own[-2:]), 2
        else:
            best = max((s for s in shapes if len(s) <= 4), key=len)
            self.rank = len(best) - 2
            padded = (*best[:-2], 1, 1)[:2] if self.rank < 2 else tuple(best[:2])
            self.sizes = (*(padded if self.rank else (1, 1)), *best[-2:])
        self.kind = {0: "none", 1: "batch", 2: "same", 3: "grouped" if grouped else "flat"}[len(batch)]
        if self.rank == 2 and len(batch) == 1:
            self.kind = "split"
        if len(batch) < self.rank - 1 or (self.kind == "same" and not _same(batch, self.sizes[:2])):
            raise Unsupported("the scores' batch dims at the two products do not correspond")
        if not same_expr(_product(batch), _product(self.sizes[:2])):
            raise Unsupported("the scores' batch dims at the two products differ")

    def index(self, shape: Sequence[Any], node: Node | None = None) -> Index:
        """The index into scores of ``shape`` (one of the path's) of the canonical element at :data:`AXES`."""
        target = {0: (Q, K), 1: (BATCH, Q, K), 2: AXES}[self.rank]
        sizes = {0: self.sizes[2:], 1: (self.sizes[0], *self.sizes[2:]), 2: self.sizes}[self.rank]
        try:
            return reshape_index(shape, sizes, target)
        except Unsupported as error:
            raise Stopped(node, f"the scores are reshaped in a way that cannot be followed ({error})") from None

    def enter(self, builder: Builder, node: Node, keys: bool) -> Node:
        """An operand (batch dims..., L, D) as (B, H, L, D), size 1 where it broadcasts."""
        match self.kind:
            case "none":
                return builder.call(aten.unsqueeze.default, builder.call(aten.unsqueeze.default, node, 0), 0)
            case "batch":
                return builder.call(aten.unsqueeze.default, node, 1)
            case "split":
                if is_one(value(node).shape[0]):
                    return builder.call(aten.unsqueeze.default, node, 1)
                heads = self.sizes[1]
                parts = [-1, heads] if isinstance(heads, int) else [self.sizes[0], -1]
                return builder.call(aten.unflatten.int, node, 0, parts)
            case "grouped" if keys and is_one(value(node).shape[2]):
                return builder.call(aten.squeeze.dim, node, 2)
            case "grouped":
                return builder.call(aten.flatten.using_ints, node, 1, 2)
            case "flat":
                return builder.call(aten.flatten.using_ints, node, 0, 1)
        return node

    def restore(self, builder: Builder, result: Node) -> Node:
        """(B, H, Q, Dv) as (batch dims..., Q, Dv)."""
        match self.kind:
            case "none":
                return builder.call(aten.squeeze.dims, result, [0, 1])
            case "batch":
                return builder.call(aten.squeeze.dim, result, 1)
            case "split":
                return builder.call(aten.flatten.using_ints, result, 0, 1)
            case "grouped":
                return builder.call(aten.unflatten.int, result, 1, [-1, self.shape[2]])
            case "flat":
                return builder.call(aten.unflatten.int, result, 0, [-1, self.shape[1]])
        return result


def _mul(a: Any, b: Any) -> Any:
    return a * b if isinstance(a, int) and isinstance(b, int) else size_expr(a) * size_expr(b)


def _product(sizes: Sequence[Any]) -> sympy.Expr:
    return sympy.Mul(*map(size_expr, sizes))


def _same(left: Sequence[Any], right: Sequence[Any]) -> bool:
    return all(same_expr(size_expr(a), size_expr(b)) for a, b in zip(left, right, strict=True))


class Operand:
    """One operand: ``node`` with its dims in the order (batch dims..., L, D); None for a dim it does not have.

    :meth:`strip` replaces the node by an earlier one and keeps the account: permutations, repeated heads, a scale.
    """

    def __init__(self, node: Node, dims: Sequence[int | None], layout: Layout, product: Node | None = None) -> None:
        self.node = node
        self.dims = list(dims)
        self.layout = layout
        self.product = product or node
        self.factor = 1.0
        self.groups = 1
        self.split = layout.kind == "split"
        self.squeeze: int | None = None

    def fresh(self) -> Operand:
        return Operand(self.node, self.dims, self.layout, self.product)

    def strip(self, facts: Facts, *, scales: bool, repeats: bool, dtype: torch.dtype) -> None:
        """dtype: casts to a wider type are stripped when what was cast has this one."""
        steps: list[Callable[[], bool]] = [self._permute, self._noise(dtype), self._unsqueeze, self._merged]
        if scales:
            steps.append(lambda: self._scale(facts))
        if repeats:
            steps.append(self._repeated)
        # Behind a squeeze dims are counted differently: that is where it ends.
        placed: tuple[Any, ...] | None = None
        while True:
            account = (self.factor, self.groups, self.split)
            if self.dims == list(range(len(self.dims))):
                placed = (self.node, list(self.dims), account)
            if self.squeeze is not None or self.node.op != "call_function" or not any(step() for step in steps):
                break
        # A node of the graph that lies in the right order already is better than permuting an earlier one.
        if placed is not None and placed[2] == account and self.squeeze is None:
            self.node, self.dims = placed[:2]

    def _permute(self) -> bool:
        node, rank = self.node, value(self.node).dim() if isinstance(value(self.node), torch.Tensor) else 0
        swap = {
            aten.transpose.int: lambda: node.args[1:3],
            aten.swapaxes.default: lambda: node.args[1:3],
            aten.swapdims.default: lambda: node.args[1:3],
            aten.mT.default: lambda: (-2, -1),
            aten.adjoint.default: lambda: (-2, -1),
            aten.t.default: lambda: (0, 1),
        }.get(node.target)
        order = list(range(rank))
        if swap is not None and rank >= 2:
            a, b = (d % rank for d in swap())
            order[a], order[b] = order[b], order[a]
        elif node.target is aten.permute.default:
            order = [d % rank for d in node.args[1]]
        elif node.target is aten.numpy_T.default:
            order.reverse()
        else:
            return False
        self.dims = [None if d is None else order[d] for d in self.dims]
        self.node = node.args[0]
        return True

    def _noise(self, dtype: torch.dtype) -> Callable[[], bool]:
        def step() -> bool:
            if not is_noise(self.node):
                return False
            source = self.node.args[0]
            if is_cast(self.node) and value(source).dtype not in (value(self.node).dtype, dtype):
                return False
            if is_cast(self.node) and value(source).dtype.itemsize > value(self.node).dtype.itemsize:
                return False  # rounded on purpose
            self.node = source
            return True

        return step

    def _unsqueeze(self) -> bool:
        """A dim of size 1 that broadcasts is one the operand need not have; not below a pending merge of dims."""
        if self.node.target is not aten.unsqueeze.default or self.split:
            return False
        at = self.node.args[1] % value(self.node).dim()
        if at not in self.dims[:-2]:
            return False
        self.dims = [None if d is None or d == at else d - (d > at) for d in self.dims]
        self.node = self.node.args[0]
        return True

    def _merged(self) -> bool:
        """(B, H, L, D) reshaped to (B * H, L, D), where the canonical layout is the former."""
        node = self.node
        if not self.split or node.target not in (aten.view.default, aten.reshape.default, aten._unsafe_view.default,
                                                 aten.flatten.using_ints):  # fmt: skip
            return False
        old, new = value(node.args[0]).shape, value(node).shape
        at = self.dims[0]
        if len(old) != 4 or len(new) != 3 or at is None:
            return False
        if not (same_sizes(old[:at], new[:at]) and same_sizes(old[at + 2 :], new[at + 1 :])):
            return False
        if not _same(old[at : at + 2], self.layout.sizes[:2]):
            # Grouped keys are repeated to the queries' heads before the merge: the product of the sizes decides.
            return False
        self.dims = [at, at + 1, *(d if d is None or d < at else d + 1 for d in self.dims[1:])]
        self.node, self.split = node.args[0], False
        return True

    def _scale(self, facts: Facts) -> bool:
        """A number that multiplies or divides the whole operand."""
        name = self.node.target._schema.name if hasattr(self.node.target, "_schema") else ""
        if name not in ("aten::mul", "aten::div", "aten::multiply", "aten::divide", "aten::true_divide"):
            return False
        given = arguments(self.node)
        if given.get("rounding_mode") is not None:
            return False
        left, right = given["self"], given["other"]
        divides = "div" in name
        for source, number in [(left, right)] if divides else [(left, right), (right, left)]:
            factor = Masks.of(facts).number(number)
            if factor is None or not isinstance(source, Node) or (divides and factor == 0):
                continue
            old, new = value(source), value(self.node)
            if same_sizes(old.shape, new.shape) and old.dtype == new.dtype:
                self.factor = self.factor / factor if divides else self.factor * factor
                self.node = source
                return True
        return False

    def _head(self) -> int | None:
        """The dim of the node that holds the heads, once the layout is canonical."""
        if self.split or self.layout.kind not in ("same", "split"):
            return None
        return self.dims[1]

    def _repeated(self) -> bool:
        """Each key head repeated for its group: ``repeat_interleave``, or ``expand`` behind it and ``reshape``."""
        head, node = self._head(), self.node
        if head is None or self.groups != 1:
            return False
        if node.target is aten.repeat_interleave.self_int:
            given = arguments(node)
            count, dim = given["repeats"], given["dim"]
            if dim is None or dim % value(node).dim() != head or not isinstance(count, int) or count < 1:
                return False
            self.groups, self.node = count, given["self"]
            return True
        if node.target not in (aten.reshape.default, aten.view.default, aten._unsafe_view.default,
                               aten.flatten.using_ints):  # fmt: skip
            return False
        inner, new = node.args[0], value(node).shape
        while is_noise(inner) and not is_cast(inner):
            inner = inner.args[0]
        if inner.op != "call_function" or inner.target not in (aten.expand.default, aten.expand_as.default,
                                                               aten.broadcast_to.default):  # fmt: skip
            return False
        old, base = value(inner).shape, inner.args[0]
        count = old[head + 1] if len(old) == len(new) + 1 else None
        if not isinstance(count, int) or not same_sizes(old[:head], new[:head]):
            return False
        if not same_sizes(old[head + 2 :], new[head + 1 :]) or not same_expr(
            _product(old[head : head + 2]), size_expr(new[head])
        ):
            return False
        before = value(base).shape
        kept = [d for d in range(len(old)) if d != head + 1]
        if len(before) != len(old) or not is_one(before[head + 1]):
            return False
        if not same_sizes([before[d] for d in kept], [old[d] for d in kept]):
            return False
        while is_noise(base) and not is_cast(base):
            base = base.args[0]
        self.groups = count
        if base.target is aten.unsqueeze.default and base.args[1] % len(old) == head + 1:
            self.node = base.args[0]
        else:
            # The dim of size 1 comes from a view: it is squeezed when the operand is built.
            self.node, self.squeeze = base, head + 1
        return True

    @property
    def shape(self) -> list[Any]:
        """The operand's shape (batch dims..., L, D), 1 for dims it does not have."""
        sizes = list(value(self.node).shape)
        if self.squeeze is not None:
            del sizes[self.squeeze]
        return [1 if d is None else sizes[d] for d in self.dims]

    @property
    def canonical_shape(self) -> tuple[Any, ...]:
        """(B, H, L, D); 1 where it broadcasts."""
        *batch, length, width = self.shape
        if self.split:
            batch = [1, 1] if is_one(batch[0]) else list(self.layout.sizes[:2])
        elif len(batch) == 3 and self.layout.kind == "grouped":
            batch = [batch[0], _mul(batch[1], batch[2])]
        elif len(batch) == 3:
            batch = [_mul(batch[0], batch[1]), batch[2]]
        return (*([*batch, 1, 1][:2] if len(batch) < 2 else batch), length, width)

    def build(self, builder: Builder, dtype: torch.dtype, keys: bool) -> Node:
        node = self.node
        if self.squeeze is not None:
            node = builder.call(aten.squeeze.dim, node, self.squeeze)
        present = [d for d in self.dims if d is not None]
        if present != list(range(value(node).dim())):
            node = builder.call(aten.permute.default, node, present)
        for at, dim in enumerate(self.dims):
            if dim is None:
                node = builder.call(aten.unsqueeze.default, node, at)
        if self.split or self.layout.kind != "split":
            node = self.layout.enter(builder, node, keys)
        return node if value(node).dtype == dtype else builder.call(aten.to.dtype, node, dtype)


class Operands:
    """Queries, keys and values of one site.

    result: dtype of the site's output; scores: dtype of the product of queries and keys (None: the same).
    dtype: what the canonical op computes on.
    """

    def __init__(
        self,
        q: Operand,
        k: Operand,
        v: Operand,
        result: torch.dtype,
        facts: Facts,
        scores: torch.dtype | None = None,
    ) -> None:
        self.given = (q, k, v)
        self.q, self.k, self.v = q, k, v
        self.result, self.scores = result, scores or result
        self.facts = facts

    def strip(self, *, scales: bool) -> None:
        for repeats in (True, False):
            self.q, self.k, self.v = (operand.fresh() for operand in self.given)
            self.q.strip(self.facts, scales=scales, repeats=False, dtype=self.result)
            self.k.strip(self.facts, scales=scales, repeats=repeats, dtype=self.result)
            self.v.strip(self.facts, scales=False, repeats=repeats, dtype=self.result)
            if self.k.groups == self.v.groups:
                break
        dtypes = {value(operand.node).dtype for operand in (self.q, self.k, self.v)}
        if dtypes == {self.result}:
            self.dtype = self.result
        else:
            self.dtype = torch.promote_types(self.scores, self.result)

    @property
    def scale(self) -> float:
        return self.q.factor * self.k.factor

    @property
    def sizes(self) -> tuple[Any, Any, Any, Any]:
        return self.given[0].layout.sizes  # type: ignore[return-value]

    def check(self, mutated: set[Node]) -> None:
        """Raise :class:`Stopped` when the shapes do not provably fit, or an operand changes in place."""
        batch, heads, queries, keys = self.sizes
        for operand, length, name in ((self.q, queries, "queries"), (self.k, keys, "keys"), (self.v, keys, "values")):
            if operand.node in mutated or operand.product in mutated:
                raise Stopped(operand.node, f"the {name} change in place while others read them")
            b, h, size, _ = operand.canonical_shape
            # The product with the values contracts over keys, so their lengths are equal or the model itself fails:
            # Dynamo gives the two halves of a growing cache symbols of their own.
            implied = name == "values" and not (isinstance(size, int) and isinstance(length, int))
            if not (_same([b], [batch]) or is_one(b)) or not (implied or _same([size], [length])):
                raise Stopped(operand.product, f"the {name} have shape {tuple(operand.canonical_shape)}")
            grouped = isinstance(h, int) and isinstance(heads, int) and h and heads % h == 0
            if not (_same([h], [heads]) or is_one(h) or (grouped and name != "queries")):
                raise Stopped(operand.product, f"the {name} have {h} heads, the scores {heads}")
        key_heads, value_heads = self.k.canonical_shape[1], self.v.canonical_shape[1]
        if not _same([key_heads], [value_heads]) and not (is_one(key_heads) or is_one(value_heads)):
            raise Stopped(self.v.product, f"{key_heads} key heads and {value_heads} value heads")
        if not same_size(self.q.canonical_shape[3], self.k.canonical_shape[3]):
            raise Stopped(self.q.product, "queries and keys differ in width")

    def build(self, builder: Builder) -> dict[str, Any]:
        made = {
            name: operand.build(builder, self.dtype, name != "q")
            for name, operand in (("q", self.q), ("k", self.k), ("v", self.v))
        }
        # What broadcasts over batch or heads in a product is expanded: the op wants it spelled out.
        heads = [value(made["k"]).shape[1], value(made["v"]).shape[1]]
        for name, node in made.items():
            target = [-1, -1, -1, -1]
            if is_one(value(node).shape[0]) and not is_one(self.sizes[0]):
                target[0] = self._size(builder, made, 0)
            if name == "q" and is_one(value(node).shape[1]) and not is_one(self.sizes[1]):
                target[1] = self._size(builder, made, 1)
            elif name != "q" and is_one(value(node).shape[1]) and not all(map(is_one, heads)):
                target[1] = next(h for h in heads if not is_one(h))
            if target != [-1, -1, -1, -1]:
                made[name] = builder.call(aten.expand.default, node, target)
        return made

    def _size(self, builder: Builder, made: dict[str, Any], dim: int) -> Any:
        size = self.sizes[dim]
        if isinstance(size, int):
            return size
        full = next(node for node in made.values() if _same([value(node).shape[dim]], [size]))
        return builder.call(aten.sym_size.int, full, dim)


__all__ = ["AXES", "Layout", "Operand", "Operands", "Stopped"]
