"""How a canonical op is declared.

A canonical op is *composite*: it is kept whole in a pre-dispatch graph, where the passes see it, and dissolves below
autograd into either its ``aten`` form (``target="reference"``; Inductor then fuses it as it pleases) or an opaque
kernel op of a named target. So the target is one keyword of the call, and eager, Inductor, training and inference
all run the same node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UnsupportedKernel

LIBRARY = torch.library.Library("tilewright", "DEF")
TARGETS = ("reference", "triton", "triton-interpret", "cpp")


@dataclass(frozen=True)
class Tolerance:
    """``|out - expected| <= atol + rtol * |expected|``, against the reference in float64."""

    atol: float
    rtol: float


@dataclass(frozen=True)
class CanonicalOp:
    """One canonical op.

    name: the op's name under ``torch.ops.tilewright``.
    overload: the ``OpOverload`` that stands in graphs.
    reference: plain PyTorch, the definition of what is correct; the op's arguments without ``target``.
    tolerance: per dtype of the output, from the rounding of the reference itself.
    spec: ``spec(*args, target=..., **kwargs) -> KernelSpec`` from tensors or fake tensors; raises
        :class:`~tilewright.runtime.errors.UnsupportedKernel` with the reason when no kernel computes this call.
        None when no target has a kernel for the op.
    """

    name: str
    overload: Any
    reference: Callable[..., Any]
    tolerance: Mapping[torch.dtype, Tolerance]
    spec: Callable[..., Any] | None = None


OPS: dict[str, CanonicalOp] = {}
HELPERS: dict[str, Any] = {}
"""Name -> overload of composite ops that passes put beside canonical ones; they never become kernels."""


def canonical(
    schema: str,
    *,
    reference: Callable[..., Any],
    composite: Callable[..., Any],
    tolerance: Mapping[torch.dtype, Tolerance],
    spec: Callable[..., Any] | None = None,
) -> CanonicalOp:
    """Define ``tilewright::<schema>`` and register it. ``composite`` is its implementation for every target."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, composite, "CompositeImplicitAutograd")
    overload = getattr(torch.ops.tilewright, name).default
    op = CanonicalOp(name, overload, reference, dict(tolerance), spec)
    OPS[name] = op
    return op


def reference_only(name: str, target: str) -> None:
    """For the composite of an op that no target has a kernel for.

    Raises UnsupportedKernel for any target but ``reference``.
    """
    if target != "reference":
        raise UnsupportedKernel(f"{name} has no kernel for target {target!r}: call it with target='reference'")


def helper(schema: str, composite: Callable[..., Any]) -> Any:
    """Define ``tilewright::<schema>`` as a composite op that is no canonical op, and return its overload."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, composite, "CompositeImplicitAutograd")
    HELPERS[name] = getattr(torch.ops.tilewright, name).default
    return HELPERS[name]


def is_canonical(target: Any) -> bool:
    """Whether a graph node's target is a canonical op."""
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "tilewright" and target._opname in OPS
