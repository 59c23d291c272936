"""SigmoidAttention: the numbers of every mask form, dynamic shapes, sharing of counts, options."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from sigmoid_cases import (
    ATTENTION,
    COUNT,
    F64,
    MASKS,
    SHIFT32,
    graph_of,
    grid,
    minus_log,
    qkv,
    rewritten,
    sigmoid_formula,
)

from tilewright.passes import SigmoidAttention
from tilewright.passes.parse import parse_passes
from tilewright.runtime import errors


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("q_len", "k_len"), [(7, 7), (3, 9), (9, 5)])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_symbolic_masks(mask: str, q_len: int, k_len: int, key_heads: int) -> None:
    example = qkv(key_heads=key_heads, q_len=q_len, k_len=k_len)
    module = graph_of([{"q": "q", "k": "k", "v": "v", "mask": mask}], example)
    done = rewritten(module)
    assert [r.details["bias"] for r in done.rewrites] == ["-log_n"]
    visible = MASKS[mask](*grid(q_len, k_len), q_len, k_len)
    expected = sigmoid_formula(*example.values(), visible, 0.0, minus_log(visible, (2, 4, q_len, k_len)))
    torch.testing.assert_close(module(*example.values())[0], expected, **SHIFT32)
    hidden = ~visible.any(-1)
    assert bool((module(*example.values())[0][:, :, hidden] == 0).all()), "a row that sees nothing gives zeros"


def test_mask_over_batch_and_head() -> None:
    example = qkv()
    module = graph_of([{"q": "q", "k": "k", "v": "v", "mask": "k_idx <= q_idx + head + 2 * batch"}], example)
    rewritten(module)
    q, k = grid(7, 7)
    visible = k <= q + torch.arange(4)[None, :, None, None] + 2 * torch.arange(2)[:, None, None, None]
    expected = sigmoid_formula(*example.values(), visible, 0.0, minus_log(visible, (2, 4, 7, 7)))
    torch.testing.assert_close(module(*example.values())[0], expected, **SHIFT32)


def padding(dtype: torch.dtype, hidden: float | None) -> torch.Tensor:
    """(2, 1, 1, 7): the first sequence has 4 tokens, the second none. ``hidden``: the float put on padded keys."""
    visible = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [0] * 7], dtype=torch.bool)[:, None, None]
    if hidden is None:
        return visible
    return torch.where(visible, 0.0, torch.tensor(hidden, dtype=dtype)).to(dtype)


@pytest.mark.parametrize("mask", ["", "k_idx <= q_idx"])
@pytest.mark.parametrize(
    ("dtype", "hidden"),
    [
        (torch.bool, None),
        (torch.float64, -torch.inf),
        (torch.float64, torch.finfo(torch.float64).min),
        (torch.float32, torch.finfo(torch.float32).min),
        (torch.float32, -10000.0),
        (torch.bfloat16, -10000.0),
        (torch.float16, torch.finfo(torch.float16).min),
    ],
)
@pytest.mark.parametrize("whole", [False, True], ids=["(B,1,1,Lk)", "(B,1,Lq,Lk)"])
def test_padding(dtype: torch.dtype, hidden: float | None, whole: bool, mask: str) -> None:
    example = qkv()
    bias = padding(dtype, hidden)
    shown = padding(torch.bool, None)
    example["bias"] = bias.expand(2, 1, 7, 7) if whole else bias
    module = graph_of([{"q": "q", "k": "k", "v": "v", "bias": "bias", "mask": mask}], example)
    rewritten(module)
    visible = shown & MASKS[mask](*grid(7, 7), 7, 7)
    q, k, v = (example[name] for name in "qkv")
    expected = sigmoid_formula(q, k, v, visible, 0.0, minus_log(visible, (2, 4, 7, 7)))
    out = module(*example.values())[0]
    torch.testing.assert_close(out, expected, **SHIFT32)
    assert bool((out[1] == 0).all()), "a sequence without tokens gives exact zeros"


def test_real_bias_hides_nothing() -> None:
    """T5's and ALiBi's biases are added, and their keys count, however negative up to the threshold."""
    example = qkv()
    q, k = grid(7, 7)
    slopes = torch.tensor([0.5, 0.25, 0.125, 600.0], dtype=torch.float64)[:, None, None]
    example["bias"] = (-slopes * (q - k).abs())[None]
    module = graph_of([{"q": "q", "k": "k", "v": "v", "bias": "bias"}], example)
    rewritten(module)
    everything = torch.ones(7, 7, dtype=torch.bool)
    args = (example["q"], example["k"], example["v"], everything, example["bias"])
    torch.testing.assert_close(
        module(*example.values())[0], sigmoid_formula(*args, minus_log(everything, (2, 4, 7, 7))), **SHIFT32
    )


@pytest.mark.parametrize("shape", [(7,), (7, 7), (1, 7, 7), (2, 4, 7, 1), (1, 4, 1, 7)])
def test_bias_of_fewer_or_single_dims(shape: tuple[int, ...]) -> None:
    example = qkv()
    example["bias"] = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4
    module = graph_of([{"q": "q", "k": "k", "v": "v", "bias": "bias"}], example)
    rewritten(module)
    visible = example["bias"].expand(2, 4, 7, 7)
    q, k, v = (example[name] for name in "qkv")
    expected = sigmoid_formula(q, k, v, visible, 0.0, minus_log(visible, (2, 4, 7, 7)))
    torch.testing.assert_close(module(*example.values())[0], expected, **SHIFT32)


def test_fixed_number() -> None:
    example = qkv()
    module = graph_of([{"q": "q", "k": "k", "v": "v", "mask": "k_idx <= q_idx"}], example)
    rewritten(module, SigmoidAttention(bias=-1.5))
    visible = MASKS["k_idx <= q_idx"](*grid(7, 7), 7, 7)
    expected = sigmoid_formula(*example.values(), visible, 0.0, torch.full((1, 1, 1, 1), -1.5, dtype=torch.float64))
    torch.testing.assert_close(module(*example.values())[0], expected, **F64)
    assert not module.graph.find_nodes(op="call_function", target=COUNT)


@pytest.mark.parametrize("mask", ["", "k_idx <= q_idx", "(k_idx <= q_idx) & ((k_idx > q_idx - 3) | (k_idx < 2))"])
@pytest.mark.parametrize("padded", [False, True])
def test_dynamic_shapes(mask: str, padded: bool) -> None:
    """One graph for all sizes: nothing of the example's batch and lengths is baked in."""
    example = qkv(q_len=5, k_len=6)
    free: dict[str, Sequence[int]] = {"q": (0, 2), "k": (0, 2), "v": (0, 2)}
    call = {"q": "q", "k": "k", "v": "v", "mask": mask}
    if padded:
        example["bias"] = torch.ones(2, 1, 1, 6, dtype=torch.bool)
        free["bias"] = (0, 3)
        call["bias"] = "bias"
    module = graph_of([call], example, free)
    rewritten(module)
    for batch, q_len, k_len in ((1, 3, 11), (3, 8, 2), (2, 5, 6)):
        new = qkv(batch, q_len=q_len, k_len=k_len, seed=batch)
        visible = MASKS[mask](*grid(q_len, k_len), q_len, k_len)
        if padded:
            new["bias"] = (torch.arange(k_len) < k_len - 1).expand(batch, 1, 1, k_len)
            visible = visible & new["bias"]
        q, k, v = (new[name] for name in "qkv")
        expected = sigmoid_formula(q, k, v, visible, 0.0, minus_log(visible, (batch, 4, q_len, k_len)))
        torch.testing.assert_close(module(*new.values())[0], expected, **SHIFT32)


