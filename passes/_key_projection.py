"""Which rows of which linear layer an attention's queries, keys or values are, and what stands between."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx

from ..runtime.ops import OPS
from .base import Builder, SiteContext
from .site import get_site
from .view import GraphView, arguments, is_identity, value

Node = torch.fx.Node
aten = torch.ops.aten

_MOVES = frozenset(
    f"aten::{name}"
    for name in (
        "view reshape _unsafe_view unflatten flatten transpose permute movedim contiguous clone alias slice select "
        "split split_with_sizes chunk unbind unsqueeze squeeze expand t"
    ).split()
)
_LINEAR = OPS["linear"].overload
_ROPE = OPS["rope"].overload
_NORM = OPS["rms_norm"].overload


@dataclass(frozen=True)
class Projection:
    """A tensor (B, H, L, D) of an attention as moved, normalised and turned rows of one linear layer.

    linear: the layer's node. rows: int64 (H, D), the layer's output channel that each channel is (before norm and
    rotation). rope: the rotation's node, or None; rotary: how many leading channels it turns. norm: the RMS norm's
    node, or None. between: the nodes from after ``linear`` up to the tensor, in graph order.
    """

    linear: Node
    rows: torch.Tensor
    rope: Node | None
    rotary: int
    norm: Node | None
    between: tuple[Node, ...] = field(repr=False)

    @property
    def x(self) -> Node:
        """What is projected, (B, L, C) or (B * L, C)."""
        return arguments(self.linear)["x"]

    @property
    def weight(self) -> Node:
        return arguments(self.linear)["weight"]

    @property
    def bias(self) -> Node | None:
        return arguments(self.linear)["bias"]

    @property
    def plain(self) -> bool:
        """Whether nothing but moves stands between."""
        return self.rope is None and self.norm is None

    def replay(self, builder: Builder, linear: Node) -> Node:
        """The tensor again, from another node of the layer's shape."""
        copies: dict[Node, Node] = {self.linear: linear}
        for node in self.between:
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: copies.get(n, n))
            copies[node] = builder.call(node.target, *args, **kwargs)
        return copies[self.between[-1]] if self.between else linear


def find_projection(tensor: Node) -> Projection | str:
    """The projection that an attention's argument ``tensor`` (B, H, L, D) comes from, or the reason there is none.

    The way between is followed on channel numbers: whatever views, splits and permutations stand there, the numbers
    that arrive say which row each channel is, and that tokens stayed where they were.
    """
    between: set[Node] = set()
    linears: set[Node] = set()
    stack = [tensor]
    while stack:
        node = stack.pop()
        if node in between or node in linears:
            continue
        if node.target is _LINEAR:
            linears.add(node)
            continue
        name = node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""
        if node.target is _ROPE or node.target is _NORM or name in _MOVES or is_identity(node):
            stack.append(_source(node))
        elif node.target is operator.getitem:
            stack.append(_source(node))
        elif node.target is aten.cat.default:
            stack.extend(_source(node))
        elif node.op == "placeholder":
            return f"it comes from the input {node}, not from a linear layer"
        else:
            what = name.rpartition("::")[2] or str(node.target)
            return f"{what} stands between the projection and the dot product, which is neither RoPE nor an RMS norm"
        between.add(node)
    if len(linears) != 1:
        return f"it is put together from {len(linears)} linear layers"
    linear = next(iter(linears))
    return _follow(tensor, linear, tuple(sorted(between)))


