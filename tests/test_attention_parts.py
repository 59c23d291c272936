"""An attention taken apart around its softmax is the same attention, and TwoPassSoftmax(force=True) reaches it."""

from __future__ import annotations

import functools
import math

import pytest
import torch

import tilewright as tw
from tilewright.passes import TwoPassSoftmax
from tilewright.runtime.ops import OPS, attention, attention_parts

INF = math.inf


def inputs(dtype: torch.dtype, heads: int = 4, q_len: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, q_len, 16), (2, 2, 7, 16), (2, 2, 7, 24)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def parts(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, mask: str) -> torch.Tensor:
    scores = torch.ops.tilewright.attention_scores(q, k, bias, scale=0.25, mask=mask)
    return torch.ops.tilewright.attention_values(scores.softmax(-1), v, scores)


def biases() -> dict[str, torch.Tensor | None]:
    additive = torch.zeros(2, 1, 5, 7)
    additive[0, :, 2] = -INF  # a query that sees nothing
    additive[1, :, :, 3:] = -INF
    additive[:, :, 0, 1] = 0.75
    return {"none": None, "additive": additive, "boolean": additive > -INF}


@pytest.mark.parametrize("bias", ["none", "additive", "boolean"])
@pytest.mark.parametrize("mask", ["", "k_idx <= q_idx", "(k_idx > q_idx) & (k_idx < 6)"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_are_the_whole(bias: str, mask: str, dtype: torch.dtype) -> None:
    q, k, v = inputs(dtype)
    added = biases()[bias]
    expected = attention.reference(q.double(), k.double(), v.double(), added, scale=0.25, mask=mask)
    got = parts(q, k, v, added, mask)
    tolerance = OPS["attention"].tolerance[dtype]
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, atol=tolerance.atol, rtol=tolerance.rtol)


def test_gradients_are_the_whole_s_where_a_row_sees_nothing() -> None:
    bias = biases()["additive"]
    grads = []
    whole = functools.partial(attention.reference, bias=bias, scale=0.25)
    for function in (functools.partial(parts, bias=bias, mask=""), whole):
        leaves = [t.double().requires_grad_() for t in inputs(torch.float32)]
        function(*leaves).square().sum().backward()
        grads.append([t.grad for t in leaves])
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-10)


class Model(torch.nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25)


def compiled(force: bool, target: str = "reference") -> tuple[tw.CompiledModule, list[torch.Tensor]]:
    example = inputs(torch.float32, heads=2, q_len=7)
    done = tw.compile(Model(), [TwoPassSoftmax(force=force)], tuple(example), target=target, rest="eager")
    return done, example


def test_the_pass_leaves_attention_alone_unless_forced() -> None:
    done, _ = compiled(force=False)
    (one,) = done.report.passes
    assert not one.matched
    assert "force=True" in one.declined[0].reason


@pytest.mark.parametrize("target", ["reference", "triton-interpret"])
def test_forced_it_rewrites_the_softmax_inside(target: str) -> None:
    done, example = compiled(True, target)
    (one,) = done.report.passes
    assert len(one.matched) == 1 and one.matched[0].error is not None
    tolerance = OPS["attention"].tolerance[torch.float32]
    torch.testing.assert_close(done(*example), Model()(*example), atol=tolerance.atol, rtol=tolerance.rtol)
    assert [use.op for use in done.kernels] == (["softmax"] if target == "triton-interpret" else [])


def test_sigmoid_attention_has_no_softmax() -> None:
    example = tuple(inputs(torch.float32, heads=2, q_len=7))
    passes = [tw.passes.SigmoidAttention(bias=-1.0), TwoPassSoftmax(force=True)]
    done = tw.compile(Model(), passes, example, target="reference", rest="eager")
    by_name = {one.name: one for one in done.report.passes}
    rewritten = {name: len(one.matched) for name, one in by_name.items()}
    # Either order is legal; the first one takes the site, and the other finds no softmax attention there any more.
    assert sum(rewritten.values()) == 1


def test_the_helpers_are_registered() -> None:
    assert attention_parts.ATTENTION_SCORES is torch.ops.tilewright.attention_scores.default
