"""select_blocks: the same blocks on every target, and those that a search over exact fractions selects."""

from __future__ import annotations

import ast
from fractions import Fraction

import pytest
import torch
from golden import check_golden
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.codegen.render import render
from tilewright.codegen.select_blocks import MAX_CAPACITY, SelectBlocksSpec
from tilewright.codegen.spec import KernelSpec, SpecError
from tilewright.runtime.cross_compile import cross_compile
from tilewright.runtime.errors import BadArgument, UnsupportedKernel
from tilewright.runtime.ops import OPS
from tilewright.runtime.ops.select_blocks import reference, spec

INF, NAN = float("inf"), float("nan")

GOLDEN = {
    "select_blocks_native": (SelectBlocksSpec(), "cpp"),
    "select_blocks_native_budget": (SelectBlocksSpec(budget=True), "cpp"),
    "select_blocks": (SelectBlocksSpec(capacity=256, num_warps=1), "triton"),
    "select_blocks_budget": (SelectBlocksSpec(capacity=2048, budget=True), "triton"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    one, target = GOLDEN[name]
    text = render(one, target)
    assert text == render(KernelSpec.from_dict(one.to_dict()), target)
    assert " \n" not in text and "\n\n\n\n" not in text
    if target == "cpp":
        assert max(map(len, text.splitlines())) <= 120
    else:
        module = ast.parse(text)
        literals = {n.targets[0].id: n.value for n in module.body if isinstance(n, ast.Assign)}
        defined = {n.name: [a.arg for a in n.args.args] for n in module.body if isinstance(n, ast.FunctionDef)}
        for entry in ast.literal_eval(literals["COMPILE"]):
            assert defined[entry["kernel"]] == list(entry["signature"])
    check_golden(name, text, ".cpp.txt" if target == "cpp" else ".py.txt")


def test_specs_out_of_range_are_refused():
    for change, says in (
        ({"capacity": 48}, "capacity is 48"),
        ({"capacity": 2 * MAX_CAPACITY}, f"16 to {MAX_CAPACITY}"),
        ({"num_warps": 3}, "num_warps is 3"),
        ({"budget": 1}, "budget is 1"),
    ):
        with pytest.raises(SpecError, match=says):
            SelectBlocksSpec(**change)
    with pytest.raises(SpecError, match="capacity is 0"):
        render(SelectBlocksSpec(), "triton")


@pytest.mark.parametrize(
    "target", ["gfx942", *(pytest.param(t, marks=pytest.mark.grid) for t in ("sm_80", "sm_90", "sm_100"))]
)
def test_compiles_for_gpus_that_are_not_here(target):
    small = SelectBlocksSpec(64, budget=True, num_warps=1)
    for one in [small] if target == "gfx942" else [small, *(s for s, t in GOLDEN.values() if t == "triton")]:
        for kernel in cross_compile(render(one, "triton"), target):
            assert not kernel.stack_bytes


# -------------------------------------------------------------------------------------------------------- choices


def search(scores, states, budget, *, threshold, most, sinks, local, causal, block_q, block_k):
    """The definition, row by row, in exact fractions."""
    *batch, columns = scores.shape
    width = min(columns, most) if most else columns
    counts = torch.zeros(batch, dtype=torch.int32)
    indices = torch.full((*batch, width), -1, dtype=torch.int32)
    for place in torch.cartesian_prod(*map(torch.arange, batch)).reshape(-1, 3).tolist():
        row, state = scores[tuple(place)].tolist(), states[tuple(place)].tolist()
        candidates = [j for j in range(columns) if state[j]]
        own = place[2] * block_q // block_k
        nearest = sorted(candidates, key=lambda j, own=own: (abs(j - own), j > own))[:local]
        always = {*candidates[:sinks], *(candidates[max(0, len(candidates) - local) :] if causal else nearest)}
        order = sorted(
            candidates, key=lambda j: (j not in always, row[j] != row[j], -row[j] if row[j] == row[j] else j, j)
        )
        masses = [Fraction(max(row[j], 0)) if row[j] == row[j] else Fraction(0) for j in order]
        kept = max(1, len(always))
        if budget is not None:
            kept = max(kept, int(budget[tuple(place)]))
        else:
            while kept < len(order) and sum(masses[:kept]) < Fraction(threshold) * sum(masses):
                kept += 1
        chosen = sorted(order[: min(kept, most) if most else kept])
        counts[tuple(place)] = len(chosen)
        for slot, j in enumerate(chosen):
            indices[(*place, slot)] = 2 * j + (state[j] == 2)
    return counts, indices


@st.composite
def problems(draw, finite=True):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    rows, columns = draw(st.integers(0, 5)), draw(st.sampled_from([0, 1, 2, 5, 15, 16, 17, 40]))
    shape = (2, 2, rows, columns)
    kind = draw(st.sampled_from(["normal", "few values", "softmax", "wide"]))
    scores = torch.randn(shape, generator=generator)
    if kind == "few values":
        scores = scores.round()  # ties, and -0
    elif kind == "softmax":
        scores = (3 * scores).softmax(-1) if columns else scores
    elif kind == "wide":
        scores = scores * 10.0 ** torch.randint(-12, 13, shape, generator=generator)
    if draw(st.booleans()):
        scores = scores.masked_fill(torch.rand(shape, generator=generator) < 0.2, NAN)
    if not finite:
        scores = scores.masked_fill(torch.rand(shape, generator=generator) < 0.1, INF)
        scores = scores.masked_fill(torch.rand(shape, generator=generator) < 0.1, -INF)
        scores = scores.masked_fill(torch.rand(shape, generator=generator) < 0.1, 1e-42)
    share = draw(st.sampled_from([0.0, 0.3, 1.0]))
    states = torch.randint(1, 3, (draw(st.sampled_from([1, 2])), *shape[1:]), dtype=torch.uint8, generator=generator)
    states = states.masked_fill(torch.rand(states.shape, generator=generator) < share, 0)
    budget = None
    if draw(st.booleans()):
        budget = torch.randint(-1, columns + 3, (2, 1, rows), dtype=torch.int32, generator=generator)
    options = {
        "threshold": draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.95, 1.0])),
        "most": draw(st.sampled_from([0, 0, 1, 3, 50])),
        "sinks": draw(st.integers(0, 3)),
        "local": draw(st.integers(0, 3)),
        "causal": draw(st.booleans()),
        "block_q": draw(st.sampled_from([16, 64, 128])),
        "block_k": draw(st.sampled_from([16, 64])),
    }
    return scores, states, budget, options


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype == torch.int32 and one.is_contiguous()
        assert torch.equal(one, other), f"{one}\n{other}"


