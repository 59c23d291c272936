"""Thin keys: the factors against their definition, and compiled models against eager ones with the same product."""

from __future__ import annotations

import copy
import functools
import math

import decoders
import pytest
import tiny
import torch
from torch import Tensor, nn

import tilewright as tw
from tilewright.benchmarks.thin_keys import WholeKeys
from tilewright.frontend.capture import copy_module, export_model
from tilewright.frontend.raising import raise_graph
from tilewright.passes import Exactness, FactorKeys, KVCache, SigmoidAttention
from tilewright.passes._key_factors import KeyStatistics, RotateBack, decompose, spread
from tilewright.passes._key_projection import find_projection
from tilewright.passes.manager import PassRun, run_pass
from tilewright.passes.view import arguments
from tilewright.runtime import errors
from tilewright.runtime.ops import OPS, rope


def positive(size: int, seed: int, *lead: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*lead, 3 * size, size, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(0, -2, size, dtype=torch.float64)
    return x.mT @ x


# ---------------------------------------------------------------------------------------------------------- the factors


def weighted_error(second: Tensor, weight: Tensor, down: Tensor, up: Tensor) -> float:
    error = torch.eye(len(second), dtype=torch.float64) - up.flatten(0, 1) @ down
    return float((torch.block_diag(*weight) @ error @ second * error).sum())


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_factors_are_the_best_of_their_rank(rank):
    second, weight = positive(8, 1), positive(4, 2, 2)
    found = decompose(second, weight, heads=2, dim=4)
    down, up = found.factors(rank)
    assert down.shape == (rank, 8) and up.shape == (2, 4, rank)
    least = weighted_error(second, weight, down, up)
    assert least == pytest.approx(found.lost(rank), rel=1e-6)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        moved = [t + 1e-3 * t.abs().mean() * torch.randn(t.shape, generator=generator).double() for t in (down, up)]
        assert weighted_error(second, weight, *moved) >= least * (1 - 1e-9)
    assert found.kept(rank) == pytest.approx(1 - least / weighted_error(second, weight, down * 0, up), rel=1e-6)


def test_full_rank_loses_nothing_and_energy_names_the_rank():
    found = decompose(positive(8, 1), positive(4, 2, 2), heads=2, dim=4)
    down, up = found.factors(8)
    torch.testing.assert_close(up.flatten(0, 1) @ down, torch.eye(8, dtype=torch.float64))
    for energy in (0.5, 0.9, 0.999):
        rank = found.rank_for(energy)
        assert found.kept(rank) >= energy and (rank == 1 or found.kept(rank - 1) < energy)
    assert found.rank_for(1.0) == 8


def attention_of(length: int = 12) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """keys (L, 8), q (4, L, 4), softmax weights (4, L, L), cos and sin (L, 4)."""
    generator = torch.Generator().manual_seed(3)
    keys, q = torch.randn(length, 8, generator=generator), torch.randn(4, length, 4, generator=generator)
    angles = torch.arange(length)[:, None] * torch.tensor([1.0, 0.1])
    cos, sin = (torch.cat((f, f), -1) for f in (angles.cos(), angles.sin()))
    turned = rope.reference(keys.unflatten(1, (2, 4)).transpose(0, 1), cos, sin)
    scores = q @ turned.repeat_interleave(2, 0).mT
    weights = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf).softmax(-1)
    return keys, q, weights, cos, sin


