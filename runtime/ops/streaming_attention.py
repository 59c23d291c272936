"""``tilewright::streaming_attention``: attention to a sliding window and the first tokens, in a cache of fixed size.

    q at index p, key j <= p, both counted from the sequence's first token:
    visible     p - j < window, or j < sinks
    score       scale * q . k                where p - j <= limit
                scale * q_far . k_far        beyond: queries turned as at distance ``limit`` and keys as at 0

the position rule of LM-Infinite: Han et al., "LM-Infinite: Zero-Shot Extreme Length Generalization for Large Language
Models" (NAACL 2024, arXiv:2308.16137), section 4; the fixed cache of first and newest tokens: Xiao et al., "Efficient
Streaming Language Models with Attention Sinks" (ICLR 2024, arXiv:2309.17453), section 3. With limit >= window only the
first tokens are ever beyond it. Without q_far and k_far (models that turn nothing) distances do not matter.

Two ops, as for :mod:`tilewright.runtime.ops.cached_attention`: the pure, canonical ``streaming_attention``, and
``streaming_attention_step`` on a store of three tensors that never grow, with slots = sinks + (window + SPARE) + 1:

    k_recent    (B, Hk, slots, D)       the first tokens, then a ring with token j at j % (window + SPARE), then one
    v_recent    (B, Hk, slots, Dv)      slot for tokens that nothing will see
    far_recent  (B, Hk, sinks + 1, D)   the first tokens as at position 0, and a slot for all others; with k_far only

SPARE more tokens than the window let a call of up to SPARE + 1 queries be answered from the store alone, and as many
of the newest tokens be dropped again (speculative decoding). A store starts as zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...codegen.attention import AttentionSpec
from ..errors import BadArgument
from . import attention, attention_kernel
from .attention import _safe_softmax
from .cached_attention import _padding
from .registry import LIBRARY, canonical

SPARE = 16
"""Tokens that the ring holds beyond the window."""


def layout(
    batch: int, heads: int, key_dim: int, value_dim: int, dtype: str, *, window: int, sinks: int, far: bool
) -> dict[str, tuple[tuple[int, ...], str]]:
    """The store's tensors in order: name -> (shape, name of the dtype). heads: of the keys. far: with ``k_far``."""
    slots = sinks + window + SPARE + 1
    found: dict[str, tuple[tuple[int, ...], str]] = {
        "k_recent": ((batch, heads, slots, key_dim), dtype),
        "v_recent": ((batch, heads, slots, value_dim), dtype),
    }
    if far:
        found["far_recent"] = ((batch, heads, sinks + 1, key_dim), dtype)
    return found


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    q_far: Tensor | None = None,
    k_far: Tensor | None = None,
    *,
    scale: float,
    window: int,
    sinks: int,
    limit: int,
) -> Tensor:
    """The definition, for all tokens at once.

    q, q_far (B, Hq, L, D); k, k_far (B, Hk, L, D), v (B, Hk, L, Dv), Hk dividing Hq; bias: bool (B, 1, 1, L), which
    keys are no (left) padding. Returns (B, Hq, L, Dv) in q's dtype; a query that is padding gives zeros.
    """
    _check(q, k, v, q_far, k_far, window, sinks, limit)
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    at = torch.arange(q.shape[2], device=q.device)
    distance = at[:, None] - at
    first = _padding(bias, q)[:, None, None, None]
    visible = (distance >= 0) & ((distance < window) | (at < first + sinks)) & (at >= first)
    scores = _products(q, k, compute)
    if q_far is not None and k_far is not None:
        scores = torch.where(distance > limit, _products(q_far, k_far, compute), scores)
    weights, _ = _safe_softmax((scores * scale).masked_fill(~visible, -torch.inf))
    return _weighted(weights, v, compute).to(q.dtype)


def _composite(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    q_far: Tensor | None = None,
    k_far: Tensor | None = None,
    *,
    scale: float,
    window: int,
    sinks: int,
    limit: int,
    target: str = "reference",
) -> Tensor:
    """In time proportional to the window: what is near by the attention of a window, the first tokens beside it."""
    _check(q, k, v, q_far, k_far, window, sinks, limit)
    first = _padding(bias, q)
    at = torch.arange(k.shape[2], device=k.device).expand(q.shape[0], -1)
    near = _lse(q, k, v, _after_sinks(at, first, sinks), scale, near_mask(window), target)
    if not sinks:
        return near[0]
    index = first[:, None] + torch.arange(sinks, device=k.device)
    index = torch.minimum(index, at[:, -1:])[:, None, :, None]
    rows = [None if x is None else _rows(x, index) for x in (k, k_far, v)]
    assert rows[0] is not None and rows[2] is not None
    ends = _first_tokens(q, q_far, rows[0], rows[1], rows[2], at, first, scale, limit)
    return torch.ops.tilewright.merge_attention(*near, *ends)[0]


