"""What a KV cache holds: the encoding of keys and values as one small value, and the tensors that it takes.

A site's cache is a list of tensors, its *store*. B sequences, S tokens of capacity, Hs heads of Ds channels of what is
kept for the keys (the keys, or one latent shared by all heads), Hv heads of Dv channels of values, R = window + group:

    whole         k         (B, Hs, S, Ds)              the activations' dtype
    quantized     k_codes   (B, Hs, S, Ds * bits / 8)   uint8; byte i of n holds channel i in its low bits, then
                                                        i + n, i + 2n ..
                  k_scale, k_offset (B, Hs, S / group, Ds)  float16: key = scale * code + offset, per channel and group
                  k_recent  (B, Hs, R, Ds)              token j that is still whole lies at slot j % R
      correction  k_left    (B, Hs, S, rank), k_right (B, Hs, S / group, Ds, rank), float16: block += left right^T
      outliers    k_outlier (B, Hs, S / group, n) float16, added at k_place, int16: token in block * Ds + channel

and the same for values, whose scale and offset are (B, Hv, S, Dv / value_group): per token and group of channels. With
pages, tensors with S are (N, H, page, ...), and a table (B, S / page) says which page a token lies in; the recent
tokens have no pages. Keys per channel and values per token: "KIVI: A Tuning-Free Asymmetric 2bit Quantization for
KV Cache", Liu et al. 2024, section 3; correction and outliers: "GEAR", Kang et al. 2024, section 3.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .spec import SpecError

BITS = (0, 2, 4, 8)
INSET = {8: 0.0, 4: 0.0, 2: 0.0625}
"""By which share of its range a vector's least and greatest move inwards before the codes are spread between them: four
levels serve the many numbers near the middle better than the two at the ends, which are clamped."""
ROTATIONS = ("", "rotate_half", "interleaved")

Tensor = tuple[tuple[int, ...], str]
"""A tensor's shape and the name of its dtype."""


