"""OSTQuant: rotations and scales that are learnt, fold into the weights, and leave them easier to round."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...runtime.errors import BadPassOption, QuantizationError
from ..execute import Hook, protect, run
from ..view import GraphView, value
from . import qsur
from ._fold import apply_fold, find_fold, find_groups
from ._ost_learn import TOP, Learner, Target, logits_output, start_matrices
from ._ost_round import Rounding
from ._rotate import Plan, find_rotations
from ._turn import rotate
from .base import Calibration, Method, WeightSite, each
from .constants import constant
from .grid import QuantizedWeight

CHECK = 25
"""Steps between two looks at the held-out inputs, where the grids' reach is fitted anew and the state is kept."""
_KEY = "ostquant"
_GROUPS = 4
"""Groups of layers whose utilization is measured."""
_SHARE = 0.8
"""Of the time budget, for learning; rounding takes the rest."""


@dataclass(frozen=True)
class OSTQuant(Method):
    """Learn orthogonal matrices and scales that make weights and activations fill the grid's range.

    ::

        R1   the residual stream, through embeddings, norms, all layers that read or write it, and the head
        R2   each head of values, between the value and the output projection
        s    scales of channels: norm and the layers behind it, values and output, up and down projections

        W' = R_out^T W diag(g) R_in diag(s)        the float function stays what it was
        min  KL(float || rounded W', rounded activations)  over the float model's ``top`` largest logits (KL-Top)

    "OSTQuant: Refining Large Language Model Quantization with Orthogonal and Scaling Transformations for Better
    Distribution Fitting", Hu et al. 2025, sections 3.2 and 3.3. All of it folds into constants; ``_rotate.py`` says
    where it can. What cannot take a rotation is named in the report. The matrices start from randomised Hadamard ones
    or from the identity, whichever is closer to the float model on held-out inputs, and stay orthogonal by torch's
    Cayley parametrization, with Adam and a cosine in place of the paper's Riemannian Adam. Nothing rotates at run time:
    the input of down projections is scaled only. Models without logits (encoders) take the mean squared error of their
    output. Weights are rounded to nearest with searched clipping while learning, and afterwards column by column with
    each column's error handed on to later ones (GPTQ's rule, as in the paper), block by block.

    steps: of the optimiser, ``tokens`` of one calibration input each, ``batch`` of them. lr: of rotations, in radians a
    step and entry; lr_scale: of the logarithms of scales. streams, heads, scales: which transformations to use. start:
    ``auto``, ``hadamard`` or ``identity``. precision: what layers compute in for calibration. rounding: of the
    transformed weights, ``feedback`` or ``nearest``.
    """

    name: ClassVar[str] = "ostquant"
    needs_calibration: ClassVar[bool] = True
    transforms: ClassVar[bool] = True

    steps: int = 150
    tokens: int = 256
    batch: int = 1
    lr: float = 1e-4
    lr_scale: float = 3e-3
    top: int = TOP
    streams: bool = True
    heads: bool = True
    scales: bool = True
    start: Literal["auto", "hadamard", "identity"] = "auto"
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    rounding: Literal["feedback", "nearest"] = "feedback"

    def __post_init__(self) -> None:
        whole = {"steps": (self.steps, 0), "tokens": (self.tokens, 2), "batch": (self.batch, 1), "top": (self.top, 2)}
        for name, (given, least) in whole.items():
            if not isinstance(given, int) or isinstance(given, bool) or given < least:
                raise BadPassOption(f"ostquant: {name} is {given!r}, but must be a whole number from {least} on")
        for name, rate in (("lr", self.lr), ("lr_scale", self.lr_scale)):
            if not 0 <= rate < 1:
                raise BadPassOption(f"ostquant: {name} is {rate!r}, but must be in [0, 1)")
        for name, chosen, allowed in (
            ("start", self.start, ("auto", "hadamard", "identity")),
            ("precision", self.precision, ("bfloat16", "float32")),
            ("rounding", self.rounding, ("feedback", "nearest")),
        ):
            if chosen not in allowed:
                raise BadPassOption(f"ostquant: {name} is {chosen!r}, but must be one of {', '.join(allowed)}")

    # ------------------------------------------------------------------------------------------------------- the graph

    def transform(self, work: Calibration) -> Mapping[str, Any]:
        view = work.view
        plan = find_rotations(view, streams=self.streams, heads=self.heads)
        sites = [site for site in work.leaders(linear=True) if len(work.sharing(site.id)) == 1]
        before = utilization(work, sites)
        session = _Session(self, work, plan, sites)
        matrices, factors = session.learnt()
        rotate(view, plan, matrices)
        scaled = self._scale(view, factors)
        view.module.recompile()
        work.forget()
        after = utilization(work, sites)
        rotated = {"stream": 0, "heads": 0}
        for name in plan.sizes:
            rotated["stream" if name.startswith("stream") else "heads"] += 1
        return {
            "rotations": rotated,
            "scales": scaled,
            "not_rotated": dict(plan.declined),
            "qsur": {what: {"before": before[what], "after": after[what]} for what in before},
            **session.facts,
        }

    def _scale(self, view: GraphView, factors: Mapping[str, Tensor]) -> int:
        """Fold the scales into the rotated graph; how many groups took them."""
        done = 0
        for group in find_groups(view):
            scale = factors.get(group.linears[0].name)
            if scale is None:
                continue
            fold = find_fold(view, group)
            if isinstance(fold, str) or fold.kind == "input":
                raise QuantizationError(f"the scales of {group.linears[0]} lost their place: {fold}")
            apply_fold(view, fold, scale)
            done += 1
        return done

    # --------------------------------------------------------------------------------------------------------- rounding

    def round(self, work: Calibration) -> dict[str, QuantizedWeight]:
        if self.rounding == "feedback":
            return Rounding(work, None if self.precision == "float32" else torch.bfloat16).run()
        return {site.id: work.nearest(site.id, clip=True) for site in each(work, work.leaders(linear=True), "rounding")}


