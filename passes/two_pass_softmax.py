"""Two-pass softmax: one pass less over memory for rows that no cache holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx

from ..codegen.softmax import ALGORITHMS
from ..runtime.cpu import cache_bytes
from ..runtime.errors import BadPassOption, UnsupportedKernel
from ..runtime.ops.softmax import HALF, KERNEL_DTYPES, hint, promoted_dtype, row_fits_on_chip
from ._attention_softmax import split_attention
from .base import Builder, Decline, Exactness, Pass, Rewrite, SiteContext
from .view import GraphView, arguments, is_assertion, is_cast, is_identity, same_size, same_sizes, value

Node = torch.fx.Node
aten = torch.ops.aten

_MULTIPLY = (aten.mul.Tensor, aten.mul.Scalar)
_DIVIDE = (aten.div.Tensor, aten.div.Scalar)
_NOT = (aten.logical_not.default, aten.bitwise_not.default)
_SAME_VALUE = (aten.expand.default, aten.detach.default, aten.detach_.default)
_H100 = {"L2_cache_size": 50 << 20, "multi_processor_count": 132}


@dataclass(frozen=True)
class TwoPassSoftmax(Pass):
    """Compute softmax with one accumulating read and one writing pass (rows that fit on chip: with one read in all).

        exp(z_i) = m_i 2^(e_i)      e_i = rint(z_i / ln 2), m_i = exp(z_i - e_i ln 2) in [2^-1/2, 2^1/2]
        (m, e) = sum_i (m_i, e_i)   added after aligning both mantissas to the greater exponent: nothing can overflow
        y_i = m_i / m * 2^(e_i - e)

    Dukhan and Ablavatski, "The Two-Pass Softmax Algorithm", arXiv:2001.04438. Holding exp(z) as a pair of floats makes
    the pass that looks for the maximum superfluous: 3N elements of memory traffic for a row of N, where three passes
    move 4N (recomputing the exponentials) or 5N (storing them). The paper measures up to 28 % (AVX-512) and 18 %
    (AVX2) over three passes on rows that no cache holds.

    A scale, an additive bias or a ``-inf`` mask in front is computed in the same kernel when only the softmax uses it.

    Quality: the same function, rounded differently, within the op's tolerance (2^-17 relative in float32). In half
    types a step in front that rounds is left where it is, so that the scores are the model's own, bit for bit.

    force: rewrite rows that a cache holds, too, where the saved pass costs no memory traffic, and take attentions
        apart, so that the softmax inside becomes one of its own (for comparisons: a fused attention is faster).
    row_bytes: rewrite rows of at least this many bytes; by default more than the CPU's second-level cache, and on a GPU
        rows that fit on chip, and longer ones when those in flight are more than its second-level cache.
    fuse_rounded: in half types, fuse steps that round as well: more accurate scores, but not the model's.
    algorithm: ``auto``, or the one to use everywhere, for comparisons.
    """

    exactness = Exactness.REASSOCIATED
    ops = ("softmax", "attention")
    after = frozenset({"sigmoid-attention"})  # a sigmoid attention has no softmax left

    force: bool = False
    row_bytes: int | None = None
    fuse_rounded: bool = False
    algorithm: str = "auto"

    def __post_init__(self) -> None:
        if self.row_bytes is not None and (not isinstance(self.row_bytes, int) or self.row_bytes < 0):
            raise BadPassOption(f"two-pass-softmax: row_bytes is {self.row_bytes!r}, but must be bytes or None")
        if self.algorithm not in ("auto", *ALGORITHMS):
            choices = ", ".join(("auto", *ALGORITHMS))
            raise BadPassOption(f"two-pass-softmax: algorithm is {self.algorithm!r}, but must be one of {choices}")

    def rewrite(self, site: SiteContext) -> Rewrite | Decline:
        if site.op == "attention":
            return self._inside_attention(site)
        if site.arg("algorithm") != "auto":
            return Decline(f"its algorithm has been chosen before: {site.arg('algorithm')}")
        scores = _fuse(site, self.fuse_rounded)
        x = value(scores.x)
        if x.dtype not in KERNEL_DTYPES:
            return Decline(f"it is {_dtype(x.dtype)}; kernels compute float32, bfloat16 and float16")
        dim = site.arg("dim") % max(x.dim(), 1)
        try:
            n = hint(x.shape[dim]) if x.dim() else 1
            sizes = [hint(size) for size in x.shape]
            on_chip = row_fits_on_chip(x, dim) if x.dim() else True
        except UnsupportedKernel as error:
            return Decline(str(error))
        if 0 in sizes:
            return Decline("it is empty")
        symbolic = x.dim() > 0 and not isinstance(x.shape[dim], int)
        bytes_in_row = n * x.dtype.itemsize
        rows = math.prod(sizes) // n
        if not self.force and (reason := self._unprofitable(x.device, bytes_in_row, rows, on_chip)):
            when = f" (captured with {n} elements, a length that may vary)" if symbolic else ""
            return Decline(f"{reason}{when}; force=True overrides")
        algorithm = self.algorithm
        if algorithm == "auto" and not symbolic:
            algorithm = "one_read" if on_chip else "two_pass"
        changes = {"scale": scores.scale, "dtype": scores.dtype, "algorithm": algorithm}
        details: dict[str, Any] = {
            "algorithm": algorithm,
            "row_length": n,
            "row_bytes": bytes_in_row,
            "fused": scores.fused,
            "not_fused": scores.stopped,
        }
        if symbolic:
            details["decided"] = (
                f"from the captured length {n}; a kernel is chosen for each length as it comes: "
                f"{'one_read' if on_chip else 'two_pass'} for this one"
            )

        def build(builder: Builder) -> Node:
            bias = scores.bias
            if scores.inverted:
                bias = builder.call(aten.logical_not.default, bias)
            return builder.call(site.node.target, **(arguments(site.node) | changes | {"x": scores.x, "bias": bias}))

        return Rewrite(build, details)

    def _inside_attention(self, site: SiteContext) -> Rewrite | Decline:
        """The softmax of an attention stands alone only after taking the attention apart."""
        if site.arg("normalizer") != "softmax":
            return Decline(f"its normalizer is {site.arg('normalizer')}")
        if not self.force:
            return Decline(
                "its softmax is part of an attention, whose scores need not go through memory at all; "
                "force=True takes the attention apart"
            )
        # The length decides between one_read and two_pass at each call, unless the user has decided.
        return Rewrite(
            split_attention(site, algorithm=self.algorithm),
            {"algorithm": self.algorithm, "taken_apart": "attention_scores, softmax, attention_values"},
        )

    def _unprofitable(self, device: torch.device, row: int, rows: int, on_chip: bool) -> str | None:
        """Why the rewrite would not save memory traffic, or None."""
        if self.row_bytes is not None:
            return f"rows of {_size(row)} are below row_bytes={self.row_bytes}" if row < self.row_bytes else None
        if device.type != "cuda":
            cache = cache_bytes()
            fits = f"rows of {_size(row)} stay in the CPU's second-level cache ({_size(cache)}) between passes"
            return f"{fits}, so one pass less saves no memory traffic" if row <= cache else None
        if on_chip:
            return None
        cache, processors = _gpu(device)
        flying = min(rows, processors)
        fits = f"the {flying} rows of {_size(row)} in flight stay in the GPU's second-level cache ({_size(cache)})"
        return f"{fits} between passes" if flying * row <= cache else None


@dataclass(frozen=True)
class _Scores:
    """The softmax's input as ``scale * x + bias``: what is left to read, and what the kernel computes itself."""

    x: Node
    bias: Node | None
    scale: float
    dtype: torch.dtype | None
    inverted: bool = False
    fused: list[str] = field(default_factory=list)
    stopped: str | None = None

    def step(self, node: Node, **changes: Any) -> _Scores:
        return replace(self, fused=[*self.fused, node.name], **changes)

    def stop(self, reason: str) -> _Scores:
        return replace(self, stopped=reason)


