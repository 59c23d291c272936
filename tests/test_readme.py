"""The README holds: its example runs as shown, its tables are the code's, its links and commands exist."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def example() -> str:
    return EXAMPLES[0]


def test_the_example_is_short() -> None:
    assert sum(1 for line in example().splitlines() if line.strip()) <= 15


def test_the_example_runs_as_shown(tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(example(), encoding="utf-8")
    environment = os.environ | {"TILEWRIGHT_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, script.name], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sigmoid-attention" in done.stdout, "the report names the pass"
    assert "torch.Size([2, 4, 100, 64])" in done.stdout
    assert "// Sigmoid attention, forward" in done.stdout, "the kernel's text is shown"
    dump = tmp_path / "attention-dump"
    assert (dump / "report.html").is_file()
    assert list(dump.rglob("check.py")), "each kernel comes with its check"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["attention-dump", "cache", "example.py"]


def test_the_masks_are_drawn_and_become_passes() -> None:
    shown = EXAMPLES[1]
    names: dict[str, Any] = {}
    exec(shown, names)
    assert names["static"].mask.text and "threshold=0.9" in names["dynamic"].options()["select"]
    assert names["picture"].axes


def test_the_cached_decoder_is_compiled() -> None:
    names: dict[str, Any] = {}
    exec(EXAMPLES[2], names)
    figures = names["compiled"].report.cache
    # Whole, two layers have 4 heads of 16 for keys and for values in float32.
    assert figures["bytes_per_token"] < 2 * 4 * (64 + 64) / 8


def test_the_weights_are_packed_and_the_float_ones_leave() -> None:
    names: dict[str, Any] = {}
    exec(EXAMPLES[3], names)
    weights = names["compiled"].report.weights
    assert weights["after"] < weights["before"] / 2
    assert len(EXAMPLES) == 4


def test_tables_come_from_the_code() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "doc_tables.py"))
    for name, (page, make) in script["TABLES"].items():
        text = page.read_text(encoding="utf-8")
        assert script["updated"](text, name, make()) == text, f"run python scripts/doc_tables.py: {page.name} is stale"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    broken = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not broken, f"{page.name}: {broken}"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"\bmake ([a-z]+)\b", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target} is not in the Makefile"


def test_commands_exist() -> None:
    from typer.main import get_command

    from tilewright.frontend.cli import app

    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    shown = set(re.findall(r"^    tilewright ([a-z]+)", README, flags=re.MULTILINE))
    assert shown, "the README shows commands"
    assert shown <= known, f"no such command: {shown - known}"
