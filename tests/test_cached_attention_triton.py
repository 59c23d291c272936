"""Triton kernels of cached attention: interpreted, against float64, and compiled for GPUs that are not here."""

from __future__ import annotations

import ast
import dataclasses

import pytest
import torch
from attention_bounds import DTYPES, close
from cached_bounds import SCALE, Call, Site, empty_store, expected, make_call, page_table
from golden import check_golden
from torch import Tensor

from tilewright.codegen import cache_triton
from tilewright.codegen.cache_format import CacheFormat
from tilewright.codegen.cached_attention import CacheAppendSpec, CachedAttentionSpec
from tilewright.codegen.render import render
from tilewright.codegen.spec import KernelSpec, SpecError
from tilewright.runtime.cross_compile import cross_compile
from tilewright.runtime.load import load
from tilewright.runtime.ops import cache_store

INTERPRETED = "triton-interpret"
LONGER = {"capacity": 128, "held": (90, 37)}


def coded(key_bits: int = 4, value_bits: int = 4, **fields) -> CacheFormat:
    return CacheFormat(bits_k=key_bits, bits_v=value_bits, **({"group": 16, "window": 16} | fields))


def latent(**fields) -> CacheFormat:
    return CacheFormat(latent=True, **fields)


TURNED = {"rotate": "rotate_half", "rotary": 16, "norm": True}

ALWAYS = {
    "sinks": Site(left=12, sinks=3),
    "shared_keys_sigmoid": Site(dims=(24, 24, 20), heads=(8, 1, 4), queries=3, normalizer="sigmoid"),
    "pages": Site(CacheFormat(page=64), "float16", capacity=128, held=(90, 37), block_n=64),
    "codes": Site(coded(), "bfloat16", heads=(2, 1, 1), queries=1, **LONGER),
    "mixed_codes_pages": Site(
        coded(2, 8, value_group=8, page=64), heads=(2, 1, 1), capacity=128, held=(90, 70), left=40, sinks=5
    ),
    "gear": Site(coded(4, 2, group=32, correction=2, outliers=5), heads=(2, 1, 1), queries=1, **LONGER),
    "latent": Site(latent(key_bias=True, rotate="interleaved", rotary=8, norm=True), dims=(16, 12, 16)),
    "latent_codes": Site(
        latent(bits_k=4, group=16, window=16, **TURNED), "bfloat16", (16, 24, 16), (2, 2, 2), queries=1, **LONGER
    ),
}


def check(site: Site, splits: int | None = 3, seed: int = 0) -> tuple[Call, Tensor]:
    call = make_call(site, seed)
    out = load(site.spec, INTERPRETED).launch(*call.arguments(), splits=splits)
    assert out.dtype == DTYPES[site.dtype]
    close("out", out, *expected(site, call))
    return call, out


@pytest.mark.parametrize("name", ALWAYS)
def test_against_float64(name: str) -> None:
    check(ALWAYS[name])


WIDE = {
    "whole": Site(),
    "window": Site(left=20),
    "chunks": Site(dims=(400, 400, 20), queries=1),
    "many_rows": Site(heads=(20, 2, 4), queries=8),
    "many_rows_of_codes": Site(coded(), heads=(8, 1, 2), queries=8, **LONGER),
    "codes_8": Site(coded(8, 8), **LONGER),
    "codes_2": Site(coded(2, 2, value_group=2), **LONGER),
    "keys_alone": Site(coded(4, 0, group=48), capacity=144, held=(120, 60)),
    "values_alone": Site(coded(0, 4, page=64, window=32), capacity=128, held=(120, 60), left=30),
    "outliers": Site(coded(2, 2, outliers=20), heads=(4, 1, 2), **LONGER),
    "correction": Site(coded(2, 2, correction=5, page=64), capacity=128, held=(90, 37)),
    "gear_sinks": Site(coded(2, 8, group=32, correction=3, outliers=5), left=50, sinks=4, **LONGER),
    "wide_codes": Site(coded(4, 4), dims=(600, 600, 40), queries=1, **LONGER),
    "latent_plain": Site(latent(), dims=(16, 12, 16)),
    "latent_turned": Site(latent(**TURNED), dims=(40, 12, 24), heads=(6, 2, 2)),
    "latent_wide_codes": Site(latent(bits_k=4, bits_v=2, group=16, window=16, **TURNED), dims=(24, 600, 16), **LONGER),
    "latent_gear": Site(
        latent(bits_k=2, bits_v=4, group=32, window=16, correction=2, outliers=7, page=64, **TURNED),
        dims=(16, 24, 16),
        capacity=128,
        held=(90, 37),
        left=60,
    ),
}


