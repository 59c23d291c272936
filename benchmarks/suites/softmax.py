"""Row softmax on the CPU: each of our algorithms beside torch eager, Inductor and a copy of the same tensor.

Peers write into one output that they reuse, which is their best case: a new large tensor costs page faults, as torch's
CPU allocator returns big blocks to the system. Ours return a new tensor each time, from the runtime's pool.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...runtime.ops import softmax as ops
from ..harness import Bound, Case, Contender, Problem, Suite
from ..machine import dtype_name
from ..measure import Call
from ..peers import inductor
from ..record import Kind

# Times that an algorithm reads or writes the tensor.
TRAFFIC = {"one_read": 2, "two_pass": 3, "online": 3, "three_pass": 4, "three_pass_reload": 5}
SHAPES = (
    *((8192, 128), (1024, 1024), (1, 1 << 20)),
    *((32768, 128), (1024, 4096), (1, 1 << 22)),
    *((131072, 128), (16384, 1024), (4096, 4096), (64, 262144), (1, 1 << 24)),
    *((1024, 32768), (1, 1 << 25)),
    *((1 << 20, 128), (32768, 4096), (128, 1 << 20), (1, 1 << 27)),
)
QUICK = ((1024, 1024), (4096, 4096), (64, 262144), (1, 1 << 25))
SAMPLE = 1 << 21  # elements that are compared with float64


def bound(dtype: torch.dtype) -> Bound:
    """The op's own tolerance."""
    tolerance = ops.TOLERANCE[dtype]
    return Bound(tolerance.atol, tolerance.rtol)


def scores(rows: int, cols: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Normal with standard deviation 4; a block of it repeated, which is made quickly."""
    torch.manual_seed(0)
    block = torch.randn(min(rows * cols, 1 << 22), device=device).mul_(4).to(dtype)
    return block.repeat(-(-rows * cols // block.numel()))[: rows * cols].reshape(rows, cols)


class Sample:
    """Some whole rows, or parts of too long a row, with their softmax in float64."""

    def __init__(self, x: Tensor, log: bool = False) -> None:
        self.x, self.log = x, log
        rows, cols = x.shape
        count = max(1, min(rows, SAMPLE // cols))
        self.rows = torch.linspace(0, rows - 1, count, device=x.device).long()
        width = min(cols, SAMPLE)
        self.cols = torch.linspace(0, cols - 1, width, device=x.device, dtype=torch.float64).long()

    def of(self, y: Tensor) -> Tensor:
        picked = y[self.rows]
        return picked if self.cols.numel() == y.shape[1] else picked[:, self.cols]

    def expected(self) -> Tensor:
        x, cols = self.x[self.rows], self.x.shape[1]
        largest = x.amax(-1, keepdim=True).double()
        parts = [(part.double() - largest).exp_().sum(-1, keepdim=True) for part in x.split(min(cols, 1 << 22), dim=1)]
        z = (self.of(self.x).double() - largest) - sum(parts).log()
        return z if self.log else z.exp_()


def problem(rows: int, cols: int, dtype: torch.dtype) -> Problem:
    x = scores(rows, cols, dtype)
    out = torch.empty_like(x)
    size = x.numel() * x.element_size()
    sample = Sample(x)

    def into() -> Call:
        compiled = inductor(lambda x, out: out.copy_(torch.softmax(x, -1)))
        return lambda: compiled(x, out)

    def ours(algorithm: str) -> Call:
        ops.spec(x, -1, algorithm=algorithm, target="cpp")  # says why, where there is no kernel
        return lambda: torch.ops.tilewright.softmax(x, -1, algorithm=algorithm, target="cpp")

    contenders = [
        Contender("copy", Kind.FLOOR, lambda: out.copy_(x), output="reused", bytes=2 * size),
        Contender("eager", Kind.PEER, lambda: torch.softmax(x, -1, out=out), output="reused"),
        Contender("inductor", Kind.PEER, make=into, output="reused"),
        Contender("ours", Kind.OURS, make=functools.partial(ours, "auto")),
    ]
    for algorithm, times in TRAFFIC.items():
        contenders.append(Contender(algorithm, Kind.OURS, make=functools.partial(ours, algorithm), bytes=times * size))
    return Problem("ours", contenders, sample.expected, bound(dtype), sample.of, bytes=2 * size)


def cases() -> list[Case]:
    return [
        Case(
            f"{dtype_name(dtype)}/{rows}x{cols}",
            {"dtype": dtype_name(dtype), "rows": rows, "cols": cols, "elements": rows * cols},
            functools.partial(problem, rows, cols, dtype),
            quick=(rows, cols) in QUICK,
        )
        for dtype in (torch.float32, torch.bfloat16)
        for rows, cols in SHAPES
    ]


SUITE = Suite(
    "softmax",
    "Row softmax, 2^20 to 2^27 elements, rows of 128 to 2^27.",
    cases,
    headline=("float32/4096x4096", "float32/64x262144", "float32/1x134217728", "bfloat16/4096x4096"),
    compare=(("three_pass", "two_pass"), ("three_pass_reload", "two_pass"), ("online", "two_pass"), ("ours", "copy")),
    plot_panels=("dtype",),
)
