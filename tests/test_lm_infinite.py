"""LMInfinite against a rotation of every pair on its own, in float64; where it declines; real layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from raise_cases import export, nodes, trace

from tilewright.frontend.raising import raise_graph
from tilewright.passes import LMInfinite
from tilewright.passes.manager import PassRun, run_pass
from tilewright.passes.parse import parse_passes
from tilewright.runtime import errors

rope, attention = torch.ops.tilewright.rope, torch.ops.tilewright.attention
# Both sides are float64: a few hundred operations of rounding 2^-53 on values of order one.
F64 = {"rtol": 1e-11, "atol": 1e-11}
SCALE = 0.4


def frequencies(dim: int) -> torch.Tensor:
    return 1.0 / 100.0 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def angles(positions: torch.Tensor, dim: int, layout: str = "rotate_half") -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, (1, 1, L, dim)."""
    each = positions.to(torch.float64)[:, None] * frequencies(dim)
    both = torch.cat((each, each), -1) if layout == "rotate_half" else each.repeat_interleave(2, -1)
    return both.cos()[None, None], both.sin()[None, None]


def lambda_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, sinks: int, limit: int, layout: str = "rotate_half"
) -> torch.Tensor:
    """Section 4 of the paper, each pair rotated on its own: the key stays, the query is turned by the distance."""
    length = q.shape[2]
    p, j = torch.arange(length)[:, None], torch.arange(length)[None]
    cos, sin = (
        x.unflatten(2, (length, length)) for x in angles((p - j).clamp(max=limit).flatten(), q.shape[3], layout)
    )
    turned = rope(q.unsqueeze(3).expand(-1, -1, -1, length, -1), cos, sin, layout=layout)
    keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (turned * keys.unsqueeze(2)).sum(-1) * SCALE
    seen = (j <= p) & ((p - j < window) | (j < sinks))
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values


def sample(length: int, batch: int = 2, dim: int = 8, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, 4, length, dim), (batch, 2, length, dim), (batch, 2, length, 6))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def layer(layout: str = "rotate_half", mask: str = "k_idx <= q_idx") -> Any:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        turned = (rope(x, cos, sin, layout=layout) for x in (q, k))
        return attention(*turned, v, scale=SCALE, mask=mask)

    return call


def rewritten(module: torch.fx.GraphModule, one: LMInfinite) -> PassRun:
    return run_pass(module, one, copy.deepcopy)


def test_every_length() -> None:
    """Grouped heads, batch 2, lengths other than the captured one: shorter than the sinks and the limit, and longer."""
    q, k, v = sample(23)
    module = trace(layer(), q, k, v, *angles(torch.arange(23), 8), symbolic=True)
    done = rewritten(module, LMInfinite(8, 3, 12))
    assert done.rewrites[0].details["form"] == "two attentions, merged"
    for length in (2, 9, 23, 31):
        q, k, v = sample(length, seed=length)
        # Where counting starts makes no difference to distances.
        found = module(q, k, v, *angles(7 + torch.arange(length), 8))
        torch.testing.assert_close(found, lambda_attention(q, k, v, 8, 3, 12), **F64)


@pytest.mark.parametrize(
    ("window", "sinks", "limit"),
    [(8, 3, None), (12, 3, 5), (1, 1, 1), (19, 4, 15)],
    ids=["window=limit", "window>limit", "one key", "nearly all"],
)
def test_every_pair(window: int, sinks: int, limit: int | None) -> None:
    q, k, v = sample(23)
    given = (q, k, v, *angles(torch.arange(23), 8))
    module = trace(layer(), *given)
    assert rewritten(module, LMInfinite(window, sinks, limit)).rewrites
    torch.testing.assert_close(module(*given), lambda_attention(q, k, v, window, sinks, limit or window), **F64)
    far = nodes(module, "attention_lse")[1].args[1].meta["val"]
    assert far.shape[2] == (23 if limit and window > limit else sinks), "keys beyond the limit are the sinks alone"


def test_interleaved_pairs_and_a_bias() -> None:
    """GPT-J's layout; a padding mask that hides the first keys of one sequence, sinks among them."""
    q, k, v = sample(20)
    bias = torch.ones(2, 1, 1, 20, dtype=torch.bool)
    bias[1, ..., :2] = False

    def call(q: Any, k: Any, v: Any, cos: Any, sin: Any, bias: Any) -> Any:
        turned = (rope(x, cos, sin, layout="interleaved") for x in (q, k))
        return attention(*turned, v, bias, scale=SCALE, mask="k_idx <= q_idx")

    given = (q, k, v, *angles(torch.arange(20), 8, "interleaved"), bias)
    module = trace(call, *given)
    assert rewritten(module, LMInfinite(6, 3)).rewrites
    found = module(*given)
    expected = lambda_attention(q, k, v, 6, 3, 6, "interleaved")
    torch.testing.assert_close(found[0], expected[0], **F64)
    # Without its first two keys a sequence is one with a single sink, two positions later.
    later = lambda_attention(q[1:, :, 2:], k[1:, :, 2:], v[1:, :, 2:], 6, 1, 6, "interleaved")
    torch.testing.assert_close(found[1:, :, 2:], later, **F64)


