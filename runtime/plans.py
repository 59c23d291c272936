"""What a native launcher does for one call, written down so that C++ can do it again (see :mod:`.fast_call`).

A launcher (``runtime/launchers``) is a Python function: it allocates the outputs with the ``empty`` it was given, calls
the kernel once, and returns the outputs or views of them; several can be joined to one that calls each once. Here it is
run twice on stand-ins of the same shapes and strides, with a kernel that only notes its arguments. An argument that is
the address of the same stand-in both times is that tensor's address; one that is equal both times and no address is a
constant. Anything else, and there is no plan: a launcher that copies a tensor first, keeps packed weights or calls its
kernel twice is left to Python.
"""

from __future__ import annotations

import ctypes
import struct
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

THREADS, INTEGER, REAL, INPUT, BUFFER, ARRAY = range(6)
MAX_INTEGERS, MAX_REALS = 40, 8
"""As in ``fast_call.cpp.jinja``."""
MAX_BYTES = 2**26
"""A call with a larger tensor takes milliseconds: nothing to gain."""
BIG = 2**20
ELEMENT = 2**16

Launch = Callable[..., Any]


@dataclass(frozen=True)
class Part:
    """A native kernel of a launch function. function: its entry. fields: of its spec."""

    launcher: ModuleType
    function: Any
    fields: dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How a launch function was made. join: makes it of the parts' own launch functions; None where it is the only
    one's."""

    parts: tuple[Part, ...]
    join: Callable[..., Launch] | None = None


_recipes: weakref.WeakKeyDictionary[Launch, Recipe] = weakref.WeakKeyDictionary()


def remember(launch: Launch, launcher: ModuleType, function: Any, fields: dict[str, Any]) -> Launch:
    """Note how ``launch`` was made, and return it."""
    _recipes[launch] = Recipe((Part(launcher, function, fields),))
    return launch


def joined(join: Callable[..., Launch], *launches: Launch) -> Launch:
    """``join(*launches)``, a launch function that calls each of ``launches`` once, noting how it was made."""
    launch = join(*launches)
    known = [_recipes.get(one) for one in launches]
    if all(one is not None and one.join is None for one in known):
        _recipes[launch] = Recipe(tuple(one.parts[0] for one in known if one is not None), join)
    return launch


def recipe(launch: Launch) -> Recipe | None:
    """How ``launch`` was made; None for what is no native kernel's own launch function."""
    return _recipes.get(launch)


@dataclass
class Plan:
    """calls: of each kernel its address and the words of its arguments, (kind, value). The value of INPUT is an index
    into the launch's arguments, of a tensor in a list plus ELEMENT for each place from 1 on.

    buffers: (dtype, shape) of what is allocated. results: (buffer, shape, strides, offset in elements).
    arrays: numbers behind pointers. big: whether a buffer is for the pool.
    """

    calls: list[tuple[int, list[tuple[int, int]]]]
    buffers: list[tuple[torch.dtype, tuple[int, ...]]]
    results: list[tuple[int, tuple[int, ...], tuple[int, ...], int]]
    arrays: list[list[int]]

    @property
    def big(self) -> bool:
        return any(dtype.itemsize * torch.Size(shape).numel() >= BIG for dtype, shape in self.buffers)

    def encode(self, positions: Sequence[int]) -> Any:
        """The numbers ``install`` reads. positions: where in the op's arguments each of the launch's arguments is."""
        numbers = [len(self.calls)]
        for address, words in self.calls:
            numbers += (address, len(words))
            for kind, value in words:
                inside, index = divmod(value, ELEMENT) if kind == INPUT else (0, 0)
                numbers += (kind, positions[index] + inside * ELEMENT if kind == INPUT else value)
        numbers.append(len(self.buffers))
        for dtype, shape in self.buffers:
            numbers += (SCALAR_TYPES[dtype], len(shape), *shape)
        numbers.append(len(self.results))
        for buffer, shape, strides, offset in self.results:
            numbers += (buffer, len(shape), *shape, *strides, offset)
        numbers.append(len(self.arrays))
        for array in self.arrays:
            numbers += (len(array), *array)
        return (ctypes.c_int64 * len(numbers))(*numbers)


# c10::ScalarType, whose numbers are part of saved models.
SCALAR_TYPES = {
    torch.uint8: 0,
    torch.int8: 1,
    torch.int16: 2,
    torch.int32: 3,
    torch.int64: 4,
    torch.float16: 5,
    torch.float32: 6,
    torch.float64: 7,
    torch.bool: 11,
    torch.bfloat16: 15,
}


def _stand_in(x: Any) -> Any:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) if isinstance(x, Tensor) else x


