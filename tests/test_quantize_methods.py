"""What rounding methods are given by Quantize, and what is checked of what they give back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from quantize_cases import (
    IDS,
    MORE,
    Small,
    details,
    quantized,
    rounded,
    row,
)

import tilewright as tw
from tilewright.passes import Quantize
from tilewright.passes.rounding import Calibration, Method, QuantizedWeight, grid
from tilewright.passes.rounding._fold import set_constant
from tilewright.passes.rounding.store import Store
from tilewright.runtime.errors import (
    BadPass,
    CalibrationNeeded,
    QuantizationError,
    ValidationError,
)

# -------------------------------------------------------------------------------------------------- what methods get


@dataclass(frozen=True)
class Probe(Method):
    """Rounds one site to all zeros, and looks at what it is given."""

    name: ClassVar[str] = "probe"
    needs_calibration: ClassVar[bool] = True
    seen: ClassVar[dict[str, Any]] = {}

    def round(self, work: Calibration) -> dict[str, QuantizedWeight]:
        self.seen.update(work=work, stats=work.stats(), left=work.time_left())
        site = work.sites["down/linear"]
        work.details["down/linear"] = {"probed": True}
        work.facts["probe"] = 7
        return {site.id: grid.round_weight(torch.zeros_like(work.weight(site.id)), site.format)}


def test_a_method_rounds_what_it_answers_for_and_the_rest_goes_to_the_nearest():
    model = Small()
    compiled = quantized(model, Quantize(method=Probe(), seconds=60), calibration=MORE)
    want = Small()
    for name, site in Probe.seen["work"].sites.items():
        w = site.context.view.module.get_parameter(f"{name.removesuffix('/linear')}.weight").detach()
        moments = Probe.seen["stats"][name].second
        found = grid.round_weight(w, site.format, *grid.search_grid(w, site.format, moments))
        want.get_parameter(f"{name.removesuffix('/linear')}.weight").data = found.dequantize()
    want.down.weight.data.zero_()
    with torch.no_grad():
        assert torch.equal(compiled(IDS), want(IDS))
    assert details(compiled)["down/linear"]["probed"] and row(compiled).facts["probe"] == 7
    assert 0 < Probe.seen["left"] <= 60 and row(compiled).facts["stopped_early"] is False
    stats = Probe.seen["stats"]["up/linear"]
    x = model.embed(torch.cat([m.flatten() for m in MORE])).detach().double()
    assert stats.rows == 128
    torch.testing.assert_close(stats.second, x.square().mean(0))
    torch.testing.assert_close(stats.mean_abs, x.abs().mean(0))
    torch.testing.assert_close(stats.most, x.abs().amax(0))
    torch.testing.assert_close(Probe.seen["work"].second("up/linear"), x.square().mean(0))


def test_clipping_weighs_columns_by_what_they_are_multiplied_by():
    """With calibration inputs ``rtn{clip}`` loses less at the layer's output than without."""
    model = Small()
    with torch.no_grad():
        model.embed.weight *= torch.logspace(-2, 1, 64)
    errors = []
    for given in ({}, {"calibration": MORE}):
        compiled = quantized(model, Quantize(bits=2, group_size=32, method="rtn{clip}"), **given)
        errors.append({site.site: site.error.rel_l2 for site in row(compiled).matched}["up/linear"])
    assert errors[1] < 0.9 * errors[0]


def test_no_and_too_little_calibration():
    with pytest.raises(CalibrationNeeded, match="give compile\\(\\) calibration"):
        quantized(Small(), Quantize(method=Probe()))
    with pytest.raises(CalibrationNeeded, match=r"saw 6 rows.*at least 32.*up/linear"):
        quantized(Small(), Quantize(method=Probe()), calibration=[IDS[:2, :3]])


def test_activations_that_are_not_finite_are_named():
    model = Small()
    with torch.no_grad():
        model.embed.weight.fill_(1e38)
        model.up.weight.fill_(1)  # 64 times 1e38 is no float32
    with pytest.raises(QuantizationError, match=r"its input is (NaN|infinite) on the calib.*\[down/linear"):
        quantized(model, Quantize(method=Probe()), calibration=MORE)


def test_codes_that_do_not_fit_are_refused():
    @dataclass(frozen=True)
    class Wrong(Method):
        name: ClassVar[str] = "wrong"

        def round(self, work: Calibration) -> dict[str, QuantizedWeight]:
            site = work.leaders()[0]
            return {site.id: grid.round_weight(torch.zeros(3, 64), site.format)}

    with pytest.raises(BadPass, match=r"shape \(3, 64\)"):
        quantized(Small(), Quantize(method=Wrong()))


