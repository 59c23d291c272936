"""Orthogonal changes of basis that leave a graph's function as it is, and where they can go.

With R orthogonal and every row ``y`` of a tensor written as ``y R``, what writes it takes R and what reads it takes the
transpose, in constants of their own (QuaRot, Ashkboos et al. 2024, section 4; OSTQuant, Hu et al. 2025, section 3.2):

    stream   the residual stream of a pre-norm model, one R of its width for all layers. Embeddings and the linear
             layers that are added to it write it; linear layers read it through norms. rms_norm(x R) = rms_norm(x) R
             once the norm's weight g is folded into the readers: W' = W diag(g) R. A layer norm subtracts the mean
             too; where all readers do, the writers subtract it instead, W' = (I - 11^T / C) W, and the norm becomes an
             RMS norm. Its bias goes into the readers' biases.
    heads    the values of an attention, one R for each head of values: rows of the value projection, columns of the
             output projection. Query heads that share values share R.

A head that is tied to the embedding stays tied: both read the rotated table, and what differs, the final norm's
weight, becomes a matrix R^T diag(g) R in front of the head. With layer norms a tied table is not centred itself (the
head reads what is subtracted); a matrix behind the embedding does that.

:func:`find_rotations` says where rotations go and why not elsewhere; ``_turn.py`` edits the graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Number
from typing import Any

import networkx as nx
import torch
import torch.fx
from torch import Tensor

from ...runtime.ops import OPS
from .._key_projection import constant, find_projection, owner
from ..site import get_site
from ..view import GraphView, arguments, is_assertion, is_cast, is_identity, value
from ._fold import find_fold, find_groups, readers

Node = torch.fx.Node
aten = torch.ops.aten

LINEAR = OPS["linear"].overload
RMS_NORM = OPS["rms_norm"].overload
LAYER_NORM = OPS["layer_norm"].overload
ATTENTIONS = frozenset(OPS[name].overload for name in ("attention", "cached_attention"))
EMBEDDING = aten.embedding.default
_NORMS = (RMS_NORM, LAYER_NORM)
_SUMS = (aten.add.Tensor, aten.sub.Tensor)
_BY_NUMBERS = (aten.mul.Tensor, aten.div.Tensor)
_SAME_LAST = frozenset(
    f"aten::{name}"
    for name in "view reshape _unsafe_view unsqueeze squeeze expand contiguous clone alias detach".split()
)
_DIMS = {"aten::slice": ("dim",), "aten::select": ("dim",), "aten::transpose": ("dim0", "dim1")}


@dataclass(frozen=True)
class Side:
    """One side of a weight: ``channels`` (H, D) of it are turned by matrix ``heads[h]`` of the rotation ``name``."""

    name: str
    channels: Tensor = field(repr=False)
    heads: Tensor = field(repr=False)

    def whole(self, size: int) -> bool:
        """Whether one matrix turns all ``size`` channels in order."""
        return self.channels.shape == (1, size) and torch.equal(self.channels[0], torch.arange(size))


@dataclass
class Turned:
    """What happens to one linear layer.

    columns, rows: how its inputs and outputs are turned, or None. norm: the norm whose weight (and bias) go into its
    columns first. centred: whether the mean over its outputs is subtracted. tied: it reads the table of an embedding:
    its weight is the table's, and the rest is a matrix in front of it.
    """

    columns: Side | None = None
    rows: Side | None = None
    norm: Node | None = None
    centred: bool = False
    tied: bool = False


@dataclass(frozen=True)
class Table:
    """An embedding that writes a stream. own: whether no linear layer reads its table."""

    name: str
    centred: bool
    own: bool


@dataclass
class Plan:
    """Which rotations a graph takes.

    sizes: rotation -> (matrices, width). linears, tables, norms: what changes with them, by node; of norms, the
    rotation of the stream that they read. declined: what takes no rotation, with the reason.
    """

    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    linears: dict[Node, Turned] = field(default_factory=dict)
    tables: dict[Node, Table] = field(default_factory=dict)
    norms: dict[Node, str] = field(default_factory=dict)
    declined: dict[str, str] = field(default_factory=dict)

    def of(self, node: Node) -> Turned:
        return self.linears.setdefault(node, Turned())


class _Declined(Exception):
    """Why a rotation cannot be."""


def named(node: Node) -> str:
    site = get_site(node)
    return site.id if site is not None else node.name


def width(node: Any) -> int | None:
    """Channels of a floating-point tensor's last dimension; None for everything else."""
    tensor = value(node)
    if not isinstance(tensor, Tensor) or not tensor.dtype.is_floating_point or tensor.dim() < 1:
        return None
    size = tensor.shape[-1]
    return size if isinstance(size, int) else None


