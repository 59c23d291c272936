"""The reference of quantized caches: codes against loops, stores against the definition however tokens arrive."""

from __future__ import annotations

import itertools

import pytest
import torch

from tilewright.codegen.cache_format import CacheFormat, is_recent
from tilewright.runtime import errors
from tilewright.runtime.ops import cache_codes, cache_store

HALF = 2.0**-11  # what rounding to float16 costs, relative
step_op, pure_op = torch.ops.tilewright.cached_attention_step, torch.ops.tilewright.cached_attention
CAUSAL = "k_idx <= q_idx"


def sample(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers with channels of different size and offset, as keys have."""
    generator = torch.Generator().manual_seed(seed)
    spread, middle = torch.rand(shape[-1], generator=generator) * 3, torch.randn(shape[-1], generator=generator)
    return (torch.randn(shape, generator=generator) * spread + middle).to(dtype)


def restored(x: torch.Tensor, bits: int, **options: int | bool) -> torch.Tensor:
    parts = cache_codes.quantize(x, bits, **options)
    return cache_codes.dequantize(parts, bits, keys=bool(options["keys"]), dtype=x.dtype)


# Codes.


def test_bytes_hold_channels_a_stride_apart() -> None:
    codes = torch.tensor([[1, 2, 3, 0, 3, 1, 2, 2]])
    assert cache_codes.pack(codes, 4).tolist() == [[1 | 3 << 4, 2 | 1 << 4, 3 | 2 << 4, 0 | 2 << 4]]
    assert cache_codes.pack(codes, 2).tolist() == [[1 | 3 << 2 | 3 << 4 | 2 << 6, 2 | 0 << 2 | 1 << 4 | 2 << 6]]
    for bits in (8, 4, 2):
        codes = torch.randint(0, 2**bits, (3, 5, 24), generator=torch.Generator().manual_seed(bits))
        packed = cache_codes.pack(codes, bits)
        assert packed.shape == (3, 5, 3 * bits) and packed.dtype == torch.uint8
        assert torch.equal(cache_codes.unpack(packed, bits), codes.to(torch.uint8))


def by_loops(vector: torch.Tensor, bits: int) -> list[float]:
    """One vector as the page on formats defines it, number by number."""
    numbers = vector.tolist()
    least, most = min(numbers), max(numbers)
    inwards = (most - least) / 16 if bits == 2 else 0.0
    scale = float(torch.tensor((most - least - 2 * inwards) / (2**bits - 1)).half())
    offset = float(torch.tensor(least + inwards).half())
    return [offset + scale * min(max(round((x - offset) / scale), 0), 2**bits - 1) for x in numbers]


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_codes_by_their_definition(bits: int) -> None:
    x = sample(2, 16, 8, seed=bits)
    keys, values, halves = (
        restored(x, bits, keys=True),
        restored(x, bits, keys=False),
        restored(x, bits, keys=False, value_group=4),
    )
    # A quotient that float32 rounds to the other side of a half gives the next code: none of these do.
    near = {"rtol": 1e-6, "atol": 1e-6}
    for head in range(2):
        for c in range(8):
            torch.testing.assert_close(keys[head, :, c].tolist(), by_loops(x[head, :, c], bits), **near)
        for t in range(16):
            torch.testing.assert_close(values[head, t].tolist(), by_loops(x[head, t], bits), **near)
            torch.testing.assert_close(halves[head, t, 4:].tolist(), by_loops(x[head, t, 4:], bits), **near)
    # Half a step (at 2 bits a sixth of seven eighths of the range, which is over the sixteenth that is clamped), what
    # rounding offset and scale to float16 shifts, and float32.
    least, most = x.amin(-2, keepdim=True), x.amax(-2, keepdim=True)
    bound = (most - least) * (0.5 / (2**bits - 1) + HALF) + torch.maximum(least.abs(), most.abs()) * HALF + 1e-6
    assert ((keys - x).abs() <= bound).all()


def test_vectors_of_one_number_and_beyond_float16() -> None:
    x = torch.full((16, 4), 0.75)
    assert torch.equal(restored(x, 4, keys=True), x) and torch.equal(restored(x, 2, keys=False), x)
    assert torch.equal(restored(torch.zeros(16, 4), 2, keys=True, rank=2, outliers=3), torch.zeros(16, 4))
    assert restored(torch.tensor([[1e6, -1e6, 0.0, 1.0]]).repeat(16, 1), 4, keys=True).isfinite().all()


@pytest.mark.parametrize("keys", [True, False])
def test_outliers_come_back_and_stop_stretching_the_scale(keys: bool) -> None:
    x = sample(2, 32, 16, seed=3)
    x[0, 5, 7], x[1, 31, 0] = 80.0, -90.0
    plain, kept = restored(x, 4, keys=keys), restored(x, 4, keys=keys, outliers=6)
    assert (kept - x).norm() < 0.5 * (plain - x).norm()
    place = cache_codes.quantize(x, 4, keys=keys, outliers=6)["place"].long()
    assert 5 * 16 + 7 in place[0].tolist() and 31 * 16 in place[1].tolist()
    assert (place.diff(dim=-1) > 0).all()
    # What is missing there is at most as large as the entry and its vector's mean together.
    found, wanted = (t.flatten(-2).gather(-1, place) for t in (kept, x))
    assert ((found - wanted).abs() <= 2 * HALF * wanted.abs() + 4 * HALF).all()


def test_low_rank_is_nearly_the_best_one_and_takes_dependent_columns() -> None:
    residual = sample(3, 32, 16, seed=5)
    left, right = cache_codes.low_rank(residual, 4)
    found = left.float() @ right.float().transpose(-2, -1)
    singular = torch.linalg.svdvals(residual)
    best = singular[:, 4:].square().sum(-1).sqrt()
    assert ((found - residual).flatten(1).norm(dim=-1) <= 1.15 * best).all()
    # Rank one in rank four: the other columns are rounding, and must not come back as directions.
    single = sample(1, 32, 1) @ sample(1, 1, 16, seed=1)
    left, right = cache_codes.low_rank(single, 4)
    error = (left.float() @ right.float().transpose(-2, -1) - single).norm() / single.norm()
    assert error < 4 * HALF
    # The start is part of the format's definition: other implementations have the same signs.
    signs = [[-1 if (c + 1) * 0x9E3779B1 * (2 * r + 3) % 2**32 >= 2**31 else 1 for r in range(4)] for c in range(96)]
    assert cache_codes.start(96, 4).tolist() == signs
    assert signs[:3] == [[-1, 1, 1, -1], [-1, 1, -1, 1], [-1, 1, -1, -1]]


def test_each_correction_helps() -> None:
    x = sample(2, 64, 32, seed=7)
    errors_of = {
        (rank, count): float((restored(x, 2, keys=True, rank=rank, outliers=count) - x).norm())
        for rank, count in itertools.product((0, 4), (0, 40))
    }
    assert errors_of[4, 40] < min(errors_of[4, 0], errors_of[0, 40]) < errors_of[0, 0]


# Stores.

FORMS = (
    CacheFormat(bits_k=4, bits_v=2, group=32, window=16, value_group=8),
    CacheFormat(bits_k=2, bits_v=4, group=16, window=32, correction=2, outliers=5),
    CacheFormat(bits_k=8, group=64, window=16),
)


def empty_store(form: CacheFormat, batch: int, capacity: int, heads: int, dims: tuple[int, int]) -> dict:
    """Full of NaN and ones, so that reading what nobody wrote shows; pages, where there are any, in any order."""
    pages = batch * capacity // form.page if form.page else 0
    wanted = form.store(batch, capacity, heads, dims[0], heads, dims[1], "float32", pages=pages)
    return {
        name: torch.full(shape, 1 if kind in ("uint8", "int16") else torch.nan, dtype=getattr(torch, kind))
        for name, (shape, kind) in wanted.items()
    }


def page_table(form: CacheFormat, batch: int, capacity: int) -> torch.Tensor | None:
    if not form.page:
        return None
    count = batch * capacity // form.page
    return torch.randperm(count, generator=torch.Generator().manual_seed(1)).reshape(batch, -1).int()


def definition(x: torch.Tensor, side: str, tokens: int, form: CacheFormat) -> torch.Tensor:
    """What a store of ``tokens`` tokens gives back."""
    old = form.quantized_tokens(tokens)
    return torch.cat((cache_store.rounded(x[:, :, :old], side, form), x[:, :, old:tokens]), dim=2)


@pytest.mark.parametrize("page", [0, 64])
@pytest.mark.parametrize("form", FORMS)
def test_a_store_does_not_care_how_tokens_arrive(form: CacheFormat, page: int) -> None:
    form = form.changed(page=page)
    capacity, total = 256, 171
    k, v = sample(2, 2, total, 16, seed=1), sample(2, 2, total, 8, seed=2)
    pages = page_table(form, 2, capacity)
    for calls in ([1] * total, [total], [1, 40, 1, 5, 90, 33, 1]):
        store = empty_store(form, 2, capacity, 2, (16, 8))
        done = 0
        for count in calls:
            held = torch.full((2,), done, dtype=torch.int32)
            new = slice(done, done + count)
            cache_store.append(k[:, :, new], v[:, :, new], store, held, pages, form)
            done += count
        found = cache_store.read(store, torch.tensor([total, total]), pages, form)
        for x, whole, side in zip(found, (k, v), "kv", strict=True):
            torch.testing.assert_close(x, definition(whole, side, total, form), rtol=0, atol=0)
        assert set(store) == set(form.names())


def test_sequences_of_different_lengths() -> None:
    form, ends = FORMS[0], (19, 80, 133)
    k, v = sample(3, 1, 160, 16, seed=1), sample(3, 1, 160, 8, seed=2)
    store = empty_store(form, 3, 160, 1, (16, 8))
    for b, end in enumerate(ends):  # each sequence's own beginning, through a store of its own
        own = {name: tensor[b : b + 1] for name, tensor in store.items()}
        cache_store.append(k[b : b + 1, :, :end], v[b : b + 1, :, :end], own, torch.zeros(1), None, form)
    length = torch.tensor(ends, dtype=torch.int32)
    more = 20
    new = [torch.stack([x[b, :, end : end + more] for b, end in enumerate(ends)]) for x in (k, v)]
    cache_store.append(*new, store, length, None, form)
    ahead = cache_store.read(store, length, None, form, ahead=more)
    after = cache_store.read(store, length + more, None, form)
    for x, y, whole, side in zip(ahead, after, (k, v), "kv", strict=True):
        for b, end in enumerate(ends):
            wanted = definition(whole[b : b + 1], side, end + more, form)[0]
            assert torch.equal(y[b, :, : end + more], wanted) and torch.equal(x[b, :, :end], wanted[:, :end])


@pytest.mark.parametrize("form", FORMS[:2])
def test_token_by_token_is_the_pure_op(form: CacheFormat) -> None:
    total = 75
    q, k, v = sample(2, 4, total, 16), sample(2, 2, total, 16, seed=1), sample(2, 2, total, 8, seed=2)
    first = torch.tensor([0, 3], dtype=torch.int32)
    store = empty_store(form, 2, 96, 2, (16, 8))
    options = {"scale": 0.3, "mask": CAUSAL, "format": form.text()}
    out = []
    for at in range(total):
        now, held = slice(at, at + 1), torch.full((2,), at, dtype=torch.int32)
        one = (q[:, :, now], k[:, :, now], v[:, :, now])
        out.append(step_op(*one, [], list(store.values()), held, first, None, **options))
    shown = (torch.arange(total) >= first[:, None])[:, None, None]
    wanted = pure_op(q, k, v, shown, [], **options)
    # Both in float32, sums in another order.
    torch.testing.assert_close(torch.cat(out, dim=2), wanted, rtol=1e-5, atol=1e-5)
    whole = pure_op(q, k, v, shown, [], scale=0.3, mask=CAUSAL)
    assert (whole - wanted)[:, :, -1].abs().max() > 1e-3, "the last query sees quantized tokens"
    torch.testing.assert_close(wanted[:, :, : form.window], whole[:, :, : form.window], rtol=1e-5, atol=1e-5)


def test_cutting_a_store_back() -> None:
    form = CacheFormat(bits_k=8, bits_v=4, group=16, window=16)
    k, v = sample(1, 1, 112, 16, seed=1), sample(1, 1, 112, 8, seed=2)
    whole = [torch.cat((definition(x, s, 112, form)[:, :, :56], x[:, :, 56:]), 2) for x, s in ((k, "k"), (v, "v"))]
    for after in (60, 100, 0, 112):
        store = empty_store(form, 1, 112, 1, (16, 8))
        cache_store.append(k, v, store, torch.zeros(1), None, form)
        before, end = torch.tensor([112]), torch.tensor([after])
        cache_store.restore_recent(store, before, end, None, form)
        found = cache_store.read(store, end, None, form)
        quantized = form.quantized_tokens(after)
        for x, y, original, side in zip(found, whole, (k, v), "kv", strict=True):
            assert x.shape[2] == after and x.isfinite().all()
            rounded = cache_store.rounded(original[:, :, :quantized], side, form)
            assert torch.equal(x[:, :, :quantized], rounded)
            if after == 60:  # slots of tokens 48 to 59 were taken by 80 and later ones: only codes are left of them
                codes = definition(original, side, 112, form)[:, :, quantized:after]
                assert torch.equal(x[:, :, quantized:], codes)
            if after == 100:  # 96 to 99 still have their slots
                assert torch.equal(x[:, :, 96:], y[:, :, 96:100])


def test_rounding_passes_gradients_through() -> None:
    x = sample(1, 2, 40, 8).requires_grad_()
    rounded = cache_store.rounded(x, "k", FORMS[0])
    assert not torch.equal(rounded[:, :, :32], x[:, :, :32]) and torch.equal(rounded[:, :, 32:], x[:, :, 32:])
    (rounded * 3).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full_like(x, 3))
    cheap = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.tilewright.cache_rounded, (x, "k", FORMS[0].text()), test_utils=cheap)


def test_bfloat16_rounds_once() -> None:
    x = sample(1, 1, 32, 16, seed=4, dtype=torch.bfloat16)
    found = restored(x, 8, keys=True)
    wide = restored(x.float(), 8, keys=True)
    assert found.dtype == torch.bfloat16 and torch.equal(found, wide.bfloat16())


def test_a_store_of_another_format_is_refused() -> None:
    store = list(empty_store(FORMS[0], 1, 64, 1, (16, 8)).values())
    with pytest.raises(errors.BadArgument, match="its format has k_codes, k_scale"):
        cache_store.named(store[:-1], FORMS[0])
    assert [name for name in FORMS[1].names() if is_recent(name)] == ["k_recent", "v_recent"]
