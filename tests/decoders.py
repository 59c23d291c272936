"""Small random decoders of several architectures, compiled once a process, for tests of the KV cache."""

from __future__ import annotations

import functools

import tiny
import torch
from torch import nn

import tilewright as tw
from tilewright.passes import KVCache

ROOM = 64


@functools.cache
def model(name: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    common = {"vocab_size": 96, "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None}
    common |= {"pad_token_id": 0}
    heads = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    if name == "llama":
        return tiny.llama(bos_token_id=None, eos_token_id=None)
    if name == "mistral":  # a window shorter than the prompts
        config = transformers.MistralConfig(
            **common, **heads, num_key_value_heads=2, intermediate_size=48, sliding_window=5
        )
        return transformers.MistralForCausalLM(config).eval()
    if name == "qwen3":
        config = transformers.Qwen3Config(**common, **heads, num_key_value_heads=2, intermediate_size=48, head_dim=16)
        return transformers.Qwen3ForCausalLM(config).eval()
    if name == "gpt2":
        config = transformers.GPT2Config(**common, n_embd=32, n_layer=1, n_head=4, n_positions=128)
        return transformers.GPT2LMHeadModel(config).eval()
    if name == "opt":
        common.pop("initializer_range")
        config = transformers.OPTConfig(
            **common, **heads, ffn_dim=48, word_embed_proj_dim=32, init_std=0.3, max_position_embeddings=128
        )
        return transformers.OPTForCausalLM(config).eval()
    raise KeyError(name)


@functools.cache
def compiled(name: str, **options: object) -> tw.CompiledModule:
    """With a cache of :data:`ROOM` tokens; options: of the pass."""
    return tw.compile(model(name), passes=[KVCache(**{"max_length": ROOM} | options)], rest="eager", target="reference")


def padded(batch: int = 3, length: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention_mask, the sequences padded on the left by 0, 2, 4 ... tokens."""
    ids = tiny.tokens(batch, length)
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, : 2 * row] = 0
    return ids.masked_fill(mask == 0, 0), mask
