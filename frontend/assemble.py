"""Make the report from what happened to the graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree

from ..passes.metrics import language_model_error
from .options import Options
from .pipeline import GraphRecord
from .report import (
    CaptureReport,
    DeclinedSite,
    KernelReport,
    MatchedSite,
    ModelError,
    NearMissSite,
    PassReport,
    RaisingReport,
    Report,
    SiteError,
    worst_error,
)


def assemble(
    model_name: str,
    options: Options,
    records: Sequence[GraphRecord],
    capture: CaptureReport,
    model_error: ModelError | None,
    warnings: Sequence[str] = (),
    seconds: dict[str, float] | None = None,
) -> Report:
    """One report over all graphs. Sites of a second graph and later carry ``graph N:`` in front of their id."""
    report = Report(capture=capture, model=model_name, model_error=model_error, warnings=list(warnings))
    report.passes = [PassReport(one.name, one.exactness.value, one.options()) for one in options.passes]
    for name, value in (seconds or {}).items():
        report.seconds[name] = report.seconds.get(name, 0.0) + value
    for record in records:
        _add(report, record)
    if records and any(record.weights.get("before") for record in records):
        report.weights = {when: max(record.weights.get(when, 0) for record in records) for when in ("before", "after")}
    capture.graphs = len(records)
    capture.nodes = sum(len(record.captured.graph.nodes) for record in records)
    return report


def _add(report: Report, record: GraphRecord) -> None:
    prefix = f"graph {record.index}: " if record.index else ""
    for name, value in record.seconds.items():
        report.seconds[name] = report.seconds.get(name, 0.0) + value
    by_node = {use.node: use for use in record.kernels}
    for row, run in zip(report.passes, record.runs, strict=True):
        for rewrite in run.rewrites:
            use = next((by_node[name] for name in reversed(rewrite.nodes) if name in by_node), None)
            error = SiteError(**rewrite.error) if rewrite.error is not None else None
            row.matched.append(
                MatchedSite(
                    prefix + rewrite.site.id, rewrite.site.source, use.name if use else None, error, rewrite.details
                )
            )
        row.matched += [MatchedSite(prefix + site.id, site.source, details=details) for site, details in run.edited]
        row.facts |= run.facts
        if run.error is not None:
            row.error = worst_error((row.error, SiteError(**run.error)))
        row.declined += [DeclinedSite(prefix + site.id, reason, site.source) for site, reason in run.declined]
        row.near_misses += [
            NearMissSite(prefix + site.id, stopped, reason, site.source) for site, stopped, reason in run.near_misses
        ]
        # What raising left alone, the pass never saw; its user asks for the reason all the same.
        about = set(run.rewrite.ops)
        row.declined += [
            DeclinedSite(prefix + s.id, reason, s.source) for s, reason in record.raising.declined if s.op in about
        ]
        row.near_misses += [
            NearMissSite(prefix + s.id, stopped, reason, s.source)
            for s, stopped, reason in record.raising.near_misses
            if s.op in about
        ]
    report.kernels += [
        KernelReport(use.name, use.spec.kind, use.op, prefix + use.site.id, use.target, use.digest, use.spec.to_dict())
        for use in record.kernels
    ]
    report.kernels += [
        KernelReport("", "", use.op, prefix + use.site.id, "reference", reason=use.reason) for use in record.references
    ]
    raising: RaisingReport = report.raising
    raising.sites += [
        {"site": prefix + s.id, "op": s.op, "source": s.source, "details": record.raising.details.get(s.id, {})}
        for s in record.raising.sites
    ]
    raising.declined += [DeclinedSite(prefix + s.id, reason, s.source) for s, reason in record.raising.declined]
    raising.near_misses += [
        NearMissSite(prefix + s.id, stopped, reason, s.source) for s, stopped, reason in record.raising.near_misses
    ]


def model_error(record: GraphRecord, named: dict[str, Any], out_spec: Any) -> ModelError | None:
    """The whole model's error on its example inputs; with token and logit tensors also a language model's figures.

    named: the example inputs by parameter name.
    """
    if record.error is None:
        return None
    error = ModelError.of(record.error)
    after = pytree.tree_unflatten(pytree.tree_leaves(record.outputs_after), out_spec)
    before = pytree.tree_unflatten(pytree.tree_leaves(record.outputs_before), out_spec)
    tokens, logits_after, logits_before = named.get("input_ids"), _logits(after), _logits(before)
    if isinstance(tokens, torch.Tensor) and logits_after is not None and logits_before is not None:
        if tokens.dim() == 2 and logits_before.dim() == 3 and tokens.shape == logits_before.shape[:2]:
            mask = named.get("attention_mask")
            mask = mask if isinstance(mask, torch.Tensor) and mask.shape == tokens.shape else None
            for name, value in language_model_error(logits_after, logits_before, tokens, mask).items():
                setattr(error, name, value)
    return error


def _logits(output: Any) -> torch.Tensor | None:
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, dict):
        found = output.get("logits")
    return found if isinstance(found, torch.Tensor) else None
