"""Runs a graph on the CPU from C++, operator by operator, as eager Python does and without Python.

One token of a small language model is some hundred kernels of ten to fifty microseconds. Python needs nearly as long
to get from each to the next, its own code having been pushed out of the caches by the weights. So a graph that consists
of kernels of ours, views and a few other operators is handed to C++ as rows of numbers (``_graph_executor.jinja``),
which calls the very same operators through torch's dispatcher: results are those of eager, bit for bit.

The first call is made by Python, node by node, and shows which kernel op each canonical op dissolves into. From then
on :class:`GraphExecutor` runs in C++. Inference only: no gradient goes through it.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import fast_call
from .announce import announce
from .ops import HELPERS, is_canonical
from .ops.registry import LIBRARY
from .plans import SCALAR_TYPES

Node = torch.fx.Node
aten = torch.ops.aten

# As in _graph_executor.jinja.
DEFAULT, READ, TAKE, LIST, NONE, WHOLE, TRUTH, DECIMAL, TEXT, TENSOR, DEVICE, WHOLE_TENSOR, DECIMAL_TENSOR = range(13)
TENSORS, OPTIONAL_TENSORS, WHOLES, DECIMALS, TRUTHS = range(5)
CALL = 0
BUILT_IN: dict[Any, int] = {
    operator.getitem: 1,
    operator.add: 2,
    operator.sub: 3,
    operator.mul: 4,
    operator.floordiv: 5,
}
_ELEMENTS = {"IntType": WHOLES, "SymIntType": WHOLES, "FloatType": DECIMALS, "BoolType": TRUTHS, "TensorType": TENSORS}
_FORMATS = {torch.contiguous_format: 0, torch.preserve_format: 1, torch.channels_last: 2, torch.channels_last_3d: 3}
_CASTS = (aten.to.dtype, aten.to.device, aten.to.dtype_layout)

LIBRARY.define("load_graph(int[] numbers, str[] texts, float[] reals, Tensor[] tensors) -> int")
LIBRARY.define("run_graph(int graph, Tensor[] inputs) -> Tensor[]")


class NotExecutable(Exception):
    """The graph holds something that C++ does not run. Never leaves this file."""


def why_not(module: torch.fx.GraphModule) -> str | None:
    """What of a lowered graph only Python can run; None for nothing. Looks at the nodes' kinds alone."""
    for node in module.graph.nodes:
        if node.op in ("call_module", "call_method"):
            return f"{node.name} is no operator"
        if node.op != "call_function" or node.target in BUILT_IN:
            continue
        if not isinstance(node.target, torch._ops.OpOverload):
            return f"{node.name} is a function of Python"
        name = node.target._opname
        if node.target in HELPERS.values():
            return f"{name} is no kernel"
        if is_canonical(node.target) and node.kwargs.get("target") != "cpp" and name != "linear":
            return f"{name} runs in its reference form"
    return None


def available() -> bool:
    """Whether the C++ side is there. Builds it if need be: half a minute, once a machine."""
    return fast_call.prepare() and _served()


_serving = False


def _served() -> bool:
    global _serving
    functions = fast_call.functions()
    if functions is not None and not _serving:
        functions["serve_graphs"]()
        _serving = True
    return functions is not None


