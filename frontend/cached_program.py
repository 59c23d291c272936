"""Calls of a module with a KV cache: the model's own signature in, its own output type out, the cache in between."""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ..passes._rotary import table_end
from ..passes.base import Pass
from ..passes.execute import run as run_graph
from ..passes.metrics import tensor_error
from ..runtime import graph_executor, kv_cache_file, memory
from ..runtime.errors import BadArgument, CacheFull, CacheMismatch, NotADecoder
from ..runtime.kv_cache import AnySite, KVState
from .capture import untouched
from .decode_form import DecodeCall, DecodeForm
from .decoder_cache import DecoderCache, cache_class
from .exported import ExportedProgram
from .inputs import describe_inputs
from .lift_cache import Lifted, lift, why_not_token_by_token
from .options import KV_CACHE, Options
from .rest import through_inductor

if TYPE_CHECKING:
    from .decoder_file import StoredProgram

MEASURED = 1024
"""Tokens of the cache whose memory is measured for the report."""
SAMPLES = 4096
"""Entries of a weight that go into a fingerprint."""
UNLIMITED = 2**31 - 1
"""Tokens that a cache of fixed size may have seen: what counts them has 32 bits."""


def cache_pass(passes: Sequence[Pass]) -> Pass | None:
    """The pass that puts a cache into the graph, if there is one."""
    return next((one for one in passes if KV_CACHE in one.provides), None)


class CacheOwner:
    """What a compiled module's caches have in common, in all modes of the model.

    sites: as they are kept. max_length: tokens a sequence. Two compilations never share one.
    """

    def __init__(self, sites: tuple[AnySite, ...], max_length: int, module: torch.fx.GraphModule) -> None:
        self.sites = sites
        self.max_length = max_length
        self.module = module

    def fingerprint(self) -> str:
        """Of the weights and of how the cache is kept: tells a file of another model's cache. Samples large tensors."""
        digest = hashlib.sha256(repr(self.sites).encode())
        held = (self.module.named_parameters(remove_duplicate=False), self.module.named_buffers(remove_duplicate=False))
        for name, tensor in sorted((*held[0], *held[1]), key=lambda pair: pair[0]):
            flat = tensor.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // SAMPLES)].cpu().contiguous()
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(sample.view(torch.uint8).numpy().tobytes() if sample.numel() else b"")
        return digest.hexdigest()


