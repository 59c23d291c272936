"""The block_sparse suite computes what it says, and the study of quality adds up and goes on where it stopped."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmark_tools import record
from test_benchmark_suites import right, spoiled, states

from tilewright.benchmarks import sparse_pages, sparse_quality
from tilewright.benchmarks.record import Entry, Kind, Row, State
from tilewright.benchmarks.sparse_quality import CAUSAL, DENSE, Setting, Study
from tilewright.benchmarks.suites import block_sparse
from tilewright.runtime.ops import attention
from tilewright.runtime.ops.block_lists import block_lists

FLOAT32 = torch.float32


@pytest.mark.parametrize("kind", ["window", "sinks", "documents", "prefix"])
def test_a_static_mask_is_the_same_for_kernels_and_peers(kind: str) -> None:
    length = 700
    mask, x = block_sparse.static(kind, length), torch.zeros(1, 1, length, 1)
    rows, columns = torch.arange(length)[:, None], torch.arange(length)
    wanted = mask.visible(rows, columns)
    seen = attention.visible_pairs(x, x, mask.text, mask.table)
    assert seen is not None and torch.equal(seen.expand(1, 1, length, length)[0, 0], wanted)
    assert int(wanted.sum()) == block_sparse.visible_pairs(kind, length)


@pytest.mark.parametrize("percent", [50, 6])
def test_random_lists_have_the_density_asked_for(percent: int) -> None:
    states_of = block_sparse.random_lists(3, 4000, percent)
    count = states_of.shape[-1]
    causal = torch.ones(count, count).tril().bool()
    assert not (states_of[..., ~causal] > 0).any() and (states_of.diagonal(dim1=2, dim2=3) == 1).all()
    kept = (states_of > 0).double().sum((-1, -2)) / causal.sum()
    # Each row has its diagonal, which is more than 6 % of the first rows.
    torch.testing.assert_close(kept, torch.full_like(kept, percent / 100), atol=0.03, rtol=0)


def without_peers(problem):
    problem.contenders = [c for c in problem.contenders if not c.name.startswith(("flex", "sparse"))]
    return problem


def test_static_masks_and_lists_are_checked() -> None:
    one = without_peers(block_sparse.static_problem("window", 600, FLOAT32, with_dense=False))
    right(one, "ours")
    assert states(spoiled(one, "ours"))["ours"].state is State.WRONG
    assert one.flops == 4 * 8 * 64 * block_sparse.visible_pairs("window", 600)
    one = block_sparse.lists_problem(900, 25, FLOAT32)
    right(one, "ours", "sdpa")
    assert states(spoiled(one, "ours"))["ours"].state is State.WRONG


def test_peak_memory_counts_what_a_call_touches() -> None:
    size = 64 * 2**20
    # A system short of memory may take pages from the process meanwhile, which hides what a call adds.
    found = max(block_sparse.peak_memory(lambda: torch.ones(size // 4).add_(1)) for _ in range(3))
    assert 0.9 * size < found < 1.5 * size


def test_topics_are_what_blocks_attend_to() -> None:
    q, k, _ = block_sparse.topical(1, 2048, FLOAT32)
    weights = (q @ k.transpose(-1, -2) / 8).softmax(-1)
    tiles = weights.reshape(16, 128, 16, 128).mean(1).sum(-1)
    assert ((tiles > 0.02).sum(-1) <= 6).all() and tiles.diagonal().mean() > 0.2


# The study of quality


def test_densities_and_what_dense_means() -> None:
    q = torch.zeros(1, 2, 1024, 16)
    named = {"q": q, "k": q, "mask": f"({CAUSAL}) & (q_idx - k_idx < 128)", "block_q": 0, "block_k": 0}
    assert sparse_quality.density(named) == pytest.approx(15 / 36)
    assert sparse_quality.dense(named) == named | {"mask": CAUSAL}
    tiles = torch.eye(16, dtype=torch.uint8).expand(1, 2, 16, 16)
    counts, indices = block_lists(tiles)
    named |= {"counts": counts, "indices": indices, "block_q": 64, "block_k": 64, "table": None, "mask": CAUSAL}
    assert sparse_quality.density(named) == pytest.approx(16 / 136)
    assert sparse_quality.dense(named)["counts"] is None
    moved = named | {"table": torch.arange(1024, dtype=torch.int32), "mask": "table(k_idx) <= q_idx"}
    whole = sparse_quality.dense(moved)
    assert whole["mask"] == moved["mask"] and (whole["counts"] == 16).all()


def fake_study(work: Path) -> Study:
    """A vocabulary of 7, hidden states that are the tokens' one-hot vectors, a head that is the identity."""
    head = SimpleNamespace(weight=torch.eye(7) * 3, bias=None)
    study = Study(work, SimpleNamespace(model=SimpleNamespace(lm_head=head)), length=40)
    study.texts = lambda: [torch.arange(40)[None] % 7 for _ in range(sparse_quality.SEQUENCES)]
    study.needle = lambda depth: (torch.tensor([[1, 2, 3]]), 3)
    study.backbone = lambda ids: torch.nn.functional.one_hot(ids, 7).float()
    return study


