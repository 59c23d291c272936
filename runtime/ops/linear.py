"""A linear layer, as ``torch.nn.functional.linear``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .registry import Tolerance, canonical, reference_only


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``.

    x: (..., K); weight: (N, K), any strides; bias: (N,) or None; one floating dtype. Returns (..., N) in that dtype,
    accumulated in at least float32. Raises RuntimeError when shapes or dtypes disagree, as torch does.
    """
    return functional.linear(x, weight, bias)


def _composite(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, target: str = "reference") -> Tensor:
    reference_only("linear", target)
    return functional.linear(x, weight, bias)


# A dot product of K terms errs by about sqrt(K) * eps/2 of the root of the sum of squares (rounding errors of random
# sign; Higham, Accuracy and Stability, 2.8): 32 eps for K up to 4096 and results of order one. Half dtypes accumulate
# in float32 and round the result, and the sum with the bias where the backend does not fuse it: eps.
op = canonical(
    'linear(Tensor x, Tensor weight, Tensor? bias=None, *, str target="reference") -> Tensor',
    reference=reference,
    composite=_composite,
    tolerance={
        torch.float64: Tolerance(32 * 2.0**-52, 32 * 2.0**-52),
        torch.float32: Tolerance(32 * 2.0**-23, 32 * 2.0**-23),
        torch.bfloat16: Tolerance(2.0**-7, 2.0**-7),
        torch.float16: Tolerance(2.0**-10, 2.0**-10),
    },
)