class GraphExecutor:
    """``module`` made callable: flat tensors in, a flat tuple out, like the module itself.

    module: a lowered graph for which :func:`why_not` has nothing to say. Its tensors may get other contents, and other
    tensors may take their places: the graph is loaded anew then. Calls that somebody watches (a dispatch mode,
    autocast, a compiler) or that record gradients go through the module.
    """

    def __init__(self, module: torch.fx.GraphModule) -> None:
        self.module = module
        self.problem: str | None = None
        """Why the module itself runs, once that is known."""
        self._owners = [held for one in module.modules() for held in (one._parameters, one._buffers) if held]
        self._loaded: _Loaded | None = None

    def __call__(self, *inputs: Any) -> Any:
        if self.problem is not None or _watched():
            return self.module(*inputs)
        loaded = self._loaded
        if loaded is None or loaded.ids != list(map(id, self._tensors())):
            return self._load(inputs)
        outputs = torch.ops.tilewright.run_graph(loaded.number, inputs)
        if loaded.whole:
            return tuple(outputs)
        left = iter(outputs)
        return tuple(next(left) if there else None for there in loaded.outputs)

    def _tensors(self) -> Iterator[Tensor | None]:
        return chain.from_iterable(held.values() for held in self._owners)

    def _load(self, inputs: Sequence[Any]) -> Any:
        """Answer this call from Python and hand the graph over for the next."""
        watcher = _Watcher(self.module)
        held = list(self._tensors())
        result = watcher.run(*inputs)
        try:
            if not _served() or not all(isinstance(one, Tensor) and one.device.type == "cpu" for one in inputs):
                raise NotExecutable("it is for CPU tensors")
            self._loaded = _Loaded(_Text(watcher), held)
        except (NotExecutable, RuntimeError) as error:
            self.problem = str(error)
            announce(f"a graph runs from Python, some microseconds slower an operator: {error}", key="graph executor")
        return result


class _Loaded:
    """A graph on the C++ side, dropped there when nobody runs it any more.

    held: all tensors of the module it was made of. They stay as long, so that no other tensor gets the id of one.
    """

    def __init__(self, text: _Text, held: list[Tensor | None]) -> None:
        self.held = held
        self.ids = list(map(id, held))
        self.outputs = text.outputs
        self.whole = all(text.outputs)
        self.number: int = torch.ops.tilewright.load_graph(text.numbers, text.texts, text.reals, text.tensors)
        functions = fast_call.functions()
        assert functions is not None
        weakref.finalize(self, functions["drop_graph"], self.number)


def _watched() -> bool:
    return (
        torch.compiler.is_compiling()  # asked first: a compiler knows the answer
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.is_autocast_enabled("cpu")
        or torch.is_grad_enabled()
    )


class _Calls(TorchDispatchMode):
    """Notes the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class _Watcher(torch.fx.Interpreter):
    """Runs the graph and notes what stands in its nodes' places.

    calls: of each canonical op, the kernel op it is and its arguments, nodes where those are tensors.
    same: nodes whose value is that of another. first_only: ops of several results whose kernel has the first alone.
    """

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.graph_module = module
        self.calls: dict[Node, tuple[Any, list[Any], dict[str, Any]]] = {}
        self.same: dict[Node, Node] = {}
        self.first_only: set[Node] = set()
        self.shown: list[bool] = []
        self.reason: str | None = None

    def run_node(self, n: Node) -> Any:
        if isinstance(n.target, torch._ops.OpOverload) and is_canonical(n.target):
            if n.target._opname == "linear" and n.kwargs.get("target") != "cpp":
                self.calls[n] = (aten.linear.default, list(n.args[:3]), {})
                return super().run_node(n)
            with _Calls() as seen:
                result = super().run_node(n)
            self._note(n, seen.calls, result)
            return result
        result = super().run_node(n)
        if n.op == "call_function" and n.args and isinstance(first := n.args[0], Node):
            if n.target is operator.getitem:
                self._item(n, first, n.args[1])
            elif n.target is aten.detach.default or (n.target in _CASTS and result is self.env[first]):
                self.same[n] = first
        if n.op == "output":
            self.shown = [isinstance(one, Tensor) for one in result]
        return result

    def _note(self, node: Node, calls: list[Any], result: Any) -> None:
        """A canonical op is one kernel op, besides views of a tensor's own shape and stand-ins for what none reads."""
        viewed: dict[int, int] = {}
        kernels = []
        for call in calls:
            func, args, _, made = call
            if func is aten.view.default and made.shape == args[0].shape:
                viewed[id(made)] = viewed.get(id(args[0]), id(args[0]))
            elif func is not aten.new_empty.default:
                kernels.append(call)
        if len(kernels) != 1:
            self.reason = f"{node.name} is more than one kernel"
            return
        func, args, kwargs, made = kernels[0]
        outputs = {id(one): index for index, one in enumerate(made if isinstance(made, list | tuple) else [made])}
        shown = result if isinstance(result, tuple) else (result,)
        items = [outputs.get(viewed.get(id(one), id(one))) for one in shown]
        if len(outputs) == 1 and items[0] == 0 and isinstance(result, tuple):
            self.first_only.add(node)
        elif items != list(range(len(outputs))):
            self.reason = f"{node.name} gives something else than its kernel"
        known = {id(self.env[one]): one for one in node.all_input_nodes}

        def to_node(item: Any) -> Any:
            if isinstance(item, list | tuple):
                return [to_node(one) for one in item]
            if isinstance(item, Tensor):
                if (found := known.get(viewed.get(id(item), id(item)))) is None:
                    self.reason = f"{node.name} makes a tensor before its kernel"
                return found
            return item

        self.calls[node] = (func, [to_node(one) for one in args], {name: to_node(one) for name, one in kwargs.items()})

    def _item(self, node: Node, of: Node, index: Any) -> None:
        if of in self.first_only:
            self.same[node] = of
            if index != 0:
                self.reason = f"{of.name} has one result"


