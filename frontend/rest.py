"""The rest of a lowered graph, through Inductor: compiled at the first call, and again for sizes it has no code for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx

from .lower import canonical_nodes


def through_inductor(module: torch.fx.GraphModule, dynamic: bool | None) -> Callable[..., Any]:
    """``torch.compile`` of a graph of ours. dynamic: as torch.compile has it.

    Before each call Dynamo compares dtype, shape and strides of every tensor that the graph reads with those it was
    compiled for, and Inductor's code asserts them once more: with some hundred packed weights, a tenth of the time of a
    token. Buffers that go into kernels of ours alone need neither, for a kernel's op looks at each of its tensors: one
    that was changed meanwhile is refused there, or gets another kernel. All other tensors keep Dynamo's guards.
    """
    checked = _checked_by_ops(module)

    def keep(guards: Sequence[Any]) -> list[bool]:
        return [not (guard.has_value and id(guard.value) in checked) for guard in guards]

    options: dict[str, Any] = {"guard_filter_fn": keep, "size_asserts": False}
    # Not the module: its __call__ of torch.fx, traced while an error passes through it, would hide that error.
    return torch.compile(module.forward, dynamic=dynamic, fullgraph=True, options=options)


def _checked_by_ops(module: torch.fx.GraphModule) -> dict[int, torch.Tensor]:
    """The buffers that only ops with a kernel read, by id."""
    kernels = {node for node, _ in canonical_nodes(module) if node.kwargs.get("target", "reference") != "reference"}
    buffers = dict(module.named_buffers(remove_duplicate=False))
    read: dict[int, bool] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        tensor = buffers.get(str(node.target))
        if tensor is not None and not tensor.requires_grad:
            read[id(tensor)] = read.get(id(tensor), True) and kernels.issuperset(node.users)
    return {id(tensor): tensor for tensor in buffers.values() if read.get(id(tensor))}