class CachedProgram:
    """One exported graph with its cache lifted out, made callable."""

    def __init__(
        self,
        program: ExportedProgram | StoredProgram,
        form: DecodeForm,
        lifted: Lifted,
        options: Options,
        owner: CacheOwner | None = None,
        max_length: int | None = None,
        table: int | None = None,
    ) -> None:
        """max_length, table: of a decoder whose passes and graph metadata are gone."""
        self.program, self.form, self.lifted = program, form, lifted
        self.uncached = program if isinstance(program, ExportedProgram) else None
        """The graph without a cache, which gradients go through; None where only the decoding graph is left."""
        if max_length is None:
            max_length = getattr(cache_pass(options.passes), "max_length", UNLIMITED)
        self.owner = CacheOwner(lifted.sites, max_length, lifted.module)
        if owner is not None and owner.sites == self.owner.sites:
            self.owner = owner  # the same weights in another mode: caches go on
        self.device = torch.device(next((one.device for one in program.inputs if one.device), "cpu"))
        rest = program.record.rest if isinstance(program, ExportedProgram) else options.rest
        if rest != "eager":
            self.run: Any = through_inductor(lifted.module, True)
        elif graph_executor.why_not(lifted.module) is None and graph_executor.available():
            self.run = graph_executor.GraphExecutor(lifted.module)
        else:
            self.run = lifted.module
        if options.memory == "pool":
            self.run = memory.pooled(self.run)
        self.table = table_end(lifted.module) if self.uncached is not None else table
        self.turns_keys = any(site.layout.rotate for site in lifted.sites)
        self._last = torch.zeros(1, dtype=torch.int64, device=self.device)

    @staticmethod
    def make(
        program: ExportedProgram, form: DecodeForm, options: Options, owner: CacheOwner | None = None
    ) -> CachedProgram:
        """Lift the cache out of ``program``'s graph and see that it decodes.

        Raises :class:`~tilewright.runtime.errors.NotADecoder` naming the site and the reason.
        """
        refuse(program)
        names = [one.path for one in describe_inputs(program.record.captured, program.captured.in_spec)]
        lifted = lift(program.record.lowered, names, form.tokens)
        cached = CachedProgram(program, form, lifted, options, owner)
        if options.validate and not program.model.training and not form.extra:  # dropout draws other numbers each time
            cached._check_decoding()
        return cached

    def _check_decoding(self) -> None:
        """A few tokens, in chunks and one by one, must give what the whole graph gives for them at once."""
        named = self.form.example(self.program.model, self.device)
        ids = named[self.form.tokens]
        assert self.uncached is not None
        whole = run_graph(self.uncached.record.lowered, self.uncached.flatten((), named))
        want = next(t for t in pytree.tree_leaves(whole) if isinstance(t, Tensor) and t.is_floating_point())
        for rows, chunks in ((len(ids), (ids.shape[1] - 3, 1, 2)), (1, (ids.shape[1] - 1, 1))):
            state, got = self.new_state(rows, ids.shape[1]), []
            start = 0
            for count in chunks:
                state.reserve(count)
                part = {n: self.form.cut(n, t, rows, start, count) for n, t in named.items()}
                out = self._step(part, state, count, self.lifted.module)
                got.append(next(t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()))
                start += count
            error = tensor_error(torch.cat(got, 1), want[:rows])["rel_l2"]
            if not error <= 4 * torch.finfo(want.dtype).eps ** 0.5:
                raise NotADecoder(
                    f"with a cache the model computes something else than on the whole sequence (relative error "
                    f"{error:.2g}): it mixes tokens in another way than by causal attention"
                )

    # State.

    def new_state(self, batch: int, limit: int | None = None) -> KVState:
        return KVState(self.owner.sites, limit or self.owner.max_length, batch, self.device)

    def new_cache(self, path: str | os.PathLike[str] | None = None) -> DecoderCache:
        """An empty one, or what :meth:`DecoderCache.save` wrote to ``path``."""
        cache = cache_class()(self.owner)
        if path is not None:
            cache.state = kv_cache_file.read(path, self.new_state(0), self.owner.fingerprint())
        return cache

    def for_generate(self, kwargs: dict[str, Any], use_cache: bool | None = None) -> dict[str, Any]:
        """The keywords of ``generate`` with a cache of ours, unless the caller wants none or has one.

        use_cache: the model's own default.
        """
        config = kwargs.get("generation_config")
        for source in (kwargs, vars(config) if config is not None else {}):
            if source.get("cache_implementation") is not None:
                raise BadArgument(
                    f"cache_implementation={source['cache_implementation']!r}: this module keeps its cache itself; "
                    "leave it out"
                )
        wanted = kwargs.get("use_cache", use_cache if config is None else config.use_cache)
        if wanted is False or kwargs.get("past_key_values") is not None:
            return kwargs
        return kwargs | {"past_key_values": self.new_cache()}

    def figures(self) -> dict[str, float]:
        """What one sequence takes, measured on tensors that are allocated for it. See :class:`Report`."""
        small = self.new_state(1, min(self.owner.max_length, MEASURED))
        small.reserve(1)
        fixed = sum(tensor.nbytes for grows, tensor in zip(small.grows, small.flat, strict=True) if not grows)
        return {
            "sites": len(self.owner.sites),
            "tokens": self.owner.max_length,
            "bytes_per_token": small.bytes_per_token(),
            "fixed_bytes": fixed,
        }

    # Calls.

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.form.read(args, kwargs)
        cache = self._cache_of(call.cache)
        plain = call.use_cache is False or (call.use_cache is None and self.program.model.training)
        if call.loss and cache is not None and cache.get_seq_length():
            raise BadArgument("a loss is computed on whole sequences: give labels without past_key_values")
        if self.uncached is not None and (call.loss or (plain and cache is None and torch.is_grad_enabled())):
            return self._whole(self.uncached, call)
        ids = call.tensors[self.form.tokens]
        batch, count = ids.shape
        keep = call.use_cache is not False or cache is not None
        if keep and cache is None:
            cache = self.new_cache()
        state = cache.state if cache is not None else None
        fresh = state is None
        if state is None:
            if count > self.owner.max_length and keep:
                KVState((), self.owner.max_length, 0).reserve(count)  # refuses
            state = self.new_state(batch, None if keep else count)
        elif state.batch != batch:
            raise CacheMismatch(f"the cache holds {state.batch} sequences, and the call has {batch}")
        first = self._padding(call.tensors.pop("attention_mask", None), state, batch, count)
        self._fill_in(call.tensors, state, first, batch, count, call.keep)
        state.reserve(count)
        before = state.first.clone() if first is not None else None
        if first is not None:
            state.set_first(first)
        try:
            flat = self._step(call.tensors, state, count, self.run)
        except BaseException:
            if before is not None:
                state.set_first(before)
            state.failed()
            raise
        if fresh and cache is not None:
            cache.state = state
        return self._output(flat, cache if keep else None, call)

    def _step(self, tensors: Mapping[str, Any], state: KVState, count: int, run: Any) -> Any:
        inputs = [tensors[name] for name in self.lifted.inputs]
        inputs += [state.length, state.first]
        if state.pages is not None:
            inputs.append(state.pages)
        with torch.no_grad():
            flat = run(*inputs, *state.flat)
        state.advance(count)
        return flat

    def _output(self, flat: Any, cache: DecoderCache | None, call: DecodeCall) -> Any:
        out = pytree.tree_unflatten(list(flat), self.program.captured.out_spec)
        if cache is not None and isinstance(out, dict):
            out["past_key_values"] = cache
        if call.loss:
            out = self.form.with_loss(self.program.model, out, call)
        if call.return_dict is False and hasattr(out, "to_tuple"):
            return out.to_tuple()
        return out

    def _whole(self, program: ExportedProgram, call: DecodeCall) -> Any:
        """Without any cache, through the graph that gradients go through."""
        out = program(**self.form.complete(call.tensors, call.keep))
        if call.loss:
            out = self.form.with_loss(self.program.model, out, call)
        return out.to_tuple() if call.return_dict is False and hasattr(out, "to_tuple") else out

    def _cache_of(self, given: Any) -> DecoderCache | None:
        if given is None:
            return None
        if not isinstance(given, DecoderCache):
            raise CacheMismatch(
                f"past_key_values is a {type(given).__name__}, but this module keeps its cache itself: leave it out, "
                "or give what compiled.new_cache() or an earlier call returned"
            )
        if given.owner is not self.owner:
            raise CacheMismatch(
                "past_key_values is the cache of another compilation: make one with compiled.new_cache()"
            )
        return given

    def _padding(self, mask: Any, state: KVState, batch: int, count: int) -> Tensor | None:
        """The first token of each sequence that is no padding; None when it is as known."""
        total = state.tokens + count
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise BadArgument(
                "attention_mask must be a tensor of shape (batch, tokens so far): 1 for tokens, 0 for padding"
            )
        if tuple(mask.shape) != (batch, total):
            raise BadArgument(
                f"attention_mask has shape {tuple(mask.shape)}, but must cover the {state.tokens} tokens in the cache "
                f"and the {count} of this call: ({batch}, {total})"
            )
        shown = mask != 0
        if bool(shown.all()):
            if state.padded:
                raise CacheMismatch("attention_mask shows tokens that were padding when they were put into the cache")
            return None
        seen = shown.sum(1)
        first = torch.where(seen > 0, shown.to(torch.int8).argmax(1), total)
        if bool((seen != total - first).any()):
            raise BadArgument(
                "attention_mask has padding after tokens: a cache needs padding on the left (padding_side='left')"
            )
        if not state.tokens:
            return first
        known = state.first.to(first.dtype)
        moved = first != known
        if bool((moved & ~((known == state.tokens) & (first > known))).any()):
            raise CacheMismatch("attention_mask hides other tokens than when they were put into the cache")
        return first if bool(moved.any()) else None

    def _fill_in(
        self, tensors: dict[str, Any], state: KVState, first: Tensor | None, batch: int, count: int, keep: Any
    ) -> None:
        """What the graph reads and the call leaves out."""
        for name in self.lifted.inputs:
            if name == "position_ids":
                given = tensors.get(name)
                start = state.first if first is None else first
                if given is None:
                    given = self._positions(state, start, count)
                elif self.turns_keys and not self._as_counted(given, state, start, count):
                    raise BadArgument(
                        "position_ids must count each sequence's tokens from 0, padding left out: keys are kept before "
                        "they are turned by their positions"
                    )
                if given.shape[-1] != count:
                    raise BadArgument(f"position_ids has {given.shape[-1]} positions, but the call has {count} tokens")
                self._check_table(given, state.tokens + count)
                tensors[name] = given.expand(batch, count)
            elif name == "logits_to_keep":
                tensors[name] = self._kept(keep, count)
            elif name not in tensors:
                raise BadArgument(f"the call lacks {name!r}, with which the model was captured")

    def _check_table(self, positions: Tensor, tokens: int) -> None:
        if self.table is None or tokens <= self.table:  # the cheap question first: it needs no look at the tensor
            return
        if (last := int(positions.max())) >= self.table:
            raise CacheFull(f"position {last} is beyond the model's table of {self.table} positions")

    def _positions(self, state: KVState, first: Tensor, count: int) -> Tensor:
        """What the model takes for positions when it is given none: int64 (B, L) or (L,)."""
        index = torch.arange(state.tokens, state.tokens + count, device=self.device)
        padded = state.padded or (first is not state.first and bool((first > 0).any()))
        if not padded or not (self.turns_keys or self.skips_padding):
            return index
        return (index - first[:, None].to(torch.int64)).clamp_min(0)

    def _as_counted(self, given: Tensor, state: KVState, first: Tensor, count: int) -> bool:
        index = torch.arange(state.tokens, state.tokens + count, device=self.device)
        from_first = index - first[:, None].to(torch.int64)
        return bool(((given == from_first) | (from_first < 0)).all())

    @functools.cached_property
    def skips_padding(self) -> bool:
        """Whether the model leaves padding out when it counts positions itself. Asked of the model, once."""
        if self.form.extra:
            return True
        named = self.form.example(self.program.model, self.device)
        mask = named["attention_mask"].clone()
        mask[0, :3] = 0
        given = self.form.complete({self.form.tokens: named[self.form.tokens], "attention_mask": mask})
        # Its decoder without the head: the head's product is large, and positions are counted before it.
        asked: Any = getattr(self.program.model, "base_model", self.program.model)
        takes = inspect.signature(asked.forward).parameters
        given = {name: value for name, value in given.items() if name in takes}
        found = []
        for call in (given, {name: value for name, value in given.items() if name != "position_ids"}):
            with untouched(self.program.model), torch.no_grad():
                out = pytree.tree_leaves(asked(**call))
            found.append(next(t for t in out if isinstance(t, Tensor) and t.is_floating_point())[:, 3:])
        return tensor_error(found[1], found[0])["rel_l2"] <= torch.finfo(found[0].dtype).eps ** 0.5

    def _kept(self, keep: Any, count: int) -> Tensor:
        if isinstance(keep, Tensor):
            return keep
        if count == 1:
            return self._last
        return torch.arange(count - keep if 0 < keep < count else 0, count, device=self.device)


def refuse(program: ExportedProgram, beside: frozenset[str] = frozenset()) -> None:
    """Raise :class:`NotADecoder` when any attention of the graph but those ``beside`` was left without a cache."""
    record = program.record
    reasons: dict[str, tuple[str, str]] = {}
    for run in record.runs:
        if KV_CACHE in run.rewrite.provides:
            reasons |= {site.id: (reason, site.source) for site, reason in run.declined}
    left = why_not_token_by_token(record.rewritten, beside)
    if left is None and not any(
        getattr(n.target, "_opname", "") in ("cached_attention", "streaming_attention")
        for n in record.rewritten.graph.nodes
    ):
        raise NotADecoder("no attention was found in the model, so there is nothing to cache")
    if left is None:
        return
    if left in reasons:
        reason, source = reasons[left]
        raise NotADecoder(f"this attention cannot go through a KV cache: {reason}", site=left, source=source)
    for site, reason in record.raising.declined:
        if site.op == "attention":
            raise NotADecoder(f"an attention was not recognised: {reason}", site=site.id, source=site.source)
    raise NotADecoder("this part of the model looks at other tokens without a cache", site=left)
