"""``tilewright::cached_attention``: causal self-attention whose keys and values go through a KV cache.

Two ops. ``cached_attention`` is the canonical one that passes see: pure, all keys are the call's own, and what the
cache does to them (factoring, quantizing) is applied as decoding would meet it, so it can be validated, calibrated,
measured and trained. ``cached_attention_step`` is what a compiled decoder runs: it appends the tokens to the store and
attends to everything in it. The frontend turns the one into the other.

    keys(j)     rebuild(kept(j)): the keys themselves, or rope(norm(U c + bias)) of latents
    out         softmax_j(scale * q . keys(j)) values(j) over the j that ``mask`` shows and that are no padding

Token indices are absolute: query i of a call that follows ``length[b]`` tokens has q_idx = length[b] + i, and masks are
about those. A query sees its own call's tokens whole, older ones as the store holds them after the append.
Formats: :mod:`tilewright.codegen.cache_format`; the store: :mod:`tilewright.runtime.ops.cache_store`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...codegen import symbols
from ...codegen.cache_format import CacheFormat, parse_format
from .. import fast_call
from ..errors import BadArgument
from . import attention, cache_store, cached_kernel
from .registry import LIBRARY, canonical


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    rebuild: Sequence[Tensor] = (),
    *,
    scale: float,
    mask: str,
    normalizer: str = "softmax",
    format: str = "",
) -> Tensor:
    """Attention as decoding with the cache computes it, for all tokens at once.

    q (B, Hq, L, D); k (B, Hs, L, Ds): keys, or latents; v (B, Hv, L, Dv); Hs divides Hv, Hv divides Hq. bias: bool
    (B, 1, 1, L), which keys are no (left) padding. rebuild: see :func:`cache_store.rebuild_keys`. Returns
    (B, Hq, L, Dv) in q's dtype.
    """
    return _pure(q, k, v, bias, rebuild, scale, mask, normalizer, parse_format(format), "reference", exact=True)


def _composite(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    rebuild: Sequence[Tensor] = (),
    *,
    scale: float,
    mask: str,
    normalizer: str = "softmax",
    format: str = "",
    target: str = "reference",
) -> Tensor:
    return _pure(q, k, v, bias, rebuild, scale, mask, normalizer, parse_format(format), target)


def _pure(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    rebuild: Sequence[Tensor],
    scale: float,
    mask: str,
    normalizer: str,
    form: CacheFormat,
    target: str,
    exact: bool = False,
) -> Tensor:
    _check(q, k, v, form)
    first = _padding(bias, q)
    positions = torch.arange(k.shape[2], device=k.device) - first[:, None]
    keys = _for_each_value_head(cache_store.rebuild_keys(k, rebuild, positions, form), v)
    if not form.quantized:
        if exact:
            return attention.reference(q, keys, v, bias, scale=scale, mask=mask, normalizer=normalizer)
        target = cached_kernel.many_target(q, target)
        return torch.ops.tilewright.attention(
            q, keys, v, bias, scale=scale, mask=mask, normalizer=normalizer, target=target
        )
    old_keys = cache_store.rebuild_keys(cache_store.rounded(k, "k", form), rebuild, positions, form)
    old_values = cache_store.rounded(v, "v", form)
    return _two_ages(q, keys, v, _for_each_value_head(old_keys, v), old_values, bias, scale, mask, normalizer, form)


def _two_ages(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    old_keys: Tensor,
    old_values: Tensor,
    bias: Tensor | None,
    scale: float,
    mask: str,
    normalizer: str,
    form: CacheFormat,
) -> Tensor:
    """Every query sees the tokens that are quantized by its time quantized, the newer ones whole."""
    length = q.shape[2]
    at = torch.arange(length, device=q.device)
    old = at[None, :] < ((at[:, None] + 1 - form.window).clamp_min(0) // form.group * form.group)
    visible = attention.visible_pairs(q, keys, mask)
    visible = torch.ones_like(old) if visible is None else visible
    if bias is not None:
        visible = visible & bias
    # One attention over both ages side by side: each pair is visible in one of them.
    seen = torch.cat((visible & old, visible & ~old), dim=-1)
    return attention.attend(
        q,
        torch.cat((old_keys, keys), dim=2),
        torch.cat((old_values, values), dim=2),
        None,
        None,
        seen,
        scale,
        normalizer,
    )[0]


def _padding(bias: Tensor | None, q: Tensor) -> Tensor:
    """first (B,) from the visible keys: the number of leading ones that are not."""
    if bias is None:
        return torch.zeros(q.shape[0], dtype=torch.int64, device=q.device)
    shown = bias.expand(q.shape[0], *bias.shape[1:])[:, 0, 0]
    return (shown.to(torch.int32).cumsum(-1) == 0).sum(-1)


def _for_each_value_head(keys: Tensor, v: Tensor) -> Tensor:
    """Keys shared by several value heads, once for each, without a copy where there is one."""
    if keys.shape[1] == v.shape[1]:
        return keys
    if keys.shape[1] == 1:
        return keys.expand(-1, v.shape[1], -1, -1)
    return keys.repeat_interleave(v.shape[1] // keys.shape[1], dim=1)


def _check(q: Tensor, k: Tensor, v: Tensor, form: CacheFormat) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise BadArgument(
                f"cached_attention: {name} has {tensor.dim()} dimensions, not (batch, heads, length, dim)"
            )
    if form.latent and k.shape[1] != 1:
        raise BadArgument(f"cached_attention: a latent has one head, not {k.shape[1]}")
    if not k.shape[1] or v.shape[1] % k.shape[1] or q.shape[1] % v.shape[1]:
        raise BadArgument(
            f"cached_attention: {k.shape[1]} key heads, {v.shape[1]} value heads and {q.shape[1]} query heads: each "
            "must divide the next"
        )


def _step_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rebuild: list[Tensor],
    store: list[Tensor],
    length: Tensor,
    first: Tensor,
    pages: Tensor | None,
    *,
    scale: float,
    mask: str,
    normalizer: str = "softmax",
    format: str = "",
    target: str = "reference",
) -> fast_call.Launch:
    """The launch that appends this call's tokens, then attends. See :func:`reference`.

    store: the tensors of :meth:`CacheFormat.store` in order, written in place; k and v: what is kept of the call's
    tokens. length, first: int32 (B,), left as they are: the caller advances ``length`` when the call has succeeded.
    """
    form = parse_format(format)
    _check(q, k, v, form)
    cache_store.named(store, form)
    append = attend = None
    if target != "reference":
        options: dict[str, Any] = {"scale": scale, "mask": mask, "normalizer": normalizer, "format": format}
        append, attend = cached_kernel.step_launches(
            q, k, v, rebuild, store, length, first, pages, target=target, **options
        )
    if append is not None and attend is not None:
        return cached_kernel.both(append, attend)

    def launch(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rebuild: list[Tensor],
        store: list[Tensor],
        length: Tensor,
        first: Tensor,
        pages: Tensor | None,
        scale: float,
    ) -> Tensor:
        tensors = cache_store.named(store, form)
        if append is not None:
            append(k, v, store, length, first, pages)
        else:
            cache_store.append(k, v, tensors, length, pages, form)
        out = _attend_all(q, k, v, rebuild, tensors, length, first, pages, scale, mask, normalizer, form, target)
        return out.contiguous()  # Inductor relies on what the fake form says

    return launch


def _attend_all(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rebuild: Sequence[Tensor],
    store: cache_store.Store,
    length: Tensor,
    first: Tensor,
    pages: Tensor | None,
    scale: float,
    mask: str,
    normalizer: str,
    form: CacheFormat,
    target: str,
) -> Tensor:
    """Many queries: older tokens are read back whole and joined with the call's own; then it is plain attention."""
    held = int(length.max()) if len(length) else 0
    even = held == 0 or bool((length == held).all())
    fresh = torch.arange(k.shape[2], device=k.device)
    at = length[:, None] + fresh  # (B, L): the call's tokens
    if held:
        old_k, old_v = cache_store.read(store, length, pages, form, ahead=fresh.numel())
        index = torch.cat((torch.arange(held, device=k.device).expand(len(length), held), at), dim=1)
        k, v = torch.cat((old_k.to(k.dtype), k), dim=2), torch.cat((old_v.to(v.dtype), v), dim=2)
    else:
        index = at
    keys = _for_each_value_head(cache_store.rebuild_keys(k, rebuild, index - first[:, None], form), v)
    if even:
        bias = (index >= first[:, None])[:, None, None] if bool((first > 0).any()) else None
        target = cached_kernel.many_target(q, target)
        return torch.ops.tilewright.attention(
            q, keys, v, bias, scale=scale, mask=_from_offset(mask, held), normalizer=normalizer, target=target
        )
    total = (length + fresh.numel())[:, None, None, None]
    values = {"q_idx": at[:, None, :, None], "k_idx": index[:, None, None, :], "q_len": total, "k_len": total}
    visible = symbols.evaluate(symbols.parse_mask(mask), values).expand(len(length), 1, fresh.numel(), index.shape[1])
    exists = torch.ones_like(index, dtype=torch.bool)
    exists[:, :held] = index[:, :held] < length[:, None]
    visible = visible & (exists & (index >= first[:, None]))[:, None, None]
    return attention.attend(q, keys, v, None, None, visible, scale, normalizer)[0]


