"""Scales of input channels: where they fold and that the function stays, and AWQ's search for them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import decoders
import pytest
import tiny
import torch
from torch import Tensor, nn

from tilewright.frontend.assemble import assemble
from tilewright.frontend.capture import copy_module, export_model
from tilewright.frontend.options import Options
from tilewright.frontend.pipeline import GraphRecord, process
from tilewright.frontend.raising import raise_graph
from tilewright.frontend.report import CaptureReport, Report
from tilewright.passes import Quantize
from tilewright.passes.execute import run
from tilewright.passes.rounding import AWQ, RTN
from tilewright.passes.rounding import awq as awq_module
from tilewright.passes.rounding._fold import Fold, apply_fold, find_fold, find_groups
from tilewright.passes.rounding._moments import Inputs, output_error
from tilewright.passes.site import get_site
from tilewright.passes.view import GraphView
from tilewright.runtime.errors import BadPassOption

IDS = tiny.tokens(2, 7)


@functools.cache
def model_of(name: str) -> nn.Module:
    return tiny.bert(layers=1) if name == "bert" else decoders.model(name)


@functools.cache
def raised(name: str) -> torch.fx.GraphModule:
    kwargs: dict[str, Any] = {"input_ids": IDS} | ({} if name == "bert" else {"use_cache": False})
    return lift(export_model(model_of(name), (), kwargs).module)


def lift(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    graph = copy_module(module)
    raise_graph(graph)
    return graph


def run_on(graph: torch.fx.GraphModule, *inputs: Any) -> list[Tensor]:
    found = run(graph, inputs)
    return [leaf for leaf in torch.utils._pytree.tree_leaves(found) if isinstance(leaf, Tensor)]


def folds_of(graph: torch.fx.GraphModule) -> tuple[GraphView, dict[str, Fold | str]]:
    """By the id of each group's first layer."""
    view = GraphView(graph)
    return view, {get_site(group.linears[0]).id: find_fold(view, group) for group in find_groups(view)}


def scale_for(fold: Fold, *, powers: bool = False) -> Tensor:
    scale = torch.rand(fold.group.width, generator=torch.Generator().manual_seed(fold.group.width)) * 6 - 3
    return fold.shared((scale.round() if powers else scale).exp2())


KINDS = {
    # q, k and v; o; gate and up; down: of every layer, then the head or pooler. "tied" is not scaled.
    "qwen3": ["norm", "linear", "norm", "linear", "norm"],
    "gpt2": ["norm", "linear", "norm", "input", "tied"],
    "opt": ["norm", "linear", "norm", "linear", "tied"],
    "bert": ["input", "linear", "input", "input", "input"],
}


@pytest.mark.parametrize("name", KINDS)
def test_scaling_a_whole_model_changes_no_function(name):
    model, graph = model_of(name), copy_module(raised(name))
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    inputs = [IDS] + [None] * (len(graph.graph.find_nodes(op="placeholder")) - 1)
    before = run_on(graph, *inputs)
    view, folds = folds_of(graph)
    assert ["tied" if isinstance(fold, str) else fold.kind for fold in folds.values()] == KINDS[name]
    for fold in folds.values():
        if isinstance(fold, str):
            assert "tied weights stay tied" in fold
        else:
            apply_fold(view, fold, scale_for(fold))
    graph.graph.lint()
    graph.recompile()
    for one, wanted in zip(run_on(graph, *inputs), before, strict=True):
        assert not torch.equal(one, wanted)  # scales of up to 8 and 1/8 did go somewhere
        torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


