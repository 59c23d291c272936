"""Linear layers, embeddings and the output head with weights of 8, 4, 3 or 2 bits."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.fx

from ..codegen.spec import SpecError
from ..codegen.weight_format import WeightFormat
from ..runtime.errors import BadPass, BadPassOption
from ..runtime.ops import OPS
from ._quantize_sites import EMBEDDING, FLOAT, Chooser, constant_bytes, find_candidates, float_bytes, matches
from .base import Builder, Decline, Exactness, NearMiss, Needs, Pass, Rewrite, SiteContext, Work
from .rounding import Calibration, Method, QuantizedWeight, WeightSite, find_method
from .rounding.budget import search_bits
from .rounding.grid import scales_dtype, sqnr
from .rounding.store import Store
from .view import GraphView, arguments, value

Node = torch.fx.Node
aten = torch.ops.aten

QUANTIZED_LINEAR = OPS["quantized_linear"].overload
QUANTIZED_EMBEDDING = OPS["quantized_embedding"].overload
_BUDGET = "tilewright_quantize_deadline"
_BITS = "tilewright_quantize_bits"


@dataclass(frozen=True)
class Quantize(Pass):
    """Keep weights as integers of a few bits with a scale a group; the kernels multiply the scales back.

    ::

        W[n, k] ~ scale[n, k / group] * (code[n, k] - zero)        code in 0 .. 2^bits - 1, scale in float16
        zero: the middle code (symmetric), or a code of each group's own, or any number

    How the codes are chosen is the ``method``'s business: ``rtn`` rounds each weight to the nearest level and needs no
    inputs, the others fit the codes to what the layers see on calibration inputs. ``activations`` rounds the input of
    every layer as well, each token by its own largest number, so that products are of integers. Original weights are
    not touched.

    Quality: another function; docs/quantize.md has figures for each method on SmolLM2. 8 bits are as good as whole,
    4 bits cost some perplexity when rounded to nearest and little with a method, 3 and 2 bits need one.

    bits: 8, 4, 3 or 2. group_size: columns that share a scale, a multiple of 32; 0: all of a row; -1: all of the
        tensor. The last group of a row may be shorter.
    symmetric: levels on both sides of zero; otherwise each group has a zero of its own, as ``zero`` says: ``point``, an
        integer, or ``offset``, a number.
    method: a name, with options as in ``rtn{clip=true}``, or a method object of ``tilewright.passes.rounding``.
    activations: 8 or 4 bits for the layers' inputs; None leaves them as they are.
    skip: patterns (``*`` and ``?``) of module paths or site ids that stay float.
    bits_per_site: pattern -> bits for other sites than the rest's, the first that fits; 16 leaves a site as it is. As
        text, ``[model.layers.0.*=8,lm_head=4]``.
    average_bits: search for the bits of every linear layer, at most so many a weight on average (docs/quantize_awq.md);
        ``bits_per_site`` still decides about the sites that it names, which count.
    embeddings: embedding tables too. head: the layer that gives a language model's logits too; tied to the embedding,
        and with both asked for, they share one packed tensor.
    seed: of everything that is drawn. seconds: stop calibrating after so many, with the best so far. checkpoint: a
        folder that keeps what is done, for a run that is killed and started again.
    kind: ``float8_e4m3fn`` for 8-bit floats with a scale instead of integers (GPU).
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    ops: ClassVar[tuple[str, ...]] = ("linear",)
    after: ClassVar[frozenset[str]] = frozenset(
        "two-pass-softmax sigmoid-attention block-sparse-attention lm-infinite focus-attention routing-transformer "
        "kv-cache factor-keys streaming-cache quantize-kv gear".split()
    )

    bits: int = 4
    group_size: int = 64
    symmetric: bool = True
    method: str | Method = "rtn"
    activations: int | None = None
    skip: tuple[str, ...] = ()
    bits_per_site: tuple[str, ...] | Mapping[str, int] = ()
    embeddings: bool = False
    head: bool = False
    seed: int = 0
    seconds: float | None = None
    checkpoint: str | os.PathLike[str] | None = None
    average_bits: float | None = None
    zero: Literal["point", "offset"] = "point"
    kind: Literal["int", "float8_e4m3fn"] = "int"

    def __post_init__(self) -> None:
        for name in ("symmetric", "embeddings", "head"):
            if not isinstance(getattr(self, name), bool):
                raise BadPassOption(f"quantize: {name} is {getattr(self, name)!r}, not True or False")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise BadPassOption(f"quantize: seed is {self.seed!r}, but must be a whole number")
        time_ok = isinstance(self.seconds, int | float) and not isinstance(self.seconds, bool)
        if self.seconds is not None and not (time_ok and 0 < self.seconds < math.inf):
            raise BadPassOption(f"quantize: seconds is {self.seconds!r}, but must be above 0, or None for no limit")
        average = self.average_bits
        if average is not None and (isinstance(average, bool) or not 2 <= average <= 8 or self.kind != "int"):
            raise BadPassOption(f"quantize: average_bits is {average!r}, but must be integers of 2 to 8 bits")
        if self.activations not in (None, 8, 4) or isinstance(self.activations, bool):
            raise BadPassOption(f"quantize: activations is {self.activations!r}, but must be 8, 4 or None")
        if self.zero not in ("point", "offset"):
            raise BadPassOption(f"quantize: zero is {self.zero!r}, but must be 'point' or 'offset'")
        skip = (self.skip,) if isinstance(self.skip, str) else tuple(self.skip)
        if not all(isinstance(pattern, str) and pattern for pattern in skip):
            raise BadPassOption(f"quantize: skip is {self.skip!r}, but must be patterns of module paths")
        object.__setattr__(self, "skip", skip)
        object.__setattr__(self, "bits_per_site", tuple(f"{p}={b}" for p, b in _pairs(self.bits_per_site).items()))
        if isinstance(self.method, type):
            object.__setattr__(self, "method", find_method(self.method))
        method = find_method(self.method)
        if isinstance(self.method, str) and method.text() != self.method:
            object.__setattr__(self, "method", method)  # options are spelled out
        self.format()

    # -------------------------------------------------------------------------------------------------------- options

    def format(self) -> WeightFormat:
        """The format of a site that nothing else is said about. Raises :class:`BadPassOption` for what is none."""
        group = self.group_size
        if not isinstance(group, int) or isinstance(group, bool) or (group != -1 and (group < 0 or group % 32)):
            raise BadPassOption(
                f"quantize: group_size is {group!r}, but must be a multiple of 32, 0 for a scale a row or -1 for one a "
                "tensor"
            )
        try:
            return WeightFormat(
                bits=self.bits,
                group=max(group, 0),
                zero="middle" if self.symmetric else self.zero,
                activations=self.activations or 0,
                kind=self.kind,
            )
        except SpecError as error:
            raise BadPassOption(f"quantize: {str(error).removeprefix('weight: ')}") from error

    @property
    def rounding(self) -> Method:
        return find_method(self.method)

    def current_needs(self) -> Needs:
        searches = self.average_bits is not None
        return Needs.CALIBRATION if self.rounding.needs_calibration or searches else Needs.NOTHING

    def stages(self) -> tuple[Pass, ...]:
        return (TransformWeights(self), self) if self.rounding.transforms else (self,)

    def options(self) -> dict[str, Any]:
        return super().options() | {"method": self.rounding.text()}

    # ------------------------------------------------------------------------------------------------------- the graph

    def candidates(self, view: GraphView) -> Iterable[Node]:
        return find_candidates(view)

    def calibration(self, work: Work, stage: str) -> Calibration:
        """What the method works with; the sites that stay float have the reason in their state."""
        chooser = Chooser(
            work.view,
            base=self.format(),
            whole=self.group_size == -1,
            skip=self.skip,
            bits=_pairs(self.bits_per_site),
            embeddings=self.embeddings,
            head=self.head,
        )
        sites, reasons = chooser.choose(work.sites)
        for context in work.sites:
            context.state["reason"] = reasons.get(context.node)
        if chooser.unused:
            work.facts["patterns_without_a_site"] = sorted(chooser.unused)
        settings = repr(
            (stage, self.rounding, self.format(), self.skip, self.bits_per_site, self.average_bits, self.seed)
        )
        meta = work.view.module.meta
        deadline = meta.get(_BUDGET)
        if deadline is None and self.seconds is not None:
            deadline = meta[_BUDGET] = time.monotonic() + self.seconds
        made = Calibration(
            view=work.view,
            sites=sites,
            batches=work.batches,
            seed=self.seed,
            progress=work.progress,
            deadline=deadline,
            store=Store.at(self.checkpoint, settings, work.view.module, work.batches),
            facts=work.facts,
        )
        return made if self.average_bits is None else self._spend(made)

    def _spend(self, work: Calibration) -> Calibration:
        """The sites with the bits that the search gives them, once for all stages."""
        meta = work.view.module.meta
        if _BITS not in meta:
            named = _pairs(self.bits_per_site)
            fixed = {s.id: s.format.bits for s in work.sites.values() if any(matches(s.context.site, p) for p in named)}
            work.check_rows("average_bits", 1)
            clip = bool(getattr(self.rounding, "clip", True))
            meta[_BITS] = search_bits(work, self.average_bits or 0.0, fixed=fixed, clip=clip)
        for name, bits in meta[_BITS].items():
            for site in work.sharing(name):
                form = site.format.changed(bits=bits)
                form = form.changed(scales=scales_dtype(work.weight(name), form))
                work.sites[site.id] = dataclasses.replace(site, format=form)
        return work

    def prepare(self, work: Work) -> None:
        begin = time.perf_counter()
        work.facts |= {"method": self.rounding.text(), "weight_bytes_before": constant_bytes(work.view)}
        calibration = self.calibration(work, "round")
        method = self.rounding
        if method.needs_calibration and calibration.leaders(linear=True):
            calibration.check_rows(method.name, method.least_rows)
        rounded = method.round(calibration) if calibration.sites else {}
        for key in (_BUDGET, _BITS):
            work.view.module.meta.pop(key, None)
        for site in calibration.leaders():
            found = rounded.pop(site.id, None)
            weight = _Packed(calibration, site, method.rest(calibration, site.id) if found is None else found)
            for one in calibration.sharing(site.id):
                one.context.state |= {"site": one, "weight": weight, "details": calibration.details.get(one.id, {})}
        if method.needs_calibration:
            work.facts["stopped_early"] = calibration.time_left() <= 0
        work.facts["seconds"] = round(time.perf_counter() - begin, 3)

    def rewrite(self, site: SiteContext) -> Rewrite | Decline | NearMiss:
        if (reason := site.state.get("reason")) is not None:
            return Decline(reason)
        weight: _Packed = site.state["weight"]
        one: WeightSite = site.state["site"]
        build = weight.build_linear if one.linear else weight.build_embedding
        return Rewrite(lambda builder: build(builder, one), weight.details(one) | site.state["details"])

    def finish(self, work: Work) -> None:
        work.facts |= {
            "weight_bytes": constant_bytes(work.view),
            "float_bytes": float_bytes(work.view),
            "quantized": sum("weight" in context.state for context in work.sites),
            "left_float": sum("weight" not in context.state for context in work.sites),
        }


