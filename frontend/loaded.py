"""A compiled module that was read from a file: the graph, without the model it was made from."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
import torch.utils._pytree as pytree

from ..passes.site import Site
from ..runtime import announce
from ..runtime import load as kernels_of
from ..runtime.errors import BadArgument, BuildError, MissingCompiler, MissingDependency, UnsupportedKernel
from .inputs import check_inputs
from .lower import KernelUse, set_target
from .report import Report

if TYPE_CHECKING:
    from .save import Program


class LoadedModule(torch.nn.Module):
    """What :func:`tilewright.load` returns: called like the model, with its output type.

    It has ``report``, ``kernels``, ``records`` (the lowered graph only), ``door``, ``options`` and ``dump`` as a
    compiled module has, its own parameters (named as in the model, those the graph reads), and no model: what the
    model offers besides ``forward``, such as ``generate``, is not here.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.training = program.training
        self._saved_training = program.training
        self.program = program
        self.lowered = program.lowered
        self.door = "export"
        self.options = program.options
        self.kernels: list[KernelUse] = _open_kernels(program)
        self.report: Report = program.report
        self.records = [SimpleNamespace(index=0, lowered=self.lowered, kernels=self.kernels, example_values=None)]
        if program.options.get("rest") == "eager":
            self._run: Any = self.lowered
        else:
            self._run = torch.compile(self.lowered, dynamic=True if program.dynamic else None, fullgraph=True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raises :class:`~tilewright.runtime.errors.BadArgument` for a call the graph was not captured for."""
        flat = self.program.call.flatten(args, kwargs, self.program.in_spec)
        check_inputs(flat, self.program.inputs)
        return pytree.tree_unflatten(list(self._run(*flat)), self.program.out_spec)

    def train(self, mode: bool = True) -> LoadedModule:
        """The file holds one graph: that of the mode the model was saved in."""
        if mode != self._saved_training:
            saved, other = ("train", "eval") if self._saved_training else ("eval", "train")
            raise BadArgument(
                f"the file holds the graph of {saved}() mode: compile and save the model in {other}() mode"
            )
        return super().train(mode)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Weights by the names they have in the model."""
        return self.lowered.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.lowered.load_state_dict(*args, **kwargs)

    def dump(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write graph, kernels, report and standalone checks to ``folder``; see :mod:`tilewright.frontend.dump`."""
        from .dump import dump

        return dump(self, folder, overwrite=overwrite)

    def bisect(self, *args: Any, **kwargs: Any) -> Any:
        """A file holds no graph from before the passes, so there is nothing to compare with."""
        raise BadArgument(
            "a loaded module has no original graph to compare with: bisect the compiled model it came from"
        )

    @property
    def __signature__(self) -> inspect.Signature:
        return self.program.call.signature


def _open_kernels(program: Program) -> list[KernelUse]:
    """Build or load every kernel the file names; one that this machine cannot run becomes the reference form."""
    nodes = {node.name: node for node in program.lowered.graph.nodes}
    uses = []
    for row in program.kernels:
        node = nodes[row["node"]]
        try:
            if program.moved:
                raise UnsupportedKernel(f"the {row['target']} kernel belongs to the device the module was saved on")
            kernel = kernels_of.load(row["spec"], row["target"])
        except (MissingCompiler, MissingDependency, BuildError, UnsupportedKernel) as error:
            set_target(node, "reference")
            announce.announce(f"{row['op']} runs in its reference form: {error}", key=f"load:{row['op']}:{error}")
        else:
            site = Site(*row["site"])
            spec, target = row["spec"], row["target"]
            uses.append(KernelUse(site, row["op"], node.name, spec, target, kernel.digest, kernel.path))
    program.lowered.recompile()
    return uses
