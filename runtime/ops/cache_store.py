"""The store of a KV cache in plain PyTorch: append tokens, read them back, rebuild keys from latents.

The definition of what every kernel on a store computes; layouts are in :mod:`tilewright.codegen.cache_format`. All
functions take a store as a mapping by name. ``length`` int32 (B,) counts the tokens held before an append, padding
included; ``first`` int32 (B,) is the first token that is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...codegen.cache_format import CacheFormat
from ..errors import BadArgument
from . import rms_norm, rope

Store = Mapping[str, Tensor]


def named(store: Sequence[Tensor], form: CacheFormat) -> dict[str, Tensor]:
    """The list ``store`` by name. Raises :class:`~tilewright.runtime.errors.BadArgument` for too many or too few."""
    names = form.names()
    if len(store) != len(names):
        raise BadArgument(f"the cache holds {len(store)} tensors, but its format has {', '.join(names)}")
    return dict(zip(names, store, strict=True))


def append(k: Tensor, v: Tensor, store: Store, length: Tensor, pages: Tensor | None, form: CacheFormat) -> None:
    """Write the tokens of a call, in place.

    k (B, Hs, L, Ds), v (B, Hv, L, Dv): what is kept of tokens ``length[b] .. length[b] + L - 1``. pages: int32
    (B, S / page), or None. A side that is quantized keeps its newest tokens whole and quantizes the groups that end
    before them.
    """
    for side, fresh, bits in (("k", k, form.bits_k), ("v", v, form.bits_v)):
        if bits:
            _append_quantized(side, fresh, store, length, pages, form)
        else:
            write_rows(store[side], fresh, length, pages, form.page)


def _append_quantized(
    side: str, fresh: Tensor, store: Store, length: Tensor, pages: Tensor | None, form: CacheFormat
) -> None:
    raise BadArgument("quantized caches are not there yet")


def write_rows(data: Tensor, fresh: Tensor, length: Tensor, pages: Tensor | None, page: int) -> None:
    """data[b, :, length[b] + i] = fresh[b, :, i], through the page table when there are pages."""
    tokens = length.to(torch.int64)[:, None] + torch.arange(fresh.shape[2], device=fresh.device)
    rows = fresh.transpose(1, 2).to(data.dtype)  # (B, L, H, D): advanced indices with a slice between come first
    if pages is None:
        data[torch.arange(len(tokens), device=fresh.device)[:, None], :, tokens] = rows
    else:
        data[pages.to(torch.int64).gather(1, tokens // page), :, tokens % page] = rows


def rows_of(data: Tensor, tokens: int, pages: Tensor | None, share: int = 1) -> Tensor:
    """The first ``tokens`` tokens as (B, H, tokens / share, ...). share: tokens to an entry of dimension 2."""
    if pages is not None:
        table = pages.to(torch.int64).clamp_min(0)
        data = data[table].transpose(1, 2).flatten(2, 3)
    return data[:, :, : -(-tokens // share)]


def read(store: Store, length: Tensor, pages: Tensor | None, form: CacheFormat) -> tuple[Tensor, Tensor]:
    """What the store holds of its first ``length[b]`` tokens, whole: (B, Hs, T, Ds), (B, Hv, T, Dv), T = max(length).

    Rows at and after ``length[b]`` hold anything.
    """
    tokens = int(length.max()) if len(length) else 0
    return _read_side("k", store, length, tokens, pages, form), _read_side("v", store, length, tokens, pages, form)


def _read_side(side: str, store: Store, length: Tensor, tokens: int, pages: Tensor | None, form: CacheFormat) -> Tensor:
    if not (form.bits_k if side == "k" else form.bits_v):
        return rows_of(store[side], tokens, pages)
    raise BadArgument("quantized caches are not there yet")


def rounded(x: Tensor, side: str, form: CacheFormat) -> Tensor:
    """x (B, H, L, D) as it comes back from the store once its groups are quantized; an incomplete last one is whole."""
    if not (form.bits_k if side == "k" else form.bits_v):
        return x
    raise BadArgument("quantized caches are not there yet")


def rebuild_keys(kept: Tensor, rebuild: Sequence[Tensor], positions: Tensor, form: CacheFormat) -> Tensor:
    """The keys (B, Hk, L, D) behind what is kept of them, (B, Hs, L, Ds); the same tensor when that is keys already.

    Latent: ``rope(norm(U c + bias))`` with ``rebuild`` = U (Hk, D, r), then as the format says bias (Hk, D), norm
    weight (D,), cos and sin (P, rotary / 2) by position. positions: int (B, L), clamped to the tables. Rounded to
    kept's dtype after the product, the norm and the rotation, as models do.
    """
    if not form.latent:
        return kept
    parts = dict(zip(form.rebuild_names(), rebuild, strict=True))
    keys = torch.einsum("blr,hdr->bhld", kept[:, 0], parts["up"].to(kept.dtype))
    if form.key_bias:
        keys = keys + parts["key_bias"].to(keys.dtype)[:, None]
    if form.norm:
        weight = parts["norm_weight"]
        keys = rms_norm.reference(keys, weight, form.norm_eps, round_before_weight=form.round_before_weight)
        keys = keys.to(kept.dtype)
    if form.rotate:
        at = positions.to(torch.int64).clamp(0, parts["cos"].shape[0] - 1)
        cos, sin = (_both(parts[name][at][:, None], form.rotate).to(kept.dtype) for name in ("cos", "sin"))
        turned, rest = keys[..., : form.rotary], keys[..., form.rotary :]
        turned = rope.reference(turned, cos, sin, layout=form.rotate)
        keys = torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned
    return keys


def _both(angles: Tensor, layout: str) -> Tensor:
    """An angle's cosine or sine at both places of its pair: (..., n) to (..., 2n)."""
    if layout == "rotate_half":
        return torch.cat((angles, angles), dim=-1)
    return angles.repeat_interleave(2, dim=-1)
