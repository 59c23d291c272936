"""block_scores: sums of softmax weights over tiles, by native and Triton kernels, against float64 with a bound."""

from __future__ import annotations

import ast
import functools

import pytest
import torch
from attention_bounds import DTYPES, U32, close
from golden import check_golden
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.codegen.block_scores import BlockScoresSpec
from tilewright.codegen.render import render
from tilewright.codegen.spec import KernelSpec, SpecError
from tilewright.codegen.symbols import mask_text
from tilewright.runtime import cpu
from tilewright.runtime import settings as runtime_settings
from tilewright.runtime.cross_compile import cross_compile
from tilewright.runtime.errors import BadArgument, UnsupportedKernel
from tilewright.runtime.load import forget, load
from tilewright.runtime.ops import OPS
from tilewright.runtime.ops.block_scores import reference, spec

CAUSAL = "k_idx <= q_idx"
SINKS = mask_text("(k_idx <= q_idx + 3) & ((k_idx < 4) | (k_idx > q_idx - 40))")
HEADS = mask_text("(k_idx % 3 == q_idx % 3) | (k_idx <= q_idx - 20 * head)")

GOLDEN = {
    "block_scores_native": (BlockScoresSpec(dtype="bfloat16", mask=CAUSAL), "cpp"),
    "block_scores_native_ranges": (BlockScoresSpec(mask=SINKS), "cpp"),
    "block_scores": (BlockScoresSpec(dtype="bfloat16", mask=CAUSAL, block_k=8), "triton"),
    "block_scores_ranges": (BlockScoresSpec(mask=SINKS, block_k=150, block_c=32, num_warps=8), "triton"),
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


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"mask": "q_idx >= k_idx"}, "canonical text is 'k_idx <= q_idx'"),
        ({"mask": "False"}, "hides every pair"),
        ({"mask": "table(k_idx) > 0"}, "no table to look up"),
        ({"block_k": -1}, "block_k is -1"),
        ({"block_m": 48}, "block_m is 48"),
        ({"num_stages": 9}, "num_stages is 9"),
    ],
)
def test_specs_out_of_range_are_refused(change, says):
    with pytest.raises(SpecError, match=says):
        BlockScoresSpec(**change)


@pytest.mark.parametrize(
    "target", ["gfx942", *(pytest.param(t, marks=pytest.mark.grid) for t in ("sm_80", "sm_90", "sm_100"))]
)
def test_compiles_for_gpus_that_are_not_here(target):
    small = BlockScoresSpec(dtype="float16", mask=CAUSAL, block_k=8, block_m=32, block_n=32, block_c=32)
    for one in [small] if target == "gfx942" else [small, *(s for s, t in GOLDEN.values() if t == "triton")]:
        for kernel in cross_compile(render(one, "triton"), target):
            assert kernel.stack_bytes <= 16 and kernel.shared_bytes <= 64 << 10  # no spills to speak of


# ---------------------------------------------------------------------------------------------------------- numbers


def bounded(q, k, scale, mask, block_q, block_k):
    """The block sums in float64, and how far float32 may be from them.

    A score is off by e = (C + 8) u32 times the sum of its terms' magnitudes; a weight by a factor of 2 e (numerator and
    denominator) and (N + 32) u32 for exp and the sum over N keys; adding the block_q rows costs block_q u32 more.
    """
    exact, wide = (q.double(), k.double()), k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    out = reference(*exact, scale=scale, mask=mask, block_q=block_q, block_k=block_k)
    size = abs(scale) * (exact[0].abs() @ wide.abs().mT)
    error = (q.shape[3] + 8) * U32 * (size.amax().item() if size.numel() else 0.0)
    return out, (2 * error + (k.shape[2] + block_q + 32) * U32) * out


@functools.cache
def launch(dtype: str, mask: str, where: str, block_k: int = 0):
    """The launch of a kernel for an instruction set, or in the interpreter."""
    if where == "interpret":
        return load(BlockScoresSpec(dtype, mask, block_k, 16, 16, 16), "triton-interpret").launch
    with runtime_settings.override(cpu_isa=where):
        forget()
        found = load(BlockScoresSpec(dtype, mask), "cpp").launch
        forget()
    return found


def laid_out(generator, batch, heads, length, channels, layout, dtype):
    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    if layout == "heads_last":
        return normal(batch, length, heads, channels).transpose(1, 2)
    if layout == "transposed":
        return normal(batch, heads, channels, length).mT
    if layout == "strided":
        return normal(batch, heads, 2 * length, 2 * channels)[:, :, ::2, ::2]
    return normal(batch, heads, length, channels)


# Around a vector, a strip (32 or 64 queries), a tile (64 or 128 keys) and the rows a thread takes (128).
LENGTHS = [0, 1, 2, 15, 16, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200, 300]
CHANNELS = [1, 3, 16, 31, 32, 33, 64, 65, 100, 260]
BLOCKS = [1, 2, 3, 8, 16, 31, 64, 100, 150, 400]