def near_mask(window: int) -> str:
    """The mask of the call's own tokens, symbols of codegen/symbols.py."""
    return f"(k_idx <= q_idx) & (k_idx > q_idx - {window})"


def spec(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    q_far: Tensor | None = None,
    k_far: Tensor | None = None,
    *,
    scale: float,
    window: int,
    sinks: int,
    limit: int,
    target: str,
) -> AttentionSpec:
    """The kernel of the window; raises :class:`~tilewright.runtime.errors.UnsupportedKernel` when there is none."""
    _check(q, k, v, q_far, k_far, window, sinks, limit)
    hidden = q.new_empty((q.shape[0], 1, 1, k.shape[2]), dtype=torch.bool)
    return attention_kernel.spec(q, k, v, hidden, None, mask=near_mask(window), normalizer="softmax", target=target)


def _after_sinks(at: Tensor, first: Tensor, sinks: int) -> Tensor:
    """bool (B, 1, 1, N): neither padding nor among the first tokens. at: indices (B, N)."""
    return (at >= first[:, None] + sinks)[:, None, None]


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(2, index.expand(x.shape[0], x.shape[1], index.shape[2], x.shape[3]))


def _lse(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, mask: str, target: str) -> tuple[Tensor, Tensor]:
    return torch.ops.tilewright.attention_lse(q, k, v, bias, scale=scale, mask=mask, target=target)


def _products(q: Tensor, k: Tensor, compute: torch.dtype) -> Tensor:
    """(B, Hq, L, N): the dot products of queries with the keys of their heads."""
    rows = q.to(compute).reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    return (rows @ k.to(compute).transpose(-1, -2)).reshape(*q.shape[:3], k.shape[2])


def _weighted(weights: Tensor, v: Tensor, compute: torch.dtype) -> Tensor:
    rows = weights.reshape(weights.shape[0], v.shape[1], -1, weights.shape[3])
    return (rows @ v.to(compute)).reshape(*weights.shape[:3], v.shape[3])


def _first_tokens(
    q: Tensor,
    q_far: Tensor | None,
    k: Tensor,
    k_far: Tensor | None,
    v: Tensor,
    at: Tensor,
    first: Tensor,
    scale: float,
    limit: int,
) -> tuple[Tensor, Tensor]:
    """Attention to the first tokens, k, k_far, v (B, Hk, sinks, ...), as out and log-sum-exp. at: queries' (B, L)."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    index = first[:, None] + torch.arange(k.shape[2], device=k.device)
    distance = (at[:, :, None] - index[:, None])[:, None]
    scores = _products(q, k, compute)
    if q_far is not None and k_far is not None:
        scores = torch.where(distance > limit, _products(q_far, k_far, compute), scores)
    weights, lse = _safe_softmax((scores * scale).masked_fill(distance < 0, -torch.inf))
    return _weighted(weights, v, compute).to(q.dtype), lse


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_far: Tensor | None,
    k_far: Tensor | None,
    store: Sequence[Tensor],
    length: Tensor,
    first: Tensor,
    *,
    scale: float,
    window: int,
    sinks: int,
    limit: int,
    target: str = "reference",
) -> Tensor:
    """Append this call's tokens, then attend; q .. k_far as for :func:`reference`, of the call's tokens alone.

    store: the tensors of :func:`layout` in order, written in place. length, first: int32 (B,), the tokens held and the
    first that is no padding; the caller advances ``length``. After a call of more than SPARE + 1 tokens that was not
    the first, the store cannot go back: tokens that queries before it saw are gone.
    """
    _check(q, k, v, q_far, k_far, window, sinks, limit)
    if len(store) != (2 if k_far is None else 3):
        raise BadArgument(f"streaming_attention: {len(store)} tensors are not this site's store")
    count, ring = k.shape[2], window + SPARE
    first = first.to(torch.int64)
    at = length.to(torch.int64)[:, None] + torch.arange(count, device=k.device)
    if count > SPARE + 1:
        near = _many(q, k, v, store, at, first, scale, window, sinks, target)
        _append(k, v, k_far, store, at, first, ring, sinks)
    else:
        _append(k, v, k_far, store, at, first, ring, sinks)
        held = _held(at[:, -1], ring)
        visible = _in_window(held, at, first, window, sinks)
        if k_far is None and sinks:
            index = first[:, None] + torch.arange(sinks, device=k.device)
            visible = torch.cat(((index[:, None] <= at[:, :, None])[:, None], visible), -1)
            return _heads_last(
                torch.ops.tilewright.attention(
                    q, store[0][:, :, :-1], store[1][:, :, :-1], visible, scale=scale, target=target
                )
            )
        near = _lse(q, store[0][:, :, sinks:-1], store[1][:, :, sinks:-1], visible, scale, "", target)
    if not sinks:
        return _heads_last(near[0])
    ends = [x[:, :, :sinks] for x in store]
    far = ends[2] if len(ends) == 3 else None
    found = _first_tokens(q, q_far, ends[0], far, ends[1], at, first, scale, limit)
    return _heads_last(torch.ops.tilewright.merge_attention(*near, *found)[0])


def _many(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    store: Sequence[Tensor],
    at: Tensor,
    first: Tensor,
    scale: float,
    window: int,
    sinks: int,
    target: str,
) -> tuple[Tensor, Tensor]:
    """The window of each of many queries, before they are appended: the call's own tokens, and what the ring holds."""
    out, lse = _lse(q, k, v, _after_sinks(at, first, sinks), scale, near_mask(window), target)
    reach = min(q.shape[2], window - 1)  # later queries see nothing from before the call
    if not reach or not int(at[:, 0].max()):
        return out, lse
    held = _held(at[:, 0] - 1, window + SPARE)
    visible = _in_window(held, at[:, :reach], first, window, sinks)
    early = q[:, :, :reach]
    before = _lse(early, store[0][:, :, sinks:-1], store[1][:, :, sinks:-1], visible, scale, "", target)
    both = torch.ops.tilewright.merge_attention(out[:, :, :reach], lse[:, :, :reach], *before)
    return torch.cat((both[0], out[:, :, reach:]), 2), torch.cat((both[1], lse[:, :, reach:]), 2)


