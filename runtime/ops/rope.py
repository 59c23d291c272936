"""Rotary position embedding ("RoFormer: Enhanced Transformer with Rotary Position Embedding", Su et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import BadArgument
from .registry import Tolerance, canonical, reference_only

LAYOUTS = ("rotate_half", "interleaved")


def rotate(x: Tensor, layout: str) -> Tensor:
    """The pairs of x's last dimension (even size) turned by 90 degrees: (a, b) -> (-b, a).

    rotate_half pairs element i with i + N/2 (GPT-NeoX, Llama); interleaved pairs 2i with 2i + 1 (GPT-J, the paper).
    """
    if layout == "rotate_half":
        half = x.shape[-1] // 2
        return torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    if layout == "interleaved":
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    raise BadArgument(f"rope has no layout {layout!r}; use one of {', '.join(LAYOUTS)}")


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
    reference_only("rope", target)
    return reference(x, cos, sin, layout=layout)


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
)
