"""Graphs that C++ runs: the same bits as from Python, and Python again wherever C++ cannot be right."""

from __future__ import annotations

import copy
import gc
import math
import operator
import threading
import weakref
from typing import Any

import decoders
import hypothesis
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tilewright as tw
from tilewright.passes import KVCache, Quantize
from tilewright.runtime import compilers, fast_call, graph_executor, settings
from tilewright.runtime.errors import MissingCompiler, UnsupportedKernel
from tilewright.runtime.graph_executor import GraphExecutor

pytest.importorskip("transformers")
aten = torch.ops.aten


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    try:
        compilers.find_cxx()
    except MissingCompiler:
        pytest.skip("there is no C++ compiler")
    assert graph_executor.available()


def executor(module: nn.Module) -> GraphExecutor:
    """Of a module that torch.fx can trace."""
    return GraphExecutor(torch.fx.symbolic_trace(module))


def graph_of(*steps: Any, outputs: int = 1, inputs: int = 1) -> torch.fx.GraphModule:
    """A graph of steps that each get the nodes so far and return (target, args, kwargs)."""
    graph = torch.fx.Graph()
    nodes: list[Any] = [graph.placeholder(f"x{i}") for i in range(inputs)]
    for step in steps:
        target, args, kwargs = step(nodes)
        nodes.append(graph.call_function(target, args, kwargs))
    graph.output(tuple(nodes[-outputs:]))
    return torch.fx.GraphModule({}, graph)


@torch.no_grad()
def agree(module: torch.fx.GraphModule, *calls: tuple[torch.Tensor, ...]) -> GraphExecutor:
    """Every call gives what the module gives. The first goes through Python, so there must be two."""
    run = GraphExecutor(module)
    for call in calls:
        for _ in range(2):
            for got, want in zip(run(*call), module(*call), strict=True):
                assert got is None if want is None else torch.equal(got, want)
    assert run.problem is None and run._loaded is not None
    return run


def test_views_sizes_and_arithmetic_follow_the_shapes():
    module = graph_of(
        lambda n: (aten.sym_size.int, (n[0], 0), {}),
        lambda n: (aten.sym_size.int, (n[0], 1), {}),
        lambda n: (operator.mul, (n[1], n[2]), {}),
        lambda n: (operator.add, (n[3], 1), {}),
        lambda n: (operator.sub, (n[4], 1), {}),
        lambda n: (operator.floordiv, (n[5], 2), {}),
        lambda n: (aten.view.default, (n[0], [2, n[6]]), {}),
        lambda n: (aten.split_with_sizes.default, (n[7], [1, 1], 0), {}),
        lambda n: (operator.getitem, (n[8], 1), {}),
        lambda n: (aten.mul.Tensor, (n[9], 2.5), {}),
        lambda n: (aten.cat.default, ([n[10], n[9]], -1), {}),
        lambda n: (aten.sum.dim_IntList, (n[11], [0]), {"keepdim": True}),
    )
    agree(module, (torch.randn(4, 3),), (torch.randn(2, 7),), (torch.randn(6, 1),))


def test_every_kind_of_argument():
    module = graph_of(
        lambda n: (aten.to.dtype, (n[0], torch.float64), {}),
        lambda n: (aten.arange.start, (0, 3), {"dtype": torch.int64, "device": torch.device("cpu")}),
        lambda n: (aten.index.Tensor, (n[1], [None, n[2]]), {}),
        lambda n: (aten.clone.default, (n[3],), {"memory_format": torch.contiguous_format}),
        lambda n: (aten.max.dim, (n[4], 1), {}),
        lambda n: (operator.getitem, (n[5], 1), {}),
        lambda n: (aten.gelu.default, (n[4],), {"approximate": "tanh"}),
        lambda n: (aten.clamp.default, (n[7], None, 0.5), {}),
        lambda n: (aten.sum.default, (n[8],), {}),
        lambda n: (aten.full.default, ([2, 2], 7), {"layout": torch.strided, "pin_memory": False}),
        outputs=5,
    )
    agree(module, (torch.randn(2, 5),))


