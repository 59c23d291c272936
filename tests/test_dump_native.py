"""A dumped native kernel: it builds and checks itself in a process that has no tilewright."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from test_dump import folders, without_tilewright
from torch import Tensor, nn

import tilewright as tw
from tilewright.frontend.dump import dump
from tilewright.runtime import cpu


@pytest.fixture(scope="module")
def dumped(tmp_path_factory) -> Path:
    kwargs = {"input_ids": tiny.tokens()}
    compiled = tw.compile(tiny.llama().train(), example_kwargs=kwargs, rest="eager", target="cpp")
    return dump(compiled, tmp_path_factory.mktemp("dump") / "llama", backward=True)


def test_files(dumped) -> None:
    found = folders(dumped)
    assert {"attention", "attention_backward"} <= set(found)
    files = {"kernel.cpp", "launcher.py", "kernel.py", "spec.json", "inputs.safetensors", "call.json"}
    files |= {"reference.py", "check.py", "README.md"}
    for folder in found.values():
        assert {path.name for path in folder.iterdir()} == files
        assert "tilewright_launch" in (folder / "kernel.cpp").read_text()


def test_every_check_passes_without_tilewright(dumped) -> None:
    for kind, folder in folders(dumped).items():
        done = without_tilewright(folder)
        assert done.returncode == 0, f"{kind}: {done.stdout}{done.stderr}"
        assert done.stdout.startswith(f"ok {kind}-") and "(CPU, " in done.stdout


def test_a_check_for_another_instruction_set(dumped) -> None:
    done = without_tilewright(folders(dumped)["attention"], ISA=cpu.supported()[-1])
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wrong_kernel_fails_its_check(dumped, tmp_path) -> None:
    folder = shutil.copytree(folders(dumped)["attention"], tmp_path / "broken")
    call = json.loads((folder / "call.json").read_text())
    index = next(i for i, item in enumerate(call["launch"]) if isinstance(item, float))
    call["launch"][index] *= 1.5
    (folder / "call.json").write_text(json.dumps(call))
    done = without_tilewright(folder)
    assert done.returncode == 1 and done.stdout.startswith("FAILED attention-"), done.stdout + done.stderr


def test_without_a_compiler_the_check_says_what_to_install(dumped, tmp_path) -> None:
    done = without_tilewright(folders(dumped)["attention"], PATH=str(tmp_path), CXX="")
    assert done.returncode == 1 and "install g++ or clang++" in done.stderr


class _Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_the_kernels_that_choose_blocks_check_themselves(tmp_path) -> None:
    q, k, v = (torch.randn(1, 2, 100, 16) for _ in range(3))
    documents = tw.mask.documents([0] * 30 + [1] * 70)
    one = tw.passes.BlockSparseAttention(mask=documents, select="xattention(stride=8,threshold=0.7)", block_size=32)
    compiled = tw.compile(_Attention(), [one], (q, k, v), dynamic_shapes=[None] * 3, rest="eager", target="cpp")
    found = folders(dump(compiled, tmp_path / "sparse"))
    assert set(found) == {"attention", "attention_backward", "block_scores", "select_blocks"}
    for kind, folder in found.items():
        done = without_tilewright(folder)
        assert done.returncode == 0 and done.stdout.startswith(f"ok {kind}-"), f"{kind}: {done.stdout}{done.stderr}"
    assert "table" in (found["attention"] / "kernel.cpp").read_text()


@pytest.mark.parametrize("bits", [4, pytest.param(0, marks=pytest.mark.grid)])
def test_the_kernel_of_a_cache_checks_itself(bits, tmp_path) -> None:
    """It gets a store that holds the example's tokens."""
    passes: list = [tw.passes.KVCache(max_length=64)]
    passes += [tw.passes.QuantizeKV(bits=bits, group=16, window=16)] if bits else []
    kwargs = {"input_ids": tiny.tokens(2, 50)}
    compiled = tw.compile(tiny.llama(), passes=passes, example_kwargs=kwargs, rest="eager", target="cpp")
    folder = folders(dump(compiled, tmp_path / "cached"))["cached_attention"]
    done = without_tilewright(folder)
    assert done.returncode == 0 and done.stdout.startswith("ok cached_attention-"), done.stdout + done.stderr
    call = json.loads((folder / "call.json").read_text())
    lists = [item for item in call["launch"] if isinstance(item, list)]
    assert [len(item) for item in lists] == [0, 8 if bits else 2]
