"""``tilewright::softmax``: softmax or log_softmax of ``scale * x + bias`` along one dimension.

    softmax      y_i = exp(z_i) / sum_j exp(z_j)            z = scale * x + bias
    log_softmax  y_i = z_i - log(sum_j exp(z_j))            z = -inf where a bool bias is False

Edge cases are torch's: a row of only ``-inf`` (every element hidden, too), a row with ``+inf`` or with NaN gives NaN.
The kernel ops ``tilewright::softmax_forward`` and ``softmax_backward`` run the kernels of codegen/softmax.py.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ...codegen.softmax import (
    ALGORITHMS,
    MAX_BATCH,
    MAX_KEPT,
    MAX_TILE,
    SPLITTABLE,
    SoftmaxBackwardSpec,
    SoftmaxSpec,
    choose_splits,
    choose_tile,
    collapse,
    fits_in_cache,
    fits_on_chip,
    next_power_of_two,
)
from .. import cpu, fast_call
from ..errors import BadArgument, UnsupportedKernel
from .registry import LIBRARY, Tolerance, canonical

HALF = (torch.float16, torch.bfloat16)
KERNEL_DTYPES = (torch.float32, *HALF)

# u is a dtype's unit roundoff: 2^-24 (float32), 2^-11 (float16), 2^-8 (bfloat16). For scores of |z| <= 32 the reference
# in float32 rounds z by at most u |z| in each of three steps (scale, bias, minus the maximum): 96 u, which is also the
# relative error of exp(z). exp itself, the sum and the division add less than 32 u: rtol 128 u = 2^-17. The logarithm
# turns relative into absolute error: log_softmax has atol 2^-17; softmax only needs an atol for values that are flushed
# to zero below 2^-126. Half types are computed in float32 and rounded once: u more.
_F32 = 2.0**-17
TOLERANCE = {
    torch.float64: Tolerance(atol=2.0**-46, rtol=2.0**-46),
    torch.float32: Tolerance(atol=_F32, rtol=_F32),
    torch.float16: Tolerance(atol=_F32, rtol=2.0**-11 + 2 * _F32),
    torch.bfloat16: Tolerance(atol=_F32, rtol=2.0**-8 + 2 * _F32),
}


def promoted_dtype(x: Tensor, bias: Tensor | None) -> torch.dtype:
    """The dtype of ``scale * x + bias``, as PyTorch promotes."""
    return x.dtype if bias is None or bias.dtype == torch.bool else torch.result_type(x, bias)


def check_arguments(x: Tensor, dim: int, bias: Tensor | None, algorithm: str) -> None:
    """Raise :class:`~tilewright.runtime.errors.BadArgument` for a call that has no meaning."""
    if algorithm != "auto" and algorithm not in ALGORITHMS:
        raise BadArgument(f"softmax: algorithm is {algorithm!r}, but must be auto or one of {', '.join(ALGORITHMS)}")
    if not -max(x.dim(), 1) <= dim < max(x.dim(), 1):
        raise BadArgument(f"softmax: dim is {dim}, but x has {x.dim()} dimensions")
    if bias is None:
        return
    if bias.dtype != torch.bool and not bias.dtype.is_floating_point:
        raise BadArgument(f"softmax: bias is {bias.dtype}, but must be floating (added) or bool (False hides)")
    sizes = list(zip(reversed(bias.shape), reversed(x.shape), strict=False))
    known = [(b, s) for b, s in sizes if isinstance(b, int) and isinstance(s, int)]
    if bias.dim() > x.dim() or any(b not in (1, s) for b, s in known):
        raise BadArgument(f"softmax: bias {tuple(bias.shape)} does not broadcast to x {tuple(x.shape)}")


def reference(
    x: Tensor,
    dim: int,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    log: bool = False,
    algorithm: str = "auto",
) -> Tensor:
    """softmax, or with ``log`` log_softmax, of ``scale * x + bias`` along ``dim``.

    x: any shape, floating (integers with ``dtype``). bias: broadcastable to x; floating is added, bool hides where
    False. dtype: as in ``torch.softmax``. algorithm: how a kernel computes it; no part of the function.
    Scores of half types are formed in float32, and the result is rounded once. Result: x's shape, contiguous,
    ``dtype`` or the promoted dtype of x and bias.
    """
    check_arguments(x, dim, bias, algorithm)
    function = torch.log_softmax if log else torch.softmax
    z = x
    promoted = promoted_dtype(x, bias)
    rounds = scale != 1.0 or (bias is not None and bias.dtype != torch.bool)
    if rounds and x.dtype in HALF:
        z = z.to(torch.float32)
    if scale != 1.0:
        z = z * scale
    if bias is not None:
        z = z.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else z + bias
    if rounds and promoted in HALF:
        return function(z, dim).to(promoted if dtype is None else dtype)
    return function(z, dim, dtype=dtype)


def _composite(
    x: Tensor,
    dim: int,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    log: bool = False,
    algorithm: str = "auto",
    target: str = "reference",
) -> Tensor:
    if target == "reference":
        return reference(x, dim, bias, scale=scale, dtype=dtype, log=log, algorithm=algorithm)
    check_arguments(x, dim, bias, algorithm)
    out_dtype = dtype if dtype is not None else promoted_dtype(x, bias)
    return torch.ops.tilewright.softmax_forward(x, bias, dim, scale, out_dtype, log, algorithm, target)


# From a call to a spec.


def hint(size: Any) -> int:
    """The size, or what a symbolic one was when captured. Raises :class:`UnsupportedKernel` when nobody knows."""
    if isinstance(size, int):
        return size
    node = size.node
    if not node.has_hint():
        raise UnsupportedKernel(f"the size {size} depends on data, so no kernel can be chosen before it runs")
    return int(node.hint)


def check_device(target: str, **tensors: Tensor | None) -> None:
    """Raise :class:`UnsupportedKernel` when ``target`` cannot run on the tensors' devices, or these differ."""
    wanted = {"triton": "cuda", "triton-interpret": "cpu", "cpp": "cpu"}.get(target)
    if wanted is None:
        raise UnsupportedKernel(f"there is no softmax kernel for target {target}")
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device.type != wanted:
            raise UnsupportedKernel(f"target {target} runs on {wanted} tensors, but {name} is on {tensor.device}")
    devices = {tensor.device for tensor in tensors.values() if tensor is not None}
    if len(devices) > 1:
        raise UnsupportedKernel(f"the tensors are on different devices: {', '.join(sorted(map(str, devices)))}")


