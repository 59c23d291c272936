"""OSTQuant: rotations and scales change nothing before rounding, and are learnt as the method says."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from tilewright.codegen.weight_format import WeightFormat
from tilewright.frontend.capture import copy_module, export_model
from tilewright.frontend.options import Options
from tilewright.frontend.pipeline import process
from tilewright.passes.base import SiteContext
from tilewright.passes.execute import run
from tilewright.passes.rounding import grid, qsur
from tilewright.passes.rounding._fold import apply_fold, find_fold, find_groups
from tilewright.passes.rounding._ost_learn import Learner, Target, hadamard, logits_output, start_matrices
from tilewright.passes.rounding._ost_weight import FakeQuantized
from tilewright.passes.rounding._rotate import LAYER_NORM, LINEAR, find_rotations
from tilewright.passes.rounding._turn import rotate
from tilewright.passes.rounding.base import Calibration, WeightSite
from tilewright.passes.rounding.ostquant import CHECK, OSTQuant
from tilewright.passes.rounding.store import Store
from tilewright.passes.site import get_site
from tilewright.passes.view import GraphView, arguments
from tilewright.runtime.errors import BadPassOption

SIZES: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
LLAMA: dict[str, Any] = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.3}


def make(name: str) -> nn.Module:
    import transformers as hf

    torch.manual_seed(0)
    match name:
        case "llama":
            return tiny.llama(layers=1, attention_bias=True, mlp_bias=True)
        case "tied llama":
            return tiny.llama(layers=1, tie_word_embeddings=True)
        case "qwen3":
            return hf.Qwen3ForCausalLM(hf.Qwen3Config(**LLAMA, head_dim=8))
        case "mistral":
            return hf.MistralForCausalLM(hf.MistralConfig(**LLAMA, max_position_embeddings=64))
        case "phi3":
            return hf.Phi3ForCausalLM(hf.Phi3Config(**LLAMA, pad_token_id=0, max_position_embeddings=64))
        case "gemma":
            return hf.GemmaForCausalLM(hf.GemmaConfig(**LLAMA, head_dim=8, max_position_embeddings=64))
        case "opt":
            sizes = SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3, "max_position_embeddings": 64}
            return hf.OPTForCausalLM(hf.OPTConfig(**sizes))
        case "gpt2":
            sizes = {"vocab_size": 96, "n_embd": 32, "n_head": 4, "n_layer": 1, "n_positions": 64}
            return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, initializer_range=0.3))
        case _:
            return tiny.bert(layers=1)


@functools.cache
def raised(name: str) -> torch.fx.GraphModule:
    """The raised graph of a model whose norms and biases are no ones and zeros."""
    model = make(name).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.3
    given = {"input_ids": tiny.tokens()} | ({} if name == "bert" else {"use_cache": False})
    dims = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    shapes = {"input_ids": dims} | ({} if name == "bert" else {"use_cache": None})
    module = export_model(model, (), given, shapes).module
    return process(module, Options.make([], rest="eager", target="reference"), example_values=inputs(module)).raised


def inputs(module: torch.fx.GraphModule, ids: Tensor | None = None) -> list[Any]:
    count = len(module.graph.find_nodes(op="placeholder"))
    return [tiny.tokens() if ids is None else ids, False][:count]


def sites(view: GraphView, form: WeightFormat) -> dict[str, WeightSite]:
    found = {}
    for node in view.graph.find_nodes(op="call_function", target=LINEAR):
        site = get_site(node)
        assert site is not None
        if "lm_head" not in site.id:
            found[site.id] = WeightSite(site.id, SiteContext(node, view), form, False, site.id)
    return found


# ------------------------------------------------------------------------------------------------- nothing changes


@pytest.mark.parametrize(
    ("name", "streams", "heads"),
    [("llama", 1, 1), ("tied llama", 1, 1), ("qwen3", 1, 1), ("opt", 1, 1), ("gpt2", 1, 1), ("bert", 0, 1)]
    + [pytest.param(name, 1, 1, marks=pytest.mark.grid) for name in ("mistral", "phi3", "gemma")],
)
def test_rotations_and_scales_leave_the_function_as_it_is(name, streams, heads):
    """With random orthogonal matrices and scales at every place that takes them."""
    original = raised(name)
    kept = {key: tensor.clone() for key, tensor in original.state_dict().items()}
    module = copy_module(original)
    view = GraphView(module)
    plan = find_rotations(view)
    kinds = [key.startswith("stream") for key in plan.sizes]
    assert (kinds.count(True), kinds.count(False)) == (streams, heads)
    if not streams:
        assert any("post-norm" in reason for reason in plan.declined.values())
    generator = torch.Generator().manual_seed(2)
    matrices = {
        key: torch.stack([torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator))[0]] * count)
        for key, (count, d) in plan.sizes.items()
    }
    rotate(view, plan, matrices)
    folded = 0
    for group in find_groups(view):
        fold = find_fold(view, group)
        if not isinstance(fold, str) and fold.kind != "input":
            apply_fold(view, fold, fold.shared(0.5 + torch.rand(group.width, generator=generator).double()))
            folded += 1
    assert folded >= (2 if streams else 1)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    given = inputs(module)
    want, found = run(original, given)[0], run(module, given)[0]
    assert float((found - want).abs().max() / want.abs().max()) < 1e-5
    # It is another graph: no layer's weight is what it was, and the model's own numbers are untouched.
    before = {get_site(n).id: n for n in original.graph.find_nodes(op="call_function", target=LINEAR)}
    for node in module.graph.find_nodes(op="call_function", target=LINEAR):
        if streams:
            assert not torch.equal(weight(module, node), weight(original, before[get_site(node).id]))
    assert all(torch.equal(tensor, kept[key]) for key, tensor in original.state_dict().items())
    if streams:
        assert not module.graph.find_nodes(op="call_function", target=LAYER_NORM)


def weight(module: torch.fx.GraphModule, linear: Any) -> Tensor:
    from tilewright.passes.rounding.constants import constant

    found = constant(GraphView(module), arguments(linear)["weight"])
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["tied llama", "gpt2"])
def test_a_tied_head_stays_tied(name):
    module = copy_module(raised(name))
    view = GraphView(module)
    plan = find_rotations(view)
    rotate(view, plan, start_matrices(plan, 0))
    (head,) = [n for n in view.graph.find_nodes(op="call_function", target=LINEAR) if "lm_head" in get_site(n).id]
    tables = [n.args[0] for n in view.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default)]
    assert arguments(head)["weight"] in tables


def test_streams_that_end_in_an_output_are_declined():
    module = copy_module(raised("tied llama"))
    (output,) = module.graph.find_nodes(op="output")
    norm = next(n for n in module.graph.nodes if getattr(n.target, "_opname", "") == "rms_norm")
    output.args = ((*output.args[0], arguments(norm)["x"]),)
    plan = find_rotations(GraphView(module))
    assert "it is an output of the model" in plan.declined.values()
    assert not any(name.startswith("stream") for name in plan.sizes)


def test_a_projection_that_others_read_keeps_its_values_unturned():
    module = copy_module(raised("tied llama"))
    attention = next(n for n in module.graph.nodes if getattr(n.target, "_opname", "") == "attention")
    (output,) = module.graph.find_nodes(op="output")
    output.args = ((*output.args[0], arguments(attention)["v"]),)
    plan = find_rotations(GraphView(module), streams=False)
    assert not plan.sizes and len(plan.declined) == 1


# ----------------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("name", ["tied llama", "gpt2", "bert"])
def test_what_is_learnt_on_is_the_model(name):
    """Unrounded, the learner computes the float model whatever its parameters; rounded, all of them have gradients."""
    module = raised(name)
    view = GraphView(module)
    plan = find_rotations(view)
    learner = Learner(
        view,
        plan,
        list(sites(view, WeightFormat(4, 32, activations=8)).values()),
        start_matrices(plan, 0),
        torch.float32,
    )
    generator = torch.Generator().manual_seed(3)
    for scale in learner.scales:
        scale.data = torch.randn(scale.shape, generator=generator) * 0.3
    given = inputs(module)
    want = run(module, given)
    learner.rounded = False
    with torch.no_grad(), learner.step():
        torch.testing.assert_close(learner(given)[0], want[0], rtol=2e-4, atol=2e-4)
    low = Learner(view, plan, list(sites(view, WeightFormat()).values()), start_matrices(plan, 0), torch.bfloat16)
    low.rounded = False
    with torch.no_grad(), low.step():
        error = low(given)[0] - want[0]
    assert float(error.norm() / want[0].norm()) < 0.05
    learner.rounded = True
    learner.fit_ratios()
    place = logits_output(module)
    assert (place is None) == (name == "bert")
    target = Target(want, place, top=20)
    with learner.step():
        target.loss(learner(given)).backward()
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in learner.parameters())
    # Steps along them get closer, and rotations stay orthogonal.
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        with learner.step():
            loss = target.loss(learner(given))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert min(losses) < 0.9 * losses[0], losses
    for rotation in learner.rotations:
        matrix = rotation.matrix.detach()
        torch.testing.assert_close(matrix @ matrix.mT, torch.eye(matrix.shape[-1]).expand_as(matrix), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "form", [WeightFormat(4, 32), WeightFormat(3, 32, "point"), WeightFormat(2, 0, "offset")], ids=WeightFormat.text
)
def test_fake_weights_are_those_of_the_grid(form):
    """Values and gradients of the plain differentiable form, a short last group included."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(5, 75, generator=generator)
    ratio = 0.6 + 0.4 * torch.rand(5, form.groups(75), generator=generator)
    if form.zero == "middle":
        ratio[::2] *= -1
    loss = torch.randn(5, 75, generator=generator)
    one, other = w.clone().requires_grad_(), w.clone().requires_grad_()
    found = FakeQuantized.apply(one, ratio, form, False)
    lower, upper = grid.ranges(other, form)
    size = (upper - lower) * ratio / (2 * grid.reach(form) if form.zero == "middle" else form.levels - 1)
    with torch.no_grad():
        kept, zero = grid.grid(lower * ratio.abs(), upper * ratio.abs(), form)
    step = size + (kept.float() * ratio.sign() - size).detach()
    want = grid.fake_quantize(other, form, step, None if zero is None else zero.float())
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
    (found * loss).sum().backward()
    (want * loss).sum().backward()
    assert one.grad is not None and other.grad is not None
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_kl_top_counts_the_largest_logits_only():
    logits = torch.tensor([[[4.0, 3.0, 0.0, -1.0]]])
    target = Target([logits], 0, top=2)
    assert float(target.loss([logits + 7])) == pytest.approx(0, abs=1e-6)
    changed = logits.clone()
    changed[..., 2:] = 50
    assert float(target.loss([changed])) == pytest.approx(0, abs=1e-6)
    p, q = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-3))
    want = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert float(target.loss([logits + torch.tensor([2.0, 0, 0, 0])])) == pytest.approx(want, rel=1e-5)


