"""``tilewright.load_quantized``: checkpoints that are quantized already go straight to packed weights.

The model is built from its config with parameters on the meta device, linear layers and embeddings become modules of
packed weights, one by one, and the rest is loaded as it is. No float weight of what is packed is ever made.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..codegen.weight_format import WeightFormat
from ..runtime.announce import announce
from ..runtime.errors import BadArgument, CheckpointError, MissingDependency
from .models import BUNDLED, bundled_folder
from .quantized_modules import PackedWeight, QuantizedEmbedding, QuantizedLinear


@dataclass(frozen=True)
class PackedTensor:
    """A weight that stayed packed. module: its path. source: type in the checkpoint. format: of the codes (text).

    shape: (N, K). bytes: of codes, scales and zeros. order: whether the input is permuted.
    """

    module: str
    source: str
    format: str
    shape: tuple[int, int]
    bytes: int
    order: bool = False


@dataclass(frozen=True)
class FloatTensor:
    """A tensor that is float in the model. reason: why, where the checkpoint had it quantized; else empty."""

    name: str
    source: str
    bytes: int
    reason: str = ""


@dataclass
class ImportReport:
    """What :func:`load_quantized` made of a checkpoint.

    source: the path. kind: ``gguf``, ``gptq`` or ``awq``. tied: modules that share another's weight, by path.
    notes: what else is worth knowing.
    """

    source: str
    kind: str
    packed: list[PackedTensor] = field(default_factory=list)
    floats: list[FloatTensor] = field(default_factory=list)
    tied: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def packed_bytes(self) -> int:
        return sum(one.bytes for one in self.packed)

    @property
    def float_bytes(self) -> int:
        return sum(one.bytes for one in self.floats)

    @property
    def unpacked(self) -> list[FloatTensor]:
        """Quantized in the checkpoint, float in the model."""
        return [one for one in self.floats if one.reason]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"packed_bytes": self.packed_bytes, "float_bytes": self.float_bytes}

    def __str__(self) -> str:
        kinds: dict[str, int] = {}
        for one in self.packed:
            key = f"{one.source} {one.format}"
            kinds[key] = kinds.get(key, 0) + 1
        lines = [f"{self.kind} {self.source}: {len(self.packed)} packed weights, {self.packed_bytes / 1e6:.1f} MB"]
        lines += [f"  {count} x {key}" for key, count in kinds.items()]
        lines += [f"  {module} shares the weight of {other}" for module, other in self.tied.items()]
        lines += [f"  float: {len(self.floats)} tensors, {self.float_bytes / 1e6:.1f} MB"]
        lines += [f"  dequantized: {one.name} ({one.source}): {one.reason}" for one in self.unpacked]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


@dataclass
class QuantizedCheckpoint:
    """model: in eval mode, for inference (no parameter requires gradients). report: what was packed and what not."""

    model: nn.Module
    report: ImportReport
    folder: Path
    gguf: str | None = None

    @cached_property
    def tokenizer(self) -> Any:
        """Read when it is asked for. Raises OSError where the checkpoint has none."""
        named = {} if self.gguf is None else {"gguf_file": self.gguf}
        return _transformers().AutoTokenizer.from_pretrained(str(self.folder), local_files_only=True, **named)


def load_quantized(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    activations: int | None = None,
) -> QuantizedCheckpoint:
    """Load a quantized checkpoint with its weights packed as they are: nothing is rounded again.

    path: a GGUF file, a folder with one, a folder with an AWQ or GPTQ checkpoint in transformers' format, or the name
    of a bundled model (``smollm2``). dtype: of what is float in the model, which is also what its layers compute in.
    attn_implementation: as in transformers. activations: 8 or 4 to round each token to integers of so many bits before
    a packed linear layer, as its kernels then multiply (an approximation that the checkpoint does not ask for).

    GGUF: Q4_0, Q4_1 and Q8_0 stay packed, other types become float (the report says which). AWQ: 4 bits, format
    ``gemm``. GPTQ: 8, 4, 3 and 2 bits, formats ``gptq`` and ``gptq_v2``, activation order included.

    Raises :class:`~tilewright.runtime.errors.CheckpointError` for a checkpoint that is damaged, incomplete or of
    another kind, ``BadArgument`` for other ``activations``, and ``MissingDependency``.
    """
    from . import import_awq_gptq, import_gguf

    if activations not in (None, 8, 4) or isinstance(activations, bool):
        raise BadArgument(f"activations is {activations!r}, but must be 8, 4 or None")
    folder, file = _find(path)
    if file is not None:
        config = import_gguf.read_config(folder, file)
        blank = Blank.build(config, dtype, attn_implementation)
        report = ImportReport(str(folder / file), "gguf")
        import_gguf.fill(blank, folder / file, report)
    else:
        config = _read_config(folder)
        scheme = import_awq_gptq.Scheme.of(getattr(config, "quantization_config", None))
        del config.quantization_config  # transformers would look for its own modules
        blank = Blank.build(config, dtype, attn_implementation, folder)
        report = ImportReport(str(folder), scheme.method)
        import_awq_gptq.fill(blank, folder, scheme, report)
    blank.finish(report)
    if activations:
        for module in blank.model.modules():
            if isinstance(module, QuantizedLinear):
                module.format = module.format.changed(activations=activations)
        report.notes.append(f"linear layers round their input to {activations} bits a token")
    if report.unpacked:
        first = report.unpacked[0]
        announce(
            f"{len(report.unpacked)} weights that are quantized in {report.source} are float in the model, such as "
            f"{first.name}: {first.reason}",
            key=f"import:{report.source}",
        )
    return QuantizedCheckpoint(blank.model.eval().requires_grad_(False), report, folder, file)


def _find(path: str | Path) -> tuple[Path, str | None]:
    """The folder, and the GGUF file in it if there is one."""
    if str(path) in BUNDLED and BUNDLED[str(path)].gguf:
        return bundled_folder(str(path)), BUNDLED[str(path)].gguf
    place = Path(path).expanduser()
    if place.is_file():
        if place.suffix != ".gguf":
            raise CheckpointError(f"{path} is a file but no .gguf: name the folder of an AWQ or GPTQ checkpoint")
        return place.parent, place.name
    if not place.is_dir():
        raise CheckpointError(f"there is no file or folder {path}")
    files = sorted(one.name for one in place.glob("*.gguf"))
    if len(files) > 1:
        raise CheckpointError(f"{path} holds {len(files)} GGUF files: name one, such as {place / files[0]}")
    if not files and not (place / "config.json").is_file():
        raise CheckpointError(f"{path} holds neither a GGUF file nor a config.json")
    return place, files[0] if files else None


def _read_config(folder: Path) -> Any:
    try:
        return _transformers().AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder}: its config.json cannot be read: {_first(error)}") from error


def _first(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Blank:
    """A model whose parameters are on the meta device until a checkpoint fills them, one by one."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.model = model
        self.dtype = dtype
        self.filled: set[str] = set()
        """Names of parameters and buffers that have a value, ``weight`` of packed modules among them."""

    @staticmethod
    def build(config: Any, dtype: torch.dtype, attn_implementation: str | None, folder: Path | None = None) -> Blank:
        """From a transformers config; buffers, which a config decides, are real."""
        transformers = _transformers()
        if importlib.util.find_spec("accelerate") is None:
            raise MissingDependency("importing quantized checkpoints needs accelerate: pip install accelerate")
        accelerate: Any = importlib.import_module("accelerate")
        name = (getattr(config, "architectures", None) or [""])[0]
        made: Any = getattr(transformers, name, None)
        more = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        with accelerate.init_empty_weights(include_buffers=False):
            if made is None:
                model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, **more)
            else:
                model = made._from_config(config, dtype=dtype, **more)
        if folder is not None and (folder / "generation_config.json").is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(str(folder))
        return Blank(model, dtype)

    def module(self, name: str) -> nn.Module | None:
        """The module at this path; None where there is none."""
        try:
            return self.model.get_submodule(name)
        except AttributeError:
            return None

    def find(self, name: str) -> str:
        """The model's own name of a checkpoint's parameter or module: with or without the base model's prefix.

        Empty where there is none.
        """
        prefix = getattr(self.model, "base_model_prefix", "") + "."
        for one in (name, name.removeprefix(prefix), prefix + name):
            path, _, leaf = one.rpartition(".")
            owner = self.module(path)
            if owner is not None and (leaf in owner._parameters or leaf in owner._buffers or leaf in owner._modules):
                return one
        return ""

    def put(self, name: str, tensor: Tensor) -> int:
        """A float (or integer) tensor, in the dtype that the model has for it; returns its bytes."""
        path, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(path)
        held: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
        old = held.get(leaf)
        if old is None or tuple(old.shape) != tuple(tensor.shape):
            wanted = "none" if old is None else tuple(old.shape)
            raise CheckpointError(f"{name} has shape {tuple(tensor.shape)}, but the model has {wanted}")
        value = tensor.to(old.dtype).contiguous()
        held[leaf] = nn.Parameter(value, requires_grad=False) if leaf in owner._parameters else value
        self.filled.add(name)
        return value.nbytes

    def size(self, name: str) -> tuple[int, int] | None:
        """(N, K) of the weight of a linear layer or embedding that can be packed; None for other modules."""
        module = self.module(name)
        if type(module) is nn.Linear or (type(module) is nn.Embedding and module.max_norm is None):
            rows, columns = module.weight.shape
            return int(rows), int(columns)
        return None

    def pack(
        self,
        name: str,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        form: WeightFormat,
        order: Tensor | None = None,
    ) -> PackedWeight:
        """Put a packed weight where the linear layer or embedding ``name`` stands; its bias stays.

        Raises :class:`CheckpointError` where a scale or offset is not finite.
        """
        for what, numbers in (("scale", scale), ("offset", zero)):
            if numbers is not None and numbers.is_floating_point() and not bool(numbers.isfinite().all()):
                raise CheckpointError(f"{name}: a {what} is not finite, so the checkpoint is damaged")
        packed = self._made(name, codes, scale, zero, form, order)
        self.model.set_submodule(name, packed)
        self.filled.add(f"{name}.weight")
        return packed

    def _made(
        self,
        name: str,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        form: WeightFormat,
        order: Tensor | None = None,
    ) -> PackedWeight:
        old: Any = self.model.get_submodule(name)
        rows, columns = (int(size) for size in old.weight.shape)
        if type(old) is nn.Embedding:
            extra: dict[str, Any] = {"dtype": old.weight.dtype, "padding_idx": old.padding_idx}
            return QuantizedEmbedding(codes, scale, zero, rows=rows, columns=columns, format=form, **extra)
        packed = QuantizedLinear(codes, scale, zero, rows=rows, columns=columns, format=form, order=order)
        if (bias := old._parameters.get("bias")) is not None:  # still on the meta device, or filled already
            packed.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return packed

    def finish(self, report: ImportReport) -> None:
        """Tie what the model ties, and see that nothing is missing. Raises :class:`CheckpointError`."""
        for name, other in dict(getattr(self.model, "all_tied_weights_keys", None) or {}).items():
            if name in self.filled and other not in self.filled:
                name, other = other, name
            if name not in self.filled and other in self.filled:
                self._tie(name, other)
                report.tied[name.removesuffix(".weight")] = other.removesuffix(".weight")
        missing = [name for name, one in self.model.named_parameters() if one.is_meta]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError(f"{report.source} has no {missing[0]}{more}, which the model needs")

    def _tie(self, name: str, other: str) -> None:
        module, source = name.rpartition(".")[0], self.model.get_submodule(other.rpartition(".")[0])
        if isinstance(source, PackedWeight):
            held = (source.codes, source.scale, source.zero, source.format)
            self.model.set_submodule(module, self._made(module, *held))
        else:
            leaf = other.rpartition(".")[2]
            self.model.get_submodule(module)._parameters[name.rpartition(".")[2]] = source._parameters[leaf]
        self.filled.add(name)


def add_packed(report: ImportReport, name: str, source: str, packed: PackedWeight) -> None:
    """A row of the report."""
    shape = (packed.rows, packed.columns)
    order = isinstance(packed, QuantizedLinear) and packed.order is not None
    report.packed.append(PackedTensor(name, source, packed.format.text(), shape, packed.weight_bytes, order))


def unknown(names: Mapping[str, Any] | list[str], source: str) -> CheckpointError:
    """What to raise for tensors that the model has no place for."""
    listed = list(names)
    more = f" and {len(listed) - 1} more" if len(listed) > 1 else ""
    return CheckpointError(f"{source} holds {listed[0]}{more}, for which the model has no place")


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingDependency("importing checkpoints needs transformers: pip install 'tilewright[hf]'") from error
    return transformers
