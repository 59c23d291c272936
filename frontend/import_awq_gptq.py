"""AWQ and GPTQ checkpoints as their packages and transformers write them, as packed weights.

A linear layer of K inputs and N outputs is, in safetensors, with G groups of inputs,

    GPTQ    qweight int32 (K * bits / 32, N): the codes of a column, lowest bits first, as one stream of bits
            qzeros  int32 (G, N * bits / 32): zeros of a group, likewise a stream along N; format ``gptq`` keeps
                    zero - 1, ``gptq_v2`` zero
            scales  (G, N), g_idx int32 (K,): the group of each input
    AWQ     (format ``gemm``, 4 bits) qweight int32 (K, N / 8), qzeros int32 (G, N / 8): nibble i of a word is
            column 8 c + [0, 2, 4, 6, 1, 3, 5, 7][i]; scales (G, N)

and the weight is scale * (code - zero), which is our zero ``point`` (``middle`` where every zero is the middle).
With activation order, columns of one group are not neighbours (g_idx is no staircase): they are sorted by group, and
the layer's input is permuted the same way, which is exact.

Sources: AutoGPTQ and GPTQModel (``gptq``, ``gptq_v2``), AutoAWQ (``gemm``); Frantar et al., "GPTQ", 2022; Lin et al.,
"AWQ", 2023.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..codegen.weight_format import UNIT, WeightFormat
from ..runtime.errors import CheckpointError
from ..runtime.ops import quantized_weight
from .import_checkpoint import Blank, FloatTensor, ImportReport, add_packed, unknown

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_FORMATS = {"awq": ("gemm",), "gptq": ("gptq", "gptq_v2")}
_BITS = {"awq": (4,), "gptq": (8, 4, 3, 2)}


@dataclass(frozen=True)
class Scheme:
    """What ``quantization_config`` says. group: columns, -1 for a whole row. mixed: whether layers may differ."""

    method: str
    bits: int
    group: int
    format: str
    mixed: bool = False

    @staticmethod
    def of(given: Any) -> Scheme:
        """Raises :class:`CheckpointError` for schemes that are not imported."""
        if given is None:
            raise CheckpointError("config.json has no quantization_config: this checkpoint is not quantized")
        row: dict[str, Any] = dict(given) if isinstance(given, Mapping) else given.to_dict()
        method = str(row.get("quant_method", "")).lower().rpartition(".")[2]
        if method not in _FORMATS:
            raise CheckpointError(
                f"quantization_config says quant_method={row.get('quant_method')!r}: AWQ and GPTQ checkpoints can be "
                "imported, and GGUF files"
            )
        default = "gemm" if method == "awq" else "gptq"
        form = row.get("checkpoint_format") or row.get("version" if method == "awq" else "format") or default
        form = str(getattr(form, "value", form)).lower()
        if form not in _FORMATS[method]:
            raise CheckpointError(f"{method} checkpoints of format {form!r} cannot be imported: {_FORMATS[method]}")
        try:
            bits, group = (
                int(row.get("bits", row.get("w_bit", 4))),
                int(row.get("group_size", row.get("q_group_size", 128))),
            )
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"quantization_config has no proper bits and group_size: {error}") from error
        if bits not in _BITS[method]:
            raise CheckpointError(f"{method} with {bits} bits cannot be imported: bits are one of {_BITS[method]}")
        if method == "awq" and row.get("zero_point") is False:
            raise CheckpointError("AWQ checkpoints without zero points are of no published gemm layout")
        return Scheme(method, bits, group, form, bool(row.get("dynamic")))


def fill(blank: Blank, folder: Path, scheme: Scheme, report: ImportReport) -> None:
    """Read every tensor of the checkpoint into ``blank``. Raises :class:`CheckpointError`."""
    with contextlib.ExitStack() as stack:
        where = {name: file for file in _open(folder, stack) for name in file.keys()}
        layers = {name.removesuffix(".qweight") for name in where if name.endswith(".qweight")}
        if not layers:
            raise CheckpointError(f"{folder} holds no quantized weight (no name ends with .qweight)")
        strange = []
        for name in sorted(where):
            layer, _, part = name.rpartition(".")
            if layer in layers and part in _PARTS:
                if part == "qweight":
                    parts = {
                        one: where[f"{layer}.{one}"].get_tensor(f"{layer}.{one}")
                        for one in _PARTS
                        if f"{layer}.{one}" in where
                    }
                    _layer(blank, layer, parts, scheme, report)
                continue
            place = blank.find(name)
            if not place:
                strange.append(name)
                continue
            value = where[name].get_tensor(name)
            source = str(value.dtype).removeprefix("torch.")
            report.floats.append(FloatTensor(place, source, blank.put(place, value)))
        # Old checkpoints keep rotary tables and causal masks, which the config decides.
        if strange := [
            one for one in strange if not one.endswith(("rotary_emb.inv_freq", ".masked_bias", "attn.bias"))
        ]:
            raise unknown(strange, str(folder))


def _open(folder: Path, stack: contextlib.ExitStack) -> Iterator[Any]:
    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            names = sorted(one.name for one in folder.glob("*.safetensors"))
        if not names:
            raise CheckpointError(f"{folder} holds no .safetensors file; pickled weights are not read")
        for name in names:
            if Path(name).name != name:
                raise CheckpointError(f"{index} names {name!r}, which is no file of its folder")
            yield stack.enter_context(safe_open(str(folder / name), framework="pt"))
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{folder}: its weights cannot be read: {error}") from error


def _layer(blank: Blank, layer: str, parts: Mapping[str, Tensor], scheme: Scheme, report: ImportReport) -> None:
    """One linear layer."""
    name = blank.find(layer)
    size = blank.size(name) if name else None
    if size is None:
        raise CheckpointError(f"{layer} is quantized in the checkpoint, but is no linear layer of the model")
    rows, columns = size
    for needed in ("qweight", "qzeros", "scales"):
        if needed not in parts:
            raise CheckpointError(f"{layer} has no {needed}")
    bits, codes, zeros = _codes(layer, parts, scheme, rows, columns)
    scale, groups = parts["scales"].t().contiguous(), parts["scales"].shape[0]
    fits = scheme.group > 0 and -(-columns // scheme.group) == groups
    group = scheme.group if fits and groups > 1 else -(-columns // groups)
    if scale.shape[0] != rows or zeros.shape != scale.shape or (groups - 1) * group >= columns:
        raise CheckpointError(
            f"{layer}: scales {tuple(parts['scales'].shape)} and zeros {tuple(zeros.shape)[::-1]} do not fit a weight "
            f"of {rows} rows and {columns} columns"
        )
    source = f"{scheme.method} {bits} bits"
    index = parts.get("g_idx")
    order, why = _order(layer, index, columns, group, groups)
    if groups > 1 and group % UNIT and not why:
        why = f"groups of {group} columns are no multiple of {UNIT}"
    if why:
        owner = torch.arange(columns) // group if index is None else index.to(torch.int64)
        weight = (codes.float() - zeros.float()[:, owner]) * scale.float()[:, owner]
        count = blank.put(f"{name}.weight", weight)
        report.floats.append(FloatTensor(f"{name}.weight", source, count, why))
        return
    if order is not None:
        codes = codes[:, order]
    scales = "float16" if scale.dtype == torch.float16 else "float32"
    middle = bool((zeros == 2 ** (bits - 1)).all())
    form = WeightFormat(bits, group if groups > 1 else 0, "middle" if middle else "point", scales)
    packed = quantized_weight.pack(codes, form)
    held = (packed, scale.to(getattr(torch, scales)), None if middle else zeros.contiguous())
    add_packed(report, name, source, blank.pack(name, *held, form, order))


def _codes(
    layer: str, parts: Mapping[str, Tensor], scheme: Scheme, rows: int, columns: int
) -> tuple[int, Tensor, Tensor]:
    """Bits, codes (N, K) and zeros (N, G), uint8."""
    qweight, qzeros = parts["qweight"], parts["qzeros"]
    if qweight.dtype != torch.int32 or qzeros.dtype != torch.int32 or qweight.dim() != 2 or qzeros.dim() != 2:
        raise CheckpointError(f"{layer}: qweight and qzeros must be 2-d int32, not {qweight.dtype} and {qzeros.dtype}")
    if scheme.method == "awq":
        if tuple(qweight.shape) != (columns, rows // 8) or rows % 8 or qzeros.shape[1] != rows // 8:
            raise CheckpointError(
                f"{layer}: qweight {tuple(qweight.shape)} is not AWQ's for {rows} outputs and {columns} inputs"
            )
        return 4, _awq(qweight).t().contiguous(), _awq(qzeros).t().contiguous()
    # A checkpoint may keep layers at several widths; the shape tells.
    bits = qweight.shape[0] * 32 // columns
    if bits not in _BITS["gptq"] or tuple(qweight.shape) != (columns * bits // 32, rows) or (columns * bits) % 32:
        raise CheckpointError(
            f"{layer}: qweight {tuple(qweight.shape)} is not GPTQ's for {rows} outputs and {columns} inputs"
        )
    if bits != scheme.bits and not scheme.mixed:
        raise CheckpointError(f"{layer} has {bits} bits, but quantization_config says {scheme.bits}")
    if qzeros.shape[1] * 32 != rows * bits:
        raise CheckpointError(f"{layer}: qzeros {tuple(qzeros.shape)} do not fit {rows} outputs")
    zeros = stream(qzeros, bits)
    if scheme.format == "gptq":
        zeros = (zeros + 1) & (2**bits - 1)
    return bits, stream(qweight.t(), bits), zeros.t().contiguous()


def stream(words: Tensor, bits: int) -> Tensor:
    """Numbers of ``bits`` bits along the last dimension of int32 (R, W), lowest first: uint8 (R, W * 32 / bits)."""
    data = words.contiguous().view(torch.uint8)  # little-endian, as all our targets
    if bits == 8:
        return data
    if bits != 3:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        return (data[:, :, None] >> shifts & (2**bits - 1)).flatten(1)
    triples = data.reshape(data.shape[0], -1, 3).to(torch.int32)  # 24 bits hold 8 numbers
    whole = triples[..., 0] | triples[..., 1] << 8 | triples[..., 2] << 16
    return (whole[:, :, None] >> torch.arange(0, 24, 3) & 7).to(torch.uint8).flatten(1)


def _awq(words: Tensor) -> Tensor:
    """Nibbles of int32 (R, W) in the order of their columns: uint8 (R, W * 8)."""
    nibbles = stream(words, 4).unflatten(1, (-1, 8))
    found = torch.empty_like(nibbles)
    found[:, :, list(AWQ_ORDER)] = nibbles
    return found.flatten(1)


def _order(layer: str, index: Tensor | None, columns: int, group: int, groups: int) -> tuple[Tensor | None, str]:
    """How to sort columns by group (None: they are), and why that gives no equal groups (empty: it does)."""
    if index is None or groups == 1:
        return None, ""
    index = index.to(torch.int64)
    staircase = torch.arange(columns) // group
    if index.shape != staircase.shape or int(index.min()) < 0 or int(index.max()) >= groups:
        raise CheckpointError(f"{layer}: g_idx does not give each of {columns} inputs one of {groups} groups")
    if torch.equal(index, staircase):
        return None, ""
    order = torch.argsort(index, stable=True)
    if not torch.equal(index[order], staircase):
        return None, "its groups (g_idx) have different numbers of columns"
    return order, ""
