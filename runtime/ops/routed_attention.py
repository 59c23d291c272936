"""Helpers of attention inside clusters of queries and keys, each cluster holding as many of either.

Roy et al., "Efficient Content-Based Sparse Attention with Routing Transformers" (2020, arXiv 2003.05997), section 4.1.
K clusters, Hq = Hk * G query and Hk key heads; each key head has centroids of its own, which its group's queries share.
A cluster's queries and keys are gathered to one small attention, so there are Hq * K of those, in the order (key head,
cluster, member of the group); where their tokens stood is read from a table, per batch entry ``(Hq + Hk) * K * w``
numbers: the queries' positions, then the keys'. All are composite, on any device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .block_lists import EMPTY, FULL, PARTIAL
from .group_attention import CAUSAL
from .registry import helper

_FAR = 2**29


def similarity(x: Tensor, centroids: Tensor) -> Tensor:
    """(B, H, K, L) products of the tokens of x (B, H, L, D), normalised, with centroids (Hk, K, D), normalised."""
    heads, (key_heads, clusters, channels) = x.shape[1], centroids.shape
    compute = centroids.dtype
    tokens = F.layer_norm(x.to(compute), (x.shape[-1],))
    rows = tokens.reshape(x.shape[0], key_heads, (heads // key_heads) * x.shape[2], channels)
    found = F.layer_norm(centroids, (channels,)) @ rows.transpose(-1, -2)
    found = found.reshape(x.shape[0], key_heads, clusters, heads // key_heads, x.shape[2])
    return found.transpose(2, 3).reshape(x.shape[0], heads, clusters, x.shape[2])


def route(x: Tensor, centroids: Tensor, *, size: int = 0) -> Tensor:
    """The positions, ascending, of the ``size`` tokens nearest to each centroid: int64 (B, H, K, w).

    size 0 is the paper's w, the length over the number of clusters.
    """
    length, clusters = x.shape[2], centroids.shape[1]
    width = torch.sym_min(size, length) if size else -(-length // clusters)
    return similarity(x, centroids).topk(width, dim=-1).indices.sort(dim=-1).values


def take_routed(x: Tensor, index: Tensor, *, group: int = 1) -> Tensor:
    """x's rows (B, H, L, D) by cluster: (B, H * K, w, D), heads in the order (H / group, K, group)."""
    batch, heads, clusters, width = index.shape
    x = x.expand(batch, *x.shape[1:])
    rows = x.gather(2, index.reshape(batch, heads, -1)[..., None].expand(-1, -1, -1, x.shape[-1]))
    rows = rows.reshape(batch, heads // group, group, clusters, width, x.shape[-1]).transpose(2, 3)
    return rows.reshape(batch, heads * clusters, width, x.shape[-1])


def _in_order(index: Tensor, group: int) -> Tensor:
    """(B, H, K, w) as (B, H * K, w) in the order of :func:`take_routed`."""
    batch, heads, clusters, width = index.shape
    return index.reshape(batch, heads // group, group, clusters, width).transpose(2, 3).reshape(batch, -1, width)


def route_table(q_index: Tensor, k_index: Tensor) -> Tensor:
    """The int32 table of positions, see the module's text."""
    group = q_index.shape[1] // k_index.shape[1]
    rows = torch.cat((_in_order(q_index, group), _in_order(k_index, 1)), 1)
    return rows.reshape(-1).to(torch.int32)


def route_mask(mask: str, q_heads: int, k_heads: int, clusters: int, window: int) -> str:
    """The mask of distant pairs inside a cluster: the site's own ``mask`` at the tokens' positions."""
    row = f"batch * ({(q_heads + k_heads) * clusters} * q_len)"
    place = {
        "q_idx": f"table({row} + head * q_len + q_idx)",
        "k_idx": f"table({row} + ({q_heads * clusters} + head // {q_heads // k_heads}) * q_len + k_idx)",
    }
    distance = f"{place['q_idx']} - {place['k_idx']}"
    far = f"({distance} > {window})"
    if mask != CAUSAL:
        far = f"({far} | ({distance} < {-window}))"
    if mask in ("", CAUSAL):
        return far
    for side, text in place.items():
        mask = mask.replace(side, text)
    return f"{far} & ({mask})"


def route_states(q_index: Tensor, k_index: Tensor, *, mask: str, window: int, block: int) -> Tensor:
    """uint8 states (B, Hq * K, NQ, NK) of the tiles of :func:`route_mask`, from their first and last positions."""
    group = q_index.shape[1] // k_index.shape[1]
    q_low, q_high = (t[..., :, None] for t in _ends(_in_order(q_index, group), block))
    k_low, k_high = (t.repeat_interleave(group, 1)[..., None, :] for t in _ends(_in_order(k_index, 1), block))
    some, every = q_high - k_low > window, q_low - k_high > window
    if mask != CAUSAL:
        some, every = some | (k_high - q_low > window), every | (k_low - q_high > window)
    states = torch.where(some, PARTIAL, EMPTY)
    return (torch.where(every, FULL, states) if mask in ("", CAUSAL) else states).to(torch.uint8)


def _ends(places: Tensor, block: int) -> tuple[Tensor, Tensor]:
    missing = -places.shape[-1] % block
    shape = (*places.shape[:-1], -1, block)
    low = F.pad(places, (0, missing), value=_FAR).reshape(shape).amin(-1)
    return low, F.pad(places, (0, missing), value=-_FAR).reshape(shape).amax(-1)


def merge_routed(out: Tensor, lse: Tensor, index: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Bring the clusters' rows back to their tokens: out (B, Hq, L, Dv) in out's dtype, lse (B, Hq, L).

    out (B, Hq * K, w, Dv), lse (B, Hq * K, w) in the order of :func:`take_routed` for ``index`` (B, Hq, K, w); like:
    any tensor whose sizes 1 and 2 are key heads and length. A token in several clusters gets their rows joined by
    log-sum-exp, one in none zeros and -inf.
    """
    batch, heads, clusters, width = index.shape
    length, key_heads = like.shape[2], like.shape[1]
    shape = (batch, key_heads, clusters, heads // key_heads, width)
    lse = lse.reshape(shape).transpose(2, 3).reshape(batch, heads, clusters * width)
    out = out.reshape(*shape, out.shape[-1]).transpose(2, 3).reshape(batch, heads, clusters * width, out.shape[-1])
    place = index.reshape(batch, heads, clusters * width)
    nothing = lse.new_full((batch, heads, length), float("-inf"))
    largest = nothing.scatter_reduce(2, place, lse.detach(), "amax")
    largest = largest.masked_fill(largest == float("-inf"), 0.0)
    weight = torch.exp(lse - largest.gather(2, place))
    total = torch.zeros_like(nothing).scatter_add(2, place, weight)
    rows = lse.new_zeros((batch, heads, length, out.shape[-1]))
    rows = rows.scatter_add(2, place[..., None].expand_as(out), weight[..., None] * out.to(lse.dtype))
    safe = total.masked_fill(total == 0, 1.0)
    return (rows / safe[..., None]).to(out.dtype), (largest + safe.log()).masked_fill(total == 0, float("-inf"))


def cluster_means(q: Tensor, k: Tensor, centroids: Tensor) -> Tensor:
    """Where the tokens nearest to each centroid lie, (Hk, K, D): half the mean of its queries, half of its keys'.

    Of the whole batch, normalised; where a centroid is nearest to no query or no key, it stands in for their mean.
    """
    with torch.no_grad():
        key_heads, clusters, channels = centroids.shape
        here = F.layer_norm(centroids, (channels,))
        means = []
        for x in (q, k):
            nearest = similarity(x, centroids).argmax(2)
            tokens = F.layer_norm(x.to(centroids.dtype), (channels,))
            split = (x.shape[0], key_heads, -1)
            member = F.one_hot(nearest, clusters).to(centroids.dtype).reshape(*split, clusters)
            total = (member.transpose(-1, -2) @ tokens.reshape(*split, channels)).sum(0)
            count = member.sum((0, 2))[..., None]
            means.append(torch.where(count > 0, total / count.clamp_min(1.0), here))
        return (means[0] + means[1]) / 2


ROUTE = helper("route(Tensor x, Tensor centroids, *, int size=0) -> Tensor", route)
TAKE_ROUTED = helper("take_routed(Tensor x, Tensor index, *, int group=1) -> Tensor", take_routed)
ROUTE_TABLE = helper("route_table(Tensor q_index, Tensor k_index) -> Tensor", route_table)
ROUTE_STATES = helper(
    "route_states(Tensor q_index, Tensor k_index, *, str mask, int window, int block) -> Tensor", route_states
)
MERGE_ROUTED = helper(
    "merge_routed(Tensor out, Tensor lse, Tensor index, Tensor like) -> (Tensor, Tensor)", merge_routed
)
CLUSTER_MEANS = helper("cluster_means(Tensor q, Tensor k, Tensor centroids) -> Tensor", cluster_means)
