"""The KVCache pass, calls of what it makes, and the state behind them."""

from __future__ import annotations

import copy

import decoders
import pytest
import tiny
import torch
from torch import nn

import tilewright as tw
from tilewright.passes import KVCache, LMInfinite
from tilewright.runtime.kv_cache import CacheSite, KVState

errors = tw.errors


def logits(name, ids, **kwargs):
    with torch.no_grad():
        return decoders.model(name)(ids, **kwargs).logits


def close(got, want):
    torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)


# ------------------------------------------------------------------------------------------------------------ the calls


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "opt", pytest.param("qwen3", marks=pytest.mark.grid)])
def test_chunks_and_single_tokens_give_the_logits_of_the_whole(name):
    pytest.importorskip("transformers")
    ids, compiled = tiny.tokens(3, 14), decoders.compiled(name)
    cache, got = None, []
    for part in ids.split([4, 1, 6, 1, 2], dim=1):
        out = compiled(part, past_key_values=cache)
        assert isinstance(out, type(decoders.model(name)(part)))
        cache = out.past_key_values
        got.append(out.logits)
    assert cache.get_seq_length() == 14 and cache.batch_size == 3
    close(torch.cat(got, dim=1), logits(name, ids))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_left_padding_without_positions_is_as_in_the_model(name):
    ids, mask = decoders.padded()
    shown = mask.bool()
    want = logits(name, ids, attention_mask=mask)
    compiled = decoders.compiled(name)
    close(compiled(ids, attention_mask=mask).logits[shown], want[shown])
    cache = compiled(ids[:, :3], attention_mask=mask[:, :3]).past_key_values  # all of one sequence is padding so far
    rest = compiled(ids[:, 3:], attention_mask=mask, past_key_values=cache).logits
    close(rest[shown[:, 3:]], want[:, 3:][shown[:, 3:]])


def test_what_a_call_may_say():
    compiled, ids = decoders.compiled("llama"), tiny.tokens(2, 9)
    want = logits("llama", ids)
    close(compiled(input_ids=ids, logits_to_keep=1).logits, want[:, -1:])
    close(compiled(ids, logits_to_keep=torch.tensor([2, 5])).logits, want[:, [2, 5]])
    close(compiled(ids, None, torch.arange(9)[None]).logits, want)
    close(compiled(ids, use_cache=False).logits, want)
    with torch.no_grad():
        plain = compiled(ids, use_cache=False, return_dict=False)
    assert isinstance(plain, tuple) and len(plain) == 1
    close(plain[0], want)
    first, cache = compiled(ids, return_dict=False)
    close(first, want)
    assert cache.get_seq_length() == 9 and not compiled(ids, use_cache=False).get("past_key_values")


def test_a_loss_goes_through_the_whole_graph_with_gradients():
    compiled, ids, model = decoders.compiled("llama"), tiny.tokens(2, 9), decoders.model("llama")
    model.zero_grad()
    want = model(ids, labels=ids)
    want.loss.backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    got = compiled(ids, labels=ids)
    got.loss.backward()
    close(got.loss, want.loss)
    close(model.lm_head.weight.grad, gradient)
    model.zero_grad()


def test_calls_that_cannot_be_followed_leave_the_cache_as_it_was():
    compiled, ids = decoders.compiled("llama"), tiny.tokens(2, 9)
    cache = compiled(ids).past_key_values
    before = [tensor.clone() for tensor in cache.state.flat]
    ones, ragged = torch.ones(2, 12, dtype=torch.int64), torch.ones(2, 12, dtype=torch.int64)
    ragged[0, 10] = 0
    hidden = ones.clone()
    hidden[1, 0] = 0
    step = tiny.tokens(2, 3)
    cases = [
        (errors.CacheFull, "holds 9 tokens", {"input_ids": tiny.tokens(2, 56)}),
        (errors.CacheMismatch, "2 sequences, and the call has 3", {"input_ids": tiny.tokens(3, 1)}),
        (errors.BadArgument, "must cover the 9", {"input_ids": step, "attention_mask": ones[:, :3]}),
        (errors.BadArgument, "padding on the left", {"input_ids": step, "attention_mask": ragged}),
        (errors.CacheMismatch, "hides other tokens", {"input_ids": step, "attention_mask": hidden}),
        (errors.BadArgument, "1 for tokens", {"input_ids": step, "attention_mask": ones[:, None, None]}),
        (errors.BadArgument, "position_ids has 2", {"input_ids": step, "position_ids": torch.arange(2)[None]}),
        (errors.BadArgument, "there must be a token", {"input_ids": step[:, :0]}),
        (errors.BadArgument, "output_attentions", {"input_ids": step, "output_attentions": True}),
        (errors.BadArgument, "token ids of shape", {"inputs_embeds": torch.zeros(2, 3, 32)}),
        (errors.BadArgument, "whole sequences", {"input_ids": step, "labels": step}),
    ]
    for error, words, call in cases:
        with pytest.raises(error, match=words):
            compiled(**call, past_key_values=cache)
    assert cache.get_seq_length() == 9 and cache.state.length.tolist() == [9, 9]
    assert all(torch.equal(a, b) for a, b in zip(before, cache.state.flat, strict=True))
    close(compiled(step, past_key_values=cache).logits, logits("llama", torch.cat((ids, step), 1))[:, 9:])


