"""The command line: ``tilewright doctor | passes | explain | dump | bench | render | cache | demo``.

torch and the stages are imported inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from . import cli_bench, cli_models
from .cli_output import EXIT_FOUND_BAD, AsJson, Commands, err, out, print_json, progress, size_text

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Rewrite PyTorch models with passes that say what they changed, and see the kernels that run them.",
)
cache_app = typer.Typer(no_args_is_help=True, help="The kernel cache: what is in it, is it sound, empty it.")
app.add_typer(cache_app, name="cache")
app.command()(cli_models.explain)
app.command()(cli_models.dump)
app.command()(cli_bench.bench)

_STATES = {"ok": "green", "limited": "yellow", "broken": "red"}


def _version(show: bool) -> None:
    if show:
        from tilewright import __version__

        print(f"tilewright {__version__}")
        raise typer.Exit


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    # One spinner is enough: libraries' own bars would be drawn across it.
    os.environ.setdefault("TQDM_DISABLE", "1")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Examine this machine: what works, and the remedy for what does not. Exit status 1 when something is broken."""
    with progress("examining") as stage:
        from ..runtime.doctor import examine

        diagnosis = examine(lambda fact: stage(f"examined {fact.name}"))
    if as_json:
        print_json(diagnosis.to_dict())
    else:
        table = _table("", "what", "found")
        for fact in diagnosis.facts:
            found = Text(fact.found)
            if fact.remedy:
                found.append(f"\n{fact.remedy}", style=_STATES[fact.state.value])
            table.add_row(Text(fact.state.value, style=_STATES[fact.state.value]), fact.name, found)
        out().print(table)
    if not diagnosis.ok:
        raise typer.Exit(EXIT_FOUND_BAD)


@app.command()
def passes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One pass, with its whole description.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the passes: what they need, how exact they are, their options."""
    with progress("importing torch"):
        from ..passes import PASSES
        from ..passes.parse import find_pass
    chosen = [find_pass(name, PASSES)] if name else list(PASSES.values())
    rows = [_describe(cls) for cls in chosen]
    if as_json:
        print_json(rows)
        return
    table = _table("pass", "exactness", "needs", "options")
    for row in rows:
        options = "\n".join(f"{o['name']}={o['default']}  [dim]{escape(o['type'])}[/dim]" for o in row["options"])
        table.add_row(Text(row["name"], style="bold"), row["exactness"], row["needs"], options)
        if not name:
            table.add_row("", "", "", Text(row["summary"], style="dim"), end_section=True)
    out().print(table)
    if name:
        out().print(Text("\n" + rows[0]["description"]))


def _describe(cls: Any) -> dict[str, Any]:
    import inspect

    from ..passes.parse import describe_type, option_types
    from .report import json_safe

    types = option_types(cls)
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}
    text = inspect.getdoc(cls) or ""
    return {
        "name": cls.cli_name(),
        "exactness": cls.exactness.value,
        "needs": cls.describe_needs(),
        "ops": list(cls.ops),
        "options": [
            {
                "name": option,
                "type": describe_type(kind),
                "default": None if defaults[option] is dataclasses.MISSING else json_safe(defaults[option]),
            }
            for option, kind in types.items()
        ],
        "summary": text.partition("\n")[0],
        "description": text,
    }


@app.command()
def render(
    kind: Annotated[
        str | None, typer.Argument(metavar="[KIND]", help="The kernel's kind; without one, list them.")
    ] = None,
    values: Annotated[list[str] | None, typer.Argument(metavar="[FIELD=VALUE]...", help="Fields of the spec.")] = None,
    spec: Annotated[
        str | None, typer.Option(metavar="JSON|FILE", help="The whole spec as JSON, or a spec.json.")
    ] = None,
    target: Annotated[str, typer.Option(help="triton or cpp.")] = "triton",
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write to a file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Render a kernel spec to the text of its file. Needs no GPU."""
    from . import cli_render

    if kind is None and spec is None:
        rows = cli_render.kinds()
        if as_json:
            print_json(rows)
            return
        table = _table("kind", "targets", "fields")
        for row in rows:
            fields = ", ".join(f["name"] + ("" if f["default"] is None else f"={f['default']}") for f in row["fields"])
            table.add_row(Text(row["kind"], style="bold"), ", ".join(row["targets"]), Text(fields))
        out().print(table)
        return
    made = cli_render.make_spec(kind, values or [], spec)
    text = cli_render.text_of(made, target)
    if output is not None:
        cli_render.write(output, text)
    if as_json:
        print_json({"spec": json.loads(made.to_json()), "target": target, "text": text})
    elif output is None:
        print(text, end="" if text.endswith("\n") else "\n")


