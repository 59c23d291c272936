"""Native kernels of packed weights read nothing beyond their tensors: behind each is a page that nobody may read.

A read beyond would end the process, so it is a process of its own that calls the kernel.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

FIRST = "dtype='float32', bits=4, group=32, zero='offset'"
MORE = (
    "dtype='bfloat16', bits=4, group=32",
    "dtype='float32', bits=8, group=0",
    "dtype='bfloat16', bits=2, group=64, zero='point'",
    "dtype='float32', bits=3, group=64",
    "dtype='bfloat16', bits=3, group=0, zero='point', activation='silu', gated=True",
    "dtype='bfloat16', bits=8, group=0, activations=8",
    "dtype='float32', bits=4, group=32, activations=8",
)
PROGRAM = """
import ctypes, itertools, torch
from tilewright.codegen.quantized_linear import QuantizedLinearSpec
from tilewright.codegen.weight_format import WeightFormat
from tilewright.runtime import load
from tilewright.runtime.ops import quantized_weight

PAGE, READ_WRITE, PRIVATE_ANONYMOUS = 4096, 3, 0x22
c = ctypes.CDLL(None)
c.mmap.restype = ctypes.c_void_p
c.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
c.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
c.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
held = []

def guarded(tensor):
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // PAGE)
    start = c.mmap(None, (pages + 1) * PAGE, READ_WRITE, PRIVATE_ANONYMOUS, -1, 0)
    assert c.mprotect(start + pages * PAGE, PAGE, 0) == 0
    held.append((start, (pages + 1) * PAGE))
    memory = (ctypes.c_uint8 * size).from_address(start + pages * PAGE - size)
    return torch.frombuffer(memory, dtype=tensor.dtype).reshape(tensor.shape).copy_(tensor)

spec = QuantizedLinearSpec(SPEC)
fmt = WeightFormat(spec.bits, spec.group, spec.zero, spec.scales, spec.activations)
launch, dtype = load.load(spec, "cpp").launch, getattr(torch, spec.dtype)
for K, N in itertools.product((1, 31, 45, 64, 100, 576), (1, 15, 16, 17, 65)):
    weights = []
    for _ in range(2 if spec.gated else 1):
        codes = quantized_weight.pack(torch.randint(0, fmt.levels, (N, K), dtype=torch.uint8), fmt)
        scale = torch.rand(N, fmt.groups(K)).to(getattr(torch, fmt.scales))
        zero = {"middle": None, "point": (scale * 7).to(torch.uint8), "offset": scale}[fmt.zero]
        parts = quantized_weight.to_layout(codes, scale, zero, fmt, N, K, "panels")
        weights.append([None if part is None else guarded(part) for part in parts])
    codes, scales, zeros = ([w[i] for w in weights if w[i] is not None] for i in range(3))
    for M in (1, 2, 3, 5, 9, 17, 40):
        x, residual = guarded(torch.randn(M, K).to(dtype)), guarded(torch.randn(M, N).to(dtype))
        biases = [guarded(torch.randn(N).to(dtype)) for _ in weights]
        assert launch(x, codes, scales, zeros, biases, residual, [N] * len(weights)).isfinite().all()
    while held:
        c.munmap(*held.pop())
print("fine")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="guards pages as Linux does")
@pytest.mark.parametrize("spec", [FIRST, *(pytest.param(one, marks=pytest.mark.grid) for one in MORE)])
def test_nothing_beyond_the_tensors_is_read(spec):
    program = textwrap.dedent(PROGRAM).replace("SPEC", spec)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.strip()) == (0, "fine"), done.stderr
