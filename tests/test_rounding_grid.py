"""Grids of low-bit codes: what they reach, that rounding is to the nearest level, and the differentiable forms."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tilewright.codegen.weight_format import WeightFormat
from tilewright.passes.rounding import grid
from tilewright.runtime.ops.quantized_linear import round_activations

FORMATS = [
    WeightFormat(bits, group, zero)
    for bits, group, zero in itertools.product((8, 4, 3, 2), (0, 32), ("middle", "point", "offset"))
]


def matrix(rows: int = 5, columns: int = 70, seed: int = 0, shift: float = 0.0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) + shift


def levels(found: grid.QuantizedWeight) -> Tensor:
    """All numbers that each element could have become, (N, K, levels)."""
    form = found.format
    shape = found.shape
    every = [
        grid.QuantizedWeight(torch.full(shape, code, dtype=torch.uint8), found.scale, found.zero, form).dequantize()
        for code in range(form.levels)
    ]
    return torch.stack(every, -1)


@settings(max_examples=25, deadline=None)
@given(
    form=st.sampled_from([f for f in FORMATS if f.bits < 8] + [FORMATS[0], FORMATS[4]]),
    rows=st.integers(1, 4),
    columns=st.sampled_from([1, 31, 32, 33, 64, 90]),
    seed=st.integers(0, 99),
    shift=st.sampled_from([0.0, 3.0, -0.5]),
)
def test_every_weight_gets_the_nearest_level(form, rows, columns, seed, shift):
    w = matrix(rows, columns, seed, shift)
    found = grid.round_weight(w, form)
    off = (levels(found) - w[..., None]).abs()
    mine = (found.dequantize() - w).abs()
    # Computed in float32: a tie may go either way by the rounding of w / scale.
    step = grid.spread(found.scale.float(), form.group, columns).abs()
    assert bool((mine <= off.amin(-1) + 1e-5 * (step + w.abs())).all())
    assert int(found.codes.max()) < form.levels and found.scale.dtype == torch.float16
    assert found.scale.shape == (rows, form.groups(columns))
    assert found.packed().nbytes + found.scale.nbytes + (0 if found.zero is None else found.zero.nbytes) == found.nbytes


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f"{f.bits}-{f.group}-{f.zero}")
def test_the_whole_range_is_reached(form):
    """No weight is off by more than half a step, and the rounding of scale and zero."""
    w = matrix(columns=70, shift=0.3)
    found = grid.round_weight(w, form)
    step = grid.spread(found.scale.float(), form.group, 70)
    # A scale a little too small leaves the outermost weight beyond the last level by that share of the range.
    slack = step * form.levels * 2.0**-11
    if form.zero == "point":
        slack = slack + 0.5 * step  # and an integer zero shifts the range by up to half a step
    if form.zero == "offset":
        slack = slack + grid.spread(found.zero.float().abs(), form.group, 70) * 2.0**-11
    assert bool(((found.dequantize() - w).abs() <= 0.5 * step + slack).all())


def test_the_least_and_greatest_that_a_grid_reaches():
    w = torch.tensor([[-3.0, 1.0, 2.0, 0.5], [1.0, 2.0, 3.0, 4.0]])
    for zero, lower, upper in (
        ("middle", [[-3.0], [-4.0]], [[3.0], [4.0]]),
        ("point", [[-3.0], [0.0]], [[2.0], [4.0]]),
        ("offset", [[-3.0], [1.0]], [[2.0], [4.0]]),
    ):
        got = grid.ranges(w, WeightFormat(4, 0, zero))
        assert torch.equal(got[0], torch.tensor(lower)) and torch.equal(got[1], torch.tensor(upper))
    whole = grid.ranges(w, WeightFormat(4), whole=True)
    assert whole[0].tolist() == [[-4.0], [-4.0]] and whole[1].tolist() == [[4.0], [4.0]]
    scale, zero = grid.grid(*grid.ranges(w, WeightFormat(4)), WeightFormat(4, scales="float32"))
    assert torch.equal(scale, torch.tensor([[3 / 7.5], [4 / 7.5]])) and zero is None


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f"{f.bits}-{f.group}-{f.zero}")
def test_a_transposed_weight_gives_the_same_bytes(form):
    """As GPT-2 keeps its weights."""
    w = matrix(64, 64)
    plain, moved = grid.round_weight(w, form), grid.round_weight(w.t().contiguous().t(), form)
    for one, other in ((plain.packed(), moved.packed()), (plain.scale, moved.scale), (plain.zero, moved.zero)):
        if one is not None:
            assert torch.equal(one, other) and other.is_contiguous()


def test_a_short_last_group_has_its_own_range():
    w = torch.cat([torch.full((1, 32), 7.5), torch.full((1, 3), -0.75)], 1)
    found = grid.round_weight(w, WeightFormat(4, 32, scales="float32"))
    torch.testing.assert_close(found.scale, torch.tensor([[1.0, 0.1]]))
    # The range ends half a step beyond the last level above zero, and half a step before the first one below.
    torch.testing.assert_close(found.dequantize().unique(), torch.tensor([-0.8, 7.0]))


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f"{f.bits}-{f.group}-{f.zero}")
def test_groups_of_zeros_and_of_one_number(form):
    found = grid.round_weight(torch.zeros(2, 40), form)
    assert bool((found.dequantize() == 0).all()) and bool((found.scale == 1).all())
    constant = grid.round_weight(torch.full((2, 40), 0.75), form).dequantize()
    # A symmetric grid ends half a step short of its range.
    slack = 0.75 / (form.levels - 1) if form.zero == "middle" else 0.0
    torch.testing.assert_close(constant, torch.full((2, 40), 0.75), rtol=2.0**-10, atol=slack)


def test_float8():
    w = matrix() * 100
    found = grid.round_weight(w, WeightFormat(8, 32, kind="float8_e4m3fn"))
    assert bool(((found.dequantize() - w).abs() <= w.abs() * 2.0**-4 + found.scale.float().max() * 2.0**-10).all())
    assert bool(found.dequantize().isfinite().all())


def test_scales_are_float32_where_float16_could_not_hold_them():
    for factor, want in ((1.0, "float16"), (1e-3, "float16"), (1e-5, "float32"), (1e6, "float32")):
        assert grid.scales_dtype(matrix() * factor, WeightFormat(4)) == want
    # A large common offset overflows as well, whatever the spread.
    assert grid.scales_dtype(matrix() + 1e6, WeightFormat(4, 0, "offset")) == "float32"
    assert grid.scales_dtype(torch.zeros(2, 32), WeightFormat(4)) == "float16"
    tiny = matrix() * 1e-9
    form = WeightFormat(4, 32, scales="float32")
    assert grid.sqnr(tiny, grid.round_weight(tiny, form)) > 18


# --------------------------------------------------------------------------------------------------------------- search


@pytest.mark.parametrize("form", [f for f in FORMATS if f.bits <= 4], ids=lambda f: f"{f.bits}-{f.group}-{f.zero}")
def test_the_search_finds_less_error_in_every_group(form):
    w, weight = matrix(6, 96, seed=3), torch.rand(96, generator=torch.Generator().manual_seed(4)).square() + 1e-3
    plain = grid.error(w, grid.round_weight(w, form), weight)
    found = grid.error(w, grid.round_weight(w, form, *grid.search_grid(w, form, weight)), weight)
    assert bool((found <= plain).all()) and float(found.sum()) < 0.99 * float(plain.sum())
    unweighted = grid.error(w, grid.round_weight(w, form, *grid.search_grid(w, form)), weight)
    assert float(found.sum()) < float(unweighted.sum())


def test_the_error_is_weighted_by_column():
    w = matrix(3, 40)
    found = grid.round_weight(w, WeightFormat(3, 32))
    weight = torch.arange(40.0)
    off = (found.dequantize() - w).square() * weight
    torch.testing.assert_close(grid.error(w, found, weight), torch.stack([off[:, :32].sum(1), off[:, 32:].sum(1)], 1))
    signal = (w.square().sum() / (found.dequantize() - w).square().sum()).log10() * 10
    assert grid.sqnr(w, found) == pytest.approx(float(signal), abs=1e-4)


def test_large_weights_are_searched_in_parts(monkeypatch):
    w, form = matrix(9, 64), WeightFormat(3, 32, "point")
    want = grid.search_grid(w, form, torch.ones(9, 64))
    monkeypatch.setattr(grid, "_CHUNK", 128)
    got = grid.search_grid(w, form, torch.ones(9, 64))
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    assert grid.sqnr(w, grid.round_weight(w, form)) > 0


def test_a_search_for_the_whole_tensor_gives_one_scale():
    w = matrix() * torch.tensor([1.0, 5.0, 1.0, 1.0, 0.1])[:, None]
    scale, _ = grid.search_grid(w, WeightFormat(2), whole=True)
    assert len(scale.unique()) == 1


# ------------------------------------------------------------------------------------------------------ differentiable


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f"{f.bits}-{f.group}-{f.zero}")
def test_fake_quantization_gives_the_numbers_that_rounding_gives(form):
    w = matrix(shift=0.2)
    # Half the range, so that some codes are clamped; scales that float16 has to round.
    lower, upper = grid.ranges(w, form)
    scale, zero = grid.grid(lower / 2, upper / 2, form.changed(scales="float32"))
    want = grid.round_weight(w, form, scale, zero).dequantize()
    got = grid.fake_quantize(w, form, scale, None if zero is None else zero.float())
    assert torch.equal(got, want)


@pytest.mark.parametrize("zero", ["middle", "point", "offset"])
def test_gradients_pass_straight_through_the_rounding(zero):
    form = WeightFormat(3, 32, zero, scales="float32")
    w = matrix(2, 64).requires_grad_()
    scale, point = grid.grid(*(r / 2 for r in grid.ranges(w.detach(), form)), form)
    scale = scale.requires_grad_()
    point = None if point is None else point.float().requires_grad_()
    found = grid.round_weight(w.detach(), form, scale, point)
    grid.fake_quantize(w, form, scale, point).sum().backward()
    step = grid.spread(scale.detach(), 32, 64)
    base = torch.full((2, 64), float(form.middle)) if point is None else grid.spread(point.detach(), 32, 64)
    code = found.codes.float()
    exact = (w.detach() - base) / step if zero == "offset" else w.detach() / step + base
    inside = (exact.round() >= 0) & (exact.round() < form.levels)
    assert inside.any() and not inside.all()
    torch.testing.assert_close(w.grad, inside.float())
    # d(scale * code(w / scale)) / d scale = code - w / scale inside, the clamped code outside (LSQ, Esser et al. 2020).
    number = code if zero == "offset" else code - base
    ratio = exact if zero == "offset" else exact - base
    slope = number - torch.where(inside, ratio, 0)
    torch.testing.assert_close(scale.grad, grid.grouped(slope, 32).sum(-1), rtol=1e-4, atol=1e-4)
    if point is not None:
        # Shifting the grid moves clamped weights only.
        moved = (~inside).float() * (1 if zero == "offset" else -step)
        torch.testing.assert_close(point.grad, grid.grouped(moved, 32).sum(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_activations_are_rounded_as_the_op_does(bits):
    x = matrix(6, 40)
    x[2] = 0
    integers, step = round_activations(x, bits)
    assert torch.equal(grid.fake_quantize_activations(x, bits), integers * step)
    assert grid.fake_quantize_activations(x, 0) is x
    leaf = x.clone().requires_grad_()
    grid.fake_quantize_activations(leaf, bits)[0, 0].backward()
    assert leaf.grad[0, 0] == pytest.approx(1.0)
