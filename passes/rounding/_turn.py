"""Turning a graph's constants by the rotations that ``_rotate.py`` found places for.

Nothing is written into: new constants are registered, computed in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.fx
from torch import Tensor

from .._key_projection import constant, owner
from ..base import Builder
from ..view import GraphView, arguments
from ._fold import set_constant
from ._rotate import LINEAR, RMS_NORM, Plan, Side, Table, Turned, named

Node = torch.fx.Node
aten = torch.ops.aten


def gain(view: GraphView, norm: Node) -> tuple[Tensor | None, Tensor | None]:
    """A norm's weight, with its offset, and bias, float64 (C,); None where it has none."""
    given = arguments(norm)
    weight, bias = constant(view, given["weight"]), constant(view, given.get("bias"))
    wide = None if weight is None else weight.double() + given.get("weight_offset", 0.0)
    return wide, None if bias is None else bias.double()


def turn_columns(weight: Tensor, side: Side | None, matrices: Mapping[str, Tensor]) -> Tensor:
    """weight (N, K) times the rotation of its columns; differentiable."""
    if side is None:
        return weight
    matrix = matrices[side.name]
    if side.whole(weight.shape[1]):
        return weight @ matrix[0]
    parts = torch.einsum("nhd,hde->nhe", weight[:, side.channels.to(weight.device)], matrix[side.heads])
    return torch.zeros_like(weight).index_copy(1, side.channels.flatten().to(weight.device), parts.flatten(1))


def turn_rows(weight: Tensor, side: Side | None, matrices: Mapping[str, Tensor]) -> Tensor:
    """The transposed rotation times weight (N, K) or a bias (N,), whose outputs become ``y R``; differentiable."""
    if side is None:
        return weight
    if weight.dim() == 1:
        return turn_rows(weight[:, None], side, matrices)[:, 0]
    matrix = matrices[side.name]
    if side.whole(weight.shape[0]):
        return matrix[0].t() @ weight
    channels = side.channels.to(weight.device)
    parts = torch.einsum("hdk,hde->hek", weight[channels], matrix[side.heads])
    # Rows that are not of the values (queries and keys of a fused projection) stay.
    return weight.index_copy(0, channels.flatten(), parts.flatten(0, 1))


def base_weight(view: GraphView, linear: Node, turned: Turned) -> tuple[Tensor, Tensor | None]:
    """Weight (N, K) and bias (N,) in float64 with the norm folded in and the mean of the outputs subtracted."""
    given = arguments(linear)
    weight, bias = constant(view, given["weight"]), constant(view, given["bias"])
    assert weight is not None
    weight, bias = weight.double(), None if bias is None else bias.double()
    if turned.norm is not None:
        scale, shift = gain(view, turned.norm)
        if shift is not None:
            bias = weight @ shift if bias is None else bias + weight @ shift
        weight = weight if scale is None or turned.tied else weight * scale
    if turned.centred:
        weight = weight - weight.mean(0)
        bias = None if bias is None else bias - bias.mean()
    return weight, bias


def rotate(view: GraphView, plan: Plan, matrices: Mapping[str, Tensor]) -> None:
    """Edit the graph: matrices (M, D, D) orthogonal, float64, by the names of ``plan.sizes``. Recompile afterwards."""
    weights: dict[Node, tuple[Tensor, Tensor | None]] = {}
    shared: dict[int, Node] = {}
    for node, turned in plan.linears.items():
        if turned.tied:
            _mix_head(view, node, turned, matrices)
    for embedding, table in plan.tables.items():
        _turn_table(view, embedding, table, matrices, shared)
    for node, turned in plan.linears.items():
        given = arguments(node)
        stored = constant(view, given["weight"])
        assert stored is not None
        if turned.tied:
            continue
        weight, bias = base_weight(view, node, turned)
        weight = turn_rows(turn_columns(weight, turned.columns, matrices), turned.rows, matrices)
        bias = None if bias is None else turn_rows(bias, turned.rows, matrices)
        weights[node] = weight.to(stored.dtype), None if bias is None else bias.to(stored.dtype)
        set_constant(view, node, "weight", weights[node][0])
        if weights[node][1] is not None:
            set_constant(view, node, "bias", weights[node][1])  # type: ignore[arg-type]
    for norm in plan.norms:
        _plain_norm(view, norm)


def _plain_norm(view: GraphView, norm: Node) -> None:
    """The norm as an RMS norm without a weight."""
    given = arguments(norm)
    builder = Builder(view, norm)
    options = {"round_before_weight": True} if given.get("round_before_weight") else {}
    made = builder.call(RMS_NORM, given["x"], None, given["eps"], **options)
    view.replace(norm, made)
    _erase(view, norm)


def _erase(view: GraphView, node: Node) -> None:
    """Remove a node that nothing uses, and what only it used."""
    behind = node.all_input_nodes
    view.erase(node)
    for one in behind:
        if not one.users and one.op in ("get_attr", "call_function"):
            _erase(view, one)


def _turn_table(
    view: GraphView, embedding: Node, table: Table, matrices: Mapping[str, Tensor], shared: dict[int, Node]
) -> None:
    node = arguments(embedding)["weight"]
    stored = constant(view, node)
    assert stored is not None
    matrix = matrices[table.name][0]
    place = stored.data_ptr()
    if place in shared:
        embedding.update_arg(0, shared[place])
        view.insert(embedding)
    else:
        rows = stored.double()
        rows = rows - rows.mean(1, keepdim=True) if table.centred and table.own else rows
        turned = (rows @ matrix).to(stored.dtype)
        users = [user for user in view.graph.nodes if user.target is LINEAR and _reads(view, user, place)]
        made = set_constant(view, embedding, "weight", turned)
        shared[place] = made
        for user in users:
            user.update_arg(1, made)
            view.insert(user)
    if table.centred and not table.own:
        after = embedding.next
        builder = Builder(view, after)
        mean = torch.full_like(matrix, 1 / len(matrix))
        centre = builder.constant(
            f"{named(embedding)}_centre", (matrix.t() @ (torch.eye(len(matrix)) - mean) @ matrix).to(stored.dtype)
        )
        mixed = builder.call(aten.matmul.default, embedding, centre)
        view.replace(embedding, mixed)


def _reads(view: GraphView, user: Node, place: int) -> bool:
    stored = constant(view, owner(arguments(user)["weight"]))
    return stored is not None and stored.data_ptr() == place


def _mix_head(view: GraphView, linear: Node, turned: Turned, matrices: Mapping[str, Tensor]) -> None:
    """R^T diag(g) R in front of a head that is tied to the embedding; a norm's bias goes into the head's."""
    assert turned.columns is not None
    stored = constant(view, arguments(linear)["weight"])
    assert stored is not None
    matrix = matrices[turned.columns.name][0]
    scale = None if turned.norm is None else gain(view, turned.norm)[0]
    _, bias = base_weight(view, linear, turned)
    if bias is not None:
        set_constant(view, linear, "bias", bias.to(stored.dtype))
    if scale is not None and not torch.equal(scale, torch.ones_like(scale)):
        builder = Builder(view, linear)
        mix = builder.constant(f"{named(linear)}_mix", (matrix.t() @ (scale[:, None] * matrix)).to(stored.dtype))
        linear.update_arg(0, builder.call(aten.matmul.default, arguments(linear)["x"], mix))
        view.insert(linear)
