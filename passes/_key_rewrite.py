"""Building what FactorKeys puts in the place of an attention: the factors as parameters, the tables of angles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch import Tensor

from ..codegen.cache_format import CacheFormat, parse_format
from ..runtime.ops import OPS
from ._key_projection import Projection, constant
from ._rotary import evaluate
from .base import Builder, SiteContext
from .kv_cache import POSITIONS
from .view import arguments, value

Node = torch.fx.Node
aten = torch.ops.aten
LINEAR = OPS["linear"].overload
GROUP = "qk"
"""What ``tilewright.tune(..., parameters=)`` calls the factors and the query projections."""


@dataclass(frozen=True)
class Fit:
    """Factors of one site. down (S, r, C): from x to what is cached of each of S heads; up (Hk, D, r), float64.

    With S = 1 < Hk all key heads share what is cached.
    """

    down: Tensor
    up: Tensor

    @property
    def shared(self) -> bool:
        return self.down.shape[0] < self.up.shape[0]


def balanced(down: Tensor, up: Tensor) -> Fit:
    """The same product with both factors of one size, channel by channel: one learning rate then suits both."""
    if len(down) == len(up):
        sizes = down.norm(dim=2), up.norm(dim=1)  # (heads, r) each
        scale = (sizes[0].clamp_min(1e-30) / sizes[1].clamp_min(1e-30)).sqrt()
        return Fit(down / scale[:, :, None], up * scale[:, None, :])
    sizes = down[0].norm(dim=1), up.flatten(0, 1).norm(dim=0)  # (r,)
    scale = (sizes[0].clamp_min(1e-30) / sizes[1].clamp_min(1e-30)).sqrt()
    return Fit(down / scale[:, None], up * scale)


def build_latent(builder: Builder, site: SiteContext, key: Projection, query: Projection | None, fit: Fit) -> Node:
    """Latents are cached; ``rebuild`` and ``format`` say how keys come back. The angles' tables are shared by sites."""
    named = arguments(site.node)
    name = site.site.id
    dtype = value(named["k"]).dtype
    up = builder.parameter(f"{name}_key_up", fit.up.to(dtype), group=GROUP)
    rebuild = [up]
    bias = projected(site, key, "bias")
    changes: dict[str, Any] = {"latent": True}
    if bias is not None:
        rebuild.append(builder.parameter(f"{name}_key_bias", bias.to(dtype), group=GROUP))
        changes["key_bias"] = True
    if key.norm is not None:
        norm = arguments(key.norm)
        weight = norm["weight"]
        if weight is None:
            weight = builder.constant(f"{name}_norm_weight", torch.ones(fit.up.shape[1], dtype=dtype))
        rebuild.append(weight)
        changes |= {"norm": True, "norm_eps": norm["eps"], "round_before_weight": norm["round_before_weight"]}
    if key.rope is not None:
        rebuild += tables(builder, site, key)
        changes |= {"rotate": arguments(key.rope)["layout"], "rotary": key.rotary}
    latent = heads_of(builder, site, key.x, fit.down, f"{name}_key_down", None)
    q = named["q"] if query is None else query.replay(builder, _query_linear(builder, site, query))
    form: CacheFormat = parse_format(named["format"]).changed(**changes)
    return builder.call(site.node.target, **(named | {"q": q, "k": latent, "rebuild": rebuild, "format": form.text()}))


