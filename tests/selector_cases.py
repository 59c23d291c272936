"""Helpers of the selector tests: put a selector at an attention, and the papers' rules, slowly and plainly."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx
from sigmoid_cases import graph_of

from tilewright.passes.base import Decline, Exactness, Pass, Rewrite, SiteContext
from tilewright.passes.manager import run_pass
from tilewright.passes.selectors import Selector, SelectorInputs
from tilewright.passes.view import arguments
from tilewright.runtime.ops import HELPERS, OPS
from tilewright.runtime.ops.attention import visible_pairs
from tilewright.runtime.ops.block_lists import list_states

SCALE = 0.5  # graph_of's
CAUSAL, CACHED = "k_idx <= q_idx", "k_idx <= q_idx + k_len - q_len"
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def qkv(
    queries: int, keys: int | None = None, batch: int = 2, heads: tuple[int, int] = (4, 2), seed: int = 0
) -> Tensors:
    """float64 q (batch, heads[0], queries, 8), and k, v (batch, heads[1], keys, 8)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads[0], queries), (heads[1], keys or queries), (heads[1], keys or queries))
    q, k, v = (torch.randn(batch, *shape, 8, generator=generator, dtype=torch.float64) for shape in shapes)
    return q, k, v


@dataclass(frozen=True)
class Select(Pass):
    """Puts ``selectors[i]`` at site i."""

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    ops: ClassVar[tuple[str, ...]] = ("attention",)

    selectors: tuple[Selector, ...] = ()
    block: int = 16

    def rewrite(self, site: SiteContext) -> Rewrite | Decline:
        name = site.site.id
        chosen = self.selectors[int(name.split(".")[1].split("/")[0])]
        if why := chosen.why_not(site, self.block):
            return Decline(why)

        def build(builder: Any) -> torch.fx.Node:
            named, sizes = arguments(site.node), {"block_q": self.block, "block_k": self.block}
            q, k, v = named["q"], named["k"], named["v"]
            states = builder.call(HELPERS["block_states"], q, k, None, mask=named["mask"], **sizes)
            inputs = SelectorInputs(q, k, v, states, named["mask"], None, named["scale"], self.block, self.block)
            found = chosen.build(builder, inputs)
            out = builder.call(
                OPS["block_attention"].overload,
                q=found.q, k=found.k, v=found.v, counts=found.counts, indices=found.indices, table=found.table,
                scale=named["scale"], mask=found.mask, **sizes,
            )  # fmt: skip
            return found.finish(builder, out)

        return Rewrite(build)


def sites(
    selectors: Sequence[Selector], example: Tensors, mask: str, block: int = 16, *, dynamic: bool = False
) -> tuple[torch.fx.GraphModule, list[str]]:
    """A graph with one attention for each selector, which gives (out, counts, indices) of each; reasons of decline."""
    named = dict(zip("qkv", example, strict=True))
    calls = [{"q": "q", "k": "k", "v": "v", "mask": mask} for _ in selectors]
    module = graph_of(calls, named, dict.fromkeys("qkv", (2,)) if dynamic else None)
    done = run_pass(module, Select(tuple(selectors), block), copy.deepcopy)
    found = module.graph.find_nodes(op="call_function", target=OPS["block_attention"].overload)
    outputs = tuple((node, arguments(node)["counts"], arguments(node)["indices"]) for node in found)
    module.graph.output_node().args = (outputs,)
    module.recompile()
    return module, [reason for _, reason in done.declined]


def run(selector: Selector, example: Tensors, mask: str = CAUSAL, block: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and which blocks were read, bool (B, H, NQ, NK)."""
    module, declined = sites([selector], example, mask, block)
    assert not declined, declined
    ((out, counts, indices),) = module(*example)
    return out, list_states(counts, indices, -(-example[1].shape[2] // block)) > 0


def dense(example: Tensors, mask: str) -> torch.Tensor:
    return OPS["attention"].reference(*example, scale=SCALE, mask=mask)


# ------------------------------------------------------------------------------------------------------------ the rules


def blocks(x: torch.Tensor, size: int = 16) -> list[torch.Tensor]:
    """The rows of x, block by block."""
    return list(x.split(size))


def visible(example: Tensors, mask: str) -> torch.Tensor:
    """Bool (Lq, Lk)."""
    pairs = visible_pairs(example[0], example[1], mask)
    shape = (example[0].shape[2], example[1].shape[2])
    return torch.ones(shape, dtype=torch.bool) if pairs is None else pairs.reshape(shape)


def spans(length: int, size: int) -> list[range]:
    return [range(start, min(start + size, length)) for start in range(0, length, size)]


def tiles(pairs: torch.Tensor, block: int) -> torch.Tensor:
    """Which tiles have a visible pair: bool (NQ, NK)."""
    rows, columns = spans(pairs.shape[0], block), spans(pairs.shape[1], block)
    return torch.tensor([[bool(pairs[r[0] : r[-1] + 1, c[0] : c[-1] + 1].any()) for c in columns] for r in rows])


def every_head(example: Tensors) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(batch, head, q, k, v) with the key head that the head reads."""
    q, k, v = example
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            yield b, h, q[b, h], k[b, h // group], v[b, h // group]


def best(scores: torch.Tensor, candidates: list[int], kept: set[int], *, count: int) -> set[int]:
    """What is always kept, then the best scores, ``count`` in all."""
    rest = sorted((j for j in candidates if j not in kept), key=lambda j: -float(scores[j]))
    return {*kept, *rest[: max(0, count - len(kept))]}


def fewest(scores: torch.Tensor, candidates: list[int], kept: set[int], *, share: float) -> set[int]:
    """What is always kept, then the best scores until they hold the share of the candidates' sum."""
    found = set(kept)
    rest = sorted((j for j in candidates if j not in kept), key=lambda j: -float(scores[j]))
    total = sum(float(scores[j]) for j in candidates)
    while rest and sum(float(scores[j]) for j in found) < share * total:
        found.add(rest.pop(0))
    return found


def blocks_read(
    example: Tensors,
    mask: str,
    choose: Callable[[int, int, int, list[int], set[int]], set[int]],
    *,
    local: int = 1,
    block: int = 16,
) -> torch.Tensor:
    """Bool (B, H, NQ, NK) from ``choose(batch, head, row, candidates, always kept)``.

    Always kept are the first candidate and the ``local`` last ones; without a mask, the one on the diagonal.
    """
    seen = tiles(visible(example, mask), block)
    out = torch.zeros(*example[0].shape[:2], *seen.shape, dtype=torch.bool)
    for b, h, *_ in every_head(example):
        for row in range(len(seen)):
            candidates = [j for j in range(seen.shape[1]) if seen[row, j]]
            kept = {*candidates[:1], *(candidates[-local:] if mask else [row])}
            out[b, h, row, sorted(choose(b, h, row, candidates, kept))] = True
    return out


def attend_blocks(example: Tensors, mask: str, read: torch.Tensor, block: int = 16) -> torch.Tensor:
    """Softmax attention over the visible pairs of the blocks that are read."""
    pairs = visible(example, mask)
    out = torch.zeros(*example[0].shape[:3], example[2].shape[3], dtype=torch.float64)
    for b, h, q, k, v in every_head(example):
        listed = read[b, h].repeat_interleave(block, 0).repeat_interleave(block, 1)[: pairs.shape[0], : pairs.shape[1]]
        scores = (q @ k.T * SCALE).masked_fill(~(pairs & listed), -math.inf)
        out[b, h] = scores.softmax(-1).nan_to_num() @ v
    return out
