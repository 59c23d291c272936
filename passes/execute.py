"""Run a captured graph eagerly, looking at or replacing the values of single nodes on the way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

Node = torch.fx.Node


@dataclass(frozen=True)
class Hook:
    """Runs after a node: ``call(values of needs, the node's own value)`` returns the value to go on with."""

    needs: tuple[Node, ...]
    call: Callable[[list[Any], Any], Any]


class HookedInterpreter(torch.fx.Interpreter):
    """An interpreter that calls ``hooks[node]`` after computing a node and goes on with what the hook returns."""

    def __init__(self, module: torch.fx.GraphModule, hooks: Mapping[Node, Hook]) -> None:
        super().__init__(module, garbage_collect_values=not hooks)
        self.hooks = hooks
        if hooks:
            self._last_use = _last_uses(module.graph, hooks)

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n in self.hooks:
            hook = self.hooks[n]
            result = hook.call([result if need is n else self.env[need] for need in hook.needs], result)
        if self.hooks:
            # Our own garbage collection: Interpreter's would free values before a hook reads them.
            for dead in self._last_use.get(n, ()):
                self.env.pop(dead, None)
        return result


def _last_uses(graph: torch.fx.Graph, hooks: Mapping[Node, Hook]) -> dict[Node, list[Node]]:
    last: dict[Node, Node] = {}
    for node in graph.nodes:
        for producer in (*node.all_input_nodes, *(hooks[node].needs if node in hooks else ())):
            last[producer] = node
    grouped: dict[Node, list[Node]] = {}
    for producer, user in last.items():
        if user.op != "output":
            grouped.setdefault(user, []).append(producer)
    return grouped


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """No gradients, and the random number generators as they were afterwards."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        yield


def run(module: torch.fx.GraphModule, inputs: Sequence[Any], hooks: Mapping[Node, Hook] | None = None) -> Any:
    """The graph's outputs on flat ``inputs``. Nothing the caller owns is modified: mutated inputs are copied first."""
    inputs = protect(module, inputs)
    with undisturbed(), preserved_state(module):
        return HookedInterpreter(module, hooks or {}).run(*inputs)


def protect(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """Copies of the tensors among ``inputs`` when the graph has any operator that writes in place."""
    if not any(_writes(node) for node in module.graph.nodes):
        return list(inputs)
    # Views make it undecidable here which input is written; parameters are only written by explicit copies.
    return [
        i.detach().clone() if isinstance(i, torch.Tensor) and not isinstance(i, torch.nn.Parameter) else i
        for i in inputs
    ]


@contextlib.contextmanager
def preserved_state(module: torch.fx.GraphModule) -> Iterator[None]:
    """Buffers of a graph that writes in place (batch norm statistics) are as before afterwards."""
    writes = any(_writes(node) for node in module.graph.nodes)
    saved = {name: b.detach().clone() for name, b in module.named_buffers()} if writes else {}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in saved.items():
                module.get_buffer(name).copy_(tensor)


def _writes(node: Node) -> bool:
    return (
        node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    )


def extract(module: torch.fx.GraphModule, wanted: Node, inside: set[Node]) -> tuple[torch.fx.GraphModule, list[str]]:
    """The part of the graph made of ``inside`` nodes that ``wanted`` depends on, as a module of its own.

    Returns the module and the names of the outer nodes its placeholders stand for.
    """
    needed: dict[Node, None] = {}
    stack = [wanted]
    while stack:
        node = stack.pop()
        if node in inside and node not in needed:
            needed[node] = None
            stack.extend(node.all_input_nodes)
    ordered = [node for node in module.graph.nodes if node in needed]
    graph = torch.fx.Graph()
    copies: dict[Node, Node] = {}
    outer: list[Node] = []
    for node in ordered:
        for producer in node.all_input_nodes:
            if producer not in needed and producer not in copies:
                copies[producer] = graph.placeholder(producer.name)
                copies[producer].meta = dict(producer.meta)
                outer.append(producer)
    for node in ordered:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    # A pass may answer with a node that was there before, such as the input itself.
    if wanted not in copies:
        copies[wanted] = graph.placeholder(wanted.name)
        outer.append(wanted)
    graph.output(copies[wanted])
    return torch.fx.GraphModule(module, graph), [node.name for node in outer]
