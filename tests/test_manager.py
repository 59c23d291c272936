"""The pass manager on graphs of canonical ops, with passes as a user would write them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from tilewright.frontend.capture import copy_module, export_model
from tilewright.passes.base import Decline, Exactness, NearMiss, Needs, Pass, Rewrite, SiteContext
from tilewright.passes.execute import run
from tilewright.passes.manager import check_needs, contribution, run_pass, sort_passes, validate
from tilewright.passes.metrics import identical, language_model_error, tensor_error, within
from tilewright.passes.site import name_site, set_site
from tilewright.runtime import errors
from tilewright.runtime.ops import Tolerance


class Norms(torch.nn.Module):
    """Three rms_norm sites in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList([torch.nn.Parameter(torch.rand(8) + 0.5) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight in self.weights:
            x = torch.ops.tilewright.rms_norm(x, weight, 1e-6) + 1
        return x


def graph() -> torch.fx.GraphModule:
    torch.manual_seed(0)
    module = export_model(Norms(), (torch.randn(2, 8),), {}).module
    taken: set[str] = set()
    for node in module.graph.nodes:
        if "rms_norm" in str(node.target):
            set_site(node, name_site(node, "rms_norm", taken))
    return module


X = torch.linspace(-2, 2, 24).reshape(3, 8)


@dataclass(frozen=True)
class Same(Pass):
    """Rebuilds the op as it is."""

    exactness: ClassVar[Exactness] = Exactness.EXACT
    ops: ClassVar[tuple[str, ...]] = ("rms_norm",)

    def rewrite(self, site: SiteContext) -> Rewrite | Decline | NearMiss:
        return Rewrite(site.changed(), {"eps": site.arg("eps")})


@dataclass(frozen=True)
class Coarser(Pass):
    """Adds to eps at the sites after the first."""

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    ops: ClassVar[tuple[str, ...]] = ("rms_norm",)
    more: float = 0.5

    def rewrite(self, site: SiteContext) -> Rewrite | Decline | NearMiss:
        if not site.site.id.endswith(("#2", "#3")):
            return Decline("the first stays as it is")
        return Rewrite(site.changed(eps=site.arg("eps") + self.more))


def liar(of: Exactness) -> Pass:
    @dataclass(frozen=True)
    class Liar(Coarser):
        """Says it is exact."""

        exactness: ClassVar[Exactness] = of

    return Liar()


def test_exact_pass_is_validated_bit_for_bit() -> None:
    module = graph()
    done = run_pass(module, Same(), copy_module)
    validate(done, [X])
    assert [r.error["max_abs"] for r in done.rewrites] == [0.0, 0.0, 0.0]
    assert len({r.site.id for r in done.rewrites}) == 3
    assert done.rewrites[0].details == {"eps": 1e-6}
    assert torch.equal(run(module, [X])[0], run(done.before, [X])[0])


def test_approximate_pass_is_measured_per_site() -> None:
    module = graph()
    done = run_pass(module, Coarser(), copy_module)
    assert [(site.op, reason) for site, reason in done.declined] == [("rms_norm", "the first stays as it is")]
    validate(done, [X])
    assert len(done.rewrites) == 2
    # Each site is measured on the values it sees in the unchanged model, so by hand:
    values = {}
    seen = X
    for index, weight in enumerate(p for _, p in sorted(module.named_parameters())):
        before = torch.ops.tilewright.rms_norm(seen, weight, 1e-6)
        after = torch.ops.tilewright.rms_norm(seen, weight, 0.5 + 1e-6)
        values[index] = float((after - before).double().norm() / before.double().norm())
        seen = before + 1
    assert done.rewrites[0].error["rel_l2"] == pytest.approx(values[1], rel=1e-5)
    assert done.rewrites[1].error["rel_l2"] == pytest.approx(values[2], rel=1e-5)


@pytest.mark.parametrize("exactness", [Exactness.EXACT, Exactness.REASSOCIATED])
def test_a_pass_that_lies_is_caught(exactness: Exactness) -> None:
    done = run_pass(graph(), liar(exactness), copy_module)
    with pytest.raises(errors.ValidationError, match=exactness.value):
        validate(done, [X])


def test_contribution_changes_one_site_only() -> None:
    module = graph()
    done = run_pass(module, Coarser(), copy_module)
    base = run(done.before, [X])[0]
    single = [contribution(done, rewrite, [X])[0] for rewrite in done.rewrites]
    both = run(module, [X])[0]
    assert not torch.allclose(single[0], base) and not torch.allclose(single[1], base)
    assert not torch.allclose(single[0], both) and not torch.allclose(single[1], both)


@dataclass(frozen=True)
class Doubled(Pass):
    """Wraps the op instead of replacing it."""

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    ops: ClassVar[tuple[str, ...]] = ("rms_norm",)

    def rewrite(self, site: SiteContext) -> Rewrite | Decline | NearMiss:
        return Rewrite(lambda b: b.call(torch.ops.aten.mul.Tensor, site.node, 2.0))


def test_a_replacement_may_wrap_what_it_replaces() -> None:
    module = graph()
    done = run_pass(module, Doubled(), copy_module)
    validate(done, [X])
    assert [r.error["rel_l2"] for r in done.rewrites] == pytest.approx([1.0, 1.0, 1.0])
    weights = [p for _, p in sorted(module.named_parameters())]
    seen = X
    for weight in weights:
        seen = 2 * torch.ops.tilewright.rms_norm(seen, weight, 1e-6) + 1
    torch.testing.assert_close(run(module, [X])[0], seen.detach())


@dataclass(frozen=True)
class Calibrated(Pass):
    """Adds the largest input it saw, as a buffer."""

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    needs: ClassVar[Needs] = Needs.CALIBRATION
    ops: ClassVar[tuple[str, ...]] = ("rms_norm",)

    def observe(self, site: SiteContext, values: Mapping[str, Any]) -> None:
        site.state["peak"] = max(site.state.get("peak", -math.inf), float(values["x"].max()))

    def rewrite(self, site: SiteContext) -> Rewrite | Decline | NearMiss:
        def build(builder: Any) -> torch.fx.Node:
            normed = site.changed()(builder)
            peak = builder.constant("peak", torch.tensor(site.state["peak"]))
            return builder.call(torch.ops.aten.add.Tensor, normed, peak)

        return Rewrite(build, {"peak": site.state["peak"]})


def test_calibration_streams_real_values() -> None:
    module = graph()
    done = run_pass(module, Calibrated(), copy_module, [[X], [X * 10]])
    assert done.rewrites[0].details["peak"] == 20.0
    validate(done, [X])
    assert done.rewrites[0].error["max_abs"] == pytest.approx(20.0)
    first = dict(module.named_parameters())["weights.0"]
    seen = [torch.ops.tilewright.rms_norm(batch, first, 1e-6) + 1 for batch in (X, X * 10)]
    assert done.rewrites[1].details["peak"] == pytest.approx(max(float(batch.max()) for batch in seen))
    with pytest.raises(errors.CalibrationNeeded, match="calibrated"):
        check_needs([Calibrated()], [])


@dataclass(frozen=True)
class Wrong(Pass):
    """Answers with another dtype."""

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    ops: ClassVar[tuple[str, ...]] = ("rms_norm",)

    def rewrite(self, site: SiteContext) -> Rewrite | Decline | NearMiss:
        return Rewrite(lambda b: b.call(torch.ops.aten.to.dtype, site.node.args[0], torch.float64))


@dataclass(frozen=True)
class Silent(Pass):
    """Forgets to decide."""

    exactness: ClassVar[Exactness] = Exactness.EXACT
    ops: ClassVar[tuple[str, ...]] = ("rms_norm",)

    def rewrite(self, site: SiteContext) -> Any:
        return None


@pytest.mark.parametrize(("one", "match"), [(Wrong(), "float64"), (Silent(), "returned None")])
def test_broken_passes_are_named(one: Pass, match: str) -> None:
    with pytest.raises(errors.BadPass, match=match):
        run_pass(graph(), one, copy_module)


@dataclass(frozen=True)
class First(Pass):
    exactness: ClassVar[Exactness] = Exactness.EXACT
    provides: ClassVar[frozenset[str]] = frozenset({"factored"})


@dataclass(frozen=True)
class Second(Pass):
    exactness: ClassVar[Exactness] = Exactness.EXACT
    requires: ClassVar[frozenset[str]] = frozenset({"factored"})
    why: ClassVar[Mapping[str, str]] = {"factored": "rounding destroys the low rank"}


@dataclass(frozen=True)
class Third(Pass):
    exactness: ClassVar[Exactness] = Exactness.EXACT
    conflicts: ClassVar[frozenset[str]] = frozenset({"factored"})
    why: ClassVar[Mapping[str, str]] = {"factored": "both own the keys"}


@dataclass(frozen=True)
class Round(Pass):
    exactness: ClassVar[Exactness] = Exactness.EXACT
    requires: ClassVar[frozenset[str]] = frozenset({"about"})


@dataclass(frozen=True)
class About(Pass):
    exactness: ClassVar[Exactness] = Exactness.EXACT
    requires: ClassVar[frozenset[str]] = frozenset({"round"})


def test_passes_are_sorted_and_refused_in_a_sentence() -> None:
    assert [p.name for p in sort_passes([Second(), Same(), First()])] == ["same", "first", "second"]
    assert [p.name for p in sort_passes([Same(), Coarser()])] == ["same", "coarser"]
    for passes, match in [
        ([Second()], "second needs factored.*rounding destroys"),
        ([First(), Third()], "third cannot go with first: both own the keys"),
        ([Same(), Same()], "same is listed twice"),
        ([Round(), About()], "circle"),
    ]:
        with pytest.raises(errors.IllegalPassCombination, match=match):
            sort_passes(passes)


def test_metrics() -> None:
    a = torch.tensor([1.0, float("nan"), float("inf"), 2.0])
    assert tensor_error(a, a) == {"max_abs": 0.0, "rel_l2": 0.0, "sqnr_db": math.inf}
    assert identical(a, a) and not identical(a, a + 1)
    off = a.clone()
    off[0] = 1.1
    error = tensor_error(off, a)
    assert error["max_abs"] == pytest.approx(0.1, rel=1e-5)
    assert error["rel_l2"] == pytest.approx(0.1 / math.sqrt(5), rel=1e-5)
    assert error["sqnr_db"] == pytest.approx(-20 * math.log10(0.1 / math.sqrt(5)), rel=1e-5)
    assert tensor_error(torch.ones(1), torch.tensor([math.nan]))["max_abs"] == math.inf
    assert within(off, a, Tolerance(0.11, 0)) and not within(off, a, Tolerance(0.09, 0))


def test_language_model_error_against_a_formula() -> None:
    torch.manual_seed(0)
    before, after = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    ids = torch.randint(0, 7, (2, 5))
    result = language_model_error(after, before, ids)
    p, q = before.double().softmax(-1), after.double().softmax(-1)
    assert result["kl"] == pytest.approx(float((p * (p.log() - q.log())).sum(-1).mean()), rel=1e-5)
    loss = torch.nn.functional.cross_entropy(after[:, :-1].reshape(-1, 7), ids[:, 1:].reshape(-1))
    assert result["perplexity_after"] == pytest.approx(float(loss.exp()), rel=1e-5)
    assert result["top1_agreement"] == pytest.approx(float((before.argmax(-1) == after.argmax(-1)).float().mean()))
    same = language_model_error(before, before, ids)
    assert same["kl"] == pytest.approx(0, abs=1e-6) and same["tokens_worse"] == 0
