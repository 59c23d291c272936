"""Norms of a sum: ``norm(x + residual)`` becomes one op that reads x and residual once and writes norm and sum.

For targets whose kernels are opaque to the compiler of the rest, which would otherwise write the sum and read it back.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx

from ..passes.site import get_site, set_site
from ..passes.view import GraphView, arguments, is_assertion, peel, same_sizes, value
from .raising import DETAILS
from .raising.rules import chain_to

Node = torch.fx.Node
_ops = torch.ops.tilewright
FUSED: dict[Any, Any] = {
    _ops.rms_norm.default: _ops.add_rms_norm.default,
    _ops.layer_norm.default: _ops.add_layer_norm.default,
}


def fuse(module: torch.fx.GraphModule) -> int:
    """Replace each ``rms_norm`` or ``layer_norm`` of a sum by ``add_rms_norm`` or ``add_layer_norm``, in place.

    The sum is an ``aten.add`` of two tensors of one shape and dtype with no factor, which nobody reads before the norm.
    The new node has the norm's site and keyword arguments. Returns how many were formed.
    """
    view = GraphView(module)
    norms = [node for node in module.graph.nodes if node.target in FUSED]
    count = sum(_fuse(node, view) for node in norms)
    if count:
        module.graph.lint()
        module.recompile()
    return count


def _fuse(norm: Node, view: GraphView) -> bool:
    op, given = FUSED[norm.target], arguments(norm)
    total = peel(given.pop("x"))
    if not _is_sum(total) or view.autocast.get(total) != view.autocast.get(norm):
        return False
    x, residual = total.args[:2]
    chain = chain_to(norm.args[0], total)
    readers = _readers([*chain, total], norm)
    if any(user < norm for user in readers) or view.modified((*chain, total), norm) is not None:
        return False
    with view.graph.inserting_before(norm):
        fused = view.graph.call_function(op, (x, residual), {})
        normed = view.graph.call_function(operator.getitem, (fused, 0), {})
    schema = op._schema.arguments[2:]
    given["keep_sum"] = keep_sum = bool(readers)
    fused.args = (x, residual, *(given[a.name] for a in schema if not a.kwarg_only))
    fused.kwargs = {a.name: given[a.name] for a in schema if a.kwarg_only}
    sum_value = value(total)
    normed.meta["val"] = value(norm)
    fused.meta["val"] = (value(norm), sum_value if keep_sum else sum_value.new_empty((0,)))
    _describe(fused, norm)
    _describe(normed, norm)
    if (site := get_site(norm)) is not None:
        set_site(fused, site)
    if DETAILS in norm.meta:
        fused.meta[DETAILS] = norm.meta[DETAILS]
    for node in (fused, normed):
        view.insert(node)
    view.replace(norm, normed)
    view.erase(norm)
    if keep_sum:
        with view.graph.inserting_after(normed):
            kept = view.graph.call_function(operator.getitem, (fused, 1), {})
        kept.meta["val"] = sum_value
        _describe(kept, total)
        view.insert(kept)
        for reader in readers:
            for node in (*chain, total):
                reader.replace_input_with(node, kept)
            view.insert(reader)
    for node in (*chain, total):
        for user in list(node.users):  # assertions about it
            view.erase(user)
        view.erase(node)
    return True


def _is_sum(node: Any) -> bool:
    """Whether ``node`` adds two tensors of its own shape and floating dtype."""
    if not isinstance(node, Node) or node.target is not torch.ops.aten.add.Tensor or arguments(node)["alpha"] != 1:
        return False
    result, sides = value(node), [value(side) for side in node.args[:2] if isinstance(side, Node)]
    return (
        isinstance(result, torch.Tensor)
        and result.dtype.is_floating_point
        and len(sides) == 2
        and all(isinstance(s, torch.Tensor) and s.dtype == result.dtype for s in sides)
        and all(same_sizes(s.shape, result.shape) for s in sides)
    )


def _readers(nodes: list[Node], norm: Node) -> list[Node]:
    """What reads the sum, or a copy of it in ``nodes``, besides the norm."""
    inside = {norm, *nodes}
    return [user for node in nodes for user in node.users if user not in inside and not is_assertion(user)]


def _describe(node: Node, origin: Node) -> None:
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
        if key in origin.meta:
            node.meta[key] = origin.meta[key]