@pytest.mark.grid
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid"])
@pytest.mark.parametrize("name", [*WIDE, *ALWAYS])
def test_every_format_dtype_and_normalizer(name: str, normalizer: str, dtype: str) -> None:
    site = (WIDE | ALWAYS)[name]
    check(dataclasses.replace(site, dtype=dtype, normalizer=normalizer), splits=2, seed=1)


@pytest.mark.grid
@pytest.mark.parametrize("held", [(0, 0), (1, 0), (15, 16), (31, 63), (47, 48)], ids=str)
@pytest.mark.parametrize("queries", [1, 3, 8])
@pytest.mark.parametrize("name", ["sinks", "codes", "latent_codes", "keys_alone", "values_alone"])
def test_every_edge_of_tiles_and_groups(name: str, queries: int, held: tuple[int, ...]) -> None:
    """Nothing held, ends of groups, and padding that reaches to the newest tokens or beyond."""
    site = dataclasses.replace((WIDE | ALWAYS)[name], queries=queries, held=held, first=(0, held[1] + 1))
    check(dataclasses.replace(site, capacity=max(96, site.capacity)), splits=4)


@pytest.mark.parametrize("name", ["whole", *(pytest.param(n, marks=pytest.mark.grid) for n in ("sinks", "codes"))])
def test_any_number_of_programs_finds_the_same(name: str) -> None:
    site = dataclasses.replace((WIDE | ALWAYS)[name], dtype="float32", heads=(2, 1, 1), queries=1)
    call, one = check(site, splits=1)
    again = load(site.spec, INTERPRETED).launch(*call.arguments(), splits=7)
    torch.testing.assert_close(again, one, rtol=1e-5, atol=1e-6)


def test_older_tokens_than_a_window_are_not_read() -> None:
    """Keys and values between the sinks and the window are NaN: a visit would show, since 0 times NaN is NaN."""
    site = Site(heads=(2, 1, 1), queries=1, held=(60,), first=(0,), left=20, sinks=3)
    call = make_call(site)
    for tensor in call.store.values():
        tensor[:, :, 16:32] = torch.nan
    assert bool(load(site.spec, INTERPRETED).launch(*call.arguments()).isfinite().all())


@pytest.mark.parametrize("name", ["codes", pytest.param("latent", marks=pytest.mark.grid)])
def test_a_step_of_the_op_appends_and_attends(name: str) -> None:
    """Through the op, whose reference form says what both kernels have to give together: float32, one call."""
    site = dataclasses.replace(ALWAYS[name], dtype="float32", held=(31, 20), first=(0, 3), queries=2)
    options = {"scale": SCALE, "mask": "k_idx <= q_idx", "format": site.form.text()}
    found = []
    for target in (INTERPRETED, "reference"):
        # Both begin with what the reference has appended, the call's own tokens among it: they are written again.
        call, generator = make_call(site), torch.Generator().manual_seed(5)
        kept = (1 if site.form.latent else site.heads[1], site.heads[2])
        k, v = (torch.randn(2, h, 2, d, generator=generator) for h, d in zip(kept, site.dims[1:], strict=True))
        store = [tensor.nan_to_num() for tensor in call.store.values()]
        rest = (call.rebuild, store, call.length, call.first, call.pages)
        out = torch.ops.tilewright.cached_attention_step(call.q, k, v, *rest, **options, target=target)
        found.append([out, *store])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_store_must_be_contiguous() -> None:
    site = Site()
    call = make_call(site)
    call.store["k"] = call.store["k"].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="contiguous"):
        load(site.spec, INTERPRETED).launch(*call.arguments())