@cache_app.command("status")
def cache_status(as_json: AsJson = False) -> None:
    """Where the cache is and what it holds."""
    from ..runtime import cache

    status = cache.status()
    if as_json:
        print_json(dataclasses.asdict(status))
        return
    table = _table("kernel cache", "")
    table.add_row("folder", Text(status.path))
    table.add_row("state", "writable" if status.writable else Text("not writable", style="red"))
    table.add_row("kernels", f"{status.entries} ({size_text(status.bytes)})")
    for label, counts in (("by target", status.by_target), ("by kind", status.by_kind)):
        if counts:
            table.add_row(label, ", ".join(f"{name} {count}" for name, count in counts.items()))
    table.add_row("other files", size_text(status.other_bytes))
    if status.unfinished or status.unreadable:
        table.add_row(
            "damaged", f"{status.unfinished} unfinished, {status.unreadable} unreadable: tilewright cache verify"
        )
    out().print(table)


@cache_app.command("verify")
def cache_verify(as_json: AsJson = False) -> None:
    """Read every byte and say which kernels are damaged. Exit status 1 when one is; they are rebuilt when needed."""
    from ..runtime import cache

    with progress("reading the cache"):
        entries = cache.verify()
    damaged = [entry for entry in entries if not entry.ok]
    if as_json:
        print_json({"entries": [dataclasses.asdict(e) | {"ok": e.ok} for e in entries], "damaged": len(damaged)})
    else:
        table = _table("", "kernel", "target", "size", "problem")
        for entry in entries:
            state = Text("ok", style="green") if entry.ok else Text("damaged", style="red")
            kernel = f"{entry.kind}-{entry.name[:8]}" if entry.kind else entry.name[:16]
            table.add_row(state, kernel, entry.target, size_text(entry.bytes), entry.problem or "")
        out().print(table if entries else "The cache holds no kernels.")
    if damaged:
        if not as_json:
            err().print("Damaged kernels are never loaded: they are rebuilt when needed.")
        raise typer.Exit(EXIT_FOUND_BAD)


@cache_app.command("clear")
def cache_clear(
    damaged: Annotated[bool, typer.Option("--damaged", help="Only what verify calls damaged.")] = False,
    as_json: AsJson = False,
) -> None:
    """Empty the cache. Running processes keep the kernels that they have loaded."""
    from ..runtime import cache

    cleared = cache.clear(only_damaged=damaged)
    if as_json:
        print_json(dataclasses.asdict(cleared))
        return
    out().print(f"removed {cleared.entries} kernels, {size_text(cleared.bytes)}, from {cleared.path}", soft_wrap=True)
    for kept in cleared.kept:
        err().print(Text(f"kept {kept}", style="yellow"), soft_wrap=True)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def demo(ctx: typer.Context) -> None:
    """Two pretrained models before and after each pass, on any machine. See tilewright demo --help."""
    from .demo import main as run_demo

    raise typer.Exit(run_demo(ctx.args))


def _table(*columns: str) -> Table:
    from rich import box

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for number, name in enumerate(columns):
        table.add_column(name, no_wrap=number == 0, overflow="fold")
    return table