def build_absorbed(
    builder: Builder, site: SiteContext, key: Projection, query: Projection | None, val: Projection | None, fit: Fit
) -> Node:
    """Thin keys, and queries that carry the other factor. With softmax the key bias is a constant of each row."""
    named = dict(arguments(site.node))
    name = site.site.id
    bias = projected(site, key, "bias")
    q, k = _thin_queries(builder, site, query, fit), heads_of(builder, site, key.x, fit.down, f"{name}_key_down", None)
    if named["normalizer"] != "softmax" and bias is not None:
        bias = bias.repeat_interleave(value(named["q"]).shape[1] // bias.shape[0], 0)
        row = builder.constant(f"{name}_key_bias", bias[:, :, None].to(value(named["q"]).dtype))
        constant_part = builder.call(aten.matmul.default, named["q"], row)  # (B, Hq, L, 1)
        scaled = builder.call(aten.mul.Tensor, constant_part, float(named["scale"]))
        shift = named["shift"]
        named["shift"] = scaled if shift is None else builder.call(aten.add.Tensor, shift, scaled)
    named |= {"q": q, "k": k}
    if val is not None:
        named["v"] = heads_of(
            builder, site, val.x, _rows(site, val), f"{name}_value", projected(site, val, "bias"), tuned=False
        )
    return builder.call(site.node.target, **named)


def _thin_queries(builder: Builder, site: SiteContext, query: Projection | None, fit: Fit) -> Node:
    """(B, Hq, L, r): U^T q, in one product with the query projection where that can be."""
    q = arguments(site.node)["q"]
    heads = value(q).shape[1]
    up = fit.up.repeat_interleave(heads // fit.up.shape[0], 0)  # (Hq, D, r)
    name = f"{site.site.id}_query"
    if query is None or not query.plain:
        node = builder.parameter(name, up.to(value(q).dtype), group=GROUP)
        return builder.call(aten.matmul.default, q, node)
    weight = torch.einsum("hdr,hdc->hrc", up, _rows(site, query))
    bias = projected(site, query, "bias")
    folded = None if bias is None else torch.einsum("hdr,hd->hr", up, bias.double())
    return heads_of(builder, site, query.x, weight, name, folded)


def heads_of(
    builder: Builder,
    site: SiteContext,
    x: Node,
    weight: Tensor,
    name: str,
    bias: Tensor | None,
    *,
    tuned: bool = True,
) -> Node:
    """x (B, L, C) or (B L, C) times weight (H, r, C): (B, H, L, r)."""
    dtype = value(x).dtype
    flat = weight.flatten(0, 1).to(dtype)
    vector = None if bias is None else bias.flatten().to(dtype)

    def held(suffix: str, tensor: Tensor) -> Node:
        if tuned:
            return builder.parameter(name + suffix, tensor, group=GROUP)
        return builder.constant(name + suffix, tensor)

    both = held("", flat), None if vector is None else held("_bias", vector)
    if value(x).dim() == 2:
        q = arguments(site.node)["q"]
        sizes = [_size(builder, q, 0), _size(builder, q, 2), flat.shape[1]]
        x = builder.call(aten.view.default, x, sizes)
    found = builder.call(LINEAR, x, *both)
    found = builder.call(aten.unflatten.int, found, -1, list(weight.shape[:2]))
    return builder.call(aten.transpose.int, found, 1, 2)


def _size(builder: Builder, tensor: Node, dim: int) -> Any:
    size = value(tensor).shape[dim]
    return size if isinstance(size, int) else builder.call(aten.sym_size.int, tensor, dim)


def _query_linear(builder: Builder, site: SiteContext, query: Projection) -> Node:
    """The query projection on a copy of its weight that tuning may change."""
    named = arguments(query.linear)
    weight = constant(site.view, query.weight)
    assert weight is not None
    node = builder.parameter(f"{site.site.id}_query", weight, group=GROUP)
    return builder.call(LINEAR, named["x"], node, named["bias"])


def _rows(site: SiteContext, projection: Projection) -> Tensor:
    """The projection's weight by head, (H, D, C) float64."""
    weight = constant(site.view, projection.weight)
    assert weight is not None
    return weight[projection.rows.to(weight.device)].double()


def projected(site: SiteContext, projection: Projection, what: str) -> Tensor | None:
    """The projection's bias by head, (H, D), or None."""
    node = getattr(projection, what)
    found = constant(site.view, node)
    return None if found is None else found[projection.rows.to(found.device)]


def weight_rows(site: SiteContext, projection: Projection) -> Tensor:
    return _rows(site, projection)


# ------------------------------------------------------------------------------------------------------ angles' tables

_TABLES = "tilewright_angles"


def why_no_tables(site: SiteContext, key: Projection) -> str | None:
    """The reason that the key's angles are not a function of each token's position alone, or None."""
    assert key.rope is not None
    for which in ("cos", "sin"):
        node = arguments(key.rope)[which]
        near = evaluate(site.view.module, node, [0, 1, 2, 5])
        if isinstance(near, str):
            return near
        far = evaluate(site.view.module, node, [5, 2, 1, 0, _DISTANT])
        if isinstance(far, str):
            return far
        rows, other = near.reshape(-1, near.shape[-1]), far.reshape(-1, far.shape[-1])
        if len(rows) != 4 or len(other) != 5:
            return "the angles that its keys are turned by differ between heads"
        if not torch.equal(rows, other[:4].flip(0)):
            return "its angles depend on the length of the text, not on each position alone"
        if not all(torch.equal(*halves) for halves in (_halves(rows, key),)):
            return "the two channels of a pair are turned by different angles"
    return None


_DISTANT = 10_000_000


def _halves(rows: Tensor, key: Projection) -> tuple[Tensor, Tensor]:
    assert key.rope is not None
    if arguments(key.rope)["layout"] == "interleaved":
        return rows[:, ::2], rows[:, 1::2]
    first, second = rows.chunk(2, dim=-1)
    return first, second


def tables(builder: Builder, site: SiteContext, key: Projection) -> list[Node]:
    """Nodes of cos and sin (positions, rotary / 2), float32, for as many positions as the cache holds tokens."""
    assert key.rope is not None
    positions = site.node.meta.get(POSITIONS) or _longest(site)
    found = []
    for which in ("cos", "sin"):
        angles = arguments(key.rope)[which]
        place = (angles.name, positions, arguments(key.rope)["layout"])
        earlier = next((n for n in builder.view.graph.nodes if n.meta.get(_TABLES) == place), None)
        if earlier is None:
            rows = evaluate(site.view.module, angles, range(positions))
            assert isinstance(rows, Tensor)
            half = _halves(rows.reshape(-1, rows.shape[-1]), key)[0].float().contiguous()
            earlier = builder.constant(f"key_{which}", half)
            earlier.meta[_TABLES] = place
        found.append(earlier)
    return found


def _longest(site: SiteContext) -> int:
    """Positions where no pass said how many a cache holds: those of the example inputs."""
    size = site.val("k").shape[2]
    return int(size) if isinstance(size, int) else int(size.node.hint)
