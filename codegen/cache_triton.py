"""What the Triton templates of a KV cache need besides the spec: parts of channels, tiles, and how kernels compile.

Packed codes hold a head's channels in *parts*: byte i has channel i in its low bits, then i + n, i + 2n .. A tile of
bytes is therefore several tiles of channels, each a contiguous range, and a kernel works on those one after another.
Whole tensors have one part, or are read in the parts of the codes that they stand beside.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from .attention import padded
from .cache_format import INSET, CacheFormat
from .spec import require

RESIDENT = 256
"""Channels of queries that a program keeps on chip; beyond it, it reads them in chunks again for every tile."""
CHUNK = 128
"""Channels of all parts in a chunk."""
LATENT_CHUNK = 64
"""Channels of a latent in a chunk: they meet as many of U's, beside a whole key that is being rebuilt."""
MAX_SPLITS = 128
"""Programs that share a sequence's tokens: each row's partial results are merged by one program."""
QUANTIZE_WARPS = 8

_POINTER = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "uint8": "*u8", "int16": "*i16"}


def power_of_two(number: int) -> int:
    """The largest power of two that divides ``number``."""
    return number & -number


def max_rows(cache: CacheFormat) -> int:
    """Rows of queries (heads that share keys times queries) in a tile of a program; more of them are several programs,
    which follow each other and find the keys in the cache. Twice as many would spill registers."""
    return 16 if cache.latent or cache.quantized else 32


def key_tile(cache: CacheFormat, wanted: int) -> int:
    """Keys in a tile: ``wanted``, or fewer where a tile would leave its group of tokens or its page."""
    limit = power_of_two(cache.group) if cache.quantized else 256
    if cache.page:
        limit = min(limit, power_of_two(cache.page))
    return min(wanted, limit)


