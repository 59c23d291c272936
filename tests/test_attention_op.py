"""``tilewright::attention``: its reference, its ATen form, its kernel ops and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F

from tilewright.codegen.attention import AttentionSpec, Tiles
from tilewright.runtime.errors import BadArgument, UnsupportedKernel
from tilewright.runtime.ops import OPS, attention_kernel
from tilewright.runtime.ops.attention import TOLERANCE, reference

attention = torch.ops.tilewright.attention
CAUSAL, END = "k_idx <= q_idx", "k_idx <= q_idx + k_len - q_len"
WINDOW = "(k_idx <= q_idx) & (k_idx > q_idx - 3)"
MASKS = [
    "",
    CAUSAL,
    END,
    WINDOW,
    "(k_idx // 4 == q_idx // 4) | (head == 1)",
    "batch == 1",
    "q_idx > 2",
    "k_len > q_len",
]


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(attention_kernel, "INTERPRETER_TILES", Tiles(16, 16, 4, 1))
    attention_kernel._forward_spec.cache_clear()
    attention_kernel._backward_spec.cache_clear()
    yield
    attention_kernel._forward_spec.cache_clear()
    attention_kernel._backward_spec.cache_clear()


def inputs(q_len=7, k_len=9, heads=2, group=2, dim=8, value_dim=6, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    q = torch.randn(2, q_len, heads * group, dim, dtype=dtype).transpose(1, 2).requires_grad_()
    k = torch.randn(2, heads, k_len, dim, dtype=dtype, requires_grad=True)
    v = torch.randn(2, heads, k_len, value_dim, dtype=dtype, requires_grad=True)
    return q, k, v


def biases(q_len, k_len, dtype):
    full = torch.randn(2, 4, q_len, k_len, dtype=dtype)
    return {
        "none": None,
        "bool": full > -0.5,
        "float": full,
        "key padding": (full > -0.5)[:, :1, :1],
        "two dimensions": full[0, 0],
        "expanded -inf": full[:, :1, :1].masked_fill(full[:, :1, :1] > 0.5, float("-inf")).expand(2, 4, q_len, k_len),
        "column": full[..., :1],
    }


def results(call, args, grad):
    out = call(*args)
    leaves = [t for t in args if t is not None and t.requires_grad]
    return [out, *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lengths", [(7, 9), (9, 7), (1, 9), (0, 3), (3, 0)])
def test_aten_form_is_the_reference(lengths, mask, normalizer):
    q, k, v = inputs(*lengths)
    options = {"scale": 0.3, "mask": mask, "normalizer": normalizer}
    for name, bias in biases(*lengths, torch.float64).items():
        if name == "column" and lengths[1] == 0:
            continue
        shift = torch.randn(4, 1, 1) if normalizer == "sigmoid" else None
        grad = torch.randn(2, 4, lengths[0], 6, dtype=torch.float64)
        found = results(lambda *a: attention(*a, **options), (q, k, v, bias, shift), grad)
        expected = results(lambda *a: reference(*a, **options), (q, k, v, bias, shift), grad)
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f, e, atol=1e-12, rtol=1e-12, msg=lambda m: f"{name}: {m}")  # noqa: B023


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid"])
@pytest.mark.parametrize("mask", ["", CAUSAL, WINDOW])
def test_aten_form_is_within_the_tolerance(mask, normalizer, dtype):
    q, k, v = inputs(65, 70, dim=64, value_dim=64, dtype=dtype)
    shift = torch.tensor([-4.0]) if normalizer == "sigmoid" else None
    options = {"scale": 0.125, "mask": mask, "normalizer": normalizer}
    found = attention(q, k, v, None, shift, **options)
    expected = reference(q.double(), k.double(), v.double(), None, shift, **options)
    assert found.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), expected, atol=tolerance.atol, rtol=tolerance.rtol)


def test_reference_is_sdpa():
    q, k, v = inputs(7, 9, group=1)
    torch.testing.assert_close(reference(q, k, v, scale=0.2), F.scaled_dot_product_attention(q, k, v, scale=0.2))
    causal = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2)
    torch.testing.assert_close(reference(q, k, v, scale=0.2, mask=CAUSAL), causal)
    hidden = torch.rand(7, 9) > 0.5
    hidden[2] = False
    masked = F.scaled_dot_product_attention(q, k, v, attn_mask=hidden, scale=0.2)
    found = reference(q, k, v, hidden, scale=0.2)
    torch.testing.assert_close(found, masked)
    assert not found[:, :, 2].any()


@pytest.mark.parametrize("form", ["reference", "aten"])
@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid"])
@pytest.mark.parametrize("mask", ["", CAUSAL, "q_idx > 1"])
def test_gradcheck(mask, normalizer, form):
    q, k, v = (t.detach().requires_grad_() for t in inputs(4, 5, dim=3, value_dim=2))
    bias = torch.randn(1, 4, 4, 5, dtype=torch.float64, requires_grad=True)
    # float32 by contract; float64 here, so that finite differences mean something.
    shift = torch.randn(4, 1, 1, dtype=torch.float64, requires_grad=True) if normalizer == "sigmoid" else None
    call = reference if form == "reference" else attention
    options = {"scale": 0.3, "mask": mask, "normalizer": normalizer}
    assert torch.autograd.gradcheck(lambda *a: call(*a, **options), (q, k, v, bias, shift))


@pytest.mark.parametrize("target", ["triton-interpret", "cpp"])
@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid"])
def test_kernels_through_the_op(normalizer, target, small_tiles):
    q, k, v = inputs(19, 21, heads=1, dim=16, value_dim=16, dtype=torch.float32)
    bias = torch.randn(2, 1, 21, requires_grad=True)
    shift = torch.randn(2, 1, 1, requires_grad=True) if normalizer == "sigmoid" else None
    options = {"scale": 0.25, "mask": CAUSAL, "normalizer": normalizer}
    grad = torch.randn(2, 2, 19, 16)
    found = results(lambda *a: attention(*a, **options, target=target), (q, k, v, bias, shift), grad)
    expected = results(lambda *a: reference(*a, **options), (q, k, v, bias, shift), grad)
    for f, e in zip(found, expected, strict=True):
        assert f.shape == e.shape and f.dtype == e.dtype
        torch.testing.assert_close(f, e, atol=5e-5, rtol=2e-5)


@pytest.mark.parametrize("target", ["triton-interpret", "cpp"])
@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid"])
def test_opcheck(normalizer, target, small_tiles):
    q, k, v = inputs(5, 6, heads=1, dim=16, value_dim=16, dtype=torch.float32)
    bias = torch.randn(1, 2, 1, 6, requires_grad=True)
    shift = torch.randn(1, 2, 1, 1, requires_grad=True) if normalizer == "sigmoid" else None
    options = {"scale": 0.25, "mask": CAUSAL, "normalizer": normalizer}
    utils = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(attention.default, (q, k, v, bias, shift), {**options, "target": "reference"})
    forward = torch.ops.tilewright.attention_forward.default
    options["target"] = target
    torch.library.opcheck(forward, (q, k, v, bias, shift), options, test_utils=utils)
    if normalizer == "softmax":  # ahead-of-time dispatch runs the kernels some ten times: once is enough
        torch.library.opcheck(forward, (q, k, v, None, None), options, test_utils="test_aot_dispatch_dynamic")
    args = [t if t is None else t.detach() for t in (q, k, v, bias, shift)]
    out, lse = forward(*args, **options)
    backward = torch.ops.tilewright.attention_backward.default
    options |= {"grad_bias": True, "grad_shift": normalizer == "sigmoid"}
    torch.library.opcheck(backward, (torch.randn_like(out), *args, out, lse, None), options, test_utils=utils)


@pytest.mark.parametrize(
    ("mask", "target"),
    [(WINDOW, "reference"), (END, "reference"), (CAUSAL, "reference"), (END, "triton-interpret"), (END, "cpp")],
)
def test_one_graph_for_all_lengths_in_training(mask, target, fresh_dynamo, small_tiles):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(dynamic=True, fullgraph=True, backend=counter)
    def compiled(q, k, v):
        return attention(q, k, v, scale=0.3, mask=mask, target=target)

    for length in (17, 12, 31):
        q, k, v = inputs(length, length + 3, heads=1, dim=16, value_dim=16, dtype=torch.float32)
        grad = torch.randn(2, 2, length, 16)
        found = results(compiled, (q, k, v), grad)
        expected = results(lambda *a: reference(*a, scale=0.3, mask=mask), (q, k, v), grad)
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f, e, atol=5e-5, rtol=2e-5)
    assert counter.frame_count == 1


def test_export_keeps_the_op_and_the_lengths_symbolic():
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v, scale=0.3, mask=WINDOW)

    length = torch.export.Dim("length", min=2, max=4096)
    shapes = ({2: length}, {2: length}, {2: length})
    exported = torch.export.export(Model(), inputs(9, 9), dynamic_shapes=shapes)
    assert [n.target for n in exported.graph.nodes if n.op == "call_function"] == [attention.default]
    args = inputs(31, 31, seed=1)
    torch.testing.assert_close(exported.module()(*args), reference(*args, scale=0.3, mask=WINDOW))
    text = str(exported.run_decompositions().graph)
    assert "tilewright" not in text and "arange" in text


def specification(*args, target="triton-interpret", **options):
    return OPS["attention"].spec(*args, scale=1.0, target=target, **options)


def test_spec_of_a_call():
    q, k, v = inputs(7, 9, dtype=torch.bfloat16)
    padding = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    spec = specification(q, k, v, padding.expand(2, 4, 7, 9), mask="q_idx >= k_idx")
    assert isinstance(spec, AttentionSpec)
    expected = {"head_dim": 8, "value_dim": 6, "dtype": "bfloat16", "mask": CAUSAL, "bias": "bool", "bias_rows": False}
    expected |= {"group": 2, "wide": False, "shift": False}
    assert {name: getattr(spec, name) for name in expected} == expected
    assert specification(q, k, v, padding.expand(2, 4, 7, 9), mask="q_idx >= k_idx") is spec
    assert specification(q, k, v, torch.ones(7, 9)).bias_rows
    far = torch.empty(1, device="meta").as_strided((1, 1, 300, 8), (0, 0, 2**23, 1))
    assert attention_kernel._wide(far) and not attention_kernel._wide(far.contiguous())


def test_one_native_kernel_for_all_layouts():
    """Broadcast, strided or far apart: the native kernel reads strides when it runs, so that the spec is the same."""
    q, k, v = inputs(7, 9, dtype=torch.float32)
    padding = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    found = {
        specification(q, k, v, bias, target="cpp")
        for bias in (padding, padding.expand(2, 4, 7, 9), torch.ones(7, 9, dtype=torch.bool))
    }
    far = torch.empty(8).as_strided((1, 2, 1, 8), (0, 0, 2**23, 1))
    assert len(found) == 1 and not specification(q[:1, :, :1], far, far, target="cpp").wide


def test_native_launches_that_are_kept_do_not_mix_tensors_up():
    """A signature says nothing of where tensors lie: one tensor as q, k and v first, then three."""
    options = {"scale": 0.25, "target": "cpp"}
    with torch.no_grad():
        x, y, z = (torch.randn(1, 2, 33, 16) for _ in range(3))
        for _ in range(300):
            attention(x, x, x, **options)
        torch.testing.assert_close(attention(x, y, z, **options), reference(x, y, z, scale=0.25))
        out = attention(x, y, z, **options)
        assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "not torch.float64"),
        ({"dim": 257}, "257"),
        ({"value_dim": 300}, "300"),
        ({"target": "triton"}, "cuda tensors, and q is on cpu"),
        ({"target": "metal"}, "target 'metal'"),
        ({"bias": torch.zeros(9, dtype=torch.float64)}, "not torch.float64"),
        ({"bias": torch.zeros(9, dtype=torch.int64)}, "not torch.int64"),
        ({"mask": "k_idx < 0"}, "hides every pair"),
    ],
)
def test_unsupported_calls_say_why(change, reason):
    options = dict(change)
    shapes = {name: options.pop(name) for name in ("dtype", "dim", "value_dim") if name in options}
    q, k, v = inputs(7, 9, **({"dtype": torch.float32} | shapes))
    with pytest.raises(UnsupportedKernel, match=reason):
        specification(q, k, v, options.pop("bias", None), **options)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"k": torch.randn(2, 3, 9, 8)}, "no multiple"),
        ({"k": torch.randn(2, 2, 9, 7)}, "channels"),
        ({"v": torch.randn(2, 2, 8, 8)}, "differ"),
        ({"v": torch.randn(2, 2, 9, 8).half()}, "dtypes"),
        ({"q": torch.randn(4, 7, 8)}, "dimensions"),
        ({"normalizer": "relu"}, "normalizer"),
        ({"shift": torch.zeros(1)}, "shift"),
        ({"mask": "k_idx <= nothing"}, "column 10"),
        ({"bias": torch.zeros(1, 2, 4, 7, 9)}, "5 dimensions"),
        ({"target": "tpu"}, "target 'tpu'"),
    ],
)
def test_meaningless_calls_are_refused(change, says):
    options = {"scale": 1.0} | change
    defaults = {"q": torch.randn(2, 4, 7, 8), "k": torch.randn(2, 2, 9, 8), "v": torch.randn(2, 2, 9, 8)}
    args = [options.pop(name, default) for name, default in {**defaults, "bias": None, "shift": None}.items()]
    with pytest.raises((BadArgument, UnsupportedKernel), match=says):
        attention(*args, **options)
