"""A pass of one's own: soften attention by a temperature.

python examples/custom_pass.py
tilewright explain MODEL --passes "examples/custom_pass.py:AttentionTemperature{temperature=1.5}"
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tilewright as tw
from tilewright.passes import Decline, Exactness, Pass, Rewrite, SiteContext


@dataclass(frozen=True)
class AttentionTemperature(Pass):
    """softmax(s QK' + bias) V  ->  softmax(s QK' / temperature + bias) V: above 1 softer, below 1 sharper."""

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    ops: ClassVar[tuple[str, ...]] = ("attention",)

    temperature: float = 1.25

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise tw.errors.BadPassOption(f"attention-temperature: {self.temperature} is not above 0")

    def rewrite(self, site: SiteContext) -> Rewrite | Decline:
        if site.arg("normalizer") != "softmax":
            return Decline("only a softmax has a temperature")
        scale = site.arg("scale") / self.temperature
        return Rewrite(site.changed(scale=scale), details={"scale": scale})


class TinyModel(nn.Module):
    """One self-attention: (B, L, 32) -> (B, L, 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def main() -> tw.CompiledModule:
    torch.manual_seed(0)
    model, x = TinyModel().eval(), torch.randn(2, 10, 32)
    compiled = tw.compile(
        model, passes=[AttentionTemperature(1.5)], example_inputs=(x,), target="reference", rest="eager", strict=True
    )
    print(compiled.report)
    return compiled


if __name__ == "__main__":
    main()
