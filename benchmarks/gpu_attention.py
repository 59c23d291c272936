#!/usr/bin/env python3
"""Attention on a CUDA GPU: our kernels beside torch's SDPA and FlexAttention, checked against float64 first.

    python benchmarks/gpu_attention.py              # all cases, writes benchmarks/results/gpu_attention_<GPU>.json
    python benchmarks/gpu_attention.py --case causal --rounds 50 --tune

One interleaved run per case: every round times each contender once, in an order drawn anew, so that clocks and
neighbours bear on all alike. Reported are medians, and median and quartiles of the ratio contender / ours *within* each
round (above 1: we are faster). "floor": the time of the multiplications that the mask leaves, at the rate of a large
matrix product measured in the same process, as a share of the time taken. Visible pairs count 4 D operations forward
and 10 D backward (five products, the scores computed again included). Sigmoid has no peer in torch: FlexAttention is a
softmax, so there it is timed beside SDPA's softmax, for scale only.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

RESULTS = Path(__file__).resolve().parent / "results"
CAUSAL = "k_idx <= q_idx"


@dataclass(frozen=True)
class Case:
    """Self-attention of ``length`` tokens. window: keys a query sees, 0 for no limit (needs causal)."""

    name: str
    batch: int
    heads: int
    length: int
    dim: int = 128
    key_heads: int = 0
    dtype: torch.dtype = torch.bfloat16
    causal: bool = True
    window: int = 0
    normalizer: str = "softmax"

    @property
    def mask(self) -> str:
        if self.window:
            return f"(k_idx <= q_idx) & (k_idx > q_idx - {self.window})"
        return CAUSAL if self.causal else ""

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs of one head."""
        n, w = self.length, self.window
        if w and w < n:
            return w * (w + 1) // 2 + (n - w) * w
        return n * (n + 1) // 2 if self.causal else n * n


CASES = (
    Case("causal-4k", 4, 16, 4096),
    Case("causal-16k", 1, 16, 16384),
    Case("causal-4k-64", 4, 32, 4096, dim=64),
    Case("causal-4k-256", 4, 8, 4096, dim=256),
    Case("causal-4k-fp16", 4, 16, 4096, dtype=torch.float16),
    Case("causal-grouped-8k", 2, 32, 8192, key_heads=8),
    Case("full-4k", 4, 16, 4096, causal=False),
    Case("full-4k-80", 4, 16, 4096, dim=80, causal=False),
    Case("window-1k-of-16k", 1, 16, 16384, window=1024),
    Case("causal-2k-fp32", 2, 8, 2048, dim=64, dtype=torch.float32),
    Case("sigmoid-causal-4k", 4, 16, 4096, normalizer="sigmoid"),
    Case("sigmoid-causal-4k-64", 4, 32, 4096, dim=64, normalizer="sigmoid"),
    Case("sigmoid-full-4k", 4, 16, 4096, causal=False, normalizer="sigmoid"),
)


def inputs(case: Case, length: int | None = None, batch: int | None = None) -> list[torch.Tensor]:
    """q, k, v as models make them: (batch, length, heads, dim) in memory."""
    length, batch = length or case.length, batch or case.batch

    def tensor(heads: int) -> torch.Tensor:
        data = torch.randn(batch, length, heads, case.dim, device="cuda", dtype=case.dtype)
        return data.transpose(1, 2).requires_grad_()

    return [tensor(case.heads), tensor(case.key_heads or case.heads), tensor(case.key_heads or case.heads)]


def shift_of(case: Case, length: int) -> torch.Tensor | None:
    return torch.full((1,), -math.log(length), device="cuda") if case.normalizer == "sigmoid" else None


def ours(case: Case, length: int) -> Callable[..., torch.Tensor]:
    import tilewright.runtime.ops  # noqa: F401  (registers the op)

    scale, shift = case.dim**-0.5, shift_of(case, length)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.ops.tilewright.attention(
            q, k, v, None, shift, scale=scale, mask=case.mask, normalizer=case.normalizer, target="triton"
        )

    return call


def check(case: Case) -> dict[str, float]:
    """Largest error of output and gradients on up to 1,024 tokens, relative to the largest value, against float64.

    Exits with a message when one is beyond what the dtype's rounding explains.
    """
    from tilewright.runtime.ops.attention import reference

    length = min(case.length, 1000)  # no multiple of a tile
    args = inputs(case, length, 1)
    exact = [t.detach().double().requires_grad_() for t in args]
    shift = shift_of(case, length)
    out = ours(case, length)(*args)
    options: dict[str, Any] = {"scale": case.dim**-0.5, "mask": case.mask, "normalizer": case.normalizer}
    expected = reference(*exact, None, shift, **options)
    grad = torch.randn_like(out)
    found = [out, *torch.autograd.grad(out, args, grad)]
    wanted = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    limit = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[case.dtype]
    errors = {}
    for name, f, e in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        errors[name] = ((f.double() - e).abs().max() / e.abs().max()).item()
        if not errors[name] <= limit:
            sys.exit(f"{case.name}: {name} is off by {errors[name]:.3g} of its largest value, over {limit}")
    return errors


