"""The pass manager: sorts passes, refuses illegal combinations, calibrates, edits the graph and validates each site."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch
import torch.fx

from ..runtime import ops as canonical_ops
from ..runtime.errors import (
    BadPass,
    BadPassOption,
    CalibrationNeeded,
    IllegalPassCombination,
    ValidationError,
)
from ..runtime.ops import Tolerance
from .base import Builder, Decline, Exactness, NearMiss, Needs, Pass, Progress, Rewrite, SiteContext, Work, silent
from .execute import Hook, extract, run
from .metrics import combine, identical, tensor_error, within
from .site import Site, get_site, name_site, set_site, source_line
from .view import GraphView, arguments, value

Node = torch.fx.Node


@dataclass
class SiteRewrite:
    """One rewritten site.

    node: name of the replaced node in :attr:`PassRun.before`. result: name of the node that took its place.
    after: the replacement as a module; inputs: names of the nodes of ``before`` that its placeholders stand for.
    nodes: names of all nodes that were inserted for it.
    """

    site: Site
    op: str
    node: str
    result: str
    after: torch.fx.GraphModule
    inputs: list[str]
    nodes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    error: dict[str, float] | None = None
    exactness: Exactness = Exactness.APPROXIMATE
    measure: Callable[[torch.fx.GraphModule, list[Any]], Mapping[str, Any]] | None = None


@dataclass
class PassRun:
    """What one pass did to one graph. before: the graph as the pass found it.

    facts: about the whole graph. Of a pass that edits the graph as a whole: after, the graph as it left it; edited,
    the sites concerned and details; error, of the graph's outputs.
    """

    rewrite: Pass
    before: torch.fx.GraphModule
    rewrites: list[SiteRewrite] = field(default_factory=list)
    declined: list[tuple[Site, str]] = field(default_factory=list)
    near_misses: list[tuple[Site, str, str]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    after: torch.fx.GraphModule | None = None
    edited: list[tuple[Site, dict[str, Any]]] = field(default_factory=list)
    error: dict[str, float] | None = None


def sort_passes(passes: Iterable[Pass]) -> list[Pass]:
    """The passes in an order in which each finds what it requires; otherwise as given.

    Raises :class:`BadPassOption` for what is not a pass, :class:`IllegalPassCombination` for a pass listed twice,
    a conflict, a requirement nobody provides, and requirements in a circle.
    """
    passes = list(passes)
    for one in passes:
        if isinstance(one, type) and issubclass(one, Pass):
            raise BadPassOption(f"passes wants pass objects: write {one.__name__}(), not {one.__name__}")
        if not isinstance(one, Pass) or not dataclasses.is_dataclass(one):
            raise BadPassOption(f"{one!r} is not a pass: passes are dataclasses derived from tilewright.passes.Pass")
        if not isinstance(getattr(one, "exactness", None), Exactness):
            raise BadPassOption(f"{type(one).__name__} must declare its exactness")
    provided = [one.provides | {one.name} for one in passes]
    order: nx.DiGraph = nx.DiGraph()
    order.add_nodes_from(range(len(passes)))
    for index, one in enumerate(passes):
        for other in range(len(passes)):
            if other == index:
                continue
            if passes[other].name == one.name:
                raise IllegalPassCombination(f"{one.name} is listed twice: give one of them")
            if clash := one.conflicts & provided[other]:
                raise IllegalPassCombination(_refusal(one, clash, f"{one.name} cannot go with {passes[other].name}"))
            if (one.requires | one.after) & provided[other]:
                order.add_edge(other, index)
        if missing := one.requires - set().union(*provided[:index], *provided[index + 1 :]):
            need = ", ".join(sorted(missing))
            sentence = f"{one.name} needs {need}: add a pass that provides it"
            raise IllegalPassCombination(_refusal(one, missing, sentence))
    try:
        return [passes[index] for index in nx.lexicographical_topological_sort(order)]
    except nx.NetworkXUnfeasible:
        circle = " before ".join(passes[edge[0]].name for edge in nx.find_cycle(order))
        raise IllegalPassCombination(f"these passes require each other in a circle: {circle}") from None


def _refusal(one: Pass, properties: Iterable[str], sentence: str) -> str:
    reasons = [one.why[name] for name in sorted(properties) if name in one.why]
    return f"{sentence}: {'; '.join(reasons)}" if reasons else sentence


def check_needs(passes: Iterable[Pass], calibration: Sequence[Any]) -> None:
    """Raise :class:`CalibrationNeeded` when a pass measures activations and there is nothing to measure on."""
    for one in passes:
        if one.current_needs() is Needs.CALIBRATION and not calibration:
            raise CalibrationNeeded(
                f"{one.name} fits itself to activations: give compile() calibration=[inputs, ...], "
                "a few batches like those the model will see"
            )


def run_pass(
    module: torch.fx.GraphModule,
    one: Pass,
    copy: Callable[[torch.fx.GraphModule], torch.fx.GraphModule],
    calibration: Sequence[Sequence[Any]] = (),
    *,
    training: bool = False,
    progress: Progress = silent,
) -> PassRun:
    """Apply one pass to ``module`` in place. Its :meth:`Pass.stages` are passes of their own: run each.

    calibration: flat inputs of the graph, a sequence a batch. copy: how to copy a graph module that shares weights.
    training: build the form that ``tilewright.tune`` trains where a rewrite has one. progress: shows what takes long.
    """
    before = copy(module)
    done = PassRun(one, before)
    view = GraphView(module)
    candidates = list(one.candidates(view))
    taken = {site.id for node in module.graph.nodes if (site := get_site(node)) is not None}
    for node in candidates:
        if get_site(node) is None:  # a user's pass with a pattern of its own
            set_site(node, name_site(node, one.name, taken))
    contexts = {node: SiteContext(node, view) for node in candidates}
    work = Work(view, list(contexts.values()), calibration, progress, done.facts, done.edited)
    one.prepare(work)
    if one.edits:
        one.edit(work)
        _check(module, one)
        one.finish(work)
        done.after = copy(module)
        return done
    if one.current_needs() is Needs.CALIBRATION and type(one).observe is not Pass.observe:
        _calibrate(module, one, contexts, calibration)
    one.plan(list(contexts.values()))
    inserted: set[Node] = set()
    pending: list[tuple[SiteRewrite, Node]] = []
    for node, context in contexts.items():
        outcome = one.rewrite(context)
        site = context.site
        if isinstance(outcome, Decline):
            done.declined.append((site, outcome.reason))
        elif isinstance(outcome, NearMiss):
            done.near_misses.append((site, _place(outcome.stopped_at), outcome.reason))
        elif isinstance(outcome, Rewrite):
            if training and outcome.training is not None:
                outcome = dataclasses.replace(outcome, build=outcome.training)
            builder = Builder(view, node)
            result = _build(one, outcome, builder, node)
            inserted.update(builder.inserted)
            names = [inserted_node.name for inserted_node in builder.inserted]
            details = dict(outcome.details)
            exactness = outcome.exactness or one.exactness
            if exactness is not one.exactness:
                details["exactness"] = exactness.value
            rewrite = SiteRewrite(site, _op(node), node.name, result.name, module, [], names, details)
            rewrite.exactness, rewrite.measure = exactness, outcome.measure
            pending.append((rewrite, result))
            if get_site(result) is None and result in inserted:
                set_site(result, site)
            if any(node in new.all_input_nodes for new in builder.inserted):
                builder.inserted[0].prepend(node)  # the replacement wraps what it replaces
            for user in list(node.users):
                if user not in inserted:
                    user.replace_input_with(node, result)
                    view.insert(user)
            if not node.users:
                view.erase(node)
        else:
            want = "return a Rewrite, Decline or NearMiss"
            raise BadPass(f"{one.name}.rewrite returned {outcome!r}: {want}", site=site.id)
    # A site that reads another one's result is measured on what stood there before: each error is its site's own.
    replaced = {result: rewrite.node for rewrite, result in pending if result in inserted}
    for rewrite, result in pending:
        others = replaced.keys() - {result}
        rewrite.after, inputs = extract(module, result, inserted - others)
        before_it = {other.name: replaced[other] for other in others}
        rewrite.inputs = [before_it.get(name, name) for name in inputs]
        done.rewrites.append(rewrite)
    _check(module, one)
    one.finish(work)
    return done


def _check(module: torch.fx.GraphModule, one: Pass) -> None:
    module.graph.eliminate_dead_code()
    try:
        module.graph.lint()
    except Exception as error:  # lint raises whatever it finds; all of it means a broken pass
        raise BadPass(f"{one.name} left an illegal graph: {error}") from error
    module.recompile()


def _build(one: Pass, rewrite: Rewrite, builder: Builder, node: Node) -> Node:
    """Run the pass's build function and check that the result can stand where the node stood."""
    site = get_site(node)
    where = {"site": site.id, "source": site.source} if site else {}
    result = rewrite.build(builder)
    if not isinstance(result, Node):
        raise BadPass(f"{one.name} built {result!r}, not a graph node", **where)
    old, new = value(node), value(result)
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        if old.dtype != new.dtype or old.dim() != new.dim() or old.device != new.device:
            raise BadPass(
                f"{one.name} replaced a {old.dtype} tensor of {old.dim()} dims on {old.device} "
                f"by a {new.dtype} one of {new.dim()} dims on {new.device}",
                **where,
            )
    return result


