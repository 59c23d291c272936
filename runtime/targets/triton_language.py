"""Put Triton's language into interpreted or compiled form for a while, whatever form it was imported in.

``@triton.jit`` looks at ``triton.knobs.runtime.interpret`` when a function is decorated. The language's own library
(``tl.sum``, ``tl.max``, ``tl.sigmoid``, ``tl.cdiv`` ..., in ``triton/language/standard.py``) is decorated when triton
is imported, so without ``TRITON_INTERPRET=1`` at that moment it cannot be interpreted; with it, what the compiler
sees is interpreted functions. Both are mended here: :func:`language_mode` swaps every library function for its
counterpart made from the same Python function, and puts the originals back.

It also undoes what Triton's interpreter leaves behind: a call of a library function patches ``triton.language.core``
(``InterpretedFunction.__call__``) and never restores it, which a later compilation in the process would see.

Checked with triton 3.6 and 3.9.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

# Interpreted launches change process-wide state of the triton package, so there is one at a time.
_lock = threading.RLock()
_MISSING = object()


@functools.cache
def _scopes() -> tuple[list[types.ModuleType], list[type]]:
    """The modules of the language and the classes of its core: all that the interpreter patches."""
    import triton.language as tl

    modules = [
        module
        for name, module in sorted(sys.modules.items())
        if (name == "triton.language" or name.startswith("triton.language.")) and isinstance(module, types.ModuleType)
    ]
    classes = [
        value for value in vars(tl.core).values() if inspect.isclass(value) and value.__module__ == tl.core.__name__
    ]
    return modules, classes


@functools.cache
def imported_interpreted() -> bool:
    """Whether triton was imported with ``TRITON_INTERPRET=1``, so that its library is in interpreted form."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(vars(tl)["sum"], InterpretedFunction)


@functools.cache
def _swaps() -> list[tuple[Any, str, Any]]:
    """(namespace, name, counterpart) for every library function: the form it was *not* imported in."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    interpreted = imported_interpreted()
    old, made = (InterpretedFunction if interpreted else JITFunction), {}

    def counterpart(function: Any) -> Any:
        if function.fn not in made:
            made[function.fn] = (
                JITFunction(function.fn, **function.kwargs) if interpreted else InterpretedFunction(function.fn)
            )
        return made[function.fn]

    modules, _ = _scopes()
    swaps: list[tuple[Any, str, Any]] = []
    for module in modules:
        for name, value in vars(module).items():
            if isinstance(value, old):
                swaps.append((module, name, counterpart(value)))
    for name, value in vars(tl.tensor).items():
        # `x.sum()`: compiled, the class holds the JITFunction itself; interpreted, a function that forwards to it.
        if isinstance(value, JITFunction) and not interpreted:
            swaps.append((tl.tensor, name, _forward(counterpart(value))))
        elif interpreted and isinstance(value, types.FunctionType):
            for cell in value.__closure__ or ():
                if isinstance(cell.cell_contents, InterpretedFunction):
                    swaps.append((tl.tensor, name, counterpart(cell.cell_contents)))
    return swaps


def _forward(function: Any) -> Any:
    def member(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return member


@contextlib.contextmanager
def language_mode(interpret: bool) -> Iterator[None]:
    """Within the block, decorating and running Triton functions is interpreted (True) or compiled (False).

    One thread at a time; blocks may nest. Everything is as before afterwards, also after an exception. While an
    interpreted block runs, another thread that decorates or compiles Triton kernels outside of this function sees
    interpreted mode: Triton keeps it in process-wide state.
    """
    from triton import knobs

    with _lock:
        modules, classes = _scopes()
        saved = [(scope, dict(vars(scope))) for scope in (*modules, *classes)]
        # The dictionary, not the attribute: assigning the attribute would also set the environment variable, which
        # every process started meanwhile would inherit.
        knob = knobs.runtime.__dict__
        before = knob.get("interpret", _MISSING)
        swapped = interpret != imported_interpreted()
        try:
            knob["interpret"] = interpret
            if swapped:
                for scope, name, value in _swaps():
                    setattr(scope, name, value)
            yield
        finally:
            for scope, names in saved:
                _restore(scope, names)
            if before is _MISSING:
                knob.pop("interpret", None)
            else:
                knob["interpret"] = before


def _restore(scope: Any, names: dict[str, Any]) -> None:
    now = dict(vars(scope))
    for name, value in names.items():
        if now.get(name, _MISSING) is not value:
            setattr(scope, name, value)
    if isinstance(scope, type):
        # Modules keep additions: the interpreter puts the helpers of a rewritten function into its globals, once.
        for name in now.keys() - names.keys():
            delattr(scope, name)


# Set before this process imported us: the user's wish. Inductor sets the variable too, but later.
_user_cache_dir = os.environ.get("TRITON_CACHE_DIR")


@contextlib.contextmanager
def compile_mode() -> Iterator[None]:
    """:func:`language_mode` for compiling, with Triton's own binary cache below our cache folder.

    ``TRITON_CACHE_DIR`` or ``triton.knobs.cache.dir`` set by the user before Tilewright was imported stays in force.
    """
    from triton import knobs

    from .. import cache, settings

    with language_mode(interpret=False):
        knob = knobs.cache.__dict__
        ours = _user_cache_dir is None and "dir" not in knob
        if ours:
            knob["dir"] = str(cache.working_folder(settings.get().cache_dir, "triton"))
        try:
            yield
        finally:
            if ours:
                del knob["dir"]


def compile_below(module: types.ModuleType) -> None:
    """Let the module's kernels be compiled in :func:`compile_mode` when they are launched.

    Wraps ``JITFunction._do_compile``, which Triton calls only for argument types it has not compiled yet, so a launch
    in steady state passes nothing of ours.
    """
    from triton.runtime.jit import JITFunction

    for value in vars(module).values():
        if isinstance(value, JITFunction) and value.fn.__module__ == module.__name__:
            value._do_compile = _in_compile_mode(value._do_compile)


def _in_compile_mode(compile_function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(compile_function)
    def compiling(*args: Any, **kwargs: Any) -> Any:
        with compile_mode():
            return compile_function(*args, **kwargs)

    return compiling
