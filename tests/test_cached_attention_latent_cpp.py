"""The native decode kernel on latents, whose keys it rebuilds, against float64 (bounds: cached_bounds.py)."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attention_bounds import close
from cached_bounds import Call, Site, expected, make_call
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention_cpp import kernel as spec_kernel

from tilewright.codegen.cache_format import CacheFormat
from tilewright.runtime import cpu


def latent(**fields) -> CacheFormat:
    return CacheFormat(latent=True, **fields)


HALF, FLOAT16 = {"dtype": "bfloat16"}, {"dtype": "float16"}
TURNED = {"rotate": "rotate_half", "rotary": 64}
# Few texts, since each is built: together both layouts, partial rotation, bias, norm, codes, pages, odd widths.
SITES = {
    "half": Site(latent(**TURNED), **HALF, dims=(64, 96, 64), heads=(9, 3, 3), left=100, sinks=5),
    "normed": Site(
        latent(rotate="interleaved", rotary=24, norm=True, key_bias=True), dims=(39, 50, 20), heads=(4, 2, 2)
    ),
    "coded": Site(
        latent(rotate="rotate_half", rotary=32, norm=True, bits_k=4, bits_v=4, group=16, window=32, page=64),
        **HALF,
        dims=(32, 40, 32),
        heads=(2, 2, 2),
    ),
}
WIDE = {
    "qwen": Site(
        latent(rotate="rotate_half", rotary=128, norm=True, round_before_weight=True),
        **HALF,
        dims=(128, 64, 128),
        heads=(4, 2, 2),
    ),
    "phi": Site(latent(rotate="rotate_half", rotary=38, key_bias=True), dims=(96, 33, 96), heads=(5, 5, 5)),
    "fp16": Site(latent(**TURNED), **FLOAT16, dims=(64, 48, 64), heads=(3, 3, 3)),
    "normed_half": Site(latent(norm=True, page=128), **HALF, dims=(25, 7, 16), heads=(8, 1, 1)),
    "eight_bits": Site(latent(**TURNED, bits_k=8), dims=(64, 96, 64), heads=(9, 3, 3), normalizer="sigmoid"),
    "gear": Site(
        latent(**TURNED, bits_k=2, group=32, window=16, correction=2, outliers=3), dims=(64, 48, 64), heads=(3, 1, 1)
    ),
    "large": Site(
        latent(rotate="rotate_half", rotary=256), **HALF, dims=(256, 300, 128), heads=(8, 8, 8), left=50
    ),
}  # fmt: skip


def kernel(site: Site, isa: str):
    return spec_kernel(site.spec, isa)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def check(site: Site, isa: str, call: Call) -> torch.Tensor:
    out = kernel(site, isa)(*call.arguments())
    exact, bound = expected(site, call)
    assert out.dtype == call.q.dtype
    close("out", out, exact, bound)
    return out


@st.composite
def sites(draw, site: Site) -> Site:
    held = draw(
        st.lists(st.sampled_from([0, 1, 15, 31, 32, 40, 62, 63, 64, 65, 127, 200, 300]), min_size=1, max_size=3)
    )
    first = [draw(st.sampled_from([0, 0, 1, 7, 33, 70, 150])) for _ in held]
    group, heads = site.heads[0] // site.heads[1], draw(st.sampled_from([1, 2, site.heads[1]]))
    return dataclasses.replace(
        site,
        held=tuple(held),
        first=tuple(first),
        queries=draw(st.integers(1, 8)),
        heads=(group * heads, heads, heads),
        capacity=384,
    )


def match(site: Site, isa: str, examples: int) -> None:
    kernel(site, isa)

    @given(sites(site), st.integers(0, 99), st.sampled_from([1, 2, 3]))
    @settings(max_examples=examples)
    def run(drawn, seed, threads):
        torch.set_num_threads(threads)
        check(drawn, isa, make_call(drawn, seed))

    run()


@pytest.mark.parametrize("name", SITES)
def test_matches_float64(name) -> None:
    match(SITES[name], cpu.supported()[0], 10)


def test_another_instruction_set_matches_float64() -> None:
    match(SITES["normed"], "avx2", 8)


@pytest.mark.grid
@pytest.mark.parametrize("isa", ["amx", "avx512", "avx2", "baseline"])
@pytest.mark.parametrize("name", SITES | WIDE)
def test_every_format_matches_float64(name, isa) -> None:
    match((SITES | WIDE)[name], isa, 40)


@pytest.mark.parametrize("queries", [1, 8])
def test_far_positions(queries) -> None:
    """Angles of 40,000 positions, of which bfloat16 kernels read one row for every span."""
    site = dataclasses.replace(
        SITES["half"], held=(40000,), first=(7,), queries=queries, heads=(3, 1, 1), capacity=40032
    )
    check(site, cpu.supported()[0], make_call(site))


@pytest.mark.parametrize("name", ["half", "normed"])
def test_blocks_of_zeros_in_the_factor(name) -> None:
    """Factors of single heads, side by side: a head that reads a part of the latent, and one that reads nothing."""
    site = dataclasses.replace(SITES[name], held=(150, 64), capacity=192)
    call = make_call(site)
    up = call.rebuild[0]
    up[0, :, 32:], up[1] = 0, 0
    out = check(site, cpu.supported()[0], call)
    if name == "half":  # without bias all keys of that head are alike: the mean of the values
        seen = call.store["v"][0, 1, 150 - 100 + 1 : 151].float()
        seen = torch.cat((call.store["v"][0, 1, :5].float(), seen))
        torch.testing.assert_close(out[0, 3:6, 0].float(), seen.mean(0).expand(3, -1), atol=1e-2, rtol=0)


def test_nan_in_a_latent_reaches_only_those_who_see_it() -> None:
    site = dataclasses.replace(SITES["half"], held=(300,), first=(0,), capacity=320)
    call = make_call(site)
    clean = kernel(site, cpu.supported()[0])(*call.arguments())
    call.store["k"][0, 0, 150] = torch.nan
    assert torch.equal(kernel(site, cpu.supported()[0])(*call.arguments()), clean)
    call.store["k"][0, 0, 250] = torch.nan
    assert bool(kernel(site, cpu.supported()[0])(*call.arguments()).isnan().all())
