"""The tensors that a graph reads: how many bytes they take, and dropping those that nobody reads any more."""

from __future__ import annotations

import ctypes
import gc
import sys

import torch
import torch.fx


def drop_unread(module: torch.fx.GraphModule) -> None:
    """Take reads without users out of the graph, and tensors that no node reads from the module, in place."""
    for node in list(module.graph.find_nodes(op="get_attr")):
        if not node.users:
            module.graph.erase_node(node)
    read = {str(node.target) for node in module.graph.find_nodes(op="get_attr")}
    for path, owner in list(module.named_modules()):
        for held in (owner._parameters, owner._buffers):
            for name in [name for name in held if (f"{path}.{name}" if path else name) not in read]:
                del held[name]
                owner._non_persistent_buffers_set.discard(name)


def weight_bytes(module: torch.fx.GraphModule) -> int:
    """Bytes of the tensors that the graph reads; memory that several of them share counts once."""
    found: dict[int, int] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        tensor = module
        for part in str(node.target).split("."):
            tensor = getattr(tensor, part)
        if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            # An expanded or sliced view is read in part only.
            found[storage.data_ptr()] = max(found.get(storage.data_ptr(), 0), min(storage.nbytes(), tensor.nbytes))
    return sum(found.values())


def give_memory_back() -> None:
    """Collect garbage, and let the C library return what is free to the system."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
