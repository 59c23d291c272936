"""tune(): trains what passes declare and nothing else, keeps the best, survives a kill, refuses what makes no sense."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import tilewright as tw
from tilewright.frontend.tune import language_model_loss
from tilewright.passes import Exactness, Pass, Rewrite
from tilewright.passes.focus_attention import FocusAttention
from tilewright.passes.routing_transformer import RoutingTransformer
from tilewright.runtime import errors

VOCABULARY = 24


class Tiny(nn.Module):
    """A language model of one attention; its answers are far from its data's, so that there is something to learn."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.qkv = nn.Linear(16, 48)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        q, k, v = self.qkv(self.drop(self.embed(input_ids))).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(3 * q, k, v, is_causal=True)
        return 4 * self.head(mixed.transpose(1, 2).flatten(2))


def tokens(seed: int, length: int = 40) -> Tensor:
    return torch.randint(VOCABULARY, (2, length), generator=torch.Generator().manual_seed(seed))


DATA = [tokens(seed) for seed in range(5)]
FOCUS = FocusAttention(window=2, sinks=0, block_size=16, channels=4, keep=1, gate="weight")


@functools.cache
def _compiled(dropout: float, one: Pass, rest: str) -> tuple[Any, dict[str, Tensor]]:
    compiled = tw.compile(
        Tiny(dropout).train(dropout > 0),
        passes=[one],
        example_inputs=(tokens(99),),
        target="reference",
        rest=rest,
        strict=True,
        validate=False,
    )
    return compiled, parameters_of(compiled)


def compiled_of(dropout: float = 0.0, one: Pass = FOCUS, rest: str = "eager") -> Any:
    """A compiled model as if new: capturing it takes longer than tuning it."""
    compiled, start = _compiled(dropout, one, rest)
    compiled.original_model.train(dropout > 0)
    compiled.set_tuned(start)
    return compiled