# --------------------------------------------------------------------------------------------------------- append

APPENDED = {
    "whole_pages": Site(CacheFormat(page=64), "float16", capacity=128, dims=(20, 20, 16)),
    "codes_pages": Site(coded(4, 2, value_group=8, page=64), "bfloat16", (16, 16, 32), capacity=128),
    "gear": Site(coded(2, 4, correction=2, outliers=3), heads=(1, 1, 1), held=(0,), capacity=96),
    "uneven": Site(coded(8, 4, group=48, value_group=4), capacity=144),
    "keys_alone": Site(coded(2, 0), "float16", (16, 40, 16), capacity=96),
    "values_alone": Site(coded(0, 2, window=32), capacity=96),
    "wide": Site(latent(bits_k=4, group=16, window=16), dims=(16, 600, 16), capacity=96),
    "more_gear": Site(coded(4, 8, group=32, correction=4, outliers=40, value_group=8, page=64), capacity=128),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if i < 3 else pytest.mark.grid) for i, n in enumerate(APPENDED)]
)
def test_appends_what_the_reference_appends(name: str) -> None:
    """Calls of many and of one token, in which groups become complete in every way; codes are the same bit for bit."""
    site = APPENDED[name]
    form, dtype, generator = site.form, DTYPES[site.dtype], torch.Generator().manual_seed(2)
    length = torch.arange(len(site.held), dtype=torch.int32) * 5
    site = dataclasses.replace(site, first=(0,) * len(site.held))
    pages, count = page_table(site, generator)
    ours, theirs = ({n: t.nan_to_num() for n, t in empty_store(site, count).items()} for _ in range(2))
    spec = CacheAppendSpec(site.dtype, site.dims[1], site.dims[2], form.text())
    launch = load(spec, INTERPRETED).launch
    key_heads = 1 if form.latent else site.heads[1]
    for tokens in (37, 1, 18, 1):
        k = torch.randn(len(length), tokens, key_heads, site.dims[1], generator=generator).to(dtype).transpose(1, 2)
        v = torch.randn(len(length), site.heads[2], tokens, site.dims[2], generator=generator).to(dtype)
        cache_store.append(k, v, theirs, length, pages, form)
        launch(k, v, list(ours.values()), length, torch.zeros_like(length), pages)
        length = length + tokens
        for found, wanted in zip(*(cache_store.read(s, length, pages, form) for s in (ours, theirs)), strict=True):
            for b, held in enumerate(length.tolist()):
                torch.testing.assert_close(found[b, :, :held], wanted[b, :, :held], rtol=0, atol=1e-3)
    for name, tensor in ours.items():
        if not name.endswith(("recent", "left", "right", "outlier")):
            assert torch.equal(tensor, theirs[name]), name


def test_tokens_beyond_the_capacity_are_not_written() -> None:
    site = Site(held=(60,), first=(0,), heads=(2, 2, 2), queries=1)
    data = torch.zeros(2, 1, 2, 64, 16)
    spec = CacheAppendSpec(key_dim=16, value_dim=16)
    fresh = torch.ones(1, 2, 9, 16)
    store = [data[0], data[1]]
    load(spec, INTERPRETED).launch(fresh, fresh, store, torch.tensor(site.held, dtype=torch.int32), None, None)
    assert data[:, :, :, 60:].eq(1).all() and data[:, :, :, :60].eq(0).all()


# ----------------------------------------------------------------------------------------------- texts and compilers

