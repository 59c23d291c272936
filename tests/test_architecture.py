"""The rules of the layout, read from the source: which stage may import which, file lengths, no machine's paths."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A stage may import the stages after it, never those before it.
STAGES = ("frontend", "passes", "runtime", "codegen")
ALLOWED = {stage: set(STAGES[i:]) for i, stage in enumerate(STAGES)}
# The benchmarks stand outside: they may import every stage, and of the stages only this command's file imports them.
BENCHMARKS, THEIR_COMMAND = "benchmarks", Path("frontend/cli_bench.py")
FOLDERS = (*STAGES, BENCHMARKS)
LONGEST = 500


def stage_files() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def project_files() -> list[Path]:
    """Every file that git tracks or would add; every text file below the root where there is no git."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if listing.returncode == 0 and listing.stdout:
        paths = [ROOT / name for name in listing.stdout.decode().split("\0") if name]
    else:
        folders = (*STAGES, "tilewright", "tests", "examples", "benchmarks", "docs", "scripts")
        paths = [path for folder in folders for path in (ROOT / folder).rglob("*")] + list(ROOT.glob("*.*"))
    return sorted(
        path for path in paths if path.is_file() and not path.is_symlink() and "__pycache__" not in path.parts
    )


def imported_modules(source: str, package: tuple[str, ...]) -> list[tuple[int, str]]:
    """(line, absolute dotted name) of all that ``source``, a module of ``package``, imports anywhere in it.

    ``from X import a`` counts as ``X`` and as ``X.a``: ``a`` may be a module.
    """
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join((*package[: len(package) - node.level + 1], *filter(None, [node.module])))
            found.append((node.lineno, base))
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            argument = node.args[0] if node.args else None
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                name = argument.value
                level = len(name) - len(name.lstrip("."))
                if level:
                    name = ".".join((*package[: len(package) - level + 1], name.lstrip(".")))
                found.append((node.lineno, name))
    return found


def violations(source: str, relative: Path) -> list[str]:
    """The imports of one stage file that point against the arrows."""
    stage = relative.parts[0]
    package = ("tilewright", *relative.parent.parts)
    wrong = []
    for line, name in imported_modules(source, package):
        parts = name.split(".")
        if parts[0] in FOLDERS and (ROOT / parts[0]).is_dir():
            wrong.append(f"{relative}:{line} imports {name}: write tilewright.{name}, or a relative import")
        elif stage == BENCHMARKS:
            continue
        elif parts[:2] == ["tilewright", BENCHMARKS] and relative != THEIR_COMMAND:
            wrong.append(f"{relative}:{line} imports {name}: only {THEIR_COMMAND} imports the benchmarks")
        elif parts[0] == "tilewright" and len(parts) > 1 and parts[1] in STAGES and parts[1] not in ALLOWED[stage]:
            wrong.append(f"{relative}:{line} imports {name}: {stage} comes after {parts[1]}")
    return wrong


def test_there_are_stage_files() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in stage_files()} == set(FOLDERS)


def test_arrows_point_one_way() -> None:
    wrong = [
        text for path in stage_files() for text in violations(path.read_text(encoding="utf-8"), path.relative_to(ROOT))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("file", "source", "ok"),
    [
        ("codegen/render.py", "from .spec import KernelSpec", True),
        ("codegen/render.py", "from ..runtime import ops", False),
        ("codegen/render.py", "def f():\n    from tilewright.passes.base import Pass", False),
        ("runtime/ops/softmax.py", "from ...codegen.softmax import SoftmaxSpec", True),
        ("runtime/ops/softmax.py", "from ...frontend import report", False),
        ("runtime/load.py", "import importlib\nimportlib.import_module('..passes', __package__)", False),
        ("runtime/load.py", "import codegen.render", False),
        ("passes/base.py", "from .. import frontend", False),
        ("passes/base.py", "from ..runtime import errors", True),
        ("frontend/raising/rules.py", "from ...passes.base import Decline", True),
        ("frontend/cli_bench.py", "from ..benchmarks import harness", True),
        ("frontend/cli.py", "from ..benchmarks import harness", False),
        ("runtime/load.py", "import tilewright.benchmarks.measure", False),
        ("benchmarks/suites/softmax.py", "from ...runtime.ops import softmax", True),
        ("benchmarks/harness.py", "from benchmarks import record", False),
    ],
)
def test_a_wrong_import_is_seen(file: str, source: str, ok: bool) -> None:
    assert (not violations(source, Path(file))) is ok


