"""CBQ: offsets in low rank that harden, outliers found from coarse to fine, and windows that overlap."""

from __future__ import annotations

import pytest
import torch
from rounding_cases import SAMPLES, calibration, output_error, rounded, same

from tilewright.codegen.weight_format import WeightFormat
from tilewright.passes.execute import run
from tilewright.passes.rounding import grid
from tilewright.passes.rounding._reconstruct import Start
from tilewright.passes.rounding._windows import spans
from tilewright.passes.rounding.cbq import CBQ, LowRankRounder, channel_divergence, outliers_from
from tilewright.passes.rounding.store import Store
from tilewright.runtime.errors import BadPassOption

FORMATS = [
    WeightFormat(bits=3, group=32),
    WeightFormat(bits=4, group=32, zero="point"),
    WeightFormat(bits=2, group=0, zero="offset"),
]


def rounder(fmt: WeightFormat, **options: bool) -> LowRankRounder:
    torch.manual_seed(1)
    w = torch.randn(6, 80)
    return LowRankRounder(fmt, Start(w, *grid.search_grid(w, fmt, **options)), CBQ(rank=3), seed=4, **options)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_soft_offsets_start_as_the_weight_itself_and_hard_ones_as_the_nearest_level(fmt):
    one = rounder(fmt)
    start = grid.round_weight(
        one.w.flatten(1)[:, :80], fmt, one.scale[..., 0], None if one.zero is None else one.zero[..., 0]
    )
    one.at(0.0)
    within = (start.codes > 0) & (start.codes < fmt.levels - 1)  # others may be clipped
    assert within.float().mean() > 0.3
    torch.testing.assert_close(one()[within], one.w.flatten(1)[:, :80][within], rtol=1e-4, atol=1e-4)
    one.at(1.0)
    torch.testing.assert_close(one(), start.dequantize(), rtol=1e-5, atol=1e-5)
    assert torch.equal(one.quantized().codes, start.codes)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("whole", [False, True])
def test_codes_are_what_was_learnt(fmt, whole):
    one = rounder(fmt, whole=whole)
    before = one.quantized().codes
    torch.manual_seed(2)
    one.first.data += torch.randn_like(one.first)
    one.size.data += 0.1 * torch.randn_like(one.size)
    found = one.quantized()
    torch.testing.assert_close(found.dequantize(), one().detach(), rtol=1e-4, atol=1e-5)
    moved = found.codes.int() - before.int()
    assert moved.any() and (one.size.abs().max() > 0)


def test_logits_move_a_code_by_one_level_at_most():
    one = rounder(FORMATS[0])
    before = one.quantized().codes.int()
    one.first.data += 100 * torch.randn_like(one.first)
    moved = one.quantized().codes.int() - before
    assert set(moved.unique().tolist()) == {-1, 0, 1}


def test_gradients_of_soft_offsets_are_those_of_the_formula():
    """h = clip(1.2 sigmoid(V + logits) - 0.1), with V such that h is the weight's own offset without logits."""
    fmt = FORMATS[0]
    one = rounder(fmt)
    torch.manual_seed(2)
    one.first.data += 0.5 * torch.randn_like(one.first)
    one.at(0.0)
    seen = torch.randn(6, 80)
    mine = torch.autograd.grad((one() * seen).sum(), [one.first, one.second])
    logits = grid.grouped(one.first @ one.second, 32)
    u = one.w / one.scale
    share = (u - u.floor() + 0.1) / 1.2
    h = (1.2 * torch.sigmoid(share.logit() + logits) - 0.1).clamp(0, 1)
    inside = ((u.floor() + h) >= -4) & ((u.floor() + h) <= 3)
    theirs = torch.autograd.grad(
        ((u.floor() + h) * inside * one.scale).flatten(1)[:, :80].mul(seen).sum(), [one.first, one.second]
    )
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_regulariser_drives_offsets_apart_and_ends_when_they_are_hard():
    one = rounder(FORMATS[0])
    torch.manual_seed(2)
    one.first.data += 0.5 * torch.randn_like(one.first)
    one.at(0.2)

    def spread() -> float:
        one()
        return float((2 * one.offsets.detach() - 1).abs().mean())

    before = spread()
    one()
    gradient = torch.autograd.grad(one.penalty(), one.first)[0]
    one.first.data -= 0.1 * gradient / gradient.norm()
    assert spread() > before
    one.at(0.5)
    one()
    assert one.penalty() is None


