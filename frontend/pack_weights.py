"""Quantized weights as the kernels want them, in place of what passes make: the same codes, moved.

:func:`pack` permutes them into the layout that native CPU kernels read, :func:`join` puts those of one call behind each
other for Triton's. A layer's constants are replaced, so a packed weight exists once a graph; a weight that several
nodes read (an embedding tied to the output head) stays one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from ..codegen.weight_format import WeightFormat, parse_weight_format
from ..passes.view import arguments, value
from ..runtime.ops import quantized_weight

Node = torch.fx.Node
_ops = torch.ops.tilewright
LAYOUT = "panels"


def pack(module: torch.fx.GraphModule) -> int:
    """Give every ``quantized_linear`` and ``quantized_embedding`` node of a CPU graph its weights in panels, in place.

    Nodes whose weights are no constants of the graph, or of a kind that has no such layout, stay as they are and so do
    those that share a weight with them. Returns how many weights were packed anew.
    """
    uses = [use for node in module.graph.nodes for use in _uses(node)]
    fixed = {use.codes for use in uses if not use.packable(module)}
    made: dict[Any, list[Node | None]] = {}
    old: set[Node] = set()
    for use in uses:
        if use.codes in fixed or use.format.layout == LAYOUT:
            continue
        key = (use.codes, use.scale, use.zero)
        if key not in made:
            made[key] = _repack(module, use)
        use.replace(made[key])
        old.update(one for one in key if one is not None)
    for node in {use.node for use in uses}:
        form = parse_weight_format(arguments(node)["format"])
        if form.layout != LAYOUT and not any(use.codes in fixed for use in uses if use.node is node):
            node.update_kwarg("format", form.changed(layout=LAYOUT).text())
    _drop(module, old)
    return len(made)


def join(module: torch.fx.GraphModule) -> int:
    """Make one weight of those that a ``quantized_linear`` call has side by side, in place: one launch on a GPU.

    The rows of packed weights in the layout ``plain`` follow each other in memory, so this copies bytes and no more.
    Only for constants that nothing else reads, and not for gated calls, whose kernel takes two. Returns how many
    calls were changed.
    """
    count = 0
    for node in module.graph.find_nodes(op="call_function", target=_ops.quantized_linear.default):
        given = arguments(node)
        fmt = parse_weight_format(given["format"])
        lists = {name: given[name] for name in ("codes", "scales", "zeros")}
        parts = [part for parts in lists.values() for part in parts]
        if len(given["codes"]) < 2 or given["gated"] or fmt.layout != "plain":
            continue
        if not all(isinstance(one, Node) and one.op == "get_attr" and len(one.users) == 1 for one in parts):
            continue
        biases = _joined_bias(module, given["biases"], given["rows"], value(given["x"]).dtype)
        if biases is None:
            continue
        new: dict[str, list[Any]] = {
            name: [_add(module, each[0], torch.cat([_constant(module, one) for one in each]), "joined")]
            for name, each in lists.items()
            if each
        }
        new |= {"biases": biases, "rows": [sum(given["rows"])]}
        old = {one for one in (*parts, *given["biases"]) if one is not None}
        schema = node.target._schema.arguments
        for place, argument in enumerate(schema):
            if argument.name not in new:
                continue
            if argument.kwarg_only:
                node.update_kwarg(argument.name, new[argument.name])
            else:
                node.update_arg(place, new[argument.name])
        _drop(module, old)
        count += 1
    return count


def _joined_bias(
    module: torch.fx.GraphModule, biases: list[Node | None], rows: list[int], dtype: torch.dtype
) -> list[Node | None] | None:
    """The biases as one, zeros where a layer has none; None where they are no constants of the graph.

    A bias that is a parameter of the model stays what it is: the graph adds them up when it runs.
    """
    given = [bias for bias in biases if bias is not None]
    if not given:
        return [None]
    if not all(isinstance(bias, Node) and bias.op == "get_attr" for bias in given):
        return None
    first = given[0]
    items: list[Node] = []
    for bias, count in zip(biases, rows, strict=True):
        zeros = torch.zeros(count, dtype=dtype, device=value(first).device)
        items.append(bias if bias is not None else _add(module, first, zeros, "none"))
    last = max(items)
    with module.graph.inserting_after(last):
        made = module.graph.call_function(torch.ops.aten.cat.default, (items,))
    made.meta["val"] = value(first).new_empty((sum(rows),))
    return [made]


def _drop(module: torch.fx.GraphModule, constants: set[Node]) -> None:
    """Erase constants that nothing reads now, and their tensors."""
    for constant in constants:
        if not constant.users:
            target = str(constant.target)
            module.graph.erase_node(constant)
            if not any(node.op == "get_attr" and node.target == target for node in module.graph.nodes):
                path, _, name = target.rpartition(".")
                delattr(module.get_submodule(path), name)


class _Use:
    """One weight of one node. index: its place in the node's lists; None where the arguments are no lists."""

    def __init__(self, node: Node, index: int | None) -> None:
        self.node, self.index = node, index
        given = arguments(node)
        self.format: WeightFormat = parse_weight_format(given["format"])
        if index is None:
            self.codes, self.scale, self.zero = given["codes"], given["scale"], given["zero"]
            self.rows, self.columns = given["rows"], given["columns"]
        else:
            self.codes, self.scale = given["codes"][index], given["scales"][index]
            self.zero = given["zeros"][index] if given["zeros"] else None
            self.rows, columns = given["rows"][index], value(given["x"]).shape[-1]
            # A size that is known can still come as a symbol of one value.
            known = columns.node.maybe_as_int() if isinstance(columns, torch.SymInt) else columns
            self.columns = columns if known is None else known

    def packable(self, module: torch.fx.GraphModule) -> bool:
        constants = [one for one in (self.codes, self.scale, self.zero) if one is not None]
        return (
            self.format.kind == "int"
            and isinstance(self.columns, int)
            and all(isinstance(one, Node) and one.op == "get_attr" for one in constants)
            and value(self.codes).device.type == "cpu"
        )

    def replace(self, new: list[Node | None]) -> None:
        given = arguments(self.node)
        names = ("codes", "scale", "zero") if self.index is None else ("codes", "scales", "zeros")
        schema = [a.name for a in self.node.target._schema.arguments]  # type: ignore[union-attr]
        for name, node in zip(names, new, strict=True):
            if self.index is None:
                self.node.update_arg(schema.index(name), node)
            elif node is not None:
                items = list(given[name])
                items[self.index] = node
                self.node.update_arg(schema.index(name), items)


