"""Specs of the row-softmax family: forward (five algorithms) and backward.

A tensor is seen as *rows*: the elements along the softmax dimension, ``n`` of them, at a column stride. What is left of
the shape is merged into as few *batch* dimensions as the strides allow (:func:`collapse`). A program handles
``block_rows`` rows of the innermost batch dimension, ``block_cols`` columns at a time.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from .spec import DTYPES, KernelSpec, require, require_choice, require_power_of_two

ALGORITHMS = ("one_read", "two_pass", "three_pass", "three_pass_reload", "online")
SPLITTABLE = ("two_pass", "online")
MAX_TILE = 32768
"""Elements of a tile: 512 threads hold that many float32 values in 64 registers each."""
MAX_KEPT = 1 << 20
"""Elements that a native one-read kernel keeps in memory of its own: 4 MiB of float32."""
MAX_BATCH = 6
MAX_SPLITS = 256

_TRITON_TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "bool": "i1"}


def collapse(sizes: list, *strides: list) -> list:
    """Batch dimensions as ``[(size, (stride in each tensor, ...)), ...]``, innermost first, never empty.

    Dimensions of size 1 go; the others are sorted by the first tensor's stride, because rows are independent and
    neighbouring rows should be neighbours in memory; two that every tensor steps through evenly become one.
    """
    dims = [(size, steps) for size, *steps in zip(sizes, *strides, strict=True) if size != 1][::-1]
    dims.sort(key=lambda dim: (dim[1][0] == 0, dim[1][0]))
    merged: list = []
    for size, steps in dims:
        if merged and all(step == merged[-1][0] * inner for step, inner in zip(steps, merged[-1][1], strict=True)):
            merged[-1] = (merged[-1][0] * size, merged[-1][1])
        else:
            merged.append((size, tuple(steps)))
    return merged or [(1, (0,) * len(strides))]


def _compile_entry(kernel: str, arguments: dict[str, str], constexprs: dict[str, Any], warps: int) -> dict[str, Any]:
    types = arguments | dict.fromkeys(constexprs, "constexpr")
    return {"kernel": kernel, "signature": types, "constexprs": constexprs, "num_warps": warps, "num_stages": 1}


@dataclass(frozen=True)
class _RowSpec(KernelSpec):
    """What forward and backward share.

    in_dtype, out_dtype: one of ``DTYPES``. log: log_softmax. block_rows, block_cols: the tile, powers of two.
    splits: programs that share one row, a power of two. outer_rank: batch dimensions besides the innermost.
    contiguous: ``"cols"`` when the elements of a row are neighbours in memory, else ``"rows"``.
    index_bits: 64 when an offset into any tensor does not fit 31 bits.

    Native kernels take sizes and strides as arguments: of what describes the layout, only ``contiguous`` decides their
    text.
    """

    in_dtype: str = "float32"
    out_dtype: str = "float32"
    log: bool = False
    block_rows: int = 1
    block_cols: int = 4096
    splits: int = 1
    outer_rank: int = 0
    contiguous: str = "cols"
    index_bits: int = 32
    num_warps: int = 8

    def check(self) -> None:
        require_choice("in_dtype", self.in_dtype, DTYPES)
        require_choice("out_dtype", self.out_dtype, DTYPES)
        require(isinstance(self.log, bool), f"log is {self.log!r}, but must be True or False")
        require_power_of_two("block_rows", self.block_rows, 1, 1024)
        require_power_of_two("block_cols", self.block_cols, 1, MAX_TILE)
        tile = self.block_rows * self.block_cols
        require(tile <= MAX_TILE, f"block_rows * block_cols is {tile}, but must be at most {MAX_TILE}")
        require_power_of_two("splits", self.splits, 1, MAX_SPLITS)
        ok = isinstance(self.outer_rank, int) and 0 <= self.outer_rank <= MAX_BATCH
        require(ok, f"outer_rank is {self.outer_rank}, but must be from 0 to {MAX_BATCH}")
        require_choice("contiguous", self.contiguous, ("cols", "rows"))
        require(self.index_bits in (32, 64), f"index_bits is {self.index_bits}, but must be 32 or 64")
        require_power_of_two("num_warps", self.num_warps, 1, 32)

    def _strides(self, tensor: str) -> dict[str, str]:
        names = [f"{tensor}_col", f"{tensor}_row", *(f"{tensor}_outer{i}" for i in range(self.outer_rank))]
        return dict.fromkeys(names, "i64" if self.index_bits == 64 else "i32")

    def _sizes(self) -> dict[str, str]:
        return dict.fromkeys(["n", "rows", *(f"size{i}" for i in range(self.outer_rank))], "i32")

    def _unit_strides(self, *tensors: str) -> dict[str, int]:
        """Arguments that Triton specialises because they are 1."""
        return dict.fromkeys((f"{t}_{'col' if self.contiguous == 'cols' else 'row'}" for t in tensors), 1)

    def context(self, target: str) -> dict[str, Any]:
        if target == "cpp":
            return {}
        return {
            "collapse_source": inspect.getsource(collapse),
            "outer": range(self.outer_rank),
            "in_type": _TRITON_TYPES[self.in_dtype],
            "compile_entries": self.compile_entries(),
        }

    def compile_entries(self) -> list[dict[str, Any]]:
        """What is needed to compile each kernel with no GPU, see the text's ``COMPILE``. Each spec lists its own."""
        raise NotImplementedError(f"{type(self).__name__} must list its kernels")

    def _holds_row(self) -> bool:
        """Whether the tile has to hold a whole row, so that its width is no matter of speed."""
        raise NotImplementedError(f"{type(self).__name__} must say whether a tile holds a row")

    def candidates(self, target: str) -> list[Self]:
        """The default; twice and half the warps; for tiles narrower than the row, twice and half the width."""
        if target != "triton":
            return [self]
        tile = self.block_rows * self.block_cols
        changes: list[dict[str, Any]] = [{"num_warps": self.num_warps * 2}, {"num_warps": self.num_warps // 2}]
        if not self._holds_row():
            changes += [{"block_cols": self.block_cols * 2}, {"block_cols": self.block_cols // 2}]
        found = [self]
        for change in changes:
            warps, cols = change.get("num_warps", self.num_warps), change.get("block_cols", self.block_cols)
            elements = tile // self.block_cols * cols // (32 * max(warps, 1))
            # From one to 64 elements a thread, and 16 warps at most: beyond, registers spill or threads idle.
            if 1 <= warps <= 16 and cols >= 1 and 1 <= elements <= 64:
                found.append(replace(self, **change))
        return found


@dataclass(frozen=True)
class SoftmaxSpec(_RowSpec):
    """softmax or log_softmax of ``scale * x + bias`` along one dimension, in float32.

    algorithm: how often a row is read, see ``ALGORITHMS``; ``one_read`` needs ``block_cols >= n``.
    bias: ``"none"``, a float dtype (added) or ``"bool"`` (False is minus infinity). scaled: whether to multiply.
    """

    kind: ClassVar[str] = "softmax"
    templates: ClassVar[dict[str, str]] = {
        "triton": "triton/softmax.py.jinja",
        "cpp": "cpp/softmax.cpp.jinja",
    }

    algorithm: str = "two_pass"
    bias: str = "none"
    scaled: bool = False

    def check(self) -> None:
        super().check()
        require_choice("algorithm", self.algorithm, ALGORITHMS)
        require_choice("bias", self.bias, ("none", "bool", *DTYPES))
        require(isinstance(self.scaled, bool), f"scaled is {self.scaled!r}, but must be True or False")
        splittable = self.splits == 1 or self.algorithm in SPLITTABLE
        require(splittable, f"splits is {self.splits}, but {self.algorithm} handles a row in one program")
        if self.algorithm == "three_pass_reload":
            require(not self.log, "three_pass_reload is no way to compute log_softmax: it keeps exponentials")
            ok = self.out_dtype == "float32"
            require(ok, f"three_pass_reload keeps exponentials in the output: {self.out_dtype} would round them twice")

    def _holds_row(self) -> bool:
        return self.algorithm == "one_read"

    def compile_entries(self) -> list[dict[str, Any]]:
        value = f"*{_TRITON_TYPES[self.in_dtype]}"
        inputs = {"x": value}
        strides = self._strides("x")
        unit = ["x"]
        if self.bias != "none":
            inputs["bias"] = f"*{_TRITON_TYPES[self.bias]}"
            strides |= self._strides("bias")
        if self.scaled:
            inputs["scale"] = "fp32"
        out = {"out": f"*{_TRITON_TYPES[self.out_dtype]}"}
        blocks = {"BLOCK_ROWS": self.block_rows, "BLOCK_COLS": self.block_cols}
        warps = self.num_warps
        if self.splits == 1:
            arguments = inputs | out | self._sizes() | strides | self._strides("out")
            constexprs = self._unit_strides(*unit, "out") | blocks
            return [_compile_entry("softmax_kernel", arguments, constexprs, warps)]
        parts = {"parts": "*fp32"}
        blocks["SPLITS"] = self.splits
        first = inputs | parts | self._sizes() | strides
        second = inputs | parts | out | self._sizes() | strides | self._strides("out")
        return [
            _compile_entry("accumulate_kernel", first, self._unit_strides(*unit) | blocks, warps),
            _compile_entry("write_kernel", second, self._unit_strides(*unit, "out") | blocks, warps),
        ]


@dataclass(frozen=True)
class SoftmaxBackwardSpec(_RowSpec):
    """The gradient of softmax or log_softmax with respect to its scaled input, times ``scale``.

    in_dtype: of the saved output ``y``. grad_dtype: of the incoming gradient ``g``. out_dtype: of the result.
    one_read: whether a row fits one tile, so that ``g`` and ``y`` are read once.
    """

    kind: ClassVar[str] = "softmax_backward"
    templates: ClassVar[dict[str, str]] = {
        "triton": "triton/softmax_backward.py.jinja",
        "cpp": "cpp/softmax_backward.cpp.jinja",
    }

    grad_dtype: str = "float32"
    one_read: bool = False

    def check(self) -> None:
        super().check()
        require_choice("grad_dtype", self.grad_dtype, DTYPES)
        require(isinstance(self.one_read, bool), f"one_read is {self.one_read!r}, but must be True or False")
        require(self.splits == 1 or not self.one_read, "a row that fits one tile is not split")

    def _holds_row(self) -> bool:
        return self.one_read

    def compile_entries(self) -> list[dict[str, Any]]:
        inputs = {"g": f"*{_TRITON_TYPES[self.grad_dtype]}", "y": f"*{_TRITON_TYPES[self.in_dtype]}"}
        strides = self._strides("g") | self._strides("y")
        out = {"out": f"*{_TRITON_TYPES[self.out_dtype]}"}
        blocks = {"BLOCK_ROWS": self.block_rows, "BLOCK_COLS": self.block_cols}
        warps = self.num_warps
        unit = self._unit_strides("g", "y")
        end = {"scale": "fp32"} | self._sizes() | strides | self._strides("out")
        if self.splits == 1:
            constexprs = unit | self._unit_strides("out") | blocks
            return [_compile_entry("backward_kernel", inputs | out | end, constexprs, warps)]
        parts = {"parts": "*fp32"}
        blocks["SPLITS"] = self.splits
        constexprs = unit | self._unit_strides("out") | blocks
        return [
            _compile_entry("accumulate_kernel", inputs | parts | self._sizes() | strides, unit | blocks, warps),
            _compile_entry("write_kernel", inputs | parts | out | end, constexprs, warps),
        ]


def next_power_of_two(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


def fits_on_chip(n: int, contiguous: str = "cols", held: int = 1) -> bool:
    """Whether one-read kernels hold rows of ``n`` elements, of ``held`` tensors at a time, and still load wide.

    Rows whose elements are far apart are read 8 neighbouring rows at a time.
    """
    return next_power_of_two(n) * (8 if contiguous == "rows" else 1) * held <= MAX_TILE


def fits_in_cache(n: int, contiguous: str, element_bytes: int, cache_bytes: int) -> bool:
    """Whether rows of ``n`` elements stay in half of a core's cache, so that native kernels read them from memory once.

    element_bytes: of all that is held for one element. Rows whose elements are far apart are worked on 64 at a time.
    """
    return n * (64 if contiguous == "rows" else 1) * element_bytes * 2 <= cache_bytes


def choose_tile(n: int, rows: int, contiguous: str, one_read: bool, held: int = 1) -> tuple[int, int, int]:
    """The shipped default ``(block_rows, block_cols, num_warps)`` for rows of ``n`` elements.

    One-read tiles hold the row. Tiles of the others hold 4096 elements: long along the contiguous axis, so that a
    warp's loads are neighbours, and with enough of them in flight for each program to keep memory busy.
    """
    rows = next_power_of_two(rows)
    if contiguous == "cols":
        cols = next_power_of_two(n) if one_read else min(next_power_of_two(n), 4096)
        height = max(1, min(rows, 1024, 2048 // cols))
    else:
        height = min(rows, 64 if not one_read else max(1, min(64, MAX_TILE // held // next_power_of_two(n))))
        cols = next_power_of_two(n) if one_read else max(1, min(next_power_of_two(n), 4096 // height))
    tile = height * cols
    warps = 1 if tile <= 256 else 4 if tile <= 4096 else 8 if tile <= 16384 else 16
    if (not one_read and tile >= 4096) or (held > 1 and tile >= 4096):
        warps = min(2 * warps, 16)
    return height, cols, warps


def choose_splits(n: int, programs: int, block_cols: int, multiprocessors: int) -> int:
    """How many programs share a row so that ``multiprocessors`` are busy: none unless rows are few and long."""
    wanted = -(-2 * multiprocessors // max(programs, 1))
    most = n // (4 * block_cols)
    splits = 1
    while splits * 2 <= min(wanted, most, MAX_SPLITS):
        splits *= 2
    return splits
