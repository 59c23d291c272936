"""Lowering of quantized layers: what is joined into one call, and how their weights are packed for the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import transformers
from torch import nn

import tilewright as tw
from tilewright.codegen.weight_format import WeightFormat, parse_weight_format
from tilewright.frontend import pack_weights
from tilewright.frontend.capture import copy_module
from tilewright.passes import Exactness, Pass, Rewrite
from tilewright.passes.view import arguments
from tilewright.runtime.ops import quantized_weight

pytestmark = pytest.mark.filterwarnings("ignore:.*reference form")


@dataclass(frozen=True)
class Coded(Pass):
    """Weights to 8-bit codes, with an offset; layers whose path has ``other`` in it get 4 bits."""

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    ops: ClassVar[tuple[str, ...]] = ("linear",)
    other: str = "-"

    def rewrite(self, site):
        weight = site.view.module.get_parameter(site.arg("weight").target).detach()
        fmt = WeightFormat(bits=4 if self.other in site.site.id else 8, zero="offset", scales="float32")
        low = weight.amin(1, keepdim=True)
        scale = (weight.amax(1, keepdim=True) - low) / (fmt.levels - 1)
        codes = quantized_weight.pack(((weight - low) / scale).round(), fmt)

        def build(builder):
            parts = [builder.constant(n, t) for n, t in (("codes", codes), ("scale", scale), ("zero", low))]
            return builder.call(
                torch.ops.tilewright.quantized_linear.default,
                site.arg("x"),
                *([part] for part in parts),
                [site.arg("bias")],
                rows=[weight.shape[0]],
                format=fmt.text(),
            )

        return Rewrite(build)


def quantized(module):
    nodes = module.graph.nodes
    return [node for node in nodes if node.target is torch.ops.tilewright.quantized_linear.default]


def compiled(model, *inputs, other="-"):
    result = tw.compile(model, [Coded(other)], example_inputs=inputs, rest="eager", target="cpp")
    return result, result.records[0]


def tiny_llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
    )
    return transformers.LlamaForCausalLM(config).eval()


def test_a_decoder_layer_is_four_calls():
    model, ids = tiny_llama(), torch.randint(0, 97, (2, 9))
    result, record = compiled(model, ids)
    calls = [arguments(node) for node in quantized(record.lowered)]
    assert [call["rows"] for call in calls] == [[64, 32, 32], [64], [96, 96], [64]] * 2 + [[97]]
    assert [call["gated"] for call in calls] == [False, False, True, False] * 2 + [False]
    assert [call["residual"] is not None for call in calls] == [False, True, False, True] * 2 + [False]
    assert [call["norm"] is not None for call in calls] == [True, False] * 4 + [True]
    with torch.no_grad():
        wanted = record.rewritten(*[ids])[0]
        assert torch.allclose(result(ids).logits, wanted, atol=1e-5)
        assert not torch.allclose(model(ids).logits, wanted, atol=1e-5)


def test_layers_of_another_format_stay_apart():
    """And so does the norm that both read."""
    model, ids = tiny_llama(), torch.randint(0, 97, (2, 9))
    result, record = compiled(model, ids, other="k_proj")
    calls = [arguments(node) for node in quantized(record.lowered)][:3]
    assert [call["rows"] for call in calls] == [[64, 32], [32], [64]]
    assert not any(call["norm"] for call in calls)
    with torch.no_grad():
        assert torch.allclose(result(ids).logits, record.rewritten(ids)[0], atol=1e-5)


class Feed(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(40, 56), nn.Linear(56, 40, bias=False)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(x)))


def test_activation_bias_and_residual_are_taken_up():
    torch.manual_seed(0)
    x = torch.randn(3, 40)
    result, record = compiled(Feed().eval(), x)
    up, down = (arguments(node) for node in quantized(record.lowered))
    assert (up["activation"], up["biases"] != [None]) == ("gelu", True) and down["residual"] is not None
    with torch.no_grad():
        assert torch.allclose(result(x), record.rewritten(x)[0], atol=1e-5)


def test_weights_are_packed_once_and_the_plain_ones_leave():
    _, record = compiled(Feed().eval(), torch.randn(3, 40))
    nodes = quantized(record.lowered)
    assert all(parse_weight_format(node.kwargs["format"]).layout == "panels" for node in nodes)
    codes = [record.lowered.get_buffer(arguments(node)["codes"][0].target) for node in nodes]
    assert [tuple(c.shape) for c in codes] == [(4, 2, 512), (3, 2, 512)]
    assert sum(name.endswith("panels") for name, _ in record.lowered.named_buffers()) == 6
    assert not [n for n, _ in record.lowered.named_buffers() if "codes" in n and not n.endswith("panels")]
    assert all(parse_weight_format(node.kwargs["format"]).layout == "plain" for node in quantized(record.rewritten))
    assert pack_weights.pack(record.lowered) == 0


class Tied(nn.Module):
    """An embedding and a head that read one packed table."""

    def __init__(self):
        super().__init__()
        self.format = WeightFormat(bits=4, group=32)
        self.register_buffer("codes", torch.randint(0, 256, (50, 2 * 16), dtype=torch.uint8))
        self.register_buffer("scale", torch.rand(50, 2).half())

    def forward(self, ids):
        text = self.format.text()
        x = torch.ops.tilewright.quantized_embedding(
            ids, self.codes, self.scale, None, rows=50, columns=64, format=text, dtype=torch.float32
        )
        return torch.ops.tilewright.quantized_linear(x, [self.codes], [self.scale], [], [None], rows=[50], format=text)


def test_a_tied_table_stays_one():
    model, ids = Tied(), torch.randint(0, 50, (2, 5))
    result = tw.compile(model, [], example_inputs=(ids,), rest="eager", target="cpp")
    lowered = result.records[0].lowered
    packed = [n for n, b in lowered.named_buffers() if b.dtype == torch.uint8]
    assert len(packed) == 1 and packed[0].endswith("panels")
    assert torch.allclose(result(ids), model(ids), atol=1e-4)


def test_a_weight_that_is_no_constant_is_left_as_it_is():
    model, ids = Tied(), torch.randint(0, 50, (2, 5))
    module = copy_module(
        tw.compile(model, [], example_inputs=(ids,), rest="eager", target="reference").records[0].raised
    )
    node = quantized(module)[0]
    with module.graph.inserting_before(node):
        codes = node.args[1][0]
        copy = module.graph.call_function(torch.ops.aten.clone.default, (codes,))
    copy.meta = dict(codes.meta)
    node.update_arg(1, [copy])
    pack_weights.pack(module)
    assert parse_weight_format(node.kwargs["format"]).layout == "plain"


@pytest.mark.parametrize("bias", [False, True])
def test_layers_that_share_their_input_are_one_launch(bias):
    """For Triton: query, key and value are one weight of packed rows."""
    model, ids = tiny_llama(), torch.randint(0, 97, (2, 9))
    for layer in model.model.layers if bias else ():
        layer.self_attn.k_proj.bias = nn.Parameter(torch.randn(32))
    result = tw.compile(model, [Coded("-")], example_inputs=(ids,), rest="eager", target="triton-interpret")
    record = result.records[0]
    calls = [arguments(node) for node in quantized(record.lowered)]
    assert [call["rows"] for call in calls] == [[128], [64], [96, 96], [64]] * 2 + [[97]]
    assert all(len(call[key]) == 1 for call in calls[::4] for key in ("codes", "scales", "zeros", "biases"))
    assert [call["biases"][0] is not None for call in calls[::4]] == [bias] * 2 + [False]
    names = [name for name, _ in record.lowered.named_buffers()]
    assert sum("joined" in name for name in names) == 3 * 2  # codes, scales and zeros of two layers
    assert len([name for name in names if "codes" in name]) == 2 * 5 + 1  # and what they were is gone
    with torch.no_grad():
        wanted = record.rewritten(ids)[0]
        assert torch.allclose(result(ids).logits, wanted, atol=1e-5)
        if bias:  # still the model's
            model.model.layers[0].self_attn.k_proj.bias.add_(1.0)
            assert not torch.allclose(result(ids).logits, wanted, atol=1e-3)


def test_a_weight_that_others_read_is_not_joined():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(64, 32, bias=False), nn.Linear(64, 16, bias=False)

        def forward(self, x, y):
            return self.first(x) + 1, self.second(x) + 1, self.first(y) + 1

    x, y = torch.randn(3, 64), torch.randn(5, 64)
    passes = [tw.passes.Quantize(bits=8, group_size=32)]
    result = tw.compile(Twice().eval(), passes, example_inputs=(x, y), rest="eager", target="triton-interpret")
    calls = [arguments(node) for node in quantized(result.records[0].lowered)]
    assert sorted(call["rows"] for call in calls) == [[32], [32, 16]]
    for got, want in zip(result(x, y), result.records[0].rewritten(x, y), strict=True):
        assert torch.allclose(got, want, atol=1e-5)
