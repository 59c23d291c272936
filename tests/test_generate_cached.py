"""transformers' generate() on a module with a KV cache of ours: the same tokens as the model's own."""

from __future__ import annotations

import copy

import decoders
import pytest
import tiny
import torch

import tilewright as tw
from tilewright.passes import KVCache

pytest.importorskip("transformers")

MODELS = ("llama", "mistral", "gpt2", "opt", pytest.param("qwen3", marks=pytest.mark.grid))
GREEDY = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}


def both(name, ids, compiled=None, **options):
    """The tokens that the model and the compiled module generate."""
    found = []
    for module in (decoders.model(name), compiled or decoders.compiled(name)):
        torch.manual_seed(1)
        found.append(module.generate(ids, **(GREEDY | options)))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_greedy_with_left_padding(name):
    ids, mask = decoders.padded()
    want, got = both(name, ids, attention_mask=mask)
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": True, "top_k": 20, "temperature": 1.3},
        {"do_sample": True, "num_return_sequences": 3},
        {"prefill_chunk_size": 4},
        {"use_cache": False},
    ],
    ids=str,
)
def test_other_ways_to_generate(name, options):
    ids, mask = decoders.padded(2)
    want, got = both(name, ids, attention_mask=mask, **options)
    assert got.tolist() == want.tolist()


def test_a_batch_of_one_and_a_prompt_of_one_token():
    for ids in (tiny.tokens(1, 6), tiny.tokens(3, 1)):
        want, got = both("llama", ids)
        assert got.tolist() == want.tolist()


def test_paged_greedy_and_beams():
    compiled = decoders.compiled("llama", page_size=64, max_length=192)
    ids, mask = decoders.padded()
    for options in ({"max_new_tokens": 70}, {"num_beams": 3, "max_new_tokens": 60}):
        want, got = both("llama", ids, compiled, attention_mask=mask, **options)
        assert got.tolist() == want.tolist()


def test_prompt_lookup_crops_what_was_guessed_wrong():
    ids = tiny.tokens(1, 5).repeat(1, 4)
    want, got = both("llama", ids, prompt_lookup_num_tokens=3, max_new_tokens=16)
    assert got.tolist() == want.tolist()


def test_a_compiled_module_assists_another():
    ids = tiny.tokens(1, 7)
    model = decoders.model("llama")
    want = model.generate(ids, **GREEDY)
    got = decoders.compiled("llama").generate(ids, assistant_model=decoders.compiled("mistral"), **GREEDY)
    assert got.tolist() == want.tolist()


def test_a_second_turn_goes_on_from_the_cache_that_the_first_returned():
    ids = tiny.tokens(2, 6)
    texts = []
    for module in (decoders.model("llama"), decoders.compiled("llama")):
        first = module.generate(ids, return_dict_in_generate=True, **GREEDY)
        more = torch.cat((first.sequences, tiny.tokens(2, 3, seed=5)), dim=1)
        cache = first.past_key_values
        held = cache.get_seq_length()
        assert held == first.sequences.shape[1] - 1
        texts.append(module.generate(more, past_key_values=cache, **GREEDY).tolist())
    assert texts[0] == texts[1]


def test_a_copied_cache_continues_one_prefix_in_two_ways():
    compiled, prefix = decoders.compiled("llama"), tiny.tokens(1, 9)
    cache = compiled(prefix).past_key_values
    for seed in (3, 4):
        ids = torch.cat((prefix, tiny.tokens(1, 4, seed=seed)), dim=1)
        want = decoders.model("llama").generate(ids, **GREEDY)
        got = compiled.generate(ids, past_key_values=copy.deepcopy(cache), **GREEDY)
        assert got.tolist() == want.tolist()
    assert cache.get_seq_length() == 9


def test_streamer_and_stopping_criteria():
    from transformers import MaxTimeCriteria, StoppingCriteria, StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer

    class Collect(BaseStreamer):
        def __init__(self):
            self.pieces = []

        def put(self, value):
            self.pieces.append(value.flatten().tolist())

        def end(self):
            self.pieces.append("end")

    class Until(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 11)

    seen = []
    for module in (decoders.model("llama"), decoders.compiled("llama")):
        streamer = Collect()
        stop = StoppingCriteriaList([Until(), MaxTimeCriteria(60.0)])
        module.generate(tiny.tokens(1, 7), streamer=streamer, stopping_criteria=stop, **GREEDY)
        seen.append(streamer.pieces)
    assert seen[0] == seen[1] and seen[1][-1] == "end" and len(seen[1]) == 6


def test_scores_agree():
    ids, mask = decoders.padded()
    options = {"output_scores": True, "return_dict_in_generate": True, "attention_mask": mask}
    want, got = both("gpt2", ids, **options)
    for before, after in zip(want.scores, got.scores, strict=True):
        torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_a_cache_implementation_of_transformers_is_refused():
    with pytest.raises(tw.errors.BadArgument, match="keeps its cache itself"):
        decoders.compiled("llama").generate(tiny.tokens(1, 4), cache_implementation="static", **GREEDY)


def test_a_configuration_may_say_that_there_be_no_cache(monkeypatch):
    from transformers import GenerationConfig

    model, compiled, ids = decoders.model("llama"), decoders.compiled("llama"), tiny.tokens(2, 6)
    config = GenerationConfig(**GREEDY, use_cache=False)
    assert compiled.generate(ids, config).tolist() == model.generate(ids, config).tolist()
    want = model.generate(ids, **GREEDY).tolist()
    monkeypatch.setattr(model.generation_config, "cache_implementation", "static")
    assert compiled.generate(ids, **GREEDY).tolist() == want


def test_generating_past_the_limit_is_refused():
    with pytest.raises(tw.errors.CacheFull, match="room for 64"):
        decoders.compiled("llama").generate(tiny.tokens(1, 60), **GREEDY)


@pytest.mark.usefixtures("fresh_dynamo")
def test_inductor_compiles_prefill_and_decoding_once_each():
    model = tiny.llama(layers=1)
    compiled = tw.compile(model, passes=[KVCache(max_length=64)], target="reference")
    ids, mask = decoders.padded(2)
    for length in (9, 7, 5):
        options = GREEDY | {"attention_mask": mask[:, :length]}
        want, got = (m.generate(ids[:, :length], **options) for m in (model, compiled))
        assert got.tolist() == want.tolist()
        if length == 9:
            torch._dynamo.utils.counters.clear()
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]
