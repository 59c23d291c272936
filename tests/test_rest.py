"""Graphs through Inductor: which tensors are looked at before each call, and that none changes unseen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tilewright
from tilewright.passes import Quantize


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 32), nn.Linear(32, 16)
        self.register_buffer("shift", torch.randn(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(torch.tanh(self.first(x) + self.shift))
        return out


def packed() -> tuple[Any, torch.Tensor, str]:
    """A compiled module that was called once, its input, and the name of one weight's codes."""
    torch.manual_seed(0)
    x = torch.randn(3, 64)
    compiled = tilewright.compile(Net().eval(), [Quantize(bits=4, group_size=32)], example_inputs=(x,))
    with torch.no_grad():
        compiled(x)
    names = [name for name, _ in compiled.records[-1].lowered.named_buffers() if "first" in name and "codes" in name]
    return compiled, x, names[0]


@torch.no_grad()
def test_changed_codes_are_read() -> None:
    compiled, x, name = packed()
    lowered = compiled.records[-1].lowered
    before = compiled(x)
    setattr(lowered, name, torch.zeros_like(getattr(lowered, name)))
    assert not torch.equal(compiled(x), before)


@torch.no_grad()
@pytest.mark.parametrize("change", ["dtype", "shape"])
def test_unfit_codes_are_refused(change: str) -> None:
    compiled, x, name = packed()
    lowered = compiled.records[-1].lowered
    codes = getattr(lowered, name)
    setattr(lowered, name, codes.to(torch.int32) if change == "dtype" else codes[..., :-1].contiguous())
    with pytest.raises(RuntimeError, match="codes"):
        compiled(x)


@torch.no_grad()
def test_other_tensors_are_guarded() -> None:
    """A buffer that Inductor's own loops read: they are compiled anew for other strides."""
    compiled, x, _ = packed()
    lowered = compiled.records[-1].lowered
    want = compiled(x)
    lowered.shift = torch.stack([lowered.shift, torch.zeros(32)], 1)[:, 0]
    assert not lowered.shift.is_contiguous()
    assert torch.allclose(compiled(x), want, atol=1e-5)
