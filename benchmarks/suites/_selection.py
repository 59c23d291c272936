"""A selector at one attention, compiled: the whole site, and the choice of blocks alone, cut out of its graph."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...frontend.compile import compile
from ...passes.block_sparse_attention import BlockSparseAttention
from ...passes.execute import extract
from ...passes.selectors import Selector
from ...passes.view import arguments
from ...runtime.ops import OPS
from ..measure import Call

Inputs = tuple[Tensor, ...]
"""q, k and v."""


class Attention(torch.nn.Module):
    """What a selector is put into: causal attention."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def whole_site(selector: Selector, inputs: Inputs, block: int) -> Call:
    """Choosing the blocks and attending to them, as a compiled model runs it."""
    compiled = _compiled(selector, inputs, block, "inductor")
    return lambda: compiled(*inputs)


def selection(selector: Selector, inputs: Inputs, block: int) -> Call:
    """Choosing the blocks alone, compiled: gives the counts (B, H, NQ) and the indices."""
    graph = _compiled(selector, inputs, block, "eager").records[0].rewritten
    (node,) = graph.graph.find_nodes(op="call_function", target=OPS["block_attention"].overload)
    named = arguments(node)
    inside = {n for n in graph.graph.nodes if n.op in ("call_function", "get_attr")}
    pair = named["counts"].args[0]  # both are parts of one node
    assert pair is named["indices"].args[0]
    part, names = extract(graph, pair, inside)
    given = dict(zip((n.name for n in graph.graph.find_nodes(op="placeholder")), inputs, strict=True))
    wanted = tuple(given[name] for name in names)
    compiled = compile(part, [], wanted, dynamic_shapes=_fixed(wanted), validate=False)
    return lambda: compiled(*wanted)


def _compiled(selector: Selector, inputs: Inputs, block: int, rest: Any) -> Any:
    one = BlockSparseAttention(select=selector, block_size=block)
    fixed = _fixed(inputs)
    return compile(Attention(), [one], inputs, dynamic_shapes=fixed, rest=rest, validate=False, strict=True)


def _fixed(inputs: Inputs) -> tuple[dict[int, Any], ...]:
    """No size varies."""
    return tuple({} for _ in inputs)
