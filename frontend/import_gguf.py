"""GGUF files: Q4_0, Q4_1 and Q8_0 blocks as packed weights, bit for bit; everything else as float.

A block of 32 weights of one row is, in GGUF,

    Q4_0    float16 d; 16 bytes, byte j: weights j (low) and j + 16 (high)      d * (q - 8)
    Q4_1    float16 d, float16 m; the same 16 bytes                             d * q + m
    Q8_0    float16 d; 32 signed bytes                                          d * q

which is our layout ``plain`` with groups of 32: zero ``middle``, ``offset`` and (q + 128 as the code) ``middle``.

Config, names and what the file does to weights (Llama's rows of queries and keys are interleaved) come from
transformers.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..codegen.weight_format import UNIT, WeightFormat
from ..runtime.errors import CheckpointError, MissingDependency
from .import_checkpoint import Blank, FloatTensor, ImportReport, add_packed, unknown

FORMATS = {
    "Q4_0": WeightFormat(4, UNIT),
    "Q4_1": WeightFormat(4, UNIT, "offset"),
    "Q8_0": WeightFormat(8, UNIT),
}
_HEADER = {"Q4_0": 2, "Q4_1": 4, "Q8_0": 2}
_PLAIN = ("F32", "F16", "BF16", "F64")


def read_config(folder: Path, file: str) -> Any:
    """The transformers config that the file's metadata make."""
    import transformers

    _gguf()
    try:
        return transformers.AutoConfig.from_pretrained(str(folder), gguf_file=file, local_files_only=True)
    except (OSError, ValueError, KeyError, IndexError, NotImplementedError) as error:
        raise CheckpointError(f"{folder / file} cannot be read: {_line(error)}") from error


def fill(blank: Blank, path: Path, report: ImportReport) -> None:
    """Read every tensor of the file into ``blank``. Raises :class:`CheckpointError`."""
    from transformers import modeling_gguf_pytorch_utils as names

    gguf = _gguf()
    try:
        reader = gguf.GGUFReader(str(path))
        architecture = names.read_field(reader, "general.architecture")[0]
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"{path} cannot be read: {_line(error)}") from error
    reader.fields.clear()  # a vocabulary is hundreds of thousands of small arrays
    model: Any = blank.model
    processor = names.TENSOR_PROCESSORS.get(architecture, names.TensorProcessor)(config=model.config.to_dict())
    try:
        places = _places(names, blank.model, processor, [tensor.name for tensor in reader.tensors])
    except NotImplementedError as error:
        raise CheckpointError(f"{path} is of architecture {architecture!r}: {_line(error)}") from error
    rows = _RowOrder(names, processor)
    parsed: dict[str, Any] = {"tensors": {}}  # where transformers' processors put what they join from several tensors
    left = []
    for tensor in reader.tensors:
        kind, name = tensor.tensor_type.name, places.get(tensor.name, "")
        module = name.removesuffix(".weight")
        size = blank.size(module) if name.endswith(".weight") else None
        why = rows.why_not(tensor.name) if kind in FORMATS else f"{kind} has no packed form"
        if size is not None and kind in FORMATS and not why:
            shape = tuple(int(n) for n in reversed(tensor.shape))
            if shape != size:
                raise CheckpointError(f"{tensor.name} has shape {shape}, but the model's {module} has {size}")
            form = FORMATS[kind]
            codes, scale, zero = blocks(_bytes(path, tensor), kind, *size)
            if (order := rows.of(tensor.name, size[0])) is not None:
                codes, scale = codes[order], scale[order]
                zero = None if zero is None else zero[order]
            add_packed(report, module, kind, blank.pack(module, codes, scale, zero, form))
            continue
        try:
            data = _bytes(path, tensor).numpy().reshape(tensor.data.shape[0], -1)
            data = data.view(tensor.data.dtype).reshape(tensor.data.shape)
            weights = gguf.quants.dequantize(data, tensor.tensor_type)
        except NotImplementedError as error:
            raise CheckpointError(f"{path}: {tensor.name} is {kind}, which cannot be read: {_line(error)}") from error
        done = processor.process(weights=weights, name=tensor.name, tensor_key_mapping=places, parsed_parameters=parsed)
        if done.name is None:
            continue
        if done.name not in places:
            left.append(tensor.name)
            continue
        reason = "" if kind in _PLAIN else why or "no linear layer or embedding"
        count = blank.put(places[done.name], torch.from_numpy(np.ascontiguousarray(done.weights)))
        report.floats.append(FloatTensor(places[done.name], kind, count, reason))
    for name, value in parsed["tensors"].items():
        report.floats.append(FloatTensor(name, "joined", blank.put(name, value), "the model joins several tensors"))
    # Tables of rotary frequencies are the config's in transformers.
    if left and (strange := [name for name in left if not name.startswith("rope_")]):
        raise unknown(strange, str(path))
    if left:
        report.notes.append(f"left out, as transformers does: {', '.join(left)}")