def check_native(dtype, mask, isa, examples):
    if isa not in cpu.supported():
        pytest.skip(f"this CPU has no {isa}")
    kernel = launch(dtype, mask, isa)

    @given(
        st.tuples(*(st.sampled_from(values) for values in (LENGTHS, LENGTHS, CHANNELS, BLOCKS, BLOCKS))),
        st.sampled_from([(1, 1, 1), (2, 2, 2), (1, 4, 2)]),
        st.sampled_from(["plain", "plain", "heads_last", "transposed", "strided"]),
        st.integers(0, 99),
        st.sampled_from([1, 2, 3]),
    )
    @settings(max_examples=examples)
    def run(sizes, heads, layout, seed, threads):
        q_len, k_len, channels, block_q, block_k = sizes
        batch, q_heads, k_heads = heads
        generator = torch.Generator().manual_seed(seed)
        q = laid_out(generator, batch, q_heads, q_len, channels, layout, DTYPES[dtype])
        k = laid_out(generator, batch, k_heads, k_len, channels, layout, DTYPES[dtype])
        scale = (-1 if seed % 5 == 0 else 1) * (1.5 if seed % 7 == 0 else 0.5) * channels**-0.5
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            out = kernel(q, k, scale, block_q, block_k)
        finally:
            torch.set_num_threads(before)
        close("out", out, *bounded(q, k, scale, mask, block_q, block_k))

    run()


@pytest.mark.parametrize(("dtype", "mask"), [("float32", SINKS), ("bfloat16", CAUSAL)])
def test_native_kernels_match_float64(dtype, mask):
    check_native(dtype, mask, cpu.supported()[0], 20)


