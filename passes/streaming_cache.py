"""StreamingCache: decode text of any length with a cache of fixed size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx

from ..codegen.cached_attention import window_of
from ..codegen.spec import SpecError
from ..codegen.symbols import MAX_LITERAL
from ..runtime.errors import BadPassOption
from ..runtime.ops import OPS
from ..runtime.ops.streaming_attention import layout
from ._rotary import Rotary, angle_rows, find_rotary
from .base import Builder, Decline, Exactness, NearMiss, Pass, Rewrite, SiteContext
from .kv_cache import why_not
from .view import arguments, peel, value

Node = torch.fx.Node


@dataclass(frozen=True)
class StreamingCache(Pass):
    """Keep the first ``sinks`` tokens and the last ``window`` ones, and none further away than ``limit``.

    ::

        q at position p, k at position j <= p:   visible if p - j < window or j < sinks
        score = q . R(min(p - j, limit)) k       R: the rotation of the rotary embedding by a distance

    Sources: Xiao et al., "Efficient Streaming Language Models with Attention Sinks" (ICLR 2024, arXiv:2309.17453),
    section 3, for the cache; Han et al., "LM-Infinite: Zero-Shot Extreme Length Generalization for Large Language
    Models" (NAACL 2024, arXiv:2308.16137), section 4, for the positions: tokens of the window stand at their true
    distances, and the first ones no further than ``limit``. The pass ``LMInfinite`` is the same function without a
    cache. Models that rotate nothing (GPT-2, OPT) get the window and the first tokens, and end where their table of
    positions does.

    The first tokens are those behind the padding of each sequence. A site whose own window is no wider than ``window``
    keeps it and nothing else, which is exact there; a wider one is narrowed, and gets the first tokens.

    Quality: within the window it is the model as it was; beyond, distant tokens are forgotten, and text longer than the
    model was trained on stays readable. Memory and the time of a step do not depend on how much was said before.

    window: keys, the query's own among them. sinks: first tokens, at least 0. limit: in tokens, at least the window,
        which it is by default; the length that the model was trained on is the most that makes sense.
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    ops: ClassVar[tuple[str, ...]] = ("attention",)
    provides: ClassVar[frozenset[str]] = frozenset({"kv-cache"})
    conflicts: ClassVar[frozenset[str]] = frozenset(
        {"kv-cache", "factor-keys", "quantize-kv", "lm-infinite", "block-sparse-attention", "focus-attention"}
        | {"routing-transformer"}
    )
    after: ClassVar[frozenset[str]] = frozenset({"two-pass-softmax"})
    why: ClassVar[dict[str, str]] = {
        "kv-cache": "a model has one cache: this one keeps some tokens, the other all of them",
        "factor-keys": "this cache does not grow, so there is little to be saved on its keys",
        "quantize-kv": "this cache does not grow, so there is little to be saved on it",
        "lm-infinite": "it is the same function without a cache",
        "block-sparse-attention": "it chooses keys by looking at all queries at once",
        "focus-attention": "it chooses keys by looking at all queries at once",
        "routing-transformer": "it groups all tokens of a sequence, which are not there at once",
    }

    window: int = 2048
    sinks: int = 16
    limit: int | None = None

    def __post_init__(self) -> None:
        least = {"window": 1, "sinks": 0, "limit": 1}
        for option, lowest in least.items():
            number = getattr(self, option)
            if number is None and option == "limit":
                continue
            if not isinstance(number, int) or isinstance(number, bool) or not lowest <= number <= MAX_LITERAL:
                raise BadPassOption(f"{self.name}: {option} is {number!r}, but must be a whole number from {lowest}")
        if self.reach < self.window:
            raise BadPassOption(
                f"{self.name}: limit is {self.limit}, but must be at least the window, {self.window}: tokens of the "
                "window stand at their true distances"
            )

    @property
    def reach(self) -> int:
        """The limit on distance, given or not."""
        return self.window if self.limit is None else self.limit

    def rewrite(self, site: SiteContext) -> Rewrite | Decline | NearMiss:
        named = arguments(site.node)
        if reason := why_not(named):
            return Decline(reason)
        if named["normalizer"] != "softmax":
            return Decline(f"its normalizer is {named['normalizer']}, and its parts cannot be joined by a log-sum-exp")
        try:
            own, first = window_of(named["mask"])
        except SpecError:
            return Decline(f"its mask is neither causal nor a sliding window: {named['mask']}")
        if own and (first or own <= self.window):
            if first:
                return Decline(f"it has a window of {own} tokens and the first {first} of its own")
            return Rewrite(
                lambda builder: self._build(builder, named, own, 0, None),
                {"window": own, "sinks": 0, "form": "its own window", "bytes": _bytes(named, own, 0, False)},
                exactness=Exactness.REASSOCIATED,
            )
        turned = _rotations(site, self.reach) if self.sinks else None
        if isinstance(turned, str):
            return Decline(turned)
        details = {
            "window": self.window,
            "sinks": self.sinks,
            "limit": self.reach if turned else "none: nothing is rotated" if self.sinks else "none: no first tokens",
            "form": f"narrowed from its own window of {own}" if own else "window and first tokens",
            "bytes": _bytes(named, self.window, self.sinks, turned is not None),
        }
        return Rewrite(lambda builder: self._build(builder, named, self.window, self.sinks, turned), details)

    def _build(
        self, builder: Builder, named: dict[str, Any], window: int, sinks: int, turned: _Rotations | None
    ) -> Node:
        far = (None, None) if turned is None else turned.build(builder)
        return builder.call(
            OPS["streaming_attention"].overload,
            named["q"],
            named["k"],
            named["v"],
            named["bias"],
            *far,
            scale=named["scale"],
            window=window,
            sinks=sinks,
            limit=max(window, self.reach),
        )


