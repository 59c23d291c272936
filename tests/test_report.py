"""The report as data and as text: exact keys, JSON without NaN, one screen of 100 columns."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
from rich.console import Console

from tilewright.frontend.report import (
    STAGES,
    CaptureReport,
    DeclinedSite,
    KernelReport,
    MatchedSite,
    ModelError,
    NearMissSite,
    PassReport,
    RaisingReport,
    Report,
    SiteError,
    json_safe,
    number,
    worst_error,
)
from tilewright.frontend.report_print import group_sites, plain


def sample(layers: int = 30) -> Report:
    """A report of a model of many equal layers, with every kind of row."""
    site = "model.layers.{}.self_attn/attention"
    line = "/lib/modeling_llama.py:212"
    kernel = "attention-1a2b3c4d"
    matched = [
        MatchedSite(
            site.format(i), line, kernel, SiteError(1e-3 * i, 1e-4 * i, 90.0 - i), {"bias": "-log_n", "none": None}
        )
        for i in range(layers)
    ]
    declined = [
        DeclinedSite(f"model.layers.{i}.mlp/softmax", f"rows of softmax_{i} fit in cache", line) for i in range(layers)
    ]
    near = [NearMissSite("head/softmax", "mul_3", "the constant is 0.5, the pattern asks for 0.125")]
    spec = {"kind": "attention", "head_dim": 64}
    used = [
        KernelReport(kernel, "attention", "attention", site.format(i), "triton", "1a2b3c4d" * 8, spec)
        for i in range(layers)
    ]
    fallen = [
        KernelReport("", "", "linear", f"l.{i}/linear", "reference", reason="no kernel for linear") for i in range(4)
    ]
    return Report(
        [
            PassReport("sigmoid-attention", "approximate", {"bias": "-log_n"}, matched),
            PassReport("two-pass-softmax", "reassociated", {}, [], declined, near),
        ],
        ModelError(
            0.5,
            0.25,
            12.0,
            kl=0.01,
            top1_agreement=0.98,
            perplexity_before=13.44,
            perplexity_after=15.2,
            tokens_worse=0.5,
        ),
        used + fallen,
        CaptureReport("dynamo", 2, 2217, [{"source": "a.py:3", "reason": "print"}], "export refused"),
        dict.fromkeys(STAGES, 0.5),
        RaisingReport([{"site": "a/attention", "op": "attention", "source": "x:1"}]),
        ["a warning"],
        "Model",
    )


def test_dict_has_the_documented_keys() -> None:
    data = sample().to_dict()
    assert {"passes", "model_error", "kernels", "capture", "seconds"} <= set(data)
    assert {"name", "exactness", "matched", "declined", "near_misses"} <= set(data["passes"][0])
    assert {"site", "source", "kernel", "error"} <= set(data["passes"][0]["matched"][0])
    assert set(data["passes"][0]["matched"][0]["error"]) == {"max_abs", "rel_l2", "sqnr_db"}
    assert {"site", "reason"} <= set(data["passes"][1]["declined"][0])
    assert {"site", "stopped_at", "reason"} <= set(data["passes"][1]["near_misses"][0])
    assert {"door", "graphs", "nodes", "graph_breaks"} <= set(data["capture"])
    assert set(data["seconds"]) == set(STAGES) == {"capture", "raise", "rewrite", "validate", "lower", "build"}


def test_empty_report_has_the_same_keys() -> None:
    empty, full = Report().to_dict(), sample().to_dict()
    assert set(empty) == set(full)
    assert empty["model_error"] is None
    assert set(Report(seconds={"capture": 1.0}).to_dict()["seconds"]) == set(STAGES)


def test_infinities_and_nan_are_texts_that_float_reads() -> None:
    report = sample(1)
    report.passes[0].matched[0].error = SiteError(math.nan, math.inf, -math.inf)
    error = json.loads(json.dumps(report.to_dict(), allow_nan=False))["passes"][0]["matched"][0]["error"]
    assert error == {"max_abs": "nan", "rel_l2": "inf", "sqnr_db": "-inf"}
    assert number(error["rel_l2"]) == math.inf and math.isnan(number(error["max_abs"])) and number(None) is None


def test_unmeasured_error_keeps_its_keys() -> None:
    report = Report([PassReport("p", "exact", {}, [MatchedSite("a/softmax")])])
    assert report.to_dict()["passes"][0]["matched"][0]["error"] == {"max_abs": None, "rel_l2": None, "sqnr_db": None}


def test_dict_reads_back() -> None:
    report = sample(3)
    report.passes[0].matched[0].error = SiteError(0.0, 0.0, math.inf)
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert Report.from_dict(data).to_dict() == report.to_dict()
    assert Report.from_dict(Report().to_dict()).to_dict() == Report().to_dict()


def test_json_safe_takes_what_options_and_details_hold() -> None:
    value = {1: torch.float16, "t": torch.ones(3), "s": torch.tensor(2.5), "set": {2, 1}, "o": (1, [math.inf])}
    expected = {"1": "torch.float16", "t": "tensor(3,) torch.float32", "s": 2.5, "set": [1, 2], "o": [1, ["inf"]]}
    assert json_safe(value) == expected
    json.dumps(json_safe(object()), allow_nan=False)


def test_equal_layers_are_one_row_with_the_worst_error() -> None:
    text = str(sample())
    assert "model.layers.{0-29}.self_attn/attention" in text
    assert text.count("self_attn/attention") == 2  # its row, and the kernel's
    assert "rel 0.0029, max 0.029, 61 dB" in text
    assert "model.layers.{0-29}.mlp/softmax" in text  # reasons that differ by a node's number only are one


def test_reasons_and_facts_are_printed() -> None:
    text = " ".join(str(sample()).split())
    for part in (
        "fit in cache",
        "stopped at mul_3: the constant is 0.5",
        "graph break at a.py:3: print",
        "not torch.export: export refused",
        "perplexity 13.44 -> 15.2",
        "reference form runs 4 linear: no kernel for linear",
        "a warning",
        "total 3.00",
    ):
        assert part in text, part
    assert "none=" not in text  # empty details say nothing


def test_fits_a_screen_of_100_columns() -> None:
    lines = str(sample()).splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 100


def test_print_and_rich_agree() -> None:
    console = Console(width=100, color_system=None, file=io.StringIO(), record=True)
    console.print(sample())
    rich = [line.rstrip() for line in console.export_text().splitlines()]
    assert rich == str(sample()).rstrip("\n").splitlines()


def test_site_names_are_not_markup() -> None:
    report = Report([PassReport("p", "exact", {}, [MatchedSite("[red]a[/red]/softmax", "m.py:1")])])
    assert "[red]a[/red]/softmax" in plain(report)


@pytest.mark.parametrize(
    ("sites", "expected"),
    [
        (["a.0.b/x", "a.1.b/x", "a.2.b/x"], ["a.{0-2}.b/x"]),
        (["a.0.b/x", "a.2.b/x", "a.3.b/x"], ["a.{0,2-3}.b/x"]),
        (["a.0.b/x", "a.0.b/y"], ["a.0.b/x", "a.0.b/y"]),
        (["m.0.n.0/x", "m.0.n.1/x", "m.1.n.0/x", "m.1.n.1/x"], ["m.{0-1}.n.{0-1}/x"]),
        (["conv2d/x", "conv3d/x"], ["conv2d/x", "conv3d/x"]),
        (["s/x", "s/x#2"], ["s/x", "s/x#2"]),
    ],
)
def test_grouping(sites: list[str], expected: list[str]) -> None:
    assert [group.site for group in group_sites([MatchedSite(site) for site in sites])] == expected


def test_groups_differ_where_the_key_does() -> None:
    rows = [MatchedSite("a.0/x", "f.py:1"), MatchedSite("a.1/x", "f.py:2")]
    assert len(group_sites(rows, lambda row: row.source)) == 2


def test_worst_error_prefers_nan_and_skips_unmeasured() -> None:
    assert worst_error([None, SiteError()]) is None
    assert worst_error([SiteError(1, 0.1, 20), SiteError(1, 0.2, 14), None]).rel_l2 == 0.2
    assert math.isnan(worst_error([SiteError(1, 9.0, 0), SiteError(math.nan, math.nan, math.nan)]).rel_l2)
