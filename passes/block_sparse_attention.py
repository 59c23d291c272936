"""Block-sparse attention in the place of dense attention: a static mask, a dynamic choice of blocks, or both."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.fx

from ..codegen import symbols
from ..runtime.errors import BadArgument, BadPassOption
from ..runtime.mask import Mask
from ..runtime.ops import OPS
from ..runtime.ops.block_attention import SIZES
from ..runtime.ops.block_lists import BLOCK_LISTS
from ..runtime.ops.block_states import BLOCK_STATES
from ._sparse_measure import measure
from .base import Builder, Decline, Exactness, NearMiss, Pass, Rewrite, SiteContext
from .selectors import Selector, SelectorInputs, parse_selector
from .view import arguments, same_size, same_sizes, value

Node = torch.fx.Node
aten = torch.ops.aten


@dataclass(frozen=True)
class BlockSparseAttention(Pass):
    """Let attention read only the blocks of keys that a static mask shows or a selector chooses.

    ::

        softmax_k(s q.k + bias) v  over the keys that the model's mask AND ``mask`` show, in the blocks ``select`` chose

    A static mask that has closed-form limits (causal, windows, sinks and their unions) becomes loop bounds in the
    kernel; any other becomes lists of key blocks, made on the device in time proportional to the number of blocks.
    Inside a block that is partly visible the mask is evaluated, so a static mask is exact for the masked function.

    Quality: restricting a dense model is another function, and what it costs is measured and reported for each site:
    density, selection time and error. A site whose own mask implies ``mask`` (Mistral's window) is REASSOCIATED.
    docs/block_sparse.md has perplexity against density for each selector.

    mask: a :class:`~tilewright.mask.Mask`, or its text: ``"causal & (window(256) | sinks(4))"``.
    select: a selector (passes/selectors) or its text: ``"xattention(stride=16, threshold=0.9)"``. It chooses blocks at
        run time from q and k, among those that the masks leave.
    block_size: queries and keys in a block: one of 16, 32, 64, 128, 256, or a pair of them.
    align: where the first query stands: ``start``, at the first key; ``end``, so that the last query stands at the last
        key (cached decoding); ``auto``: as the site's own mask has it.
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    ops: ClassVar[tuple[str, ...]] = ("attention",)
    after: ClassVar[frozenset[str]] = frozenset({"sigmoid-attention"})

    mask: Mask | str | None = None
    select: Selector | str | None = None
    block_size: int | tuple[int, int] = 128
    align: Literal["auto", "start", "end"] = "auto"

    def __post_init__(self) -> None:
        if self.mask is None and self.select is None:
            raise BadPassOption(
                f"{self.name} restricts nothing: give it a mask, such as mask='causal & window(256)', or a selector, "
                "such as select='xattention'"
            )
        for size in self._sizes():
            if size not in SIZES or isinstance(size, bool):
                choices = ", ".join(map(str, SIZES))
                raise BadPassOption(f"{self.name}: block_size is {self.block_size!r}, but must be one of {choices}")
        if self.align not in ("auto", "start", "end"):
            raise BadPassOption(f"{self.name}: align is {self.align!r}, but must be auto, start or end")
        try:
            mask = self._mask()
        except (symbols.SpecError, BadArgument) as error:
            raise BadPassOption(f"{self.name}: mask: {error}") from error
        if mask is not None and mask.hides_everything:
            raise BadPassOption(f"{self.name}: the mask {mask.text!r} hides every pair")
        self._selector()

    def options(self) -> dict[str, Any]:
        mask, select = self._mask(), self._selector()
        return super().options() | {
            "mask": None if mask is None else self.mask if isinstance(self.mask, str) else mask.text,
            "select": None if select is None else str(select),
        }

    def _mask(self) -> Mask | None:
        return Mask.parse(self.mask) if isinstance(self.mask, str) else self.mask

    def _selector(self) -> Selector | None:
        return parse_selector(self.select) if isinstance(self.select, str) else self.select

    def _sizes(self) -> tuple[Any, ...]:
        size = self.block_size
        return (size, size) if isinstance(size, int) else tuple(size) if len(size) == 2 else (None,)

    def rewrite(self, site: SiteContext) -> Rewrite | Decline | NearMiss:
        q, k = site.val("q"), site.val("k")
        if any(isinstance(size, int) and size == 0 for t in (q, k) for size in t.shape):
            return Decline("it has no elements")
        own = Mask.parse(site.arg("mask"))
        combined, exactness = own, Exactness.APPROXIMATE
        if (wanted := self._mask()) is not None:
            aligned = self._aligned(site, own, wanted)
            if isinstance(aligned, Decline):
                return aligned
            if why := aligned.why_not(*(_hint(size) for size in (q.shape[2], k.shape[2], q.shape[1], q.shape[0]))):
                return Decline(why)
            if own.implies(aligned):
                exactness = Exactness.REASSOCIATED
            else:
                combined = own & aligned
            if combined.hides_everything:
                return Decline(
                    f"the mask asked for contradicts the model's own ({own.text}): together they hide every pair"
                )
        selector = self._selector()
        if selector is not None and (why := selector.why_not(site, self._sizes())):
            return Decline(why)
        if selector is not None:
            exactness = Exactness.APPROXIMATE
        loops = selector is None and combined.closed_form
        details = {
            "mask": combined.text,
            "form": "loop bounds" if loops else "block lists",
            "block_size": list(self._sizes()) if self._sizes()[0] != self._sizes()[1] else self._sizes()[0],
        } | ({} if selector is None else {"select": str(selector)})

        def build(builder: Builder) -> Node:
            named = arguments(site.node)
            if loops:
                return builder.call(site.node.target, **(named | {"mask": combined.text}))
            return self._listed(builder, named, combined, selector)

        def measured(after: torch.fx.GraphModule, values: list[Any]) -> Mapping[str, Any]:
            return measure(after, values, own.text, self._sizes(), timed=selector is not None)

        return Rewrite(build, details, exactness=exactness, measure=measured)

    def _aligned(self, site: SiteContext, own: Mask, wanted: Mask) -> Mask | Decline:
        """The mask asked for, over the positions that the site's own mask speaks of."""
        if self.align != "auto":
            return wanted.end_aligned() if self.align == "end" else wanted
        mentioned = own.expression.free_symbols
        if {symbols.Q_LEN, symbols.K_LEN} <= mentioned:
            return wanted.end_aligned()
        queries, keys = site.val("q").shape[2], site.val("k").shape[2]
        if same_size(queries, keys) or symbols.Q not in wanted.expression.free_symbols or symbols.Q in mentioned:
            return wanted
        return Decline(
            f"it has {queries} queries and {keys} keys, and its own mask does not say how their positions are related "
            "(cross-attention, or a cache behind a mask that is a tensor): align='start' or 'end' says it"
        )

    def _listed(self, builder: Builder, named: Mapping[str, Any], mask: Mask, selector: Selector | None) -> Node:
        block_q, block_k = self._sizes()
        q, k, v = named["q"], named["k"], named["v"]
        table = None if mask.table is None else _table(builder, mask.table.to(value(q).device))
        states = _states(builder, q, k, table, mask, block_q, block_k)
        if selector is None:
            lists = _shared(builder, BLOCK_LISTS, states)
            counts, indices = (_shared(builder, operator.getitem, lists, part) for part in (0, 1))
            text, finish = mask.text, None
        else:
            inputs = SelectorInputs(q, k, v, states, mask.text, table, named["scale"], block_q, block_k)
            chosen = selector.build(builder, inputs)
            counts, indices, text, finish = chosen.counts, chosen.indices, chosen.mask, chosen.finish
            q, k, v, table = chosen.q, chosen.k, chosen.v, chosen.table
        out = builder.call(
            OPS["block_attention"].overload,
            q=q, k=k, v=v, counts=counts, indices=indices, bias=named["bias"], shift=named["shift"], table=table,
            scale=named["scale"], mask=text, normalizer=named["normalizer"], block_q=block_q, block_k=block_k,
        )  # fmt: skip
        return out if finish is None else finish(builder, out)


def _states(builder: Builder, q: Node, k: Node, table: Node | None, mask: Mask, block_q: int, block_k: int) -> Node:
    """A ``block_states`` node. It depends on sizes alone, so attentions of the same sizes share one."""
    options = {"mask": mask.text, "block_q": block_q, "block_k": block_k, "length": mask.length or 0}
    wanted = options | {"table": table}
    for node in builder.view.graph.find_nodes(op="call_function", target=BLOCK_STATES, sort=False):
        other = arguments(node)
        if node < builder.before and all(other[name] == item for name, item in wanted.items()):
            if all(_alike(value(other[name]), value(mine)) for name, mine in (("q", q), ("k", k))):
                return node
    return builder.call(BLOCK_STATES, q, k, table, **options)


def _hint(size: Any) -> int:
    """A size as it was when captured."""
    return size if isinstance(size, int) else size.node.hint or 0


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.device == b.device and same_sizes(a.shape[:3], b.shape[:3])


def _table(builder: Builder, table: torch.Tensor) -> Node:
    """The node that reads the mask's table, which all sites share."""
    for node in builder.view.graph.find_nodes(op="get_attr", sort=False):
        if "mask_table" in str(node.target) and node < builder.before:
            known = builder.view.module.get_buffer(str(node.target))
            if known.device == table.device and torch.equal(known, table):
                return node
    return builder.constant("mask_table", table)


def _shared(builder: Builder, target: Any, argument: Node, *rest: Any) -> Node:
    """``target(argument, *rest)``: the node before the builder's place that computes it already, or a new one."""
    for user in argument.users:
        if user.target is target and user.args == (argument, *rest) and not user.kwargs and user < builder.before:
            return user
    return builder.call(target, argument, *rest)
