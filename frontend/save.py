"""Saving a compiled module to one file, and loading it without the model's class, calibration or pickle.

The file is a zip (stored, not compressed) of

- ``meta.json``: format version, versions of what wrote it, options, pytree specs, kernels, and the SHA-256 of the rest;
- ``graph.json``: the lowered graph, see ``graph_json``;
- ``weights.safetensors``: each tensor once; tied names share it;
- ``report.json``: :meth:`~tilewright.frontend.report.Report.to_dict`.

A file is data: loading runs the graph's operators when called and nothing else. The hashes tell damage, not malice;
what a hostile file may name is closed in ``graph_json`` and here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
import torch.utils._pytree as pytree
from safetensors import SafetensorError

from ..codegen.spec import KernelSpec, SpecError
from ..runtime.errors import SaveError
from .cross_cache import CrossProgram
from .decoder_file import Decoding, step_names
from .graph_json import graph_from_json, graph_to_json
from .inputs import CallForm, Input
from .report import Report, json_safe
from .weights_file import read_tensors

if TYPE_CHECKING:
    from .compiled import CompiledModule
    from .loaded import LoadedModule

FORMAT = 1
_WEIGHTS = "weights.safetensors"
_MEMBERS = ("meta.json", "graph.json", _WEIGHTS, "report.json")
# Containers a saved signature may be made of. Others would let a file choose what to import.
_CONTAINERS = frozenset({"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"})
_TRUSTED_PACKAGE = "transformers"


@dataclass
class Program:
    """What a file holds.

    lowered: flat graph module, inputs in the order of ``in_spec``'s leaves. in_spec: of ``(args, kwargs)``.
    call, inputs: how calls are written and what is checked of them. dynamic: whether any input size may vary.
    kernels: per kernel ``{"site", "op", "node", "target", "spec"}``, ``site`` the fields of a ``Site``, ``spec`` a
    :class:`KernelSpec`. options: ``target``, ``rest`` and ``passes`` (name and options) of the compilation.
    training: whether the model was in training mode. moved: whether loading put it on another device.
    decoding: of a module with a KV cache; ``lowered`` then takes the inputs that it names.
    """

    lowered: torch.fx.GraphModule
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    call: CallForm
    inputs: list[Input]
    report: Report
    dynamic: bool = False
    kernels: list[dict[str, Any]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    training: bool = False
    moved: bool = False
    decoding: Decoding | None = None


def save(compiled: CompiledModule | LoadedModule, path: str | os.PathLike[str]) -> Path:
    """Write a compiled module to ``path`` (any name; ``.tilewright`` is customary) and return the path.

    An existing file is replaced once the new one is complete. Only modules captured whole, from example inputs, can
    be saved; the graph of the module's current mode (training or not) is. A decoder with a KV cache is saved with its
    config and generation config, as transformers' JSON.
    Raises :class:`~tilewright.runtime.errors.SaveError` with the remedy.
    """
    return write_program(_program_of(compiled), path)


def load(path: str | os.PathLike[str], *, device: str | torch.device | None = None) -> LoadedModule:
    """Read what :func:`save` wrote. The model's class is not needed; kernels are taken from the cache or built.

    device: where to put weights and constants; where they were saved from by default. On another kind of device the
    kernels' reference forms run.
    Raises :class:`~tilewright.runtime.errors.SaveError` when the file is damaged, of another format, asks for an
    operator a saved graph may not call, or was saved on a device that this machine lacks.
    """
    from .loaded import LoadedModule

    return LoadedModule(read_program(path, device=device))


def _program_of(compiled: CompiledModule | LoadedModule) -> Program:
    from .compiled import CompiledModule
    from .loaded import LoadedModule

    if isinstance(compiled, CompiledModule) and compiled.stored is not None:
        return compiled.stored.program
    if isinstance(compiled, LoadedModule):
        return compiled.program
    if not isinstance(compiled, CompiledModule):
        raise SaveError(
            f"a {type(compiled).__name__} is not what compile() returned: save(tilewright.compile(...), path)"
        )
    if compiled.door != "export":
        why = compiled.report.capture.fallback_reason
        raise SaveError(
            "only a model captured whole by torch.export can be saved, and this one was captured by Dynamo"
            + (f" because {why}" if why else ": give compile() example_inputs or example_kwargs")
        )
    return program_of(compiled)


def program_of(compiled: CompiledModule) -> Program:
    """What runs of a compiled module, with nothing of the model and the graphs before lowering."""
    program = compiled.exported_program()
    captured, lowered = program.captured, program.record.lowered
    names = {node.name: node.name for node in lowered.graph.nodes}
    decoding = None
    if (decoder := compiled.decoder()) is not None:
        if isinstance(decoder, CrossProgram):
            raise SaveError(
                "an encoder-decoder with a KV cache cannot be saved: its encoder runs as the model's own module; save "
                "the model and compile it again"
            )
        names = step_names(lowered, decoder.lifted.module)
        decoding, lowered = Decoding.of(decoder), decoder.lifted.module
    rows = [
        {
            "site": list(dataclasses.astuple(u.site)),
            "op": u.op,
            "node": names[u.node],
            "target": u.target,
            "spec": u.spec,
        }
        for u in program.record.kernels
        if u.node in names
    ]
    return Program(
        lowered,
        captured.in_spec,
        captured.out_spec,
        program.call,
        program.inputs,
        compiled.report,
        captured.dynamic,
        rows,
        {
            "target": compiled.options.target,
            "rest": program.record.rest,
            "memory": compiled.options.memory,
            "passes": [{"name": one.name, "options": one.options()} for one in compiled.options.passes],
        },
        compiled.training,
        decoding=decoding,
    )


def write_program(program: Program, path: str | os.PathLike[str]) -> Path:
    """Write ``program``; see :func:`save`."""
    path = Path(path)
    tensors, attributes = _collect(program.lowered)
    report = json.dumps(program.report.to_dict(), allow_nan=False, indent=1).encode()
    graph = json.dumps(graph_to_json(program.lowered), allow_nan=False).encode()
    try:
        weights = safetensors.torch.save(tensors)
    except (SafetensorError, KeyError, ValueError) as error:
        raise SaveError(f"the weights do not fit into safetensors: {error}") from error
    parts = {"graph.json": graph, "weights.safetensors": weights, "report.json": report}
    meta = {
        "format": FORMAT,
        "versions": _versions(),
        "in_spec": _spec_to_text(program.in_spec, "inputs"),
        "out_spec": _spec_to_text(program.out_spec, "outputs"),
        "call": dataclasses.asdict(program.call),
        "inputs": [dataclasses.asdict(one) for one in _checked(program.inputs)],
        "dynamic": program.dynamic,
        "attributes": attributes,
        "kernels": [{**kernel, "spec": kernel["spec"].to_dict()} for kernel in program.kernels],
        "options": json_safe(program.options),
        "training": program.training,
        "decoding": program.decoding.to_json() if program.decoding is not None else None,
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in parts.items()},
    }
    parts = {"meta.json": json.dumps(meta, allow_nan=False, indent=1).encode(), **parts}
    _write_zip(path, parts)
    return path


def _checked(inputs: list[Input]) -> list[Input]:
    for one in inputs:
        if not isinstance(one.constant, type(None) | bool | int | float | str):
            raise SaveError(f"the input {one.path} is a {type(one.constant).__name__}, which a file cannot hold")
    return inputs


def _write_zip(path: Path, parts: Mapping[str, bytes]) -> None:
    """Write next to the goal and move into place, so that a full disk leaves the old file whole."""
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=path.name + ".", suffix=".tmp", dir=path.parent)
        with os.fdopen(handle, "wb") as stream:
            with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
                for name, data in parts.items():
                    # A fixed date: the same module gives the same bytes.
                    archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise SaveError(f"cannot write {path}: {error.strerror or error}") from error


def _versions() -> dict[str, str]:
    from tilewright import __version__

    return {"tilewright": __version__, "torch": torch.__version__}


def _collect(module: torch.fx.GraphModule) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """The tensors that the graph reads, each once, and what stands at each attribute."""
    tensors: dict[str, torch.Tensor] = {}
    attributes: dict[str, dict[str, Any]] = {}
    keys: dict[Any, str] = {}
    for node in module.graph.nodes:
        if node.op != "get_attr" or node.target in attributes:
            continue
        tensor: Any = module
        for part in node.target.split("."):
            tensor = getattr(tensor, part)
        if not isinstance(tensor, torch.Tensor) or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise SaveError(f"{node.target} is a {type(tensor).__name__}, which a file cannot hold")
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise SaveError(f"{node.target} is {tensor.layout}, which a file cannot hold")
        same = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, str(tensor.device))
        # Empty tensors have no address to tell them apart by.
        key = keys.setdefault(same if tensor.numel() else node.target, str(node.target))
        tensors.setdefault(key, tensor.detach().cpu().contiguous())
        kind = "parameter" if isinstance(tensor, torch.nn.Parameter) else "buffer"
        row = {"tensor": key, "kind": kind, "device": str(tensor.device), "requires_grad": tensor.requires_grad}
        if not tensor.is_contiguous():
            row["stride"] = list(tensor.stride())  # another layout may take another kernel and round differently
        attributes[str(node.target)] = row
    # safetensors refuses tensors that share memory, such as two overlapping views.
    owners: set[int] = set()
    for key, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        if tensor.numel() and (address in owners or tensor.untyped_storage().nbytes() != tensor.nbytes):
            tensors[key] = tensor = tensor.clone()
        owners.add(tensor.untyped_storage().data_ptr())
    return tensors, attributes


def _spec_to_text(spec: pytree.TreeSpec, what: str) -> str:
    try:
        text = pytree.treespec_dumps(spec)
    except (NotImplementedError, TypeError) as error:
        raise SaveError(f"the {what} hold a type that cannot be saved: {error}") from error
    _check_spec(json.loads(text)[1], what)
    return text


def _check_spec(spec: Any, what: str) -> None:
    """Refuse a pytree spec whose loading would import or build anything but plain containers and model outputs."""
    try:
        kind, context, children = spec["type"], spec["context"], spec["children_spec"]
        if kind is None:
            if children:
                raise SaveError(f"the {what} have a malformed structure")
            return
        trusted = kind.split(".")[0] == _TRUSTED_PACKAGE and all(part.isidentifier() for part in kind.split("."))
        if kind not in _CONTAINERS and not trusted:
            raise SaveError(
                f"the {what} hold a {kind}: a file can hold tuples, lists, dicts and the outputs of {_TRUSTED_PACKAGE}"
            )
        names = json.loads(context) if context is not None else None
        plain = names is None or (isinstance(names, list) and all(isinstance(n, str | int) for n in names))
        if not plain:
            raise SaveError(f"the {what} hold a {kind} with keys that are no texts")
        for child in children:
            _check_spec(child, what)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise SaveError(f"the {what} have a malformed structure") from error


def _spec_from_text(text: Any, what: str) -> pytree.TreeSpec:
    try:
        version, spec = json.loads(text)
    except (TypeError, ValueError) as error:
        raise SaveError(f"the {what} have a malformed structure") from error
    _check_spec(spec, what)
    _register(spec)
    try:
        return pytree.treespec_loads(json.dumps([version, spec]))
    except (NotImplementedError, KeyError, TypeError, ValueError, AssertionError) as error:
        raise SaveError(f"the {what} hold a type that is not known here: {error}") from error


def _register(spec: Mapping[str, Any]) -> None:
    """transformers registers an output class with pytree when the class's module is imported."""
    kind = spec["type"]
    if kind is not None and kind not in _CONTAINERS:
        module, _, _ = kind.rpartition(".")
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise SaveError(f"the model gives a {kind}, and {error}: pip install 'tilewright[hf]'") from error
    for child in spec["children_spec"]:
        _register(child)


