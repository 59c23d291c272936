"""The search for bits under a budget: it keeps to it, finds what matters, and goes on after a kill."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tilewright.frontend.assemble import assemble
from tilewright.frontend.capture import copy_module, export_model
from tilewright.frontend.options import Options
from tilewright.frontend.pipeline import process
from tilewright.frontend.report import CaptureReport, Report
from tilewright.passes import Quantize
from tilewright.passes.manager import check_needs
from tilewright.passes.rounding import budget
from tilewright.runtime.errors import BadPassOption, CalibrationNeeded

WIDTH = 32
IDS = torch.randint(0, 40, (2, 24), generator=torch.Generator().manual_seed(1))
BATCHES = [[torch.randint(0, 40, (2, 24), generator=torch.Generator().manual_seed(s))] for s in (2, 3)]


class Block(nn.Module):
    """Two layers on one input, one on their product. size: of what it adds."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.c = nn.Linear(2 * WIDTH, WIDTH)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.size * (self.a(y) + self.c(torch.relu(self.b(y))))


class Stack(nn.Module):
    """A language model whose blocks matter more and less."""

    def __init__(self, *sizes: float, head: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(40, WIDTH)
        self.blocks = nn.ModuleList(Block(size) for size in sizes)
        self.head = nn.Linear(WIDTH, 40 if head else 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@functools.cache
def exported(*sizes: float, head: bool = True) -> torch.fx.GraphModule:
    return export_model(Stack(*sizes, head=head).eval(), (IDS,), {}).module


def quantized(*sizes: float, head: bool = True, **options: Any) -> Report:
    given = Options.make([Quantize(group_size=32, **options)], rest="eager", target="reference")
    check_needs(given.passes, BATCHES)
    module = copy_module(exported(*sizes, head=head))
    record = process(module, given, example_values=[IDS], calibration=BATCHES)
    return assemble("Stack", given, [record], CaptureReport(), None)


def bits_of(report: Report) -> dict[str, int]:
    return {site.site: site.details["bits"] for site in report.passes[-1].matched}


def average_of(found: dict[str, int]) -> float:
    sizes = {"a": 1, "b": 2, "c": 2}
    weights = {site: sizes[site.partition("/")[0][-1]] for site in found}
    return sum(weights[site] * bits for site, bits in found.items()) / sum(weights.values())


def test_bits_go_where_they_matter_and_keep_to_the_average():
    report = quantized(0.1, 3.0, average_bits=3.0, method="rtn{clip=true}")
    found, facts = bits_of(report), report.passes[-1].facts["bits_budget"]
    assert len(found) == 6 and 2.8 < average_of(found) <= 3.0
    assert average_of(found) == pytest.approx(facts["average"])
    large = [bits for site, bits in found.items() if site.startswith("blocks.1.")]
    small = [bits for site, bits in found.items() if not site.startswith("blocks.1.")]
    assert min(large) > max(small)
    # Layers that share their input run as one product, which has one format.
    assert all(found[f"blocks.{i}.a/linear"] == found[f"blocks.{i}.b/linear"] for i in range(2))
    assert facts["divergence"] <= facts["first_divergence"] < 0.5 * facts["uniform_divergence"]
    assert sum(facts["share_of_weights"].values()) == pytest.approx(1)
    again = quantized(0.1, 3.0, average_bits=3.0, method="rtn{clip=true}")
    assert bits_of(again) == found


def test_it_comes_close_to_the_best_of_all_choices(monkeypatch):
    seen: dict[str, Any] = {}
    evolve = budget._Search.evolve

    def tried(self: Any, *args: Any) -> Any:
        found = evolve(self, *args)
        every = itertools.product((2, 3, 4, 8), repeat=len(self.units))
        able = {choice: self.divergence(choice) for choice in every if self.bits(choice) <= self.budget}
        seen.update(found=found, able=able, settled=self.model.settled)
        return found

    monkeypatch.setattr(budget._Search, "evolve", tried)
    quantized(1.0, 0.3, head=False, average_bits=3.2, method="rtn{clip=true}")  # no logits: relative squared error
    found, able = seen["found"], seen["able"]
    assert len(able) > 60
    assert seen["settled"] == pytest.approx(able[found], rel=1e-4)  # from boundaries kept on the way
    assert able[found] <= 1.02 * min(able.values())
    assert able[found] < 0.8 * sorted(able.values())[len(able) // 4]


def test_given_bits_stay_and_count():
    report = quantized(0.1, 3.0, average_bits=4.0, bits_per_site={"blocks.0.b": 8}, method="awq{steps=2}")
    found = bits_of(report)
    assert found["blocks.0.b/linear"] == 8 and average_of(found) <= 4.0
    with pytest.raises(BadPassOption, match="average_bits is 2.0, but the fewest bits of all sites come to 3.2"):
        quantized(0.1, 3.0, average_bits=2.0, bits_per_site={"blocks.0.b": 8, "blocks.0.a": 2})


def test_a_killed_search_goes_on_where_it_was(tmp_path, monkeypatch):
    options: dict[str, Any] = {"average_bits": 3.0, "method": "rtn{clip=true}"}
    whole = bits_of(quantized(0.5, 2.0, **options))
    generations = []
    keep = budget._Search.keep

    def dies(self: Any, parent: Any, facts: Any, generation: int) -> None:
        keep(self, parent, facts, generation)
        generations.append(generation)
        if len(generations) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(budget._Search, "keep", dies)
    with pytest.raises(KeyboardInterrupt):
        quantized(0.5, 2.0, checkpoint=tmp_path, **options)
    monkeypatch.setattr(budget._Search, "begin", None)  # what is measured already is not measured again
    report = quantized(0.5, 2.0, checkpoint=tmp_path, **options)
    assert (
        generations[:5] == [0, 1, 2, 3, 4] and generations[-1] == report.passes[-1].facts["bits_budget"]["generations"]
    )
    assert average_of(bits_of(report)) <= 3.0 and set(bits_of(report)) == set(whole)


def test_a_spent_time_budget_still_keeps_to_the_average():
    report = quantized(0.1, 3.0, average_bits=3.0, seconds=1e-9)
    assert 2.8 < average_of(bits_of(report)) <= 3.0
    assert "generations" not in report.passes[-1].facts["bits_budget"]


def test_bad_options():
    for wrong in (1.5, 9, True):
        with pytest.raises(BadPassOption, match="average_bits is .* 2 to 8 bits"):
            Quantize(average_bits=wrong)
    with pytest.raises(BadPassOption, match="average_bits"):
        Quantize(average_bits=8, bits=8, kind="float8_e4m3fn")
    with pytest.raises(CalibrationNeeded):
        check_needs([Quantize(average_bits=3.0)], [])