@dataclass(frozen=True)
class CacheFormat:
    """How one site's keys and values are kept.

    bits_k, bits_v: 0 for whole ones in the activations' dtype, else the bits of a code.
    group: tokens that share a key's scale; also the block of GEAR's correction. value_group: channels that share a
    value's scale, 0 for all of a head's. window: newest tokens that stay whole. correction: rank; outliers: entries a
    block and head. page: tokens a page, 0 for none.
    latent: what is kept for the keys is c (one head), and the keys are rope(norm(U c + bias)).
    rotate, rotary: rope's layout, and how many of a key's channels it turns. key_bias, norm: what stands between.
    """

    bits_k: int = 0
    bits_v: int = 0
    group: int = 64
    value_group: int = 0
    window: int = 64
    correction: int = 0
    outliers: int = 0
    page: int = 0
    latent: bool = False
    rotate: str = ""
    rotary: int = 0
    key_bias: bool = False
    norm: bool = False
    norm_eps: float = 1e-6
    round_before_weight: bool = False

    def __post_init__(self) -> None:
        if self.bits_k not in BITS or self.bits_v not in BITS:
            raise SpecError(f"cache: bits must be 8, 4 or 2 (0: whole), not {self.bits_k} and {self.bits_v}")
        if self.group < 16 or self.group % 16:
            raise SpecError(f"cache: group is {self.group} tokens, but must be a multiple of 16")
        if self.window < 16 or self.window % 16:
            raise SpecError(f"cache: window is {self.window} tokens, but must be a multiple of 16, at least 16")
        if min(self.value_group, self.correction, self.outliers, self.page, self.rotary) < 0:
            raise SpecError("cache: sizes cannot be negative")
        if self.page % 64 or self.page % self.group:
            raise SpecError(
                f"cache: page is {self.page} tokens, but must be a multiple of 64 and of group ({self.group})"
            )
        if self.rotate not in ROTATIONS or bool(self.rotate) != bool(self.rotary):
            raise SpecError(f"cache: rotate is {self.rotate!r} with {self.rotary} channels")
        if (self.rotate or self.key_bias or self.norm) and not self.latent:
            raise SpecError("cache: only latent keys are rebuilt")
        if (self.correction or self.outliers) and not self.quantized:
            raise SpecError("cache: a correction without quantization corrects nothing")

    @property
    def quantized(self) -> bool:
        return bool(self.bits_k or self.bits_v)

    @property
    def ring(self) -> int:
        """Slots for tokens that are still whole."""
        return self.window + self.group

    def quantized_tokens(self, tokens: int) -> int:
        """How many of the oldest of ``tokens`` are quantized."""
        return max(0, tokens - self.window) // self.group * self.group

    def text(self) -> str:
        """Canonical: fields at their defaults are left out; ``""`` for a plain cache."""
        changed = {f.name: value for f in dataclasses.fields(self) if (value := getattr(self, f.name)) != f.default}
        return json.dumps(changed, sort_keys=True) if changed else ""

    def changed(self, **changes: object) -> CacheFormat:
        """A copy with some fields changed. Raises :class:`SpecError` like the class."""
        return parse_format(json.dumps({**dataclasses.asdict(self), **changes}))

    def store(
        self,
        batch: int,
        capacity: int,
        key_heads: int,
        key_dim: int,
        value_heads: int,
        value_dim: int,
        dtype: str,
        pages: int = 0,
    ) -> dict[str, Tensor]:
        """The store's tensors in order: name -> (shape, dtype's name).

        capacity: tokens; a multiple of ``group`` when quantized; unused when paged. pages: how many, when paged.
        """
        span = self.page or capacity
        if self.quantized and span % self.group:
            raise SpecError(f"cache: a capacity of {span} tokens is no multiple of the group of {self.group}")
        lead = pages if self.page else batch
        found = self._side("k", self.bits_k, (lead, key_heads), span, key_dim, dtype)
        found |= self._side("v", self.bits_v, (lead, value_heads), span, value_dim, dtype)
        return {n: ((batch, *shape[1:]) if is_recent(n) else shape, kind) for n, (shape, kind) in found.items()}

    def _side(self, name: str, bits: int, lead: tuple[int, int], span: int, dim: int, dtype: str) -> dict[str, Tensor]:
        if not bits:
            return {name: ((*lead, span, dim), dtype)}
        if dim * bits % 8:
            raise SpecError(f"cache: {dim} channels of {bits} bits do not fill bytes")
        blocks = span // self.group
        if name == "k":
            scales: tuple[int, ...] = (*lead, blocks, dim)
        else:
            share = self.value_group or dim
            if dim % share:
                raise SpecError(f"cache: value_group {share} does not divide {dim} channels")
            scales = (*lead, span, dim // share)
        found: dict[str, Tensor] = {
            f"{name}_codes": ((*lead, span, dim * bits // 8), "uint8"),
            f"{name}_scale": (scales, "float16"),
            f"{name}_offset": (scales, "float16"),
            f"{name}_recent": ((*lead, self.ring, dim), dtype),
        }
        if self.correction:
            found[f"{name}_left"] = ((*lead, span, self.correction), "float16")
            found[f"{name}_right"] = ((*lead, blocks, dim, self.correction), "float16")
        if self.outliers:
            if self.group * dim > 2**15:
                raise SpecError(
                    f"cache: outliers are placed by int16, too few for {self.group} x {dim} entries a block"
                )
            found[f"{name}_outlier"] = ((*lead, blocks, self.outliers), "float16")
            found[f"{name}_place"] = ((*lead, blocks, self.outliers), "int16")
        return found

    def names(self) -> tuple[str, ...]:
        """The store's names in order, whatever the sizes."""
        return tuple(self.store(1, self.page or self.group, 1, 8, 1, 8 * max(1, self.value_group), "float32"))

    def rebuild_names(self) -> tuple[str, ...]:
        """What ``rebuild`` lists for latent keys, in order."""
        if not self.latent:
            return ()
        given = (("up", True), ("key_bias", self.key_bias), ("norm_weight", self.norm))
        return tuple(n for n, there in given if there) + (("cos", "sin") if self.rotate else ())


def is_recent(name: str) -> bool:
    """Whether a store tensor holds the newest tokens, and so has a sequence's row rather than pages."""
    return name.endswith("_recent")


@lru_cache(maxsize=256)
def parse_format(text: str) -> CacheFormat:
    """The format of :meth:`CacheFormat.text`. Raises :class:`SpecError` for text that is none."""
    try:
        given = json.loads(text) if text else {}
        known = {f.name: f for f in dataclasses.fields(CacheFormat)}
        checked: dict[str, Any] = {}
        for name, value in given.items():
            kind: Any = type(known[name].default)
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                if not (kind is float and isinstance(value, int)):
                    raise SpecError(f"cache: {name} is {value!r}, but must be {kind.__name__}")
            checked[name] = kind(value)
    except (json.JSONDecodeError, KeyError, AttributeError) as error:
        raise SpecError(f"cache: {text!r} is not a cache format: {error}") from None
    return CacheFormat(**checked)
