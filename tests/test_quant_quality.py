"""The study of low-bit weights: its measures are what they say, it can be resumed, and its page comes from its JSON."""

from __future__ import annotations

import math
import types
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from tilewright.benchmarks import quant_pages, quant_peers, quant_quality
from tilewright.benchmarks.quant_quality import PLAIN, Budget, Part, Setting, Study
from tilewright.passes.parse import parse_passes

FOUR = Setting("4 bits, groups of 64", 4, 64)


class Letters:
    """A tokenizer of one token a character."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % 7 for c in text]}


class Table(nn.Module):
    """Logits that depend on the token alone. shift: added to those of token 0."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.logits = torch.randn(7, 7, generator=torch.Generator().manual_seed(0))
        self.logits[:, 0] += shift

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        return types.SimpleNamespace(logits=self.logits[input_ids])


def study(tmp_path: Path, **given: Any) -> Study:
    loaded: Any = types.SimpleNamespace(tokenizer=Letters(), model=Table(), kind="causal-lm")
    return Study(tmp_path, length=16, sequences=2, load=lambda name: loaded, **given)


def test_text_is_measured_against_the_model_itself(tmp_path: Path) -> None:
    one = study(tmp_path)
    plain = one.measure(Part("smollm2", None, PLAIN), Table())
    same = one.measure(Part("smollm2", FOUR, "rtn"), Table())
    assert same["perplexity"] == plain["perplexity"] and same["top1"] == 1 and abs(same["kl"]) < 1e-6
    other = one.measure(Part("smollm2", FOUR, "rtn"), Table(9.0))
    ids = torch.cat(quant_quality.token_blocks(Letters(), 2, 16))
    p, q = Table().logits.log_softmax(-1), Table(9.0).logits.log_softmax(-1)
    assert other["top1"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1))[ids].float().mean()))
    kl = (p.exp() * (p - q)).sum(-1)[ids[:, :: quant_quality.EVERY]]
    assert other["kl"] == pytest.approx(float(kl.mean()), rel=1e-4)
    loss = -q[ids[:, :-1], ids[:, 1:]].mean()
    assert other["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_ranking_is_the_share_of_neighbours_that_stay() -> None:
    angles = torch.tensor([0.0, 0.1, 0.25, 1.5, 1.6])
    rows = torch.stack([angles.cos(), angles.sin()], 1)
    assert quant_quality.ranking(rows, rows, 1) == 1
    moved = angles.clone()
    moved[1] = 1.42  # now nearest to the fourth, and no longer to the first
    other = torch.stack([moved.cos(), moved.sin()], 1)
    # Nearest before: 1, 0, 1, 4, 3; after: 2, 3, 0, 1, 3.
    assert quant_quality.ranking(rows, other, 1) == pytest.approx(0.2)


def test_parts_are_kept_and_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def compiled(self: Study, part: Part) -> tuple[Any, dict[str, Any]]:
        done.append(part.method)
        if part.method == "torchao":
            raise quant_peers.Unavailable("not here")
        return Table(), {"calibration_seconds": 1.0}

    monkeypatch.setattr(Study, "compiled", compiled)
    wanted = [Part("smollm2", None, PLAIN), Part("smollm2", FOUR, "rtn"), Part("smollm2", FOUR, "torchao")]
    one = study(tmp_path)
    assert not one.run(wanted, seconds=-1) and not done
    assert one.run(wanted[:2], seconds=math.inf) and one.run(wanted, seconds=math.inf)
    assert done == [PLAIN, "rtn", "torchao"]
    rows = one.collect()["rows"]
    assert [row["method"] for row in rows] == done
    assert rows[2]["unavailable"] == "not here" and rows[1]["top1"] == 1


def test_budgets() -> None:
    budget = Budget.parse("200,awq=60")
    assert budget.of("ostquant{steps=3}") == 200 and budget.of("awq{clip=false}") == 60
    assert Budget.parse("").of("awq") == quant_quality.BUDGET
    for text in ("x", "awq=0", "1,2", "awq=-3"):
        with pytest.raises(ValueError):
            Budget.parse(text)


def test_every_part_can_be_read_and_has_a_file_of_its_own() -> None:
    found = quant_quality.parts()
    assert len({part.file for part in found}) == len({part.name for part in found}) == len(found)
    for part in found:
        if part.setting is not None and part.method not in quant_peers.PEERS:
            assert parse_passes(f"quantize{{{part.setting.options},method={part.method},seed=0,seconds=5}}")


def test_peers_say_why_they_have_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchao.quantization", "llmcompressor"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    for peer in quant_peers.PEERS.values():
        with pytest.raises(quant_peers.Unavailable, match="not installed"):
            peer(nn.Linear(4, 4), 4, 64, None, ())


def test_llm_compressor_rounds_a_copy() -> None:
    pytest.importorskip("llmcompressor")
    model = tiny.llama()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    batches = [{"input_ids": tiny.tokens(1, 40, seed=seed)} for seed in range(4)]
    made = quant_peers.llm_compressor(model, 4, 16, None, batches)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    found = made.model.layers[0].mlp.up_proj.weight.unflatten(1, (-1, 16))
    assert all(len(group.unique()) <= 16 for group in found.reshape(-1, 16))
    assert not torch.equal(made.model.layers[0].mlp.up_proj.weight, before["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(made.lm_head.weight, before["lm_head.weight"])


def test_the_page() -> None:
    rows = [
        {"model": "smollm2", "setting": PLAIN, "method": PLAIN, "perplexity": 13.0},
        row("rtn", 20.0, 0.5),
        row("awq", 15.0, 0.25) | {"calibration_seconds": 61.0, "budget": 60, "stopped_early": True},
        row("qvlm", 1e6, 0.75),
        {"model": "smollm2", "setting": FOUR.name, "method": "torchao", "unavailable": "not installed"},
        {"model": "minilm", "setting": "W8A8", "method": "rtn", "cosine": 0.99, "least_cosine": 0.9, "ranking": 0.8},
    ]
    known = {"sequences": 8, "length": 1024, "every": 4, "sentences": 128, "nearest": 10, "seed": 0, "threads": "2"}
    text = quant_pages.quality(known | {"device": "d", "date": "2026-01-02T", "versions": {"torch": "2"}, "rows": rows})
    lines = {line.split("|")[2].strip(): line for line in text.splitlines() if line.startswith("| 4 bits")}
    for cell in ("15.00", "0.2500", "50.0%", "61 s, cut off", "yes"):
        assert f"| {cell} |" in lines["awq"], (cell, lines["awq"])
    assert "| no |" in lines["qvlm"] and "| 1.0e+06 |" in lines["qvlm"]
    assert (
        "| 0.99000 | 0.90000 | 80.0% |" in text and "No result of torchao, 4 bits, groups of 64: not installed" in text
    )


def row(method: str, perplexity: float, kl: float) -> dict[str, Any]:
    return {"model": "smollm2", "setting": FOUR.name, "method": method, "perplexity": perplexity, "kl": kl, "top1": 0.5}