def _from_offset(mask: str, held: int) -> str:
    """The mask for queries that stand at the end of the keys, in attention's indices, which count from 0 for both."""
    if not held:
        return mask
    expression = symbols.parse_mask(mask)
    shift = {symbols.Q: symbols.Q + symbols.K_LEN - symbols.Q_LEN, symbols.Q_LEN: symbols.K_LEN}
    return symbols.mask_text(expression.subs(shift, simultaneous=True))


def _step_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rebuild: Sequence[Tensor],
    store: Sequence[Tensor],
    length: Tensor,
    first: Tensor,
    pages: Tensor | None,
    *,
    scale: float,
    mask: str,
    normalizer: str = "softmax",
    format: str = "",
    target: str = "reference",
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[3])


CACHED_ATTENTION = canonical(
    "cached_attention(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor[] rebuild, *, float scale, str mask, "
    "str normalizer='softmax', str format='', str target='reference') -> Tensor",
    reference=reference,
    composite=_composite,
    tolerance=attention.TOLERANCE,
    spec=cached_kernel.spec,
)

LIBRARY.define(
    "cached_attention_step(Tensor q, Tensor k, Tensor v, Tensor[] rebuild, Tensor(a!)[] store, Tensor length, "
    "Tensor first, Tensor? pages, *, float scale, str mask, str normalizer='softmax', str format='', "
    "str target='reference') -> Tensor"
)
fast_call.implement(
    "cached_attention_step",
    _step_kernel,
    passes=("q", "k", "v", "rebuild", "store", "length", "first", "pages", "scale"),
)
torch.library.register_fake("tilewright::cached_attention_step", _step_fake, lib=LIBRARY)