def test_rotated_before_the_transpose() -> None:
    """Heads behind the sequence where the rotation happens, and a cast behind it."""
    q, k, v = sample(20)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        turned = (rope(x.transpose(1, 2), cos, sin).transpose(1, 2) for x in (q, k))
        return attention(
            *(x.to(torch.float32) for x in turned), v.to(torch.float32), scale=SCALE, mask="k_idx <= q_idx"
        )

    cos, sin = (x.transpose(1, 2) for x in angles(torch.arange(20), 8))
    module = trace(call, q, k, v, cos, sin)
    assert rewritten(module, LMInfinite(5, 2)).rewrites
    # The scores are those of float32: 8 products of rounding 2^-24 and values of order one.
    close = {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(module(q, k, v, cos, sin).double(), lambda_attention(q, k, v, 5, 2, 5), **close)


def test_a_short_static_length_needs_one_attention() -> None:
    q, k, v = sample(9)
    module = trace(layer(), q, k, v, *angles(torch.arange(9), 8))
    assert rewritten(module, LMInfinite(4, 2, 8)).rewrites[0].details["form"].startswith("one attention")
    assert len(nodes(module, "attention")) == 1 and not nodes(module, "attention_lse")
    torch.testing.assert_close(module(q, k, v, *angles(torch.arange(9), 8)), lambda_attention(q, k, v, 4, 2, 8), **F64)


def declined(function: Any, *inputs: torch.Tensor) -> str:
    done = rewritten(trace(function, *inputs), LMInfinite(4, 2))
    assert not done.rewrites
    return done.declined[0][1]


def test_where_it_declines() -> None:
    q, k, v = sample(12)
    given = (q, k, v, *angles(torch.arange(12), 8))
    causal = {"scale": SCALE, "mask": "k_idx <= q_idx"}

    def plain(q: Any, k: Any, v: Any, cos: Any, sin: Any) -> Any:
        return attention(q, k, v, **causal)

    def sigmoid(q: Any, k: Any, v: Any, cos: Any, sin: Any) -> Any:
        return attention(rope(q, cos, sin), rope(k, cos, sin), v, **causal, normalizer="sigmoid")

    def cached(q: Any, k: Any, v: Any, cos: Any, sin: Any) -> Any:
        keys, values = torch.cat((k, rope(k, cos, sin)), 2), torch.cat((v, v), 2)
        return attention(rope(q, cos, sin), keys, values, scale=SCALE, mask="k_idx <= q_idx + k_len - q_len")

    def other(q: Any, k: Any, v: Any, cos: Any, sin: Any) -> Any:
        return attention(rope(q, cos, sin), rope(k, cos + 0, sin), v, **causal)

    assert "no rotary embedding" in declined(plain, *given)
    assert "sigmoid" in declined(sigmoid, *given)
    assert "cache" in declined(cached, *given)
    assert "different angles" in declined(other, *given)
    assert "not causal" in declined(layer(mask=""), *given)
    batched = [x.expand(2, -1, -1, -1).contiguous() for x in given[3:]]
    assert "differ between sequences" in declined(layer(), *given[:3], *batched)


@pytest.mark.parametrize("options", [{"window": 0}, {"sinks": True}, {"limit": -1}, {"window": 4, "sinks": 5}])
def test_bad_options(options: dict[str, int]) -> None:
    with pytest.raises(errors.BadPassOption, match="lm-infinite"):
        LMInfinite(**options)


def test_a_real_model() -> None:
    """Llama: nothing changes while everything is within the window, and later logits change when it is not."""
    ids = tiny.tokens(2, 24)
    module = export(tiny.llama(layers=1), ids, use_cache=False)
    raise_graph(module)
    before = module(ids, use_cache=False).logits
    wide, narrow = copy.deepcopy(module), module
    assert rewritten(wide, LMInfinite(64, 4)).rewrites[0].details["positions"] == "counted by the model"
    torch.testing.assert_close(wide(ids, use_cache=False).logits, before, rtol=1e-4, atol=1e-4)
    (one,) = parse_passes("lm-infinite{window=6,sinks=2}")
    assert rewritten(narrow, one).rewrites
    after = narrow(ids, use_cache=False).logits
    torch.testing.assert_close(after[:, :6], before[:, :6], rtol=1e-4, atol=1e-4)
    assert (after[:, -1] - before[:, -1]).abs().max() > 1e-2
