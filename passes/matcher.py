"""Patterns over ATen graphs.

A pattern is an expression of :class:`Var`, :class:`Number` and operator calls::

    x, c = Var("x"), Number("c")
    pattern = call(aten.mul.Tensor, call(aten.add.Tensor, x, 1.0, commutes=True), c)

No constant is a wildcard: a Python value in a pattern must be equal to the graph's, and a number that may vary is
captured by name and handed to the rewrite. An argument the pattern does not mention must have its schema default.
Where a match stops, :class:`Miss` names the node and says why, and how much had matched by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx

from .view import GraphView, arguments

Node = torch.fx.Node


@dataclass(frozen=True)
class Var:
    """Binds any value: a node, a number, a list or None. Bound twice, both must be the same.

    where: an optional test of the value; ``reason`` is told when it fails.
    """

    name: str
    where: Callable[[Any], bool] | None = None
    reason: str = "has another value than the pattern asks for"


@dataclass(frozen=True)
class Number:
    """Binds a Python int or float (not a bool, not a tensor)."""

    name: str


@dataclass(frozen=True)
class Call:
    """A call of one of ``targets``. Positional arguments follow the schema; keywords are schema names."""

    targets: tuple[Any, ...]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()
    commutes: bool = False
    name: str | None = None


@dataclass(frozen=True)
class Through:
    """Looks through a chain of calls of ``targets`` (first argument) before matching ``inner``; none is fine too.

    where: which of those calls may be passed through, such as a dropout that is not active.
    """

    targets: tuple[Any, ...]
    inner: Any
    where: Callable[[Node], bool] | None = None
    name: str | None = None


@dataclass(frozen=True)
class Either:
    """The first of several patterns that matches."""

    options: tuple[Any, ...]


def call(target: Any, *args: Any, commutes: bool = False, name: str | None = None, **kwargs: Any) -> Call:
    """A :class:`Call`. ``target`` is an OpOverload or a tuple of them; ``name`` binds the node itself."""
    targets = target if isinstance(target, tuple) else (target,)
    return Call(targets, args, tuple(sorted(kwargs.items())), commutes, name)


def either(*options: Any) -> Either:
    return Either(options)


@dataclass(frozen=True)
class Match:
    """What a pattern bound. ``covered``: the nodes a rewrite replaces, the root included, bound Vars excluded."""

    root: Node
    bound: dict[str, Any]
    covered: tuple[Node, ...]

    def __getitem__(self, name: str) -> Any:
        return self.bound[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.bound.get(name, default)


@dataclass(frozen=True)
class Miss:
    """Where a match stopped. ``depth``: how many nodes had matched, to tell a near miss from no resemblance."""

    node: Node | None
    reason: str
    depth: int = 0


@dataclass
class _State:
    bound: dict[str, Any] = field(default_factory=dict)
    covered: dict[Node, None] = field(default_factory=dict)

    def copy(self) -> _State:
        return _State(dict(self.bound), dict(self.covered))


class Matcher:
    """Matches patterns at given roots of one graph.

    skip: nodes to look through wherever the pattern does not ask for their operator, by their first argument; they
    are covered where they stand between matched nodes. A Var binds what is behind them. Take
    :func:`~tilewright.passes.view.is_identity` to ignore casts and copies that change nothing.
    """

    def __init__(self, view: GraphView, skip: Callable[[Node], bool] | None = None) -> None:
        self.view = view
        self.skip = skip
        self._deepest = Miss(None, "nothing was matched", 0)

    def match(self, pattern: Any, root: Node, *, private: bool = True) -> Match | Miss:
        """Match ``pattern`` with its outermost call at ``root``.

        private: refuse when an inner node is used outside the match, so that a rewrite removes all it covers.
        """
        self._deepest = Miss(root, "the operator is another one", 0)
        for state in self._match(pattern, root, _State()):
            covered = tuple(sorted(state.covered))
            if private and (leak := self.view.escaping(covered, root)) is not None:
                self._stop(leak, f"its intermediate result {leak.name} is used elsewhere too", state)
                continue
            return Match(root, state.bound, covered)
        return self._deepest

    def _stop(self, node: Any, reason: str, state: _State) -> None:
        if len(state.covered) >= self._deepest.depth:
            self._deepest = Miss(node if isinstance(node, Node) else self._deepest.node, reason, len(state.covered))

    def _match(self, pattern: Any, value: Any, state: _State) -> Iterator[_State]:
        """Yield every state in which ``pattern`` matches ``value``: commuting operands and options backtrack."""
        match pattern:
            case Var(name, where, reason):
                value = self._behind(value)[0]
                if where is not None and not where(value):
                    self._stop(value, reason, state)
                    return
                yield from self._bind(name, value, state)
            case Number(name):
                if isinstance(value, bool) or not isinstance(value, int | float):
                    self._stop(value, f"{name} is not a number known when compiling", state)
                    return
                yield from self._bind(name, value, state)
            case Through():
                yield from self._match_through(pattern, value, state)
            case Either(options):
                for option in options:
                    yield from self._match(option, value, state.copy())
            case Call():
                yield from self._match_call(pattern, value, state)
            case list() | tuple():
                yield from self._match_sequence(pattern, value, state)
            case _:
                # A literal. 1 and 1.0 are the same number, True and 1 are not.
                if isinstance(value, Node) or pattern != value or isinstance(pattern, bool) != isinstance(value, bool):
                    self._stop(value, f"the constant is {value!r}, the pattern asks for {pattern!r}", state)
                    return
                yield state

    def _behind(self, value: Any) -> tuple[Any, list[Node]]:
        """What is behind the nodes to skip, and those nodes."""
        skipped = []
        while self.skip is not None and isinstance(value, Node) and value.args and self.skip(value):
            skipped.append(value)
            value = value.args[0]
        return value, skipped

    def _bind(self, name: str, value: Any, state: _State) -> Iterator[_State]:
        if name in state.bound:
            if state.bound[name] is value or (not isinstance(value, Node) and state.bound[name] == value):
                yield state
            else:
                self._stop(value, f"{name} is two different values", state)
            return
        state = state.copy()
        state.bound[name] = value
        yield state

    def _match_sequence(self, pattern: Any, value: Any, state: _State) -> Iterator[_State]:
        if not isinstance(value, list | tuple) or len(value) != len(pattern):
            self._stop(value, f"{value!r} is not a list of {len(pattern)}", state)
            return
        states: Iterator[_State] = iter([state])
        for inner, item in zip(pattern, value, strict=True):
            states = self._chain(inner, item, states)
        yield from states

    def _chain(self, pattern: Any, value: Any, states: Iterator[_State]) -> Iterator[_State]:
        for state in states:
            yield from self._match(pattern, value, state)

    def _match_through(self, pattern: Through, value: Any, state: _State) -> Iterator[_State]:
        """Longest chain first, so that the inner pattern sees the value behind every cast."""
        chain = []
        inner = value
        while isinstance(inner, Node) and inner.target in pattern.targets:
            if pattern.where is not None and not pattern.where(inner):
                break
            chain.append(inner)
            inner = inner.args[0]
        for length in range(len(chain), -1, -1):
            new = state.copy()
            new.covered.update(dict.fromkeys(chain[:length]))
            if pattern.name is not None:
                new.bound[pattern.name] = tuple(chain[:length])
            yield from self._match(pattern.inner, chain[length] if length < len(chain) else inner, new)

    def _match_call(self, pattern: Call, value: Any, state: _State) -> Iterator[_State]:
        skipped: list[Node] = []
        if isinstance(value, Node) and value.target not in pattern.targets:
            value, skipped = self._behind(value)
        if not isinstance(value, Node) or value.target not in pattern.targets:
            want = " or ".join(str(t) for t in pattern.targets[:3])
            got = value.target if isinstance(value, Node) else repr(value)
            self._stop(value, f"expected {want}, found {got}", state)
            return
        actual = arguments(value)
        schema = value.target._schema.arguments
        wanted = {schema[i].name: inner for i, inner in enumerate(pattern.args)} | dict(pattern.kwargs)
        for argument in schema:
            if argument.name in wanted or argument.name not in actual:
                continue
            default = argument.default_value if argument.has_default_value() else None
            if not argument.has_default_value() or actual[argument.name] != default:
                self._stop(
                    value, f"{argument.name}={actual[argument.name]!r} of {value.target} is not the default", state
                )
                return
        state = state.copy()
        state.covered.update(dict.fromkeys((*skipped, value)))
        if pattern.name is not None:
            state.bound[pattern.name] = value
        orders = [list(wanted.items())]
        if pattern.commutes:
            names = [schema[0].name, schema[1].name]
            swapped = dict(wanted)
            swapped[names[0]], swapped[names[1]] = wanted[names[1]], wanted[names[0]]
            orders.append(list(swapped.items()))
        for order in orders:
            states: Iterator[_State] = iter([state])
            for name, inner in order:
                states = self._chain(inner, actual.get(name), states)
            yield from states
