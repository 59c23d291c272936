"""rms_norm and layer_norm are found as models write them, with their numbers, and look-alikes are left alone."""

import pytest
import torch
from raise_cases import assert_close, counts, export, nodes, raise_function

from tilewright.frontend.raising import raise_graph
from tilewright.passes.view import arguments, is_identity

N = 16
EPS = 3e-5


def inputs(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(2, 3, N, dtype=dtype), torch.rand(N, dtype=dtype) + 0.5, torch.randn(N, dtype=dtype)


def llama(x, w, b):
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return w * h.to(x.dtype)


def t5(x, w, b):
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return w * (x * torch.rsqrt(variance + EPS)).to(w.dtype)


def gemma(x, w, b):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return (h * (1.0 + w.float())).type_as(x)


def product(x, w, b):
    h = x.float()
    return (w.float() * (h * (EPS + (h * h).mean(2, True)).rsqrt())).to(x.dtype)


def quotient(x, w, b):
    h = x.float()
    return (h / torch.sqrt(h.square().mean(dim=-1, keepdim=True) + EPS) * w.float()).to(x.dtype)


def reciprocal(x, w, b):
    h = x.float()
    return (h * (1 / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + EPS)) * w.float()).to(x.dtype)


def power(x, w, b):
    h = x.float()
    return (h * torch.pow(h.pow(2).mean(-1, keepdim=True) + EPS, -0.5)).type_as(x) * w


def bare(x, w, b):
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def aten_rms_norm(x, w, b):
    return torch.rms_norm(x, [N], w, EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("function", "offset", "weighted"),
    [
        (llama, 0.0, True),
        (t5, 0.0, True),
        (gemma, 1.0, True),
        (product, 0.0, True),
        (quotient, 0.0, True),
        (reciprocal, 0.0, True),
        (power, 0.0, True),
        (bare, 0.0, False),
        (aten_rms_norm, 0.0, True),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_rms_norm_in_every_spelling(function, offset, weighted, dtype):
    module, result = raise_function(function, *inputs(dtype))
    assert counts(result) == {"rms_norm": 1} and not result.near_misses
    given = arguments(nodes(module, "rms_norm")[0])
    assert given["eps"] == EPS and given["weight_offset"] == offset
    assert given["input" if "input" in given else "x"].op == "placeholder"
    assert (given["weight"] is not None) == weighted
    if dtype == torch.bfloat16:
        assert given["round_before_weight"] == (function in (llama, t5, power))
    # Nothing of the pattern is left.
    assert sum(n.op == "call_function" and not is_identity(n) for n in module.graph.nodes) == 1


def test_torchs_default_eps_is_captured():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.randn(4, N, dtype=dtype) * 1e-4
        module, result = raise_function(lambda x: torch.rms_norm(x, [N]), x)
        assert counts(result) == {"rms_norm": 1}
        assert arguments(nodes(module, "rms_norm")[0])["eps"] > 0


def test_a_float32_result_of_a_half_input_keeps_its_dtype():
    module, result = raise_function(
        lambda x: x.float() * torch.rsqrt(x.float().pow(2).mean(-1, True) + EPS), inputs(torch.bfloat16)[0]
    )
    assert counts(result) == {"rms_norm": 1}
    assert nodes(module, "rms_norm")[0].meta["val"].dtype == torch.float32


def shared(x, w, b):
    r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return x * r * w, r


def written_between(x, w, b):
    y = x + 0
    r = torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS)
    y[0].add_(1)
    return y * r * w


RMS_LOOK_ALIKES = {
    "another dimension": lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS),
    "two dimensions": lambda x, w, b: x * torch.rsqrt(x.pow(2).mean((-1, -2), keepdim=True) + EPS),
    "sum": lambda x, w, b: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS),
    "all elements": lambda x, w, b: x * torch.rsqrt(x.pow(2).mean() + EPS),
    "another tensor": lambda x, w, b: (x + 1) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS),
    "root used elsewhere": shared,
    "written in between": written_between,
}
NOTHING_ALIKE = {
    "cubed": lambda x, w, b: x * torch.rsqrt(x.pow(3).abs().mean(-1, keepdim=True) + EPS),
    "eps outside": lambda x, w, b: x / (x.pow(2).mean(-1, keepdim=True).sqrt() + EPS),
    "divided by the square": lambda x, w, b: x / (x.pow(2).mean(-1, keepdim=True) + EPS),
    "multiplied by the root": lambda x, w, b: x * torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS),
    "cube root": lambda x, w, b: x * (x.pow(2).mean(-1, keepdim=True) + EPS).pow(-1 / 3),
    "eps subtracted": lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) - -EPS),
    "eps from data": lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + b.pow(2)),
}


