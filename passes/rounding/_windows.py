"""Block reconstruction from the first block to the last: windows, time, checkpoints and the report.

The blocks of a model are taken a window at a time. The window's targets are what the float model gives at its end; its
inputs are what the quantized model gives at its start. Blocks that no later window holds are final then, and the
quantized path goes on through them. Learnt state of blocks that the next window shares is carried over to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ...runtime import cpu
from ...runtime.errors import BadPassOption
from . import grid
from ._reconstruct import Distance, Plan, Rounder, Start, reconstruct, relative_error, second_moments, start
from .base import Calibration, Method, WeightSite
from .blocks import Blocks, Feed, Walk, Window, split
from .grid import QuantizedWeight

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class Recipe:
    """What a method asks of :func:`learn`.

    make: a site and where it begins -> its rounder. size, overlap: blocks a window, and how many the next shares.
    reach: a weight -> the size that its outliers are cut off at where that helps. Others: as the methods' options of
    the same names.
    """

    method: Method
    make: Callable[[WeightSite, Start], Rounder]
    steps: int
    size: int = 1
    overlap: int = 0
    feedback: bool = True
    precision: Precision = "auto"
    distance: Distance = relative_error
    reach: Callable[[Tensor], float | None] = lambda weight: None


@dataclass
class _Learning:
    """One weight that is being learnt."""

    begin: Start
    rounder: Rounder


@dataclass
class State:
    """done: leader -> its codes. open: leader -> what the next window goes on with. facts: a row a window."""

    done: dict[str, QuantizedWeight] = field(default_factory=dict)
    open: dict[str, _Learning] = field(default_factory=dict)
    facts: list[dict[str, Any]] = field(default_factory=list)


def check_options(name: str, **least: tuple[Any, float]) -> None:
    """Raise :class:`BadPassOption` for a number below its least value; option -> (value, least)."""
    for option, (value, bound) in least.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= bound:
            raise BadPassOption(f"quantize: {name}: {option} is {value!r}, but must be at least {bound}")


def low_precision(precision: Precision, device: torch.device) -> torch.dtype | None:
    """The dtype for products: bfloat16 where that is asked for, or faster by much; None for the model's own."""
    fast = device.type == "cuda" or (device.type == "cpu" and "amx" in cpu.supported())
    return torch.bfloat16 if precision == "bfloat16" or (precision == "auto" and fast) else None


def rounded_inputs(work: Calibration) -> Feed | None:
    """Rounds the inputs of the sites whose format says so, as the quantized layers do. None where none does."""
    bits = {site.id: site.format.activations for site in work.sites.values() if site.format.activations}
    if not bits:
        return None
    return lambda site, x: grid.fake_quantize_activations(x, bits[site]) if site in bits else x


def cut(work: Calibration) -> Blocks:
    """The graph's blocks, with the linear sites that are to be rounded."""
    return split(work.view, [site.context for site in work.sites.values() if site.linear], work.batches[0])


def begin_walk(work: Calibration, method: Method, blocks: Blocks) -> Walk:
    """Before the first block; what stands before it is rounded as the method's rest."""
    prefix = blocks.prefix()
    weights = {site: _numbers(work, method, site) for site in prefix.sites}
    tables = {}
    for site in work.sites.values():
        if not site.linear and site.weight.op == "get_attr":
            tables[str(site.weight.target)] = _numbers(work, method, site.id)
    return Walk(blocks, work.batches, weights, constants=tables)


def _numbers(work: Calibration, method: Method, site: str) -> Tensor:
    leader = work.sites[site].leader
    return method.rest(work, leader).dequantize(work.weight(leader).dtype)


def spans(count: int, size: int, overlap: int) -> list[tuple[int, int]]:
    """(first, last) of windows over ``count`` blocks; the last one ends at the end."""
    size = min(size, count)
    step = max(1, size - overlap)
    starts = list(range(0, count - size + 1, step))
    if starts and starts[-1] + size < count:
        starts.append(starts[-1] + step)
    return [(first, min(first + size, count)) for first in starts]


def learn(work: Calibration, recipe: Recipe) -> dict[str, QuantizedWeight]:
    """Codes of all sites in blocks, by leader. Blocks that the time budget does not reach are left out."""
    blocks = cut(work)
    if not len(blocks):
        work.facts["blocks"] = "the model repeats no module: there is nothing to reconstruct, all is rounded to nearest"
        return {}
    walk = begin_walk(work, recipe.method, blocks)
    feed, state = rounded_inputs(work), State()
    windows = spans(len(blocks), recipe.size, recipe.overlap)
    for index, (first, last) in enumerate(windows):
        final = windows[index + 1][0] if index + 1 < len(windows) else last
        key = f"{recipe.method.name}-{blocks.names[first]}"
        if not restore(work, recipe.make, state, key):
            if work.time_left() <= 0:
                break
            _window(work, recipe, walk, blocks.window(first, last), state, index, len(windows), feed)
            for position in range(first, final):
                for site in blocks.sites(position):
                    if (learnt := state.open.pop(work.sites[site].leader, None)) is not None:
                        state.done[work.sites[site].leader] = learnt.rounder.quantized()
            keep(work, state, key, [work.sites[s].leader for p in range(first, final) for s in blocks.sites(p)])
        for position in range(first, final):
            if position + 1 < len(blocks):
                walk.advance(fixed_weights(work, state, blocks.sites(position), blocks), feed)
    # A window that the budget cut off leaves blocks that were learnt in part: better than to nearest.
    state.done |= {leader: learnt.rounder.quantized() for leader, learnt in state.open.items()}
    work.facts["windows"] = state.facts
    missing = [
        n for i, n in enumerate(blocks.names) if any(work.sites[s].leader not in state.done for s in blocks.sites(i))
    ]
    if missing:
        work.facts["not_reached"] = missing
    return state.done


