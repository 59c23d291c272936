"""KV caches of encoder-decoders: the encoder runs once, and so does what the decoder makes of its states.

The decoder is captured by itself, from its tokens and the encoder's states. Of its graph, the part that depends on
those states alone (keys and values of every cross-attention, the encoder's padding mask) becomes a graph of its own,
which runs at a sequence's first call; its results stay with the cache and are inputs of the graph that decodes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx
from torch import Tensor

from ..passes.view import value
from ..runtime.errors import BadArgument, BadExampleInputs, CacheMismatch, NotADecoder
from ..runtime.kv_cache import KVState
from .cached_program import CachedProgram, CacheOwner, refuse
from .decode_form import SAMPLE, DecodeForm
from .exported import ExportedProgram
from .inputs import by_name, describe_inputs
from .lift_cache import Lifted, lift
from .options import Options

Node = torch.fx.Node
aten = torch.ops.aten
STATES, MASK = "encoder_hidden_states", "encoder_attention_mask"
_KNOWN = frozenset(
    {"attention_mask", "decoder_input_ids", "decoder_attention_mask", "encoder_outputs", "past_key_values", "use_cache"}
    | {"return_dict", "cache_position"}
)


def is_encoder_decoder(model: torch.nn.Module) -> bool:
    """Whether a transformers model has an encoder whose states its decoder looks at."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)) and hasattr(model, "get_encoder")


class Decoder(torch.nn.Module):
    """The decoder of an encoder-decoder and its head, from token ids (B, L) and the encoder's states (B, S, W)."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor
    ) -> Any:
        from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

        out = self.model(
            attention_mask=encoder_attention_mask,
            decoder_input_ids=input_ids,
            decoder_attention_mask=attention_mask,
            encoder_outputs=BaseModelOutput(last_hidden_state=encoder_hidden_states),
            use_cache=False,
        )
        return Seq2SeqLMOutput(logits=out.logits)


@dataclass(frozen=True)
class CrossForm(DecodeForm):
    """How the decoder is captured. states: the encoder's on example inputs, and their mask, as many rows as SAMPLE."""

    states: tuple[Tensor, ...] = field(default=(), compare=False)

    @staticmethod
    def of(model: torch.nn.Module, named: Mapping[str, Any]) -> CrossForm:
        """named: example inputs of the whole model, perhaps none. Raises :class:`BadExampleInputs`."""
        call: Any = model
        embedding = call.get_decoder().get_input_embeddings()
        vocabulary = int(embedding.num_embeddings)
        main = getattr(model, "main_input_name", "input_ids")
        if named.get(main) is None:
            if main != "input_ids":
                raise BadExampleInputs(f"give example inputs: {type(model).__name__} takes {main}, not only token ids")
            generator = torch.Generator().manual_seed(1)
            ids = torch.randint(
                int(call.get_encoder().get_input_embeddings().num_embeddings), (2, 11), generator=generator
            )
            named = {main: ids.to(embedding.weight.device)}
        states, mask = encode(model, named)
        rows = torch.arange(SAMPLE[0], device=states.device) % states.shape[0]
        parameters = tuple(inspect.signature(Decoder.forward).parameters)[1:]
        return CrossForm(
            tokens="input_ids",
            parameters=parameters,
            constants={},
            vocabulary=vocabulary,
            has_mask=True,
            has_positions=False,
            keeps_logits=False,
            takes_use_cache=False,
            extra=(STATES, MASK),
            states=(states[rows], mask[rows]),
        )

    def example(self, model: torch.nn.Module, device: torch.device | None = None) -> dict[str, Any]:
        named = super().example(model, device)
        return self.complete(named | dict(zip(self.extra, self.states, strict=True)))

    def captured(self, model: torch.nn.Module, named: Mapping[str, Any]) -> dict[str, Any]:
        """Always our own tokens: the whole model's example inputs say nothing about them but the encoder's states."""
        return self.example(model)

    def cut(self, name: str, value: Any, rows: int, start: int, count: int) -> Any:
        return value[:rows] if name in self.extra else super().cut(name, value, rows, start, count)


