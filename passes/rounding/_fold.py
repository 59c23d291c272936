"""Where a scale of the input channels of linear layers can go without changing the function.

Linear layers that read one tensor ``x`` (..., K) form a *group*. With a positive vector ``s`` (K,)

    linear(x, W) = linear(x / s, W * s)          W * s: column k of W times s[k]

and ``x / s`` costs nothing where what makes ``x`` can take the division into a constant of its own:

    norm     the weight (and bias) of an RMS or layer norm
    linear   the rows (and bias) of a linear layer, where only what keeps channels apart and commutes with a positive
             factor of each stands between: moves of elements, casts, dropout that is off, relu, factors that are
             numbers, the ``up`` of a gated MLP (``act(gate) * up``), the values of an attention. Query heads that share
             a head of values share its factors: :attr:`Fold.channels` says which channels must.
    input    neither: a ``mul`` in front of the group

The folds for ``norm``, and for ``linear`` through values and ``up``, are those of AWQ ("AWQ: Activation-aware Weight
Quantization", Lin et al. 2023, section 3.2) and of OSTQuant's scaling pairs (Hu et al. 2025, section 3.2).

:func:`find_groups` finds groups, :func:`find_fold` says where a group's factors go and :func:`apply_fold` edits the
graph. Constants of the graph may be shared with the user's model or read elsewhere: none is written into. New ones are
registered, and only the nodes concerned read them (:func:`set_constant`). What is read by more than one node (a head
tied to the embedding, layers that share weights) is not scaled, since that would untie it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Number
from typing import Any

import torch
import torch.fx
from torch import Tensor

from ...runtime.ops import OPS
from .._key_projection import constant, owner
from ..base import Builder
from ..site import get_site
from ..view import GraphView, arguments, is_assertion, is_cast, is_identity, value

Node = torch.fx.Node
aten = torch.ops.aten

LINEAR = OPS["linear"].overload
NORMS = (OPS["rms_norm"].overload, OPS["layer_norm"].overload)
_MOVES = frozenset(
    f"aten::{name}"
    for name in (
        "view reshape _unsafe_view unflatten flatten transpose permute movedim contiguous clone alias slice select "
        "split split_with_sizes chunk unbind unsqueeze squeeze expand t"
    ).split()
)
_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_BY_NUMBERS = (aten.mul.Tensor, aten.div.Tensor)
_CHANNELWISE = {OPS["gated_mlp"].overload: "up", OPS["attention"].overload: "v"}
"""Ops whose result is, channel by channel, a linear function of one argument: which one."""


@dataclass(frozen=True)
class Group:
    """Linear layers that read one tensor. x: the node they share; linears: in graph order."""

    x: Node
    linears: tuple[Node, ...]

    @property
    def width(self) -> int:
        """K, the number of input channels."""
        return int(value(self.x).shape[-1])


@dataclass(frozen=True)
class Fold:
    """Where the factors of a group's input channels go.

    kind: ``norm``, ``linear`` or ``input``, as the module says. source: the norm's or linear layer's node; None for
    ``input``. channels: int64 (K,), which of the source's channels each input channel is; equal numbers must get equal
    factors. reason: for ``input``, why nothing takes the factors.
    """

    group: Group
    kind: str
    source: Node | None
    channels: Tensor = field(repr=False)
    reason: str = ""

    def shared(self, statistic: Tensor, reduce: str = "amax") -> Tensor:
        """``statistic`` (K,) made equal over input channels that must share a factor: their maximum, or "mean"."""
        count = int(self.channels.max()) + 1
        place = self.channels.to(statistic.device)
        pooled = statistic.new_zeros(count).scatter_reduce(0, place, statistic, reduce, include_self=False)
        return pooled[place]

    def divisor(self, scale: Tensor) -> Tensor:
        """What each channel of the source is divided by for a ``scale`` (K,) of the inputs; 1 for other channels."""
        size = int(_hint(value(self.source).shape[-1]))
        return scale.new_ones(size).index_copy(0, self.channels.to(scale.device), scale)


def find_groups(view: GraphView) -> list[Group]:
    """All groups of the graph, in its order. A linear layer that shares its input with no other is a group of one."""
    groups: dict[Node, list[Node]] = {}
    for node in view.graph.nodes:
        if node.op == "call_function" and node.target is LINEAR:
            groups.setdefault(_shared_input(arguments(node)["x"]), []).append(node)
    return [Group(x, tuple(linears)) for x, linears in groups.items()]


def find_fold(view: GraphView, group: Group) -> Fold | str:
    """Where the factors of ``group`` go, or the reason that its columns must not be scaled at all."""
    for linear in group.linears:
        name = _name(linear)
        weight = arguments(linear)["weight"]
        if constant(view, weight) is None:
            return f"the weight of {name} is computed, not a constant"
        if readers(view, weight) != 1:
            return f"the weight of {name} is read elsewhere too, and tied weights stay tied"
    own = torch.arange(group.width)
    try:
        source, path = _walk_back(group.x)
        channels = _arrive(source, path, group.x)
        _check_constants(view, source)
        _check_readers(source, path, channels, group)
    except _NotFoldable as stop:
        return Fold(group, "input", None, own, str(stop))
    return Fold(group, "norm" if source.target in NORMS else "linear", source, channels)


def apply_fold(view: GraphView, fold: Fold, scale: Tensor) -> list[Node]:
    """Divide the group's input by ``scale`` where ``fold`` says, and multiply the columns of its weights.

    scale: (K,), positive, equal where ``fold.channels`` is; float64 keeps most. The new constants have the dtypes of
    the old ones. Returns the nodes inserted for ``input``; recompile the module when all folds are done.
    Raises ValueError for a scale that breaks this.
    """
    scale = scale.detach().double()
    if not bool((scale > 0).all()) or not bool(scale.isfinite().all()):
        raise ValueError("a scale must be positive and finite")
    if not torch.equal(fold.shared(scale), scale):
        raise ValueError("input channels that are one channel of the source must share their factor")
    inserted: list[Node] = []
    if fold.kind == "input":
        inserted = _insert(view, fold.group, scale)
    else:
        _scale_source(view, fold, scale)
    for linear in fold.group.linears:
        weight = constant(view, arguments(linear)["weight"])
        assert weight is not None
        set_constant(view, linear, "weight", (weight.double() * scale).to(weight.dtype))
    return inserted


def set_constant(view: GraphView, node: Node, argument: str, tensor: Tensor) -> Node:
    """Let the argument of that name of ``node`` read ``tensor``, registered as a new constant. Returns its node."""
    old = arguments(node)[argument]
    made = Builder(view, node).constant(f"{_name(node)}_{argument}", tensor.contiguous())
    index = [a.name for a in node.target._schema.arguments].index(argument)  # type: ignore[union-attr]
    if argument in node.kwargs or index >= len(node.args):
        node.update_kwarg(argument, made)
    else:
        node.update_arg(index, made)
    view.insert(node)
    while isinstance(old, Node) and not old.users and old.op in ("get_attr", "call_function"):
        behind = old.args[0] if old.args else None
        view.erase(old)
        old = behind
    return made


def readers(view: GraphView, weight: Node) -> int:
    """How many nodes read the parameter behind ``weight``, under any of its names; casts and transposes are no readers.

    A head tied to the embedding has two.
    """
    mine = owner(weight)
    stored = constant(view, mine)
    if stored is None:
        return 0
    count = 0
    for node in view.graph.find_nodes(op="get_attr", sort=False):
        other = constant(view, node)
        if other is not None and other.data_ptr() == stored.data_ptr():
            count += _reads(node)
    return count


def _reads(node: Node) -> int:
    """Nodes that compute with ``node`` or with a transpose, cast or copy of it."""
    count = 0
    for user in node.users:
        same = is_identity(user) or is_cast(user) or user.target in (aten.t.default, aten.transpose.int)
        count += 0 if is_assertion(user) else _reads(user) if same else 1
    return count


class _NotFoldable(Exception):
    """Why factors cannot go on towards where the input comes from."""


def _name(node: Node) -> str:
    site = get_site(node)
    return site.id if site is not None else node.name


def _shared_input(x: Node) -> Node:
    """What linear layers share though each may have reshaped it: ``x`` before copies and views that keep channels."""
    while x.op == "call_function" and x.args and isinstance(x.args[0], Node):
        before, after = value(x.args[0]), value(x)
        keeps = x.target in _RESHAPES and _last(before) == _last(after)
        if not (is_identity(x) or keeps):
            break
        x = x.args[0]
    return x


def _last(tensor: Any) -> Any:
    size = tensor.shape[-1] if isinstance(tensor, Tensor) and tensor.dim() else None
    return size if isinstance(size, int) else object()


def _through(node: Node) -> Node | None:
    """The argument that ``node`` hands on, each channel times a positive number or as it is; None for other nodes."""
    if node.op != "call_function":
        return None
    if node.target in _CHANNELWISE:
        source = arguments(node)[_CHANNELWISE[node.target]]
    elif node.target in _BY_NUMBERS and isinstance(node.args[1], Number):
        source = node.args[0]
    else:
        name = node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""
        cast = is_cast(node) and value(node).dtype.is_floating_point
        moves = name in _MOVES or node.target is operator.getitem or is_identity(node)
        source = node.args[0] if moves or cast or node.target is aten.relu.default else None
    return source if isinstance(source, Node) else None


def _walk_back(x: Node) -> tuple[Node, list[Node]]:
    """The norm or linear layer behind ``x``, and the nodes between in graph order, ``x`` the last."""
    path: list[Node] = []
    node = x
    while node.target is not LINEAR and node.target not in NORMS:
        before = _through(node)
        if before is None:
            what = node.target if node.op == "call_function" else f"the graph's {node.op}"
            raise _NotFoldable(f"{what} makes the input")
        path.append(node)
        node = before
    if node.target in NORMS and len(arguments(node).get("normalized_shape") or (0,)) != 1:
        raise _NotFoldable("its layer norm is taken over several dimensions")
    return node, path[::-1]


def _numbers(source: Node) -> Tensor:
    """The channel number of every element of the source's result."""
    sizes = [_hint(size) for size in value(source).shape]
    if None in sizes:
        raise _NotFoldable("its sizes are not known")
    return torch.arange(sizes[-1]).expand(sizes).contiguous()


