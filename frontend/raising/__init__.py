"""Raising: lift the many spellings of an operation to one canonical op that passes can read.

``RULES`` run in order, each over the whole graph. Order matters: rope and the norms are taken out before attention
looks at its operands, attention before the softmax it contains, linear last because other rules read ``aten.linear``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx

from ...passes.base import Builder
from ...passes.site import Site, name_site, set_site, source_line
from ...passes.view import GraphView, is_assertion, same_sizes, value
from ...runtime import ops as canonical_ops
from . import attention, gated_mlp, layer_norm, linear, rms_norm, rope, softmax
from .rules import Decline, Facts, NearMiss, Raised, RaiseRule

__all__ = ["RULES", "RaiseResult", "raise_graph"]

Node = torch.fx.Node

DETAILS = "tilewright_details"
RULES: tuple[RaiseRule, ...] = (
    *rope.RULES,
    *rms_norm.RULES,
    *layer_norm.RULES,
    *gated_mlp.RULES,
    *attention.RULES,
    *softmax.RULES,
    *linear.RULES,
)
"""Every rule in the order they run."""


@dataclass
class RaiseResult:
    """What raising did.

    sites: one per canonical node, in graph order.
    details: site id -> what the rule tells about it; also in ``meta[DETAILS]`` of the canonical node.
    declined: sites that are the op and were left alone, with the reason.
    near_misses: (where it would have been, the node and source line where the match stopped, the reason).
    """

    sites: list[Site] = field(default_factory=list)
    details: dict[str, dict[str, Any]] = field(default_factory=dict)
    declined: list[tuple[Site, str]] = field(default_factory=list)
    near_misses: list[tuple[Site, str, str]] = field(default_factory=list)


def raise_graph(module: torch.fx.GraphModule, only: Sequence[RaiseRule] | None = None) -> RaiseResult:
    """Replace what the rules recognise by canonical ops, in place.

    module: a pre-dispatch ATen graph with ``meta["val"]`` on its nodes. only: these rules instead of all.
    The outputs stay the same within the tolerance of the ops (``tilewright.runtime.ops``).
    """
    return _Raiser(module).run(RULES if only is None else only)


class _Raiser:
    def __init__(self, module: torch.fx.GraphModule) -> None:
        self.module = module
        self.view = GraphView(module)
        self.facts = Facts(self.view)
        self.taken: set[str] = set()
        self.gone: dict[Node, str] = {}  # node -> the op that took it
        self.raised: list[tuple[Node, Site]] = []
        self.declined: list[tuple[Node, str, str]] = []
        self.missed: list[tuple[Node, str, NearMiss]] = []

    def run(self, rules: Sequence[RaiseRule]) -> RaiseResult:
        self._sweep()  # an unused half of max() or native_layer_norm() is no use of it
        index: dict[Any, list[Node]] = defaultdict(list)
        for node in self.view.graph.nodes:
            if node.op == "call_function":
                index[node.target].append(node)
        for rule in rules:
            for node in sorted(n for target in dict.fromkeys(rule.anchors) for n in index.get(target, ())):
                if node not in self.gone:
                    self._ask(rule, node)
        result = self._result()
        self._sweep()
        self.view.graph.lint()
        self.module.recompile()
        return result

    def _ask(self, rule: RaiseRule, node: Node) -> None:
        outcome = rule.match(node, self.view, self.facts)
        if isinstance(outcome, Raised):
            outcome = self._apply(node, outcome)
        if isinstance(outcome, NearMiss):
            self.missed.append((node, rule.op, outcome))
        elif isinstance(outcome, Decline):
            self.declined.append((node, rule.op, outcome.reason))

    def _apply(self, anchor: Node, raised: Raised) -> NearMiss | None:
        root = raised.root or anchor
        if (leak := self.view.escaping(raised.covered, root)) is not None:
            return NearMiss(leak, f"its intermediate result {leak.name} is used elsewhere too")
        if (writer := self.view.modified(raised.covered, root)) is not None:
            return NearMiss(writer, "it modifies a tensor of the site in place while the site is computed")
        if len({self.view.autocast.get(node) for node in (root, *raised.covered)}) > 1:
            return NearMiss(root, "an autocast region begins or ends inside the site")
        builder = Builder(self.view, root)
        overload = canonical_ops.OPS[raised.op].overload
        named = {a.name: arg for a, arg in zip(overload._schema.arguments, raised.args, strict=False)}
        named |= raised.kwargs
        if raised.before is not None:
            named |= raised.before(builder)
        node = builder.call(overload, **named)
        result = node if raised.after is None else raised.after(builder, node)
        if (reason := _differs(value(root), value(result))) is not None:
            for inserted in reversed(builder.inserted):
                self.view.erase(inserted)
            return NearMiss(root, reason)
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            if key in raised.origin.meta:
                node.meta[key] = raised.origin.meta[key]
        site = name_site(raised.origin, raised.op, self.taken)
        set_site(node, site)
        if raised.details:
            node.meta[DETAILS] = dict(raised.details)
        self.raised.append((node, site))
        self.view.replace(root, result)
        self._erase({*raised.covered, root}, raised.op)
        return None

    def _erase(self, covered: set[Node], op: str) -> None:
        """Erase what nothing uses any more, users first. Nodes that others share stay."""
        for node in sorted(covered, reverse=True):
            for user in list(node.users):
                if is_assertion(user):
                    self._drop(user, op)
            if not node.users:
                self._drop(node, op)

    def _drop(self, node: Node, op: str) -> None:
        if node not in self.gone:
            self.gone[node] = op
            self.view.erase(node)

    def _settled(self, node: Node, op: str) -> bool:
        """Whether a rule's complaint about ``node`` has become noise: another anchor or rule took the node after all.

        The softmax inside an attention that was left alone does not settle the attention.
        """
        return node in self.gone and not (op == "attention" and self.gone[node] == "softmax")

    def _sweep(self) -> None:
        """Remove what computes nothing any more, and the assertions about it, which would keep it alive."""
        for node in reversed(self.view.graph.nodes):
            if is_assertion(node):
                tensor = node.args[0]
                if isinstance(tensor, Node) and tensor.op == "call_function" and all(map(is_assertion, tensor.users)):
                    self.view.erase(node)
            elif not node.users and node.op in ("call_function", "get_attr") and not node.is_impure():
                self.view.erase(node)

    def _result(self) -> RaiseResult:
        raised = sorted(self.raised, key=lambda pair: pair[0])
        result = RaiseResult(sites=[site for _, site in raised])
        result.details = {site.id: node.meta[DETAILS] for node, site in raised if DETAILS in node.meta}
        seen: set[Any] = set()
        for node, op, reason in self.declined:
            if not self._settled(node, op) and (node, op) not in seen:
                seen.add((node, op))
                result.declined.append((name_site(node, op, self.taken), reason))
        for node, op, miss in self.missed:
            stop = miss.stopped_at if miss.stopped_at is not None else node
            if self._settled(node, op) or self._settled(stop, op) or (stop, op) in seen:
                continue  # two anchors may stop at one node
            seen.add((stop, op))
            where = ", ".join(part for part in (f"{stop.name} = {stop.target}", source_line(stop)) if part)
            result.near_misses.append((name_site(node, op, self.taken), where, miss.reason))
        return result


def _differs(old: Any, new: Any) -> str | None:
    """Why ``new`` cannot take the place of ``old``: fake tensors before and after."""
    if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
        return "the graph carries no shapes here"
    if old.dtype != new.dtype:
        return f"the model computes {old.dtype} here, the canonical op {new.dtype}"
    if not same_sizes(old.shape, new.shape):
        return f"the model's result has shape {tuple(old.shape)}, the canonical op's {tuple(new.shape)}"
    if old.device != new.device:
        return f"the model's result is on {old.device}, the canonical op's on {new.device}"
    return None
