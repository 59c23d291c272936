"""Condense a graph of thousands of nodes to what fits on a page.

Three steps: what only moves or reshapes data is looked through; plain ATen nodes of the same module that hang
together become one box, canonical ops stay boxes of their own; and repeated blocks (``layers.0`` ... ``layers.29``)
that look the same are drawn once with a count.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import networkx as nx
import torch
import torch.fx

from ..passes.site import get_site, module_path
from ..passes.view import arguments, value
from ..runtime.ops import is_canonical

Node = torch.fx.Node

# Ops that compute nothing: edges run through them.
_MOVES = frozenset(
    "view reshape _unsafe_view transpose permute t contiguous expand expand_as slice unsqueeze squeeze select to alias "
    "clone detach dropout _to_copy flatten unflatten split chunk unbind narrow sym_size movedim lift_fresh_copy "
    "_assert_tensor_metadata _assert_scalar getitem type_as repeat_interleave broadcast_to".split()
)
MAX_BOXES = 60
_FOLD_FROM = 3  # plain nodes of other modules than a box's own are named up to this many


@dataclass
class Box:
    """One drawn node.

    title: the op, or the ops that were put together. where: module path inside its segment.
    kind: ``op`` (canonical), ``plain`` (ATen), ``input`` (comes from outside the segment) or ``output``.
    sites: ids of the sites it stands for. detail: arguments worth a tooltip. nodes: how many graph nodes.
    """

    id: int
    title: str
    where: str
    kind: str
    sites: tuple[str, ...] = ()
    detail: str = ""
    nodes: int = 1
    target: str = ""


@dataclass
class Segment:
    """A part of the model drawn as one picture; ``count`` equal ones are drawn once."""

    key: str
    name: str
    boxes: list[Box] = field(default_factory=list)
    edges: list[tuple[int, int]] = field(default_factory=list)
    members: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.members)

    @property
    def sites(self) -> set[str]:
        return {site for box in self.boxes for site in box.sites}


def condense(module: torch.fx.GraphModule) -> list[Segment]:
    """The segments of a graph, in the order in which they run, repeated blocks one by one."""
    nodes = [node for node in module.graph.nodes if _is_drawn(node)]
    paths = _paths(module)
    dag = _drawn_dag(module, set(nodes))
    keys = _segment_keys(nodes, paths, dag)
    members: dict[str, list[Node]] = {}
    for node in nodes:
        members.setdefault(keys[node], []).append(node)
    return [_segment(key, inside, paths, dag, keys) for key, inside in members.items()]


def condense_pair(
    before: torch.fx.GraphModule | None, after: torch.fx.GraphModule, mark: Callable[[str], str] = lambda site: ""
) -> list[tuple[Segment | None, Segment | None]]:
    """Segments of two stages of a graph side by side; blocks that look the same in both are put together.

    mark: a text for a site id, such as the pass that rewrote it; blocks whose marks differ look different.
    """
    old = {segment.key: segment for segment in (condense(before) if before is not None else ())}
    new = {segment.key: segment for segment in condense(after)}
    merged: dict[object, tuple[Segment | None, Segment | None]] = {}
    for key in dict.fromkeys((*old, *new)):
        pair = (old.get(key), new.get(key))
        look = key if key.startswith("after ") else tuple(s and _look(s, mark) for s in pair)
        if look in merged:
            pair = tuple(_join(known, one) for known, one in zip(merged[look], pair, strict=True))  # type: ignore[assignment]
        merged[look] = pair
    return list(merged.values())


def _opname(node: Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._opname
    return getattr(node.target, "__name__", str(node.target))


def _is_drawn(node: Node) -> bool:
    if node.op in ("placeholder", "output"):
        return node.op == "placeholder" and bool(node.users)
    if node.op != "call_function" or _opname(node) in _MOVES:
        return False
    if get_site(node) is not None:
        return True
    val = value(node)
    # Positions, masks and sizes are not what anyone looks for in the picture.
    return not isinstance(val, torch.Tensor) or val.dtype.is_floating_point or val.dtype.is_complex


def _paths(module: torch.fx.GraphModule) -> dict[Node, str]:
    """Module path by node; a node without one takes its input's."""
    paths: dict[Node, str] = {}
    for node in module.graph.nodes:
        site = get_site(node)
        path = site.module if site is not None and site.module else module_path(node)
        if not path and node.op == "call_function":
            path = next((paths[p] for p in reversed(node.all_input_nodes) if paths.get(p)), "")
        paths[node] = path
    return paths


