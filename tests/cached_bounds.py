"""Cached attention in float64 on what a store holds, with a bound, element by element, for the Triton kernels.

Errors of rounding are many and independent here, so they add up as roots of sums of squares; worst cases are a hundred
times what happens, and would let a wrong kernel pass. With u the unit roundoff of the dtype, u32 = 2^-24, D channels:

    a score     FACTOR (u + u32 sqrt(D + r)) of the norm of its terms q_d s_d: s_d is |k_d|; with a quantized key's
                range more, because code and offset reach beyond it; for a latent of r channels the norm of the
                products that it is made of
    out         FACTOR times the norm of w_j e_j v_j over the keys, e_j the errors of scores; 4u of w_j v_j
                likewise, of the token's range where values are quantized; and for what goes one way (Triton's
                interpreter truncates to bfloat16) 4u of |out| and 2u of |w_j z_j v_j|
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from attention_bounds import DTYPES, U32, UNIT
from torch import Tensor

from tilewright.codegen.cache_format import CacheFormat, is_recent
from tilewright.codegen.cached_attention import CachedAttentionSpec
from tilewright.runtime.ops import cache_store

SCALE = 0.3
FACTOR = 2


@dataclass(frozen=True)
class Site:
    """A call: numbers of heads, queries, tokens held before it and padding of each sequence, capacity."""

    form: CacheFormat = field(default_factory=CacheFormat)
    dtype: str = "float32"
    dims: tuple[int, int, int] = (16, 16, 16)  # of queries, of what is kept for keys, of values
    heads: tuple[int, int, int] = (4, 2, 2)  # of queries, of (rebuilt) keys, of values
    queries: int = 2
    held: tuple[int, ...] = (37, 20)
    first: tuple[int, ...] = (0, 3)
    capacity: int = 64
    left: int = 0
    sinks: int = 0
    normalizer: str = "softmax"
    block_n: int = 16

    @property
    def spec(self) -> CachedAttentionSpec:
        return CachedAttentionSpec(
            dtype=self.dtype,
            head_dim=self.dims[0],
            key_dim=self.dims[1],
            value_dim=self.dims[2],
            format=self.form.text(),
            normalizer=self.normalizer,
            left=self.left,
            sinks=self.sinks,
            block_n=self.block_n,
        )


@dataclass
class Call:
    """The tensors of a call whose tokens were appended already by the reference."""

    q: Tensor
    rebuild: list[Tensor]
    store: dict[str, Tensor]
    length: Tensor
    first: Tensor
    pages: Tensor | None

    def arguments(self) -> tuple:
        return self.q, self.rebuild, list(self.store.values()), self.length, self.first, self.pages, SCALE


def empty_store(site: Site, pages: int) -> dict[str, Tensor]:
    """A store of NaN, so that reading what was never written shows."""
    key_heads = 1 if site.form.latent else site.heads[1]
    shapes = site.form.store(
        len(site.held), site.capacity, key_heads, site.dims[1], site.heads[2], site.dims[2], site.dtype, pages
    )
    made = {name: torch.zeros(shape, dtype=getattr(torch, kind)) for name, (shape, kind) in shapes.items()}
    return {n: t.fill_(torch.nan) if t.is_floating_point() else t for n, t in made.items()}


def page_table(site: Site, generator: torch.Generator) -> tuple[Tensor | None, int]:
    """Pages of all sequences in disorder, two of them of nobody; and how many."""
    if not site.form.page:
        return None, 0
    each = site.capacity // site.form.page
    count = each * len(site.held) + 2
    order = torch.randperm(count, generator=generator)[: each * len(site.held)]
    return order.view(len(site.held), each).to(torch.int32), count


def make_call(site: Site, seed: int = 0) -> Call:
    """Random tokens, appended by the reference: to every sequence what it held, then the call's own."""
    generator = torch.Generator().manual_seed(seed)
    dtype, form, batch = DTYPES[site.dtype], site.form, len(site.held)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    pages, count = page_table(site, generator)
    store = empty_store(site, count)
    q = normal(batch, site.queries, site.heads[0], site.dims[0]).transpose(1, 2)
    for b, held in enumerate(site.held):
        own = {n: t if form.page and not is_recent(n) else t[b : b + 1] for n, t in store.items()}
        table = None if pages is None else pages[b : b + 1]
        for start, tokens in ((0, held), (held, site.queries)):
            key_heads = 1 if form.latent else site.heads[1]
            k, v = (normal(1, h, tokens, d) for h, d in ((key_heads, site.dims[1]), (site.heads[2], site.dims[2])))
            # A channel far off zero, as keys have: its codes have an offset much larger than their range.
            k[..., 0] += 4.0
            cache_store.append(k, v, own, torch.tensor([start], dtype=torch.int32), table, form)
    rebuild = []
    if form.latent:
        rebuild.append(normal(site.heads[1], site.dims[0], site.dims[1]) / site.dims[1] ** 0.5)
        rebuild += [normal(site.heads[1], site.dims[0])] if form.key_bias else []
        rebuild += [normal(site.dims[0]).abs() + 0.5] if form.norm else []
        if form.rotate:
            half = form.rotary // 2
            angles = torch.arange(site.capacity)[:, None] * 100.0 ** (-torch.arange(half) / half)
            rebuild += [1.1 * angles.cos(), 1.1 * angles.sin()]  # scaled, as YaRN does
    length, first = (torch.tensor(numbers, dtype=torch.int32) for numbers in (site.held, site.first))
    return Call(q, rebuild, store, length, first, pages)


