"""The gate of a gated MLP ("GLU Variants Improve Transformer", Shazeer 2020): SwiGLU, GEGLU, ReGLU, GLU.

Only the gate: the linears around it stay sites of their own, so that passes on weights see them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...codegen.gated import GatedBackwardSpec, GatedSpec
from .. import fast_call
from ..errors import BadArgument
from ..load import load
from .native import check_native, differentiate, dtype_name, result_dtype
from .registry import LIBRARY, Tolerance, canonical

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
}


def check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise BadArgument(f"gated_mlp has no activation {activation!r}; use one of {', '.join(ACTIVATIONS)}")


def reference(gate: Tensor, up: Tensor, *, activation: str) -> Tensor:
    """``act(gate) * up``, elementwise; the activation is rounded to gate's dtype, as models write it.

    gate, up: broadcastable, any floating dtypes; returns the promoted dtype. Raises BadArgument for an unknown
    activation.
    """
    check_activation(activation)
    return ACTIVATIONS[activation](gate) * up


def _composite(gate: Tensor, up: Tensor, *, activation: str, target: str = "reference") -> Tensor:
    if target == "reference":
        return reference(gate, up, activation=activation)
    check_activation(activation)
    return torch.ops.tilewright.gated_mlp_forward(gate, up, activation, target)


def spec(gate: Tensor, up: Tensor, *, activation: str, target: str = "cpp") -> GatedSpec:
    """The kernel for a call. Raises :class:`~tilewright.runtime.errors.UnsupportedKernel` when there is none."""
    check_native("gated_mlp", target, gate=gate, up=up)
    check_activation(activation)
    return GatedSpec(
        gate_dtype=dtype_name(gate), up_dtype=dtype_name(up), out_dtype=result_dtype(gate, up), activation=activation
    )


LIBRARY.define("gated_mlp_forward(Tensor gate, Tensor up, str activation, str target) -> Tensor")
LIBRARY.define(
    "gated_mlp_backward(Tensor grad, Tensor gate, Tensor up, str activation, str target) -> (Tensor, Tensor)"
)


def _forward_launch(gate: Tensor, up: Tensor, activation: str, target: str) -> Callable[..., Any]:
    return load(spec(gate, up, activation=activation, target=target), target).launch


def _backward_launch(grad: Tensor, gate: Tensor, up: Tensor, activation: str, target: str) -> Callable[..., Any]:
    check_native("gated_mlp_backward", target, grad=grad, gate=gate, up=up)
    chosen = GatedBackwardSpec(
        gate_dtype=dtype_name(gate), up_dtype=dtype_name(up), out_dtype=dtype_name(grad), activation=activation
    )
    return load(chosen, target).launch


fast_call.implement("gated_mlp_forward", _forward_launch, passes=("gate", "up"))
fast_call.implement("gated_mlp_backward", _backward_launch, passes=("grad", "gate", "up"))


def _forward_fake(gate: Tensor, up: Tensor, activation: str, target: str) -> Tensor:
    shape = torch.broadcast_shapes(gate.shape, up.shape)
    return torch.empty(shape, dtype=torch.result_type(gate, up), device=gate.device)


def _backward_fake(grad: Tensor, gate: Tensor, up: Tensor, activation: str, target: str) -> tuple[Tensor, Tensor]:
    dgate = torch.empty(grad.shape, dtype=gate.dtype, device=gate.device)
    return dgate, torch.empty(grad.shape, dtype=up.dtype, device=up.device)


torch.library.register_fake("tilewright::gated_mlp_forward", _forward_fake, lib=LIBRARY)
torch.library.register_fake("tilewright::gated_mlp_backward", _backward_fake, lib=LIBRARY)


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.activation, ctx.target = inputs
    ctx.save_for_backward(gate, up)


def _forward_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gate, up = ctx.saved_tensors
    dgate, dup = torch.ops.tilewright.gated_mlp_backward(grad, gate, up, ctx.activation, ctx.target)
    return dgate.sum_to_size(gate.shape), dup.sum_to_size(up.shape), None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, gate, up, ctx.activation, _ = inputs
    ctx.save_for_backward(grad, gate, up)


def _backward_gradient(ctx: Any, *vectors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradient of the gradient, in plain PyTorch: it is rarely asked for."""

    def first(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        gate, up = gate.expand(grad.shape), up.expand(grad.shape)
        out = ACTIVATIONS[ctx.activation](gate) * up
        return torch.autograd.grad(out, (gate, up), grad.to(out.dtype), create_graph=True)

    return (*differentiate(first, ctx.saved_tensors, vectors), None, None)


torch.library.register_autograd(
    "tilewright::gated_mlp_forward", _forward_gradient, setup_context=_save_forward, lib=LIBRARY
)
torch.library.register_autograd(
    "tilewright::gated_mlp_backward", _backward_gradient, setup_context=_save_backward, lib=LIBRARY
)


# Activation and product are rounded: eps. float32's exp and tanh are good to a few units in the last place: 8 eps.
# gelu far left of zero cancels (1 + erf, 1 + tanh), and ATen's float32 gelu takes a polynomial with an absolute error
# for erf (Abramowitz and Stegun 7.1.26): 3 eps * |gate|, so 32 eps absolute for |gate * up| up to ten.
op = canonical(
    'gated_mlp(Tensor gate, Tensor up, *, str activation, str target="reference") -> Tensor',
    reference=reference,
    composite=_composite,
    tolerance={
        torch.float64: Tolerance(32 * 2.0**-52, 8 * 2.0**-52),
        torch.float32: Tolerance(32 * 2.0**-23, 8 * 2.0**-23),
        torch.bfloat16: Tolerance(32 * 2.0**-23, 1.5 * 2.0**-7),
        torch.float16: Tolerance(32 * 2.0**-23, 1.5 * 2.0**-10),
    },
    spec=spec,
)
