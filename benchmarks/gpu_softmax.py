#!/usr/bin/env python3
"""Row softmax on a CUDA GPU: every algorithm beside torch eager and torch.compile, checked against float64 first.

    python benchmarks/gpu_softmax.py                       # all cases, writes benchmarks/results/gpu_softmax_<GPU>.json
    python benchmarks/gpu_softmax.py --case long --repeats 50

One interleaved run per case: every round times each contender once, in an order drawn anew, so that clocks and
neighbours bear on all alike. Reported are medians, and median and quartiles of the ratio to torch eager *within* each
round. "floor": the time in which the bytes that a softmax has to move (one read, one write) could be copied, by the
copy bandwidth measured in the same process, as a share of the time taken. "moved": the same for the bytes that the
algorithm moves itself (2N, 3N, 4N, 5N).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(os.environ.get("TILEWRIGHT_BENCHMARK_RESULTS") or Path(__file__).resolve().parent / "results")
TRAFFIC = {"one_read": 2, "two_pass": 3, "online": 3, "three_pass": 4, "three_pass_reload": 5}


@dataclass(frozen=True)
class Case:
    """A tensor and a softmax over one of its dimensions. bias: "none", "additive" (shape of a row) or "mask"."""

    name: str
    shape: tuple[int, ...]
    dim: int = -1
    dtype: torch.dtype = torch.float32
    log: bool = False
    bias: str = "none"
    scale: float = 1.0
    backward: bool = False


CASES = (
    Case("short", (65536, 128)),
    Case("medium", (16384, 2048), dtype=torch.bfloat16),
    Case("vocabulary", (4096, 32768), dtype=torch.bfloat16),
    Case("vocabulary-log", (4096, 50257), log=True),
    Case("vocabulary-large", (2048, 131072), dtype=torch.bfloat16, log=True),
    Case("long", (512, 1 << 20)),
    Case("long-bf16", (512, 1 << 20), dtype=torch.bfloat16),
    Case("one-row", (1, 1 << 27)),
    Case("few-rows", (8, 1 << 24), dtype=torch.float16),
    Case("columns", (16, 4096, 1024), dim=1),
    Case("columns-long", (4, 1 << 17, 128), dim=1, dtype=torch.bfloat16),
    Case("masked-scores", (16, 12, 1024, 1024), dtype=torch.bfloat16, bias="mask", scale=0.125),
    Case("biased-scores", (16, 12, 1024, 1024), bias="additive", scale=0.125),
    Case("medium-backward", (16384, 2048), dtype=torch.bfloat16, backward=True),
    Case("long-backward", (512, 1 << 20), backward=True),
    Case("log-backward", (4096, 50257), log=True, backward=True),
)


def copy_bandwidth(bytes_moved: int = 1 << 31) -> float:
    """Bytes a second (read and written both counted) of a large device-to-device copy, the median of 20."""
    source = torch.empty(bytes_moved // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = [milliseconds(lambda: target.copy_(source)) for _ in range(25)][5:]
    return bytes_moved / (statistics.median(times) * 1e-3)


def milliseconds(function: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def tensors(case: Case) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    torch.manual_seed(0)
    x = (torch.randn(case.shape, device="cuda") * 4).to(case.dtype)
    bias = None
    if case.bias == "additive":
        bias = torch.randn(case.shape[-2:], device="cuda").to(case.dtype)
    elif case.bias == "mask":
        bias = torch.ones(case.shape[-2:], dtype=torch.bool, device="cuda").tril()
    return x, bias, torch.randn(case.shape, device="cuda").to(case.dtype)


def plain(case: Case, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The same function as a user writes it."""
    z = x * case.scale if case.scale != 1.0 else x
    if bias is not None:
        z = z.masked_fill(~bias, float("-inf")) if bias.dtype == torch.bool else z + bias
    return (torch.log_softmax if case.log else torch.softmax)(z, case.dim)


def contenders(case: Case, x: torch.Tensor, bias: torch.Tensor | None, grad: torch.Tensor) -> dict[str, Callable]:
    """Name -> what is timed. An algorithm that has no kernel for the case is left out."""
    from tilewright.runtime.errors import UnsupportedKernel
    from tilewright.runtime.ops import softmax as ops

    compiled = torch.compile(lambda x, bias: plain(case, x, bias), dynamic=False)
    if case.backward:
        y = plain(case, x, bias)
        eager = torch.ops.aten._log_softmax_backward_data if case.log else torch.ops.aten._softmax_backward_data
        dim = case.dim % x.dim()
        formula = torch.compile(lambda g, y: eager(g, y, dim, x.dtype), dynamic=False)
        backward = torch.ops.tilewright.softmax_backward
        return {
            "eager": lambda: eager(grad, y, dim, x.dtype),
            "compile": lambda: formula(grad, y),
            "backward": lambda: backward(grad, y, case.dim, 1.0, x.dtype, case.log, "triton"),
        }
    found: dict[str, Callable] = {"eager": lambda: plain(case, x, bias), "compile": lambda: compiled(x, bias)}
    for algorithm in TRAFFIC:
        call = {"scale": case.scale, "log": case.log, "algorithm": algorithm, "target": "triton"}
        try:
            ops.spec(x, case.dim, bias, **call)
        except UnsupportedKernel as error:
            print(f"  {algorithm}: left out, {error}", file=sys.stderr)
            continue
        found[algorithm] = lambda call=call: torch.ops.tilewright.softmax(x, case.dim, bias, **call)
    return found