def test_prompts_that_do_not_fit_or_are_padded_on_the_right_are_refused():
    compiled = decoders.compiled("llama")
    with pytest.raises(errors.CacheFull, match="room for 64"):
        compiled(tiny.tokens(1, 65))
    ids, mask = decoders.padded()
    with pytest.raises(errors.BadArgument, match="padding_side='left'"):
        compiled(ids, attention_mask=mask.flip(1))
    mixed = torch.cat((mask[:1].flip(1), mask[1:]))
    mixed[0, -2:] = 0
    with pytest.raises(errors.BadArgument, match="padding_side='left'"):
        compiled(ids, attention_mask=mixed)


def test_caches_of_others_are_refused():
    from transformers import DynamicCache

    compiled, ids = decoders.compiled("llama"), tiny.tokens(1, 4)
    with pytest.raises(errors.CacheMismatch, match="DynamicCache"):
        compiled(ids, past_key_values=DynamicCache())
    with pytest.raises(errors.CacheMismatch, match="another compilation"):
        compiled(ids, past_key_values=decoders.compiled("mistral").new_cache())
    with pytest.raises(errors.CacheMismatch, match="give it to that module"):
        decoders.model("llama")(ids, past_key_values=compiled.new_cache())


def test_a_call_that_breaks_off_does_not_advance(monkeypatch):
    compiled, ids = decoders.compiled("llama"), tiny.tokens(2, 5)
    cache = compiled(ids).past_key_values
    decoder = compiled._decoder()

    def broken(*inputs):
        decoder.lifted.module(*inputs)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(decoder, "run", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        compiled(ids, past_key_values=cache)
    monkeypatch.undo()
    assert cache.get_seq_length() == 5
    more = tiny.tokens(2, 3, seed=8)
    close(compiled(more, past_key_values=cache).logits, logits("llama", torch.cat((ids, more), 1))[:, 5:])


def test_training_mode_has_a_graph_of_its_own():
    compiled = compile_decoder(dropout=0.5)
    ids, positions = torch.randint(50, (2, 6)), torch.arange(6).expand(2, 6)
    cache = compiled.new_cache()
    compiled(ids, past_key_values=cache)
    compiled.train()
    assert compiled.exported_program() is not compiled._exported[(False,)]
    compiled(ids, positions).sum().backward()
    assert compiled.original_model.embed.weight.grad is not None
    compiled.eval()
    compiled(ids, past_key_values=cache)
    assert cache.get_seq_length() == 12


# ------------------------------------------------------------------------------------------------------------ the cache


PAGED = {"page_size": 64, "max_length": 192}


@pytest.mark.parametrize(("options", "length"), [({}, 40), (PAGED, 70)], ids=["whole", "paged"])
def test_crop_reorder_repeat_and_copy(options, length):
    compiled = decoders.compiled("llama", **options)
    ids, more = tiny.tokens(3, length), tiny.tokens(3, 5, seed=2)
    cache = compiled(ids).past_key_values
    twin = copy.deepcopy(cache)
    cache.crop(-6)
    cache.crop(0)
    assert cache.get_seq_length() == length - 6
    out = compiled(more, past_key_values=cache)
    close(out.logits, logits("llama", torch.cat((ids[:, :-6], more), 1))[:, length - 6 :])
    order = torch.tensor([2, 0, 0])
    twin.reorder_cache(order)
    both = torch.cat((ids[order], more), 1)
    close(compiled(more, past_key_values=twin).logits, logits("llama", both)[:, length:])
    twin.crop(length)
    twin.batch_select_indices(torch.tensor([1]))
    twin.batch_repeat_interleave(2)
    pair = torch.cat((ids[[0, 0]], more[:2]), 1)
    close(compiled(more[:2], past_key_values=twin).logits, logits("llama", pair)[:, length:])
    with pytest.raises(errors.CacheMismatch, match="cannot be forgotten"):
        twin.crop(-200)
    twin.reset()
    close(compiled(ids[:2], past_key_values=twin).logits, logits("llama", ids[:2]))


@pytest.mark.parametrize("options", [{}, PAGED], ids=["whole", "paged"])
def test_a_saved_prefix_goes_on_where_it_stopped(tmp_path, options):
    compiled = decoders.compiled("llama", **options)
    ids, mask = decoders.padded()
    cache = compiled(ids, attention_mask=mask).past_key_values
    path = cache.save(tmp_path / "prefix.safetensors")
    again = compiled.new_cache(path)
    step = tiny.tokens(3, 2)
    longer = torch.cat((mask, torch.ones(3, 2, dtype=mask.dtype)), 1)
    for one in (cache, again):
        got = compiled(step, attention_mask=longer, past_key_values=one).logits
        close(got, logits("llama", torch.cat((ids, step), 1), attention_mask=longer)[:, 9:])
    other = decoders.compiled("mistral")
    with pytest.raises(errors.CacheMismatch, match="another model"):
        other.new_cache(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(errors.SaveError, match="damaged"):
        compiled.new_cache(path)
    with pytest.raises(errors.SaveError, match="empty"):
        compiled.new_cache().save(path)


def test_decoding_allocates_nothing_of_the_caches_size():
    compiled = decoders.compiled("llama")
    cache = compiled(tiny.tokens(1, 40)).past_key_values
    places = [tensor.data_ptr() for tensor in cache.state.flat]
    small = [t.data_ptr() for t in (cache.state.length, cache.state.first)]
    for token in range(5):
        compiled(tiny.tokens(1, 1, seed=token), past_key_values=cache)
    assert places == [tensor.data_ptr() for tensor in cache.state.flat]
    assert small == [t.data_ptr() for t in (cache.state.length, cache.state.first)]


@pytest.mark.grid
@pytest.mark.parametrize("page", [None, 64])
def test_what_a_native_step_allocates_does_not_grow_with_the_length(page):
    model = tiny.llama(head_dim=64, max_position_embeddings=4096)
    compiled = tw.compile(model, passes=[KVCache(max_length=4096, page_size=page)], rest="eager", target="cpp")
    assert {"cached_attention"} <= {use.spec.kind for use in compiled.kernels}
    cache = compiled(tiny.tokens(1, 40)).past_key_values
    found = []
    for more in (1, 3000):
        for part in tiny.tokens(1, more + 3).split([more, 1, 1, 1], dim=1):
            compiled(part, past_key_values=cache)
        steps = []
        for _ in range(3):
            with torch.profiler.profile(profile_memory=True) as profile:
                compiled(tiny.tokens(1, 1), past_key_values=cache)
            steps.append(sum(max(0, event.self_cpu_memory_usage) for event in profile.events()))
        found.append(sorted(steps)[1])  # a freed block may be counted in the step that reuses it
    assert found[0] == found[1] < 2**16


def site(format="", heads=2, dim=8):
    return CacheSite("here", format, heads, dim, heads, dim, torch.float32)


def test_pages_are_taken_as_tokens_come_and_given_back():
    state = KVState([site('{"page": 64}')], 512, 2)
    assert not state.nbytes > 4096
    state.reserve(65)
    state.advance(65)
    assert sorted(state.pages[:, :2].flatten().tolist()) == [0, 1, 2, 3] and (state.pages[:, 2:] == -1).all()
    state.crop(64)
    assert (state.pages[:, 1:] == -1).all()
    pool = state.flat[0].shape[0]
    state.reserve(64)
    assert state.flat[0].shape[0] == pool  # the pages that were given back are used again
    with pytest.raises(errors.CacheFull):
        state.reserve(512)


def test_shared_pages_are_copied_before_they_are_written():
    state = KVState([site('{"page": 64}')], 256, 1)
    state.reserve(70)
    state.advance(70)
    state.flat[0][state.pages[0, 1]] = 1.0
    state.select(torch.tensor([0, 0]))
    assert state.pages[0].tolist() == state.pages[1].tolist()
    state.reserve(1)
    assert state.pages[0, 0] == state.pages[1, 0] and state.pages[0, 1] != state.pages[1, 1]
    assert all(bool((state.flat[0][state.pages[b, 1]] == 1).all()) for b in (0, 1))


def test_bytes_of_a_token():
    state = KVState([site(), site(dim=16)], 100, 1)
    assert state.capacity == 128 and state.bytes_per_token() == 2 * 2 * (8 + 16) * 4
    assert decoders.compiled("llama").report.cache["bytes_per_token"] == 2 * 2 * 2 * 8 * 4
    assert "256 bytes a token, room for 64 tokens" in str(decoders.compiled("llama").report)


# ------------------------------------------------------------------------------------------------------ what is refused


class Decoder(nn.Module):
    """Causal attention with learned positions; ``counted``: by the model itself, from the number of tokens."""

    def __init__(self, counted=False, causal=True, mixes=False, dropout=0.0):
        super().__init__()
        self.embed, self.place = nn.Embedding(50, 16), nn.Embedding(64, 16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 50)
        self.counted, self.causal, self.mixes = counted, causal, mixes
        self.drop = nn.Dropout(dropout)

    def forward(self, tokens, position_ids=None):
        if self.counted:
            position_ids = torch.arange(tokens.shape[1], device=tokens.device)[None]
        x = self.embed(tokens) + self.place(position_ids)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        y = y.transpose(1, 2).flatten(2)
        if self.mixes:
            y = y + nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
        return self.out(self.drop(x + y))


def compile_decoder(**options):
    torch.manual_seed(0)
    return tw.compile(
        Decoder(**options).eval(), passes=[KVCache(max_length=32)], rest="eager", target="reference", validate=True
    )


def test_a_model_of_ones_own_decodes():
    compiled = compile_decoder()
    ids = torch.randint(50, (2, 9))
    positions = torch.arange(9).expand(2, 9)
    with torch.no_grad():
        want = compiled.original_model(ids, positions)
    cache = compiled.new_cache()
    got = [compiled(ids[:, a:b], past_key_values=cache) for a, b in ((0, 4), (4, 5), (5, 9))]
    close(torch.cat(got, 1), want)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"counted": True}, "needs position_ids"),
        ({"causal": False}, "not causal"),
        ({"mixes": True}, "mixes tokens in another way"),
    ],
    ids=str,
)
def test_models_that_cannot_decode_are_refused(options, words):
    with pytest.raises(errors.NotADecoder, match=words):
        compile_decoder(**options)


