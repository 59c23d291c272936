"""The kernel ops below rms_norm and layer_norm, with or without a residual: ``norm_forward``, ``add_norm_forward``
(which gives the sum too) and ``norm_backward``. Their kernels are those of codegen/norm.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...codegen.norm import NormBackwardSpec, NormSpec
from .. import fast_call
from ..errors import UnsupportedKernel
from ..load import load
from .native import check_native, differentiate, dtype_name, result_dtype
from .registry import LIBRARY


def spec(
    name: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    centred: bool,
    round_before_weight: bool,
    keep_sum: bool,
    weight_offset: float,
    target: str,
) -> NormSpec:
    """The kernel of a call of the op ``name``, from tensors or fake tensors.

    Raises :class:`~tilewright.runtime.errors.UnsupportedKernel` with the reason when none computes the call.
    """
    check_native(name, target, x=x, residual=residual, weight=weight, bias=bias)
    if x.dim() == 0:
        raise UnsupportedKernel("x has no dimension to normalise")
    if residual is not None and (residual.dtype != x.dtype or tuple(residual.shape) != tuple(x.shape)):
        raise UnsupportedKernel("the residual has another shape or dtype than x, and the kernel adds equal ones")
    for key, vector in (("weight", weight), ("bias", bias)):
        if vector is None:
            continue
        leading = vector.shape[:-1]
        if not 1 <= vector.dim() <= x.dim() or vector.shape[-1] != x.shape[-1] or any(size != 1 for size in leading):
            raise UnsupportedKernel(f"{key} has shape {tuple(vector.shape)}, and the kernel takes one value a column")
    rounds = round_before_weight and weight is not None
    return NormSpec(
        in_dtype=dtype_name(x),
        out_dtype=result_dtype(x, weight) if rounds and weight is not None else dtype_name(x),
        weight=dtype_name(weight),
        bias=dtype_name(bias),
        centred=centred,
        round_before_weight=rounds,
        offset=weight_offset != 0 and weight is not None and not centred,
        residual=residual is not None,
        keep_sum=keep_sum,
    )


_ARGUMENTS = (
    "Tensor? weight, Tensor? bias, float eps, float weight_offset, bool centred, bool round_before_weight, str target"
)
LIBRARY.define(f"norm_forward(Tensor x, Tensor? residual, {_ARGUMENTS}) -> Tensor")
LIBRARY.define(f"add_norm_forward(Tensor x, Tensor residual, {_ARGUMENTS}) -> (Tensor, Tensor)")
LIBRARY.define(
    "norm_backward(Tensor grad, Tensor x, Tensor? extra, Tensor? weight, float eps, float weight_offset, "
    "ScalarType? bias, bool centred, bool round_before_weight, str target) -> (Tensor, Tensor, Tensor)"
)


def _forward_launch(keep_sum: bool) -> Callable[..., Any]:
    def choose(
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        weight_offset: float,
        centred: bool,
        round_before_weight: bool,
        target: str,
    ) -> Callable[..., Any]:
        chosen = spec(
            "layer_norm" if centred else "rms_norm",
            x,
            residual,
            weight,
            bias,
            centred=centred,
            round_before_weight=round_before_weight,
            weight_offset=weight_offset,
            keep_sum=keep_sum,
            target=target,
        )
        return load(chosen, target).launch

    return choose


def _backward_launch(
    grad: Tensor,
    x: Tensor,
    extra: Tensor | None,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
    bias: torch.dtype | None,
    centred: bool,
    round_before_weight: bool,
    target: str,
) -> Callable[..., Any]:
    check_native("norm_backward", target, grad=grad, x=x, extra=extra, weight=weight)
    chosen = NormBackwardSpec(
        in_dtype=dtype_name(x),
        out_dtype=dtype_name(grad),
        weight=dtype_name(weight),
        bias="none" if bias is None else str(bias).removeprefix("torch."),
        centred=centred,
        round_before_weight=round_before_weight and weight is not None,
        offset=weight_offset != 0 and weight is not None and not centred,
        extra=extra is not None,
    )
    return load(chosen, target).launch


_FORWARD = ("x", "residual", "weight", "bias", "eps", "weight_offset")
fast_call.implement("norm_forward", _forward_launch(False), passes=_FORWARD)
fast_call.implement("add_norm_forward", _forward_launch(True), passes=_FORWARD)
fast_call.implement("norm_backward", _backward_launch, passes=("grad", "x", "extra", "weight", "eps", "weight_offset"))


def _result(x: Tensor, weight: Tensor | None, round_before_weight: bool) -> Tensor:
    dtype = torch.result_type(x, weight) if round_before_weight and weight is not None else x.dtype
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _forward_fake(
    x: Tensor, residual: Any, weight: Any, bias: Any, eps: Any, offset: Any, centred: Any, rounds: bool, target: Any
) -> Tensor:
    return _result(x, weight, rounds)


def _add_forward_fake(
    x: Tensor, residual: Any, weight: Any, bias: Any, eps: Any, offset: Any, centred: Any, rounds: bool, target: Any
) -> tuple[Tensor, Tensor]:
    return _result(x, weight, rounds), torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _backward_fake(
    grad: Tensor, x: Tensor, extra: Any, weight: Any, eps: Any, offset: Any, bias: Any, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    n = x.shape[-1]
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        x.new_empty((0,), dtype=torch.float32) if weight is None else weight.new_empty((n,)),
        x.new_empty((0,), dtype=torch.float32) if bias is None else x.new_empty((n,), dtype=bias),
    )


torch.library.register_fake("tilewright::norm_forward", _forward_fake, lib=LIBRARY)
torch.library.register_fake("tilewright::add_norm_forward", _add_forward_fake, lib=LIBRARY)
torch.library.register_fake("tilewright::norm_backward", _backward_fake, lib=LIBRARY)


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, residual, weight, bias, ctx.eps, ctx.offset, ctx.centred, ctx.rounds, ctx.target = inputs
    ctx.bias_dtype, ctx.bias_shape = (None, None) if bias is None else (bias.dtype, bias.shape)
    ctx.weight_shape = None if weight is None else weight.shape
    if isinstance(output, tuple):
        ctx.save_for_backward(output[1], None, weight)
    else:
        ctx.save_for_backward(x, residual, weight)


def _forward_gradient(ctx: Any, grad: Tensor | None, extra: Tensor | None = None) -> tuple[Tensor | None, ...]:
    total, residual, weight = ctx.saved_tensors
    if residual is not None:
        total = total + residual
    dx = extra
    dweight = dbias = None
    if grad is not None:
        dx, dweight, dbias = torch.ops.tilewright.norm_backward(
            grad, total, extra, weight, ctx.eps, ctx.offset, ctx.bias_dtype, ctx.centred, ctx.rounds, ctx.target
        )
        dweight = None if weight is None else dweight.view(ctx.weight_shape)
        dbias = None if ctx.bias_dtype is None else dbias.view(ctx.bias_shape)
    dresidual = dx if ctx.needs_input_grad[1] else None
    return dx, dresidual, dweight, dbias, None, None, None, None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, x, extra, weight, ctx.eps, ctx.offset, ctx.bias, ctx.centred, ctx.rounds, _ = inputs
    ctx.save_for_backward(grad, x, extra, weight)


def _backward_gradient(ctx: Any, *vectors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradient of the gradient, in plain PyTorch: it is rarely asked for."""

    def first(grad: Tensor, x: Tensor, extra: Tensor | None, weight: Tensor | None) -> list[Tensor | None]:
        bias = None if ctx.bias is None else torch.zeros(x.shape[-1:], dtype=ctx.bias, requires_grad=True)
        wide = x.float()
        if ctx.centred:
            wide = wide - wide.mean(-1, keepdim=True)
        out = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + ctx.eps)
        if weight is not None:
            out = out * (weight.float() + ctx.offset)
        if bias is not None:
            out = out + bias
        leaves = [leaf for leaf in (x, weight, bias) if leaf is not None]
        found = iter(torch.autograd.grad(out, leaves, grad.float(), create_graph=True))
        dx, dweight, dbias = (None if leaf is None else next(found) for leaf in (x, weight, bias))
        return [dx if extra is None or dx is None else dx + extra, dweight, dbias]

    return (*differentiate(first, ctx.saved_tensors, vectors), *(None,) * 6)


for _name in ("norm_forward", "add_norm_forward"):
    torch.library.register_autograd(f"tilewright::{_name}", _forward_gradient, setup_context=_save_forward, lib=LIBRARY)
torch.library.register_autograd(
    "tilewright::norm_backward", _backward_gradient, setup_context=_save_backward, lib=LIBRARY
)
