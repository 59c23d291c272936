"""Which sites ``target="auto"`` leaves to the compiler of the rest of the graph, although a kernel of ours exists.

An opaque kernel ends Inductor's fusion on both sides of it and costs a call of two to four microseconds, so a small op
is better off in Inductor's loops. Where the line is comes from the benchmark suites ``ops`` and ``models``
(docs/benchmarks.md). ``target="cpp"`` or ``rest="eager"`` takes every kernel there is.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.fx

from ..passes.view import arguments, value
from ..runtime import cpu, graph_executor
from ..runtime.ops import CanonicalOp, is_canonical
from .choices import Rest, Target

# Memory-bound, elementwise or a row at a time: what Inductor would fuse with its neighbours into one loop.
FUSES = frozenset({"rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm", "rope", "gated_mlp"})
# No kernel of ours is wanted: a few elementwise operations, which any compiler fuses.
ELEMENTWISE = frozenset({"merge_attention"})
# Elements from which the kernel beats Inductor's own loop for the same op, its call included.
ENOUGH = 2**17
# Packed tiles need AMX's; up to this many rows the kernel reads the weights as they are, on every instruction set.
FEW_ROWS = 4
# Operators that compute nothing, beside views.
_FREE = frozenset({"_assert_tensor_metadata", "sym_size", "to", "_to_copy", "reshape", "contiguous", "detach"})


def may_run_alone(module: torch.fx.GraphModule, requested: Target) -> bool:
    """Whether a graph is for the CPU and may have kernels there: only then :func:`runs_alone` is worth asking."""
    tensors = [value(node) for node in module.graph.nodes if isinstance(value(node), torch.Tensor)]
    return requested in ("auto", "cpp") and all(tensor.device.type == "cpu" for tensor in tensors)


def runs_alone(module: torch.fx.GraphModule) -> bool:
    """Whether a decoder's lowered graph is so nearly all kernels that Inductor's Python costs more than it gains.

    Going from kernel to kernel through Inductor's wrapper took half the time of a token of SmolLM2 with 4-bit weights;
    :mod:`tilewright.runtime.graph_executor` does it in a tenth. It fuses nothing, so operators that compute count.
    """
    if graph_executor.why_not(module) is not None:
        return False
    calls = [node for node in module.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    kernels = sum(is_canonical(node.target) for node in calls)
    others = sum(_computes(node.target) for node in calls)
    return others <= kernels and graph_executor.available()


def _computes(op: torch._ops.OpOverload) -> bool:
    views = any(one.alias_info is not None and not one.alias_info.is_write for one in op._schema.returns)
    return not is_canonical(op) and not views and op._opname not in _FREE


def why_leave(node: torch.fx.Node, op: CanonicalOp, rest: Rest) -> str:
    """The reason to run the op's reference form on the CPU under ``target="auto"``; empty to take the kernel.

    Symbolic sizes count as they were when captured.
    """
    if rest != "eager" and op.name in FUSES and _elements(node) < ENOUGH:
        return f"Inductor fuses so small a {op.name} with its neighbours: target='cpp' takes the kernel all the same"
    if op.name in ("linear", "linear_fused") and _rows(node) > FEW_ROWS:
        dtype = value(next(iter(arguments(node).values()))).dtype
        if cpu.isa() != "amx" or dtype not in (torch.float32, torch.bfloat16):
            return f"without AMX tiles for {dtype}, torch's own matrix product is faster: target='cpp' takes the kernel"
    return ""


def _elements(node: torch.fx.Node) -> int:
    """Elements of the op's first operand; for rope, of the largest that shares its angles."""
    given = arguments(node)
    first = next(iter(given.values()))
    together = [first]
    if "cos" in given:  # queries and keys: one left behind would cost what both do
        same = [user for user in given["cos"].users if user.target is node.target and user.args[1:] == node.args[1:]]
        together += [user.args[0] for user in same]
    return max(_numel(value(item)) for item in together)


def _rows(node: torch.fx.Node) -> int:
    x = value(next(iter(arguments(node).values())))
    return prod(_hint(size) for size in x.shape[:-1]) if isinstance(x, torch.Tensor) else 0


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else size.node.hint or 0


def _numel(tensor: Any) -> int:
    if not isinstance(tensor, torch.Tensor):
        return 0
    return prod(map(_hint, tensor.shape))