@dataclass(frozen=True)
class TransformWeights(Pass):
    """What a rounding method changes of the float model beforehand: scales and rotations that fold into its weights.

    The function stays the same, which is validated on the model's outputs. :class:`Quantize` brings it along where its
    method asks for it. of: that pass.
    """

    exactness: ClassVar[Exactness] = Exactness.REASSOCIATED
    ops: ClassVar[tuple[str, ...]] = ()
    edits: ClassVar[bool] = True
    optional: ClassVar[bool] = True

    of: Quantize

    def options(self) -> dict[str, Any]:
        return {"method": self.of.rounding.text()}

    def current_needs(self) -> Needs:
        return self.of.current_needs()

    def candidates(self, view: GraphView) -> Iterable[Node]:
        return find_candidates(view)

    def edit(self, work: Work) -> None:
        method = self.of.rounding
        calibration = self.of.calibration(work, "transform")
        if not calibration.leaders(linear=True):
            return
        if method.needs_calibration:
            calibration.check_rows(method.name, method.least_rows)
        begin = time.perf_counter()
        work.facts |= dict(method.transform(calibration) or {})
        work.facts["seconds"] = round(time.perf_counter() - begin, 3)
        places = {context.site.id: context.site for context in work.sites}
        work.changed += [(places[name], dict(details)) for name, details in calibration.details.items()]


