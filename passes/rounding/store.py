"""What a calibration has done so far, kept in a folder for a run that is killed and started again.

::

    folder/<digest of the settings>/<key>.safetensors     tensors, and numbers as the bytes of a JSON text

The digest covers the options, the graph, samples of its weights and the calibration inputs: a run with other ones has
a folder of its own, so nothing stale is ever read, and one folder serves several models. Files are written next to
their place and moved there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.fx
import torch.utils._pytree as pytree
from safetensors import SafetensorError
from torch import Tensor

from ...runtime.errors import QuantizationError

_NUMBERS = "numbers.json"
SAMPLES = 4096
"""Elements of a tensor that go into a digest."""


@dataclass(frozen=True)
class Store:
    """folder: of this run's settings; None keeps nothing."""

    folder: Path | None = None

    @staticmethod
    def at(
        folder: str | os.PathLike[str] | None,
        settings: str,
        module: torch.fx.GraphModule,
        batches: Sequence[Sequence[Any]],
    ) -> Store:
        """The store of these settings in ``folder``. None keeps nothing."""
        if folder is None:
            return Store()
        digest = hashlib.sha256(settings.encode())
        digest.update("\n".join(f"{n.name} {n.target}" for n in module.graph.nodes).encode())
        for name, tensor in sorted((*module.named_parameters(), *module.named_buffers())):
            digest.update(name.encode() + _sample(tensor))
        for leaf in pytree.tree_leaves([list(batch) for batch in batches]):
            digest.update(_sample(leaf) if isinstance(leaf, Tensor) else repr(leaf).encode())
        return Store(Path(folder) / digest.hexdigest()[:16])

    def read(self, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was kept under ``key``, or None. Raises :class:`QuantizationError` for a damaged file."""
        path = self._path(key)
        if path is None or not path.is_file():
            return None
        try:
            tensors = safetensors.torch.load_file(path)
            return tensors, json.loads(bytes(tensors.pop(_NUMBERS).tolist()))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise QuantizationError(
                f"the checkpoint {path} is damaged ({type(error).__name__}: {error}): delete it to do that part again"
            ) from error

    def write(self, key: str, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Replace what is kept under ``key``. Raises :class:`QuantizationError` when it cannot be written."""
        path = self._path(key)
        if path is None:
            return
        whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        whole[_NUMBERS] = torch.tensor(list(json.dumps(dict(numbers)).encode()), dtype=torch.uint8)
        data = safetensors.torch.save(whole)
        temporary: str | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
            raise QuantizationError(f"the checkpoint cannot be written to {path}: {error}") from error

    def _path(self, key: str) -> Path | None:
        if self.folder is None:
            return None
        # Site ids have slashes; two keys must not share a file.
        name = re.sub(r"[^\w.-]", "_", key)
        return self.folder / f"{name[:100]}-{hashlib.sha256(key.encode()).hexdigest()[:8]}.safetensors"


def _sample(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    part = flat[:: max(1, flat.numel() // SAMPLES)].cpu().contiguous()
    data = part.view(torch.uint8).numpy().tobytes() if part.numel() else b""
    return f" {tuple(tensor.shape)} {tensor.dtype} ".encode() + data
