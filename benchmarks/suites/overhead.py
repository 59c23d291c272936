"""What a kernel call costs besides the kernel, and what memory from the pool saves.

``call`` rows: one kernel on a tensor so small that computing it takes nothing. ``kernel`` is the C function called
through ctypes (about 0.8 microseconds of that is ctypes), ``launcher`` the Python function that allocates and calls it,
``ours`` the kernel op through torch's dispatcher, as Inductor's code calls it, ``written`` the canonical op in eager
code, ``reference`` what it stands for in plain PyTorch. ``graph`` rows: a compiled chain of 16 such calls.

``pool`` rows: big tensors allocated afresh at every call, from the system and from the pool.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ...runtime import fast_call, memory, plans
from ...runtime.ops import OPS
from ..harness import Bound, Case, Contender, Problem, Skip, Suite
from ..measure import Call, Limits
from ..peers import inductor
from ..record import Kind

CHAIN = 16
Function = Callable[..., Any]


def written() -> dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]]:
    """name: (the op as a function of (x, target), x's shape). Each gives a tensor of x's shape."""
    ops = torch.ops.tilewright
    weight, angles = torch.linspace(0.5, 1.5, 16), torch.linspace(0, 3, 4)[:, None].repeat(1, 16)
    cos, sin = angles.cos(), angles.sin()
    return {
        "softmax": (lambda x, target: ops.softmax(x, -1, target=target), (4, 16)),
        "rms_norm": (lambda x, target: ops.rms_norm(x, weight, 1e-5, target=target), (4, 16)),
        "layer_norm": (lambda x, target: ops.layer_norm(x, [16], weight, weight, target=target), (4, 16)),
        "rope": (lambda x, target: ops.rope(x, cos, sin, target=target), (1, 2, 4, 16)),
        "gated_mlp": (lambda x, target: ops.gated_mlp(x, x, activation="silu", target=target), (4, 16)),
        "attention": (lambda x, target: ops.attention(x, x, x, scale=0.25, target=target), (1, 2, 4, 16)),
    }


class _Seen(TorchDispatchMode):
    """The kernel op that a canonical op dissolves into, with its arguments."""

    found: tuple[Any, tuple[Any, ...], dict[str, Any]] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "tilewright":
            self.found = func, args, kwargs or {}
        return func(*args, **(kwargs or {}))


def first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple | list) else result


def parts(name: str, x: Tensor) -> tuple[Function, Function, Function]:
    """(kernel op as a function of x, launcher without arguments, C function without arguments)."""
    if not fast_call.prepare():
        raise Skip("the fast way is off or cannot be built")
    with _Seen() as seen:
        written()[name][0](x, "cpp")
    if seen.found is None:
        raise Skip(f"{name} runs no kernel op")
    op, args, kwargs = seen.found
    operator = next(one for one in fast_call.operators() if one.name == op._opname)
    names = [argument.name for argument in op._schema.arguments]
    given = operator.defaults | dict(zip(names, args, strict=False)) | kwargs
    launch = operator.choose(*args, **kwargs)
    how = plans.recipe(launch)
    if how is None:
        raise Skip(f"{name} has no native launcher of its own")
    calls: list[tuple[Any, ...]] = []
    inputs = [given[wanted] for wanted in operator.passes]
    held: list[Tensor] = []

    def empty(shape: Any, dtype: torch.dtype) -> Tensor:
        held.append(torch.empty(shape, dtype=dtype))
        return held[-1]

    part = how.parts[0]
    part.launcher.make_launch(lambda *numbers: calls.append(numbers), part.fields, empty)(*inputs)

    def kernel(held: Any = held) -> None:  # keeps the outputs' memory
        part.function(*calls[0])

    def run(x_now: Tensor) -> Any:
        return op(*[x_now if value is x else value for value in args], **kwargs)

    return run, lambda: launch(*inputs), kernel


def one_call(name: str) -> Problem:
    function, shape = written()[name]
    x = torch.randn(shape)
    run, launch, kernel = parts(name, x)
    contenders = [
        Contender("kernel", Kind.FLOOR, kernel, output="reused"),
        Contender("launcher", Kind.OURS, launch),
        Contender("ours", Kind.OURS, lambda: run(x)),
        Contender("written", Kind.OURS, lambda: function(x, "cpp")),
        Contender("reference", Kind.PEER, lambda: function(x, "reference")),
    ]
    tolerance = OPS[name].tolerance[torch.float32]
    for _ in range(4 * fast_call.TRY_EVERY):
        run(x)
    before = fast_call.calls_without_python()
    run(x)
    note = "" if fast_call.calls_without_python() > before else "every call enters Python: there is no plan for it"
    expected = functools.partial(function, x, "reference")
    return Problem("ours", contenders, expected, Bound(2 * tolerance.atol, 2 * tolerance.rtol), first, note=note)


def graph(name: str) -> Problem:
    function, shape = written()[name]
    x = torch.randn(shape)
    run, _, kernel = parts(name, x)

    def chain(step: Function, x: Tensor) -> Tensor:
        for _ in range(CHAIN):
            x = first(step(x))
        return x

    def kernels() -> None:
        for _ in range(CHAIN):
            kernel()

    def compiled(step: Function) -> Call:
        code = inductor(functools.partial(chain, step))
        for _ in range(4 * fast_call.TRY_EVERY):
            code(x)
        return lambda: code(x)

    contenders = [
        Contender("kernel", Kind.FLOOR, kernels, output="reused"),
        Contender("ours", Kind.OURS, make=functools.partial(compiled, run)),
    ]
    tolerance = OPS[name].tolerance[torch.float32]
    return Problem(
        "ours",
        contenders,
        expected=lambda: chain(lambda x: function(x, "reference"), x),
        bound=Bound(CHAIN * tolerance.atol, CHAIN * tolerance.rtol),
        items=CHAIN,
        item="call",
    )


def big_output(rows: int, cols: int) -> Problem:
    """Softmax into a new tensor."""
    x = torch.randn(rows, cols)
    operator = next(one for one in fast_call.operators() if one.name == "softmax_forward")
    how = plans.recipe(operator.choose(x, None, -1, 1.0, torch.float32, False, "auto", "cpp"))
    if how is None or not memory.prepare():
        raise Skip("there is no native softmax, or no pool")
    part = how.parts[0]
    fresh = part.launcher.make_launch(part.function, part.fields, lambda shape, dtype: torch.empty(shape, dtype=dtype))
    out = torch.empty_like(x)
    size = x.numel() * x.element_size()
    contenders = [
        Contender("copy", Kind.FLOOR, lambda: out.copy_(x), output="reused"),
        Contender("eager", Kind.PEER, lambda: torch.softmax(x, -1)),
        Contender("eager_reused", Kind.PEER, lambda: torch.softmax(x, -1, out=out), output="reused"),
        Contender("system", Kind.OURS, lambda: fresh(x, None, -1, 1.0)),
        Contender("ours", Kind.OURS, lambda: torch.ops.tilewright.softmax(x, -1, target="cpp")),
    ]
    tolerance = OPS["softmax"].tolerance[torch.float32]
    bound = Bound(tolerance.atol, tolerance.rtol)
    return Problem("ours", contenders, lambda: torch.softmax(x.double(), -1), bound, bytes=2 * size)


def big_graph(rows: int, width: int) -> Problem:
    """An Inductor graph with big intermediates (three layers of an MLP), alone and inside the pool."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(width, 4 * width), torch.nn.GELU(), torch.nn.Linear(4 * width, width)]
    model = torch.nn.Sequential(*(layer for _ in range(3) for layer in layers)).requires_grad_(False)
    x = torch.randn(rows, width)
    alone = inductor(model)
    pooled = memory.pooled(alone)
    contenders = [
        Contender("system", Kind.PEER, lambda: alone(x)),
        Contender("ours", Kind.OURS, lambda: pooled(x)),
    ]
    flops = 3 * 2 * 2 * rows * width * 4 * width
    return Problem("ours", contenders, lambda: model(x), Bound(1e-5, 1e-4), flops=flops)


def elementwise_graph(rows: int, width: int) -> Problem:
    """An Inductor graph that only moves memory: a sort of residual stream with a reduction between the steps."""

    def function(x: Tensor) -> Tensor:
        for _ in range(4):
            x = (x - x.mean(0, keepdim=True)) * torch.rsqrt(x.var(1, keepdim=True) + 1e-5)
        return x

    x = torch.randn(rows, width)
    alone = inductor(function)
    pooled = memory.pooled(alone)
    contenders = [
        Contender("system", Kind.PEER, lambda: alone(x)),
        Contender("ours", Kind.OURS, lambda: pooled(x)),
    ]
    return Problem("ours", contenders, lambda: function(x.double()), Bound(1e-4, 1e-4), bytes=2 * x.nbytes)


def cases() -> list[Case]:
    short = Limits(seconds=1.5)
    found = []
    for name in written():
        found.append(Case(f"call/{name}", {"op": name}, functools.partial(one_call, name), name == "softmax", short))
        found.append(Case(f"graph/{name}", {"op": name}, functools.partial(graph, name), name == "softmax", short))
    for size in (2048, 4096):
        name = f"pool/softmax/{size}x{size}"
        found.append(Case(name, {"rows": size, "cols": size}, functools.partial(big_output, size, size), size == 4096))
    found.append(Case("pool/mlp", {"rows": 2048, "cols": 512}, functools.partial(big_graph, 2048, 512)))
    found.append(Case("pool/normalise", {"rows": 4096, "cols": 4096}, functools.partial(elementwise_graph, 4096, 4096)))
    return found


SUITE = Suite(
    "overhead",
    "What a kernel call costs besides the kernel, and what memory from the pool saves.",
    cases,
    headline=("call/softmax", "graph/softmax", "pool/softmax/4096x4096"),
    compare=(("system", "ours"),),
)
