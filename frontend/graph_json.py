"""A ``torch.fx`` graph as JSON, and back. Nothing read from a file is ever executed or imported.

torch.export's own serializer was weighed and not taken: it writes an ``ExportedProgram``, whose weights go through
pickle, and would have to export the rewritten graph once more. A flat graph of ATen and canonical ops needs little:

- a call target is ``namespace.op.overload`` or the name of a function in the closed lists below;
- an argument is a JSON value; what JSON lacks is an object with one key: ``{"node": name}``, ``{"dtype": "float32"}``,
  ``{"device": "cpu"}``, ``{"tuple": [...]}``, ``{"float": "inf"}`` and so on;
- sizes that are symbolic are nodes of the graph already.

Reading is strict, because a graph becomes Python source when it is recompiled: every name is checked before it can
reach that source.
"""

from __future__ import annotations

import keyword
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx

from ..passes.site import Site, get_site, set_site
from ..passes.view import value
from ..runtime.errors import SaveError
from ..runtime.ops import HELPERS, OPS

Node = torch.fx.Node

NAMESPACES = ("aten", "prims", "tilewright")
# ATen ops that reach beyond their tensors: files, standard output, memory that is not theirs.
FORBIDDEN = frozenset({"from_file", "_print", "set_", "resize_", "_resize_output_", "from_blob"})
_OPERATORS = (
    "add sub mul truediv floordiv mod pow neg pos abs eq ne lt le gt ge and_ or_ xor not_ lshift rshift getitem matmul"
).split()
_MATH = "floor ceil trunc sqrt pow log2 exp".split()
_SYMBOLIC = "sym_int sym_float sym_max sym_min sym_not sym_ite sym_sum".split()

FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in _OPERATORS},
    **{f"math.{name}": getattr(math, name) for name in _MATH},
    **{f"torch.{name}": getattr(torch, name) for name in _SYMBOLIC if hasattr(torch, name)},
    # A model that opens autocast itself: capture keeps the pair.
    "torch.amp.enter": torch.amp.autocast_mode._enter_autocast,
    "torch.amp.exit": torch.amp.autocast_mode._exit_autocast,
}
_FUNCTION_NAMES = {function: name for name, function in FUNCTIONS.items()}

_MEMORY_FORMATS = {
    str(f): f for f in (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d)
}
_LAYOUTS = {str(layout): layout for layout in (torch.strided,)}
# What a decoder with a KV cache runs: they write to the stores among their own inputs, and nowhere else.
STEPS = frozenset({"cached_attention_step", "streaming_attention_step"})
_ATTRIBUTE = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


def graph_to_json(module: torch.fx.GraphModule) -> list[dict[str, Any]]:
    """The module's graph, one dict a node. Raises :class:`SaveError` for what the format does not hold."""
    return [_node_to_json(node) for node in module.graph.nodes]


def graph_from_json(rows: Any, attributes: torch.nn.Module) -> torch.fx.GraphModule:
    """Rebuild a module from :func:`graph_to_json` on the parameters and buffers of ``attributes``.

    Raises :class:`SaveError` for anything that :func:`graph_to_json` would not have written.
    """
    graph = torch.fx.Graph()
    nodes: dict[str, Node] = {}
    if not isinstance(rows, list) or not rows:
        raise SaveError("the graph is no list of nodes")
    for row in rows:
        if graph._len and next(iter(reversed(graph.nodes))).op == "output":
            raise SaveError("the graph has nodes after its output")
        _node_from_json(row, graph, nodes, attributes)
    if next(iter(reversed(graph.nodes))).op != "output":
        raise SaveError("the graph has no output")
    graph.lint()
    return torch.fx.GraphModule(attributes, graph)


def describe(node: Node) -> str:
    """Dtype and shape of what the node gives, such as ``float32[s0, 16, 384]``; empty when unknown."""
    val = value(node)
    if isinstance(val, torch.Tensor):
        return f"{str(val.dtype).removeprefix('torch.')}[{', '.join(map(str, val.shape))}]"
    if isinstance(val, tuple | list):
        return f"({', '.join(describe_value(item) for item in val)})"
    return describe_value(val) if val is not None else str(node.meta.get("tilewright_value", ""))


