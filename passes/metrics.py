"""How far one tensor is from another, and one language model from another."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ..runtime.ops import Tolerance


def tensor_error(actual: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """``max_abs``, ``rel_l2`` = |a - e| / |e| and ``sqnr_db`` = 20 log10(|e| / |a - e|), computed in float64.

    Places where both are NaN or the same infinity agree. Where only one is, the error is infinite.
    """
    a, e = actual.detach().double().flatten(), expected.detach().double().flatten()
    same = (a == e) | (a.isnan() & e.isnan())
    difference = torch.where(same, 0.0, a - e).nan_to_num(nan=math.inf, posinf=math.inf, neginf=math.inf)
    noise = float(difference.norm())
    signal = float(e[e.isfinite()].norm())
    max_abs = float(difference.abs().max()) if difference.numel() else 0.0
    if noise == 0:
        return {"max_abs": 0.0, "rel_l2": 0.0, "sqnr_db": math.inf}
    rel = noise / signal if signal else math.inf
    return {"max_abs": max_abs, "rel_l2": rel, "sqnr_db": -20 * math.log10(rel) if 0 < rel < math.inf else -math.inf}


def within(actual: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance) -> bool:
    """Whether ``|actual - expected| <= atol + rtol * |expected|`` everywhere; equal NaN and infinities agree."""
    return torch.allclose(
        actual.detach().double(), expected.detach().double(), rtol=tolerance.rtol, atol=tolerance.atol, equal_nan=True
    )


def identical(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit for bit the same values; NaN equals NaN."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    return bool(((actual == expected) | (actual.isnan() & expected.isnan())).all())


def combine(errors: list[dict[str, float]]) -> dict[str, float]:
    """The worst of several outputs' errors."""
    if not errors:
        return {"max_abs": 0.0, "rel_l2": 0.0, "sqnr_db": math.inf}
    return {
        "max_abs": max(e["max_abs"] for e in errors),
        "rel_l2": max(e["rel_l2"] for e in errors),
        "sqnr_db": min(e["sqnr_db"] for e in errors),
    }


def language_model_error(
    actual: torch.Tensor, expected: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor | None = None
) -> Mapping[str, Any]:
    """Compare next-token distributions.

    actual, expected: logits (B, S, V). tokens: (B, S) integers. mask: (B, S), nonzero where a token counts.
    Returns ``kl`` (mean KL(expected || actual), nats), ``top1_agreement`` (share of positions), ``perplexity_after``
    and ``perplexity_before``, and ``tokens_worse`` (share of tokens whose log-probability fell).
    """
    log_a, log_e = F.log_softmax(actual.float(), -1), F.log_softmax(expected.float(), -1)
    keep = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    kl = (log_e.exp() * (log_e - log_a)).sum(-1)[keep]
    agree = (log_a.argmax(-1) == log_e.argmax(-1))[keep]
    result = {"kl": float(kl.mean()), "top1_agreement": float(agree.float().mean())}
    scored = keep[:, 1:] & keep[:, :-1]
    if scored.any():
        target = tokens[:, 1:, None]
        after = log_a[:, :-1].gather(-1, target)[..., 0][scored]
        before = log_e[:, :-1].gather(-1, target)[..., 0][scored]
        result |= {
            "perplexity_after": math.exp(min(float(-after.mean()), 700.0)),
            "perplexity_before": math.exp(min(float(-before.mean()), 700.0)),
            "tokens_worse": float((after < before).float().mean()),
        }
    return result