def visible(site: Site, tokens: int) -> Tensor:
    """Which of the first ``tokens`` tokens a query sees: bool (B, 1, L, tokens)."""
    k = torch.arange(tokens)
    q = torch.tensor(site.held)[:, None, None] + torch.arange(site.queries)[:, None]
    seen = (k <= q) & (k >= torch.tensor(site.first)[:, None, None])
    if site.left:
        seen = seen & ((k > q - site.left) | (k < site.sinks))
    return seen[:, None]


def expected(site: Site, call: Call) -> tuple[Tensor, Tensor]:
    """out (B, Hq, L, Dv) in float64, and how far a kernel may be from it."""
    form, unit, dim = site.form, UNIT[DTYPES[site.dtype]], site.dims[0]
    store = {n: t.double() if t.dtype == DTYPES[site.dtype] else t for n, t in call.store.items()}
    kept, values = cache_store.read(store, call.length + site.queries, call.pages, form)
    kept, values = kept.double().nan_to_num(), values.double().nan_to_num()
    rebuild = [tensor.double() for tensor in call.rebuild]
    tokens = kept.shape[2]
    seen = visible(site, tokens)
    positions = torch.arange(tokens) - call.first[:, None]
    keys = cache_store.rebuild_keys(kept, rebuild, positions, form)
    size = (
        _latent_sizes(kept, keys, rebuild, form)
        if form.latent
        else keys.abs() + (_range(keys, 2) if form.bits_k else 0.0)
    )
    reach = values.abs() + (_range(values, 3) if form.bits_v else 0.0)
    keys, size, values, reach = (
        t.repeat_interleave(site.heads[0] // t.shape[1], 1) for t in (keys, size, values, reach)
    )
    q = SCALE * call.q.double()
    scores = q @ keys.mT
    off = FACTOR * (unit + U32 * (dim + site.dims[1]) ** 0.5) * (q**2 @ (size**2).mT).sqrt()
    if site.normalizer == "softmax":
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
        off = off + (weights * off).pow(2).sum(-1, keepdim=True).sqrt()
    else:
        weights = scores.sigmoid() * seen
    out, squares = weights @ values, values**2
    apart = ((weights * (off + tokens**0.5 * U32)) ** 2 @ squares).sqrt() + 4 * unit * (weights**2 @ reach**2).sqrt()
    together = 4 * unit * out.abs() + 2 * unit * ((weights * scores.abs()) @ values.abs())
    tiny = 2.0**-24 * tokens**0.5 if site.dtype == "float16" else 0.0
    return out, FACTOR * apart + together + tiny


def _range(x: Tensor, dim: int) -> Tensor:
    return x.amax(dim, keepdim=True) - x.amin(dim, keepdim=True)


def _latent_sizes(kept: Tensor, keys: Tensor, rebuild: list[Tensor], form: CacheFormat) -> Tensor:
    """By how much, over FACTOR u, rounding moves a rebuilt key: (B, Hk, T, D)."""
    parts = dict(zip(form.rebuild_names(), rebuild, strict=True))
    size = torch.einsum("bolr,hdr->bhld", kept**2, parts["up"] ** 2).sqrt()
    if form.norm:
        exact = torch.einsum("bolr,hdr->bhld", kept, parts["up"])
        exact = exact + parts["key_bias"][:, None] if form.key_bias else exact
        # All channels are divided by what the errors of all have moved.
        mean = exact.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-9)
        size = (size + exact.abs() * size.pow(2).mean(-1, keepdim=True).sqrt() / mean) / mean * parts["norm_weight"]
    if form.rotate:
        half, turned = form.rotary // 2, size[..., : form.rotary]
        pair = turned.unflatten(-1, (2, half) if form.rotate == "rotate_half" else (half, 2))
        both = 1.1 * pair.sum(-2 if form.rotate == "rotate_half" else -1)
        both = torch.cat((both, both), -1) if form.rotate == "rotate_half" else both.repeat_interleave(2, -1)
        size = torch.cat((both, size[..., form.rotary :]), -1)
    return size + keys.abs()
