"""Native kernels of norms, rope and gated MLPs for each instruction set, against float64 and PyTorch's gradients."""

from __future__ import annotations

import math

import pytest
import torch
from golden import check_golden
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tilewright.codegen.gated import GatedBackwardSpec, GatedSpec
from tilewright.codegen.norm import NormBackwardSpec, NormSpec
from tilewright.codegen.render import render
from tilewright.codegen.rope import LAYOUTS, RopeSpec
from tilewright.codegen.spec import KernelSpec, SpecError
from tilewright.runtime.errors import BadArgument, UnsupportedKernel
from tilewright.runtime.ops import OPS, gated_mlp, rope

ROW_KERNELS = True  # conftest.py leaves two of the four instruction sets to `make grid`

INF, NAN = math.inf, math.nan
HALF = (torch.bfloat16, torch.float16)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ops = torch.ops.tilewright
# The fixture chooses the instruction set once for all examples.
drawn = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def wide(args):
    return [a.double() if isinstance(a, torch.Tensor) else a for a in args]


def check(name, args, kwargs=None, factor=1.0, dtype=None):
    """The op on its kernel is within its tolerance of the reference in float64, NaN and infinities included.

    dtype: the narrowest that something is rounded to, when it is not the result's.
    """
    op, kwargs = OPS[name], kwargs or {}
    expected = op.reference(*wide(args), **kwargs)
    actual = op.overload(*args, **kwargs, target="cpp")
    plain = op.overload(*args, **kwargs)
    if isinstance(actual, torch.Tensor):
        actual, expected, plain = (actual,), (expected,), (plain,)
    for a, e, p in zip(actual, expected, plain, strict=True):
        assert a.dtype == p.dtype and a.shape == p.shape and a.is_contiguous()
        bound = op.tolerance[dtype or a.dtype]
        # What does not fit the dtype is infinite there.
        limit = torch.finfo(a.dtype).max
        e = torch.where(e.abs() > limit * (1 + torch.finfo(a.dtype).eps / 4), e.sign() * INF, e)
        torch.testing.assert_close(a.double(), e, rtol=bound.rtol * factor, atol=bound.atol * factor, equal_nan=True)


