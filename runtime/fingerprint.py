"""The content fingerprint of a kernel: everything that decides what is built, and nothing else (no time, no path).

Same ingredients, same digest; any ingredient changed, another digest. So a stale cache entry cannot exist: it is
simply never asked for again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from .. import __version__
from ..codegen.spec import KernelSpec

# Layout of a cache entry. Raise it when what the loader expects of an entry's files changes.
ENTRY_FORMAT = 1


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def ingredients(spec: KernelSpec, target: str, text: str, toolchain: Mapping[str, str]) -> dict[str, Any]:
    """What goes into the digest, as JSON-able data that is stored beside the kernel and can be read by a person.

    toolchain: the target's own part (torch, triton or compiler version, CPU or GPU capability, flags).
    """
    return {
        "format": ENTRY_FORMAT,
        "tilewright": __version__,
        "target": target,
        "spec": json.loads(spec.to_json()),
        "text_sha256": sha256(text.encode()),
        "toolchain": dict(toolchain),
    }


def digest(parts: Mapping[str, Any]) -> str:
    """sha256 (64 hexadecimal digits) of :func:`ingredients` in canonical JSON."""
    return sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode())
