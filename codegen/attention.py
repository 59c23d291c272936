"""Specs of the attention kernels, forward and backward: flash-style, no scores in memory.

Dao, "FlashAttention-2", arXiv:2307.08691, algorithms 1 and 2; sigmoid normalizer: Ramapuram et al., "Theory, Analysis,
and Best Practices for Sigmoid Self-Attention", arXiv:2409.04431, section 4 and appendix G.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import sympy

from . import bounds, symbols
from .spec import DTYPES, KernelSpec, require, require_choice, require_power_of_two

NORMALIZERS = ("softmax", "sigmoid")
BIASES = ("none", "bool", *DTYPES)
DOT_PRECISIONS = ("ieee", "tf32x3", "tf32")
MAX_HEAD_DIM = 256
_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
# Lengths, numbers of heads and widths of lists are whatever the model has.
_UNALIGNED = (
    *("q_len", "k_len", "q_heads", "bias_batch", "bias_heads"),
    *("list_batch", "list_head", "width", "table_len", "splits"),
)
_TRITON = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "bool": "i1"}


def padded(dim: int) -> int:
    """The power of two, at least 16, that holds ``dim`` channels: what a tile of a matrix product needs."""
    return max(16, 1 << (dim - 1).bit_length())


@dataclass(frozen=True)
class Tiles:
    """What autotuning chooses: rows of queries and of keys in a tile, warps, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class _AttentionSpec(KernelSpec):
    """What forward and backward share.

    head_dim, value_dim: channels of q and k, and of v: 1 to 256; tiles are padded to a power of two.
    dtype: of q, k, v and the output. normalizer: ``softmax`` or ``sigmoid``. mask: canonical text of
        codegen/symbols.py.
    bias: ``none``, ``bool`` (True is visible) or the dtype of an additive bias. bias_rows: whether it varies over
        queries; if not (key padding) a tile reads one row of it. shift: a float32 number for every query is added to
        the scores (sigmoid only). group: query heads that share a key head.
    block_m, block_n: queries and keys in a tile. num_warps, num_stages: Triton's launch options.
    wide: 64-bit offsets inside a tile, for strides beyond 2^22; offsets of tiles are always 64 bits wide.
    block_q, block_k: queries and keys in a block of the block lists that say which keys a query reads; 0 and 0: there
        are no lists, and the loops follow the mask's closed-form limits.
    dot_precision: how float32 products are computed: ``ieee``, or on tensor cores as three (``tf32x3``) or one
        TF32 product.
    """

    head_dim: int = 64
    value_dim: int = 64
    dtype: str = "float32"
    normalizer: str = "softmax"
    mask: str = ""
    bias: str = "none"
    bias_rows: bool = True
    shift: bool = False
    group: int = 1
    block_m: int = 64
    block_n: int = 32
    num_warps: int = 4
    num_stages: int = 1
    wide: bool = False
    dot_precision: str = "ieee"
    block_q: int = 0
    block_k: int = 0

    def check(self) -> None:
        for name in ("head_dim", "value_dim"):
            value = getattr(self, name)
            require(
                isinstance(value, int) and 1 <= value <= MAX_HEAD_DIM,
                f"{name} is {value}, but must be an int from 1 to {MAX_HEAD_DIM}",
            )
        require_choice("dtype", self.dtype, DTYPES)
        require_choice("normalizer", self.normalizer, NORMALIZERS)
        require_choice("bias", self.bias, BIASES)
        require_choice("dot_precision", self.dot_precision, DOT_PRECISIONS)
        for name in ("bias_rows", "shift", "wide"):
            require(isinstance(getattr(self, name), bool), f"{name} is {getattr(self, name)!r}, but must be a bool")
        require(self.bias != "none" or self.bias_rows, "bias_rows is False, but there is no bias: leave it True")
        require(not self.shift or self.normalizer == "sigmoid", "shift is True, but softmax does not feel it")
        require(isinstance(self.group, int) and self.group >= 1, f"group is {self.group}, but must be at least 1")
        require_power_of_two("block_m", self.block_m, 16, 256)
        require_power_of_two("block_n", self.block_n, 16, 256)
        require_power_of_two("num_warps", self.num_warps, 1, 16)
        require(
            isinstance(self.num_stages, int) and 1 <= self.num_stages <= 5,
            f"num_stages is {self.num_stages}, but must be 1 to 5",
        )
        require((self.block_q == 0) == (self.block_k == 0), "block_q and block_k are given together, or neither")
        for name in ("block_q", "block_k"):
            if getattr(self, name):
                require_power_of_two(name, getattr(self, name), 16, 256)
        mask = symbols.parse_mask(self.mask)
        require(mask != sympy.false, f"mask is {self.mask!r}, which hides every pair")
        canonical = symbols.mask_text(mask)
        require(self.mask == canonical, f"mask is {self.mask!r}, but its canonical text is {canonical!r}")

    @property
    def padded_head_dim(self) -> int:
        return padded(self.head_dim)

    @property
    def padded_value_dim(self) -> int:
        return padded(self.value_dim)

    @property
    def additive(self) -> bool:
        return self.bias not in ("none", "bool")

    @property
    def lists(self) -> bool:
        """Whether block lists say which keys a query reads."""
        return self.block_q > 0

    @property
    def table(self) -> bool:
        """Whether the mask looks entries of a table up."""
        return "table(" in self.mask

    def with_tiles(self, tiles: Tiles) -> Self:
        return dataclasses.replace(self, **dataclasses.asdict(tiles))

    @property
    def in_blocks(self) -> bool:
        """Whether tiles lie inside the blocks of the lists, as the Triton kernels need them to."""
        return not self.lists or (self.block_m <= self.block_q and self.block_n <= self.block_k)

    def context(self, target: str) -> dict[str, Any]:
        mask = symbols.parse_mask(self.mask)
        printer = symbols.cpp_lanes_text if target == "cpp" else symbols.triton_text
        return {
            "predicate": None if mask == sympy.true else printer(mask),
            "mask_symbols": sorted(symbol.name for symbol in mask.free_symbols),
            # Which keys a tile of queries needs, and which queries a tile of keys: a list of ranges that may overlap.
            "key_segments": _segments(mask, symbols.K, target),
            "query_segments": _segments(mask, symbols.Q, target),
            # The hull of all of them, for templates that loop over one range.
            "keys": _limits(bounds.tile_bounds(mask, symbols.K), target),
            "queries": _limits(bounds.tile_bounds(mask, symbols.Q), target),
            "compile_entries": [] if target == "cpp" else self.compile_entries(),
        }

    def compile_entries(self) -> list[dict[str, Any]]:
        """What is needed to compile each kernel with no GPU, see the text's ``COMPILE``. Each spec lists its own."""
        raise NotImplementedError(f"{type(self).__name__} must list its kernels")

    def _entry(self, kernel: str, arguments: dict[str, str], ones: tuple[str, ...]) -> dict[str, Any]:
        """How ``kernel`` is compiled for inputs whose channels lie beside each other: their strides are one."""
        signature = {name: "constexpr" if name in ones else kind for name, kind in arguments.items()}
        constexprs = {name: 1 for name in arguments if name in ones}
        unaligned = [name for name in arguments if name in _UNALIGNED]
        return {
            "kernel": kernel,
            "signature": signature,
            "constexprs": constexprs,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "unaligned": unaligned,
        }

    def _inputs(self) -> dict[str, str]:
        """The pointers that every kernel takes first."""
        t = _TRITON[self.dtype]
        pointers = {"q": f"*{t}", "k": f"*{t}", "v": f"*{t}"}
        if self.bias != "none":
            pointers["bias"] = f"*{_TRITON[self.bias]}"
        if self.shift:
            pointers["shift"] = "*fp32"
        if self.lists:
            pointers |= {"counts": "*i32", "indices": "*i32"}
        if self.table:
            pointers["table"] = "*i32"
        return pointers

    def _sizes(self) -> dict[str, str]:
        """Scale and sizes, which follow the pointers; strides come last."""
        names = ["q_heads", "q_len", "k_len"]
        if self.lists:
            names += ["list_batch", "list_head", "width"]
        if self.table:
            names.append("table_len")
        return {"scale": "fp32"} | dict.fromkeys(names, "i32")

    def _strides(self, *extra: str) -> dict[str, str]:
        names = [f"{t}_{d}" for t in ("q", "k", "v", *extra) for d in ("batch", "head", "row", "dim")]
        if self.bias != "none":
            names += ["bias_batch_stride", "bias_head_stride", "bias_row", "bias_col"]
        if self.shift:
            names += ["shift_batch", "shift_head", "shift_row"]
        return dict.fromkeys(names, "i32")


