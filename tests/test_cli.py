"""The command line: pure JSON on stdout, one sentence and status 2 for an error, the same facts as the library's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tilewright.codegen.render import render
from tilewright.codegen.spec import SPECS, KernelSpec
from tilewright.frontend.cli import app
from tilewright.frontend.report import Report
from tilewright.passes import PASSES

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(16, 16)
        self.head = nn.Linear(16, 12)
    def forward(self, x):
        h = self.q(x)[:, None]
        h = nn.functional.scaled_dot_product_attention(h, h, h, is_causal=True)[:, 0]
        return self.head(h).softmax(-1)

def make():
    torch.manual_seed(0)
    return Net().eval(), (torch.randn(2, 9, 16),)

def broken():
    class Bad(nn.Module):
        def forward(self, x):
            raise RuntimeError("never runs")
    return Bad(), (torch.ones(1),)
"""


@pytest.fixture
def model(tmp_path) -> str:
    path = tmp_path / "net.py"
    path.write_text(MODEL)
    return f"{path}:make"


def run(*arguments: str, code: int = 0):
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr, result.exception)
    return result


def run_json(*arguments: str, code: int = 0):
    return json.loads(run(*arguments, "--json", code=code).stdout)


def error(*arguments: str) -> str:
    """The sentence of a command that must fail: one line on stderr, nothing else."""
    result = run(*arguments, code=2)
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ") and "Traceback" not in result.stderr and result.stdout == ""
    return line


# The machine.


def test_help_is_quick_and_lists_every_command() -> None:
    code = (
        "import runpy, sys\n"
        "sys.argv = ['tilewright', '--help']\n"
        "try: runpy.run_module('tilewright', run_name='__main__')\n"
        "except SystemExit: assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for command in ("doctor", "passes", "explain", "dump", "render", "cache", "demo"):
        assert command in done.stdout


def test_version() -> None:
    import tilewright

    assert run("--version").stdout == f"tilewright {tilewright.__version__}\n"


def test_doctor(monkeypatch) -> None:
    from tilewright.runtime import doctor

    facts = (
        doctor.Fact("torch", doctor.State.OK, "2.13"),
        doctor.Fact("GPU", doctor.State.LIMITED, "none", "install a CUDA build"),
    )
    monkeypatch.setattr(doctor, "examine", lambda on_fact=None: doctor.Diagnosis(facts))
    text = run("doctor").stdout
    assert "torch" in text and "install a CUDA build" in text
    assert run_json("doctor") == doctor.Diagnosis(facts).to_dict()
    broken = doctor.Diagnosis((doctor.Fact("triton", doctor.State.BROKEN, "missing", "pip install triton"),))
    monkeypatch.setattr(doctor, "examine", lambda on_fact=None: broken)
    assert "pip install triton" in run("doctor", code=1).stdout
    assert run_json("doctor", code=1)["ok"] is False


def test_cache(fresh_cache) -> None:
    from tilewright.runtime import load

    spec = KernelSpec.from_dict({"kind": "softmax"})
    assert run_json("cache", "status")["entries"] == 0
    assert "no kernels" in run("cache", "verify").stdout
    entry = load.build(spec, "triton-interpret")
    status = run_json("cache", "status")
    assert status["entries"] == 1 and status["by_kind"] == {"softmax": 1}
    assert "softmax 1" in run("cache", "status").stdout
    assert run_json("cache", "verify")["damaged"] == 0
    (entry / "kernel.py").write_text("changed")
    assert "damaged" in run("cache", "verify", code=1).stdout
    verified = run_json("cache", "verify", code=1)
    assert verified["damaged"] == 1 and verified["entries"][0]["problem"]
    assert run_json("cache", "clear", "--damaged")["entries"] == 1
    load.build(spec, "triton-interpret")
    assert "removed 1 kernels" in run("cache", "clear").stdout
    assert run_json("cache", "status")["entries"] == 0


# Passes and kernels.


def test_passes() -> None:
    rows = {row["name"]: row for row in run_json("passes")}
    assert set(rows) == set(PASSES)
    row = rows["sigmoid-attention"]
    assert row["exactness"] == "approximate" and row["options"][0]["default"] == "-log_n"
    text = run("passes").stdout
    assert all(name in text for name in PASSES) and "bias=-log_n" in text
    assert "Ramapuram" in run("passes", "sigmoid-attention").stdout
    assert "did you mean 'sigmoid-attention'" in error("passes", "sigmoid-atention")


def test_render_prints_the_kernel_and_nothing_else() -> None:
    spec = KernelSpec.from_dict({"kind": "softmax", "algorithm": "online", "in_dtype": "bfloat16"})
    text = render(spec, "triton")
    assert run("render", "softmax", "algorithm=online", "in_dtype=bfloat16").stdout == text
    assert run("render", "--spec", spec.to_json()).stdout == text
    data = run_json("render", "softmax", "algorithm=online", "in_dtype=bfloat16")
    assert data["text"] == text and KernelSpec.from_dict(data["spec"]) == spec


def test_render_from_and_to_files(tmp_path) -> None:
    spec = KernelSpec.from_dict({"kind": "attention", "normalizer": "sigmoid", "head_dim": 80})
    (tmp_path / "spec.json").write_text(spec.to_json())
    run("render", "--spec", str(tmp_path / "spec.json"), "value_dim=80", "-o", str(tmp_path / "k.py"))
    assert (tmp_path / "k.py").read_text() == render(
        KernelSpec.from_dict({**spec.to_dict(), "value_dim": 80}), "triton"
    )


def test_render_lists_kinds() -> None:
    assert {row["kind"] for row in run_json("render")} == {k for k in SPECS if "codegen" in SPECS[k].__module__}
    assert "head_dim=64" in run("render").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["softmaxx"], "did you mean 'softmax'"),
        (["softmax", "algorthm=online"], "did you mean 'algorithm'"),
        (["softmax", "algorithm=fast"], "algorithm is 'fast', but must be one of"),
        (["softmax", "num_warps=many"], "must be a number"),
        (["softmax", "log=1"], "must be true or false"),
        (["softmax", "online"], "'online' is no field=value"),
        (["softmax", "--target", "cuda"], "choose triton or cpp"),
        (["--spec", "{"], "--spec is no JSON"),
        (["--spec", "nowhere.json"], "neither JSON nor a file"),
        (["--spec", "{}"], "there is no kernel kind None"),
        (["softmax", "-o", "/nowhere/k.py"], "cannot write /nowhere/k.py"),
    ],
)
def test_render_errors(arguments, words) -> None:
    assert words in error("render", *arguments)