class Killed(Exception):
    pass


def work(folder: Path | None, kill_at: int | None = None) -> tuple[Calibration, OSTQuant]:
    module = copy_module(raised("tied llama"))
    view = GraphView(module)
    batches = [inputs(module, tiny.tokens(2, 24, seed=seed)) for seed in range(4)]
    store = Store.at(folder, "settings", module, batches)
    seen = 0

    def progress(done: int, total: int, text: str) -> None:
        nonlocal seen
        seen += text.startswith("learning")
        if kill_at is not None and seen > kill_at:
            raise Killed

    method = OSTQuant(steps=CHECK + 3, tokens=16, precision="float32", start="hadamard", top=50)
    return Calibration(view, sites(view, WeightFormat(3, 32)), batches, progress=progress, store=store), method


def test_a_killed_run_goes_on_and_ends_where_a_whole_one_does(tmp_path):
    whole, method = work(None)
    want = method.transform(whole)
    assert want["steps"] == CHECK + 3 and [step for step, _ in want["checks"]] == [0, CHECK, CHECK + 3]
    assert want["rotations"] == {"stream": 1, "heads": 1} and set(want["qsur"]) == {"weights", "activations"}
    killed, method = work(tmp_path, kill_at=CHECK + 1)
    with pytest.raises(Killed):
        method.transform(killed)
    again, method = work(tmp_path)
    found = method.transform(again)
    assert found["checks"] == want["checks"]
    for site in whole.sites:
        assert torch.equal(again.weight(site), whole.weight(site))
    # Rounded with errors handed on, the model is closer than rounded to nearest.
    ids = inputs(whole.module, tiny.tokens(2, 24, seed=9))
    truth = run(raised("tied llama"), ids)
    torch.testing.assert_close(run(whole.module, ids)[0], truth[0], rtol=2e-4, atol=2e-4)
    codes = method.round(whole)
    assert set(codes) == set(whole.sites)
    plain, _ = work(None)
    nearest = {site: plain.nearest(site) for site in plain.sites}
    assert distance(whole, codes, ids, truth) < distance(plain, nearest, ids, truth)


