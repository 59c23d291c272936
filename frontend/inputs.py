"""What a captured graph takes: how a call's arguments become its flat inputs, and which of them it was made for.

Plain data, so that a saved module checks its calls as the original did.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.fx
import torch.utils._pytree as pytree

from ..passes.view import value
from ..runtime.errors import BadArgument

_KINDS = {kind.name: kind for kind in inspect._ParameterKind}
_SCALARS = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class Input:
    """One flat input.

    path: where it stands in the call, such as ``input_ids``. dtype: torch's name without ``torch.``; empty for a
    constant. shape: ints that must be met, and names of sizes that may vary (the same name is the same size); ``""``
    for a size that is computed from others. most: an upper bound for every size, None where there is none.
    device: its type. constant: the value that is not a tensor.
    """

    path: str
    dtype: str = ""
    shape: tuple[int | str, ...] = ()
    most: tuple[int | None, ...] = ()
    device: str = ""
    constant: Any = None


def describe_inputs(module: torch.fx.GraphModule, in_spec: pytree.TreeSpec) -> list[Input]:
    """The inputs of a flat graph module, from its placeholders' fake tensors."""
    args, kwargs = pytree.tree_unflatten([0] * in_spec.num_leaves, in_spec)
    paths = pytree.tree_flatten_with_path(kwargs if not args else (args, kwargs))[0]
    vals = [value(node) for node in module.graph.nodes if node.op == "placeholder"]
    # ``['input_ids']`` reads better without the dictionary's brackets.
    names = [re.sub(r"^\['([^']+)'\]", r"\1", pytree.keystr(path)) for path, _ in paths]
    return [_describe(name, val) for name, val in zip(names, vals, strict=True)]


def _describe(path: str, val: Any) -> Input:
    if isinstance(val, torch.Tensor):
        shape, most = tuple(map(_size, val.shape)), tuple(map(_upper, val.shape))
        return Input(path, str(val.dtype).removeprefix("torch."), shape, most, val.device.type)
    return Input(path, constant=val)


def _size(size: int | torch.SymInt) -> int | str:
    if isinstance(size, int):
        return size
    expression = size.node.expr  # export leaves sizes it has fixed as symbols with a known value
    if expression.is_Integer:
        return int(expression)
    return str(expression) if expression.is_Symbol else ""


def _upper(size: int | torch.SymInt) -> int | None:
    if isinstance(size, int) or not size.node.expr.is_Symbol:
        return None
    bounds = size.node.shape_env.var_to_range.get(size.node.expr)
    # Without a bound the range ends at a symbolic infinity.
    return int(bounds.upper) if bounds is not None and bounds.upper.is_Integer else None


def check_inputs(flat: Sequence[Any], inputs: Sequence[Input]) -> None:
    """Raise :class:`BadArgument` where a call is not what the graph was captured for: constants, dtypes, sizes."""
    sizes: dict[str, int] = {}
    for got, expected in zip(flat, inputs, strict=True):
        path = expected.path
        if not expected.dtype:
            if isinstance(got, torch.Tensor) or got != expected.constant:
                wanted = expected.constant
                raise BadArgument(f"{path} is {got!r}, but the model was captured with {wanted!r}: compile again")
            continue
        if not isinstance(got, torch.Tensor):
            raise BadArgument(f"{path} is {type(got).__name__}, but the model was captured with a tensor")
        dtype = str(got.dtype).removeprefix("torch.")
        if (dtype, got.device.type, got.dim()) != (expected.dtype, expected.device, len(expected.shape)):
            raise BadArgument(
                f"{path} is a {got.dim()}-d {dtype} tensor on {got.device}, but the model was captured with a "
                f"{len(expected.shape)}-d {expected.dtype} one on {expected.device}: compile again"
            )
        for dim, (size, wanted) in enumerate(zip(got.shape, expected.shape, strict=True)):
            allowed = wanted if isinstance(wanted, int) else sizes.setdefault(wanted, size) if wanted else size
            if size != allowed:
                raise BadArgument(
                    f"{path} has size {size} in dim {dim}, but the captured graph needs {allowed}: compile with "
                    "example inputs or dynamic_shapes that let this size vary, or without example inputs"
                )
            most = expected.most[dim] if expected.most else None
            if most is not None and size > most:
                raise BadArgument(f"{path} has size {size} in dim {dim}, but the model takes at most {most}")