class _Text:
    """A watched graph as ``load_graph`` reads it."""

    def __init__(self, watcher: _Watcher) -> None:
        if watcher.reason is not None:
            raise NotExecutable(watcher.reason)
        self.texts: list[str] = []
        self.reals: list[float] = []
        self.tensors: list[Tensor] = []
        self.numbers: list[int] = []
        self._watcher = watcher
        self._names: dict[Any, int] = {}
        self._attributes: dict[str, int] = {}
        nodes = list(watcher.graph_module.graph.nodes)
        given = [node for node in nodes if node.op == "placeholder"]
        self._registers = {node: index for index, node in enumerate(given)}
        steps = [node for node in nodes if node.op == "call_function" and not self._needless(node)]
        for node in steps:
            self._registers[node] = len(self._registers)
        last = self._last_uses(steps)
        body: list[int] = []
        for node in steps:
            body += self._step(node, {n for n, at in last.items() if at is node})
        (shown,) = nodes[-1].args
        if not isinstance(shown, list | tuple) or not all(one is None or isinstance(one, Node) for one in shown):
            raise NotExecutable("its outputs are no flat list of tensors")
        self.outputs = tuple(watcher.shown)
        if any((one is not None) != there for one, there in zip(shown, self.outputs, strict=True)):
            raise NotExecutable("an output is no tensor")
        self.numbers = [len(self._registers), len(given), len(steps), *body, sum(self.outputs)]
        for one in shown:
            if one is not None:
                self.numbers += self._argument(one, None, set())

    def _true(self, node: Node) -> Node:
        while node in self._watcher.same:
            node = self._watcher.same[node]
        return node

    def _needless(self, node: Node) -> bool:
        if node in self._watcher.same:
            return True
        # The dtype of what a kernel made is its own.
        if node.target is not aten._assert_tensor_metadata.default or not isinstance(first := node.args[0], Node):
            return False
        return is_canonical(self._true(first).target)

    def _inputs(self, node: Node) -> list[Node]:
        func_args = self._watcher.calls.get(node)
        found: list[Node] = []
        torch.fx.node.map_arg(func_args[1:] if func_args else (node.args, node.kwargs), found.append)
        return [self._true(one) for one in found]

    def _last_uses(self, steps: list[Node]) -> dict[Node, Node]:
        """Where each value is read last. Values read twice there, and outputs, are in nobody's hands."""
        last: dict[Node, Node] = {}
        for node in steps:
            for one in self._inputs(node):
                last[one] = node
        for one in self._watcher.graph_module.graph.output_node().all_input_nodes:
            last.pop(self._true(one), None)
        return {one: node for one, node in last.items() if self._inputs(node).count(one) == 1}

    def _step(self, node: Node, dying: set[Node]) -> list[int]:
        register = self._registers[node]
        if node.target in BUILT_IN:
            first, second = node.args
            words = [*self._argument(first, None, dying), *self._argument(second, None, dying)]
            return [BUILT_IN[node.target], register, 2, *words]
        target, args, kwargs = self._watcher.calls.get(node, (node.target, list(node.args), dict(node.kwargs)))
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
            self._attributes[name] = _put(self.tensors, operator.attrgetter(name)(self._watcher.graph_module))
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
