"""Rounding a weight column by column, each column's error made up for by the columns that are still to come.

For a layer with inputs x and H = mean(x x^T), the expected squared error of the output is tr((W - Q) H (W - Q)^T) / N.
Once column k is rounded, the change of the later columns that gives the least error is known in closed form:

    W[:, j] -= (W[:, k] - Q[:, k]) / U[k, k] * U[k, j]          j > k, U^T U = H^-1, U upper triangular

("GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", Frantar et al. 2022, section 3).
Here it gives learnt roundings their start: the columns as they were just before they were rounded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...codegen.weight_format import WeightFormat
from . import grid

BLOCK = 128
"""Columns whose errors are handed on together, as a matrix product."""


def feed_back(
    w: Tensor, hessian: Tensor, fmt: WeightFormat, scale: Tensor, zero: Tensor | None, *, damping: float = 0.01
) -> Tensor:
    """``w`` (N, K) changed so that rounding it to the grid of ``scale`` and ``zero`` (N, G) hands errors on.

    hessian: (K, K), the inputs' second moments. damping: times their mean is added to the diagonal. Columns go from the
    largest second moment to the smallest. Returns float32 (N, K); ``w`` itself where the moments cannot be inverted.
    """
    columns = w.shape[1]
    h = hessian.double()
    h = h + torch.eye(columns, dtype=h.dtype, device=h.device) * (damping * h.diagonal().mean() + 1e-12)
    order = h.diagonal().argsort(descending=True, stable=True)
    lower, failed = torch.linalg.cholesky_ex(h[order][:, order])
    if int(failed):
        return w.float()
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if int(failed):
        return w.float()
    u = upper.float()
    left = w.float().T[order].contiguous()  # columns are rows here
    rounding = _rounding(fmt, scale.float(), zero if zero is None else zero.float(), columns)
    places = order.tolist()
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = torch.empty_like(left[start:stop])
        for k in range(start, stop):
            column = left[k]
            error = (column - rounding(column, places[k])) / u[k, k]
            left[k + 1 : stop] -= u[k, k + 1 : stop, None] * error
            errors[k - start] = error
        left[stop:] -= u[start:stop, stop:].T @ errors
    out = torch.empty_like(left)
    out[order] = left
    return out.T.contiguous()


def _rounding(fmt: WeightFormat, scale: Tensor, zero: Tensor | None, columns: int) -> Callable[[Tensor, int], Tensor]:
    """(numbers of a column, the column) -> their levels."""
    size = fmt.group or columns

    def middle(column: Tensor, k: int) -> Tensor:
        step = scale[:, k // size]
        return (column / step).round().clamp(-fmt.middle, fmt.middle - 1) * step

    def point(column: Tensor, k: int) -> Tensor:
        assert zero is not None
        step, zeros = scale[:, k // size], zero[:, k // size]
        return ((column / step).round().clamp(-zeros, fmt.levels - 1 - zeros)) * step

    def offset(column: Tensor, k: int) -> Tensor:
        assert zero is not None
        step, low = scale[:, k // size], zero[:, k // size]
        return ((column - low) / step).round().clamp(0, fmt.levels - 1) * step + low

    if fmt.kind != "int":
        return lambda column, k: grid.fake_quantize(column[:, None], fmt, scale[:, k // size, None])[:, 0]
    return {"middle": middle, "point": point, "offset": offset}[fmt.zero]
