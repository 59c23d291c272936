"""Helpers of attention inside groups of tokens: Sinkhorn-balanced groups, tokens sorted by group, tile states.

Two tokens may attend to each other when they share a kept group and are further apart than a window; pairs inside the
window, or with a sink, belong to a second attention, and ``merge_attention`` joins the two. Tokens are sorted by their
set of groups, so that whole tiles are empty, and what a tile's pairs may see is read from one int32 table:

    compatible    N * N      entry (a, b) is 1 when the sets of groups a and b have one in common
    per batch     2 * L      the position of each sorted token, then the number of its set of groups

"Why Attend to Everything? Focus is the Key" (arXiv 2604.03260), section 2 and appendix D. The paper splits the pairs
into same group and cross-group window; here they are split into distant pairs and window, so that the window has
closed-form limits. Both splits are disjoint and have the same union. All are composite, O(L) or O(tiles), any device.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import BadArgument
from .block_lists import EMPTY, FULL, PARTIAL
from .registry import helper

MOST_SETS = 512
"""Sets of kept groups that a table may tell apart: C(groups, keep)."""
_FAR = 2**29


def sinkhorn(scores: Tensor, *, temperature: float, iterations: int) -> tuple[Tensor, Tensor]:
    """log g (B, L, K) and the groups' offsets (B, K), from scores (B, L, K): step 1 and 2 of the paper, in logarithms.

    g = exp(scores / temperature), then ``iterations`` times divided by its sums over tokens and over groups, so that a
    token's groups sum to one and every group has about the same mass. The offsets are what balancing added to the
    scores of each group, their mean taken off: ``g = softmax(scores / temperature + offsets)``.
    """
    scaled = scores / temperature
    log_g = scaled
    for _ in range(iterations):
        log_g = log_g - log_g.logsumexp(-2, keepdim=True)
        log_g = log_g - log_g.logsumexp(-1, keepdim=True)
    added = (log_g - scaled).mean(-2)
    return log_g, added - added.mean(-1, keepdim=True)


def kept_groups(log_g: Tensor, *, keep: int) -> Tensor:
    """The ``keep`` likeliest groups of each token: bool (B, L, K)."""
    best = log_g.topk(keep, dim=-1).indices
    return torch.zeros_like(log_g, dtype=torch.bool).scatter(-1, best, True)


def group_sets(groups: int, keep: int) -> list[tuple[int, ...]]:
    """All sets of ``keep`` of ``groups`` groups, in the order of their numbers. Raises BadArgument for too many."""
    if not 1 <= keep <= groups or math.comb(groups, keep) > MOST_SETS:
        raise BadArgument(f"{keep} of {groups} groups: need 1 to all of them, and at most {MOST_SETS} different sets")
    # The combinatorial number system: a set c1 < c2 < .. has the number C(c1, 1) + C(c2, 2) + ..
    return sorted(itertools.combinations(range(groups), keep), key=lambda chosen: chosen[::-1])


def group_order(members: Tensor, *, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens sorted by their set of groups: (order, inverse, table) from bool members (B, L, K), ``keep`` True a row.

    order int64 (B, L): which token stands at each sorted place; stable, so that positions ascend inside a set.
    inverse: at which place each token stands. table int32: see the module's text.
    """
    groups = members.shape[-1]
    sets = group_sets(groups, keep)
    device = members.device
    binomials = torch.tensor([[math.comb(c, t) for t in range(keep + 1)] for c in range(groups)], device=device)
    rank = members.cumsum(-1) * members  # 1 for a token's first group, 2 for its second, 0 for what is not its
    number = (binomials.gather(1, rank.reshape(-1, groups).T).T.reshape(rank.shape) * members).sum(-1)
    order = number.argsort(dim=-1, stable=True)
    compatible = [[int(not set(a).isdisjoint(b)) for b in sets] for a in sets]
    rows = torch.cat((order, number.gather(-1, order)), -1).to(torch.int32)
    table = torch.cat((torch.tensor(compatible, dtype=torch.int32, device=device).flatten(), rows.flatten()))
    return order, order.argsort(dim=-1), table


def group_mask(mask: str, groups: int, keep: int, window: int, sinks: int = 0) -> str:
    """The mask of distant pairs over sorted tokens: the site's own ``mask`` at their positions, and a common group."""
    count = math.comb(groups, keep)
    row = f"{count * count} + batch * (2 * q_len)"
    place = {side: f"table({row} + {side})" for side in ("q_idx", "k_idx")}
    sets = {side: f"table({row} + q_len + {side})" for side in ("q_idx", "k_idx")}
    distance = f"{place['q_idx']} - {place['k_idx']}"
    far = f"{distance} > {window}"
    if mask != CAUSAL:
        far = f"(({far}) | ({distance} < {-window}))"
    terms = [f"({far})", f"(table({count} * {sets['q_idx']} + {sets['k_idx']}) > 0)"]
    if sinks:
        terms.append(f"({place['k_idx']} >= {sinks})")
    if mask not in ("", CAUSAL):
        own = mask
        for side, text in place.items():
            own = own.replace(side, text)
        terms.append(f"({own})")
    return " & ".join(terms)


