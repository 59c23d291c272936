"""The native kernels on a KV cache: few queries against float64 (bounds: attention_bounds.py), appends exactly."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from attention_bounds import DTYPES, Expected, close
from golden import check_golden
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention_cpp import kernel
from torch import Tensor

from tilewright.codegen.cache_format import CacheFormat
from tilewright.codegen.cached_attention import CacheAppendSpec, CachedAttentionSpec, window_of
from tilewright.codegen.render import render
from tilewright.codegen.spec import SpecError
from tilewright.runtime import cpu, fast_call
from tilewright.runtime.ops import cache_store

PAGED = CacheFormat(page=64).text()
CAUSAL = "k_idx <= q_idx"
WINDOW = "(k_idx <= q_idx) & ((k_idx > q_idx - 100) | (k_idx < 5))"
HALF = {"dtype": "bfloat16"}
# Few texts, since each is built: together every mask, normalizer and way of reading, and odd widths.
SPECS = {
    "plain": CachedAttentionSpec(),
    "half": CachedAttentionSpec(**HALF, key_dim=80, head_dim=80, value_dim=40),
    "tiles": CachedAttentionSpec(**HALF, key_dim=96, head_dim=96, value_dim=32),
    "window": CachedAttentionSpec(format=PAGED, key_dim=20, head_dim=20, value_dim=33, left=100, sinks=5),
    "sigmoid": CachedAttentionSpec(**HALF, format=PAGED, normalizer="sigmoid", key_dim=7, head_dim=7, left=3),
}
WIDE = {
    "absorbed": CachedAttentionSpec(**HALF, key_dim=300, head_dim=300, value_dim=64),
    "fp16": CachedAttentionSpec(dtype="float16", key_dim=128, head_dim=128, value_dim=128, left=64, sinks=64),
    "tiles_window": CachedAttentionSpec(
        **HALF, format=PAGED, key_dim=128, head_dim=128, value_dim=64, left=70, sinks=3
    ),
    "sigmoid_fp32": CachedAttentionSpec(normalizer="sigmoid", key_dim=128, head_dim=128, value_dim=256),
}


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@dataclasses.dataclass
class Case:
    """A cache with tokens, and queries. length: before the call, whose own tokens are in the store as well."""

    q: Tensor
    keys: Tensor
    values: Tensor
    length: Tensor
    first: Tensor
    store: list[Tensor]
    pages: Tensor | None


def make_case(
    spec: CachedAttentionSpec,
    lengths: list[int],
    first: list[int],
    queries: int,
    heads: tuple[int, int, int],
    layout: str,
    seed: int,
) -> Case:
    """heads: of the queries, the values and the kept keys. Rows of the store that hold no token are NaN."""
    generator = torch.Generator().manual_seed(seed)
    dtype, batch = DTYPES[spec.dtype], len(lengths)
    q_heads, value_heads, key_heads = heads

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    q = normal(batch, q_heads, queries, spec.head_dim)
    if layout == "heads_last":
        q = normal(batch, queries, q_heads, spec.head_dim).transpose(1, 2)
    elif layout == "strided":
        q = normal(batch, q_heads, 2 * queries, 2 * spec.head_dim)[:, :, ::2, ::2]
    tokens = max(lengths) + queries
    keys, values = normal(batch, key_heads, tokens, spec.key_dim), normal(batch, value_heads, tokens, spec.value_dim)
    page = spec.cache.page
    columns = -(-tokens // page) if page else 0
    # Pages in no order, one of them nobody's.
    free = torch.randperm(batch * columns + 1, generator=generator).to(torch.int32)
    pages = free[: batch * columns].view(batch, columns) if page else None
    shapes = spec.cache.store(
        batch, tokens + 3, key_heads, spec.key_dim, value_heads, spec.value_dim, spec.dtype, len(free)
    )
    store = [torch.full(shape, math.nan, dtype=dtype) for shape, _ in shapes.values()]
    for b, (length, row) in enumerate(zip(lengths, torch.arange(batch), strict=True)):
        table = None if pages is None else pages[b : b + 1]
        for side, fresh in zip(store, (keys, values), strict=True):
            target = side if page else side[row : row + 1]
            cache_store.write_rows(
                target, fresh[b : b + 1, :, : length + queries], torch.zeros(1, dtype=torch.int32), table, page
            )
        for fresh in (keys, values):
            fresh[b, :, length + queries :] = 0
    numbers = (torch.tensor(n, dtype=torch.int32) for n in (lengths, first))
    return Case(q, keys, values, *numbers, store, pages)


def visible(spec: CachedAttentionSpec, case: Case) -> Tensor:
    """Bool (B, 1, L, T)."""
    own = case.length[:, None] + torch.arange(case.q.shape[2])
    q_idx, k_idx = own[:, :, None], torch.arange(case.keys.shape[2])
    seen = k_idx <= q_idx
    if spec.left:
        seen = seen & ((k_idx > q_idx - spec.left) | (k_idx < spec.sinks))
    return (seen & (k_idx >= case.first[:, None, None]))[:, None]


def check(spec: CachedAttentionSpec, isa: str, case: Case, scale: float = 0.3) -> Tensor:
    launch = kernel(spec, isa)
    out = launch(case.q, [], case.store, case.length, case.first, case.pages, scale)
    keys = case.keys.repeat_interleave(case.values.shape[1] // case.keys.shape[1], 1)
    inputs = [case.q, keys, case.values, None, None]
    grad = torch.zeros(out.shape, dtype=out.dtype)
    expected = Expected(inputs, grad, scale, "", spec.normalizer, visible(spec, case))
    assert out.dtype == case.q.dtype and out.is_contiguous()
    close("out", out, expected.out, expected.out_bound)
    return out


# Around a vector, a tile and a few of them.
LENGTHS = [0, 1, 2, 15, 16, 40, 62, 63, 64, 65, 100, 127, 128, 200, 300]


@st.composite
def cases(draw, spec: CachedAttentionSpec) -> Case:
    lengths = draw(st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=3))
    first = [draw(st.sampled_from([0, 0, 0, 1, 7, 64, 90, 400])) for _ in lengths]
    queries = draw(st.integers(1, 8))
    heads = draw(st.sampled_from([(1, 1, 1), (2, 2, 2), (6, 2, 2), (4, 2, 1), (9, 3, 1), (6, 3, 3), (7, 1, 1)]))
    layout = draw(st.sampled_from(["plain", "heads_last", "strided"]))
    return make_case(spec, lengths, first, queries, heads, layout, draw(st.integers(0, 99)))


def match(spec: CachedAttentionSpec, isa: str, examples: int) -> None:
    kernel(spec, isa)

    @given(cases(spec), st.sampled_from([1, 2, 3]), st.sampled_from([0.3, 0.3, 0.0]))
    @settings(max_examples=examples)
    def run(case, threads, scale):
        torch.set_num_threads(threads)
        check(spec, isa, case, scale)

    run()


@pytest.mark.parametrize("name", SPECS)
def test_matches_float64(name) -> None:
    match(SPECS[name], cpu.supported()[0], 25)


@pytest.mark.parametrize(("name", "isa"), [("tiles", "avx512"), ("half", "avx2"), ("window", "baseline")])
def test_other_instruction_sets_match_float64(name, isa) -> None:
    match(SPECS[name], isa, 15)


@pytest.mark.grid
@pytest.mark.parametrize("isa", ["amx", "avx512", "avx2", "baseline"])
@pytest.mark.parametrize("name", SPECS | WIDE)
def test_every_spec_matches_float64(name, isa) -> None:
    match((SPECS | WIDE)[name], isa, 40)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_long_caches_are_shared_out_and_merged(threads) -> None:
    """One head, three that do not divide by the threads, and sequences of very different length."""
    torch.set_num_threads(threads)
    for lengths, heads in (
        ([5000], (2, 1, 1)),
        ([1500], (9, 3, 3)),
        ([2100, 3, 700], (3, 3, 1)),
        ([0, 4000], (1, 1, 1)),
    ):
        case = make_case(SPECS["plain"], lengths, [0] * len(lengths), 2, heads, "plain", threads)
        check(SPECS["plain"], cpu.supported()[0], case)


def test_the_result_depends_on_no_scheduling() -> None:
    torch.set_num_threads(2)
    case = make_case(SPECS["plain"], [4000], [0], 1, (3, 3, 3), "plain", 0)
    launch = kernel(SPECS["plain"], cpu.supported()[0])
    runs = [launch(case.q, [], case.store, case.length, case.first, None, 0.2) for _ in range(20)]
    assert all(torch.equal(runs[0], other) for other in runs)


def test_a_negative_scale() -> None:
    case = make_case(SPECS["half"], [100], [3], 2, (4, 2, 2), "plain", 0)
    launch = kernel(SPECS["half"], cpu.supported()[0])
    rest = ([], case.store, case.length, case.first, None)
    assert torch.equal(launch(case.q, *rest, -0.25), launch(-case.q, *rest, 0.25))


def test_a_window_reads_nothing_outside_of_it() -> None:
    spec = SPECS["window"]
    case = make_case(spec, [600], [0], 3, (2, 2, 2), "plain", 0)
    kept = {int(case.pages[0, i]) for i in (0, *range((600 - 99) // 64, -(-603 // 64)))}
    for page in set(range(case.store[0].shape[0])) - kept:
        for tensor in case.store:
            tensor[page] = math.nan
    check(spec, cpu.supported()[0], case)


def test_pages_that_are_missing_count_as_hidden() -> None:
    spec = SPECS["window"]
    case = make_case(spec, [600], [0], 1, (2, 2, 2), "plain", 0)
    whole = check(spec, cpu.supported()[0], case)
    case.pages[0, 2:6] = -1
    assert torch.equal(check(spec, cpu.supported()[0], case), whole)


@pytest.mark.parametrize("name", ["plain", "sigmoid"])
def test_infinite_and_undefined_numbers(name) -> None:
    """As torch's own attention: NaN keys and values reach every row that sees them and no other."""
    spec = SPECS[name]
    for side, value in itertools.product(("keys", "values", "q"), (math.nan, math.inf, -math.inf)):
        case = make_case(spec, [130], [0], 2, (2, 2, 2), "plain", 1)
        if side == "q":
            case.q[0, 1, 1, 3] = value
        else:
            getattr(case, side)[0, 1, 131, 3] = value  # the second query alone sees it
            tensor = case.store[0 if side == "keys" else 1]
            rows = tensor if case.pages is None else tensor[case.pages[0].long()].transpose(0, 1).flatten(1, 2)[None]
            rows = rows.clone()
            rows[0, 1, 131, 3] = value
            if case.pages is None:
                tensor.copy_(rows)
            else:
                tensor[case.pages[0].long()] = rows[0].unflatten(1, (-1, 64)).transpose(0, 1)
        out = kernel(spec, cpu.supported()[0])(case.q, [], case.store, case.length, case.first, case.pages, 0.3)
        scores = (0.3 * case.q.double() @ case.keys.double().mT).masked_fill(~visible(spec, case), -math.inf)
        weights = scores.softmax(-1) if spec.normalizer == "softmax" else scores.sigmoid()
        expected = weights @ case.values.double()
        assert torch.equal(out.isnan(), expected.isnan()), (side, value)
        assert torch.equal(out.isposinf(), expected.isposinf()), (side, value)
        assert torch.equal(out.isneginf(), expected.isneginf()), (side, value)


