"""A graph as rows of numbers, which ``_graph_text.jinja`` reads."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
import torch.fx
from torch import Tensor

from .ops import is_canonical
from .plans import SCALAR_TYPES

Node = torch.fx.Node
aten = torch.ops.aten

# As in _graph_text.jinja.
DEFAULT, READ, TAKE, LIST, NONE, WHOLE, TRUTH, DECIMAL, TEXT, TENSOR, DEVICE, WHOLE_TENSOR, DECIMAL_TENSOR = range(13)
TENSORS, OPTIONAL_TENSORS, WHOLES, DECIMALS, TRUTHS = range(5)
CALL, VIEWS = 0, 6
RESHAPE, TRANSPOSE, UNSQUEEZE, PART = range(4)
BUILT_IN: dict[Any, int] = {
    operator.getitem: 1,
    operator.add: 2,
    operator.sub: 3,
    operator.mul: 4,
    operator.floordiv: 5,
}
_ELEMENTS = {"IntType": WHOLES, "SymIntType": WHOLES, "FloatType": DECIMALS, "BoolType": TRUTHS, "TensorType": TENSORS}
_FORMATS = {torch.contiguous_format: 0, torch.preserve_format: 1, torch.channels_last: 2, torch.channels_last_3d: 3}
# Views that C++ computes itself, and where their arguments behind the tensor go.
_VIEWS = {
    aten.view.default: RESHAPE,
    aten.reshape.default: RESHAPE,
    aten.transpose.int: TRANSPOSE,
    aten.unsqueeze.default: UNSQUEEZE,
}


class NotExecutable(Exception):
    """The graph holds something that C++ does not run. Never leaves the executor."""


@dataclass
class Watched:
    """What one run showed of a graph.

    calls: of each canonical op, the kernel op it is and its arguments, nodes where those are tensors.
    same: nodes whose value is that of another. shown: which outputs are tensors. reason: why C++ cannot run it.
    """

    module: torch.fx.GraphModule
    calls: dict[Node, tuple[Any, list[Any], dict[str, Any]]] = field(default_factory=dict)
    same: dict[Node, Node] = field(default_factory=dict)
    shown: list[bool] = field(default_factory=list)
    reason: str | None = None


class Text:
    """A watched graph as ``load_graph`` reads it."""

    def __init__(self, watched: Watched) -> None:
        if watched.reason is not None:
            raise NotExecutable(watched.reason)
        self.texts: list[str] = []
        self.reals: list[float] = []
        self.tensors: list[Tensor] = []
        self.numbers: list[int] = []
        self._watched = watched
        self._names: dict[Any, int] = {}
        self._attributes: dict[str, int] = {}
        nodes = list(watched.module.graph.nodes)
        given = [node for node in nodes if node.op == "placeholder"]
        self._registers = {node: index for index, node in enumerate(given)}
        self._share_views(nodes)
        steps = [node for node in nodes if node.op == "call_function" and not self._needless(node)]
        for node in steps:
            self._registers[node] = len(self._registers)
        self._readers = self._count_readers(steps)
        chains = self._chains(steps)
        inside = {one for chain_ in chains.values() for one in chain_}
        steps = [node for node in steps if node not in inside or node in chains]
        last = self._last_uses(steps, chains)
        dying: dict[Node, set[Node]] = {node: set() for node in steps}
        for one, node in last.items():
            dying[node].add(one)
        body: list[int] = []
        for node in steps:
            body += self._views(chains[node], dying[node]) if node in chains else self._step(node, dying[node])
        (shown,) = nodes[-1].args
        if not isinstance(shown, list | tuple) or not all(one is None or isinstance(one, Node) for one in shown):
            raise NotExecutable("its outputs are no flat list of tensors")
        self.outputs = tuple(watched.shown)
        if any((one is not None) != there for one, there in zip(shown, self.outputs, strict=True)):
            raise NotExecutable("an output is no tensor")
        self.numbers = [len(self._registers), len(given), len(steps), *body, sum(self.outputs)]
        for one in shown:
            if one is not None:
                self.numbers += self._argument(one, None, set())

    def _true(self, node: Any) -> Any:
        while node in self._watched.same:
            node = self._watched.same[node]
        return node

    def _needless(self, node: Node) -> bool:
        if node in self._watched.same:
            return True
        # The dtype of what a kernel made is its own.
        if node.target is not aten._assert_tensor_metadata.default or not isinstance(first := node.args[0], Node):
            return False
        return is_canonical(self._true(first).target)

    def _inputs(self, node: Node) -> list[Node]:
        func_args = self._watched.calls.get(node)
        found: list[Node] = []
        torch.fx.node.map_arg(func_args[1:] if func_args else (node.args, node.kwargs), found.append)
        return [self._true(one) for one in found]

    def _share_views(self, nodes: list[Any]) -> None:
        """Views that equal an earlier one are that one: angles are given a dimension in every layer."""
        known: dict[Any, Node] = {}
        for node in nodes:
            if node.target in _VIEWS and not node.kwargs:
                key = (node.target, repr(torch.fx.node.map_arg(node.args, self._true)))
                if (found := known.setdefault(key, node)) is not node:
                    self._watched.same[node] = found

    def _count_readers(self, steps: list[Any]) -> dict[Node, int]:
        found = dict.fromkeys(self._registers, 0)
        for node in (*steps, self._watched.module.graph.output_node()):
            for one in self._inputs(node):
                found[one] = found.get(one, 0) + 1
        return found

    def _chains(self, steps: list[Any]) -> dict[Any, list[Any]]:
        """Views in a row that nobody else reads, by the last of them. A part of a split begins with that split."""
        chains: dict[Any, list[Any]] = {}
        for node in steps:
            shared = False
            if node.target is operator.getitem:
                before = self._true(node.args[0])
                parts = before.target is aten.split_with_sizes.default and not before.kwargs
                if not parts or any(user.target is not operator.getitem for user in before.users):
                    continue
                chain_ = [before, node]
                shared = len(before.users) > 1
            elif node.target in _VIEWS and not node.kwargs:
                before = node
                chain_ = [node]
            else:
                continue
            source = self._true(before.args[0])
            if not shared and source in chains and self._readers[source] == 1:
                chain_ = chains.pop(source) + chain_
            chains[node] = chain_
        return chains

    def _last_uses(self, steps: list[Any], chains: dict[Any, list[Any]]) -> dict[Node, Node]:
        """Where each value is read last. Values read twice there, and outputs, are in nobody's hands."""
        last: dict[Node, Node] = {}
        for node in steps:
            for one in self._reads(node, chains):
                last[one] = node
        for one in self._watched.module.graph.output_node().all_input_nodes:
            last.pop(self._true(one), None)
        return {one: node for one, node in last.items() if self._reads(node, chains).count(one) == 1}

    def _reads(self, node: Any, chains: dict[Any, list[Any]]) -> list[Node]:
        inside = chains.get(node, [node])
        return [one for each in inside for one in self._inputs(each) if one not in inside]

    def _views(self, chain_: list[Any], dying: set[Node]) -> list[int]:
        """One instruction, and behind it the operators themselves for where a copy or an error is due."""
        base = self._true(chain_[0].args[0])
        ints = [one for node in chain_ for one in self._inputs(node) if one is not base and one not in chain_]
        taken = dying - set(ints)  # sizes are read again by what stands behind
        words = [VIEWS, self._registers[chain_[-1]], 1, *self._argument(base, None, taken)]
        steps: list[int] = []
        count = 0
        for node in chain_:
            schema = None if node.target is operator.getitem else node.target._schema.arguments
            if node.target is aten.split_with_sizes.default:
                continue
            count += 1
            if schema is None:
                split = self._true(node.args[0])
                sizes, dim = split.args[1], split.args[2] if len(split.args) > 2 else 0
                kinds = split.target._schema.arguments[1].type
                steps += [PART, 3, *self._argument(sizes, kinds, set()), WHOLE, dim, WHOLE, node.args[1]]
            else:
                steps += [_VIEWS[node.target], len(node.args) - 1]
                for item, argument in zip(node.args[1:], schema[1:], strict=False):
                    steps += self._argument(item, argument.type, set())
        plain = [word for node in chain_ for word in self._step(node, set())]
        return [*words, count, *steps, len(chain_), *plain]

    def _step(self, node: Node, dying: set[Node]) -> list[int]:
        register = self._registers[node]
        if node.target in BUILT_IN:
            first, second = node.args
            words = [*self._argument(first, None, dying), *self._argument(second, None, dying)]
            return [BUILT_IN[node.target], register, 2, *words]
        target, args, kwargs = self._watched.calls.get(node, (node.target, list(node.args), dict(node.kwargs)))
        schema = target._schema.arguments
        words = [CALL, register, self._name(target), len(schema)]
        for index, argument in enumerate(schema):
            if index < len(args) and not argument.kwarg_only:
                words += self._argument(args[index], argument.type, dying)
            elif argument.name in kwargs:
                words += self._argument(kwargs[argument.name], argument.type, dying)
            else:
                words.append(DEFAULT)
        return words

    def _name(self, target: Any) -> int:
        if target not in self._names:
            overload = "" if target._overloadname == "default" else target._overloadname
            self._names[target] = len(self.texts)
            self.texts += [target._schema.name, overload]
        return self._names[target]

    def _argument(self, item: Any, kind: Any, dying: set[Node]) -> list[int]:
        while kind is not None and kind.kind() == "OptionalType":
            kind = kind.getElementType()
        wanted = "" if kind is None else kind.kind()
        match item:
            case Node():
                node = self._true(item)
                if node.op == "get_attr":
                    return [TENSOR, self._attribute(str(node.target))]
                return [TAKE if node in dying else READ, self._registers[node]]
            case None:
                return [NONE]
            case list() | tuple():
                return self._list(list(item), kind, dying)
            case bool() if wanted != "TensorType":
                return [TRUTH, int(item)]
            case int() | float() if wanted == "ListType":  # one number for all dimensions
                return self._list([item], kind, dying)
            case int() if not isinstance(item, bool) and wanted != "FloatType":
                return [WHOLE_TENSOR if wanted == "TensorType" else WHOLE, item]
            case int() | float() if not isinstance(item, bool):
                return [DECIMAL_TENSOR if wanted == "TensorType" else DECIMAL, _put(self.reals, float(item))]
            case str():
                return [TEXT, _put(self.texts, item)]
            case torch.device():
                return [DEVICE, _put(self.texts, str(item))]
            case torch.dtype() if item in SCALAR_TYPES:
                return [WHOLE, SCALAR_TYPES[item]]
            case torch.memory_format():
                return [WHOLE, _FORMATS[item]]
            case torch.layout() if item is torch.strided:
                return [WHOLE, 0]
        raise NotExecutable(f"an operator takes {item!r}")

    def _attribute(self, name: str) -> int:
        if name not in self._attributes:
            self._attributes[name] = _put(self.tensors, operator.attrgetter(name)(self._watched.module))
        return self._attributes[name]

    def _list(self, items: list[Any], kind: Any, dying: set[Node]) -> list[int]:
        inner = kind.getElementType() if kind is not None and kind.kind() == "ListType" else None
        if inner is None:
            raise NotExecutable(f"an operator takes {items!r}")
        element = OPTIONAL_TENSORS if inner.kind() == "OptionalType" else _ELEMENTS.get(inner.kind())
        if element is None:
            raise NotExecutable(f"an operator takes a list of {inner}")
        return [LIST, element, len(items), *chain.from_iterable(self._argument(one, inner, dying) for one in items)]


def _put(table: list[Any], item: Any) -> int:
    table.append(item)
    return len(table) - 1