def _fuse(site: SiteContext, fuse_rounded: bool) -> _Scores:
    """Walk from the softmax's input towards the graph's, taking over each step it can."""
    scores = _Scores(site.arg("x"), site.arg("bias"), float(site.arg("scale")), site.arg("dtype"))
    user = site.node
    while True:
        node = scores.x
        rule = _rule(node)
        if rule is None:
            return scores
        if reason := _kept(site.view, node, user, site.node):
            return scores.stop(f"{node.name}: {reason}")
        after = rule(node, scores, site, fuse_rounded)
        if after.stopped is not None:
            return replace(after, stopped=f"{node.name}: {after.stopped}")
        scores, user = after, node


def _kept(view: GraphView, node: Node, user: Node, root: Node) -> str | None:
    """Why the node has to stay: something else reads it, or what it read is overwritten before the softmax runs."""
    others = [u for u in node.users if u is not user and not is_assertion(u)]
    if others:
        return f"{others[0].name} uses it too"
    if (writer := view.modified([node], root)) is not None:
        return f"{writer.name} writes in place what it reads or makes"
    return None


Rule = Callable[[Node, _Scores, SiteContext, bool], _Scores]


def _rule(node: Node) -> Rule | None:
    if node.op != "call_function":
        return None
    if is_identity(node):
        return _nothing
    return _cast if is_cast(node) else _RULES.get(node.target)


