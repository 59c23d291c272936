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
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Launch = Callable[..., Any]
MAX_SIGNATURES = 4096
"""Signatures kept for each op; past that, all are dropped and met again."""

_caches: list[dict[Any, Launch]] = []


def implement(name: str, choose: Callable[..., Launch], *, passes: Sequence[str]) -> None:
    """Register the kernels of ``tilewright::<name>`` for CPU and CUDA tensors.

    name: an op that ``LIBRARY.define`` has declared, whose arguments are tensors, optional tensors and plain values.
    choose: takes the op's arguments as the schema has them and returns the launch function for this call and for every
        other call of the same signature. It must not read what tensors contain or where they lie. What it raises, the
        caller of the op gets, and the next call asks again.
    passes: names of the op's arguments, in the order in which the launch function takes them.
    """
    from .ops.registry import LIBRARY

    schema = getattr(torch.ops.tilewright, name).default._schema
    names = [argument.name for argument in schema.arguments]
    by_position = {argument.name: i for i, argument in enumerate(schema.arguments) if not argument.kwarg_only}
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    unknown = sorted(set(passes) - set(names))
    if unknown:
        raise ValueError(f"{name} has no argument {unknown[0]!r}: it has {', '.join(names)}")
    launches: dict[Any, Launch] = {}
    _caches.append(launches)
    # The dispatcher leaves out what equals its default.
    full = len(by_position)
    picks = [(by_position.get(wanted, -1), wanted) for wanted in passes]
    only_positions = tuple(position for position, _ in picks) if all(p >= 0 for p, _ in picks) else None

    def call(*args: Any, **kwargs: Any) -> Any:
        key = (*map(_sign, args), *kwargs.items())
        launch = launches.get(key)
        if launch is None:
            launch = choose(*args, **kwargs)
            if len(launches) >= MAX_SIGNATURES:
                launches.clear()
            launches[key] = launch
        if only_positions is not None and len(args) == full:
            return launch(*[args[position] for position in only_positions])
        return launch(
            *[
                args[position] if 0 <= position < len(args) else kwargs.get(wanted, defaults.get(wanted))
                for position, wanted in picks
            ]
        )

    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, call, device)


def _sign(value: Any) -> Any:
    """What of an argument decides the kernel."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    return value


def forget() -> None:
    """Drop every kept launch, so that the next calls choose again."""
    for launches in _caches:
        launches.clear()