@dataclass(frozen=True)
class Scales(Method):
    """Multiplies a layer's rows and divides the next one's columns; ``slip`` makes the two differ."""

    name: ClassVar[str] = "scales"
    transforms: ClassVar[bool] = True

    slip: float = 1.0

    def transform(self, work: Calibration) -> Mapping[str, Any]:
        down, again = work.sites["down/linear"], work.sites["again/linear"]
        for what in ("weight", "bias"):
            node = getattr(down, what, None) or down.node.args[2]
            tensor = tw.passes._key_projection.constant(work.view, node)
            set_constant(work.view, down.node, what, tensor * 4)
        set_constant(work.view, again.node, "weight", work.weight("again/linear") / (4 * self.slip))
        work.details["again/linear"] = {"folded": 4}
        return {"pairs": 1}


def test_a_transformation_is_a_stage_of_its_own_and_is_validated_on_the_whole_graph():
    model = Small()
    compiled = quantized(model, Quantize(bits=8, method=Scales()), strict=True)
    first, second = compiled.report.passes
    assert (first.name, first.exactness, second.name) == ("transform-weights", "reassociated", "quantize")
    assert first.facts["pairs"] == 1 and first.matched[0].details == {"folded": 4}
    assert 0 <= first.worst().rel_l2 < 1e-5
    want = Small()
    want.down.weight.data *= 4
    want.down.bias.data *= 4
    want.again.weight.data /= 4
    for layer in (want.up, want.down, want.again):
        layer.weight.data = rounded(layer.weight.data, bits=8)
    with torch.no_grad():
        assert torch.equal(compiled(IDS), want(IDS))
    assert model.down.weight.data.abs().max() < 1
    with pytest.raises(ValidationError, match="transform-weights says it is reassociated"):
        quantized(model, Quantize(method=Scales(slip=1.01)))


@dataclass(frozen=True)
class Dies(Method):
    """Keeps each site's codes and dies at the third one it has to do itself."""

    name: ClassVar[str] = "dies"
    done: ClassVar[list[str]] = []
    limit: ClassVar[int] = 2

    def round(self, work: Calibration) -> dict[str, QuantizedWeight]:
        found = {}
        for site in work.leaders():
            kept = work.kept(site.id)
            if kept is None:
                if len(self.done) >= self.limit:
                    raise KeyboardInterrupt
                one = work.nearest(site.id)
                self.done.append(site.id)
                work.keep(site.id, {"codes": one.codes, "scale": one.scale}, {"bits": site.format.bits})
            else:
                assert kept[1] == {"bits": site.format.bits}
                one = QuantizedWeight(kept[0]["codes"], kept[0]["scale"], None, site.format)
            found[site.id] = one
        return found


def test_a_killed_calibration_goes_on_where_it_was(tmp_path, monkeypatch):
    model = Small()
    one = Quantize(method=Dies(), checkpoint=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        quantized(model, one)
    assert Dies.done == ["up/linear", "down/linear"]
    monkeypatch.setattr(Dies, "limit", 3)
    compiled = quantized(model, one)
    assert Dies.done == ["up/linear", "down/linear", "again/linear"]
    with torch.no_grad():
        assert torch.equal(compiled(IDS), quantized(model)(IDS))
    # Other settings, other weights and other inputs have folders of their own.
    for change in ({"bits": 8}, {"seed": 1}):
        with pytest.raises(KeyboardInterrupt):
            quantized(model, dataclasses.replace(one, **change))
    model.up.weight.data[0, 0] += 1
    with pytest.raises(KeyboardInterrupt):
        quantized(model, one)
    with pytest.raises(KeyboardInterrupt):
        quantized(Small(), one, calibration=MORE)
    # A damaged file is told, not read.
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(QuantizationError, match="is damaged.*delete it"):
        quantized(Small(), one)


def test_keys_of_a_checkpoint_do_not_collide(tmp_path):
    store = Store(tmp_path)
    assert store.read("a/b") is None
    store.write("a/b", {"x": torch.ones(2)}, {"n": 1})
    store.write("a_b", {"x": torch.zeros(3)}, {})
    assert store.read("a/b")[1] == {"n": 1} and store.read("a_b")[0]["x"].shape == (3,)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(QuantizationError, match="cannot be written"):
        Store(tmp_path / "file").write("a", {}, {})
    Store().write("nowhere", {}, {})
    assert Store().read("nowhere") is None
