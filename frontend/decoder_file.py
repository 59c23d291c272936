"""A decoder with a KV cache as data: what a file says of it beside its graph, and a decoder made of that."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.fx
from torch import nn

from ..passes.site import get_site
from ..runtime.errors import SaveError
from ..runtime.kv_cache import AnySite, CacheSite
from ..runtime.streaming_site import StreamingSite
from .cached_program import CachedProgram, CacheOwner
from .decode_form import DecodeForm
from .inputs import Input
from .lift_cache import Lifted
from .options import Options
from .shell import shell_from_json, shell_of, shell_to_json

_SITES: dict[str, type[Any]] = {"cache": CacheSite, "streaming": StreamingSite}


@dataclass
class Decoding:
    """How a graph with a cache is called.

    form, inputs, sites, paged: see :class:`DecodeForm` and :class:`Lifted`. max_length: tokens a sequence.
    table: rows of a learned table of positions. skips_padding: whether the model counts positions without padding.
    model: class, config and mode, for ``generate``. owner: of the caches that exist; None for a file's.
    """

    form: DecodeForm
    inputs: tuple[str, ...]
    sites: tuple[AnySite, ...]
    paged: bool
    max_length: int
    table: int | None
    skips_padding: bool
    model: nn.Module
    owner: CacheOwner | None = None

    @staticmethod
    def of(program: CachedProgram) -> Decoding:
        """Of a compiled decoder."""
        lifted = program.lifted
        return Decoding(
            program.form,
            lifted.inputs,
            lifted.sites,
            lifted.paged,
            program.owner.max_length,
            program.table,
            # Asked of the model only where a call would ask it.
            program.form.has_mask
            and "position_ids" in lifted.inputs
            and not program.turns_keys
            and program.skips_padding,
            shell_of(program.program.model),
            program.owner,
        )

    def to_json(self) -> dict[str, Any]:
        """Class and config are those of transformers' own models; others go without, and have no ``generate`` then.

        Raises :class:`SaveError` for constants that JSON lacks.
        """
        form = dataclasses.asdict(self.form)
        for name, value in form["constants"].items():
            if not isinstance(value, bool | int | float | str):
                raise SaveError(f"the decoder was captured with {name}, a {type(value).__name__}: no file holds that")
        sites = []
        for site in self.sites:
            kind = next(name for name, one in _SITES.items() if type(site) is one)
            sites.append({"kind": kind, **dataclasses.asdict(site), "dtype": str(site.dtype).removeprefix("torch.")})
        rest = {n: getattr(self, n) for n in ("inputs", "paged", "max_length", "table", "skips_padding")}
        return {"form": form, "sites": sites, "model": shell_to_json(self.model), **rest}

    @staticmethod
    def from_json(row: Mapping[str, Any], training: bool) -> Decoding:
        """Raises KeyError, TypeError or ValueError for what :meth:`to_json` would not have written."""
        form = {**row["form"], "parameters": tuple(row["form"]["parameters"]), "extra": tuple(row["form"]["extra"])}
        sites = []
        for one in row["sites"]:
            fields = {name: value for name, value in one.items() if name != "kind"}
            dtype = getattr(torch, str(one["dtype"]), None)
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{one['dtype']!r} is no dtype")
            site = _SITES[one["kind"]](**{**fields, "dtype": dtype})
            _ = site.layout  # raises for a format that is none
            sites.append(site)
        table = None if row["table"] is None else int(row["table"])
        numbers = (bool(row["paged"]), int(row["max_length"]), table, bool(row["skips_padding"]))
        model = shell_from_json(row["model"], training)
        return Decoding(DecodeForm(**form), tuple(map(str, row["inputs"])), tuple(sites), *numbers, model)

    def placeholders(self) -> int:
        """Inputs of the graph: the model's, length, first, the page table and the stores."""
        return len(self.inputs) + 2 + self.paged + sum(len(site.names()) for site in self.sites)

    def program(self, stored: StoredProgram, module: torch.fx.GraphModule, options: Options) -> CachedProgram:
        """A decoder that runs ``module``."""
        lifted = Lifted(module, self.inputs, self.sites, self.paged)
        made = CachedProgram(stored, self.form, lifted, options, self.owner, self.max_length, self.table)
        made.skips_padding = self.skips_padding
        return made


@dataclass
class StoredProgram:
    """What stands for the :class:`ExportedProgram` of a decoder whose model and other graphs are gone."""

    model: nn.Module
    inputs: list[Input]
    out_spec: Any

    @property
    def captured(self) -> Any:
        return SimpleNamespace(out_spec=self.out_spec)


def step_names(lowered: torch.fx.GraphModule, lifted: torch.fx.GraphModule) -> dict[str, str]:
    """Names of nodes in the lowered graph -> in the lifted one, which has other nodes where the cache is read."""
    kept = {node.name for node in lifted.graph.nodes}
    steps = {
        site.id: node.name
        for node in lifted.graph.nodes
        if getattr(node.target, "_opname", "").endswith("_step") and (site := get_site(node)) is not None
    }
    names: dict[str, str] = {}
    for node in lowered.graph.nodes:
        site = get_site(node)
        if node.name in kept:
            names[node.name] = node.name
        elif site is not None and site.id in steps:
            names[node.name] = steps[site.id]
    return names
