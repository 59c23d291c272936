"""Which rewritten site adds the most error to the model's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..passes.execute import run
from ..passes.manager import contribution
from .pipeline import GraphRecord, output_error


@dataclass(frozen=True)
class Contribution:
    """The error of the model's outputs when one pass rewrites one site and nothing else is changed.

    error: ``max_abs``, ``rel_l2``, ``sqnr_db`` over the floating-point outputs, the worst of them.
    """

    pass_name: str
    site: str
    source: str
    error: dict[str, float]


def measure(record: GraphRecord, inputs: Sequence[Any]) -> list[Contribution]:
    """One contribution per pass and rewritten site of one graph; costs a run of the graph each."""
    found = []
    for done in record.runs:
        if not done.rewrites:
            continue
        before = run(done.before, inputs)
        for rewrite in done.rewrites:
            after = contribution(done, rewrite, inputs)
            error = output_error(after, before)
            found.append(Contribution(done.rewrite.name, rewrite.site.id, rewrite.site.source, error))
    return found
