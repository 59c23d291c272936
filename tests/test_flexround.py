"""FlexRound: its rounding is the paper's formula, its gradients are those, and the blocks' outputs come closer."""

from __future__ import annotations

import pytest
import torch
from rounding_cases import calibration, output_error, rounded, same

from tilewright.codegen.weight_format import WeightFormat
from tilewright.passes.rounding import grid
from tilewright.passes.rounding._feedback import feed_back
from tilewright.passes.rounding._reconstruct import Start, relative_error
from tilewright.passes.rounding.flexround import FlexRound, FlexRounder
from tilewright.passes.rounding.store import Store
from tilewright.runtime.errors import BadPassOption, QuantizationError

FORMATS = [
    WeightFormat(bits=3, group=32),
    WeightFormat(bits=4, group=32, zero="point"),
    WeightFormat(bits=2, group=0, zero="offset"),
    WeightFormat(bits=8, group=64, scales="float32"),
]


def rounder(fmt: WeightFormat, rows: int = 6, columns: int = 80, whole: bool = False) -> FlexRounder:
    torch.manual_seed(1)
    w = torch.randn(rows, columns)
    made = FlexRounder(fmt, Start(w, *grid.search_grid(w, fmt, whole=whole)), 1e-2, 1e-2, whole=whole)
    return made


def learnt(one: FlexRounder) -> FlexRounder:
    torch.manual_seed(2)
    for parameter in one.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return one


