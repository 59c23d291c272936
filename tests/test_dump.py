"""Dumps: importable graphs, kernels that check themselves where Tilewright is not installed, nothing disturbed."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tilewright as tw
from tilewright import errors
from tilewright.frontend.dump import dump
from tilewright.passes import SigmoidAttention, TwoPassSoftmax
from tilewright.runtime import load


class Block(nn.Module):
    """Causal attention through strided heads, so that kernels see inputs that are not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, 2, 16).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(attended.transpose(1, 2).reshape(batch, length, 32))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(32, 50)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x).softmax(-1)


def compiled_net(passes=(), **options):
    torch.manual_seed(0)
    x = torch.randn(2, 20, 32)
    options = {"rest": "eager", "target": "triton-interpret"} | options
    return tw.compile(Net().eval(), passes, (x,), **options), x


@pytest.fixture(scope="module")
def dumped(tmp_path_factory) -> Path:
    compiled, _ = compiled_net([SigmoidAttention(), TwoPassSoftmax(force=True)])
    return dump(compiled, tmp_path_factory.mktemp("dump") / "net", backward=True)


def without_tilewright(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run check.py in a fresh interpreter that cannot import tilewright."""
    block = "import sys; sys.modules['tilewright'] = None; sys.argv = ['check.py']; import runpy; "
    code = block + f"runpy.run_path({str(folder / 'check.py')!r}, run_name='__main__')"
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")} | environment
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=clean, cwd="/", timeout=300
    )


def folders(dumped: Path) -> dict[str, Path]:
    found = sorted(path for path in (dumped / "kernels").iterdir() if path.is_dir())
    return {path.name.split("-")[1]: path for path in found}


def test_files(dumped) -> None:
    names = {path.name for path in dumped.iterdir()}
    assert {"report.json", "report.txt", "report.html", "dump.json", "01_captured.py", "02_raised.py"} <= names
    assert {"03_sigmoid_attention.py", "04_two_pass_softmax.py", "05_lowered.py"} <= names
    assert list(folders(dumped)) == ["attention", "attention_backward", "softmax", "softmax_backward"]
    expected = {"kernel.py", "spec.json", "inputs.safetensors", "call.json", "reference.py", "check.py", "README.md"}
    for folder in folders(dumped).values():
        assert {path.name for path in folder.iterdir()} == expected
    report = json.loads((dumped / "report.json").read_text())
    assert [one["name"] for one in report["passes"]] == ["sigmoid-attention", "two-pass-softmax"]


def test_graphs_are_python_that_shows_each_stage(dumped) -> None:
    texts = {path.name[3:-3]: path.read_text() for path in dumped.glob("0*.py")}
    for text in texts.values():
        names = [node.name for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
        assert names == ["GraphModule"]
    assert "scaled_dot_product_attention" in texts["captured"] and "tilewright" not in texts["captured"]
    assert "torch.ops.tilewright.attention" in texts["raised"] and "sigmoid" not in texts["raised"]
    assert "normalizer = 'sigmoid'" in texts["sigmoid_attention"]
    assert "target = 'triton-interpret'" in texts["lowered"]
    assert "test_dump.py" in texts["captured"]  # the model's lines are there as comments


def test_graph_files_can_be_imported(dumped) -> None:
    code = "import runpy, sys\nfor p in sys.argv[1:]: assert 'GraphModule' in runpy.run_path(p)"
    files = [str(path) for path in sorted(dumped.glob("0*.py"))]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["attention", "attention_backward", "softmax", "softmax_backward"])
def test_check_passes_without_tilewright(dumped, kind) -> None:
    done = without_tilewright(folders(dumped)[kind])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"ok {kind}-") and done.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("kind", "line", "replacement"),
    [("softmax", "return out", "return out * 1.001"), ("attention", "return out, lse", "return out + 1e-3, lse")],
)
def test_check_fails_for_a_wrong_kernel(dumped, tmp_path, kind, line, replacement) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in folders(dumped)[kind].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    text = (folder / "kernel.py").read_text()
    start = text.index("def launch")
    changed = text[:start] + text[start:].replace(f"    {line}\n", f"    {replacement}\n")
    assert changed != text
    (folder / "kernel.py").write_text(changed)
    done = without_tilewright(folder)
    assert done.returncode == 1 and done.stdout.startswith(f"FAILED {kind}-"), done.stdout + done.stderr


def test_kernel_is_the_one_that_runs_and_names_its_sites(dumped) -> None:
    compiled, _ = compiled_net([SigmoidAttention(), TwoPassSoftmax(force=True)])
    use = next(use for use in compiled.kernels if use.op == "attention")
    folder = folders(dumped)["attention"]
    assert (folder / "kernel.py").read_text() == use.text
    assert json.loads((folder / "spec.json").read_text()) == use.spec.to_dict()
    readme = (folder / "README.md").read_text()
    assert "2 x layers.{0-1}/attention" in readme and "test_dump.py" in readme
    overview = (dumped / "kernels" / "README.md").read_text()
    assert "5 x linear" in overview  # what runs as its reference is listed


def test_backward_kernels_are_left_out_in_eval_mode(tmp_path) -> None:
    compiled, _ = compiled_net()
    compiled.dump(tmp_path / "d")
    assert list(folders(tmp_path / "d")) == ["attention", "softmax"]


def test_a_dump_changes_nothing(tmp_path) -> None:
    compiled, x = compiled_net([SigmoidAttention()])
    with torch.no_grad():
        before = compiled(x)
    state = {name: value.clone() for name, value in compiled.state_dict().items()}
    launches = {key: kernel.launch for key, kernel in load._kernels.items()}
    graph = str(compiled.records[0].lowered.code)
    rng = torch.get_rng_state()
    dump(compiled, tmp_path / "d", backward=True)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(load._kernels[key].launch is launch for key, launch in launches.items())
    assert str(compiled.records[0].lowered.code) == graph
    assert all(torch.equal(value, state[name]) for name, value in compiled.state_dict().items())
    assert all(parameter.grad is None for parameter in compiled.parameters())
    with torch.no_grad():
        assert torch.equal(compiled(x), before)


def test_folder_with_other_files_is_refused(tmp_path) -> None:
    compiled, _ = compiled_net(target="reference")
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(errors.BadArgument, match="not empty and no previous dump"):
        compiled.dump(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    compiled.dump(tmp_path, overwrite=True)
    assert (tmp_path / "mine.txt").read_text() == "keep" and (tmp_path / "report.json").exists()
    with pytest.raises(errors.BadArgument, match="is a file"):
        compiled.dump(tmp_path / "mine.txt")


def test_previous_dump_is_replaced_and_nothing_else(tmp_path) -> None:
    kernels, _ = compiled_net()
    plain, _ = compiled_net(target="reference")
    kernels.dump(tmp_path / "d")
    (tmp_path / "d" / "notes.txt").write_text("keep")
    outside = tmp_path / "outside.txt"
    outside.write_text("keep")
    marker = tmp_path / "d" / "dump.json"
    listed = json.loads(marker.read_text())
    listed["files"].append("../outside.txt")
    marker.write_text(json.dumps(listed))
    plain.dump(tmp_path / "d")
    assert not folders(tmp_path / "d")
    assert (tmp_path / "d" / "notes.txt").exists() and outside.exists()


def test_unwritable_place(tmp_path, monkeypatch) -> None:
    compiled, _ = compiled_net(target="reference")

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(errors.SaveError, match="No space left"):
        compiled.dump(tmp_path / "d")


def test_dynamo_door_uses_random_inputs_and_says_so(tmp_path, fresh_dynamo) -> None:
    torch.manual_seed(0)
    compiled = tw.compile(Net().eval(), [SigmoidAttention()], target="triton-interpret", rest="eager")
    with torch.no_grad():
        compiled(torch.randn(2, 12, 32))
    dump(compiled, tmp_path / "d")
    folder = folders(tmp_path / "d")["attention"]
    assert "random values of the captured shapes" in (folder / "README.md").read_text()
    done = without_tilewright(folder)
    assert done.returncode == 0, done.stdout + done.stderr


def test_half_precision_and_masks(tmp_path) -> None:
    class Masked(nn.Module):
        def forward(self, q, k, v, mask):
            return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 11, 16), torch.randn(2, 2, 11, 16)
    mask = (torch.rand(2, 1, 1, 11) < 0.7).expand(2, 1, 9, 11)
    inputs = (q.bfloat16(), k.bfloat16(), v.bfloat16(), mask)
    compiled = tw.compile(Masked().eval(), example_inputs=inputs, rest="eager", target="triton-interpret")
    dump(compiled, tmp_path / "d", backward=True)
    for folder in folders(tmp_path / "d").values():
        call = json.loads((folder / "call.json").read_text())
        bias = next(item for item in call["launch"] if isinstance(item, dict) and item["tensor"].startswith("bias"))
        assert 0 in bias["stride"]  # what is broadcast is stored once and broadcast again
        done = without_tilewright(folder)
        assert done.returncode == 0, done.stdout + done.stderr


def test_loaded_module_dumps_without_inputs(tmp_path) -> None:
    compiled, _ = compiled_net()
    loaded = tw.load(tw.save(compiled, tmp_path / "m"))
    loaded.dump(tmp_path / "d")
    assert (tmp_path / "d" / "01_lowered.py").exists()
    for folder in folders(tmp_path / "d").values():
        assert {path.name for path in folder.iterdir()} == {"kernel.py", "spec.json", "README.md"}
        assert "keeps none" in (folder / "README.md").read_text()


@pytest.mark.parametrize("target", ["cpp", "triton-interpret"])
def test_packed_weights(tmp_path, target) -> None:
    """A norm, two layers with 4-bit weights and a gate: one kernel, which runs without Tilewright."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.gate = nn.RMSNorm(64, eps=1e-6), nn.Linear(64, 48), nn.Linear(64, 48)

        def forward(self, x):
            x = self.norm(x)
            return nn.functional.silu(self.gate(x)) * self.up(x)

    torch.manual_seed(0)
    x = torch.randn(3, 64)
    passes = [tw.passes.Quantize(bits=4, group_size=32)]
    compiled = tw.compile(Gated().eval(), passes, example_inputs=(x,), rest="eager", target=target)
    dump(compiled, tmp_path / "d")
    packed = [folder for name, folder in folders(tmp_path / "d").items() if "quantized_linear" in name]
    assert len(packed) == 1
    done = without_tilewright(packed[0])
    assert done.returncode == 0, done.stdout + done.stderr
