"""The Quantize pass: what it takes up and leaves, what it computes, and what methods can rely on."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tilewright as tw
from tilewright.codegen.weight_format import parse_weight_format
from tilewright.frontend.assemble import assemble
from tilewright.frontend.backend import require_changes
from tilewright.frontend.capture import copy_module, export_model
from tilewright.frontend.options import Options
from tilewright.frontend.pipeline import GraphRecord, process
from tilewright.frontend.report import CaptureReport, Report
from tilewright.passes import FactorKeys, KVCache, Quantize
from tilewright.passes.manager import check_needs, sort_passes
from tilewright.passes.parse import parse_passes
from tilewright.passes.rounding import RTN, Calibration, Method, QuantizedWeight, grid
from tilewright.passes.rounding._fold import set_constant
from tilewright.passes.rounding.store import Store
from tilewright.runtime.errors import (
    BadPass,
    BadPassOption,
    CalibrationNeeded,
    PassChangedNothing,
    QuantizationError,
    ValidationError,
)
from tilewright.runtime.ops.quantized_linear import round_activations


class Small(nn.Module):
    """An embedding, two layers, one that follows another at once, and a head, tied or not."""

    def __init__(self, *, tied: bool = False, width: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, width)
        self.up, self.down = nn.Linear(width, 96), nn.Linear(96, width)
        self.again = nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, 50, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + self.again(self.down(F.gelu(self.up(x)))))


IDS = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(1))
MORE = [torch.randint(0, 50, (4, 16), generator=torch.Generator().manual_seed(seed)) for seed in (2, 3)]


@functools.cache
def captured(tied: bool, width: int) -> Any:
    return export_model(Small(tied=tied, width=width), (IDS,), {}).module


@dataclass
class Done:
    """A graph that was processed, and its report."""

    record: GraphRecord
    report: Report

    def __call__(self, ids: Tensor) -> Tensor:
        return self.record.lowered(ids)[0]


def quantized(model: Small, one: Quantize | None = None, *, calibration: Sequence[Tensor] = (), **given: Any) -> Done:
    """``compile`` for :class:`Small`, which is exported once only."""
    module = copy_module(captured(model.head.weight is model.embed.weight, model.embed.weight.shape[1]))
    for name, tensor in model.named_parameters(remove_duplicate=False):
        owner, _, last = name.rpartition(".")
        if not hasattr(module, owner):  # tied: the graph knows the weight by its other name
            continue
        child = copy.copy(module.get_submodule(owner))
        child._parameters = dict(child._parameters) | {last: tensor}
        setattr(module, owner, child)
    options = Options.make([one or Quantize()], rest="eager", target="reference", **given)
    check_needs(options.passes, calibration)
    record = process(module, options, example_values=[IDS], calibration=[[batch] for batch in calibration])
    if options.strict:
        require_changes(options, [record])
    return Done(record, assemble("Small", options, [record], CaptureReport(), None))


def compiled_whole(model: nn.Module, one: Quantize | None = None, **given: Any) -> tw.CompiledModule:
    options: dict[str, Any] = {"example_inputs": (IDS,), "rest": "eager", "target": "reference"}
    return tw.compile(model, [one or Quantize()], **(options | given))


def row(compiled: Any, name: str = "quantize") -> Any:
    return next(one for one in compiled.report.passes if one.name == name)


def details(compiled: Any) -> dict[str, dict[str, Any]]:
    return {site.site: site.details for site in row(compiled).matched}


def reasons(compiled: Any) -> dict[str, str]:
    return {site.site: site.reason for site in row(compiled).declined}


def rounded(w: Tensor, clip: bool = False, **fields: Any) -> Tensor:
    """A weight as rounding to nearest leaves it."""
    form = Quantize(**fields).format()
    if form.group >= w.shape[1]:
        form = form.changed(group=0)
    grids = grid.search_grid(w, form) if clip else grid.grid(*grid.ranges(w, form), form)
    return grid.round_weight(w.detach(), form, *grids).dequantize()


# ----------------------------------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 8, "group_size": 0},
        {"bits": 4, "group_size": 32},
        {"bits": 3, "group_size": 32, "symmetric": False},
        {"bits": 2, "group_size": 0, "symmetric": False, "zero": "offset"},
        {"bits": 4, "group_size": 64, "method": "rtn{clip=true}"},
        {"bits": 8, "kind": "float8_e4m3fn"},
    ],
    ids=str,
)
def test_layers_compute_with_the_rounded_weights(fields):
    """Bit for bit the model with the dequantized weights in the place of its own; the model itself is as it was."""
    model = Small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compiled = quantized(model, Quantize(**fields))
    plain = {name: value for name, value in fields.items() if name != "method"}
    want = Small()
    for layer in (want.up, want.down, want.again):
        layer.weight.data = rounded(layer.weight.data, clip="method" in fields, **plain)
    with torch.no_grad():
        assert torch.equal(compiled(IDS), want(IDS))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert set(details(compiled)) == {"up/linear", "down/linear", "again/linear"}


def test_activations_are_rounded_by_token():
    model = Small()
    compiled = quantized(model, Quantize(bits=8, activations=8, skip=("up", "down")))
    x = model.embed(IDS)
    hidden = model.down(F.gelu(model.up(x)))
    integers, step = round_activations(hidden, 8)
    again = F.linear(integers, rounded(model.again.weight, bits=8)) * step
    torch.testing.assert_close(compiled(IDS), model.head(x + again), rtol=1e-5, atol=1e-5)
    assert details(compiled)["again/linear"]["activations"] == 8
    # A table is looked up by numbers, which are not rounded.
    table = quantized(model, Quantize(activations=8, embeddings=True))
    assert "activations" not in details(table)["embed/embedding"]


def test_one_scale_for_the_whole_tensor():
    compiled = quantized(Small(), Quantize(bits=4, group_size=-1))
    for found in formats(compiled):
        scales = found["scales"][0]
        assert len(scales.unique()) == 1 and scales.shape[1] == 1
    assert details(compiled)["up/linear"]["group"] == "tensor"


def record(compiled: Any) -> GraphRecord:
    return compiled.record if isinstance(compiled, Done) else compiled.records[0]


def held(module: nn.Module, node: Any) -> Tensor:
    owner, _, last = node.target.rpartition(".")
    return getattr(module.get_submodule(owner), last)


def formats(compiled: Any) -> list[dict[str, Any]]:
    """The arguments of the quantized ops, constants as tensors."""
    module = record(compiled).rewritten
    found = []
    for node in module.graph.nodes:
        if getattr(node.target, "_opname", "") in ("quantized_linear", "quantized_embedding"):
            given = tw.passes.view.arguments(node)
            found.append(torch.fx.map_arg(given, lambda n: held(module, n) if n.op == "get_attr" else n))
    return found


def test_a_site_is_measured_by_itself():
    """``again`` follows ``down`` at once: its error is of its own weights, not of those before it."""
    model = Small()
    compiled = quantized(model, Quantize(bits=2, bits_per_site={"again": 8}))
    errors = {site.site: site.error.rel_l2 for site in row(compiled).matched}
    hidden = model.down(F.gelu(model.up(model.embed(IDS))))
    want = F.linear(hidden, rounded(model.again.weight, bits=8)) - model.again(hidden)
    assert errors["again/linear"] == pytest.approx((want.norm() / model.again(hidden).norm()).item(), rel=1e-3)
    assert errors["again/linear"] < 0.02 < 0.2 < errors["down/linear"]


def test_bfloat16_and_autocast():
    model = Small().bfloat16()
    compiled = compiled_whole(model, Quantize(bits=8))
    assert compiled(IDS).dtype == torch.bfloat16
    assert row(compiled).facts["weight_bytes_before"] == 2 * (2 * 50 * 64 + 2 * 64 * 96 + 64 * 64 + 96 + 64)

    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.inner(x)

    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    casting = Casting()
    found = compiled_whole(casting, Quantize(bits=8), example_inputs=(x,), strict=True)
    assert found(x).dtype == torch.bfloat16
    torch.testing.assert_close(found(x), casting(x), rtol=0.02, atol=0.02)


# ----------------------------------------------------------------------------------------------------- which are taken


def test_embeddings_and_the_head_are_taken_when_asked_for():
    left = reasons(quantized(Small()))
    assert "embeddings=True" in left["embed/embedding"] and "head=True" in left["head/linear"]
    model = Small()
    compiled = quantized(model, Quantize(bits=8, embeddings=True, head=True), strict=True)
    assert not reasons(compiled) and len(details(compiled)) == 5
    facts = row(compiled).facts
    assert (facts["quantized"], facts["left_float"]) == (5, 0)
    assert "linear" not in facts["float_bytes"] and "embedding" not in facts["float_bytes"]
    torch.testing.assert_close(compiled(IDS), model(IDS), rtol=0.1, atol=0.3)


def test_tied_weights_stay_tied():
    model = Small(tied=True)
    compiled = quantized(model, Quantize(bits=4, activations=8, embeddings=True, head=True))
    table, head = (one for one in formats(compiled) if len(one["codes"]) == 50 or one.get("rows") == [50])
    assert table["codes"] is head["codes"][0] and table["scale"] is head["scales"][0]
    assert parse_weight_format(table["format"]).activations == 0
    assert parse_weight_format(head["format"]).activations == 8
    assert details(compiled)["head/linear"]["shared_by"] == 2
    want = rounded(model.embed.weight)
    assert torch.equal(F.embedding(IDS, want), model_embedding(compiled))
    # Of the rounded layers every byte counts once: 4 bits a weight and 2 bytes a scale.
    sizes = {"up": 96 * 64, "down": 64 * 96, "again": 64 * 64, "table": 50 * 64}
    scales = 96 + 64 * 2 + 64 + 50
    assert row(compiled).facts["weight_bytes"] == sum(sizes.values()) // 2 + 2 * scales + 4 * (96 + 64)
    # Quantizing one of the two alone leaves the float table where it is.
    alone = quantized(model, Quantize(head=True))
    assert row(alone).facts["float_bytes"]["embedding"] == 4 * 50 * 64


def model_embedding(compiled: Any) -> Tensor:
    module = record(compiled).rewritten
    node = next(n for n in module.graph.nodes if getattr(n.target, "_opname", "") == "quantized_embedding")
    constants = [getattr(module, n.target) if n is not None else None for n in node.args[1:4]]
    return torch.ops.tilewright.quantized_embedding(IDS, *constants, **node.kwargs)


def test_tied_weights_with_different_settings_are_refused():
    with pytest.raises(BadPassOption, match=r"embed/embedding and head/linear share one weight.*8 and 4"):
        quantized(Small(tied=True), Quantize(embeddings=True, head=True, bits_per_site={"embed": 8}))
    # Leaving one of them float is fine.
    compiled = quantized(Small(tied=True), Quantize(embeddings=True, head=True, skip=("head",)))
    assert set(reasons(compiled)) == {"head/linear"}


def test_a_layer_called_twice_has_one_packed_weight():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(F.relu(self.layer(x)))

    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    compiled = compiled_whole(Twice(), example_inputs=(x,))
    one, other = formats(compiled)
    assert one["codes"][0] is other["codes"][0] and len(details(compiled)) == 2


def test_patterns_choose_bits_and_leave_sites_out():
    one = Quantize(bits=4, bits_per_site={"up": 8, "u*": 2, "head": 3, "down": 16}, skip=("again", "nothing.*"))
    compiled = quantized(Small(), one)
    assert {site: found["bits"] for site, found in details(compiled).items()} == {"up/linear": 8, "head/linear": 3}
    left = reasons(compiled)
    assert left["again/linear"] == "skip names it (again)" and "16 bits" in left["down/linear"]
    assert row(compiled).facts["patterns_without_a_site"] == ["nothing.*"]


def test_a_group_as_wide_as_the_row_is_the_row():
    compiled = quantized(Small(), Quantize(group_size=96))
    groups = {site: found["group"] for site, found in details(compiled).items()}
    assert groups == {"up/linear": "row", "down/linear": "row", "again/linear": "row"}
    compiled = quantized(Small(), Quantize(group_size=64))  # 96 columns: 64 and 32
    assert details(compiled)["down/linear"]["group"] == 64
    (down,) = (one for one in formats(compiled) if parse_weight_format(one["format"]).group)
    assert down["scales"][0].shape == (64, 2)


def test_weights_out_of_the_range_of_float16_scales_get_float32_ones():
    model = Small()
    with torch.no_grad():
        model.up.weight *= 1e7
        model.up.bias *= 1e7
    found = details(quantized(model))
    assert found["up/linear"]["scales"] == "float32" and "scales" not in found["down/linear"]
    assert found["up/linear"]["weight_sqnr_db"] > 20


def test_weights_computed_from_parameters_are_taken_and_others_declined():
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))
            self.wide = nn.Linear(32, 32 * 32)
            self.register_buffer("running", torch.randn(32, 32))

        def forward(self, x: Tensor) -> Tensor:
            y = self.normed(x)
            made = self.wide(x[:1]).view(32, 32)
            self.running.mul_(0.5)
            return F.linear(F.linear(y, made), self.running)

    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    model = Computed()
    compiled = compiled_whole(model, Quantize(bits=8), example_inputs=(x,), validate=False)
    assert {"normed/linear", "wide/linear"} == set(details(compiled))
    assert any("computed in the graph from the model's inputs" in reason for reason in reasons(compiled).values())
    assert any("written into" in reason for reason in reasons(compiled).values())


def test_weights_that_are_inputs_are_declined_with_the_remedy():
    compiled = tw.compile(Small(), [Quantize()], rest="eager", target="reference")
    compiled(IDS)
    assert "give compile() example inputs" in reasons(compiled)["up/linear"]
    strict = tw.compile(Small(), [Quantize()], rest="eager", target="reference", strict=True)
    with pytest.raises(PassChangedNothing, match="example inputs"):
        strict(IDS)


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"bits": 5}, "one of 8, 4, 3, 2"),
        ({"bits": True}, "one of 8, 4, 3, 2"),
        ({"group_size": 48}, "a multiple of 32"),
        ({"group_size": -2}, "a multiple of 32"),
        ({"group_size": 64.0}, "a multiple of 32"),
        ({"activations": 6}, "8, 4 or None"),
        ({"method": "awk"}, "did you mean 'awq'"),
        ({"method": "rtn{steps=3}"}, "no option 'steps'"),
        ({"method": 3}, "must be a name"),
        ({"bits_per_site": {"up": 5}}, "'up' 5 bits"),
        ({"bits_per_site": ("up",)}, "list of pattern=bits"),
        ({"skip": ("",)}, "patterns of module paths"),
        ({"seconds": 0}, "above 0"),
        ({"seed": "1"}, "a whole number"),
        ({"symmetric": 1}, "not True or False"),
        ({"zero": "middle"}, "'point' or 'offset'"),
        ({"bits": 4, "kind": "float8_e4m3fn"}, "8 bits"),
    ],
    ids=str,
)
def test_options_out_of_range(fields, said):
    with pytest.raises(BadPassOption, match=said):
        Quantize(**fields)


def test_weights_that_are_not_finite_are_named():
    for number, what in ((float("nan"), "NaN"), (float("inf"), "infinite")):
        model = Small()
        model.down.weight.data[3, 4] = number
        with pytest.raises(QuantizationError, match=f"1 of the 6144 numbers.*{what}.*down/linear"):
            quantized(model)
        compiled = quantized(model, Quantize(skip=("down",)), validate=False)
        assert "up/linear" in details(compiled)


def test_the_command_lines_text():
    (one,) = parse_passes(
        "quantize{bits=3,group_size=128,method=rtn{clip=true},skip=[a.*,b],bits_per_site=[up=8,*.down=4],activations=8}"
    )
    assert isinstance(one, Quantize)
    assert (one.bits, one.group_size, one.method, one.activations) == (3, 128, RTN(clip=True), 8)
    assert one.skip == ("a.*", "b") and one.bits_per_site == ("up=8", "*.down=4")
    assert one == Quantize(
        3, 128, method=RTN(clip=True), activations=8, skip=("a.*", "b"), bits_per_site={"up": 8, "*.down": 4}
    )
    assert hash(one) and "rtn{clip=True}" in str(one.options())


def test_it_runs_after_the_passes_that_read_or_build_layers():
    order = [one.name for one in sort_passes([Quantize(), KVCache(max_length=8), FactorKeys(rank=8)])]
    assert order == ["kv-cache", "factor-keys", "quantize"]


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
    want.up.weight.data, want.again.weight.data = rounded(want.up.weight.data), rounded(want.again.weight.data)
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


# -------------------------------------------------------------------------------------------------------- whole models


def test_a_cached_decoder_with_quantized_weights_decodes():
    model = tiny.llama(layers=1, bos_token_id=None, eos_token_id=None)
    passes = [KVCache(max_length=32), Quantize(bits=8, embeddings=True, head=True)]
    compiled = tw.compile(model, passes, rest="eager", target="reference", strict=True, validate=False)
    assert len(details(compiled)) == 7 + 2 and not reasons(compiled)
    ids = tiny.tokens(2, 6)
    got = compiled.generate(ids, max_new_tokens=5, do_sample=False)
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Embedding):
            layer.weight = nn.Parameter(rounded(layer.weight.data, bits=8), requires_grad=False)
    want = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(got, want)


def test_the_saved_file_holds_packed_weights_only(tmp_path):
    model = Small(tied=True, width=256)
    compiled = compiled_whole(model, Quantize(bits=4, embeddings=True, head=True))
    path = tw.save(compiled, tmp_path / "small.tilewright")
    facts = row(compiled).facts
    assert facts["weight_bytes"] < path.stat().st_size < facts["weight_bytes"] + 40_000
    assert facts["weight_bytes"] < facts["weight_bytes_before"] / 6
    loaded = tw.load(path)
    assert torch.equal(loaded(IDS), compiled(IDS))
    assert loaded.report.passes[0].facts["weight_bytes"] == facts["weight_bytes"]