@given(problems())
@settings(max_examples=40)
def test_the_reference_is_the_definition(problem):
    scores, states, budget, options = problem
    full = (states.expand(scores.shape), None if budget is None else budget.expand(scores.shape[:3]))
    # Fractions count what is below 2^-40 of the largest: only without such scores the two agree to the last block.
    largest = scores.nan_to_num(0.0).amax(-1, keepdim=True) if scores.shape[3] else scores
    scores = scores.masked_fill((scores > 0) & (scores < largest * 2.0**-16), 0.0)
    assert_same(reference(scores, states, budget, **options), search(scores, *full, **options))


@given(problems(finite=False), st.booleans(), st.sampled_from([1, 2]))
@settings(max_examples=40)
def test_native_selects_what_the_reference_does(problem, transposed, threads):
    scores, states, budget, options = problem
    if transposed:
        scores, states = scores.mT.contiguous().mT, states.mT.contiguous().mT
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = torch.ops.tilewright.select_blocks(scores, states, budget, **options, target="cpp")
    finally:
        torch.set_num_threads(before)
    assert_same(found, reference(scores, states, budget, **options))


def check_interpreted(examples):
    @given(problems(finite=False))
    @settings(max_examples=examples)
    def run(problem):
        scores, states, budget, options = problem
        scores, states, budget = scores[:1, :1], states[:1, :1], None if budget is None else budget[:1]
        found = torch.ops.tilewright.select_blocks(scores, states, budget, **options, target="triton-interpret")
        assert_same(found, reference(scores, states, budget, **options))

    run()


def test_triton_selects_what_the_reference_does():
    check_interpreted(4)


@pytest.mark.grid
def test_triton_selects_what_the_reference_does_in_many_cases():
    check_interpreted(60)


def test_many_blocks_in_many_rows():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 3, 300, 301, generator=generator).mul(4).softmax(-1)
    states = (torch.arange(300)[:, None] >= torch.arange(301)).to(torch.uint8)[None, None]
    options = {"threshold": 0.9, "block_q": 128, "block_k": 128}
    found = torch.ops.tilewright.select_blocks(scores, states, **options, target="cpp")
    assert_same(found, reference(scores, states, **options))
    kept = torch.zeros(scores.shape[:3])
    for slot in range(found[1].shape[3]):
        entry = found[1][..., slot].long()
        kept += torch.where(entry < 0, 0.0, scores.gather(-1, (entry >> 1).clamp(min=0)[..., None])[..., 0])
    assert (kept >= 0.9 * (scores * (states > 0)).sum(-1) - 1e-5).all()
    assert (found[0][..., 0] == 1).all() and found[0].float().mean() < 75


