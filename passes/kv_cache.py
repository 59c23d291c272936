"""Insert the KV cache: from a decoder exported without one to a module that serves prefill and decode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx

from ..codegen import mask_logic
from ..codegen.cache_format import CacheFormat
from ..codegen.spec import SpecError
from ..runtime.errors import BadPassOption
from ..runtime.ops import OPS
from .base import Builder, Decline, Exactness, NearMiss, Pass, Rewrite, SiteContext
from .view import arguments, same_size, value

Node = torch.fx.Node
aten = torch.ops.aten
MAX_LENGTH = 2**31 - 1
POSITIONS = "tilewright_max_length"
"""Key of a ``cached_attention`` node's metadata: tokens that its cache may hold."""


@dataclass(frozen=True)
class KVCache(Pass):
    """Keep keys and values of tokens seen, so that a call reads only the new ones.

    ::

        out_t = softmax(scale * q_t . [k_0 .. k_t]) [v_0 .. v_t]     k, v of earlier tokens from the cache

    The technique is as old as Transformer decoding; the layout in pages follows Kwon et al., "Efficient Memory
    Management for Large Language Model Serving with PagedAttention" (SOSP 2023), section 4.

    Every causal self-attention is rewritten, whatever its window; the padding mask becomes the index of each sequence's
    first token. The compiled module takes the calls that the model takes, ``past_key_values`` and ``generate`` among
    them. Quality: the function is the model's own; sums are added in another order.

    max_length: tokens a sequence may have, prompt and padding included; memory for them is taken at the first call.
    page_size: take memory in pages of that many tokens as sequences grow instead; a multiple of 64.
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATED
    ops: ClassVar[tuple[str, ...]] = ("attention",)
    provides: ClassVar[frozenset[str]] = frozenset({"kv-cache"})
    conflicts: ClassVar[frozenset[str]] = frozenset(
        {"lm-infinite", "block-sparse-attention", "focus-attention", "routing-transformer"}
    )
    after: ClassVar[frozenset[str]] = frozenset({"sigmoid-attention", "two-pass-softmax"})
    why: ClassVar[dict[str, str]] = {
        "lm-infinite": "it turns keys by their distance, and a cache holds them turned: StreamingCache does both",
        "block-sparse-attention": "it chooses keys by looking at all queries at once",
        "focus-attention": "it chooses keys by looking at all queries at once",
        "routing-transformer": "it groups all tokens of a sequence, which are not there at once",
    }

    max_length: int = 2048
    page_size: int | None = None

    @classmethod
    def cli_name(cls) -> str:
        return "kv-cache"

    def __post_init__(self) -> None:
        length = self.max_length
        if not isinstance(length, int) or isinstance(length, bool) or not 1 <= length <= MAX_LENGTH:
            raise BadPassOption(f"{self.name}: max_length is {length!r}, but must be a whole number from 1")
        size = self.page_size
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 64 or size % 64):
            raise BadPassOption(f"{self.name}: page_size is {size!r}, but must be a multiple of 64, or None")

    def format(self) -> CacheFormat:
        """How this pass keeps keys and values: whole, in the activations' dtype."""
        try:
            return CacheFormat(page=self.page_size or 0)
        except SpecError as error:
            raise BadPassOption(f"{self.name}: {error}") from error

    def rewrite(self, site: SiteContext) -> Rewrite | Decline | NearMiss:
        named = arguments(site.node)
        if (reason := why_not(named)) is not None:
            return Decline(reason)
        form = self.format()
        k, v = site.val("k"), site.val("v")
        heads = [int(site.val(name).shape[1]) for name in "qkv"]
        width = (heads[1] * int(k.shape[3]) + heads[2] * int(v.shape[3])) * k.element_size()
        details = {
            "mask": named["mask"],
            "heads": " / ".join(map(str, heads)),
            "bytes_per_token": width,
            "cache": f"{self.page_size} tokens a page" if self.page_size else f"{self.max_length} tokens",
        }

        def build(builder: Builder) -> Node:
            node = builder.call(
                OPS["cached_attention"].overload,
                named["q"],
                named["k"],
                named["v"],
                named["bias"],
                [],
                scale=named["scale"],
                mask=named["mask"],
                normalizer=named["normalizer"],
                format=form.text(),
            )
            node.meta[POSITIONS] = self.max_length
            return node

        return Rewrite(build, details)


def why_not(named: dict[str, Any]) -> str | None:
    """Why an ``attention`` node with these arguments cannot go through a cache; None when it can."""
    q, k, v = (value(named[name]) for name in "qkv")
    if not same_size(q.shape[2], k.shape[2]):
        return "its keys are not those of its queries' tokens: it is no self-attention"
    if named["bias"] is not None and value(named["bias"]).dtype is not torch.bool:
        return (
            "numbers are added to its scores (relative positions as in T5, slopes as in ALiBi, or a mask that could "
            "not be put into an equation), which belong to pairs of tokens and are not in a cache of keys and values"
        )
    if not mask_logic.implies(named["mask"], "k_idx <= q_idx"):
        return "it is not causal: tokens also look at later ones, as in an encoder"
    if named.get("shift") is not None:
        return "a tensor is added to its scores for each query"
    if any(not isinstance(size, int) for tensor in (q, k, v) for size in (tensor.shape[1], tensor.shape[3])):
        return "its heads or channels vary from call to call"
    if not v.shape[1] or v.shape[1] % k.shape[1] or q.shape[1] % v.shape[1]:
        return f"{k.shape[1]} key heads, {v.shape[1]} value heads and {q.shape[1]} query heads do not divide each other"
    if named["bias"] is not None:
        return _why_not_padding(named["bias"])
    return None


def _why_not_padding(bias: Node) -> str | None:
    """A bias may say which keys are padding, as ``attention_mask`` (B, L) does: bool (B, 1, 1, L), true where shown."""
    shape = value(bias).shape
    if len(shape) != 4 or not (same_size(shape[1], 1) and same_size(shape[2], 1)):
        return f"its mask of shape {tuple(shape)} is no padding mask of the keys and could not be put into an equation"
    node = bias
    compared = False
    while node.op != "placeholder":
        if node.op != "call_function":
            return f"its padding mask comes from {node}, not from an input"
        compared |= node.target in _NOT_ZERO
        if node.target not in _NOT_ZERO and node.target not in _SHAPES and node.target not in _CASTS:
            return f"its padding mask is computed by {node.target}, and only attention_mask != 0 can be kept"
        if node.target in _NOT_ZERO and node.args[1] != _NOT_ZERO[node.target]:
            return f"its padding mask is computed by {node.target} with {node.args[1]}"
        before = node.args[0]
        assert isinstance(before, Node)
        node = before
    if not compared and value(node).dtype is not torch.bool:
        return "its padding mask is not compared with zero"
    return None


_NOT_ZERO: dict[Any, int] = {aten.ne.Scalar: 0, aten.gt.Scalar: 0, aten.eq.Scalar: 1, aten.ge.Scalar: 1}
_SHAPES = {aten.slice.Tensor, aten.unsqueeze.default, aten.view.default, aten.expand.default, aten.alias.default}
_CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default}