def read_program(path: str | os.PathLike[str], *, device: str | torch.device | None = None) -> Program:
    """Read ``path``; see :func:`load`."""
    path = Path(path)
    parts, tensors, digest = _read_zip(path)
    meta = _json(parts["meta.json"], path, "meta.json")
    if meta.get("format") != FORMAT:
        written = meta.get("format")
        raise SaveError(
            f"{path} has format {written!r} and this version reads {FORMAT}: save it again with this version"
        )
    expected = meta.get("sha256")
    found = {name: hashlib.sha256(data).hexdigest() for name, data in parts.items()} | {_WEIGHTS: digest}
    for name in _MEMBERS[1:]:
        if not isinstance(expected, dict) or expected.get(name) != found[name]:
            raise SaveError(f"{path} is damaged: {name} is not what was saved")
    try:
        attributes = _restore(tensors, meta["attributes"], device)
        rows = _json(parts["graph.json"], path, "graph.json")
        lowered = graph_from_json(_on_device(rows, device), attributes)
        program = Program(
            lowered,
            _spec_from_text(meta["in_spec"], "inputs"),
            _spec_from_text(meta["out_spec"], "outputs"),
            CallForm(tuple(meta["call"]["parameters"]), tuple(meta["call"]["names"]), bool(meta["call"]["by_name"])),
            [_input(row, device) for row in meta["inputs"]],
            Report.from_dict(_json(parts["report.json"], path, "report.json")),
            bool(meta["dynamic"]),
            [{**row, "spec": KernelSpec.from_dict(row["spec"])} for row in meta["kernels"]],
            dict(meta["options"]),
            bool(meta["training"]),
            device is not None and any(_type(row["device"]) != _type(device) for row in meta["attributes"].values()),
            Decoding.from_json(meta["decoding"], bool(meta["training"])) if meta.get("decoding") else None,
        )
        program.call.signature  # noqa: B018 - raises for rows that are no signature
    except SaveError as error:
        raise SaveError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, SyntaxError, SpecError) as error:
        # Each part was checked by its hash, so a wrong structure means a foreign writer.
        raise SaveError(f"{path} is not a file that Tilewright wrote: {type(error).__name__}: {error}") from error
    inputs = sum(node.op == "placeholder" for node in lowered.graph.nodes)
    if program.decoding is not None:
        if inputs != program.decoding.placeholders():
            raise SaveError(f"{path}: the graph has {inputs} inputs, its cache needs {program.decoding.placeholders()}")
    elif not inputs == len(program.inputs) == program.in_spec.num_leaves:
        raise SaveError(f"{path}: the graph has {inputs} inputs, the signature {program.in_spec.num_leaves}")
    return program


