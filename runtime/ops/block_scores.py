"""``tilewright::block_scores``: how much softmax weight every tile of (query, key) pairs holds.

    P = softmax_k(scale * q.k)  over the visible keys
    out[b, h, I, J] = sum of P over the queries of block I and the keys of block J

The matrix P never lies in memory. q and k are what a selector made of its queries and keys: XAttention ("XAttention:
Block Sparse Attention with Antidiagonal Scoring", Xu et al. 2025, section 2.1) folds ``stride`` neighbouring rows into
the channels, so that a product sums an antidiagonal; ProxyAttn and others pool rows. A choice of blocks is not
differentiated: the result never requires a gradient.
"""

from __future__ import annotations

import functools
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

from ...codegen import symbols
from ...codegen.block_scores import BlockScoresSpec
from .. import fast_call
from ..autotune import load_best
from ..errors import BadArgument, UnsupportedKernel
from .attention import _safe_softmax, visible_pairs
from .registry import LIBRARY, Tolerance, canonical

_DEVICES = {"triton": "cuda", "triton-interpret": "cpu", "cpp": "cpu"}
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

# A score is a sum of C products in float32: off by at most C u |q||k| scale, u = 2^-24, typically by a few sqrt(C) u; a
# weight is off by that factor, and a sum of weights too. rtol 2^-13 leaves 2^11 u for scores up to about 50 with C of
# 1024. The result is float32 whatever q and k are, and their products are exact in it.
_F32 = Tolerance(atol=2.0**-20, rtol=2.0**-13)
TOLERANCE = {
    torch.float64: Tolerance(atol=1e-12, rtol=1e-10),
    torch.float32: _F32,
    torch.float16: _F32,
    torch.bfloat16: _F32,
}


def check_arguments(q: Tensor, k: Tensor, mask: str, block_q: int, block_k: int) -> None:
    """Raise :class:`~tilewright.runtime.errors.BadArgument` for a call that has no meaning."""
    for name, tensor in (("q", q), ("k", k)):
        if tensor.dim() != 4:
            message = f"block_scores: {name} has {tensor.dim()} dimensions, but needs (batch, heads, length, channels)"
            raise BadArgument(message)
        if not tensor.dtype.is_floating_point:
            raise BadArgument(f"block_scores: {name} is {tensor.dtype}, which is not floating")
    if q.dtype != k.dtype:
        raise BadArgument(f"block_scores: q is {q.dtype} and k {k.dtype}, which must be the same")
    if q.shape[0] != k.shape[0]:
        raise BadArgument(f"block_scores: q has {q.shape[0]} batches and k {k.shape[0]}")
    if q.shape[1] % k.shape[1] if k.shape[1] else q.shape[1]:
        raise BadArgument(f"block_scores: {q.shape[1]} query heads are no multiple of {k.shape[1]} key heads")
    if q.shape[3] != k.shape[3]:
        raise BadArgument(f"block_scores: queries have {q.shape[3]} channels and keys {k.shape[3]}")
    for name, size in (("block_q", block_q), ("block_k", block_k)):
        if not size >= 1:
            raise BadArgument(f"block_scores: {name} is {size}, but a block has at least 1 row")
    try:
        if "table(" in symbols.mask_text(mask):
            raise BadArgument("block_scores: the mask looks entries of a table up, and there is none to look in")
    except symbols.SpecError as error:
        raise BadArgument(f"block_scores: mask: {error}") from None


def blocks(length: Any, size: int) -> Any:
    """How many blocks of ``size`` rows hold ``length`` rows; lengths may be symbolic."""
    return (length + size - 1) // size


def reference(q: Tensor, k: Tensor, *, scale: float, mask: str = "", block_q: int, block_k: int) -> Tensor:
    """The block sums by their definition.

    q: (B, Hq, M, C), k: (B, Hk, N, C), any floating dtype, Hq a multiple of Hk. mask: which pairs are visible, symbolic
    (codegen/symbols.py), q_idx and k_idx counting rows of these q and k. block_q, block_k: rows of q and of k in a
    block; the last block may have fewer.
    Returns (B, Hq, ceil(M / block_q), ceil(N / block_k)), float64 for float64 inputs and float32 otherwise. A row that
    sees nothing, or only scores of ``-inf``, adds nothing. Raises BadArgument.
    """
    check_arguments(q, k, mask, block_q, block_k)
    q, k = q.detach(), k.detach()
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1] if k.shape[1] else 1
    keys = k.to(compute).repeat_interleave(group, dim=1)
    scores = torch.matmul(q.to(compute), keys.transpose(-2, -1)) * scale
    visible = visible_pairs(q, k, mask)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    weights = _safe_softmax(scores)[0]
    rows, columns = blocks(q.shape[2], block_q), blocks(k.shape[2], block_k)
    padding = (0, columns * block_k - k.shape[2], 0, rows * block_q - q.shape[2])
    tiles = F.pad(weights, padding).reshape(*q.shape[:2], rows, block_q, columns, block_k)
    return tiles.sum((3, 5))


