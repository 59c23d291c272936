"""A raised graph cut into its repeated blocks, so that methods can work on one part of a model at a time.

A *block* is a stretch of the graph in its own order, from the first node of a repeated module, such as
``model.layers.3``, to the first of the next. What stands before the first block is the *prefix*, what follows the last
one the *suffix*. A *boundary* is what is known at a cut: the values made before it that are read after it. A
:class:`Window` is the part of the graph between two cuts as a differentiable function from boundary to boundary, whose
linear layers can be given other weights and other inputs. A :class:`Walk` keeps the boundary values of the calibration
samples at one cut, along the path of the float model and along the quantized one.

Nothing here copies or changes a weight.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
import torch.utils._pytree as pytree
from torch import Tensor

from ...runtime.errors import BadArgument
from ...runtime.ops import OPS
from ..base import SiteContext
from ..execute import preserved_state, protect, undisturbed
from ..site import get_site, module_path
from ..view import GraphView, arguments, is_assertion
from .constants import constant, storage

Node = torch.fx.Node
_LINEAR, _ATTENTION = OPS["linear"].overload, OPS["attention"].overload
Values = Mapping[str, Any]
Feed = Callable[[str, Tensor], Tensor]
"""(site id, a linear layer's input) -> what the layer is to read instead."""


@dataclass(frozen=True)
class Linear:
    """One linear layer of a window. weight: the constant (N, K) as the layer reads it; never write into it.

    input: name of the node it reads; layers with the same one share their input.
    """

    id: str
    node: str
    input: str
    weight: Tensor = field(repr=False)


class Window:
    """The part of a graph between two cuts. ``split(...).window(i, j)`` makes them.

    module: the part as a graph module, whose placeholders are :attr:`inputs`. inputs, outputs: names of the values it
    reads of the boundary before it and makes for the one after. sites: ids of its linear layers in graph order.
    first, last: it holds blocks first .. last - 1 (-1, 0 for the prefix; n, n + 1 for the suffix).
    """

    def __init__(self, blocks: Blocks, nodes: Sequence[Node], first: int, last: int) -> None:
        self.first, self.last = first, last
        self.module, self.inputs, self.outputs, self._copies = _part(blocks.module, nodes)
        self.linears = {
            found.id: Linear(found.id, self._copies[node].name, arguments(node)["x"].name, blocks.weights[found.id])
            for node in nodes
            if node in blocks.linears and (found := get_site(node)) is not None
        }
        self.sites = tuple(self.linears)
        self._by_node = {linear.node: linear for linear in self.linears.values()}

    def weight(self, site: str) -> Tensor:
        """The site's float weight (N, K). Not to be written into."""
        return self.linears[site].weight

    def input_of(self, site: str) -> str:
        """The name of the value that the site reads; equal for layers that share their input."""
        return self.linears[site].input

    @property
    def shared_inputs(self) -> list[tuple[str, ...]]:
        """The sites by what they read: Q, K and V together, gate and up together."""
        groups: dict[str, list[str]] = {}
        for linear in self.linears.values():
            groups.setdefault(linear.input, []).append(linear.id)
        return [tuple(group) for group in groups.values()]

    def run(
        self,
        inputs: Values,
        weights: Mapping[str, Tensor] | None = None,
        *,
        constants: Mapping[str, Tensor] | None = None,
        feed: Feed | None = None,
        precision: torch.dtype | None = None,
    ) -> dict[str, Any]:
        """:attr:`outputs` and their values. Differentiable in the inputs, weights and constants.

        inputs: at least :attr:`inputs`, by name. weights: by site id, instead of the linears' own. constants: by the
        graph module's attribute name, instead of other constants (a norm's weight). feed: called with each linear's
        site id and input; what it returns is what the layer reads: for looking at inputs and for rounding them.
        precision: linear layers and attention compute in it (bfloat16, where the CPU is several times faster at that);
        all else, and all values between, stay as they are.
        """
        runner = _Runner(self.module, self._by_node, weights or {}, constants or {}, feed, precision)
        return dict(zip(self.outputs, runner.run(*(inputs[name] for name in self.inputs)), strict=True))

    def observe(self, inputs: Values, see: Callable[[str, Tensor], None], **options: Any) -> dict[str, Any]:
        """:meth:`run` without gradients, showing ``see`` each linear's site id and input (..., K)."""

        def feed(site: str, x: Tensor) -> Tensor:
            if given is not None:
                x = given(site, x)
            see(site, x)
            return x

        given = options.pop("feed", None)
        with torch.no_grad():
            return self.run(inputs, feed=feed, **options)


class _Runner(torch.fx.Interpreter):
    """Runs a part with some weights, constants and linear inputs replaced."""

    def __init__(
        self,
        module: torch.fx.GraphModule,
        linears: Mapping[str, Linear],
        weights: Mapping[str, Tensor],
        constants: Mapping[str, Tensor],
        feed: Feed | None,
        precision: torch.dtype | None,
    ) -> None:
        super().__init__(module)
        self.linears, self.weights, self.constants = linears, weights, constants
        self.feed, self.precision = feed, precision

    def run_node(self, n: Node) -> Any:
        if n.op == "get_attr" and n.target in self.constants:
            return self.constants[str(n.target)]
        linear = self.linears.get(n.name)
        if linear is None and (n.target is not _ATTENTION or self.precision is None):
            return super().run_node(n)
        given = {key: self.env[item] if isinstance(item, Node) else item for key, item in arguments(n).items()}
        if linear is not None:
            given["x"] = given["x"] if self.feed is None else self.feed(linear.id, given["x"])
            given["weight"] = self.weights.get(linear.id, given["weight"])
        function, dtype = (_ATTENTION if linear is None else _LINEAR), None
        if self.precision is not None:
            dtype = given["q" if linear is None else "x"].dtype
            given = {key: self._low(item) for key, item in given.items()}
        made = function(**given)
        return made if dtype is None else made.to(dtype)

    def _low(self, item: Any) -> Any:
        return item.to(self.precision) if isinstance(item, Tensor) and item.dtype.is_floating_point else item


@dataclass
class Blocks:
    """A graph and where it is cut. ``split`` makes one.

    names: module paths of the blocks, in graph order; empty for a graph without repeated modules. linears: the nodes of
    the sites. weights: site id -> its float weight (N, K). owners: site id -> the first site with the same weight, for
    layers that are tied or used twice: one set of codes serves them all.
    """

    module: torch.fx.GraphModule
    names: tuple[str, ...]
    linears: dict[Node, str]
    weights: dict[str, Tensor] = field(repr=False)
    owners: dict[str, str]
    _nodes: list[Node] = field(repr=False)
    _cuts: list[int] = field(repr=False)
    _made: dict[tuple[int, int], Window] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def outside(self) -> tuple[str, ...]:
        """Sites in no block: before the first or after the last."""
        inside = {site for index in range(len(self)) for site in self.sites(index)}
        return tuple(site for site in self.linears.values() if site not in inside)

    def sites(self, index: int) -> tuple[str, ...]:
        """Ids of a block's sites, in graph order."""
        return tuple(self.linears[node] for node in self._between(index, index + 1) if node in self.linears)

    def window(self, first: int, last: int) -> Window:
        """Blocks ``first`` .. ``last - 1``. Raises :class:`BadArgument` for a range that is empty or outside."""
        if not 0 <= first < last <= len(self):
            raise BadArgument(f"blocks {first} to {last} of {len(self)}: no such window")
        return self._window(first, last, self._between(first, last))

    def prefix(self) -> Window:
        """What stands before the first block. Its inputs are the graph's placeholders, by name."""
        return self._window(-1, 0, self._nodes[: self._cuts[0]])

    def suffix(self) -> Window:
        """What stands after the last block. Its outputs are the values that the graph returns, by node name."""
        return self._window(len(self), len(self) + 1, self._nodes[self._cuts[-1] :])

    def boundary(self, index: int) -> tuple[str, ...]:
        """Names of the values known at the cut before block ``index`` (after the last one: ``len(blocks)``)."""
        before, after = set(self._nodes[: self._cuts[index]]), self._nodes[self._cuts[index] :]
        after = [*after, self.module.graph.output_node()]
        read = {producer: None for node in after for producer in node.all_input_nodes if producer.op != "get_attr"}
        return tuple(node.name for node in read if node in before or node.op == "placeholder")

    def _between(self, first: int, last: int) -> list[Node]:
        return self._nodes[self._cuts[first] : self._cuts[last]]

    def _window(self, first: int, last: int, nodes: list[Node]) -> Window:
        if (first, last) not in self._made:
            while len(self._made) > 8:  # windows hold a copy of a few hundred nodes each
                del self._made[next(iter(self._made))]
            self._made[first, last] = Window(self, nodes, first, last)
        return self._made[first, last]


def split(view: GraphView, sites: Iterable[SiteContext | Node], inputs: Sequence[Any] = ()) -> Blocks:
    """Cut the graph at its repeated modules.

    sites: the linear layers concerned. inputs: flat inputs of the graph, for weights that are among them, as behind
    Dynamo. A layer whose weight is computed in the graph is left out. A part that repeats inside a repeated module (the
    experts of a layer) makes no cut; a list that holds one module only is looked into. Where a graph repeats nothing
    there are no blocks, and all of it is prefix.
    """
    # Assertions about dtypes would not let a part run in another precision.
    apart = ("placeholder", "get_attr", "output")
    nodes = [node for node in view.graph.nodes if node.op not in apart and not is_assertion(node)]
    given = dict(zip(view.graph.find_nodes(op="placeholder"), inputs, strict=False))
    linears: dict[Node, str] = {}
    weights: dict[str, Tensor] = {}
    owners: dict[str, str] = {}
    first_with: dict[Any, str] = {}
    for one in sites:
        node = one.node if isinstance(one, SiteContext) else one
        site, source = get_site(node), arguments(node)["weight"]
        weight = constant(view, source)
        if weight is None and isinstance(given.get(source), Tensor):
            weight = given[source].detach()
        if site is None or weight is None:
            continue
        linears[node], weights[site.id] = site.id, weight
        owners[site.id] = first_with.setdefault(storage(weight), site.id)
    paths = {node: path for node in nodes if (path := _path(node))}
    families = _families(sorted({paths[node] for node in linears if node in paths}))
    starts: dict[str, int] = {}
    end = 0
    for index, node in enumerate(nodes):
        name = next((name for name in families if _inside(paths.get(node, ""), name)), None)
        if name is not None:
            starts.setdefault(name, index)
            end = index + 1
    cuts = [*starts.values(), end] if starts else [len(nodes)]
    return Blocks(view.module, tuple(starts), linears, weights, owners, nodes, cuts)


def _path(node: Node) -> str:
    site = get_site(node)
    return (site.module if site is not None else "") or module_path(node)


def _inside(path: str, block: str) -> bool:
    return path == block or path.startswith(f"{block}.")


_NUMBER = re.compile(r"(?:^|\.)\d+(?=\.|$)")


def _families(paths: Sequence[str], start: int = 0) -> list[str]:
    """The repeated modules that hold ``paths``: of each path up to its first number, if there are several such."""
    lists: dict[str, dict[str, list[str]]] = {}
    for path in paths:
        found = _NUMBER.search(path, start)
        if found is not None:
            lists.setdefault(path[: found.start()], {}).setdefault(path[: found.end()], []).append(path)
    names: list[str] = []
    for members in lists.values():
        if len(members) == 1:
            ((only, inner),) = members.items()
            names += _families(inner, len(only)) or [only]
        else:
            names += members
    return names


def _part(
    module: torch.fx.GraphModule, nodes: Sequence[Node]
) -> tuple[torch.fx.GraphModule, tuple[str, ...], tuple[str, ...], dict[Node, Node]]:
    """``nodes`` as a graph module of their own: it, the names it reads and makes, and its node for each of them."""
    inside = set(nodes)
    graph = torch.fx.Graph()
    copies: dict[Node, Node] = {}
    outer = dict.fromkeys(p for node in nodes for p in node.all_input_nodes if p not in inside and p.op != "get_attr")
    for producer in outer:
        copies[producer] = graph.placeholder(producer.name)
        copies[producer].meta = dict(producer.meta)
    made = []
    for node in nodes:
        for producer in node.all_input_nodes:
            if producer.op == "get_attr" and producer not in copies:
                copies[producer] = graph.node_copy(producer)
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if any(user not in inside and not is_assertion(user) for user in node.users):
            made.append(node)
    graph.output(tuple(copies[node] for node in made))
    names = tuple(node.name for node in outer), tuple(node.name for node in made)
    return torch.fx.GraphModule(module, graph), *names, {node: copies[node] for node in nodes}


# ------------------------------------------------------------------------------------------------------------- walking


class Walk:
    """Boundary values of the calibration samples at one cut, on the float model's path and on the quantized one.

    blocks: what :func:`split` gave. batches: flat inputs of the graph, one sequence a sample.
    Memory: the boundary of one cut for each path (one for both until they part). Values that are the same for every
    sample, such as rotary tables, are held once.
    """

    def __init__(
        self,
        blocks: Blocks,
        batches: Sequence[Sequence[Any]],
        weights: Mapping[str, Tensor] | None = None,
        *,
        constants: Mapping[str, Tensor] | None = None,
    ) -> None:
        """weights, constants: what the quantized path uses in the prefix, as in :meth:`Window.run`."""
        if not batches:
            raise BadArgument("a walk needs at least one calibration sample")
        self.blocks, self.position = blocks, 0
        names = [node.name for node in blocks.module.graph.find_nodes(op="placeholder")]
        start = [dict(zip(names, protect(blocks.module, batch), strict=True)) for batch in batches]
        self.float = [dict(values) for values in start]
        self.quantized = self.float
        self._step(blocks.prefix(), {"weights": weights or {}, "constants": constants or {}}, 0)

    def __len__(self) -> int:
        return len(self.float)

    def tokens(self) -> int:
        """Rows of the hidden states over all samples: the elements of the largest value, by its last dimension."""
        return sum(max((v.numel() // v.shape[-1] for v in _floating(s.values())), default=0) for s in self.float)

    def targets(self, window: Window, **options: Any) -> Iterator[dict[str, Any]]:
        """What the float model gives after ``window``, which starts here, a sample after another.

        options: of :meth:`Window.run`.
        """
        self._check(window)
        for values in self.float:
            with calm(self.blocks.module):
                yield window.run(values, **options)

    def advance(self, weights: Mapping[str, Tensor], feed: Feed | None = None) -> None:
        """Go on to the next cut; the quantized path with ``weights`` by site id and linear inputs as of ``feed``."""
        if self.position >= len(self.blocks):
            raise BadArgument("the walk is at its end")
        window = self.blocks.window(self.position, self.position + 1)
        self._step(window, {"weights": weights, "feed": feed}, self.position + 1)
        self.position += 1

    def _step(self, window: Window, changes: dict[str, Any], then: int) -> None:
        live = set(self.blocks.boundary(then))
        parted = self.quantized is not self.float or any(changes.values())
        if parted and self.quantized is self.float:
            self.quantized = [dict(values) for values in self.float]
        paths: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [(self.float, {})]
        if parted:
            paths.append((self.quantized, changes))
        for path, given in paths:
            for values in path:
                with calm(self.blocks.module):
                    values.update(window.run(values, **given))
                for name in [name for name in values if name not in live]:
                    del values[name]
        self._share()

    def _share(self) -> None:
        """Let equal values be one tensor."""
        first = self.float[0]
        for values in [*self.float, *(self.quantized if self.quantized is not self.float else ())]:
            for name, value in values.items():
                known = first.get(name)
                if isinstance(value, Tensor) and isinstance(known, Tensor) and value is not known:
                    same = value.shape == known.shape and value.dtype == known.dtype
                    if same and value.data_ptr() != known.data_ptr() and torch.equal(value, known):
                        values[name] = known

    def _check(self, window: Window) -> None:
        if window.first != self.position:
            raise BadArgument(f"the walk is before block {self.position}, the window starts at {window.first}")


@contextlib.contextmanager
def calm(module: torch.fx.GraphModule) -> Iterator[None]:
    """No gradients; random generators, and buffers that the graph writes into, are as before afterwards."""
    with undisturbed(), preserved_state(module):
        yield


def _floating(values: Iterable[Any]) -> list[Tensor]:
    leaves = pytree.tree_leaves(list(values))
    return [v for v in leaves if isinstance(v, Tensor) and v.dtype.is_floating_point and v.dim() > 0]
