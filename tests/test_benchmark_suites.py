"""The suites compute what they say: contenders that need no compiler are right at small sizes. Nothing is timed."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from tiny import llama, tokens

from tilewright.benchmarks import first_call, harness, peers
from tilewright.benchmarks.harness import Problem, Skip
from tilewright.benchmarks.record import Entry, Kind, State
from tilewright.benchmarks.suites import (
    _models,
    attention,
    decode,
    decode_cache,
    gpu_attention,
    gpu_decode_cache,
    gpu_quantized_linear,
    gpu_softmax,
    models,
    ops,
    softmax,
)
from tilewright.codegen.cache_format import CacheFormat
from tilewright.codegen.weight_format import WeightFormat

COMPILED = ("inductor", "flex", "compile")  # seconds each; the peers are torch's own to test
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


def states(problem: Problem) -> dict[str, Entry]:
    """What the harness says of each contender before it would be timed."""
    found = {}
    with torch.no_grad():
        expected = problem.expected()
        for contender in problem.contenders:
            if contender.name not in COMPILED:
                entry = Entry(contender.name, contender.kind, State.OK)
                harness._checked(entry, contender, problem, expected)
                found[contender.name] = entry
    return found


def right(problem: Problem, *names: str) -> None:
    """``names`` ran and are right; no other is wrong or broken."""
    found = states(problem)
    for name in names:
        assert found[name].state is State.OK and found[name].of_tolerance is not None, found[name]
    bad = {name: e.word for name, e in found.items() if e.state in (State.WRONG, State.FAILED)}
    assert not bad


def spoiled(problem: Problem, name: str) -> Problem:
    """The same with one contender a little off."""

    def change(contender: harness.Contender) -> harness.Contender:
        if contender.name != name:
            return contender

        def call() -> torch.Tensor:
            result = contender.ready()().clone()
            return result.mul_(1.2)

        return dataclasses.replace(contender, call=call, make=None)

    return dataclasses.replace(problem, contenders=[change(c) for c in problem.contenders])


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("shape", [(1, 5000), (37, 129)])
def test_softmax(shape: tuple[int, int], dtype: torch.dtype) -> None:
    one = softmax.problem(*shape, dtype)
    right(one, "eager", "ours", "two_pass", "three_pass")
    assert one.bytes == 2 * math.prod(shape) * dtype.itemsize
    assert states(spoiled(one, "ours"))["ours"].state is State.WRONG


def test_a_long_row_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    x = softmax.scores(2, 50, FLOAT32)
    torch.testing.assert_close(softmax.Sample(x, log=True).expected(), x.double().log_softmax(-1))
    monkeypatch.setattr(softmax, "SAMPLE", 64)
    one = softmax.problem(3, 1000, FLOAT32)
    assert one.expected().shape == (1, 64) and one.sample(torch.zeros(3, 1000)).shape == (1, 64)
    right(one, "eager")


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize(("causal", "group"), [(True, 1), (False, 4)])
def test_attention(causal: bool, group: int, dtype: torch.dtype) -> None:
    one = attention.problem(67, 32, causal, group, dtype, with_flex=False)
    right(one, "sdpa", "ours", "ours sigmoid")
    assert states(spoiled(one, "ours sigmoid"))["ours sigmoid"].state is State.WRONG
    assert states(spoiled(one, "sdpa"))["sdpa"].state is State.WRONG


def test_attention_counts_its_work() -> None:
    assert attention.pairs(5, causal=False) == 25 and attention.pairs(5, causal=True) == 15
    window = sum(1 for q in range(50) for k in range(50) if q - 7 < k <= q)
    assert attention.pairs(50, causal=True, window=7) == window
    assert attention.flops(2, 3, 5, 8, causal=False) == 4 * 2 * 3 * 8 * 25
    assert attention.heads_for(128, 32, True) == 8 and attention.heads_for(16384, 128, False) == 2


@pytest.mark.parametrize(("heads", "key_heads"), [(8, 8), (9, 3)])
def test_decode_attention(heads: int, key_heads: int) -> None:
    one = decode.attention(77, heads, key_heads, 64, FLOAT32)
    right(one, "sdpa", "ours")
    assert one.bytes == 2 * key_heads * 77 * 64 * 4


@pytest.mark.parametrize("static", [False, True])
def test_decoding_steps_give_the_logits_of_the_whole(static: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "PROMPT", 6)
    monkeypatch.setattr(decode, "STEPS", 4)
    monkeypatch.setattr(decode, "CONTEXT", 16)
    model, ids = llama(), tokens(1, 10)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits[:, 6:]
        steps = decode.Steps(model, model, ids, static)
        for _ in range(3):  # the cache goes back to the prompt each time
            torch.testing.assert_close(steps(), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize(
    ("op", "sizes"),
    [
        ("rms_norm", (3, 70)),
        ("layer_norm", (3, 70)),
        ("rope", (2, 5, 16)),
        ("gated_mlp", (3, 70)),
        ("linear", (3, 70, 9)),
    ],
)
def test_small_ops(op: str, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    right(ops.problem(op, sizes, dtype), "eager")


def test_gpu_suites_compute_the_same_on_the_interpreter() -> None:
    small = gpu_softmax.Shape("small", (6, 40), dtype=torch.float16)  # the interpreter truncates to bfloat16
    right(gpu_softmax.problem(small, "cpu", "triton-interpret"), "eager", "ours", "two_pass", "online")
    masked = gpu_softmax.Shape("masked", (2, 3, 8, 8), bias="mask", scale=0.5)
    right(gpu_softmax.problem(masked, "cpu", "triton-interpret"), "eager", "ours")
    backward = gpu_softmax.Shape("backward", (6, 40), log=True, backward=True)
    right(gpu_softmax.problem(backward, "cpu", "triton-interpret"), "eager", "ours")


def test_gpu_quantized_layers_compute_the_same_on_the_interpreter() -> None:
    case = gpu_quantized_linear.Shape("small", WeightFormat(4, 32, "point"), 3, 70, 20, torch.float16)
    one = gpu_quantized_linear.problem(case, "cpu", "triton-interpret")
    assert one.bytes == 20 * 3 * 16 + 20 * 3 * (2 + 1) + 3 * (70 + 20) * 2  # codes, scales and zeros; x, result
    here = [c for c in one.contenders if c.name in ("plain", "ours")]
    right(dataclasses.replace(one, contenders=here), "plain", "ours")


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid"])
@pytest.mark.parametrize("backward", [False, True])
def test_gpu_attention_computes_the_same_on_the_interpreter(backward: bool, normalizer: str) -> None:
    case = gpu_attention.Shape("small", 1, 2, 37, 16, 1, FLOAT32, normalizer=normalizer)
    one = gpu_attention.problem(case, backward, "cpu", "triton-interpret")
    without = [c for c in one.contenders if c.name == "ours"]  # SDPA's GPU backends are not on a CPU
    right(dataclasses.replace(one, contenders=without), "ours")


def test_gpu_window_is_the_mask() -> None:
    case = gpu_attention.Shape("window", 1, 1, 20, window=5)
    rows, columns = torch.arange(20)[:, None], torch.arange(20)
    assert int(case.static(20).visible(rows, columns).sum()) == attention.pairs(20, True, 5) == case.pairs


@pytest.mark.parametrize(("pattern", "backward"), [("sinks", False), ("documents", True)])
def test_gpu_masks_and_lists_compute_the_same_on_the_interpreter(pattern: str, backward: bool) -> None:
    case = gpu_attention.Shape("small", 1, 1, 37, 16, dtype=FLOAT32, pattern=pattern)
    one = gpu_attention.problem(case, backward, "cpu", "triton-interpret")
    names = ["ours"] if pattern == "documents" else ["ours", "ours lists"]
    assert [c.name for c in one.contenders] == [*names, "flex"]
    right(one, *names)


def test_gpu_lists_compute_the_same_on_the_interpreter() -> None:
    one = gpu_attention.lists_problem(300, 1, 50, 16, "cpu", "triton-interpret")
    right(dataclasses.replace(one, contenders=one.contenders[:1]), "ours")
    assert {case.name for case in gpu_attention.cases()} >= {"sinks-128k/backward", "xattention-32k/forward"}


# Models


def test_model_inputs_are_padded_text() -> None:
    kwargs = _models.encoder_inputs("minilm", 3, 16)
    assert kwargs["input_ids"].shape == (3, 16)
    assert kwargs["attention_mask"].sum(1).tolist() == [16, 12, 8]
    assert not kwargs["input_ids"][kwargs["attention_mask"] == 0].any()
    assert _models.encoder_inputs("minilm", 1, 16)["attention_mask"].all()


def test_model_problems_know_their_work() -> None:
    one = models.problem("minilm", 2, 8, FLOAT32)
    layers = 6 * (4 * 384 * 384 + 2 * 384 * 1536)  # multiply-adds of a token; attention adds a little
    assert 2 * layers * 16 < one.flops < 2.2 * layers * 16
    assert one.items == 16 and one.bytes > 4 * 20e6
    found = states(dataclasses.replace(one, contenders=[c for c in one.contenders if c.name == "eager"]))
    assert found["eager"].state is State.OK


def test_a_missing_model_or_package_is_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: object, **__: object) -> None:
        raise _models.UnknownModel("the model minilm comes in a package that is not installed: pip install it")

    monkeypatch.setattr(_models, "load_model", nothing)
    _models.loaded.cache_clear()
    with pytest.raises(Skip, match="pip install it"):
        _models.loaded("minilm", FLOAT32)
    _models.loaded.cache_clear()
    with pytest.raises(Skip, match="no_such_package is not installed: pip install 'tilewright"):
        peers.need("no_such_package")
    case = next(c for c in models.cases() if c.name.startswith("minilm"))
    monkeypatch.setattr(models, "problem", nothing)
    assert case.params["model"] == "minilm"


def test_openvino_is_right_or_missing() -> None:
    model, ids = llama(), tokens(1, 6)
    with torch.no_grad():
        try:
            call = peers.openvino_model(model, {"input_ids": ids, "use_cache": False}, "f32", 1)
        except Skip as skip:
            assert "openvino" in str(skip)
            return
        torch.testing.assert_close(call(), model(input_ids=ids).logits, rtol=1e-3, atol=1e-4)


def test_first_call_tells_a_failure(tmp_path) -> None:
    with pytest.raises(RuntimeError, match="no_such_model"):
        first_call.measure("no_such_model", "float32", 1, 8, "compile", 1, tmp_path)


def test_every_own_contender_is_named_ours() -> None:
    """Ratios are taken to it."""
    for one in (softmax.problem(2, 8, FLOAT32), ops.problem("rope", (1, 2, 4), FLOAT32)):
        own = next(c for c in one.contenders if c.name == one.ours)
        assert own.kind is Kind.OURS


@pytest.mark.parametrize("name", ["whole", "paged"])
def test_decode_cache(name) -> None:
    case = decode_cache.problem(300, name, 6, 2, 3, FLOAT32)
    right(case, "sdpa", "ours")
    spoil = states(spoiled(case, "ours"))["ours"]
    assert spoil.state is State.WRONG
    # Three queries stand behind 291 tokens, in 2 tensors of 2 heads of 64 float32 channels.
    assert case.bytes == 2 * 294 * 2 * 64 * 4


@pytest.mark.parametrize(
    "case",
    [
        gpu_decode_cache.Shape("codes", 130, 2, 4, 2, 16, form=CacheFormat(4, 4), dtype=torch.float16),
        gpu_decode_cache.Shape("absorbed", 70, 1, 4, 4, 16, rank=8, left=30, dtype=FLOAT32),
    ],
    ids=lambda case: case.name,
)
def test_gpu_decode_cache_computes_the_same_on_the_interpreter(case: gpu_decode_cache.Shape) -> None:
    right(gpu_decode_cache.problem(case, "cpu", "triton-interpret"), "sdpa", "ours", "append")