def describe_value(val: Any) -> str:
    """As :func:`describe`, of a value."""
    if isinstance(val, torch.Tensor):
        return f"{str(val.dtype).removeprefix('torch.')}[{', '.join(map(str, val.shape))}]"
    return str(val)


def _node_to_json(node: Node) -> dict[str, Any]:
    row: dict[str, Any] = {"op": node.op, "name": node.name}
    match node.op:
        case "call_function":
            row["target"] = _target_to_json(node)
        case "placeholder" | "get_attr":
            row["target"] = str(node.target)
        case "output":
            pass
        case _:
            raise SaveError(f"the graph has a {node.op} node ({node.name}), which the file format does not hold")
    row["args"] = [_argument_to_json(argument, node) for argument in node.args]
    row["kwargs"] = {name: _argument_to_json(argument, node) for name, argument in node.kwargs.items()}
    if (site := get_site(node)) is not None:
        row["site"] = [site.id, site.module, site.source, site.op]
    if text := describe(node):
        row["value"] = text
    return row


def _target_to_json(node: Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        if target.namespace in NAMESPACES and target._opname not in FORBIDDEN:
            return f"{target.namespace}.{target._opname}.{target._overloadname}"
        raise SaveError(
            f"the graph calls {target}, which a file cannot hold: only {', '.join(NAMESPACES)} ops can be saved"
        )
    name = _FUNCTION_NAMES.get(target) if callable(target) else None  # type: ignore[arg-type]
    if name is None:
        raise SaveError(f"the graph calls {target} ({node.name}), which a file cannot hold")
    return name


def _argument_to_json(argument: Any, node: Node) -> Any:
    inner = [_argument_to_json(item, node) for item in argument] if isinstance(argument, tuple | list) else None
    match argument:
        case Node():
            return {"node": argument.name}
        case None | bool() | str():
            return argument
        case int() if type(argument) is int:
            return argument
        case float():
            return argument if math.isfinite(argument) else {"float": repr(argument)}
        case complex():
            return {"complex": [repr(argument.real), repr(argument.imag)]}
        case list():
            return inner
        case tuple():
            return {"tuple": inner}
        case slice():
            return {"slice": [_argument_to_json(a, node) for a in (argument.start, argument.stop, argument.step)]}
        case torch.dtype():
            return {"dtype": str(argument).removeprefix("torch.")}
        case torch.device():
            return {"device": str(argument)}
        case torch.memory_format():
            return {"memory_format": str(argument)}
        case torch.layout() if str(argument) in _LAYOUTS:
            return {"layout": str(argument)}
        case dict() if all(isinstance(key, str) for key in argument):
            return {"dict": {key: _argument_to_json(item, node) for key, item in argument.items()}}
        case _ if argument is Ellipsis:
            return {"ellipsis": True}
    raise SaveError(f"node {node.name} has an argument of type {type(argument).__name__}, which a file cannot hold")


def _node_from_json(row: Any, graph: torch.fx.Graph, nodes: dict[str, Node], attributes: torch.nn.Module) -> None:
    if not isinstance(row, dict) or not isinstance(row.get("name"), str) or not row["name"].isidentifier():
        raise SaveError("the graph holds a node without a proper name")
    name = row["name"]
    if name in nodes:
        raise SaveError(f"the graph has two nodes named {name}")
    args = tuple(_argument_from_json(argument, nodes) for argument in _typed(row, "args", list))
    kwargs = {key: _argument_from_json(item, nodes) for key, item in _typed(row, "kwargs", dict).items()}
    for key in kwargs:
        _require_identifier(key)
    op = row.get("op")
    target: Any = "output"
    if op == "call_function":
        target = find_target(_typed(row, "target", str))
    elif op == "placeholder":
        target = _require_identifier(_typed(row, "target", str))
        if kwargs or len(args) > 1:
            raise SaveError(f"input {name} has arguments")
    elif op == "get_attr":
        target = _typed(row, "target", str)
        if not _ATTRIBUTE.fullmatch(target) or args or kwargs or not _has_tensor(attributes, target):
            raise SaveError(f"the graph reads {target!r}, which is no weight of the file")
    elif op != "output" or len(args) != 1 or kwargs:
        raise SaveError(f"the graph has a node of kind {op!r}, which the format does not have")
    node = graph.create_node(op, target, args, kwargs, name)
    if node.name != name:  # fx renames what Python or torch reserve; the writer's names were accepted by fx
        raise SaveError(f"{name!r} is no name for a node")
    nodes[name] = node
    if "site" in row:
        site = row["site"]
        if not (isinstance(site, list) and len(site) == 4 and all(isinstance(part, str) for part in site)):
            raise SaveError(f"node {name} has a malformed site")
        set_site(node, Site(*site))
    if isinstance(row.get("value"), str):
        node.meta["tilewright_value"] = row["value"]


def _typed(row: Mapping[str, Any], key: str, kind: type[Any]) -> Any:
    item = row.get(key)
    if not isinstance(item, kind):
        raise SaveError(f"node {row.get('name')} of the graph has a malformed {key}")
    return item


def _require_identifier(name: str) -> str:
    if not name.isidentifier() or not name.isascii() or keyword.iskeyword(name):
        raise SaveError(f"{name!r} is no argument name")
    return name


def _has_tensor(module: torch.nn.Module, path: str) -> bool:
    owner: Any = module
    for part in path.split("."):
        owner = getattr(owner, part, None)
    return isinstance(owner, torch.Tensor)


def find_target(name: str) -> Callable[..., Any]:
    """The function a saved target names: from the closed lists only. Raises :class:`SaveError` for any other."""
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    parts = name.split(".")
    known = len(parts) == 3 and parts[0] in NAMESPACES and all(part.isidentifier() for part in parts)
    if (
        not known
        or parts[1] in FORBIDDEN
        or (parts[0] == "tilewright" and parts[1] not in STEPS | OPS.keys() | HELPERS.keys())
    ):
        raise SaveError(f"the file calls {name!r}, which is not among the operators a saved graph may call")
    packet = getattr(getattr(torch.ops, parts[0]), parts[1], None)
    overload = getattr(packet, parts[2], None) if packet is not None else None
    if not isinstance(overload, torch._ops.OpOverload):
        raise SaveError(f"this torch ({torch.__version__}) has no operator {name}: load the file where it was saved")
    return overload


def _argument_from_json(item: Any, nodes: Mapping[str, Node]) -> Any:
    match item:
        case None | bool() | int() | float() | str():
            return item
        case list():
            return [_argument_from_json(one, nodes) for one in item]
        case {"node": str(name)} if len(item) == 1 and name in nodes:
            return nodes[name]
        case {"tuple": list(inner)} if len(item) == 1:
            return tuple(_argument_from_json(one, nodes) for one in inner)
        case {"float": "inf" | "-inf" | "nan" as text} if len(item) == 1:
            return float(text)
        case {"complex": [str(real), str(imag)]} if len(item) == 1:
            return complex(_float(real), _float(imag))
        case {"slice": [start, stop, step]} if len(item) == 1:
            return slice(*(_argument_from_json(one, nodes) for one in (start, stop, step)))
        case {"dtype": str(name)} if len(item) == 1 and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        case {"device": str(name)} if len(item) == 1 and re.fullmatch(r"[a-z]+(:\d+)?", name):
            return _device(name)
        case {"memory_format": str(name)} if len(item) == 1 and name in _MEMORY_FORMATS:
            return _MEMORY_FORMATS[name]
        case {"layout": str(name)} if len(item) == 1 and name in _LAYOUTS:
            return _LAYOUTS[name]
        case {"dict": dict(inner)} if len(item) == 1:
            return {key: _argument_from_json(one, nodes) for key, one in inner.items()}
        case {"ellipsis": True} if len(item) == 1:
            return Ellipsis
    raise SaveError(f"the graph has a malformed argument: {str(item)[:80]}")


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise SaveError(f"{text!r} is no number") from None


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError:
        raise SaveError(f"this torch has no device {name!r}") from None
