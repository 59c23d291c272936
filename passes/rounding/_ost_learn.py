"""Learning OSTQuant's rotations and scales: the float graph run with turned, scaled and rounded weights.

The rotations live on the manifold of orthogonal matrices through torch's Cayley parametrization around their start
(``torch.nn.utils.parametrizations.orthogonal``), so that any optimiser of ``torch.optim`` keeps them there.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional

from ..view import GraphView, arguments, is_assertion, peel, value
from ._fold import Fold, find_fold, find_groups
from ._ost_weight import LearntWeight
from ._rotate import LINEAR, Plan, Turned
from ._turn import base_weight, gain
from .base import WeightSite

Node = torch.fx.Node
TOP = 1000
"""Logits of the float model that count in the loss."""


class Rotation(nn.Module):
    """Orthogonal matrices (M, D, D)."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(start.clone())
        nn.utils.parametrizations.orthogonal(self, "matrix", orthogonal_map="cayley")
        setattr(self, "matrix", start)  # noqa: B010 - the parametrization takes a tensor and starts there

    def exact(self) -> Tensor:
        """The nearest orthogonal matrices in float64."""
        u, _, v = torch.linalg.svd(self.matrix.detach().double())
        return u @ v


class Learner(nn.Module):
    """A graph whose linear layers are turned, scaled and rounded as the parameters say.

    start: (M, D, D) for each rotation of ``plan``. dtype: what the layers compute in.
    """

    def __init__(
        self, view: GraphView, plan: Plan, sites: Sequence[WeightSite], start: Mapping[str, Tensor], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.graph, self.plan, self.dtype = view, plan, dtype
        self.names = list(plan.sizes)
        self.rotations = nn.ModuleList([Rotation(start[name].float()) for name in self.names])
        self.folds: list[tuple[Fold, Tensor, Tensor]] = []
        self.scales = nn.ParameterList()
        self.weights: dict[Node, LearntWeight] = {}
        self.norm_scale: dict[Node, tuple[str, Tensor]] = {}
        self.rounded = True
        wanted = {site.node: site for site in sites}
        self._find_scales(wanted)
        for node in {**plan.linears, **wanted}:
            self._add(node, plan.linears.get(node, Turned()), wanted.get(node))
        self._add_scales()
        self._gains = {norm: gain(view, norm) for norm in plan.norms}
        self._given: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}

    # ------------------------------------------------------------------------------------------------------ parameters

    def _find_scales(self, wanted: Mapping[Node, WeightSite]) -> None:
        for group in find_groups(self.graph):
            if not any(linear in wanted for linear in group.linears):
                continue
            fold = find_fold(self.graph, group)
            if isinstance(fold, str) or fold.kind == "input" or fold.source is None:
                continue
            distinct, place = fold.channels.unique(return_inverse=True)
            self.folds.append((fold, distinct, place))
            self.scales.append(nn.Parameter(torch.zeros(len(distinct))))

    def _add(self, node: Node, turned: Turned, site: WeightSite | None) -> None:
        weight, bias = base_weight(self.graph, node, turned)
        format = site.format if site is not None and not turned.tied else None
        self.weights[node] = LearntWeight(
            weight.to(self.dtype),
            None if bias is None else bias.float(),
            turned.columns,
            turned.rows,
            format=format,
            whole=site is not None and site.whole,
        )

    def _add_scales(self) -> None:
        for number, (fold, distinct, place) in enumerate(self.folds):
            name = str(number)
            source = fold.source
            assert source is not None
            for linear in fold.group.linears:
                if linear not in self.weights:
                    self._add(linear, Turned(), None)
                self.weights[linear].column_scale = name, place
            if fold.kind == "norm":
                self.norm_scale[source] = name, place
            else:
                if source not in self.weights:
                    self._add(source, Turned(), None)
                self.weights[source].row_scale = name, distinct, torch.arange(len(distinct))

    def turns(self) -> dict[str, Rotation]:
        """The rotations by name."""
        return {n: one for n, one in zip(self.names, self.rotations, strict=True) if isinstance(one, Rotation)}

    def values(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Rotations and scales, float32, by name, as the parameters say now; differentiable."""
        matrices: dict[str, Tensor] = {name: one.matrix for name, one in self.turns().items()}
        return matrices, {str(i): p.exp() for i, p in enumerate(self.scales)}

    def keep_gains(self) -> None:
        """Start the scales from what leaves norms as they were: the inverse of the weights folded into the layers."""
        with torch.no_grad():
            for (fold, distinct, _), log in zip(self.folds, self.scales, strict=True):
                weight = self._gains[fold.source][0] if fold.source in self._gains else None
                if weight is not None:
                    size = weight.abs().clamp_min(1e-6 + weight.abs().max() * 1e-4)
                    log.copy_(-size[distinct].log().float())

    def fit_ratios(self) -> None:
        """Look for the grids' reach anew, for the weights as they are turned now."""
        with torch.no_grad():
            matrices, scales = self.values()
            matrices = {name: one.to(self.dtype) for name, one in matrices.items()}
            for one in self.weights.values():
                if one.format is not None:
                    one.fit_ratio(one.turned(matrices, scales))

    # --------------------------------------------------------------------------------------------------------- running

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Rotations and scales are computed once for all runs inside."""
        matrices, scales = self.values()
        self._given = {name: one.to(self.dtype) for name, one in matrices.items()}, scales
        self._wide = matrices
        try:
            yield
        finally:
            self._given = {}, {}

    def forward(self, inputs: Sequence[Any]) -> Any:
        """The graph's outputs on flat inputs, inside :meth:`step`."""
        instead: dict[Node, Callable[..., Any]] = {}
        for node in self.weights:
            instead[node] = self._linear(node)
        for node in {**self.plan.norms, **self.norm_scale}:
            instead[node] = self._norm(node)
        for node in self.plan.tables:
            instead[node] = self._embedding(node)
        return _Replaced(self.graph.module, instead, self.dtype).run(*inputs)

    def _linear(self, node: Node) -> Callable[..., Tensor]:
        one, turned = self.weights[node], self.plan.linears.get(node, Turned())

        def run(x: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor:
            matrices, scales = self._given
            if turned.tied:
                assert turned.columns is not None
                x = x @ self._wide[turned.columns.name][0].t()
                scale = None if turned.norm is None else self._gains[turned.norm][0]
                x = x if scale is None else x * scale.float()
                bias = None if one.bias is None else one.bias.to(self.dtype)
                return functional.linear(x.to(self.dtype), one.base, bias).float()
            return one(x, matrices, scales, self.rounded)

        return run

    def _norm(self, node: Node) -> Callable[..., Tensor]:
        turned, scale = node in self.plan.norms, self.norm_scale.get(node)

        def run(*args: Any, **kwargs: Any) -> Tensor:
            if turned:
                x = args[0].float()
                y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + arguments(node)["eps"])
            else:
                y = node.target(*args, **kwargs)  # type: ignore[operator]
            if scale is not None:
                name, place = scale
                y = y / self._given[1][name][place]
            return y

        return run

    def _embedding(self, node: Node) -> Callable[..., Tensor]:
        table = self.plan.tables[node]

        def run(weight: Tensor, ids: Tensor, *_: Any, **__: Any) -> Tensor:
            rows = functional.embedding(ids, weight.detach()).float()
            rows = rows - rows.mean(-1, keepdim=True) if table.centred else rows
            return rows @ self._wide[table.name][0]

        return run


class _Replaced(torch.fx.Interpreter):
    """Runs a graph with some nodes replaced by functions of their arguments, and with checks of dtypes left out."""

    def __init__(self, module: torch.fx.GraphModule, instead: Mapping[Node, Callable[..., Any]], dtype: torch.dtype):
        super().__init__(module)
        self.instead, self.dtype = instead, dtype

    def run_node(self, n: Node) -> Any:
        if is_assertion(n):
            return None
        if n in self.instead:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return self.instead[n](*args, **kwargs)
        if n.target is LINEAR and self.dtype is not torch.float32:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            reduced = [a.to(self.dtype) if isinstance(a, Tensor) else a for a in args]
            return functional.linear(*reduced).to(args[0].dtype)
        return super().run_node(n)


# ---------------------------------------------------------------------------------------------------------------- loss


def logits_output(module: torch.fx.GraphModule) -> int | None:
    """Which of the graph's outputs is logits, made by a linear layer; None when none is."""
    (output,) = module.graph.find_nodes(op="output")
    for place, item in enumerate(output.args[0]):
        if isinstance(item, Node) and peel(item).target is LINEAR and isinstance(value(item), Tensor):
            return place
    return None


def main_output(result: Sequence[Any]) -> int:
    """The first floating-point tensor."""
    return next(i for i, item in enumerate(result) if isinstance(item, Tensor) and item.dtype.is_floating_point)


class Target:
    """What the float model gives for one batch, and how far others are from it.

    Logits: KL(float || other) over the float model's ``top`` largest logits of each position, nats (section 3.3).
    Other outputs: the mean squared error as a share of the mean square.
    """

    def __init__(self, result: Sequence[Any], place: int | None, top: int = TOP) -> None:
        self.place = main_output(result) if place is None else place
        out = result[self.place].detach().float()
        self.indices: Tensor | None = None
        if place is not None:
            logits, self.indices = out.topk(min(top, out.shape[-1]), -1)
            self.values = logits.log_softmax(-1)
        else:
            self.values = out

    def loss(self, result: Sequence[Any]) -> Tensor:
        out: Tensor = result[self.place]
        if self.indices is None:
            return (out.float() - self.values).square().mean() / self.values.square().mean().clamp_min(1e-30)
        logs = out.gather(-1, self.indices).float().log_softmax(-1)
        return functional.kl_div(logs, self.values, reduction="none", log_target=True).sum(-1).mean()


def start_matrices(plan: Plan, seed: int, *, identity: bool = False) -> dict[str, Tensor]:
    """Where each rotation starts, float64 (M, D, D): see :func:`hadamard`; or the identity."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.stack([torch.eye(size, dtype=torch.float64) if identity else hadamard(size, generator)] * count)
        for name, (count, size) in plan.sizes.items()
    }


def hadamard(size: int, generator: torch.Generator) -> Tensor:
    """A randomised Hadamard matrix over sqrt(size), float64: rows of random sign.

    For size = 2^a m with m odd, Sylvester's matrix of 2^a Kronecker a random orthogonal matrix of m.
    """
    power = size & -size
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < power:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    if (odd := size // power) > 1:
        other, upper = torch.linalg.qr(torch.randn(odd, odd, dtype=torch.float64, generator=generator))
        matrix = torch.kron(matrix, (other * upper.diagonal().sign()).contiguous())
    signs = torch.randint(0, 2, (size, 1), generator=generator).double() * 2 - 1
    return signs * matrix / math.sqrt(power)
