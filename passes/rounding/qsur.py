"""Quantization space utilization rate: how much of the cube that a grid spans a distribution fills.

"OSTQuant: Refining Large Language Model Quantization with Orthogonal and Scaling Transformations for Better
Distribution Fitting", Hu et al. 2025 (arXiv 2501.13987), section 3.1. With covariance S = Q diag(l) Q^T of x in R^d,
the set that holds a share alpha of a normal distribution is an ellipsoid of volume

    V = pi^(d/2) / Gamma(d/2 + 1) * chi2_d(alpha)^(d/2) * sqrt(prod l)

and a grid with one scale spans the cube around zero that holds it. QSUR is the ratio of the two volumes. It vanishes
for large d whatever the distribution, so what is reported is its d-th root, relative to that of a ball: 1 where all
directions vary alike, which is what rotating and scaling aim at.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ALPHA = 0.99


def chi_square(dims: int, alpha: float = ALPHA) -> float:
    """The quantile of the chi-square distribution (Wilson and Hilferty's approximation, good to 1 % from 3 on)."""
    normal = math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * alpha - 1, dtype=torch.float64)))
    part = 2 / (9 * dims)
    return float(dims * (1 - part + normal * math.sqrt(part)) ** 3)


def utilization(mean: Tensor, covariance: Tensor) -> float:
    """QSUR per dimension, 0 to 1, of a distribution with ``mean`` (d,) and ``covariance`` (d, d); float64 inside.

    The cube holds the ellipsoid exactly: its half edge is the largest |mean_i| + sqrt(chi2 * S_ii). Directions that do
    not vary (fewer samples than dimensions) are left out of both volumes.
    """
    cov = covariance.double()
    size = len(cov)
    values = torch.linalg.eigvalsh(cov).clamp_min(0)
    values = values[values > values.max() * 1e-7]
    if not len(values):
        return 0.0
    reach = math.sqrt(chi_square(size))
    edge = (mean.double().abs() + reach * cov.diagonal().clamp_min(0).sqrt()).max()
    return float(reach * (0.5 * values.log().mean()).exp() / edge)


def of_samples(x: Tensor) -> float:
    """:func:`utilization` of samples x (..., d)."""
    rows = x.detach().reshape(-1, x.shape[-1]).double()
    mean = rows.mean(0)
    centred = rows - mean
    return utilization(mean, centred.t() @ centred / max(1, len(rows)))