class Chain(nn.Module):
    """A norm, layers, a gate and values, in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.norm = nn.RMSNorm(8)
        self.gate, self.up, self.down = nn.Linear(8, 12, bias=False), nn.Linear(8, 12), nn.Linear(12, 16)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y = self.down(nn.functional.silu(self.gate(y)) * self.up(y)).unflatten(-1, (2, 2, 4)).permute(2, 0, 3, 1, 4)
        q, v = y.unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, q, v).transpose(1, 2).flatten(2)
        return self.out(y)


def test_powers_of_two_lose_no_bit_in_bfloat16():
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    graph = lift(export_model(Chain().bfloat16(), (x,), {}).module)
    before = run_on(graph, x)
    view, folds = folds_of(graph)
    assert [fold.kind for fold in folds.values()] == ["norm", "linear", "linear"]
    for fold in folds.values():
        apply_fold(view, fold, scale_for(fold, powers=True))
    graph.recompile()
    assert all(torch.equal(a, b) for a, b in zip(run_on(graph, x), before, strict=True))


class Odd(nn.Module):
    """Ways to a linear layer, one a name."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.way = way
        self.first, self.second = nn.Linear(8, 8), nn.Linear(4 if way == "half" else 8, 6)
        self.other = nn.Linear(8, 6)
        self.norm, self.wide = nn.LayerNorm(8), nn.LayerNorm((3, 8))

    def forward(self, x: Tensor) -> Tensor:
        y, second = self.first(x), self.second
        match self.way:
            case "relu":
                return second(torch.relu(y * 2).transpose(0, 1))
            case "negative":
                return second(y * -2)
            case "gelu":
                return second(nn.functional.gelu(y))
            case "also read":
                return second(y) + y.sum(-1, keepdim=True)
            case "two layers":
                return second(y) + self.other(y.view(-1, 8)).view(2, 3, 6)
            case "tokens":
                return second(y.transpose(1, 2).reshape(2, 3, 8))
            case "part":
                return second(torch.cat([y[..., :4], y[..., :4]], -1))
            case "half":
                return second(y[..., :4]) + y[..., 4:].sum(-1, keepdim=True)
            case "wide norm":
                return second(self.wide(x))
            case "norm read twice":
                normed = self.norm(x)
                return second(normed) + normed.sum(-1, keepdim=True)
            case "silu":
                return second(nn.functional.silu(y) * y)
            case "shared":
                return second(self.first(y))
        raise AssertionError(self.way)


WAYS = {
    "relu": ("linear", ""),
    "negative": ("linear", ""),
    "gelu": ("input", "gelu"),
    "also read": ("input", "reads it too"),
    "two layers": ("linear", ""),
    "tokens": ("input", "last dimension"),
    "part": ("input", "cat"),
    "half": ("linear", ""),
    "wide norm": ("input", "several dimensions"),
    "norm read twice": ("input", "reads it too"),
    "silu": ("input", "mul.Tensor makes the input"),
    "shared": ("input", "read elsewhere"),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_keeps_channels_apart_is_folded_through_and_nothing_else(way):
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    graph = lift(export_model(Odd(way), (x,), {}).module)
    view, folds = folds_of(graph)
    fold = folds["second/linear"]
    assert isinstance(fold, Fold)
    kind, reason = WAYS[way]
    assert fold.kind == kind and reason in fold.reason
    assert len(fold.group.linears) == (2 if way == "two layers" else 1)
    (before,) = run_on(graph, x)
    apply_fold(view, fold, scale_for(fold))
    graph.graph.lint()
    graph.recompile()
    (after,) = run_on(graph, x)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert len(graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)) >= (kind == "input")


def test_query_heads_share_the_factors_of_their_values():
    view, folds = folds_of(copy_module(raised("qwen3")))
    fold = folds["model.layers.0.self_attn.o_proj/linear"]
    assert isinstance(fold, Fold)
    heads = fold.channels.reshape(4, 16)  # 4 query heads of 16 channels, 2 of values
    assert torch.equal(heads, torch.arange(32).reshape(2, 16).repeat_interleave(2, 0))
    with pytest.raises(ValueError, match="must share their factor"):
        apply_fold(view, fold, torch.arange(1.0, 65.0))
    with pytest.raises(ValueError, match="positive"):
        apply_fold(view, fold, torch.zeros(64))


def test_moments_give_the_error_of_outputs():
    torch.manual_seed(0)
    x, delta = torch.randn(5, 40, 24), torch.randn(6, 24)
    inputs = Inputs.of(list(x), 16)
    rows = x.reshape(-1, 24)
    # Each sample's median shrinks that sample's larger rows.
    length = x.norm(dim=2, keepdim=True)
    even = (x / (length / length.median(1, keepdim=True).values).clamp_min(1)).reshape(-1, 24)
    assert output_error(delta, inputs) == pytest.approx(float((even @ delta.T).square().sum(1).mean()), rel=1e-5)
    scaled = inputs.scaled(torch.full((24,), 2.0))
    assert output_error(2 * delta, scaled) == pytest.approx(output_error(delta, inputs), rel=1e-5)
    assert inputs.rows == len(rows) and inputs.sample.shape == (20, 24)
    torch.testing.assert_close(inputs.mean_abs, even.abs().mean(0))


