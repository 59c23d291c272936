"""Import of GGUF, AWQ and GPTQ checkpoints: packed without loss, tied weights tied, nothing silently float.

The checkpoints are made here: GGUF by the ``gguf`` package, AWQ and GPTQ by packers written for these tests, number by
number, from the published layouts.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tilewright as tw
from tilewright import errors
from tilewright.frontend import import_awq_gptq
from tilewright.frontend.quantized_modules import QuantizedEmbedding, QuantizedLinear, replace

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 96}


def llama(**config: object) -> nn.Module:
    torch.manual_seed(0)
    return tiny.llama(**(SIZES | config))


# GGUF.


def write_gguf(
    path: Path, model: nn.Module, kinds: dict[str, str], rows: dict[str, torch.Tensor] | None = None
) -> None:
    """A Llama as llama.cpp writes it: queries' and keys' rows of a head's two halves interleaved.

    kinds: of each linear layer's weight, by the last part of its GGUF name, and ``token_embd`` and ``output``.
    """
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    names = {"embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm"}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "o_proj": "attn_output"}
    names |= {f"{one}_proj": f"attn_{one}" for one in "qkv"} | {
        f"{one}_proj": f"ffn_{one}" for one in ("gate", "up", "down")
    }
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        leaf = next(there for here, there in names.items() if here in name)
        block = f"blk.{name.split('.')[2]}." if ".layers." in name else ""
        data = tensor.detach().numpy()
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(leaf)
        if heads:
            data = data.reshape(heads, 2, -1, data.shape[-1]).swapaxes(1, 2).reshape(data.shape)
        kind = gguf.GGMLQuantizationType[kinds.get(leaf, "F32")]
        packed = gguf.quants.quantize(np.ascontiguousarray(data), kind) if data.ndim > 1 else data
        writer.add_tensor(f"{block}{leaf}.weight", packed, raw_dtype=kind if data.ndim > 1 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


KINDS = {"attn_q": "Q4_0", "attn_k": "Q4_1", "attn_v": "Q8_0", "attn_output": "Q4_1", "ffn_gate": "Q4_0"}
KINDS |= {"ffn_up": "Q5_1", "ffn_down": "Q8_0", "token_embd": "Q8_0", "output": "Q4_0"}


@pytest.mark.parametrize("tied", [True, False])
def test_gguf_keeps_every_bit(tmp_path, tied) -> None:
    write_gguf(tmp_path / "m.gguf", llama(tie_word_embeddings=tied), KINDS)
    before = (tmp_path / "m.gguf").read_bytes()
    with pytest.warns(errors.TilewrightWarning, match=r"2 weights .* ffn_up|up_proj"):
        got = tw.load_quantized(tmp_path / "m.gguf")
    want = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file="m.gguf", dtype=torch.float32)
    packed = {name: module for name, module in got.model.named_modules() if hasattr(module, "codes")}
    for name, module in packed.items():
        assert torch.equal(module.dequantized(), want.get_submodule(name).weight), name
    assert len(packed) == 2 * 6 + 2  # all linears but the Q5_1 ones, embedding and head
    assert [one.name for one in got.report.unpacked] == [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]
    assert "Q5_1" in str(got.report)
    assert got.report.packed_bytes == sum(m.weight_bytes for n, m in packed.items() if n not in got.report.tied)
    head, table = got.model.lm_head, got.model.model.embed_tokens
    assert (head.codes is table.codes) == tied == ("lm_head" in got.report.tied)
    ids = tiny.tokens()
    with torch.no_grad():
        assert torch.equal(got.model(ids, use_cache=False).logits, want(ids, use_cache=False).logits)
    assert (tmp_path / "m.gguf").read_bytes() == before


def test_gguf_model_compiles_with_and_without_a_cache(tmp_path) -> None:
    write_gguf(tmp_path / "m.gguf", llama(tie_word_embeddings=True, num_hidden_layers=1), KINDS | {"ffn_up": "Q4_0"})
    model = tw.load_quantized(tmp_path).model
    ids = tiny.tokens()
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        for passes in ((), [tw.passes.KVCache(max_length=32)]):
            compiled = tw.compile(
                model, passes, example_kwargs={"input_ids": ids, "use_cache": False}, rest="eager", target="reference"
            )
            torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, want, rtol=1e-5, atol=1e-5)
            graph = compiled.records[0].lowered.graph
            called = [node.target._opname for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
            assert {"quantized_embedding", "quantized_linear", "gated_mlp"} <= set(called) and "linear" not in called
        text = compiled.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert torch.equal(text, model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0))


def test_activations_are_rounded_when_asked(tmp_path) -> None:
    write_gguf(tmp_path / "m.gguf", llama(tie_word_embeddings=True, num_hidden_layers=1), KINDS | {"ffn_up": "Q4_0"})
    plain, got = (tw.load_quantized(tmp_path, activations=bits).model for bits in (None, 8))
    layer, x = got.model.layers[0].mlp.down_proj, torch.randn(3, plain.config.intermediate_size)
    step = x.abs().amax(-1, keepdim=True) / 127
    want = plain.model.layers[0].mlp.down_proj((x / step).round()) * step
    torch.testing.assert_close(layer(x), want)
    assert got.lm_head.codes is got.model.embed_tokens.codes
    with pytest.raises(errors.BadArgument, match="8, 4 or None"):
        tw.load_quantized(tmp_path, activations=6)


def test_gguf_damage_is_told(tmp_path) -> None:
    path = tmp_path / "m.gguf"
    model = llama(tie_word_embeddings=True)
    write_gguf(path, model, {"ffn_down": "Q4_0"})
    whole = path.read_bytes()
    path.write_bytes(whole[:-4096])
    with pytest.raises(errors.CheckpointError, match=r"m\.gguf"):
        tw.load_quantized(path)
    path.write_bytes(b"GGUF" + whole[60:])
    with pytest.raises(errors.CheckpointError, match="cannot be read"):
        tw.load_quantized(path)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = float("nan")
    write_gguf(path, model, {"ffn_down": "Q4_0"})
    with pytest.raises(errors.CheckpointError, match=r"layers\.1\.mlp\.down_proj: a scale is not finite"):
        tw.load_quantized(path)
    with pytest.raises(errors.CheckpointError, match="no file or folder"):
        tw.load_quantized(tmp_path / "nowhere")


# AWQ and GPTQ: weights are drawn as codes, zeros and scales, and packed number by number.


def draw(rows: int, columns: int, group: int, bits: int, seed: int, symmetric: bool) -> tuple[np.ndarray, ...]:
    """codes (K, N), zeros and scales (G, N), as the formats have them."""
    rng = np.random.default_rng(seed)
    groups = 1 if group < 0 else -(-columns // group)
    codes = rng.integers(0, 2**bits, (columns, rows))
    zeros = rng.integers(1, 2**bits, (groups, rows)) if not symmetric else np.full((groups, rows), 2 ** (bits - 1))
    return codes, zeros, rng.uniform(0.01, 0.04, (groups, rows)).astype(np.float16)


def words(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Numbers along the first axis as one little-endian stream of bits in int32."""
    total = np.zeros((numbers.shape[0] * bits // 32, numbers.shape[1]), np.uint64)
    for place, row in enumerate(numbers.astype(np.uint64)):
        word, shift = divmod(place * bits, 32)
        total[word] |= (row << np.uint64(shift)) & np.uint64(0xFFFFFFFF)
        if shift + bits > 32:
            total[word + 1] |= row >> np.uint64(32 - shift)
    return total.astype(np.uint32).view(np.int32)


def awq_words(numbers: np.ndarray) -> np.ndarray:
    """Eight neighbours along the last axis in a word, in AutoAWQ's order."""
    total = np.zeros((numbers.shape[0], numbers.shape[1] // 8), np.uint32)
    for column in range(total.shape[1]):
        for nibble, neighbour in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            total[:, column] |= numbers[:, 8 * column + neighbour].astype(np.uint32) << np.uint32(4 * nibble)
    return total.view(np.int32)


def write_folder(
    folder: Path, method: str, bits: int = 4, group: int = 32, form: str = "gptq", symmetric=False, order="none"
) -> nn.Module:
    """A checkpoint, and the float model that it stands for."""
    model = llama(hidden_size=128 if bits == 3 else 64)  # 3 bits need 32 rows
    state = {n: t.clone() for n, t in model.state_dict().items()}
    generator = np.random.default_rng(1)
    for seed, (name, module) in enumerate(model.named_modules()):
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        columns, rows = module.in_features, module.out_features
        codes, zeros, scales = draw(rows, columns, group, bits, seed, symmetric)
        owner = np.arange(columns) // (columns if group < 0 else group)
        if order == "permuted":
            owner = generator.permutation(owner)
        elif order == "uneven":
            owner[0] = owner[-1]
        values = (codes - zeros[owner]) * scales[owner].astype(np.float32)
        module.weight = nn.Parameter(torch.from_numpy(values.T.astype(np.float32).copy()))
        del state[f"{name}.weight"]
        if method == "awq":
            packed = {"qweight": awq_words(codes), "qzeros": awq_words(zeros)}
        else:
            stored = zeros - 1 if form == "gptq" else zeros
            packed = {"qweight": words(codes, bits), "qzeros": words(stored.T, bits).T, "g_idx": owner.astype(np.int32)}
        state |= {f"{name}.{part}": torch.from_numpy(value.copy()) for part, value in packed.items()}
        state[f"{name}.scales"] = torch.from_numpy(scales)
    config = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    scheme = {"quant_method": method, "bits": bits, "group_size": group, "sym": symmetric, "desc_act": order != "none"}
    scheme |= {"version": "gemm", "zero_point": True} if method == "awq" else {"checkpoint_format": form}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": scheme}))
    save_file({n: t.contiguous() for n, t in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return model


def assert_imported(folder: Path, want: nn.Module) -> tw.frontend.import_checkpoint.QuantizedCheckpoint:
    got = tw.load_quantized(folder)
    for name, module in got.model.named_modules():
        if hasattr(module, "codes"):
            assert torch.equal(module.dequantized(), want.get_submodule(name).weight), name
    ids = tiny.tokens()
    with torch.no_grad():
        result, expected = got.model(ids, use_cache=False).logits, want(ids, use_cache=False).logits
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    return got


CASES = [
    ("awq", {}, {"group": 32, "zero": "point"}),
    ("awq", {"group": -1}, {"zero": "point"}),
    ("gptq", {"bits": 4}, {"group": 32, "zero": "point"}),
    ("gptq", {"bits": 4, "form": "gptq_v2"}, {"group": 32, "zero": "point"}),
    # 96 columns are a group and a half.
    ("gptq", {"bits": 8, "group": 64}, {"bits": 8, "group": 64, "zero": "point"}),
    ("gptq", {"bits": 3}, {"bits": 3, "group": 32, "zero": "point"}),
    ("gptq", {"bits": 2, "group": -1}, {"bits": 2, "zero": "point"}),
    ("gptq", {"bits": 4, "symmetric": True}, {"group": 32}),
]


@pytest.mark.parametrize(("method", "options", "fields"), CASES, ids=[f"{m}-{o}" for m, o, _ in CASES])
def test_awq_and_gptq_keep_every_number(tmp_path, method, options, fields) -> None:
    want = write_folder(tmp_path, method, **options)
    got = assert_imported(tmp_path, want)
    last = next(one for one in got.report.packed if one.module.endswith("down_proj"))
    assert json.loads(last.format) == fields
    assert len(got.report.packed) == 14 and not got.report.unpacked
    assert not hasattr(got.model.config, "quantization_config")


def test_activation_order_permutes_the_input(tmp_path) -> None:
    got = assert_imported(tmp_path, write_folder(tmp_path, "gptq", order="permuted"))
    assert all(one.order for one in got.report.packed) and len(got.report.packed) == 14
    ids = tiny.tokens()
    compiled = tw.compile(
        got.model, example_kwargs={"input_ids": ids, "use_cache": False}, rest="eager", target="reference"
    )
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(input_ids=ids, use_cache=False).logits, got.model(ids, use_cache=False).logits
        )


def test_groups_that_do_not_fit_become_float_and_are_told(tmp_path) -> None:
    want = write_folder(tmp_path / "uneven", "gptq", order="uneven")
    with pytest.warns(errors.TilewrightWarning, match="14 weights that are quantized"):
        got = assert_imported(tmp_path / "uneven", want)
    assert not got.report.packed and "different numbers of columns" in got.report.unpacked[0].reason
    want = write_folder(tmp_path / "small", "gptq", group=16)
    with pytest.warns(errors.TilewrightWarning, match="no multiple of 32"):
        got = assert_imported(tmp_path / "small", want)
    assert len(got.report.unpacked) == 14


def test_three_bits_cross_words() -> None:
    numbers = np.random.default_rng(0).integers(0, 8, (64, 5))
    got = import_awq_gptq.stream(torch.from_numpy(words(numbers, 3).copy()).t(), 3)
    assert np.array_equal(got.numpy().T, numbers)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method='bitsandbytes'"),
        ({"bits": 5}, "5 bits"),
        ({"bits": 8}, "4 bits, but quantization_config says 8"),
        ({"checkpoint_format": "marlin"}, "format 'marlin'"),
        (None, "no quantization_config"),
    ],
)
def test_other_schemes_are_refused(tmp_path, change, match) -> None:
    write_folder(tmp_path, "gptq")
    config = json.loads((tmp_path / "config.json").read_text())
    if change is None:
        del config["quantization_config"]
    else:
        config["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(errors.CheckpointError, match=match):
        tw.load_quantized(tmp_path)


def test_incomplete_and_wrong_checkpoints_are_refused(tmp_path) -> None:
    write_folder(tmp_path, "awq")
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    layer = "model.layers.0.mlp.up_proj"
    cases = [
        ({f"{layer}.qzeros": None}, f"{layer} has no qzeros"),
        ({"model.norm.weight": None}, r"has no model\.norm\.weight"),
        ({"model.other.weight": torch.ones(3)}, r"holds model\.other\.weight"),
        ({"model.norm.weight": torch.ones(3)}, r"shape \(3,\), but the model has \(64,\)"),
        ({f"{layer}.qweight": state[f"{layer}.qweight"][:32].clone()}, "is not AWQ's for 96 outputs and 64 inputs"),
        ({f"{layer}.scales": state[f"{layer}.scales"].fill_(float("inf"))}, f"{layer}: a scale is not finite"),
    ]
    for change, match in cases:
        changed = {name: tensor for name, tensor in (load_file(path) | change).items() if tensor is not None}
        folder = tmp_path / "changed"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text((tmp_path / "config.json").read_text())
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(errors.CheckpointError, match=match):
            tw.load_quantized(folder)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(errors.CheckpointError, match="cannot be read"):
        tw.load_quantized(tmp_path)


# The modules.


def test_modules_move_and_refuse(tmp_path) -> None:
    write_folder(tmp_path, "awq")
    model = tw.load_quantized(tmp_path).model
    linear = model.model.layers[0].mlp.up_proj
    model.to(torch.bfloat16)
    assert linear.scale.dtype == torch.float16 and linear.codes.dtype == torch.uint8
    assert linear(torch.randn(3, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    table = QuantizedEmbedding(linear.codes, linear.scale, linear.zero, rows=96, columns=64, format=linear.format)
    assert table.to(torch.float64)(torch.tensor([[5]])).dtype == torch.float64
    with pytest.raises(errors.BadArgument, match="needs"):
        QuantizedLinear(linear.codes, linear.scale[:, :1], linear.zero, rows=96, columns=64, format=linear.format)
    layer = nn.Sequential(nn.Linear(64, 96))
    replace(layer, "0", linear)
    assert layer[0] is linear and linear.training
    restored = QuantizedLinear(
        *(torch.zeros_like(t) for t in (linear.codes, linear.scale, linear.zero)),
        rows=96,
        columns=64,
        format=linear.format,
    )
    restored.load_state_dict(linear.state_dict())
    assert torch.equal(restored.dequantized(), linear.dequantized())
