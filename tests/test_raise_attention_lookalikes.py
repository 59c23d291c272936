"""What resembles attention and is another function is never raised, or raised as exactly what it is."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from attention_cases import Function, assert_close, in_float64, qkv, raise_function
from torch import nn

softmax = F.softmax
L = 8  # lengths, width and heads are all 8 below: every wrong transposition has a shape that fits


def square(dtype=torch.float32):
    return qkv(dtype, batch=2, heads=8, queries=8, keys=8, width=8)


def causal():
    return torch.ones(L, L, dtype=torch.bool).tril()


def used_elsewhere(q, k, v):
    weights = softmax(q @ k.mT * 0.25, -1)
    return weights @ v, weights.mean(1)


def scores_used_elsewhere(q, k, v):
    scores = q @ k.mT * 0.25
    return softmax(scores, -1) @ v, scores.amax(-1)


def subtracts_its_maximum(q, k, v):
    scores = q @ k.mT * 0.25
    return softmax(scores - scores.amax(-1, keepdim=True), -1) @ v


def softcapped(q, k, v):
    return softmax(torch.tanh(q @ k.mT * 0.25 / 30.0) * 30.0, -1) @ v


def with_sinks(q, k, v):
    scores = torch.cat([q @ k.mT * 0.25, torch.zeros(2, 8, L, 1)], -1)
    return softmax(scores, -1)[..., :-1] @ v


def sinks_kept(q, k, v):
    scores = torch.cat([q @ k.mT * 0.25, torch.zeros(2, 8, L, 1)], -1)
    return softmax(scores, -1) @ F.pad(v, (0, 0, 0, 1))


def head_mask(q, k, v):
    weights = softmax(q @ k.mT * 0.25, -1) * torch.linspace(0, 1, 8).view(1, 8, 1, 1)
    return weights @ v


def mask_after(q, k, v):
    return softmax(q @ k.mT * 0.25, -1).masked_fill(~causal(), 0.0) @ v


def renormalized(q, k, v):
    weights = softmax(q @ k.mT * 0.25, -1).masked_fill(~causal(), 0.0)
    return (weights / weights.sum(-1, keepdim=True)) @ v


def twice(q, k, v):
    return softmax(softmax(q @ k.mT * 0.25, -1), -1) @ v


def scaled_after(q, k, v):
    return (softmax(q @ k.mT * 0.25, -1) * 2.0) @ v


def changed_in_place_between(q, k, v):
    v = v.clone()
    weights = softmax(q @ k.mT * 0.25, -1)
    v.mul_(2.0)
    return weights @ v


def changed_view_in_place(q, k, v):
    scores = q @ k.mT * 0.25
    first = scores[:, :, :, :1]
    first.add_(1.0)
    return softmax(scores, -1) @ v


LOOKALIKES = {
    "softmax over queries": (lambda q, k, v: softmax(q @ k.mT * 0.25, -2) @ v, "not over the keys"),
    "softmax over heads": (lambda q, k, v: softmax(q @ k.mT * 0.25, 1) @ v, "not over the keys"),
    "weights transposed": (lambda q, k, v: softmax(q @ k.mT * 0.25, -1).mT @ v, "after the softmax"),
    "weights on the right": (lambda q, k, v: v @ softmax(q @ k.mT * 0.25, -1), "does not sum over the keys"),
    "weights used elsewhere": (used_elsewhere, "used more than once"),
    "scores used elsewhere": (scores_used_elsewhere, "used elsewhere"),
    "maximum subtracted": (subtracts_its_maximum, "used elsewhere"),
    "softcapping": (softcapped, "softcapping"),
    "sinks cut off": (with_sinks, "sinks"),
    "sinks kept": (sinks_kept, "sinks"),
    "head mask": (head_mask, "after the softmax"),
    "mask after the softmax": (mask_after, "after the softmax"),
    "renormalized": (renormalized, "after the softmax"),
    "scaled after the softmax": (scaled_after, "after the softmax"),
    "runtime scale": (lambda q, k, v: softmax(q @ k.mT * v.mean(), -1) @ v, "not known when compiling"),
    "number added": (lambda q, k, v: softmax(q @ k.mT * 0.25 + 1.0, -1) @ v, "a number is added"),
    "clamped": (lambda q, k, v: softmax((q @ k.mT * 0.25).clamp(-1, 1), -1) @ v, "clamped"),
    "squared": (lambda q, k, v: softmax((q @ k.mT) ** 2, -1) @ v, "between the scores and the softmax"),
    "scores permuted": (lambda q, k, v: softmax((q @ k.mT).transpose(1, 2), -1) @ v, "transposed"),
    "mild fill": (
        lambda q, k, v: softmax((q @ k.mT * 0.25).masked_fill(~causal(), -5.0), -1) @ v,
        "does not hide them",
    ),
    "positive fill": (
        lambda q, k, v: softmax((q @ k.mT * -0.25).masked_fill(causal(), 9.0), -1) @ v,
        "does not hide them",
    ),
    "fill turned by a negative scale": (
        lambda q, k, v: softmax((q @ k.mT).masked_fill(causal(), -1e9) * -2.0, -1) @ v,
        "does not hide them",
    ),
    "filled by a tensor": (
        lambda q, k, v: softmax((q @ k.mT).masked_fill(causal(), v.amin()), -1) @ v,
        "not known when compiling",
    ),
    "heads summed": (
        lambda q, k, v: torch.einsum("bhqk,bhkd->bqd", softmax(q @ k.mT * 0.25, -1), v),
        "does not sum over the keys",
    ),
    "two sums": (
        lambda q, k, v: torch.einsum("bhqk,bhkd->bhd", softmax(q @ k.mT * 0.25, -1), v),
        "cannot read|does not sum over the keys|other dims",
    ),
    "diagonal einsum": (
        lambda q, k, v: torch.einsum("bhqk,bhqd->bhqd", softmax(q @ k.mT * 0.25, -1), v),
        "cannot read|does not sum over the keys",
    ),
    "scores rounded": (lambda q, k, v: softmax((q @ k.mT).bfloat16().float(), -1) @ v, "rounded to torch.bfloat16"),
    "values change in between": (changed_in_place_between, "in place"),
    "scores change through a view": (changed_view_in_place, "in place|used elsewhere"),
}


@pytest.mark.parametrize("name", LOOKALIKES)
def test_lookalike_is_a_near_miss(name):
    function, reason = LOOKALIKES[name]
    raised = raise_function(function, *square())
    assert raised.calls == [], raised.result
    assert len(raised.result.near_misses) == 1, raised.result
    ((_, stopped_at, why),) = raised.result.near_misses
    assert re.search(reason, why), why
    assert stopped_at
    torch.testing.assert_close(raised.after, raised.before, rtol=0, atol=0)


UNRELATED = {
    "softmax of a linear layer": lambda q, k, v: softmax(F.linear(q, k[0, 0]), -1),
    "router": lambda q, k, v: softmax(F.linear(q, k[0, 0]), -1) @ v,
    "softmax of a product": lambda q, k, v: softmax(q @ k.mT, -1),
    "no product": lambda q, k, v: softmax(q, -1) @ v,
    "softmax twice": lambda q, k, v: softmax(softmax(q, -1), -1),
}


@pytest.mark.parametrize("name", UNRELATED)
def test_unrelated_softmax_is_left_alone(name):
    raised = raise_function(UNRELATED[name], *square())
    assert raised.calls == [] and raised.result.declined == []
    torch.testing.assert_close(raised.after, raised.before, rtol=0, atol=0)


def test_softmax_twice_is_not_raised():
    raised = raise_function(twice, *square())
    assert raised.calls == []
    torch.testing.assert_close(raised.after, raised.before, rtol=0, atol=0)


# Odd, but attention all the same: the roles follow from the products, not from the names.
ODD = {
    "keys not transposed": lambda q, k, v: softmax(q @ k * 0.25, -1) @ v,
    "values transposed": lambda q, k, v: softmax(q @ k.mT * 0.25, -1) @ v.mT,
    "queries transposed": lambda q, k, v: softmax(q.mT @ k.mT * 0.25, -1) @ v,
    "roles swapped": lambda q, k, v: softmax(k @ q.mT * 0.25, -1) @ v,
    "one tensor": lambda q, k, v: softmax(q @ q.mT * 0.25, -1) @ q,
    "heads and lengths swapped": lambda q, k, v: (
        softmax(q.transpose(1, 2) @ k.transpose(1, 2).mT * 0.25, -1) @ v.transpose(1, 2)
    ),
    "result transposed": lambda q, k, v: torch.einsum("bhqk,bhkd->bdqh", softmax(q @ k.mT * 0.25, -1), v),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_attention_is_raised_as_it_is(name):
    args = square()
    raised = raise_function(ODD[name], *args)
    assert len(raised.calls) == 1, raised.result
    assert_close(raised.after, in_float64(ODD[name], args), torch.float32)


def test_a_constant_that_differs_between_sites():
    """Every site keeps its own scale: no constant is taken from another site."""

    class Two(nn.Module):
        def forward(self, q, k, v):
            q = softmax(q @ k.mT * 0.25, -1) @ v
            return softmax(q @ k.mT * 0.5, -1) @ v

    args = square()
    raised = raise_function(Two(), *args)
    assert [call.kwargs["scale"] for call in raised.calls] == [0.25, 0.5]
    assert_close(raised.after, in_float64(Two(), args), torch.float32)


def test_a_parameter_is_no_constant():
    class Temperature(nn.Module):
        def __init__(self):
            super().__init__()
            self.temperature = nn.Parameter(torch.tensor(0.25))

        def forward(self, q, k, v):
            return softmax(q @ k.mT * self.temperature, -1) @ v

    raised = raise_function(Temperature(), *square())
    assert raised.calls == []
    ((_, _, why),) = raised.result.near_misses
    assert "not known when compiling" in why


def test_a_buffer_is_no_constant():
    class Temperature(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("temperature", torch.tensor(0.25))

        def forward(self, q, k, v):
            return softmax(q @ k.mT * self.temperature, -1) @ v

    raised = raise_function(Temperature(), *square())
    assert raised.calls == []


def test_learned_scale_on_the_queries_stays_on_them():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.linspace(0.5, 2, 8))

        def forward(self, q, k, v):
            return softmax((q * self.gain) @ k.mT * 0.25, -1) @ v

    model = Scaled()
    args = square()
    raised = raise_function(model, *args)
    assert raised.argument("scale") == 0.25
    assert_close(raised.after, in_float64(model.double(), args).float(), torch.float32)


def test_a_rounded_constant_is_the_rounded_one():
    """0.3 in a bfloat16 tensor is 0.30078125."""

    def function(q, k, v):
        return softmax(q @ k.mT * torch.full([], 0.3, dtype=torch.bfloat16), -1) @ v

    raised = raise_function(function, *square(torch.bfloat16))
    assert raised.argument("scale") == 0.30078125


def test_near_miss_names_the_node_and_line():
    raised = raise_function(softcapped, *square())
    ((site, stopped_at, _),) = raised.result.near_misses
    assert "tanh" in stopped_at and "attention_cases.py" in stopped_at or __file__ in stopped_at
    assert site.op == "attention"


def test_a_graph_is_not_changed_by_a_miss():
    module = Function(used_elsewhere)
    graph = torch.export.export(module, square(), strict=False).module()
    from attention_cases import RULES, raise_graph

    before = [node.name for node in graph.graph.nodes if "_guards" not in node.name]
    raise_graph(graph, RULES)
    assert [node.name for node in graph.graph.nodes if "_guards" not in node.name] == before


def test_negative_scale_under_a_mask():
    """The scale moves into the queries: torch's own causal kernel gives NaN for a negative one."""

    def function(q, k, v):
        return softmax((-(q @ k.mT)).masked_fill(~causal(), -math.inf), -1) @ v

    args = square()
    raised = raise_function(function, *args)
    assert raised.argument("scale") == 1.0 and raised.argument("mask") == "k_idx <= q_idx"
    assert_close(raised.after, in_float64(function, args), torch.float32)


@pytest.mark.parametrize("scale", [0.0, math.inf, math.nan])
def test_a_scale_that_is_none_is_refused(scale):
    raised = raise_function(lambda q, k, v: softmax(q @ k.mT * scale, -1) @ v, *square())
    assert raised.calls == [] and len(raised.result.near_misses) == 1
