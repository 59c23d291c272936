"""The reference of a dumped kernel: the op's definition, traced to plain torch code for one call's arguments."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx
from torch.fx.experimental.proxy_tensor import make_fx

from ..passes.execute import undisturbed
from ..runtime.ops import CanonicalOp


def differentiable_results(result: Any) -> list[torch.Tensor]:
    """The outputs of an op that a gradient can be asked of."""
    results = result if isinstance(result, tuple | list) else [result]
    return [one for one in results if one.requires_grad]


def traced_reference(
    op: CanonicalOp, named: Mapping[str, Any], wrt: list[str] | None
) -> tuple[dict[str, torch.Tensor], str]:
    """The reference as straight-line torch code for these arguments, in float64, and the tensors it takes.

    wrt: names of the operands to give gradients for; the output itself when None.
    """
    tensors: dict[str, torch.Tensor] = {}
    lists: dict[str, list[str | None]] = {}
    for name, item in named.items():
        if isinstance(item, torch.Tensor):
            tensors[name] = item.detach()
        elif isinstance(item, list | tuple) and any(isinstance(one, torch.Tensor) for one in item):
            lists[name] = [None if one is None else f"{name}_{index}" for index, one in enumerate(item)]
            tensors |= {key: one.detach() for key, one in zip(lists[name], item, strict=True) if key is not None}
    constants = {
        # A dtype asked of the result would round it.
        name: torch.float64 if isinstance(item, torch.dtype) and item.is_floating_point else item
        for name, item in named.items()
        if name not in tensors and name not in lists and name != "target"
    }
    wide = {name: t.double() if t.dtype.is_floating_point else t for name, t in tensors.items()}
    order = list(wide)

    def forward(*inputs: torch.Tensor) -> Any:
        given: dict[str, Any] = dict(zip(order, inputs, strict=True))
        grads = [given.pop(name) for name in order if name.startswith("grad_")]
        for name, keys in lists.items():
            given[name] = [None if key is None else given.pop(key) for key in keys]
        if wrt is None:
            return _reference(op, given, constants)
        leaves = {name: given[name].detach().requires_grad_(True) for name in wrt}
        with torch.enable_grad():
            result = _reference(op, {**given, **leaves}, constants)
            return torch.autograd.grad(differentiable_results(result), list(leaves.values()), grads)

    with undisturbed():
        traced = make_fx(_flat(forward, len(order)))(*wide.values())
    traced.graph.eliminate_dead_code()
    for node, name in zip([n for n in traced.graph.nodes if n.op == "placeholder"], order, strict=True):
        node.name = node.target = name
    code = traced.graph.python_code("self").src
    return tensors, _reference_source(op, traced, code, order, constants, wrt)


def _flat(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    # make_fx names inputs after the signature, and a starred one is taken as it is called.
    def call(*inputs: Any) -> Any:
        assert len(inputs) == count
        return function(*inputs)

    return call


def _reference(op: CanonicalOp, tensors: Mapping[str, Any], constants: Mapping[str, Any]) -> Any:
    merged = {**tensors, **constants}
    schema = [a for a in op.overload._schema.arguments if a.name in merged]
    args = [merged[a.name] for a in schema if not a.kwarg_only]
    return op.reference(*args, **{a.name: merged[a.name] for a in schema if a.kwarg_only})


def _reference_source(
    op: CanonicalOp,
    traced: torch.fx.GraphModule,
    code: str,
    order: list[str],
    constants: Mapping[str, Any],
    wrt: list[str] | None,
) -> str:
    lines = code.strip("\n").splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("def "))
    body = [line.split(";  ")[0] if ";  " in line else line for line in lines[start + 1 :] if line.strip()]
    attributes = {n.target: getattr(traced, n.target) for n in traced.graph.nodes if n.op == "get_attr"}
    for name, tensor in attributes.items():
        # Constants that tracing met, such as 0-d tensors.
        literal = f"torch.tensor({tensor.tolist()!r}, dtype={tensor.dtype})"
        body = [line.replace(f"self.{name}", literal) for line in body]
    given = ", ".join(f"{name}={item!r}" for name, item in constants.items())
    what = f"the gradients of tilewright::{op.name} by {', '.join(wrt)}" if wrt else f"tilewright::{op.name}"
    general = textwrap.indent(inspect.getsource(op.reference).rstrip(), "# ", lambda line: True)
    return "\n".join(
        [
            f'"""What is correct: {what}, in float64.',
            "",
            f"Constants of this call: {given or 'none'}.",
            "The steps were traced for the shapes of inputs.safetensors; the definition they come from is at the end.",
            '"""',
            "",
            "import torch",
            "from torch import device, inf, nan",
            "",
            "",
            f"def reference({', '.join(order)}):",
            *body,
            "",
            "",
            "# The definition:",
            "#",
            *(line.rstrip() for line in general.splitlines()),
            "",
        ]
    )