def _drawn_dag(module: torch.fx.GraphModule, drawn: set[Node]) -> nx.DiGraph:
    """Edges between drawn nodes, looking through the others; sizes that flow along are no edges."""
    dag: nx.DiGraph = nx.DiGraph()
    dag.add_nodes_from(node for node in module.graph.nodes if node in drawn)
    origins: dict[Node, dict[Node, None]] = {}
    for node in module.graph.nodes:
        sources = {source: None for producer in node.all_input_nodes for source in origins[producer]}
        if node in drawn:
            dag.add_edges_from((source, node) for source in sources)
            sources = {node: None}
        elif isinstance(value(node), int | float | torch.SymInt | torch.SymFloat | torch.SymBool):
            sources = {}
        origins[node] = sources
    return dag


_BLOCK = re.compile(r"^(.*?(?:^|\.)\d+)(?=\.|$)")


def block_of(path: str) -> str:
    """``model.layers.3.self_attn`` -> ``model.layers.3``; empty outside of numbered blocks."""
    found = _BLOCK.match(path)
    return found[1] if found else ""


def _segment_keys(nodes: list[Node], paths: Mapping[Node, str], dag: nx.DiGraph) -> dict[Node, str]:
    """Numbered blocks are segments; other nodes are told apart by the kinds of blocks that come before them."""
    seen: dict[Node, frozenset[str]] = {}
    keys: dict[Node, str] = {}
    for node in nodes:
        before = frozenset().union(*(seen[p] for p in dag.predecessors(node)))
        block = block_of(paths[node])
        if block:
            before |= {re.sub(r"\d+$", "", block)}
        seen[node] = before
        keys[node] = block or "after " + ", ".join(sorted(name.strip(".") for name in before)) * bool(before)
    return keys


def _segment(
    key: str, inside: list[Node], paths: Mapping[Node, str], dag: nx.DiGraph, keys: Mapping[Node, str]
) -> Segment:
    block = "" if key.startswith("after ") else key
    name = block or ("inputs" if key == "after " else key)
    segment = Segment(key, name, members=[block or name])
    groups = _groups(inside, paths, dag, lambda node: _home(node, paths[node]))
    if len(groups) > MAX_BOXES:
        groups = _groups(inside, paths, dag, lambda node: _child(paths[node], block))
    index: dict[Node, int] = {}
    for number, members in enumerate(groups):
        index.update(dict.fromkeys(members, number))
        segment.boxes.append(_box(number, members, paths, block))
    edges: dict[tuple[int, int], None] = {}
    stubs: dict[str, int] = {}
    for node in inside:
        for source in dag.predecessors(node):
            if source not in index:
                label = _outside(keys[source], block)
                if label not in stubs:
                    stubs[label] = len(segment.boxes)
                    segment.boxes.append(Box(stubs[label], label, "", "input"))
                edges[stubs[label], index[node]] = None
            elif index[source] != index[node]:
                edges[index[source], index[node]] = None
    segment.edges = sorted(edges)
    return segment


def _outside(key: str, block: str) -> str:
    prefix = re.sub(r"\d+$", "", block)
    if key.startswith("after "):
        return "inputs" if key == "after " else key
    return "previous" if prefix and key.startswith(prefix) else re.sub(r"\.?\d+$", "", key)


def _home(node: Node, path: str) -> str | None:
    """What plain nodes must share to become one box: the site they were written for, or the module."""
    if is_canonical(node.target):
        return None
    site = get_site(node)
    return f"site {site.id}" if site is not None else f"module {path}"


