"""softmax and log_softmax: ATen forms and hand-written exponentials; other quotients are left alone."""

import math

import pytest
import torch
from raise_cases import counts, nodes, raise_function, trace

from tilewright.frontend.raising import raise_graph
from tilewright.passes.view import arguments

X = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)) * 4

ATEN = {
    "softmax": (lambda x: torch.softmax(x, 1), 1, False, None),
    "log_softmax": (lambda x: torch.log_softmax(x, -1), -1, True, None),
    "softmax with a dtype": (lambda x: torch.softmax(x, -1, dtype=torch.float64), -1, False, torch.float64),
    "_softmax": (lambda x: torch.ops.aten._softmax(x, 2, False), 2, False, None),
    "_log_softmax": (lambda x: torch.ops.aten._log_softmax(x, 0, False), 0, True, None),
    "special.softmax": (lambda x: torch.special.softmax(x, -1), -1, False, None),
    "special.log_softmax": (lambda x: torch.special.log_softmax(x, -1), -1, True, None),
}


@pytest.mark.parametrize("name", ATEN)
def test_aten_forms(name):
    function, dim, log, dtype = ATEN[name]
    module, result = raise_function(function, X)
    assert counts(result) == {"softmax": 1} and not result.near_misses
    given = arguments(nodes(module, "softmax")[0])
    assert (given["dim"], given["log"], given["dtype"]) == (dim, log, dtype)
    assert given["scale"] == 1.0 and given["bias"] is None


def shifted(x, dim, keepdim=True):
    top = x.max(dim, keepdim=keepdim)[0]
    return x - (top if keepdim else top.unsqueeze(dim))


WRITTEN = {
    "exp over sum": lambda x, d: x.exp() / x.exp().sum(d, keepdim=True),
    "one exp": lambda x, d: (e := x.exp()) / e.sum(d, keepdim=True),
    "amax": lambda x, d: (e := (x - x.amax(d, keepdim=True)).exp()) / e.sum(d, keepdim=True),
    "detached amax": lambda x, d: (e := (x - x.amax(d, keepdim=True).detach()).exp()) / e.sum(d, keepdim=True),
    "max of detached": lambda x, d: (e := (x - x.detach().amax(d, True)).exp()) / e.sum(d, keepdim=True),
    "max with indices": lambda x, d: (e := shifted(x, d).exp()) / e.sum(d, keepdim=True),
    "dropped and put back": lambda x, d: (e := shifted(x, d, False).exp()) / e.sum(d).unsqueeze(d),
    "times the reciprocal": lambda x, d: (e := shifted(x, d).exp()) * e.sum(d, keepdim=True).reciprocal(),
    "another shift": lambda x, d: (e := (x - 1).exp()) / e.sum(d, keepdim=True),
}
WRITTEN_LOG = {
    "logsumexp": lambda x, d: x - x.logsumexp(d, keepdim=True),
    "logsumexp put back": lambda x, d: x - x.logsumexp(d).unsqueeze(d),
    "log of the sum": lambda x, d: x - x.exp().sum(d, keepdim=True).log(),
    "shifted": lambda x, d: (y := shifted(x, d)) - y.exp().sum(d, keepdim=True).log(),
    "log put back": lambda x, d: (y := shifted(x, d)) - y.exp().sum(d).log().unsqueeze(d),
}


@pytest.mark.parametrize("dim", [-1, 1])
@pytest.mark.parametrize("name", [*WRITTEN, *WRITTEN_LOG])
def test_written_by_hand(name, dim):
    log = name in WRITTEN_LOG
    function = (WRITTEN_LOG if log else WRITTEN)[name]
    if name == "exp over sum":
        # Two exponentials, each used once: not one intermediate, and not raised.
        _, result = raise_function(lambda x: function(x, dim), X)
        assert counts(result) == {}
        return
    module, result = raise_function(lambda x: function(x, dim), X)
    assert counts(result) == {"softmax": 1} and not result.near_misses
    given = arguments(nodes(module, "softmax")[0])
    assert given["dim"] == dim and given["log"] == log
    if name != "another shift":
        assert given["x"].op == "placeholder"


