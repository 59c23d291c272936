"""How raising edits a graph: writes in place, autocast, dead code, assertions, reports without noise."""

import torch
from raise_cases import assert_close, counts, export, nodes, raise_function, trace

from tilewright.frontend.capture import export_model
from tilewright.frontend.raising import raise_graph
from tilewright.frontend.raising.rules import Decline, Facts, NearMiss, Raised
from tilewright.passes.base import Builder
from tilewright.passes.view import GraphView

aten = torch.ops.aten
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class SinRule:
    """Calls every sine a softmax, or says something else about it: what the rule answers is the test's."""

    op = "softmax"
    anchors = (aten.sin.default,)

    def __init__(self, answer):
        self.answer = answer

    def match(self, node, view, facts):
        return self.answer(node)


def test_a_replacement_of_another_dtype_or_shape_is_never_made():
    wider = lambda node: Raised("softmax", (node.args[0], -1), {"dtype": torch.float64}, (node,), node)  # noqa: E731
    shorter = lambda node: Raised("gated_mlp", (), {"activation": "silu"}, (node,), node, before=row)  # noqa: E731

    def row(builder: Builder):
        x = builder.call(aten.select.int, builder.before.args[0], 0, 0)
        return {"gate": x, "up": x}

    for answer, reason in ((wider, "torch.float64"), (shorter, "shape")):
        module = trace(lambda x: x.sin() + 1, X)
        code = module.code
        result = raise_graph(module, [SinRule(answer)])
        assert result.sites == [] and reason in result.near_misses[0][2]
        assert module.code == code


def test_answers_reach_the_result_once_each():
    function = lambda x: x.sin() + x.cos().sin()  # noqa: E731
    declined = raise_graph(trace(function, X), [SinRule(lambda node: Decline("not today"))] * 2).declined
    assert [(site.id, reason) for site, reason in declined] == [("softmax", "not today"), ("softmax#2", "not today")]
    missed = raise_graph(trace(function, X), [SinRule(lambda node: NearMiss(node, "close"))] * 2).near_misses
    assert [(site.id, where) for site, where, _ in missed] == [
        ("softmax", "sin = aten.sin.default"),
        ("softmax#2", "sin_1 = aten.sin.default"),
    ]
    assert raise_graph(trace(function, X), [SinRule(lambda node: None)]).near_misses == []


def test_a_near_miss_is_forgotten_when_another_rule_takes_the_node():
    rules = [
        SinRule(lambda node: NearMiss(node, "close")),
        SinRule(lambda node: Raised("softmax", (node.args[0], -1), {}, (node,), node)),
    ]
    result = raise_graph(trace(lambda x: x.sin(), X), rules)
    assert len(result.sites) == 1 and result.near_misses == []


def test_autocast_regions_keep_their_dtypes():
    class Mixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear, self.norm = torch.nn.Linear(6, 6), torch.nn.LayerNorm(6)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                y = self.norm(self.linear(x)).softmax(-1)
            return self.linear(y.float())

    model = Mixed()
    module = export_model(model, (X,), {}).module
    result = raise_graph(module)
    assert counts(result) == {"linear": 2, "layer_norm": 1, "softmax": 1} and not result.near_misses
    assert [node.meta["val"].dtype for node in nodes(module, "linear")] == [torch.bfloat16, torch.float32]
    assert torch.equal(module(X)[0], model(X))


def test_a_site_across_the_border_of_an_autocast_region_is_left_alone():
    class Across(torch.nn.Module):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
            return x * r

    module = export_model(Across(), (X,), {}).module
    before = module(X)
    result = raise_graph(module)
    assert counts(result) == {} and "autocast" in result.near_misses[0][2]
    assert_close(module(X), before)


def test_a_write_to_an_unrelated_tensor_does_not_matter():
    def function(x, y):
        z = y + 0
        r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        z.add_(1)
        return x * r, z

    _, result = raise_function(function, X, X.clone())
    assert counts(result) == {"rms_norm": 1}


def test_a_write_through_a_view_of_the_input_stops_raising():
    def function(x):
        y = x + 0
        total = y.exp().sum(-1, keepdim=True).log()
        y[:, 0].zero_()
        return y - total

    _, result = raise_function(function, X)
    assert counts(result) == {} and "in place" in result.near_misses[0][2]


def test_assertions_about_removed_nodes_go_and_others_stay():
    class Model(torch.nn.Module):
        def forward(self, x):
            h = x.to(torch.float32)
            h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
            return h.to(x.dtype).sin().to(torch.float64)

    module = export(Model(), X.bfloat16())
    raise_graph(module)
    left = [node.args[0] for node in module.graph.nodes if node.target is aten._assert_tensor_metadata.default]
    assert all(node.op == "placeholder" or len(node.users) > 1 for node in left)
    assert len(nodes(module, "rms_norm")) == 1
    assert not any(node.target is aten.rsqrt.default for node in module.graph.nodes)


def test_facts_know_constant_tensors():
    module = export(torch.nn.Linear(6, 6), X)
    facts = Facts(GraphView(module))
    builder = Builder(facts.view, next(n for n in module.graph.nodes if n.op == "call_function"))
    assert facts.number(builder.call(aten.full.default, [], 0.5)) == 0.5
    assert facts.number(builder.call(aten.full.default, [2], 0.5)) is None
    assert facts.number(builder.call(aten.scalar_tensor.default, 3)) == 3
    assert facts.number(2) == 2 and facts.number(True) is None
    assert facts.number(next(n for n in module.graph.nodes if n.op == "get_attr")) is None


def test_builders_infer_each_kind_of_call_once():
    module = trace(lambda x: x.sin().softmax(-1) + x.cos().softmax(-1), X)
    view = GraphView(module)
    calls = [node for node in module.graph.nodes if node.target is aten.softmax.int]
    made = [Builder(view, node).call(torch.ops.tilewright.softmax.default, node.args[0], dim=-1) for node in calls]
    assert len(view.results) == 1
    assert [node.meta["val"].shape for node in made] == [X.shape] * 2
    other = Builder(view, calls[0]).call(torch.ops.tilewright.softmax.default, calls[0].args[0], dim=0)
    assert len(view.results) == 2 and other.kwargs == {} and other.args[1] == 0


def test_metadata_follows_symbolic_sizes():
    module = trace(lambda x: x.softmax(-1), X, symbolic=True)
    raise_graph(module)
    (node,) = nodes(module, "softmax")
    assert all(isinstance(size, torch.SymInt) for size in node.meta["val"].shape)
    y = torch.randn(9, 2)
    assert_close(module(y), y.softmax(-1))
