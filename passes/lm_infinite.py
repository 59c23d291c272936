"""LM-Infinite: a window, the first tokens, and a limit on distance, for models with rotary positions."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx

from ..codegen import mask_logic, symbols
from ..runtime.errors import BadPassOption
from ..runtime.ops import OPS
from .base import Builder, Decline, Exactness, NearMiss, Pass, Rewrite, SiteContext
from .selectors.base import Emit
from .view import arguments, is_cast, is_identity, peel, same_size, value

Node = torch.fx.Node
aten = torch.ops.aten
ROPE = OPS["rope"].overload


@dataclass(frozen=True)
class LMInfinite(Pass):
    """Let each query see the last ``window`` keys and the first ``sinks``, none further away than ``limit``.

    ::

        q at position p, k at position j <= p:   visible if p - j < window or j < sinks
        score = q . R(min(p - j, limit)) k       R: the rotation of the rotary embedding by a distance

    Source: Han, Wang, Peng, Xiong, Chen, Ji, Wang, "LM-Infinite: Zero-Shot Extreme Length Generalization for Large
    Language Models" (NAACL 2024, arXiv:2308.16137), section 4, and the authors' code (Glaciohound/LM-Infinite). There
    window and limit are both the length that the model was trained on, and sinks are 10 to 100. What the paper adds for
    retrieval tasks, the middle tokens of highest score in deep layers, is left out.

    Two attentions, joined by their log-sum-exps, so that kernels stay as they are: one over the pairs within the limit,
    with queries and keys as the model rotates them, and one over the pairs beyond it, with all queries rotated as at
    position ``limit`` and all keys as at 0. When the window lies within the limit, the second one has ``sinks`` keys.
    The rows of the model's own angles ``limit`` and 0 stand for these rotations; so positions must count up by one from
    row to row, as they do unless the model is given others. The report says where they are an input.

    Quality: within the window it is the model as it was; beyond, distant tokens are dropped, and text longer than the
    model was trained on stays readable. No cached decoding: a cache holds keys that are rotated already.

    window: keys, the query's own among them. sinks: first keys of the sequence, at most ``limit``. limit: in tokens;
        the window by default.
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    ops: ClassVar[tuple[str, ...]] = ("attention",)
    after: ClassVar[frozenset[str]] = frozenset({"sigmoid-attention"})

    window: int = 2048
    sinks: int = 16
    limit: int | None = None

    @classmethod
    def cli_name(cls) -> str:
        return "lm-infinite"

    def __post_init__(self) -> None:
        for option in ("window", "sinks", "limit"):
            number = getattr(self, option)
            if number is None and option == "limit":
                continue
            if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= symbols.MAX_LITERAL:
                raise BadPassOption(f"{self.name}: {option} is {number!r}, but must be a whole number from 1")
        if self.sinks > self._limit:
            raise BadPassOption(
                f"{self.name}: sinks is {self.sinks}, but must lie within the limit on distance, {self._limit}"
            )

    @property
    def _limit(self) -> int:
        return self.window if self.limit is None else self.limit

    def rewrite(self, site: SiteContext) -> Rewrite | Decline | NearMiss:
        if site.arg("normalizer") != "softmax":
            return Decline(
                f"its normalizer is {site.arg('normalizer')}, and its parts cannot be joined by a log-sum-exp"
            )
        if any(isinstance(size, int) and size == 0 for name in "qkv" for size in site.val(name).shape):
            return Decline("it has no elements")
        if isinstance(q := _rotation(site.arg("q"), "queries"), str):
            return Decline(q)
        if isinstance(k := _rotation(site.arg("k"), "keys"), str):
            return Decline(k)
        if any(peel(q.named[name]) is not peel(k.named[name]) for name in ("cos", "sin")):
            return Decline("its queries and keys are rotated by different angles")
        if q.named["layout"] != k.named["layout"]:
            return Decline("its queries and keys pair their channels differently")
        # Both have a row of angles each, so there are as many queries as keys.
        own = _square(site.arg("mask"))
        if not mask_logic.implies(own, "k_idx <= q_idx"):
            return Decline("it is not causal, and LM-Infinite is about the keys before a query")
        shape = f"(k_idx > q_idx - {self.window}) | (k_idx < {self.sinks})"
        near, far = (
            symbols.mask_text(
                " & ".join(f"({part})" for part in (own, shape, f"q_idx - k_idx {relation} {self._limit}"))
            )
            for relation in ("<=", ">")
        )
        length = value(site.arg("q")).shape[2]
        short = isinstance(length, int) and length - 1 <= self._limit
        details = {
            "window": self.window,
            "sinks": self.sinks,
            "limit": self._limit,
            "positions": "an input, taken to count up by one"
            if _from_input(q.named["cos"])
            else "counted by the model",
            "form": "one attention: no pair is beyond the limit" if short else "two attentions, merged",
        }

        def build(builder: Builder) -> Node:
            named = arguments(site.node)
            if short:
                return builder.call(site.node.target, **(named | {"mask": near}))
            return self._merged(builder, named, q, k, near, far)

        return Rewrite(build, details)

    def _merged(
        self, builder: Builder, named: Mapping[str, Any], q: _Rotation, k: _Rotation, near: str, far: str
    ) -> Node:
        emit = Emit(builder)
        last = emit.plus(emit.size(named["q"], 2), -1)
        device = value(named["q"]).device
        row = builder.call(aten.full.default, [1], self._limit, dtype=torch.int64, device=device)
        row = builder.call(aten.clamp_max.default, row, last)
        start = builder.call(aten.full.default, [1], 0, dtype=torch.int64, device=device)
        keys, values, bias = named["k"], named["v"], named["bias"]
        if self.window <= self._limit:
            # Beyond the limit are only the first keys. Where there are fewer, none is: the last one may stand in.
            first = builder.call(aten.arange.default, self.sinks, dtype=torch.int64, device=device)
            first = builder.call(aten.clamp_max.default, first, last)
            keys = k.again(builder, start, first)
            values = builder.call(aten.index_select.default, values, 2, first)
            if bias is not None and not same_size(value(bias).shape[-1], 1):
                bias = builder.call(aten.index_select.default, bias, value(bias).dim() - 1, first)
        else:
            keys = k.again(builder, start)
        lse, scale = OPS["attention_lse"].overload, named["scale"]
        parts = (
            builder.call(lse, named["q"], named["k"], named["v"], named["bias"], scale=scale, mask=near),
            builder.call(lse, q.again(builder, row), keys, values, bias, scale=scale, mask=far),
        )
        both = [builder.call(operator.getitem, part, index) for part in parts for index in (0, 1)]
        return builder.call(operator.getitem, builder.call(OPS["merge_attention"].overload, *both), 0)


