"""Every spelling of attention becomes one canonical op that computes the same, in float32 and bfloat16."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from attention_cases import assert_close, in_float64, qkv, raise_function
from torch import nn

softmax = F.softmax
LENGTH = 7


def tri(device_of):
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=device_of.device).tril()


def constant_scale(q, k, v):
    return softmax(q @ k.mT * torch.tensor(0.25, dtype=q.dtype), -1) @ v


def masked_in_place(q, k, v):
    scores = q @ k.mT
    scores /= 4
    scores.masked_fill_(~tri(q), -math.inf)
    return softmax(scores, -1) @ v


def ignored_in_place(q, k, v):
    scores = q @ k.mT / 4
    scores.masked_fill_(~tri(q), -math.inf)
    scores.add_(0.0)
    weights = softmax(scores, -1)
    return weights @ v


def both_sides(q, k, v):
    root = math.sqrt(0.25)
    return softmax((q * root) @ (k * root).transpose(-2, -1), -1) @ v


def bart(q, k, v):
    b, h, length, d = q.shape
    q, k, v = (t.reshape(b * h, length, d) for t in (q * 0.25, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).view(b, h, length, length)
    scores = scores.masked_fill(~tri(q), -math.inf).view(b * h, length, length)
    return torch.bmm(softmax(scores, -1), v).view(b, h, length, d)


def three_dims(q, k, v):
    q, k, v = (t[:, 0] for t in (q, k, v))
    return torch.bmm(softmax(torch.bmm(q, k.permute(0, 2, 1)) / 4, -1), v)


def with_baddbmm(q, k, v):
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    bias = torch.zeros(LENGTH, LENGTH, dtype=q.dtype).masked_fill(~tri(q), -math.inf)
    scores = torch.baddbmm(bias.expand(8, -1, -1), q, k.mT, beta=1.0, alpha=0.25)
    return torch.bmm(softmax(scores, -1), v)


def two_dims(q, k, v):
    q, k, v = (t[0, 0] for t in (q, k, v))
    return softmax(torch.mm(q, k.t()) * 0.25, -1).mm(v)


def rounded_softmax(q, k, v):
    scores = (q @ k.mT * 0.25).float()
    return softmax(scores, -1).to(q.dtype) @ v


def upcast_operands(q, k, v):
    scores = q.float() @ k.float().mT * 0.25 if q.dtype != torch.float64 else q @ k.mT * 0.25
    return softmax(scores, -1).to(q.dtype) @ v


def softmax_dtype(q, k, v):
    wide = torch.float32 if q.dtype != torch.float64 else None
    return softmax(q @ k.mT * 0.25, dim=-1, dtype=wide).to(q.dtype) @ v


def channels_last_einsum(q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 4
    return torch.einsum("bhqk,bkhd->bqhd", softmax(scores, -1), v)


def swapped_einsum(q, k, v):
    scores = torch.einsum("bhkd,bhqd->bhqk", k, q) / 4
    return torch.einsum("bhkd,bhqk->bhqd", v, softmax(scores, -1))


def ellipsis_einsum(q, k, v):
    return torch.einsum("...qk,...kd->...qd", softmax(torch.einsum("...qd,...kd->...qk", q, k) / 4, -1), v)


def dropouts(q, k, v):
    return F.dropout(softmax(F.dropout(q @ k.mT / 4, 0.0, True), -1), 0.0, True) @ v


def bias_then_scale(q, k, v):
    bias = torch.linspace(-1, 1, LENGTH * LENGTH).view(LENGTH, LENGTH).to(q.dtype)
    return softmax((q @ k.mT + bias) * 0.25, -1) @ v


def subtracted_bias(q, k, v):
    bias = torch.linspace(-1, 1, LENGTH).to(q.dtype)
    return softmax(q @ k.mT * 0.25 - bias, -1) @ v


def negative_scale(q, k, v):
    return softmax(-(q @ k.mT) / 8.0, -1) @ v


SPELLINGS = {
    "matmul": (lambda q, k, v: softmax(q @ k.transpose(-2, -1) * 0.25, -1) @ v, 0.25),
    "positive dims": (lambda q, k, v: softmax(q @ k.transpose(2, 3) * 0.25, 3) @ v, 0.25),
    "scale first": (lambda q, k, v: softmax(0.25 * (q @ k.mT), -1) @ v, 0.25),
    "divided": (lambda q, k, v: softmax(q @ k.mT / math.sqrt(16), -1) @ v, 0.25),
    "permuted": (lambda q, k, v: softmax(q @ k.permute(0, 1, 3, 2) / 4, -1) @ v, 0.25),
    "no scale": (lambda q, k, v: softmax(q @ k.mT, -1) @ v, 1.0),
    "another scale": (lambda q, k, v: softmax(q @ k.mT * 0.3, -1) @ v, 0.3),
    "two scales": (lambda q, k, v: softmax(q @ k.mT * 0.5 / 2, -1) @ v, 0.25),
    "scaled queries": (lambda q, k, v: softmax((q * 0.25) @ k.mT, -1) @ v, 0.25),
    "scaled keys": (lambda q, k, v: softmax(q @ (k / 4).mT, -1) @ v, 0.25),
    "scaled transposed keys": (lambda q, k, v: softmax(q @ (k.mT * 0.25), -1) @ v, 0.25),
    "both sides": (both_sides, 0.25),
    "constant tensor": (constant_scale, 0.25),
    "negative scale": (negative_scale, 0.125),
    "einsum": (channels_last_einsum, 0.25),
    "einsum swapped": (swapped_einsum, 0.25),
    "einsum ellipsis": (ellipsis_einsum, 0.25),
    "bmm": (three_dims, 0.25),
    "bmm and views": (bart, 0.25),
    "baddbmm": (with_baddbmm, 0.25),
    "two dims": (two_dims, 0.25),
    "in place": (masked_in_place, 0.25),
    "in place, result ignored": (ignored_in_place, 0.25),
    "softmax in float32": (softmax_dtype, 0.25),
    "scores in float32": (rounded_softmax, 0.25),
    "operands in float32": (upcast_operands, 0.25),
    "inactive dropout": (dropouts, 0.25),
    "bias before the scale": (bias_then_scale, 0.25),
    "subtracted bias": (subtracted_bias, 0.25),
    "sdpa": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), 0.25),
    "sdpa scale": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3), 0.3),
    "sdpa causal": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), 0.25),
    "sdpa 3-D": (lambda q, k, v: F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0]), 0.25),
    "sdpa 2-D": (lambda q, k, v: F.scaled_dot_product_attention(q[0, 0], k[0, 0], v[0, 0]), 0.25),
    "sdpa 5-D": (lambda q, k, v: F.scaled_dot_product_attention(q[None], k[None], v[None]), 0.25),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(name, dtype):
    function, scale = SPELLINGS[name]
    args = qkv(dtype)
    raised = raise_function(function, *args)
    assert raised.result.near_misses == [] and raised.result.declined == []
    assert raised.argument("scale") == pytest.approx(scale, rel=1e-12)
    assert raised.argument("normalizer") == "softmax"
    assert raised.after.dtype == raised.before.dtype and raised.after.shape == raised.before.shape
    assert_close(raised.after, in_float64(function, args), dtype)


GROUPED = {
    "repeat_kv": lambda q, k, v: [t[:, :, None].expand(2, 2, 2, LENGTH, 16).reshape(2, 4, LENGTH, 16) for t in (k, v)],
    "repeat_interleave": lambda q, k, v: [t.repeat_interleave(2, dim=1) for t in (k, v)],
    "expand of a view": lambda q, k, v: [
        t.view(2, 2, 1, LENGTH, 16).expand(-1, -1, 2, -1, -1).flatten(1, 2) for t in (k, v)
    ],
}


@pytest.mark.parametrize("fused", [False, True], ids=["written", "sdpa"])
@pytest.mark.parametrize("name", GROUPED)
def test_repeated_heads_are_not_repeated(name, fused):
    def function(q, k, v):
        k, v = GROUPED[name](q, k, v)
        if fused:
            return F.scaled_dot_product_attention(q, k, v)
        return softmax(q @ k.mT * 0.25, -1) @ v

    args = qkv(key_heads=2)
    raised = raise_function(function, *args)
    assert raised.shape("k") == raised.shape("v") == (2, 2, LENGTH, 16)
    assert_close(raised.after, in_float64(function, args), torch.float32)


def test_repeated_behind_a_transpose():
    """Keys kept as (B, L, H, D) and repeated there, as in older Falcon and MPT code."""

    def function(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        k, v = (t.repeat_interleave(2, dim=2) for t in (k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return softmax(q @ k.transpose(2, 3) * 0.25, -1) @ v

    args = qkv(key_heads=2)
    raised = raise_function(function, *args)
    assert raised.shape("k") == (2, 2, LENGTH, 16)
    assert_close(raised.after, in_float64(function, args), torch.float32)


def test_enable_gqa():
    args = qkv(key_heads=2)
    raised = raise_function(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), *args)
    assert raised.shape("k") == (2, 2, LENGTH, 16)
    assert_close(raised.after, raised.before, torch.float32)


def test_tiled_heads_stay_repeated():
    """``repeat`` puts the heads in another order than grouped attention does: (h0, h1, h0, h1)."""

    def function(q, k, v):
        k, v = k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)
        return softmax(q @ k.mT * 0.25, -1) @ v

    args = qkv(key_heads=2)
    raised = raise_function(function, *args)
    assert raised.shape("k") == (2, 4, LENGTH, 16)
    assert_close(raised.after, in_float64(function, args), torch.float32)


def test_tiled_by_expand_stays_repeated():
    def function(q, k, v):
        k, v = (t[:, None].expand(2, 2, 2, LENGTH, 16).reshape(2, 4, LENGTH, 16) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v)

    args = qkv(key_heads=2)
    raised = raise_function(function, *args)
    assert raised.shape("k") == (2, 4, LENGTH, 16)
    assert_close(raised.after, in_float64(function, args), torch.float32)


def test_values_repeated_in_another_way_than_keys():
    def function(q, k, v):
        return softmax(q @ k.repeat_interleave(2, 1).mT * 0.25, -1) @ v.repeat(1, 2, 1, 1)

    args = qkv(key_heads=2)
    raised = raise_function(function, *args)
    assert raised.shape("k") == raised.shape("v") == (2, 4, LENGTH, 16)
    assert_close(raised.after, in_float64(function, args), torch.float32)


def test_one_key_head_broadcasts():
    def function(q, k, v):
        return softmax(q @ k.mT * 0.25, -1) @ v

    args = qkv(key_heads=1)
    raised = raise_function(function, *args)
    assert raised.shape("k") == (2, 1, LENGTH, 16)
    assert_close(raised.after, in_float64(function, args), torch.float32)


@pytest.mark.parametrize("spelling", ["matmul", "einsum"])
def test_groups_as_a_fifth_dim(spelling):
    def function(q, k, v):
        q = q.view(2, 2, 2, LENGTH, 16)
        if spelling == "einsum":
            scores = torch.einsum("bhgqd,bhkd->bhgqk", q, k) * 0.25
            return torch.einsum("bhgqk,bhkd->bhgqd", softmax(scores, -1), v)
        return softmax(q @ k[:, :, None].mT * 0.25, -1) @ v[:, :, None]

    args = qkv(key_heads=2)
    raised = raise_function(function, *args)
    assert raised.shape("k") == (2, 2, LENGTH, 16)
    assert_close(raised.after, in_float64(function, args), torch.float32)


def test_queries_shared_by_the_batch():
    """Learned queries, as in Perceiver and in attention pooling."""

    def function(q, k, v):
        return softmax(q[:1] @ k.mT * 0.25, -1) @ v

    args = qkv()
    raised = raise_function(function, *args)
    assert raised.shape("q") == (2, 4, LENGTH, 16)
    assert_close(raised.after, in_float64(function, args), torch.float32)


def test_cross_attention():
    def function(q, k, v):
        return softmax(q @ k.mT * 0.25, -1) @ v

    args = qkv(queries=5, keys=9)
    raised = raise_function(function, *args)
    assert raised.shape("k") == (2, 4, 9, 16)
    assert_close(raised.after, in_float64(function, args), torch.float32)


def test_values_of_another_width():
    def function(q, k, v):
        return softmax(q @ k.mT * 0.25, -1) @ v[..., :8]

    args = qkv()
    raised = raise_function(function, *args)
    assert raised.shape("v") == (2, 4, LENGTH, 8)
    assert_close(raised.after, in_float64(function, args), torch.float32)


def test_dynamic_lengths():
    batch, queries, keys = torch.export.Dim("b"), torch.export.Dim("q"), torch.export.Dim("k")

    def function(q, k, v):
        b, h, length, d = q.shape
        q, k, v = (t.reshape(b * h, t.shape[2], d) for t in (q, k, v))
        weights = softmax(torch.bmm(q * 0.25, k.mT).view(b, h, length, -1), -1)
        return torch.bmm(weights.flatten(0, 1), v).view(b, h, length, d)

    args = qkv(queries=5, keys=9)
    shapes = [({0: batch, 2: queries}, {0: batch, 2: keys}, {0: batch, 2: keys})]
    raised = raise_function(function, *args, dynamic_shapes=shapes)
    assert len(raised.calls) == 1
    others = qkv(batch=3, queries=11, keys=4, seed=1)
    with torch.no_grad():
        assert_close(raised.module(*others), in_float64(function, others), torch.float32)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("fused", [False, True], ids=["written", "sdpa"])
def test_dropout(p, training, fused):
    class Attention(nn.Module):
        def forward(self, q, k, v):
            if fused:
                return F.scaled_dot_product_attention(q, k, v, dropout_p=p if self.training else 0.0)
            return F.dropout(softmax(q @ k.mT * 0.25, -1), p, self.training) @ v

    raised = raise_function(Attention(), *qkv(), training=training)
    if p and training:
        assert raised.calls == []
        ((_, reason),) = raised.result.declined
        assert "dropout is active (p=0.1)" in reason
        torch.testing.assert_close(raised.after, raised.before, rtol=0, atol=0)
    else:
        assert len(raised.calls) == 1
        assert_close(raised.after, raised.before, torch.float32)


@pytest.mark.parametrize("weights", [False, True], ids=["sdpa", "weights"])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "padded"])
def test_multihead_attention(weights, masked):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(32, 4, batch_first=True)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = module

        def forward(self, x, pad):
            return self.attention(x, x, x, key_padding_mask=pad if masked else None, need_weights=weights)[0]

    x = torch.randn(2, LENGTH, 32)
    pad = torch.zeros(2, LENGTH, dtype=torch.bool)
    pad[0, 5:] = True
    # Training mode (with dropout 0) and gradients keep torch off its fused inference path.
    model = Model().train()
    graph = torch.export.export(model, (x, pad), strict=False).module()
    before = graph(x, pad)
    from attention_cases import ATTENTION, RULES, raise_graph

    result = raise_graph(graph, RULES)
    calls = [node for node in graph.graph.nodes if node.target is ATTENTION]
    if weights:
        # The averaged weights are an output of the module: unused here, so export has dropped them.
        assert len(calls) + len(result.near_misses) == 1
    else:
        assert len(calls) == 1
    torch.testing.assert_close(graph(x, pad), before, atol=2e-5, rtol=2e-5)


def test_fused_inference_path_is_declined():
    model = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    x = torch.randn(2, LENGTH, 32)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = model

        def forward(self, x):
            return torch._native_multi_head_attention(
                x, x, x, 32, 4, model.in_proj_weight, model.in_proj_bias, model.out_proj.weight, model.out_proj.bias,
                None, False,
            )[0]  # fmt: skip

    raised = raise_function(Model(), x)
    assert raised.calls == []
    ((_, reason),) = raised.result.declined
    assert "fused operator" in reason


def test_autocast():
    def function(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return softmax(q @ k.mT * 0.25, -1) @ v

    from tilewright.frontend.capture import export_model

    args = qkv()
    from attention_cases import ATTENTION, RULES, Function, raise_graph

    with torch.no_grad():
        graph = export_model(Function(function), args, {}, ({},) * 3 and [({}, {}, {})]).module
        result = raise_graph(graph, RULES)
        after = torch.utils._pytree.tree_leaves(graph(*args))[0]
    calls = [node for node in graph.graph.nodes if node.target is ATTENTION]
    assert len(calls) == 1, result
    assert after.dtype == torch.bfloat16
    rounded = [t.bfloat16().double() for t in args]
    assert_close(after, softmax(rounded[0] @ rounded[1].mT * 0.25, -1) @ rounded[2], torch.bfloat16)


def test_gradients_survive_raising():
    def function(q, k, v):
        return softmax((q @ k.mT * 0.25).masked_fill(~tri(q), -math.inf), -1) @ v

    from attention_cases import RULES, Function, raise_graph

    args = [t.requires_grad_() for t in qkv()]
    graph = torch.export.export(Function(function), tuple(args), strict=False).module()
    expected = torch.autograd.grad(function(*args).square().sum(), args)
    raise_graph(graph, RULES)
    actual = torch.autograd.grad(graph(*args).square().sum(), args)
    # A gradient sums LENGTH products of the output's error (2e-5) with weights of at most one.
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=2e-4)