def _composite(
    q: Tensor, k: Tensor, *, scale: float, mask: str = "", block_q: int, block_k: int, target: str = "reference"
) -> Tensor:
    if target == "reference":
        return reference(q, k, scale=scale, mask=mask, block_q=block_q, block_k=block_k)
    check_arguments(q, k, mask, block_q, block_k)
    return torch.ops.tilewright.block_scores_forward(
        q.detach(), k.detach(), scale=scale, mask=mask, block_q=block_q, block_k=block_k, target=target
    )


def spec(
    q: Tensor, k: Tensor, *, scale: float = 1.0, mask: str = "", block_q: int = 1, block_k: int, target: str = "cpp"
) -> BlockScoresSpec:
    """The kernel for a call, from tensors or fake tensors; a native one serves every size of q and k and every block.

    Raises :class:`~tilewright.runtime.errors.UnsupportedKernel` with the reason when ``target`` has none.
    """
    check_arguments(q, k, mask, block_q, block_k)
    if target not in _DEVICES:
        raise UnsupportedKernel(f"there is no block_scores kernel for target {target!r}")
    for name, tensor in (("q", q), ("k", k)):
        if tensor.device.type != _DEVICES[target]:
            raise UnsupportedKernel(
                f"{target} kernels take {_DEVICES[target]} tensors, and {name} is on {tensor.device.type}"
            )
    if q.dtype not in _DTYPE_NAMES:
        raise UnsupportedKernel(f"block_scores kernels take float32, bfloat16 and float16, not {q.dtype}")
    channels = q.shape[3] if isinstance(q.shape[3], int) else 64
    return _spec(_DTYPE_NAMES[q.dtype], mask, block_k, channels, target)


@functools.lru_cache(maxsize=1024)
def _spec(dtype: str, mask: str, block_k: int, channels: int, target: str) -> BlockScoresSpec:
    expression = symbols.parse_mask(mask)
    if expression == sympy.false:
        raise UnsupportedKernel(f"the mask {mask!r} hides every pair, so there is nothing to compute")
    text = symbols.mask_text(expression)
    if target == "cpp":
        return BlockScoresSpec(dtype=dtype, mask=text)
    # The interpreter pays for every operation and little for its size; a tile of channels is no wider than they are.
    width = min(64 if target == "triton" else 256, max(16, 1 << (channels - 1).bit_length()))
    float32 = dtype == "float32" and target == "triton"  # multiplied without tensor cores, in registers
    width = min(width, 32) if float32 else width
    return BlockScoresSpec(dtype=dtype, mask=text, block_k=block_k, block_c=width, num_warps=8 if float32 else 4)


LIBRARY.define(
    "block_scores_forward(Tensor q, Tensor k, *, float scale, str mask, int block_q, int block_k, str target)"
    " -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def _kernel(
    q: Tensor, k: Tensor, *, scale: float, mask: str, block_q: int, block_k: int, target: str
) -> fast_call.Launch:
    chosen = spec(q, k, scale=scale, mask=mask, block_q=block_q, block_k=block_k, target=target)
    return load_best(chosen, target, lambda: (q, k, scale, block_q, block_k)).launch


fast_call.implement("block_scores_forward", _kernel, passes=("q", "k", "scale", "block_q", "block_k"))


@torch.library.register_fake("tilewright::block_scores_forward", lib=LIBRARY)
def _fake(q, k, *, scale, mask, block_q, block_k, target):
    shape = (q.shape[0], q.shape[1], blocks(q.shape[2], block_q), blocks(k.shape[2], block_k))
    return q.new_empty(shape, dtype=torch.float32)


block_scores = canonical(
    "block_scores(Tensor q, Tensor k, *, float scale, str mask='', int block_q, int block_k, str target='reference')"
    " -> Tensor",
    reference=reference,
    composite=_composite,
    tolerance=TOLERANCE,
    spec=spec,
)