def test_outliers_from_coarse_to_fine():
    torch.manual_seed(0)
    usual = torch.randn(2000).abs().clamp(max=3)
    assert outliers_from(usual.clamp(max=0.5)) is None
    some = torch.cat([usual, torch.tensor([20.0, 21.0, 25.0])])
    # The candidates beyond the quartiles' bound that are close to the rest stay; the three far ones go.
    assert outliers_from(some) == pytest.approx(float(usual.max()))
    assert outliers_from(torch.tensor([1.0, 2.0])) is None


def test_divergence_of_channels():
    torch.manual_seed(0)
    a, b = torch.randn(3, 5, 16), torch.randn(3, 5, 16)
    assert float(channel_divergence(a, a)) == pytest.approx(0, abs=1e-6)
    size = b.square().mean(-1, keepdim=True).rsqrt()
    expected = torch.nn.functional.kl_div(
        (a * size).log_softmax(-1).flatten(0, 1), (b * size).softmax(-1).flatten(0, 1), reduction="batchmean"
    )
    assert float(channel_divergence(a, b)) == pytest.approx(float(expected), rel=1e-4)


def test_windows_overlap_and_reach_the_end():
    assert spans(5, 2, 1) == [(0, 2), (1, 3), (2, 4), (3, 5)]
    assert spans(5, 3, 1) == [(0, 3), (2, 5)]
    assert spans(6, 3, 1) == [(0, 3), (2, 5), (4, 6)]
    assert spans(4, 2, 0) == [(0, 2), (2, 4)]
    assert spans(5, 1, 0) == [(i, i + 1) for i in range(5)]
    assert spans(1, 2, 1) == [(0, 1)]


def test_scaling_of_channels_leaves_the_function_as_it_is():
    work = calibration(WeightFormat(bits=4, group=32))
    # One channel of a norm far above the others.
    name = next(n.target for n in work.module.graph.find_nodes(op="get_attr") if "1.input_layernorm" in n.target)
    part = work.module.get_submodule(name.rpartition(".")[0])
    weight = part.weight.detach().clone()
    del part.weight
    weight[3] *= 50
    part.register_buffer("weight", weight)
    before = run(work.module, SAMPLES[0])[0]
    facts = CBQ().transform(work)
    assert facts["scaled_inputs"] >= 1
    assert work.details["model.layers.1.self_attn.q_proj/linear"]["scaled_channels"] >= 1
    after = run(work.module, SAMPLES[0])[0]
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
    assert part.weight is weight and float(weight[3]) > 20  # the model's own constant is as it was


@pytest.mark.parametrize(
    "fmt",
    [
        WeightFormat(bits=3, group=32),
        pytest.param(WeightFormat(bits=3, group=0, zero="point", activations=8), marks=pytest.mark.grid),
    ],
    ids=str,
)
def test_blocks_come_closer_than_rounding_to_nearest(fmt):
    work = calibration(fmt)
    found = rounded(work, CBQ(steps=8, lr=3e-2))
    assert set(found) == set(work.sites)
    assert output_error(work, found) < 0.85 * output_error(work, {})
    rows = work.facts["windows"]
    assert [row["blocks"] for row in rows] == [
        ["model.layers.0", "model.layers.1"],
        ["model.layers.1", "model.layers.2"],
    ]
    assert all(row["after"] <= row["before"] for row in rows)


def test_learning_makes_every_window_better_on_what_it_learns_from():
    work = calibration(WeightFormat(bits=3, group=32), samples=1)
    rounded(work, CBQ(steps=10, lr=5e-2))
    assert all(row["after"] < 0.9 * row["before"] and row["at"] > 0 for row in work.facts["windows"])


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_and_the_seed_decides(tmp_path):
    fmt, method = WeightFormat(bits=3, group=32), CBQ(steps=2)
    whole = rounded(calibration(fmt), method)
    assert not same(whole, rounded(calibration(fmt, seed=1), method))

    def kill(done: int, total: int, text: str) -> None:
        if "layers.2" in text:
            raise Killed

    with pytest.raises(Killed):
        rounded(calibration(fmt, store=Store(tmp_path), progress=kill), method)
    seen: list[str] = []
    work = calibration(fmt, store=Store(tmp_path), progress=lambda done, total, text: seen.append(text))
    assert same(rounded(work, method), whole)
    assert not any("layers.0" in text for text in seen)


@pytest.mark.parametrize("bad", [{"window": 0}, {"overlap": 2}, {"rank": 0}, {"kl": -1.0}, {"steps": -1}])
def test_options_out_of_range_are_refused(bad):
    with pytest.raises(BadPassOption, match="cbq"):
        CBQ(**bad)
