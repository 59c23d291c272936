"""SigmoidAttention: the numbers of every mask form, dynamic shapes, sharing, calibration, options."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from tilewright.passes import Decline, Needs, SigmoidAttention, SiteContext
from tilewright.passes import _sigmoid_fit as sigmoid_fit
from tilewright.passes.manager import PassRun, run_pass
from tilewright.passes.parse import parse_passes
from tilewright.passes.site import Site, set_site
from tilewright.passes.view import GraphView
from tilewright.runtime import errors
from tilewright.runtime.ops import OPS

ATTENTION = OPS["attention"].overload
COUNT = torch.ops.tilewright.visible_keys.default
# Both sides are float64: a few hundred operations of rounding 2^-53 on values of order one.
F64 = {"rtol": 1e-12, "atol": 1e-12}
# The shift itself is float32: an error of 2^-24 of a logarithm below 8 moves a weight by 5e-7 of itself at most.
SHIFT32 = {"rtol": 2e-6, "atol": 2e-6}
# The fit stops when the mean row sum is one to 1e-5, and rounds scores, biases and sums in float32.
FITTED = 2e-5


def graph_of(
    calls: Sequence[dict[str, Any]], example: dict[str, torch.Tensor], dynamic: dict[str, Sequence[int]] | None = None
) -> torch.fx.GraphModule:
    """A graph of attention calls whose arguments name placeholders.

    dynamic: placeholder -> dims of free size. Those that are equal in the example stay equal, as a capture finds them.
    """
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    graph = torch.fx.Graph()
    nodes: dict[str, torch.fx.Node] = {}
    for name, tensor in example.items():
        free = (dynamic or {}).get(name, ())
        sizes = [DimDynamic.DUCK if d in free else DimDynamic.STATIC for d in range(tensor.dim())]
        nodes[name] = graph.placeholder(name)
        context = StatelessSymbolicContext(dynamic_sizes=sizes)
        nodes[name].meta["val"] = mode.from_tensor(tensor, symbolic_context=context)
    outputs = []
    for index, given in enumerate(calls):
        named = {key: nodes.get(item, item) if isinstance(item, str) else item for key, item in given.items()}
        tensors = {key: named.pop(key, None) for key in ("q", "k", "v", "bias", "shift")}
        node = graph.call_function(ATTENTION, tuple(tensors.values()), {"scale": 0.5, **named})
        with mode:
            fakes = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            node.meta["val"] = ATTENTION(*fakes[0], **fakes[1])
        set_site(node, Site(f"layer.{index}/attention", f"layer.{index}", f"model.py:{index + 1}", "attention"))
        outputs.append(node)
    graph.output(tuple(outputs))
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def rewritten(
    module: torch.fx.GraphModule,
    one: SigmoidAttention | None = None,
    calibration: Sequence[Sequence[torch.Tensor]] = (),
) -> PassRun:
    return run_pass(module, one or SigmoidAttention(), copy.deepcopy, calibration)


def sigmoid_formula(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    bias: torch.Tensor | float,
    b: torch.Tensor,
) -> torch.Tensor:
    """The definition, in float64, one head at a time."""
    group = q.shape[1] // k.shape[1]
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=torch.float64)
    visible = visible.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    extra = torch.as_tensor(bias, dtype=torch.float64).expand(visible.shape)
    b = b.expand(q.shape[0], q.shape[1], q.shape[2], 1)
    for head in range(q.shape[1]):
        keys, values = k[:, head // group].double(), v[:, head // group].double()
        scores = 0.5 * q[:, head].double() @ keys.transpose(-1, -2) + extra[:, head] + b[:, head]
        out[:, head] = (1 / (1 + torch.exp(-scores)) * visible[:, head]) @ values
    return out


def minus_log(visible: torch.Tensor, shape: tuple[int, int, int, int]) -> torch.Tensor:
    """-log n of each row, by counting a mask of the full shape."""
    return -visible.expand(shape).sum(-1, keepdim=True).clamp_min(1).double().log()


def qkv(
    batch: int = 2, heads: int = 4, key_heads: int = 4, q_len: int = 7, k_len: int = 7, seed: int = 0
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "q": draw(batch, heads, q_len, 8),
        "k": draw(batch, key_heads, k_len, 8),
        "v": draw(batch, key_heads, k_len, 6),
    }


def grid(q_len: int, k_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(q_len)[:, None], torch.arange(k_len)[None, :]


MASKS = {
    "": lambda q, k, n, m: torch.ones(n, m, dtype=torch.bool),
    "k_idx <= q_idx": lambda q, k, n, m: k <= q,
    "k_idx <= q_idx + k_len - q_len": lambda q, k, n, m: k <= q + m - n,
    "(k_idx <= q_idx) & (k_idx > q_idx - 3)": lambda q, k, n, m: (k <= q) & (k > q - 3),
    "(k_idx <= q_idx) & ((k_idx > q_idx - 3) | (k_idx < 2))": lambda q, k, n, m: (k <= q) & ((k > q - 3) | (k < 2)),
    "k_idx // 3 == q_idx // 3": lambda q, k, n, m: k // 3 == q // 3,
    "k_idx > q_idx + 2": lambda q, k, n, m: k > q + 2,
    "(k_idx <= q_idx) & (q_idx > 2)": lambda q, k, n, m: (k <= q) & (q > 2),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("q_len", "k_len"), [(7, 7), (3, 9), (9, 5)])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_symbolic_masks(mask: str, q_len: int, k_len: int, key_heads: int) -> None:
    example = qkv(key_heads=key_heads, q_len=q_len, k_len=k_len)
    module = graph_of([{"q": "q", "k": "k", "v": "v", "mask": mask}], example)
    done = rewritten(module)
    assert [r.details["bias"] for r in done.rewrites] == ["-log_n"]
    visible = MASKS[mask](*grid(q_len, k_len), q_len, k_len)
    expected = sigmoid_formula(*example.values(), visible, 0.0, minus_log(visible, (2, 4, q_len, k_len)))
    torch.testing.assert_close(module(*example.values())[0], expected, **SHIFT32)
    hidden = ~visible.any(-1)
    assert bool((module(*example.values())[0][:, :, hidden] == 0).all()), "a row that sees nothing gives zeros"


def test_mask_over_batch_and_head() -> None:
    example = qkv()
    module = graph_of([{"q": "q", "k": "k", "v": "v", "mask": "k_idx <= q_idx + head + 2 * batch"}], example)
    rewritten(module)
    q, k = grid(7, 7)
    visible = k <= q + torch.arange(4)[None, :, None, None] + 2 * torch.arange(2)[:, None, None, None]
    expected = sigmoid_formula(*example.values(), visible, 0.0, minus_log(visible, (2, 4, 7, 7)))
    torch.testing.assert_close(module(*example.values())[0], expected, **SHIFT32)


def padding(dtype: torch.dtype, hidden: float | None) -> torch.Tensor:
    """(2, 1, 1, 7): the first sequence has 4 tokens, the second none. ``hidden``: the float put on padded keys."""
    visible = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [0] * 7], dtype=torch.bool)[:, None, None]
    if hidden is None:
        return visible
    return torch.where(visible, 0.0, torch.tensor(hidden, dtype=dtype)).to(dtype)


@pytest.mark.parametrize("mask", ["", "k_idx <= q_idx"])
@pytest.mark.parametrize(
    ("dtype", "hidden"),
    [
        (torch.bool, None),
        (torch.float64, -torch.inf),
        (torch.float64, torch.finfo(torch.float64).min),
        (torch.float32, torch.finfo(torch.float32).min),
        (torch.float32, -10000.0),
        (torch.bfloat16, -10000.0),
        (torch.float16, torch.finfo(torch.float16).min),
    ],
)
@pytest.mark.parametrize("whole", [False, True], ids=["(B,1,1,Lk)", "(B,1,Lq,Lk)"])
def test_padding(dtype: torch.dtype, hidden: float | None, whole: bool, mask: str) -> None:
    example = qkv()
    bias = padding(dtype, hidden)
    shown = padding(torch.bool, None)
    example["bias"] = bias.expand(2, 1, 7, 7) if whole else bias
    module = graph_of([{"q": "q", "k": "k", "v": "v", "bias": "bias", "mask": mask}], example)
    rewritten(module)
    visible = shown & MASKS[mask](*grid(7, 7), 7, 7)
    q, k, v = (example[name] for name in "qkv")
    expected = sigmoid_formula(q, k, v, visible, 0.0, minus_log(visible, (2, 4, 7, 7)))
    out = module(*example.values())[0]
    torch.testing.assert_close(out, expected, **SHIFT32)
    assert bool((out[1] == 0).all()), "a sequence without tokens gives exact zeros"


def test_real_bias_hides_nothing() -> None:
    """T5's and ALiBi's biases are added, and their keys count, however negative up to the threshold."""
    example = qkv()
    q, k = grid(7, 7)
    slopes = torch.tensor([0.5, 0.25, 0.125, 600.0], dtype=torch.float64)[:, None, None]
    example["bias"] = (-slopes * (q - k).abs())[None]
    module = graph_of([{"q": "q", "k": "k", "v": "v", "bias": "bias"}], example)
    rewritten(module)
    everything = torch.ones(7, 7, dtype=torch.bool)
    args = (example["q"], example["k"], example["v"], everything, example["bias"])
    torch.testing.assert_close(
        module(*example.values())[0], sigmoid_formula(*args, minus_log(everything, (2, 4, 7, 7))), **SHIFT32
    )


@pytest.mark.parametrize("shape", [(7,), (7, 7), (1, 7, 7), (2, 4, 7, 1), (1, 4, 1, 7)])
def test_bias_of_fewer_or_single_dims(shape: tuple[int, ...]) -> None:
    example = qkv()
    example["bias"] = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4
    module = graph_of([{"q": "q", "k": "k", "v": "v", "bias": "bias"}], example)
    rewritten(module)
    visible = example["bias"].expand(2, 4, 7, 7)
    q, k, v = (example[name] for name in "qkv")
    expected = sigmoid_formula(q, k, v, visible, 0.0, minus_log(visible, (2, 4, 7, 7)))
    torch.testing.assert_close(module(*example.values())[0], expected, **SHIFT32)


def test_fixed_number() -> None:
    example = qkv()
    module = graph_of([{"q": "q", "k": "k", "v": "v", "mask": "k_idx <= q_idx"}], example)
    rewritten(module, SigmoidAttention(bias=-1.5))
    visible = MASKS["k_idx <= q_idx"](*grid(7, 7), 7, 7)
    expected = sigmoid_formula(*example.values(), visible, 0.0, torch.full((1, 1, 1, 1), -1.5, dtype=torch.float64))
    torch.testing.assert_close(module(*example.values())[0], expected, **F64)
    assert not module.graph.find_nodes(op="call_function", target=COUNT)


@pytest.mark.parametrize("mask", ["", "k_idx <= q_idx", "(k_idx <= q_idx) & ((k_idx > q_idx - 3) | (k_idx < 2))"])
@pytest.mark.parametrize("padded", [False, True])
def test_dynamic_shapes(mask: str, padded: bool) -> None:
    """One graph for all sizes: nothing of the example's batch and lengths is baked in."""
    example = qkv(q_len=5, k_len=6)
    free: dict[str, Sequence[int]] = {"q": (0, 2), "k": (0, 2), "v": (0, 2)}
    call = {"q": "q", "k": "k", "v": "v", "mask": mask}
    if padded:
        example["bias"] = torch.ones(2, 1, 1, 6, dtype=torch.bool)
        free["bias"] = (0, 3)
        call["bias"] = "bias"
    module = graph_of([call], example, free)
    rewritten(module)
    for batch, q_len, k_len in ((1, 3, 11), (3, 8, 2), (2, 5, 6)):
        new = qkv(batch, q_len=q_len, k_len=k_len, seed=batch)
        visible = MASKS[mask](*grid(q_len, k_len), q_len, k_len)
        if padded:
            new["bias"] = (torch.arange(k_len) < k_len - 1).expand(batch, 1, 1, k_len)
            visible = visible & new["bias"]
        q, k, v = (new[name] for name in "qkv")
        expected = sigmoid_formula(q, k, v, visible, 0.0, minus_log(visible, (batch, 4, q_len, k_len)))
        torch.testing.assert_close(module(*new.values())[0], expected, **SHIFT32)