def _pairs(given: Any) -> dict[str, int]:
    """``bits_per_site`` as a mapping. Raises :class:`BadPassOption` for what is none."""
    found: dict[str, int] = {}
    if isinstance(given, str):
        given = (given,)
    if not isinstance(given, Mapping):
        try:
            given = dict(item.rsplit("=", 1) for item in given)
        except (AttributeError, TypeError, ValueError):
            raise BadPassOption(
                f"quantize: bits_per_site is {given!r}, but must be {{pattern: bits}} or a list of pattern=bits"
            ) from None
    for pattern, bits in given.items():
        number = int(bits) if isinstance(bits, str) and bits.strip().isdecimal() else bits
        if isinstance(number, bool) or number not in (8, 4, 3, 2, FLOAT) or not pattern:
            raise BadPassOption(
                f"quantize: bits_per_site gives {pattern!r} {bits!r} bits, but there are 8, 4, 3 and 2, and {FLOAT} to "
                "leave a site as it is"
            )
        found[str(pattern).strip()] = number
    return found


class _Packed:
    """One rounded weight, packed, for all the sites that read it."""

    def __init__(self, work: Calibration, site: WeightSite, rounded: QuantizedWeight) -> None:
        weight = work.weight(site.id)
        form = rounded.format
        if rounded.shape != tuple(weight.shape) or form.kind != site.format.kind or form.layout != "plain":
            raise BadPass(
                f"the rounding method gave codes of shape {rounded.shape} in {form.text()} for a weight of shape "
                f"{tuple(weight.shape)} in {site.format.text()}",
                site=site.id,
            )
        self.form = form.changed(activations=0)
        self.rows, self.columns = rounded.shape
        self.codes, self.scale, self.zero = rounded.packed(), rounded.scale, rounded.zero
        self.name = site.id
        self.before = weight.nbytes
        self.after = rounded.nbytes
        self.whole = site.whole
        self.sqnr = sqnr(weight, rounded)
        self.shared = len(work.sharing(site.id))
        self.nodes: list[Node | None] = []

    def constants(self, builder: Builder) -> list[Node | None]:
        """The nodes of codes, scale and zero: the same for every site, as the first one put them into the graph."""
        if not self.nodes:
            named = {"codes": self.codes, "scale": self.scale, "zero": self.zero}
            self.nodes = [None if t is None else builder.constant(f"{self.name}_{n}", t) for n, t in named.items()]
        return self.nodes

    def build_linear(self, builder: Builder, site: WeightSite) -> Node:
        codes, scale, zero = self.constants(builder)
        named = arguments(site.node)
        x, dtype = named["x"], value(site.node).dtype
        if value(x).dtype != dtype:  # inside autocast
            x = builder.call(aten.to.dtype, x, dtype)
        return builder.call(
            QUANTIZED_LINEAR,
            x,
            [codes],
            [scale],
            [] if zero is None else [zero],
            [named["bias"]],
            None,
            rows=[self.rows],
            format=self.form.changed(activations=site.format.activations).text(),
        )

    def build_embedding(self, builder: Builder, site: WeightSite) -> Node:
        return builder.call(
            QUANTIZED_EMBEDDING,
            arguments(site.node)["indices"],
            *self.constants(builder),
            rows=self.rows,
            columns=self.columns,
            format=self.form.text(),
            dtype=value(site.node).dtype,
        )

    def details(self, site: WeightSite) -> dict[str, Any]:
        form = self.form
        found: dict[str, Any] = {
            "bits": form.bits if form.kind == "int" else form.kind,
            "group": "tensor" if self.whole else form.group or "row",
            "zero": form.zero,
            "bytes": self.after,
            "bytes_before": self.before,
            "weight_sqnr_db": round(self.sqnr, 3),
        }
        if form.scales != "float16":
            found["scales"] = form.scales
        if site.format.activations:
            found["activations"] = site.format.activations
        if self.shared > 1:
            found["shared_by"] = self.shared
        return found


__all__ = ["EMBEDDING", "Quantize", "TransformWeights"]