HALF = {"dtype": "bfloat16", "head_dim": 128, "key_dim": 128, "value_dim": 128}
GOLDEN: dict[str, CachedAttentionSpec | CacheAppendSpec] = {
    "cached_attention_whole": CachedAttentionSpec(**HALF, left=4096, sinks=4, num_stages=3),
    "cached_attention_codes": CachedAttentionSpec(**HALF, format=CacheFormat(bits_k=4, bits_v=2, page=128).text()),
    "cached_attention_latent": CachedAttentionSpec(
        dtype="float16",
        key_dim=48,
        format=latent(rotate="rotate_half", rotary=64, norm=True, key_bias=True, bits_k=8, correction=2).text(),
        normalizer="sigmoid",
    ),
    "cache_append_codes": CacheAppendSpec("bfloat16", 64, 64, CacheFormat(bits_k=2, bits_v=4, outliers=8).text()),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str) -> None:
    text = render(GOLDEN[name])
    check_golden(name, text)
    assert render(KernelSpec.from_dict(GOLDEN[name].to_dict())) == text
    module = ast.parse(text)
    literals = {n.targets[0].id: n.value for n in module.body if isinstance(n, ast.Assign)}
    defined = {n.name: [a.arg for a in n.args.args] for n in module.body if isinstance(n, ast.FunctionDef)}
    for entry in ast.literal_eval(literals["COMPILE"]):
        assert defined[entry["kernel"]] == list(entry["signature"])


def test_a_correction_of_keys_too_wide_for_a_program_is_refused() -> None:
    with pytest.raises(SpecError, match="up to 256 channels of keys"):
        render(CacheAppendSpec(key_dim=512, format=latent(bits_k=4, correction=2).text()))


TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950")
COMPILED = {
    "whole": (CacheFormat(page=64), HALF | {"left": 4096}),
    "codes": (CacheFormat(bits_k=4, bits_v=4), {"dtype": "bfloat16"}),
    "codes_4": (CacheFormat(bits_k=4, bits_v=4), HALF),
    "codes_2": (CacheFormat(bits_k=2, bits_v=2, value_group=32, page=128), HALF),
    "float32": (CacheFormat(bits_k=8), {"dtype": "float32"}),
    "latent": (latent(rotate="rotate_half", rotary=64), {"dtype": "bfloat16", "key_dim": 48}),
    "latent_codes": (latent(rotate="rotate_half", rotary=128, norm=True, bits_k=4, bits_v=4), HALF | {"key_dim": 1024}),
    "gear": (CacheFormat(bits_k=2, bits_v=2, correction=4, outliers=64), HALF),
    "absorbed": (CacheFormat(), {"dtype": "float16", "head_dim": 192, "key_dim": 192}),
}


def compile_all(name: str, target: str, most: bool = False) -> None:
    """Within the target's limits, checked by cross_compile, hardly a register spilled. most: the largest tile of
    queries, of heads that share keys and have values of their own."""
    form, fields = COMPILED[name]
    rows = cache_triton.max_rows(form) if most else 16
    spec = CachedAttentionSpec(format=form.text(), **fields)
    spec = dataclasses.replace(spec, **cache_triton.tiles(spec, large=target.startswith("sm_")))
    text = render(spec).replace("'BLOCK_M': 16, 'SEVERAL': False", f"'BLOCK_M': {rows}, 'SEVERAL': {most}")
    infos = cross_compile(text, target)
    assert [info.kernel for info in infos] == ["cached_attention_part", "cached_attention_merge"]
    assert all((info.stack_bytes or 0) <= (32 if most else 8) for info in infos), infos


@pytest.mark.parametrize(("name", "target"), [("codes", "sm_90"), ("whole", "gfx942")])
def test_cross_compiles(name: str, target: str) -> None:
    compile_all(name, target)


@pytest.mark.grid
@pytest.mark.parametrize("most", [False, True])  # one tile of queries of one head, or of heads with own values
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", COMPILED)
def test_every_format_cross_compiles(name: str, target: str, most: bool) -> None:
    compile_all(name, target, most)


@pytest.mark.parametrize(
    ("name", "target"),
    [pytest.param("whole", "sm_80")] + [pytest.param(n, t, marks=pytest.mark.grid) for n in COMPILED for t in TARGETS],
)
def test_appending_cross_compiles(name: str, target: str) -> None:
    form, fields = COMPILED[name]
    dtype, key_dim, value_dim = (fields.get(n, d) for n, d in (("dtype", ""), ("key_dim", 64), ("value_dim", 64)))
    infos = cross_compile(render(CacheAppendSpec(dtype, key_dim, value_dim, form.text())), target)
    assert not any(info.stack_bytes for info in infos), infos