def test_losses_and_divergence_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_quality, "SLICE", 16)
    study = fake_study(tmp_path)
    ids = study.texts()[1]
    dense_logs = (3 * study.backbone(ids)[0]).log_softmax(-1)
    dense = study.measure(study.backbone, "text1")
    wanted = -dense_logs[torch.arange(39), ids[0, 1:]].sum().item()
    assert dense["loss"] == pytest.approx(wanted, rel=1e-5) and dense["tokens"] == 39
    assert dense["kl"] == pytest.approx(0, abs=1e-6) and dense["same"] == dense["compared"] == 10
    other = study.measure(lambda ids: 2 * study.backbone(ids).roll(1, -1), "text1")
    logs = (6 * study.backbone(ids)[0].roll(1, -1)).log_softmax(-1)[::4]
    truth = dense_logs[::4]
    assert other["kl"] == pytest.approx((truth.exp() * (truth - logs)).sum().item(), rel=1e-5)
    assert other["same"] == 0
    assert study.measure(study.backbone, "needle0")["rank"] == 1


def test_a_stopped_study_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study, done = fake_study(tmp_path), []
    study.forward_of = lambda setting: done.append(setting.name) or study.backbone
    other = Setting("other", "a=1", {"select": "xattention"})
    assert not study.run((DENSE, other), ("text0", "needle1"), seconds=-1.0) and not done
    assert study.run((DENSE,), ("text0", "needle1"), seconds=math.inf) and done == ["dense"]
    assert study.run((DENSE, other), ("text0", "needle1"), seconds=math.inf) and done == ["dense", "other a=1"]
    data = json.loads(json.dumps(study.collect((DENSE, other))))
    first, second = data["rows"]
    assert first["density"] == 1.0 and second["setting"] == "a=1"
    assert first["perplexity"] == second["perplexity"] and first["found"] == 1 and first["sequences"] == 1
    table = sparse_pages.quality(data)
    assert "| other | a=1 |" in table and "1 of 4" in table
    sparse_pages.draw(data, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


# The tables


def row(name: str, note: str, params: dict | None = None, **seconds: float) -> Row:
    entries = [Entry(key.replace("_", "+"), Kind.OURS, State.OK, seconds=[value]) for key, value in seconds.items()]
    own = "selection" if name.startswith("select") else "ours"
    return Row(name, params or {}, own, entries, note=note)


def test_tables_hold_the_goals_figures() -> None:
    one = record(
        rows=[
            row("window/float32/8192", "density 0.0625", flex=3.0, flex_mask=6.0, ours=1.5, dense=20.0),
            row("lists/float32/8192/25%", "density 0.2500; 8 heads", sdpa=16.0, ours=5.0),
            row("select/pbs/float32/8192", "pbs(); keeps 0.1", sdpa=30.0, dense=20.0, selection=2.0, sparse=5.0),
            row("long/bfloat16/65536", "1.00 times", {"length": 65536}, ours=0.065536),
        ]
    )
    assert "| window/float32/8192 | 6.2% | 1.50 s | 2.00x (2.00-2.00) | 4.00x (4.00-4.00) | 1.20 |" in (
        sparse_pages.static_table(one)
    )
    assert "| float32/8192/25% | 5.00 s | 3.20x (3.20-3.20) | 0.80 |" in sparse_pages.lists_table(one)
    assert "| pbs/float32/8192 | 2.00 s | 10% | 7% | 4.00x (4.00-4.00) | keeps 0.1 |" in (
        sparse_pages.selector_table(one)
    )
    assert "| bfloat16/65536 | 65.5 ms | 1000 | 1.00 times |" in sparse_pages.long_table(one)