# ----------------------------------------------------------------------------------------------------------- the method


@functools.cache
def outlying() -> nn.Module:
    """A Llama some of whose channels are much larger than others wherever a norm makes them."""
    model = tiny.llama(initializer_range=0.06)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "layernorm" in name:
                tensor[::16] *= 16
            if name.endswith(("up_proj.weight", "v_proj.weight")):
                tensor[::16] *= 16
    return model


INPUTS = {"input_ids": IDS, "use_cache": False}
CALIBRATION = [[tiny.tokens(8, 12, seed=seed), None] for seed in (1, 2)]
HELD_OUT = tiny.tokens(8, 12, seed=3)


@functools.cache
def exported() -> torch.fx.GraphModule:
    return export_model(outlying(), (), INPUTS).module


@dataclass
class Compiled:
    """What ``compile`` makes of a graph that is exported once only."""

    record: GraphRecord
    report: Report

    @torch.no_grad()
    def __call__(self) -> Tensor:
        return self.record.lowered(HELD_OUT, None)[0]


@functools.cache
def compiled(**options: Any) -> Compiled:
    given = Options.make([Quantize(**options)], rest="eager", target="reference", strict=True)
    record = process(copy_module(exported()), given, example_values=[IDS, None], calibration=CALIBRATION)
    return Compiled(record, assemble("Llama", given, [record], CaptureReport(), None))


@torch.no_grad()
def error(one: Compiled) -> float:
    wanted = outlying()(HELD_OUT, use_cache=False).logits
    return float((one() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("options", "better"),
    [
        ({"bits": 4, "group_size": 32}, 0.8),
        pytest.param({"bits": 3, "group_size": 0, "symmetric": False}, 1.0, marks=pytest.mark.grid),
        ({"bits": 4, "group_size": 0, "activations": 8}, 0.9),
    ],
    ids=str,
)
def test_scales_help_where_some_channels_are_large(options, better):
    nearest, mine = compiled(method=RTN(clip=True), **options), compiled(method=AWQ(), **options)
    assert error(mine) < better * error(nearest)
    transformed, quantized = mine.report.passes
    assert {"norm", "linear"} >= set(transformed.facts["scales_folded_into"]) > {"linear"}
    assert transformed.facts["mean_error"] < transformed.facts["mean_error_before"]
    assert transformed.worst().rel_l2 < 1e-5
    assert len(quantized.matched) == 14
    scaled = [one.details for one in transformed.matched if one.details["alpha"]]
    assert scaled and all(one["scaled_error"] < one["input_error"] for one in scaled)
    assert all(not str(name).startswith("tilewright") for name in mine.record.rewritten.meta)


def test_a_killed_search_goes_on_and_ends_where_a_whole_one_does(tmp_path, monkeypatch):
    options = {"bits": 3, "group_size": 32, "method": AWQ(steps=3)}
    whole = compiled(**options)
    done: list[str] = []
    search = awq_module._Search.search

    def dies(self: Any, group: Any, inputs: Any) -> Any:
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(group.key)
        return search(self, group, inputs)

    monkeypatch.setattr(awq_module._Search, "search", dies)
    with pytest.raises(KeyboardInterrupt):
        compiled(checkpoint=tmp_path, **options)
    first, done[:] = list(done), []
    resumed = compiled(checkpoint=tmp_path, **options)
    assert len(first) == 5 and len(done) == 3 and not set(first) & set(done)
    assert torch.equal(whole(), resumed())


def test_a_spent_budget_leaves_the_rest_rounded_to_nearest():
    short = compiled(bits=4, group_size=32, method=AWQ(), seconds=1e-9)
    assert short.report.passes[0].facts["groups_searched"] == 0
    assert len(short.report.passes[1].matched) == 14
    assert error(short) == error(compiled(bits=4, group_size=32, method=RTN(clip=True)))
    plain = compiled(bits=4, group_size=32, method=AWQ(clip=False), seconds=1e-9)
    assert error(plain) == error(compiled(bits=4, group_size=32))


@pytest.mark.parametrize("given", [{"steps": 0}, {"rows": 0}, {"shrink": 0.0}, {"worth": 1.0}], ids=str)
def test_options_out_of_range(given):
    with pytest.raises(BadPassOption, match=f"awq: .*{next(iter(given))}"):
        AWQ(**given)
