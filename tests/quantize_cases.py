"""A small model, and quantizing it without exporting it each time."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tilewright as tw
from tilewright.frontend.assemble import assemble
from tilewright.frontend.backend import require_changes
from tilewright.frontend.capture import copy_module, export_model
from tilewright.frontend.options import Options
from tilewright.frontend.pipeline import GraphRecord, process
from tilewright.frontend.report import CaptureReport, Report
from tilewright.passes import Quantize
from tilewright.passes.manager import check_needs
from tilewright.passes.rounding import grid


class Small(nn.Module):
    """An embedding, two layers, one that follows another at once, and a head, tied or not."""

    def __init__(self, *, tied: bool = False, width: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, width)
        self.up, self.down = nn.Linear(width, 96), nn.Linear(96, width)
        self.again = nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, 50, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + self.again(self.down(F.gelu(self.up(x)))))


IDS = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(1))
MORE = [torch.randint(0, 50, (4, 16), generator=torch.Generator().manual_seed(seed)) for seed in (2, 3)]


@functools.cache
def captured(tied: bool, width: int) -> Any:
    return export_model(Small(tied=tied, width=width), (IDS,), {}).module


@dataclass
class Done:
    """A graph that was processed, and its report."""

    record: GraphRecord
    report: Report

    def __call__(self, ids: Tensor) -> Tensor:
        return self.record.lowered(ids)[0]


def quantized(model: Small, one: Quantize | None = None, *, calibration: Sequence[Tensor] = (), **given: Any) -> Done:
    """``compile`` for :class:`Small`, which is exported once only."""
    module = copy_module(captured(model.head.weight is model.embed.weight, model.embed.weight.shape[1]))
    for name, tensor in model.named_parameters(remove_duplicate=False):
        owner, _, last = name.rpartition(".")
        if not hasattr(module, owner):  # tied: the graph knows the weight by its other name
            continue
        child = copy.copy(module.get_submodule(owner))
        child._parameters = dict(child._parameters) | {last: tensor}
        setattr(module, owner, child)
    options = Options.make([one or Quantize()], rest="eager", target="reference", **given)
    check_needs(options.passes, calibration)
    record = process(module, options, example_values=[IDS], calibration=[[batch] for batch in calibration])
    if options.strict:
        require_changes(options, [record])
    return Done(record, assemble("Small", options, [record], CaptureReport(), None))


def compiled_whole(model: nn.Module, one: Quantize | None = None, **given: Any) -> tw.CompiledModule:
    options: dict[str, Any] = {"example_inputs": (IDS,), "rest": "eager", "target": "reference"}
    return tw.compile(model, [one or Quantize()], **(options | given))


def row(compiled: Any, name: str = "quantize") -> Any:
    return next(one for one in compiled.report.passes if one.name == name)


def details(compiled: Any) -> dict[str, dict[str, Any]]:
    return {site.site: site.details for site in row(compiled).matched}


def reasons(compiled: Any) -> dict[str, str]:
    return {site.site: site.reason for site in row(compiled).declined}


def rounded(w: Tensor, clip: bool = False, **fields: Any) -> Tensor:
    """A weight as rounding to nearest leaves it."""
    form = Quantize(**fields).format()
    if form.group >= w.shape[1]:
        form = form.changed(group=0)
    grids = grid.search_grid(w, form) if clip else grid.grid(*grid.ranges(w, form), form)
    return grid.round_weight(w.detach(), form, *grids).dequantize()


def record(compiled: Any) -> GraphRecord:
    return compiled.record if isinstance(compiled, Done) else compiled.records[0]


def held(module: nn.Module, node: Any) -> Tensor:
    owner, _, last = node.target.rpartition(".")
    return getattr(module.get_submodule(owner), last)


def formats(compiled: Any) -> list[dict[str, Any]]:
    """The arguments of the quantized ops, constants as tensors."""
    module = record(compiled).rewritten
    found = []
    for node in module.graph.nodes:
        if getattr(node.target, "_opname", "") in ("quantized_linear", "quantized_embedding"):
            given = tw.passes.view.arguments(node)
            found.append(torch.fx.map_arg(given, lambda n: held(module, n) if n.op == "get_attr" else n))
    return found