def _op(node: Node) -> str:
    return node.target._opname if isinstance(node.target, torch._ops.OpOverload) else str(node.target)


def _place(node: Node | None) -> str:
    if node is None:
        return ""
    line = source_line(node)
    return f"{node.name} ({line})" if line else node.name


def _calibrate(
    module: torch.fx.GraphModule,
    one: Pass,
    contexts: dict[Node, SiteContext],
    batches: Sequence[Sequence[Any]],
) -> None:
    """Show every candidate the real values of its arguments, batch by batch."""

    def hook(context: SiteContext) -> Hook:
        watched = one.watch(context)
        needs = tuple(dict.fromkeys((*context.node.all_input_nodes, *watched.values())))

        def call(values: list[Any], result: Any) -> Any:
            known = dict(zip(needs, values, strict=True))
            named = torch.fx.node.map_arg(arguments(context.node), known.__getitem__)
            one.observe(context, {**named, **{name: known[node] for name, node in watched.items()}})
            return result

        return Hook(needs, call)

    hooks = {node: hook(context) for node, context in contexts.items()}
    for batch in batches:
        run(module, batch, hooks)


def validate(
    done: PassRun,
    inputs: Sequence[Any],
    prepare: Callable[[torch.fx.GraphModule], torch.fx.GraphModule] = lambda module: module,
) -> None:
    """Run every rewritten site before and after on the values it sees for ``inputs`` and record the error.

    prepare: turns a replacement into what will really run (sets kernel targets).
    Raises :class:`ValidationError` when an EXACT pass changed a bit or a REASSOCIATED one left the tolerance. A pass
    that edits the graph as a whole is measured on the graph's outputs.
    """
    if done.after is not None:
        _validate_whole(done, done.after, inputs)
    if not done.rewrites:
        return
    nodes = {node.name: node for node in done.before.graph.nodes}
    hooks = {}
    for rewrite in done.rewrites:
        after = prepare(rewrite.after)

        def call(values: list[Any], before: Any, rewrite: SiteRewrite = rewrite, after: Any = after) -> Any:
            result = after(*values)
            rewrite.error = _compare(done.rewrite, rewrite, result, before)
            if rewrite.measure is not None:
                rewrite.details.update(rewrite.measure(after, values))
            return before

        hooks[nodes[rewrite.node]] = Hook(tuple(nodes[name] for name in rewrite.inputs), call)
    run(done.before, inputs, hooks)


