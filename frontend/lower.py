"""Lower: each canonical op left in a graph gets the kernel of its device's target, or keeps its reference form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.fx

from ..codegen.render import render
from ..codegen.spec import KernelSpec, SpecError
from ..passes.site import Site, get_site
from ..passes.view import arguments, value
from ..runtime import announce, load
from ..runtime.errors import BuildError, MissingCompiler, MissingDependency, UnsupportedKernel
from ..runtime.ops import OPS, CanonicalOp, is_canonical
from .choices import Target

Node = torch.fx.Node

NO_CPP = "there are no native CPU kernels in this version, so CPU sites run through the rest of the graph's compiler"


@dataclass(frozen=True)
class KernelUse:
    """A kernel in use at one site.

    site: where in the model. op: the canonical op. node: the node's name in the lowered graph.
    spec, target: what was rendered; digest: the content fingerprint; path: the file in the cache.
    """

    site: Site
    op: str
    node: str
    spec: KernelSpec
    target: str
    digest: str
    path: Path

    @property
    def name(self) -> str:
        return f"{self.spec.kind}-{self.digest[:8]}"

    @cached_property
    def text(self) -> str:
        """The kernel's source."""
        return render(self.spec, self.target)


@dataclass(frozen=True)
class ReferenceUse:
    """A canonical op that runs its reference form, and why."""

    site: Site
    op: str
    reason: str


def canonical_nodes(module: torch.fx.GraphModule) -> Iterator[tuple[Node, CanonicalOp]]:
    for node in module.graph.nodes:
        if node.op == "call_function" and is_canonical(node.target):
            yield node, OPS[node.target._opname]


def choose(node: Node, op: CanonicalOp, requested: Target) -> tuple[str, KernelSpec | None, str]:
    """(target, spec, reason): the target that runs the node, its spec, and why it is the reference when it is."""
    if requested == "reference":
        return "reference", None, "the reference was asked for"
    target = requested
    if requested == "auto":
        target = "triton" if _device(node) == "cuda" else "cpp"
    if target == "cpp":
        return "reference", None, NO_CPP
    if op.spec is None:
        return "reference", None, f"no target has a kernel for {op.name}"
    named = torch.fx.node.map_arg(arguments(node), value)
    schema = op.overload._schema.arguments
    args = [named[a.name] for a in schema if not a.kwarg_only]
    kwargs = {a.name: named[a.name] for a in schema if a.kwarg_only and a.name != "target"}
    try:
        return target, op.spec(*args, **kwargs, target=target), ""
    except (UnsupportedKernel, SpecError) as error:
        return "reference", None, str(error)


def _device(node: Node) -> str:
    for item in (node, *node.all_input_nodes):
        if isinstance(found := value(item), torch.Tensor):
            return found.device.type
    return "cpu"


def set_target(node: Node, target: str) -> None:
    node.update_kwarg("target", target)


def retarget(module: torch.fx.GraphModule, requested: Target) -> torch.fx.GraphModule:
    """Set targets in place without building anything: what a validated replacement will run."""
    for node, op in canonical_nodes(module):
        set_target(node, choose(node, op, requested)[0])
    module.recompile()
    return module


def lower(module: torch.fx.GraphModule, requested: Target) -> tuple[list[KernelUse], list[ReferenceUse]]:
    """Set every canonical node's target in place and build its kernel. Fallbacks are announced once.

    Returns the kernels in use and the ops left to their reference form, in graph order.
    """
    kernels: list[KernelUse] = []
    references: list[ReferenceUse] = []
    for node, op in canonical_nodes(module):
        site = get_site(node) or Site(node.name, "", "", op.name)
        target, spec, reason = choose(node, op, requested)
        if spec is not None:
            try:
                kernel = load.load(spec, target)
            except (MissingCompiler, MissingDependency, BuildError, UnsupportedKernel) as error:
                target, spec, reason = "reference", None, str(error)
            else:
                kernels.append(KernelUse(site, op.name, node.name, spec, target, kernel.digest, kernel.path))
        set_target(node, target)
        if spec is None:
            references.append(ReferenceUse(site, op.name, reason))
    _announce(references, requested)
    module.recompile()
    return kernels, references


def _announce(references: list[ReferenceUse], requested: Target) -> None:
    if requested == "reference":
        return
    reasons: dict[str, list[str]] = {}
    for use in references:
        ops = reasons.setdefault(use.reason, [])
        if use.op not in ops:
            ops.append(use.op)
    for reason, ops in reasons.items():
        announce.announce(f"{', '.join(ops)} run in their reference form: {reason}", key=f"lower:{reason}:{ops}")


def describe(uses: list[KernelUse]) -> list[dict[str, Any]]:
    """Kernels as JSON-able rows."""
    return [{"site": u.site.id, "op": u.op, "target": u.target, "name": u.name, "spec": u.spec.to_dict()} for u in uses]