def check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in KERNEL_DTYPES:
        raise UnsupportedKernel(f"{name} is {_name(dtype)}; kernels compute float32, bfloat16 and float16")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """How many the device has; of a GPU that is not here, an H100's. A row is never split on the CPU."""
    if device.type != "cuda":
        return 1
    if not torch.cuda.is_available():
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def _layout(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if tensor.dim() == 0:
        return (1,), (1,)
    return tuple(map(hint, tensor.shape)), tuple(map(hint, tensor.stride()))


def _expanded(tensor: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of ``tensor.expand(shape)``."""
    sizes, strides = _layout(tensor)
    steps = [0 if size == 1 else stride for size, stride in zip(sizes, strides, strict=True)]
    return (*(0 for _ in range(len(shape) - len(steps))), *steps)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def contiguous_axis(sizes: tuple[int, ...], strides: tuple[int, ...], dim: int) -> str:
    """``"cols"`` when the smallest step in memory is along a row."""
    batch = [step for d, step in enumerate(strides) if d != dim and sizes[d] > 1 and step > 0]
    return "cols" if not batch or strides[dim] <= min(batch) or sizes[dim] == 1 else "rows"


def row_fits_on_chip(x: Tensor, dim: int) -> bool:
    """Whether the one-read kernel is right for x (or a fake of it); symbolic sizes as they were when captured."""
    shape, strides = _layout(x)
    return fits_on_chip(shape[dim], contiguous_axis(shape, strides, dim % len(shape)))


@functools.lru_cache(maxsize=4096)
def _geometry(
    shape: tuple[int, ...], dim: int, strides: tuple[tuple[int, ...], ...], algorithm: str, held: int, processors: int
) -> dict[str, Any]:
    """Tile, splits, ranks and index width of a Triton kernel.

    strides: of every tensor, the one whose layout decides first. held: how many tensors a one-read kernel holds.
    """
    batch = [d for d in range(len(shape)) if d != dim]
    groups = collapse([shape[d] for d in batch], *([steps[d] for d in batch] for steps in strides))
    if len(groups) > MAX_BATCH + 1:
        raise UnsupportedKernel(f"the strides leave {len(groups)} batch dimensions; kernels handle {MAX_BATCH + 1}")
    n = shape[dim]
    contiguous = contiguous_axis(shape, strides[0], dim)
    if algorithm == "auto":
        algorithm = "one_read" if fits_on_chip(n, contiguous, held) else "two_pass"
    elif algorithm == "one_read" and next_power_of_two(n) > MAX_TILE:
        raise UnsupportedKernel(f"one_read holds a row on chip, and {n} elements do not fit")
    rows, cols, warps = choose_tile(n, groups[0][0], contiguous, algorithm == "one_read", held)
    programs = -(-groups[0][0] // rows) * math.prod(size for size, _ in groups[1:])
    spans = [[(size, step) for size, step in zip(shape, steps, strict=True) if size > 1] for steps in strides]
    # The last tile runs over the end before it is masked.
    reach = [
        sum((size - 1) * step for size, step in dims) + MAX_TILE * max((s for _, s in dims), default=1)
        for dims in spans
    ]
    return {
        "algorithm": algorithm,
        "block_rows": rows,
        "block_cols": cols,
        "num_warps": warps,
        "splits": choose_splits(n, programs, cols, processors) if algorithm in SPLITTABLE else 1,
        "outer_rank": len(groups) - 1,
        "contiguous": contiguous,
        "index_bits": 64 if max(reach) >= 2**31 else 32,
    }


def _native_geometry(
    shape: tuple[int, ...], dim: int, strides: tuple[int, ...], algorithm: str, row_bytes: int
) -> dict[str, Any]:
    """What of a call decides a native kernel: sizes and strides are its arguments, so one serves every shape.

    strides: of the tensor whose layout decides. row_bytes: of an element, all that is held while a row is computed.
    """
    n, contiguous = shape[dim], contiguous_axis(shape, strides, dim)
    if algorithm == "auto":
        algorithm = "one_read" if fits_in_cache(n, contiguous, row_bytes, cpu.cache_bytes()) else "two_pass"
    elif algorithm == "one_read" and not fits_in_cache(n, contiguous, 1, 2 * MAX_KEPT):
        raise UnsupportedKernel(f"one_read keeps a row in cache, and {n} elements do not fit")
    return {"algorithm": algorithm, "contiguous": contiguous, "index_bits": 64}


def spec(
    x: Tensor,
    dim: int,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    log: bool = False,
    algorithm: str = "auto",
    target: str = "triton",
) -> SoftmaxSpec:
    """The kernel for a call, from tensors or fake tensors; symbolic sizes count as they were when captured.

    Raises :class:`~tilewright.runtime.errors.UnsupportedKernel` with the reason when no kernel computes the call.
    """
    check_arguments(x, dim, bias, algorithm)
    check_device(target, x=x, bias=bias)
    check_dtype("x", x.dtype)
    if bias is not None and bias.dtype != torch.bool:
        check_dtype("bias", bias.dtype)
    promoted = promoted_dtype(x, bias)
    out_dtype = promoted if dtype is None else dtype
    check_dtype("the result", out_dtype)
    if out_dtype not in (promoted, torch.float32):
        raise UnsupportedKernel(f"dtype={_name(out_dtype)} rounds the {_name(promoted)} scores before the softmax")
    if algorithm == "three_pass_reload" and (log or out_dtype != torch.float32):
        raise UnsupportedKernel("three_pass_reload keeps float32 exponentials in the output: softmax in float32 only")
    shape, strides = _layout(x)
    if target == "cpp":
        geometry = _native_geometry(shape, dim % len(shape), strides, algorithm, 4 + x.dtype.itemsize)
    else:
        layouts = [strides, *([_expanded(bias, shape)] if bias is not None else []), _contiguous(shape)]
        geometry = _geometry(shape, dim % len(shape), tuple(layouts), algorithm, 1, _multiprocessors(x.device))
    return SoftmaxSpec(
        in_dtype=_name(x.dtype),
        out_dtype=_name(out_dtype),
        log=log,
        bias="none" if bias is None else _name(bias.dtype),
        scaled=scale != 1.0,
        **geometry,
    )


def backward_spec(
    grad: Tensor, y: Tensor, dim: int, *, dtype: torch.dtype, log: bool = False, target: str = "triton"
) -> SoftmaxBackwardSpec:
    """The kernel for ``softmax_backward``. Raises :class:`UnsupportedKernel` with the reason when there is none."""
    check_device(target, grad=grad, y=y)
    check_dtype("the gradient", grad.dtype)
    check_dtype("the output", y.dtype)
    check_dtype("the input", dtype)
    shape, strides = _layout(y)
    if target == "cpp":
        geometry = _native_geometry(shape, dim % len(shape), strides, "auto", y.dtype.itemsize + grad.dtype.itemsize)
    else:
        layouts = (strides, _layout(grad)[1], _contiguous(shape))
        geometry = dict(_geometry(shape, dim % len(shape), layouts, "auto", 2, _multiprocessors(y.device)))
    one_read = geometry.pop("algorithm") == "one_read"
    return SoftmaxBackwardSpec(
        in_dtype=_name(y.dtype),
        grad_dtype=_name(grad.dtype),
        out_dtype=_name(dtype),
        log=log,
        one_read=one_read,
        **geometry,
    )


# The kernel ops.

LIBRARY.define(
    "softmax_forward(Tensor x, Tensor? bias, int dim, float scale, ScalarType dtype, bool log, str algorithm,"
    " str target) -> Tensor"
)
LIBRARY.define(
    "softmax_backward(Tensor grad, Tensor y, int dim, float scale, ScalarType dtype, bool log, str target) -> Tensor"
)


def _forward_kernel(
    x: Tensor,
    bias: Tensor | None,
    dim: int,
    scale: float,
    dtype: torch.dtype,
    log: bool,
    algorithm: str,
    target: str,
) -> fast_call.Launch:
    from ..autotune import load_best

    chosen = spec(x, dim, bias, scale=scale, dtype=dtype, log=log, algorithm=algorithm, target=target)
    return load_best(chosen, target, lambda: (x, bias, dim, scale)).launch


def _backward_kernel(
    grad: Tensor, y: Tensor, dim: int, scale: float, dtype: torch.dtype, log: bool, target: str
) -> fast_call.Launch:
    from ..autotune import load_best

    chosen = backward_spec(grad, y, dim, dtype=dtype, log=log, target=target)
    return load_best(chosen, target, lambda: (grad, y, dim, scale)).launch


def _forward_fake(x: Tensor, bias: Tensor | None, dim: int, scale: float, dtype: torch.dtype, *_: Any) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _backward_fake(grad: Tensor, y: Tensor, dim: int, scale: float, dtype: torch.dtype, *_: Any) -> Tensor:
    return torch.empty(y.shape, dtype=dtype, device=y.device)


fast_call.implement("softmax_forward", _forward_kernel, passes=("x", "bias", "dim", "scale"))
fast_call.implement("softmax_backward", _backward_kernel, passes=("grad", "y", "dim", "scale"))
torch.library.register_fake("tilewright::softmax_forward", _forward_fake, lib=LIBRARY)
torch.library.register_fake("tilewright::softmax_backward", _backward_fake, lib=LIBRARY)


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.dim, ctx.scale, _, ctx.log, _, ctx.target = inputs
    ctx.x_dtype = x.dtype
    ctx.bias_shape = None if bias is None else bias.shape
    ctx.bias_dtype = None if bias is None else bias.dtype
    # Only log_softmax needs the mask: softmax's own zeros hide the elements.
    hidden = bias if bias is not None and bias.dtype == torch.bool and ctx.log else None
    ctx.save_for_backward(output, hidden)


def _forward_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """dx = scale * dz and dbias = dz summed over what bias was broadcast along."""
    y, visible = ctx.saved_tensors
    backward = torch.ops.tilewright.softmax_backward
    dx = dbias = None
    if ctx.needs_input_grad[1] and ctx.bias_dtype != torch.bool:
        dz = backward(grad, y, ctx.dim, 1.0, torch.float32, ctx.log, ctx.target)
        dbias = dz.sum_to_size(ctx.bias_shape).to(ctx.bias_dtype)
        if ctx.needs_input_grad[0]:
            dx = (dz * ctx.scale).to(ctx.x_dtype)
    elif ctx.needs_input_grad[0]:
        dx = backward(grad, y, ctx.dim, ctx.scale, ctx.x_dtype, ctx.log, ctx.target)
    if dx is not None and visible is not None:
        dx = dx.masked_fill(~visible, 0.0)
    return dx, dbias, None, None, None, None, None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, y, ctx.dim, ctx.scale, _, ctx.log, _ = inputs
    ctx.save_for_backward(grad, y)


def _backward_gradient(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of the gradient, in plain PyTorch: it is rarely asked for.

    dx = scale * y * (g - <g, y>)        dg = scale * y * (v - <v, y>)    dy = scale * (v * (g - <g, y>) - g * <v, y>)
    dx = scale * (g - exp(y) * sum g)    dg = scale * (v - <v, exp y>)    dy = -scale * v * exp(y) * sum g
    """
    grad, y = ctx.saved_tensors
    g, p, w = grad.float(), y.float(), v.float() * ctx.scale
    if ctx.log:
        p = p.exp()
        dg = w - (w * p).sum(ctx.dim, keepdim=True)
        dy = -w * p * g.sum(ctx.dim, keepdim=True)
    else:
        along = (w * p).sum(ctx.dim, keepdim=True)
        dg = p * (w - along)
        dy = w * (g - (g * p).sum(ctx.dim, keepdim=True)) - g * along
    return dg.to(grad.dtype), dy.to(y.dtype), None, None, None, None, None


torch.library.register_autograd(
    "tilewright::softmax_forward", _forward_gradient, setup_context=_save_forward, lib=LIBRARY
)
torch.library.register_autograd(
    "tilewright::softmax_backward", _backward_gradient, setup_context=_save_backward, lib=LIBRARY
)

softmax = canonical(
    "softmax(Tensor x, int dim, Tensor? bias=None, *, float scale=1.0, ScalarType? dtype=None, bool log=False,"
    ' str algorithm="auto", str target="reference") -> Tensor',
    reference=reference,
    composite=_composite,
    tolerance=TOLERANCE,
    spec=spec,
)