def contenders(case: Case) -> dict[str, Callable[..., torch.Tensor]]:
    """Name -> function of q, k, v. SDPA's flash backend where it takes the case, else the backend torch chooses."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    grouped = bool(case.key_heads)
    found: dict[str, Callable[..., torch.Tensor]] = {"ours": ours(case, case.length)}
    half = case.dtype != torch.float32

    if not case.window:

        def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            backends = [SDPBackend.FLASH_ATTENTION] if half else [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
            with sdpa_kernel(backends):
                return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=grouped)

        found["sdpa"] = sdpa
    if case.normalizer == "softmax":
        flex = torch.compile(flex_attention, dynamic=False)
        block_mask = None
        if case.mask:

            def visible(b: Any, h: Any, q_idx: torch.Tensor, kv_idx: torch.Tensor) -> torch.Tensor:
                inside = kv_idx <= q_idx
                return inside & (kv_idx > q_idx - case.window) if case.window else inside

            block_mask = create_block_mask(visible, None, None, case.length, case.length, device="cuda")

        def flex_call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return flex(q, k, v, block_mask=block_mask, enable_gqa=grouped)

        found["flex"] = flex_call
    return found


def milliseconds(call: Callable[[], Any]) -> float:
    """One call by CUDA events, the 256 MiB flushed before it standing for a cold L2 cache."""
    flush = torch.empty(64 * 2**20, dtype=torch.int32, device="cuda")
    flush.zero_()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def matmul_rate(dtype: torch.dtype) -> float:
    """Operations per second of an 8192 x 8192 x 8192 product: the best of 20."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * 8192**3 / (min(milliseconds(lambda: a @ b) for _ in range(20)) * 1e-3)


def quartiles(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"q1": low, "median": median, "q3": high}


def race(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds by contender, a list entry per round; contenders that cannot run are left out, with the reason."""
    times: dict[str, list[float]] = {}
    for name, call in calls.items():
        try:
            for _ in range(3):
                call()
            torch.cuda.synchronize()
            times[name] = []
        except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
            print(f"    {name} cannot run: {str(error).splitlines()[0]}")
            if name == "ours":
                raise
    order = list(times)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            times[name].append(milliseconds(calls[name]))
    return times


def measure(case: Case, rounds: int, rate: float) -> dict[str, Any]:
    errors = check(case)
    args = inputs(case)
    runs = contenders(case)
    outs = {}
    grad = torch.randn(case.batch, case.length, case.heads, case.dim, device="cuda", dtype=case.dtype).transpose(1, 2)
    forward: dict[str, Callable[[], Any]] = {}
    backward: dict[str, Callable[[], Any]] = {}
    for name, call in runs.items():

        def run(call: Callable[..., torch.Tensor] = call) -> torch.Tensor:
            with torch.no_grad():
                return call(*args)

        def back(name: str = name, call: Callable[..., torch.Tensor] = call) -> Any:
            if name not in outs:
                outs[name] = call(*args)
            return torch.autograd.grad(outs[name], args, grad, retain_graph=True)

        forward[name], backward[name] = run, back
    products = case.batch * case.heads * case.pairs * case.dim
    row: dict[str, Any] = {"case": case.name, "errors": errors, "mask": case.mask, "normalizer": case.normalizer}
    row |= {"shape": [case.batch, case.heads, case.key_heads or case.heads, case.length, case.dim]}
    row |= {"dtype": str(case.dtype)}
    for phase, calls, operations in (("forward", forward, 4 * products), ("backward", backward, 10 * products)):
        times = race(calls, rounds)
        medians = {name: statistics.median(values) for name, values in times.items()}
        ratios = {
            name: quartiles([other / own for other, own in zip(values, times["ours"], strict=True)])
            for name, values in times.items()
            if name != "ours"
        }
        floor_ms = operations / rate * 1e3
        row[phase] = {
            "median_ms": medians,
            "ratio_to_ours": ratios,
            "floor_ms": floor_ms,
            "floor_share": {name: floor_ms / value for name, value in medians.items()},
        }
        told = ", ".join(f"{n} {r['median']:.2f} [{r['q1']:.2f}, {r['q3']:.2f}]" for n, r in ratios.items())
        share = floor_ms / medians["ours"]
        print(f"  {case.name:22} {phase:8} ours {medians['ours']:8.3f} ms, floor {share:4.0%}; times ours: {told}")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help="only cases whose name contains this; may be repeated")
    parser.add_argument("--rounds", type=int, default=30, help="interleaved rounds per case (default 30)")
    parser.add_argument(
        "--tune", action="store_true", help="let autotuning choose the tiles (default: the shipped ones)"
    )
    parser.add_argument("--check-only", action="store_true", help="only compare with float64")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/gpu_attention_<GPU>.json)")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds must be at least 2, for quartiles")
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU, and torch.cuda.is_available() is False")
    chosen = [c for c in CASES if not options.case or any(word in c.name for word in options.case)]
    if not chosen:
        parser.error(f"no case has such a name: there are {', '.join(c.name for c in CASES)}")
    from tilewright.runtime import settings

    device = torch.cuda.get_device_name()
    rates: dict[torch.dtype, float] = {}
    rows = []
    with settings.override(autotune=options.tune):
        for case in chosen:
            if options.check_only:
                print(f"  {case.name:22} {check(case)}")
                continue
            if case.dtype not in rates:
                rates[case.dtype] = matmul_rate(case.dtype)
                print(f"{device}: matrix products of {case.dtype} at {rates[case.dtype] / 1e12:.0f} TFLOP/s")
            rows.append(measure(case, options.rounds, rates[case.dtype]))
            torch.cuda.empty_cache()
    if not rows:
        return
    import triton

    record = {
        "device": device,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "rounds": options.rounds,
        "tuned": options.tune,
        "matmul_flops": {str(dtype): rate for dtype, rate in rates.items()},
        "rows": rows,
    }
    path = options.out or RESULTS / f"gpu_attention_{device.replace(' ', '_')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
