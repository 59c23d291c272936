"""The abstract interpreter: derived expressions against the tensors torch computes, on random programs."""

from __future__ import annotations

import math

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from tilewright.codegen import symbols
from tilewright.frontend.raising.rules import Facts
from tilewright.frontend.raising.symbolic import Cases, Interpreter
from tilewright.passes.view import GraphView


def traced(function, *args):
    graph = make_fx(function, tracing_mode="fake", pre_dispatch=True)(*args)
    interpreter = Interpreter(graph.graph, Facts(GraphView(graph)).number)
    (output,) = graph.graph.output_node().all_input_nodes
    return interpreter, output


def evaluate(element, values):
    """The element at concrete positions: every symbol has a number, nothing may be left over."""
    if isinstance(element, Cases):
        chosen = [item for item, condition in element.items if condition.subs(values) == sympy.true]
        assert len(chosen) == 1, "conditions are exclusive and exhaustive"
        item = chosen[0]
        return float(item) if isinstance(item, float) else int(item.subs(values)) if hasattr(item, "subs") else item
    return bool(element.subs(values))


numbers = st.integers(-3, 5)


@st.composite
def integer_programs(draw, depth=2):
    """A function of (rows, columns) index tensors that gives an integer tensor."""
    kind = draw(st.sampled_from(["row", "column", "add", "sub", "mul", "where", "neg", "abs", "mod", "div", "cast"]))
    if depth == 0 or kind in ("row", "column"):
        return (lambda r, c: r) if kind != "column" else (lambda r, c: c)
    left, number = draw(integer_programs(depth=depth - 1)), draw(numbers)
    if kind == "add":
        return lambda r, c: left(r, c) + number
    if kind == "mul":
        return lambda r, c: left(r, c) * number
    if kind == "neg":
        return lambda r, c: -left(r, c)
    if kind == "abs":
        return lambda r, c: left(r, c).abs()
    if kind == "mod":
        return lambda r, c: left(r, c) % (abs(number) + 1)
    if kind == "div":
        return lambda r, c: left(r, c) // (abs(number) + 1)
    if kind == "cast":
        return lambda r, c: left(r, c).to(torch.int32).to(torch.int64)
    right = draw(integer_programs(depth=depth - 1))
    if kind == "sub":
        return lambda r, c: left(r, c) - right(r, c)
    condition = draw(boolean_programs(depth=0))
    return lambda r, c: torch.where(condition(r, c), left(r, c), right(r, c))


@st.composite
def boolean_programs(draw, depth=2):
    """A function of index tensors that gives a mask."""
    kind = draw(
        st.sampled_from(["compare", "compare", "number", "and", "or", "xor", "not", "tril", "triu", "views", "fill"])
    )
    if depth == 0 or kind in ("compare", "number"):
        name = draw(st.sampled_from(["lt", "le", "gt", "ge", "eq", "ne"]))
        left = draw(integer_programs(depth=depth))
        if kind == "number":
            number = draw(numbers)
            return lambda r, c: getattr(torch, name)(left(r, c), number)
        right = draw(integer_programs(depth=depth))
        return lambda r, c: getattr(torch, name)(left(r, c), right(r, c))
    left = draw(boolean_programs(depth=depth - 1))
    if kind == "not":
        return lambda r, c: ~left(r, c)
    if kind == "views":
        return lambda r, c: full(left(r, c), r, c)[None, None].permute(0, 1, 3, 2).mT.squeeze(0).reshape(r.shape[0], -1)
    if kind in ("tril", "triu"):
        diagonal = draw(numbers)
        return lambda r, c: getattr(torch, kind)(full(left(r, c), r, c), diagonal)
    right = draw(boolean_programs(depth=depth - 1))
    if kind == "fill":
        return lambda r, c: (
            torch.zeros(r.shape[0], c.shape[1]).masked_fill(left(r, c), 1.0).masked_fill(right(r, c), 0.0) > 0.5
        )
    join = {"and": torch.logical_and, "or": torch.bitwise_or, "xor": torch.logical_xor}[kind]
    return lambda r, c: join(left(r, c), right(r, c))