def check(case: Case, x: torch.Tensor, bias: torch.Tensor | None, grad: torch.Tensor, run: dict[str, Callable]) -> dict:
    """The greatest error of each contender against float64 on up to 2^22 elements' worth of whole slices.

    Raises AssertionError when one of our kernels is outside of the op's tolerance.
    """
    from tilewright.runtime.ops import softmax as ops

    axis = 0 if case.dim % x.dim() != 0 else 1
    few = max(1, min(x.shape[axis], (1 << 22) // max(x.numel() // x.shape[axis], 1)))
    cut = (slice(None),) * axis + (slice(0, few),)
    wide = bias.double() if bias is not None and bias.dtype != torch.bool else bias
    if wide is not None and wide.dim() == x.dim() and wide.shape[axis] > 1:
        wide = wide[cut]
    if case.backward:
        y, g = plain(case, x, bias)[cut].double(), grad[cut].double()
        total = (g if case.log else g * y).sum(case.dim, keepdim=True)
        expected = g - y.exp() * total if case.log else y * (g - total)
    else:
        expected = ops.reference(x[cut].double(), case.dim, wide, scale=case.scale, log=case.log)
    tolerance = ops.TOLERANCE[x.dtype]
    # A gradient is a difference of sums over the row; its error is on the scale of the largest gradient of the row.
    scale = float(expected.abs().amax()) if case.backward else 1.0
    errors = {}
    for name, function in run.items():
        actual = function()[cut].double()
        errors[name] = float((actual - expected).abs().nan_to_num(nan=float("inf")).amax())
        if name not in ("eager", "compile"):
            torch.testing.assert_close(actual, expected, rtol=tolerance.rtol, atol=tolerance.atol * max(scale, 1.0))
    return errors


def measure(run: dict[str, Callable], repeats: int, seed: int) -> dict[str, list[float]]:
    order, draw = list(run), random.Random(seed)
    for function in run.values():  # compile, fill caches, settle clocks
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in run}
    for _ in range(repeats):
        draw.shuffle(order)
        for name in order:
            times[name].append(milliseconds(run[name]))
    return times


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4) if len(values) > 1 else values * 3


def bench(case: Case, repeats: int, bandwidth: float) -> dict[str, Any]:
    x, bias, grad = tensors(case)
    run = contenders(case, x, bias, grad)
    errors = check(case, x, bias, grad, run)
    times = measure(run, repeats, seed=0)
    extra = 0 if bias is None else bias.numel() * bias.element_size()
    tensor_bytes = x.numel() * x.element_size()
    floor = ((3 if case.backward else 2) * tensor_bytes + extra) / bandwidth * 1e3
    rows = {}
    for name, values in times.items():
        median = statistics.median(values)
        ratios = [eager / own for eager, own in zip(times["eager"], values, strict=True)]
        row = {
            "milliseconds": quartiles(values),
            "speedup_over_eager": quartiles(ratios),
            "share_of_floor": floor / median,
            "max_abs_error": errors[name],
        }
        if name in TRAFFIC:
            row["moved"] = TRAFFIC[name] * tensor_bytes / bandwidth * 1e3 / median
        rows[name] = row
    return {
        "case": case.name,
        "shape": list(case.shape),
        "dim": case.dim,
        "dtype": str(case.dtype).removeprefix("torch."),
        "log": case.log,
        "bias": case.bias,
        "backward": case.backward,
        "floor_milliseconds": floor,
        "contenders": rows,
    }


def show(result: dict[str, Any]) -> None:
    kind = ("backward of " if result["backward"] else "") + ("log_softmax" if result["log"] else "softmax")
    print(f"\n{result['case']}: {kind} {result['shape']} dim {result['dim']} {result['dtype']}, bias {result['bias']}")
    print(f"  {'':18} {'ms':>9} {'over eager (q1-q3)':>24} {'floor':>7} {'moved':>7} {'max error':>10}")
    for name, row in result["contenders"].items():
        low, middle, high = row["speedup_over_eager"]
        moved = f"{row['moved']:7.0%}" if "moved" in row else " " * 7
        speed = f"{middle:.2f} ({low:.2f}-{high:.2f})"
        share, error = row["share_of_floor"], row["max_abs_error"]
        print(f"  {name:18} {row['milliseconds'][1]:9.4f} {speed:>24} {share:7.0%} {moved} {error:10.2e}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--case", action="append", choices=[case.name for case in CASES], help="only these (repeatable)"
    )
    parser.add_argument("--repeats", type=int, default=30, help="timed rounds per case (default 30)")
    parser.add_argument("--output", type=Path, help="where to write the JSON (default: benchmarks/results/...)")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA GPU, and torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    import triton

    import tilewright

    bandwidth = copy_bandwidth()
    device = torch.cuda.get_device_name()
    print(f"{device}, copy bandwidth {bandwidth / 1e12:.2f} TB/s")
    results = []
    for case in CASES:
        if options.case and case.name not in options.case:
            continue
        results.append(bench(case, options.repeats, bandwidth))
        show(results[-1])
        torch.cuda.empty_cache()
    report = {
        "device": device,
        "copy_bytes_per_second": bandwidth,
        "repeats": options.repeats,
        "versions": {"tilewright": tilewright.__version__, "torch": torch.__version__, "triton": triton.__version__},
        "results": results,
    }
    name = device.lower().replace(" ", "_").replace("/", "_")
    output = options.output or RESULTS / f"gpu_softmax_{name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
