"""QuantizeKV and GEAR: options, sites they leave alone, what they build and what they tell."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import decoders
import pytest
import tiny
import torch
from raise_cases import nodes, trace

import tilewright as tw
from tilewright.codegen.cache_format import CacheFormat, parse_format
from tilewright.passes import GEAR, Exactness, KVCache, Pass, QuantizeKV
from tilewright.passes.manager import PassRun, run_pass, sort_passes, validate
from tilewright.passes.parse import parse_passes
from tilewright.runtime import errors

cached = torch.ops.tilewright.cached_attention
OPTIONS = {"scale": 0.25, "mask": "k_idx <= q_idx"}


def sample(
    length: int, dims: tuple[int, int] = (16, 8), dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, ...]:
    """q, k, v: batch 2, four query heads, two key heads."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, length, dims[0]), (2, 2, length, dims[0]), (2, 2, length, dims[1]))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def run_on(
    one: Pass, form: CacheFormat, *inputs: torch.Tensor, symbolic: bool = False
) -> tuple[torch.fx.GraphModule, PassRun]:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return cached(q, k, v, None, [], format=form.text(), **OPTIONS)

    module = trace(call, *inputs, symbolic=symbolic)
    return module, run_pass(module, one, copy.deepcopy)


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: CacheFormat) -> torch.Tensor:
    """Each query on its own, in float64: groups that are old by its time through 4-bit codes, the rest whole."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    for i in range(q.shape[2]):
        old = form.quantized_tokens(i + 1)
        keys, values = k[:, :, : i + 1].double(), v[:, :, : i + 1].double()
        for start in range(0, old, form.group):
            block = keys[:, :, start : start + form.group]
            keys[:, :, start : start + form.group] = four_bits(block, 2)
        values[:, :, :old] = four_bits(values[:, :, :old], 3)
        keys, values = (x.repeat_interleave(2, dim=1) for x in (keys, values))
        scores = (q[:, :, i : i + 1].double() @ keys.transpose(2, 3)) * OPTIONS["scale"]
        out[:, :, i : i + 1] = scores.softmax(-1) @ values
    return out


def four_bits(x: torch.Tensor, dim: int) -> torch.Tensor:
    if not x.numel():
        return x
    least, most = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale, offset = ((most - least) / 15).half().double(), least.half().double()
    return ((x - offset) / scale).round().clamp(0, 15) * scale + offset


def whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return cached(q, k, v, None, [], **OPTIONS).double()


def told(one: Pass, form: CacheFormat | None = None, dims: tuple[int, int] = (64, 64)) -> dict[str, Any]:
    """The report's details of the site, with what is measured on an example of 16 tokens."""
    inputs = sample(16, dims)
    done = run_on(one, form or CacheFormat(), *inputs)[1]
    validate(done, inputs)
    (rewrite,) = done.rewrites
    assert rewrite.error is not None and rewrite.error["max_abs"] < 1e-5, "all 16 tokens are still whole"
    return rewrite.details


def reason(one: Pass, form: CacheFormat | None = None, **kwargs: Any) -> str:
    done = run_on(one, form or CacheFormat(), *sample(16, **kwargs))[1]
    assert not done.rewrites
    return done.declined[0][1]


def test_decoding_sees_old_groups_quantized() -> None:
    inputs = sample(70)
    module, done = run_on(QuantizeKV(bits=4, group=16, window=16), CacheFormat(), *inputs, symbolic=True)
    (node,) = nodes(module, "cached_attention")
    form = parse_format(node.kwargs["format"])
    assert form == CacheFormat(bits_k=4, bits_v=4, group=16, window=16)
    wanted = by_hand(*inputs, form)
    # float32 sums of about a hundred terms of order one.
    torch.testing.assert_close(module(*inputs).double(), wanted, rtol=1e-5, atol=1e-5)
    assert (wanted - whole(*inputs))[:, :, -1].abs().max() > 1e-2
    other = sample(37)  # the graph goes on with other lengths
    torch.testing.assert_close(module(*other).double(), by_hand(*other, form), rtol=1e-5, atol=1e-5)


def test_bytes_told_are_those_of_the_store() -> None:
    details = told(QuantizeKV(bits=4))
    # Two heads of 64 channels: 4 bits, and two float16 for each channel of 64 tokens, or each token.
    assert details["key_bytes_per_token"] == 2 * 64 * (0.5 + 4 / 64)
    assert details["value_bytes_per_token"] == 2 * (64 * 0.5 + 4)
    assert details["key_bytes_before"] == details["value_bytes_before"] == 2 * 64 * 4
    assert details["constant_bytes"] == 2 * (64 + 64) * (64 + 64) * 4
    details = told(QuantizeKV(bits_k=8, bits_v=0), CacheFormat(page=64))
    assert details["values"] == "whole" and details["value_bytes_per_token"] == 2 * 64 * 4
    assert "value_error" not in details
    # rank 4: 64 + 64 rows of four float16 a block; outliers: 82 pairs of two bytes.
    details = told(GEAR())
    assert details["key_bytes_per_token"] == 2 * (64 * (0.25 + 4 / 64) + (128 * 4 * 2 + 82 * 4) / 64)


