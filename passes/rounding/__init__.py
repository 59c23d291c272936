"""How weights are rounded: a method a file. :class:`Method` is their base, :data:`METHODS` the table of their names."""

from __future__ import annotations

import difflib
from typing import Any

from ...runtime.errors import BadPassOption
from ..parse import option_types, read_value, split_options
from .awq import AWQ
from .base import Calibration, Method, WeightSite
from .cbq import CBQ
from .flexround import FlexRound
from .grid import QuantizedWeight
from .ostquant import OSTQuant
from .qvlm import QVLM
from .rtn import RTN

# Name -> method. A new method is one more file, one more import and one more name here.
METHODS: dict[str, type[Method]] = {cls.name: cls for cls in (RTN, AWQ, FlexRound, CBQ, OSTQuant, QVLM)}


def find_method(method: Any) -> Method:
    """A method object from itself, its class, or text such as ``awq`` and ``rtn{clip=true}``.

    Raises :class:`~tilewright.runtime.errors.BadPassOption` naming the methods, or the options, that there are.
    """
    if isinstance(method, Method):
        return method
    if isinstance(method, type) and issubclass(method, Method):
        return method()
    if not isinstance(method, str):
        raise BadPassOption(f"quantize: method is {method!r}, but must be a name or one of {', '.join(_names())}")
    name, options = split_options(method)
    cls = METHODS.get(name.lower())
    if cls is None:
        close = difflib.get_close_matches(name.lower(), METHODS, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise BadPassOption(f"quantize: there is no method {name!r}: {hint}The methods are {', '.join(METHODS)}")
    kinds = option_types(cls)
    values = {}
    for key, text in options:
        if key not in kinds:
            listing = f"its options are {', '.join(kinds)}" if kinds else "it has none"
            raise BadPassOption(f"quantize: the method {name} has no option {key!r}: {listing}")
        values[key] = read_value(text, kinds[key], f"quantize: {name}: {key}")
    return cls(**values)


def _names() -> list[str]:
    return [f"{cls.__name__}()" for cls in METHODS.values()]


__all__ = [
    "AWQ",
    "CBQ",
    "METHODS",
    "QVLM",
    "RTN",
    "Calibration",
    "FlexRound",
    "Method",
    "OSTQuant",
    "QuantizedWeight",
    "WeightSite",
    "find_method",
]
