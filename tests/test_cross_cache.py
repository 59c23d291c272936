"""KV caches of encoder-decoders: generate() equal to eager, and what comes from the encoder computed once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from raise_cases import trace
from torch import nn

import tilewright
from tilewright.frontend.capture import copy_module
from tilewright.frontend.count_positions import follow_cache
from tilewright.passes import KVCache, StreamingCache
from tilewright.passes.base import Pass
from tilewright.passes.manager import run_pass
from tilewright.runtime import errors

# Weights large enough that what the encoder saw decides which token comes next.
SIZES = {"vocab_size": 96, "d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "init_std": 0.5}
SIZES |= {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def bart(**config: Any) -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    more = TOKENS | {"forced_eos_token_id": None, "max_position_embeddings": 40}
    return BartForConditionalGeneration(BartConfig(**(SIZES | more | config))).eval()


def compiled(model: nn.Module, *passes: Pass, **options: Any) -> Any:
    return tilewright.compile(
        model, passes=passes or [KVCache(max_length=32)], target="reference", rest="eager", **options
    )


def source(batch: int = 3) -> dict[str, torch.Tensor]:
    """Token ids for the encoder, one sequence padded."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 96, (batch, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


STEPS = {"max_new_tokens": 14, "min_new_tokens": 14}
WAYS = ({"do_sample": False}, {"num_beams": 3, "do_sample": False}, {"do_sample": True, "temperature": 3.0})


def same_tokens(model: nn.Module, module: Any, given: dict[str, torch.Tensor]) -> None:
    for way in WAYS:
        torch.manual_seed(5)
        expected = model.generate(**given, **STEPS, **way)
        torch.manual_seed(5)
        assert torch.equal(module.generate(**given, **STEPS, **way), expected), way


def test_generate_with_bart(tmp_path: Path) -> None:
    model = bart()
    module = compiled(model)
    given = source()
    same_tokens(model, module, given)
    with pytest.raises(errors.SaveError, match="encoder runs as the model's own"):
        tilewright.save(module, tmp_path / "m")
    with pytest.raises(errors.BadArgument, match="cannot be released"):
        module.release()

    # The encoder, keys and values of cross-attention: once a generation.
    encoded, made = [], []
    program = module._decoder()
    setup = program.setup
    program.setup = lambda *inputs: made.append(1) or setup(*inputs)
    program.setup.graph = setup.graph
    hook = model.get_encoder().register_forward_hook(lambda *_: encoded.append(1))
    out = module.generate(**given, **STEPS, do_sample=False, return_dict_in_generate=True)
    hook.remove()
    assert len(encoded) == len(made) == 1

    # Calls: logits of a whole text, and of its end from the cache, a copy of it, and a file.
    tokens = out.sequences
    with torch.no_grad():
        whole = model(**given, decoder_input_ids=tokens).logits
        first = module(**given, decoder_input_ids=tokens[:, :10])
    torch.testing.assert_close(first.logits, whole[:, :10], rtol=2e-5, atol=2e-5)
    cache = first.past_key_values
    cache.save(tmp_path / "cache")
    for one in (copy.deepcopy(cache), module.new_cache(tmp_path / "cache"), cache):
        rest = module(decoder_input_ids=tokens[:, 10:], past_key_values=one).logits
        torch.testing.assert_close(rest, whole[:, 10:], rtol=2e-5, atol=2e-5)

    # Sequences in another order bring what their encoder said along.
    order = torch.tensor([2, 0, 1])
    cache.crop(10)
    cache.reorder_cache(order)
    rest = module(decoder_input_ids=tokens[order, 10:], past_key_values=cache).logits
    torch.testing.assert_close(rest, whole[order, 10:], rtol=2e-5, atol=2e-5)
    assert cache.nbytes > sum(tensor.nbytes for tensor in cache.state.flat)

    # A cache that was reset belongs to the next text.
    cache.reset()
    with pytest.raises(errors.BadArgument, match="input_ids or encoder_outputs"):
        module(decoder_input_ids=tokens, past_key_values=cache)
    again = module(input_ids=given["input_ids"].flip(0), decoder_input_ids=tokens, past_key_values=cache).logits
    with torch.no_grad():
        expected = model(input_ids=given["input_ids"].flip(0), decoder_input_ids=tokens).logits
    torch.testing.assert_close(again, expected, rtol=2e-5, atol=2e-5)

    with pytest.raises(errors.BadArgument, match="needs decoder_input_ids"):
        module(**given)
    with pytest.raises(errors.BadArgument, match="saw 3 sequences"):
        module(**given, decoder_input_ids=tokens[:2])
    with pytest.raises(errors.BadArgument, match="labels"):
        module(**given, decoder_input_ids=tokens, labels=tokens)
    with pytest.raises(errors.CacheFull, match="room for 32"):
        module(**given, decoder_input_ids=tokens.repeat(1, 3))


