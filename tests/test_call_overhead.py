"""The way from a kernel op to its launch: kept by signature, carried out in C++, and never another function's.

What it costs is measured by ``benchmarks/suites/overhead.py``; here is what it must not get wrong.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from call_toy import ARGTYPES, build, define, expected, fast, make_launch, native
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tilewright.codegen.native import FastCallSpec
from tilewright.runtime import errors, fast_call, load, memory, plans, settings
from tilewright.runtime.native import NativeModule
from tilewright.runtime.ops.registry import LIBRARY


@pytest.fixture(scope="module", autouse=True)
def ready():
    if not fast_call.prepare():
        pytest.fail(f"fast calls cannot be built: {fast_call._module.problem}")


@pytest.fixture(scope="module")
def function(tmp_path_factory):
    return build(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def op(function):
    launch = native(function)
    return define(lambda *args, **kwargs: launch)


@st.composite
def tensors(draw):
    """x of up to 4 dimensions, permuted, sliced, expanded or offset; sizes 0 and 1 included."""
    shape = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    base = torch.randn([2 * n + 1 for n in shape])
    x = base[tuple(slice(draw(st.integers(0, 1)), None, 2) for _ in shape)]
    x = x[tuple(slice(0, n) for n in shape)].permute(draw(st.permutations(range(len(shape)))))
    return x.expand(3, *x.shape) if draw(st.booleans()) and x.dim() < 4 else x


@given(
    tensors(), st.sampled_from(["none", "same", "row"]), st.floats(-4, 4, width=32), st.booleans(), st.text(max_size=9)
)
def test_every_call_gives_what_python_gives(op, x, kind, scale, negate, mode):
    for attempt in range(2 * fast_call.TRY_EVERY):
        x = x + attempt  # other memory, perhaps other strides
        bias = {"none": None, "same": torch.randn(x.shape), "row": torch.randn(x.shape[-1])}[kind]
        out, _ = op(x, bias, scale, mode, negate=negate)
        torch.testing.assert_close(out, expected(x, bias, scale, negate))


def test_steady_calls_do_not_enter_python(op):
    x, bias = torch.randn(3, 5), torch.randn(5)
    assert fast(lambda: op(x, bias, 2.0, "a"), 20) == 20
    with torch.no_grad():
        assert fast(lambda: op(x, bias, 2.0, "a"), 20) == 20
    with torch.inference_mode():
        assert fast(lambda: op(x, bias, 2.0, "a"), 20) == 20


def test_results_are_fresh_tensors_of_the_right_form(op):
    x = torch.randn(3, 5)
    fast(lambda: op(x, None, 2.0, "a"))
    (out, who), (again, _) = op(x, None, 2.0, "a"), op(x, None, 2.0, "a")
    assert (out.shape, out.stride(), who.shape) == ((5, 3), (1, 5), (2,))
    assert out.data_ptr() != again.data_ptr() and not out.requires_grad and out.is_leaf
    assert who.tolist() == [torch.get_num_threads(), 54321]
    assert out._base is None and out._version == 0
    out.add_(1)
    out.resize_(9, 9)


def test_a_result_inside_its_buffer(function):
    launch = native(function, inside=True)
    op = define(lambda *args, **kwargs: launch)
    # Its address is no tensor's own: the launcher stays in Python, and is right.
    assert fast(lambda: op(torch.ones(2, 2), None, 1.0, "a")) == 0
    assert op(torch.ones(2, 2), None, 1.0, "a")[1].tolist() == [torch.get_num_threads(), 54321]


def test_what_differs_has_a_signature_of_its_own(function):
    seen: list[Any] = []
    launch = native(function)
    op = define(lambda *args, **kwargs: seen.append((args, kwargs)) or launch)
    x = torch.randn(4, 4)
    calls = [
        ((x, None, 2.0, "a"), {}),
        ((x.t(), None, 2.0, "a"), {}),
        ((x[:2], None, 2.0, "a"), {}),
        ((x[None], None, 2.0, "a"), {}),
        ((x, x, 2.0, "a"), {}),
        ((x, x[0], 2.0, "a"), {}),
        ((x, None, -2.0, "a"), {}),
        ((x, None, 2.0, "b"), {}),
        ((x, None, 2.0, ""), {}),
        ((x, None, 2.0, "a" * 8), {}),
        ((x, None, 2.0, "a" * 9), {}),
        ((x, None, 2.0, "a"), {"negate": True}),
        ((x, None, 2.0, "a"), {"target": "cpp2"}),
    ]
    for _ in range(3 * fast_call.TRY_EVERY):
        for args, kwargs in calls:
            out, _ = op(*args, **kwargs)
            torch.testing.assert_close(out, expected(*args[:3], kwargs.get("negate", False)))
    assert len(seen) == len(calls)
    for args, kwargs in calls:
        assert fast(lambda args=args, kwargs=kwargs: op(*args, **kwargs), 2) == 2


def test_lists_of_numbers_are_part_of_the_signature(function):
    def choose(x: Tensor, sizes: list[int], more: list[int]) -> Callable[..., Any]:
        total = float(sum(sizes))
        own = types.SimpleNamespace(
            ARGTYPES=ARGTYPES, make_launch=lambda *a: lambda x: make_launch(*a)(x, None, total, False)[0]
        )
        return native(function, own)

    LIBRARY.define("toy_call_lists(Tensor x, int[] sizes, int[] more) -> Tensor")
    fast_call.implement("toy_call_lists", choose, passes=("x",))
    op = torch.ops.tilewright.toy_call_lists.default
    x = torch.randn(3, 4)
    for sizes, more in (([1, 2], []), ([1], [2]), ([], [1, 2]), ([1, 2, 3], []), ([2, 1], [])):
        assert fast(lambda sizes=sizes, more=more: op(x, sizes, more), 16) == 16
        torch.testing.assert_close(op(x, sizes, more), expected(x, None, float(sum(sizes))))


def test_dtypes_are_told_apart(function):
    seen: list[torch.dtype] = []
    launch = native(function)

    def choose(x: Tensor, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        seen.append(x.dtype)
        return launch if x.dtype == torch.float32 else lambda x, *rest: launch(x.float(), *rest)

    op = define(choose)
    x = torch.randn(4, 4)
    for kind in (torch.float32, torch.int32, torch.float64, torch.bool, torch.float16) * (2 * fast_call.TRY_EVERY):
        y = x.to(kind)
        torch.testing.assert_close(op(y, None, 2.0, "a")[0], expected(y.float(), None, 2.0))
    assert sorted(map(str, seen)) == sorted(map(str, set(seen))) and len(seen) == 5


def test_the_same_tensor_twice_is_no_pattern(op):
    x = torch.randn(6, 6)
    assert fast(lambda: op(x, x, 1.5, "twice")) > 0
    y, z = torch.randn(6, 6), torch.randn(6, 6)
    torch.testing.assert_close(op(y, z, 1.5, "twice")[0], expected(y, z, 1.5))


def test_the_number_of_threads_is_the_one_at_the_call(op):
    x = torch.randn(2, 3)
    before = torch.get_num_threads()
    fast(lambda: op(x, None, 1.0, "threads"))
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert op(x, None, 1.0, "threads")[1][0] == count
    finally:
        torch.set_num_threads(before)


def test_big_outputs_come_from_the_pool(op):
    memory.prepare()
    x = torch.randn(1 << 18, 2)
    assert fast(lambda: op(x, None, 1.0, "big")) > 0
    before = memory.statistics()
    out, _ = op(x, None, 1.0, "big")
    assert memory.statistics().reused == before.reused + 1
    torch.testing.assert_close(out, expected(x, None, 1.0))


def test_gradients(op):
    x = torch.randn(3, 4)
    fast(lambda: op(x, None, 2.0, "grad"))
    wanted = x.clone().requires_grad_()
    out, _ = op(wanted, None, 2.0, "grad", negate=True)
    assert out.requires_grad
    (grad,) = torch.autograd.grad(out.sum(), wanted)
    assert torch.equal(grad, torch.full((3, 4), -2.0))
    with torch.no_grad():
        assert not op(wanted, None, 2.0, "grad")[0].requires_grad
    (grad,) = torch.autograd.grad((op(wanted * 3, None, 2.0, "grad")[0] ** 2).sum(), wanted)
    torch.testing.assert_close(grad, 2 * 6 * expected(wanted.detach() * 3, None, 2.0).t())


def test_modes_and_compilers_see_the_op(op):
    x = torch.randn(3, 4)
    fast(lambda: op(x, None, 2.0, "modes"))
    seen: list[Any] = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        op(x, None, 2.0, "modes")
    assert seen == [op]
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda t: op(t, None, 2.0, "modes")[0])(x)
    assert op in [node.target for node in traced.graph.nodes]

    class Model(torch.nn.Module):
        def forward(self, t):
            return op(t, None, 2.0, "modes")[0] + 1

    length = torch.export.Dim("length", min=2, max=64)
    exported = torch.export.export(Model(), (x,), dynamic_shapes=({0: length},))
    y = torch.randn(7, 4)
    torch.testing.assert_close(exported.module()(y), expected(y, None, 2.0) + 1)


def test_opcheck(op):
    x = torch.randn(3, 4)
    fast(lambda: op(x, None, 2.0, "check"))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for sample in (x, x.clone().requires_grad_()):
        assert set(torch.library.opcheck(op, (sample, None, 2.0, "check"), test_utils=tests).values()) == {"SUCCESS"}


def test_an_inductor_graph_takes_the_fast_way(op, fresh_dynamo):
    def chain(x):
        for _ in range(3):
            x = op(x, None, 2.0, "graph")[0]
        return x + 1

    compiled = torch.compile(chain)
    x = torch.randn(4, 4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), chain(x))
        assert fast(lambda: compiled(x), 20) == 60
        y = torch.randn(5, 5)
        torch.testing.assert_close(compiled(y), chain(y))


# Launchers that have no plan.


def without_plan(function: Any, make: Callable[..., Any]) -> None:
    launcher = types.SimpleNamespace(ARGTYPES=ARGTYPES, make_launch=make)
    launch = native(function, launcher)
    op = define(lambda *args, **kwargs: launch)
    for _ in range(3 * fast_call.TRY_EVERY):
        x, bias = torch.randn(4, 6), torch.randn(4, 6)
        torch.testing.assert_close(op(x, bias, 1.25, "a")[0], expected(x, bias, 1.25))
    assert plans.make(launch, [x, bias, 1.25, False], 2) is None
    assert fast(lambda: op(x, bias, 1.25, "a")) == 0


def test_a_launcher_that_copies(function):
    def make(function, spec, empty):
        inner = make_launch(function, spec, empty)
        return lambda x, bias, scale, negate: inner(x.clone(), bias, scale, negate)

    without_plan(function, make)


def test_a_launcher_that_calls_twice(function):
    def make(function, spec, empty):
        inner = make_launch(function, spec, empty)

        def launch(x, bias, scale, negate):
            inner(x, bias, scale, negate)
            return inner(x, bias, scale, negate)

        return launch

    without_plan(function, make)


def test_a_launcher_that_returns_its_own_tensor(function):
    def make(function, spec, empty):
        inner = make_launch(function, spec, empty)

        def launch(x, bias, scale, negate):
            out, who = inner(x, bias, scale, negate)
            return out.clone(), who

        return launch

    without_plan(function, make)


def test_a_launcher_that_passes_addresses_in_an_array(function):
    def make(function, spec, empty):
        def through(threads, x, bias, out, who, layout, *rest):
            pointers = (ctypes.c_int64 * 1)(x)
            held = (ctypes.c_int64 * (len(layout) + 1))(*layout, pointers[0])
            function(threads, x, bias, out, who, held, *rest)

        return make_launch(through, spec, empty)

    without_plan(function, make)


def test_what_is_no_native_launch_stays_in_python():
    op = define(lambda *args, **kwargs: lambda x, bias, scale, negate: (x.t() * scale, torch.zeros(2)))
    x = torch.randn(3, 3)
    assert fast(lambda: op(x, None, 2.0, "a")) == 0
    assert torch.equal(op(x, None, 2.0, "a")[0], x.t() * 2)


# Bookkeeping.


def test_a_launch_is_chosen_once_a_signature_and_again_after_forgetting(function):
    seen: list[Any] = []
    factors = [2.0]

    def choose(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        seen.append(args)
        inner = native(function)
        return inner

    op = define(choose)
    x = torch.randn(3, 3)
    assert fast(lambda: op(x, None, factors[0], "a")) > 0
    assert len(seen) == 1
    for again, change in enumerate((load.forget, settings.reload, fast_call.forget), start=2):
        change()
        op(x, None, 2.0, "a")
        assert len(seen) == again
    with settings.override(autotune=True):
        op(x, None, 2.0, "a")
    assert len(seen) == 5
    assert fast(lambda: op(x, None, factors[0], "a")) > 0


def test_a_choice_that_fails_is_asked_again(function):
    attempts = itertools.count()
    launch = native(function)

    def choose(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        if next(attempts) < 2:
            raise errors.UnsupportedKernel("not now")
        return launch

    op = define(choose)
    for _ in range(2):
        with pytest.raises(errors.UnsupportedKernel, match="not now"):
            op(torch.ones(2, 2), None, 1.0, "a")
    assert op(torch.ones(2, 2), None, 1.0, "a")[0].sum() == 4 * 1.375


def test_more_signatures_than_are_kept(function, monkeypatch):
    monkeypatch.setattr(fast_call, "MAX_SIGNATURES", 16)
    launch = native(function)
    op = define(lambda *args, **kwargs: launch)
    x = torch.randn(2, 2)
    for scale in range(64):
        for _ in range(fast_call.TRY_EVERY + 1):
            out, _ = op(x, None, float(scale), "a")
        torch.testing.assert_close(out, expected(x, None, float(scale)))
    assert all(len(operator.kept) <= 16 for operator in fast_call.operators()[-1:])


def test_more_signatures_than_plans(function):
    """4,096 plans fit on the C++ side."""
    launch = native(function)
    op = define(lambda *args, **kwargs: launch)
    x = torch.randn(2, 2)
    for scale in range(4200):
        for _ in range(fast_call.TRY_EVERY):
            out, _ = op(x, None, float(scale), "a")
    torch.testing.assert_close(out, expected(x, None, 4199.0))
    for scale in (1.0, 4000.0, 4199.0):
        assert fast(lambda scale=scale: op(x, None, scale, "a"), 16) == 16
        torch.testing.assert_close(op(x, None, scale, "a")[0], expected(x, None, scale))


def test_steady_calls_do_not_grow(op):
    x, bias = torch.randn(64, 64), torch.randn(64)

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    fast(lambda: op(x, bias, 2.0, "leak"), 500)
    before = resident()
    for _ in range(5000):
        op(x, bias, 2.0, "leak")
    assert resident() - before < 2**20


def test_threads(op):
    wrong: list[int] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for step in range(150):
            x = torch.randn(1 + (seed + step) % 5, 3, generator=generator)
            scale = float(step % 3)
            if not torch.allclose(op(x, None, scale, "threads")[0], expected(x, None, scale)):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_goes_on(op):
    x = torch.randn(3, 3)
    fast(lambda: op(x, None, 2.0, "fork"))
    child = os.fork()
    if child == 0:
        ok = torch.equal(op(x, None, 2.0, "fork")[0], expected(x, None, 2.0))
        os._exit(0 if ok and fast(lambda: op(x, None, 3.0, "fork"), 16) == 16 else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_implement_refuses_an_unknown_argument():
    LIBRARY.define("toy_call_wrong(Tensor x) -> Tensor")
    with pytest.raises(ValueError, match="no argument 'y'"):
        fast_call.implement("toy_call_wrong", lambda x: x, passes=("y",))


# Without the C++ side.


def alone(monkeypatch: pytest.MonkeyPatch) -> NativeModule[fast_call.Functions]:
    module = NativeModule(FastCallSpec(), lambda launch: launch(), "slower calls")
    monkeypatch.setattr(fast_call, "_module", module)
    return module


def test_a_forbidden_build_costs_nothing_but_time(function, fresh_cache, monkeypatch):
    monkeypatch.setattr(fast_call, "START_AFTER", 0)
    launch = native(function)
    op = define(lambda *args, **kwargs: launch)
    x = torch.randn(3, 3)
    with settings.override(no_build=True):
        module = alone(monkeypatch)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(5 * fast_call.TRY_EVERY):
                torch.testing.assert_close(op(x, None, 2.0, "a")[0], expected(x, None, 2.0))
                if module._builder is not None:
                    module._builder.join()
            assert not fast_call.prepare()
            assert "NO_BUILD" in str(module.problem)
    assert len([w for w in said if issubclass(w.category, errors.TilewrightWarning)]) == 1


def test_the_setting_turns_it_off(function):
    launch = native(function)
    op = define(lambda *args, **kwargs: launch)
    x = torch.randn(3, 3)
    with settings.override(fast_calls=False):
        assert fast(lambda: op(x, None, 2.0, "a")) == 0
    assert fast(lambda: op(x, None, 2.0, "a")) > 0


def test_nothing_is_built_before_many_calls(function, fresh_cache, monkeypatch):
    module = alone(monkeypatch)
    monkeypatch.setattr(fast_call, "_native_calls", 0)
    started: list[bool] = []
    monkeypatch.setattr(module, "get", lambda start=True: started.append(start))
    launch = native(function)
    op = define(lambda *args, **kwargs: launch)
    x = torch.randn(3, 3)
    for _ in range(fast_call.START_AFTER - 1):
        op(x, None, 2.0, "a")
    assert started and not any(started)
    op(x, None, 2.0, "a")
    assert started[-1]
