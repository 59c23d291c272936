"""Quantized weights into the layout that the native CPU kernels read, in place of the one that passes make.

A permutation of the same codes. The layer's constants are replaced, so a packed weight exists once a graph; a weight
that several nodes read (an embedding tied to the output head) stays one.
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
    for constant in old:
        if not constant.users:
            target = str(constant.target)
            module.graph.erase_node(constant)
            if not any(node.op == "get_attr" and node.target == target for node in module.graph.nodes):
                path, _, name = target.rpartition(".")
                delattr(module.get_submodule(path), name)
    return len(made)


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
        stem = f"{str(node.target).replace('.', '_')}_{LAYOUT}"
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
        new.append(made)
    return new


def _constant(module: torch.fx.GraphModule, node: Node) -> torch.Tensor:
    path, _, name = str(node.target).rpartition(".")
    found = getattr(module.get_submodule(path), name)
    assert isinstance(found, torch.Tensor)
    return found.detach()