def window_mask(mask: str, window: int, sinks: int = 0) -> str:
    """The pairs of ``mask`` at most ``window`` apart, and those with one of the first ``sinks`` keys."""
    near = f"(q_idx - k_idx <= {window})"
    if mask != CAUSAL:
        near += f" & (k_idx - q_idx <= {window})"
    if sinks:
        near = f"({near} | (k_idx < {sinks}))"
    return f"({mask}) & {near}" if mask else near


CAUSAL = "k_idx <= q_idx"


def group_states(
    members: Tensor, order: Tensor, *, mask: str, window: int, block_q: int, block_k: int, sinks: int = 0
) -> Tensor:
    """uint8 states (B, 1, NQ, NK) of the tiles of :func:`group_mask` over sorted tokens.

    Empty is exact for a causal or empty ``mask`` and an upper bound for others; full is stated where one common group
    of all tokens of both blocks shows it.
    """
    members = members.gather(1, order[..., None].expand_as(members))
    keys = members & (order >= sinks)[..., None] if sinks else members  # sinks are nobody's distant keys
    q, k = _extent(members, order, block_q), _extent(keys, order, block_k)
    causal = mask == CAUSAL
    visible = full = None
    for group in range(members.shape[-1]):
        (q_low, q_high, q_all), (k_low, k_high, k_all) = (tuple(t[..., group] for t in side[:3]) for side in (q, k))
        some = q_high[..., :, None] - k_low[..., None, :] > window
        if not causal:
            some = some | (k_high[..., None, :] - q_low[..., :, None] > window)
        whole = q_all[..., :, None] & k_all[..., None, :]
        visible = some if visible is None else visible | some
        full = whole if full is None else full | whole
    assert visible is not None and full is not None
    apart = q[3][..., :, None] - k[4][..., None, :] > window
    if not causal:
        apart = apart | (k[3][..., None, :] - q[4][..., :, None] > window)
    states = torch.where(visible, PARTIAL, EMPTY)
    if mask in ("", CAUSAL):
        states = torch.where(full & apart, FULL, states)
    return states.to(torch.uint8)[:, None]


def _extent(members: Tensor, order: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Per block and group the first and last position of its members, whether all are; first and last of all."""
    batch, length, groups = members.shape
    missing = -length % block
    place = order.to(torch.int32)
    low = F.pad(torch.where(members, place[..., None], _FAR), (0, 0, 0, missing), value=_FAR)
    high = F.pad(torch.where(members, place[..., None], -_FAR), (0, 0, 0, missing), value=-_FAR)
    every = F.pad(members.to(torch.uint8), (0, 0, 0, missing), value=1)
    low, high, every = (t.reshape(batch, -1, block, groups) for t in (low, high, every))
    first = F.pad(place, (0, missing), value=_FAR).reshape(batch, -1, block).amin(-1)
    last = F.pad(place, (0, missing), value=-_FAR).reshape(batch, -1, block).amax(-1)
    return low.amin(2), high.amax(2), every.amin(2) > 0, first, last


def take_tokens(x: Tensor, order: Tensor, *, dim: int = 2) -> Tensor:
    """x with its tokens, along ``dim`` (batch first), in ``order`` (B, L); a batch of 1 in x is repeated."""
    shape = [1] * x.dim()
    shape[0], shape[dim] = order.shape
    x = x.expand(order.shape[0], *x.shape[1:])
    return x.gather(dim, order.reshape(shape).expand_as(x))


def ema_update(mean: Tensor, value: Tensor, *, decay: float) -> Tensor:
    """Move ``mean`` in place to ``decay * mean + (1 - decay) * value`` and return it; no gradients."""
    with torch.no_grad():
        return mean.lerp_(value.detach().to(mean.dtype), 1.0 - decay)


SINKHORN = helper("sinkhorn(Tensor scores, *, float temperature, int iterations) -> (Tensor, Tensor)", sinkhorn)
KEPT_GROUPS = helper("kept_groups(Tensor log_g, *, int keep) -> Tensor", kept_groups)
GROUP_ORDER = helper("group_order(Tensor members, *, int keep) -> (Tensor, Tensor, Tensor)", group_order)
GROUP_STATES = helper(
    "group_states(Tensor members, Tensor order, *, str mask, int window, int block_q, int block_k, int sinks=0) "
    "-> Tensor",
    group_states,
)
TAKE_TOKENS = helper("take_tokens(Tensor x, Tensor order, *, int dim=2) -> Tensor", take_tokens)
EMA_UPDATE = helper("ema_update(Tensor(a!) mean, Tensor value, *, float decay) -> Tensor(a!)", ema_update)
