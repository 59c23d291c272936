"""TwoPassSoftmax on small exported graphs: what it fuses and what it must not, whether it declines, and the numbers."""

from __future__ import annotations

import math

import pytest
import torch

from tilewright.codegen.softmax import MAX_TILE
from tilewright.frontend.capture import copy_module
from tilewright.passes import Decline, Exactness, TwoPassSoftmax
from tilewright.passes.base import SiteContext
from tilewright.passes.manager import run_pass, validate
from tilewright.passes.site import name_site, set_site
from tilewright.passes.view import GraphView, arguments
from tilewright.runtime.cpu import cache_bytes
from tilewright.runtime.errors import BadPassOption

INF = math.inf
aten = torch.ops.aten


def canonical(x, dim=-1, **kwargs):
    return torch.ops.tilewright.softmax(x, dim, **kwargs)


class Call(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def export(function, *inputs, dynamic=None):
    """A pre-dispatch graph with sites, as raising leaves it."""
    shapes = (dynamic,) if dynamic is not None else None
    module = torch.export.export(Call(function), inputs, dynamic_shapes=shapes).module()
    taken: set[str] = set()
    for node in softmaxes(module):
        set_site(node, name_site(node, "softmax", taken))
    return module


def softmaxes(module):
    return [n for n in module.graph.nodes if n.target is torch.ops.tilewright.softmax.default]


def rewrite(function, *inputs, one=None, dynamic=None):
    """Run the pass; check every site against the original on the inputs. Returns (module, PassRun)."""
    module = export(function, *inputs, dynamic=dynamic)
    done = run_pass(module, one or TwoPassSoftmax(force=True), copy_module)
    validate(done, inputs)
    expected, actual = function(*inputs), module(*inputs)
    pairs = zip(expected, actual, strict=True) if isinstance(expected, tuple) else [(expected, actual)]
    for e, a in pairs:
        assert e.dtype == a.dtype
        torch.testing.assert_close(a, e, equal_nan=True)
    return module, done


def fused(function, *inputs, **options):
    """(the single site's arguments, details, other calls left in front of it; a constant's own calls do not count)"""
    module, done = rewrite(function, *inputs, one=TwoPassSoftmax(force=True, **options))
    (site,) = softmaxes(module)
    constant = (aten.lift_fresh_copy.default, aten.detach_.default)
    calls = [n for n in module.graph.nodes if n.op == "call_function" and n is not site]
    rest = [n.target for n in calls if "assert" not in n.name and n.target not in constant]
    return arguments(site), done.rewrites[0].details, rest


X = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
MASK = torch.rand(4, 8, generator=torch.Generator().manual_seed(1)) > 0.7
BIAS = torch.randn(1, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("function", "scale"),
    [
        (lambda x: canonical(x * 0.125), 0.125),
        (lambda x: canonical(0.125 * x), 0.125),
        (lambda x: canonical(x / 4), 0.25),
        (lambda x: canonical(x * 3 / 4), 0.75),
        (lambda x: canonical(x * 0.5, scale=0.5, log=True), 0.25),
        (lambda x: canonical(x * -2.0, dim=1), -2.0),
    ],
)
def test_scales_are_fused(function, scale):
    site, details, rest = fused(function, X)
    assert site["scale"] == scale and rest == [] and site["x"].op == "placeholder"
    assert details["algorithm"] == site["algorithm"] == "one_read" and details["row_length"] in (8, 4)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, b: canonical(x + b),
        lambda x, b: canonical(b + x),
        lambda x, b: canonical(x / 4 + b),
        lambda x, b: canonical(b + x * 0.25),
        lambda x, b: canonical(x + b, log=True),
    ],
)
def test_an_additive_bias_is_fused(function):
    site, _, rest = fused(function, X, BIAS)
    assert rest == [] and {site["x"].name, site["bias"].name} == {"args_0", "args_1"}
    assert site["x"].meta["val"].shape == X.shape


@pytest.mark.parametrize(
    ("function", "inverts"),
    [
        (lambda x, m: canonical(x.masked_fill(m, -INF)), True),
        (lambda x, m: canonical(x.masked_fill(~m, -INF)), False),
        (lambda x, m: canonical(torch.where(m, x, -INF)), False),
        (lambda x, m: canonical(torch.where(m, -INF, x)), True),
        (lambda x, m: canonical(torch.where(m, x, torch.full((), -INF))), False),
        (lambda x, m: canonical(torch.where(m, x, torch.tensor(-INF))), False),
        (lambda x, m: canonical((x * 0.5).masked_fill(m, -INF), log=True), True),
        (lambda x, m: canonical(x.masked_fill(m, -INF) * 0.5), True),
    ],
)
def test_masks_are_fused(function, inverts):
    site, details, rest = fused(function, X, MASK)
    assert rest == ([aten.logical_not.default] if inverts else []), details
    assert site["x"].name == "args_0" and site["bias"].meta["val"].dtype == torch.bool