def _step(node: Node, numbers: Any) -> Any:
    """The channel numbers of ``node``'s result from those of what it hands on."""
    if node.target is OPS["attention"].overload:
        heads = _hint(value(node).shape[1])
        numbers = numbers.repeat_interleave(heads // numbers.shape[1], 1)
        length = _hint(value(node).shape[2])
        if not bool((numbers == numbers[:, :, :1]).all()):
            raise _NotFoldable("the values of an attention mix channels and tokens")
        return numbers[:, :, :1].expand(-1, -1, length, -1)
    if is_cast(node) or node.target in (*_CHANNELWISE, *_BY_NUMBERS, aten.relu.default) or is_identity(node):
        if isinstance(shape := value(node), Tensor) and shape.dim() != numbers.dim():
            raise _NotFoldable(f"{node} broadcasts the input")
        return numbers
    handed = _through(node)
    args, kwargs = torch.fx.map_arg(
        (node.args, node.kwargs), lambda item: numbers if item is handed else _hint(value(item))
    )
    try:
        return node.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        raise _NotFoldable(f"its way through {node} cannot be followed: {str(error).splitlines()[0]}") from error


def _hint(size: Any) -> Any:
    """A symbolic size as the number it was traced with; None when unknown."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def _arrive(source: Node, path: Sequence[Node], x: Node) -> Tensor:
    """(K,): the source's channel that each channel of ``x`` is. Raises when tokens differ in that."""
    if not path:
        return torch.arange(int(value(x).shape[-1]))
    numbers: Any = _numbers(source)
    for node in path:
        numbers = _step(node, numbers)
    rows = numbers.reshape(-1, numbers.shape[-1])
    if rows.shape[0] == 0 or rows.shape[1] != _hint(value(x).shape[-1]) or not bool((rows == rows[:1]).all()):
        raise _NotFoldable("the source's channels do not stay the last dimension")
    return rows[0].clone()


def _check_constants(view: GraphView, source: Node) -> None:
    named = arguments(source)
    for what in ("weight", "bias"):
        node = named.get(what)
        if node is None:
            continue
        stored = constant(view, node)
        if stored is None:
            raise _NotFoldable(f"the {what} of {_name(source)} is computed, not a constant")
        if source.target is LINEAR and readers(view, node) != 1:
            raise _NotFoldable(f"the {what} of {_name(source)} is read elsewhere too, and tied weights stay tied")
        if source.target in NORMS and tuple(stored.shape) != (_hint(value(source).shape[-1]),):
            raise _NotFoldable(f"the {what} of {_name(source)} is no vector")


def _check_readers(source: Node, path: Sequence[Node], channels: Tensor, group: Group) -> None:
    """Raise unless all that reads a scaled channel of the source leads to the group."""
    scaled = set(channels.tolist())
    members, on_path = set(group.linears), set(path)
    whole = len(scaled) == _hint(value(source).shape[-1])

    def check(node: Node, numbers: Any) -> None:
        for user in node.users:
            if is_assertion(user) or (user in members and _only(user, node, "x")):
                continue
            expected = user in on_path and user.target in _CHANNELWISE and _only(user, node, _CHANNELWISE[user.target])
            moved = user.target not in _CHANNELWISE and _through(user) is node and len(_uses(user, node)) == 1
            if expected or moved:
                check(user, None if whole else _step(user, numbers))
            elif whole or not scaled.isdisjoint(_flat(numbers)):
                raise _NotFoldable(f"{_name(user) if user.op != 'output' else 'the output'} reads it too")

    check(source, None if whole else _numbers(source))


def _only(user: Node, node: Node, argument: str) -> bool:
    return arguments(user)[argument] is node and len(_uses(user, node)) == 1


def _uses(user: Node, node: Node) -> list[Node]:
    found: list[Node] = []
    torch.fx.map_arg((user.args, user.kwargs), lambda item: found.append(item) if item is node else None)
    return found


def _flat(numbers: Any) -> Iterable[int]:
    parts = numbers if isinstance(numbers, tuple | list) else [numbers]
    return {int(number) for part in parts for number in part.unique()}


def _scale_source(view: GraphView, fold: Fold, scale: Tensor) -> None:
    source = fold.source
    assert source is not None
    named = arguments(source)
    divisor = fold.divisor(scale)
    if source.target is LINEAR:
        weight = constant(view, named["weight"])
        assert weight is not None
        set_constant(view, source, "weight", (weight.double() / divisor[:, None]).to(weight.dtype))
    else:
        weight, offset = constant(view, named["weight"]), named.get("weight_offset", 0.0)
        if weight is None:
            weight = torch.ones_like(divisor, dtype=value(source).dtype) - offset
        folded = (weight.double() + offset) / divisor - offset
        set_constant(view, source, "weight", folded.to(weight.dtype))
    bias = constant(view, named.get("bias"))
    if bias is not None:
        set_constant(view, source, "bias", (bias.double() / divisor).to(bias.dtype))


def _insert(view: GraphView, group: Group, scale: Tensor) -> list[Node]:
    """A ``mul`` in front of each tensor that the group's members read: one, unless they reshape it apart."""
    inserted: dict[Node, Node] = {}
    for linear in group.linears:
        x = arguments(linear)["x"]
        if x not in inserted:
            builder = Builder(view, linear)
            factor = builder.constant(f"{_name(linear)}_input_scale", (1 / scale).to(value(x).dtype))
            inserted[x] = builder.call(aten.mul.Tensor, x, factor)
        linear.update_arg(0, inserted[x])
        view.insert(linear)
    return list(inserted.values())
