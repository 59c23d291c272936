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
from ..runtime import cpu
from ..runtime.ops import CanonicalOp
from .choices import Rest

# Memory-bound, elementwise or a row at a time: what Inductor would fuse with its neighbours into one loop.
FUSES = frozenset({"rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm", "rope", "gated_mlp"})
# No kernel of ours is wanted: a few elementwise operations, which any compiler fuses.
ELEMENTWISE = frozenset({"merge_attention"})
# Elements from which the kernel beats Inductor's own loop for the same op, its call included.
ENOUGH = 2**17
# Packed tiles need AMX's; up to this many rows the kernel reads the weights as they are, on every instruction set.
FEW_ROWS = 4


def why_leave(node: torch.fx.Node, op: CanonicalOp, rest: Rest) -> str:
    """The reason to run the op's reference form on the CPU under ``target="auto"``; empty to take the kernel.

    Symbolic sizes count as they were when captured.
    """
    if rest == "inductor" and op.name in FUSES and _elements(node) < ENOUGH:
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
