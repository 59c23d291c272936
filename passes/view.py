"""A networkx view of a torch.fx graph, and the schema-aware reading of its nodes."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import networkx as nx
import torch
import torch.fx


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


class GraphView:
    """The data-flow DAG of one graph module: nodes are fx nodes, edges run from producer to user.

    Built once and kept while rules only read; call :meth:`refresh` after the graph was edited.
    """

    def __init__(self, module: torch.fx.GraphModule) -> None:
        self.module = module

    @property
    def graph(self) -> torch.fx.Graph:
        return self.module.graph

    @cached_property
    def dag(self) -> nx.DiGraph:
        dag: nx.DiGraph = nx.DiGraph()
        for node in self.graph.nodes:
            dag.add_node(node)
            dag.add_edges_from((producer, node) for producer in node.all_input_nodes)
        return dag

    @cached_property
    def position(self) -> dict[torch.fx.Node, int]:
        """Node -> its place in the graph's order, to sort by."""
        return {node: index for index, node in enumerate(self.graph.nodes)}

    def refresh(self) -> None:
        for name in ("dag", "position"):
            self.__dict__.pop(name, None)

    def escaping(self, covered: Iterable[torch.fx.Node], root: torch.fx.Node) -> torch.fx.Node | None:
        """A covered node other than the root that something outside the cover uses, or None.

        Assertions about tensor metadata do not count as users: they compute nothing.
        """
        inside = set(covered) | {root}
        for node in inside - {root}:
            for user in self.dag.successors(node):
                if user not in inside and not is_assertion(user):
                    return node
        return None


def is_assertion(node: torch.fx.Node) -> bool:
    """Whether the node only checks (``_assert_tensor_metadata`` and its like) and computes nothing."""
    return node.op == "call_function" and "_assert" in str(node.target)
