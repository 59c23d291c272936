"""Every selector against its paper's rule, written out slowly: the blocks it reads and the output."""

from __future__ import annotations

import math

import pytest
import torch
from selector_cases import (
    CACHED,
    CAUSAL,
    SCALE,
    Tensors,
    attend_blocks,
    best,
    blocks,
    blocks_read,
    every_head,
    fewest,
    qkv,
    run,
    spans,
    tiles,
    visible,
)

from tilewright.passes.selectors import DHSA, PBS, BiFormer, LongHeads, ProxyAttn, Selector, XAttention

# Both sides are float64, but for pooled means, which are float32 and only rank blocks.
F64 = {"rtol": 1e-11, "atol": 1e-11}
# Grouped heads, batch 2, lengths that are no multiples of the block or the stride; queries at the end of cached keys.
WINDOW = "(k_idx <= q_idx) & (k_idx > q_idx - 70)"
CASES = [(CAUSAL, 75, 75), (CACHED, 40, 91), ("", 102, 102), (WINDOW, 96, 96)]
NAMES = ["causal", "cached", "all", "window"]
BLOCK = 16


def check(selector: Selector, example: Tensors, mask: str, expected: torch.Tensor) -> None:
    out, read = run(selector, example, mask)
    assert torch.equal(read.expand(expected.shape), expected)
    seen = tiles(visible(example, mask), BLOCK)
    assert not torch.equal(expected, seen.expand(expected.shape)), "a test where everything is kept shows nothing"
    torch.testing.assert_close(out, attend_blocks(example, mask, expected), **F64)