def _type(device: str | torch.device) -> str:
    return torch.device(device).type


def _input(row: Mapping[str, Any], device: str | torch.device | None) -> Input:
    one = Input(**{**row, "shape": tuple(row["shape"]), "most": tuple(row.get("most", ()))})
    return dataclasses.replace(one, device=_type(device)) if device is not None and one.dtype else one


def _read_zip(path: Path) -> tuple[dict[str, bytes], dict[str, torch.Tensor], str]:
    """The members that are small, the weights, and their SHA-256."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            if sorted(info.filename for info in infos) != sorted(_MEMBERS):
                raise SaveError(f"{path} is not a saved Tilewright module: it does not hold {', '.join(_MEMBERS)}")
            if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
                raise SaveError(f"{path} is not a saved Tilewright module: its parts are compressed")
            parts = {name: archive.read(name) for name in _MEMBERS if name != _WEIGHTS}
            with archive.open(_WEIGHTS) as stream:
                tensors, digest = read_tensors(stream, archive.getinfo(_WEIGHTS).file_size)
            return parts, tensors, digest
    except OSError as error:
        raise SaveError(f"cannot read {path}: {error.strerror or error}") from error
    except (zipfile.BadZipFile, EOFError, ValueError, RuntimeError, NotImplementedError) as error:
        raise SaveError(f"{path} is damaged or no saved Tilewright module: {error}") from error


def _json(data: bytes, path: Path, name: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise SaveError(f"{path} is damaged: {name} is no JSON: {error}") from error


def _restore(
    tensors: Mapping[str, torch.Tensor], rows: Mapping[str, Any], device: str | torch.device | None
) -> torch.nn.Module:
    """The attribute tree: parameters and buffers at their dotted names, one object for tied ones."""
    root = torch.nn.Module()
    made: dict[tuple[str, str], torch.Tensor] = {}
    for name, row in rows.items():
        key, kind = row["tensor"], row["kind"]
        if (key, kind) not in made:
            data = _place(tensors[key], device or row["device"])
            if "stride" in row:
                strided = torch.empty_strided(data.shape, row["stride"], dtype=data.dtype, device=data.device)
                data = strided.copy_(data)
            shared = next((t.data for (other, _), t in made.items() if other == key), data)
            made[key, kind] = (
                torch.nn.Parameter(shared, requires_grad=row["requires_grad"]) if kind == "parameter" else shared
            )
        _attach(root, name, made[key, kind])
    return root


def _place(tensor: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    try:
        return tensor.to(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SaveError(f'its weights cannot be put on {device} ({reason}): load(path, device="cpu")') from error


def _attach(root: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    *path, last = name.split(".")
    owner = root
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, torch.nn.Module())
        owner = owner._modules[part]  # type: ignore[assignment]
    if isinstance(tensor, torch.nn.Parameter):
        owner.register_parameter(last, tensor)
    else:
        owner.register_buffer(last, tensor)


def _on_device(rows: Any, device: str | torch.device | None) -> Any:
    """Device constants of a graph replaced; a kernel's target is its device's, so it becomes the reference form."""
    if device is None:
        return rows
    if isinstance(rows, list):
        return [_on_device(row, device) for row in rows]
    if isinstance(rows, dict):
        if set(rows) == {"device"}:
            return {"device": str(torch.device(device))}
        return {key: _on_device(row, device) for key, row in rows.items()}
    return rows
