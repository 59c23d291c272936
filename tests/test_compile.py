"""Door one: torch.export, and what a compiled module is to its user."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from tiny import Breaks, Mlp, bert, llama, tokens

import tilewright as tw
from tilewright.runtime import errors


def same_state(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_outputs_type_and_lengths(attn: str) -> None:
    model = llama(attn)
    before = copy.deepcopy(model.state_dict())
    compiled = tw.compile(model, example_kwargs={"input_ids": tokens(), "use_cache": False}, rest="eager")
    assert compiled.report.to_dict()["capture"]["door"] == "export"
    assert len(compiled.records) == 1
    for shape in [(2, 7), (1, 7), (3, 20), (1, 1), (5, 2)]:
        ids = tokens(*shape)
        got, want = compiled(input_ids=ids, use_cache=False), model(input_ids=ids, use_cache=False)
        assert type(got) is type(want)
        torch.testing.assert_close(got.logits, want.logits, rtol=1e-5, atol=1e-5)
    assert len(compiled.records) == 1, "a new length must not capture again"
    assert same_state(model, before)


def test_batch_of_one_stays_dynamic() -> None:
    model = bert()
    ids = tokens(1, 9)
    mask = torch.ones_like(ids)
    compiled = tw.compile(model, example_inputs=(ids,), example_kwargs={"attention_mask": mask}, rest="eager")
    ids = tokens(4, 13)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    want = model(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(compiled(ids, attention_mask=mask).last_hidden_state, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        compiled(input_ids=ids, attention_mask=mask).last_hidden_state, want, rtol=1e-5, atol=1e-5
    )


def test_inductor_runs_the_rest() -> None:
    model = bert(layers=1)
    ids = tokens()
    compiled = tw.compile(model, example_inputs=(ids,))
    for length in (7, 11):
        ids = tokens(2, length)
        with torch.no_grad():
            got, want = compiled(ids), model(ids)
        torch.testing.assert_close(got.last_hidden_state, want.last_hidden_state, rtol=1e-5, atol=1e-5)


def test_a_cache_in_the_output() -> None:
    model = llama()
    compiled = tw.compile(model, example_kwargs={"input_ids": tokens()}, rest="eager")
    got, want = compiled(input_ids=tokens()), model(input_ids=tokens())
    assert type(got.past_key_values) is type(want.past_key_values)
    assert got.past_key_values.get_seq_length() == 7


def test_weights_are_shared_and_tied_ones_stay_tied() -> None:
    model = llama(tie_word_embeddings=True)
    compiled = tw.compile(model, example_kwargs={"input_ids": tokens(), "use_cache": False}, rest="eager")
    assert {id(p) for p in compiled.parameters()} == {id(p) for p in model.parameters()}
    assert list(compiled.state_dict()) == list(model.state_dict())
    lowered = compiled.records[0].lowered
    assert {id(p) for p in lowered.parameters()} <= {id(p) for p in model.parameters()}
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    ids = tokens()
    torch.testing.assert_close(
        compiled(input_ids=ids, use_cache=False).logits, model(input_ids=ids, use_cache=False).logits
    )


def test_training_matches_eager() -> None:
    model = llama().train()
    ids = tokens()
    call = {"input_ids": ids, "labels": ids, "use_cache": False}
    model(**call).loss.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    compiled = tw.compile(model, example_kwargs=call, rest="eager")
    compiled(**call).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], rtol=1e-4, atol=1e-6)


def test_modes_have_their_own_graph() -> None:
    model = Mlp().train()
    x = torch.randn(6, 8)
    before = copy.deepcopy(model.state_dict())
    compiled = tw.compile(model, example_inputs=(x,), rest="eager")
    assert same_state(model, before), "compiling must not move batch norm statistics"
    compiled(x)
    assert int(model.norm.num_batches_tracked) == 1
    compiled.eval()
    assert not model.training
    torch.testing.assert_close(compiled(x)["y"], model(x)["y"])
    compiled.train()
    torch.manual_seed(3)
    got = compiled(x)["y"]
    torch.manual_seed(3)
    torch.testing.assert_close(got, model(x)["y"])


def test_autocast_and_half_precision() -> None:
    model = llama()
    call = {"input_ids": tokens(), "use_cache": False}
    compiled = tw.compile(model, example_kwargs=call, rest="eager")
    with torch.autocast("cpu", torch.bfloat16):
        got, want = compiled(**call).logits, model(**call).logits
    exact = model(**call).logits
    assert got.dtype == want.dtype == torch.bfloat16
    assert_no_further(got, want, exact)
    torch.testing.assert_close(compiled(**call).logits, model(**call).logits, rtol=1e-5, atol=1e-5)
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(model).to(dtype)
        compiled = tw.compile(half, example_kwargs=call, rest="eager")
        got, want = compiled(**call).logits, half(**call).logits
        assert got.dtype == dtype
        assert_no_further(got, want, exact)


def assert_no_further(got: torch.Tensor, want: torch.Tensor, exact: torch.Tensor) -> None:
    """In half precision ``got`` is about as far from the float32 result as the eager model's ``want`` is."""
    own = (want - exact).norm()
    assert 0 < own < 0.1 * exact.norm()
    assert (got - exact).norm() < 1.5 * own


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes(guard: type) -> None:
    model = llama()
    call = {"input_ids": tokens(), "use_cache": False}
    compiled = tw.compile(model, example_kwargs=call, rest="eager")
    with guard():
        got = compiled(**call).logits
        want = model(**call).logits
        assert got.requires_grad == want.requires_grad
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_signature_is_the_models() -> None:
    model = llama()
    compiled = tw.compile(model, example_kwargs={"input_ids": tokens(), "use_cache": False}, rest="eager")
    assert inspect.signature(compiled.forward) == inspect.signature(model.forward)
    assert compiled.config is model.config


