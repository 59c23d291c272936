"""Takes an attention apart, so that its softmax stands in the graph as a canonical op of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx

from ..codegen import symbols
from ..runtime.ops.attention_parts import ATTENTION_SCORES, ATTENTION_VALUES
from .base import Builder, SiteContext
from .view import arguments

Node = torch.fx.Node


def split_attention(site: SiteContext, **softmax: Any) -> Callable[[Builder], Node]:
    """A build function: ``attention_values(softmax(attention_scores(q, k)), v)`` in the place of a softmax attention.

    softmax: arguments of ``tilewright::softmax``, such as ``algorithm``.
    """

    def build(builder: Builder) -> Node:
        named = arguments(site.node)
        q, k, v, bias = (named[name] for name in ("q", "k", "v", "bias"))
        scores = builder.call(ATTENTION_SCORES, q, k, bias, scale=named["scale"], mask=named["mask"])
        weights = builder.call(torch.ops.tilewright.softmax.default, scores, -1, **softmax)
        if may_see_nothing(named):
            return builder.call(ATTENTION_VALUES, weights, v, scores)
        return builder.call(ATTENTION_VALUES, weights, v)

    return build


def may_see_nothing(named: Mapping[str, Any]) -> bool:
    """Whether some query may see no key. Under the plain causal mask each sees the first one."""
    if named["bias"] is not None:
        return True
    text = symbols.mask_text(named["mask"])
    return text not in (symbols.mask_text(""), symbols.mask_text("k_idx <= q_idx"))
