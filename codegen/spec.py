"""Kernel specs: everything that decides a kernel's text, and nothing else.

Same spec, same bytes. A spec is a frozen dataclass of ints, floats, bools, enumerated strings and printed
expressions; each subclass names its template, checks its fields, and says what may be tuned.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, ClassVar, Self

DTYPES = ("float32", "bfloat16", "float16")
SPECS: dict[str, type[KernelSpec]] = {}


class SpecError(ValueError):
    """A field of a spec is out of range. The sentence names the field, the value and the range."""


@dataclass(frozen=True)
class KernelSpec:
    """Base of every kernel spec.

    kind: the spec's name in JSON, on the command line and in the cache.
    templates: target -> template file below ``codegen/templates``.
    """

    kind: ClassVar[str] = ""
    templates: ClassVar[dict[str, str]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.kind:
            SPECS[cls.kind] = cls

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise :class:`SpecError` when a field is out of range. Subclasses extend this."""

    def context(self, target: str) -> dict[str, Any]:
        """The names the template may use besides ``spec``. Subclasses extend this with derived constants."""
        return {}

    def candidates(self, target: str) -> list[Self]:
        """Specs of the same function that autotuning may try, the shipped default first. Bounded to a handful."""
        return [self]

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **dataclasses.asdict(self)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> KernelSpec:
        """Rebuild a spec from :meth:`to_dict`. Raises :class:`SpecError` for an unknown kind or field."""
        fields = dict(data)
        kind = fields.pop("kind", None)
        if kind not in SPECS:
            raise SpecError(f"unknown kernel kind {kind!r}: choose one of {', '.join(sorted(SPECS))}")
        cls = SPECS[kind]
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise SpecError(f"{kind} has no field {unknown[0]!r}: it has {', '.join(sorted(known))}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def require(ok: bool, message: str) -> None:
    """Raise :class:`SpecError` with the message unless ok."""
    if not ok:
        raise SpecError(message)


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    require(value in choices, f"{name} is {value!r}, but must be one of {', '.join(choices)}")


def require_power_of_two(name: str, value: int, low: int, high: int) -> None:
    ok = isinstance(value, int) and value > 0 and value & (value - 1) == 0 and low <= value <= high
    require(ok, f"{name} is {value}, but must be a power of two from {low} to {high}")