def test_falls_back_to_dynamo_and_says_why() -> None:
    model, x = Breaks(), torch.randn(3, 4)
    with pytest.warns(errors.TilewrightWarning, match="torch.export failed"):
        compiled = tw.compile(model, example_inputs=(x,), rest="eager")
    capture = compiled.report.to_dict()["capture"]
    assert capture["door"] == "dynamo"
    assert "GuardOnDataDependent" in capture["fallback_reason"]
    assert len(capture["graph_breaks"]) >= 1
    source = capture["graph_breaks"][0]["source"]
    assert source.rsplit(":", 1)[0].endswith("tiny.py")
    assert "if y.sum() > 0" in open(source.rsplit(":", 1)[0]).read().splitlines()[int(source.rsplit(":", 1)[1]) - 1]
    torch.testing.assert_close(compiled(x), model(x))


def test_calls_outside_the_capture_are_refused() -> None:
    model, x = Mlp(), torch.randn(3, 8)
    model.eval()
    compiled = tw.compile(model, example_inputs=(x,), rest="eager")
    assert compiled(x, scale=1.0)["y"].shape == (3, 8)
    for bad, match in [
        (lambda: compiled(x, scale=2.0), "captured without 'scale'"),
        (lambda: compiled(x.double()), "float64"),
        (lambda: compiled(x[0]), "1-d"),
        (lambda: compiled(torch.randn(3, 9)), "needs 8"),
    ]:
        with pytest.raises(errors.BadArgument, match=match):
            bad()


def test_fixed_dynamic_shapes_are_respected() -> None:
    model, x = Mlp().eval(), torch.randn(3, 8)
    compiled = tw.compile(model, example_inputs=(x,), dynamic_shapes=({0: None, 1: None},), rest="eager")
    with pytest.raises(errors.BadArgument, match="needs 3"):
        compiled(torch.randn(4, 8))