def _same_tensor(x: Any, result: Any, dtype: bool = True) -> bool:
    """Whether ``x`` is a tensor of the result's shape and dtype: what broadcasts cannot become the input."""
    if not isinstance(x, torch.Tensor) or x.dim() != result.dim() or (dtype and x.dtype != result.dtype):
        return False
    return same_sizes(x.shape, result.shape)


def _broadcasts(bias: Any, result: Any) -> bool:
    if not isinstance(bias, torch.Tensor) or bias.dim() > result.dim() or bias.device != result.device:
        return False
    pairs = zip(reversed(bias.shape), reversed(result.shape), strict=False)
    return all(same_size(b, 1) or same_size(b, s) for b, s in pairs)


def _scale(node: Node, scores: _Scores, site: SiteContext, fuse_rounded: bool) -> _Scores:
    given = arguments(node)
    names = list(given)
    left, right = given[names[0]], given[names[1]]
    dividing = node.target in _DIVIDE
    if not dividing and isinstance(right, Node) and not isinstance(left, Node):
        left, right = right, left
    if isinstance(right, bool) or not isinstance(right, int | float):
        return scores.stop("the factor is no number known when compiling")
    if right == 0 or not math.isfinite(right):
        return scores.stop(f"the factor is {right}")
    result = value(node)
    if not _same_tensor(value(left), result):
        return scores.stop("it changes shape or dtype")
    exact = math.frexp(abs(right))[0] == 0.5  # a power of two
    if result.dtype == torch.float16:  # 2^k x may overflow in the model and not in the kernel
        exact = exact and (abs(right) >= 1 if dividing else abs(right) <= 1)
    if result.dtype in HALF and not exact and not fuse_rounded:
        return scores.stop(f"it rounds to {str(result.dtype).removeprefix('torch.')}; fuse_rounded=True overrides")
    return scores.step(node, x=left, scale=scores.scale / right if dividing else scores.scale * right)


def _bias(node: Node, scores: _Scores, site: SiteContext, fuse_rounded: bool) -> _Scores:
    given = arguments(node)
    if given["alpha"] != 1:
        return scores.stop(f"alpha is {given['alpha']}")
    if scores.bias is not None or scores.scale != 1.0:
        return scores.stop("the scores are masked or scaled after the addition")
    result = value(node)
    terms = [given["self"], given["other"]]
    # Both may have the full shape: the input is then the one that something can be fused behind.
    if isinstance(terms[1], Node) and terms[1].target in (*_MULTIPLY, *_DIVIDE):
        terms.reverse()
    for x, bias in (terms, terms[::-1]):
        wide, narrow = value(x), value(bias)
        if not isinstance(x, Node) or not isinstance(bias, Node) or not _same_tensor(wide, result, dtype=False):
            continue
        if not _broadcasts(narrow, result) or not wide.dtype.is_floating_point or not narrow.dtype.is_floating_point:
            continue
        if narrow.dim() == 0 and narrow.dtype != wide.dtype:
            continue  # torch promotes by dimensions there
        if promoted_dtype(wide, narrow) != result.dtype:
            continue
        if result.dtype in HALF and not fuse_rounded:
            return scores.stop(f"it rounds to {str(result.dtype).removeprefix('torch.')}; fuse_rounded=True overrides")
        return scores.step(node, x=x, bias=bias)
    return scores.stop("no operand has the shape of the sum and a floating partner that broadcasts to it")


