"""What a pass is. Users' passes derive from the same classes as ours.

A pass is one frozen dataclass in one file. Its fields are its options; its docstring gives the equation, the source
and the quality to expect. It sees canonical ops only (``ops``), decides about one site at a time, and either
declines with a reason or says how to build the replacement. Sorting, editing the graph, validating and measuring
belong to the manager.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.fx
from torch._dispatch.python import enable_python_dispatcher

from ..runtime import ops as canonical_ops
from .site import Site, get_site, set_site
from .view import GraphView, arguments, layout, signature, value

Node = torch.fx.Node

PARAMETER_GROUP = "tilewright_parameter"
"""Key of a ``get_attr`` node's metadata: the (group, trained) that :meth:`Builder.parameter` declared."""


class Exactness(enum.Enum):
    """How the function after a rewrite relates to the one before."""

    EXACT = "exact"
    """Bit for bit the same."""
    REASSOCIATED = "reassociated"
    """The same function, rounded differently: within the tolerance of the op and dtype."""
    APPROXIMATE = "approximate"
    """Another function. Its error is measured and reported."""


class Needs(enum.Enum):
    """What a pass needs besides the model."""

    NOTHING = "nothing"
    CALIBRATION = "calibration"
    TRAINING = "training"


@dataclass(frozen=True)
class Decline:
    """The site is left alone, for this reason."""

    reason: str


@dataclass(frozen=True)
class NearMiss:
    """The site almost matched: where it stopped and why."""

    stopped_at: Node | None
    reason: str


@dataclass(frozen=True)
class Rewrite:
    """How to build the replacement of a site's node, and what to tell about it.

    build: takes a :class:`Builder` placed before the node and returns the node that takes its place.
    details: JSON-able facts for the report.
    exactness: what this site's rewrite is, where it is more than its pass promises: an APPROXIMATE pass may find that
        it changes nothing of the function here. None: the pass's own.
    measure: called where the site is validated, with the replacement as a module and the values of its inputs; what it
        returns joins the details.
    training: builds what stands there instead while ``tilewright.tune`` trains (soft gates in the place of a hard
        choice, say), with the same :meth:`Builder.parameter` names; None for the same as ``build``.
    """

    build: Callable[[Builder], Node]
    details: Mapping[str, Any] = field(default_factory=dict)
    exactness: Exactness | None = None
    measure: Callable[[torch.fx.GraphModule, list[Any]], Mapping[str, Any]] | None = None
    training: Callable[[Builder], Node] | None = None


@dataclass
class SiteContext:
    """One canonical node as a pass sees it."""

    node: Node
    view: GraphView
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def site(self) -> Site:
        site = get_site(self.node)
        assert site is not None, f"{self.node} has no site"
        return site

    @property
    def op(self) -> str:
        return self.node.target._opname  # type: ignore[union-attr]

    def arg(self, name: str) -> Any:
        """The node's argument by schema name: a node, or a constant."""
        return arguments(self.node)[name]

    def val(self, name: str) -> Any:
        """The fake tensor of the node's argument ``name`` (None when the argument is None)."""
        return value(self.arg(name))

    def changed(self, **changes: Any) -> Callable[[Builder], Node]:
        """A build function: the same op with some arguments changed."""

        def build(builder: Builder) -> Node:
            return builder.call(self.node.target, **(arguments(self.node) | changes))

        return build


Progress = Callable[[int, int, str], None]
"""(steps done, steps in all, what is being done)."""


def silent(done: int, total: int, text: str) -> None:
    """A :data:`Progress` that shows nothing."""


@dataclass
class Work:
    """The whole graph as a pass sees it before it decides about sites.

    sites: what :meth:`Pass.candidates` found, in graph order. batches: calibration inputs, flat inputs of the graph
    each; none where the user gave none. progress: to be called during what takes long. facts: JSON-able, about the
    whole graph, for the report; changed: (site, JSON-able details) of what :meth:`Pass.edit` changed.
    """

    view: GraphView
    sites: Sequence[SiteContext]
    batches: Sequence[Sequence[Any]] = ()
    progress: Progress = silent
    facts: dict[str, Any] = field(default_factory=dict)
    changed: list[tuple[Site, dict[str, Any]]] = field(default_factory=list)


