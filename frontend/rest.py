"""The rest of a lowered graph, through Inductor: compiled at the first call, and again for sizes it has no code for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx

from ..passes.view import arguments

_ops = torch.ops.tilewright
PACKED = (_ops.quantized_linear.default, _ops.quantized_embedding.default)
WEIGHTS = ("codes", "scales", "zeros", "scale", "zero")


def through_inductor(module: torch.fx.GraphModule, dynamic: bool | None) -> Callable[..., Any]:
    """``torch.compile`` of a graph of ours. dynamic: as torch.compile has it.

    Before each call Dynamo compares dtype, shape and strides of every tensor that the graph reads with those it was
    compiled for, and Inductor's code asserts them once more: for the hundreds of packed weights of a language model
    that is a share of each token. Packed weights that go into kernels alone need neither. The op has their format and
    sizes as arguments of its own and looks at each: one that was changed meanwhile is refused there. All other tensors
    keep Dynamo's guards, and graphs without packed weights Inductor's assertions.
    """
    checked = _checked_by_ops(module)

    def keep(guards: Sequence[Any]) -> list[bool]:
        return [not (guard.has_value and id(guard.value) in checked) for guard in guards]

    options: dict[str, Any] = {"guard_filter_fn": keep, "size_asserts": not checked}
    # Not the module: its __call__ of torch.fx, traced while an error passes through it, would hide that error.
    return torch.compile(module.forward, dynamic=dynamic, fullgraph=True, options=options)


def _checked_by_ops(module: torch.fx.GraphModule) -> dict[int, torch.Tensor]:
    """The buffers that are nothing but weights of packed ops with a kernel, by id."""
    buffers = dict(module.named_buffers(remove_duplicate=False))
    read: dict[int, bool] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        tensor = buffers.get(str(node.target))
        if tensor is not None and not tensor.requires_grad:
            read[id(tensor)] = read.get(id(tensor), True) and all(_is_weight(node, user) for user in node.users)
    return {id(tensor): tensor for tensor in buffers.values() if read.get(id(tensor))}


def _is_weight(node: torch.fx.Node, user: torch.fx.Node) -> bool:
    if user.target not in PACKED or user.kwargs.get("target", "reference") == "reference":
        return False
    given = arguments(user)
    others = [item for name, item in given.items() if name not in WEIGHTS]
    return all(node is not item and not (isinstance(item, list | tuple) and node in item) for item in others)
