"""``tilewright::merge_attention``: joins attention over two disjoint sets of keys by their log-sum-exps.

    lse = log(exp(lse1) + exp(lse2)),    out = exp(lse1 - lse) out1 + exp(lse2 - lse) out2

which is the attention over both sets. A few elementwise operations, left to the compiler of the rest of the graph.
Dao et al., "Flash-Decoding" (2023); Milakov and Gimelshein, arXiv:1805.02867, section 3.1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import BadArgument
from .attention import TOLERANCE
from .registry import canonical, reference_only


def reference(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """out (B, H, L, Dv) in out1's dtype and lse (B, H, L) in lse1's, from two pairs of these shapes.

    A row with ``-inf`` in both gives zeros and ``-inf``, and no gradient.
    """
    if out1.shape != out2.shape or lse1.shape != lse2.shape or out1.shape[:-1] != lse1.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (out1, lse1, out2, lse2))
        raise BadArgument(f"merge_attention: out and lse must be (B, H, L, Dv) and (B, H, L), twice, not {shapes}")
    largest = torch.maximum(lse1, lse2).detach()
    largest = largest.masked_fill(largest == -math.inf, 0.0)
    weight1, weight2 = torch.exp(lse1 - largest), torch.exp(lse2 - largest)
    total = weight1 + weight2
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    share1, share2 = (weight1 / total)[..., None], (weight2 / total)[..., None]
    out = share1 * out1.to(lse1.dtype) + share2 * out2.to(lse1.dtype)
    return out.to(out1.dtype), (largest + total.log()).masked_fill(empty, -math.inf)


def _merge_attention(
    out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor, *, target: str = "reference"
) -> tuple[Tensor, Tensor]:
    reference_only("merge_attention", target)
    return reference(out1, lse1, out2, lse2)


MERGE_ATTENTION = canonical(
    "merge_attention(Tensor out1, Tensor lse1, Tensor out2, Tensor lse2, *, str target='reference') "
    "-> (Tensor, Tensor)",
    reference=reference,
    composite=_merge_attention,
    tolerance=TOLERANCE,
)
