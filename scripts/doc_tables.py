"""Write the tables that come from the code into the pages: passes in README.md, tolerances in docs/exactness.md.

``python scripts/doc_tables.py`` rewrites the pages; ``--check`` only says whether they are up to date. A table stands
between ``<!-- table: NAME -->`` and ``<!-- end: NAME -->``.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path

from tilewright.passes import PASSES
from tilewright.runtime.ops import OPS

ROOT = Path(__file__).resolve().parent.parent


def pass_table() -> str:
    """One row a pass: names, what it claims, what it needs, its options with their defaults, what it does."""
    rows = ["| pass | exactness | needs | options and defaults | what it does |", "| --- | --- | --- | --- | --- |"]
    for name, cls in sorted(PASSES.items()):
        options = ", ".join(f"`{f.name}={f.default!r}`" for f in dataclasses.fields(cls)) or "none"
        summary = (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ").replace("``", "`")
        rows.append(
            f"| `{name}`<br>`tw.passes.{cls.__name__}` | {cls.exactness.value} | {cls.describe_needs()} "
            f"| {options} | {summary} |"
        )
    return "\n".join(rows)


def tolerance_table() -> str:
    """One row an op and dtype; powers of two are written as such."""
    rows = ["| op | dtype | atol | rtol |", "| --- | --- | --- | --- |"]
    for name, op in sorted(OPS.items()):
        for dtype, tolerance in op.tolerance.items():
            kind = str(dtype).removeprefix("torch.")
            rows.append(f"| `{name}` | {kind} | {tolerance.atol:.2g} | {tolerance.rtol:.2g} |")
    return "\n".join(rows)


TABLES: dict[str, tuple[Path, Callable[[], str]]] = {
    "passes": (ROOT / "README.md", pass_table),
    "tolerances": (ROOT / "docs" / "exactness.md", tolerance_table),
}


def updated(text: str, name: str, table: str) -> str:
    """``text`` with the table ``name`` replaced. Raises ValueError when its markers are missing."""
    pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end: {name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"there are no markers for the table {name!r}")
    return pattern.sub(lambda match: match[1] + table + "\n" + match[2], text)


def main(arguments: list[str]) -> int:
    stale = []
    for name, (page, make) in TABLES.items():
        text = page.read_text(encoding="utf-8")
        new = updated(text, name, make())
        if new != text:
            stale.append(page.name)
            if "--check" not in arguments:
                page.write_text(new, encoding="utf-8")
    if stale:
        print(f"{'out of date' if '--check' in arguments else 'rewritten'}: {', '.join(stale)}")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
