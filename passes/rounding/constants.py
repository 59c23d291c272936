"""The values of nodes that only parameters and buffers of a graph decide."""

from __future__ import annotations

import torch
import torch.fx
from torch import Tensor

from .. import _key_projection
from ..execute import extract, undisturbed
from ..view import GraphView

Node = torch.fx.Node


def constant(view: GraphView, node: Node) -> Tensor | None:
    """The value of ``node`` when no input of the graph has a part in it, or None.

    A parameter, or a transpose of one, is itself, not a copy: not to be written into. What the graph computes from
    parameters (a weight norm, a cast, several weights put together) is computed here.
    """
    found = _key_projection.constant(view, node)
    if found is not None:
        return found
    inside: set[Node] = set()
    stack = [node]
    while stack:
        one = stack.pop()
        if one.op == "get_attr" or one in inside:
            if one.op == "get_attr":
                inside.add(one)
            continue
        if one.op != "call_function" or _impure(one):
            return None
        inside.add(one)
        stack.extend(one.all_input_nodes)
    module, outer = extract(view.module, node, inside)
    assert not outer
    with undisturbed():
        value = module()
    return value.detach() if isinstance(value, Tensor) else None


def _impure(node: Node) -> bool:
    """Whether a call may give another value each time, or change one."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return getattr(node.target, "__name__", "") != "getitem"
    tags = node.target.tags
    return node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in tags


def storage(tensor: Tensor) -> tuple[object, ...]:
    """What tells whether two tensors are the same numbers in memory."""
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()
