"""CPU sites on native kernels: which are taken, how they are built, what is said when they cannot be."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
import tiny
import torch
from rich.console import Console

import tilewright as tw
from tilewright.frontend import progress
from tilewright.passes import TwoPassSoftmax
from tilewright.runtime import cpu, load, memory, settings
from tilewright.runtime.errors import TilewrightWarning


def kernels(compiled) -> dict[str, str]:
    """op -> target, or for a reference form its reason."""
    return {row.op: row.target if row.digest else row.reason for row in compiled.report.kernels}


def test_auto_takes_the_native_kernels(fresh_cache) -> None:
    model = tiny.llama()
    ids = tiny.tokens()
    compiled = tw.compile(model, example_kwargs={"input_ids": ids}, rest="eager")
    found = kernels(compiled)
    assert found["attention"] == found["rms_norm"] == found["rope"] == found["linear_fused"] == "cpp"
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits, atol=2e-4, rtol=2e-4)
        more = tiny.tokens(3, 19, seed=1)
        torch.testing.assert_close(compiled(input_ids=more).logits, model(input_ids=more).logits, atol=2e-4, rtol=2e-4)


def test_auto_leaves_to_inductor_what_it_fuses(fresh_cache) -> None:
    compiled = tw.compile(tiny.llama(), example_kwargs={"input_ids": tiny.tokens()})
    found = kernels(compiled)
    assert found["attention"] == "cpp" and found["rope"].startswith("Inductor fuses so small a rope")
    many = {"input_ids": tiny.tokens(32, 128)}  # 2^17 numbers in the queries, half as many in the keys
    assert kernels(tw.compile(tiny.llama(), example_kwargs=many))["rope"] == "cpp"
    asked = tw.compile(tiny.llama(), example_kwargs={"input_ids": tiny.tokens()}, target="cpp")
    assert kernels(asked)["rope"] == "cpp"


def test_auto_leaves_linear_layers_to_torch_without_amx(fresh_cache) -> None:
    with settings.override(cpu_isa=cpu.supported()[-1]):
        found = kernels(tw.compile(tiny.llama(), example_kwargs={"input_ids": tiny.tokens()}))
    assert found["attention"] == "cpp" and found["linear_fused"].startswith("without AMX tiles")


def test_what_the_policy_leaves_is_not_warned_about(fresh_cache, recwarn) -> None:
    tw.compile(tiny.llama(), example_kwargs={"input_ids": tiny.tokens()})
    assert not [w for w in recwarn if issubclass(w.category, TilewrightWarning) and "rope" in str(w.message)]


def test_without_a_compiler_the_reference_runs_and_says_so(fresh_cache, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    model, x = torch.nn.Softmax(-1), torch.randn(4, 5000)
    with pytest.warns(TilewrightWarning, match="softmax run in their reference form: there is no .*CXX"):
        compiled = tw.compile(model, [TwoPassSoftmax()], (x,), rest="eager")
    assert kernels(compiled)["softmax"].startswith("there is no C++ compiler")
    torch.testing.assert_close(compiled(x), model(x))


def test_a_second_process_builds_nothing(fresh_cache) -> None:
    code = """
import torch, tilewright as tw
import tiny
compiled = tw.compile(tiny.llama(), example_kwargs={"input_ids": tiny.tokens()}, rest="eager", target="cpp")
print(sum(1 for row in compiled.report.kernels if row.target == "cpp"))
"""
    from runtime_toy import environment

    def run(**extra: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            capture_output=True,
            text=True,
            env=environment(fresh_cache, **extra),
            timeout=300,
        )

    first = run()
    second = run(TILEWRIGHT_NO_BUILD="1")
    assert first.returncode == 0, first.stderr
    assert second.returncode == 0, second.stderr
    assert int(first.stdout) > 0 and first.stdout == second.stdout


def test_the_progress_bar_counts_the_kernels(fresh_cache, monkeypatch) -> None:
    shown = io.StringIO()
    shown.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr("rich.console.Console", lambda **_: Console(file=shown, force_terminal=True, width=80))
    spec = tw.compile(torch.nn.Softmax(-1), [TwoPassSoftmax()], (torch.randn(4, 5000),), rest="eager").kernels[0].spec
    assert "building kernels" in shown.getvalue() and "1/1" in shown.getvalue()
    before = len(shown.getvalue())
    assert progress.build_kernels([(spec, "cpp")]) == {} and len(shown.getvalue()) == before


@pytest.mark.parametrize("door", ["export", "dynamo"])
def test_the_graphs_memory_from_the_pool(fresh_cache, door) -> None:
    assert memory.prepare()
    model = torch.nn.Sequential(torch.nn.Linear(512, 1024), torch.nn.ReLU())
    x = torch.randn(512, 512)
    given = {"example_inputs": (x,)} if door == "export" else {}
    compiled = tw.compile(model, memory="pool", rest="eager", **given)
    with torch.no_grad():
        want = model(x)
        compiled(x)
        before = memory.statistics().reused
        torch.testing.assert_close(compiled(x), want)
        assert memory.statistics().reused > before
        plain = memory.statistics().reused
        torch.empty(1 << 20)
        assert memory.statistics().reused == plain


def test_memory_is_checked() -> None:
    from tilewright.runtime.errors import BadArgument

    with pytest.raises(BadArgument, match="memory is 'heap', but must be one of system, pool"):
        tw.compile(torch.nn.ReLU(), memory="heap")


def test_loaded_kernels_are_not_built_again(fresh_cache) -> None:
    x = torch.randn(4, 5000)
    first = tw.compile(torch.nn.Softmax(-1), [TwoPassSoftmax()], (x,), rest="eager")
    assert load.is_loaded(first.kernels[0].spec, "cpp")
