"""The study of caches: its probes are what they say, and its page is made from its JSON."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch

from tilewright.benchmarks import kv_pages, kv_quality
from tilewright.codegen.cache_format import CacheFormat
from tilewright.passes.parse import parse_passes
from tilewright.runtime.kv_cache import CacheSite


class Letters:
    """A tokenizer of one token a character, so that the probe can be read back."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


def study(tmp_path: Path, length: int) -> kv_quality.Study:
    loaded: Any = types.SimpleNamespace(tokenizer=Letters(), model=None)
    return kv_quality.Study(tmp_path, loaded, length=length, sequences=2)


def test_the_needle_stands_at_its_depth_and_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_quality, "PAIRS", (("Alice", " banana"), ("Peter", " castle")))
    prompts = study(tmp_path, length=2048).prompts()
    assert [depth for depth, *_ in prompts] == list(kv_quality.DEPTHS)
    for depth, text, asked, answer in prompts:
        assert text.shape[1] + asked.shape[1] == 2048
        for row, (who, word) in enumerate(kv_quality.PAIRS):
            read = "".join(map(chr, text[row].tolist()))
            planted = f"The special keyword of {who} is{word}."
            assert read.count(planted) == 1 and abs(read.index(planted) / 2048 - depth) < 0.05
            assert "".join(map(chr, asked[row].tolist())).endswith(f"keyword of {who} is")
            assert "".join(map(chr, answer[row].tolist())) == word


def test_every_token_is_fed_once_and_compared_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A feed that answers with the truth loses nothing to it, and its loss is the sum over all tokens but the first."""
    one = study(tmp_path, length=44)
    one.__dict__["text"] = ids = torch.arange(88).reshape(2, 44) % 7
    logs = torch.randn(44, 2, 7, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    torch.save(logs[:: kv_quality.EVERY].clone(), one.truth)
    counts = []

    def feed(part: torch.Tensor) -> torch.Tensor:
        at = sum(counts)
        counts.append(part.shape[1])
        assert torch.equal(part, ids[:, at : at + part.shape[1]])
        return logs[at : at + part.shape[1]].transpose(0, 1)

    monkeypatch.setattr(one, "feed_of", lambda compiled: feed)
    found = one.decode(None)
    assert counts == [16, 8, 8, 8, 4]
    assert found["same"] == found["compared"] == 2 * 11 and abs(found["kl"]) < 1e-5
    wanted = sum(-logs[t, b, ids[b, t + 1]].item() for b in range(2) for t in range(43))
    assert found["tokens"] == 2 * 43 and found["loss"] == pytest.approx(wanted, rel=1e-5)


def test_bytes_are_counted_apart_from_what_does_not_grow() -> None:
    form = CacheFormat(bits_k=4, group=64, window=64)
    site = CacheSite("a", form.text(), 3, 64, 3, 64, torch.float32)
    compiled = types.SimpleNamespace(
        new_cache=lambda: types.SimpleNamespace(owner=types.SimpleNamespace(sites=(site,) * 2))
    )
    assert kv_quality.sizes(compiled) == {
        "key_bytes": 2 * 192 * (0.5 + 4 / 64),
        "value_bytes": 2 * 192 * 2,
        "key_constant": 2 * 128 * 192 * 2,
        "value_constant": 0,
    }


def test_the_page() -> None:
    rows = [
        kv_quality.summary(kv_quality.SETTINGS[0], {"decode": part(100.0)}),
        kv_quality.summary(kv_quality.SETTINGS[1], {"decode": part(100.0, 4), "bytes": sizes(100)}),
        kv_quality.summary(
            kv_quality.SETTINGS[3],
            {
                "decode": part(101.0, 4),
                "bytes": sizes(25),
                "needle": {"needles": [{"depth": 0.1, "rank": 1, "log": -0.5, "exact": True}]},
            },
        ),
    ]
    known = {"model": "m", "sequences": 1, "length": 101, "step": 8, "prompt": 16, "device": "d", "date": "2026-01-02T"}
    text = kv_pages.quality(known | {"rows": rows, "versions": {"torch": "2"}})
    line = next(line for line in text.splitlines() if line.startswith("| 4 bits"))
    for cell in ("2.746 (+1.01 %)", "4.0; 4.0", "1 of 1", "-0.50", "0.50000", "75.0%"):
        assert f"| {cell} |" in line, (cell, line)
    assert "8 tokens a call after 16" in text


def part(loss: float, compared: int = 0) -> dict[str, Any]:
    return {"loss": loss, "tokens": 100, "kl": 2.0, "same": 3, "compared": compared, "seconds": 1.0}


def sizes(each: float) -> dict[str, float]:
    return {"key_bytes": each, "value_bytes": each, "key_constant": 0.0, "value_constant": 0.0}


def test_every_setting_can_be_read() -> None:
    names = [setting.name for setting in kv_quality.SETTINGS]
    files = {setting.file for setting in kv_quality.SETTINGS}
    assert len(files) == len(set(names)) == len(names)
    for setting in kv_quality.SETTINGS[1:]:
        assert parse_passes(setting.passes)