def test_causal_count_costs_no_score_matrix() -> None:
    """Causal and window masks are counted from limits, without a tensor of Lq x Lk."""
    q = torch.zeros(1, 1, 2**20, 1)
    count = torch.ops.tilewright.visible_keys(q, q, mask="(k_idx <= q_idx) & (k_idx > q_idx - 256)")
    assert count.shape == (1, 1, 2**20, 1)
    assert torch.equal(count.flatten(), torch.arange(1, 2**20 + 1).clamp_max(256))


@pytest.mark.parametrize("dynamic", [False, True])
def test_layers_share_one_count(dynamic: bool) -> None:
    example = {f"{name}{i}": t for i in range(3) for name, t in qkv(seed=i).items()}
    example["pad"] = padding(torch.bool, None)
    calls = [{n: f"{n}{i}" for n in "qkv"} | {"bias": "pad", "mask": "k_idx <= q_idx"} for i in range(3)]
    calls.append({n: f"{n}0" for n in "qkv"} | {"mask": "k_idx <= q_idx"})
    free = {"pad": (0, 3)} | {f"{n}{i}": (0, 2) for n in "qkv" for i in range(3)} if dynamic else None
    module = graph_of(calls, example, free)
    rewritten(module)
    counts = module.graph.find_nodes(op="call_function", target=COUNT)
    logs = module.graph.find_nodes(op="call_function", target=torch.ops.aten.log.default)
    assert len(counts) == len(logs) == 2
    q, k = grid(7, 7)
    visible = padding(torch.bool, None) & (k <= q)
    out = module(*example.values())
    for i in range(3):
        args = (example[f"q{i}"], example[f"k{i}"], example[f"v{i}"])
        torch.testing.assert_close(
            out[i], sigmoid_formula(*args, visible, 0.0, minus_log(visible, (2, 4, 7, 7))), **SHIFT32
        )


