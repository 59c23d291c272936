"""The gate of a gated MLP ("GLU Variants Improve Transformer", Shazeer 2020): SwiGLU, GEGLU, ReGLU, GLU.

Only the gate: the linears around it stay sites of their own, so that passes on weights see them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import BadArgument
from .registry import Tolerance, canonical, reference_only

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
}


def reference(gate: Tensor, up: Tensor, *, activation: str) -> Tensor:
    """``act(gate) * up``, elementwise; the activation is rounded to gate's dtype, as models write it.

    gate, up: broadcastable, any floating dtypes; returns the promoted dtype. Raises BadArgument for an unknown
    activation.
    """
    if activation not in ACTIVATIONS:
        raise BadArgument(f"gated_mlp has no activation {activation!r}; use one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[activation](gate) * up


def _composite(gate: Tensor, up: Tensor, *, activation: str, target: str = "reference") -> Tensor:
    reference_only("gated_mlp", target)
    return reference(gate, up, activation=activation)


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
)
