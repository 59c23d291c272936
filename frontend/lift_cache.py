"""From a graph whose keys are all its own to one that reads and writes a KV cache.

Each ``cached_attention`` (and ``streaming_attention``) becomes its ``_step`` with its store as new inputs;
``length``, ``first`` and the page table are shared by all. The padding mask is no input any more: ``first`` says what
it said. One graph serves prefill, chunks and decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from ..passes.site import Site, get_site
from ..passes.view import arguments, value
from ..runtime.errors import NotADecoder
from ..runtime.kv_cache import AnySite, CacheSite
from ..runtime.ops import OPS
from ..runtime.streaming_site import StreamingSite
from .capture import copy_module
from .constants import drop_unread
from .count_positions import follow_cache

Node = torch.fx.Node
aten = torch.ops.aten
CACHED = OPS["cached_attention"].overload
STREAMING = OPS["streaming_attention"].overload
# Ops that mix tokens of a sequence; in a decoder's graph none but the cached ones may be left.
MIXING = frozenset(
    {"attention", "block_attention", "block_scores", "gated_attention", "group_attention", "routed_attention"}
)
# Tensors of which every entry is the same number, wherever it stands.
_FILLS = frozenset({"full", "zeros", "ones", "empty", "new_full", "new_zeros", "new_ones", "expand", "scalar_tensor"})
_FILLS |= {"full_like", "zeros_like", "ones_like", "empty_like", "sym_size", "_assert_tensor_metadata"}


@dataclass(frozen=True)
class Lifted:
    """module: takes the values of ``inputs`` in order, then length, first, the page table (when ``paged``) and the
    stores of ``sites``. inputs: names of the model's inputs that are left."""

    module: torch.fx.GraphModule
    inputs: tuple[str, ...]
    sites: tuple[AnySite, ...]
    paged: bool


def lift(
    lowered: torch.fx.GraphModule,
    names: Sequence[str],
    tokens: str,
    mask: str = "attention_mask",
    counts: bool = False,
) -> Lifted:
    """A copy of ``lowered`` that shares its tensors and keeps its cache in inputs.

    names: of the graph's inputs, in order. tokens: which of them holds the token ids (B, L). mask: which one the
    padding mask. counts: let positions that the model counts itself follow the cache. Raises
    :class:`~tilewright.runtime.errors.NotADecoder` for a graph that cannot run token by token.
    """
    module = copy_module(lowered)
    graph = module.graph
    placeholders = dict(zip(names, graph.find_nodes(op="placeholder"), strict=True))
    nodes = [node for node in graph.nodes if node.target in (CACHED, STREAMING)]
    last = list(placeholders.values())[-1]

    def add(name: str) -> Node:
        nonlocal last
        with graph.inserting_after(last):
            last = graph.placeholder(name)
        return last

    length, first = add("cache_length"), add("cache_first")
    sites = [_site(node) for node in nodes]
    paged = any(site.layout.page for site in sites)
    pages = add("cache_pages") if paged else None
    for index, (node, site) in enumerate(zip(nodes, sites, strict=True)):
        store = [add(f"cache_{index}_{name}") for name in site.names()]
        with graph.inserting_before(node):
            step = graph.call_function(*_step(node, store, length, first, pages))
        step.meta = dict(node.meta)
        node.replace_all_uses_with(step)
        graph.erase_node(node)
    _forget_mask(graph, placeholders.get(mask), placeholders[tokens])
    graph.eliminate_dead_code()
    followed = follow_cache(graph, placeholders[tokens], length) if counts else set()
    _check_positions(graph, set(placeholders.values()), followed)
    left = []
    for name, node in placeholders.items():
        if node.users:
            left.append(name)
        else:
            graph.erase_node(node)
    if mask in left:
        raise NotADecoder(
            f"{mask} is read by more than the attention ({next(iter(placeholders[mask].users))}), as when positions "
            "are counted from it: a cached call has no such mask, so the model needs position_ids as an input"
        )
    drop_unread(module)
    graph.lint()
    module.recompile()
    return Lifted(module, tuple(left), tuple(sites), paged)