@pytest.mark.parametrize("format", ["", PAGED])
def test_appended_tokens(format) -> None:
    spec = CacheAppendSpec("bfloat16", 20, 33, format)
    form = spec.cache
    for count, seed in itertools.product((1, 5, 70), range(2)):
        generator = torch.Generator().manual_seed(seed)
        k = torch.randn(3, 2 * count, 2, 20, generator=generator).to(torch.bfloat16)[:, ::2].transpose(1, 2)
        v = torch.randn(3, 4, count, 66, generator=generator).to(torch.bfloat16)[..., ::2]
        length = torch.tensor([0, 60, 100], dtype=torch.int32)
        pages = torch.randperm(12, generator=generator).to(torch.int32).view(3, 4) if form.page else None
        shapes = form.store(3, 200, 2, 20, 4, 33, "bfloat16", 12)
        mine, expected = ([torch.zeros(shape, dtype=torch.bfloat16) for shape, _ in shapes.values()] for _ in range(2))
        kernel(spec, cpu.supported()[0])(k, v, mine, length, length, pages)
        cache_store.append(k, v, cache_store.named(expected, form), length, pages, form)
        assert all(map(torch.equal, mine, expected))
        assert sum(int(t.count_nonzero()) for t in mine) > 0.9 * (k.numel() + v.numel())


