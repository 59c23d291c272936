"""What FactorKeys reads off one batch of calibration inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..runtime.ops.attention import visible_pairs
from ._key_factors import ROWS, KeyStatistics, RotateBack
from ._key_projection import Projection
from .view import arguments


def observe_site(
    statistics: KeyStatistics,
    key: Projection,
    values: Mapping[str, Any],
    *,
    scale: float,
    mask: str,
    normalizer: str,
    scores: bool,
    centred: bool,
) -> None:
    """values: the attention's arguments, ``keys`` (the key projection's output) and, with RoPE, ``cos`` and ``sin``.

    Padding is what a boolean mask of the keys says. Of long sequences ROWS queries are taken, evenly.
    """
    q, k, bias = values["q"], values["k"], values.get("bias")
    batch, length = k.shape[0], k.shape[2]
    raw = values["keys"].reshape(batch, length, -1)[..., key.rows.flatten().to(k.device)].float()
    shown = None
    if bias is not None and bias.dtype == torch.bool and bias.dim() == 4 and bias.shape[2] == 1:
        shown = bias[:, 0, 0].expand(batch, length)
    if not scores:
        statistics.see_keys(raw, shown)
        return
    visible = visible_pairs(q[:1], k[:1], mask)
    taken = torch.linspace(0, q.shape[2] - 1, min(ROWS, q.shape[2]), device=q.device).round().long()
    for one in range(batch):
        weights = _weights(q[one, :, taken], k[one], _bias(bias, one, taken), visible, taken, scale, normalizer)
        if shown is not None:  # rows of padding say nothing
            own = shown[one][taken] if q.shape[2] == length else torch.ones_like(taken, dtype=torch.bool)
            weights = weights * own[None, :, None]
        statistics.see_scores(
            raw[one],
            q[one, :, taken].float(),
            weights,
            _turn_back(key, values, one, length),
            _scales(key, raw[one]),
            centred,
        )


def _bias(bias: Tensor | None, one: int, taken: Tensor) -> Tensor | None:
    if bias is None:
        return None
    while bias.dim() < 4:
        bias = bias[None]
    mine = bias[one if bias.shape[0] > 1 else 0]
    return mine if mine.shape[1] == 1 else mine[:, taken]


def _weights(
    q: Tensor, k: Tensor, bias: Tensor | None, visible: Tensor | None, taken: Tensor, scale: float, normalizer: str
) -> Tensor:
    """(Hq, N, L): how much an error of each score matters: softmax's p, or the sigmoid's slope."""
    scores = q.float() @ k.repeat_interleave(q.shape[0] // k.shape[0], 0).float().transpose(1, 2) * scale
    hidden = torch.zeros((), dtype=torch.bool, device=q.device)
    if visible is not None:
        rows = visible[0] if visible.dim() == 4 else visible
        rows = rows if rows.shape[-2] == 1 else rows[..., taken, :]
        hidden = ~rows
    if bias is not None and bias.dtype == torch.bool:
        hidden = hidden | ~bias
    elif bias is not None:
        scores = scores + bias.float()
    if normalizer == "softmax":
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return weights.nan_to_num(0.0)
    weights = scores.sigmoid()
    return (weights * (1 - weights)).masked_fill(hidden, 0.0)


def _turn_back(key: Projection, values: Mapping[str, Any], one: int, length: int) -> RotateBack | None:
    if key.rope is None:
        return None
    pair = []
    for which in ("cos", "sin"):
        angles = values[which]
        rows = angles.reshape(-1, length, angles.shape[-1])
        pair.append(rows[one if len(rows) > 1 else 0])
    return RotateBack(pair[0], pair[1], arguments(key.rope)["layout"])


def _scales(key: Projection, raw: Tensor) -> Tensor | None:
    """What a QK-norm multiplies each raw key by, (L, heads): its errors are those of the keys times that."""
    if key.norm is None:
        return None
    heads, dim = key.rows.shape
    mean = raw.reshape(-1, heads, dim).square().mean(-1)
    return (mean + arguments(key.norm)["eps"]).rsqrt()
