"""Routing Transformer: attention inside clusters against a slow dense softmax in float64, and the running means."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tilewright as tw
from tilewright.passes.routing_transformer import RoutingTransformer
from tilewright.runtime import errors
from tilewright.runtime.ops import OPS, routed_attention

ROUTE = torch.ops.tilewright.route.default


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


def inputs(length: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, length, 24, generator=torch.Generator().manual_seed(length), dtype=dtype)


def compiled_of(model: nn.Module, *example: Tensor, target: str = "reference", **options: Any) -> Any:
    one = RoutingTransformer(**{"clusters": 4, "window": 3, "block_size": 16, **options})
    return tw.compile(
        model, passes=[one], example_inputs=example, target=target, rest="eager", strict=True, validate=False
    )


def run_and_routes(compiled: Any, *given: Tensor) -> tuple[Tensor, list[Tensor]]:
    found = []

    class Watch(torch.fx.Interpreter):
        def run_node(self, node: torch.fx.Node) -> Any:
            value = super().run_node(node)
            if node.target is ROUTE:
                found.append(value)
            return value

    program = compiled.exported_program()
    (out,) = Watch(program.record.lowered).run(*program.flatten(given, {}))
    return out, found


def dense(model: Attend, x: Tensor, routes: list[Tensor], window: int, keep: Tensor | None) -> Tensor:
    """Window pairs once, distant pairs once for each cluster that holds both; by its definition, pair by pair."""
    q, k, v = model.heads(x)
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    length, clusters = x.shape[1], routes[0].shape[2]
    member = [
        torch.zeros(2, index.shape[1], clusters, length, dtype=torch.float64).scatter_(3, index, 1.0)
        for index in routes
    ]
    common = member[0].transpose(-1, -2) @ member[1].repeat_interleave(2, 1)
    place = torch.arange(length)
    distance = place[:, None] - place
    times = torch.where(distance.abs() <= window, 1.0, common)
    if model.causal:
        times = times * (distance >= 0)
    if keep is not None:
        times = times * keep[:, None, None, :]
    scores = (q @ k.transpose(-1, -2) / 4) + times.log()
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v


@pytest.mark.parametrize(("causal", "size"), [(True, 0), pytest.param(False, 20, marks=pytest.mark.grid)])
def test_equals_softmax_over_window_and_clusters(causal: bool, size: int) -> None:
    model = Attend(causal)

    def padding(length: int) -> list[Tensor]:
        return [] if causal else [torch.arange(length).expand(2, length) < torch.tensor([[length], [length // 2]])]

    compiled = compiled_of(model, inputs(80), *padding(80), size=size)
    for length in (80, 51):
        x, pad = inputs(length), padding(length)
        out, routes = run_and_routes(compiled, x, *pad)
        width = min(size, length) if size else math.ceil(length / 4)
        assert [tuple(r.shape) for r in routes] == [(2, 4, 4, width), (2, 2, 4, width)]
        expected = dense(model, x, routes, 3, pad[0] if pad else None)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)


def test_routes_are_the_nearest() -> None:
    """By the products of layer-normalised queries and centroids, each key head's group with its own centroids."""
    x, centroids = torch.randn(2, 4, 30, 8).double(), torch.randn(2, 3, 8).double()
    index = routed_attention.route(x, centroids, size=7)
    assert (index.diff(dim=-1) > 0).all()
    for head in range(4):
        tokens = nn.functional.layer_norm(x[:, head], (8,))
        products = tokens @ nn.functional.layer_norm(centroids[head // 2], (8,)).T
        for b in range(2):
            for c in range(3):
                chosen = products[b, index[b, head, c], c]
                assert chosen.min() >= products[b, :, c].sort().values[-7] - 1e-12


@pytest.mark.grid
def test_native_kernels() -> None:
    model, x = Attend(dtype=torch.float32), inputs(300, torch.float32)
    native, plain = (compiled_of(model, x, target=target, window=20) for target in ("cpp", "reference"))
    assert {"attention_lse", "block_attention_lse"} <= {use.op for use in native.kernels}
    tolerance = OPS["attention"].tolerance[torch.float32]
    torch.testing.assert_close(native(x), plain(x), rtol=2 * tolerance.rtol, atol=2 * tolerance.atol)


def test_means_of_what_is_nearest() -> None:
    """Well separated queries and keys: repeated updates bring each centroid to the middle of its cluster."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.eye(8, dtype=torch.float64)[:4] * 5
    tokens = corners.repeat_interleave(10, 0) + 0.01 * torch.randn(40, 8, generator=generator, dtype=torch.float64)
    q = k = tokens[None, None]
    centroids = (corners + 0.5 * torch.randn(4, 8, generator=generator, dtype=torch.float64))[None]
    for _ in range(5):
        means = routed_attention.cluster_means(q, k, centroids)
        torch.ops.tilewright.ema_update(centroids, means, decay=0.1)
    expected = nn.functional.layer_norm(tokens, (8,)).reshape(4, 10, 8).mean(1)
    torch.testing.assert_close(centroids[0], expected, rtol=1e-3, atol=1e-3)
    far = torch.full((1, 1, 8), -1.0, dtype=torch.float64)
    far[..., 0] = -9.0
    lonely = torch.cat((centroids, far), 1)  # nothing is nearest to it: it stays
    assert torch.equal(routed_attention.cluster_means(q, k, lonely)[:, 4], nn.functional.layer_norm(lonely[:, 4], (8,)))


@pytest.mark.parametrize(
    ("options", "words"),
    [({"clusters": 0}, "at least 1"), ({"decay": 1.0}, "below 1"), ({"block_size": 1}, "16, 32"), ({"size": -1}, "0")],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(errors.BadPassOption, match=words):
        RoutingTransformer(**options)