@pytest.mark.parametrize("mask", [CAUSAL, pytest.param(WINDOW, marks=pytest.mark.grid)])
@pytest.mark.parametrize("format", ["", PAGED])
def test_prefill_chunks_and_steps_give_what_one_call_does(mask, format) -> None:
    """The op on its kernels, with sequences of one length, against the pure op in float64."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 190, 64, generator=generator) for heads in (4, 2))
    v = torch.randn(2, 2, 190, 64, generator=generator)
    first = torch.tensor([5, 0], dtype=torch.int32)
    bias = (torch.arange(190) >= first[:, None])[:, None, None]
    options = {"scale": 0.2, "mask": mask, "normalizer": "softmax", "format": format}
    expected = torch.ops.tilewright.cached_attention(q.double(), k.double(), v.double(), bias, [], **options)
    shapes = CacheFormat(page=64 if format else 0).store(2, 192, 2, 64, 2, 64, "float32", 6).values()
    store = [torch.full(shape, math.nan) for shape, _ in shapes]
    pages = torch.tensor([[4, 0, 2], [1, 5, 3]], dtype=torch.int32) if format else None
    at = 0
    for count in (100, 1, 1, 5, 40, 8, 1, 34):
        part = slice(at, at + count)
        length = torch.full((2,), at, dtype=torch.int32)
        out = torch.ops.tilewright.cached_attention_step(
            q[:, :, part], k[:, :, part], v[:, :, part], [], store, length, first, pages, **options, target="cpp"
        )
        torch.testing.assert_close(out.double(), expected[:, :, part], rtol=1e-5, atol=1e-5)
        at += count
    assert at == 190


def test_lists_of_tensors_and_two_kernels_in_one_call() -> None:
    """A step through a KV cache appends to the tensors of a list, then reads them."""
    assert fast_call.prepare()
    step = torch.ops.tilewright.cached_attention_step
    options = {"scale": 0.125, "mask": "k_idx <= q_idx"}
    first = torch.zeros(1, dtype=torch.int32)
    mine, expected = ([torch.zeros(1, 2, 40, 64) for _ in range(2)] for _ in range(2))

    def call(at: int, store: list[Tensor], target: str) -> Tensor:
        generator = torch.Generator().manual_seed(at)
        q, k, v = (torch.randn(1, 2, 1, 64, generator=generator) for _ in range(3))
        length = torch.tensor([at], dtype=torch.int32)
        return step(q, k, v, [], store, length, first, None, **options, target=target)

    for at in range(2 * fast_call.TRY_EVERY):
        torch.testing.assert_close(call(at, mine, "cpp"), call(at, expected, "reference"))
    at += 1
    before = fast_call.calls_without_python()
    found = call(at, mine, "cpp")
    assert fast_call.calls_without_python() == before + 1
    torch.testing.assert_close(found, call(at, expected, "reference"))
    # Other tensors in the list, of the same shapes and of others, are not mistaken for these.
    for other in (
        [t.clone() for t in mine],
        [torch.zeros(1, 2, 50, 64) for _ in range(2)],
        mine[:1] + [mine[1].clone()],
    ):
        same = [t.clone() for t in other]
        torch.testing.assert_close(call(at + 1, other, "cpp"), call(at + 1, same, "reference"))
        assert all(map(torch.equal, other, same))


def test_masks_that_the_kernel_knows() -> None:
    assert window_of(CAUSAL) == (0, 0)
    assert window_of("k_idx <= q_idx + k_len - q_len") == (0, 0)
    assert window_of("(k_idx <= q_idx) & (k_idx >= q_idx - 255)") == (256, 0)
    assert window_of(WINDOW) == (100, 5)
    for mask in ("", "k_idx < q_idx", "(k_idx <= q_idx) & (k_idx % 2 == 0)", "(k_idx <= q_idx) & (head > 1)"):
        with pytest.raises(SpecError, match="causal masks, windows and sinks"):
            window_of(mask)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"head_dim": 32}, "only latent keys may differ"),
        ({"sinks": 4}, "left is 0"),
        ({"left": -1}, "left is -1"),
        ({"value_dim": 300}, "1 to 256"),
        ({"format": '{"page":64}'}, "canonical text"),
        ({"normalizer": "entmax"}, "normalizer"),
    ],
)
def test_specs_out_of_range(fields, words) -> None:
    with pytest.raises(SpecError, match=words):
        CachedAttentionSpec(**fields)


def test_texts() -> None:
    check_golden("cached_attention_native", render(SPECS["tiles"], "cpp"), ".cpp.txt")
    check_golden("cached_attention_native_window", render(SPECS["window"], "cpp"), ".cpp.txt")
    check_golden("cache_append_native", render(CacheAppendSpec(format=PAGED), "cpp"), ".cpp.txt")