def find_rotations(view: GraphView, *, streams: bool = True, heads: bool = True) -> Plan:
    """Where rotations go: the residual streams, and the values of attentions."""
    plan = Plan()
    if streams:
        _find_streams(view, plan)
    if heads:
        _find_heads(view, plan)
    return plan


# ------------------------------------------------------------------------------------------------------------- streams


def _same_channels(node: Node) -> list[Node] | None:
    """The arguments whose channels, in order, are the node's own; None for nodes that make channels of their own."""
    if node.op != "call_function":
        return None
    if node.target in _SUMS:
        both = [item for item in node.args[:2] if isinstance(item, Node) and width(item) == width(node)]
        return both if len(both) == 2 else None
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or width(source) is None or width(source) != width(node):
        return None
    name = node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""
    if name in _DIMS:
        last = value(source).dim() - 1
        touched = {arguments(node)[one] % (last + 1) for one in _DIMS[name]}
        return None if last in touched else [source]
    scaled = node.target in _BY_NUMBERS and _is_number(node.args[1])
    return [source] if scaled or is_identity(node) or is_cast(node) or name in _SAME_LAST else None


def _is_number(item: Any) -> bool:
    tensor = value(item)
    return isinstance(item, Number) or (isinstance(tensor, Tensor) and tensor.dim() == 0)


@dataclass
class _Component:
    """Nodes whose channels are the same."""

    members: list[Node] = field(default_factory=list)
    summed: bool = False

    def makers(self) -> list[Node]:
        return [node for node in self.members if _same_channels(node) is None]

    def readers(self) -> Iterator[tuple[Node, Node]]:
        inside = set(self.members)
        for node in self.members:
            for user in node.users:
                # What asks only for sizes or the dtype reads nothing.
                asks = user.target in (aten.sym_size.int, aten.sym_size.default) or (
                    user.target is aten.type_as.default and user.args[0] is not node
                )
                if user not in inside and not asks and not is_assertion(user):
                    yield node, user


def _components(view: GraphView) -> dict[Node, _Component]:
    union: Any = nx.utils.UnionFind()
    nodes = [node for node in view.graph.nodes if width(node) is not None]
    for node in nodes:
        union.union(node, *(_same_channels(node) or ()))
    found: dict[Node, _Component] = {}
    of: dict[Node, _Component] = {}
    for node in nodes:
        of[node] = found.setdefault(union[node], _Component())
        of[node].members.append(node)
        of[node].summed |= node.target in _SUMS and _same_channels(node) is not None
    return of


def _find_streams(view: GraphView, plan: Plan) -> None:
    of = _components(view)
    seen: set[int] = set()
    count = 0
    for component in of.values():
        if id(component) in seen:
            continue
        seen.add(id(component))
        readers_ = [user for _, user in component.readers()]
        if not component.summed or not any(user.target in (LINEAR, *_NORMS) for user in readers_):
            continue
        name = f"stream{count or ''}"
        try:
            part = _stream(view, component, of, name)
        except _Declined as stop:
            label = "the residual stream"
            first = component.makers()[0]
            plan.declined.setdefault(f"{label} from {named(first)}", str(stop))
            continue
        count += 1
        plan.sizes |= part.sizes
        plan.tables |= part.tables
        plan.norms |= part.norms
        for node, turned in part.linears.items():
            mine = plan.of(node)
            mine.columns, mine.rows = turned.columns or mine.columns, turned.rows or mine.rows
            mine.norm, mine.centred = turned.norm or mine.norm, turned.centred or mine.centred
            mine.tied |= turned.tied


