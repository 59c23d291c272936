"""Autotuning with a clock and a timer of our own: bounded, interleaved, the default unless something beats it."""

from __future__ import annotations

import json

import pytest
import runtime_toy
from runtime_toy import ToySpec

from tilewright.codegen import spec as spec_module
from tilewright.runtime import autotune, cache, errors, load, settings, targets


class Bench:
    """A world where a launch of block b takes ``seconds[b]`` and nothing else takes any time but building."""

    def __init__(self, seconds: dict[int, float], build: float = 0.0) -> None:
        self.seconds, self.build, self.now = seconds, build, 0.0
        self.order: list[int] = []
        self.inputs = 0

    def clock(self) -> float:
        return self.now

    def timer(self, kernel, inputs) -> float:
        block = kernel.spec.block
        self.order.append(block)
        self.now += self.seconds[block]
        return self.seconds[block]

    def loader(self, spec, target):
        self.now += self.build
        return load.load(spec, target)

    def make_inputs(self):
        self.inputs += 1
        return ("x",)

    def tune(self, spec=None, budget=1.0) -> autotune.Tuning:
        spec = spec or ToySpec()
        hooks = {"timer": self.timer, "clock": self.clock, "loader": self.loader}
        return autotune.tune(spec, "counting", self.make_inputs, budget, **hooks)


@pytest.fixture(autouse=True)
def toys(fresh_cache, monkeypatch):
    monkeypatch.setattr(load, "render", runtime_toy.toy_text)
    monkeypatch.setitem(targets._targets, "counting", runtime_toy.CountingTarget())
    monkeypatch.setitem(spec_module.SPECS, "toy", ToySpec)
    autotune.forget()
    with settings.override(autotune=True):
        yield
    autotune.forget()


SECONDS = {64: 0.003, 128: 0.002, 256: 0.004}


def test_the_fastest_wins_in_interleaved_rounds():
    bench = Bench(SECONDS)
    tuning = bench.tune()
    assert (tuning.winner, tuning.why, tuning.medians) == (ToySpec(128), "tuned", (0.003, 0.002, 0.004))
    assert tuning.rounds == autotune.MAX_ROUNDS and bench.inputs == 1
    assert bench.order == [64, 128, 256] * autotune.MAX_ROUNDS


def test_the_median_decides_not_the_best_run():
    class Noisy(Bench):
        def timer(self, kernel, inputs):
            time = super().timer(kernel, inputs)
            return 1e-6 if kernel.spec.block == 256 and len(self.order) == 3 else time  # one lucky run

    assert Noisy(SECONDS).tune().winner == ToySpec(128)


def test_noise_does_not_replace_the_default():
    assert Bench({64: 0.00300, 128: 0.00299, 256: 0.004}).tune().winner == ToySpec(64)


def test_the_budget_holds():
    bench = Bench(SECONDS)
    tuning = bench.tune(budget=0.02)  # a round takes 0.009
    assert tuning.rounds == 3 and bench.now <= 0.02 + 0.009
    assert tuning.winner == ToySpec(128)


@pytest.mark.parametrize(
    ("bench", "said"), [(Bench(SECONDS, build=0.5), "built"), (Bench(dict.fromkeys(SECONDS, 0.7)), "timed")]
)
def test_out_of_time_ships_the_default_and_keeps_nothing(bench, said, fresh_cache):
    tuning = bench.tune()
    assert tuning.winner == ToySpec(64) and said in tuning.why
    assert not list(fresh_cache.glob("tuning/*"))


def test_off_or_without_a_device_nothing_is_timed(monkeypatch):
    bench = Bench(SECONDS)
    with settings.override(autotune=False):
        tuning = bench.tune()
        assert tuning.winner == ToySpec(64) and "TILEWRIGHT_AUTOTUNE" in tuning.why
    monkeypatch.setattr(runtime_toy.CountingTarget, "device", lambda self: None)
    tuning = bench.tune()  # turned on again: decided anew
    assert tuning.winner == ToySpec(64) and "no device" in tuning.why
    assert bench.order == [] and bench.inputs == 0
    assert autotune.tune(ToySpec(), "triton-interpret", bench.make_inputs).winner == ToySpec(64)
    assert bench.inputs == 0


