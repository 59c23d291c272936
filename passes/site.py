"""Where in the user's model a graph node comes from."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch.fx

_SITE = "tilewright_site"


@dataclass(frozen=True)
class Site:
    """One place in the model that a canonical op stands for.

    id: unique in its graph: module path, op, and a number when a module holds several.
    module: path of the innermost module, such as ``encoder.layer.0.attention.self``; empty when unknown.
    source: ``file:line`` of the model's code; empty when unknown.
    op: the canonical op's name.
    """

    id: str
    module: str
    source: str
    op: str


def module_path(node: torch.fx.Node) -> str:
    """The path of the module that ran when the node was traced, without Dynamo's ``L['self']`` in front."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    path = re.sub(r"^L\['(?:self|fn|args|mod)'\](?:\.forward\.__self__)?\.?", "", path)
    path = re.sub(r"\._modules\['([^']+)'\]|\['([^']+)'\]", lambda m: "." + (m[1] or m[2]), path)
    return path.strip(".")


def source_line(node: torch.fx.Node) -> str:
    """``file:line`` of the model's innermost frame; frames inside torch itself are skipped when others exist."""
    trace = node.meta.get("stack_trace") or ""
    frames = re.findall(r'File "([^"]+)", line (\d+)', trace)
    own = [frame for frame in frames if "/torch/" not in frame[0].replace("\\", "/")] or frames
    return f"{own[-1][0]}:{own[-1][1]}" if own else ""


def get_site(node: torch.fx.Node) -> Site | None:
    return node.meta.get(_SITE)


def set_site(node: torch.fx.Node, site: Site) -> None:
    node.meta[_SITE] = site


def name_site(origin: torch.fx.Node, op: str, taken: set[str]) -> Site:
    """A site for ``op`` found at ``origin`` whose id is not in ``taken``; the id is added."""
    module = module_path(origin)
    base = f"{module}/{op}" if module else op
    name, count = base, 1
    while name in taken:
        count += 1
        name = f"{base}#{count}"
    taken.add(name)
    return Site(name, module, source_line(origin), op)
