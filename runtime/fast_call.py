"""The kernel ops' way from a call to a launch, in microseconds.

Which kernel a call gets depends on its *signature* alone: shape, strides and dtype of every tensor, and every other
argument. Working that out (a spec, its fingerprint, the loaded kernel) takes tens of microseconds, so it is done once
a signature and kept. An operator declares how, beside its schema:

    LIBRARY.define("row_sum(Tensor x, int dim, str target) -> Tensor")

    def _row_sum_kernel(x, dim, target):
        chosen = spec(x, dim, target=target)
        return load_best(chosen, target, lambda: (x, dim)).launch

    fast_call.implement("row_sum", _row_sum_kernel, passes=("x", "dim"))

That registers the op for CPU and CUDA tensors. ``launch`` is then called with the arguments that ``passes`` names.

Python itself costs about ten microseconds of such a call, most of it in entering it twice, for autograd and for the
kernel. So for native kernels a second way is laid: ``fast_call.cpp.jinja`` takes the op over in torch's dispatcher and
carries out *plans*. A plan is what a launcher does for one signature, found by watching it twice on stand-ins for the
tensors (:mod:`.plans`). A launcher that does anything else than allocate and call its kernel has no plan and
stays as it is. The C++ side is loaded from the cache at the first call; where it is not there, a thread builds it once
the process has made :data:`START_AFTER` native calls, so that no first call ever waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..codegen.native import FastCallSpec
from . import load, memory, plans, settings
from .native import NativeModule

Launch = Callable[..., Any]
Functions = dict[str, Any]
MAX_SIGNATURES = 4096
"""Signatures kept for each op; past that, all are dropped and met again."""
TRY_EVERY = 8
"""Calls of a signature from Python between two attempts to make a plan for it; must be a power of two."""
START_AFTER = 512
"""Native calls of a process before it builds the C++ side."""


@dataclass(slots=True)
class _Kept:
    """A signature's launch function, how often Python called it, and whether a plan may be made."""

    launch: Launch
    calls: int
    plannable: bool


class Operator:
    """One op: its kept launches and its number on the C++ side, once it is there."""

    def __init__(self, name: str, choose: Callable[..., Launch], passes: Sequence[str]) -> None:
        self.name = name
        schema = getattr(torch.ops.tilewright, name).default._schema
        self.arguments = list(schema.arguments)
        self.returns = len(schema.returns)
        self.names = [argument.name for argument in self.arguments]
        self.defaults = {a.name: a.default_value for a in self.arguments if a.has_default_value()}
        self.passes = tuple(passes)
        unknown = sorted(set(passes) - set(self.names))
        if unknown:
            raise ValueError(f"{name} has no argument {unknown[0]!r}: it has {', '.join(self.names)}")
        self.choose = choose
        self.kept: dict[Any, _Kept] = {}
        self.number: int | None = None

    def python_kernel(self) -> Callable[..., Any]:
        """What is registered with torch."""
        kept, choose = self.kept, self.choose
        positional = [argument.name for argument in self.arguments if not argument.kwarg_only]
        full = len(positional)
        picks = [(positional.index(wanted) if wanted in positional else -1, wanted) for wanted in self.passes]
        positions = tuple(position for position, _ in picks)
        all_positional = -1 not in positions
        defaults = self.defaults

        def call(*args: Any, **kwargs: Any) -> Any:
            key = (*map(_sign, args), *kwargs.items()) if kwargs else tuple(map(_sign, args))
            found = kept.get(key)
            if found is None:
                found = self.keep(key, choose(*args, **kwargs))
            found.calls += 1
            if found.plannable and not found.calls & (TRY_EVERY - 1):
                self.plan(found, args, kwargs)
            if all_positional and len(args) == full:
                return found.launch(*[args[position] for position in positions])
            # The dispatcher leaves out what equals its default.
            return found.launch(
                *[
                    args[position] if 0 <= position < len(args) else kwargs.get(wanted, defaults.get(wanted))
                    for position, wanted in picks
                ]
            )

        return call

    def keep(self, key: Any, launch: Launch) -> _Kept:
        if len(self.kept) >= MAX_SIGNATURES:
            self.kept.clear()
        plannable = plans.recipe(launch) is not None and settings.get().fast_calls
        if plannable and self.number is None:
            self.attach(_module.get(start=False))
        found = self.kept[key] = _Kept(launch, 0, plannable)
        return found

    def attach(self, functions: Functions | None) -> None:
        """Have the C++ side serve the op, once it is there."""
        if functions is not None and self.number is None:
            self.number = functions["attach"](self.name.encode())

    def plan(self, found: _Kept, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Make a plan for the call that is being answered, and install it."""
        global _native_calls
        _native_calls += TRY_EVERY
        functions = _module.get(start=_native_calls >= START_AFTER)
        self.attach(functions)
        if functions is None or self.number is None or self.number < 0:
            return
        given = dict(self.defaults)
        given.update(zip(self.names, args, strict=False))
        given.update(kwargs)
        made = plans.make(found.launch, [given[name] for name in self.passes], self.returns)
        if made is None:
            found.plannable = False
            return
        if made.big:
            functions["set_pool"](memory.allocator())
        functions["install"](self.number, made.encode([self.names.index(name) for name in self.passes]))


def _sign(value: Any) -> Any:
    """What of an argument decides the kernel."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    return tuple(map(_sign, value)) if isinstance(value, list) else value


_operators: list[Operator] = []
_native_calls = 0
_module: NativeModule[Functions] = NativeModule(
    FastCallSpec(), lambda launch: launch(), "native kernels are launched from Python, some microseconds slower a call"
)


def implement(name: str, choose: Callable[..., Launch], *, passes: Sequence[str]) -> None:
    """Register the kernels of ``tilewright::<name>`` for CPU and CUDA tensors.

    name: an op that ``LIBRARY.define`` has declared, whose arguments are tensors, optional tensors and plain values.
    choose: takes the op's arguments as the schema has them and returns the launch function for this call and for every
        other call of the same signature. It must not read what tensors contain or where they lie. What it raises, the
        caller of the op gets, and the next call asks again.
    passes: names of the op's arguments, in the order in which the launch function takes them.

    ``register_autograd`` and ``register_fake`` work as for any op.
    """
    from .ops.registry import LIBRARY

    operator = Operator(name, choose, passes)
    _operators.append(operator)
    call = operator.python_kernel()
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, call, device)


def operators() -> list[Operator]:
    """Every op that :func:`implement` was called for."""
    return list(_operators)


def prepare() -> bool:
    """Build and load the C++ side now, and hand it all ops. Whether it is there."""
    functions = _module.wait() if settings.get().fast_calls else None
    for operator in _operators:
        operator.attach(functions)
    return functions is not None


def functions() -> Functions | None:
    """The C++ side, if it is loaded."""
    return _module.made


def calls_without_python() -> int:
    """How many calls of this process were launched without entering Python."""
    return int(_module.made["count"]()) if _module.made is not None else 0


def forget() -> None:
    """Drop every kept launch and plan, so that the next calls choose again."""
    for operator in _operators:
        operator.kept.clear()
        if _module.made is not None and operator.number is not None and operator.number >= 0:
            _module.made["clear"](operator.number)


settings.on_change(forget)
load.on_forget(forget)
