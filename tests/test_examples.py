"""The examples run, and do what their pages say."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

import tilewright as tw
from tilewright.passes import Exactness
from tilewright.passes.parse import parse_passes

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_custom_pass_changes_the_scale() -> None:
    module = load("custom_pass")
    torch.manual_seed(0)
    model, x = module.TinyModel().eval(), torch.randn(3, 7, 32)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    compiled = tw.compile(
        model,
        passes=[module.AttentionTemperature(1.5)],
        example_inputs=(x,),
        target="reference",
        rest="eager",
        strict=True,
    )
    q, k, v = model.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=8**-0.5 / 1.5)
    expected = model.out(mixed.transpose(1, 2).flatten(2))
    # float32 attention over at most 7 keys of 8 channels, and a dot product of 32: well below 100 roundings of 2^-24.
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(compiled(x), model(x), atol=1e-4)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    (row,) = compiled.report.to_dict()["passes"]
    assert row["name"] == "attention-temperature" and row["exactness"] == Exactness.APPROXIMATE.value
    assert len(row["matched"]) == 1 and row["matched"][0]["error"]["rel_l2"] > 1e-3


def test_custom_pass_is_short_and_checks_its_option() -> None:
    lines = (EXAMPLES / "custom_pass.py").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("@dataclass"))
    end = next(i for i, line in enumerate(lines) if line.startswith("class TinyModel"))
    assert end - start <= 30
    with pytest.raises(tw.errors.BadPassOption, match="above 0"):
        load("custom_pass").AttentionTemperature(0.0)


def test_custom_pass_from_the_command_line_text() -> None:
    (one,) = parse_passes(f"{EXAMPLES / 'custom_pass.py'}:AttentionTemperature{{temperature=1.5}}")
    assert one.name == "attention-temperature" and one.options() == {"temperature": 1.5}


def test_custom_pass_script_prints_the_report() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "custom_pass.py")], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "attention-temperature" in done.stdout and "approximate" in done.stdout.lower()


def test_sigmoid_model_learns(tmp_path: Path) -> None:
    """A short run: from the uniform level to well below it, for both, from the same first batch."""
    module = load("train_sigmoid_attention")
    result = module.run(steps=60, batch=8, context=32)
    assert result["uniform"] == pytest.approx(math.log(103), abs=0.5)
    for name in ("softmax", "sigmoid"):
        losses = torch.tensor(result[name]["losses"])
        assert losses.isfinite().all()
        assert float(losses[0]) == pytest.approx(result["uniform"], abs=0.5), "untrained models guess"
        assert float(losses[-10:].mean()) < 3.1, f"{name} is at {float(losses[-10:].mean()):.2f} after 60 steps"
    assert result["softmax"]["losses"] != result["sigmoid"]["losses"]
    picture = tmp_path / "loss.png"
    module.plot(result, picture)
    assert picture.stat().st_size > 10_000


def test_training_moves_the_users_weights() -> None:
    """compile() shares the weights: gradients through the sigmoid graph reach every parameter of the model."""
    module = load("train_sigmoid_attention")
    model = module.CharacterModel(vocabulary=11, context=12, width=16, heads=2, layers=2).train()
    tokens = torch.randint(11, (3, 12), generator=torch.Generator().manual_seed(0))
    compiled = tw.compile(
        model,
        passes=[tw.passes.SigmoidAttention()],
        example_inputs=(tokens,),
        target="reference",
        rest="eager",
        strict=True,
    )
    assert len(compiled.report.to_dict()["passes"][0]["matched"]) == 2
    compiled(tokens).square().mean().backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in model.parameters())