@given(data=st.data())
@hypothesis.settings(max_examples=150, deadline=None)
def test_any_row_of_views(data):
    """Views in any order, of what is a view of something else, some read twice, some that need a copy."""
    steps: list[Any] = []
    shapes = [[2, 3, 4]]
    for _ in range(data.draw(st.integers(1, 7))):
        source = data.draw(
            st.sampled_from([len(shapes) - 1, len(shapes) - 1, data.draw(st.integers(0, len(shapes) - 1))])
        )
        if not (shape := shapes[source]):
            continue
        rank = len(shape)
        kind = data.draw(st.sampled_from(["transpose", "unsqueeze", "view", "split", "neg"]))
        dim = data.draw(st.integers(-rank, rank - 1))
        if kind == "transpose":
            other = data.draw(st.integers(-rank, rank - 1))
            steps.append(lambda n, i=source, a=dim, b=other: (aten.transpose.int, (n[i], a, b), {}))
            shape = list(shape)
            shape[dim], shape[other] = shape[other], shape[dim]
            shapes.append(shape)
        elif kind == "unsqueeze":
            at = data.draw(st.integers(-rank - 1, rank))
            steps.append(lambda n, i=source, at=at: (aten.unsqueeze.default, (n[i], at), {}))
            shape = list(shape)
            shape.insert(at if at >= 0 else at + rank + 1, 1)
            shapes.append(shape)
        elif kind == "view":
            wanted = data.draw(st.sampled_from([[-1], [2, -1], [-1, 2], [1, -1, 1]]))
            size = math.prod(shape)
            if size % 2 and 2 in wanted:
                continue
            steps.append(lambda n, i=source, w=wanted: (aten.reshape.default, (n[i], w), {}))
            shapes.append([size // abs(math.prod(wanted)) if one == -1 else one for one in wanted])
        elif kind == "split" and shape[dim] > 1:
            parts = [1, shape[dim] - 1]
            steps.append(lambda n, i=source, p=parts, d=dim: (aten.split_with_sizes.default, (n[i], p, d), {}))
            shapes.append([])
            at = len(steps)
            for index in data.draw(st.sampled_from([[0], [1], [0, 1], [-1, 0]])):
                steps.append(lambda n, i=at, k=index: (operator.getitem, (n[i], k), {}))
                shapes.append([*shape[: dim % rank], parts[index], *shape[dim % rank + 1 :]])
        elif kind == "neg":
            steps.append(lambda n, i=source: (aten.neg.default, (n[i],), {}))
            shapes.append(shape)
    module = graph_of(*steps)
    if shapes[-1]:
        agree(module, (torch.randn(2, 3, 4),))


def test_views_that_do_not_fit_say_so():
    split = graph_of(
        lambda n: (aten.split_with_sizes.default, (n[0], [1, 2]), {}), lambda n: (operator.getitem, (n[1], 1), {})
    )
    run = agree(split, (torch.randn(3, 2),))
    with torch.no_grad(), pytest.raises(RuntimeError, match="split_with_sizes expects"):
        run(torch.randn(4, 2))
    swapped = graph_of(lambda n: (aten.transpose.int, (n[0], 0, 2), {}))
    run = agree(swapped, (torch.randn(3, 2, 1),))
    with torch.no_grad(), pytest.raises(IndexError, match="Dimension out of range"):
        run(torch.randn(4, 2))
    viewed = graph_of(lambda n: (aten.transpose.int, (n[0], 0, 1), {}), lambda n: (aten.view.default, (n[1], [-1]), {}))
    run = agree(viewed, (torch.randn(3, 1),))
    with torch.no_grad(), pytest.raises(RuntimeError, match="not compatible"):
        run(torch.randn(4, 2))


def test_a_view_shows_the_same_memory():
    run = agree(graph_of(lambda n: (aten.transpose.int, (n[0], 0, 1), {})), (torch.randn(3, 2),))
    x = torch.zeros(3, 2)
    with torch.no_grad():
        run(x)[0][1, 2] = 5
    assert x[2, 1] == 5


def test_a_number_beside_a_tensor_does_not_promote():
    module = graph_of(lambda n: (aten.mul.Tensor, (n[0], 1.5), {}), lambda n: (aten.add.Tensor, (n[1], 3), {}))
    x = torch.randn(3).bfloat16()
    run = agree(module, (x,))
    with torch.no_grad():
        assert run(x)[0].dtype == torch.bfloat16


def test_conversions_that_change_nothing_share_the_value():
    module = graph_of(
        lambda n: (aten.to.dtype, (n[0], torch.float32), {}),
        lambda n: (aten.detach.default, (n[1],), {}),
        lambda n: (aten.add.Tensor, (n[2], n[2]), {}),
        lambda n: (aten.mul.Tensor, (n[3], n[2]), {}),
        outputs=2,
    )
    agree(module, (torch.randn(4),))


def test_outputs_that_are_none():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output((None, graph.call_function(aten.neg.default, (x,)), x))
    agree(torch.fx.GraphModule({}, graph), (torch.randn(2),))


def test_values_die_when_they_were_read_last():
    """Every big value is alive with its successor only."""
    steps = [lambda n: (aten.neg.default, (n[-1],), {})] * 6
    run = agree(graph_of(*steps), (torch.randn(8),))
    x = torch.ones(2**21)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        run(x)
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    assert 0 < most <= 2 * x.nbytes


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("shift", torch.ones(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (aten.add.Tensor(aten.mul.Tensor(x, self.weight), self.shift),)


@torch.no_grad()
def test_changed_and_replaced_weights_are_seen():
    module = torch.fx.symbolic_trace(Weighted())
    run = GraphExecutor(module)
    x = torch.tensor([1.0, 2.0, 3.0])
    for _ in range(2):
        assert torch.equal(run(x)[0], x + 1)
    module.weight.mul_(2)
    assert torch.equal(run(x)[0], 2 * x + 1)
    module.shift = torch.zeros(3)
    for _ in range(2):
        assert torch.equal(run(x)[0], 2 * x)
    module.weight.data = torch.full((3,), 5.0)
    assert torch.equal(run(x)[0], 5 * x)


class Normed(nn.Module):
    """A kernel of ours with a weight, behind a view."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(32) + 0.5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.ops.tilewright.rms_norm.default(aten.transpose.int(x, 0, 1), self.weight, 1e-6, target="cpp"),)


@torch.no_grad()
def test_a_kernel_is_called_anew_for_every_shape_and_stride():
    """An instruction keeps its last plan: other sizes, strides, weights or dropped plans must not get it."""
    module = torch.fx.symbolic_trace(Normed())
    run = GraphExecutor(module)

    def check(x: torch.Tensor) -> None:
        want = torch.nn.functional.rms_norm(x.transpose(0, 1), module.weight.shape, module.weight, 1e-6)
        torch.testing.assert_close(run(x)[0], want)

    shapes = (3, 5, 32), (4, 1, 32), (3, 5, 32), (3, 5, 64), (2, 2, 2, 32)
    for _ in range(2 * fast_call.TRY_EVERY):
        check(torch.randn(3, 5, 32))
    before = fast_call.calls_without_python()
    for _ in range(4):
        check(torch.randn(3, 5, 32))
    assert fast_call.calls_without_python() == before + 4
    for _ in range(2 * fast_call.TRY_EVERY):
        for shape in shapes:
            check(torch.randn(shape)[..., :32])
            check(torch.randn(shape)[..., :32].contiguous())
    fast_call.forget()
    check(torch.randn(3, 5, 32))
    module.weight.data = torch.rand(64)
    for _ in range(2 * fast_call.TRY_EVERY):
        check(torch.randn(3, 5, 64))
    module.weight.data = torch.rand(32)
    with pytest.raises(UnsupportedKernel, match="weight has shape"):
        run(torch.randn(3, 5, 64))
    check(torch.randn(3, 5, 32))
    assert run.problem is None


@torch.no_grad()
def test_weights_die_with_the_executor():
    module = torch.fx.symbolic_trace(Weighted())
    run = GraphExecutor(module)
    for _ in range(2):
        run(torch.ones(3))
    weight = weakref.ref(module.shift)
    del module, run
    gc.collect()
    assert weight() is None


def test_whoever_watches_sees_the_operators():
    run = executor(Weighted())
    x = torch.ones(3)
    with torch.no_grad():
        run(x), run(x)
    x.requires_grad_()
    run(x)[0].sum().backward()
    assert torch.equal(x.grad, torch.ones(3))

    product = graph_of(lambda n: (aten.mm.default, (n[0], n[0]), {}))
    run = agree(product, (torch.randn(4, 4),))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run(torch.randn(4, 4))
    assert counter.get_total_flops() == 2 * 4**3
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert run(torch.randn(4, 4))[0].dtype == torch.bfloat16
    with torch.no_grad():
        compiled = torch.compile(run, backend="eager", fullgraph=True)
        assert torch.equal(compiled(torch.ones(4, 4))[0], torch.full((4, 4), 4.0))


@torch.no_grad()
def test_a_copy_has_its_own_graph():
    run = GraphExecutor(torch.fx.symbolic_trace(Weighted()))
    x = torch.ones(3)
    run(x), run(x)
    other = copy.deepcopy(run)
    run.module.weight.mul_(3)
    del run
    gc.collect()
    for _ in range(2):
        assert torch.equal(other(x)[0], torch.full((3,), 2.0))


def test_inference_mode():
    run = GraphExecutor(
        graph_of(
            lambda n: (aten.transpose.int, (n[0], 0, 1), {}),
            lambda n: (aten.mul.Tensor, (n[1], n[1]), {}),
            lambda n: (aten.add_.Tensor, (n[0], 1), {}),
            outputs=3,
        )
    )
    for _ in range(3):
        with torch.inference_mode():
            x = torch.ones(2, 3)
            shown, product, written = run(x)
            assert torch.equal(x, torch.full((2, 3), 2.0)) and torch.equal(shown, x.T)
            assert torch.equal(product, torch.ones(3, 2)) and torch.equal(written, x)
    with torch.no_grad():
        assert torch.equal(run(x)[1], torch.full((3, 2), 4.0))


@torch.no_grad()
def test_a_profiler_sees_every_kernel():
    compiled = tw.compile(tiny.llama(), "quantize{bits=4},kv-cache{max_length=32}", target="cpp", rest="eager")
    ids = tiny.tokens(1, 4)
    for _ in range(3):
        compiled(ids)
    with torch.profiler.profile() as profile:
        compiled(ids)
    names = [event.name for event in profile.events()]
    assert names.count("tilewright::run_graph") == 1
    assert names.count("tilewright::cached_attention_step") == 2
    assert names.count("tilewright::quantized_linear_forward") == 8


@torch.no_grad()
def test_an_operator_that_fails_says_why():
    run = agree(graph_of(lambda n: (aten.view.default, (n[0], [2, -1]), {})), (torch.randn(4),))
    with pytest.raises(RuntimeError, match="shape '\\[2, -1\\]' is invalid for input of size 3"):
        run(torch.randn(3))
    assert torch.equal(run(torch.arange(6.0))[0], torch.arange(6.0).view(2, 3))


@torch.no_grad()
def test_many_threads():
    steps = [lambda n: (aten.add.Tensor, (n[-1], n[0]), {})] * 20
    run = GraphExecutor(graph_of(*steps))
    wrong = []

    def work(number: int) -> None:
        with torch.no_grad():
            for _ in range(50):
                x = torch.full((4,), float(number))
                if not torch.equal(run(x)[0], 21 * x):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::tilewright.runtime.announce.TilewrightWarning")
def test_what_cpp_cannot_run_stays_in_python():
    run = GraphExecutor(graph_of(lambda n: (aten.mul.Tensor, (n[0], True), {})))
    x = torch.randn(3)
    for _ in range(2):
        assert torch.equal(run(x)[0], x)
    assert run.problem is not None and "True" in run.problem


@pytest.mark.parametrize(
    ("target", "why"),
    [
        (torch.sin, "function of Python"),
        (torch.ops.tilewright.softmax.default, "reference form"),
        (operator.add, None),
        (aten.sin.default, None),
    ],
    ids=["function", "reference", "arithmetic", "operator"],
)
def test_why_not(target, why):
    graph = torch.fx.Graph()
    graph.output((graph.call_function(target, (graph.placeholder("x"), 1)),))
    found = graph_executor.why_not(torch.fx.GraphModule({}, graph))
    assert found is None if why is None else why in str(found)


# Decoders.


def run_of(compiled: Any) -> Any:
    return compiled._decoder().run


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("passes", ["", "quantize{bits=4,group_size=32},"])
def test_decoders_give_the_same_bits(name, passes):
    """A prompt, single tokens, a batch of another size, padding: against the very graph that Python runs."""
    model = decoders.model(name)
    one, other = (
        tw.compile(model, f"{passes}kv-cache{{max_length=32}}", target="cpp", rest="eager", validate=False)
        for _ in range(2)
    )
    assert isinstance(run_of(one), GraphExecutor)
    other._decoder().run = other._decoder().lifted.module
    for batch in (2, 1, 3):
        ids = tiny.tokens(batch, 9)
        mask = torch.ones_like(ids)
        mask[0, :2] = batch == 1
        caches = [None, None]
        for start, stop in ((0, 6), (6, 7), (7, 8), (8, 9)):
            outs = [
                module(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
                for module, cache in zip((one, other), caches, strict=True)
            ]
            caches = [out.past_key_values for out in outs]
            assert torch.equal(outs[0].logits, outs[1].logits)
    assert run_of(one).problem is None and run_of(one)._loaded is not None


def test_auto_takes_it_where_little_but_kernels_is_left(tmp_path):
    model = tiny.llama()
    passes = [Quantize(bits=8, group_size=32), KVCache(max_length=32)]
    compiled = tw.compile(model, passes, validate=False)
    assert compiled.records[0].rest == "eager" and isinstance(run_of(compiled), GraphExecutor)
    settings_ = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    ids = tiny.tokens()
    python = tw.compile(model, passes, validate=False)
    python._decoder().run = python._decoder().lifted.module
    want = python.generate(ids, **settings_)
    assert compiled.generate(ids, **settings_).tolist() == want.tolist()
    tw.save(compiled, tmp_path / "model.tw")
    loaded = tw.load(tmp_path / "model.tw")
    assert isinstance(loaded._decoder.run, GraphExecutor)
    assert loaded.generate(ids, **settings_).tolist() == want.tolist()
    assert loaded._decoder.run.problem is None


class Busy(nn.Module):
    """What is left between its kernels would gain from fusion."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        logits = self.model(input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False).logits
        for _ in range(40):
            logits = torch.sin(logits)
        return logits


@pytest.mark.parametrize("how", ["busy", "inductor", "setting"])
def test_inductor_runs_the_others(how):
    model = Busy(tiny.llama()) if how == "busy" else tiny.llama()
    passes = [Quantize(bits=8, group_size=32), KVCache(max_length=32)]
    with settings.override(fast_calls=how != "setting"):
        compiled = tw.compile(model, passes, rest="inductor" if how == "inductor" else "auto", validate=False)
    assert compiled.records[0].rest == "inductor" and not isinstance(run_of(compiled), GraphExecutor)
