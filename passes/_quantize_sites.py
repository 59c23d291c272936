"""Which weights Quantize takes up, in which format, and why the others stay float."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.fx

from ..codegen.weight_format import WeightFormat
from ..runtime.errors import BadPassOption, QuantizationError
from ..runtime.ops import OPS
from ._key_projection import constant as plain_constant
from .base import SiteContext
from .rounding import WeightSite
from .rounding.constants import constant, storage
from .rounding.grid import scales_dtype
from .site import Site, get_site, name_site, set_site
from .view import GraphView, arguments, is_assertion, value

Node = torch.fx.Node
aten = torch.ops.aten

LINEAR = OPS["linear"].overload
EMBEDDING = aten.embedding.default
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FLOAT = 16
"""As bits of a site: leave it as it is."""


def find_candidates(view: GraphView) -> list[Node]:
    """Linear layers and embeddings in graph order, each with a site of its own.

    What earlier passes built has the site of what it was built for, which several layers may share.
    """
    found = [n for n in view.graph.nodes if n.op == "call_function" and n.target in (LINEAR, EMBEDDING)]
    taken = {site.id for node in view.graph.nodes if (site := get_site(node)) is not None}
    seen: set[str] = set()
    for node in found:
        op = "linear" if node.target is LINEAR else "embedding"
        site = get_site(node)
        if site is None:
            set_site(node, name_site(node, op, taken))
        elif site.op != op or site.id in seen:
            module = site.module or site.id.rpartition("/")[0]
            base, count = f"{module}/{op}" if module else op, 1
            name = base
            while name in taken:
                count += 1
                name = f"{base}#{count}"
            taken.add(name)
            set_site(node, Site(name, site.module, site.source, op))
        seen.add(_id(node))
    return found


def _id(node: Node) -> str:
    site = get_site(node)
    assert site is not None
    return site.id


def matches(site: Site, pattern: str) -> bool:
    """Whether a pattern (as of a shell: ``*`` and ``?``) names the site by its module's path or its id."""
    return fnmatch.fnmatchcase(site.module, pattern) or fnmatch.fnmatchcase(site.id, pattern)


def head_nodes(view: GraphView) -> set[Node]:
    """The linear layers that give a language model's logits.

    Such a layer has a row for each row of an embedding that is looked up in the graph, and its result reaches the
    graph's outputs through no other linear layer, matrix product or attention.
    """
    vocabularies = {
        size
        for node in view.graph.find_nodes(op="call_function", target=EMBEDDING)
        if isinstance(size := value(arguments(node)["weight"]).shape[0], int)
    }
    last = _after_last_product(view)
    found = set()
    for node in view.graph.find_nodes(op="call_function", target=LINEAR):
        rows = value(node).shape[-1]
        if node in last and isinstance(rows, int) and rows in vocabularies:
            found.add(node)
    return found


_PRODUCTS = frozenset("aten::matmul aten::mm aten::bmm aten::addmm aten::baddbmm aten::einsum aten::linear".split())


def _after_last_product(view: GraphView) -> set[Node]:
    """Nodes that nothing with a matrix product comes after on the way to the outputs."""
    later: dict[Node, bool] = {}
    for node in reversed(view.graph.nodes):
        later[node] = any(later[user] or _multiplies(user) for user in node.users)
    return {node for node, product in later.items() if not product}