def single_sizes(flat: Sequence[Any], inputs: Sequence[Input]) -> tuple[tuple[int, int], ...]:
    """(index of the input, dim) of every size that may vary and is 1 in this call."""
    return tuple(
        (index, dim)
        for index, (got, expected) in enumerate(zip(flat, inputs, strict=True))
        for dim, wanted in enumerate(expected.shape)
        if isinstance(wanted, str) and got.shape[dim] == 1
    )


def takes_names(signature: inspect.Signature) -> bool:
    """Whether every argument can be given by name, so that ``f(x)`` and ``f(x=x)`` become the same call."""
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    return not kinds & {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL}


def by_name(bound: inspect.BoundArguments) -> dict[str, Any]:
    """A bound call's arguments by name, ``**kwargs`` among them."""
    named: dict[str, Any] = {}
    for name, argument in bound.arguments.items():
        variadic = bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        named.update(argument if variadic else {name: argument})
    return named


@dataclass(frozen=True)
class CallForm:
    """How calls are written: the model's signature as data.

    parameters: ``{"name", "kind", "default"}`` each, ``default`` only where it is None, a bool, number or text.
    names: of the arguments the model was captured with. by_name: every argument is brought to keyword form first.
    """

    parameters: tuple[dict[str, Any], ...]
    names: tuple[str, ...]
    by_name: bool

    @staticmethod
    def of(signature: inspect.Signature, names: Sequence[str], by_name: bool) -> CallForm:
        rows = []
        for parameter in signature.parameters.values():
            row: dict[str, Any] = {"name": parameter.name, "kind": parameter.kind.name}
            if isinstance(parameter.default, _SCALARS):
                row["default"] = parameter.default
            rows.append(row)
        return CallForm(tuple(rows), tuple(names), by_name)

    @cached_property
    def signature(self) -> inspect.Signature:
        """Raises KeyError, TypeError or ValueError for rows that are no signature."""
        return inspect.Signature(
            [
                inspect.Parameter(row["name"], _KINDS[row["kind"]], default=row.get("default", inspect.Parameter.empty))
                for row in self._ordered()
            ]
        )

    def _ordered(self) -> list[dict[str, Any]]:
        """A default that could not be kept would stand between others: such positional parameters come to need one."""
        rows, seen_default = [], False
        for row in self.parameters:
            positional = row["kind"] in ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD")
            if positional and seen_default and "default" not in row:
                row = {**row, "default": None}
            seen_default |= positional and "default" in row
            rows.append(row)
        return rows

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any], in_spec: pytree.TreeSpec) -> list[Any]:
        """The call's leaves in the graph's order. Raises :class:`BadArgument` where the capture does not cover it."""
        inputs: Any = (args, kwargs)
        if self.by_name:
            inputs = ((), self._named(args, kwargs))
        leaves, got = pytree.tree_flatten(inputs)
        if got != in_spec:
            raise BadArgument(f"the call's inputs are nested another way than when captured: {got} against {in_spec}")
        return leaves

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        signature = self.signature
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise BadArgument(f"the call does not fit the model's signature {signature}: {error}") from error
        named = by_name(bound)
        defaults = {row["name"]: row["default"] for row in self.parameters if "default" in row}
        for name in sorted(set(named) - set(self.names)):
            if isinstance(named[name], torch.Tensor) or name not in defaults or named[name] != defaults[name]:
                raise BadArgument(f"the model was captured without {name!r}: give it in example_kwargs when compiling")
        missing = [name for name in self.names if name not in named and name not in defaults]
        if missing:
            raise BadArgument(f"the call lacks {missing[0]!r}")
        return {name: named.get(name, defaults.get(name)) for name in self.names}