def test_count_is_not_shared_across_a_write() -> None:
    """A mask tensor that is written to between two layers is counted anew."""
    example = qkv()
    example["pad"] = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    module = graph_of([{"q": "q", "k": "k", "v": "v", "bias": "pad"}] * 2, example)
    second = module.graph.find_nodes(op="call_function", target=ATTENTION)[1]
    pad = module.graph.find_nodes(op="placeholder")[3]
    with module.graph.inserting_before(second):
        written = module.graph.call_function(torch.ops.aten.fill_.Scalar, (pad, False))
        written.meta["val"] = pad.meta["val"]
    module.recompile()
    rewritten(module)
    assert len(module.graph.find_nodes(op="call_function", target=COUNT)) == 2


def test_meta_and_arguments_are_kept() -> None:
    example = qkv()
    module = graph_of([{"q": "q", "k": "k", "v": "v", "mask": "k_idx <= q_idx"}], example)
    (node,) = module.graph.find_nodes(op="call_function", target=ATTENTION)
    node.meta["stack_trace"] = 'File "model.py", line 3, in forward'
    site = node.meta["tilewright_site"]
    rewritten(module)
    (after,) = module.graph.find_nodes(op="call_function", target=ATTENTION)
    assert after.meta["tilewright_site"] == site and after.meta["stack_trace"] == node.meta["stack_trace"]
    assert after.kwargs["normalizer"] == "sigmoid" and after.kwargs["mask"] == "k_idx <= q_idx"
    assert after.kwargs["scale"] == 0.5 and after.meta["val"].dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"normalizer": "sigmoid"}, "sigmoid already"),
        ({"q_len": 0}, "no elements"),
        ({"k_len": 1}, "single key"),
    ],
)
def test_declines(change: dict[str, Any], reason: str) -> None:
    sizes = {key: value for key, value in change.items() if key.endswith("len")}
    call = {"q": "q", "k": "k", "v": "v"} | {key: value for key, value in change.items() if key == "normalizer"}
    module = graph_of([call], qkv(**sizes))
    text = module.code
    done = rewritten(module)
    assert not done.rewrites and reason in done.declined[0][1]
    assert module.code == text


