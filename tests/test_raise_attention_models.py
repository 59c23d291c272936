"""Attention and masks of transformers models, through both doors: how many sites, which masks, the same outputs."""

from __future__ import annotations

import pytest
import torch
from attention_cases import ATTENTION, RULES, raise_graph
from tiny import bert, llama, tokens
from torch import nn

from tilewright.frontend.capture import export_model, placeholder_values, retrace
from tilewright.passes.view import arguments

pytest.importorskip("transformers")

CAUSAL = "k_idx <= q_idx"
WINDOW = "(k_idx <= q_idx) & (k_idx > q_idx - 4)"
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def gpt2(attn):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    special = {"bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, **special, attn_implementation=attn)).eval()


def mistral(attn):
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**SIZES, vocab_size=96, num_key_value_heads=2, sliding_window=4, attn_implementation=attn)
    return MistralForCausalLM(config).eval()


def t5(attn):
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, attn_implementation=attn)).eval()


def vit(attn):
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(**SIZES, image_size=16, patch_size=4, attn_implementation=attn)).eval()


class Call(nn.Module):
    """A model as a function of tensors: keyword arguments fixed, the first output only."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], fixed: dict) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.fixed = fixed

    def forward(self, *inputs):
        return self.model(**dict(zip(self.names, inputs, strict=True)), **self.fixed)[0]


NO_CACHE = {"use_cache": False}
# name: (model, inputs, fixed, masks of the sites in graph order without padding)
MODELS = {
    "bert": (bert, {"input_ids": tokens()}, {}, ["", ""]),
    "gpt2": (gpt2, {"input_ids": tokens()}, NO_CACHE, [CAUSAL, CAUSAL]),
    "llama": (llama, {"input_ids": tokens()}, NO_CACHE, [CAUSAL, CAUSAL]),
    "mistral": (mistral, {"input_ids": tokens()}, NO_CACHE, [WINDOW, WINDOW]),
    "t5": (
        t5,
        {"input_ids": tokens(length=9), "decoder_input_ids": tokens(length=7)},
        NO_CACHE,
        ["", "", CAUSAL, "", CAUSAL, ""],
    ),
    "vit": (vit, {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)}, {}, ["", ""]),
}
# How far apart two float32 evaluations of these two-layer models may be: each layer's attention is off by its own
# tolerance (2e-5 relative), and outputs of order one pass a handful of layers that do not amplify.
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


def build(name, attn, padding=None):
    make, inputs, fixed, masks = MODELS[name]
    torch.manual_seed(0)
    model = make(attn)
    if padding is not None:
        ids = inputs["input_ids"]
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        inputs = inputs | {"attention_mask": mask if padding == "left" else mask.flip(1)}
    return Call(model, tuple(inputs), fixed), tuple(inputs.values()), masks


def sites(graph):
    return [arguments(node) for node in graph.graph.nodes if node.target is ATTENTION]


def through_export(model, inputs):
    """Door one, static shapes. Returns (graph before, raised graph, result of raising)."""
    from tilewright.frontend.capture import copy_module

    shapes = {"inputs": tuple({} for _ in inputs)}
    before = export_model(model, inputs, {}, shapes).module
    after = copy_module(before)
    return before, after, raise_graph(after, RULES)


def flat(output):
    return torch.utils._pytree.tree_leaves(output)[0]


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_export_door(name, attn):
    model, inputs, masks = build(name, attn)
    with torch.no_grad():
        before, after, result = through_export(model, inputs)
        assert [site["mask"] for site in sites(after)] == masks
        assert (result.declined, result.near_misses) == ([], [])
        for node in after.graph.nodes:
            assert "softmax" not in str(node.target) and "scaled_dot" not in str(node.target)
        torch.testing.assert_close(flat(after(*inputs)), flat(before(*inputs)), **TOLERANCE)
    if name in ("llama", "mistral"):
        assert {site["k"].meta["val"].shape[1] for site in sites(after)} == {2}
    if name != "t5":
        assert {site["bias"] for site in sites(after)} == {None}


@pytest.mark.parametrize(
    ("name", "attn"),
    # The other half is in test_raise_models.py.
    [("bert", "sdpa"), ("gpt2", "eager"), ("llama", "sdpa"), ("mistral", "eager"), ("t5", "eager"), ("vit", "sdpa")],
)
def test_dynamo_door(name, attn, fresh_dynamo):
    model, inputs, masks = build(name, attn)
    found = []

    def backend(graph, _):
        traced = retrace(graph, placeholder_values(graph))
        result = raise_graph(traced, RULES)
        found.append((sites(traced), result))
        return traced

    with torch.no_grad():
        expected = model(*inputs)
        actual = torch.compile(model, backend=backend)(*inputs)
    assert [site["mask"] for raised, _ in found for site in raised] == masks
    for _, result in found:
        assert (result.declined, result.near_misses) == ([], [])
    torch.testing.assert_close(actual, expected, **TOLERANCE)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "mistral", "t5"])
def test_padding(name, attn):
    """Left padding hides every key of the first rows: they are compared as well."""
    model, inputs, masks = build(name, attn, "left")
    with torch.no_grad():
        before, after, result = through_export(model, inputs)
        raised = sites(after)
        assert len(raised) == len(masks) and result.near_misses == []
        for number in range(2):
            other = [t.flip(1) if t.dtype == torch.int64 and number else t for t in inputs]
            torch.testing.assert_close(flat(after(*other)), flat(before(*other)), **TOLERANCE)
    biases = [None if site["bias"] is None else site["bias"].meta["val"] for site in raised]
    if attn == "sdpa" and name != "t5":
        # Boolean masks come apart: positions in the text, padding as one row of keys.
        assert [site["mask"] for site in raised] == masks
        assert {(b.dtype, tuple(b.shape)) for b in biases} == {(torch.bool, (2, 1, 1, 7))}
    elif name == "bert":
        assert {(b.dtype, tuple(b.shape)) for b in biases} == {(torch.float32, (2, 1, 1, 7))}
    elif name != "t5":
        # finfo.min on rows that may see no key is no mask.
        assert {site["mask"] for site in raised} == {""}


def test_output_attentions_is_a_near_miss():
    model, inputs, _ = build("bert", "eager")
    model = Attentions(model.model)
    with torch.no_grad():
        before, after, result = through_export(model, inputs)
        assert sites(after) == []
        assert len(result.near_misses) == 2
        assert all("used more than once" in reason for _, _, reason in result.near_misses)
        torch.testing.assert_close(after(*inputs), before(*inputs), rtol=0, atol=0)


class Attentions(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *inputs):
        return self.model(inputs[0], output_attentions=True).attentions


@pytest.mark.parametrize(("attn", "reason"), [("eager", "softcapping")])
def test_softcapping_is_a_near_miss(attn, reason):
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(0)
    config = Gemma2Config(**SIZES, vocab_size=96, num_key_value_heads=2, head_dim=8, attn_implementation=attn)
    model = Call(Gemma2Model(config).eval(), ("input_ids",), NO_CACHE)
    with torch.no_grad():
        _, after, result = through_export(model, (tokens(),))
    assert sites(after) == []
    assert len(result.near_misses) == 2 and all(reason in why for _, _, why in result.near_misses)


def test_sinks_are_a_near_miss():
    from transformers import GptOssConfig, GptOssModel

    torch.manual_seed(0)
    config = GptOssConfig(
        **SIZES, vocab_size=96, num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1,
        attn_implementation="eager",
    )  # fmt: skip
    model = Call(GptOssModel(config).eval(), ("input_ids",), NO_CACHE)
    with torch.no_grad():
        _, after, result = through_export(model, (tokens(),))
    assert sites(after) == []
    assert any("sinks" in why for _, _, why in result.near_misses)
    assert all(site.op == "attention" for site, _, _ in result.near_misses)


def test_dropout_in_training_is_declined():
    model, inputs, _ = build("bert", "eager")
    model.train()
    _, after, result = through_export(model, inputs)
    assert sites(after) == []
    assert [reason for _, reason in result.declined] == ["dropout is active (p=0.1)"] * 2


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_dynamic_lengths(attn):
    """One graph for all lengths: the mask is told in positions, not in sizes."""
    model, inputs, masks = build("llama", attn)
    captured = export_model(model, inputs, {})
    graph = captured.module
    raise_graph(graph, RULES)
    assert [site["mask"] for site in sites(graph)] == masks
    with torch.no_grad():
        for batch, length in ((1, 5), (3, 12)):
            ids = tokens(batch, length, seed=1)
            torch.testing.assert_close(flat(graph(ids)), model(ids), **TOLERANCE)


@pytest.mark.parametrize(("attn", "cache"), [("eager", "dynamic"), ("sdpa", "static")])
def test_generate(attn, cache, fresh_dynamo):
    """generate() with a growing or a static cache, token for token; every attention of every graph is found."""
    model = llama(attn)
    ids = tokens(1, 6)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    counts = []

    def backend(graph, _):
        traced = retrace(graph, placeholder_values(graph))
        result = raise_graph(traced, RULES)
        counts.append((len(sites(traced)), result.declined, result.near_misses))
        return traced

    with torch.no_grad():
        expected = model.generate(ids, **options)
        model.forward = torch.compile(model.forward, backend=backend)
        actual = model.generate(ids, **options)
    assert torch.equal(actual, expected)
    assert counts and all(count == (2, [], []) for count in counts), counts