def _held(last: Tensor, ring: int) -> Tensor:
    """(B, ring): the index of the token in each slot of the ring when ``last`` (B,) is the newest one; < 0: none."""
    return last[:, None] - (last[:, None] - torch.arange(ring, device=last.device)) % ring


def _in_window(held: Tensor, at: Tensor, first: Tensor, window: int, sinks: int) -> Tensor:
    """bool (B, 1, L, ring): which slots a query sees, the first tokens left out."""
    held, at = held[:, None], at[:, :, None]
    return ((held <= at) & (held > at - window) & (held >= (first + sinks)[:, None, None]))[:, None]


def _append(
    k: Tensor,
    v: Tensor,
    k_far: Tensor | None,
    store: Sequence[Tensor],
    at: Tensor,
    first: Tensor,
    ring: int,
    sinks: int,
) -> None:
    since = at - first[:, None]
    slot = torch.where(since < sinks, since, sinks + at % ring)
    # Padding, and tokens that this very call pushes out again, go to the slot that nothing reads.
    gone = (since < 0) | ((since >= sinks) & (at <= at[:, -1:] - ring))
    slot = slot.masked_fill(gone, sinks + ring)
    batch = torch.arange(at.shape[0], device=at.device)[:, None]
    for data, fresh in zip(store, (k, v), strict=False):
        data[batch, :, slot] = fresh.transpose(1, 2).to(data.dtype)
    if k_far is not None:
        slot = since.masked_fill((since < 0) | (since > sinks), sinks)
        store[2][batch, :, slot] = k_far.transpose(1, 2).to(store[2].dtype)


def _heads_last(out: Tensor) -> Tensor:
    """The same in the layout that the fake implementation promises, which models want next."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_far: Tensor | None,
    k_far: Tensor | None,
    window: int,
    sinks: int,
    limit: int,
) -> None:
    attention.check_arguments(q, k, v, None, None, "", "softmax")
    if q.shape[2] != k.shape[2]:
        raise BadArgument(f"streaming_attention: {q.shape[2]} queries and {k.shape[2]} keys are not of one call")
    if window < 1 or sinks < 0 or limit < window:
        raise BadArgument(
            f"streaming_attention: window {window}, sinks {sinks}, limit {limit}: a window has at least one token, and "
            "the limit on distance reaches over the window"
        )
    if (q_far is None) != (k_far is None):
        raise BadArgument("streaming_attention: q_far and k_far go together")
    if q_far is not None and k_far is not None and (q_far.shape != q.shape or k_far.shape != k.shape):
        raise BadArgument("streaming_attention: q_far and k_far are q and k turned otherwise, of the same shapes")


def _step_fake(q, k, v, q_far, k_far, store, length, first, **options):
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)


STREAMING_ATTENTION = canonical(
    "streaming_attention(Tensor q, Tensor k, Tensor v, Tensor? bias=None, Tensor? q_far=None, Tensor? k_far=None, *, "
    "float scale, int window, int sinks, int limit, str target='reference') -> Tensor",
    reference=reference,
    composite=_composite,
    tolerance=attention.TOLERANCE,
    spec=spec,
)

LIBRARY.define(
    "streaming_attention_step(Tensor q, Tensor k, Tensor v, Tensor? q_far, Tensor? k_far, Tensor(a!)[] store, "
    "Tensor length, Tensor first, *, float scale, int window, int sinks, int limit, str target='reference') -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
LIBRARY.impl("streaming_attention_step", _step, "CPU")
LIBRARY.impl("streaming_attention_step", _step, "CUDA")
torch.library.register_fake("tilewright::streaming_attention_step", _step_fake, lib=LIBRARY)