def _places(names: Any, model: Any, processor: Any, wanted: list[str]) -> dict[str, str]:
    """GGUF's name -> the model's. transformers asks every module of the model in turn, which takes seconds; the whole
    model's own names do nearly always."""
    whole = SimpleNamespace(config=model.config, state_dict=model.state_dict, named_children=list)
    found: dict[str, str] = names.get_gguf_hf_weights_map(whole, processor)
    if any(name not in found and not name.startswith("rope_") for name in wanted):
        found = names.get_gguf_hf_weights_map(model, processor)
    return found


def blocks(data: Tensor, kind: str, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes (N, U * 4 * bits) uint8, scale (N, U) and zero (N, U) or None, float16, of a tensor's bytes."""
    head = _HEADER[kind]
    parts = data.reshape(rows, columns // UNIT, -1)
    numbers = parts[..., :head].contiguous().view(torch.float16)
    codes = parts[..., head:].flatten(1)  # a copy: a row's blocks are no longer apart
    if kind == "Q8_0":
        codes = codes ^ 0x80  # q + 128 of a signed byte
    zero = numbers[..., 1].contiguous() if numbers.shape[-1] > 1 else None
    return codes.contiguous(), numbers[..., 0].contiguous(), zero


class _RowOrder:
    """What the file did to the rows of a linear layer's weight, asked of transformers' processor."""

    def __init__(self, names: Any, processor: Any) -> None:
        self.processor = processor
        self.permutes = isinstance(processor, names.LlamaTensorProcessor)
        # These change norms only, or nothing.
        same = (names.TensorProcessor, names.Gemma2TensorProcessor, names.NemotronTensorProcessor)
        self.known = self.permutes or type(processor) in same

    def why_not(self, name: str) -> str:
        return "" if self.known else "this architecture's files keep some weights in another order or shape"

    def of(self, name: str, rows: int) -> Tensor | None:
        """Row i of the model is row ``order[i]`` of the file: int64 (N,); None where nothing moved."""
        if not self.permutes:
            return None
        moved = self.processor.process(weights=np.arange(rows)[:, None], name=name).weights[:, 0]
        return None if np.array_equal(moved, np.arange(rows)) else torch.from_numpy(np.ascontiguousarray(moved))


def _bytes(path: Path, tensor: Any) -> Tensor:
    """The tensor's bytes, read instead of mapped: pages of a mapping would stay resident."""
    data = np.fromfile(path, np.uint8, int(tensor.n_bytes), offset=int(tensor.data_offset))
    if data.size != tensor.n_bytes:
        raise CheckpointError(f"{path} ends within {tensor.name}: it is not complete")
    return torch.from_numpy(data)


def _gguf() -> Any:
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependency("reading GGUF files needs the gguf package: pip install gguf")
    import gguf

    return gguf


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
