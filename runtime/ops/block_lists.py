"""``tilewright::block_lists``: which key blocks each query block reads, as kernels walk them.

    counts    int32 (Bl, Hl, NQ)       how many entries of a row of ``indices`` are valid
    indices   int32 (Bl, Hl, NQ, W)    entry = 2 * key block + full, ascending; -1 beyond the count

``full`` is 1 where the mask hides no pair of the block, so that a kernel need not evaluate it. Bl is 1 or the batch, Hl
is 1 or the number of query heads. Helpers: composite, a few ATen operations on the device of their input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import helper

EMPTY, PARTIAL, FULL = 0, 1, 2
"""What a mask says of a tile: hides all of it, some of it, nothing of it."""


def block_lists(states: Tensor) -> tuple[Tensor, Tensor]:
    """counts (Bl, Hl, NQ) and indices (Bl, Hl, NQ, NK) from uint8 states (Bl, Hl, NQ, NK): see the module's text."""
    # Kernels read the lists as contiguous, and what follows keeps the order of its input's strides.
    states = states.contiguous()
    listed = states > EMPTY
    counts = listed.sum(-1, dtype=torch.int32)
    blocks = states.shape[-1]
    number = torch.arange(blocks, device=states.device, dtype=torch.int32)
    # Each listed block goes to its rank among the listed ones, each other one behind them.
    rank = torch.where(listed, listed.cumsum(-1), counts[..., None] + (~listed).cumsum(-1)) - 1
    entries = torch.where(listed, 2 * number + (states == FULL).to(torch.int32), -1)
    return counts, torch.empty_like(entries).scatter_(-1, rank, entries)


def transposed_lists(counts: Tensor, indices: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """The query blocks that list each of ``blocks`` key blocks: counts_t (Bl, Hl, NK), indices_t (Bl, Hl, NK, NQ)."""
    return block_lists(list_states(counts, indices, blocks).transpose(-1, -2))


def list_states(counts: Tensor, indices: Tensor, blocks: int) -> Tensor:
    """uint8 states (Bl, Hl, NQ, blocks) that give these lists."""
    valid = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    # What is not valid is written to a column of its own, which is cut off.
    place = torch.where(valid, indices >> 1, blocks).long()
    value = torch.where(valid, 1 + (indices & 1), EMPTY).to(torch.uint8)
    states = torch.zeros((*indices.shape[:-1], blocks + 1), dtype=torch.uint8, device=indices.device)
    return states.scatter_(-1, place, value)[..., :blocks]


BLOCK_LISTS = helper("block_lists(Tensor states) -> (Tensor, Tensor)", block_lists)
