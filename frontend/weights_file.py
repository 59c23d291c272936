"""Tensors out of a file that holds safetensors data somewhere inside, one by one.

``safetensors`` reads whole files, or bytes that are in memory already, which doubles the peak. The format is a length,
a JSON header and the tensors' bytes one after another (https://huggingface.co/docs/safetensors), so each tensor can be
read straight into its own memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from typing import IO, Any

import torch
from torch import Tensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MOST_HEADER = 100_000_000
_CHUNK = 1 << 20


def read_tensors(stream: IO[bytes], size: int) -> tuple[dict[str, Tensor], str]:
    """The tensors of ``size`` bytes of safetensors data, and the SHA-256 of all of them in hex.

    Raises ValueError for data that is not in the format.
    """
    source = _Hashed(stream)
    try:
        tensors = _tensors(source, size)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"the weights are damaged: {error}") from error
    return tensors, source.digest.hexdigest()


def _tensors(source: _Hashed, size: int) -> dict[str, Tensor]:
    (length,) = struct.unpack("<Q", source.read(8))
    if length > min(_MOST_HEADER, size - 8):
        raise ValueError("their header is longer than the file")
    header = json.loads(source.read(length))
    header.pop("__metadata__", None)
    tensors: dict[str, Tensor] = {}
    place = 0
    for name, row in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        tensors[name], place = _tensor(source, row, place, size - 8 - length)
    if place != size - 8 - length:
        raise ValueError("there are bytes that no tensor has")
    return tensors


class _Hashed:
    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.digest = stream, hashlib.sha256()

    def read(self, count: int) -> bytes:
        data = self.stream.read(count)
        if len(data) != count:
            raise ValueError("they end too early")
        self.digest.update(data)
        return data


def _tensor(source: _Hashed, row: Any, place: int, most: int) -> tuple[Tensor, int]:
    """The next tensor and where the one after it begins."""
    dtype, shape, (start, stop) = _DTYPES[row["dtype"]], row["shape"], row["data_offsets"]
    if not all(type(one) is int and one >= 0 for one in (*shape, start, stop)):
        raise ValueError("a shape or place is no number")
    if start != place or stop > most or stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError("the places of the tensors do not fit their shapes")
    tensor = torch.empty(shape, dtype=dtype)
    if stop > start:
        data: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        room = memoryview(data)
        for at in range(0, stop - start, _CHUNK):
            part = room[at : at + _CHUNK]
            part[:] = source.read(len(part))
    return tensor, stop