def kept(function, *inputs, reason, **options):
    """The step in front stays, for this reason, and the softmax still reads it."""
    site, details, rest = fused(function, *inputs, **options)
    assert reason in (details["not_fused"] or ""), details
    assert rest
    return site, details


def test_what_is_used_elsewhere_stays():
    kept(lambda x: (canonical(y := x * 0.5), y), X, reason="output uses it too")
    kept(lambda x, b: (canonical(y := x + b), y.sum()), X, BIAS, reason="uses it too")
    kept(lambda x: canonical(y := x * 0.5) + y, X, reason="uses it too")
    # The outer step goes, the inner stays.
    site, details = kept(lambda x, b: (canonical((y := x * 0.5) + b), y), X, BIAS, reason="output uses it too")
    assert site["bias"] is not None and site["scale"] == 1.0 and len(details["fused"]) == 1


def test_steps_that_are_another_function_stay():
    kept(lambda x, b: canonical((x + b) * 0.5), X, BIAS, reason="scaled after the addition")
    kept(lambda x, b: canonical(torch.add(x, b, alpha=2)), X, BIAS, reason="alpha is 2")
    kept(lambda x, m: canonical(x.masked_fill(m, -1e9)), X, MASK, reason="is not -inf")
    kept(lambda x, m: canonical(x.masked_fill(m, INF)), X, MASK, reason="is not -inf")
    kept(lambda x, m: canonical(x.masked_fill(m, -INF) * -1.0), X, MASK, reason="negative scale")
    kept(lambda x, m, b: canonical(x.masked_fill(m, -INF) + b), X, MASK, BIAS, reason="masked or biased after")
    kept(lambda x, b: canonical(x * b), X, BIAS, reason="no number known")
    kept(lambda x: canonical(x * 0.0), X, reason="the factor is 0.0")
    kept(lambda x: canonical(x / INF), X, reason="the factor is inf")
    kept(lambda x, y: canonical(x + y), X[:, :1], X[:1], reason="no operand has the shape")
    kept(lambda x: canonical((x.double() * 0.5).float()), X, reason="casts float64 to float32")
    kept(lambda x, b: canonical(x + b.long()), X, BIAS, reason="floating partner")


def test_a_write_in_between_keeps_the_step():
    def function(x, out):
        y = x * 0.5
        x.mul_(3.0)  # adding a number would not change the softmax
        return canonical(y)

    module = export(function, X.clone(), X)
    if not any(n.op == "call_function" and "mul_" in str(n.target) for n in module.graph.nodes):
        pytest.skip("this torch.export functionalises")
    run_pass(module, TwoPassSoftmax(force=True), copy_module)
    torch.testing.assert_close(module(X.clone(), X), torch.softmax(X * 0.5, -1))


def test_in_half_types_only_steps_that_do_not_round_are_fused():
    for dtype in (torch.bfloat16, torch.float16):
        x, bias = X.to(dtype), BIAS.to(dtype)
        assert fused(lambda x: canonical(x * 0.125), x)[2] == []
        assert fused(lambda x, m: canonical((x / 8).masked_fill(m, -INF)), x, MASK)[2] == [aten.logical_not.default]
        kept(lambda x: canonical(x * 0.3), x, reason="it rounds to")
        kept(lambda x, b: canonical(x + b), x, bias, reason="it rounds to")
    kept(lambda x: canonical(x * 8.0), X.half(), reason="it rounds to float16")
    # Half scores widened first: everything behind the cast is float32 and goes, and the kernel reads halves.
    site, _, rest = fused(lambda x, b: canonical(x.float() * 0.3 + b), X.bfloat16(), BIAS)
    assert rest == [] and site["x"].meta["val"].dtype == torch.bfloat16 and site["dtype"] == torch.float32
    module = export(lambda x: canonical(x * 0.3), X.bfloat16())
    run_pass(module, TwoPassSoftmax(force=True, fuse_rounded=True), copy_module)
    assert arguments(softmaxes(module)[0])["scale"] == 0.3