class Add(torch.nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"model": "nonsense"}, errors.BadArgument),
        ({"example_inputs": torch.ones(2)}, errors.BadExampleInputs),
        ({"example_inputs": (torch.ones(2),)}, errors.BadExampleInputs),
        ({"example_inputs": (torch.ones(2), torch.ones(3))}, errors.BadExampleInputs),
        ({"example_inputs": (torch.ones(2), torch.ones(2)), "example_kwargs": {"z": 1}}, errors.BadExampleInputs),
        ({"target": "gpu"}, errors.BadArgument),
        ({"rest": "jit"}, errors.BadArgument),
        ({"passes": "no-such-pass"}, errors.UnknownPass),
        ({"passes": "two-pass-softmax{foo=1}"}, errors.BadPassOption),
        ({"passes": [object()]}, errors.BadPassOption),
        ({"passes": [tw.passes.TwoPassSoftmax]}, errors.BadPassOption),
        ({"passes": tw.passes.TwoPassSoftmax()}, errors.BadArgument),
        ({"passes": [tw.passes.TwoPassSoftmax(), tw.passes.TwoPassSoftmax()]}, errors.IllegalPassCombination),
        ({"passes": "sigmoid-attention{bias=calibrated}"}, errors.CalibrationNeeded),
        ({"calibration": [3]}, errors.BadArgument),
        ({"dynamic_shapes": {}}, errors.BadArgument),
    ],
)
def test_bad_arguments(arguments: dict, error: type[Exception]) -> None:
    model = Add()
    with pytest.raises(error):
        tw.compile(**({"model": model} | arguments))


def test_compiling_twice_is_refused() -> None:
    compiled = tw.compile(Add())
    with pytest.raises(errors.BadArgument, match="compiled already"):
        tw.compile(compiled)


def test_strict_raises_when_nothing_changed() -> None:
    with pytest.raises(errors.PassChangedNothing, match="two-pass-softmax"):
        tw.compile(Add(), [tw.passes.TwoPassSoftmax()], (torch.ones(2), torch.ones(2)), strict=True)
    compiled = tw.compile(Add(), [tw.passes.TwoPassSoftmax()], strict=True, rest="eager")
    with pytest.raises(errors.PassChangedNothing):
        compiled(torch.ones(2), torch.ones(2))


class Dropped(torch.nn.Module):
    """Attention whose dropout is active in training: another function at every call."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        weights = torch.nn.functional.dropout((q @ k.transpose(-2, -1)).softmax(-1), 0.1, self.training)
        return weights @ v


def test_a_pass_tells_what_raising_left_alone() -> None:
    inputs = tuple(torch.randn(2, 4, 6, 8) for _ in range(3))
    compiled = tw.compile(Dropped().train(), [tw.passes.SigmoidAttention()], inputs, rest="eager")
    row = compiled.report.to_dict()["passes"][0]
    assert not row["matched"]
    assert any("dropout" in site["reason"] for site in row["declined"] + row["near_misses"])
    with pytest.raises(errors.PassChangedNothing, match="dropout"):
        tw.compile(Dropped().train(), [tw.passes.SigmoidAttention()], inputs, rest="eager", strict=True)


class BreaksInTraining(Breaks):
    """With batch norm in front."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.norm(x))


def test_the_fallback_leaves_the_model_as_it_was() -> None:
    model, x = BreaksInTraining().train(), torch.randn(5, 4)
    before = copy.deepcopy(model.state_dict())
    random = torch.random.get_rng_state()
    compiled = tw.compile(model, example_inputs=(x,), rest="eager")
    assert compiled.door == "dynamo" and compiled.records
    assert same_state(model, before)
    assert torch.equal(torch.random.get_rng_state(), random)
    compiled(x)
    assert int(model.norm.num_batches_tracked) == 1


class Branches(torch.nn.Module):
    """Does something else for one row: export cannot see that from two."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[0] == 1 else x * 3


def test_sizes_of_one_are_compared_with_the_model() -> None:
    model = Branches()
    compiled = tw.compile(model, example_inputs=(torch.ones(4, 3),), rest="eager")
    assert torch.equal(compiled(torch.ones(2, 3)), torch.full((2, 3), 3.0))
    with pytest.raises(errors.BadArgument, match="x has size 1 in dim 0"):
        compiled(torch.ones(1, 3))
    assert torch.equal(compiled(torch.ones(2, 1)), torch.full((2, 1), 3.0))
    # A batch of one given as the example is not doubled when that would capture the other branch.
    compiled = tw.compile(model, example_inputs=(torch.ones(1, 3),), rest="eager")
    assert torch.equal(compiled(torch.ones(1, 3)), torch.full((1, 3), 2.0))
    with pytest.raises(errors.BadArgument):
        compiled(torch.ones(2, 3))
