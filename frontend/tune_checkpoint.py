"""Checkpoints of a tuning run: one folder with ``checkpoint.json`` and the safetensors file that it names.

The tensors are written first and the JSON, which names them, is put in their place last; both writes are atomic, so a
run that is killed at any moment leaves the checkpoint before or the one after.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from ..runtime.errors import TuningError

FORMAT = 1
_INDEX = "checkpoint.json"


@dataclass
class Progress:
    """How far a run is, apart from its tensors.

    losses: one a step. checks: (step, loss) pairs that decided about the best. seconds: of all runs so far together.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    checks: list[tuple[int, float]] = field(default_factory=list)
    best: float | None = None
    best_step: int = 0
    seconds: float = 0.0


def write(
    folder: Path,
    progress: Progress,
    settings: Mapping[str, Any],
    now: Mapping[str, torch.Tensor],
    best: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """Replace the folder's checkpoint. Raises :class:`TuningError` when it cannot be written."""
    tensors = {f"now/{name}": t for name, t in now.items()} | {f"best/{name}": t for name, t in best.items()}
    numbers: dict[str, Any] = {}
    groups: Any = []
    if optimizer is not None:
        state = optimizer.state_dict()
        groups = state["param_groups"]
        for index, entries in state["state"].items():
            for key, item in entries.items():
                (tensors if isinstance(item, torch.Tensor) else numbers)[f"optimizer/{index}/{key}"] = item
    name = f"checkpoint-{progress.step:08d}.safetensors"
    index = {
        "format": FORMAT,
        "tensors": name,
        "settings": dict(settings),
        "progress": asdict(progress),
        "optimizer": {"groups": groups, "numbers": numbers},
    }
    data = safetensors.torch.save({key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()})
    try:
        text = json.dumps(index, indent=1)
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / name, data)
        _replace(folder / _INDEX, text.encode())
        for old in folder.glob("checkpoint-*.safetensors"):
            if old.name != name:
                old.unlink(missing_ok=True)
    except OSError as error:
        raise TuningError(f"the checkpoint cannot be written to {folder}: {error}") from error
    except TypeError as error:
        raise TuningError(
            f"this optimizer's state cannot be kept as JSON and tensors ({error}): take another"
        ) from error


def _replace(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@dataclass
class Saved:
    """A checkpoint that was read."""

    progress: Progress
    now: dict[str, torch.Tensor]
    best: dict[str, torch.Tensor]
    optimizer: dict[str, Any]


def read(folder: Path, settings: Mapping[str, Any]) -> Saved | None:
    """The folder's checkpoint, or None when it has none.

    Raises :class:`TuningError` for a damaged one, and for one of a run with other ``settings``, naming what differs.
    """
    index = folder / _INDEX
    if not index.is_file():
        return None
    remedy = "give another folder, delete this one, or pass resume=False to start again"
    try:
        found = json.loads(index.read_text())
        if found["format"] != FORMAT:
            raise TuningError(f"{index} is a checkpoint of format {found['format']}, not {FORMAT}: {remedy}")
        wanted = json.loads(json.dumps(dict(settings)))
        if different := sorted(
            key for key in wanted | found["settings"] if wanted.get(key) != found["settings"].get(key)
        ):
            raise TuningError(f"{folder} is a checkpoint of a run with another {', '.join(different)}: {remedy}")
        tensors = safetensors.torch.load_file(folder / found["tensors"])
        given = found["progress"]
        given["checks"] = [(int(step), float(loss)) for step, loss in given["checks"]]
        progress = Progress(**given)
        state: dict[int, dict[str, Any]] = {}
        parts: dict[str, dict[str, torch.Tensor]] = {"now": {}, "best": {}}
        for key, item in (tensors | found["optimizer"]["numbers"]).items():
            kind, _, name = key.partition("/")
            if kind == "optimizer":
                position, _, entry = name.partition("/")
                state.setdefault(int(position), {})[entry] = item
            else:
                parts[kind][name] = item
        optimizer = {"state": state, "param_groups": found["optimizer"]["groups"]}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise TuningError(
            f"the checkpoint in {folder} is damaged ({type(error).__name__}: {error}): {remedy}"
        ) from error
    return Saved(progress, parts["now"], parts["best"], optimizer)
