"""Spec of the kernel that chooses blocks of keys by score and writes them as block lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .spec import KernelSpec, require, require_power_of_two

MAX_CAPACITY = 8192
"""Blocks of keys that a Triton program holds on chip."""


@dataclass(frozen=True)
class SelectBlocksSpec(KernelSpec):
    """Selection and compaction of a row of scores; sizes, strides and all limits are arguments of a launch.

    capacity: blocks of keys that a Triton program can hold, a power of two; 0 in native kernels, which take any number.
    budget: whether a tensor says how many blocks a row keeps. num_warps: a Triton program's.
    """

    kind: ClassVar[str] = "select_blocks"
    templates: ClassVar[dict[str, str]] = {
        "triton": "triton/select_blocks.py.jinja",
        "cpp": "cpp/select_blocks.cpp.jinja",
    }

    capacity: int = 0
    budget: bool = False
    num_warps: int = 4

    def check(self) -> None:
        if self.capacity != 0:
            require_power_of_two("capacity", self.capacity, 16, MAX_CAPACITY)
        require_power_of_two("num_warps", self.num_warps, 1, 16)
        require(isinstance(self.budget, bool), f"budget is {self.budget!r}, but must be a bool")

    def context(self, target: str) -> dict[str, Any]:
        if target == "triton":
            require(self.capacity != 0, f"capacity is 0, but a triton kernel holds 16 to {MAX_CAPACITY} blocks")
        return {
            "index_bits": max(self.capacity, 1).bit_length() - 1,
            "compile_entries": self.compile_entries() if target == "triton" else [],
        }

    def compile_entries(self) -> list[dict[str, Any]]:
        """What is needed to compile the Triton kernel with no GPU, see the text's ``COMPILE``."""
        types = {"scores": "*fp32", "states": "*u8"} | ({"budget": "*i32"} if self.budget else {})
        types |= {"counts": "*i32", "indices": "*i32"}
        numbers = ("heads", "q_blocks", "k_blocks", "width", "most", "sinks", "local", "causal", "block_q", "block_k")
        steps = [f"{name}_{d}" for name in ("scores", "states") for d in ("batch", "head", "row", "col")]
        steps += [f"budget_{d}" for d in ("batch", "head", "row")] if self.budget else []
        types |= {"threshold_bits": "i64"} | dict.fromkeys((*numbers, *steps), "i32")
        ones = ("scores_col", "states_col")
        return [
            {
                "kernel": "select_blocks",
                "signature": {name: "constexpr" if name in ones else kind for name, kind in types.items()},
                "constexprs": dict.fromkeys(ones, 1),
                "num_warps": self.num_warps,
                "num_stages": 1,
                "unaligned": [name for name, kind in types.items() if kind in ("i32", "i64")],
            }
        ]
