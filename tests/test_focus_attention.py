"""Focus: groups, attention inside them, and the gates they are trained with, against slow dense masks in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tilewright as tw
from tilewright.passes.focus_attention import FocusAttention
from tilewright.runtime import errors
from tilewright.runtime.ops import OPS, group_attention
from tilewright.runtime.ops.gated_attention import gated_attention

KEPT = torch.ops.tilewright.kept_groups.default
CAUSAL = "k_idx <= q_idx"


class Attend(nn.Module):
    """Self-attention of 4 query and 2 key heads over (B, L, 24), causal or with a padding mask."""

    def __init__(self, causal: bool = True, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.causal = causal
        self.q, self.k, self.v = (nn.Linear(24, width, dtype=dtype) for width in (64, 32, 32))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (f(x).unflatten(-1, (-1, 16)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return 2 * q, k, v

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        mask = None if keep is None else keep[:, None, None, :]
        return nn.functional.scaled_dot_product_attention(
            *self.heads(x), attn_mask=mask, is_causal=self.causal, enable_gqa=True
        )


def compiled_of(model: nn.Module, x: Tensor, *rest: Tensor, target: str = "reference", **options: Any) -> Any:
    focus = FocusAttention(**{"window": 3, "sinks": 0, "block_size": 16, **options})
    return tw.compile(
        model, passes=[focus], example_inputs=(x, *rest), target=target, rest="eager", strict=True, validate=False
    )


def run_and_members(compiled: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The compiled output, and which groups each token keeps (B, L, K)."""
    found = []

    class Watch(torch.fx.Interpreter):
        def run_node(self, node: torch.fx.Node) -> Any:
            value = super().run_node(node)
            if node.target is KEPT:
                found.append(value)
            return value

    program = compiled.exported_program()
    (out,) = Watch(program.record.lowered).run(*program.flatten(inputs, {}))
    return out, found[0]


def visible_pairs(members: Tensor, window: int, causal: bool, keep: Tensor | None = None, sinks: int = 0) -> Tensor:
    place = torch.arange(members.shape[1])
    distance = place[:, None] - place
    shared = (members[:, :, None] & members[:, None, :]).any(-1)
    visible = (distance.abs() <= window) | shared | (place < sinks)
    if causal:
        visible = visible & (distance >= 0)
    return visible if keep is None else visible & keep[:, None, :]


def dense(model: Attend, x: Tensor, visible: Tensor) -> Tensor:
    q, k, v = model.heads(x)
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    scores = (q @ k.transpose(-1, -2) / 4).masked_fill(~visible[:, None], -math.inf)
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v


