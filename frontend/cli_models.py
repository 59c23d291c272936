"""The commands that compile a model: ``explain`` and ``dump``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_output import AsJson, out, print_json, progress

if TYPE_CHECKING:
    from .compiled import CompiledModule


class TargetName(StrEnum):
    AUTO = "auto"
    TRITON = "triton"
    INTERPRET = "triton-interpret"
    CPP = "cpp"
    REFERENCE = "reference"


class RestName(StrEnum):
    AUTO = "auto"
    EAGER = "eager"
    INDUCTOR = "inductor"


class DtypeName(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face id, a folder with a config.json, file.py:factory, or a bundled name: minilm, smollm2.",
    ),
]
Passes = Annotated[
    str, typer.Option("--passes", "-p", help='For example "two-pass-softmax,sigmoid-attention{bias=calibrated}".')
]
Target = Annotated[TargetName, typer.Option(help="What runs the canonical ops.")]
Rest = Annotated[RestName, typer.Option(help="What runs the rest of the graph.")]
Strict = Annotated[bool, typer.Option("--strict", help="Fail when a pass changed nothing.")]
Attention = Annotated[
    str | None, typer.Option(metavar="NAME", help="attn_implementation of transformers, such as eager or sdpa.")
]
Dtype = Annotated[DtypeName, typer.Option(help="Of the weights; a factory's model keeps its own.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens of a language model's example inputs.")]
Calibration = Annotated[int, typer.Option(min=1, help="Batches to calibrate on, for passes that need it.")]


def compile_named(
    model: str,
    passes: str,
    target: TargetName,
    rest: RestName,
    strict: bool,
    attention: str | None,
    dtype: DtypeName,
    length: int,
    calibration: int,
) -> CompiledModule:
    """Load the model, make inputs and compile; the spinner tells the stage."""
    with progress("importing torch") as stage:
        import torch

        from ..passes.base import Needs
        from ..passes.parse import parse_passes
        from .compile import compile
        from .models import calibration_batches, load_model

        chosen = parse_passes(passes)  # a typing mistake is told before a model is loaded
        stage(f"loading {model}")
        loaded = load_model(model, attn_implementation=attention, dtype=getattr(torch, dtype.value), length=length)
        batches: list[Any] | None = None
        if any(one.current_needs() is Needs.CALIBRATION for one in chosen):
            batches = calibration_batches(loaded, calibration)
        stage(f"compiling {model}" + (f", calibrating on {len(batches)} batches" if batches else ""))
        # A command's inputs need no gradients, but the model keeps what it has.
        return compile(
            loaded.model,
            chosen,
            loaded.args,
            loaded.kwargs,
            target=target.value,
            rest=rest.value,
            strict=strict,
            calibration=batches,
        )


def explain(
    model: Model,
    passes: Passes = "",
    target: Target = TargetName.AUTO,
    rest: Rest = RestName.EAGER,
    strict: Strict = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as a page, too.")] = None,
    attention: Attention = None,
    dtype: Dtype = DtypeName.FLOAT32,
    length: Length = 64,
    calibration: Calibration = 4,
    as_json: AsJson = False,
) -> None:
    """Compile MODEL with the passes and print what they did, site by site, and why they left others alone."""
    compiled = compile_named(model, passes, target, rest, strict, attention, dtype, length, calibration)
    report = compiled.report
    if html is not None:
        from ..runtime.errors import SaveError
        from .page import page_of

        try:
            html.write_text(page_of(compiled), encoding="utf-8")
        except OSError as error:
            raise SaveError(f"cannot write {html}: {error.strerror or error}") from error
    if as_json:
        print_json(report.to_dict())
        return
    out().print(report)
    if html is not None:
        out().print(f"page: {html}")


def dump(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The folder to write.")],
    passes: Passes = "",
    target: Target = TargetName.AUTO,
    rest: Rest = RestName.EAGER,
    strict: Strict = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a folder that holds other files.")] = False,
    backward: Annotated[bool, typer.Option("--backward", help="Dump the backward kernels, too.")] = False,
    attention: Attention = None,
    dtype: Dtype = DtypeName.FLOAT32,
    length: Length = 64,
    calibration: Calibration = 4,
    as_json: AsJson = False,
) -> None:
    """Compile MODEL and write graphs, report and kernels that run on their own to DIR."""
    from .dump import check_folder
    from .dump import dump as write

    check_folder(output, overwrite)
    compiled = compile_named(model, passes, target, rest, strict, attention, dtype, length, calibration)
    with progress(f"writing {output}"):
        write(compiled, output, overwrite=overwrite, backward=backward)
    files = sorted(str(path.relative_to(output)) for path in output.rglob("*") if path.is_file())
    if as_json:
        print_json({"folder": str(output), "files": files, "report": compiled.report.to_dict()})
        return
    checks = [name for name in files if name.endswith("check.py")]
    out().print(f"{len(files)} files in {output}; open {output / 'report.html'}")
    for name in checks:
        out().print(f"  python {output / name}", soft_wrap=True)
