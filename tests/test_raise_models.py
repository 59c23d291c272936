"""Raising whole models: every site is found through both doors, outputs stay, gradients and compilation work."""

import contextlib

import pytest
import torch
from raise_cases import assert_close, counts

from tilewright.frontend.capture import placeholder_values, retrace
from tilewright.frontend.raising import raise_graph
from tilewright.passes.site import get_site
from tilewright.runtime import ops

transformers = pytest.importorskip("transformers")

LAYERS = 2
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
CAUSAL = {"vocab_size": 96, "use_cache": False, "num_key_value_heads": 2, **SIZES}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 32, "use_cache": False}
T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": LAYERS, "num_heads": 4, "use_cache": False}
VIT = {"image_size": 16, "patch_size": 8, **SIZES}

# Architecture -> configuration, its fields, model, what raising finds.
MODELS = {
    "bert": (
        "BertConfig",
        {"vocab_size": 96, **SIZES},
        "BertModel",
        {"layer_norm": 2 * LAYERS + 1, "attention": LAYERS, "linear": 6 * LAYERS + 1},
    ),
    "gpt2": (
        "GPT2Config",
        GPT2,
        "GPT2LMHeadModel",
        {"layer_norm": 2 * LAYERS + 1, "attention": LAYERS, "linear": 4 * LAYERS + 1},
    ),
    "llama": (
        "LlamaConfig",
        CAUSAL,
        "LlamaForCausalLM",
        {
            "rms_norm": 2 * LAYERS + 1,
            "rope": 2 * LAYERS,
            "gated_mlp": LAYERS,
            "attention": LAYERS,
            "linear": 7 * LAYERS + 1,
        },
    ),
    "mistral": (
        "MistralConfig",
        {"sliding_window": 4, **CAUSAL},
        "MistralForCausalLM",
        {
            "rms_norm": 2 * LAYERS + 1,
            "rope": 2 * LAYERS,
            "gated_mlp": LAYERS,
            "attention": LAYERS,
            "linear": 7 * LAYERS + 1,
        },
    ),
    "t5": (
        "T5Config",
        {"feed_forward_proj": "gated-silu", **T5},
        "T5ForConditionalGeneration",
        # Encoder: two norms and one attention a layer; decoder: three norms, two attentions; a norm after each.
        {
            "rms_norm": 5 * LAYERS + 2,
            "gated_mlp": 2 * LAYERS,
            "attention": 3 * LAYERS,
            "linear": 4 * 3 * LAYERS + 3 * 2 * LAYERS + 1,
        },
    ),
    "vit": (
        "ViTConfig",
        VIT,
        "ViTModel",
        {"layer_norm": 2 * LAYERS + 1, "attention": LAYERS, "linear": 6 * LAYERS + 1},
    ),
}
models = pytest.mark.parametrize("name", MODELS)
implementations = pytest.mark.parametrize("implementation", ["eager", "sdpa"])


def build(name, implementation, dtype=torch.float32):
    config, fields, model, expected = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config)(**fields, attn_implementation=implementation)
    model = getattr(transformers, model)(config).eval().to(dtype)
    ids = torch.randint(3, 96, (2, 7))
    if name == "vit":
        return model, {"pixel_values": torch.randn(2, 3, 16, 16, dtype=dtype)}, expected
    if name == "t5":
        return model, {"input_ids": ids, "decoder_input_ids": ids[:, :5]}, expected
    return model, {"input_ids": ids}, expected


def result_of(output):
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def export(model, inputs):
    with torch.no_grad():
        return torch.export.export(model, (), inputs, strict=False).module()


@models
@implementations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_door_one(name, implementation, dtype):
    model, inputs, expected = build(name, implementation, dtype)
    module = export(model, inputs)
    before = result_of(module(**inputs))
    result = raise_graph(module)
    assert counts(result) == expected
    assert not result.near_misses and not result.declined
    assert_close(result_of(module(**inputs)), before)
    ids = [site.id for site in result.sites]
    assert len(set(ids)) == len(ids) and all(site.source and site.module for site in result.sites)
    sited = [node for node in module.graph.nodes if ops.is_canonical(node.target)]
    assert [get_site(node) for node in sited] == result.sites
    assert all(isinstance(node.meta["val"], torch.Tensor) for node in sited)
    # What stands in the graph is what the metadata says.
    for node, value in run(module, inputs).items():
        val = node.meta["val"]
        assert (val.dtype, val.shape, val.stride()) == (value.dtype, value.shape, value.stride()), node


def run(module, inputs):
    """Canonical node -> its value."""
    values = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, node):
            value = super().run_node(node)
            if ops.is_canonical(node.target):
                values[node] = value
            return value

    with torch.no_grad():
        Recorder(module).run(*inputs.values())
    return values


@pytest.mark.parametrize(
    ("name", "implementation"),
    [("bert", "eager"), ("gpt2", "sdpa"), ("llama", "eager"), ("mistral", "sdpa"), ("t5", "sdpa"), ("vit", "eager")],
)
def test_door_two_with_gradients(name, implementation, fresh_dynamo):
    model, inputs, expected = build(name, implementation)
    found = []

    def backend(module, example_inputs):
        graph = retrace(module, placeholder_values(module))
        found.append(raise_graph(graph))
        return torch._dynamo.backends.debugging.aot_eager(graph, example_inputs)

    want = result_of(model(**inputs))
    direction = torch.randn(want.shape)
    (want * direction).mean().backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    got = result_of(torch.compile(model, backend=backend)(**inputs))
    (got * direction).mean().backward()
    assert len(found) == 1 and counts(found[0]) == expected
    assert_close(got, want)
    # Sums over the batch and the layers above round more than one output does. Some gradients are zero up to rounding
    # (a bias of the keys shifts every score of a row alike), so the least scale is a thousandth of the largest.
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for key, p in model.named_parameters():
        if key in gradients:
            scale = max(gradients[key].abs().max().item(), largest / 1000)
            bound = 64 * torch.finfo(torch.float32).eps * scale
            torch.testing.assert_close(p.grad, gradients[key], rtol=0, atol=bound, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.slow
def test_a_raised_graph_goes_through_inductor(fresh_dynamo):
    model, inputs, _ = build("llama", "sdpa")
    module = export(model, inputs)
    before = result_of(module(**inputs))
    raise_graph(module)
    with torch.no_grad():
        assert_close(result_of(torch.compile(module)(**inputs)), before, ulps=16)


def test_raising_twice_changes_nothing_more():
    model, inputs, _ = build("llama", "eager")
    module = export(model, inputs)
    raise_graph(module)
    text = module.code
    assert raise_graph(module).sites == []
    assert module.code == text


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_dynamic_sizes_stay_dynamic(training):
    model, inputs, expected = build("llama", "sdpa")
    model.train(training)
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with contextlib.nullcontext() if training else torch.no_grad():
        program = torch.export.export(model, (), inputs, dynamic_shapes={"input_ids": dynamic}, strict=False)
    module = program.module()
    result = raise_graph(module)
    assert counts(result) == expected
    for shape in ((1, 5), (3, 11)):
        ids = torch.randint(3, 96, shape)
        assert_close(module(input_ids=ids).logits, model(input_ids=ids).logits)
