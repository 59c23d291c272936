"""Keep the KV cache in 8, 4 or 2 bits a number: keys by channel, values by token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx

from ..codegen.cache_format import CacheFormat, is_recent, parse_format
from ..codegen.spec import SpecError
from ..runtime.errors import BadPassOption
from ..runtime.ops import cache_codes, cache_store
from .base import Decline, Exactness, NearMiss, Pass, Rewrite, SiteContext
from .metrics import tensor_error
from .view import arguments

AFTER = frozenset({"kv-cache", "factor-keys"})
WHY = {
    "kv-cache": "what is quantized is the cache, so there has to be one",
    "streaming-cache": "its cache does not grow, so there is little to be saved on it",
    "gear": "each of them says how the cache is kept",
    "quantize-kv": "each of them says how the cache is kept",
}


@dataclass(frozen=True)
class QuantizeKV(Pass):
    """Quantize tokens as they leave the newest ``window``; attention reads codes and multiplies scales back.

    ::

        key[t, c]   = scale[t / group, c] * code[t, c] + offset[t / group, c]           code in 0 .. 2^bits - 1
        value[t, c] = scale[t, c / value_group] * code[t, c] + offset[t, c / value_group]
        offset = least, scale = (greatest - least) / (2^bits - 1)     of the numbers that share them, in float16

    Keys have channels that are large in every token, so each channel of ``group`` tokens has its own scale; values have
    none, so each token has one. A group is quantized when its last token is ``window`` tokens old; until then, and for
    the call's own tokens, keys and values are whole. Source: Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit
    Quantization for KV Cache" (ICML 2024, arXiv:2402.02750), sections 3 and 4. After ``FactorKeys`` it is the latents
    that are quantized, by channel as keys are.

    Quality: see docs/quantized_cache.md for SmolLM2. 8 bits are as good as whole; 4 bits cost a few parts in a thousand
    of perplexity; at 2 bits most models of this size need :class:`GEAR`.

    bits: 8, 4 or 2. bits_k, bits_v: of keys and of values where they differ; 0 keeps them whole.
    group: tokens that share a key's scale, a multiple of 16. A key's share of its scale and offset is 32 / group bits.
    value_group: channels that share a value's scale; 0 for all of a head's.
    window: newest tokens that stay whole, a multiple of 16; window + group of them are kept, whatever the length.
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    ops: ClassVar[tuple[str, ...]] = ("cached_attention",)
    requires: ClassVar[frozenset[str]] = frozenset({"kv-cache"})
    after: ClassVar[frozenset[str]] = AFTER
    conflicts: ClassVar[frozenset[str]] = frozenset({"gear", "streaming-cache"})
    why: ClassVar[dict[str, str]] = WHY

    bits: int = 4
    bits_k: int | None = None
    bits_v: int | None = None
    group: int = 64
    value_group: int = 0
    window: int = 64

    @classmethod
    def cli_name(cls) -> str:
        return "quantize-kv"

    def __post_init__(self) -> None:
        check_bits(self.name, self.bits, self.bits_k, self.bits_v)
        check_numbers(self, ("group", "window"), 16)
        check_numbers(self, ("value_group",), 0)
        checked_format(self.name, self._changes())

    def _changes(self) -> dict[str, Any]:
        return sides(self.bits, self.bits_k, self.bits_v) | {
            "group": self.group,
            "value_group": self.value_group,
            "window": self.window,
        }

    def rewrite(self, site: SiteContext) -> Rewrite | Decline | NearMiss:
        return quantize_site(site, self._changes())


def check_bits(name: str, bits: Any, bits_k: Any, bits_v: Any) -> None:
    """Raise :class:`BadPassOption` unless ``bits`` is 8, 4 or 2, and bits_k and bits_v are, or 0, or None."""
    for option, number, allowed in (
        ("bits", bits, (8, 4, 2)),
        ("bits_k", bits_k, (8, 4, 2, 0, None)),
        ("bits_v", bits_v, (8, 4, 2, 0, None)),
    ):
        if isinstance(number, bool) or number not in allowed:
            hint = "" if option == "bits" else ", or 0 to keep them whole"
            raise BadPassOption(f"{name}: {option} is {number!r}, but must be 8, 4 or 2{hint}")
    if bits_k == 0 and bits_v == 0:
        raise BadPassOption(f"{name} quantizes nothing with bits_k=0 and bits_v=0: leave the pass out")