def test_codegen_needs_no_torch_to_render() -> None:
    """No module of codegen imports torch or triton when it is itself imported."""
    wrong = []
    for path in (ROOT / "codegen").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            wrong += [f"{path.name}:{node.lineno} imports {n}" for n in names if n.split(".")[0] in ("torch", "triton")]
    assert not wrong, "\n".join(wrong)


def test_passes_import_no_template() -> None:
    wrong = [
        f"{path.name}:{line} imports {name}"
        for path in (ROOT / "passes").rglob("*.py")
        for line, name in imported_modules(path.read_text(encoding="utf-8"), ("tilewright", "passes"))
        if "templates" in name or name.split(".")[0] == "jinja2" or name.startswith("tilewright.codegen.render")
    ]
    assert not wrong, "\n".join(wrong)


def test_files_stay_readable_in_length() -> None:
    long = []
    for path in project_files():
        if path.suffix in (".py", ".jinja") and "golden" not in path.parts:
            count = len(path.read_text(encoding="utf-8").splitlines())
            if count > LONGEST:
                long.append(f"{path.relative_to(ROOT)} has {count} lines")
    assert not long, f"over {LONGEST} lines: " + "; ".join(long)


# A path below somebody's home or a scratch folder holds on one machine only.
MACHINE_PATH = re.compile(r"(?<![\w.~$}])/(?:home|root|Users|tmp|mnt|srv)(?:/[\w.-]+)+")
TEXT = {".py", ".jinja", ".md", ".toml", ".txt", ".json", ".sh", ".cfg", ".yml", ".yaml", ".html", ".csv", ""}


def test_no_machine_paths() -> None:
    wrong = []
    for path in project_files():
        if path.suffix in TEXT and path != Path(__file__).resolve():
            for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
                if match := MACHINE_PATH.search(line):
                    wrong.append(f"{path.relative_to(ROOT)}:{number}: {match[0]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "bad"),
    [("open('/home/someone/x')", True), ("see /srv/thing/x", True), ("encoder/tmp/x", False), ("~/tmp/x", False)],
)
def test_a_machine_path_is_seen(text: str, bad: bool) -> None:
    assert bool(MACHINE_PATH.search(text)) is bad


def test_no_package_index_is_named() -> None:
    """Where packages come from is the user's setting."""
    host = re.compile(
        r"(?:index-url|find-links|extra-index)|https?://[\w.-]*(?:pypi|pythonhosted|download\.pytorch)[\w.-]*"
    )
    files = [ROOT / n for n in ("pyproject.toml", "constraints.txt", "requirements-models.txt", "Makefile", ".ci/run")]
    wrong = [f"{path.name}: {match[0]}" for path in files if (match := host.search(path.read_text(encoding="utf-8")))]
    assert not wrong, "\n".join(wrong)


def test_no_module_hides_the_standard_library_s() -> None:
    """Python started in a stage folder puts it first on its path: ``types.py`` there would break every import."""
    early = {"site"}  # loaded before the working folder is on the path
    hidden = [
        str(path.relative_to(ROOT))
        for path in stage_files()
        if path.stem in sys.stdlib_module_names - early - {"__init__"}
    ]
    assert not hidden, f"named as a module of the standard library: {', '.join(hidden)}"