def _step(
    node: Node, store: list[Node], length: Node, first: Node, pages: Node | None
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The op that does the node's work on a store, and its arguments."""
    named = arguments(node)
    if node.target is STREAMING:
        given = tuple(named[name] for name in ("q", "k", "v", "q_far", "k_far"))
        keep = {name: named[name] for name in ("scale", "window", "sinks", "limit", "target")}
        return torch.ops.tilewright.streaming_attention_step.default, (*given, store, length, first), keep
    given = tuple(named[name] for name in ("q", "k", "v", "rebuild"))
    keep = {name: named[name] for name in ("scale", "mask", "normalizer", "format", "target")}
    return torch.ops.tilewright.cached_attention_step.default, (*given, store, length, first, pages), keep


def _site(node: Node) -> AnySite:
    named = arguments(node)
    k, v = value(named["k"]), value(named["v"])
    site = get_site(node) or Site(node.name, "", "", "cached_attention")
    if node.target is STREAMING:
        widths = (int(k.shape[1]), int(k.shape[3]), int(v.shape[3]))
        return StreamingSite(site.id, *widths, k.dtype, named["window"], named["sinks"], named["k_far"] is not None)
    sizes = (int(k.shape[1]), int(k.shape[3]), int(v.shape[1]), int(v.shape[3]))
    return CacheSite(site.id, named["format"], *sizes, k.dtype)


def _forget_mask(graph: torch.fx.Graph, mask: Node | None, tokens: Node) -> None:
    """Sizes that were read off the padding mask are read off the token ids, which have the same."""
    if mask is None:
        return
    graph.eliminate_dead_code()
    for user in list(mask.users):
        if user.target is aten._assert_tensor_metadata.default:
            graph.erase_node(user)
        elif user.target is aten.sym_size.int:
            # The ids come before anything computed, but perhaps after this node's place among the inputs.
            user.replace_input_with(mask, tokens)


def why_not_token_by_token(module: torch.fx.GraphModule, beside: frozenset[str] = frozenset()) -> str | None:
    """What in a rewritten graph still looks at other tokens without a cache; None for nothing.

    beside: names of nodes that look at something else, such as an encoder's states.
    """
    for node in module.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        site = get_site(node)
        where = site.id if site else node.name
        name = node.target._opname
        if node.name in beside:
            continue
        if node.target.namespace == "tilewright" and name in MIXING:
            return where
        if name.startswith(("scaled_dot_product", "_scaled_dot_product")):
            return where
        if name in ("softmax", "_softmax") and isinstance(found := value(node), torch.Tensor):
            dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", -1)
            if isinstance(dim, int) and isinstance(found.shape[dim], torch.SymInt):
                return where
    return None


def _check_positions(graph: torch.fx.Graph, inputs: set[Node], followed: set[Node]) -> None:
    """Nothing may depend on how many tokens a call has: position t of a chunk is not token t of the sequence."""
    from_tokens: set[Node] = set()
    for node in graph.nodes:
        if node in inputs or node in followed:
            from_tokens.add(node)
        if node.op != "call_function" or node in followed:
            continue
        tensors = [n for n in node.all_input_nodes if isinstance(value(n), torch.Tensor) or n in from_tokens]
        sizes = [n for n in node.all_input_nodes if isinstance(value(n), torch.SymInt)]
        if isinstance(value(node), torch.SymInt | int):
            continue
        if any(n in from_tokens for n in tensors) or any(n.op == "placeholder" for n in tensors):
            from_tokens.add(node)
            continue
        name = getattr(node.target, "_opname", "")
        if sizes and name not in _FILLS and isinstance(value(node), torch.Tensor):
            raise NotADecoder(
                f"the model counts positions itself, from the length of the call ({node.name}: {name}), and a cached "
                "call starts in the middle: its forward needs position_ids",
                site=_module(node),
            )


def _module(node: Node) -> str:
    stack: Any = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else ""
