"""Layer normalisation ("Layer Normalization", Ba, Kiros and Hinton 2016), as ``torch.nn.functional.layer_norm``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .registry import Tolerance, canonical, reference_only


def reference(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the trailing ``normalized_shape``; var is biased (1/N).

    x: (..., *normalized_shape), any floating dtype; weight, bias: normalized_shape or None; eps: unit of x squared.
    Returns x's shape and dtype. Raises RuntimeError when the shapes disagree, as torch does.
    """
    return torch.layer_norm(x, normalized_shape, weight, bias, eps)


def _composite(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    target: str = "reference",
) -> Tensor:
    reference_only("layer_norm", target)
    return torch.layer_norm(x, normalized_shape, weight, bias, eps)


# Computed in float32 for half dtypes and rounded once: eps/2, doubled. x - mean cancels: the error of the mean is
# eps/2 * |x|, divided by the standard deviation; with |x| up to 64 standard deviations and weights near one that is
# 32 eps absolute, in the dtype of the computation.
op = canonical(
    "layer_norm(Tensor x, SymInt[] normalized_shape, Tensor? weight=None, Tensor? bias=None, float eps=1e-05, *, "
    'str target="reference") -> Tensor',
    reference=reference,
    composite=_composite,
    tolerance={
        torch.float64: Tolerance(32 * 2.0**-52, 8 * 2.0**-52),
        torch.float32: Tolerance(32 * 2.0**-23, 8 * 2.0**-23),
        torch.bfloat16: Tolerance(32 * 2.0**-23, 2.0**-7),
        torch.float16: Tolerance(32 * 2.0**-23, 2.0**-10),
    },
)
