"""The pattern matcher: constants are never wildcards, commutation backtracks, misses say where and why."""

import pytest
import torch
from raise_cases import trace

from tilewright.passes.matcher import Match, Matcher, Miss, Number, Through, Var, call, either
from tilewright.passes.view import GraphView, arguments, is_identity, same_size

aten = torch.ops.aten
X = torch.randn(3, 4)


def match(pattern, function, *inputs, private=True, skip=None, root=None):
    """Match ``pattern`` at the last call of the traced ``function`` or at the node named ``root``."""
    module = trace(function, *inputs)
    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    node = calls[-1] if root is None else next(n for n in calls if n.name == root)
    return Matcher(GraphView(module), skip).match(pattern, node, private=private)


def test_a_literal_number_must_be_equal():
    pattern = call(aten.mul.Tensor, Var("x"), 0.5)
    assert isinstance(match(pattern, lambda x: x * 0.5, X), Match)
    miss = match(pattern, lambda x: x * 0.25, X)
    assert isinstance(miss, Miss)
    assert "0.25" in miss.reason and "0.5" in miss.reason


def test_one_and_one_point_zero_are_the_same_number_but_true_is_not():
    assert isinstance(match(call(aten.mul.Tensor, Var("x"), 1.0), lambda x: x * 1, X), Match)
    pattern = call(aten.mean.dim, Var("x"), [-1], 1)
    assert isinstance(match(pattern, lambda x: x.mean(-1, keepdim=True), X), Miss)
    pattern = call(aten.mean.dim, Var("x"), [-1], True)
    assert isinstance(match(pattern, lambda x: x.mean(-1, keepdim=True), X), Match)


def test_a_captured_number_is_handed_over():
    found = match(call(aten.mul.Tensor, Var("x"), Number("scale")), lambda x: x * 0.125, X)
    assert isinstance(found, Match)
    assert found["scale"] == 0.125


@pytest.mark.parametrize("factor", [lambda x: x.sum(), lambda x: x])
def test_a_tensor_is_no_number(factor):
    miss = match(call(aten.mul.Tensor, Var("x"), Number("scale")), lambda x: x * factor(x), X)
    assert isinstance(miss, Miss) and "scale" in miss.reason


def test_a_bool_is_no_number():
    miss = match(call(aten.mean.dim, Var("x"), [-1], Number("n")), lambda x: x.mean(-1, keepdim=True), X)
    assert isinstance(miss, Miss) and "n is not a number" in miss.reason


def test_one_name_is_one_value():
    pattern = call(aten.mul.Tensor, Var("x"), Var("x"))
    assert isinstance(match(pattern, lambda x, y: x * x, X, X.clone()), Match)
    miss = match(pattern, lambda x, y: x * y, X, X.clone())
    assert isinstance(miss, Miss) and miss.reason == "x is two different values"


def test_commuting_operands_backtrack():
    inner = call(aten.sin.default, Var("x"))
    pattern = call(aten.add.Tensor, call(aten.mul.Tensor, inner, Var("y"), commutes=True), Var("y"), commutes=True)
    assert isinstance(match(pattern, lambda x, y: y + y * x.sin(), X, X.clone()), Match)
    assert isinstance(match(pattern, lambda x, y: x.sin() * y + y, X, X.clone()), Match)
    assert isinstance(match(pattern, lambda x, y: x.sin() * y + x, X, X.clone()), Miss)


def test_an_argument_the_pattern_does_not_mention_must_be_the_default():
    pattern = call(aten.add.Tensor, Var("x"), Var("y"))
    assert isinstance(match(pattern, lambda x, y: torch.add(x, y), X, X.clone()), Match)
    miss = match(pattern, lambda x, y: torch.add(x, y, alpha=2), X, X.clone())
    assert isinstance(miss, Miss) and "alpha=2" in miss.reason
    pattern = call(aten.add.Tensor, Var("x"), Var("y"), alpha=Number("alpha"))
    assert match(pattern, lambda x, y: torch.add(x, y, alpha=2), X, X.clone())["alpha"] == 2


def test_an_inner_node_used_elsewhere_is_refused_unless_asked():
    def function(x):
        s = x.sin()
        return s, s * 2

    pattern = call(aten.mul.Tensor, call(aten.sin.default, Var("x")), 2)
    miss = match(pattern, function, X)
    assert isinstance(miss, Miss) and miss.node.name == "sin" and "used elsewhere" in miss.reason
    assert isinstance(match(pattern, function, X, private=False), Match)


def test_either_takes_the_first_that_matches():
    pattern = either(call(aten.sin.default, Var("x")), call(aten.cos.default, Var("x")))
    assert isinstance(match(pattern, lambda x: x.cos(), X), Match)
    assert isinstance(match(pattern, lambda x: x.tan(), X), Miss)