def distance(one: Calibration, codes: dict[str, Any], ids: list[Any], truth: Any) -> float:
    from tilewright.passes.rounding._fold import set_constant

    for site, found in codes.items():
        set_constant(one.view, one.sites[site].node, "weight", found.dequantize())
    one.module.recompile()
    return float(Target(truth, 0, top=50).loss(run(one.module, ids)))


# ----------------------------------------------------------------------------------------------- matrices and measures


@pytest.mark.parametrize("size", [1, 9, 64, 576])
def test_starts_are_orthogonal_and_spread(size):
    matrix = hadamard(size, torch.Generator().manual_seed(0))
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    if size == 64:
        torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, 1 / 8))


def test_utilization():
    """1 for a ball, less for what varies along few directions; a rotation that evens it out helps."""
    assert qsur.chi_square(10) == pytest.approx(23.209, rel=0.01)  # tables of the chi-square distribution
    zero, eye = torch.zeros(8), torch.eye(8)
    assert qsur.utilization(zero, 3 * eye) == pytest.approx(1)
    uneven = torch.diag(torch.tensor([64.0, 1, 1, 1, 1, 1, 1, 1]))
    matrix = hadamard(8, torch.Generator().manual_seed(0)).float()
    before, after = qsur.utilization(zero, uneven), qsur.utilization(zero, matrix.t() @ uneven @ matrix)
    # sqrt of the geometric mean of 64 and seven ones, over sqrt of the largest variance: of 64, and of their mean.
    assert before == pytest.approx(64 ** (1 / 16) / 8) and after == pytest.approx(64 ** (1 / 16) / math.sqrt(71 / 8))
    assert qsur.utilization(zero + 5, eye) < 1
    samples = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    assert qsur.of_samples(samples) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(
    "options",
    [{"steps": -1}, {"tokens": 1}, {"batch": 0}, {"lr": 1.5}, {"lr_scale": -0.1}, {"start": "x"}, {"rounding": "up"}],
    ids=str,
)
def test_options_out_of_range(options):
    with pytest.raises(BadPassOption, match=f"ostquant: {next(iter(options))}"):
        OSTQuant(**options)