def _window(
    work: Calibration,
    recipe: Recipe,
    walk: Walk,
    window: Window,
    state: State,
    index: int,
    count: int,
    feed: Feed | None,
) -> None:
    """Learn one window; what is learnt is in ``state.open`` afterwards."""
    began = time.monotonic()
    share = work.time_left() / (count - index)
    sites = {site: work.sites[site] for site in window.sites}
    device = next(iter(window.linears.values())).weight.device if window.linears else torch.device("cpu")
    precision = low_precision(recipe.precision, device)
    text = f"{recipe.method.name}: {', '.join(walk.blocks.names[window.first : window.last])}"
    total = recipe.steps + 1
    work.progress(index * total, count * total, text)

    def weights() -> dict[str, Tensor]:
        made = {leader: learning.rounder() for leader, learning in state.open.items()}
        leaders = {site: one.leader for site, one in sites.items()}
        return fixed | {site: made[leader] for site, leader in leaders.items() if leader in made}

    fixed = fixed_weights(work, state, window.sites, walk.blocks)
    new = [s for s in sites.values() if s.leader not in state.done and s.leader not in state.open]
    if new:
        with torch.no_grad():
            now = weights()
        moments = second_moments(window, walk.quantized, weights=now, feed=feed, precision=precision)
        for site in new:
            if site.leader in state.open:
                continue
            leader = work.sites[site.leader]
            w, moment = work.weight(leader.id), moments.get(site.id)
            begin = start(w, leader, moment, feedback=recipe.feedback, reach=recipe.reach(w))
            state.open[leader.id] = _Learning(begin, recipe.make(leader, begin))
    own = {work.sites[site].leader for site in window.sites}
    rounders = {leader: one.rounder for leader, one in state.open.items() if leader in own}
    if not rounders:
        return
    if not recipe.steps or share <= time.monotonic() - began:
        _tell(state, walk.blocks, window, {"steps": 0}, time.monotonic() - began)
        return
    targets = [hidden_values(window, made) for made in walk.targets(window, precision=precision)]
    plan = Plan(
        steps=recipe.steps,
        seed=work.seed + index,
        held=min(4, max(1, len(walk) // 12)),
        precision=precision,
        seconds=max(1e-3, share - (time.monotonic() - began)),
    )
    outcome = reconstruct(
        window,
        rounders,
        weights,
        walk.quantized,
        targets,
        plan,
        feed=feed,
        distance=recipe.distance,
        progress=lambda step: work.progress(index * total + step + 1, count * total, text),
    )
    _tell(state, walk.blocks, window, asdict(outcome), time.monotonic() - began)


def _tell(state: State, blocks: Blocks, window: Window, outcome: dict[str, Any], seconds: float) -> None:
    row = {"blocks": list(blocks.names[window.first : window.last]), **outcome, "seconds": round(seconds, 2)}
    state.facts.append(row)


def fixed_weights(work: Calibration, state: State, sites: tuple[str, ...], blocks: Blocks) -> dict[str, Tensor]:
    """The numbers of weights that are final, by site."""
    leaders = {site: work.sites[site].leader for site in sites}
    dtype = {site: blocks.weights[site].dtype for site in sites}
    return {s: state.done[leader].dequantize(dtype[s]) for s, leader in leaders.items() if leader in state.done}


def hidden_values(window: Window, made: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in made.items()
        if isinstance(value, Tensor) and value.dtype.is_floating_point and value.dim() > 1
    }


def keep(work: Calibration, state: State, key: str, leaders: list[str]) -> None:
    tensors: dict[str, Tensor] = {}
    done = [leader for leader in dict.fromkeys(leaders) if leader in state.done]
    for i, leader in enumerate(done):
        found = state.done[leader]
        parts = {"codes": found.codes, "scale": found.scale, "zero": found.zero}
        tensors |= {f"done/{i}/{name}": tensor for name, tensor in parts.items() if tensor is not None}
    for i, learning in enumerate(state.open.values()):
        begin = learning.begin
        tensors |= {f"start/{i}/weight": begin.weight, f"start/{i}/scale": begin.scale}
        if begin.zero is not None:
            tensors[f"start/{i}/zero"] = begin.zero
        tensors |= {f"state/{i}/{name}": tensor for name, tensor in learning.rounder.state_dict().items()}
    work.keep(key, tensors, {"done": done, "open": list(state.open), "facts": state.facts[-1:]})


def restore(work: Calibration, make: Callable[[WeightSite, Start], Rounder], state: State, key: str) -> bool:
    """Take a window from the checkpoint, if it is there."""
    kept = work.kept(key)
    if kept is None:
        return False
    tensors, numbers = kept
    for i, leader in enumerate(numbers["done"]):
        part = {name: tensors.get(f"done/{i}/{name}") for name in ("codes", "scale", "zero")}
        codes, scale = part["codes"], part["scale"]
        assert codes is not None and scale is not None
        state.done[leader] = QuantizedWeight(codes, scale, part["zero"], work.sites[leader].format)
    state.open = {}
    for i, leader in enumerate(numbers["open"]):
        begin = Start(tensors[f"start/{i}/weight"], tensors[f"start/{i}/scale"], tensors.get(f"start/{i}/zero"))
        rounder = make(work.sites[leader], begin)
        prefix = f"state/{i}/"
        rounder.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        state.open[leader] = _Learning(begin, rounder)
    state.facts += numbers["facts"]
    return True
