"""``tilewright::block_states``: what a mask says of every tile of pairs, by interval analysis on the device.

    states    uint8 (Bl, Hl, NQ, NK)    0 nothing visible, 1 partly visible, 2 all visible

Bl is the batch if the mask names it, else 1; Hl is the number of query heads likewise. A helper: composite, ATen
operations over tiles (runtime/mask_tiles.py), never over pairs.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..errors import BadArgument
from ..mask_tiles import tile_states
from .registry import helper


def block_states(
    q: Tensor, k: Tensor, table: Tensor | None = None, *, mask: str = "", block_q: int, block_k: int, length: int = 0
) -> Tensor:
    """States of the tiles of q (B, Hq, Lq, D) and k (B, Hk, Lk, D), of which only sizes and q's device matter.

    NQ = ceil(Lq / block_q) and NK = ceil(Lk / block_k). Sound: 0 and 2 are proven, 1 is the rest. table: int32 (N,),
    what the mask looks up. length: how many positions the mask was made for (0: any number); more are refused when the
    op runs, also where lengths are symbolic. Raises BadArgument for a mask with no table to look up, and SpecError for
    text that is none.
    """
    if table is not None and (table.dim() != 1 or table.is_floating_point()):
        raise BadArgument(f"table must be a row of integers, not {table.dtype} of shape {tuple(table.shape)}")
    if block_q < 1 or block_k < 1:
        raise BadArgument(f"blocks have at least one query and one key, not {block_q} and {block_k}")
    if length:
        for name, size in (("queries", q.shape[2]), ("keys", k.shape[2])):
            torch._check(
                size <= length,
                functools.partial("the mask was made for {} positions, and there are more {}".format, length, name),
            )
    return tile_states(
        mask,
        q_len=q.shape[2],
        k_len=k.shape[2],
        block_q=block_q,
        block_k=block_k,
        heads=q.shape[1],
        batch=q.shape[0],
        table=table,
        device=q.device,
    )


BLOCK_STATES = helper(
    "block_states(Tensor q, Tensor k, Tensor? table=None, *, str mask='', int block_q, int block_k, "
    "int length=0) -> Tensor",
    block_states,
)