def parameters_of(compiled: Any) -> dict[str, Tensor]:
    record = compiled.exported_program().record
    return {name: t.clone() for name, t in record.lowered.named_buffers() if name.startswith("tilewright_")}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_trains_the_declared_parameters_alone() -> None:
    """The best of the checked parameters stay, chosen by what the module really computes; the model is untouched."""
    compiled = compiled_of()
    model = compiled.original_model
    model.head.bias.requires_grad_(False)
    weights = {name: t.detach().clone() for name, t in model.state_dict().items()}
    before = parameters_of(compiled)
    # What the same model would say with other groups: there is something to learn, and it can be learnt.
    planted = {name: torch.randn(t.shape, generator=torch.Generator().manual_seed(5)) for name, t in before.items()}
    compiled.set_tuned(planted)
    with torch.no_grad():
        data = [{"input_ids": x, "labels": compiled(x).argmax(-1).roll(1, -1)} for x in DATA]
    compiled.set_tuned(before)

    def held_out() -> float:
        with torch.no_grad():
            losses = [language_model_loss(compiled(one["input_ids"]), one) for one in data]
        return float(torch.stack(losses).double().mean())

    start = held_out()
    result = tw.tune(compiled, data, "centroids", steps=30, lr=0.1, validation=data, check_every=5)
    after = parameters_of(compiled)
    assert len(after) == 2 and not any(torch.equal(before[name], after[name]) for name in after)
    assert result.checks[0] == (0, pytest.approx(start)) and result.best == min(loss for _, loss in result.checks)
    assert held_out() == pytest.approx(result.best) and result.best < start and result.best_step > 0
    assert result.finished and result.steps == len(result.losses) == 30 and set(result.names) == set(after)
    assert same(weights, dict(model.state_dict()))
    assert [p.requires_grad for p in model.parameters()] == [p is not model.head.bias for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    # A graph captured later, in another mode, has the tuned parameters too.
    compiled.original_model.train()
    assert same(parameters_of(compiled), after)
    model.head.bias.requires_grad_(True)


def test_resume_after_a_kill_changes_nothing(tmp_path: Path) -> None:
    """Killed between checkpoints, and stopped by the clock: the run that goes on ends bit for bit the same.

    In training mode, so that the dropout's random numbers have to be the same ones too.
    """

    def make() -> Any:
        return compiled_of(0.5)

    options: dict[str, Any] = {"steps": 12, "lr": 0.05, "check_every": 3, "accumulate": 2, "seed": 3}
    expected = tw.tune(make(), DATA, "centroids", **options)
    whole = parameters_of(_compiled(0.5, FOCUS, "eager")[0])
    folder, calls = tmp_path / "run", []

    def dies(output: Any, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return language_model_loss(output, batch)

    with pytest.raises(KeyboardInterrupt):
        tw.tune(make(), DATA, "centroids", checkpoint=folder, loss=dies, **options)
    assert json.loads((folder / "checkpoint.json").read_text())["progress"]["step"] == 3
    (folder / ".checkpoint.json.half").write_text("{")  # what a kill in the middle of a write leaves
    second = tw.tune(make(), DATA, "centroids", checkpoint=folder, seconds=1e-9, **options)
    assert second.steps == 4 and not second.finished
    resumed = make()
    result = tw.tune(resumed, DATA, "centroids", checkpoint=folder, **options)
    assert result.losses == expected.losses and result.checks == expected.checks
    assert same(parameters_of(resumed), whole)
    assert result.finished and result.total_seconds > result.seconds
    again = make()  # nothing is left to do, and the best parameters are put in place
    assert tw.tune(again, DATA, "centroids", checkpoint=folder, **options).losses == expected.losses
    assert same(parameters_of(again), whole)
    assert tw.tune(make(), DATA, "centroids", **(options | {"seed": 4})).losses != expected.losses


def test_checkpoints_of_other_runs_and_damage(tmp_path: Path) -> None:
    compiled = compiled_of()
    options: dict[str, Any] = {"steps": 2, "check_every": 1, "checkpoint": tmp_path}
    tw.tune(compiled, DATA, "centroids", **options)
    with pytest.raises(errors.TuningError, match="another data, lr: give another folder"):
        tw.tune(compiled, DATA[:2], "centroids", lr=0.5, **options)
    tw.tune(compiled, DATA[:2], "centroids", lr=0.5, resume=False, **options)
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(errors.TuningError, match="damaged"):
        tw.tune(compiled, DATA[:2], "centroids", lr=0.5, **options)
    (tmp_path / "checkpoint.json").write_text("{")
    with pytest.raises(errors.TuningError, match="damaged"):
        tw.tune(compiled, DATA[:2], "centroids", lr=0.5, **options)


def test_losses_that_are_not_finite_stop_it() -> None:
    compiled = compiled_of()
    before = parameters_of(compiled)
    with pytest.raises(errors.TuningError, match=r"nan at step 1.*lower lr"):
        tw.tune(compiled, DATA, "centroids", steps=3, loss=lambda output, batch: output.sum() * float("nan"))
    assert same(parameters_of(compiled), before)


def test_own_losses_see_output_and_batch() -> None:
    """labels are for the loss alone; a user's loss decides what is learnt."""
    compiled = compiled_of()
    seen = []

    def loss(output: Tensor, batch: dict[str, Any]) -> Tensor:
        seen.append((tuple(output.shape), sorted(batch)))
        return output.square().mean()

    data = [{"input_ids": x, "labels": x} for x in DATA]
    tw.tune(compiled, data, "centroids", steps=1, loss=loss)
    assert seen == [((2, 40, VOCABULARY), ["input_ids", "labels"])]
    ignored = torch.full_like(DATA[0], -100)
    ignored[:, 1] = 3
    result = tw.tune(compiled, [{"input_ids": DATA[0], "labels": ignored}], "centroids", steps=1)
    log = torch.log_softmax(Tiny()(DATA[0])[:, 0], -1)  # the first token attends to itself alone
    assert result.losses == [pytest.approx(float(-log[:, 3].mean()), rel=1e-5)]
    with pytest.raises(errors.BadArgument, match="one number"):
        tw.tune(compiled, DATA, "centroids", steps=1, loss=lambda output, batch: output)


def test_arguments_that_make_no_sense() -> None:
    compiled = compiled_of()
    refused: list[tuple[Any, dict[str, Any], str]] = [
        (DATA, {"parameters": "qk"}, "there are 'centroids'"),
        ([], {}, "data is empty"),
        (DATA[0], {}, "list of batches"),
        ((x for x in DATA), {}, "list of batches"),
        ([tokens(0).float()], {}, "captured with a 2-d int64"),
        ([{"ids": tokens(0)}], {}, "does not accept batch 0"),
        (DATA, {"steps": 0}, "steps is 0"),
        (DATA, {"lr": -1.0}, "lr is -1.0"),
        (DATA, {"seconds": 0}, "seconds is 0"),
        (DATA, {"validation": []}, "validation is empty"),
    ]
    for data, options, words in refused:
        with pytest.raises(errors.BadArgument, match=words):
            tw.tune(compiled, data, **{"parameters": "centroids", **options})
    with pytest.raises(errors.BadArgument, match=r"what tilewright\.compile\(\) returned, not a Tiny"):
        tw.tune(Tiny(), DATA, "centroids")
    with pytest.raises(errors.BadArgument, match="nor any others"):
        tw.tune(tw.compile(Tiny(), example_inputs=(DATA[0],), target="reference", rest="eager"), DATA, "centroids")
    with pytest.raises(errors.BadArgument, match="compile it with example_inputs"):
        tw.tune(tw.compile(Tiny(), passes=[FOCUS]), DATA, "centroids")


@dataclass(frozen=True)
class Scale(Pass):
    """A pass of a user: a learnt factor on the queries, the same form in training and after."""

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    ops: ClassVar[tuple[str, ...]] = ("attention",)

    def rewrite(self, site: Any) -> Rewrite:
        def build(builder: Any) -> Any:
            factor = builder.parameter(f"{site.site.id}_factor", torch.ones(1, 2, 1, 1), group="scale")
            q = builder.call(torch.ops.aten.mul.Tensor, site.arg("q"), factor)
            return site.changed(q=q)(builder)

        return Rewrite(build)


@pytest.mark.grid
def test_users_passes_and_inductor(fresh_dynamo: None, tmp_path: Path) -> None:
    """What Inductor compiled before tuning computes with the tuned parameters after it, and so does a saved copy."""
    compiled = compiled_of(one=Scale(), rest="inductor")
    x = DATA[0]
    with torch.no_grad():
        before = compiled(x)
    result = tw.tune(compiled, DATA[:1], "scale", steps=10, lr=0.03, optimizer=torch.optim.Adam)
    assert result.losses[-1] < result.losses[0]
    with torch.no_grad():
        after = compiled(x)
    assert float((after - before).abs().max()) > 0.01
    lowered = compiled.exported_program().record.lowered
    torch.testing.assert_close(after, lowered(x)[0], rtol=1e-4, atol=1e-4)
    tw.save(compiled, tmp_path / "tuned.tw")
    loaded = tw.load(tmp_path / "tuned.tw")
    with torch.no_grad():
        torch.testing.assert_close(loaded.program.lowered(x)[0], lowered(x)[0])
    with pytest.raises(errors.BadArgument, match="not a LoadedModule"):
        tw.tune(loaded, DATA, "scale")


def test_running_means_without_gradients() -> None:
    """Online k-means: tuning moves the centroids towards their tokens and trains nothing."""
    one = RoutingTransformer(clusters=2, window=2, decay=0.5, block_size=16)
    compiled = compiled_of(one=one)
    before = parameters_of(compiled)
    result = tw.tune(compiled, DATA, "centroids", steps=10)
    after = parameters_of(compiled)
    assert len(after) == 1 and not same(before, after) and result.finished
    offsets = compiled_of(one=FocusAttention(window=2, sinks=0, block_size=16, channels=4, balance="running"))
    tw.tune(offsets, DATA, "centroids", steps=3)
    moved = [t for name, t in parameters_of(offsets).items() if name.endswith("offsets")]
    assert len(moved) == 1 and float(moved[0].abs().max()) > 0


def test_bar_and_log(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich draws bars on terminals only
    compiled = compiled_of()
    with caplog.at_level("INFO", logger="tilewright.tune"):
        tw.tune(compiled, DATA, "centroids", steps=2, check_every=1, progress=True)
    assert "tuning centroids" in capsys.readouterr().err
    assert [record.getMessage()[:6] for record in caplog.records] == ["step 1", "step 2"]
