"""Draw a small directed graph top to bottom: layers by longest path, crossings reduced by barycentres.

"Methods for Visual Understanding of Hierarchical System Structures", Sugiyama, Tagawa and Toda 1981, with the
coordinates relaxed towards each node's neighbours. Enough for the sixty boxes a segment has at most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx

GAP_X, GAP_Y = 22.0, 30.0
_WAYPOINT_WIDTH = 8.0


@dataclass(frozen=True)
class Placed:
    """Where a node stands: the middle of its box, in pixels."""

    x: float
    y: float


@dataclass(frozen=True)
class Layout:
    """positions: by node. routes: by edge, the points it passes, ends included. width, height: of the picture."""

    positions: dict[int, Placed]
    routes: dict[tuple[int, int], list[Placed]]
    width: float
    height: float


def layered(sizes: Mapping[Any, tuple[float, float]], edges: Sequence[tuple[int, int]]) -> Layout:
    """Place nodes of the given (width, height) so that every edge runs downwards. Raises for cycles."""
    dag: nx.DiGraph = nx.DiGraph()
    dag.add_nodes_from(sizes)
    dag.add_edges_from(edges)
    layers, chains = _layers(dag)
    widths = {node: sizes[node][0] if node in sizes else _WAYPOINT_WIDTH for layer in layers for node in layer}
    links: nx.DiGraph = nx.DiGraph()
    links.add_nodes_from(widths)
    for chain in chains.values():
        nx.add_path(links, chain)
    _order(layers, links)
    xs = _coordinates(layers, links, widths)
    left = min((xs[n] - widths[n] / 2 for n in widths), default=0.0)
    right = max((xs[n] + widths[n] / 2 for n in widths), default=0.0)
    ys: dict[Any, float] = {}
    top = 0.0
    heights = []
    for layer in layers:
        height = max((sizes[n][1] for n in layer if n in sizes), default=0.0)
        ys.update(dict.fromkeys(layer, top + height / 2))
        heights.append(height)
        top += height + GAP_Y
    place = {node: Placed(xs[node] - left, ys[node]) for node in widths}
    routes = {edge: [place[node] for node in chain] for edge, chain in chains.items()}
    return Layout({n: place[n] for n in sizes}, routes, right - left, max(top - GAP_Y, 0.0))


def _layers(dag: nx.DiGraph) -> tuple[list[list[Any]], dict[tuple[int, int], list[Any]]]:
    """Nodes by layer, with waypoints where an edge crosses layers, and each edge's chain of nodes."""
    depth: dict[int, int] = {}
    for node in nx.topological_sort(dag):
        depth[node] = max((depth[p] + 1 for p in dag.predecessors(node)), default=0)
    # A source is drawn right above the first that uses it.
    for node in reversed(list(nx.topological_sort(dag))):
        if dag.in_degree(node) == 0 and dag.out_degree(node):
            depth[node] = min(depth[s] for s in dag.successors(node)) - 1
    layers: list[list[Any]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for node in dag:
        layers[depth[node]].append(node)
    chains: dict[tuple[int, int], list[Any]] = {}
    for a, b in dag.edges:
        points: list[Any] = [("waypoint", a, b, level) for level in range(depth[a] + 1, depth[b])]
        for level, point in enumerate(points, depth[a] + 1):
            layers[level].append(point)
        chains[a, b] = [a, *points, b]
    return layers, chains


def _order(layers: list[list[Any]], links: nx.DiGraph) -> None:
    """Sort each layer by the mean place of its neighbours, downwards and upwards, keeping the best."""
    best, fewest = [list(layer) for layer in layers], _crossings(layers, links)
    for sweep in range(12):
        down = sweep % 2 == 0
        pairs = list(zip(layers, layers[1:], strict=False))
        for upper, lower in pairs if down else reversed(pairs):
            fixed, moving = (upper, lower) if down else (lower, upper)
            place = {node: index for index, node in enumerate(fixed)}
            near = links.predecessors if down else links.successors
            means = {}
            for index, node in enumerate(moving):
                found = [place[n] for n in near(node) if n in place]
                means[node] = sum(found) / len(found) if found else float(index)
            moving.sort(key=means.__getitem__)
        if (crossings := _crossings(layers, links)) < fewest:
            best, fewest = [list(layer) for layer in layers], crossings
    layers[:] = best


def _crossings(layers: list[list[Any]], links: nx.DiGraph) -> int:
    count = 0
    for upper, lower in zip(layers, layers[1:], strict=False):
        place = {node: index for index, node in enumerate(lower)}
        ends = [
            place[s]
            for node in upper
            for s in sorted(place.keys() & set(links.successors(node)), key=place.__getitem__)
        ]
        count += sum(a > b for i, a in enumerate(ends) for b in ends[i + 1 :])
    return count


def _coordinates(layers: list[list[Any]], links: nx.DiGraph, widths: Mapping[Any, float]) -> dict[Any, float]:
    xs: dict[Any, float] = {}
    for layer in layers:
        x = 0.0
        for node in layer:
            xs[node] = x + widths[node] / 2
            x += widths[node] + GAP_X
        for node in layer:
            xs[node] -= x / 2
    for sweep in range(24):
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            near = [list(links.predecessors(n)) + list(links.successors(n)) for n in layer]
            wanted = [sum(xs[m] for m in ns) / len(ns) if ns else xs[n] for n, ns in zip(layer, near, strict=True)]
            xs.update(zip(layer, _spread(wanted, [widths[n] for n in layer]), strict=True))
    return xs


def _spread(wanted: Sequence[float], widths: Sequence[float]) -> list[float]:
    """The places nearest to ``wanted``, in order and without overlap: clusters move as one to their mean."""
    clusters: list[tuple[float, list[float]]] = []  # (mean of wanted minus offset, offsets)
    for want in wanted:
        clusters.append((want, [0.0]))
        while len(clusters) > 1:
            (left, left_offsets), (right, right_offsets) = clusters[-2:]
            index = sum(len(c[1]) for c in clusters[:-1])
            need = left_offsets[-1] + (widths[index - 1] + widths[index]) / 2 + GAP_X
            if left + need <= right:
                break
            weight = len(left_offsets) + len(right_offsets)
            base = (left * len(left_offsets) + (right - need) * len(right_offsets)) / weight
            clusters[-2:] = [(base, left_offsets + [need + offset for offset in right_offsets])]
    return [base + offset for base, offsets in clusters for offset in offsets]
