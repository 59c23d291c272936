"""``compiled.dump(folder)``: everything a compilation made, as files that can be read and run on their own.

::

    report.json  report.html  report.txt
    01_captured.py  02_raised.py  03_<pass>.py ...  NN_lowered.py     importable modules of plain torch code
    kernels/00-softmax-1a2b3c4d/                                      see dump_kernels
    dump.json                                                         what was written, so that a later dump replaces it

With several graphs, each has a folder ``graph0``, ``graph1``. A dump reads; what runs is the same before and after.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.fx

from ..runtime.errors import BadArgument, SaveError
from .dump_kernels import kernel_folders
from .page import page_of

if TYPE_CHECKING:
    from .compiled import CompiledModule
    from .loaded import LoadedModule

MARKER = "dump.json"


def dump(
    compiled: CompiledModule | LoadedModule,
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    backward: bool | None = None,
) -> Path:
    """Write ``folder`` and return it.

    overwrite: write into a folder that holds other files too (they stay). A previous dump is always replaced.
    backward: whether to dump the backward kernels too; None: when the module is in training mode.
    Raises :class:`~tilewright.runtime.errors.BadArgument` for a folder with other files, and
    :class:`~tilewright.runtime.errors.SaveError` when it cannot be written.
    """
    folder = Path(folder)
    try:
        _make_room(folder, overwrite)
        written: list[str] = []
        for path, content in _files(compiled, compiled.training if backward is None else backward):
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content.encode() if isinstance(content, str) else content)
            written.append(path)
        (folder / MARKER).write_text(json.dumps({"tilewright_dump": 1, "files": written}, indent=1) + "\n")
    except OSError as error:
        raise SaveError(f"cannot write the dump to {folder}: {error.strerror or error}") from error
    return folder


def check_folder(folder: Path, overwrite: bool) -> None:
    """Raise :class:`~tilewright.runtime.errors.BadArgument` for a folder that a dump must not be written to."""
    if folder.exists() and not folder.is_dir():
        raise BadArgument(f"{folder} is a file: name a folder for the dump")
    if not overwrite and folder.exists() and any(folder.iterdir()) and _previous(folder) is None:
        raise BadArgument(
            f"{folder} is not empty and no previous dump: name another folder, or overwrite (its other files stay)"
        )


def _make_room(folder: Path, overwrite: bool) -> None:
    """Refuse a folder with foreign files; take away the files of a previous dump, and nothing else."""
    check_folder(folder, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    for path in _previous(folder) or ():
        target = folder / path
        if target.is_file() and target.resolve().is_relative_to(folder.resolve()):
            target.unlink()
            for parent in target.parents:
                if parent == folder or any(parent.iterdir()):
                    break
                parent.rmdir()


def _previous(folder: Path) -> list[str] | None:
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    files = marker.get("files") if isinstance(marker, dict) and "tilewright_dump" in marker else None
    return [str(name) for name in files] if isinstance(files, list) else None


def _files(compiled: CompiledModule | LoadedModule, backward: bool) -> Iterator[tuple[str, str | bytes]]:
    report = compiled.report
    yield "report.json", json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n"
    yield "report.txt", str(report)
    yield "report.html", page_of(compiled)
    for record in compiled.records:
        prefix = f"graph{record.index}/" if len(compiled.records) > 1 else ""
        for number, (stage, module) in enumerate(_stages(record), 1):
            yield f"{prefix}{number:02d}_{stage}.py", graph_source(module, stage, report.model)
    yield from kernel_folders(compiled, backward)


def _stages(record: Any) -> Iterator[tuple[str, torch.fx.GraphModule]]:
    """The graph after each stage that was kept; a loaded module has the lowered one only."""
    for stage in ("captured", "raised"):
        if (module := getattr(record, stage, None)) is not None:
            yield stage, module
    runs = list(getattr(record, "runs", ()))
    for index, done in enumerate(runs):
        # What the next pass found is what this one left.
        module = runs[index + 1].before if index + 1 < len(runs) else record.rewritten
        yield re.sub(r"\W", "_", done.rewrite.name), module
    yield "lowered", record.lowered


def graph_source(module: torch.fx.GraphModule, stage: str, model: str) -> str:
    """The graph as an importable Python file: shapes as annotations, the model's lines as comments.

    ``GraphModule().forward`` runs once the weights it reads (``self.<path>``) are set on the instance.
    """
    # Canonical ops are there once tilewright is imported; files of plain ATen graphs need torch only.
    needs_tilewright = any("tilewright" in str(node.target) for node in module.graph.nodes)
    # forward() of an fx module names some things that print_readable does not import.
    header = [
        f'"""The graph {json.dumps(model)[1:-1]} after the stage {stage!r}. Annotations are dtype[shape]."""',
        "",
        "import math",
        "import operator",
        "",
        "import torch",
        "from torch import device, inf, nan",
        *(["", "import tilewright.runtime.ops  # registers torch.ops.tilewright"] if needs_tilewright else []),
        "",
        "",
    ]
    body = module.print_readable(print_output=False, include_device=False)
    return (
        "\n".join(header)
        + re.sub(r"^class \S+\(torch\.nn\.Module\)", "class GraphModule(torch.nn.Module)", body)
        + "\n"
    )
