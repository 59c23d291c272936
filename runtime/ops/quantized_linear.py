"""Linear layers with packed low-bit weights, with the activation, gate and residual that follow them, in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...codegen.linear import ACTIVATIONS, MOST_WEIGHTS
from ...codegen.quantized_linear import QuantizedLinearSpec
from ...codegen.quantized_triton import QuantizedLinearTritonSpec
from ...codegen.weight_format import WeightFormat, parse_weight_format
from .. import fast_call
from ..autotune import load_best
from ..errors import BadArgument, UnsupportedKernel
from . import gated_mlp, linear, quantized_triton, quantized_weight, rms_norm
from .native import check_native, dtype_name
from .registry import LIBRARY, Tolerance, canonical


def reference(
    x: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    zeros: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    residual: Tensor | None = None,
    *,
    rows: Sequence[int],
    format: str,
    activation: str = "none",
    gated: bool = False,
    norm: Tensor | None = None,
    eps: float = 0.0,
    round_before_weight: bool = False,
) -> Tensor:
    """``act(x @ W.T + b) + residual`` with W from its codes, every operation rounded to x's dtype.

    x: (..., K). codes, scales, zeros: of each weight (N_i, K), as ``format`` says (:mod:`codegen.weight_format`);
    zeros is empty where the format has none. biases: (N_i,) or None each. rows: the N_i. Results of several weights
    follow each other in the last dimension; ``gated`` takes two of one shape and gives ``act(first) * second``.
    residual: of the result's shape. activation: ``none`` or one of gated_mlp's.

    norm: (K,), x's dtype. With it x is normalised before all else, as ``rms_norm`` does with that weight, eps and
    round_before_weight.

    With the format's ``activations`` 8 or 4, each row of x is rounded to integers first: s = max|x| / 127 (or 7) in
    float32, x = s * round(x / s), and sums are taken of integers times weights.

    Returns (..., sum of N_i), gated (..., N), of x's dtype. Raises ``BadArgument`` for counts that disagree.
    """
    fmt = parse_weight_format(format)
    check(codes, scales, zeros, biases, rows, fmt, activation, gated)
    if norm is not None:
        x = rms_norm.reference(x, norm, eps, round_before_weight=round_before_weight)
    x, step = round_activations(x, fmt.activations) if fmt.activations else (x, None)
    parts = []
    for i, (packed, scale, bias) in enumerate(zip(codes, scales, biases, strict=True)):
        zero = zeros[i] if zeros else None
        weight = quantized_weight.dequantize(
            packed, scale, zero, fmt, rows[i], x.shape[-1], x.dtype if step is None else _wide(x.dtype)
        )
        if step is None:
            parts.append(functional.linear(x, weight, bias))
        else:
            product = functional.linear(x.to(weight.dtype), weight) * step
            parts.append((product if bias is None else product + bias).to(x.dtype))
    act = gated_mlp.ACTIVATIONS.get(activation, lambda y: y)
    out = act(parts[0]) * parts[1] if gated else act(torch.cat(parts, -1) if len(parts) > 1 else parts[0])
    return out if residual is None else out + residual


def round_activations(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Each row of x (..., K) as integers of ``bits`` bits (in x's dtype) and their step (..., 1), float32 or float64.

    A row of zeros has step 1. NaN and infinities make the whole row NaN.
    """
    wide = x.to(_wide(x.dtype))
    most = 2.0 ** (bits - 1) - 1
    step = wide.abs().amax(-1, keepdim=True) / most if x.shape[-1] else wide.new_zeros((*x.shape[:-1], 1))
    step = torch.where(step == 0, torch.ones_like(step), step)
    integers = (wide / step).round().clamp(-most, most)
    return integers.to(x.dtype), step


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def check(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    zeros: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    rows: Sequence[int],
    fmt: WeightFormat,
    activation: str,
    gated: bool,
) -> None:
    """Raise :class:`BadArgument` when the lists of a call do not fit each other or the format."""
    if activation not in ACTIVATIONS:
        raise BadArgument(f"quantized_linear has no activation {activation!r}; use one of {', '.join(ACTIVATIONS)}")
    count = len(codes)
    wanted = 0 if fmt.zero == "middle" else count
    if not count or len(scales) != count or len(biases) != count or len(rows) != count or len(zeros) != wanted:
        raise BadArgument(
            f"quantized_linear got {count} codes, {len(scales)} scales, {len(zeros)} zeros, {len(biases)} biases and "
            f"{len(rows)} rows: one of each a weight, and {'no zeros' if not wanted else 'zeros'} in this format"
        )
    if gated and (count != 2 or rows[0] != rows[1]):
        raise BadArgument(f"a gated quantized_linear takes two weights with as many rows, not {list(rows)}")


