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
from . import fuse_linear, fuse_residual, fuse_rope, pack_weights, policy
from .choices import Rest, Target
from .progress import build_kernels

Node = torch.fx.Node


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


@dataclass(frozen=True)
class Choice:
    """What runs a canonical node. spec: None for the reference form, and then ``reason`` says why.

    intended: the reference is what was asked for or what the policy prefers, so nobody need be warned.
    """

    target: str
    spec: KernelSpec | None = None
    reason: str = ""
    intended: bool = False


def choose(node: Node, op: CanonicalOp, requested: Target, rest: Rest) -> Choice:
    """The target that runs the node, its spec, and why it is the reference when it is."""
    if requested == "reference":
        return Choice("reference", None, "the reference was asked for", intended=True)
    target: str = requested
    if requested == "auto":
        target = "triton" if _device(node) == "cuda" else "cpp"
        if target == "cpp" and (why := policy.why_leave(node, op, rest)):
            return Choice("reference", None, why, intended=True)
    if op.spec is None:
        intended = op.name in policy.ELEMENTWISE
        return Choice("reference", None, f"no target has a kernel for {op.name}", intended)
    named = torch.fx.node.map_arg(arguments(node), value)
    schema = op.overload._schema.arguments
    args = [named[a.name] for a in schema if not a.kwarg_only]
    kwargs = {a.name: named[a.name] for a in schema if a.kwarg_only and a.name != "target"}
    try:
        return Choice(target, op.spec(*args, **kwargs, target=target))
    except (UnsupportedKernel, SpecError) as error:
        return Choice("reference", None, str(error))


def _device(node: Node) -> str:
    for item in (node, *node.all_input_nodes):
        if isinstance(found := value(item), torch.Tensor):
            return found.device.type
    return "cpu"


def set_target(node: Node, target: str) -> None:
    node.update_kwarg("target", target)


def retarget(module: torch.fx.GraphModule, requested: Target, rest: Rest) -> torch.fx.GraphModule:
    """Set targets in place, their kernels built: what a validated replacement will run."""
    _pack(module, requested)
    for node, choice in _choose_all(module, requested, rest).items():
        set_target(node, choice.target)
    module.recompile()
    return module


def _choose_all(module: torch.fx.GraphModule, requested: Target, rest: Rest) -> dict[Node, Choice]:
    """:func:`choose` for every canonical node, all kernels built at once; what cannot be built runs its reference."""
    choices = {node: choose(node, op, requested, rest) for node, op in canonical_nodes(module)}
    results = build_kernels([(choice.spec, choice.target) for choice in choices.values() if choice.spec is not None])
    for node, choice in choices.items():
        result = results.get((choice.spec, choice.target)) if choice.spec is not None else None
        if result is None or result.error is None:
            continue
        if not isinstance(result.error, MissingCompiler | MissingDependency | BuildError | UnsupportedKernel):
            raise result.error
        choices[node] = Choice("reference", None, str(result.error))
    return choices


def lower(module: torch.fx.GraphModule, requested: Target, rest: Rest) -> tuple[list[KernelUse], list[ReferenceUse]]:
    """Set every canonical node's target in place and build its kernel. Fallbacks are announced once.

    Returns the kernels in use and the ops left to their reference form, in graph order.
    """
    _fuse(module, requested)
    _pack(module, requested)
    kernels: list[KernelUse] = []
    references: list[ReferenceUse] = []
    fallbacks: list[ReferenceUse] = []
    for node, choice in _choose_all(module, requested, rest).items():
        op = _op(node)
        site = get_site(node) or Site(node.name, "", "", op)
        if (spec := choice.spec) is not None:
            try:
                kernel = load.load(spec, choice.target)
            except BuildError as error:  # it was built, and does not load
                choice = Choice("reference", None, str(error))
            else:
                kernels.append(KernelUse(site, op, node.name, spec, choice.target, kernel.digest, kernel.path))
        set_target(node, choice.target)
        if choice.spec is None:
            references.append(ReferenceUse(site, op, choice.reason))
            if not choice.intended:
                fallbacks.append(references[-1])
    _announce(fallbacks)
    module.recompile()
    return kernels, references


def _fuse(module: torch.fx.GraphModule, requested: Target) -> None:
    """Join what one kernel computes in one go."""
    devices = {_device(node) for node, _ in canonical_nodes(module)}
    if requested in ("auto", "cpp") and devices == {"cpu"}:
        fuse_linear.fuse(module)
        fuse_residual.fuse(module)
        fuse_rope.fuse(module)
    elif requested in ("triton", "triton-interpret") or (requested == "auto" and devices == {"cuda"}):
        fuse_linear.fuse(module, packed_only=True)
        pack_weights.join(module)


def _pack(module: torch.fx.GraphModule, requested: Target) -> None:
    """Quantized weights in the layout of the native CPU kernels, where those will read them."""
    if requested in ("auto", "cpp"):
        pack_weights.pack(module)


def _op(node: Node) -> str:
    assert isinstance(node.target, torch._ops.OpOverload)
    return node.target._opname


def _announce(fallbacks: list[ReferenceUse]) -> None:
    reasons: dict[str, list[str]] = {}
    for use in fallbacks:
        ops = reasons.setdefault(use.reason, [])
        if use.op not in ops:
            ops.append(use.op)
    for reason, ops in reasons.items():
        announce.announce(f"{', '.join(ops)} run in their reference form: {reason}", key=f"lower:{reason}:{ops}")


def describe(uses: list[KernelUse]) -> list[dict[str, Any]]:
    """Kernels as JSON-able rows."""
    return [{"site": u.site.id, "op": u.op, "target": u.target, "name": u.name, "spec": u.spec.to_dict()} for u in uses]
