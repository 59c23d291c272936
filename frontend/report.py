"""What a compilation did: per pass the sites it changed, the ones it left alone and why, and the error it introduced.

The classes are plain data that the stages fill in. :meth:`Report.to_dict` is the JSON form; printing lives in
``report_print`` and the notebook form in ``page``.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import torch

STAGES = ("capture", "raise", "rewrite", "validate", "lower", "build")


def json_safe(value: Any) -> Any:
    """``value`` as JSON can hold it.

    JSON has no infinities and no NaN: they become the strings ``"inf"``, ``"-inf"`` and ``"nan"``, which ``float()``
    reads back. ``None`` always means "not measured" or "does not apply".
    """
    match value:
        case enum.Enum():
            return json_safe(value.value)
        case None | bool() | str():
            return value
        case float():
            return float(value) if math.isfinite(value) else repr(float(value))
        case int():
            return int(value)
        case Mapping():
            return {str(key): json_safe(item) for key, item in value.items()}
        case list() | tuple():
            return [json_safe(item) for item in value]
        case set() | frozenset():
            return sorted((json_safe(item) for item in value), key=str)
        case torch.Tensor() if value.numel() == 1:
            return json_safe(value.item())
        case torch.Tensor():
            return f"tensor{tuple(value.shape)} {value.dtype}"
        case torch.dtype() | torch.device() | PurePath():
            return str(value)
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: json_safe(getattr(value, f.name)) for f in dataclasses.fields(value)}
        case _:
            return str(value)


def number(value: Any) -> float | None:
    """Read a number that :func:`json_safe` wrote: ``"inf"`` is a float again, ``None`` stays ``None``."""
    return None if value is None else float(value)


@dataclass
class SiteError:
    """Error of one site's output after the rewrite against before, on the same inputs. ``None``: not measured.

    max_abs: largest absolute difference.
    rel_l2: ``||after - before|| / ||before||``.
    sqnr_db: ``20 log10(||before|| / ||after - before||)`` in dB, ``inf`` when nothing differs.
    """

    max_abs: float | None = None
    rel_l2: float | None = None
    sqnr_db: float | None = None

    @property
    def measured(self) -> bool:
        return self.max_abs is not None


@dataclass
class ModelError(SiteError):
    """Error of the whole model's outputs, all passes together.

    The rest is for language models (logits over a vocabulary), ``None`` otherwise:
    kl: mean KL divergence of the next-token distribution, before against after, in nats.
    top1_agreement: share of positions whose most likely token stays the same, 0 to 1.
    perplexity_before, perplexity_after: ``exp`` of the mean next-token loss on the example inputs' own tokens.
    tokens_worse: share of tokens whose loss grew, 0 to 1.
    outputs: error by output name, when the model has several.
    """

    kl: float | None = None
    top1_agreement: float | None = None
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    tokens_worse: float | None = None
    outputs: dict[str, SiteError] = field(default_factory=dict)

    @classmethod
    def of(cls, measured: Mapping[str, float]) -> ModelError:
        """From ``max_abs``, ``rel_l2`` and ``sqnr_db``."""
        return cls(measured["max_abs"], measured["rel_l2"], measured["sqnr_db"])


@dataclass
class MatchedSite:
    """A site a pass rewrote.

    site: :class:`~tilewright.passes.site.Site` id. source: ``file:line`` of the model.
    kernel: name of the kernel that runs it (:class:`KernelReport`), None when the reference form does.
    details: what the pass wants to tell, JSON-able.
    """

    site: str
    source: str = ""
    kernel: str | None = None
    error: SiteError | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class DeclinedSite:
    """A site a pass looked at and left alone."""

    site: str
    reason: str
    source: str = ""


@dataclass
class NearMissSite:
    """Something that almost matched. stopped_at: the graph node where it stopped."""

    site: str
    stopped_at: str
    reason: str
    source: str = ""


@dataclass
class PassReport:
    """What one pass did. exactness: ``exact``, ``reassociated`` or ``approximate``.

    facts: what the pass tells about a whole graph; of several graphs the last one's. error: of the model's outputs, for
    a pass that edits the graph as a whole.
    """

    name: str
    exactness: str
    options: dict[str, Any] = field(default_factory=dict)
    matched: list[MatchedSite] = field(default_factory=list)
    declined: list[DeclinedSite] = field(default_factory=list)
    near_misses: list[NearMissSite] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    error: SiteError | None = None

    def worst(self) -> SiteError | None:
        """The error of the worst measured site, by relative L2; None when nothing was measured."""
        return worst_error((self.error, *(site.error for site in self.matched)))


def worst_error(errors: Iterable[SiteError | None]) -> SiteError | None:
    """The largest of several errors by relative L2 (NaN counts as largest); unmeasured ones are skipped."""
    measured = [e for e in errors if e is not None and e.measured]
    return max(measured, key=lambda e: (_rank(e.rel_l2), _rank(e.max_abs)), default=None)


def _rank(value: float | None) -> float:
    return math.inf if value is None or math.isnan(value) else value


@dataclass
class CaptureReport:
    """How the model became graphs.

    door: ``export`` or ``dynamo``. graph_breaks: ``{"source": "file:line", "reason": ...}`` each.
    fallback_reason: why ``export`` was not used although example inputs were given; empty otherwise.
    """

    door: str = "export"
    graphs: int = 0
    nodes: int = 0
    graph_breaks: list[dict[str, str]] = field(default_factory=list)
    fallback_reason: str = ""


@dataclass
class KernelReport:
    """One lowered canonical op: the kernel that runs it, or why its reference form does.

    name: ``<kind>-<first 8 of digest>``, empty for a reference. reason: why there is no kernel, empty when there is.
    """

    name: str
    kind: str
    op: str
    site: str
    target: str
    digest: str = ""
    spec: dict[str, Any] | None = None
    reason: str = ""


@dataclass
class RaisingReport:
    """The canonical ops found, before any pass. sites: ``{"site", "op", "source", "details"}`` each."""

    sites: list[dict[str, Any]] = field(default_factory=list)
    declined: list[DeclinedSite] = field(default_factory=list)
    near_misses: list[NearMissSite] = field(default_factory=list)


@dataclass
class Report:
    """What :func:`tilewright.compile` did; ``print``, rich, notebooks and :meth:`to_dict` show the same facts."""

    passes: list[PassReport] = field(default_factory=list)
    model_error: ModelError | None = None
    kernels: list[KernelReport] = field(default_factory=list)
    capture: CaptureReport = field(default_factory=CaptureReport)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    raising: RaisingReport = field(default_factory=RaisingReport)
    warnings: list[str] = field(default_factory=list)
    model: str = ""
    cache: dict[str, float] = field(default_factory=dict)
    """Of a module with a KV cache: ``sites``, ``tokens`` (room for), ``bytes_per_token`` and ``fixed_bytes`` as
    allocated for one sequence; empty for other modules."""
    weights: dict[str, int] = field(default_factory=dict)
    """Bytes of the tensors that the graphs read, ``before`` (as captured) and ``after`` (as they run). Through Dynamo
    the model's parameters are inputs of its graphs and do not count."""

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able data, the same keys whatever happened.

        An error that was not measured is ``{"max_abs": None, ...}``; infinities and NaN are the strings ``"inf"``,
        ``"-inf"``, ``"nan"``. :meth:`from_dict` reads it back.
        """
        data = json_safe(self)
        data["seconds"] = dict.fromkeys(STAGES, 0.0) | data["seconds"]
        for one in data["passes"]:
            for site in one["matched"]:
                site["error"] = site["error"] or json_safe(SiteError())
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Rebuild a report from :meth:`to_dict`. Raises KeyError or TypeError when the data is not one."""
        passes = [
            PassReport(
                one["name"],
                one["exactness"],
                dict(one.get("options", {})),
                [MatchedSite(**{**row, "error": _error(SiteError, row["error"])}) for row in one["matched"]],
                _rows(DeclinedSite, one["declined"]),
                _rows(NearMissSite, one["near_misses"]),
                dict(one.get("facts", {})),
                _error(SiteError, one.get("error")),
            )
            for one in data["passes"]
        ]
        raising = data.get("raising") or {}
        return cls(
            passes,
            _error(ModelError, data["model_error"]),
            [KernelReport(**row) for row in data["kernels"]],
            CaptureReport(**data["capture"]),
            dict(data["seconds"]),
            RaisingReport(
                list(raising.get("sites", [])),
                _rows(DeclinedSite, raising.get("declined", [])),
                _rows(NearMissSite, raising.get("near_misses", [])),
            ),
            list(data.get("warnings", [])),
            data.get("model", ""),
            dict(data.get("cache", {})),
            dict(data.get("weights", {})),
        )

    def __rich__(self) -> Any:
        from .report_print import renderable

        return renderable(self)

    def __str__(self) -> str:
        from .report_print import plain

        return plain(self)

    def _repr_html_(self) -> str:
        from .page import fragment

        return fragment(self)


def _rows(cls: type[Any], rows: Iterable[Mapping[str, Any]]) -> list[Any]:
    return [cls(**row) for row in rows]


def _error(cls: type[Any], row: Mapping[str, Any] | None) -> Any:
    if row is None:
        return None
    fields = dict(row)
    outputs = fields.pop("outputs", None)
    error = cls(**{key: number(value) for key, value in fields.items()})
    if outputs:
        error.outputs = {name: _error(SiteError, one) for name, one in outputs.items()}
    return error if error.measured or cls is ModelError else None