def test_gradients_flow() -> None:
    """Through the weights, not through the count; compared with autograd through the formula."""
    example = qkv()
    q, k = grid(7, 7)
    visible = k <= q
    module = graph_of([{"q": "q", "k": "k", "v": "v", "mask": "k_idx <= q_idx"}], example)
    rewritten(module)
    ours = [t.clone().requires_grad_() for t in example.values()]
    module(*ours)[0].square().sum().backward()
    theirs = [t.clone().requires_grad_() for t in example.values()]
    sigmoid_formula(*theirs, visible, 0.0, minus_log(visible, (2, 4, 7, 7))).square().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad is not None and b.grad is not None and float(b.grad.norm()) > 0.1
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("bias", ["log_n", math.inf, math.nan, True, None, [1.0]])
def test_bad_bias(bias: Any) -> None:
    with pytest.raises(errors.BadPassOption, match="bias is"):
        SigmoidAttention(bias=bias)


def test_follow_queries_needs_calibration() -> None:
    with pytest.raises(errors.BadPassOption, match="bias='calibrated'"):
        SigmoidAttention(follow_queries=True)


def test_command_line_text() -> None:
    def one(text: str) -> Any:
        return parse_passes(text)[0]

    assert one("sigmoid-attention") == SigmoidAttention()
    assert one("sigmoid-attention{bias=calibrated}") == SigmoidAttention(bias="calibrated")
    assert one("sigmoid-attention{bias=-log_n}") == SigmoidAttention(bias="-log_n")
    assert one("sigmoid-attention{bias=-1.5}") == SigmoidAttention(bias=-1.5)
    assert one("sigmoid-attention{bias=calibrated,follow-queries}") == SigmoidAttention("calibrated", True)
    with pytest.raises(errors.BadPassOption):
        one("sigmoid-attention{bias=inf}")
    with pytest.raises(errors.BadPassOption):
        one("sigmoid-attention{bias=logn}")


# --------------------------------------------------------------------------------------------------------- calibration


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
