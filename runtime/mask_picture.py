"""A mask as a picture: tiles coloured empty, full and partial, and the pairs that are visible in partial tiles."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .mask import Mask

EMPTY, FULL, PARTIAL = "#f1f3f5", "#3b6fb6", "#f6c177"
VISIBLE = "#b35c00"
"""Of the pairs that a partial tile shows."""
MOST_PAIRS = 2**20
"""Beyond so many pairs only tiles are drawn: a pair would be less than a dot."""


def draw(mask: Mask, q_len: int, k_len: int, block_q: int, block_k: int, head: int, batch: int) -> Figure:
    """Queries from top to bottom and keys from left to right, for one head and batch entry. See Mask.show."""
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    states = mask.states(q_len, k_len, (block_q, block_k), head + 1, batch + 1)[-1, -1]
    colours = torch.tensor([to_rgb(c) for c in (EMPTY, PARTIAL, FULL)])
    if q_len * k_len <= MOST_PAIRS:
        rows, columns = torch.arange(q_len) // block_q, torch.arange(k_len) // block_k
        tiles = states.cpu()[rows][:, columns].long()
        image = colours[tiles]
        seen = mask.visible(q_len, k_len, head + 1, batch + 1)[-1, -1].cpu() & (tiles == 1)
        image[seen] = torch.tensor(to_rgb(VISIBLE))
        extent = (0.0, float(k_len), float(q_len), 0.0)
    else:
        image = colours[states.cpu().long()]
        extent = (0.0, float(states.shape[1] * block_k), float(states.shape[0] * block_q), 0.0)
    shape = q_len / k_len
    width = 6.4 if shape <= 1 else max(3.2, 6.4 / shape)
    figure = Figure(figsize=(width + 0.6, min(max(width * shape, 1.6), 8.0) + 1.3), layout="constrained")
    axes = figure.subplots()
    axes.imshow(image.numpy(), interpolation="nearest", extent=extent, aspect="auto")
    for places, size, line in (
        (range(0, q_len, block_q), q_len, axes.axhline),
        (range(0, k_len, block_k), k_len, axes.axvline),
    ):
        if len(places) <= 64:
            for place in (*places, size):
                line(place, color="white", linewidth=0.6)
    axes.set(xlabel="key", ylabel="query", xlim=(0, k_len), ylim=(q_len, 0))
    axes.set_title(_title(mask, head, batch), fontsize=9, family="monospace")
    counts = [int((states == state).sum()) for state in (2, 1, 0)]
    names = ("full", "partial", "empty")
    handles: list[Any] = [
        Patch(facecolor=colour, edgecolor="#adb5bd", label=f"{name}: {count}")
        for name, count, colour in zip(names, counts, (FULL, PARTIAL, EMPTY), strict=True)
    ]
    figure.legend(
        handles=handles,
        title=f"tiles of {block_q} x {block_k}, density {(counts[0] + counts[1]) / sum(counts):.1%}",
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=9,
        title_fontsize=9,
    )
    return figure


def _title(mask: Mask, head: int, batch: int) -> str:
    text = textwrap.shorten(mask.text or "all pairs", 180, placeholder=" ...")
    names = {symbol.name for symbol in mask.expression.free_symbols}
    which = [f"{name} {index}" for name, index in (("head", head), ("batch", batch)) if name in names]
    return "\n".join([*textwrap.wrap(text, 64), *([", ".join(which)] if which else [])])