def _stream(view: GraphView, component: _Component, of: Mapping[Node, _Component], name: str) -> Plan:
    """The plan of one residual stream. Raises _Declined."""
    size = width(component.members[0])
    assert size is not None
    plan = Plan(sizes={name: (1, size)})
    side = Side(name, torch.arange(size)[None], torch.zeros(1, dtype=torch.long))
    norms: list[Node] = []
    for node, user in component.readers():
        if user.target is LINEAR and _only(user, node, "x"):
            plan.of(user).columns = side
        elif user.target in _NORMS and _only(user, node, "x"):
            norms.append(user)
        elif user.op == "output":
            raise _Declined("it is an output of the model")
        else:
            raise _Declined(f"{named(user)} reads it, which does not commute with rotations")
    if not norms:
        raise _Declined("no norm reads it")
    kinds = {norm.target for norm in norms}
    if len(kinds) > 1 or (LAYER_NORM in kinds and plan.linears):
        raise _Declined("some of what reads it subtracts its mean and some does not")
    centred = LAYER_NORM in kinds
    for norm in norms:
        plan.norms[norm] = name
        for linear in _normed(view, norm, size, of):
            if plan.of(linear).columns is not None:
                raise _Declined(f"{named(linear)} reads two norms")
            plan.of(linear).columns, plan.of(linear).norm = side, norm
    reading = list(plan.linears)
    for maker in component.makers():
        if maker.target is LINEAR:
            plan.of(maker).rows, plan.of(maker).centred = side, centred
        elif maker.target is EMBEDDING:
            tied = _table(view, maker, component, reading)
            plan.tables[maker] = Table(name, centred, not tied)
            for linear in tied:
                plan.of(linear).tied = True
        elif maker.target in _NORMS:
            raise _Declined(
                f"what {named(maker)} returns is added to it, with a weight for each channel, which no rotation "
                "commutes with (a post-norm model)"
            )
        else:
            raise _Declined(f"{named(maker)} writes it, which takes no rotation")
    for linear, turned in plan.linears.items():
        _check_linear(view, linear, turned)
        if turned.tied and turned.rows is not None:
            raise _Declined(f"{named(linear)} is tied to the embedding, and writes the stream itself")
    return plan


def _only(user: Node, node: Node, argument: str) -> bool:
    return arguments(user)[argument] is node and user.all_input_nodes.count(node) == 1


def _normed(view: GraphView, norm: Node, size: int, of: Mapping[Node, _Component]) -> list[Node]:
    """The linear layers that read a norm. Raises _Declined where anything else does."""
    given = arguments(norm)
    if "normalized_shape" in given and list(given["normalized_shape"]) != [size]:
        raise _Declined(f"{named(norm)} is taken over several dimensions")
    for what in ("weight", "bias"):
        node = given.get(what)
        stored = None if node is None else constant(view, node)
        if node is not None and (stored is None or tuple(stored.shape) != (size,)):
            raise _Declined(f"the {what} of {named(norm)} is no constant vector")
        if stored is not None and stored.dtype != value(given["x"]).dtype:
            raise _Declined(f"{named(norm)} has a {what} of another dtype")
    linears = []
    component = of[norm]
    if component.makers() != [norm]:
        raise _Declined(
            f"what {named(norm)} returns is added to something, with a weight for each channel, which no rotation "
            "commutes with (a post-norm model)"
        )
    for node, user in component.readers():
        if user.target is not LINEAR or not _only(user, node, "x"):
            reads = "it is an output of the model" if user.op == "output" else f"{named(user)} reads it"
            raise _Declined(f"of what {named(norm)} returns, {reads}; only linear layers take its weight and rotation")
        linears.append(user)
    return linears


