"""Say a thing once per process: fallbacks are announced, never silent, and never repeated."""

from __future__ import annotations

import threading
import warnings

from . import settings
from .errors import TilewrightWarning

_said: set[str] = set()
_lock = threading.Lock()


def announce(message: str, *, key: str | None = None) -> bool:
    """Warn with :class:`~.errors.TilewrightWarning`, once per process and ``key`` (the message when None).

    Returns whether the warning was given. ``TILEWRIGHT_ANNOUNCE=0`` keeps it quiet.
    """
    if not settings.get().announce:
        return False
    with _lock:
        if (key or message) in _said:
            return False
        _said.add(key or message)
    warnings.warn(message, TilewrightWarning, stacklevel=3)
    return True


def forget() -> None:
    """Forget what was said, so that it is said again."""
    with _lock:
        _said.clear()