def test_causal_count_costs_no_score_matrix() -> None:
    """Causal and window masks are counted from limits, without a tensor of Lq x Lk."""
    q = torch.zeros(1, 1, 2**20, 1)
    count = torch.ops.tilewright.visible_keys(q, q, mask="(k_idx <= q_idx) & (k_idx > q_idx - 256)")
    assert count.shape == (1, 1, 2**20, 1)
    assert torch.equal(count.flatten(), torch.arange(1, 2**20 + 1).clamp_max(256))


@pytest.mark.parametrize("dynamic", [False, True])
def test_layers_share_one_count(dynamic: bool) -> None:
    example = {f"{name}{i}": t for i in range(3) for name, t in qkv(seed=i).items()}
    example["pad"] = padding(torch.bool, None)
    calls = [{n: f"{n}{i}" for n in "qkv"} | {"bias": "pad", "mask": "k_idx <= q_idx"} for i in range(3)]
    calls.append({n: f"{n}0" for n in "qkv"} | {"mask": "k_idx <= q_idx"})
    free = {"pad": (0, 3)} | {f"{n}{i}": (0, 2) for n in "qkv" for i in range(3)} if dynamic else None
    module = graph_of(calls, example, free)
    rewritten(module)
    counts = module.graph.find_nodes(op="call_function", target=COUNT)
    logs = module.graph.find_nodes(op="call_function", target=torch.ops.aten.log.default)
    assert len(counts) == len(logs) == 2
    q, k = grid(7, 7)
    visible = padding(torch.bool, None) & (k <= q)
    out = module(*example.values())
    for i in range(3):
        args = (example[f"q{i}"], example[f"k{i}"], example[f"v{i}"])
        torch.testing.assert_close(
            out[i], sigmoid_formula(*args, visible, 0.0, minus_log(visible, (2, 4, 7, 7))), **SHIFT32
        )