def _child(path: str, block: str) -> str:
    rest = path[len(block) :].strip(".") if block else path
    return ".".join(rest.split(".")[: 1 if block else 2])


def _groups(
    inside: list[Node], paths: Mapping[Node, str], dag: nx.DiGraph, key: Callable[[Node], str | None]
) -> list[list[Node]]:
    """Put neighbours of equal key together as long as no cycle between groups comes of it; None stays alone."""
    groups: list[list[Node]] = []
    of: dict[Node, int] = {}
    condensed: nx.DiGraph = nx.DiGraph()
    members = set(inside)
    for node in inside:
        sources = [of[p] for p in dag.predecessors(node) if p in members]
        own = key(node) if node.op != "placeholder" else None
        # A group may take the node when every other group it reads from is not below that group.
        home = next(
            (
                g
                for g in sorted(set(sources), reverse=True)
                if own is not None
                and key(groups[g][0]) == own
                and not any(other != g and nx.has_path(condensed, g, other) for other in sources)
            ),
            None,
        )
        if home is None:
            home = len(groups)
            groups.append([])
            condensed.add_node(home)
        groups[home].append(node)
        of[node] = home
        condensed.add_edges_from((source, home) for source in sources if source != home)
    return groups


def _box(number: int, members: list[Node], paths: Mapping[Node, str], block: str) -> Box:
    first = members[0]
    if first.op == "placeholder":
        return Box(number, str(first.target), _shape(first), "input")
    path = paths[first]
    where = path[len(block) :].strip(".") if block else path
    sites = tuple(dict.fromkeys(site.id for node in members if (site := get_site(node)) is not None))
    canonical = [node for node in members if is_canonical(node.target)]
    if len(members) == 1 and canonical:
        given = arguments(first)
        detail = ", ".join(
            f"{name}={item}" for name, item in given.items() if not isinstance(item, Node | list | tuple | None)
        )
        return Box(number, _opname(first), where, "op", sites, detail, 1, str(given.get("target", "")))
    names: dict[str, int] = {}
    for node in members:
        names[_opname(node)] = names.get(_opname(node), 0) + 1
    listed = [name if count == 1 else f"{count} {name}" for name, count in names.items()]
    title = ", ".join(listed) if len(listed) <= _FOLD_FROM else f"{', '.join(listed[:2])} + {len(listed) - 2} more"
    return Box(number, title, where, "op" if canonical else "plain", sites, ", ".join(listed), len(members))


def _shape(node: Node) -> str:
    val = value(node)
    return " × ".join(map(str, val.shape)) if isinstance(val, torch.Tensor) else ""


def _look(segment: Segment, mark: Callable[[str], str]) -> object:
    """What two blocks must share to be drawn as one. Where inputs come from does not count: the first block of a
    stack reads the embeddings, the others their predecessor."""
    inner = {box.id for box in segment.boxes if box.kind != "input"}
    return (
        re.sub(r"\d+$", "", segment.key),
        tuple(
            (b.title, b.where, b.kind, b.target, tuple(mark(s) for s in b.sites))
            for b in segment.boxes
            if b.id in inner
        ),
        tuple(edge for edge in segment.edges if edge[0] in inner and edge[1] in inner),
    )


def _join(known: Segment | None, one: Segment | None) -> Segment | None:
    """One segment for both, drawn as the one that has a predecessor."""
    if known is None or one is None:
        return known
    reads = any(box.kind == "input" and box.title == "previous" for box in known.boxes)
    shown = known if reads else one
    return Segment(known.key, known.name, shown.boxes, shown.edges, [*known.members, *one.members])


def merged_name(members: Iterable[str]) -> str:
    """``model.layers.0`` ... ``model.layers.29`` as ``model.layers.{0-29}``."""
    from .report_print import merge_sites

    names = list(members)
    return names[0] if len(names) == 1 else merge_sites(names)
