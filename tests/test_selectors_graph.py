"""Selectors in a graph: every length, nothing dropped when all is kept, what matters found; text; declined sites."""

from __future__ import annotations

import pytest
import torch
from selector_cases import CACHED, CAUSAL, Tensors, dense, qkv, run, sites, tiles

from tilewright.codegen import symbols
from tilewright.passes.selectors import (
    DHSA,
    PBS,
    SELECTORS,
    BiFormer,
    LongHeads,
    ProxyAttn,
    Selector,
    XAttention,
    masks,
    parse_selector,
)
from tilewright.runtime import errors

F64 = {"rtol": 1e-11, "atol": 1e-11}
EVERYTHING: list[Selector] = [
    XAttention(4, 1.0),
    ProxyAttn(1.0, stride=2, least=0),
    PBS(32, 1.0),
    PBS(32, 1.0, shared=True),
    DHSA(10**6, 9),
    BiFormer(1000),
    LongHeads(1000),
]
SOME: list[Selector] = [
    XAttention(4, 0.5),
    ProxyAttn(0.5, stride=2, least=0),
    PBS(32, 0.5),
    DHSA(48, 9, window=2, apart=2),
    BiFormer(3),
    LongHeads(4),
]


@pytest.mark.parametrize(
    "selectors",
    [SOME[:1], pytest.param([EVERYTHING[0], EVERYTHING[2], *SOME], marks=pytest.mark.grid)],
    ids=["xattention", "each"],
)
def test_one_graph_for_every_length(selectors: list[Selector]) -> None:
    """Captured at 80, run at other lengths: the choice and the output of a graph of that length."""
    module, declined = sites(selectors, qkv(80), CAUSAL, dynamic=True)
    assert not declined
    for length in (35, 101):
        example = qkv(length, seed=length)
        own = sites(selectors, example, CAUSAL)[0](*example)
        for (out, counts, indices), (expected, their_counts, their_indices) in zip(module(*example), own, strict=True):
            assert torch.equal(counts, their_counts) and torch.equal(indices, their_indices)
            torch.testing.assert_close(out, expected, **F64)


@pytest.mark.parametrize(
    ("mask", "queries", "keys"),
    [
        (CAUSAL, 75, 75),
        (CACHED, 37, 90),
        ("", 64, 64),
        ("(k_idx <= q_idx) & ((k_idx > q_idx - 20) | (k_idx < 3))", 81, 81),
    ],
    ids=["causal", "cached", "all", "sinks and window"],
)
def test_keeping_everything_is_dense(mask: str, queries: int, keys: int) -> None:
    example = qkv(queries, keys)
    module, declined = sites(EVERYTHING, example, mask)
    assert len(declined) == (2 if mask == "" else 1 if mask == CACHED else 0), declined
    for out, _, _ in module(*example):
        torch.testing.assert_close(out, dense(example, mask), **F64)


def planted(length: int = 160) -> Tensors:
    """Keys 70 to 75 are what every query asks for, in every head; what they say is worth hearing."""
    q, k, v = qkv(length)
    q, k = q + 2.0, k - 0.5
    k[:, :, 70:76] += 3.0
    v[:, :, 70:76] += 3.0
    return q, k, v