def _mask(x: Any, mask: Any, inverted: bool, filler: Any, node: Node, scores: _Scores) -> _Scores:
    """The scores are ``filler`` where mask is (inverted: is not) True, else x."""
    if not _is_minus_infinity(filler):
        return scores.stop("what it fills in is not -inf")
    if scores.bias is not None:
        return scores.stop("the scores are masked or biased after it")
    if scores.scale < 0:
        return scores.stop("a negative scale turns its -inf into +inf")
    if not isinstance(x, Node) or not _same_tensor(value(x), value(node)):
        return scores.stop("it changes shape or dtype")
    if not isinstance(mask, Node) or value(mask).dtype != torch.bool or not _broadcasts(value(mask), value(node)):
        return scores.stop("its mask does not broadcast to the scores")
    if inverted and mask.target in _NOT and value(mask.args[0]).dtype == torch.bool:
        mask, inverted = mask.args[0], False
    return scores.step(node, x=x, bias=mask, inverted=inverted)


def _masked_fill(node: Node, scores: _Scores, site: SiteContext, fuse_rounded: bool) -> _Scores:
    given = arguments(node)
    return _mask(given["self"], given["mask"], True, given["value"], node, scores)


def _where(node: Node, scores: _Scores, site: SiteContext, fuse_rounded: bool) -> _Scores:
    given = arguments(node)
    if _is_minus_infinity(given["other"]):
        return _mask(given["self"], given["condition"], False, given["other"], node, scores)
    return _mask(given["other"], given["condition"], True, given["self"], node, scores)


def _is_minus_infinity(filler: Any) -> bool:
    if isinstance(filler, Node):
        if filler.target in (aten.full.default, aten.full_like.default):
            filler = filler.args[1]
        elif filler.target is aten.scalar_tensor.default:
            filler = filler.args[0]
        elif is_identity(filler) or is_cast(filler) or filler.target in _SAME_VALUE:
            return _is_minus_infinity(filler.args[0])
        elif filler.op == "get_attr":
            held = _attribute(filler)
            return isinstance(held, torch.Tensor) and held.numel() == 1 and float(held) == -math.inf
    return isinstance(filler, float) and filler == -math.inf


def _attribute(node: Node) -> Any:
    """The tensor a ``get_attr`` node reads when it is a lifted constant, which nothing trains or writes."""
    held: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        held = getattr(held, part, None)
    if isinstance(held, torch._subclasses.FakeTensor) or isinstance(held, torch.nn.Parameter):
        return None
    return held


def _cast(node: Node, scores: _Scores, site: SiteContext, fuse_rounded: bool) -> _Scores:
    """Half scores widened to float32: the kernel reads them as they are. The result is float32 as before."""
    source = node.args[0]
    before, after = value(source), value(node)
    if after.device != before.device:
        return scores.stop(f"it moves {before.device} to {after.device}")
    out = scores.dtype if scores.dtype is not None else value(site.node).dtype
    if before.dtype not in HALF or after.dtype != torch.float32 or out != torch.float32:
        return scores.stop(f"it casts {_dtype(before.dtype)} to {_dtype(after.dtype)}")
    return scores.step(node, x=source, dtype=torch.float32)


def _nothing(node: Node, scores: _Scores, site: SiteContext, fuse_rounded: bool) -> _Scores:
    return scores.step(node, x=node.args[0])


_RULES: dict[Any, Rule] = {
    **dict.fromkeys((*_MULTIPLY, *_DIVIDE), _scale),
    aten.add.Tensor: _bias,
    **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill.Tensor), _masked_fill),
    **dict.fromkeys((aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar), _where),
}


def _gpu(device: torch.device) -> tuple[int, int]:
    """(bytes of second-level cache, multiprocessors); an H100's when no GPU is here and the graph is only compiled."""
    if not torch.cuda.is_available():
        return _H100["L2_cache_size"], _H100["multi_processor_count"]
    properties = torch.cuda.get_device_properties(device)
    return properties.L2_cache_size, properties.multi_processor_count


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