def _table(view: GraphView, embedding: Node, component: _Component, reading: list[Node]) -> list[Node]:
    """The linear layers that are tied to an embedding's table. Raises _Declined where anything else reads it."""
    weight = arguments(embedding)["weight"]
    stored = constant(view, weight)
    if stored is None:
        raise _Declined(f"the table of {named(embedding)} is no constant")

    def same(node: Any) -> bool:
        other = constant(view, owner(node))
        return other is not None and other.data_ptr() == stored.data_ptr() and other.shape == stored.shape

    inside = set(component.members)
    tables = [n for n in view.graph.find_nodes(op="call_function", target=EMBEDDING, sort=False) if same(n.args[0])]
    linears = [n for n in reading if same(arguments(n)["weight"])]
    if not inside.issuperset(tables) or readers(view, weight) != len(tables) + len(linears):
        raise _Declined(f"the table of {named(embedding)} is read elsewhere too")
    return linears


def _check_linear(view: GraphView, linear: Node, turned: Turned) -> None:
    given = arguments(linear)
    if constant(view, given["weight"]) is None:
        raise _Declined(f"the weight of {named(linear)} is computed, not a constant")
    if not turned.tied and readers(view, given["weight"]) != 1:
        raise _Declined(f"the weight of {named(linear)} is read elsewhere too, and tied weights stay tied")
    if given["bias"] is not None and constant(view, given["bias"]) is None:
        raise _Declined(f"the bias of {named(linear)} is computed, not a constant")


# --------------------------------------------------------------------------------------------------------------- heads


def _find_heads(view: GraphView, plan: Plan) -> None:
    groups = [group for group in find_groups(view) if len(group.linears) == 1]
    for group in groups:
        attention = group.x
        path: list[Node] = []
        while _moves(attention):
            path.append(attention)
            attention = attention.args[0]  # type: ignore[assignment]
        if attention.op != "call_function" or attention.target not in ATTENTIONS:
            continue
        linear, name = group.linears[0], named(attention)
        try:
            fold = find_fold(view, group)
            if isinstance(fold, str) or fold.kind != "linear":
                raise _Declined(fold if isinstance(fold, str) else fold.reason or "a norm makes its values")
            v = find_projection(arguments(attention)["v"])
            if isinstance(v, str):
                raise _Declined(v)
            if v.linear is not fold.source or not v.plain:
                raise _Declined("its values are no plain projection")
            columns = _columns(attention, path[::-1])
            _check_linear(view, v.linear, Turned())
        except _Declined as stop:
            plan.declined[f"the values of {name}"] = str(stop)
            continue
        count, size = v.rows.shape
        shared = columns.shape[0] // count
        heads = torch.arange(columns.shape[0]) // shared
        if not torch.equal(fold.channels[columns], v.rows[heads]):
            plan.declined[f"the values of {name}"] = "its heads do not arrive in order at the output projection"
            continue
        plan.sizes[name] = (count, size)
        plan.of(v.linear).rows = Side(name, v.rows, torch.arange(count))
        plan.of(linear).columns = Side(name, columns, heads)


def _moves(node: Node) -> bool:
    name = node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""
    moved = name in _SAME_LAST or name in ("aten::transpose", "aten::permute", "aten::flatten", "aten::movedim")
    return node.op == "call_function" and (moved or is_identity(node) or is_cast(node))


def _columns(attention: Node, path: list[Node]) -> Tensor:
    """(H, D): which column of the output projection each channel of each query head is. Raises _Declined."""

    def known(item: Any) -> Any:
        return item.node.hint if isinstance(item, torch.SymInt) else item

    batch, heads, length, size = (known(one) for one in value(attention).shape)
    numbers = torch.arange(heads * size).reshape(1, heads, 1, size).expand(batch, heads, length, size)
    current: Any = numbers
    for node in path:
        if is_identity(node) or is_cast(node):
            continue
        args, kwargs = torch.fx.map_arg(
            (node.args, node.kwargs),
            lambda item, node=node, current=current: current if item is node.args[0] else known(value(item)),  # type: ignore[misc]
        )
        current = node.target(*args, **kwargs)  # type: ignore[operator]
    rows = current.reshape(-1, current.shape[-1])
    if rows.shape[0] != batch * length or rows.shape[1] != heads * size or not bool((rows == rows[:1]).all()):
        raise _Declined("its heads do not stay together on the way to the output projection")
    return rows[0].argsort().reshape(heads, size)
