"""Thin keys: a low-rank factor of the key projection is what the cache holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.fx

from ..codegen.cache_format import parse_format
from ..runtime.errors import BadPassOption, CalibrationNeeded
from ._key_factors import KeyStatistics, Spectrum, decompose, each_head, spread
from ._key_observe import observe_site
from ._key_projection import Projection, constant, find_projection, source_linear, users_of, uses
from ._key_rewrite import Fit, balanced, build_absorbed, build_latent, weight_rows, why_no_tables
from .base import Decline, Exactness, NearMiss, Needs, Pass, Rewrite, SiteContext
from .view import arguments, value

Node = torch.fx.Node
WIDEST = 256
"""Channels of a key that attention kernels take."""
STEP = 16
"""Ranks that this pass chooses by itself are multiples of it (of 8 a head), as kernels and codes like them."""
SHARED_GAIN = 0.9
"""Heads share what is absorbed only where that leaves at most this share of the error: their dot products are wider."""


@dataclass(frozen=True)
class Plan:
    """What is to be done at a site. mode: absorb or latent. spectra: one for all heads together, or one each."""

    mode: str
    key: Projection
    query: Projection | None
    value: Projection | None
    joint: Spectrum
    each: tuple[Spectrum, ...]
    element: int
    sensitivity: float
    """What the weighted error is to be multiplied by, to be compared between sites."""

    @property
    def rows(self) -> int:
        return self.joint.heads * self.joint.dim


@dataclass(frozen=True)
class FactorKeys(Pass):
    """Cache a rank-r factor of the keys; values stay whole.

    ::

        W_K ~ U A       A (r, C), U (heads, D, r)
        absorb   k' = A x,   q' = U^T q                     scores q'. k', nothing else changes
        latent   c = A x is cached;  k_j = R_j norm(U c_j + bias)     rebuilt where attention reads it

    Source: "Thin Keys, Full Values", Yao et al. 2026. Absorbing is legal where nothing that depends on the position and
    nothing nonlinear stands between the key projection and the dot product (GPT-2, OPT, BERT, ALiBi), with a cache or
    without. RoPE and QK-norm forbid it; there the latent is cached, which needs ``KVCache``. With softmax a key bias
    adds the same to all scores of a row and is dropped when absorbed; with sigmoid it is kept, as an added score.

    At full rank an absorbed site computes the same function (REASSOCIATED); below, another one. Quality: the report
    tells each site's error, docs/thin_keys.md the measurements on SmolLM2.

    rank: of every site, over all its key heads together (192 for 3 heads of 64 is all of them).
    energy: the least rank that keeps this share of the weighted spectrum, site by site.
    bytes_per_token: key cache of all sites together; ranks go where they save most of the weighted error for a byte.
        Of the three give one; without any, energy is 0.98.
    weighting: what error the factors minimise. ``"none"``: of the weight (truncated SVD); ``"activations"``: of the
        keys of the calibration inputs; ``"scores"``: of q . k there, weighted by attention.
    mode: ``"absorb"`` or ``"latent"`` leaves sites alone where that is not possible; ``"auto"`` absorbs where it may.
    heads: of an absorbed site. ``"each"``: rank / heads channels for each key head. ``"shared"``: all key heads read
        the same ``rank`` channels, which needs ``KVCache`` and costs wider dot products; ``"auto"``: by the error.
    tune: ``tilewright.tune(compiled, data, parameters="qk")`` trains the factors and the query projections.
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    ops: ClassVar[tuple[str, ...]] = ("attention", "cached_attention")
    after: ClassVar[frozenset[str]] = frozenset({"kv-cache", "sigmoid-attention", "two-pass-softmax"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"focus-attention", "routing-transformer"})
    why: ClassVar[dict[str, str]] = {
        "focus-attention": "it sorts tokens by what the whole keys were computed from",
        "routing-transformer": "it sorts tokens by the whole keys",
    }

    rank: int | None = None
    energy: float | None = None
    bytes_per_token: int | None = None
    weighting: Literal["scores", "activations", "none"] = "scores"
    mode: Literal["auto", "absorb", "latent"] = "auto"
    heads: Literal["auto", "each", "shared"] = "auto"

    def __post_init__(self) -> None:
        for name in ("rank", "bytes_per_token"):
            got = getattr(self, name)
            if got is not None and (not isinstance(got, int) or isinstance(got, bool) or got < 1):
                raise BadPassOption(f"factor-keys: {name} is {got!r}, but must be a whole number of at least 1")
        share = self.energy
        if share is not None and (
            not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1 or math.isnan(share)
        ):
            raise BadPassOption(f"factor-keys: energy is {share!r}, but must be above 0 and at most 1")
        given = [name for name in ("rank", "energy", "bytes_per_token") if getattr(self, name) is not None]
        if len(given) > 1:
            raise BadPassOption(f"factor-keys: {' and '.join(given)} each decide the ranks: give one of them")
        for name, choices in (
            ("weighting", ("scores", "activations", "none")),
            ("mode", ("auto", "absorb", "latent")),
            ("heads", ("auto", "each", "shared")),
        ):
            if (got := getattr(self, name)) not in choices:
                raise BadPassOption(f"factor-keys: {name} is {got!r}, but must be one of {', '.join(choices)}")

    def current_needs(self) -> Needs:
        return Needs.NOTHING if self.weighting == "none" else Needs.CALIBRATION

    # ------------------------------------------------------------------------------------------------- calibration

    def watch(self, site: SiteContext) -> Mapping[str, Node]:
        found = self._look(site)
        if isinstance(found, str):
            return {}
        key = found[1]
        watched = {"keys": key.linear}
        if key.rope is not None and self.weighting == "scores":
            rope = arguments(key.rope)
            watched |= {"cos": rope["cos"], "sin": rope["sin"]}
        return watched

    def observe(self, site: SiteContext, values: Mapping[str, Any]) -> None:
        found = self._look(site)
        if isinstance(found, str):
            return
        mode, key = found
        if "statistics" not in site.state:
            site.state["statistics"] = KeyStatistics(*key.rows.shape)
        with torch.no_grad():
            observe_site(
                site.state["statistics"],
                key,
                values,
                scale=site.arg("scale"),
                mask=site.arg("mask"),
                normalizer=site.arg("normalizer"),
                scores=self.weighting == "scores",
                centred=mode == "absorb" and site.arg("normalizer") == "softmax",
            )

    # ------------------------------------------------------------------------------------------------------- which

    def _look(self, site: SiteContext) -> tuple[str, Projection] | str:
        """The mode and the key projection, or why the site is left alone. Decided once."""
        if "looked" not in site.state:
            site.state["looked"] = self._decide(site)
        found: tuple[str, Projection] | str = site.state["looked"]
        return found

    def _decide(self, site: SiteContext) -> tuple[str, Projection] | str:
        cached = site.op == "cached_attention"
        if cached:
            form = parse_format(site.arg("format"))
            if form.latent:
                return "its keys are latents already"
            if form.quantized:
                return "its cache is quantized already: factor keys first"
        key = find_projection(site.arg("k"))
        if isinstance(key, str):
            return f"its keys have no factor that could be taken out: {key}"
        if (reason := _why_not(site, key)) is not None:
            return reason
        if not key.plain:
            what = "RoPE turns the keys by their position" if key.rope is not None else "a norm scales the keys"
            if self.mode == "absorb":
                return (
                    f"{what} after the projection, so that the scores are no product of one factor with the queries: "
                    "absorbing is illegal here; use mode='latent' with KVCache"
                )
            if not cached:
                return f"{what} after the projection, so only the latent can be kept, in a cache: add KVCache"
            if key.rope is not None and (reason := why_no_tables(site, key)) is not None:
                return reason
            return "latent", key
        if self.mode == "latent":
            if not cached:
                return "there is no cache to keep latents in: add KVCache, or use mode='absorb'"
            return "latent", key
        if cached and key.bias is not None and site.arg("normalizer") != "softmax":
            return "its keys have a bias, which sigmoid scores feel, and a cached attention has no place to add it"
        return "absorb", key

    def plan(self, sites: Sequence[SiteContext]) -> None:
        plans = [(site, made) for site in sites if isinstance(made := self._plan(site), Plan)]
        for site, made in plans:
            site.state["plan"] = made
        if self.bytes_per_token is None:
            return
        steps = [self._steps(site, made) for site, made in plans]
        spectra = [
            [made.sensitivity * self._left(site, made, rank) for rank in each]
            for (site, made), each in zip(plans, steps, strict=True)
        ]
        costs = [made.element for _, made in plans]
        for (site, _), each, chosen in zip(
            plans, steps, spread(spectra, costs, steps, self.bytes_per_token), strict=True
        ):
            site.state["rank"] = each[chosen]

    def _plan(self, site: SiteContext) -> Plan | None:
        found = self._look(site)
        if isinstance(found, str):
            return None
        mode, key = found
        heads, dim = key.rows.shape
        if self.weighting == "none":
            rows = weight_rows(site, key).reshape(heads * dim, -1)
            second, weight = rows @ rows.t(), None
        else:
            statistics = site.state.get("statistics")
            if statistics is None or not statistics.tokens:
                raise CalibrationNeeded(
                    "factor-keys saw no activations of this attention: give calibration inputs, or weighting='none'",
                    site=site.site.id,
                    source=site.site.source,
                )
            rows = weight_rows(site, key).reshape(heads * dim, -1)
            second = statistics.shrunk(rows)
            weight = _before_norm(site, key, statistics.weight) if self.weighting == "scores" else None
        query = find_projection(site.arg("q"))
        val = find_projection(site.arg("v"))
        apart = not isinstance(val, str) and val.plain and val.linear is key.linear
        return Plan(
            mode,
            key,
            query if isinstance(query, Projection) and constant(site.view, query.weight) is not None else None,
            val if apart and isinstance(val, Projection) else None,
            decompose(second, weight, heads, dim),
            tuple(each_head(second, weight, heads, dim)) if mode == "absorb" else (),
            value(site.arg("k")).element_size(),
            self._sensitivity(site, second),
        )

    def _sensitivity(self, site: SiteContext, second: torch.Tensor) -> float:
        """Scores: errors are squared changes of softmax's logits, whose mean is comparable. Others: shares."""
        if self.weighting == "scores":
            scale: float = site.arg("scale")
            return scale**2 / site.state["statistics"].tokens
        return 1.0 / max(float(second.trace()), 1e-30)

    # ------------------------------------------------------------------------------------------------------- ranks

    def _shared(self, site: SiteContext, made: Plan, rank: int) -> bool:
        """Whether the heads of an absorbed site share their channels."""
        if made.mode != "absorb" or made.joint.heads == 1 or site.op != "cached_attention" or rank > WIDEST:
            return False
        if self.heads != "auto":
            return self.heads == "shared"
        # As wide as the keys were, a head's own channels are exact and cheaper.
        if rank // made.joint.heads >= made.joint.dim:
            return False
        return made.joint.lost(rank) < SHARED_GAIN * _lost(made.each, rank // made.joint.heads)

    def _left(self, site: SiteContext, made: Plan, rank: int) -> float:
        """The weighted error of a rank."""
        if made.mode == "absorb" and not self._shared(site, made, rank):
            return _lost(made.each, rank // made.joint.heads)
        return made.joint.lost(rank)

    def _steps(self, site: SiteContext, made: Plan) -> list[int]:
        """The ranks that the pass may choose for a site, rising."""
        unit = max(1, min(STEP, made.rows // 4))
        if made.mode == "absorb":
            unit = made.joint.heads * max(1, min(STEP // 2, made.joint.dim // 4))
        last = made.rows if made.mode == "absorb" else made.rows - 1
        return list(range(unit, last + 1, unit)) or [1]

    def _rank(self, site: SiteContext, made: Plan) -> int:
        if self.rank is not None:
            return self.rank
        if self.bytes_per_token is not None:
            return int(site.state["rank"])
        energy = 0.98 if self.energy is None else self.energy
        steps = self._steps(site, made)
        most = (1 - energy) * float(made.joint.values.sum())
        return next((rank for rank in steps if self._left(site, made, rank) <= most), made.rows)

    # ----------------------------------------------------------------------------------------------------- rewrite

    def rewrite(self, site: SiteContext) -> Rewrite | Decline | NearMiss:
        found = self._look(site)
        if isinstance(found, str):
            return Decline(found)
        made: Plan = site.state["plan"]
        rank = self._rank(site, made)
        heads, dim = made.key.rows.shape
        if rank > made.rows:
            return Decline(f"rank {rank} is over its key space of {made.rows} channels ({heads} heads of {dim})")
        if made.mode == "latent" and rank == made.rows:
            return Decline(f"a latent of {rank} channels is as large as the keys: nothing would be saved")
        if made.mode == "absorb" and rank < heads and not self._shared(site, made, rank):
            return Decline(f"rank {rank} leaves no channel for each of its {heads} key heads")
        fit, lost = self._fit(site, made, rank)
        kept = fit.down.shape[0] * fit.down.shape[1]
        total = float(made.joint.values.sum())
        error = math.sqrt(lost / total) if total > 0 else 0.0
        details = {
            "mode": made.mode,
            "rank": kept,
            "of": made.rows,
            "kept_energy": round(1 - error**2, 6),
            "predicted_error": round(error, 6),
            "key_bytes_per_token": kept * made.element,
            "key_bytes_before": made.rows * made.element,
        }
        if made.mode == "latent":
            # Multiply-adds to rebuild one token's keys, once for all queries of a call.
            details["rebuild_macs_per_token"] = kept * made.rows
        else:
            details["heads"] = "shared" if fit.shared else "each"
        full = made.mode == "absorb" and kept >= made.rows and not fit.shared
        if made.mode == "latent":
            return Rewrite(lambda b: build_latent(b, site, made.key, made.query, fit), details)
        return Rewrite(
            lambda b: build_absorbed(b, site, made.key, made.query, made.value, fit),
            details,
            exactness=Exactness.REASSOCIATED if full else None,
        )

    def _fit(self, site: SiteContext, made: Plan, rank: int) -> tuple[Fit, float]:
        """The factors in terms of x, and the weighted error that they leave."""
        weight = weight_rows(site, made.key)  # (Hk, D, C)
        heads, dim, _ = weight.shape
        if made.mode == "latent" or self._shared(site, made, rank):
            down, up = made.joint.factors(rank)
            return balanced((down @ weight.reshape(heads * dim, -1))[None], up), made.joint.lost(rank)
        share = rank // heads
        if share == dim:
            # Nothing is lost: the identity is the factor that rounds nothing.
            eye = torch.eye(dim, dtype=torch.float64)
            return Fit(weight, eye.expand(heads, dim, dim)), 0.0
        pairs = [one.factors(share) for one in made.each]
        down = torch.stack([pair[0] @ rows for pair, rows in zip(pairs, weight, strict=True)])
        return balanced(down, torch.cat([pair[1] for pair in pairs])), _lost(made.each, share)


def _before_norm(site: SiteContext, key: Projection, weight: torch.Tensor) -> torch.Tensor:
    """The weight on errors of keys before a QK-norm multiplies them by its own weight."""
    gain = None if key.norm is None else constant(site.view, arguments(key.norm)["weight"])
    return weight if gain is None else weight * gain.double()[:, None].cpu() * gain.double().cpu()


def _lost(each: Sequence[Spectrum], share: int) -> float:
    return sum(one.lost(share) for one in each)


def _why_not(site: SiteContext, key: Projection) -> str | None:
    """Why this key projection is not to be factored, or None."""
    k, v = site.val("k"), site.val("v")
    if any(isinstance(size, int) and size == 0 for t in (k, v) for size in t.shape):
        return "it has no elements"
    weight = constant(site.view, key.weight)
    if weight is None or (key.bias is not None and constant(site.view, key.bias) is None):
        return "the weight of its key projection is no constant of the graph (the model is captured call by call)"
    if len({*key.rows.flatten().tolist()}) < key.rows.numel():
        return "its key heads are copies of each other"
    if (count := uses(site, key.weight)) > 1:
        return f"its key projection is shared by {count} layers: factors of one would not be those of the others"
    if others := users_of(site, key):
        return f"its keys are used by {others} too"
    source = source_linear(key.x)
    narrow = None if source is None else int(value(source).shape[-1])
    if narrow is not None and narrow < key.rows.numel():
        return f"its keys are projected from a latent of {narrow} channels: they are factored already (MLA)"
    return None
