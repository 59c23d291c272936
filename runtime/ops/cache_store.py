"""The store of a KV cache in plain PyTorch: append tokens, read them back, rebuild keys from latents.

The definition of what every kernel on a store computes; layouts are in :mod:`tilewright.codegen.cache_format`. All
functions take a store as a mapping by name. ``length`` int32 (B,) counts the tokens held before an append, padding
included; ``first`` int32 (B,) is the first token that is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...codegen.cache_format import CacheFormat, parse_format
from ..errors import BadArgument
from . import cache_codes, rms_norm, rope
from .registry import LIBRARY

Store = Mapping[str, Tensor]
PARTS = ("codes", "scale", "offset", "left", "right", "outlier", "place")
"""What :func:`cache_codes.quantize` gives, in the store's order."""


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
    """Quantize the groups that this call completes, of tokens from the ring and the call's own; then renew the ring."""
    recent, start, count = store[f"{side}_recent"], length.to(torch.int64), fresh.shape[2]
    fresh = fresh.to(recent.dtype)
    done, then = (_quantized_tokens(held, form) // form.group for held in (start, start + count))
    block = done[:, None] + torch.arange(-(-count // form.group), device=fresh.device)
    row, place = (block < then[:, None]).nonzero(as_tuple=True)
    if len(row):
        block = block[row, place]
        tokens = block[:, None] * form.group + torch.arange(form.group, device=fresh.device)  # (N, group)
        behind = (tokens - start[row, None])[..., None, None]
        own = fresh[row[:, None], :, behind[..., 0, 0].clamp_min(0)]  # (N, group, H, D)
        x = torch.where(behind >= 0, own, recent[row[:, None], :, tokens % form.ring]).transpose(1, 2)
        for name, part in quantize_side(x, side, form).items():
            _write_blocks(store[f"{side}_{name}"], part, row, block, _of_token(name, side), pages, form)
    kept = min(count, form.ring)  # older tokens of the call would land on the same slots
    at = (start + count - kept)[:, None] + torch.arange(kept, device=fresh.device)
    rows = torch.arange(len(at), device=fresh.device)[:, None]
    recent[rows, :, at % form.ring] = fresh[:, :, count - kept :].transpose(1, 2)


def quantize_side(x: Tensor, side: str, form: CacheFormat) -> dict[str, Tensor]:
    """The parts of blocks x (..., H, group, D) as the format wants them: :func:`cache_codes.quantize`."""
    keys = side == "k"
    return cache_codes.quantize(
        x,
        form.bits_k if keys else form.bits_v,
        keys=keys,
        value_group=form.value_group,
        rank=form.correction,
        outliers=form.outliers,
    )


def _of_token(name: str, side: str) -> bool:
    """Whether a part has a row for each token; the others have one for each group."""
    return name in ("codes", "left") or (side == "v" and name in ("scale", "offset"))


def _quantized_tokens(held: Tensor, form: CacheFormat) -> Tensor:
    """:meth:`CacheFormat.quantized_tokens` of each sequence."""
    return (held - form.window).clamp_min(0) // form.group * form.group


def _write_blocks(
    data: Tensor, part: Tensor, row: Tensor, block: Tensor, of_token: bool, pages: Tensor | None, form: CacheFormat
) -> None:
    """Write part (N, H, group, ...) or (N, H, ...), of group ``block[n]`` of sequence ``row[n]``."""
    if pages is not None:
        share = form.page // form.group
        row, block = pages.to(torch.int64)[row, block // share], block % share
    if of_token:
        tokens = block[:, None] * form.group + torch.arange(form.group, device=data.device)
        data[row[:, None], :, tokens] = part.transpose(1, 2)
    else:
        data[row, :, block] = part


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


def read(
    store: Store, length: Tensor, pages: Tensor | None, form: CacheFormat, ahead: int = 0
) -> tuple[Tensor, Tensor]:
    """What the store holds of its first ``length[b]`` tokens, whole: (B, Hs, T, Ds), (B, Hv, T, Dv), T = max(length).

    ahead: how many more tokens than these it holds; they decide which of the older ones are quantized. Rows at and
    after ``length[b]`` hold anything.
    """
    tokens = int(length.max()) if len(length) else 0
    held = length + ahead
    return _read_side("k", store, held, tokens, pages, form), _read_side("v", store, held, tokens, pages, form)


def _read_side(side: str, store: Store, held: Tensor, tokens: int, pages: Tensor | None, form: CacheFormat) -> Tensor:
    """held: (B,), tokens in the store. tokens: how many to give back."""
    bits = form.bits_k if side == "k" else form.bits_v
    if not bits:
        return rows_of(store[side], tokens, pages)
    recent = store[f"{side}_recent"]
    at = torch.arange(tokens, device=recent.device)
    whole = recent[:, :, at % form.ring]
    coded = _quantized_tokens(held.to(torch.int64), form)
    blocks = min(-(-tokens // form.group), int(coded.max()) // form.group if len(coded) else 0)
    if not blocks:
        return whole
    parts = {}
    for name in PARTS:
        if (data := store.get(f"{side}_{name}")) is not None:
            of_token = _of_token(name, side)
            part = rows_of(data, blocks * form.group, pages, 1 if of_token else form.group)
            parts[name] = part.unflatten(2, (blocks, form.group)) if of_token else part
    old = cache_codes.dequantize(parts, bits, keys=side == "k", dtype=recent.dtype).flatten(2, 3)[:, :, :tokens]
    return torch.cat(
        (
            torch.where((at < coded[:, None])[:, None, : old.shape[2], None], old, whole[:, :, : old.shape[2]]),
            whole[:, :, old.shape[2] :],
        ),
        dim=2,
    )


def restore_recent(store: Store, before: Tensor, after: Tensor, pages: Tensor | None, form: CacheFormat) -> None:
    """Make the rings right again where sequences are cut from ``before`` to ``after`` tokens, int (B,), in place.

    A token that is to be whole again and whose slot a newer one has taken comes back as its codes give it: what
    rounding took is gone. A token that still has its slot is whole as before.
    """
    start = _quantized_tokens(after.to(torch.int64), form)
    end = torch.minimum(after, before - form.ring).to(torch.int64)
    row, place = (torch.arange(form.ring, device=start.device) < (end - start)[:, None]).nonzero(as_tuple=True)
    if not len(row):
        return
    token = start[row] + place
    for side, bits in (("k", form.bits_k), ("v", form.bits_v)):
        if bits:
            old = _read_side(side, store, before, int(token.max()) + 1, pages, form)
            store[f"{side}_recent"][row, :, token % form.ring] = old[row, :, token]


def rounded(x: Tensor, side: str, form: CacheFormat) -> Tensor:
    """x (B, H, L, D) as it comes back from the store once its groups are quantized; a last, incomplete group is whole.

    Gradients pass as if nothing had been rounded (a straight-through estimate). An op of its own: the number of groups
    must not fix the length of a graph that is traced with any length.
    """
    if not (form.bits_k if side == "k" else form.bits_v):
        return x
    return torch.ops.tilewright.cache_rounded(x, side, form.text())


def _rounded(x: Tensor, side: str, format: str) -> Tensor:
    form = parse_format(format)
    blocks = x.shape[2] // form.group
    tokens, result = blocks * form.group, x.clone(memory_format=torch.contiguous_format)
    if x.numel() and blocks:
        parts = quantize_side(x[:, :, :tokens].unflatten(2, (blocks, form.group)), side, form)
        bits = form.bits_k if side == "k" else form.bits_v
        result[:, :, :tokens] = cache_codes.dequantize(parts, bits, keys=side == "k", dtype=x.dtype).flatten(2, 3)
    return result


LIBRARY.define("cache_rounded(Tensor x, str side, str format) -> Tensor")
for _key in ("CPU", "CUDA"):
    LIBRARY.impl("cache_rounded", _rounded, _key)
torch.library.register_fake("tilewright::cache_rounded", lambda x, side, format: x.new_empty(x.shape), lib=LIBRARY)
torch.library.register_autograd("tilewright::cache_rounded", lambda ctx, grad: (grad, None, None), lib=LIBRARY)


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
