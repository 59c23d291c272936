"""Rotary position embedding ("RoFormer: Enhanced Transformer with Rotary Position Embedding", Su et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...codegen.rope import LAYOUTS, RopeSpec
from .. import fast_call
from ..errors import BadArgument, UnsupportedKernel
from ..load import load
from .native import DTYPE_NAMES, check_native, dtype_name, result_dtype
from .registry import LIBRARY, Tolerance, canonical

__all__ = ["LAYOUTS", "op", "reference", "rotate", "spec"]


def check_layout(layout: str) -> None:
    """Raise :class:`~tilewright.runtime.errors.BadArgument` for an unknown layout."""
    if layout not in LAYOUTS:
        raise BadArgument(f"rope has no layout {layout!r}; use one of {', '.join(LAYOUTS)}")


def rotate(x: Tensor, layout: str) -> Tensor:
    """The pairs of x's last dimension (even size) turned by 90 degrees: (a, b) -> (-b, a).

    rotate_half pairs element i with i + N/2 (GPT-NeoX, Llama); interleaved pairs 2i with 2i + 1 (GPT-J, the paper).
    """
    check_layout(layout)
    if layout == "rotate_half":
        half = x.shape[-1] // 2
        return torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def reference(x: Tensor, cos: Tensor, sin: Tensor, *, layout: str = "rotate_half") -> Tensor:
    """``x * cos + rotate(x) * sin``.

    x: (..., N), N even, any floating dtype. cos, sin: broadcastable to x, each angle at both places of its pair.
    Products and sum are rounded in the promoted dtype, as models write it; the result has that dtype.
    Raises BadArgument for an unknown layout.
    """
    return x * cos + rotate(x, layout) * sin


def _composite(
    x: Tensor, cos: Tensor, sin: Tensor, *, layout: str = "rotate_half", target: str = "reference"
) -> Tensor:
    if target == "reference":
        return reference(x, cos, sin, layout=layout)
    check_layout(layout)
    return torch.ops.tilewright.rope_forward(x, cos, sin, layout, False, torch.result_type(x, cos), target)


def spec(x: Tensor, cos: Tensor, sin: Tensor, *, layout: str = "rotate_half", target: str = "cpp") -> RopeSpec:
    """The kernel for a call. Raises :class:`~tilewright.runtime.errors.UnsupportedKernel` when there is none."""
    check_native("rope", target, x=x, cos=cos, sin=sin)
    check_layout(layout)
    return _spec(x, cos, sin, layout, False, torch.result_type(x, cos))


def _spec(x: Tensor, cos: Tensor, sin: Tensor, layout: str, transposed: bool, dtype: torch.dtype) -> RopeSpec:
    if cos.dtype != sin.dtype:
        raise UnsupportedKernel(f"cos is {dtype_name(cos)} and sin {dtype_name(sin)}: the kernel takes one dtype")
    sizes = {t.shape[-1] if t.dim() else 1 for t in (x, cos, sin)}
    if any(size % 2 for size in sizes) or len(sizes) > 1:
        raise UnsupportedKernel("the last dimensions of x, cos and sin must be one even size")
    return RopeSpec(
        in_dtype=dtype_name(x),
        angle_dtype=dtype_name(cos),
        product_dtype=result_dtype(x, cos),
        out_dtype=DTYPE_NAMES[dtype],
        layout=layout,
        transposed=transposed,
    )


LIBRARY.define(
    "rope_forward(Tensor x, Tensor cos, Tensor sin, str layout, bool transposed, ScalarType dtype, str target)"
    " -> Tensor"
)


def _launch(
    x: Tensor, cos: Tensor, sin: Tensor, layout: str, transposed: bool, dtype: torch.dtype, target: str
) -> Callable[..., Any]:
    check_native("rope", target, x=x, cos=cos, sin=sin)
    return load(_spec(x, cos, sin, layout, transposed, dtype), target).launch


def _fake(
    x: Tensor, cos: Tensor, sin: Tensor, layout: str, transposed: bool, dtype: torch.dtype, target: str
) -> Tensor:
    shape = torch.broadcast_shapes(x.shape, cos.shape, sin.shape)
    if tuple(shape) == tuple(x.shape):
        return torch.empty_like(x, dtype=dtype)
    return torch.empty(shape, dtype=dtype, device=x.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cos, sin, ctx.layout, ctx.transposed, _, ctx.target = inputs
    ctx.shape, ctx.dtype = x.shape, x.dtype
    ctx.save_for_backward(x if ctx.needs_input_grad[1] or ctx.needs_input_grad[2] else None, cos, sin)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """dx turns the gradient back; those of the angles, rarely wanted, are plain PyTorch.

    out = x cos + R x sin: dcos = g x, dsin = g R x. Transposed, out = x cos + R^T (x sin): dsin = x R g.
    """
    x, cos, sin = ctx.saved_tensors
    dx = dcos = dsin = None
    if ctx.needs_input_grad[0]:
        turned = torch.ops.tilewright.rope_forward(
            grad, cos, sin, ctx.layout, not ctx.transposed, ctx.dtype, ctx.target
        )
        dx = turned.sum_to_size(ctx.shape)
    if ctx.needs_input_grad[1]:
        dcos = (grad * x).sum_to_size(cos.shape).to(cos.dtype)
    if ctx.needs_input_grad[2]:
        product = x * rotate(grad, ctx.layout) if ctx.transposed else grad * rotate(x, ctx.layout)
        dsin = product.sum_to_size(sin.shape).to(sin.dtype)
    return dx, dcos, dsin, None, None, None, None


fast_call.implement("rope_forward", _launch, passes=("x", "cos", "sin"))
torch.library.register_fake("tilewright::rope_forward", _fake, lib=LIBRARY)
torch.library.register_autograd("tilewright::rope_forward", _gradient, setup_context=_save, lib=LIBRARY)


# Two products and a sum, each rounded: 3/2 eps of |x cos| + |x' sin|, which is at most sqrt(2) times the length of the
# pair. The sum can cancel, so the error is absolute: 4 eps covers pairs up to length 2, rtol the larger results.
op = canonical(
    'rope(Tensor x, Tensor cos, Tensor sin, *, str layout="rotate_half", str target="reference") -> Tensor',
    reference=reference,
    composite=_composite,
    tolerance={
        torch.float64: Tolerance(4 * 2.0**-52, 4 * 2.0**-52),
        torch.float32: Tolerance(4 * 2.0**-23, 4 * 2.0**-23),
        torch.bfloat16: Tolerance(4 * 2.0**-7, 4 * 2.0**-7),
        torch.float16: Tolerance(4 * 2.0**-10, 4 * 2.0**-10),
    },
    spec=spec,
)
