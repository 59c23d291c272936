"""A linear layer, as ``torch.nn.functional.linear``, and the kernel op that also takes what follows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ...codegen.linear import MOST_WEIGHTS, LinearSpec
from .. import fast_call, packing
from ..errors import UnsupportedKernel
from ..load import load
from .native import check_native, dtype_name
from .registry import LIBRARY, Tolerance, canonical


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``.

    x: (..., K); weight: (N, K), any strides; bias: (N,) or None; one floating dtype. Returns (..., N) in that dtype,
    accumulated in at least float32. Raises RuntimeError when shapes or dtypes disagree, as torch does.
    """
    return functional.linear(x, weight, bias)


def _composite(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, target: str = "reference") -> Tensor:
    if runs_reference(target, x, weight, bias):
        return functional.linear(x, weight, bias)
    return torch.ops.tilewright.linear_forward(x, [weight], [bias], None, "none", False, target)


def runs_reference(target: str, *tensors: Tensor | None) -> bool:
    """Whether a call runs as plain PyTorch whatever the target: when a gradient is recorded, and under autocast.

    Weights that change at every step would be packed at every step, and autocast decides dtypes below this op.
    """
    if target == "reference" or torch.is_autocast_enabled("cpu"):
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def spec(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, target: str = "cpp") -> LinearSpec:
    """The kernel for a call. Raises :class:`~tilewright.runtime.errors.UnsupportedKernel` when there is none."""
    return kernel_spec("linear", x, [weight], [bias], None, "none", False, target)


def kernel_spec(
    name: str,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    residual: Tensor | None,
    activation: str,
    gated: bool,
    target: str,
) -> LinearSpec:
    """The kernel of ``linear_forward``, for the op ``name``. Raises as :func:`spec`."""
    named = {f"weight {i}": w for i, w in enumerate(weights)} | {f"bias {i}": b for i, b in enumerate(biases)}
    check_native(name, target, x=x, residual=residual, **named)
    for key, tensor in {"residual": residual, **named}.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise UnsupportedKernel(f"{name}: {key} is {tensor.dtype}, but x is {x.dtype}")
    if len(weights) > MOST_WEIGHTS or len(weights) != len(biases) or (gated and len(weights) != 2):
        raise UnsupportedKernel(f"{name} takes one to {MOST_WEIGHTS} weights, each with a bias or None; gated, two")
    for weight, bias in zip(weights, biases, strict=True):
        if weight.dim() != 2 or x.dim() < 1 or (bias is not None and bias.dim() != 1):
            raise UnsupportedKernel(f"{name}: a weight has two dimensions, a bias one, and x at least one")
    return LinearSpec(dtype=dtype_name(x), activation=activation, gated=gated)


LIBRARY.define(
    "linear_forward(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor? residual, str activation, bool gated,"
    " str target) -> Tensor"
)


def _check_shapes(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], residual: Tensor | None, gated: bool
) -> tuple[int, ...]:
    """The result's shape. Raises RuntimeError, as torch does, when sizes disagree."""
    for weight, bias in zip(weights, biases, strict=True):
        _agree("x", x.size(-1), "weight", weight.size(1))
        if bias is not None:
            _agree("weight", weight.size(0), "bias", bias.size(0))
    width = sum(weight.size(0) for weight in weights)
    if gated:
        _agree("the gate", weights[0].size(0), "what it multiplies", weights[1].size(0))
        width = weights[0].size(0)
    shape = (*x.shape[:-1], width)
    if residual is not None:
        torch._check(residual.dim() == len(shape), lambda: "linear: a residual has the result's shape")
        for mine, wanted in zip(residual.shape, shape, strict=True):
            _agree("residual", mine, "result", wanted)
    return shape


def _agree(one: str, size: int, other: str, wanted: int) -> None:
    torch._check(size == wanted, lambda: f"linear: {one} and {other} disagree: {size} and {wanted}")


def _launch(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    residual: Tensor | None,
    activation: str,
    gated: bool,
    target: str,
) -> Callable[..., Tensor]:
    chosen = kernel_spec("linear", x, weights, biases, residual, activation, gated, target)
    _check_shapes(x, weights, biases, residual, gated)
    launch = load(chosen, target).launch

    def run(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], residual: Tensor | None) -> Tensor:
        out: Tensor = launch(x, weights, biases, residual, packing.packed)
        return out

    return run


fast_call.implement("linear_forward", _launch, passes=("x", "weights", "biases", "residual"))


def _fake(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    residual: Tensor | None,
    activation: str,
    gated: bool,
    target: str,
) -> Tensor:
    return x.new_empty(_check_shapes(x, weights, biases, residual, gated))


torch.library.register_fake("tilewright::linear_forward", _fake, lib=LIBRARY)

# A dot product of K terms errs by about sqrt(K) * eps/2 of the root of the sum of squares (rounding errors of random
# sign; Higham, Accuracy and Stability, 2.8): 32 eps for K up to 4096 and results of order one. Half dtypes accumulate
# in float32 and round the result, and the sum with the bias where the backend does not fuse it: eps.
TOLERANCE = {
    torch.float64: Tolerance(32 * 2.0**-52, 32 * 2.0**-52),
    torch.float32: Tolerance(32 * 2.0**-23, 32 * 2.0**-23),
    torch.bfloat16: Tolerance(2.0**-7, 2.0**-7),
    torch.float16: Tolerance(2.0**-10, 2.0**-10),
}
op = canonical(
    'linear(Tensor x, Tensor weight, Tensor? bias=None, *, str target="reference") -> Tensor',
    reference=reference,
    composite=_composite,
    tolerance=TOLERANCE,
    spec=spec,
)