def _validate_whole(done: PassRun, after: torch.fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Compare all outputs. Rounding differs in every layer and adds up: the bound is the root of the dtype's eps."""
    pairs = [
        (a, b)
        for a, b in zip(_tensors(run(after, inputs)), _tensors(run(done.before, inputs)), strict=True)
        if b.is_floating_point()
    ]
    done.error = combine([tensor_error(a, b) for a, b in pairs])
    kinds = {value(node).dtype for node in done.before.graph.nodes if isinstance(value(node), torch.Tensor)}
    eps = max((torch.finfo(kind).eps for kind in kinds if kind.is_floating_point), default=0.0)
    exact = done.rewrite.exactness is Exactness.EXACT
    ok = all(identical(a, b) for a, b in pairs) if exact else done.error["rel_l2"] <= eps**0.5
    if not ok and done.rewrite.exactness is not Exactness.APPROXIMATE:
        raise ValidationError(
            f"{done.rewrite.name} says it is {done.rewrite.exactness.value}, but changed the model's outputs by "
            f"{done.error['max_abs']:.3g} (relative L2 {done.error['rel_l2']:.3g}); please report it, and leave the "
            "pass out meanwhile"
        )


def _compare(one: Pass, rewrite: SiteRewrite, after: Any, before: Any) -> dict[str, float]:
    pairs = list(zip(_tensors(after), _tensors(before), strict=True))
    for a, b in pairs:
        if a.shape != b.shape:
            raise ValidationError(
                f"{one.name} changed the shape from {tuple(b.shape)} to {tuple(a.shape)}",
                site=rewrite.site.id,
                source=rewrite.site.source,
            )
    error = combine([tensor_error(a, b) for a, b in pairs])
    if rewrite.exactness is Exactness.EXACT:
        ok = all(identical(a, b) for a, b in pairs)
    elif rewrite.exactness is Exactness.REASSOCIATED:
        ok = all(within(a, b, tolerance(rewrite.op, b.dtype)) for a, b in pairs)
    else:
        ok = True
    if not ok:
        raise ValidationError(
            f"{one.name} says it is {rewrite.exactness.value}, but changed this site by {error['max_abs']:.3g} "
            f"(relative L2 {error['rel_l2']:.3g}); please report it, and leave the pass out meanwhile",
            site=rewrite.site.id,
            source=rewrite.site.source,
        )
    return error


def tolerance(op: str, dtype: torch.dtype) -> Tolerance:
    """How far two correct evaluations of an op may be apart: each within the op's tolerance of the exact value."""
    known = canonical_ops.OPS[op].tolerance.get(dtype) if op in canonical_ops.OPS else None
    if known is not None:
        return Tolerance(2 * known.atol, 2 * known.rtol)
    if not dtype.is_floating_point:
        return Tolerance(0.0, 0.0)
    # Not a canonical op (a user's own pattern): a few operations' worth of rounding.
    bound = 16 * torch.finfo(dtype).eps
    return Tolerance(bound, bound)


def contribution(done: PassRun, rewrite: SiteRewrite, inputs: Sequence[Any]) -> Any:
    """The graph's outputs on ``inputs`` with this one site rewritten and nothing else that the pass did."""
    nodes = {node.name: node for node in done.before.graph.nodes}
    hook = Hook(tuple(nodes[name] for name in rewrite.inputs), lambda values, _: rewrite.after(*values))
    return run(done.before, inputs, {nodes[rewrite.node]: hook})


def _tensors(result: Any) -> list[torch.Tensor]:
    return [item for item in torch.utils._pytree.tree_leaves(result) if isinstance(item, torch.Tensor)]