@dataclass
class _Recording:
    """One run of a launcher: what it was given, allocated, called and returned."""

    inputs: list[Any]
    buffers: list[Tensor] = field(default_factory=list)
    calls: list[tuple[int, tuple[Any, ...]]] = field(default_factory=list)
    returned: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        self.inputs = [[_stand_in(y) for y in x] if isinstance(x, list) else _stand_in(x) for x in self.inputs]

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        self.buffers.append(torch.empty(shape, dtype=dtype))
        return self.buffers[-1]

    def run(self, how: Recipe) -> None:
        def noted(index: int) -> Callable[..., None]:
            return lambda *args: self.calls.append((index, args))

        made = [
            part.launcher.make_launch(noted(index), part.fields, self.empty) for index, part in enumerate(how.parts)
        ]
        result = (how.join(*made) if how.join is not None else made[0])(*self.inputs)
        self.returned = tuple(result) if isinstance(result, tuple | list) else (result,)

    def addresses(self) -> dict[int, tuple[int, int]]:
        found = {}
        for i, x in enumerate(self.inputs):
            if isinstance(x, Tensor):
                found[x.data_ptr()] = (INPUT, i)
            elif isinstance(x, list):
                here = [(n, y) for n, y in enumerate(x, 1) if isinstance(y, Tensor)]
                found |= {y.data_ptr(): (INPUT, i + n * ELEMENT) for n, y in here}
        return found | {x.data_ptr(): (BUFFER, i) for i, x in enumerate(self.buffers) if x.numel()}


def make(launch: Launch, arguments: Sequence[Any], returns: int) -> Plan | None:
    """The plan of ``launch(*arguments)``, None where there is none. returns: how many tensors the op returns.

    The arguments are not read and no kernel runs.
    """
    how = recipe(launch)
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    # What stands in a list may be as large as it likes: a call need not read all of it.
    listed = [y for x in arguments if isinstance(x, list) for y in x if isinstance(y, Tensor)]
    if how is None:
        return None
    if any(x.numel() == 0 or x.dtype not in SCALAR_TYPES for x in (*tensors, *listed)):
        return None
    if any(x.untyped_storage().nbytes() > MAX_BYTES for x in tensors):
        return None
    first, second = _Recording(list(arguments)), _Recording(list(arguments))
    first.run(how)
    second.run(how)
    order = list(range(len(how.parts)))
    if any([index for index, _ in one.calls] != order for one in (first, second)):
        return None
    if any(x.numel() * x.element_size() > MAX_BYTES for x in first.buffers):
        return None
    plan = Plan([], [], [], [])
    plan.buffers = [(x.dtype, tuple(x.shape)) for x in first.buffers]
    if plan.buffers != [(x.dtype, tuple(x.shape)) for x in second.buffers] or len(first.returned) != returns:
        return None
    here, there = first.addresses(), second.addresses()
    for part, (_, mine), (_, other) in zip(how.parts, first.calls, second.calls, strict=True):
        types = part.launcher.ARGTYPES
        if len(mine) != len(types):
            return None
        words = []
        for position, (kind, a, b) in enumerate(zip(types, mine, other, strict=True)):
            word = _word(plan, kind, a, b, here, there, position == 0)
            if word is None:
                return None
            words.append(word)
        reals = sum(kind == REAL for kind, _ in words)
        if reals > MAX_REALS or len(words) - reals > MAX_INTEGERS:
            return None
        plan.calls.append((ctypes.cast(part.function, ctypes.c_void_p).value or 0, words))
    storages = {x.untyped_storage()._cdata: i for i, x in enumerate(first.buffers)}
    for result in first.returned:
        if not isinstance(result, Tensor):
            return None
        buffer = storages.get(result.untyped_storage()._cdata)
        if buffer is None or result.dtype != first.buffers[buffer].dtype:
            return None
        plan.results.append((buffer, tuple(result.shape), tuple(result.stride()), int(result.storage_offset())))
    return plan


def _word(
    plan: Plan,
    kind: Any,
    a: Any,
    b: Any,
    here: dict[int, tuple[int, int]],
    there: dict[int, tuple[int, int]],
    threads: bool,
) -> tuple[int, int] | None:
    """One argument of the kernel, from what it was in two recordings; None when it is neither constant nor a tensor."""
    if threads:
        return (THREADS, 0) if a == b == torch.get_num_threads() else None
    if kind is ctypes.c_double or kind is ctypes.c_float:
        bits = [struct.pack("=d" if kind is ctypes.c_double else "=fxxxx", x) for x in (a, b)]
        return (REAL, struct.unpack("=q", bits[0])[0]) if bits[0] == bits[1] else None
    if kind is not ctypes.c_void_p:
        return (INTEGER, int(a)) if a == b and kind in (ctypes.c_int, ctypes.c_int64, ctypes.c_bool) else None
    if isinstance(a, ctypes.Array) and isinstance(b, ctypes.Array):
        if bytes(a) != bytes(b):
            return None
        text = bytes(a)
        text += bytes(-len(text) % 8)
        plan.arrays.append(list(struct.unpack(f"={len(text) // 8}q", text)))
        return ARRAY, len(plan.arrays) - 1
    if not a and not b:
        return INTEGER, 0
    if isinstance(a, int) and isinstance(b, int) and a in here and here[a] == there.get(b):
        return here[a]
    return None
