"""Tilewright rewrites PyTorch graphs and writes the kernels that run them.

    compiled = tilewright.compile(model, passes=[TwoPassSoftmax()], example_inputs=(x,))

The four stages live in the folders ``frontend``, ``passes``, ``runtime`` and ``codegen`` and are imported as
``tilewright.frontend`` and so on. Public names are resolved on first use, so that ``import tilewright`` is cheap.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# In a checkout the stage folders stand beside this package. Python started in the checkout's root finds this
# folder first, even when a wheel is installed, so the stages must be reachable from here too.
_root = Path(__file__).resolve().parent.parent
if all((_root / stage / "__init__.py").is_file() for stage in ("frontend", "passes", "runtime", "codegen")):
    __path__.append(str(_root))

_PUBLIC = {
    "compile": ".frontend.compile",
    "CompiledModule": ".frontend.compiled",
    "Report": ".frontend.report",
    "save": ".frontend.save",
    "load": ".frontend.save",
    "load_quantized": ".frontend.import_checkpoint",
    "tune": ".frontend.tune",
    "render": ".codegen.render",
    "errors": ".runtime.errors",
    "settings": ".runtime.settings",
    "mask": ".runtime.mask",
}
_STAGES = ("frontend", "passes", "runtime", "codegen")

__all__ = ["__version__", *sorted(_PUBLIC), *_STAGES]

if TYPE_CHECKING:
    from .codegen.render import render as render
    from .frontend.compile import compile as compile
    from .frontend.compiled import CompiledModule as CompiledModule
    from .frontend.import_checkpoint import load_quantized as load_quantized
    from .frontend.report import Report as Report
    from .frontend.save import load as load
    from .frontend.save import save as save
    from .frontend.tune import tune as tune


def __getattr__(name: str) -> Any:
    if name in _STAGES:
        return importlib.import_module(f".{name}", __name__)
    if name in _PUBLIC:
        module = importlib.import_module(_PUBLIC[name], __name__)
        value = module if name in ("errors", "mask", "settings") else getattr(module, name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'tilewright' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