@dataclass(frozen=True)
class AttentionSpec(_AttentionSpec):
    """Forward: out (B, Hq, Lq, Dv), and for softmax lse (B, Hq, Lq) float32."""

    kind: ClassVar[str] = "attention"
    templates: ClassVar[dict[str, str]] = {
        "triton": "triton/attention_forward.py.jinja",
        "cpp": "cpp/attention_forward.cpp.jinja",
    }
    split: ClassVar[bool] = False
    """Whether several programs share the keys of a tile of queries, and a second kernel merges what they found."""

    def compile_entries(self) -> list[dict[str, Any]]:
        arguments = self._inputs() | {"out": f"*{_TRITON[self.dtype]}"}
        if self.normalizer == "softmax":
            arguments["lse"] = "*fp32"
        arguments |= self._sizes() | self._strides("out")
        return [self._entry("attention_forward", arguments, ("q_dim", "k_dim", "v_dim", "out_dim", "bias_col"))]

    def candidates(self, target: str) -> list[Self]:
        """The default, then larger and smaller tiles that fit as well as the default does."""
        if target != "triton":
            return [self]
        variants = [self]
        for m, n, warps, stages in (
            (self.block_m, self.block_n, self.num_warps, min(self.num_stages + 1, 4)),
            (self.block_m, max(16, self.block_n // 2), self.num_warps, min(self.num_stages + 1, 4)),
            (max(16, self.block_m // 2), self.block_n, max(4, self.num_warps // 2), self.num_stages),
            (self.block_m, self.block_n, 8 if self.num_warps == 4 else 4, self.num_stages),
        ):
            variant = self.with_tiles(Tiles(m, n, warps, stages))
            fits = variant.in_blocks and forward_bytes(variant, variant) <= max(forward_bytes(self, self), 64 * 1024)
            if variant not in variants and fits:
                variants.append(variant)
        return variants

    def for_few_queries(self) -> AttentionSplitSpec:
        """The same function for few queries and many keys, as in decoding. Triton only."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(AttentionSpec)}
        return AttentionSplitSpec(**(fields | {"block_m": 16, "num_warps": 4}))


@dataclass(frozen=True)
class AttentionSplitSpec(AttentionSpec):
    """Forward for few queries, whose programs are too few for a GPU when each walks over all keys: several share them.

    Dao et al., "Flash-Decoding for long-context inference" (2023): partial results are merged by their maxima and sums.
    """

    kind: ClassVar[str] = "attention_split"
    templates: ClassVar[dict[str, str]] = {"triton": "triton/attention_forward.py.jinja"}
    split: ClassVar[bool] = True

    def compile_entries(self) -> list[dict[str, Any]]:
        softmax = self.normalizer == "softmax"
        parts = {"parts": "*fp32"} | ({"peaks": "*fp32", "totals": "*fp32"} if softmax else {})
        ones = ("q_dim", "k_dim", "v_dim", "out_dim", "bias_col")
        arguments = self._inputs() | parts | self._sizes() | {"splits": "i32"} | self._strides()
        entries = [self._entry("attention_part", arguments, ones)]
        arguments = parts | {"out": f"*{_TRITON[self.dtype]}"} | ({"lse": "*fp32"} if softmax else {})
        arguments |= dict.fromkeys(("q_heads", "q_len", "splits"), "i32")
        arguments |= {f"out_{d}": "i32" for d in ("batch", "head", "row", "dim")}
        entries.append(self._entry("attention_merge", arguments, ones))
        return entries


@dataclass(frozen=True)
class AttentionBackwardSpec(_AttentionSpec):
    """Backward: dq, dk, dv in the inputs' dtype; dbias (float32) and dshift (float32) where wanted.

    grad_bias: the gradient of an additive bias is wanted; dims of size 1 are summed inside the kernel. grad_bias_rows:
        whether that gradient has a row for each query; if not, queries are summed too.
    grad_shift: the gradient of shift is wanted, as one number for every query and head.
    """

    kind: ClassVar[str] = "attention_backward"
    templates: ClassVar[dict[str, str]] = {
        "triton": "triton/attention_backward.py.jinja",
        "cpp": "cpp/attention_backward.cpp.jinja",
    }

    grad_bias: bool = False
    grad_bias_rows: bool = True
    grad_shift: bool = False

    def check(self) -> None:
        super().check()
        require(not self.grad_bias or self.additive, "grad_bias is True, but there is no additive bias")
        require(self.grad_bias or self.grad_bias_rows, "grad_bias_rows is False, but grad_bias is too: leave it True")
        require(not self.grad_shift or self.shift, "grad_shift is True, but there is no shift")

    def compile_entries(self) -> list[dict[str, Any]]:
        t = _TRITON[self.dtype]
        softmax = self.normalizer == "softmax"
        inputs = self._inputs() | {"grad": f"*{t}"} | ({"lse": "*fp32", "delta": "*fp32"} if softmax else {})
        sizes = self._sizes()
        ones = ("q_dim", "k_dim", "v_dim", "out_dim", "grad_dim", "dq_dim", "dk_dim", "dv_dim", "bias_col")
        entries = []
        if softmax:
            rows = ("batch", "head", "row", "dim")
            arguments = {"out": f"*{t}", "grad": f"*{t}", "delta": "*fp32", "q_heads": "i32", "q_len": "i32"}
            arguments |= {f"{name}_{d}": "i32" for name in ("out", "grad") for d in rows}
            entries.append(self._entry("attention_delta", arguments, ones))
        arguments = inputs | {"dk": f"*{t}", "dv": f"*{t}"} | sizes | self._strides("grad", "dk", "dv")
        entries.append(self._entry("attention_dkdv", arguments, ones))
        outputs = {"dq": f"*{t}"} | ({"dshift": "*fp32"} if self.grad_shift else {})
        arguments = inputs | outputs | sizes | self._strides("grad", "dq")
        entries.append(self._entry("attention_dq", arguments, ones))
        if self.grad_bias:
            arguments = inputs | {"dbias": "*fp32"} | sizes
            arguments |= {"batches": "i32", "bias_batch": "i32", "bias_heads": "i32"} | self._strides("grad")
            entries.append(self._entry("attention_dbias", arguments, ones))
            entries[-1]["unaligned"].append("batches")
        return entries

    def candidates(self, target: str) -> list[Self]:
        if target != "triton":
            return [self]
        variants = [self]
        for m, n, warps in (
            (self.block_n, self.block_m, self.num_warps),
            (self.block_m, self.block_n, 8 if self.num_warps == 4 else 4),
            (max(16, self.block_m // 2), self.block_n, self.num_warps),
        ):
            variant = self.with_tiles(Tiles(m, n, warps, self.num_stages))
            if variant not in variants and variant.in_blocks:
                variants.append(variant)
        return variants


def _segments(mask: Any, index: sympy.Symbol, target: str) -> list[dict[str, Any]]:
    return [_limits(tile, target) for tile in bounds.segments(mask, index)]


def _limits(tile: bounds.TileBounds, target: str) -> dict[str, Any]:
    """One range of an index as the target's text over first, last (ends of the other index's tile), the lengths, and
    head and batch where the mask has them."""
    printer = symbols.cpp_text if target == "cpp" else symbols.triton_text

    def texts(expressions: tuple[sympy.Expr, ...] | None) -> list[str]:
        return [printer(expression) for expression in expressions or ()]

    return {
        "lower": texts(tile.needed_lower),
        "upper": texts(tile.needed_upper),
        "full_lower": texts(tile.full_lower),
        "full_upper": texts(tile.full_upper),
        "has_full": tile.has_full,
        # Conditions of the whole range: it is empty unless all of the first hold, and has a full part only where all
        # of the second do.
        "needed_if": [printer(condition) for condition in tile.needed_if],
        "full_if": [printer(condition) for condition in tile.full_if],
    }


def forward_bytes(spec: _AttentionSpec, tiles: Tiles | _AttentionSpec) -> int:
    """Estimate of the forward kernel's shared memory: the tile of queries and ``num_stages`` of keys and values.

    An estimate from the sizes of the operands, for choosing tiles; the tests hold compiled kernels to the real limits.
    """
    size = _SIZE[spec.dtype]
    keys = tiles.block_n * (spec.padded_head_dim + spec.padded_value_dim)
    return size * (tiles.block_m * spec.padded_head_dim + keys * tiles.num_stages)


def default_tiles(head_dim: int, value_dim: int, dtype: str, *, backward: bool, large: bool) -> Tiles:
    """The tiles shipped for these head dims.

    large: the GPU gives a block at least 160 KiB of shared memory (sm_80, sm_90, sm_100, gfx950); otherwise the tiles
    fit 64 KiB (gfx942, and the 99 KiB of sm_86, sm_89, sm_120).
    """
    dim = max(padded(head_dim), padded(value_dim))
    table = _BACKWARD_TILES if backward else _FORWARD_TILES
    rows = table["float32" if dtype == "float32" else "half", large]
    return next(tiles for limit, tiles in rows if dim <= limit)


# (widest padded head dim, tiles), by (kind of dtype, whether shared memory is large).
_FORWARD_TILES: dict[tuple[str, bool], tuple[tuple[int, Tiles], ...]] = {
    ("half", True): ((64, Tiles(128, 64, 4, 3)), (128, Tiles(128, 64, 8, 2)), (256, Tiles(64, 32, 4, 2))),
    ("half", False): ((64, Tiles(128, 64, 4, 1)), (128, Tiles(64, 32, 4, 1)), (256, Tiles(32, 32, 4, 1))),
    ("float32", True): ((64, Tiles(64, 32, 8, 1)), (128, Tiles(32, 32, 8, 1)), (256, Tiles(16, 32, 8, 1))),
    ("float32", False): ((64, Tiles(64, 32, 8, 1)), (128, Tiles(32, 16, 8, 1)), (256, Tiles(16, 16, 8, 1))),
}
_BACKWARD_TILES: dict[tuple[str, bool], tuple[tuple[int, Tiles], ...]] = {
    ("half", True): ((64, Tiles(64, 64, 4, 2)), (128, Tiles(32, 64, 8, 2)), (256, Tiles(32, 32, 8, 1))),
    ("half", False): ((64, Tiles(32, 64, 4, 1)), (128, Tiles(32, 32, 4, 1)), (256, Tiles(16, 16, 4, 1))),
    ("float32", True): ((64, Tiles(32, 32, 8, 1)), (128, Tiles(16, 16, 8, 1)), (256, Tiles(16, 16, 8, 1))),
    ("float32", False): ((64, Tiles(32, 32, 8, 1)), (128, Tiles(16, 16, 8, 1)), (256, Tiles(16, 16, 8, 1))),
}
INTERPRETER_TILES = Tiles(32, 32, 4, 1)
"""The interpreter pays for every operation of a program and little for its size."""
CPP_TILES = Tiles(128, 128, 4, 1)
"""On a CPU: most queries a thread takes at once, and keys per tile. Warps and stages mean nothing there."""