@pytest.mark.parametrize(("mask", "queries", "keys"), CASES, ids=NAMES)
def test_xattention(mask: str, queries: int, keys: int) -> None:
    """Cells of stride x stride: the sum along the antidiagonal, softmax over a row's cells, sums over blocks."""
    example, stride = qkv(queries, keys), 4
    cells = tiles(visible(example, mask), stride)
    masses = {}
    for b, h, q, k, _ in every_head(example):
        sums = torch.zeros(cells.shape, dtype=torch.float64)
        for r, rows in enumerate(spans(queries, stride)):
            for c, columns in enumerate(spans(keys, stride)):
                pairs = [(stride * r + stride - 1 - j, stride * c + j) for j in range(stride)]
                sums[r, c] = sum(float(q[i] @ k[j]) for i, j in pairs if i in rows and j in columns)
        shares = (sums * SCALE / stride).masked_fill(~cells, -math.inf).softmax(-1)
        masses[b, h] = [[t.sum() for t in r.split(BLOCK // stride, 1)] for r in shares.split(BLOCK // stride)]
    expected = blocks_read(example, mask, lambda b, h, i, seen, kept: fewest(masses[b, h][i], seen, kept, share=0.6))
    check(XAttention(stride, 0.6), example, mask, expected)


@pytest.mark.parametrize("proxies", [1, 2])
@pytest.mark.parametrize(("mask", "queries", "keys"), CASES[:3], ids=NAMES[:3])
def test_proxyattn(mask: str, queries: int, keys: int, proxies: int) -> None:
    """Maxima of the pooled heads' softmax rank blocks; a head's budget is from its last block of queries."""
    q, k, v = qkv(queries, keys)
    q = q * torch.tensor([0.3, 1.0, 2.0, 4.0])[:, None, None]  # from dull heads to sharp ones
    example, stride = (q, k, v), 2
    pairs = visible(example, mask)
    groups = tiles(pairs, stride)
    ranks, budgets = {}, {}
    for b, h, own_q, own_k, _ in every_head(example):
        heads = [slice(n * (h * proxies // 4) // proxies, n * (h * proxies // 4 + 1) // proxies) for n in (4, 2)]
        mean_q, mean_k = (x[b, part].mean(0)[::stride] for x, part in zip((q, k), heads, strict=True))
        shares = (mean_q @ mean_k.T * SCALE).masked_fill(~groups, -math.inf).softmax(-1)
        ranks[b, h] = [[t.max() for t in r.split(BLOCK // stride, 1)] for r in shares.split(BLOCK // stride)]
        last = (own_q[-BLOCK:] @ own_k.T * SCALE).masked_fill(~pairs[-BLOCK:], -math.inf).softmax(-1)
        mass = sorted((float(t.sum()) for t in last.split(BLOCK, 1)), reverse=True)
        budgets[b, h] = next(n for n in range(1, len(mass) + 1) if sum(mass[:n]) >= 0.6 * sum(mass))
    assert mask == "" or len(set(budgets.values())) > 1, "heads differ in how many blocks they need"
    for least in (0, BLOCK + 1):

        def choose(
            b: int, h: int, i: int, seen: list[int], kept: set[int], floor: int = -(-least // BLOCK)
        ) -> set[int]:
            return best(ranks[b, h][i], seen, kept, count=max(budgets[b, h], floor) + 2)

        check(ProxyAttn(0.6, proxies, stride, least), example, mask, blocks_read(example, mask, choose))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("mask", "queries", "keys"), [CASES[0], CASES[1]], ids=NAMES[:2])
def test_pbs(mask: str, queries: int, keys: int, shared: bool) -> None:
    """Sorted keys are picked out one by one: for every block of queries, the tokens that the kept blocks hold."""
    example, segment = qkv(queries, keys), 32
    pairs, first = visible(example, mask), keys - queries
    given = torch.zeros(2, 4, keys, dtype=torch.float64)
    for b, h, q, k, _ in every_head(example):
        given[b, h] = (q[-BLOCK:] @ k.T * SCALE).masked_fill(~pairs[-BLOCK:], -math.inf).softmax(-1).sum(0)
    if shared:
        given = given.unflatten(1, (2, 2)).sum(2).repeat_interleave(2, 1)
    out = torch.zeros_like(example[0])
    density = []
    for b, h, q, k, v in every_head(example):
        order: list[int] = []
        for part in spans(keys, segment):
            whole = len(part) == segment
            order += sorted(part, key=lambda j: (j != 0, -float(given[b, h, j]))) if whole else list(part)
        places = [order[block[0] : block[-1] + 1] for block in spans(keys, BLOCK)]
        for rows in spans(queries, BLOCK):
            # A block is a candidate when its segment is seen; a last incomplete segment counts block by block.
            seen = [
                j for j, block in enumerate(places)
                if bool(pairs[rows[0] : rows[-1] + 1, _reach(block, segment, keys)].any())
            ]  # fmt: skip
            local = seen[-segment // BLOCK :]
            earlier = [j for j in seen if j not in local]
            raw = [float(q[rows[0] : rows[-1] + 1].mean(0) @ k[places[j]].mean(0)) * SCALE for j in earlier]
            shares = torch.zeros(len(places), dtype=torch.float64)
            shares[earlier] = torch.tensor(raw, dtype=torch.float64).softmax(0)
            kept = fewest(shares, seen, {seen[0], *local}, share=0.5)
            density.append(len(kept) / len(seen))
            tokens = sorted(t for j in kept for t in places[j])
            for row in rows:
                mine = [t for t in tokens if t <= row + first]
                out[b, h, row] = (k[mine] @ q[row] * SCALE).softmax(0) @ v[mine]
    assert min(density) < 1
    found, _ = run(PBS(segment, 0.5, shared), example, mask)
    torch.testing.assert_close(found, out, **F64)


def _reach(block: list[int], segment: int, keys: int) -> list[int]:
    """The keys among which those of the block may have stood before."""
    start = min(block) // segment * segment
    return list(range(start, start + segment)) if start + segment <= keys else block


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize(("mask", "queries", "keys"), CASES[:3], ids=NAMES[:3])
def test_dhsa(mask: str, queries: int, keys: int, per_head: bool) -> None:
    """Chunks between the largest changes of the keys; their scaled means score tokens, whose means score blocks."""
    example, size, window, apart = qkv(queries, keys), 9, 2, 4
    q, k, _ = example
    scores, lengths = {}, set()
    for b, h, own_q, own_k, _ in every_head(example):
        change = torch.full((keys,), -1.0, dtype=torch.float64)
        for t in range(window, keys - window + 1):
            left, right = k[b, :, t - window : t].sum(1).flatten(), k[b, :, t : t + window].sum(1).flatten()
            change[t] = 1 - torch.cosine_similarity(left, right, dim=0)
        peaks = [
            t for t in range(keys) if change[t] >= change[max(0, t - apart) : t + apart + 1].max() and change[t] > 0
        ]
        cuts = sorted(sorted(peaks, key=lambda t: -float(change[t]))[: -(-keys // size) - 1])
        chunks = [list(range(*ends)) for ends in zip([0, *cuts], [*cuts, keys], strict=True)]
        lengths.update(map(len, chunks))
        query, key = (own_q, own_k) if per_head else (q[b].mean(0), k[b].mean(0))
        means = torch.stack([rows.mean(0) for rows in blocks(query)])
        token = torch.cat([(means @ (key[c].mean(0) * len(c) ** 0.5))[:, None].expand(-1, len(c)) for c in chunks], 1)
        scores[b, h] = torch.stack([part.mean(1) for part in token.split(BLOCK, 1)], 1)
    assert len(lengths) > 3, "chunks of varying length"
    expected = blocks_read(example, mask, lambda b, h, i, seen, kept: best(scores[b, h][i], seen, kept, count=3))
    check(DHSA(3 * BLOCK, size, window, apart, per_head), example, mask, expected)


@pytest.mark.parametrize(("mask", "queries", "keys"), CASES, ids=NAMES)
def test_biformer(mask: str, queries: int, keys: int) -> None:
    """One choice for all heads: products of mean query and mean key over the heads side by side."""
    example = qkv(queries, keys)
    q, k = example[0], example[1].repeat_interleave(2, 1)
    scores = {}
    for b in range(2):
        rows, columns = (
            torch.stack([part.mean(1).flatten() for part in x[b].split(BLOCK, 1)]) for x in (q, k)
        )  # heads side by side
        scores[b] = rows @ columns.T
    expected = blocks_read(example, mask, lambda b, h, i, seen, kept: best(scores[b][i], seen, kept, count=3))
    check(BiFormer(3), example, mask, expected)


@pytest.mark.parametrize(("mask", "length"), [(CAUSAL, 107), ("", 96)], ids=["causal", "all"])
def test_longheads(mask: str, length: int) -> None:
    """A chunk is what its own attention's mean output finds among its keys; the last two chunks are always read."""
    example = qkv(length)
    scores = {}
    for b, h, q, k, v in every_head(example):
        found = []
        for part_q, part_k, part_v in zip(blocks(q), blocks(k), blocks(v), strict=True):
            mean = ((part_q @ part_k.T * SCALE).softmax(-1) @ part_v).mean(0)
            found.append((part_k @ mean * SCALE).softmax(0) @ part_k)
        scores[b, h] = torch.stack([rows.mean(0) for rows in blocks(q)]) @ torch.stack(found).T

    def choose(b: int, h: int, i: int, seen: list[int], kept: set[int]) -> set[int]:
        if not mask:
            kept |= {i - 1 if i else 1}  # the two nearest to the diagonal, left before right
        return best(scores[b, h][i], seen, kept, count=4)

    check(LongHeads(4), example, mask, blocks_read(example, mask, choose, local=2))
