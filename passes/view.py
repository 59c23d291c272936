"""A networkx view of a torch.fx graph, and the schema-aware reading of its nodes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import networkx as nx
import torch
import torch.fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.multiprocessing.reductions import StorageWeakRef

aten = torch.ops.aten


def arguments(node: torch.fx.Node) -> dict[str, Any]:
    """The node's arguments by schema name, defaults filled in. Empty for a node that is not an operator call."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return {}
    values: dict[str, Any] = {}
    for index, argument in enumerate(node.target._schema.arguments):
        if argument.name in node.kwargs:
            values[argument.name] = node.kwargs[argument.name]
        elif not argument.kwarg_only and index < len(node.args):
            values[argument.name] = node.args[index]
        elif argument.has_default_value():
            values[argument.name] = argument.default_value
    return values


def value(node: Any) -> Any:
    """The fake tensor or symbolic int a node stands for (its ``meta["val"]``); a non-node is its own value."""
    return node.meta.get("val") if isinstance(node, torch.fx.Node) else node


_CASTS = frozenset(
    {
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.to.device,
        aten.to.other,
        aten.type_as.default,
        aten._to_copy.default,
    }
)
_COPIES = frozenset({aten.alias.default, aten.contiguous.default, aten.clone.default, aten.lift_fresh_copy.default})
_RESHAPES = frozenset(
    {
        aten.slice.Tensor,
        aten.expand.default,
        aten.expand_as.default,
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.repeat.default,
    }
)
_DROPOUTS = frozenset({aten.dropout.default, aten.feature_dropout.default})


def is_cast(node: Any) -> bool:
    """Whether ``node`` converts the dtype of its first argument, or could and does not (``x.to(x.dtype)``)."""
    return isinstance(node, torch.fx.Node) and node.target in _CASTS


def is_identity(node: Any) -> bool:
    """Whether ``node`` has the values, shape and dtype of its first argument.

    Casts to the same dtype, copies, reshapes to the same shape, full-range slices and dropout that is not active.
    A detach is none: gradients differ.
    """
    if not isinstance(node, torch.fx.Node) or node.op != "call_function":
        return False
    target = node.target
    if target in _COPIES:
        return True
    if target in _DROPOUTS:
        given = arguments(node)
        return given.get("p") == 0 or given.get("train") is False
    if target not in _CASTS and target not in _RESHAPES:
        return False
    before, after = value(node.args[0]), value(node)
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    if target in _CASTS:
        return before.dtype == after.dtype and before.device == after.device
    if target is aten.slice.Tensor and arguments(node)["step"] != 1:
        return False
    return same_sizes(before.shape, after.shape)


def peel(item: Any) -> Any:
    """What is behind a chain of identities."""
    while is_identity(item):
        item = item.args[0]
    return item