class Builder:
    """Inserts nodes in front of a site's node, with metadata and shapes filled in."""

    def __init__(self, view: GraphView, before: Node) -> None:
        self.view = view
        self.before = before
        self.inserted: list[Node] = []
        self.repeats = False
        """Whether the same operations follow at other sites. Then each is inferred once per kind of call, and nodes may
        share a fake tensor: for operations whose results nobody writes into."""

    def call(self, target: Any, /, *args: Any, **kwargs: Any) -> Node:
        """Insert ``target(*args, **kwargs)``; shapes and dtypes are inferred by running it on fake tensors."""
        graph = self.view.graph
        if isinstance(target, torch._ops.OpOverload):
            # Positional arguments first, as ATen graphs print them.
            positional = [a.name for a in target._schema.arguments if not a.kwarg_only][len(args) :]
            while positional and positional[0] in kwargs:
                args = (*args, kwargs.pop(positional.pop(0)))
        with graph.inserting_before(self.before):
            node = graph.call_function(target, args, kwargs)
        self._describe(node)
        node.meta["val"] = self._infer(target, *torch.fx.map_arg((args, kwargs), value))  # type: ignore[arg-type, misc]
        return node

    def constant(self, name: str, tensor: torch.Tensor) -> Node:
        """Add ``tensor`` to the graph module as a buffer and return the node that reads it."""
        return self._attribute(name, tensor)

    def parameter(self, name: str, tensor: torch.Tensor, *, group: str, trained: bool = True) -> Node:
        """A :meth:`constant` that ``tilewright.tune(compiled, data, parameters=group)`` may change.

        trained: by gradients; otherwise the graph's own training form updates it in place, as a running mean.
        """
        node = self._attribute(name, tensor.detach().clone())
        node.meta[PARAMETER_GROUP] = (group, trained)
        return node

    def _attribute(self, name: str, tensor: torch.Tensor) -> Node:
        module, graph = self.view.module, self.view.graph
        name = re.sub(r"\W", "_", f"tilewright_{name}")
        unique, count = name, 0
        while hasattr(module, unique):
            count += 1
            unique = f"{name}_{count}"
        module.register_buffer(unique, tensor.detach())
        with graph.inserting_before(self.before):
            node = graph.get_attr(unique)
        self._describe(node)
        mode = next((m for m in map(_fake_mode, (self.before, *self.before.all_input_nodes)) if m), None)
        node.meta["val"] = mode.from_tensor(tensor, static_shapes=True) if mode is not None else tensor
        return node

    def _infer(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The fake result. Layers repeat: a canonical op, which never returns a view, is run once per kind of call."""
        mode = next((m for m in map(_fake_mode, (self.before, *self.before.all_input_nodes)) if m), None)
        if mode is None:
            return None
        results, key = self.view.results, None
        if self.repeats or canonical_ops.is_canonical(target):
            region = self.view.autocast.get(self.before)
            key = (target, region, signature((args, tuple(sorted(kwargs.items())))))
        # torch 2.11 needs the Python dispatcher for composite operators on symbolic sizes.
        with mode, enable_python_dispatcher(), self.view.running_as(self.before):
            if key is None:
                return target(*args, **kwargs)
            if key not in results:
                results[key] = target(*args, **kwargs)
                return results[key]
            result, replaced = results[key], value(self.before)
            if self.repeats:
                return result
            if isinstance(result, tuple | list):
                return tuple(map(_alike, result))
            if isinstance(replaced, torch.Tensor) and layout(replaced) == layout(result):
                return replaced  # the node to be replaced goes, and its fake tensor is nobody else's
            return _alike(result)

    def _describe(self, node: Node) -> None:
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            if key in self.before.meta:
                node.meta[key] = self.before.meta[key]
        if (site := get_site(self.before)) is not None:
            set_site(node, site)
        self.inserted.append(node)
        self.view.insert(node)


def _alike(result: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device=result.device)


def _fake_mode(node: Node) -> Any:
    found = value(node)
    return getattr(found[0] if isinstance(found, tuple | list) and found else found, "fake_mode", None)


@dataclass(frozen=True)
class Pass:
    """Base of every rewrite.

    exactness: see :class:`Exactness`. needs: see :class:`Needs`.
    ops: names of the canonical ops whose sites the pass is asked about.
    provides, requires, conflicts: names of properties; a pass always provides its own name. A pass that requires a
        property runs after the passes of the same compilation that provide it, and is refused when none does;
        conflicting passes are refused together. ``after`` orders without requiring.
    why: property -> the sentence that a refusal tells.
    edits: whether it changes the graph as a whole, by :meth:`edit`, and not site by site.
    optional: whether ``strict`` accepts that it changes nothing.
    """

    exactness: ClassVar[Exactness]
    needs: ClassVar[Needs] = Needs.NOTHING
    ops: ClassVar[tuple[str, ...]] = ()
    provides: ClassVar[frozenset[str]] = frozenset()
    requires: ClassVar[frozenset[str]] = frozenset()
    conflicts: ClassVar[frozenset[str]] = frozenset()
    after: ClassVar[frozenset[str]] = frozenset()
    why: ClassVar[Mapping[str, str]] = {}
    edits: ClassVar[bool] = False
    optional: ClassVar[bool] = False

    @classmethod
    def cli_name(cls) -> str:
        """``TwoPassSoftmax`` -> ``two-pass-softmax``: the name on the command line and in reports."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.__name__).lower()

    @property
    def name(self) -> str:
        return self.cli_name()

    def options(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @classmethod
    def describe_needs(cls) -> str:
        """What the pass needs, in words; a pass whose options decide says so."""
        if cls.current_needs is not Pass.current_needs:
            return "calibration inputs, with some options"
        return {
            Needs.NOTHING: "nothing",
            Needs.CALIBRATION: "calibration inputs",
            Needs.TRAINING: "training",
        }[cls.needs]

    def current_needs(self) -> Needs:
        """What this instance needs; a pass whose options decide overrides it."""
        return self.needs

    def stages(self) -> tuple[Pass, ...]:
        """The passes that this one is run as, one after the other: itself, unless it has something to do before."""
        return (self,)

    def candidates(self, view: GraphView) -> Iterable[Node]:
        """The nodes :meth:`rewrite` is asked about, in graph order. A pass with its own pattern may override it."""
        wanted = {canonical_ops.OPS[name].overload for name in self.ops}
        return [node for node in view.graph.nodes if node.op == "call_function" and node.target in wanted]

    def watch(self, site: SiteContext) -> Mapping[str, Node]:
        """Nodes before the site's whose values :meth:`observe` is to see too, by the names it will find them under."""
        return {}

    def observe(self, site: SiteContext, values: Mapping[str, Any]) -> None:
        """Calibration: called for every candidate and batch with the op's arguments as real tensors.

        values: by argument name, and what :meth:`watch` named. Keep what :meth:`rewrite` needs in ``site.state``; keep
        statistics, not the tensors.
        """

    def prepare(self, work: Work) -> None:
        """Called once, before calibration, with the whole graph and the calibration inputs: for what needs both.

        Keep what is decided in each site's ``state``.
        """

    def edit(self, work: Work) -> None:
        """Change the graph as a whole; what was changed goes into ``work.changed``. Only where :attr:`edits` is set.

        The function may change only as :attr:`exactness` says, which is validated on the whole graph's outputs.
        """
        raise NotImplementedError(f"{type(self).__name__} must define edit()")

    def finish(self, work: Work) -> None:
        """Called once after the graph was edited, for facts about the result."""

    def plan(self, sites: Sequence[SiteContext]) -> None:
        """Called once with all candidates, after calibration and before :meth:`rewrite`: for what spans sites.

        Keep what is decided in each ``site.state``.
        """

    def rewrite(self, site: SiteContext) -> Rewrite | Decline | NearMiss:
        """Decide about one site."""
        raise NotImplementedError(f"{type(self).__name__} must define rewrite()")