def _follow(tensor: Node, linear: Node, between: tuple[Node, ...]) -> Projection | str:
    """Evaluate the nodes between on channel numbers."""
    sizes = [_hint(size) for size in value(linear).shape]
    if any(size is None for size in (*sizes, *map(_hint, value(tensor).shape))):
        return "its sizes are not known"
    channels = sizes[-1]
    tokens = 1
    for size in sizes[:-1]:
        tokens *= size
    # Three numbers travel with every element: where it came from, its place in the rotation and in the norm (from 1).
    origin = torch.arange(tokens * channels).reshape(sizes)
    env: dict[Node, Any] = {linear: [origin, torch.zeros_like(origin), torch.zeros_like(origin)]}
    rope = norm = None
    for node in between:
        if node.target is _ROPE or node.target is _NORM:
            source = env[_source(node)]
            at = 1 if node.target is _ROPE else 2
            if bool(source[1].any()):
                return "it is turned twice" if at == 1 else "it is normalised after RoPE turned it"
            if (rope if at == 1 else norm) not in (None, node) or (at == 2 and norm is not None):
                return "its channels are turned or normalised in several parts"
            if at == 1:
                rope = node
            else:
                norm = node
            width = source[0].shape[-1]
            marked = list(source)
            marked[at] = torch.arange(1, width + 1).expand(source[0].shape)
            env[node] = marked
            continue
        try:
            env[node] = _moved(node, env)
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            return f"its way from the projection cannot be followed: {str(error).splitlines()[0]}"
    origin, turned, normed = env[tensor]
    if origin.dim() != 4 or origin.numel() == 0:
        return "it has no elements"
    batch, heads, length, dim = origin.shape
    rows = origin[0, :, 0] % channels
    token = torch.arange(batch * length).reshape(batch, 1, length, 1)
    if batch * length != tokens or not torch.equal(origin, token * channels + rows[None, :, None]):
        return "its tokens or channels do not stay in order between the projection and the dot product"
    rotary = int((turned > 0).sum(-1).max()) if rope is not None else 0
    places = torch.arange(1, dim + 1)
    if not torch.equal(turned, torch.where(places <= rotary, places, 0).expand(turned.shape)):
        return "RoPE turns other channels than the first of each head"
    if norm is not None and not torch.equal(normed, places.expand(normed.shape)):
        return "its norm is taken over several heads together, or over a part of one"
    return Projection(linear, rows.clone(), rope, rotary, norm, between)


def _moved(node: Node, env: dict[Node, Any]) -> Any:
    """One move of the three numbers of each element."""

    def known(number: int) -> Callable[[Node], Any]:
        def one(item: Node) -> Any:
            if item in env:
                found = env[item]
                return [part[number] for part in found] if isinstance(found, tuple) else found[number]
            return _hint(value(item))

        return one

    results = []
    for number in range(3):
        args: Any = torch.fx.map_arg(node.args, known(number))
        kwargs: Any = torch.fx.map_arg(node.kwargs, known(number))
        if is_identity(node):
            result = args[0]
        else:
            result = _function(node)(*args, **kwargs)
        results.append(result)
    if isinstance(results[0], tuple | list):
        return tuple([part[i] for part in results] for i in range(len(results[0])))
    return results


def _source(node: Node) -> Any:
    """The first argument: what a move moves."""
    return node.args[0]


def _function(node: Node) -> Any:
    return node.target


def _hint(size: Any) -> Any:
    """A symbolic size as the number it was traced with; None when unknown."""
    if isinstance(size, torch.SymInt):
        return size.node.hint
    return size


def constant(view: GraphView, node: Any) -> torch.Tensor | None:
    """The value of a node that only parameters and buffers of the graph decide, or None."""
    if not isinstance(node, Node):
        return None
    if node.op == "get_attr":
        found: Any = view.module
        for part in str(node.target).split("."):
            found = getattr(found, part)
        return found.detach() if isinstance(found, torch.Tensor) else None
    if node.op != "call_function" or not (is_identity(node) or node.target in (aten.t.default, aten.transpose.int)):
        return None
    source = constant(view, node.args[0])
    if source is None or is_identity(node):
        return source
    moved: torch.Tensor = _function(node)(source, *node.args[1:])
    return moved


def owner(node: Any) -> Node | None:
    """The parameter behind a weight, through transposes and casts."""
    while isinstance(node, Node) and node.op == "call_function" and node.args:
        node = node.args[0]
    return node if isinstance(node, Node) and node.op == "get_attr" else None


def uses(site: SiteContext, weight: Node) -> int:
    """How many linear layers of the graph compute with the parameter behind ``weight``, under any of its names."""
    mine = constant(site.view, owner(weight))
    if mine is None:
        return 1
    place = mine.data_ptr(), mine.shape
    count = 0
    for node in site.view.graph.find_nodes(op="call_function", target=_LINEAR, sort=False):
        other = constant(site.view, owner(arguments(node)["weight"]))
        count += other is not None and (other.data_ptr(), other.shape) == place
    return count


def users_of(site: SiteContext, key: Projection) -> str:
    """Which other sites attend to the same keys; empty when none does."""
    tensor = site.arg("k")
    others = []
    for other in tensor.users:
        found = get_site(other)
        if other is not site.node and found is not None and arguments(other).get("k") is tensor:
            others.append(found.id)
    return " and ".join(others)


def source_linear(x: Node) -> Node | None:
    """The linear layer whose output ``x`` is, through norms, splits and moves; None where something else stands."""
    node: Any = x
    while isinstance(node, Node) and node.op == "call_function":
        if node.target is _LINEAR:
            return node
        name = node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""
        if not (node.target is _NORM or name in _MOVES or is_identity(node) or node.target is operator.getitem):
            return None
        node = node.args[0]
    return None
