"""Render a spec to the text of one kernel file. No GPU, no compiler and no torch needed."""

from __future__ import annotations

import functools
from importlib import resources

import jinja2

from .spec import KernelSpec, SpecError

_TEMPLATE_TARGET = {"triton": "triton", "triton-interpret": "triton", "cpp": "cpp"}


@functools.cache
def _environment() -> jinja2.Environment:
    root = resources.files(__package__) / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (root / name).read_text(encoding="utf-8")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["pyrepr"] = repr
    return environment


def render(spec: KernelSpec, target: str = "triton") -> str:
    """The kernel file for ``spec`` as text: the same bytes for the same spec.

    target: ``"triton"`` (also what the interpreter runs) or ``"cpp"``.
    Raises :class:`~tilewright.codegen.spec.SpecError` when the spec has no template for the target.
    """
    family = _TEMPLATE_TARGET.get(target)
    if family is None:
        raise SpecError(f"there is no text for target {target!r}: choose triton or cpp")
    if family not in spec.templates:
        raise SpecError(f"{spec.kind} has no {family} template")
    template = _environment().get_template(spec.templates[family])
    return template.render(spec=spec, **spec.context(family))