def _multiplies(node: Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return node.target._schema.name in _PRODUCTS or node.target is LINEAR or "attention" in node.target._opname


class Chooser:
    """Decides about the candidates of one graph. ``options`` are those of :class:`Quantize`."""

    def __init__(
        self,
        view: GraphView,
        *,
        base: WeightFormat,
        whole: bool,
        skip: Sequence[str],
        bits: Mapping[str, int],
        embeddings: bool,
        head: bool,
    ) -> None:
        self.view, self.base, self.whole = view, base, whole
        self.skip, self.bits, self.embeddings, self.head = skip, bits, embeddings, head
        self.heads = head_nodes(view)
        self.unused = {*skip, *bits}
        """Patterns that named no site yet."""

    def choose(self, contexts: Iterable[SiteContext]) -> tuple[dict[str, WeightSite], dict[Node, str]]:
        """The sites to quantize by id, and of the others the reason that they stay float.

        Raises :class:`BadPassOption` for sites with one weight and different settings, :class:`QuantizationError` for
        weights that are not finite; both name the site.
        """
        sites: dict[str, WeightSite] = {}
        reasons: dict[Node, str] = {}
        first: dict[Any, WeightSite] = {}
        for context in contexts:
            outcome = self._one(context)
            if isinstance(outcome, str):
                reasons[context.node] = outcome
                continue
            form, weight = outcome
            plain = plain_constant(self.view, site_weight := arguments(context.node)["weight"])
            key = site_weight if plain is None else storage(plain)
            leader = first.get(key)
            site = WeightSite(context.site.id, context, form, self.whole, context.site.id)
            if leader is None:
                _check_finite(weight, context)
                first[key] = site
            else:
                _check_alike(leader, site)
                site = WeightSite(site.id, context, form, self.whole, leader.id)
            sites[site.id] = site
        return sites, reasons

    def _one(self, context: SiteContext) -> tuple[WeightFormat, torch.Tensor] | str:
        """The format and the weight of a site, or why it stays float."""
        site, node = context.site, context.node
        named = [pattern for pattern in (*self.skip, *self.bits) if matches(site, pattern)]
        self.unused.difference_update(named)
        if skipped := next((p for p in named if p in self.skip), None):
            return f"skip names it ({skipped})"
        bits = next((self.bits[p] for p in named if p in self.bits), None)
        if bits == FLOAT:
            return f"bits_per_site leaves it at {FLOAT} bits"
        if bits is None and node.target is EMBEDDING and not self.embeddings:
            return "it is an embedding: embeddings=True takes it too"
        if bits is None and node in self.heads and not self.head:
            return "it gives the logits: head=True takes it too"
        weight = arguments(node)["weight"]
        if (reason := self._why_not(node, weight)) is not None:
            return reason
        tensor = constant(self.view, weight)
        if tensor is None:
            return "its weight is computed in the graph from the model's inputs"
        if tensor.is_floating_point() and tensor.dtype not in DTYPES:
            return f"its weight is {tensor.dtype} already"
        rows, columns = tensor.shape
        if not rows or not columns:
            return "its weight has no elements"
        form = self.base if bits is None else self.base.changed(bits=bits)
        if form.group >= columns:
            form = form.changed(group=0)
        if node.target is EMBEDDING:
            form = form.changed(activations=0)
        return form.changed(scales=scales_dtype(tensor, form)), tensor

    def _why_not(self, node: Node, weight: Node) -> str | None:
        if not isinstance(value(weight), torch.Tensor) or not isinstance(value(node), torch.Tensor):
            return "the graph carries no shapes here"
        if weight.op == "placeholder":
            return (
                "its weight is an input of the graph (the model is captured call by call): give compile() example "
                "inputs, so that the graph holds its weights"
            )
        if not value(node).is_floating_point():
            return f"it computes {value(node).dtype}"
        if (written := self._written(weight)) is not None:
            return f"its weight is written into by {written}"
        return None

    def _written(self, weight: Node) -> str | None:
        """The node that changes, in place, a constant which ``weight`` is computed from; None when nothing does."""
        stack, seen = [weight], {weight}
        names = set()
        while stack:
            one = stack.pop()
            if one.op == "get_attr":
                names.add(one.target)
            for producer in one.all_input_nodes:
                if producer not in seen:
                    seen.add(producer)
                    stack.append(producer)
        for node in self.view._mutating:
            schema = getattr(node.target, "_schema", None)
            for argument, info in zip(node.args, schema.arguments if schema else (), strict=False):
                if info.alias_info is None or not info.alias_info.is_write or not isinstance(argument, Node):
                    continue
                if argument in seen or argument.target in names:
                    return node.name
        return None


def _check_finite(weight: torch.Tensor, context: SiteContext) -> None:
    if bool(torch.isfinite(weight.abs().amax())):
        return
    bad = int((~weight.isfinite()).sum())
    what = "NaN" if bool(weight.isnan().any()) else "infinite"
    raise QuantizationError(
        f"{bad} of the {weight.numel()} numbers of its weight are {what}: mend the model, or leave this site out with "
        "skip=",
        site=context.site.id,
        source=context.site.source,
    )


def _check_alike(leader: WeightSite, site: WeightSite) -> None:
    one, other = (s.format.changed(activations=0) for s in (leader, site))
    if one != other:
        raise BadPassOption(
            f"quantize: {leader.id} and {site.id} share one weight, which is kept once, but bits_per_site asks for "
            f"{one.bits} and {other.bits} bits: give both the same"
        )


# ------------------------------------------------------------------------------------------------------------- bytes


def constant_bytes(view: GraphView) -> int:
    """Bytes of all tensors that the graph reads and does not get as inputs; what is shared counts once."""
    return sum(tensor.nbytes for _, tensor in _read(view))


def float_bytes(view: GraphView) -> dict[str, int]:
    """Bytes of the floating-point constants by the operator that reads them first, the largest first.

    Scales and zeros of quantized weights are not among them.
    """
    found: dict[str, int] = defaultdict(int)
    for node, tensor in _read(view):
        name = _reader(node)
        if tensor.is_floating_point() and not name.startswith("quantized"):
            found[name] += tensor.nbytes
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _reader(node: Node) -> str:
    user = min((user for user in node.users if not is_assertion(user)), default=min(node.users))
    return user.target._opname if isinstance(user.target, torch._ops.OpOverload) else str(user.op)


def _read(view: GraphView) -> list[tuple[Node, torch.Tensor]]:
    """The constants that something reads, each with the first node that is it."""
    found: dict[Any, tuple[Node, torch.Tensor]] = {}
    for node in view.graph.nodes:
        tensor = plain_constant(view, node) if node.op == "get_attr" and node.users else None
        if tensor is not None:
            found.setdefault((tensor.data_ptr(), tensor.nbytes), (node, tensor))
    return list(found.values())
