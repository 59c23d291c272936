"""Calls of an exported graph: arguments by name, and whether the capture covers them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
import torch.utils._pytree as pytree

from ..runtime.errors import BadArgument


class Signature:
    """How a model's forward is called. by_name: every argument can be given by name, which makes calls comparable."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.signature = inspect.signature(model.forward)
        kinds = {p.kind for p in self.signature.parameters.values()}
        self.by_name = not kinds & {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL}
        self.defaults = {
            name: p.default for name, p in self.signature.parameters.items() if p.default is not inspect.Parameter.empty
        }

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments by name, in the signature's order. Raises TypeError as the call itself would."""
        bound = self.signature.bind(*args, **kwargs)
        named: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            kind = self.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                named.update(value)
            else:
                named[name] = value
        return named


def flatten_as(spec: pytree.TreeSpec, inputs: Any, what: str) -> list[Any]:
    leaves, got = pytree.tree_flatten(inputs)
    if got != spec:
        raise BadArgument(
            f"the {what}'s inputs are nested another way than the example inputs the model was captured with: "
            f"{got} against {spec}"
        )
    return leaves


def _paths(spec: pytree.TreeSpec) -> list[tuple[Any, Any]]:
    filled = pytree.tree_unflatten([0] * spec.num_leaves, spec)
    args, kwargs = filled
    return pytree.tree_flatten_with_path(kwargs if not args else filled)[0]


class InputCheck:
    """Refuses calls that the captured graph was not made for: other constants, dtypes, devices or fixed sizes."""

    def __init__(self, module: torch.fx.GraphModule, spec: pytree.TreeSpec) -> None:
        values = [node.meta.get("val") for node in module.graph.nodes if node.op == "placeholder"]
        # ``['input_ids']`` reads better without the dictionary's brackets.
        paths = [re.sub(r"^\['([^']+)'\]", r"\1", pytree.keystr(path)) for path, _ in _paths(spec)]
        self.expected = list(zip(paths, values, strict=True))

    def check(self, flat: Sequence[Any]) -> None:
        """Raise :class:`BadArgument` naming the input and what it should be."""
        sizes: dict[Any, int] = {}
        for got, (path, expected) in zip(flat, self.expected, strict=True):
            if not isinstance(expected, torch.Tensor):
                if isinstance(got, torch.Tensor) or got != expected:
                    raise BadArgument(f"{path} is {got!r}, but the model was captured with {expected!r}: compile again")
                continue
            if not isinstance(got, torch.Tensor):
                raise BadArgument(f"{path} is {type(got).__name__}, but the model was captured with a tensor")
            if got.dtype != expected.dtype or got.device.type != expected.device.type or got.dim() != expected.dim():
                raise BadArgument(
                    f"{path} is a {got.dim()}-d {got.dtype} tensor on {got.device}, but the model was captured with "
                    f"a {expected.dim()}-d {expected.dtype} one on {expected.device}: compile again"
                )
            for dim, (size, want) in enumerate(zip(got.shape, expected.shape, strict=True)):
                if (need := _mismatch(size, want, sizes)) is not None:
                    raise BadArgument(
                        f"{path} has size {size} in dim {dim}, but the captured graph needs {need}: give example "
                        "inputs or dynamic_shapes that let this size vary, or compile without example inputs"
                    )


def _mismatch(size: int, want: Any, sizes: dict[Any, int]) -> str | None:
    """What ``size`` should have been, or None when it fits. ``sizes``: the symbols met so far."""
    if isinstance(want, int):
        return None if size == want else str(want)
    expression, environment = want.node.expr, want.node.shape_env
    if expression.is_Symbol:
        known = sizes.setdefault(expression, size)
        bounds = environment.var_to_range.get(expression)
        if size != known:
            return f"{known}, as elsewhere"
        return f"at most {bounds.upper}" if bounds is not None and size > bounds.upper else None
    if expression.free_symbols <= sizes.keys():
        known = int(expression.subs(sizes))
        return None if size == known else str(known)
    return None