def test_the_winner_is_kept_for_this_and_the_next_process(fresh_cache):
    first = Bench(SECONDS)
    first.tune()
    second = Bench({64: 1e-9, 128: 1.0, 256: 1.0})
    assert second.tune().why == "tuned" and second.order == []  # from memory
    autotune.forget()
    stored = second.tune()
    assert (stored.winner, stored.why, stored.medians) == (ToySpec(128), "stored", (0.003, 0.002, 0.004))
    assert second.order == []
    (path,) = fresh_cache.glob("tuning/*.json")
    data = json.loads(path.read_text())
    assert data["device"] == "toy device" and data["winner"]["block"] == 128


def test_a_decision_is_made_once(monkeypatch):
    bench = Bench(dict.fromkeys(SECONDS, 0.7))
    late = bench.tune()
    assert "timed" in late.why and len(bench.order) == 2

    def never(self, target):
        raise AssertionError("the candidates of a decided spec were asked for again")

    monkeypatch.setattr(ToySpec, "candidates", never)
    assert bench.tune() is late and len(bench.order) == 2  # a budget that was spent is not spent again
    kernel = autotune.load_best(ToySpec(), "counting", bench.make_inputs)
    assert kernel is load.load(ToySpec(64), "counting")


def test_another_spec_device_or_toolchain_is_timed_again(monkeypatch):
    Bench(SECONDS).tune()
    assert Bench(SECONDS).tune(ToySpec(note="b")).why == "tuned"
    autotune.forget()
    monkeypatch.setattr(runtime_toy.CountingTarget, "device", lambda self: "another device")
    assert Bench(SECONDS).tune().why == "tuned"
    autotune.forget()
    monkeypatch.setitem(targets._targets, "counting", runtime_toy.CountingTarget("2"))
    assert Bench(SECONDS).tune().why == "tuned"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"winner": {"kind": "toy", "block": 99, "note": "a"}, "medians": [], "rounds": 1}']
)
def test_a_damaged_result_is_made_again(fresh_cache, text):
    Bench(SECONDS).tune()
    (path,) = fresh_cache.glob("tuning/*.json")
    path.write_text(text)
    autotune.forget()
    assert Bench(SECONDS).tune().why == "tuned"
    assert json.loads(path.read_text())["winner"]["block"] == 128


def test_a_candidate_that_fails_is_left_out():
    class Failing(Bench):
        def loader(self, spec, target):
            if spec.block == 128:
                raise errors.BuildError("too much shared memory")
            return super().loader(spec, target)

    tuning = Failing(SECONDS).tune()
    assert tuning.winner == ToySpec(64) and tuning.medians == (0.003, None, 0.004)
    assert tuning.failures == {1: "BuildError: too much shared memory"}

    class Broken(Bench):
        def loader(self, spec, target):
            raise RuntimeError("out of memory")

    tuning = Broken(SECONDS).tune(ToySpec(note="b"))
    assert tuning.winner == ToySpec(64, "b") and tuning.why == "no candidate could be launched"

    class Defect(Bench):
        def loader(self, spec, target):
            raise KeyError("a mistake of ours")

    with pytest.raises(KeyError):
        Defect(SECONDS).tune(ToySpec(note="c"))


def test_bad_arguments(monkeypatch):
    for budget in (0, -1.0, float("nan")):
        with pytest.raises(errors.BadArgument, match="budget"):
            Bench(SECONDS).tune(budget=budget)
    monkeypatch.setattr(ToySpec, "candidates", lambda self, target: [])
    with pytest.raises(errors.BadArgument, match="no candidates"):
        Bench(SECONDS).tune()


def test_an_unusable_cache_costs_the_next_process_only(tmp_path):
    (tmp_path / "file").write_text("")
    with settings.override(cache_dir=tmp_path / "file" / "cache"), pytest.warns(errors.TilewrightWarning):
        assert Bench(SECONDS).tune().winner == ToySpec(128)
    cache._private.clear()


def test_cpu_launches_are_timed_by_the_clock():
    kernel = load.load(ToySpec(), "counting")
    assert autotune.time_launch(kernel, (1,)) > 0
