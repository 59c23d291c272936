"""Graphs of attention calls, and sigmoid attention by its definition, shared by the SigmoidAttention tests."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from tilewright.passes import SigmoidAttention
from tilewright.passes.manager import PassRun, run_pass
from tilewright.passes.site import Site, set_site
from tilewright.runtime.ops import HELPERS, OPS

ATTENTION = OPS["attention"].overload
COUNT = HELPERS["visible_keys"]
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