def test_a_row_that_is_all_minus_infinity_stays_nan():
    x = X.clone()
    x[0, 0] = -math.inf
    raise_function(lambda x: WRITTEN["amax"](x, -1), x)


def kept(x):
    e = (x - x.amax(-1, keepdim=True)).exp()
    total = e.sum(-1, keepdim=True)
    return e / total, total


def maximum_kept(x):
    top = x.amax(-1, keepdim=True)
    e = (x - top).exp()
    return e / e.sum(-1, keepdim=True), top


S = torch.randn(5, 5, generator=torch.Generator().manual_seed(1))
NEAR = {
    "sum without keepdim": (lambda x: (e := x.exp()) / e.sum(-1), S),
    "sum put back elsewhere": (lambda x: (e := x.exp()) / e.sum(-1).unsqueeze(0), S),
    "sum over all": (lambda x: (e := x.exp()) / e.sum(), S),
    "sum over two": (lambda x: (e := x.exp()) / e.sum((-1, -2), keepdim=True), X),
    "maximum over another dimension": (lambda x: (e := (x - x.amax(0, True)).exp()) / e.sum(1, keepdim=True), S),
    "maximum without keepdim": (lambda x: (e := (x - x.amax(-1)).exp()) / e.sum(-1, keepdim=True), S),
    "maximum over all": (lambda x: (e := (x - x.max()).exp()) / e.sum(-1, keepdim=True), S),
    "sum in another dtype": (lambda x: (e := x.exp()) / e.sum(-1, keepdim=True, dtype=torch.float64), S),
    "logsumexp without keepdim": (lambda x: x - x.logsumexp(-1), S),
    "logsumexp over two": (lambda x: x - x.logsumexp((0, 1), keepdim=True), S),
    "sum used elsewhere": (kept, S),
    "maximum used elsewhere": (maximum_kept, S),
}
NOTHING_ALIKE = {
    "sum of another tensor": lambda x: x.exp() / x.exp2().sum(-1, keepdim=True),
    "sum over exp": lambda x: (e := x.exp()).sum(-1, keepdim=True) / e,
    "exp2": lambda x: (e := x.exp2()) / e.sum(-1, keepdim=True),
    "mean": lambda x: (e := x.exp()) / e.mean(-1, keepdim=True),
    "logsumexp of another": lambda x: x - x.sin().logsumexp(-1, keepdim=True),
    "logsumexp minus x": lambda x: x.logsumexp(-1, keepdim=True) - x,
    "plus one": lambda x: (e := x.exp()) / (1 + e.sum(-1, keepdim=True)),
}


@pytest.mark.parametrize("name", NEAR)
def test_look_alikes_are_near_misses(name):
    _, result = raise_function(*NEAR[name])
    assert counts(result) == {}
    assert [site.op for site, _, _ in result.near_misses] == ["softmax"]


@pytest.mark.parametrize("name", NOTHING_ALIKE)
def test_what_is_no_softmax_is_not_raised(name):
    _, result = raise_function(NOTHING_ALIKE[name], S)
    assert counts(result) == {}


def test_log_of_softmax_stays_a_log_of_a_softmax():
    module, result = raise_function(lambda x: x.softmax(-1).log(), S)
    assert counts(result) == {"softmax": 1}
    assert not arguments(nodes(module, "softmax")[0])["log"]
    assert any(node.target is torch.ops.aten.log.default for node in module.graph.nodes)


def test_gradients_through_a_raised_softmax():
    module = trace(lambda x: WRITTEN["amax"](x, -1), S)
    raise_graph(module)
    x = S.double().requires_grad_()
    assert torch.autograd.gradcheck(module, (x,))