@st.composite
def rows(draw, dtypes, last=(1, 2, 3, 15, 16, 17, 31, 64, 65, 130), even=False):
    """A tensor of any layout, seldom with NaN or an infinity in it."""
    sizes = [draw(st.sampled_from([0, 1, 2, 3, 5])) for _ in range(draw(st.integers(0, 3)))]
    sizes.append(draw(st.sampled_from([n for n in last if not even or n % 2 == 0])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    steps = [draw(st.sampled_from([1, 1, 1, 2])) for _ in sizes]
    x = torch.randn([s * step for s, step in zip(sizes, steps, strict=True)], generator=generator)
    x = x[tuple(slice(None, None, step) for step in steps)].to(draw(st.sampled_from(dtypes)))
    order = draw(st.permutations(range(len(sizes))))
    if draw(st.booleans()):
        x = x.permute(order).contiguous().permute([order.index(i) for i in range(len(sizes))])
    special = draw(st.sampled_from([None, None, None, INF, -INF, NAN]))
    if special is not None and x.numel():
        x = x.clone()
        x[tuple(size // 2 for size in x.shape)] = special
    return x


def vector(x, seed, dtype, *, positive=True):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(x.shape[-1], generator=generator) + 0.5
    return (values if positive else values * 4 - 4).to(dtype)


@drawn
@given(x=rows((F32, BF16)), seed=st.integers(0, 99), form=st.sampled_from(["plain", "gemma", "llama", "bare", "mixed"]))
def test_rms_norm(cpu_isa, x, seed, form):
    weight = None if form == "bare" else vector(x, seed, F32 if form == "mixed" else x.dtype)
    kwargs = {"weight_offset": 1.0} if form == "gemma" else {"round_before_weight": form in ("llama", "mixed")}
    check("rms_norm", (x, weight, 1e-6), kwargs, dtype=x.dtype)


@drawn
@given(x=rows((F32, BF16), last=(2, 15, 64, 130, 9000)), seed=st.integers(0, 99), bias=st.booleans())
def test_layer_norm(cpu_isa, x, seed, bias):
    b = vector(x, seed + 1, x.dtype, positive=False) if bias else None
    # Two equal neighbours: the variance is rounding alone, so eps is large enough to hide it.
    check("layer_norm", (x, [x.shape[-1]], vector(x, seed, x.dtype), b, 1e-3))


@drawn
@given(x=rows((F32, BF16)), seed=st.integers(0, 99), keep=st.booleans())
def test_norms_of_a_sum(cpu_isa, x, seed, keep):
    residual = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.dtype)
    weight, bias = vector(x, seed, x.dtype), vector(x, seed, x.dtype, positive=False)
    kwargs = {"keep_sum": keep}
    # Inputs of about one: sums below 8 deviations unless the row is short.
    factor = 4.0 if x.shape[-1] < 4 else 1.0
    check("add_rms_norm", (x, residual, weight, 1e-3), {"round_before_weight": True} | kwargs, factor)
    check("add_layer_norm", (x, residual, [x.shape[-1]], weight, bias, 1e-1), kwargs, factor)
    if keep:
        _, total = ops.add_rms_norm(x, residual, weight, 1e-6, target="cpp")
        torch.testing.assert_close(total, x + residual, rtol=0, atol=0, equal_nan=True)


@drawn
@given(
    x=rows((F32, BF16), even=True, last=(2, 6, 16, 30, 34, 64, 130)), layout=st.sampled_from(LAYOUTS), data=st.data()
)
def test_rope_is_bit_for_bit_what_models_write(cpu_isa, x, layout, data):
    dtype = data.draw(st.sampled_from([x.dtype, F32]))
    shape = [data.draw(st.sampled_from([1, s])) for s in x.shape[:-1]]
    shape = [*shape[data.draw(st.integers(0, len(shape))) :], x.shape[-1]]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    cos, sin = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    actual = ops.rope(x, cos, sin, layout=layout, target="cpp")
    expected = ops.rope(x, cos, sin, layout=layout)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    like = x if actual.shape == x.shape else torch.empty(actual.shape)
    assert actual.stride() == torch.empty_like(like).stride()
    # The transposed rotation: <R x, y> = <x, R^T y>.
    y = torch.randn(x.shape, generator=generator)
    if x.isfinite().all() and dtype == F32:
        forward, back = (ops.rope_forward(t, cos, sin, layout, turn, F32, "cpp") for t, turn in ((x, False), (y, True)))
        products = (forward.double() * y).sum(), (x.double() * back).sum()
        bound = 1e-5 * (1 + x.double().norm() * y.double().norm())
        assert abs(products[0] - products[1]) <= bound


@pytest.mark.parametrize("activation", gated_mlp.ACTIVATIONS)
@drawn
@given(gate=rows((F32, BF16)), data=st.data())
def test_gated_mlp(cpu_isa, activation, gate, data):
    shape = [data.draw(st.sampled_from([1, s])) for s in gate.shape]
    up = torch.randn(shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))).to(gate.dtype)
    check("gated_mlp", (gate * 2, up), {"activation": activation})


def every_exponent(limit):
    exponents = torch.arange(-60, 10, dtype=torch.float64)
    values = torch.cat([2.0**exponents, 1.37 * 2.0**exponents, torch.linspace(0, limit, 5001, dtype=torch.float64)])
    return torch.cat([values, -values]).float()


@pytest.mark.parametrize("activation", gated_mlp.ACTIVATIONS)
def test_activations_over_the_exponents(cpu_isa, activation):
    x = every_exponent(200.0)
    actual = ops.gated_mlp(x, torch.ones(1), activation=activation, target="cpp").double()
    expected = gated_mlp.ACTIVATIONS[activation](x.double())
    # A few units in the last place. gelu far left of zero has an absolute error: erf's cancels, the exponent of the
    # other is large. silu's exp(-x) overflows at -88.7, where the result is 2^-121.
    atol = 2.0**-23 if activation.startswith("gelu") else 2.0**-120
    torch.testing.assert_close(actual, expected, rtol=8 * 2.0**-23, atol=atol)


def gradients(name, args, kwargs, target, grads=None):
    leaves = [a.detach().clone().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
    results = OPS[name].overload(*leaves, **kwargs, target=target)
    results = [r for r in (results if isinstance(results, tuple) else (results,)) if r.numel()]
    generator = torch.Generator().manual_seed(5)
    grads = [torch.randn(r.shape, generator=generator).to(r.dtype) for r in results]
    wanted = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return torch.autograd.grad(results, wanted, grads)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


N = 70
# name, arguments, keywords
TRAINED = {
    "rms_norm": ("rms_norm", lambda: (normal(3, 40, N), normal(N), 1e-6), {"weight_offset": 1.0}),
    "rms_norm-llama": ("rms_norm", lambda: (normal(3, 40, N), normal(N), 1e-6), {"round_before_weight": True}),
    "rms_norm-bare": ("rms_norm", lambda: (normal(2, N), None, 1e-6), {}),
    "layer_norm": ("layer_norm", lambda: (normal(130, N) + 1, [N], normal(N), normal(N, seed=1)), {}),
    "layer_norm-two-dims": ("layer_norm", lambda: (normal(9, 2, 8), [2, 8], normal(2, 8), normal(2, 8)), {}),
    "layer_norm-bare": ("layer_norm", lambda: (normal(4, N), [N]), {}),
    "add_rms_norm": ("add_rms_norm", lambda: (normal(8, N), normal(8, N, seed=1), normal(N), 1e-6), {}),
    "add_rms_norm-alone": (
        "add_rms_norm",
        lambda: (normal(8, N), normal(8, N, seed=1), normal(N), 1e-6),
        {"keep_sum": False},
    ),
    "add_layer_norm": (
        "add_layer_norm",
        lambda: (normal(8, N), normal(8, N, seed=1), [N], normal(N), normal(N, seed=1)),
        {},
    ),
    **{
        f"rope-{layout}": (
            "rope",
            lambda: (normal(2, 5, 3, N).transpose(1, 2), normal(1, 5, N), normal(2, 1, 5, N)),
            {"layout": layout},
        )
        for layout in LAYOUTS
    },
    **{
        f"gated_mlp-{name}": ("gated_mlp", lambda: (normal(4, N) * 3, normal(1, N)), {"activation": name})
        for name in gated_mlp.ACTIVATIONS
    },
}


@pytest.mark.parametrize("case", TRAINED)
def test_gradients(cpu_isa, case):
    name, make, kwargs = TRAINED[case]
    args = make()
    actual = gradients(name, args, kwargs, "cpp")
    expected = gradients(name, [a.double() if isinstance(a, torch.Tensor) else a for a in args], kwargs, "reference")
    for a, e in zip(actual, expected, strict=True):
        # Sums over at most 130 rows of values below 30, and exp and erf within a few units in the last place.
        torch.testing.assert_close(a.double(), e, rtol=64 * 2.0**-23, atol=400 * 2.0**-23)


@pytest.mark.parametrize("case", ["rms_norm-llama", "add_layer_norm", "rope-interleaved", "gated_mlp-gelu"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_gradients(case, dtype):
    name, make, kwargs = TRAINED[case]
    args = [a.to(dtype) if isinstance(a, torch.Tensor) else a for a in make()]
    actual = gradients(name, args, kwargs, "cpp")
    expected = gradients(name, [a.double() if isinstance(a, torch.Tensor) else a for a in args], kwargs, "reference")
    eps = torch.finfo(dtype).eps
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        # What the forward rounds (a sum, h) and the result: eps each of values up to the largest.
        torch.testing.assert_close(a.double(), e, rtol=4 * eps, atol=eps * float(e.abs().max()))


def test_gradients_do_not_depend_on_threads():
    args = (normal(700, N), [N], normal(N), normal(N, seed=1))
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(gradients("layer_norm", args, {}, "cpp"))
    torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("case", ["rms_norm", "layer_norm", "add_layer_norm", "rope-rotate_half", "gated_mlp-silu"])
def test_gradients_of_gradients(case):
    name, make, kwargs = TRAINED[case]
    args = make()

    def twice(target, dtype):
        leaves = [a.detach().to(dtype).requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
        results = OPS[name].overload(*leaves, **kwargs, target=target)
        result = sum(r.square().sum() for r in (results if isinstance(results, tuple) else (results,)))
        wanted = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        first = torch.autograd.grad(result, wanted, create_graph=True)
        return torch.autograd.grad(sum(f.square().sum() for f in first), wanted, allow_unused=True)

    for a, e in zip(twice("cpp", torch.float32), twice("reference", torch.float64), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4 * float(e.abs().max()))


@pytest.mark.parametrize("case", TRAINED)
def test_opcheck(case):
    name, make, kwargs = TRAINED[case]
    args = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in make()]
    torch.library.opcheck(OPS[name].overload, tuple(args), kwargs | {"target": "cpp"})


def test_opcheck_of_the_kernel_ops():
    x, y, w, b = (t.requires_grad_() for t in (normal(4, 6), normal(4, 6, seed=1), normal(6), normal(6, seed=1)))
    check_op = torch.library.opcheck
    check_op(ops.norm_forward.default, (x, y, w, b, 1e-6, 0.0, True, False, "cpp"))
    check_op(ops.add_norm_forward.default, (x, y, w, None, 1e-6, 1.0, False, False, "cpp"))
    check_op(ops.norm_backward.default, (x, y, None, w, 1e-6, 0.0, F32, True, False, "cpp"))
    check_op(ops.rope_forward.default, (x, w, b, "rotate_half", True, F32, "cpp"))
    check_op(ops.gated_mlp_forward.default, (x, w, "silu", "cpp"))
    check_op(ops.gated_mlp_backward.default, (x, y, w, "relu", "cpp"))


def test_large_tensors_on_several_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    x, other, w = normal(301, 577), normal(301, 577, seed=1), normal(577)
    check("rms_norm", (x, w, 1e-6))
    check("add_layer_norm", (x, other, [577], w, w, 1e-5))
    check("gated_mlp", (x, other), {"activation": "silu"})
    check("gated_mlp", (x.view(1, -1), other.view(1, -1)), {"activation": "gelu"})
    heads = normal(2, 130, 5, 64).transpose(1, 2)
    cos, sin = normal(130, 64), normal(130, 64, seed=1)
    torch.set_num_threads(before)
    assert torch.equal(ops.rope(heads, cos, sin, target="cpp"), ops.rope(heads, cos, sin))


def test_a_long_row_is_accurate():
    x = torch.rand(1, 1 << 20) + 3
    check("layer_norm", (x, [1 << 20], None, None, 1e-6))
    check("rms_norm", (x, None, 1e-6))


def test_what_has_no_kernel_says_why():
    x, w = normal(3, 6), normal(6)
    for match, call in (
        ("rms_norm has no kernel for target 'triton'", lambda: OPS["rms_norm"].spec(x, w, 1e-6, target="triton")),
        ("x is float64", lambda: OPS["rms_norm"].spec(x.double(), w, 1e-6)),
        ("x is on meta", lambda: OPS["rms_norm"].spec(x.to("meta"), w, 1e-6)),
        ("weight has shape", lambda: OPS["rms_norm"].spec(x, normal(3, 1), 1e-6)),
        ("weight has shape", lambda: OPS["rms_norm"].spec(x, normal(1), 1e-6)),
        ("normalized shape", lambda: OPS["layer_norm"].spec(x, [5])),
        ("residual has another", lambda: OPS["add_rms_norm"].spec(x, x.bfloat16(), w, 1e-6)),
        ("one even size", lambda: OPS["rope"].spec(normal(3, 5), normal(5), normal(5))),
        ("cos is float32 and sin bfloat16", lambda: OPS["rope"].spec(x, w, w.bfloat16())),
        ("up is int64", lambda: OPS["gated_mlp"].spec(x, torch.ones(6, dtype=torch.long), activation="silu")),
    ):
        with pytest.raises(UnsupportedKernel, match=match):
            call()
    with pytest.raises(UnsupportedKernel, match="float64"):
        ops.rms_norm(x.double(), None, 1e-6, target="cpp")
    with pytest.raises(BadArgument, match="no layout"):
        ops.rope(x, w, w, layout="spiral", target="cpp")
    with pytest.raises(BadArgument, match="no activation"):
        ops.gated_mlp(x, w, activation="mish", target="cpp")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NormSpec(bias="float32"), "bias belongs to layer_norm"),
        (lambda: NormSpec(centred=True, round_before_weight=True), "belongs to rms_norm"),
        (lambda: NormSpec(weight="none", round_before_weight=True), "needs a weight"),
        (lambda: NormSpec(keep_sum=True), "needs a residual"),
        (lambda: NormSpec(centred=True, offset=True), "offset needs the weight of rms_norm"),
        (lambda: NormSpec(in_dtype="float32", out_dtype="bfloat16"), "must be float32 or float32"),
        (lambda: NormSpec(in_dtype="float64"), "in_dtype is 'float64'"),
        (lambda: NormBackwardSpec(extra=1), "extra is 1"),
        (lambda: RopeSpec(layout="x); evil("), "layout is"),
        (lambda: GatedSpec(activation="mish"), "activation is 'mish'"),
    ],
)
def test_a_spec_out_of_range_is_refused(make, message):
    with pytest.raises(SpecError, match=message):
        make()


GOLDEN = {
    "norm_add_rms": NormSpec(
        in_dtype="bfloat16",
        out_dtype="bfloat16",
        weight="bfloat16",
        round_before_weight=True,
        residual=True,
        keep_sum=True,
    ),
    "norm_layer": NormSpec(centred=True, bias="float32"),
    "norm_backward_layer": NormBackwardSpec(centred=True, bias="float32", extra=True),
    "rope_half": RopeSpec(in_dtype="bfloat16", angle_dtype="bfloat16", product_dtype="bfloat16", out_dtype="bfloat16"),
    "rope_interleaved_transposed": RopeSpec(layout="interleaved", transposed=True),
    "gated_mlp_gelu": GatedSpec(activation="gelu"),
    "gated_mlp_backward_silu": GatedBackwardSpec(),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    text = render(GOLDEN[name], "cpp")
    assert text == render(KernelSpec.from_dict(GOLDEN[name].to_dict()), "cpp")  # same spec, same bytes
    assert max(map(len, text.splitlines())) <= 120 and len(text.splitlines()) <= 500
    assert " \n" not in text and "\n\n\n\n" not in text
    check_golden(name, text, ".cpp.txt")


def test_no_rendered_line_is_too_long():
    dtypes = ("float32", "bfloat16", "float16")
    specs: list[KernelSpec] = []
    for dtype in dtypes:
        for weight in ("none", *dtypes):
            for extra in (False, True):
                specs.append(NormBackwardSpec(dtype, "bfloat16", weight, "bfloat16", True, extra=extra))
                specs.append(NormSpec(dtype, dtype, weight, "bfloat16", True, residual=extra, keep_sum=extra))
                specs.append(NormSpec(dtype, "float32", weight, residual=extra))
                if weight != "none":
                    specs.append(NormSpec(dtype, "float32", weight, "none", False, True, True, extra, extra))
                    specs.append(NormBackwardSpec(dtype, "bfloat16", weight, "none", False, True, True, extra))
                    specs.append(NormSpec(dtype, dtype, weight, offset=True))
    specs += [RopeSpec(a, b, c, d, lay, t) for a in dtypes for b in dtypes for c in dtypes for d in dtypes
              for lay in LAYOUTS for t in (False, True)]  # fmt: skip
    specs += [kind(a, b, "bfloat16", act) for kind in (GatedSpec, GatedBackwardSpec) for a in dtypes for b in dtypes
              for act in gated_mlp.ACTIVATIONS]  # fmt: skip
    long = [(spec, line) for spec in specs for line in render(spec, "cpp").splitlines() if len(line) > 120]
    assert not long, long[0]


def test_rope_rotates_as_the_reference_does():
    assert torch.equal(rope.rotate(torch.arange(4.0), "interleaved"), torch.tensor([-1.0, 0.0, -3.0, 2.0]))