def _composite(
    x: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    zeros: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    residual: Tensor | None = None,
    *,
    rows: Sequence[int],
    format: str,
    activation: str = "none",
    gated: bool = False,
    norm: Tensor | None = None,
    eps: float = 0.0,
    round_before_weight: bool = False,
    target: str = "reference",
) -> Tensor:
    if linear.runs_reference(target, x, residual, norm, *biases):
        more: dict[str, Any] = {"norm": norm, "eps": eps, "round_before_weight": round_before_weight}
        more |= {"rows": rows, "format": format, "activation": activation, "gated": gated}
        return reference(x, codes, scales, zeros, biases, residual, **more)
    return torch.ops.tilewright.quantized_linear_forward(
        x,
        codes,
        scales,
        zeros,
        biases,
        residual,
        rows,
        format,
        activation,
        gated,
        target,
        norm,
        eps,
        round_before_weight,
    )


def spec(
    x: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    zeros: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    residual: Tensor | None = None,
    *,
    rows: Sequence[int],
    format: str,
    activation: str = "none",
    gated: bool = False,
    norm: Tensor | None = None,
    eps: float = 0.0,
    round_before_weight: bool = False,
    target: str = "cpp",
) -> QuantizedLinearSpec | QuantizedLinearTritonSpec:
    """The kernel for a call. Raises :class:`~tilewright.runtime.errors.UnsupportedKernel` when there is none, and
    :class:`~tilewright.runtime.errors.BadArgument` for lists that do not fit each other."""
    fmt = parse_weight_format(format)
    check(codes, scales, zeros, biases, rows, fmt, activation, gated)
    biased = {f"bias {i}": bias for i, bias in enumerate(biases)} | {"norm": norm}
    if target in quantized_triton.DEVICES:
        quantized_triton.check("quantized_linear", target, fmt, x=x, residual=residual, **biased)
    else:
        check_native("quantized_linear", target, x=x, residual=residual, **biased)
    for key, tensor in {"residual": residual, **biased}.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise UnsupportedKernel(f"quantized_linear: {key} is {tensor.dtype}, but x is {x.dtype}")
    if len(codes) > MOST_WEIGHTS:
        raise UnsupportedKernel(f"quantized_linear takes one to {MOST_WEIGHTS} weights, not {len(codes)}")
    if target in quantized_triton.DEVICES:
        if norm is not None:
            raise UnsupportedKernel("quantized_linear: Triton kernels do not normalise x")
        return quantized_triton.linear_spec(x, fmt, activation, gated, target)
    if fmt.kind != "int" or x.dtype == torch.float16:
        what = f"{fmt.kind} weights" if fmt.kind != "int" else "float16 activations"
        raise UnsupportedKernel(f"quantized_linear: native kernels have no {what}")
    if fmt.layout != "panels":
        raise UnsupportedKernel(f"quantized_linear: native kernels read the layout 'panels', not {fmt.layout!r}")
    return QuantizedLinearSpec(
        dtype=dtype_name(x),
        bits=fmt.bits,
        group=fmt.group,
        zero=fmt.zero,
        scales=fmt.scales,
        activations=fmt.activations,
        activation=activation,
        gated=gated,
        # In float32 there is nothing to round in between.
        norm="none" if norm is None else "rounded" if round_before_weight and x.dtype != torch.float32 else "wide",
    )


