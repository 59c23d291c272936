"""Passes written as text, as the command line takes them.

::

    two-pass-softmax,sigmoid-attention{bias=calibrated}
    my_passes.py:MyPass{strength=0.5}

An option is a field of the pass's dataclass and is read as that field's type. ``file.py:Class`` names a user's own
pass.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import math
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..runtime.errors import BadPassOption, UnknownPass
from .base import Pass

_SYNTAX = 'write passes as "name{option=value,option=value},name"'


def parse_passes(text: str, registry: Mapping[str, type[Pass]] | None = None) -> list[Pass]:
    """The passes that ``text`` names, in its order. Empty text is no pass.

    registry: name -> pass; Tilewright's own by default.
    Raises :class:`UnknownPass` and :class:`BadPassOption` with the closest name there is and the valid options.
    """
    if registry is None:
        from . import PASSES

        registry = PASSES
    return [_build(name, options, registry) for name, options in _split(text)]


def _split(text: str) -> list[tuple[str, str | None]]:
    """``a{x=1},b`` -> ``[("a", "x=1"), ("b", None)]``."""
    passes = []
    for part in _top_level(text):
        match = re.fullmatch(r"([^{}]+?)\s*(?:\{(.*)\})?", part, re.DOTALL)
        if match is None:
            raise BadPassOption(f"cannot read {part!r}: {_SYNTAX}")
        passes.append((match[1], match[2]))
    return passes


def split_options(text: str) -> tuple[str, list[tuple[str, str]]]:
    """``name{x=1,y}`` -> ``("name", [("x", "1"), ("y", "true")])``: a bare name switches a flag on.

    Raises :class:`BadPassOption` for text that is no single name with options.
    """
    parts = _split(text)
    if len(parts) != 1:
        raise BadPassOption(f"cannot read {text!r}: write one name{{option=value,option=value}}")
    name, options = parts[0]
    pairs = []
    for item in _top_level(options or ""):
        key, equals, value = (part.strip() for part in item.partition("="))
        pairs.append((key.replace("-", "_"), value if equals else "true"))
    return name, pairs


def _top_level(text: str) -> list[str]:
    """Split at commas that are outside of braces, brackets and quotes; empty pieces are dropped."""
    pieces, depth, quote, start = [], 0, "", 0
    for index, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "{[(":
            depth += 1
        elif char in "}])":
            depth -= 1
            if depth < 0:
                raise BadPassOption(f"{char!r} at column {index + 1} of {text!r} closes nothing: {_SYNTAX}")
        elif char == "," and depth == 0:
            pieces.append(text[start:index])
            start = index + 1
    if quote or depth:
        raise BadPassOption(f"{text!r} lacks a closing {quote or 'brace'}: {_SYNTAX}")
    return [piece.strip() for piece in (*pieces, text[start:]) if piece.strip()]


def find_pass(name: str, registry: Mapping[str, type[Pass]]) -> type[Pass]:
    """The pass called ``name``; ``_`` may stand for ``-``, and the class's name is fine too."""
    file, colon, attribute = name.rpartition(":")
    if colon and file.endswith(".py"):
        return _from_file(Path(file), attribute)
    for cli_name, cls in registry.items():
        if name in (cli_name, cls.__name__) or name.replace("_", "-") == cli_name:
            return cls
    raise UnknownPass(f"there is no pass {name!r}{_closest(name.replace('_', '-'), registry)}")


def _from_file(path: Path, attribute: str) -> type[Pass]:
    if not path.is_file():
        raise UnknownPass(f"there is no file {str(path)!r} to take the pass {attribute!r} from")
    spec = importlib.util.spec_from_file_location(f"tilewright_user_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up the module that postponed annotations belong to
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's file may raise anything; the sentence must name the file
        raise UnknownPass(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    cls = getattr(module, attribute, None)
    if not (isinstance(cls, type) and issubclass(cls, Pass)):
        own = [n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, Pass) and v is not Pass]
        raise UnknownPass(f"{path} has no pass {attribute!r}{_closest(attribute, own)}")
    return cls


def _build(name: str, options: str | None, registry: Mapping[str, type[Pass]]) -> Pass:
    cls = find_pass(name, registry)
    values: dict[str, Any] = {}
    for item in _top_level(options or ""):
        key, equals, value = (part.strip() for part in item.partition("="))
        key = key.replace("-", "_")
        if key in values:
            raise BadPassOption(f"{name} is given {key!r} twice")
        types_of = option_types(cls)
        if key not in types_of:
            raise BadPassOption(f"{name} has no option {key!r}{_closest(key, types_of, 'option')}")
        # A bare name switches a flag on.
        values[key] = read_value(value if equals else "true", types_of[key], f"{name}: {key}")
    try:
        return cls(**values)
    except TypeError as error:
        raise BadPassOption(f"{name}: {error}") from error
    except ValueError as error:
        raise error if isinstance(error, BadPassOption) else BadPassOption(f"{name}: {error}") from error


def option_types(cls: type[Any]) -> dict[str, Any]:
    """The options of a pass (or another dataclass) and their types, in the order of its fields."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def read_value(text: str, kind: Any, what: str) -> Any:
    """``text`` as a value of type ``kind``. ``what`` opens the sentence when it is not one."""
    for reader in _readers(kind):
        try:
            return reader(text)
        except ValueError:
            continue
    raise BadPassOption(f"{what} is {text!r}, but must be {describe_type(kind)}")


def _readers(kind: Any) -> list[Any]:
    """How to read a type, strictest first, so that ``float | str`` reads ``-1.5`` as a number."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        order = {type(None): 0, bool: 1, int: 2, float: 3, str: 9}
        return [r for one in sorted(arguments, key=lambda a: order.get(a, 5)) for r in _readers(one)]
    if origin is typing.Literal:
        return [lambda text: _literal(text, arguments)]
    if origin in (tuple, list, typing.get_origin(typing.Sequence[int])):
        inner = arguments[0] if arguments else str
        return [lambda text: tuple(_first(inner, part) for part in _top_level(text.strip().strip("[]()")))]
    if origin is typing.Annotated:
        return _readers(arguments[0])
    simple = {type(None): _none, bool: _bool, int: int, float: _float, str: _text}
    return [simple.get(kind, _text)]


def _first(kind: Any, text: str) -> Any:
    for reader in _readers(kind):
        try:
            return reader(text)
        except ValueError:
            continue
    raise ValueError(text)


def _literal(text: str, choices: Iterable[Any]) -> Any:
    for choice in choices:
        if _text(text) == str(choice):
            return choice
    raise ValueError(text)


def _none(text: str) -> None:
    if text.lower() not in ("none", "null"):
        raise ValueError(text)


def _bool(text: str) -> bool:
    if text.lower() not in ("true", "false", "yes", "no", "on", "off"):
        raise ValueError(text)
    return text.lower() in ("true", "yes", "on")


def _float(text: str) -> float:
    value = float(text)
    if math.isnan(value):
        raise ValueError(text)
    return value


def _text(text: str) -> str:
    quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


def describe_type(kind: Any) -> str:
    """A type as a user reads it: ``one of a, b``, ``a number or none``."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe_type(one) for one in arguments)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (tuple, list):
        return "a list of " + (describe_type(arguments[0]) if arguments else "texts")
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "none"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def _closest(name: str, among: Iterable[str], noun: str = "pass") -> str:
    """``: did you mean X? The passes are ...``"""
    names = list(among)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    plural = "passes" if noun == "pass" else f"{noun}s"
    listing = f"The {plural} are {', '.join(names)}" if names else f"It has no {plural}"
    return f": {hint}{listing}"