def _uses(node: Node) -> list[_Use]:
    if node.target is _ops.quantized_embedding.default:
        return [_Use(node, None)]
    if node.target is _ops.quantized_linear.default:
        return [_Use(node, index) for index in range(len(arguments(node)["codes"]))]
    return []


def _repack(module: torch.fx.GraphModule, use: _Use) -> list[Node | None]:
    parts = [use.codes, use.scale, use.zero]
    tensors = [None if one is None else _constant(module, one) for one in parts]
    assert tensors[0] is not None and tensors[1] is not None
    packed = quantized_weight.to_layout(tensors[0], tensors[1], tensors[2], use.format, use.rows, use.columns, LAYOUT)
    new: list[Node | None] = []
    for node, tensor in zip(parts, packed, strict=True):
        if node is None or tensor is None:
            new.append(None)
            continue
        new.append(_add(module, node, tensor, LAYOUT))
    return new


def _add(module: torch.fx.GraphModule, node: Node, tensor: torch.Tensor, word: str) -> Node:
    """A new constant beside the constant ``node``, named after it."""
    stem = f"{str(node.target).replace('.', '_')}_{word}"
    name, count = stem, 0
    while hasattr(module, name):
        count += 1
        name = f"{stem}_{count}"
    module.register_buffer(name, tensor)
    with module.graph.inserting_before(node):
        made = module.graph.get_attr(name)
    made.meta = dict(node.meta)
    fake = value(node)
    mode = getattr(fake, "fake_mode", None)
    made.meta["val"] = mode.from_tensor(tensor, static_shapes=True) if mode is not None else tensor
    return made


def _constant(module: torch.fx.GraphModule, node: Node) -> torch.Tensor:
    path, _, name = str(node.target).rpartition(".")
    found = getattr(module.get_submodule(path), name)
    assert isinstance(found, torch.Tensor)
    return found.detach()
