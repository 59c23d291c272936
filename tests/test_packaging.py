"""The package as a user gets it: wheel, sdist and editable install, started in other folders and in the checkout.

Every install goes into a folder of its own. The heavy dependencies come from the environment that runs the tests,
through a .pth file, so nothing is downloaded and its own (editable) Tilewright is out of reach.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("frontend", "passes", "runtime", "codegen", "benchmarks")
pytestmark = pytest.mark.slow

# Imports every stage, renders a kernel, reads the version and says where it all came from.
PROBE = """
import json, sys
import tilewright as tw
from tilewright import benchmarks, codegen, frontend, passes, runtime
from tilewright.codegen.softmax import SoftmaxSpec
from tilewright.frontend import cli, compile
from tilewright.runtime import ops
from importlib import metadata, resources
text = tw.render(SoftmaxSpec(), target="triton")
compiled = __builtins__.compile(text, "kernel.py", "exec")
backends = [e.value for e in metadata.entry_points(group="torch_dynamo_backends") if e.name == "tilewright"]
json.dump({
    "files": {m.__name__: m.__file__ for m in (tw, benchmarks, codegen, frontend, passes, runtime)},
    "ops": sorted(ops.OPS), "text": len(text), "version": tw.__version__, "metadata": metadata.version("tilewright"),
    "typed": resources.files("tilewright").joinpath("py.typed").is_file(), "backends": backends,
}, sys.stdout)
"""


def run(*command: object, cwd: Path, **env: str) -> str:
    """The command's standard output; a failure shows all it wrote."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH")}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=clean | env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed in {cwd}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout's own files, so that building leaves nothing in the checkout."""
    target = tmp_path_factory.mktemp("checkout") / "tilewright-source"
    skip = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "demo-output", "results")
    shutil.copytree(ROOT, target, ignore=skip)
    return target


@pytest.fixture(scope="module")
def distributions(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(wheel, sdist), built with the setuptools at hand. The wheel is built from the sdist."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=out)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def environment(folder: Path) -> Path:
    """A new virtual environment's python, with pip and this environment's dependencies but not its Tilewright."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    # A plain path entry: .pth files of that folder, such as an editable install's finder, are not run.
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def install(python: Path, *what: object, cwd: Path) -> None:
    quiet = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--force-reinstall", "--ignore-installed")
    run(python, "-m", "pip", "install", *quiet, *what, cwd=cwd)


def probe(python: Path, cwd: Path, expected: Path) -> None:
    """Run :data:`PROBE` in ``cwd``; the package and its stages must come from below ``expected``."""
    result = json.loads(run(python, "-c", PROBE, cwd=cwd))
    for name, file in result["files"].items():
        assert Path(file).resolve().is_relative_to(expected.resolve()), f"{name} came from {file}, not {expected}"
    assert {"attention", "softmax"} <= set(result["ops"])
    assert result["text"] > 500
    assert result["version"] == result["metadata"]
    assert result["typed"]
    assert result["backends"] == ["tilewright.frontend.backend:tilewright_backend"]


def folders_with_code() -> set[str]:
    names = {"tilewright"}
    for stage in STAGES:
        for init in (ROOT / stage).rglob("__init__.py"):
            names.add(".".join(("tilewright", *init.parent.relative_to(ROOT).parts)))
    return names


def test_every_package_folder_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert set(listed) == folders_with_code()
    bare = {
        path.parent.relative_to(ROOT)
        for stage in STAGES
        for path in (ROOT / stage).rglob("*.py")
        if not (path.parent / "__init__.py").is_file()
    }
    assert not bare, f"folders with modules and no __init__.py: {bare}"


def test_wheel_and_sdist_are_complete(distributions: tuple[Path, Path]) -> None:
    wheel, sdist = distributions
    modules = {path.relative_to(ROOT) for stage in STAGES for path in (ROOT / stage).rglob("*.py")}
    data = (path for stage in STAGES for path in (ROOT / stage).rglob("templates/**/*") if path.is_file())
    templates = {path.relative_to(ROOT) for path in data}
    assert {path.parts[0] for path in templates} == {"codegen", "frontend"}, "both have templates to ship"
    others = {path for stage in STAGES for path in (ROOT / stage).rglob("*") if path.is_file()}
    results = ROOT / "benchmarks" / "results"  # of one machine: in the repository, in no package
    stray = {p for p in others if p.suffix not in (".py", ".pyc") and p.relative_to(ROOT) not in templates}
    stray = {p for p in stray if not p.is_relative_to(results)}
    assert not stray, f"data files outside a templates folder are not packaged: {stray}"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    missing = {str(p) for p in modules | templates if f"tilewright/{p.as_posix()}" not in names}
    assert not missing, f"not in the wheel: {sorted(missing)}"
    assert "tilewright/py.typed" in names
    top = {name.split("/")[0] for name in names}
    assert {t for t in top if not t.endswith(".dist-info")} == {"tilewright"}, "only our own package is installed"
    with tarfile.open(sdist) as archive:
        inside = {"/".join(name.split("/")[1:]) for name in archive.getnames()}
    wanted = {p.as_posix() for p in modules | templates}
    wanted |= {"LICENSE", "README.md", "pyproject.toml", "Makefile", "constraints.txt", "tests/conftest.py"}
    assert not wanted - inside, f"not in the sdist: {sorted(wanted - inside)}"


def test_wheel_runs_anywhere(distributions: tuple[Path, Path], source: Path, tmp_path: Path) -> None:
    wheel, _ = distributions
    python = environment(tmp_path / "venv")
    install(python, wheel, cwd=tmp_path)
    probe(python, cwd=tmp_path, expected=tmp_path / "venv")
    # Started in a checkout's root, Python finds the checkout's tilewright/ first, and with it the checkout's stages.
    probe(python, cwd=source, expected=source)
    probe(python, cwd=source / "tests", expected=tmp_path / "venv")
    assert "doctor" in run(tmp_path / "venv" / "bin" / "tilewright", "--help", cwd=source)


def test_sdist_installs(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    _, sdist = distributions
    python = environment(tmp_path / "venv")
    install(python, sdist, cwd=tmp_path)
    probe(python, cwd=tmp_path, expected=tmp_path / "venv")


def test_editable_install_runs_anywhere(source: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv")
    install(python, "--editable", source, cwd=tmp_path)
    for folder in (tmp_path, source, source / "frontend", source / "tests"):
        probe(python, cwd=folder, expected=source)


def test_stages_are_not_installed_twice(source: Path) -> None:
    """One import path for one file: a class imported both ways would be two classes."""
    code = "import tilewright.codegen.spec, sys; print([m for m in sys.modules if m.startswith('codegen')])"
    assert run(sys.executable, "-c", code, cwd=source).strip() == "[]"