class _Session:
    """One run of learning. facts: for the report."""

    def __init__(self, method: OSTQuant, work: Calibration, plan: Plan, sites: Sequence[WeightSite]) -> None:
        self.method, self.work, self.plan, self.sites = method, work, plan, sites
        self.facts: dict[str, Any] = {}
        self.place = logits_output(work.module)
        # What decides is not learnt from: the last batch, where there are others.
        count = len(work.batches)
        self.held = [count - 1]
        self.free = list(range(count - 1)) or [0]
        self.seconds = work.time_left() * _SHARE
        self.begin = time.monotonic()

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.begin)

    def learnt(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Rotations (M, D, D) and, by the name of a group's first layer, scales (K,); float64."""
        start = self.method.start
        learner = self.learner(identity=start == "identity")
        kept = self.work.kept(_KEY)
        held = [self.target(number, self.crops(number, 0)) for number in self.held]
        if kept is not None:
            learner = self.learner(identity=kept[1]["start"] == "identity")
        else:
            learner.fit_ratios()
            loss = self.check(learner, held)
            chosen = "identity" if start == "identity" else "hadamard"
            losses = {chosen: round(loss, 6)}
            spent = time.monotonic() - self.begin
            if start == "auto" and self.plan.sizes and self.left() > 2 * spent:
                other = self.learner(identity=True)
                other.fit_ratios()
                losses["identity"] = round(self.check(other, held), 6)
                if losses["identity"] < loss:
                    learner, chosen = other, "identity"
            self.facts["start"] = losses
            kept = {}, {"start": chosen, "step": 0, "best": losses[chosen], "checks": [[0, losses[chosen]]]}
        self.optimise(learner, held, *kept)
        matrices = {name: one.exact() for name, one in learner.turns().items()}
        factors = {}
        for (fold, _, place), log in zip(learner.folds, learner.scales, strict=True):
            factors[fold.group.linears[0].name] = log.detach().double().exp()[place]
        return matrices, factors if self.method.scales else {}

    def learner(self, *, identity: bool) -> Learner:
        start = start_matrices(self.plan, self.work.seed, identity=identity)
        dtype = getattr(torch, self.method.precision)
        made = Learner(self.work.view, self.plan, self.sites, start, dtype)
        if identity and self.method.scales:
            made.keep_gains()
        return made

    def optimise(self, learner: Learner, held: list[Any], tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Take the steps that are left and leave the learner in its best state."""
        method, work = self.method, self.work
        groups = [
            {"params": list(learner.rotations.parameters()), "lr": method.lr},
            {"params": list(learner.scales) if method.scales else [], "lr": method.lr_scale},
        ]
        optimizer = (
            torch.optim.Adam([g for g in groups if g["params"]], betas=(0.9, 0.95))
            if any(g["params"] for g in groups)
            else None
        )
        rates = [rate for g, rate in zip(groups, (method.lr, method.lr_scale), strict=True) if g["params"]]
        best = {name: t.clone() for name, t in learner.state_dict().items()}
        if tensors:
            best = {name[5:]: t for name, t in tensors.items() if name.startswith("best/")}
            learner.load_state_dict({name[4:]: t for name, t in tensors.items() if name.startswith("now/")})
            if optimizer is not None:
                _load(optimizer, tensors)
        step, checks = int(numbers["step"]), list(numbers["checks"])
        least = float(numbers["best"])
        learner.fit_ratios()
        longest = 0.0
        total = method.steps if optimizer is not None else 0
        schedule = [0.5 * (1 + math.cos(math.pi * i / max(1, total))) for i in range(total)]
        while step < total and self.left() > longest:
            began = time.monotonic()
            work.progress(step, total, f"learning rotations, KL {least:.4f}")
            assert optimizer is not None
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule[step]
            self.step(learner, optimizer, step)
            step += 1
            if step % CHECK == 0 or step == total or self.left() < 2 * longest:
                learner.fit_ratios()
                loss = self.check(learner, held)
                checks.append([step, round(loss, 6)])
                if loss < least:
                    least, best = loss, {name: t.clone() for name, t in learner.state_dict().items()}
                work.keep(
                    _KEY,
                    _state(learner, best, optimizer),
                    {**numbers, "step": step, "best": least, "checks": checks},
                )
            longest = max(longest, time.monotonic() - began)
        learner.load_state_dict(best)
        self.facts |= {
            "steps": step,
            "of_steps": total,
            "checks": checks,
            "loss": "KL-Top" if self.place is not None else "relative MSE",
        }

    def step(self, learner: Learner, optimizer: torch.optim.Optimizer, number: int) -> None:
        generator = torch.Generator().manual_seed(self.work.seed * 1_000_003 + number)
        optimizer.zero_grad(set_to_none=True)
        for _ in range(self.method.batch):
            chosen = self.free[int(torch.randint(len(self.free), (), generator=generator))]
            inputs, target = self.target(
                chosen, self.crops(chosen, int(torch.randint(1 << 30, (), generator=generator)))
            )
            with learner.step():
                loss = target.loss(learner(inputs)) / self.method.batch
                loss.backward()
        for parameter in learner.parameters():
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
                parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
        optimizer.step()

    def check(self, learner: Learner, held: list[Any]) -> float:
        with torch.no_grad(), learner.step():
            losses = [float(target.loss(learner(inputs))) for inputs, target in held]
        return sum(losses) / len(losses)

    def target(self, number: int, inputs: list[Any]) -> tuple[list[Any], Target]:
        return inputs, Target(run(self.work.module, inputs), self.place, self.method.top)

    def crops(self, number: int, drawn: int) -> list[Any]:
        """A batch's flat inputs; where all tensors are (B, L) of one open length, ``tokens`` in a row of one."""
        batch = protect(self.work.module, self.work.batches[number])
        names = [node for node in self.work.view.graph.nodes if node.op == "placeholder"]
        shapes = {tuple(item.shape) for item in batch if isinstance(item, Tensor)}
        symbolic = [value(node) for node, item in zip(names, batch, strict=True) if isinstance(item, Tensor)]
        open_ = all(
            isinstance(one, Tensor) and one.dim() == 2 and not isinstance(one.shape[1], int) for one in symbolic
        )
        if len(shapes) != 1 or not open_ or not symbolic:
            return batch
        ((rows, length),) = shapes
        if length <= self.method.tokens:
            return batch
        row, at = drawn % rows, (drawn // rows) % (length - self.method.tokens + 1)
        one = slice(row, row + 1) if not isinstance(symbolic[0].shape[0], int) else slice(None)
        return [item[one, at : at + self.method.tokens] if isinstance(item, Tensor) else item for item in batch]


def _state(learner: Learner, best: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {f"now/{name}": t for name, t in learner.state_dict().items()}
    found |= {f"best/{name}": t for name, t in best.items()}
    for number, entries in optimizer.state_dict()["state"].items():
        found |= {f"adam/{number}/{name}": torch.as_tensor(item) for name, item in entries.items()}
    return found


def _load(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, item in tensors.items():
        kind, _, rest = key.partition("/")
        if kind == "adam":
            number, _, name = rest.partition("/")
            state.setdefault(int(number), {})[name] = item
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def utilization(work: Calibration, sites: Sequence[WeightSite]) -> dict[str, float]:
    """QSUR per dimension, mean over some groups of layers: of their weights' rows, and of their input's tokens."""
    groups = [[n for n in g.linears if any(s.node is n for s in sites)] for g in find_groups(work.view)]
    groups = [g for g in groups if g]
    # Each of another kind, where layers repeat.
    count = min(_GROUPS, len(groups))
    chosen = [groups[min(len(groups) - 1, i * len(groups) // count + i)] for i in range(count)]
    by_node = {site.node: site for site in sites}
    seen: list[float] = []

    def see(values: list[Any], result: Any) -> Any:
        seen.append(qsur.of_samples(values[0].float()))
        return result

    hooks = {group[0]: Hook((by_node[group[0]].x,), see) for group in chosen}
    if work.batches and hooks:
        run(work.module, work.batches[0], hooks)
    weights = []
    for group in chosen:
        parts = [constant(work.view, by_node[node].weight) for node in group]
        weights.append(qsur.of_samples(torch.cat([part.float() for part in parts if part is not None])))
    found = {"weights": weights, "activations": seen}
    return {name: round(sum(each) / len(each), 4) for name, each in found.items() if each}
