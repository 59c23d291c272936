"""linear and gated_mlp: every spelling with a weight, and only gates that linear layers made."""

import pytest
import torch
from raise_cases import assert_close, counts, export, nodes, raise_function
from torch.nn import functional

from tilewright.frontend.raising import raise_graph
from tilewright.passes.view import arguments

K, N = 6, 4


class Weighted(torch.nn.Module):
    """``function(x, weight, bias)`` with parameters (N, K) and (N,), or the weight as (K, N)."""

    def __init__(self, function, transposed=False):
        super().__init__()
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(*((K, N) if transposed else (N, K))))
        self.bias = torch.nn.Parameter(torch.randn(N))
        self.function = function

    def forward(self, x):
        return self.function(x, self.weight, self.bias)


SPELLINGS = {
    "linear": (lambda x, w, b: functional.linear(x, w, b), False, True),
    "linear without bias": (lambda x, w, b: functional.linear(x, w), False, False),
    "matmul with T": (lambda x, w, b: x @ w.T, False, False),
    "matmul with mT": (lambda x, w, b: x @ w.mT, False, False),
    "matmul with transpose": (lambda x, w, b: torch.matmul(x, w.transpose(-1, -2)), False, False),
    "mm with t": (lambda x, w, b: torch.mm(x, w.t()), False, False),
    "addmm with permute": (lambda x, w, b: torch.addmm(b, x, w.permute(1, 0)), False, True),
    "mm": (lambda x, w, b: torch.mm(x, w), True, False),
    "matmul": (lambda x, w, b: x @ w, True, False),
    "GPT-2's addmm": (lambda x, w, b: torch.addmm(b, x, w), True, True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SPELLINGS)
def test_linear_in_every_spelling(name, dtype):
    function, transposed, biased = SPELLINGS[name]
    x = torch.randn(3, K, dtype=dtype)
    module = export(Weighted(function, transposed).to(dtype), x)
    expected = module(x)
    result = raise_graph(module)
    assert counts(result) == {"linear": 1}
    given = arguments(nodes(module, "linear")[0])
    assert (given["bias"] is not None) == biased
    weight = given["weight"].args[0] if transposed else given["weight"]
    assert weight.op == "get_attr" and given["weight"].meta["val"].shape == (N, K)
    assert_close(module(x), expected)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, b: torch.addmm(b, x, w, beta=0.5),
        lambda x, w, b: torch.addmm(b, x, w, alpha=2),
        lambda x, w, b: torch.addmm(x[:, :N], x, w),
        lambda x, w, b: torch.addmm(b[:1], x, w),
    ],
)
def test_an_addmm_that_is_no_linear_is_a_near_miss(function):
    x = torch.randn(3, K)
    module = export(Weighted(function, True), x)
    expected = module(x)
    result = raise_graph(module)
    assert counts(result) == {} and [site.op for site, _, _ in result.near_misses] == ["linear"]
    assert_close(module(x), expected)


def test_a_product_of_activations_is_no_linear():
    _, result = raise_function(lambda x, y: torch.mm(x, y.t()) + torch.mm(x, (y * 2).t()), *[torch.randn(N, N)] * 2)
    assert counts(result) == {} and not result.near_misses


class Gated(torch.nn.Module):
    def __init__(self, function, bias=False, parts=2):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up = torch.nn.Linear(K, N, bias=bias), torch.nn.Linear(K, N, bias=bias)
        self.both = torch.nn.Linear(K, parts * N)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def new_gelu(x):
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3.0))))


GATED = {
    "silu": (lambda m, x: functional.silu(m.gate(x)) * m.up(x), "silu"),
    "up first": (lambda m, x: m.up(x) * functional.silu(m.gate(x)), "silu"),
    "gelu": (lambda m, x: functional.gelu(m.gate(x)) * m.up(x), "gelu"),
    "gelu tanh": (lambda m, x: functional.gelu(m.gate(x), approximate="tanh") * m.up(x), "gelu_tanh"),
    "relu": (lambda m, x: functional.relu(m.gate(x)) * m.up(x), "relu"),
    "sigmoid": (lambda m, x: torch.sigmoid(m.gate(x)) * m.up(x), "sigmoid"),
    "silu by hand": (lambda m, x: ((g := m.gate(x)) * torch.sigmoid(g)) * m.up(x), "silu"),
    "gelu by hand": (lambda m, x: new_gelu(m.gate(x)) * m.up(x), "gelu_tanh"),
    "chunks": (lambda m, x: functional.silu((c := m.both(x).chunk(2, -1))[0]) * c[1], "silu"),
    "split, gate second": (lambda m, x: (c := m.both(x).split(N, -1))[0] * functional.gelu(c[1]), "gelu"),
    "slices": (lambda m, x: functional.silu((y := m.both(x))[..., :N]) * y[..., N:], "silu"),
    "glu": (lambda m, x: functional.glu(m.both(x), -1), "sigmoid"),
}


@pytest.mark.parametrize("name", GATED)
def test_gated_mlp_in_every_spelling(name):
    function, activation = GATED[name]
    x = torch.randn(3, K)
    module = export(Gated(function), x)
    expected = module(x)
    result = raise_graph(module)
    assert counts(result)["gated_mlp"] == 1 and not result.near_misses and not result.declined
    assert arguments(nodes(module, "gated_mlp")[0])["activation"] == activation
    assert_close(module(x), expected)


def kept(m, x):
    gate = functional.silu(m.gate(x))
    return gate * m.up(x), gate


NOT_GATED = {
    "square of relu": (lambda m, x: functional.relu(g := m.gate(x)) * functional.relu(g), False),
    "silu alone": (lambda m, x: functional.silu(m.gate(x)), False),
    "x times its sigmoid": (lambda m, x: (g := m.gate(x)) * torch.sigmoid(g), False),
    "squeeze and excite": (lambda m, x: torch.sigmoid(m.gate(x)) * x[..., :N], True),
    "gate of no layer": (lambda m, x: functional.silu(x[..., :N]) * m.up(x), False),
    "sum": (lambda m, x: functional.silu(m.gate(x)) + m.up(x), False),
    "activation used elsewhere": (kept, True),
    "gelu with another constant": (
        lambda m, x: 0.5 * (g := m.gate(x)) * (1.0 + torch.tanh(0.8 * (g + 0.044715 * torch.pow(g, 3.0)))) * m.up(x),
        True,
    ),
    "gelu with another power": (
        lambda m, x: 0.5 * (g := m.gate(x)) * (1.0 + torch.tanh(0.79788456 * (g + 0.044715 * g.pow(2.0)))) * m.up(x),
        False,
    ),
}


@pytest.mark.parametrize("name", NOT_GATED)
def test_what_is_no_gated_mlp_is_not_raised(name):
    function, near = NOT_GATED[name]
    x = torch.randn(3, K)
    module = export(Gated(function), x)
    expected = module(x)
    result = raise_graph(module)
    assert "gated_mlp" not in counts(result)
    assert [site.op for site, _, _ in result.near_misses] == (["gated_mlp"] if near else [])
    assert_close(module(x), expected)


def test_gelu_by_hand_in_half_precision_is_declined():
    x = torch.randn(3, K, dtype=torch.bfloat16)
    module = export(Gated(GATED["gelu by hand"][0]).bfloat16(), x)
    result = raise_graph(module)
    assert "gated_mlp" not in counts(result)
    assert "rounds to torch.bfloat16 at every step" in result.declined[0][1]