def check_numbers(one: Pass, options: tuple[str, ...], least: int) -> None:
    for option in options:
        number = getattr(one, option)
        if not isinstance(number, int) or isinstance(number, bool) or number < least:
            raise BadPassOption(f"{one.name}: {option} is {number!r}, but must be a whole number from {least}")


def checked_format(name: str, changes: Mapping[str, Any]) -> CacheFormat:
    """The format of these fields. Raises :class:`BadPassOption` for what no cache can have."""
    try:
        return CacheFormat(**changes)
    except SpecError as error:
        raise BadPassOption(f"{name}: {str(error).removeprefix('cache: ')}") from error


def sides(bits: int, bits_k: int | None, bits_v: int | None) -> dict[str, int]:
    return {"bits_k": bits if bits_k is None else bits_k, "bits_v": bits if bits_v is None else bits_v}


def quantize_site(site: SiteContext, changes: Mapping[str, Any]) -> Rewrite | Decline:
    """Change a ``cached_attention`` node's format; what is kept stays what it is, keys or latents."""
    form = parse_format(site.arg("format"))
    k, v = site.val("k"), site.val("v")
    if form.quantized:
        return Decline("its cache is quantized already")
    if k.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return Decline(f"its keys are {k.dtype}: scales are float16, which would be most of the error")
    sizes = (int(k.shape[1]), int(k.shape[3]), int(v.shape[1]), int(v.shape[3]))
    try:
        quantized = form.changed(**changes)
        before, after = (_bytes(each, sizes, str(k.dtype)) for each in (form, quantized))
    except SpecError as error:
        return Decline(str(error).removeprefix("cache: "))
    details = {
        "keys": f"{quantized.bits_k} bits, {quantized.group} tokens a scale" if quantized.bits_k else "whole",
        "values": f"{quantized.bits_v} bits, {quantized.value_group or sizes[3]} channels a scale"
        if quantized.bits_v
        else "whole",
        "key_bytes_per_token": after["k"],
        "key_bytes_before": before["k"],
        "value_bytes_per_token": after["v"],
        "value_bytes_before": before["v"],
        "constant_bytes": after["recent"],
    }

    def measured(module: torch.fx.GraphModule, values: list[Any]) -> Mapping[str, Any]:
        inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
        found = dict(zip(inputs, values, strict=True))
        call = next(node for node in module.graph.nodes if node.target is site.node.target)
        named = arguments(call)
        return _measure(found.get(named["k"]), found.get(named["v"]), quantized)

    return Rewrite(site.changed(format=quantized.text()), details, measure=measured)


def _bytes(form: CacheFormat, sizes: tuple[int, int, int, int], dtype: str) -> dict[str, float]:
    """Bytes of one sequence: a token's of keys and of values, and what does not grow with the length."""
    dtype = dtype.removeprefix("torch.")
    span = form.page or math.lcm(64, form.group)
    found = {"k": 0.0, "v": 0.0, "recent": 0.0}
    for name, (shape, kind) in form.store(1, span, *sizes, dtype, pages=1).items():
        size = math.prod(shape) * getattr(torch, kind).itemsize
        if is_recent(name):
            found["recent"] += size
        else:
            found[name[0]] += size / span
    return found


def _measure(k: Any, v: Any, form: CacheFormat) -> dict[str, Any]:
    """The relative error of what is kept, over the example's tokens, whatever of it the window would keep whole."""
    found: dict[str, Any] = {}
    for side, x, bits in (("k", k, form.bits_k), ("v", v, form.bits_v)):
        if not bits or not isinstance(x, torch.Tensor) or x.shape[2] == 0:
            continue
        # A shorter example has a shorter group: its error is at most a little smaller.
        tokens = min(form.group, x.shape[2])
        whole = x[:, :, : x.shape[2] // tokens * tokens]
        blocks = whole.unflatten(2, (-1, tokens)).detach()
        parts = cache_store.quantize_side(blocks, side, form)
        after = cache_codes.dequantize(parts, bits, keys=side == "k", dtype=x.dtype)
        found["key_error" if side == "k" else "value_error"] = tensor_error(after, blocks)["rel_l2"]
    return found
