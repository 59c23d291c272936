"""Golden texts: what the templates render stays under review.

``check_golden("softmax_one_read", text)`` compares with ``tests/golden/softmax_one_read.py.txt``.
``TILEWRIGHT_REGENERATE_GOLDEN=1 pytest ...`` rewrites the files instead; the change then shows in the commit.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "golden"
REGENERATE = "TILEWRIGHT_REGENERATE_GOLDEN"


def check_golden(name: str, text: str, suffix: str = ".py.txt") -> None:
    """Fail, with a diff, unless ``text`` equals the golden file ``<name><suffix>``."""
    assert re.fullmatch(r"[a-z0-9_]+", name), f"golden name {name!r} is no file name"
    path = FOLDER / f"{name}{suffix}"
    if os.environ.get(REGENERATE) == "1":
        FOLDER.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return
    remedy = f"run the test with {REGENERATE}=1 to accept the new text, and review the difference"
    assert path.is_file(), f"no golden file {path.name}: {remedy}"
    expected = path.read_text(encoding="utf-8")
    if text != expected:
        lines = difflib.unified_diff(
            expected.splitlines(), text.splitlines(), f"golden/{path.name}", "rendered", lineterm=""
        )
        raise AssertionError("\n".join([f"{path.name} changed; {remedy}", *lines]))
