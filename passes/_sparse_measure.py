"""What a block-sparse site reads and what its selection costs, measured on the values it sees in validation."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import torch.fx

from ..runtime.ops import OPS
from ..runtime.ops.block_lists import EMPTY, list_states
from ..runtime.ops.block_states import BLOCK_STATES
from .execute import Hook, HookedInterpreter, extract, undisturbed
from .view import arguments

Node = torch.fx.Node
ROUNDS = 3


def measure(
    after: torch.fx.GraphModule, values: list[Any], own: str, blocks: tuple[int, int], *, timed: bool
) -> dict[str, Any]:
    """density: blocks that are read, as a share of the blocks that the site's own mask needs. With ``timed``, also
    selection_ms and site_ms: medians of three runs of the selection alone, and of selection and attention.

    after: the replacement, its placeholders in the order of ``values``. own: text of the site's mask before.
    """
    # A selector may run an attention of its own before the one it selects for.
    kinds = (OPS["block_attention"].overload, OPS["attention"].overload)
    node = next(n for kind in kinds for n in after.graph.nodes if n.op == "call_function" and n.target is kind)
    named: dict[str, Any] = {}

    def keep(found: list[Any], result: Any) -> Any:
        known = dict(zip(node.all_input_nodes, found, strict=True))
        named.update(torch.fx.node.map_arg(arguments(node), known.__getitem__))
        return result

    with undisturbed():
        HookedInterpreter(after, {node: Hook(tuple(node.all_input_nodes), keep)}).run(*values)
        q, k = named["q"], named["k"]
        sizes = {"block_q": blocks[0], "block_k": blocks[1]}
        before = BLOCK_STATES(q, k, None, mask=own, **sizes) > EMPTY
        if "counts" in named:
            read = list_states(named["counts"], named["indices"], before.shape[-1]) > EMPTY
        else:
            read = BLOCK_STATES(q, k, None, mask=named["mask"], **sizes) > EMPTY
        details: dict[str, Any] = {"density": round(float(read.float().mean() / before.float().mean()), 4)}
        if timed:
            chosen = arguments(node)["counts"]
            inside = {n for n in after.graph.nodes if n.op == "call_function"}
            selection, names = extract(after, chosen, inside)
            given = dict(zip((n.name for n in after.graph.nodes if n.op == "placeholder"), values, strict=True))
            constants = {n.name: _attribute(after, n) for n in after.graph.nodes if n.op == "get_attr"}
            inputs = [(given | constants)[name] for name in names]
            details["selection_ms"] = _milliseconds(lambda: selection(*inputs), q.device)
            details["site_ms"] = _milliseconds(lambda: after(*values), q.device)
    return details


def _attribute(module: torch.fx.GraphModule, node: Node) -> Any:
    found: Any = module
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found


def _milliseconds(call: Any, device: torch.device) -> float:
    times = []
    for _ in range(ROUNDS + 1):  # the first one warms up
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return round(1000 * statistics.median(times[1:]), 3)
