"""The decode kernel of a KV cache in a dump: a cache as it stands after the example's tokens, and what is correct then.

The canonical op has no cache, so its arguments say nothing of the kernel's. Here its tokens are put into a store; the
kernel then gets the newest token's query. That token is in the store already, which appending it once more leaves as
it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..codegen import symbols
from ..codegen.cache_format import CacheFormat, parse_format
from ..runtime.ops import CanonicalOp, attention, cache_codes, cache_store

STEP = torch.ops.tilewright.cached_attention_step.default


def step_call(op: CanonicalOp, named: Mapping[str, Any]) -> tuple[CanonicalOp, dict[str, Any]]:
    """The step of the newest token of a ``cached_attention`` call: the op with its definition, and its arguments."""
    form = parse_format(named.get("format", ""))
    q, k, v, bias = named["q"], named["k"], named["v"], named.get("bias")
    batch, tokens = q.shape[0], k.shape[2]
    grain = math.lcm(64, form.page or 1, form.group if form.quantized else 1)
    capacity = -(-tokens // grain) * grain
    columns = capacity // form.page if form.page else 0
    sizes = (k.shape[1], k.shape[3], v.shape[1], v.shape[3], str(k.dtype).removeprefix("torch."), batch * columns)
    shapes = form.store(batch, capacity, *sizes).values()
    store = [torch.zeros(shape, dtype=getattr(torch, dtype), device=k.device) for shape, dtype in shapes]
    pages = torch.arange(batch * columns, dtype=torch.int32, device=k.device).view(batch, -1) if columns else None
    none = torch.zeros(batch, dtype=torch.int32, device=k.device)
    cache_store.append(k, v, cache_store.named(store, form), none, pages, form)
    first = none.clone()
    if bias is not None:
        first = (bias.expand(batch, 1, 1, tokens)[:, 0, 0].to(torch.int32).cumsum(-1) == 0).sum(-1).to(torch.int32)
    arguments = {name: item for name, item in named.items() if name not in ("q", "k", "v", "bias")}
    arguments |= {"q": q[:, :, -1:], "k": k[:, :, -1:], "v": v[:, :, -1:], "store": store, "pages": pages}
    arguments |= {"length": none + tokens - 1, "first": first}
    return CanonicalOp("cached_attention_step", STEP, definition, op.tolerance), arguments


def definition(
    q: Tensor,
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
) -> Tensor:
    """Attention of the newest tokens' queries to a store that holds them. Reads all it has room for, then masks."""
    form = parse_format(format)
    tensors = cache_store.named(store, form)
    held = (length + q.shape[2]).to(torch.int64)[:, None]
    kept, values = (everything(side, tensors, held, pages, form) for side in ("k", "v"))
    index = torch.arange(kept.shape[2], device=q.device)
    keys = cache_store.rebuild_keys(kept, rebuild, index - first[:, None], form)
    keys = keys.repeat_interleave(values.shape[1] // keys.shape[1], dim=1)
    own = length[:, None] + torch.arange(q.shape[2], device=q.device)
    total = held[:, None, None]
    indices = {"q_idx": own[:, None, :, None], "k_idx": index, "q_len": total, "k_len": total}
    seen = symbols.evaluate(symbols.parse_mask(mask), indices) & (index >= first[:, None])[:, None, None]
    # Room that holds no token yet may hold anything.
    there = (index < held)[:, None, :, None]
    keys, values = torch.where(there, keys, 0.0), torch.where(there, values, 0.0)
    return attention.attend(q, keys, values, None, None, seen, scale, normalizer)[0]


def everything(side: str, store: Mapping[str, Tensor], held: Tensor, pages: Tensor | None, form: CacheFormat) -> Tensor:
    """Keys or values, whole, of all tokens that a store has room for. held: (B, 1), those it has."""
    bits = form.bits_k if side == "k" else form.bits_v
    data = store[f"{side}_codes" if bits else side]
    room = data.shape[2] if pages is None else pages.shape[1] * form.page
    if not bits:
        return cache_store.rows_of(data, room, pages)
    at = torch.arange(room, device=data.device)
    parts = {}
    for name in cache_store.PARTS:
        if (tensor := store.get(f"{side}_{name}")) is not None:
            of_token = name in ("codes", "left") or (side == "v" and name in ("scale", "offset"))
            part = cache_store.rows_of(tensor, room, pages, 1 if of_token else form.group)
            parts[name] = part.unflatten(2, (room // form.group, form.group)) if of_token else part
    recent = store[f"{side}_recent"][:, :, at % form.ring]
    coded = (held - form.window).clamp_min(0) // form.group * form.group
    old = cache_codes.dequantize(parts, bits, keys=side == "k", dtype=recent.dtype).flatten(2, 3)
    return torch.where((at < coded)[:, None, :, None], old, recent)