def test_positions_follow_the_cache() -> None:
    """Counting over the call's tokens starts where the cache ends; counting over anything else does not."""

    def positions(tokens: torch.Tensor, length: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, ...]:
        count = tokens.shape[1]
        counted = torch.arange(count), torch.arange(0, count), torch.arange(other.shape[0]), torch.arange(1, count)
        return (*counted, length + 0)

    given = (torch.zeros(2, 5), torch.full((2,), 7, dtype=torch.int32), torch.zeros(6))
    module = trace(positions, *given, symbolic=True)
    tokens, length, _ = module.graph.find_nodes(op="placeholder")
    assert len(follow_cache(module.graph, tokens, length)) == 4
    module.recompile()
    first, second, other, inner, _ = module(*given)
    assert first.tolist() == second.tolist() == [7, 8, 9, 10, 11]
    assert other.tolist() == [0, 1, 2, 3, 4, 5] and inner.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("one", [KVCache(), StreamingCache()])
def test_scores_with_numbers_added_are_declined(one: Pass) -> None:
    """As T5's relative positions are."""
    q, bias = torch.randn(2, 4, 6, 8), torch.randn(1, 4, 6, 6)
    module = trace(lambda q, bias: torch.ops.tilewright.attention(q, q, q, bias, scale=0.4), q, bias)
    (_, reason) = run_pass(module, one, copy_module).declined[0]
    assert "relative positions as in T5" in reason


@pytest.mark.grid
@pytest.mark.parametrize("family", ["marian", "mbart", "pegasus", "whisper", "two layers", "streaming"])
def test_more_models(family: str) -> None:
    import transformers

    torch.manual_seed(0)
    more = TOKENS | {"forced_eos_token_id": None, "max_position_embeddings": 40}
    given: dict[str, torch.Tensor] = source()
    passes: list[Pass] = [KVCache(max_length=32)]
    example: dict[str, Any] = {}
    if family == "whisper":
        only = {"num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 40}
        config = transformers.WhisperConfig(**SIZES, **TOKENS, **only, suppress_tokens=None, begin_suppress_tokens=None)
        model = transformers.WhisperForConditionalGeneration(config).eval()
        features = torch.randn(3, 8, 24)
        module = compiled(model, example_kwargs={"input_features": features})
        expected = model.generate(features, max_new_tokens=20, do_sample=False)
        assert torch.equal(module.generate(features, max_new_tokens=20, do_sample=False), expected)
        return
    if family == "marian":
        model = transformers.MarianMTModel(transformers.MarianConfig(**SIZES, **more)).eval()
    elif family == "mbart":
        model = transformers.MBartForConditionalGeneration(transformers.MBartConfig(**SIZES, **more)).eval()
    elif family == "pegasus":
        model = transformers.PegasusForConditionalGeneration(transformers.PegasusConfig(**SIZES, **more)).eval()
    else:
        model = bart(encoder_layers=2, decoder_layers=2)
    if family == "streaming":
        passes = [StreamingCache(window=64, sinks=2)]
        example = {"example_kwargs": given}
    same_tokens(model, compiled(model, *passes, **example), given)


@pytest.mark.grid
def test_t5_is_refused() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    with pytest.raises(errors.NotADecoder, match="relative positions as in T5"):
        compiled(model)
