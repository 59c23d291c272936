"""Spec of the kernel that sums softmax weights over tiles of (query, key) pairs, without the weights in memory.

What XAttention (Xu et al., "XAttention: Block Sparse Attention with Antidiagonal Scoring", arXiv:2503.16428, section 2)
calls its block scores, over queries and keys that the caller has folded or pooled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import sympy

from . import attention, bounds, symbols
from .spec import DTYPES, KernelSpec, require, require_choice, require_power_of_two

_TRITON = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class BlockScoresSpec(KernelSpec):
    """Block sums of softmax weights; lengths, heads, channels, strides and the scale are arguments of a launch.

    dtype: of q and k. mask: canonical text of codegen/symbols.py, without a table. block_k: keys in a block, which
        decides how a Triton tile is laid out; 0 in native kernels, which take any.
    block_m, block_n, block_c: queries, keys and channels in a tile of a Triton kernel. num_warps, num_stages: its
        launch options.
    """

    kind: ClassVar[str] = "block_scores"
    templates: ClassVar[dict[str, str]] = {
        "triton": "triton/block_scores.py.jinja",
        "cpp": "cpp/block_scores.cpp.jinja",
    }

    dtype: str = "float32"
    mask: str = ""
    block_k: int = 0
    block_m: int = 64
    block_n: int = 64
    block_c: int = 64
    num_warps: int = 4
    num_stages: int = 3

    def check(self) -> None:
        require_choice("dtype", self.dtype, DTYPES)
        require(
            isinstance(self.block_k, int) and self.block_k >= 0, f"block_k is {self.block_k}, but must be an int from 0"
        )
        for name in ("block_m", "block_n", "block_c"):
            require_power_of_two(name, getattr(self, name), 16, 256)
        require_power_of_two("num_warps", self.num_warps, 1, 16)
        stages = self.num_stages
        require(isinstance(stages, int) and 1 <= stages <= 5, f"num_stages is {stages}, but must be 1 to 5")
        mask = symbols.parse_mask(self.mask)
        require(mask != sympy.false, f"mask is {self.mask!r}, which hides every pair")
        require("table(" not in self.mask, f"mask is {self.mask!r}, and block scores have no table to look up")
        canonical = symbols.mask_text(mask)
        require(self.mask == canonical, f"mask is {self.mask!r}, but its canonical text is {canonical!r}")

    @property
    def block_width(self) -> int:
        """Columns that a block of keys takes in a Triton tile: the power of two that holds it, or the whole tile."""
        return min(1 << (max(self.block_k, 1) - 1).bit_length(), self.block_n)

    @property
    def pieces(self) -> int:
        """Tiles that a block of keys is cut into; 1 where a tile holds one block or several."""
        return -(-max(self.block_k, 1) // self.block_n)

    def context(self, target: str) -> dict[str, Any]:
        mask = symbols.parse_mask(self.mask)
        printer = symbols.cpp_lanes_text if target == "cpp" else symbols.triton_text
        return {
            "predicate": None if mask == sympy.true else printer(mask),
            "mask_symbols": sorted(symbol.name for symbol in mask.free_symbols),
            "segments": attention._segments(mask, symbols.K, target),
            "keys": attention._limits(bounds.tile_bounds(mask, symbols.K), target),  # the hull of the segments
            "compile_entries": self.compile_entries() if target == "triton" else [],
        }

    def compile_entries(self) -> list[dict[str, Any]]:
        """What is needed to compile each Triton kernel with no GPU, see the text's ``COMPILE``."""
        t = _TRITON[self.dtype]
        sizes = ("q_heads", "group", "q_len", "k_len", "channels", "pieces", "tiles", "first_unit")
        steps = [f"{name}_{d}" for name in ("q", "k") for d in ("batch", "head", "row", "dim")]
        sums = {"q": f"*{t}", "k": f"*{t}", "sums": "*fp32", "anchors": "*fp32", "lse": "*fp32", "scale": "fp32"}
        sums |= dict.fromkeys((*sizes, *steps), "i32")
        ones = ("q_dim", "k_dim")
        together = {"sums": "*fp32", "anchors": "*fp32", "lse": "*fp32", "out": "*fp32"}
        together |= dict.fromkeys(("q_len", "pieces", "tiles", "q_blocks", "k_blocks", "block_q"), "i32")
        return [
            {
                "kernel": kernel,
                "signature": {name: "constexpr" if name in ones else kind for name, kind in types.items()},
                "constexprs": {name: 1 for name in types if name in ones},
                "num_warps": self.num_warps,
                "num_stages": self.num_stages,
                "unaligned": [
                    name for name, kind in types.items() if kind == "i32" and name not in (*steps, "channels")
                ],
            }
            for kernel, types in (("piece_sums", sums), ("block_sums", together))
        ]
