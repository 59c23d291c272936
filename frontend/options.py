"""The arguments of ``compile`` and of the backend, checked before anything happens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

from ..passes.base import Pass
from ..passes.manager import sort_passes
from ..passes.parse import parse_passes
from ..runtime.errors import BadArgument
from .choices import Memory, Rest, Target

KV_CACHE = "kv-cache"
"""What passes provide that put a KV cache into a graph."""


@dataclass(frozen=True)
class Options:
    """See :func:`tilewright.compile` for the meaning of each."""

    passes: tuple[Pass, ...] = ()
    target: Target = "auto"
    rest: Rest = "auto"
    strict: bool = False
    validate: bool = True
    memory: Memory = "system"

    @property
    def decodes(self) -> bool:
        """Whether a pass puts a KV cache into the graph."""
        return any(KV_CACHE in one.provides for one in self.passes)

    @staticmethod
    def make(
        passes: Sequence[Pass] | str = (),
        target: str = "auto",
        rest: str = "auto",
        strict: bool = False,
        validate: bool = True,
        memory: str = "system",
    ) -> Options:
        """Check and normalise. ``passes`` may be the command line's text.

        Raises :class:`~tilewright.runtime.errors.TilewrightError` subclasses naming the argument and its choices.
        """
        if isinstance(passes, Pass):
            raise BadArgument(f"passes is a list: write passes=[{type(passes).__name__}(...)]")
        given: Any = parse_passes(passes) if isinstance(passes, str) else passes
        checked = (("target", target, Target), ("rest", rest, Rest), ("memory", memory, Memory))
        for name, got, kind in checked:
            choices = get_args(kind)
            if got not in choices:
                raise BadArgument(f"{name} is {got!r}, but must be one of {', '.join(choices)}")
        return Options(
            tuple(stage for one in sort_passes(given) for stage in one.stages()),
            cast(Target, target),
            cast(Rest, rest),
            bool(strict),
            bool(validate),
            cast(Memory, memory),
        )
