"""Packed linear layers that normalise their input: beside the same kernel on an input normalised in float64."""

from __future__ import annotations

import pytest
import torch
from test_quantized_linear_cpp import format_of, weight

from tilewright.codegen.quantized_linear import QuantizedLinearSpec
from tilewright.runtime import errors
from tilewright.runtime.ops import quantized_linear, quantized_weight, rms_norm

EPS = 1e-5
QUICK = {
    "float32": QuantizedLinearSpec("float32", 4, 32, "offset", norm="wide"),
    "bfloat16": QuantizedLinearSpec("bfloat16", 4, 64, activation="silu", gated=True, norm="rounded"),
}
GRID = {
    "bfloat16-wide": QuantizedLinearSpec("bfloat16", 8, 0, "point", norm="wide"),
    "float32-8": QuantizedLinearSpec("float32", 4, 32, "offset", activations=8, norm="wide"),
    "bfloat16-8": QuantizedLinearSpec("bfloat16", 8, 0, "middle", "float32", 8, norm="rounded"),
}
# More rows than are normalised together.
SIZES = [(0, 64, 16), (1, 1, 17), (1, 576, 64), (2, 33, 5), (9, 100, 33), (40, 577, 48), (1030, 65, 17)]


def check(spec, M, K, N, op):
    """Within what an input off by one rounding, and for rounded activations one integer, would change."""
    fmt, generator, dtype = format_of(spec), torch.Generator().manual_seed(M + K + N), getattr(torch, spec.dtype)
    weights = [weight(fmt, N, K, generator) for _ in range(2)]
    # Rows of a larger tensor, and of very different sizes.
    x = torch.randn(M, K + 3, generator=generator).mul(10.0 ** (torch.arange(M) % 5 - 2)[:, None]).to(dtype)[:, :K]
    norm = torch.randn(2 * K, generator=generator).to(dtype)[::2]
    lists = ([w[i] for w in weights if w[i] is not None] for i in range(3))
    codes, scales, zeros = lists
    more = {"rows": [N, N], "format": fmt.text(), "activation": spec.activation, "gated": spec.gated}
    rounded = spec.norm == "rounded"
    given = {"norm": norm, "eps": EPS, "round_before_weight": rounded}
    got = op(x, codes, scales, zeros, [None, None], None, **more, **given, target="cpp")
    if rounded:
        normed = rms_norm.reference(x, norm, EPS, round_before_weight=True)
    else:
        wide = x.double()
        normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * norm.double()).to(dtype)
    want = op(normed, codes, scales, zeros, [None, None], None, **more, target="cpp")
    off = 2.0**-21 if dtype == torch.float32 else 2.0**-7
    dense = torch.cat([quantized_weight.dequantize(c, s, z, fmt, N, K, torch.float64) for c, s, z in weights])
    bound = off * normed.double().abs() @ dense.abs().T
    if spec.activations:
        step = normed.double().abs().amax(-1, keepdim=True) / (2 ** (spec.activations - 1) - 1)
        bound = bound + step * dense.abs().amax()
    if spec.gated:
        parts = (normed.double() @ dense.T).abs() + bound
        bound = 2 * (bound[:, :N] * parts[:, N:] + bound[:, N:] * parts[:, :N])
    assert ((got - want).double().abs() <= bound + off * want.double().abs() + 1e-30).all()


@pytest.mark.parametrize("name", QUICK)
def test_normalised_inputs(name):
    for sizes in SIZES:
        check(QUICK[name], *sizes, torch.ops.tilewright.quantized_linear)


@pytest.mark.grid
@pytest.mark.parametrize("name", {**QUICK, **GRID})
def test_every_norm(name, cpu_isa):
    for sizes in SIZES:
        check({**QUICK, **GRID}[name], *sizes, torch.ops.tilewright.quantized_linear)


def test_bad_norms_are_refused():
    spec = QUICK["float32"]
    fmt = format_of(spec)
    codes, scale, zero = weight(fmt, 16, 64, torch.Generator().manual_seed(0))
    x = torch.randn(2, 64)

    def call(norm):
        lists = ([codes], [scale], [zero], [None])
        return torch.ops.tilewright.quantized_linear(
            x, *lists, rows=[16], format=fmt.text(), norm=norm, eps=EPS, target="cpp"
        )

    call(torch.ones(64))
    with pytest.raises(RuntimeError, match="norm"):
        call(torch.ones(63))
    with pytest.raises((RuntimeError, errors.UnsupportedKernel), match="norm"):
        call(torch.ones(64, dtype=torch.bfloat16))
    with pytest.raises(errors.UnsupportedKernel, match="normalise"):
        quantized_linear.spec(
            x, [codes], [scale], [zero], [None], rows=[16], format=fmt.changed(layout="plain").text(),
            norm=torch.ones(64), target="triton-interpret",
        )  # fmt: skip
