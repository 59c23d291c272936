"""The Quantize pass: what it takes up and leaves, and what it computes."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from quantize_cases import (
    IDS,
    Small,
    compiled_whole,
    details,
    formats,
    quantized,
    reasons,
    record,
    rounded,
    row,
)
from torch import Tensor, nn

import tilewright as tw
from tilewright.codegen.weight_format import parse_weight_format
from tilewright.passes import FactorKeys, KVCache, Quantize
from tilewright.passes.manager import sort_passes
from tilewright.passes.parse import parse_passes
from tilewright.passes.rounding import RTN
from tilewright.runtime.errors import (
    BadPassOption,
    PassChangedNothing,
    QuantizationError,
)
from tilewright.runtime.ops.quantized_linear import round_activations

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
    strict = tw.compile(Small(), [Quantize()], rest="eager", target="reference", strict=True)
    with pytest.raises(PassChangedNothing, match=r"an input of the graph.*give compile\(\) example inputs"):
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


# -------------------------------------------------------------------------------------------------------- whole models


@pytest.mark.grid
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