# Models.


def test_explain(model, tmp_path) -> None:
    page = tmp_path / "page.html"
    arguments = ["explain", model, "--passes", "sigmoid-attention,two-pass-softmax{force}", "--target", "reference"]
    text = run(*arguments, "--html", str(page)).stdout
    assert "sigmoid-attention" in text and "net.py:" in text and "rel " in text
    assert page.read_text().startswith("<!doctype html>")
    data = run_json(*arguments)
    assert [one["name"] for one in data["passes"]] == ["sigmoid-attention", "two-pass-softmax"]
    assert [len(one["matched"]) for one in data["passes"]] == [1, 1]
    assert Report.from_dict(data).to_dict() == data


def test_explain_calibrates(model) -> None:
    data = run_json("explain", model, "-p", "sigmoid-attention{bias=calibrated}", "--target", "reference")
    assert data["passes"][0]["options"]["bias"] == "calibrated" and len(data["passes"][0]["matched"]) == 1


def test_json_is_all_there_is_on_stdout_and_notes_go_to_stderr(model) -> None:
    result = run("explain", model, "--json")
    json.loads(result.stdout)
    assert all(line.startswith("note: ") for line in result.stderr.splitlines())


def test_dump(model, tmp_path) -> None:
    folder = tmp_path / "out"
    arguments = ["dump", model, "-o", str(folder), "-p", "sigmoid-attention", "--target", "triton-interpret"]
    text = " ".join(run(*arguments).stdout.split())
    assert "report.html" in text and "check.py" in text
    data = run_json(*arguments, "--backward")  # a previous dump is replaced
    assert any("attention_backward" in name for name in data["files"])
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == data["files"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    assert "not empty and no previous dump" in error("dump", "no-model", "-o", str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("passes", "words"),
    [
        ("sigmoid-atention", "did you mean 'sigmoid-attention'"),
        ("sigmoid-attention{bais=1}", "did you mean 'bias'"),
        ("sigmoid-attention,sigmoid-attention", "listed twice"),
    ],
)
def test_pass_errors(model, passes, words) -> None:
    assert words in error("explain", model, "-p", passes)


def test_strict(model) -> None:
    words = error("explain", model, "-p", "two-pass-softmax", "--target", "reference", "--strict")
    assert "strict: two-pass-softmax changed nothing" in words


def test_model_errors(tmp_path, model) -> None:
    assert "there is no file" in error("explain", str(tmp_path / "none.py") + ":make")
    assert "did you mean 'make'" in error("explain", model.replace(":make", ":mak"))
    assert "itself fails on the example inputs" in error("explain", model.replace(":make", ":broken"))


def test_errors_as_json(model) -> None:
    result = run("explain", model, "-p", "zzz", "--json", code=2)
    assert json.loads(result.stdout)["error"]["type"] == "UnknownPass"


def test_debug_shows_the_traceback() -> None:
    from tilewright.runtime.errors import UnknownPass

    result = CliRunner().invoke(app, ["--debug", "passes", "zzz"])
    assert isinstance(result.exception, UnknownPass)


def test_demo_gets_its_arguments(monkeypatch) -> None:
    from tilewright.frontend import demo

    seen = []
    monkeypatch.setattr(demo, "main", lambda arguments: seen.append(list(arguments)) or 3)
    run("demo", "--quick", "-o", "x", "--help", code=3)
    assert seen == [["--quick", "-o", "x", "--help"]]


def test_module_and_script_run_from_anywhere(tmp_path) -> None:
    command = [sys.executable, "-m", "tilewright", "render", "softmax"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == render(KernelSpec.from_dict({"kind": "softmax"}), "triton")
    script = Path(sys.executable).with_name("tilewright")
    if script.exists():
        done = subprocess.run([script, "passes", "zzz"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and done.stderr.startswith("error: there is no pass 'zzz'")