def decline(function, *inputs, one=None, dynamic=None):
    _, done = rewrite(function, *inputs, one=one or TwoPassSoftmax(), dynamic=dynamic)
    assert not done.rewrites
    ((_, reason),) = done.declined
    return reason


def test_rows_in_cache_are_declined_and_force_overrides():
    reason = decline(canonical, X)
    assert "rows of 32 bytes stay in the CPU's second-level cache" in reason and "force=True overrides" in reason
    assert fused(canonical, X)[0]["algorithm"] == "one_read"


def test_row_bytes_sets_the_guard():
    _, done = rewrite(canonical, X, one=TwoPassSoftmax(row_bytes=32))
    assert done.rewrites
    assert "rows of 32 bytes are below row_bytes=33" in decline(canonical, X, one=TwoPassSoftmax(row_bytes=33))


def test_rows_beyond_the_cache_are_rewritten():
    n = max(cache_bytes() // 4, MAX_TILE) + 1
    _, done = rewrite(canonical, torch.randn(1, n), one=TwoPassSoftmax())
    details = done.rewrites[0].details
    assert details["algorithm"] == "two_pass" and details["row_bytes"] == 4 * n


def test_other_reasons_to_decline():
    force = TwoPassSoftmax(force=True)
    assert "it is float64" in decline(canonical, X.double(), one=force)
    assert decline(canonical, torch.randn(2, 0), one=force) == "it is empty"
    assert "chosen before: online" in decline(lambda x: canonical(x, algorithm="online"), X, one=force)


def on_gpu(shape, one):
    """The pass's answer for a site on a GPU that need not be here."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(torch.ops.tilewright.softmax.default, (x, -1))
    graph.output(node)
    with torch._subclasses.FakeTensorMode():
        x.meta["val"] = torch.empty(shape, device="cuda")
        node.meta["val"] = torch.empty(shape, device="cuda")
    view = GraphView(torch.fx.GraphModule(torch.nn.Module(), graph))
    return one.rewrite(SiteContext(node, view))


def test_on_a_gpu_short_rows_are_read_once_and_long_ones_have_to_leave_the_cache():
    assert on_gpu((64, 1024), TwoPassSoftmax()).details["algorithm"] == "one_read"
    assert on_gpu((4096, 1 << 20), TwoPassSoftmax()).details["algorithm"] == "two_pass"
    answer = on_gpu((1, 1 << 16), TwoPassSoftmax())
    assert isinstance(answer, Decline) and "in flight stay in the GPU's second-level cache" in answer.reason
    assert on_gpu((1, 1 << 16), TwoPassSoftmax(force=True)).details["algorithm"] == "two_pass"


def test_a_length_that_varies_is_decided_from_the_captured_one():
    n = torch.export.Dim("n", min=2, max=1 << 20)
    dynamic = ({2: n},)
    reason = decline(canonical, X, dynamic=dynamic)
    assert "captured with 8 elements, a length that may vary" in reason
    module, done = rewrite(lambda x: canonical(x * 0.5), X, dynamic=dynamic)
    details = done.rewrites[0].details
    assert details["algorithm"] == "auto" and "from the captured length 8" in details["decided"]
    longer = torch.randn(2, 4, 77)
    torch.testing.assert_close(module(longer), torch.softmax(longer * 0.5, -1))


def test_the_algorithm_can_be_named():
    for algorithm in ("online", "three_pass", "two_pass"):
        assert fused(canonical, X, algorithm=algorithm)[0]["algorithm"] == algorithm


def test_the_rewritten_site_runs_its_kernel():
    module, _ = rewrite(lambda x, m: canonical((x * 0.5).masked_fill(m, -INF)), X, MASK)
    (node,) = softmaxes(module)
    node.kwargs = {**node.kwargs, "target": "triton-interpret"}
    module.recompile()
    expected = torch.softmax((X * 0.5).masked_fill(MASK, -INF), -1)
    torch.testing.assert_close(module(X, MASK), expected, equal_nan=True)


def test_options_are_checked():
    assert TwoPassSoftmax.exactness is Exactness.REASSOCIATED and TwoPassSoftmax.cli_name() == "two-pass-softmax"
    for options in ({"row_bytes": -1}, {"row_bytes": "many"}, {"algorithm": "fast"}):
        with pytest.raises(BadPassOption, match=next(iter(options))):
            TwoPassSoftmax(**options)