@pytest.mark.parametrize("target", ["reference", "cpp"])
def test_a_row_by_hand(target):
    scores = torch.tensor([0.05, 0.3, NAN, 0.3, 0.3, 0.05])[None, None, None]
    states = torch.tensor([2, 1, 2, 2, 2, 1], dtype=torch.uint8)[None, None, None]

    def select(**options):
        counts, indices = torch.ops.tilewright.select_blocks(
            scores, states, options.pop("budget", None), block_q=16, block_k=16, target=target, **options
        )
        assert (indices[0, 0, 0, int(counts) :] == -1).all()
        return indices[0, 0, 0, : int(counts)].tolist()

    assert select(threshold=0.6) == [1, 2, 7, 10]  # first, last and two of three equal ones: the earlier
    assert select(threshold=0.6, sinks=0, local=0) == [2, 7]
    assert select(threshold=0.0, sinks=0, local=0) == [2]
    assert select(threshold=1.0) == [1, 2, 7, 9, 10]
    assert select(threshold=0.7, causal=False, local=2, sinks=0) == [1, 2, 7, 9]  # nearest to block 0: 0 and 1
    assert select(budget=torch.tensor([[[3]]], dtype=torch.int32)) == [1, 2, 10]
    assert select(budget=torch.tensor([[[99]]], dtype=torch.int32)) == [1, 2, 5, 7, 9, 10]
    assert select(threshold=1.0, most=1) == [1] and select(threshold=1.0, most=3) == [1, 2, 10]
    states.zero_()
    assert select() == []


# --------------------------------------------------------------------------------------------------------- the op


def call(target="cpp", **changes):
    scores, states = torch.rand(2, 4, 5, 9), torch.randint(0, 3, (1, 1, 5, 9), dtype=torch.uint8)
    budget = torch.full((2, 4, 1), 3, dtype=torch.int32)
    options = {"threshold": 0.9, "block_q": 16, "block_k": 16, "target": target} | changes
    return OPS["select_blocks"].overload, (scores, states, budget), options


@pytest.mark.parametrize("target", [pytest.param(t, marks=pytest.mark.grid) for t in ("reference", "cpp")])
def test_opcheck(target):
    overload, inputs, options = call(target, most=4)
    torch.library.opcheck(overload, inputs, options)


def test_opcheck_of_the_kernel_op():
    _, (scores, states, _), options = call()
    options = {"most": 4, "sinks": 1, "local": 1, "causal": True} | options
    kernel = torch.ops.tilewright.select_blocks_forward.default
    torch.library.opcheck(kernel, (scores, states.expand(2, 4, 5, 9), None), options)


def test_scores_that_require_gradients_and_shapes_that_broadcast():
    overload, (scores, states, budget), options = call()
    counts, indices = overload(scores[:, :1].requires_grad_(), states, budget, **options)
    assert counts.shape == (2, 4, 5) and indices.shape == (2, 4, 5, 9)
    assert not counts.requires_grad and not indices.requires_grad
    for dtype in (torch.float64, torch.bfloat16):
        rounded = scores.to(dtype)
        assert_same(
            overload(rounded, states, None, **options),
            reference(rounded, states, block_q=16, block_k=16, threshold=0.9),
        )


def test_symbolic_sizes(fresh_dynamo):
    overload, _, options = call()
    compiled = torch.compile(lambda *x: overload(*x, **options), backend="aot_eager", dynamic=True, fullgraph=True)
    for rows in (5, 9):
        scores, states = torch.rand(1, 2, rows, rows + 2), torch.ones(1, 1, rows, rows + 2, dtype=torch.uint8)
        assert_same(compiled(scores, states), overload(scores, states, **options))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"threshold": NAN}, "threshold is nan"),
        ({"most": -1}, "most is -1"),
        ({"sinks": -1}, "sinks is -1"),
        ({"local": -2}, "local is -2"),
        ({"block_q": 0}, "block_q is 0"),
        ({"scores": torch.ones(2, 4, 5, 9, dtype=torch.int32)}, "scores are torch.int32"),
        ({"scores": torch.rand(4, 5, 9)}, "scores has 3 dimensions"),
        ({"scores": torch.rand(2, 4, 5, 8)}, "do not broadcast"),
        ({"states": torch.ones(1, 1, 5, 9)}, "states are torch.float32"),
        ({"budget": torch.ones(2, 4, 5)}, "the budget is torch.float32"),
        ({"budget": torch.ones(2, 4, 4, dtype=torch.int32)}, "and a budget"),
    ],
)
def test_bad_input(change, says):
    overload, (scores, states, budget), options = call()
    tensors = [change.pop(name, x) for name, x in (("scores", scores), ("states", states), ("budget", budget))]
    for target in ("reference", "cpp"):
        with pytest.raises(BadArgument, match=says):
            overload(*tensors, **{**options, **change, "target": target})


def test_what_no_kernel_computes():
    scores, states = torch.rand(1, 1, 2, 2 * MAX_CAPACITY), torch.ones(1, 1, 2, 2 * MAX_CAPACITY, dtype=torch.uint8)
    with pytest.raises(UnsupportedKernel, match=f"a row has {2 * MAX_CAPACITY} blocks"):
        spec(scores, states, target="triton-interpret")
    with pytest.raises(UnsupportedKernel, match="triton kernels take cuda tensors, and scores is on cpu"):
        spec(scores, states, target="triton")
    with pytest.raises(UnsupportedKernel, match="no select_blocks kernel for target 'metal'"):
        spec(scores, states, target="metal")
