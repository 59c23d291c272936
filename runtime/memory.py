"""Memory for the outputs of native kernels: :func:`empty`."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised contiguous CPU tensor, for an output that a kernel fills completely."""
    return torch.empty(shape, dtype=dtype)