@pytest.mark.grid
@pytest.mark.parametrize("isa", ["amx", "avx512", "avx2", "baseline"])
@pytest.mark.parametrize("mask", ["", CAUSAL, SINKS, HEADS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_native_kernel_matches_float64(dtype, mask, isa):
    check_native(dtype, mask, isa, 60)


@pytest.mark.parametrize("layout", ["plain", "heads_last"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_folded_channels_of_xattention(dtype, layout):
    """Wide channels go through slices of 64 or 256; these keys are read as they are, whole tiles and the last one."""
    mask = SINKS if dtype == "float32" else CAUSAL
    generator = torch.Generator().manual_seed(0)
    q, k = (laid_out(generator, 1, heads, 300, 1024, layout, DTYPES[dtype]) for heads in (2, 1))
    out = launch(dtype, mask, cpu.supported()[0])(q, k, 1 / 32, 8, 8)
    close("out", out, *bounded(q, k, 1 / 32, mask, 8, 8))


@pytest.mark.parametrize(
    ("dtype", "mask", "sizes"),
    [
        ("float32", SINKS, (37, 53, 20, 8, 5)),
        ("bfloat16", CAUSAL, (20, 50, 40, 3, 8)),
        ("bfloat16", CAUSAL, (33, 70, 17, 40, 33)),  # a block of keys in three tiles
        pytest.param("float16", "", (40, 40, 16, 16, 16), marks=pytest.mark.grid),
        pytest.param("float32", HEADS, (70, 90, 33, 9, 20), marks=pytest.mark.grid),
        pytest.param("float32", CAUSAL, (0, 20, 8, 4, 4), marks=pytest.mark.grid),
        pytest.param("float32", CAUSAL, (20, 0, 8, 4, 4), marks=pytest.mark.grid),
    ],
)
def test_triton_kernels_match_float64(dtype, mask, sizes):
    q_len, k_len, channels, block_q, block_k = sizes
    generator = torch.Generator().manual_seed(0)
    q = laid_out(generator, 1, 2, q_len, channels, "heads_last", DTYPES[dtype])
    k = laid_out(generator, 1, 1, k_len, channels, "plain", DTYPES[dtype])
    out = launch(dtype, mask, "interpret", block_k)(q, k, 0.3, block_q, block_k)
    close("out", out, *bounded(q, k, 0.3, mask, block_q, block_k))


def test_scratch_of_the_triton_kernel_is_bounded():
    """More heads than the scratch holds are done one part after the other, with the same result."""
    generator = torch.Generator().manual_seed(0)
    q, k = (laid_out(generator, 1, heads, 9, 16, "plain", torch.float32) for heads in (4, 2))
    kernel = launch("float32", CAUSAL, "interpret", 8)
    whole = kernel(q, k, 0.3, 4, 8)
    names = kernel.__wrapped__.__globals__
    before, names["MOST_SCRATCH"] = names["MOST_SCRATCH"], 3 * 9 * 2
    try:
        assert torch.equal(kernel(q, k, 0.3, 4, 8), whole)
    finally:
        names["MOST_SCRATCH"] = before


KERNELS = [("float32", cpu.supported()[0]), ("bfloat16", cpu.supported()[0]), ("float32", "interpret")]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("dtype", "where"), KERNELS)
def test_rows_that_see_nothing_and_rows_of_infinities(dtype, where):
    mask = SINKS if (dtype, where) == ("float32", cpu.supported()[0]) else CAUSAL
    q, k = torch.zeros(1, 1, 24, 8), torch.zeros(1, 1, 24, 8)
    q[..., 0] = 1.0
    q[0, 0, 3, 0], q[0, 0, 10, 0] = float("nan"), float("inf")
    k[0, 0, :, 0] = 1.0
    kernel = launch(dtype, mask, where, 8)
    out = kernel(q.to(DTYPES[dtype]), k.to(DTYPES[dtype]), 1.0, 1, 8)[0, 0]
    assert out[3, 0].isnan() and out[10, 0].isnan()
    good = [row for row in range(24) if row not in (3, 10)]
    assert torch.allclose(out[good].sum(1), torch.ones(len(good)))
    k[0, 0, :, 0] = float("-inf")
    q[..., 0] = 1.0
    assert not kernel(q.to(DTYPES[dtype]), k.to(DTYPES[dtype]), 1.0, 4, 8).any()


def test_hidden_rows_add_nothing():
    q, k = torch.randn(1, 1, 40, 16), torch.randn(1, 1, 30, 16)
    kernel = launch("float32", SINKS, cpu.supported()[0])
    beyond = reference(q, k, scale=1.0, mask=mask_text("k_idx > q_idx + 20"), block_q=8, block_k=8)
    assert not beyond[0, 0, 2:].any() and beyond.any()
    # Queries from 37 on see the first four keys only: those below their window.
    out = kernel(q, k[:, :, 4:].contiguous(), 1.0, 8, 8)
    assert torch.allclose(out.sum(-1), torch.full((1, 1, 5), 8.0))


# ------------------------------------------------------------------------------------------------------- the op


def call(target="cpp", **changes):
    given_ = {"scale": 0.2, "mask": CAUSAL, "block_q": 8, "block_k": 16, "target": target} | changes
    return OPS["block_scores"].overload, (torch.randn(2, 4, 37, 24), torch.randn(2, 2, 50, 24)), given_


@pytest.mark.grid
@pytest.mark.parametrize("target", ["reference", "cpp"])
def test_opcheck(target):
    torch.library.opcheck(*call(target))


@pytest.mark.parametrize("target", ["reference", "cpp"])
def test_no_gradient(target):
    overload, inputs, options = call(target)
    out = overload(*(x.requires_grad_() for x in inputs), **options)
    assert out.shape == (2, 4, 5, 4) and out.dtype == torch.float32 and not out.requires_grad
    close("out", out, *bounded(*(x.detach() for x in inputs), 0.2, CAUSAL, 8, 16))


def test_opcheck_of_the_kernel_op():
    _, inputs, options = call()
    torch.library.opcheck(torch.ops.tilewright.block_scores_forward.default, inputs, options)


def test_symbolic_lengths(fresh_dynamo):
    overload, _, options = call()
    compiled = torch.compile(lambda q, k: overload(q, k, **options), backend="aot_eager", dynamic=True, fullgraph=True)
    for length in (33, 70):
        q, k = torch.randn(1, 2, length, 24), torch.randn(1, 2, length + 5, 24)
        assert torch.equal(compiled(q, k), overload(q, k, **options))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mask": "k_idx <"}, "mask"),
        ({"mask": "table(k_idx) > 0"}, "looks entries of a table up"),
        ({"block_q": 0}, "block_q is 0"),
        ({"block_k": -3}, "block_k is -3"),
        ({"q": torch.randn(2, 37, 24)}, "q has 3 dimensions"),
        ({"q": torch.randn(2, 3, 37, 24)}, "3 query heads are no multiple of 2"),
        ({"q": torch.randn(2, 4, 37, 20)}, "20 channels and keys 24"),
        ({"q": torch.randn(1, 4, 37, 24)}, "1 batches and k 2"),
        ({"q": torch.randn(2, 4, 37, 24).half()}, "which must be the same"),
        ({"q": torch.ones(2, 4, 37, 24, dtype=torch.int32)}, "not floating"),
    ],
)
def test_bad_input(change, says):
    overload, (q, k), options = call()
    q = change.pop("q", q)
    for target in ("reference", "cpp"):
        with pytest.raises(BadArgument, match=says):
            overload(q, k, **{**options, **change, "target": target})


def test_what_no_kernel_computes():
    q = torch.randn(1, 1, 8, 8)
    for target, changes, says in (
        ("opencl", {}, "no block_scores kernel for target 'opencl'"),
        ("triton", {}, "triton kernels take cuda tensors, and q is on cpu"),
        ("cpp", {"mask": "False"}, "hides every pair"),
    ):
        with pytest.raises(UnsupportedKernel, match=says):
            spec(q, q, **{"mask": "", "block_q": 8, "block_k": 8, **changes}, target=target)
    with pytest.raises(UnsupportedKernel, match="not torch.float64"):
        spec(q.double(), q.double(), block_k=8)