@torch.no_grad()
def encode(model: torch.nn.Module, named: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The encoder's last states (B, S, W) for a call's arguments, and which of them are no padding: int64 (B, S)."""
    given = named.get("encoder_outputs")
    mask = named.get("attention_mask")
    if given is not None:
        states = given[0]
    else:
        whole: Any = model
        encoder: Any = whole.get_encoder()
        main = getattr(model, "main_input_name", "input_ids")
        if named.get(main) is None:
            raise BadArgument(f"the call needs {main} or encoder_outputs")
        takes = inspect.signature(encoder.forward).parameters
        more = {"attention_mask": mask} if mask is not None and "attention_mask" in takes else {}
        states = encoder(named[main], **more)[0]
    if mask is None or tuple(mask.shape) != tuple(states.shape[:2]):
        mask = torch.ones(states.shape[:2], dtype=torch.int64, device=states.device)
    return states, mask


class CrossProgram(CachedProgram):
    """A decoder with a cache, called with the arguments of the encoder-decoder it is part of."""

    def __init__(self, setup: torch.fx.GraphModule, program: ExportedProgram, *rest: Any) -> None:
        self.setup = setup
        super().__init__(program, *rest)
        decoder: Any = program.model
        self.whole: Any = decoder.model
        self.signature = inspect.signature(self.whole.forward)

    @staticmethod
    def make(
        program: ExportedProgram, form: DecodeForm, options: Options, owner: CacheOwner | None = None
    ) -> CrossProgram:
        """As :meth:`CachedProgram.make`; cross-attention keeps what it makes of the encoder's states."""
        names = [one.path for one in describe_inputs(program.record.captured, program.captured.in_spec)]
        rewritten = program.record.rewritten.graph
        only = from_encoder(rewritten, _inputs(rewritten, names))
        beside = {node.name for node in rewritten.nodes if _is_cross(node, only)}
        refuse(program, frozenset(beside))
        lifted, setup = split(lift(program.record.lowered, names, form.tokens, counts=True))
        cross = CrossProgram(setup, program, form, lifted, options, owner)
        if options.validate:
            cross._check_decoding()
        return cross

    def _step(self, tensors: Mapping[str, Any], state: KVState, count: int, run: Callable[..., Any]) -> Any:
        if not state.fixed:
            if tensors.get(STATES) is None:
                raise CacheMismatch("this cache was not filled by a call that saw the encoder's states")
            with torch.no_grad():
                reads = self.setup.graph.find_nodes(op="placeholder")
                state.fixed = list(self.setup(*(tensors[name] for name in (STATES, MASK)[: len(reads)])))
        fixed = state.fixed
        return super()._step(tensors, state, count, lambda *given: run(*given, *fixed))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        named = by_name(self.signature.bind(*args, **kwargs))
        self.program.model.training = self.whole.training
        main = getattr(self.whole, "main_input_name", "input_ids")
        for name, item in named.items():
            if name not in _KNOWN and name != main and item is not None and item is not False:
                raise BadArgument(f"an encoder-decoder with a KV cache was not compiled for {name}")
        if not isinstance(named.get("decoder_input_ids"), Tensor):
            raise BadArgument("the call needs decoder_input_ids: token ids of shape (batch, tokens)")
        cache = self._cache_of(named.get("past_key_values"))
        given: dict[str, Any] = {"input_ids": named["decoder_input_ids"]}
        states = None
        if cache is None or cache.state is None or not cache.state.fixed:
            states, mask = encode(self.whole, named)
            if states.shape[0] != given["input_ids"].shape[0]:
                raise BadArgument(
                    f"the encoder saw {states.shape[0]} sequences, and the decoder gets {given['input_ids'].shape[0]}"
                )
            given |= {STATES: states, MASK: mask}
        elif (outputs := named.get("encoder_outputs")) is not None:
            states = outputs[0]
        given["attention_mask"] = named.get("decoder_attention_mask")
        given |= {name: named[name] for name in ("past_key_values", "use_cache") if name in named}
        out = super().__call__(**given)
        if isinstance(out, dict) and states is not None:
            out["encoder_last_hidden_state"] = states
        return out.to_tuple() if named.get("return_dict") is False and hasattr(out, "to_tuple") else out


# ------------------------------------------------------------------------------------------------------- the graphs


def _inputs(graph: torch.fx.Graph, names: list[str]) -> list[Node]:
    """The placeholders of the encoder's states and, where it is read, their mask."""
    found = dict(zip(names, graph.find_nodes(op="placeholder"), strict=False))
    return [found[name] for name in (STATES, MASK) if name in found]


def _is_cross(node: Node, only: set[Node]) -> bool:
    name = getattr(node.target, "_opname", "")
    return name == "attention" and all(item in only for item in node.args[1:3])


def _sizes(inputs: list[Node]) -> dict[Any, tuple[Node, int]]:
    """Symbolic sizes of the encoder's inputs: expression -> (input, dimension)."""
    found: dict[Any, tuple[Node, int]] = {}
    for node in inputs:
        for dim, size in enumerate(value(node).shape):
            if isinstance(size, torch.SymInt):
                found.setdefault(size.node.expr, (node, dim))
    return found


def from_encoder(graph: torch.fx.Graph, inputs: list[Node]) -> set[Node]:
    """The nodes that can be computed from ``inputs`` and parameters alone, and need at least one of ``inputs``.

    Sizes count as known when an input has them, wherever they are read off.
    """
    sizes = _sizes(inputs)
    only, free = set(inputs), set()
    for node in graph.nodes:
        if node.op == "get_attr":
            free.add(node)
        if node.op != "call_function" or getattr(getattr(node.target, "_schema", None), "is_mutable", False):
            continue
        held = value(node)
        if isinstance(held, torch.SymInt) and held.node.expr in sizes:
            free.add(node)
        elif node.all_input_nodes and all(item in only or item in free for item in node.all_input_nodes):
            (only if any(item in only for item in node.all_input_nodes) else free).add(node)
    return only


def split(lifted: Lifted) -> tuple[Lifted, torch.fx.GraphModule]:
    """The decoder's graph with what comes from the encoder as its last inputs, and the graph that makes those.

    Raises :class:`~tilewright.runtime.errors.NotADecoder` where the decoder needs the encoder's states otherwise.
    """
    module, graph = lifted.module, lifted.module.graph
    inputs = _inputs(graph, list(lifted.inputs))
    if STATES not in lifted.inputs:
        raise NotADecoder("the decoder does not look at the encoder's states")
    only = from_encoder(graph, inputs)
    wanted = [
        node
        for node in graph.nodes
        if node in only and node.op == "call_function" and any(u not in only for u in node.users)
    ]
    wanted = [node for node in wanted if isinstance(value(node), Tensor)]
    setup = _setup(module, inputs, wanted)
    last = graph.find_nodes(op="placeholder")[-1]
    for index, node in enumerate(wanted):
        with graph.inserting_after(last):
            last = graph.placeholder(f"cross_{index}")
        last.meta = {"val": value(node)}
        new = last
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user not in only)
    kept = [node for node in graph.find_nodes(op="placeholder") if node.name.startswith("cross_")]
    _read_sizes_elsewhere(graph, inputs, kept)
    graph.eliminate_dead_code()
    for node in inputs:
        if node.users:
            raise NotADecoder(
                f"the decoder uses the encoder's states together with its tokens outside of attention "
                f"({next(iter(node.users))}), so they cannot be looked at once only"
            )
        graph.erase_node(node)
    graph.lint()
    module.recompile()
    left = tuple(name for name in lifted.inputs if name not in (STATES, MASK))
    return replace(lifted, inputs=left), setup


