"""Which sites ``target="auto"`` leaves to the compiler of the rest of the graph, although a kernel of ours exists.

An opaque kernel ends Inductor's fusion on both sides of it: the values around it go through memory. So a kernel has to
be faster than the op by more than that traffic costs. The rules follow the figures in docs/benchmarks.md (suites
``ops`` and ``models``); ``target="cpp"`` or ``rest="eager"`` takes every kernel there is.
"""

from __future__ import annotations

import torch.fx

from ..runtime.ops import CanonicalOp
from .choices import Rest, Target

# Memory-bound, elementwise or a row at a time: Inductor fuses them with their neighbours into one loop.
FUSES = frozenset({"rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm", "rope", "gated_mlp"})


def why_leave(node: torch.fx.Node, op: CanonicalOp, rest: Rest) -> str:
    """The reason to run the op's reference form on the CPU under ``target="auto"``; empty to take the kernel."""
    if rest == "inductor" and op.name in FUSES:
        return f"Inductor fuses {op.name} with its neighbours, which saves more than the kernel: target='cpp' takes it"
    return ""


def takes_norms(requested: Target, rest: Rest) -> bool:
    """Whether norms on the CPU run our kernels, so that sums are worth fusing into them."""
    return requested == "cpp" or (requested == "auto" and rest == "eager")