def same_sizes(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Whether two shapes are provably equal. Symbolic sizes are compared as expressions: no guard is added."""
    return len(left) == len(right) and all(map(same_size, left, right))


def same_size(left: Any, right: Any) -> bool:
    """Whether two sizes (int or SymInt) are provably equal, without adding a guard."""
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    if _size(left) == _size(right):
        return True
    return bool(statically_known_true(left == right))


def _size(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Dtype, device, sizes and strides (symbolic ones as expressions): hashable, and comparing adds no guard."""
    return tensor.dtype, tensor.device, tuple(map(_size, tensor.shape)), tuple(map(_size, tensor.stride()))


def signature(item: Any) -> Any:
    """What shape inference can see of a call's argument: a tensor's layout, any other value itself."""
    if isinstance(item, torch.Tensor):
        return torch.Tensor, item.requires_grad, layout(item)
    if isinstance(item, list | tuple):
        return tuple(map(signature, item))
    return type(item), item.node.expr if isinstance(item, torch.SymInt | torch.SymFloat | torch.SymBool) else item


def _storage(node: torch.fx.Node) -> Any:
    """What tells tensors that share memory, or None when unknown."""
    val = value(node)
    return StorageWeakRef(val.untyped_storage()) if isinstance(val, torch.Tensor) else None


def _writes(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


class GraphView:
    """The data-flow DAG of one graph module: nodes are fx nodes, edges run from producer to user.

    The networkx graph is built when first asked for and then kept up to date by :meth:`insert`, :meth:`replace` and
    :meth:`erase`; after edits that went around these, call :meth:`refresh`. Order in the graph is fx's own: nodes
    compare with ``<``.
    """

    def __init__(self, module: torch.fx.GraphModule) -> None:
        self.module = module
        self.results: dict[Any, Any] = {}
        """Fake results of canonical ops already inferred, by :func:`signature` of the call."""

    @property
    def graph(self) -> torch.fx.Graph:
        return self.module.graph

    @cached_property
    def dag(self) -> nx.DiGraph:
        dag: nx.DiGraph = nx.DiGraph()
        dag.add_nodes_from(self.graph.nodes)
        dag.add_edges_from((producer, node) for node in self.graph.nodes for producer in node.all_input_nodes)
        return dag

    @cached_property
    def autocast(self) -> dict[torch.fx.Node, tuple[Any, ...]]:
        """The nodes inside autocast regions of the graph -> (device type, dtype, enabled, cache) of the innermost."""
        regions: list[torch.fx.Node] = []
        found = {}
        for node in self.graph.nodes:
            if node.target is torch.amp.autocast_mode._enter_autocast:
                regions.append(node)
            elif node.target is torch.amp.autocast_mode._exit_autocast:
                regions.remove(node.args[0])
            elif regions:
                found[node] = regions[-1].args
        return found

    def running_as(self, node: torch.fx.Node) -> contextlib.AbstractContextManager[Any]:
        """The autocast that is in force at ``node``, to infer dtypes in."""
        if node not in self.autocast:
            return contextlib.nullcontext()
        device, dtype, enabled, cache = self.autocast[node]
        return torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache)

    def modified(self, covered: Iterable[torch.fx.Node], root: torch.fx.Node) -> torch.fx.Node | None:
        """A node that modifies in place what ``covered`` reads or makes, while it is computed, or None.

        Moving the whole computation to ``root`` would read other values then.
        """
        if not self._mutating:
            return None
        inside = {*covered, root}
        first = min(inside)
        between = [node for node in self._mutating if first < node < root and node not in inside]
        if not between:
            return None
        storages = {_storage(tensor) for node in inside for tensor in (node, *node.all_input_nodes)}
        storages.discard(None)
        for node in between:
            written = [
                arg for arg, info in zip(node.args, node.target._schema.arguments, strict=False) if _writes(info)
            ]
            # An unknown storage may be any.
            memory = [_storage(arg) if isinstance(arg, torch.fx.Node) else None for arg in written]
            if any(storage is None or storage in storages for storage in memory):
                return node
        return None

    @cached_property
    def _mutating(self) -> list[torch.fx.Node]:
        targets = ((node, node.target) for node in self.graph.nodes if node.op == "call_function")
        # detach_ changes what autograd knows, not the values.
        return [
            node
            for node, target in targets
            if getattr(getattr(target, "_schema", None), "is_mutable", False) and target._opname != "detach_"
        ]

    def refresh(self) -> None:
        for name in ("dag", "autocast", "_mutating"):
            self.__dict__.pop(name, None)

    def insert(self, node: torch.fx.Node) -> None:
        """Tell the view of a node that was added to the graph, or whose arguments were changed."""
        if node not in self.autocast and node.next in self.autocast:
            self.autocast[node] = self.autocast[node.next]
        if "dag" in self.__dict__:
            self.dag.add_node(node)
            self.dag.remove_edges_from(list(self.dag.in_edges(node)))
            self.dag.add_edges_from((producer, node) for producer in node.all_input_nodes)

    def replace(self, old: torch.fx.Node, new: torch.fx.Node) -> None:
        """Let every user of ``old`` except ``new`` read ``new`` instead."""
        for user in old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new):
            self.insert(user)

    def erase(self, node: torch.fx.Node) -> None:
        """Remove a node that nothing uses."""
        if "dag" in self.__dict__ and node in self.dag:
            self.dag.remove_node(node)
        self.autocast.pop(node, None)
        if node in self._mutating:
            self._mutating.remove(node)
        self.graph.erase_node(node)

    def escaping(self, covered: Iterable[torch.fx.Node], root: torch.fx.Node) -> torch.fx.Node | None:
        """The first covered node other than the root that something outside the cover uses, or None.

        Assertions about tensor metadata do not count as users: they compute nothing.
        """
        inside = set(covered) | {root}
        leaks = (
            node
            for node in inside
            if node is not root and any(user not in inside and not is_assertion(user) for user in node.users)
        )
        return min(leaks, default=None)


def is_assertion(node: torch.fx.Node) -> bool:
    """Whether the node only checks a tensor's dtype, device and layout, which rewrites do not change."""
    return node.target is aten._assert_tensor_metadata.default