def test_through_looks_behind_what_it_is_told_to():
    pattern = Through((aten.to.dtype,), call(aten.sin.default, Var("x")), name="casts")
    found = match(pattern, lambda x: x.sin().to(torch.float64).to(torch.float32), X)
    assert isinstance(found, Match) and len(found["casts"]) == 2 and len(found.covered) == 3
    narrow = Through((aten.to.dtype,), call(aten.sin.default, Var("x")), where=lambda n: n.args[1] == torch.float64)
    assert isinstance(match(narrow, lambda x: x.sin().to(torch.float16), X), Miss)


def test_skipping_identities_covers_them_and_binds_behind_them():
    function = lambda x: (x.contiguous() * x).clone().sin()  # noqa: E731
    pattern = call(aten.sin.default, call(aten.mul.Tensor, Var("x"), Var("x")))
    assert isinstance(match(pattern, function, X), Miss)
    found = match(pattern, function, X, skip=is_identity)
    assert isinstance(found, Match)
    assert found["x"].op == "placeholder"
    assert [node.name for node in found.covered] == ["mul", "clone", "sin"]


def test_a_miss_names_the_deepest_node_reached():
    pattern = call(aten.exp.default, call(aten.mul.Tensor, call(aten.sin.default, Var("x")), 2.0))
    miss = match(pattern, lambda x: (x.cos() * 2.0).exp(), X)
    assert isinstance(miss, Miss) and miss.node.name == "cos" and miss.depth == 2
    miss = match(pattern, lambda x: x.tan(), X)
    assert isinstance(miss, Miss) and miss.depth == 0


def test_lists_match_element_by_element():
    pattern = call(aten.cat.default, [call(aten.neg.default, Var("a")), Var("b")], -1)
    assert isinstance(match(pattern, lambda x, y: torch.cat([-x, y], -1), X, X.clone()), Match)
    assert isinstance(match(pattern, lambda x, y: torch.cat([-x, y, y], -1), X, X.clone()), Miss)
    assert isinstance(match(pattern, lambda x, y: torch.cat([-x, y], 0), X, X.clone()), Miss)


def test_a_predicate_tells_its_reason():
    pattern = call(aten.mul.Tensor, Var("x"), Var("c", lambda c: c == 2, "is not two"))
    assert isinstance(match(pattern, lambda x: x * 2, X), Match)
    assert match(pattern, lambda x: x * 3, X).reason == "is not two"


def test_arguments_fills_in_the_schema_defaults():
    module = trace(lambda x: x.softmax(-1), X)
    node = next(n for n in module.graph.nodes if n.op == "call_function")
    assert arguments(node) == {"self": node.args[0], "dim": -1, "dtype": None}


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.to(torch.float32), True),
        (lambda x: x.to(torch.float64), False),
        (lambda x: x.clone(), True),
        (lambda x: x.reshape(3, 4), True),
        (lambda x: x.reshape(4, 3), False),
        (lambda x: x[:, 0:9], True),
        (lambda x: x[:, ::2], False),
        (lambda x: x[:, 1:], False),
        (lambda x: x.expand(3, 4), True),
        (lambda x: torch.dropout(x, 0.0, True), True),
        (lambda x: torch.dropout(x, 0.5, False), True),
        (lambda x: torch.dropout(x, 0.5, True), False),
        (lambda x: x.detach(), False),
        (lambda x: x.transpose(0, 1), False),
    ],
)
def test_identities_are_told_from_changes(function, expected):
    module = trace(lambda x: function(x) * 1, X)
    node = next(n for n in module.graph.nodes if n.target is aten.mul.Tensor).args[0]
    assert is_identity(node) == expected or (expected and node.op == "placeholder")


def test_the_dag_follows_edits():
    module = trace(lambda x: x.sin().cos().exp(), X)
    view = GraphView(module)
    sin, cos, exp = (n for n in module.graph.nodes if n.op == "call_function")
    assert set(view.dag.successors(sin)) == {cos}
    with module.graph.inserting_before(cos):
        tan = module.graph.call_function(aten.tan.default, (sin,))
    view.insert(tan)
    view.replace(cos, tan)
    view.erase(cos)
    assert set(view.dag.successors(sin)) == {tan} and set(view.dag.successors(tan)) == {exp}
    assert cos not in view.dag
    fresh = GraphView(module).dag
    assert set(fresh.edges) == set(view.dag.edges)


def test_symbolic_sizes_compare_without_guards():
    module = trace(lambda x, y: x * 2 + y, torch.randn(3, 5), torch.randn(3, 5), symbolic=True)
    x = next(n for n in module.graph.nodes if n.op == "placeholder").meta["val"]
    before = len(x.fake_mode.shape_env.guards)
    assert same_size(x.shape[0], x.shape[0])
    assert not same_size(x.shape[0], x.shape[1])
    assert not same_size(x.shape[0], x.shape[0] + 1)
    assert len(x.fake_mode.shape_env.guards) == before