def side(cache: CacheFormat, bits: int, dim: int, *, keys: bool) -> dict[str, Any]:
    """One side of the cache: its channels in parts, in tiles of ``block``, read in ``chunks`` runs over a part."""
    parts = 8 // bits if bits else 1
    width = dim // parts
    block = padded(width)
    if keys and block * parts > (LATENT_CHUNK if cache.latent else RESIDENT):
        block = max(16, (LATENT_CHUNK if cache.latent else CHUNK) // parts)
    share = cache.value_group or dim
    return {
        "bits": bits,
        "dim": dim,
        "parts": parts,
        "width": width,
        "block": block,
        "chunks": -(-width // block),
        # Channels that share a value's scale, and whether scales go into queries or weights in place of codes.
        "share": share,
        "groups": dim // share,
        "folds": (keys or share % width == 0) and not (cache.correction or cache.outliers),
        "middle": 2 ** (bits - 1) if bits else 0,
        "whole_block": padded(dim),
        "inset": INSET[bits] if bits else 0.0,
    }


def head(cache: CacheFormat, head_dim: int) -> list[dict[str, Any]]:
    """The channels of a head as the ranges that a rebuilt key is made in: both halves of the pairs that are rotated,
    then the rest. first, step: channel i of a range is first + step * i."""
    half, rest = cache.rotary // 2, head_dim - cache.rotary
    found: list[dict[str, Any]] = []
    if half:
        paired = cache.rotate == "interleaved"
        for index, name in enumerate(("low", "high")):
            first, step = (index, 2) if paired else (index * half, 1)
            found.append({"name": name, "first": first, "step": step, "size": half, "block": padded(half)})
    if rest:
        found.append({"name": "rest", "first": cache.rotary, "step": 1, "size": rest, "block": padded(rest)})
    return found


def context(spec: Any) -> dict[str, Any]:
    """Names for both templates. spec: of codegen/cached_attention.py."""
    cache = spec.cache
    return {
        "keys": side(cache, cache.bits_k, spec.key_dim, keys=True),
        "values": side(cache, cache.bits_v, spec.value_dim, keys=False),
        "pointers": _store_pointers(spec),
    }


def _store_pointers(spec: Any) -> dict[str, str]:
    cache: CacheFormat = spec.cache
    span = cache.page or cache.group
    tensors = cache.store(1, span, 1, spec.key_dim, 1, spec.value_dim, spec.dtype)
    return {name: _pointer(kind) for name, (_, kind) in tensors.items()}


def _pointer(kind: str) -> str:
    return _POINTER.get(kind, "*fp16")


def attention_context(spec: Any) -> dict[str, Any]:
    """Names for the template of cached attention."""
    tile = key_tile(spec.cache, spec.block_n)
    return context(spec) | {
        "ranges": head(spec.cache, spec.head_dim) if spec.cache.latent else [],
        "block_n": tile,
        "max_rows": max_rows(spec.cache),
        "max_splits": MAX_SPLITS,
        "compile_entries": attention_entries(spec),
    }


def attention_entries(spec: Any) -> list[dict[str, Any]]:
    """How each kernel of cached attention is compiled with no GPU, see the text's ``COMPILE``."""
    cache, element = spec.cache, _POINTER[spec.dtype]
    softmax = spec.normalizer == "softmax"
    rebuild = {name: "*fp32" if name in ("cos", "sin") else element for name in cache.rebuild_names()}
    parts = {"parts": "*fp32"} | ({"peaks": "*fp32", "totals": "*fp32"} if softmax else {})
    arguments = {"q": element} | rebuild | _store_pointers(spec) | {"length": "*i32", "first": "*i32"}
    if cache.page:
        arguments["pages"] = "*i32"
    arguments |= parts | {"scale": "fp32"}
    sizes = ["q_heads", "units", "value_heads", "q_len", "capacity", "splits"]
    if cache.rotate:
        sizes.append("positions")
    arguments |= dict.fromkeys(sizes, "i32")
    arguments |= dict.fromkeys(("q_batch", "q_head", "q_row", "q_dim"), "i32")
    constants = {"q_dim": 1, "BLOCK_M": 16, "SEVERAL": False}
    first = _entry("cached_attention_part", arguments, constants, sizes, spec.num_warps, spec.num_stages)
    merged = parts | {"out": element, "splits": "i32"}
    second = _entry("cached_attention_merge", merged, {"BLOCK_SPLITS": 32}, ["splits"], 4, 1)
    return [first, second]


def tiles(spec: Any, *, large: bool) -> dict[str, int]:
    """The tile and launch options shipped for a spec, as its fields. large: as in attention.default_tiles.

    What a program holds at once is a tile of keys and one of values, ``num_stages`` times where they are read ahead;
    decoding is bound by reading, so several programs should fit a processor.
    """
    cache: CacheFormat = spec.cache
    widest = max(padded(min(spec.head_dim, RESIDENT)), padded(spec.value_dim))
    # Half a tile where 64 keys would spill registers: wide heads, float32, and codes that are corrected or of latents.
    rich = cache.correction or cache.outliers or (cache.latent and cache.quantized)
    few = widest > 128 or (widest > 64 and bool(rich)) or (widest > 32 and spec.dtype == "float32")
    stages = 3 if large and spec.dtype != "float32" and not cache.latent else 2
    # Rebuilt keys are a tile of float32 in registers, of which an AMD program of four warps has more a thread.
    warps = 8 if cache.latent and large and widest > 64 else 4
    return {"block_n": 32 if few else 64, "num_warps": warps, "num_stages": stages}


def candidates(spec: Any) -> list[Any]:
    """The spec, then a few with other tiles, as autotuning may try them."""
    found = [spec]
    for block_n, warps, stages in (
        (spec.block_n, spec.num_warps, 1 if spec.num_stages > 1 else 2),
        (min(128, spec.block_n * 2), 8, spec.num_stages),
        (max(16, spec.block_n // 2), spec.num_warps, min(4, spec.num_stages + 1)),
    ):
        other = dataclasses.replace(spec, block_n=block_n, num_warps=warps, num_stages=stages)
        tile = key_tile(spec.cache, block_n)
        if other not in found and (tile == block_n or block_n <= spec.block_n):
            found.append(other)
    return found


def check(spec: Any) -> None:
    """Raise :class:`~tilewright.codegen.spec.SpecError` where the Triton kernels have no way, with the reason."""
    cache: CacheFormat = spec.cache
    for name, bits, dim in (("keys", cache.bits_k, spec.key_dim), ("values", cache.bits_v, spec.value_dim)):
        chunks = side(cache, bits, dim, keys=name == "keys")["chunks"]
        require(
            not bits or chunks == 1 or not (cache.correction or cache.outliers),
            f"a program holds up to {RESIDENT} channels of {name} to correct their codes, not {dim}",
        )


def append_context(spec: Any) -> dict[str, Any]:
    """Names for the template that appends."""
    check(spec)
    cache: CacheFormat = spec.cache
    found = context(spec)
    return found | {
        "compile_entries": append_entries(spec),
        # Whole sides have the names of the call's own tensors.
        "store_locals": [name if "_" in name else f"{name}_cache" for name in spec.store_names],
        "block_t": 1 << (cache.group - 1).bit_length(),
        "quantize_warps": QUANTIZE_WARPS,
    }


def append_entries(spec: Any) -> list[dict[str, Any]]:
    """How each kernel that appends is compiled with no GPU, see the text's ``COMPILE``."""
    cache, element = spec.cache, _POINTER[spec.dtype]
    pointers, entries = _store_pointers(spec), []
    sizes = ["heads", "tokens", "capacity"]
    common = {"length": "*i32"} | ({"pages": "*i32"} if cache.page else {}) | dict.fromkeys(sizes, "i32")
    common |= dict.fromkeys(("x_batch", "x_head", "x_row", "x_dim"), "i32")
    for name, bits in (("k", cache.bits_k), ("v", cache.bits_v)):
        constants: dict[str, Any] = {"x_dim": 1}
        if bits:
            made = {
                part.removeprefix(f"{name}_"): kind for part, kind in pointers.items() if part.startswith(f"{name}_")
            }
            arguments = {"x": element} | made | common
            entries.append(_entry(f"quantize_{name}", arguments, constants, sizes, QUANTIZE_WARPS, 1))
        kernel = "append_recent" if bits else "append_rows"
        constants |= {"DIM": spec.key_dim if name == "k" else spec.value_dim}
        constants |= {"BLOCK": padded(constants["DIM"]), "BLOCK_L": 16}
        entries.append(_entry(kernel, {"x": element, "data": element} | common, constants, sizes, 4, 1))
    return entries


def _entry(
    kernel: str,
    arguments: dict[str, str],
    constants: dict[str, Any],
    unaligned: list[str],
    num_warps: int,
    num_stages: int,
) -> dict[str, Any]:
    signature = {name: "constexpr" if name in constants else kind for name, kind in arguments.items()}
    signature |= {name: "constexpr" for name in constants if name not in arguments}
    return {
        "kernel": kernel,
        "signature": signature,
        "constexprs": dict(constants),
        "num_warps": num_warps,
        "num_stages": num_stages,
        "unaligned": list(unaligned),
    }