def test_the_statistics_are_the_sums_of_their_definition():
    keys, q, weights, cos, sin = attention_of()
    plain = KeyStatistics(2, 4)
    plain.see_scores(keys, q, weights, None, None, False)
    want = sum(
        float(weights[g, i, j]) * torch.outer(keys[j], keys[j]) for g in range(4) for i in range(12) for j in range(12)
    )
    torch.testing.assert_close(plain.second.float(), want, rtol=1e-4, atol=1e-4)
    for head in range(2):
        rows = q[2 * head : 2 * head + 2].flatten(0, 1)
        torch.testing.assert_close(plain.weight[head].float(), rows.mT @ rows, rtol=1e-4, atol=1e-4)
    centred, moved = KeyStatistics(2, 4), KeyStatistics(2, 4)
    centred.see_scores(keys, q, weights, None, None, True)
    moved.see_scores(keys + 3, q, weights, None, None, True)
    torch.testing.assert_close(centred.second, moved.second, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(centred.second, plain.second, rtol=1e-2)
    # Keys are drawn for the queries' moment: on average it is the sum over all pairs.
    turned = KeyStatistics(2, 4)
    for _ in range(100):
        turned.see_scores(keys, q, weights, RotateBack(cos, sin, "rotate_half"), None, False)
    want = torch.zeros(2, 4, 4)
    for g in range(4):
        for j in range(12):
            back = rope.reference(q[g], cos[j], -sin[j])
            want[g // 2] += (back * weights[g, :, j, None]).mT @ back
    torch.testing.assert_close(turned.weight.float() / 100, want, rtol=0.1, atol=0.05 * float(want.abs().max()))


def test_each_weighting_is_best_at_what_it_weighs():
    length, rank = 64, 4
    generator = torch.Generator().manual_seed(0)
    # Inputs, W_K and queries each favour other directions.
    x = torch.randn(length, 16, generator=generator) * torch.logspace(0.5, -1.5, 16)
    weight = torch.randn(8, 16, generator=generator) * torch.logspace(-1, 0.5, 16)
    keys = x @ weight.mT
    q = torch.randn(2, length, 8, generator=generator) * torch.logspace(-1.5, 0.5, 8)
    p = (q @ keys.mT / 8).masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf).softmax(-1)
    by_scores, by_keys = KeyStatistics(1, 8), KeyStatistics(1, 8)
    by_scores.see_scores(keys, q, p, None, None, False)
    by_keys.see_keys(keys[None], None)
    rows = weight.double()
    spectra = {
        "scores": decompose(by_scores.second, by_scores.weight, 1, 8),
        "activations": decompose(by_keys.second, None, 1, 8),
        "none": decompose(rows @ rows.mT, None, 1, 8),
    }
    products = {name: (lambda d, u: u[0] @ d)(*found.factors(rank)) for name, found in spectra.items()}
    errors_of = {
        "scores": lambda e: float((p * (q @ (keys @ e.mT).mT).square()).sum()),
        "activations": lambda e: float((keys @ e.mT).square().sum()),
        "none": lambda e: float((e @ weight).square().sum()),
    }
    for name, error in errors_of.items():
        lost = {other: error(torch.eye(8) - product.float()) for other, product in products.items()}
        assert lost[name] == min(lost.values()) and lost[name] < 0.9 * max(lost.values()), (name, lost)


def test_a_budget_goes_where_it_saves_most():
    steps = [[4, 8, 12]] * 2
    chosen = spread([[0.5, 0.4, 0.3], [0.9, 0.2, 0.1]], [1, 1], steps, 12)
    assert chosen == [0, 1]
    assert spread([[0.5, 0.4, 0.3], [0.9, 0.2, 0.1]], [1, 1], steps, 24) == [2, 2]
    assert spread([[0.5, 0.4, 0.3], [0.9, 0.2, 0.1]], [1, 1], steps, 1) == [0, 0]


# ------------------------------------------------------------------------------------------------------ the projections


class Odd(nn.Module):
    """Attention over 4 heads of 8 whose keys come by an odd way. way: which."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.qkv = nn.Linear(24, 96)
        self.narrow, self.wide = nn.Linear(24, 8), nn.Linear(8, 32)
        self.k_norm, self.both = nn.RMSNorm(32), nn.Linear(24, 32)

    def forward(self, x: Tensor) -> Tensor:
        split = self.qkv(x).unflatten(-1, (4, 3, 8))
        q, k, v = (split[..., i, :].transpose(1, 2) for i in range(3))
        if self.way == "latent":
            k = self.wide(self.narrow(x)).unflatten(-1, (4, 8)).transpose(1, 2)
        elif self.way == "nonlinear":
            k = torch.tanh(k)
        elif self.way == "norm over heads":
            k = self.k_norm(k.transpose(1, 2).flatten(2)).unflatten(-1, (4, 8)).transpose(1, 2)
        elif self.way == "tokens moved":
            k = k.flip(2) if x is None else torch.cat((k[:, :, 1:], k[:, :, :1]), 2)
        elif self.way == "tied":
            k, v = (self.both(part).unflatten(-1, (4, 8)).transpose(1, 2) for part in (x, 2 * x))
        return nn.functional.scaled_dot_product_attention(q, k, v)


def factored(model: nn.Module, x: Tensor, *before: tw.passes.Pass, **options: object) -> tw.CompiledModule:
    rank = {"rank": 16} if not {"rank", "energy", "bytes_per_token"} & options.keys() else {}
    return tw.compile(
        model,
        passes=[*before, FactorKeys(**rank, **options)],
        example_inputs=(x,),
        calibration=[x],
        rest="eager",
        target="reference",
    )


def told(compiled: tw.CompiledModule) -> list[str]:
    return [reason for run in compiled.records[0].runs for _, reason in run.declined]


def test_rows_are_found_behind_interleaved_splits():
    captured = export_model(Odd("plain"), (torch.randn(2, 5, 24),), {})
    module = copy_module(captured.module)
    raise_graph(module)
    node = next(n for n in module.graph.nodes if n.target is OPS["attention"].overload)
    for place, name in enumerate("qkv"):
        found = find_projection(arguments(node)[name])
        want = torch.arange(96).reshape(4, 3, 8)[:, place]
        assert torch.equal(found.rows, want) and found.plain


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("latent", "factored already"),
        ("nonlinear", "tanh stands between"),
        ("norm over heads", "over several heads together"),
        ("tokens moved", "do not stay in order"),
        ("tied", "shared by 2 layers"),
    ],
)
def test_key_paths_that_have_no_factor_are_declined(way, reason):
    x = torch.randn(2, 6, 24)
    compiled = factored(Odd(way), x, weighting="none")
    assert [reason in one for one in told(compiled)] == [True], told(compiled)
    torch.testing.assert_close(compiled(x), Odd(way)(x))


@pytest.mark.parametrize("rank", [32, 16])
def test_absorbed_keys_of_an_encoder_are_the_product_of_the_factors(rank):
    model, x = Odd("plain").double(), torch.randn(2, 6, 24, dtype=torch.float64)
    compiled = factored(model, x, rank=rank)
    site = compiled.records[0].runs[0].rewrites[0]
    assert site.details["mode"] == "absorb" and site.details["key_bytes_per_token"] == rank * 8
    assert (site.exactness is Exactness.REASSOCIATED) == (rank == 32)
    with torch.no_grad():
        got, want = compiled(x), model(x)
    error = float((got - want).norm() / want.norm())
    assert error < 1e-12 if rank == 32 else 1e-6 < error < 0.5
    # Nothing of the old merged projection is computed any more.
    linears = [n for n in compiled.records[0].lowered.graph.nodes if "linear" in str(n.target)]
    widths = sorted(n.meta["val"].shape[-1] for n in linears)
    assert widths == [rank, rank, 32]


def test_sigmoid_feels_the_key_bias_and_keeps_it():
    model, x = Odd("plain").double(), torch.randn(2, 6, 24, dtype=torch.float64)
    with torch.no_grad():
        model.qkv.bias.mul_(20)
    sigmoid = SigmoidAttention(bias=-1.0)
    whole = tw.compile(model, passes=[sigmoid], example_inputs=(x,), rest="eager", target="reference")
    with torch.no_grad():
        want, same, thin = whole(x), *(factored(model, x, sigmoid, rank=rank)(x) for rank in (32, 16))
    torch.testing.assert_close(same, want)
    assert 1e-9 < float((thin - want).norm() / want.norm()) < 0.5


# ------------------------------------------------------------------------------------------------------------ the cache


@functools.cache
def cached(name: str, **options: object) -> tw.CompiledModule:
    calibration = [] if options.get("weighting") == "none" else [{"input_ids": tiny.tokens(4, 24, seed=5)}]
    return tw.compile(
        decoders.model(name),
        passes=[KVCache(max_length=decoders.ROOM), FactorKeys(**options)],
        calibration=calibration,
        rest="eager",
        target="reference",
    )


def in_chunks(compiled: tw.CompiledModule, ids: Tensor, sizes: list[int]) -> Tensor:
    cache, got = None, []
    for part in ids.split(sizes, dim=1):
        out = compiled(part, past_key_values=cache)
        cache = out.past_key_values
        got.append(out.logits)
    return torch.cat(got, dim=1)


def details(compiled: tw.CompiledModule) -> list[dict[str, object]]:
    return [
        one.details for run in compiled.records[0].runs if run.rewrite.name == "factor-keys" for one in run.rewrites
    ]


def buffers(compiled: tw.CompiledModule, what: str) -> list[Tensor]:
    return [t for name, t in compiled.records[0].lowered.named_buffers() if what in name]


def patched(name: str, compiled: tw.CompiledModule) -> nn.Module:
    """The eager model with W_K = U A."""
    model = copy.deepcopy(decoders.model(name))
    pairs = zip(buffers(compiled, "key_down"), buffers(compiled, "key_up"), strict=True)
    for layer, (down, up) in zip(model.model.layers, pairs, strict=True):
        with torch.no_grad():
            layer.self_attn.k_proj.weight.copy_(up.flatten(0, 1) @ down)
    return model


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_latent_keys_decode_as_the_model_with_the_factors_product(name):
    compiled, ids = cached(name, rank=6), tiny.tokens(3, 14)
    assert all(one["mode"] == "latent" and one["rank"] == 6 for one in details(compiled))
    with torch.no_grad():
        want, whole = patched(name, compiled)(ids).logits, decoders.model(name)(ids).logits
    torch.testing.assert_close(in_chunks(compiled, ids, [4, 1, 6, 1, 2]), want, atol=2e-4, rtol=2e-4)
    assert (want - whole).abs().max() > 1e-2


def test_absorbed_keys_at_full_rank_decode_as_the_model():
    # Shared by all heads: every factor is another basis of the whole key space, so nothing is trivially the identity.
    compiled, ids = cached("gpt2", rank=32, heads="shared", weighting="none"), tiny.tokens(3, 14)
    with torch.no_grad():
        want = decoders.model("gpt2")(ids).logits
    torch.testing.assert_close(in_chunks(compiled, ids, [4, 1, 6, 1, 2]), want, atol=2e-4, rtol=2e-4)
    assert details(compiled)[0]["heads"] == "shared"


def test_left_padding_reaches_the_rebuilt_positions():
    compiled = cached("llama", rank=6)
    ids, mask = decoders.padded()
    shown = mask.bool()
    with torch.no_grad():
        want = patched("llama", compiled)(ids, attention_mask=mask).logits
    torch.testing.assert_close(compiled(ids, attention_mask=mask).logits[shown], want[shown], atol=2e-4, rtol=2e-4)


@functools.cache
def raised_llama() -> tuple[torch.fx.GraphModule, list[object]]:
    """The graph with canonical ops, and inputs in the order of its placeholders."""
    ids = tiny.tokens(4, 24, seed=5)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    given["position_ids"] = torch.arange(24).expand(4, 24).contiguous()
    module = copy_module(export_model(decoders.model("llama"), (), given).module)
    raise_graph(module)
    return module, [given[node.name] for node in module.graph.nodes if node.op == "placeholder"]


def passed(*passes: tw.passes.Pass, calibrated: bool = False) -> PassRun:
    """What the last of ``passes`` did to the graph."""
    graph, inputs = raised_llama()
    module = copy_module(graph)
    for one in passes:
        done = run_pass(module, one, copy_module, [inputs] if calibrated else [])
    return done


def test_a_budget_is_kept():
    budget = 100  # 2 layers of 16 channels of 4 bytes are 128
    done = passed(KVCache(max_length=32), FactorKeys(bytes_per_token=budget), calibrated=True)
    found = [one.details for one in done.rewrites]
    assert len(found) == 2 and budget - 16 < sum(one["key_bytes_per_token"] for one in found) <= budget
    assert all(1 - one["predicted_error"] ** 2 == pytest.approx(one["kept_energy"], abs=1e-4) for one in found)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rank": 8, "mode": "absorb"}, "absorbing is illegal here"),
        ({"rank": 17}, "over its key space of 16"),
        ({"rank": 16}, "nothing would be saved"),
        ({"rank": 8}, "add KVCache"),
    ],
)
def test_sites_with_rope_are_declined_with_the_reason(options, reason):
    cache = [] if reason == "add KVCache" else [KVCache(max_length=32)]
    done = passed(*cache, FactorKeys(weighting="none", **options))
    assert len(done.declined) == 2 and all(reason in one for _, one in done.declined), done.declined


def test_tables_are_as_long_as_the_cache_and_shared():
    done = passed(KVCache(max_length=32), FactorKeys(rank=8, weighting="none"))
    graph = done.rewrites[0].after
    tables = {n: t for n, t in graph.named_buffers() if "key_cos" in n or "key_sin" in n}
    assert sorted(tuple(t.shape) for t in tables.values()) == [(32, 4)] * 2
    angles = torch.arange(32)[:, None] * 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(next(t for n, t in tables.items() if "cos" in n), angles.cos())


# ------------------------------------------------------------------------------------------------------ options, tuning


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"rank": 2.0},
        {"rank": True},
        {"energy": 0.0},
        {"energy": 1.5},
        {"energy": math.nan},
        {"bytes_per_token": -1},
        {"rank": 4, "energy": 0.9},
        {"weighting": "query"},
        {"mode": "fold"},
        {"heads": "all"},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(errors.BadPassOption):
        FactorKeys(**options)


def test_what_needs_calibration_says_so():
    with pytest.raises(errors.CalibrationNeeded):
        tw.compile(Odd("plain"), passes=[FactorKeys(rank=8)], example_inputs=(torch.randn(1, 4, 24),), rest="eager")


def test_tuning_moves_factors_and_queries_only_and_heals():
    compiled = cached("llama", rank=4)
    before = {n: t.clone() for n, t in decoders.model("llama").named_parameters()}
    kept = {n: t.clone() for n, t in compiled.records[0].lowered.named_buffers() if "tilewright" not in n}
    ids = tiny.tokens(4, 24, seed=5)
    with torch.no_grad():
        target = decoders.model("llama")(ids).logits.log_softmax(-1)

    def distance(output: object, batch: object) -> Tensor:
        return nn.functional.kl_div(output.logits.log_softmax(-1), target, reduction="batchmean", log_target=True)

    start = float(distance(compiled(ids), None))
    done = tw.tune(compiled, [{"input_ids": ids}], "qk", steps=12, lr=1e-2, loss=distance, progress=False)
    assert len(done.names) == 6  # two layers: A, U and W_Q
    assert float(distance(compiled(ids), None)) < 0.7 * start
    for name, tensor in decoders.model("llama").named_parameters():
        assert torch.equal(tensor, before[name])
    for name, tensor in compiled.records[0].lowered.named_buffers():
        assert name not in kept or torch.equal(tensor, kept[name])


def test_the_yardstick_is_the_model_and_can_be_tuned():
    model, ids = decoders.model("llama"), tiny.tokens(2, 9)
    compiled = tw.compile(
        model, passes=[KVCache(max_length=decoders.ROOM), WholeKeys()], rest="eager", target="reference", strict=True
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, atol=2e-4, rtol=2e-4)
    done = tw.tune(compiled, [{"input_ids": ids}], "qk", steps=3, lr=1e-2, progress=False)
    assert len(done.names) == 4 and done.losses[-1] < done.losses[0]