def test_count_is_not_shared_across_a_write() -> None:
    """A mask tensor that is written to between two layers is counted anew."""
    example = qkv()
    example["pad"] = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    module = graph_of([{"q": "q", "k": "k", "v": "v", "bias": "pad"}] * 2, example)
    second = module.graph.find_nodes(op="call_function", target=ATTENTION)[1]
    pad = module.graph.find_nodes(op="placeholder")[3]
    with module.graph.inserting_before(second):
        written = module.graph.call_function(torch.ops.aten.fill_.Scalar, (pad, False))
        written.meta["val"] = pad.meta["val"]
    module.recompile()
    rewritten(module)
    assert len(module.graph.find_nodes(op="call_function", target=COUNT)) == 2


def test_meta_and_arguments_are_kept() -> None:
    example = qkv()
    module = graph_of([{"q": "q", "k": "k", "v": "v", "mask": "k_idx <= q_idx"}], example)
    (node,) = module.graph.find_nodes(op="call_function", target=ATTENTION)
    node.meta["stack_trace"] = 'File "model.py", line 3, in forward'
    site = node.meta["tilewright_site"]
    rewritten(module)
    (after,) = module.graph.find_nodes(op="call_function", target=ATTENTION)
    assert after.meta["tilewright_site"] == site and after.meta["stack_trace"] == node.meta["stack_trace"]
    assert after.kwargs["normalizer"] == "sigmoid" and after.kwargs["mask"] == "k_idx <= q_idx"
    assert after.kwargs["scale"] == 0.5 and after.meta["val"].dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"normalizer": "sigmoid"}, "sigmoid already"),
        ({"q_len": 0}, "no elements"),
    ],
)
def test_declines(change: dict[str, Any], reason: str) -> None:
    sizes = {key: value for key, value in change.items() if key.endswith("len")}
    call = {"q": "q", "k": "k", "v": "v"} | {key: value for key, value in change.items() if key == "normalizer"}
    module = graph_of([call], qkv(**sizes))
    text = module.code
    done = rewritten(module)
    assert not done.rewrites and reason in done.declined[0][1]
    assert module.code == text


def test_gradients_flow() -> None:
    """Through the weights, not through the count; compared with autograd through the formula."""
    example = qkv()
    q, k = grid(7, 7)
    visible = k <= q
    module = graph_of([{"q": "q", "k": "k", "v": "v", "mask": "k_idx <= q_idx"}], example)
    rewritten(module)
    ours = [t.clone().requires_grad_() for t in example.values()]
    module(*ours)[0].square().sum().backward()
    theirs = [t.clone().requires_grad_() for t in example.values()]
    sigmoid_formula(*theirs, visible, 0.0, minus_log(visible, (2, 4, 7, 7))).square().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad is not None and b.grad is not None and float(b.grad.norm()) > 0.1
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("bias", ["log_n", math.inf, math.nan, True, None, [1.0]])
def test_bad_bias(bias: Any) -> None:
    with pytest.raises(errors.BadPassOption, match="bias is"):
        SigmoidAttention(bias=bias)


def test_follow_queries_needs_calibration() -> None:
    with pytest.raises(errors.BadPassOption, match="bias='calibrated'"):
        SigmoidAttention(follow_queries=True)


def test_command_line_text() -> None:
    def one(text: str) -> Any:
        return parse_passes(text)[0]

    assert one("sigmoid-attention") == SigmoidAttention()
    assert one("sigmoid-attention{bias=calibrated}") == SigmoidAttention(bias="calibrated")
    assert one("sigmoid-attention{bias=-log_n}") == SigmoidAttention(bias="-log_n")
    assert one("sigmoid-attention{bias=-1.5}") == SigmoidAttention(bias=-1.5)
    assert one("sigmoid-attention{bias=calibrated,follow-queries}") == SigmoidAttention("calibrated", True)
    with pytest.raises(errors.BadPassOption):
        one("sigmoid-attention{bias=inf}")
    with pytest.raises(errors.BadPassOption):
        one("sigmoid-attention{bias=logn}")


def test_count_is_a_sound_operator() -> None:
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 6, 8)
    bias = torch.rand(2, 1, 1, 6) > 0.5
    torch.library.opcheck(COUNT, (q, k), {"mask": "k_idx <= q_idx"})
    torch.library.opcheck(COUNT, (q, k, bias), {"mask": "k_idx <= q_idx"})
