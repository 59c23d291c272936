"""Whole models on the CPU, exact passes only: MiniLM and SmolLM2's prefill beside eager, torch.compile and OpenVINO.

Also the first call: from a loaded model to its first output in a new process, with all compilers' caches empty (cold)
and with those of an earlier process (warm).
"""

from __future__ import annotations

import atexit
import functools
import itertools
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from .. import first_call
from ..harness import Case, Contender, Problem, Suite, Timed
from ..machine import dtype_name
from ..measure import Call, Limits
from ..peers import call_model, openvino_model
from ..record import Kind
from . import _models

SHAPES = {"minilm": ((32, 128), (1, 128), (8, 512)), "smollm2": ((1, 512), (1, 2048))}
QUICK = {("minilm", 1, 128), ("minilm", 32, 128), ("smollm2", 1, 512)}


def problem(name: str, batch: int, length: int, dtype: torch.dtype) -> Problem:
    model = _models.loaded(name, dtype).model
    exact = _models.loaded(name, torch.float32).model
    kwargs = _models.model_inputs(name, batch, length)
    mask = kwargs.get("attention_mask")

    def sample(out: Tensor) -> Tensor:
        return out[mask.bool()] if mask is not None else out

    def openvino() -> Call:
        precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
        return openvino_model(exact, kwargs, precision, torch.get_num_threads())

    return Problem(
        "ours",
        [
            Contender("eager", Kind.PEER, make=lambda: _models.eager(model, kwargs)),
            Contender("compile", Kind.PEER, make=lambda: _models.compiled(model, kwargs)),
            Contender("openvino", Kind.PEER, make=openvino, output="reused"),
            Contender("ours", Kind.OURS, make=lambda: _models.ours(model, kwargs)),
        ],
        lambda: sample(call_model(exact, kwargs)()),
        _models.BOUND[dtype],
        sample,
        bytes=_models.parameter_bytes(model),
        flops=_models.operations(exact, kwargs),
        traffic="read",
        dtype=dtype_name(dtype),
        items=batch * length,
        item="tokens",
    )


@functools.cache
def _folder() -> Path:
    """Compilers' caches of this run; removed when it ends."""
    folder = Path(tempfile.mkdtemp(prefix="tilewright-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def first(name: str, batch: int, length: int, dtype: torch.dtype, warm: bool, rounds: int) -> Problem:
    exact = _models.loaded(name, torch.float32).model
    kwargs = _models.model_inputs(name, batch, length)

    def caches(way: str, number: int) -> Path:
        return _folder() / f"{name}-{dtype_name(dtype)}-{batch}x{length}-{way}-{number}"

    def run(way: str, number: int) -> Timed:
        threads = torch.get_num_threads()
        return first_call.measure(name, dtype_name(dtype), batch, length, way, threads, caches(way, number))

    def process(way: str) -> Call:
        if not warm:
            numbers = itertools.count()
            return lambda: run(way, next(numbers))
        if not caches(way, 0).exists():  # else the cold row has filled them
            run(way, 0)
        return lambda: run(way, 0)

    return Problem(
        "ours",
        [
            Contender("compile", Kind.PEER, make=functools.partial(process, "compile")),
            Contender("ours", Kind.OURS, make=functools.partial(process, "ours")),
        ],
        lambda: call_model(exact, kwargs)(),
        _models.BOUND[dtype],
        rounds=rounds,
        note="seconds from the loaded model to the first output, in a new process",
    )


def cases() -> list[Case]:
    """What a run out of time leaves out stands last."""
    first_calls = [*_first_calls("minilm", 1, 128, 2), *_first_calls("smollm2", 1, 512, 1)]
    return [*_cases("minilm"), *_cases("smollm2"), *first_calls]


def _cases(name: str) -> list[Case]:
    return [
        Case(
            f"{name}/{dtype_name(dtype)}/{batch}x{length}",
            {"model": name, "dtype": dtype_name(dtype), "batch": batch, "length": length},
            functools.partial(problem, name, batch, length, dtype),
            quick=(name, batch, length) in QUICK and dtype is torch.bfloat16,
            limits=Limits(seconds=6.0, least_rounds=3) if name == "smollm2" else None,
        )
        for dtype in (torch.float32, torch.bfloat16)
        for batch, length in SHAPES[name]
    ]


def _first_calls(name: str, batch: int, length: int, rounds: int) -> list[Case]:
    return [
        Case(
            f"first-call/{name}/{kind}",
            {"model": name, "dtype": "float32", "batch": batch, "length": length, "caches": kind},
            functools.partial(first, name, batch, length, torch.float32, kind == "warm", rounds),
        )
        for kind in ("cold", "warm")
    ]


SUITE = Suite(
    "models",
    "MiniLM and SmolLM2 (prefill, logits of the last token), exact passes only; and the first call in a new process.",
    cases,
    compare=(("eager", "ours"), ("compile", "ours"), ("openvino", "ours")),
    headline=("minilm/*", "smollm2/*", "first-call/*"),
    plot_panels=("model", "dtype"),
)
