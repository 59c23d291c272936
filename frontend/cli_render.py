"""Kernel specs written on the command line. Imports no torch: a spec renders anywhere."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import pkgutil
import typing
from pathlib import Path
from typing import Any

from .. import codegen
from ..codegen.render import render
from ..codegen.spec import SPECS, KernelSpec, SpecError
from ..runtime.errors import BadSpec, SaveError


def _register() -> dict[str, type[KernelSpec]]:
    """Import every module of codegen: a spec class registers itself when its module is imported."""
    for module in pkgutil.iter_modules(codegen.__path__):
        importlib.import_module(f"{codegen.__name__}.{module.name}")
    return SPECS


def kinds() -> list[dict[str, Any]]:
    """The kinds of kernels with their fields and defaults."""
    return [
        {
            "kind": kind,
            "targets": sorted(cls.templates),
            "fields": [
                {"name": f.name, "default": None if f.default is dataclasses.MISSING else f.default}
                for f in dataclasses.fields(cls)
            ],
        }
        for kind, cls in sorted(_register().items())
    ]


def make_spec(kind: str | None, values: list[str], given: str | None) -> KernelSpec:
    """From ``--spec`` (JSON or a file of it) with ``field=value`` on top, or from ``kind`` and values alone.

    Raises :class:`~tilewright.runtime.errors.BadSpec` for what is no spec, and SpecError for a field out of range.
    """
    _register()
    fields = _read(given) if given is not None else {}
    if kind is not None and "=" in kind:  # no kind before the values
        values, kind = [kind, *values], None
    if kind is not None:
        fields["kind"] = kind
    cls = SPECS.get(str(fields.get("kind")))
    if cls is None:
        close = difflib.get_close_matches(str(fields.get("kind")), SPECS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise BadSpec(f"there is no kernel kind {fields.get('kind')!r}: {hint}The kinds are {', '.join(sorted(SPECS))}")
    types = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for item in values:
        name, equals, text = item.partition("=")
        if not equals:
            raise BadSpec(f"{item!r} is no field=value")
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise BadSpec(f"{cls.kind} has no field {name!r}: {hint}It has {', '.join(names)}")
        fields[name] = _value(text, types[name], f"{cls.kind}: {name}")
    try:
        return KernelSpec.from_dict(fields)
    except TypeError as error:
        missing = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in fields]
        raise BadSpec(f"{cls.kind} needs {', '.join(missing)}" if missing else f"{cls.kind}: {error}") from error


def text_of(spec: KernelSpec, target: str) -> str:
    """The rendered file. Raises :class:`BadSpec` for a target without text."""
    try:
        return render(spec, target)
    except SpecError as error:
        raise BadSpec(str(error)) from error


def write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SaveError(f"cannot write {path}: {error.strerror or error}") from error


def _read(given: str) -> dict[str, Any]:
    text = given
    if not given.lstrip().startswith("{"):
        try:
            text = Path(given).read_text(encoding="utf-8")
        except OSError as error:
            raise BadSpec(
                f"--spec is neither JSON nor a file that can be read: {given!r} ({error.strerror})"
            ) from error
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise BadSpec(f"--spec is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise BadSpec("--spec must be a JSON object with a kind and its fields")
    return fields


def _value(text: str, kind: Any, what: str) -> Any:
    """Specs hold ints, bools, floats and texts only."""
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise BadSpec(f"{what} is {text!r}, but must be true or false")
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise BadSpec(f"{what} is {text!r}, but must be a number") from None
    return text
