"""Rotary embedding is found in both layouts and every spelling of them; other rotations are left alone."""

import pytest
import torch
from raise_cases import counts, nodes, raise_function

from tilewright.passes.view import arguments

B, H, L, N = 2, 3, 5, 8


def inputs(dtype=torch.float32, half=False):
    torch.manual_seed(0)
    angle = torch.rand(1, 1, L, N // 2) * 6
    angle = angle if half else torch.cat([angle, angle], -1)
    return torch.randn(B, H, L, N, dtype=dtype), angle.cos().to(dtype), angle.sin().to(dtype)


def llama(x, cos, sin):
    return x * cos + torch.cat((-x[..., N // 2 :], x[..., : N // 2]), dim=-1) * sin


def chunked(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1) * sin + cos * x


def split(x, cos, sin):
    a, b = torch.split(x, N // 2, dim=-1)
    return (x * cos) + (torch.cat((b * -1, a), dim=-1) * sin)


def unbound(x, cos, sin):
    a, b = x.reshape(B, H, L, 2, N // 2).unbind(-2)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def gptj(x, cos, sin):
    return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2) * sin


def pairs(x, cos, sin):
    p = x.view(B, H, L, N // 2, 2)
    return x * cos + torch.stack([-p[..., 1], p[..., 0]], -1).reshape(x.shape) * sin


def partial(x, cos, sin):
    turned, rest = x[..., :N], x[..., N:]
    return torch.cat([llama(turned, cos, sin), rest], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("function", "layout"),
    [
        (llama, "rotate_half"),
        (chunked, "rotate_half"),
        (split, "rotate_half"),
        (unbound, "rotate_half"),
        (gptj, "interleaved"),
        (pairs, "interleaved"),
    ],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_rope_in_every_spelling(function, layout, dtype):
    module, result = raise_function(function, *inputs(dtype))
    assert counts(result) == {"rope": 1} and not result.near_misses
    (node,) = nodes(module, "rope")
    given = arguments(node)
    assert given["layout"] == layout
    assert [given[name].name for name in ("x", "cos", "sin")] == ["x_1", "cos_1", "sin_1"]
    assert sum(n.op == "call_function" for n in module.graph.nodes) == 1


def gpt_oss(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def llama_reference(x, cos, sin):
    a, b = x.reshape(B, H, L, N // 2, 2).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("function", "layout"), [(gpt_oss, "rotate_half"), (llama_reference, "interleaved")])
def test_rope_written_out_on_the_parts(function, layout, dtype):
    module, result = raise_function(function, *inputs(dtype, half=True))
    assert counts(result) == {"rope": 1} and not result.near_misses
    given = arguments(nodes(module, "rope")[0])
    assert given["layout"] == layout and given["x"].op == "placeholder"


def test_partial_rotary_raises_the_part_that_turns():
    x, cos, sin = inputs()
    module, result = raise_function(partial, torch.cat([x, x], -1), cos, sin)
    assert counts(result) == {"rope": 1}
    assert nodes(module, "rope")[0].meta["val"].shape == x.shape


def test_queries_and_keys_share_cosine_and_sine():
    x, cos, sin = inputs()
    both = lambda q, k, c, s: (llama(q, c.unsqueeze(0), s.unsqueeze(0)), llama(k, c.unsqueeze(0), s.unsqueeze(0)))  # noqa: E731
    _, result = raise_function(both, x, x[:, :1], cos[0], sin[0])
    assert counts(result) == {"rope": 2}


def test_symbolic_lengths():
    module, result = raise_function(llama, *inputs(), symbolic=True)
    assert counts(result) in ({"rope": 1}, {})  # the head size is a symbol here too; what matters is the outputs
    assert len(nodes(module, "rope")) == len(result.sites)


def used_elsewhere(x, cos, sin):
    turned = torch.cat((-x[..., N // 2 :], x[..., : N // 2]), -1)
    return x * cos + turned * sin, turned


NEAR = {
    "other way round": lambda x, c, s: x * c + torch.cat((x[..., N // 2 :], -x[..., : N // 2]), -1) * s,
    "halves not swapped": lambda x, c, s: x * c + torch.cat((-x[..., : N // 2], x[..., N // 2 :]), -1) * s,
    "subtracted": lambda x, c, s: x * c - torch.cat((-x[..., N // 2 :], x[..., : N // 2]), -1) * s,
    "cosine of another tensor": lambda x, c, s: x.sin() * c + torch.cat((-x[..., N // 2 :], x[..., : N // 2]), -1) * s,
    "no cosine": lambda x, c, s: x + torch.cat((-x[..., N // 2 :], x[..., : N // 2]), -1) * s,
    "no sine": lambda x, c, s: x * c + torch.cat((-x[..., N // 2 :], x[..., : N // 2]), -1),
    "alpha": lambda x, c, s: torch.add(x * c, torch.cat((-x[..., N // 2 :], x[..., : N // 2]), -1) * s, alpha=2),
    "used elsewhere": used_elsewhere,
    "pairs turned back": lambda x, c, s: x * c + torch.stack((x[..., 1::2], -x[..., ::2]), -1).flatten(-2) * s,
}


@pytest.mark.parametrize("name", NEAR)
def test_look_alikes_are_near_misses(name):
    _, result = raise_function(NEAR[name], *inputs())
    assert counts(result) == {}
    assert [site.op for site, _, _ in result.near_misses] == ["rope"]


NEAR_ON_PARTS = {
    "turned back": lambda a, b, c, s: [a * c + b * s, b * c - a * s],
    "sine missing": lambda a, b, c, s: [a * c - b * s, b * c + a * c],
    "one half only": lambda a, b, c, s: [a * c - b * s, b * s + a * s],
    "first is the other": lambda a, b, c, s: [b * c - a * s, a * c + b * s],
}


@pytest.mark.parametrize("name", NEAR_ON_PARTS)
def test_look_alikes_on_the_parts_are_near_misses(name):
    _, result = raise_function(
        lambda x, c, s: torch.cat(NEAR_ON_PARTS[name](*x.chunk(2, -1), c, s), -1), *inputs(half=True)
    )
    assert counts(result) == {}
    assert [site.op for site, _, _ in result.near_misses] == ["rope"]


NOTHING_ALIKE = {
    "halves of two tensors": lambda x, c, s: x * c + torch.cat((-(x + 1)[..., N // 2 :], x[..., : N // 2]), -1) * s,
    "another dimension": lambda x, c, s: torch.cat((-x[:, 1:], x[:, :1]), 1),
    "unequal halves": lambda x, c, s: x * c + torch.cat((-x[..., 2:], x[..., :2]), -1) * s,
    "thirds": lambda x, c, s: torch.cat(x.split([2, 2, 4], -1), -1) * c,
    "cosine on one half": lambda x, c, s: torch.cat((x[..., : N // 2] * c[..., : N // 2], x[..., N // 2 :]), -1),
    "low and high joined as pairs": lambda x, c, s: (
        x * c + torch.stack((-x[..., N // 2 :], x[..., : N // 2]), -1).flatten(-2) * s
    ),
}


@pytest.mark.parametrize("name", NOTHING_ALIKE)
def test_what_is_no_rope_is_not_raised(name):
    _, result = raise_function(NOTHING_ALIKE[name], *inputs())
    assert counts(result) == {}