def paper(one: FlexRounder) -> torch.Tensor:
    """s1 round(W / (s1 S2 s3 s4)), written out, straight through the rounding."""
    fmt, columns = one.format, one.columns
    kept = getattr(torch, fmt.scales)
    step = one.scale * one.size.exp()
    step = step + (step.to(kept).float() - step).detach()
    divided = one.w / (one.log + one.row + one.column).exp()
    if fmt.zero == "offset":
        low = one.low + (one.low.to(kept).float() - one.low).detach()
        codes = grid.round_through((divided - low) / step).clamp(0, fmt.levels - 1)
        return (codes * step + low).flatten(1)[:, :columns]
    zero = fmt.middle if one.zero is None else one.zero
    codes = torch.clamp(grid.round_through(divided / step) + zero, 0, fmt.levels - 1) - zero
    return (codes * step).flatten(1)[:, :columns]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_rounding_is_the_formula_and_so_are_its_gradients(fmt):
    one = learnt(rounder(fmt))
    torch.manual_seed(3)
    seen = torch.randn(6, 80)
    torch.testing.assert_close(one(), paper(one), rtol=1e-6, atol=1e-6)
    parameters = list(one.parameters())
    mine = torch.autograd.grad((one() * seen).sum(), parameters)
    theirs = torch.autograd.grad((paper(one) * seen).sum(), parameters)
    assert len(mine) == (5 if fmt.zero == "offset" else 4)
    for a, b in zip(mine, theirs, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("whole", [False, True])
def test_codes_are_what_was_learnt(fmt, whole):
    """The codes stand for the weight that the loss saw, and before learning for the nearest one."""
    one = rounder(fmt, whole=whole)
    torch.manual_seed(1)
    w = torch.randn(6, 80)
    start = grid.round_weight(w, fmt, *grid.search_grid(w, fmt, whole=whole))
    assert torch.equal(one.quantized().codes, start.codes)
    learnt(one)
    found = one.quantized()
    assert not torch.equal(found.codes, start.codes)
    torch.testing.assert_close(found.dequantize(), one().detach(), rtol=1e-5, atol=1e-6)
    if whole:
        assert len(found.scale.unique()) == 1


@pytest.mark.parametrize("fmt", [WeightFormat(bits=3, group=32), WeightFormat(bits=2, group=0, zero="point")], ids=str)
def test_errors_handed_on_make_the_output_closer(fmt):
    torch.manual_seed(0)
    x = torch.randn(256, 96) @ torch.randn(96, 96)
    w = torch.randn(24, 96)
    moment = x.T @ x / len(x)
    scale, zero = grid.search_grid(w, fmt, moment.diagonal())
    changed = feed_back(w, moment, fmt, scale, zero)

    def lost(weight: torch.Tensor) -> float:
        return float(((grid.round_weight(weight, fmt, scale, zero).dequantize() - w) @ x.T).square().mean())

    assert lost(changed) < 0.6 * lost(w)
    # With inputs that have nothing to do with each other there is nothing to hand on.
    torch.testing.assert_close(feed_back(w, torch.eye(96), fmt, scale, zero), w)
    assert torch.equal(feed_back(w, torch.full((96, 96), torch.nan), fmt, scale, zero), w)


def test_the_error_of_a_token_counts_by_its_size():
    wanted = torch.tensor([[[1.0, 0.0], [100.0, 0.0]]])
    assert float(relative_error(wanted * 1.1, wanted)) == pytest.approx(0.01, rel=2e-2)
    assert float(relative_error(wanted + torch.tensor([0.1, 0.0]), wanted)) == pytest.approx(0.005, rel=2e-2)


@pytest.mark.parametrize(
    "fmt",
    [
        WeightFormat(bits=3, group=32),
        pytest.param(WeightFormat(bits=3, group=0, zero="offset", activations=8), marks=pytest.mark.grid),
    ],
    ids=str,
)
def test_blocks_come_closer_than_rounding_to_nearest(fmt):
    work = calibration(fmt)
    found = rounded(work, FlexRound(steps=10, lr=1e-2))
    assert set(found) == set(work.sites)
    assert all(weight.format == fmt for weight in found.values())
    assert output_error(work, found) < 0.85 * output_error(work, {})
    rows = work.facts["windows"]
    assert [row["blocks"] for row in rows] == [[f"model.layers.{i}"] for i in range(3)]
    assert all(row["after"] <= row["before"] for row in rows) and "not_reached" not in work.facts


def test_the_same_seed_gives_the_same_codes_and_weights_stay_as_they_are():
    fmt = WeightFormat(bits=3, group=32)
    work = calibration(fmt)
    before = {name: work.weight(name).clone() for name in work.sites}
    one, two = (rounded(calibration(fmt, seed=5), FlexRound(steps=3)) for _ in range(2))
    other = rounded(calibration(fmt, seed=6), FlexRound(steps=3))
    assert same(one, two) and not same(one, other)
    assert all(torch.equal(before[name], work.weight(name)) for name in before)


def test_learning_makes_every_window_better_on_what_it_learns_from():
    work = calibration(WeightFormat(bits=3, group=32), samples=1)
    rounded(work, FlexRound(steps=10, lr=1e-2))
    assert all(row["after"] < 0.9 * row["before"] and row["at"] > 0 for row in work.facts["windows"])


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    fmt, method = WeightFormat(bits=3, group=32), FlexRound(steps=3)
    whole = rounded(calibration(fmt), method)

    def kill(done: int, total: int, text: str) -> None:
        if "layers.2" in text and done % 4 == 3:
            raise Killed

    with pytest.raises(Killed):
        rounded(calibration(fmt, store=Store(tmp_path), progress=kill), method)
    seen = []
    work = calibration(fmt, store=Store(tmp_path), progress=lambda done, total, text: seen.append(text))
    assert same(rounded(work, method), whole)
    assert all("layers.2" in text for text in seen if text.startswith("flexround"))
    assert len(work.facts["windows"]) == 3


def test_a_spent_budget_leaves_blocks_to_nearest_and_says_so():
    import time

    fmt = WeightFormat(bits=3, group=32)
    work = calibration(fmt, deadline=time.monotonic() - 1)
    assert rounded(work, FlexRound()) == {}
    assert work.facts["not_reached"] == [f"model.layers.{i}" for i in range(3)]
    work = calibration(fmt)

    def spend(done: int, total: int, text: str) -> None:
        if "layers.1" in text and work.deadline is None:
            work.deadline = time.monotonic() - 1

    work.progress = spend
    found = rounded(work, FlexRound(steps=4))
    # The second block was being learnt: it is kept with what it had.
    assert work.facts["not_reached"] == ["model.layers.2"]
    assert len(found) == 14


def test_samples_that_give_no_finite_loss_are_refused_by_name():
    work = calibration(WeightFormat(bits=3, group=32))
    weight = next(iter(work.sites.values())).weight
    parent, _, leaf = weight.target.rpartition(".")
    part = work.module.get_submodule(parent)
    delattr(part, leaf)
    part.register_buffer(leaf, torch.full((32, 32), torch.nan))
    with pytest.raises(QuantizationError, match=r"NaN.*layers\.0"):
        rounded(work, FlexRound(steps=1))


@pytest.mark.parametrize("bad", [{"steps": -1}, {"lr": -0.1}, {"steps": True}, {"lr_step": float("nan")}])
def test_options_out_of_range_are_refused(bad):
    with pytest.raises(BadPassOption, match=next(iter(bad))):
        FlexRound(**bad)