@dataclass(frozen=True)
class _Rotation:
    """Queries or keys of an attention and the rotary embedding that they come from.

    named: arguments of the ``rope`` node. between: the casts and transposes behind it, the last one first. dim, angles:
    the dimension of the sequence in what is rotated, and in cos and sin.
    """

    named: Mapping[str, Any]
    between: tuple[Node, ...]
    dim: int
    angles: int

    def again(self, builder: Builder, row: Node, only: Node | None = None) -> Node:
        """The same, all of it rotated by the angles at ``row``. only: which of the sequence, all by default."""
        x = self.named["x"]
        if only is not None:
            x = builder.call(aten.index_select.default, x, self.dim, only)
        cos, sin = (
            builder.call(aten.index_select.default, self.named[name], self.angles, row) for name in ("cos", "sin")
        )
        result = builder.call(ROPE, x, cos, sin, layout=self.named["layout"])
        for node in reversed(self.between):
            result = builder.call(node.target, result, *node.args[1:], **node.kwargs)
        return result


def _rotation(item: Any, what: str) -> _Rotation | str:
    """Where queries or keys are rotated; otherwise why they cannot be rotated anew."""
    between: list[Node] = []
    dim = 2
    while isinstance(item, Node) and item.target is not ROPE:
        given: Any = item.args
        if item.target is aten.cat.default:
            *earlier, last = given[0]
            if any(not same_size(value(part).numel(), 0) for part in earlier):
                return f"its {what} are a concatenation (a cache of rotated ones, or channels that are not rotated)"
            item = last
            continue
        if item.target is aten.transpose.int:
            swapped = [d % 4 for d in given[1:3]]
            if dim in swapped:
                dim = swapped[1 - swapped.index(dim)]
            between.append(item)
        elif not is_identity(item):
            if not is_cast(item):
                break
            between.append(item)
        item = given[0]
    if not isinstance(item, Node) or item.target is not ROPE:
        return f"its {what} come from no rotary embedding, and other positions cannot be limited in distance"
    named = arguments(item)
    x, cos = value(named["x"]), value(named["cos"])
    angles = cos.dim() - (x.dim() - dim)
    if x.dim() != 4 or angles < 0 or not same_size(cos.shape[angles], x.shape[dim]):
        return f"the angles that its {what} are rotated by do not belong to their positions one by one"
    if any(not same_size(size, 1) for d, size in enumerate(cos.shape[:-1]) if d != angles):
        return f"the angles that its {what} are rotated by differ between sequences or heads"
    return _Rotation(named, tuple(between), dim, angles)


def _square(mask: str) -> str:
    """The mask over as many keys as queries, without the number of keys: it is to hold for fewer of them as well."""
    return symbols.mask_text(symbols.parse_mask(mask).subs(symbols.K_LEN, symbols.Q_LEN))


def _from_input(node: Any) -> bool:
    """Whether the positions behind these angles are an input of the graph rather than counted in it."""
    seen, todo = set(), [node]
    while todo:
        item = todo.pop()
        if item in seen or item.target is aten.sym_size.int:
            continue
        seen.add(item)
        held = value(item)
        if item.op == "placeholder" and isinstance(held, torch.Tensor) and not held.dtype.is_floating_point:
            return True
        todo += item.all_input_nodes
    return False
