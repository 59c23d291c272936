"""SigmoidAttention(bias="calibrated"): known fits, the bound on memory, determinism, and real activations."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from sigmoid_cases import ATTENTION, COUNT, FITTED, graph_of, qkv, rewritten

import tilewright as tw
from tilewright.frontend.models import BUNDLED, calibration_batches, load_model
from tilewright.passes import Decline, Needs, SigmoidAttention, SiteContext
from tilewright.passes import _sigmoid_fit as sigmoid_fit
from tilewright.passes.view import GraphView
from tilewright.runtime import errors
from tilewright.runtime.ops import OPS


def test_needs() -> None:
    assert SigmoidAttention().current_needs() is Needs.NOTHING
    assert SigmoidAttention(-2.0).current_needs() is Needs.NOTHING
    assert SigmoidAttention("calibrated").current_needs() is Needs.CALIBRATION


def test_no_calibration_raises_before_anything_changes() -> None:
    module = graph_of([{"q": "q", "k": "k", "v": "v"}], qkv())
    text = module.code
    with pytest.raises(errors.CalibrationNeeded, match="layer.0"):
        rewritten(module, SigmoidAttention("calibrated"))
    assert module.code == text


def test_uniform_scores() -> None:
    """All scores equal to s: n sigmoid(s + b) = 1 exactly where b = -s - log(n - 1), for each head its own s."""
    example = qkv(q_len=8, k_len=8)
    q, k = example["q"], example["k"]
    k[:] = k[:, :, :1]
    q[:] = q[:, :, :1]
    q[1], k[1] = q[0], k[0]
    s = 0.5 * (q[0, :, 0] * k[0, :, 0]).sum(-1)
    module = graph_of([{"q": "q", "k": "k", "v": "v"}], example)
    done = rewritten(module, SigmoidAttention("calibrated"), [list(example.values())])
    shift = module.get_buffer("tilewright_layer_0_attention_head_bias").flatten().double() - math.log(8)
    torch.testing.assert_close(shift, -s - math.log(7), rtol=0, atol=FITTED)
    details = done.rewrites[0].details
    assert details["form"] == "offset" and details["row_sum"]["calibrated"] == pytest.approx(1, abs=FITTED)
    # Equal keys get equal weights of sum one, as softmax's are: the output is softmax attention's.
    softmax = done.before(*example.values())[0]
    torch.testing.assert_close(module(*example.values())[0], softmax, rtol=FITTED, atol=FITTED)
    assert details["calibration_rel_l2"]["calibrated"] < FITTED < details["calibration_rel_l2"]["-log_n"]


@pytest.mark.parametrize("mask", ["", "k_idx <= q_idx"])
def test_row_sums_are_one_on_average(mask: str) -> None:
    """With every row sampled, the mean over the calibration rows is one for each head, whatever the scores."""
    batches = [qkv(heads=4, key_heads=2, q_len=40, k_len=40, seed=s) for s in range(3)]
    for batch in batches:
        batch["q"][:, 1] *= 4  # a peaked head
        batch["v"][:] = 1.0  # so that an output is its row's sum
    module = graph_of([{"q": "q", "k": "k", "v": "v", "mask": mask}], batches[0])
    done = rewritten(module, SigmoidAttention("calibrated"), [list(b.values()) for b in batches])
    sums = torch.cat([module(*b.values())[0][..., 0] for b in batches])
    torch.testing.assert_close(sums.mean((0, 2)), torch.ones(4, dtype=torch.float64), rtol=0, atol=FITTED)
    details = done.rewrites[0].details
    assert details["sampled"] == {"sequences": 6, "of": 6, "rows": 240}
    assert details["row_sum"]["-log_n"] > 1.3  # exp is convex: scores that vary sum to more
    low, mean, high = (details["head_bias"][key] for key in ("min", "mean", "max"))
    assert low < mean < high < 0
    error = details["calibration_rel_l2"]
    before = [done.before(*b.values())[0] for b in batches]
    assert error["calibrated"] < error["-log_n"]
    after = torch.cat([module(*b.values())[0] - x for b, x in zip(batches, before, strict=True)])
    measured = float(after.norm() / torch.cat(before).norm())
    assert error["calibrated"] == pytest.approx(measured, rel=1e-4), "the report's error is the output's"


def test_constant_form_is_taken_where_it_is_better() -> None:
    """Each row attends to one key whatever its length: -log(n) would only make long rows too small."""
    generator = torch.Generator().manual_seed(0)
    q = torch.ones(4, 1, 64, 8, dtype=torch.float64)
    k = torch.full((4, 1, 64, 8), -10.0, dtype=torch.float64)
    k[:, :, 0] = 0.5
    v = torch.randn(4, 1, 64, 6, generator=generator, dtype=torch.float64)
    module = graph_of([{"q": "q", "k": "k", "v": "v", "mask": "k_idx <= q_idx"}], {"q": q, "k": k, "v": v})
    done = rewritten(module, SigmoidAttention("calibrated"), [[q, k, v]])
    assert done.rewrites[0].details["form"] == "constant"
    assert not module.graph.find_nodes(op="call_function", target=COUNT)
    torch.testing.assert_close(module(q, k, v)[0], done.before(q, k, v)[0], rtol=1e-3, atol=1e-3)


def test_follow_queries_fits_linear_log_sums() -> None:
    """Keys with a common part: log sum exp moves with q by exactly that part, which a constant cannot follow."""
    batches = [qkv(heads=2, key_heads=2, q_len=64, k_len=64, seed=s) for s in range(4)]
    for batch in batches:
        batch["k"][:] = 0.1 * batch["k"] + torch.linspace(-2, 2, 8, dtype=torch.float64)
    flat = [list(b.values()) for b in batches]
    errors_of = {}
    for follow in (False, True):
        module = graph_of([{"q": "q", "k": "k", "v": "v"}], batches[0])
        done = rewritten(module, SigmoidAttention("calibrated", follow), flat[:3])
        before, after = done.before(*flat[3])[0], module(*flat[3])[0]
        errors_of[follow] = float((after - before).norm() / before.norm())
        assert done.rewrites[0].details["form"] == ("query_linear" if follow else "offset")
    assert errors_of[True] < 0.2 < 1 < errors_of[False]


def test_follow_queries_does_not_extrapolate() -> None:
    """A query far from all calibration queries gets the largest bias they had, not a larger one."""
    example = qkv(heads=1, key_heads=1, q_len=64, k_len=64)
    example["k"][:] += 1.0
    module = graph_of([{"q": "q", "k": "k", "v": "v"}], example)
    rewritten(module, SigmoidAttention("calibrated", True), [list(example.values())])
    (node,) = module.graph.find_nodes(op="call_function", target=torch.ops.aten.clamp.Tensor)
    ends = torch.Tensor(
        [float(module.get_buffer(f"tilewright_layer_0_attention_query_{e}")) for e in ("least", "most")]
    )
    linear = example["q"].float() @ module.get_buffer("tilewright_layer_0_attention_query_weight")
    torch.testing.assert_close(torch.stack([linear.min(), linear.max()]), ends)
    example["k"].zero_()  # all scores 0: weights are the sigmoid of the bias alone
    example["v"].fill_(1.0)
    usual = module(*example.values())[0]
    example["q"] *= 100
    unusual = module(*example.values())[0]
    torch.testing.assert_close(unusual.max(), usual.max(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(unusual.min(), usual.min(), rtol=1e-4, atol=1e-6)


def test_padded_rows_do_not_count() -> None:
    """Queries that are padding themselves are left out of the fit."""
    example = qkv(q_len=16, k_len=16)
    keep = torch.arange(16) < 10
    example["pad"] = keep.expand(2, 1, 1, 16)
    example["q"][:, :, 10:] = 100.0
    module = graph_of([{"q": "q", "k": "k", "v": "v", "bias": "pad"}], example)
    done = rewritten(module, SigmoidAttention("calibrated"), [list(example.values())])
    assert done.rewrites[0].details["sampled"]["rows"] == 20


def test_calibration_inputs_that_see_nothing_decline() -> None:
    example = qkv()
    example["pad"] = torch.zeros(2, 1, 1, 7, dtype=torch.bool)
    module = graph_of([{"q": "q", "k": "k", "v": "v", "bias": "pad"}], example)
    done = rewritten(module, SigmoidAttention("calibrated"), [list(example.values())])
    assert not done.rewrites and "sees a key" in done.declined[0][1]


def test_deterministic() -> None:
    def fitted() -> torch.Tensor:
        torch.manual_seed(int(torch.randint(1000, ())))  # the global generator must not matter
        module = graph_of([{"q": "q", "k": "k", "v": "v"}], qkv(q_len=100, k_len=100))
        batches = [list(qkv(q_len=100, k_len=100, seed=s).values()) for s in range(3)]
        rewritten(module, SigmoidAttention("calibrated"), batches)
        return module.get_buffer("tilewright_layer_0_attention_head_bias")

    assert torch.equal(fitted(), fitted())


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """However much is observed, a site keeps its bytes, and a uniform sample of sequences, not the first ones."""
    monkeypatch.setattr(sigmoid_fit, "SAMPLE_BYTES", 200_000)
    sample = sigmoid_fit.Sample("some/site", regress=True)
    for index in range(60):
        batch = qkv(q_len=80, k_len=80, seed=index)
        batch["v"][:] = index
        sample.observe({**batch, "bias": None, "mask": "", "scale": 0.5})
        assert 0 < sample.bytes <= 200_000
    assert sample.seen == 120 and sample.moments is not None and sample.moments.shape == (4, 10, 10)
    origins = {int(rows.v[0, 0, 0]) for _, rows in sample.kept}
    assert len(sample.kept) >= 2 and max(origins) >= 20
    # One sequence is kept even when it is larger than the bound.
    monkeypatch.setattr(sigmoid_fit, "SAMPLE_BYTES", 10)
    tiny = sigmoid_fit.Sample("some/site")
    tiny.observe({**qkv(), "bias": None, "mask": "", "scale": 0.5})
    assert len(tiny.kept) == 1


def test_observed_tensors_are_copied() -> None:
    """A later in-place write to an activation must not reach the sample."""
    example = qkv()
    context = SiteContext(None, None)  # type: ignore[arg-type]
    context.state["sample"] = sample = sigmoid_fit.Sample("s")
    sample.observe({**example, "bias": None, "mask": "", "scale": 0.5})
    kept = sample.kept[0][1]
    before = kept.scores()
    for t in example.values():
        t.zero_()
    assert torch.equal(kept.scores(), before) and float(kept.v.abs().sum()) > 0
    assert isinstance(SigmoidAttention("calibrated").current_needs(), Needs)


def test_unreached_site_is_told() -> None:
    module = graph_of([{"q": "q", "k": "k", "v": "v"}], qkv())
    (node,) = module.graph.find_nodes(op="call_function", target=ATTENTION)
    with pytest.raises(errors.CalibrationNeeded, match=r"model\.py:1"):
        SigmoidAttention("calibrated").rewrite(SiteContext(node, GraphView(module)))
    assert not isinstance(SigmoidAttention().rewrite(SiteContext(node, GraphView(module))), Decline)


# ---------------------------------------------------------------------------------------------------------- real models


def minilm_two_layers() -> tuple[torch.nn.Module, dict[str, torch.Tensor], list[Any]]:
    """The first two layers of MiniLM, sentences to measure on, and batches of other sentences to calibrate on."""
    if importlib.util.find_spec(BUNDLED["minilm"].module) is None or importlib.util.find_spec("transformers") is None:
        pytest.skip(f"needs transformers and the MiniLM package: {BUNDLED['minilm'].install}")
    loaded = load_model("minilm")
    loaded.model.encoder.layer = loaded.model.encoder.layer[:2]
    batches = calibration_batches(loaded, count=3)
    return loaded.model, dict(batches[2][1]), batches[:2]


def test_calibration_helps_on_minilm() -> None:
    """On real activations the fit puts the mean row sum at one, and the model's output nearer to softmax's."""
    model, inputs, batches = minilm_two_layers()
    reports = {}
    for bias in ("-log_n", "calibrated"):
        compiled = tw.compile(
            model,
            passes=[SigmoidAttention(bias)],
            example_kwargs=inputs,
            calibration=batches if bias == "calibrated" else None,
            target="reference",
            rest="eager",
            strict=True,
        )
        reports[bias] = compiled.report.to_dict()
    matched = reports["calibrated"]["passes"][0]["matched"]
    assert len(matched) == 2
    for site in matched:
        details = site["details"]
        assert details["row_sum"]["calibrated"] == pytest.approx(1, abs=FITTED)
        assert details["calibration_rel_l2"]["calibrated"] < 0.6 * details["calibration_rel_l2"]["-log_n"]
    errors_of = {bias: report["model_error"]["rel_l2"] for bias, report in reports.items()}
    assert errors_of["calibrated"] < 0.8 * errors_of["-log_n"], "also on sentences that the fit has not seen"


def test_compile_asks_for_calibration_first() -> None:
    model = TinyAttention()
    with pytest.raises(errors.CalibrationNeeded, match="calibration="):
        tw.compile(model, passes=[SigmoidAttention("calibrated")], example_inputs=(torch.randn(2, 6, 16),))


class TinyAttention(torch.nn.Module):
    """Causal self-attention of two heads: (B, L, 16) -> (B, L, 16)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = torch.nn.Linear(16, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return mixed.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("follow", [False, True])
def test_save_and_load(tmp_path: Path, follow: bool) -> None:
    """Fitted biases and the count of visible keys survive a round trip through a file, at other lengths too."""
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    compiled = tw.compile(
        TinyAttention().eval(),
        passes=[SigmoidAttention("calibrated", follow)],
        example_inputs=(x,),
        calibration=[x, 2 * x],
        target="reference",
        rest="eager",
    )
    tw.save(compiled, tmp_path / "model.tw")
    loaded = tw.load(tmp_path / "model.tw")
    for length in (6, 9):
        other = torch.randn(3, length, 16, generator=torch.Generator().manual_seed(length))
        torch.testing.assert_close(loaded(other), compiled(other))


def test_through_dynamo(fresh_dynamo: None) -> None:
    """Door two: one graph for growing lengths, the same numbers as door one's."""
    model, x = TinyAttention().eval(), torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    passes = [SigmoidAttention()]
    exported = tw.compile(model, passes=passes, example_inputs=(x,), target="reference", rest="eager")
    dynamo = tw.compile(model, passes=passes, target="reference", rest="eager")
    for length in (6, 9, 12, 5):
        other = torch.randn(2, length, 16, generator=torch.Generator().manual_seed(length))
        # One matrix product of 16 and attention over at most 12 keys in float32, fused alike: a few roundings.
        torch.testing.assert_close(dynamo(other), exported(other), rtol=1e-5, atol=1e-6)
    assert len(dynamo.records) <= 2, "the first length may be specialized, the second opens it"


@pytest.mark.parametrize("one", [SigmoidAttention(), SigmoidAttention("calibrated", True)], ids=["-log_n", "follow"])
def test_kernel_forward_and_backward(one: SigmoidAttention) -> None:
    """The Triton kernels, run by the interpreter, agree with the reference form; the shift has a gradient too."""
    x = torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(0))
    results = []
    for target in ("reference", "triton-interpret"):
        model = TinyAttention().train()
        compiled = tw.compile(
            model, passes=[one], example_inputs=(x,), calibration=[x], target=target, rest="eager", strict=True
        )
        assert [use.op for use in compiled.kernels] == (["attention"] if target == "triton-interpret" else [])
        out = compiled(x)
        out.square().sum().backward()
        results.append((out.detach(), model.qkv.weight.grad, model.qkv.bias.grad))
    tolerance = OPS["attention"].tolerance[torch.float32]
    # Gradients add up 40 rows of products of order one: the forward's tolerance once for each.
    for (ours, theirs), rows in zip(zip(*results, strict=True), (1, 40, 40), strict=True):
        assert float(theirs.abs().max()) > 0.1
        torch.testing.assert_close(ours, theirs, rtol=rows * tolerance.rtol, atol=rows * tolerance.atol)