LIBRARY.define(
    "quantized_linear_forward(Tensor x, Tensor[] codes, Tensor[] scales, Tensor[] zeros, Tensor?[] biases, "
    "Tensor? residual, int[] rows, str format, str activation, bool gated, str target, Tensor? norm=None, "
    "float eps=0.0, bool round_before_weight=False) -> Tensor"
)


def _check_shapes(
    x: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    zeros: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    residual: Tensor | None,
    rows: Sequence[int],
    fmt: WeightFormat,
    gated: bool,
    norm: Tensor | None,
) -> tuple[int, ...]:
    """The result's shape. Raises RuntimeError, as torch does, when a tensor is not what the format says."""
    for i, count in enumerate(rows):
        found = {"codes": codes[i], "scale": scales[i], **({"zero": zeros[i]} if zeros else {})}
        for name, (shape, dtype) in fmt.shapes(count, x.size(-1)).items():
            _agree(name, found[name], shape, getattr(torch, dtype))
        bias = biases[i]
        if bias is not None:
            _agree("bias", bias, (count,), x.dtype)
    if norm is not None:
        _agree("norm", norm, (x.size(-1),), x.dtype)
    shape = (*x.shape[:-1], rows[0] if gated else sum(rows))
    if residual is not None:
        _agree("residual", residual, shape, x.dtype)
    return shape


def _agree(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch._check(
        tensor.dtype == dtype and tensor.dim() == len(shape),
        lambda: f"quantized_linear: {name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {shape}",
    )
    for mine, wanted in zip(tensor.shape, shape, strict=True):
        torch._check(
            mine == wanted,
            lambda: f"quantized_linear: {name} has shape {tuple(tensor.shape)}, but x and rows say {shape}",
        )


def _launch(
    x: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    zeros: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    residual: Tensor | None,
    rows: Sequence[int],
    format: str,
    activation: str,
    gated: bool,
    target: str,
    norm: Tensor | None = None,
    eps: float = 0.0,
    round_before_weight: bool = False,
) -> Callable[..., Tensor]:
    more: dict[str, Any] = {"rows": rows, "format": format, "activation": activation, "gated": gated, "target": target}
    more |= {"norm": norm, "eps": eps, "round_before_weight": round_before_weight}
    chosen = spec(x, codes, scales, zeros, biases, residual, **more)
    _check_shapes(x, codes, scales, zeros, biases, residual, rows, parse_weight_format(format), gated, norm)
    return load_best(chosen, target, lambda: (x, codes, scales, zeros, biases, residual, rows, norm, eps)).launch


fast_call.implement(
    "quantized_linear_forward",
    _launch,
    passes=("x", "codes", "scales", "zeros", "biases", "residual", "rows", "norm", "eps"),
)


def _fake(
    x: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    zeros: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    residual: Tensor | None,
    rows: Sequence[int],
    format: str,
    activation: str,
    gated: bool,
    target: str,
    norm: Tensor | None = None,
    eps: float = 0.0,
    round_before_weight: bool = False,
) -> Tensor:
    fmt = parse_weight_format(format)
    return x.new_empty(_check_shapes(x, codes, scales, zeros, biases, residual, rows, fmt, gated, norm))


torch.library.register_fake("tilewright::quantized_linear_forward", _fake, lib=LIBRARY)

# As linear_fused's: the weights are exact in float32, and what a half dtype adds by rounding them is less than an eps
# of each product.
TOLERANCE = {dtype: Tolerance(4 * t.atol, 4 * t.rtol) for dtype, t in linear.TOLERANCE.items()}
op = canonical(
    "quantized_linear(Tensor x, Tensor[] codes, Tensor[] scales, Tensor[] zeros, Tensor?[] biases, "
    "Tensor? residual=None, *, int[] rows, str format, str activation='none', bool gated=False, "
    "Tensor? norm=None, float eps=0.0, bool round_before_weight=False, str target='reference') -> Tensor".replace(
        "'", '"'
    ),
    reference=reference,
    composite=_composite,
    tolerance=TOLERANCE,
    spec=spec,
)
