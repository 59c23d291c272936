"""The native kernels of quantized caches: appending against the reference bit for bit, attention against float64."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from attention_bounds import Expected, close
from test_attention_cpp import kernel as spec_kernel
from torch import Tensor

from tilewright.codegen.cache_format import CacheFormat
from tilewright.codegen.cached_attention import CacheAppendSpec, CachedAttentionSpec
from tilewright.runtime import cpu
from tilewright.runtime.ops import cache_store

NAN, INF = math.nan, math.inf
SCALE = 0.3


@dataclasses.dataclass(frozen=True)
class Case:
    """What a kernel is built for, besides the format."""

    form: CacheFormat
    dtype: str = "float32"
    key_dim: int = 64
    value_dim: int = 64
    normalizer: str = "softmax"
    left: int = 0
    sinks: int = 0

    @property
    def attention(self) -> CachedAttentionSpec:
        return CachedAttentionSpec(
            dtype=self.dtype, key_dim=self.key_dim, head_dim=self.key_dim, value_dim=self.value_dim,
            normalizer=self.normalizer, left=self.left, sinks=self.sinks, format=self.form.text(),
        )  # fmt: skip

    @property
    def append(self) -> CacheAppendSpec:
        return CacheAppendSpec(
            dtype=self.dtype, key_dim=self.key_dim, value_dim=self.value_dim, format=self.form.text()
        )


PLAIN = Case(CacheFormat(bits_k=4, bits_v=4))
GEAR = CacheFormat(
    bits_k=2, bits_v=4, group=16, window=32, page=64, value_group=16, correction=3, outliers=5
)  # fmt: skip
RICH = Case(GEAR, "bfloat16", key_dim=48, value_dim=32, left=90, sinks=20)
# The default run builds three kernels: products of bytes, and rows made of codes for CPUs without, and an append.
FAST = Case(CacheFormat(bits_k=4, bits_v=2, correction=2, outliers=6), "bfloat16")
SLOW = "avx2" if "avx2" in cpu.supported() else cpu.supported()[-1]
kinds = pytest.mark.parametrize(
    ("case", "isa"),
    [
        pytest.param(FAST, "", id="fast"),
        pytest.param(RICH, SLOW, id="slow"),
        pytest.param(PLAIN, "", id="plain", marks=pytest.mark.grid),
        pytest.param(RICH, "", id="rich", marks=pytest.mark.grid),
    ],
)


def kernel(spec, isa: str = ""):
    """The launch of a spec for an instruction set, the best one without a name."""
    return spec_kernel(spec, isa or cpu.supported()[0])


class Filled:
    """A store, empty at first, and what was appended to it. Pages lie in any order."""

    def __init__(self, case: Case, batch: int, heads: tuple[int, int], capacity: int, seed: int = 0) -> None:
        self.case, self.form, self.heads = case, case.form, heads
        self.random = torch.Generator().manual_seed(seed)
        self.length = torch.zeros(batch, dtype=torch.int32)
        self.pages = None
        count = 0
        if self.form.page:
            columns = capacity // self.form.page
            count = batch * columns
            self.pages = torch.randperm(count, generator=self.random).to(torch.int32).view(batch, columns)
        shapes = self.form.store(
            batch, capacity, heads[0], case.key_dim, heads[1], case.value_dim, case.dtype, pages=count
        )
        # What nobody wrote must not be read: NaN in numbers, and codes and places that point anywhere.
        self.store = {}
        for name, (shape, dtype) in shapes.items():
            kind = getattr(torch, dtype)
            self.store[name] = torch.full(shape, NAN if kind.is_floating_point else 77, dtype=kind)

    def fresh(self, tokens: int) -> tuple[Tensor, Tensor]:
        """k and v of a call as models make them, (B, H, L, D) with heads beside each other; channels differ in size."""
        found = []
        for heads, dim in zip(self.heads, (self.case.key_dim, self.case.value_dim), strict=True):
            x = torch.randn(len(self.length), tokens, heads, dim, generator=self.random)
            x = x * torch.linspace(0.2, 3.0, dim) + torch.linspace(-1.0, 1.0, dim)
            found.append(x.to(getattr(torch, self.case.dtype)).transpose(1, 2))
        return found[0], found[1]

    def append(self, tokens: int) -> None:
        k, v = self.fresh(tokens)
        cache_store.append(k, v, self.store, self.length, self.pages, self.form)
        self.length = self.length + tokens

    def whole(self) -> tuple[Tensor, Tensor]:
        """Keys and values as the store holds them, float64."""
        store = {n: t.double() if n.endswith("_recent") or n in ("k", "v") else t for n, t in self.store.items()}
        k, v = cache_store.read(store, self.length, self.pages, self.form)
        return k.double(), v.double()


def visible(case: Case, length: Tensor, first: Tensor, queries: int, tokens: int) -> Tensor:
    q = (length[:, None] - queries + torch.arange(queries))[:, None, :, None]
    k = torch.arange(tokens)
    seen = (k <= q) & (k >= first[:, None, None, None])
    if case.left:
        seen = seen & ((k > q - case.left) | (k < case.sinks))
    return seen


def check_attention(filled: Filled, queries: int, group: int, first: Tensor | None = None, isa: str = "") -> None:
    """The last ``queries`` tokens of the store against float64 on the same codes."""
    case, batch = filled.case, len(filled.length)
    key_heads, value_heads = filled.heads
    dtype = getattr(torch, case.dtype)
    q = torch.randn(batch, queries, value_heads * group, case.key_dim, generator=filled.random).to(dtype)
    q = q.transpose(1, 2)
    first = torch.zeros(batch, dtype=torch.int32) if first is None else first
    out = kernel(case.attention, isa)(
        q, [], list(filled.store.values()), filled.length - queries, first, filled.pages, SCALE
    )
    keys, values = filled.whole()
    tokens = keys.shape[2]
    pairs = visible(case, filled.length, first, queries, tokens)
    exists = torch.arange(tokens)[None] < filled.length[:, None]
    keys = keys.masked_fill(~exists[:, None, :, None], 0.0).repeat_interleave(value_heads // key_heads, 1)
    values = values.masked_fill(~exists[:, None, :, None], 0.0)
    expected = Expected(
        [q, keys, values, None, None], torch.ones_like(out), SCALE, "", case.normalizer, pairs.expand(-1, 1, -1, -1)
    )
    if bool(keys.isnan().any() or values.isnan().any()):  # which no bound survives
        torch.testing.assert_close(out.double(), expected.out, rtol=1e-4, atol=1e-4, equal_nan=True)
    else:
        close("out", out, expected.out, expected.out_bound + rounding(case, q, keys, values))


def rounding(case: Case, q: Tensor, keys: Tensor, values: Tensor) -> float:
    """How far products of whole numbers may be off: queries times scales, and weights times scales, are rounded to a
    grid of 32,600 (bfloat16) or 8,300,000 (float32) steps, relative to the largest in a block of keys, or in a tile."""
    steps = 2 * (8.3e6 if case.dtype == "float32" else 32600.0)
    wide = [float((t.amax((2, 3)) - t.amin((2, 3))).nan_to_num(0.0).max()) for t in (keys, values)]
    most = float(values.abs().nan_to_num(0.0).max())
    score = SCALE * case.key_dim * float(q.abs().max()) * wide[0] / steps
    return 2 * score * most + 64 * wide[1] / steps * (1 if case.normalizer == "softmax" else keys.shape[2])


def edges(form: CacheFormat) -> list[int]:
    """Numbers of tokens around which something changes: the first one, the ring, the first groups, many."""
    window, group = form.window, form.group
    full = [window - 1, window, window + group - 1, window + group, window + group + 1, window + 2 * group]
    return [1, *full, 3 * (window + group) + 5, 400]


@kinds
def test_attention_around_every_edge(case, isa):
    for index, tokens in enumerate(edges(case.form)):
        filled = Filled(case, 2, (1, 2) if index % 2 else (2, 2), 448, seed=index)
        filled.append(tokens)
        queries = min(tokens, 1 + index % 8)
        check_attention(filled, queries, group=1 + index % 3, isa=isa)
        check_attention(filled, 1, group=1, first=torch.tensor([0, tokens // 2], dtype=torch.int32), isa=isa)


@kinds
def test_sequences_of_different_lengths_and_padding(case, isa):
    filled = Filled(case, 3, (2, 2), 320)
    filled.length = torch.tensor([0, 7, 16], dtype=torch.int32)  # tokens that are only in the ring
    for tensor in (t for n, t in filled.store.items() if n.endswith("_recent")):
        tensor.fill_(0.5)
    for tokens in (30, 100, 3, 61):
        filled.append(tokens)
    check_attention(filled, 3, group=2, first=torch.tensor([190, 11, 0], dtype=torch.int32), isa=isa)


@pytest.mark.grid
def test_whole_keys_and_quantized_values():
    form = CacheFormat(bits_k=0, bits_v=8, group=32, window=16, value_group=5)
    filled = Filled(Case(form, "bfloat16", key_dim=21, value_dim=35, normalizer="sigmoid"), 1, (1, 1), 128)
    filled.append(93)
    check_attention(filled, 2, group=2, isa=SLOW)


def same(name: str, found: Tensor, expected: Tensor) -> None:
    assert torch.equal(found.nan_to_num(9.25), expected.nan_to_num(9.25)), f"{name} differs"


def check_append(case: Case, chunks: list[int], spoil=None, isa: str = "") -> tuple[Filled, Filled]:
    """The same calls into two stores, one by the kernel: equal but for the low rank, whose products are near."""
    ours, theirs = (Filled(case, 2, (1, 2), 768, seed=3) for _ in range(2))
    length = torch.tensor([0, 5], dtype=torch.int32)
    for filled in (ours, theirs):
        for name, tensor in filled.store.items():
            if name.endswith("_recent"):
                tensor.zero_()
    launch = kernel(case.append, isa)
    for tokens in chunks:
        k, v = theirs.fresh(tokens)
        if spoil is not None:
            spoil(k, v)
        cache_store.append(k, v, theirs.store, length, theirs.pages, case.form)
        launch(k, v, list(ours.store.values()), length, torch.zeros_like(length), ours.pages)
        length = length + tokens
    ours.length = theirs.length = length
    for name, expected in theirs.store.items():
        if name[2:] in ("left", "right", "outlier"):
            continue
        same(name, ours.store[name], expected)
    for found, expected in zip(ours.whole(), theirs.whole(), strict=True):
        exists = (torch.arange(expected.shape[2]) < length[:, None])[:, None, :, None]
        torch.testing.assert_close(
            found.where(exists, 0.0), expected.where(exists, 0.0), rtol=0, atol=2e-3, equal_nan=True
        )
    return ours, theirs


@pytest.mark.parametrize("case", [pytest.param(PLAIN, marks=pytest.mark.grid), RICH], ids=["plain", "gear"])
def test_append_is_the_references(case):
    check_append(case, [1, 62, 1, 1, 7, 150, 1, 96, 3])


@pytest.mark.parametrize("case", [pytest.param(PLAIN, marks=pytest.mark.grid), RICH], ids=["plain", "gear"])
def test_no_numbers_infinities_and_constant_channels(case):
    """A NaN makes its vector NaN, an infinity the largest float16; a vector of equal numbers has scale 0."""

    def spoil(k: Tensor, v: Tensor) -> None:
        k[:, :, :, 3] = 0.75
        v[:, :, :, :] = v[:, :, :, :1]
        if k.shape[2] > 99:
            k[0, 0, 20, 5], k[0, 0, 30, 6], k[1, 0, 9, 7] = NAN, INF, -INF
            v[1, 0, 8, 5] = NAN

    ours, _ = check_append(case, [130, 120], spoil)
    check_attention(ours, 1, group=2, isa="" if case is PLAIN else SLOW)


@pytest.mark.grid
@pytest.mark.parametrize("isa", ["amx", "avx512", "avx2", "baseline"])
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_grid(isa, bits, dtype):
    other = {8: 0, 4: 8, 2: 4}[bits]
    forms = [
        (CacheFormat(bits_k=bits, bits_v=bits), 128, 64),
        (CacheFormat(bits_k=bits, bits_v=other, group=128, page=128, outliers=40), 80, 96),
        (CacheFormat(bits_k=other, bits_v=bits, group=32, window=16, correction=2, value_group=8), 200, 16),
        (CacheFormat(bits_k=bits, bits_v=bits, group=48, window=48, correction=5, outliers=9), 256, 256),
    ]
    for number, (form, key_dim, value_dim) in enumerate(forms):
        normalizer = "sigmoid" if number == 1 else "softmax"
        case = Case(form, dtype, key_dim, value_dim, normalizer)
        capacity = 768 if form.group == 48 else 512
        for tokens, queries, group in itertools.product([form.window + form.group, 500], [1, 8], [1, 4]):
            filled = Filled(case, 1, (2, 2), capacity, seed=tokens)
            filled.append(tokens)
            check_attention(filled, queries, group, isa=isa)
        check_append(case, [3, 200, 1, 60], isa=isa)
