"""Where the outputs of native kernels come from."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A contiguous, uninitialised CPU tensor."""
    return torch.empty(shape, dtype=dtype)
