"""A KV cache in a file, so that a prefix that was read once need not be read again.

Safetensors: of each store the part that tokens have filled, ``first``, and metadata that says which cache it is of.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from .errors import CacheMismatch, SaveError
from .kv_cache import KVState

FORMAT = "tilewright-kv-cache-1"


def write(state: KVState, path: str | os.PathLike[str], fingerprint: str) -> Path:
    """Write the tokens of ``state`` to ``path``. fingerprint: of the model and of how its cache is kept.

    Raises :class:`~tilewright.runtime.errors.SaveError` when the file cannot be written.
    """
    path = Path(path)
    tensors = {f"{index:05d}": part for index, part in enumerate(_parts(state))} | {"first": state.first.cpu()}
    tensors |= {f"fixed{index:05d}": part.detach().cpu().contiguous() for index, part in enumerate(state.fixed)}
    meta = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "tokens": str(state.tokens),
        "batch": str(state.batch),
    }
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        safetensors.torch.save_file(tensors, temporary, metadata=meta)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise SaveError(f"cannot write {path}: {error}") from error
    return path


def read(path: str | os.PathLike[str], empty: KVState, fingerprint: str) -> KVState:
    """What :func:`write` wrote, as a state like ``empty``, which says sites, limit and device.

    Raises :class:`~tilewright.runtime.errors.CacheMismatch` for the cache of another model or compilation and for more
    tokens than fit, :class:`~tilewright.runtime.errors.SaveError` for a damaged file.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as opened:
            meta = opened.metadata() or {}
            if meta.get("format") != FORMAT:
                raise SaveError(f"{path} is not a KV cache that Tilewright wrote")
            if meta.get("fingerprint") != fingerprint:
                raise CacheMismatch(f"{path} is the cache of another model, or of one compiled with other passes")
            tokens, batch = int(meta["tokens"]), int(meta["batch"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except (OSError, SafetensorError, KeyError, ValueError, json.JSONDecodeError) as error:
        if isinstance(error, CacheMismatch):
            raise
        raise SaveError(f"{path} is not a KV cache, or is damaged: {error}") from error
    state = KVState(empty.sites, empty.limit, batch, empty.device)
    state.reserve(tokens)
    parts = [tensors.get(f"{index:05d}") for index in range(len(state.flat))]
    _fill(state, parts, tokens, path)
    if "first" not in tensors or tensors["first"].shape != state.first.shape:
        raise SaveError(f"{path} is damaged: it does not say which tokens are padding")
    state.set_first(tensors["first"])
    state.advance(tokens)
    state.fixed = [tensors[name].to(state.device) for name in sorted(tensors) if name.startswith("fixed")]
    return state


def _parts(state: KVState) -> list[Tensor]:
    found = []
    for grows, tensor in zip(state.grows, state.flat, strict=True):
        if not grows:
            part = tensor
        elif state.pages is not None:
            count = -(-state.tokens // state.page)
            part = tensor[state.pages[:, :count].to(torch.int64)].transpose(1, 2)  # (B, H, pages, page, ...)
        else:
            part = tensor[:, :, : _used(state, tensor, state.tokens)]
        found.append(part.detach().cpu().contiguous())
    return found


def _used(state: KVState, tensor: Tensor, tokens: int) -> int:
    """Entries of dimension 2 that ``tokens`` tokens have filled."""
    return -(-tokens * tensor.shape[2] // state.capacity)


def _fill(state: KVState, parts: list[Tensor | None], tokens: int, path: object) -> None:
    for grows, tensor, part in zip(state.grows, state.flat, parts, strict=True):
        if part is None or part.dtype != tensor.dtype:
            raise SaveError(f"{path} is damaged: it lacks a part of the cache")
        if not grows:
            target = tensor
        elif state.pages is not None:
            count = -(-tokens // state.page)
            if part.dim() != tensor.dim() + 1 or part.shape[:3] != (state.batch, tensor.shape[1], count):
                raise SaveError(f"{path} is damaged: a part of the cache has another shape")
            tensor[state.pages[:, :count].to(torch.int64)] = part.transpose(1, 2).to(tensor.device)
            continue
        else:
            target = tensor[:, :, : _used(state, tensor, tokens)]
        if part.shape != target.shape:
            raise SaveError(f"{path} is damaged: a part of the cache has another shape")
        target.copy_(part)
