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
from .graph_text import BUILT_IN, NotExecutable, Text, Watched
from .ops import HELPERS, is_canonical
from .ops.registry import LIBRARY

Node = torch.fx.Node
aten = torch.ops.aten

_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_CASTS = (aten.to.dtype, aten.to.device, aten.to.dtype_layout)

LIBRARY.define("load_graph(int[] numbers, str[] texts, float[] reals, Tensor[] tensors) -> int")
LIBRARY.define("run_graph(int graph, Tensor[] inputs) -> Tensor[]")


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

    def __reduce__(self) -> Any:
        """A copy loads its own graph."""
        return GraphExecutor, (self.module,)

    def __call__(self, *inputs: Any) -> Any:
        if self.problem is not None or _watched() or not _PLAIN.issuperset(map(type, inputs)):
            return self.module(*inputs)
        loaded = self._loaded
        if loaded is None or not self._holds(loaded.held):
            return self._load(inputs)
        outputs = torch.ops.tilewright.run_graph(loaded.number, inputs)
        if loaded.whole:
            return tuple(outputs)
        left = iter(outputs)
        return tuple(next(left) if there else None for there in loaded.outputs)

    def _holds(self, tensors: list[Tensor | None]) -> bool:
        same = all(map(operator.is_, self._tensors(), tensors))
        return same and sum(map(len, self._owners)) == len(tensors)

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
            self._loaded = _Loaded(Text(watcher.seen), held)
        except (NotExecutable, RuntimeError) as error:
            self.problem = str(error)
            announce(f"a graph runs from Python, some microseconds slower an operator: {error}", key="graph executor")
        return result


class _Loaded:
    """A graph on the C++ side, dropped there when nobody runs it any more.

    held: all tensors of the module it was made of, in order.
    """

    def __init__(self, text: Text, held: list[Tensor | None]) -> None:
        self.held = held
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
        or torch._C._functorch.peek_interpreter_stack() is not None
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
    """Runs the graph and notes what its nodes turn out to be.

    first_only: ops of several results whose kernel has the first alone.
    """

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.seen = Watched(module)
        self.first_only: set[Node] = set()

    def run_node(self, n: Node) -> Any:
        if isinstance(n.target, torch._ops.OpOverload) and is_canonical(n.target):
            if n.target._opname == "linear" and n.kwargs.get("target") != "cpp":
                self.seen.calls[n] = (aten.linear.default, list(n.args[:3]), {})
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
                self.seen.same[n] = first
        if n.op == "output":
            self.seen.shown = [isinstance(one, Tensor) for one in result]
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
            self.seen.reason = f"{node.name} is more than one kernel"
            return
        func, args, kwargs, made = kernels[0]
        outputs = {id(one): index for index, one in enumerate(made if isinstance(made, list | tuple) else [made])}
        shown = result if isinstance(result, tuple) else (result,)
        items = [outputs.get(viewed.get(id(one), id(one))) for one in shown]
        if len(outputs) == 1 and items[0] == 0 and isinstance(result, tuple):
            self.first_only.add(node)
        elif items != list(range(len(outputs))):
            self.seen.reason = f"{node.name} gives something else than its kernel"
        known = {id(self.env[one]): one for one in node.all_input_nodes}

        def to_node(item: Any) -> Any:
            if isinstance(item, list | tuple):
                return [to_node(one) for one in item]
            if isinstance(item, Tensor):
                if (found := known.get(viewed.get(id(item), id(item)))) is None:
                    self.seen.reason = f"{node.name} makes a tensor before its kernel"
                return found
            return item

        self.seen.calls[node] = (
            func,
            [to_node(one) for one in args],
            {name: to_node(one) for name, one in kwargs.items()},
        )

    def _item(self, node: Node, of: Node, index: Any) -> None:
        if of in self.first_only:
            self.seen.same[node] = of
            if index != 0:
                self.seen.reason = f"{of.name} has one result"