@pytest.mark.parametrize("name", RMS_LOOK_ALIKES)
def test_rms_norm_look_alikes_are_near_misses(name):
    _, result = raise_function(RMS_LOOK_ALIKES[name], *inputs())
    assert counts(result) == {}
    assert [site.op for site, _, _ in result.near_misses] == ["rms_norm"]
    site, where, reason = result.near_misses[0]
    assert reason and " = aten." in where


@pytest.mark.parametrize("name", NOTHING_ALIKE)
def test_what_is_no_norm_is_not_raised(name):
    _, result = raise_function(NOTHING_ALIKE[name], *inputs())
    assert counts(result) == {}


def test_a_keepdim_that_is_missing_is_a_near_miss():
    x = torch.randn(N, N)
    _, result = raise_function(lambda x: x * torch.rsqrt(x.pow(2).mean(-1) + EPS), x)
    assert counts(result) == {} and "does not keep its dimension" in result.near_misses[0][2]


def test_a_gate_of_full_shape_is_no_weight():
    x, *_ = inputs()
    module, result = raise_function(lambda x, g: x * torch.rsqrt(x.pow(2).mean(-1, True) + EPS) * g, x, x.clone())
    assert counts(result) == {"rms_norm": 1}
    assert arguments(nodes(module, "rms_norm")[0])["weight"] is None


def test_statistics_in_half_precision_are_declined():
    _, result = raise_function(RMS_LOOK_ALIKES["sum"], *inputs(torch.bfloat16))
    assert counts(result) == {}
    x = inputs(torch.bfloat16)[0]
    _, result = raise_function(lambda x: x * torch.rsqrt(x.pow(2).mean(-1, True) + EPS), x)
    assert counts(result) == {} and "computes the statistics in torch.bfloat16" in result.declined[0][1]


def bert(x, w, b):
    u = x.mean(-1, keepdim=True)
    s = (x - u).pow(2).mean(-1, keepdim=True)
    return w * ((x - u) / torch.sqrt(s + EPS)) + b


def variance(x, w, b):
    u = x.mean(-1, keepdim=True)
    return (x - u) * torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + EPS) * w + b


def correction(x, w, b):
    return b + (x - x.mean(-1, True)) / (torch.var(x, -1, correction=0, keepdim=True) + EPS) ** 0.5 * w


def in_float32(x, w, b):
    h = x.float()
    d = h - h.mean(-1, keepdim=True)
    return (d * torch.rsqrt((d * d).mean(-1, keepdim=True) + EPS) * w.float() + b.float()).to(x.dtype)


@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize(
    "function",
    [bert, variance, correction, in_float32, lambda x, w, b: torch.nn.functional.layer_norm(x, [N], w, b, EPS)],
    ids=["bert", "variance", "correction", "in_float32", "aten"],
)
def test_layer_norm_in_every_spelling(function, symbolic):
    x, w, b = inputs()
    if symbolic and function in (bert, variance, correction, in_float32):
        # A hand-written norm does not say how long the last dimension is; a symbol there cannot be captured.
        _, result = raise_function(function, x, w, b, symbolic=True)
        assert counts(result) == {} and "not known when compiling" in result.near_misses[0][2]
        return
    module, result = raise_function(function, x, w, b, symbolic=symbolic)
    assert counts(result) == {"layer_norm": 1} and not result.near_misses
    given = arguments(nodes(module, "layer_norm")[0])
    assert given["eps"] == EPS
    assert [given[name].op for name in ("x", "weight", "bias")] == ["placeholder"] * 3


