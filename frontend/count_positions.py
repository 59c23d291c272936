"""Models that count positions themselves, from the length of a call, made to count from where the cache ends."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from ..passes.view import arguments, value

Node = torch.fx.Node
aten = torch.ops.aten
_COUNTS = (aten.arange.default, aten.arange.start, aten.arange.start_step)


def follow_cache(graph: torch.fx.Graph, tokens: Node, length: Node) -> set[Node]:
    """Let every ``arange`` over the call's tokens start at ``length``; returns those nodes and what follows from them.

    tokens: the input (B, L) whose L is counted. length: int32 (B,), the tokens held before the call, the same for all
    sequences. Whether what counts tokens counts positions is for the caller to see: a model that means something else
    computes something else in chunks.
    """
    count = value(tokens).shape[1]
    found = {node for node in graph.nodes if node.target in _COUNTS and _counts(arguments(node), count)}
    after: set[Node] = set()
    for node in found:
        with graph.inserting_after(node):
            start = graph.call_function(aten.select.int, (length, 0, 0))
        with graph.inserting_after(start):
            later = graph.call_function(aten.add.Tensor, (node, start))
        later.meta = dict(node.meta)
        start.meta = {"val": value(length)[0]} if isinstance(value(length), torch.Tensor) else {}
        node.replace_all_uses_with(later, delete_user_cb=lambda user, later=later: user is not later)
        after.add(later)
    return found | after


def _counts(named: dict[str, Any], count: Any) -> bool:
    if named.get("start", 0) != 0 or named.get("step", 1) != 1:
        return False
    end = value(named["end"])
    return isinstance(end, torch.SymInt) and isinstance(count, torch.SymInt) and end.node.expr == count.node.expr