def test_errors_of_what_is_kept_are_measured_on_short_examples_too() -> None:
    found = [told(one) for one in (QuantizeKV(bits=8), QuantizeKV(bits=4), GEAR(bits=2), QuantizeKV(bits=2))]
    for side in ("key_error", "value_error"):
        errors_of = [details[side] for details in found]
        assert errors_of == sorted(errors_of) and 1e-4 < errors_of[0] < 1e-2 < errors_of[1] < 0.15 < errors_of[3] < 0.6


def test_latents_are_quantized_by_channel_and_stay_latents() -> None:
    form = CacheFormat(latent=True)
    q, _, v = sample(40)
    latent, up = torch.randn(2, 1, 40, 24), torch.randn(2, 16, 24) / 5

    def call(q: torch.Tensor, c: torch.Tensor, v: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return cached(q, c, v, None, [up], format=form.text(), **OPTIONS)

    module = trace(call, q, latent, v, up)
    done = run_pass(module, QuantizeKV(bits=8, bits_v=0, group=16, window=16), copy.deepcopy)
    (node,) = nodes(module, "cached_attention")
    assert parse_format(node.kwargs["format"]) == CacheFormat(bits_k=8, group=16, window=16, latent=True)
    assert done.rewrites[0].details["key_bytes_per_token"] == 24 * (1 + 4 / 16)
    keys = torch.einsum("blr,hdr->bhld", latent[:, 0], up)
    # A step of 1 / 255 of about 5 in a latent, seen through 24 terms of 1 / 5: far below what the keys differ by.
    torch.testing.assert_close(module(q, latent, v, up).double(), whole(q, keys, v), rtol=0, atol=2e-2)


def test_sites_left_alone() -> None:
    assert "quantized already" in reason(QuantizeKV(), CacheFormat(bits_k=4))
    assert "value_group 24 does not divide 8 channels" in reason(QuantizeKV(value_group=24))
    assert "6 channels of 2 bits do not fill bytes" in reason(QuantizeKV(bits=2), dims=(16, 6))
    assert "page is 64 tokens" in reason(QuantizeKV(group=128), CacheFormat(page=64))
    assert "float64" in reason(QuantizeKV(), dtype=torch.float64)
    assert "rank 8 needs blocks of more than 8" in reason(GEAR(rank=8))
    assert "outliers are placed by int16" in reason(GEAR(group=1024), dims=(64, 8))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("quantize-kv{bits=3}", "bits is 3, but must be 8, 4 or 2"),
        ("quantize-kv{bits_k=16}", "bits_k is 16, but must be 8, 4 or 2, or 0 to keep them whole"),
        ("quantize-kv{bits_k=0,bits_v=0}", "quantizes nothing"),
        ("quantize-kv{group=24}", "group is 24 tokens, but must be a multiple of 16"),
        ("quantize-kv{group=0}", "group is 0, but must be a whole number from 16"),
        ("quantize-kv{window=40}", "window is 40 tokens, but must be a multiple of 16"),
        ("quantize-kv{value_group=-8}", "value_group is -8, but must be"),
        ("gear{rank=-1}", "rank is -1, but must be"),
        ("gear{outliers=0.7}", "outliers is 0.7, but must be a share of the entries"),
        ("gear{rank=0,outliers=0}", "corrects nothing"),
    ],
)
def test_bad_options(text: str, words: str) -> None:
    with pytest.raises(errors.BadPassOption, match=words):
        parse_passes(text)


@dataclass(frozen=True)
class Cache(Pass):
    """Stands for a pass that inserts a cache."""

    exactness = Exactness.EXACT
    provides = frozenset({"kv-cache"})


def test_what_comes_before_and_what_excludes_each_other() -> None:
    assert [type(one) for one in sort_passes([QuantizeKV(), Cache()])] == [Cache, QuantizeKV]
    with pytest.raises(errors.IllegalPassCombination, match="needs kv-cache.* there has to be one"):
        sort_passes([QuantizeKV()])
    with pytest.raises(errors.IllegalPassCombination, match="each of them says how the cache is kept"):
        sort_passes([Cache(), QuantizeKV(), GEAR()])
    assert "factor-keys" in QuantizeKV.after and "factor-keys" in GEAR.after


def test_a_decoder_decodes_as_its_graph_says() -> None:
    """Token by token through the cache, and the whole text at once through the form that validation measures."""
    pytest.importorskip("transformers")
    model, ids = decoders.model("llama"), tiny.tokens(2, 44)
    passes = [KVCache(64, page_size=64), QuantizeKV(bits=4, group=16, window=16)]
    compiled = tw.compile(model, passes=passes, rest="eager", target="reference")
    assert [len(one.matched) for one in compiled.report.passes] == [model.config.num_hidden_layers] * 2
    cache, out = compiled.new_cache(), []
    for at, token in enumerate(ids.split(1, dim=1)):
        out.append(compiled(input_ids=token, past_key_values=cache).logits)
        if at == 40:  # four tokens that were a guess, two of them wrong
            kept = copy.deepcopy(cache)
            compiled(input_ids=ids[:, :4], past_key_values=cache)
            cache.crop(41)
            again = compiled(input_ids=ids[:, 41:42], past_key_values=cache).logits
            torch.testing.assert_close(again, compiled(input_ids=ids[:, 41:42], past_key_values=kept).logits)
            cache.crop(41)
    # Sums in another order, in float32, through a few layers of order one.
    wanted = compiled(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(out, dim=1), wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - model(input_ids=ids).logits)[:, -1].abs().max() > 1e-3
