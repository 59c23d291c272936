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
from .cached_program import CachedProgram
from .decoder_cache import DecoderCache
from .decoder_file import StoredProgram
from .inputs import check_inputs
from .lower import KernelUse, set_target
from .options import Options
from .report import Report
from .rest import through_inductor
from .shell import generate, with_signature

if TYPE_CHECKING:
    from .save import Program


class LoadedModule(torch.nn.Module):
    """What :func:`tilewright.load` returns: called like the model, with its output type.

    It has ``report``, ``kernels``, ``records`` (the lowered graph only), ``door``, ``options`` and ``dump`` as a
    compiled module has, its own parameters (named as in the model, those the graph reads), and no model. Of what the
    model offers besides ``forward``, a decoder with a KV cache has ``generate``, ``config`` and
    ``generation_config``, and ``new_cache`` as a compiled one.
    """

    def __init__(self, program: Program, run: Any = None) -> None:
        """run: what runs the graph already, of a module that is released and not loaded."""
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
        self._run: Any = None
        self._decoder: CachedProgram | None = None
        if program.decoding is not None:
            stored = StoredProgram(program.decoding.model, program.inputs, program.out_spec)
            rest, memory = program.options.get("rest", "inductor"), program.options.get("memory", "system")
            self._decoder = program.decoding.program(
                stored, self.lowered, Options.make((), "auto", rest, memory=memory)
            )
            if run is not None:
                self._decoder.run = run
        elif run is not None or program.options.get("rest") == "eager":
            self._run = self.lowered if run is None else run
        else:
            self._run = through_inductor(self.lowered, True if program.dynamic else None)

    @property
    def decodes(self) -> bool:
        """Whether the module has a KV cache, so that calls take and give ``past_key_values``."""
        return self._decoder is not None

    @property
    def config(self) -> Any:
        """The model's config. Only of a decoder with a KV cache that is one of transformers."""
        return self._shell().config

    @property
    def generation_config(self) -> Any:
        """The model's generation config. Only of a decoder with a KV cache."""
        return self._shell().generation_config

    def _shell(self) -> Any:
        if self.program.decoding is None:
            raise AttributeError(
                f"{type(self).__name__} holds a graph, not the model: only decoders with a KV cache keep their config"
            )
        return self.program.decoding.model

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """``generate`` of transformers, its steps going through this module and its KV cache."""
        if self._decoder is None:
            raise BadArgument("generate needs a module with a KV cache: compile with passes=[KVCache(max_length=...)]")
        floats = (t for t in self.lowered.state_dict().values() if t.is_floating_point())
        stand_in = next(floats, torch.empty(0, device=self._decoder.device))

        forward = with_signature(self, self.program.call.signature)
        return generate(self._shell(), forward, self._decoder, args, kwargs, stand_in)

    def new_cache(self, path: str | Path | None = None) -> DecoderCache:
        """As :meth:`CompiledModule.new_cache`; files of the compilation that was saved can be read."""
        if self._decoder is None:
            raise BadArgument("this module has no KV cache: compile with passes=[KVCache(max_length=...)]")
        return self._decoder.new_cache(path)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raises :class:`~tilewright.runtime.errors.BadArgument` for a call the graph was not captured for."""
        if self._decoder is not None:
            return self._decoder(*args, **kwargs)
        flat = self.program.call.flatten(args, kwargs, self.program.in_spec)
        check_inputs(flat, self.program.inputs)
        return pytree.tree_unflatten(list(self._run(*flat)), self.program.out_spec)

    def train(self, mode: bool = True) -> LoadedModule:
        """The file holds one graph: that of the mode the model was saved in."""
        if mode != self._saved_training:
            saved, other = ("train", "eval") if self._saved_training else ("eval", "train")
            raise BadArgument(
                f"what was kept is the graph of {saved}() mode, and the model is not here: compile the model in "
                f"{other}() mode"
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
        """There is no graph from before the passes, so nothing to compare with."""
        raise BadArgument(
            "a loaded or released module has no original graph to compare with: bisect the compiled model it came from"
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