def test_layer_norm_in_float32_of_bfloat16():
    module, result = raise_function(in_float32, *inputs(torch.bfloat16))
    assert counts(result) == {"layer_norm": 1}
    given = arguments(nodes(module, "layer_norm")[0])
    assert [given[name].op for name in ("x", "weight", "bias")] == ["placeholder"] * 3


def test_native_layer_norm():
    x, w, b = inputs()
    _, result = raise_function(lambda x, w, b: torch.native_layer_norm(x, [N], w, b, EPS)[0], x, w, b)
    assert counts(result) == {"layer_norm": 1}
    _, result = raise_function(lambda x, w, b: torch.native_layer_norm(x, [N], w, b, EPS)[:2], x, w, b)
    assert counts(result) == {} and "is used too" in result.declined[0][1]


def centred(x, dim=-1):
    return x - x.mean(dim, keepdim=True)


def over(x, dim=-1, **kwargs):
    """A standard deviation with EPS, over ``dim``, kept."""
    return torch.sqrt(torch.var(x, dim, keepdim=True, **kwargs) + EPS)


def mean_square(x, dim=-1):
    return x.pow(2).mean(dim, keepdim=True)


LAYER_LOOK_ALIKES = {
    "unbiased": lambda x, w, b: centred(x) * torch.rsqrt(x.var(-1, keepdim=True) + EPS) * w + b,
    "unbiased by correction": lambda x, w, b: centred(x) / over(x, correction=1),
    "correction two": lambda x, w, b: centred(x) / over(x, correction=2),
    "variance of another dimension": lambda x, w, b: centred(x) / over(x, 1, correction=0),
    "variance of another tensor": lambda x, w, b: centred(x) / over(x.sin(), correction=0),
    "squares of x": lambda x, w, b: centred(x) * torch.rsqrt(mean_square(x) + EPS),
    "mean of another dimension": lambda x, w, b: centred(x, 1) * torch.rsqrt(mean_square(centred(x, 1), 1) + EPS),
}


@pytest.mark.parametrize("name", LAYER_LOOK_ALIKES)
def test_layer_norm_look_alikes_are_near_misses(name):
    _, result = raise_function(LAYER_LOOK_ALIKES[name], *inputs())
    assert counts(result) == {}
    assert len(result.near_misses) == 1


def test_a_bias_without_a_weight_stays_outside():
    x, _, b = inputs()
    module, result = raise_function(
        lambda x, b: centred(x) * torch.rsqrt(centred(x).pow(2).mean(-1, True) + EPS) + b, x, b
    )
    assert counts(result) == {"layer_norm": 1}
    assert arguments(nodes(module, "layer_norm")[0])["bias"] is None


def test_a_near_miss_names_module_node_and_line():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = Summed()

        def forward(self, x):
            return self.norm(x)

    class Summed(torch.nn.Module):
        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS)

    ((site, where, reason),) = raise_graph(export(Model(), inputs()[0])).near_misses
    assert site.id == "norm/rms_norm" and site.module == "norm"
    assert where.startswith("sum_1 = aten.sum.dim_IntList, ") and "test_raise_norms.py:" in where
    assert reason == "it sums the squares instead of averaging"


def test_sites_name_module_and_line():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.RMSNorm(N), torch.nn.LayerNorm(N)

        def forward(self, x):
            x = self.second(self.first(x))
            return bert(x, self.second.weight, self.second.bias) + bert(x, self.second.weight, self.second.bias)

    x = inputs()[0]
    module = export(Model(), x)
    expected = module(x)
    result = raise_graph(module)
    assert [site.id for site in result.sites] == ["first/rms_norm", "second/layer_norm", "layer_norm", "layer_norm#2"]
    assert "test_raise_norms.py:" in result.sites[2].source
    assert_close(module(x), expected)