def full(mask, r, c):
    return mask.expand(r.shape[0], c.shape[1])


@given(boolean_programs(), st.integers(2, 5), st.integers(2, 5))
def test_programs_evaluate_to_what_torch_computes(program, rows, columns):
    """Random programs over positions: the derived expression at every position against the tensor itself."""

    def function():
        return full(program(torch.arange(rows)[:, None], torch.arange(columns)[None, :]), *indices())

    def indices():
        return torch.arange(rows)[:, None], torch.arange(columns)[None, :]

    expected = function()
    interpreter, output = traced(function)
    element = interpreter.element(output, (symbols.Q, symbols.K))
    assert not interpreter.reads, "positions alone are no data"
    for i in range(rows):
        for j in range(columns):
            assert evaluate(element, {symbols.Q: i, symbols.K: j}) == bool(expected[i, j]), (element, i, j)


@given(st.lists(st.integers(1, 3), min_size=2, max_size=4), st.data())
def test_reshapes_of_positions(sizes, data):
    """A reshape to any factorization and back keeps every element in place."""
    total = math.prod(sizes)
    target = data.draw(st.permutations(sizes))

    def function():
        return torch.arange(total).reshape(sizes).reshape(target) * 2

    expected = function()
    interpreter, output = traced(function)
    index = sympy.symbols(f"i:{len(target)}", integer=True, nonnegative=True)
    element = interpreter.element(output, index)
    for position in torch.cartesian_prod(*(torch.arange(s) for s in target)).reshape(-1, len(target)).tolist():
        values = dict(zip(index, position, strict=True))
        actual = evaluate(element, values) if not interpreter.reads else None
        assert actual is None or actual == expected[tuple(position)].item()


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda: torch.arange(6).cumsum(0), None),
        (lambda: torch.ones(6, dtype=torch.int64).cumsum(0), "i + 1"),
        (lambda: (torch.arange(6) >= 0).cumsum(0), "i + 1"),
        (lambda: torch.diff(torch.arange(6) * 3), "3"),
        (lambda: torch.arange(2, 14, 2)[1:-1], "2*i + 4"),
        (lambda: torch.arange(6)[-3:], "i + 3"),
        (lambda: torch.arange(6).flip(0), None),
        (lambda: torch.arange(6, dtype=torch.uint8) - 1, None),
        (lambda: torch.arange(6).to(torch.int16) * 30000, None),
    ],
)
def test_integers(function, expected):
    """None: not followed, an element of data. uint8 and int16 wrap, so nothing is claimed about them."""
    interpreter, output = traced(function)
    i = sympy.Symbol("i", integer=True, nonnegative=True)
    single = interpreter.element(output, (i,)).single
    if expected is None:
        assert interpreter.reads
    else:
        assert sympy.expand(single - sympy.sympify(expected, {"i": i})) == 0


def test_data_is_read_where_it_is():
    def function(mask):
        batch = torch.arange(2)[:, None, None]
        return mask[batch, torch.arange(3)[None, None, :] + 1].bool() & torch.ones(2, 4, 3, dtype=torch.bool)

    interpreter, output = traced(function, torch.ones(2, 8, dtype=torch.int64))
    b, i, j = sympy.symbols("b i j", integer=True, nonnegative=True)
    element = interpreter.element(output, (b, i, j))
    (name,) = interpreter.reads
    assert str(element) == f"Ne({name}(b, j + 1), 0)"


def test_constants_round_as_in_the_model():
    """(1 - mask) * finfo.min in bfloat16 is bfloat16's minimum, not float32's."""

    def function():
        mask = torch.ones(3, 3, dtype=torch.bfloat16).tril()
        return (1.0 - mask) * torch.finfo(torch.bfloat16).min * 0.3

    interpreter, output = traced(function)
    element = interpreter.element(output, (symbols.Q, symbols.K))
    values = sorted(item for item, _ in element.items)
    assert values[0] == (torch.tensor(torch.finfo(torch.bfloat16).min, dtype=torch.bfloat16) * 0.3).item()
