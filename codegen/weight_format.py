"""What a quantized weight holds: the encoding of a matrix as one small value, and the tensors that it takes.

A weight of N rows (output features) and K columns is unsigned codes and, per row and group of columns, a scale:

    middle    scale * (code - 2^(bits - 1))         symmetric
    point     scale * (code - zero)                 zero uint8
    offset    scale * code + zero                   zero of the scales' dtype
    float8    scale * float8_e4m3fn(code)           kind 'float8_e4m3fn', 8 bits

Columns come in U = ceil(K / 32) units of 32, and G = ceil(K / group) groups (one without a group; the last may be
short). Two layouts hold the same codes:

    plain     codes (N, U * 4 * bits) uint8, a row after another; scale, zero (N, G). Within a unit:
              8 bits    byte j is column j
              4 bits    byte j (0 .. 15): columns j (low) and j + 16 (high)
              2 bits    byte j (0 .. 7): columns j, j + 8, j + 16, j + 24 from the lowest bits up
              3 bits    8 bytes as 2 bits with the codes' low two bits, then byte j (0 .. 3): high bits of columns
                        j, j + 4, j + 8 ... from the lowest bit up
    panels    16 rows side by side, P = ceil(N / 16): codes (P, U, 64 * bits) uint8; scale, zero (P, G, 16), zeros for
              rows beyond N. A unit is `bits` vectors of 64 bytes; 32-bit word c of a vector belongs to row 16 p + c,
              and byte b of a word holds
              8 bits    vector v (0 .. 7): column 4 v + b
              4 bits    vector v (0 .. 3): columns 8 v + b (low) and 8 v + 4 + b (high)
              2 bits    vector v (0, 1): columns 16 v + 4 i + b at bits 2 i
              3 bits    vectors 0 and 1 as 2 bits with the low two bits; vector 2: high bit of column 4 i + b at bit i

Panels suit integer dot products, which take four neighbouring columns a word: (word >> shift) & mask is an operand.
What stands beyond K is padding, which kernels multiply by zero.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .spec import SpecError

BITS = (8, 4, 3, 2)
ZEROS = ("middle", "point", "offset")
SCALES = ("float16", "float32")
ACTIVATIONS = (0, 8, 4)
LAYOUTS = ("plain", "panels")
KINDS = ("int", "float8_e4m3fn")
UNIT = 32
"""Columns that are packed together."""
PANEL = 16
"""Rows side by side in the layout ``panels``."""


@dataclass(frozen=True)
class WeightFormat:
    """How a weight is kept.

    bits: of a code. group: columns that share a scale, a multiple of 32; 0 for all of a row.
    zero: what a code is counted from. scales: dtype of scales and offsets.
    activations: bits of the integers that the layer's input is rounded to, per token when it is called; 0: not.
    layout, kind: see the head of this file.
    """

    bits: int = 4
    group: int = 0
    zero: str = "middle"
    scales: str = "float16"
    activations: int = 0
    layout: str = "plain"
    kind: str = "int"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("bits", BITS),
            ("zero", ZEROS),
            ("scales", SCALES),
            ("activations", ACTIVATIONS),
            ("layout", LAYOUTS),
            ("kind", KINDS),
        ):
            if (given := getattr(self, name)) not in allowed or isinstance(given, bool):
                raise SpecError(f"weight: {name} is {given!r}, but must be one of {', '.join(map(str, allowed))}")
        if not isinstance(self.group, int) or isinstance(self.group, bool) or self.group < 0 or self.group % UNIT:
            raise SpecError(f"weight: group is {self.group!r}, but must be a multiple of {UNIT}, or 0 for a whole row")
        if self.kind != "int" and (self.bits != 8 or self.zero != "middle" or self.layout != "plain"):
            raise SpecError(f"weight: {self.kind} has 8 bits, no zero and the plain layout")

    @property
    def levels(self) -> int:
        return int(2**self.bits)

    @property
    def middle(self) -> int:
        """The code of zero where zero is ``middle``."""
        return int(2 ** (self.bits - 1))

    def groups(self, columns: int) -> int:
        """Scales a row."""
        return -(-columns // self.group) if self.group else 1

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """The tensors of a weight: name -> (shape, dtype). ``zero`` is left out where it is ``middle``."""
        units, groups = -(-columns // UNIT), self.groups(columns)
        panels = -(-rows // PANEL)
        if self.layout == "plain":
            codes: tuple[int, ...] = (rows, units * 4 * self.bits)
            scale: tuple[int, ...] = (rows, groups)
        else:
            codes, scale = (panels, units, 64 * self.bits), (panels, groups, PANEL)
        found = {"codes": (codes, "uint8"), "scale": (scale, self.scales)}
        if self.zero != "middle":
            found["zero"] = (scale, "uint8" if self.zero == "point" else self.scales)
        return found

    def text(self) -> str:
        """Canonical: fields at their defaults are left out."""
        changed = {f.name: value for f in dataclasses.fields(self) if (value := getattr(self, f.name)) != f.default}
        return json.dumps(changed, sort_keys=True)

    def changed(self, **changes: object) -> WeightFormat:
        """A copy with some fields changed. Raises :class:`SpecError` like the class."""
        return parse_weight_format(json.dumps({**dataclasses.asdict(self), **changes}))


@lru_cache(maxsize=1024)
def parse_weight_format(text: str) -> WeightFormat:
    """The format of a text. Raises :class:`SpecError` for what is not one."""
    try:
        fields: Any = json.loads(text)
    except ValueError:
        raise SpecError(f"weight: {text!r} is not a format") from None
    if not isinstance(fields, dict):
        raise SpecError(f"weight: {text!r} is not a format")
    if unknown := set(fields) - {f.name for f in dataclasses.fields(WeightFormat)}:
        raise SpecError(f"weight: {', '.join(sorted(unknown))} is no field of a format")
    return WeightFormat(**fields)
