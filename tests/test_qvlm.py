"""Q-VLM: entropy decides which blocks are searched together, and the search only ever makes the error smaller."""

from __future__ import annotations

import math
import time

import pytest
import torch
from rounding_cases import calibration, output_error, rounded, same

from tilewright.codegen.weight_format import WeightFormat
from tilewright.passes.rounding.qvlm import QVLM, entropy, partition
from tilewright.passes.rounding.store import Store
from tilewright.runtime.errors import BadPassOption


def test_entropy_counts_levels():
    levels = torch.arange(-127, 128).float()
    assert entropy(levels[None].expand(3, -1)) == pytest.approx(math.log(255))
    assert entropy(torch.tensor([[1.0, 1.0], [5.0, -5.0]])) == pytest.approx(
        -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    )
    assert entropy(torch.zeros(2, 4)) == 0


def test_blocks_are_joined_where_the_entropy_is_high():
    names = [f"layers.{i}" for i in range(6)]
    entropies = [3.0, 1.0, 5.0, 4.0, 2.0, 9.0]
    assert partition(names, entropies, 0.4, 2) == [(0, 1), (1, 2), (2, 4), (4, 5), (5, 6)]
    assert partition(names, entropies, 0.4, 3) == [(0, 1), (1, 2), (2, 5), (5, 6)]
    assert partition(names, entropies, 0.0, 3) == [(i, i + 1) for i in range(6)]
    assert partition(names, entropies, 1.0, 4) == [(0, 4), (4, 6)]
    # Blocks of a visual encoder and of the decoder after it are not joined.
    assert partition(["vision.0", "text.0"], [5.0, 5.0], 1.0, 2) == [(0, 1), (1, 2)]
    assert partition(["a.0"], [1.0], 1.0, 2) == [(0, 1)]


@pytest.mark.parametrize(
    "fmt",
    [
        WeightFormat(bits=3, group=32),
        pytest.param(WeightFormat(bits=3, group=0, zero="offset", activations=8), marks=pytest.mark.grid),
    ],
    ids=str,
)
def test_the_search_beats_rounding_to_nearest(fmt):
    work = calibration(fmt)
    found = rounded(work, QVLM(samples=2, ratios=(0.9, 1.1)))
    assert set(found) == set(work.sites) and all(weight.format == fmt for weight in found.values())
    assert output_error(work, found) < 0.9 * output_error(work, {})
    rows = work.facts["windows"]
    assert sum((row["blocks"] for row in rows), []) == [f"model.layers.{i}" for i in range(3)]
    assert len(rows) == 2  # the two with the highest entropy between them are one
    assert all(row["after"] <= row["before"] for row in rows) and any(row["after"] < row["before"] for row in rows)
    assert len(work.facts["entropies"]) == 3


def test_runs_repeat_resume_and_stop(tmp_path):
    fmt, method = WeightFormat(bits=3, group=32), QVLM(ratios=(0.9, 1.1))
    first = rounded(calibration(fmt, store=Store(tmp_path)), method)
    assert same(first, rounded(calibration(fmt), method))
    work = calibration(fmt, store=Store(tmp_path), deadline=time.monotonic() - 1)
    assert same(first, rounded(work, method)) and "not_reached" not in work.facts
    work = calibration(fmt, deadline=time.monotonic() - 1)
    assert rounded(work, method) == {}
    assert work.facts["not_reached"] == [f"model.layers.{i}" for i in range(3)]


@pytest.mark.parametrize("bad", [{"ratios": ()}, {"ratios": (2.5,)}, {"most": 0}, {"samples": 0}, {"join": -1.0}])
def test_options_out_of_range_are_refused(bad):
    with pytest.raises(BadPassOption, match="qvlm"):
        QVLM(**bad)
