"""Cached attention on a GPU, compiled for real with the shipped tiles: formats, dtypes, long caches, CUDA graphs."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from attention_bounds import DTYPES, close
from cached_bounds import SCALE, Call, Site, expected, make_call
from test_cached_attention_triton import ALWAYS, WIDE

from tilewright.codegen import cache_triton
from tilewright.codegen.cache_format import CacheFormat
from tilewright.codegen.cached_attention import CacheAppendSpec
from tilewright.runtime.load import load
from tilewright.runtime.ops import cache_store
from tilewright.runtime.ops.attention_kernel import large_shared_memory

pytestmark = pytest.mark.gpu
DEVICE, TARGET = "cuda", "triton"
# Triton multiplies float32 as float32 here; the reference on the CPU needs room for few sequences only.
LONG = {
    "whole": Site(CacheFormat(page=256), "bfloat16", (128, 128, 128), (32, 8, 8), 1, (8000, 3000), (0, 7), 8192),
    "codes": Site(CacheFormat(4, 4), "float16", (64, 64, 64), (8, 8, 8), 8, (8000, 3000), (0, 7), 8192),
    "codes_2": Site(CacheFormat(2, 2, value_group=32), "bfloat16", (128, 128, 128), (16, 2, 2), 4, (4000,), (0,), 4096),
    "window": Site(dims=(64, 64, 64), heads=(9, 3, 3), queries=2, held=(8000,), first=(0,), capacity=8192, left=1024),
    "latent": Site(
        CacheFormat(latent=True, rotate="rotate_half", rotary=64), "bfloat16", (64, 48, 64), (9, 3, 3), 1,
        (4000, 1000), (0, 5), 4096,
    ),
    "latent_codes": Site(
        CacheFormat(4, 4, latent=True, rotate="rotate_half", rotary=128, norm=True), "float16", (128, 256, 128),
        (16, 4, 4), 2, (2000,), (0,), 2048,
    ),
    "shared_keys": Site(
        dtype="float16", dims=(192, 192, 64), heads=(12, 1, 12), held=(3000,), first=(0,), capacity=4096
    ),
}  # fmt: skip


def on_gpu(call: Call) -> Call:
    return Call(
        call.q.to(DEVICE),
        [tensor.to(DEVICE) for tensor in call.rebuild],
        {name: tensor.to(DEVICE) for name, tensor in call.store.items()},
        call.length.to(DEVICE),
        call.first.to(DEVICE),
        None if call.pages is None else call.pages.to(DEVICE),
    )


def check(site: Site) -> None:
    call = make_call(site)
    given = on_gpu(call)
    tiles = cache_triton.tiles(site.spec, large=large_shared_memory(given.q.device))
    out = load(dataclasses.replace(site.spec, **tiles), TARGET).launch(*given.arguments())
    close("out", out.cpu(), *expected(site, call))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*ALWAYS, *WIDE])
def test_every_format(name: str, dtype: str) -> None:
    check(dataclasses.replace((ALWAYS | WIDE)[name], dtype=dtype))


@pytest.mark.parametrize("name", LONG)
def test_long_caches(name: str) -> None:
    check(LONG[name])


@pytest.mark.parametrize(
    ("name", "dtype"),
    itertools.product(["codes", "mixed_codes_pages", "gear", "latent_codes"], ["float32", "bfloat16"]),
)
def test_appends_what_the_reference_appends(name: str, dtype: str) -> None:
    """In steps through the ends of groups; codes may differ by one where a quotient lies at .5."""
    site = dataclasses.replace(ALWAYS[name], dtype=dtype, held=(0,), first=(0,), heads=(2, 1, 1))
    call, generator = make_call(dataclasses.replace(site, held=(8,), queries=1)), torch.Generator().manual_seed(3)
    theirs, ours = call.store, on_gpu(call).store
    pages = None if call.pages is None else call.pages.to(DEVICE)
    launch = load(CacheAppendSpec(dtype, site.dims[1], site.dims[2], site.form.text()), TARGET).launch
    length = torch.tensor([9], dtype=torch.int32)
    for tokens in (30, 1, 17, 1):
        k, v = (torch.randn(1, 1, tokens, d, generator=generator).to(DTYPES[dtype]) for d in site.dims[1:])
        cache_store.append(k, v, theirs, length, call.pages, site.form)
        launch(k.to(DEVICE), v.to(DEVICE), list(ours.values()), length.to(DEVICE), None, pages)
        length = length + tokens
        found = cache_store.read({n: t.cpu() for n, t in ours.items()}, length, call.pages, site.form)
        for mine, wanted in zip(found, cache_store.read(theirs, length, call.pages, site.form), strict=True):
            apart = (mine - wanted).abs() > 1e-2
            assert apart.float().mean() < 0.01, f"{int(apart.sum())} of {apart.numel()} entries differ"


@pytest.mark.parametrize("name", ["whole", "codes"])
def test_a_captured_graph_follows_the_length(name: str) -> None:
    """Capture fails where a launch waits for the device; a replay must read the length that is there then."""
    site = dataclasses.replace(LONG[name], queries=1, held=(300,), first=(0,), capacity=512)
    call = make_call(site)
    given = on_gpu(call)
    launch = load(site.spec, TARGET).launch
    append = load(CacheAppendSpec(site.dtype, site.dims[1], site.dims[2], site.form.text()), TARGET).launch
    k, v = (
        torch.randn(1, h, 1, d).to(given.q) for h, d in ((site.heads[1], site.dims[1]), (site.heads[2], site.dims[2]))
    )
    store = list(given.store.values())

    def step() -> torch.Tensor:
        append(k, v, store, given.length, given.first, given.pages)
        out = launch(given.q, [], store, given.length, given.first, given.pages, SCALE)
        given.length.add_(1)
        return out

    step()
    torch.cuda.synchronize()
    given.length.fill_(300)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    given.length.fill_(300)
    for held in range(300, 304):
        graph.replay()
        assert given.length.item() == held + 1
        length = torch.full_like(given.length, held)
        again = launch(given.q, [], store, length, given.first, given.pages, SCALE)
        assert torch.equal(captured, again)
