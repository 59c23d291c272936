"""Door two: torch.compile's backend, and transformers' generate() through it."""

from __future__ import annotations

import pytest
import torch
from tiny import Mlp, llama, tokens

import tilewright as tw
from tilewright.frontend.backend import last_record
from tilewright.runtime import errors

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.parametrize("rest", ["eager", "inductor"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_equals_eager(rest: str, cache: str | None) -> None:
    model = llama()
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "cache_implementation": cache}
    want = model.generate(tokens(), **settings)
    compiled = tw.compile(model, rest=rest)
    got = compiled.generate(tokens(), **settings)
    assert torch.equal(got, want)
    # Prefill, the first decode step, and one graph for all further lengths.
    assert 1 <= len(compiled.records) <= 3
    assert any(site.op == "attention" for site in compiled.records[0].sites)
    assert type(model).forward is type(llama()).forward
    assert "forward" not in model.__dict__


def test_generate_with_left_padding() -> None:
    model = llama("eager")
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    want = model.generate(ids, **settings)
    assert torch.equal(tw.compile(model, rest="eager").generate(ids, **settings), want)


def test_by_name_with_options() -> None:
    records = []
    model = llama(layers=1)
    options = {"passes": "sigmoid-attention{bias=-2.0}", "rest": "eager", "on_graph": records.append}
    compiled = torch.compile(model, backend="tilewright", options=options)
    out = compiled(input_ids=tokens(), use_cache=False).logits
    assert last_record() is records[0]
    assert len(records[0].runs[0].rewrites) == 1
    assert records[0].error is not None and records[0].error["rel_l2"] > 1e-4
    assert not torch.allclose(out, model(input_ids=tokens(), use_cache=False).logits, rtol=1e-3, atol=1e-3)


def test_unknown_backend_option_is_named() -> None:
    compiled = torch.compile(Mlp().eval(), backend="tilewright", options={"pases": []})
    with pytest.raises(Exception, match="no option 'pases'"):
        compiled(torch.randn(2, 8))


def test_lengths_do_not_recompile_for_ever() -> None:
    model = llama(layers=1)
    compiled = tw.compile(model, rest="eager")
    for length in (5, 6, 9, 17, 30):
        ids = tokens(2, length)
        torch.testing.assert_close(
            compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits, rtol=1e-5, atol=1e-5
        )
    assert len(compiled.records) == 2  # the first length, and one graph with a symbolic length


def test_training_through_dynamo() -> None:
    model = llama(layers=1).train()
    ids = tokens()
    model(ids, labels=ids).loss.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    compiled = tw.compile(model)
    compiled(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], rtol=1e-4, atol=1e-6)


def test_autocast_through_dynamo() -> None:
    model = llama(layers=1)
    compiled = tw.compile(model, rest="eager")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        got, want = compiled(tokens(), use_cache=False).logits, model(tokens(), use_cache=False).logits
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_state_that_the_graph_writes_is_not_moved_by_validation() -> None:
    model = Mlp().train()
    compiled = tw.compile(model, rest="eager")
    compiled(torch.randn(5, 8))
    assert int(model.norm.num_batches_tracked) == 1


def test_errors_of_ours_keep_their_sentence() -> None:
    compiled = tw.compile(Mlp().eval(), [tw.passes.TwoPassSoftmax()], strict=True, rest="eager")
    with pytest.raises(errors.PassChangedNothing, match="changed nothing"):
        compiled(torch.randn(2, 8))


class ByHand(torch.nn.Module):
    """A projection written as a product with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(8, 4))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + x @ y


def test_parameters_are_known_behind_dynamo() -> None:
    compiled = tw.compile(ByHand(), rest="eager")
    x, y = torch.randn(3, 8), torch.randn(8, 4)
    torch.testing.assert_close(compiled(x, y), compiled.original_model(x, y))
    assert [site.op for site in compiled.records[0].sites] == ["linear"], "y is an input, not a weight"


@pytest.mark.parametrize("padded", [False, True])
def test_sigmoid_attention_counts_the_keys_of_every_cache(padded: bool) -> None:
    """Each decoding step sees one key more: -log(n) must follow a growing and a static cache, and no cache at all."""
    model, ids = llama(layers=1), tokens()
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    if padded:
        settings["attention_mask"] = torch.ones_like(ids)
        settings["attention_mask"][0, :3] = 0
    texts = []
    for cache in ({"use_cache": False}, {"use_cache": True}, {"cache_implementation": "static"}):
        torch._dynamo.reset()
        compiled = tw.compile(model, [tw.passes.SigmoidAttention()], rest="eager", strict=True)
        texts.append(compiled.generate(ids, **settings, **cache))
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])
    assert not torch.equal(texts[0], model.generate(ids, **settings)), "the pass must have changed something"