@dataclass(frozen=True)
class _Rotations:
    """How queries and keys are rotated, and cos and sin at distance ``limit`` and at 0."""

    q: Rotary
    k: Rotary
    limit: tuple[torch.Tensor, torch.Tensor]
    zero: tuple[torch.Tensor, torch.Tensor]

    def build(self, builder: Builder) -> tuple[Node, Node]:
        """All queries as at distance ``limit``, and all keys as at 0."""
        at = [builder.constant(f"{name}_far", row) for name, row in zip(("cos", "sin"), self.limit, strict=True)]
        start = [builder.constant(f"{name}_start", row) for name, row in zip(("cos", "sin"), self.zero, strict=True)]
        return self.q.again(builder, *at), self.k.again(builder, *start)


def _rotations(site: SiteContext, limit: int) -> _Rotations | str | None:
    """None where nothing is rotated; the reason where the angles cannot be known."""
    q, k = find_rotary(site.arg("q"), "queries"), find_rotary(site.arg("k"), "keys")
    for found in (q, k):
        if isinstance(found, str):
            return found
    if not isinstance(q, Rotary) or not isinstance(k, Rotary):
        return None if q is k else "only one of its queries and keys is rotated"
    if any(peel(q.named[name]) is not peel(k.named[name]) for name in ("cos", "sin")):
        return "its queries and keys are rotated by different angles"
    if q.named["layout"] != k.named["layout"]:
        return "its queries and keys pair their channels differently"
    rows = angle_rows(site.view.module, k, (limit, 0))
    if isinstance(rows, str):
        return rows
    cos_far, cos_start, sin_far, sin_start = rows
    return _Rotations(q, k, (cos_far, sin_far), (cos_start, sin_start))


def _bytes(named: dict[str, Any], window: int, sinks: int, far: bool) -> int:
    """Of the cache of one sequence, however long it is."""
    k, v = value(named["k"]), value(named["v"])
    store = layout(1, k.shape[1], k.shape[3], v.shape[3], "", window=window, sinks=sinks, far=far)
    return sum(torch.Size(shape).numel() for shape, _ in store.values()) * k.element_size()