@pytest.mark.parametrize("selector", SOME, ids=lambda s: s.name)
def test_finds_what_every_query_asks_for(selector: Selector) -> None:
    example, block = planted(), 16
    out, read = run(selector, example)
    expected = dense(example, CAUSAL)
    if not isinstance(selector, PBS):  # whose blocks hold other keys
        assert bool(read[:, :, 5:, 70 // block].all())
    assert float(read.sum()) < 0.7 * read.shape[0] * read.shape[1] * float(
        tiles(torch.ones(160, 160).tril(), block).sum()
    )
    wrong = out[:, :, 96:] - expected[:, :, 96:]  # to the queries before, half of the sequence means the same
    assert wrong.norm() / expected[:, :, 96:].norm() < 1e-3


def test_pbs_gathers_scattered_keys() -> None:
    """Keys that matter stand alone, one in each block; sorted, fewer blocks hold more of them."""
    q, k, v = qkv(256)
    q, k = q + 2.0, k - 1.0
    k[:, :, 5::16] += 3.0
    example = (q, k, v)
    expected = dense(example, CAUSAL)
    wrong, sizes = {}, {}
    for one in (PBS(32, 0.5), XAttention(4, 0.7)):
        out, read = run(one, example)
        wrong[one.name], sizes[one.name] = float((out - expected).norm()), int(read.sum())
    assert sizes["pbs"] < sizes["xattention"] and wrong["pbs"] < wrong["xattention"]


def brute(mask: str, stride: int, queries: int, keys: int) -> torch.Tensor:
    values = {
        "q_len": queries,
        "k_len": keys,
        "k_idx": torch.arange(keys)[None],
        "q_idx": torch.arange(queries)[:, None],
    }
    pairs = symbols.evaluate(mask, values).expand(queries, keys)
    return tiles(pairs, stride)


MASKS = [
    CAUSAL,
    CACHED,
    "(k_idx <= q_idx) & ((k_idx > q_idx - 20) | (k_idx < 5))",
    "(k_idx > q_idx + k_len - q_len - 7) | (k_idx == 3)",
    "(2 * k_idx <= 3 * q_idx + 5) & (k_idx // 8 != q_idx // 8)",
    "k_idx % 3 == 0",
]


@pytest.mark.parametrize("mask", MASKS)
def test_masks_over_groups(mask: str) -> None:
    """Never hides a visible pair; linear comparisons hide every group that has none when the lengths are known."""
    for stride in (1, 3, 4):
        for queries, keys in ((24, 24), (22, 22), (10, 31)):
            expected = brute(mask, stride, queries, keys)
            rows, columns = expected.shape
            for known in ((queries, keys), (None, None)):
                coarse = masks.coarsen(mask, stride, *known, aligned=queries == keys)
                found = brute(coarse or "True", 1, rows, columns)
                assert bool((found >= expected).all()), "hides what is visible"
                if mask in MASKS[:3] and known[0]:
                    assert torch.equal(found, expected)


@pytest.mark.parametrize("mask", MASKS)
def test_masks_of_the_last_queries(mask: str) -> None:
    for queries, keys in ((24, 24), (10, 31)):
        expected = brute(mask, 1, queries, keys)[-6:]
        aligned = queries == keys
        found = brute(masks.last_queries(mask, aligned=aligned) or "True", 1, 6, keys)
        assert bool((found >= expected).all())
        if mask == CACHED or (aligned and mask in MASKS[:4]):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("name", SELECTORS)
def test_text_there_and_back(name: str) -> None:
    one = parse_selector(name)
    assert type(one) is SELECTORS[name] and parse_selector(str(one)) == one


def test_text() -> None:
    assert parse_selector(" XAttention( 8 , threshold = 0.5 ) ") == XAttention(8, 0.5)
    assert parse_selector("long-heads(chunks=5)") == LongHeads(5)
    assert parse_selector("pbs(shared=true, segment=512)") == PBS(512, shared=True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("xatention", "did you mean 'xattention'"),
        ("dhsa(bugdet=3)", "did you mean 'budget'"),
        ("biformer(1, 2)", "one more"),
        ("biformer(topk=1, topk=2)", "twice"),
        ("biformer(topk=x)", "a whole number"),
        ("xattention(stride=0)", "stride is 0"),
        ("xattention(threshold=1.5)", "threshold is 1.5"),
        ("proxyattn(least=-1)", "least is -1"),
        ("dhsa(window=3)", "a power of two"),
        ("longheads(chunks=2)", "from 3"),
        ("pbs(", "cannot read"),
    ],
)
def test_bad_text(text: str, words: str) -> None:
    with pytest.raises(errors.BadPassOption, match=words):
        parse_selector(text)


def reason(selector: Selector, example: Tensors, mask: str, **sizes: int) -> str:
    _, declined = sites([selector], example, mask, **sizes)
    return declined[0] if declined else ""


def test_reasons_to_decline() -> None:
    assert "cross-attention" in reason(XAttention(), qkv(40, 90), "")
    assert "decoding" in reason(ProxyAttn(), qkv(1, 90), CACHED)
    assert "2 blocks" in reason(BiFormer(), qkv(30), CAUSAL)
    assert "strides" in reason(XAttention(12), qkv(80), CAUSAL)
    assert "strides" in reason(ProxyAttn(stride=3), qkv(80), CAUSAL)
    assert "2 key heads" in reason(ProxyAttn(proxies=3), qkv(80), CAUSAL)
    assert "segments" in reason(PBS(40), qkv(80), CAUSAL)
    assert "not causal" in reason(PBS(), qkv(80), "")
    assert "cached keys" in reason(LongHeads(), qkv(40, 90), CACHED)
    for one in SOME:
        assert not reason(one, qkv(80), CAUSAL)
