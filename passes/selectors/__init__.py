"""Selectors: which key blocks a block-sparse attention reads, chosen at run time. One file each.

Written as text, as the command line takes them: ``xattention(stride=16, threshold=0.9)``; options in the order of the
class's fields may go without their names, and a selector without options without parentheses.
"""

from __future__ import annotations

import re

from ...runtime.errors import BadPassOption
from ..parse import _closest, _top_level, option_types, read_value
from .base import Selected, Selector, SelectorInputs
from .biformer import BiFormer
from .dhsa import DHSA
from .longheads import LongHeads
from .pbs import PBS
from .proxyattn import ProxyAttn
from .xattention import XAttention

# Name in text -> selector. A new selector is one more file and one more name here.
SELECTORS: dict[str, type[Selector]] = {
    cls.name: cls for cls in (XAttention, ProxyAttn, PBS, DHSA, BiFormer, LongHeads)
}

_SYNTAX = 'write a selector as "name(option=value, option=value)"'


def parse_selector(text: str) -> Selector:
    """The selector that ``text`` means.

    Raises :class:`~tilewright.runtime.errors.BadPassOption` naming the closest selector or option and all there are.
    """
    match = re.fullmatch(r"\s*([A-Za-z][\w-]*)\s*(?:\((.*)\))?\s*", text, re.DOTALL)
    if match is None:
        raise BadPassOption(f"cannot read {text!r}: {_SYNTAX}")
    written = match[1]
    cls = next((c for n, c in SELECTORS.items() if written.lower().replace("_", "").replace("-", "") == n), None)
    if cls is None:
        raise BadPassOption(f"there is no selector {written!r}{_closest(written.lower(), SELECTORS, 'selector')}")
    types, values = option_types(cls), {}
    for position, item in enumerate(_top_level(match[2] or "")):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            if position >= len(types):
                raise BadPassOption(f"{cls.name} has {len(types)} options, and {item!r} is one more")
            key, value = list(types)[position], key
        if key in values:
            raise BadPassOption(f"{cls.name} is given {key!r} twice")
        if key not in types:
            raise BadPassOption(f"{cls.name} has no option {key!r}{_closest(key, types, 'option')}")
        values[key] = read_value(value, types[key], f"{cls.name}: {key}")
    return cls(**values)


__all__ = [
    "DHSA",
    "PBS",
    "SELECTORS",
    "BiFormer",
    "LongHeads",
    "ProxyAttn",
    "Selected",
    "Selector",
    "SelectorInputs",
    "XAttention",
    "parse_selector",
]
