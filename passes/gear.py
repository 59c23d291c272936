"""GEAR: a KV cache of few bits, with a low-rank correction and the outliers kept apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..runtime.errors import BadPassOption
from .base import Decline, Exactness, NearMiss, Pass, Rewrite, SiteContext
from .quantize_kv import AFTER, WHY, check_bits, check_numbers, checked_format, quantize_site, sides


@dataclass(frozen=True)
class GEAR(Pass):
    """Quantize keys and values to few bits, and correct each block of ``group`` tokens by a low rank and outliers.

    ::

        block = scale * code + offset  +  left right^T  +  outliers        (group, D), per block and head

    Source: Kang et al., "GEAR: An Efficient KV Cache Compression Recipe for Near-Lossless Generative Inference of LLM"
    (2024, arXiv:2403.05527), section 3. What is different here:

    - a block is ``group`` tokens for prompt and generated text alike (there: the whole prompt is one block, generated
      text one for every 20 tokens), so what a token looks like does not hang on how the calls were cut;
    - outliers are the entries of a block that lie furthest from their vector's mean, wherever they are, and each is
      corrected after the low rank, so that it comes back as float16 has it (there: the greatest and least of each
      vector, taken out before);
    - the power iteration for the low rank starts from fixed signs (there: at random).

    Quality: docs/quantized_cache.md. ``rank`` costs 16 rank / D bits a number for left and 16 rank / group for right,
    ``outliers`` 32 bits times their share; a block of more tokens makes both corrections cheaper.

    bits, bits_k, bits_v, group, value_group, window: as in ``QuantizeKV``.
    rank: of the correction of each block and head; 0 for none. outliers: their share of a block's entries, at most a
        half; 0 for none.
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    ops: ClassVar[tuple[str, ...]] = ("cached_attention",)
    requires: ClassVar[frozenset[str]] = frozenset({"kv-cache"})
    after: ClassVar[frozenset[str]] = AFTER
    conflicts: ClassVar[frozenset[str]] = frozenset({"quantize-kv", "streaming-cache"})
    why: ClassVar[dict[str, str]] = WHY

    bits: int = 2
    bits_k: int | None = None
    bits_v: int | None = None
    rank: int = 4
    outliers: float = 0.02
    group: int = 64
    value_group: int = 0
    window: int = 64

    @classmethod
    def cli_name(cls) -> str:
        return "gear"

    def __post_init__(self) -> None:
        check_bits(self.name, self.bits, self.bits_k, self.bits_v)
        check_numbers(self, ("group", "window"), 16)
        check_numbers(self, ("value_group", "rank"), 0)
        share = self.outliers
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 0.5:
            raise BadPassOption(f"{self.name}: outliers is {share!r}, but must be a share of the entries, 0 to 0.5")
        if not self.rank and not share:
            raise BadPassOption(f"{self.name} corrects nothing with rank=0 and outliers=0: use quantize-kv")
        checked_format(self.name, self._changes())

    def _changes(self) -> dict[str, Any]:
        return sides(self.bits, self.bits_k, self.bits_v) | {
            "group": self.group,
            "value_group": self.value_group,
            "window": self.window,
            "correction": self.rank,
        }

    def rewrite(self, site: SiteContext) -> Rewrite | Decline | NearMiss:
        widths = [
            int(site.val(name).shape[3])
            for name, bits in zip("kv", (self.bits_k, self.bits_v), strict=True)
            if bits != 0
        ]
        if (least := min(*widths, self.group)) <= self.rank:
            return Decline(f"a correction of rank {self.rank} needs blocks of more than {least} tokens or channels")
        # One number for keys and values: of the wider of the two.
        count = round(self.outliers * self.group * max(widths)) if self.outliers else 0
        return quantize_site(site, self._changes() | {"outliers": count})