def _setup(module: torch.fx.GraphModule, inputs: list[Node], wanted: list[Node]) -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    copies: dict[Node, Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
    sizes = _sizes(inputs)

    def copy(node: Node) -> Node:
        if node not in copies:
            held = value(node)
            if isinstance(held, torch.SymInt) and held.node.expr in sizes:
                source, dim = sizes[held.node.expr]
                copies[node] = graph.call_function(aten.sym_size.int, (copies[source], dim))
            else:
                for item in node.all_input_nodes:
                    copy(item)
                copies[node] = graph.node_copy(node, copies.__getitem__)
        return copies[node]

    # In one piece each: they are read at every step.
    graph.output([graph.call_function(aten.contiguous.default, (copy(node),)) for node in wanted])
    return torch.fx.GraphModule(module, graph)


def _read_sizes_elsewhere(graph: torch.fx.Graph, inputs: list[Node], kept: list[Node]) -> None:
    """Sizes that the decoder reads off the encoder's states are read off what is kept of them."""
    sizes = _sizes(kept)
    for node in inputs:
        for user in list(node.users):
            held = value(user)
            if user.target is aten.sym_size.int and isinstance(held, torch.SymInt) and held.node.expr in sizes:
                source, dim = sizes[held.node.expr]
                user.args = (source, dim)
            elif user.target is aten._assert_tensor_metadata.default:
                graph.erase_node(user)