def inputs(length: int, batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, length, 24, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(
    ("groups", "keep", "causal"), [(4, 2, True), pytest.param(5, 1, False, marks=pytest.mark.grid)]
)
def test_equals_softmax_over_window_and_groups(groups: int, keep: int, causal: bool) -> None:
    """Exactly the pairs {window, sink or common kept group}, at captured and other lengths, with padding or without."""
    model = Attend(causal)
    padding = [] if causal else [torch.arange(50).expand(2, 50) < torch.tensor([[50], [37]])]
    compiled = compiled_of(model, inputs(50), *padding, groups=groups, keep=keep, sinks=2)
    for length in (50, 71):
        x = inputs(length, seed=length)
        pad = [] if causal else [torch.arange(length).expand(2, length) < torch.tensor([[length], [length // 2]])]
        out, members = run_and_members(compiled, x, *pad)
        assert members.sum(-1).eq(keep).all() and members.any(1).all(), "every group is used"
        visible = visible_pairs(members, 3, causal, *pad, sinks=2)
        assert 0.1 < visible.double().mean() < 0.95
        torch.testing.assert_close(out, dense(model, x, visible), rtol=1e-10, atol=1e-12)


def test_masks_of_its_own_stay() -> None:
    """A model's sliding window still hides what lies further back, in a common group or not."""

    class Windowed(Attend):
        def forward(self, x: Tensor) -> Tensor:
            place = torch.arange(x.shape[1], device=x.device)
            mask = (place[:, None] >= place) & (place[:, None] - place < 20)
            return nn.functional.scaled_dot_product_attention(*self.heads(x), attn_mask=mask, enable_gqa=True)

    model, x = Windowed(), inputs(60)
    compiled = compiled_of(model, x)
    out, members = run_and_members(compiled, x)
    place = torch.arange(60)
    visible = visible_pairs(members, 3, True) & (place[:, None] - place < 20)
    torch.testing.assert_close(out, dense(model, x, visible), rtol=1e-10, atol=1e-12)


@pytest.mark.grid
def test_native_kernels() -> None:
    """The block-sparse and the window kernel, joined, agree with their references; whole blocks are left out."""
    model, x = Attend(dtype=torch.float32), inputs(300, dtype=torch.float32)
    options = {"groups": 4, "keep": 1, "window": 20}
    native, plain = (compiled_of(model, x, target=target, **options) for target in ("cpp", "reference"))
    assert sorted({use.op for use in native.kernels}) >= ["attention_lse", "block_attention_lse"]
    tolerance = OPS["attention"].tolerance[torch.float32]
    torch.testing.assert_close(native(x), plain(x), rtol=2 * tolerance.rtol, atol=2 * tolerance.atol)


@pytest.mark.parametrize("mask", [CAUSAL, ""])
def test_states_against_all_pairs(mask: str) -> None:
    """Empty exactly where no pair is visible; full only where all are, and sometimes."""
    seen = set()
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        length, groups, keep, window, sinks = 70 + seed, 4, 1 + seed % 2, (0, 5, 20)[seed % 3], (0, 0, 3)[seed % 3]
        scores = torch.randn(2, length, groups, generator=generator) * 3
        scores += torch.arange(length)[:, None] * torch.randn(groups, generator=generator) / 20
        members = group_attention.kept_groups(scores, keep=keep)
        order, inverse, table = group_attention.group_order(members, keep=keep)
        assert torch.equal(order.gather(1, inverse), torch.arange(length).expand(2, length))
        sizes = {"window": window, "block_q": 16, "block_k": 16, "sinks": sinks}
        states = group_attention.group_states(members, order, mask=mask, **sizes)
        near = visible_pairs(torch.zeros_like(members), window, False, sinks=sinks)
        far = visible_pairs(members, window, mask == CAUSAL) & ~near
        far = torch.stack([pairs[o][:, o] for pairs, o in zip(far, order, strict=True)])
        blocks = -(-length // 16)
        for b in range(2):
            for i in range(blocks):
                for j in range(blocks):
                    tile = far[b, 16 * i : 16 * i + 16, 16 * j : 16 * j + 16]
                    state = int(states[b, 0, i, j])
                    assert (state > 0) == bool(tile.any())
                    assert state < 2 or bool(tile.all())
                    seen.add(state)
        assert table.dtype == torch.int32 and len(table) == math.comb(groups, keep) ** 2 + 4 * length
    assert seen == {0, 1, 2}


def test_sinkhorn_balances() -> None:
    """Tokens sum to one, groups weigh the same, and the offsets say how far that is from a softmax."""
    scores = torch.randn(3, 64, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores[..., 0] += 2.0  # a group that would take most of the tokens
    log_g, offsets = group_attention.sinkhorn(scores, temperature=0.5, iterations=60)
    g = log_g.exp()
    torch.testing.assert_close(g.sum(-1), torch.ones(3, 64, dtype=torch.float64))
    torch.testing.assert_close(g.mean(1), torch.full((3, 8), 1 / 8, dtype=torch.float64), rtol=1e-3, atol=0)
    torch.testing.assert_close(torch.softmax(scores / 0.5 + offsets[:, None], -1), g)
    assert torch.softmax(scores / 0.5, -1).mean(1)[:, 0].min() > 0.3


def gate_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 24, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    log_g = torch.log_softmax(3 * torch.randn(2, 24, 4, generator=generator, dtype=torch.float64), -1)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), log_g.requires_grad_()


GATE = {"scale": 0.4, "mask": CAUSAL, "window": 2, "keep": 2, "steepness": 4.0}


def test_score_gate_is_equation_two() -> None:
    q, k, v, log_g = gate_inputs()
    out = gated_attention(q, k, v, log_g, gate="score", **GATE)
    g = log_g.exp()
    place = torch.arange(24)
    near = (place[:, None] - place).abs() <= 2
    factor = torch.where(near, 1.0, torch.sigmoid(4.0 * (g @ g.transpose(-1, -2))))[:, None]
    keys, values = (t.repeat_interleave(2, 1) for t in (k, v))
    scores = (q @ keys.transpose(-1, -2)) * 0.4 * factor
    plain = torch.softmax(scores.masked_fill(place[:, None] < place, -math.inf), -1) @ values
    torch.testing.assert_close(out, plain)
    ours, theirs = (torch.autograd.grad(o.square().sum(), (q, k, v, log_g)) for o in (out, plain))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_weight_gate_runs_what_inference_runs() -> None:
    """Forward the hard choice; backward exact for q, k, v, and what a token would gain by joining or leaving."""
    q, k, v, log_g = gate_inputs()
    out = gated_attention(q, k, v, log_g, gate="weight", **GATE)
    members = group_attention.kept_groups(log_g, keep=2)
    visible = visible_pairs(members, 2, True)
    keys, values = (t.repeat_interleave(2, 1) for t in (k, v))
    scores = q @ keys.transpose(-1, -2) * 0.4
    plain = torch.softmax(scores.masked_fill(~visible[:, None], -math.inf), -1) @ values
    torch.testing.assert_close(out, plain)
    target = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss = (out - target).square().sum()
    ours = torch.autograd.grad(loss, (q, k, v, log_g))
    theirs = torch.autograd.grad((plain - target).square().sum(), (q, k, v))
    for a, b in zip(ours, theirs, strict=False):
        torch.testing.assert_close(a, b)
    assert float(ours[3].abs().max()) > 1e-3


@pytest.mark.parametrize("gate", ["score", "weight"])
def test_gates_find_planted_groups(gate: str) -> None:
    """Trained towards what attention inside other groups gives, the hard choice gets much nearer to it."""
    q, k, v, start = gate_inputs()
    planted = 3 * torch.randn(2, 24, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)

    def attention(logits: Tensor, kind: str) -> Tensor:
        return gated_attention(q.detach(), k.detach(), v.detach(), torch.log_softmax(logits, -1), gate=kind, **GATE)

    target = attention(planted, "weight")
    logits = start.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.3)

    def distance(kind: str) -> Tensor:
        return (attention(logits, kind) - target).square().mean()

    before = float(distance("weight").detach())
    for _ in range(60):
        optimizer.zero_grad()
        distance(gate).backward()
        optimizer.step()
    assert float(distance("weight").detach()) < 0.7 * before


def test_running_balance_does_not_look_ahead() -> None:
    """Later tokens change nothing earlier; Sinkhorn over the sequence does, which is why it is said."""
    model, x = Attend(), inputs(60)
    other = x.clone()
    other[:, 40:] = inputs(20, seed=9)
    for balance, same in (("running", True), ("sequence", False)):
        compiled = compiled_of(model, x, balance=balance, temperature=0.3)
        assert torch.allclose(compiled(x)[:, :, :40], compiled(other)[:, :, :40], atol=1e-12) == same


def test_declines() -> None:
    class Cross(Attend):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            (q, _, _), (_, k, v) = self.heads(x), self.heads(y)
            return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    class Alibi(Attend):
        def forward(self, x: Tensor, bias: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(*self.heads(x), attn_mask=bias, enable_gqa=True)

    bias = torch.randn(2, 4, 20, 20, dtype=torch.float64)
    for model, given, reason in (
        (Cross(), (inputs(20), inputs(30)), "cross-attention"),
        (Alibi(), (inputs(20), bias), "between queries"),
    ):
        compiled = tw.compile(model, passes=[FocusAttention(window=2)], example_inputs=given, rest="eager")
        (declined,) = compiled.report.passes[0].declined
        assert reason in declined.reason


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"groups": 0}, "at least 1"),
        ({"groups": 2, "keep": 3}, "more than the 2 groups"),
        ({"groups": 40, "keep": 20}, "different sets"),
        ({"temperature": 0.0}, "positive"),
        ({"gate": "hard"}, "score, weight"),
        ({"balance": "none"}, "sequence, running"),
        ({"block_size": 48}, "16, 32"),
        ({"window": -1}, "at least 0"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(errors.BadPassOption, match=words):
        FocusAttention(**options)


def test_save_and_load(tmp_path: Path) -> None:
    x = inputs(40)
    compiled = compiled_of(Attend(), x)
    tw.save(compiled, tmp_path / "focus.tw")
    loaded = tw.load(tmp_path / "focus.tw")
    for length in (40, 77):
        torch.testing.assert_close(loaded(inputs(length)), compiled(inputs(length)))