def test_an_encoder_is_refused_with_the_site_and_the_reason():
    with pytest.raises(errors.NotADecoder, match=r"as in an encoder \[.*attention"):
        tw.compile(tiny.bert(layers=1), passes=[KVCache(max_length=32)], rest="eager", target="reference")


def test_options_and_combinations():
    for wrong in ({"max_length": 0}, {"max_length": True}, {"max_length": 9, "page_size": 100}, {"page_size": 0}):
        with pytest.raises(errors.BadPassOption):
            KVCache(**wrong)
    with pytest.raises(errors.IllegalPassCombination, match="kv-cache cannot go with lm-infinite"):
        tw.compile(tiny.llama(), passes=[KVCache(max_length=8), LMInfinite(window=4, sinks=1)])
    with pytest.raises(errors.BadArgument, match="dynamic_shapes"):
        tw.compile(tiny.llama(), passes=[KVCache(max_length=8)], dynamic_shapes={})
    with pytest.raises(errors.BadArgument, match="no KV cache"):
        tw.compile(tiny.llama()).new_cache()
    with pytest.raises(errors.BadExampleInputs, match="token ids"):
        tw.compile(tiny.llama(), passes=[KVCache(max_length=8)], example_inputs=(torch.zeros(1, 2, 3),))


def test_a_model_of_ones_own_is_saved_without_generate(tmp_path):
    compiled = compile_decoder()
    ids = torch.randint(50, (2, 9))
    loaded = tw.load(tw.save(compiled, tmp_path / "x.tw"))
    cache, other = loaded.new_cache(), compiled.new_cache()
    for a, b in ((0, 4), (4, 9)):
        assert torch.equal(loaded(ids[:, a:b], past_key_values=cache), compiled(ids[:, a:b], past_key_values=other))
    with pytest.raises(errors.BadArgument, match="has no generate"):
        loaded.generate(ids)
    with pytest.raises(errors.CacheFull, match="room for 32"):
        loaded(torch.zeros(1, 40, dtype=torch.int64))
