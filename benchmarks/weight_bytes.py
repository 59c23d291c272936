"""Memory that SmolLM2's weights take: resident and at the peak of loading, each way in a process of its own.

    python -m tilewright.benchmarks.weight_bytes --output benchmarks/results/quality/weight_bytes.json

Files are made first (``make``): float checkpoints by transformers, decoders with packed weights by ``tilewright.save``,
each in its own process too, which shows what quantizing costs at its peak. Then each is loaded in a fresh process
(``load``) that imports everything first, notes what it has, loads, decodes one token, and notes again. Graphs run
eagerly between our kernels, so that no compiler's memory is in the figures.

Resident: Rss and Pss of /proc/self/smaps_rollup, and Anonymous, which leaves out mapped files. Peak: VmHWM, which is
reset after the imports where the system allows it, and ru_maxrss, which cannot be reset. Bytes are compared with what
the report says (``weights``).
"""

from __future__ import annotations

import argparse
import datetime
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..frontend.compile import compile
from ..frontend.constants import give_memory_back
from ..frontend.import_checkpoint import load_quantized
from ..frontend.models import BUNDLED, bundled_folder
from ..frontend.save import load, save
from ..passes import KVCache, Pass, Quantize
from . import machine

MODEL = "smollm2"
ROOM = 1024
"""Tokens of the KV cache; its memory is taken by the first call and counts as the call's."""
BITS: dict[str, list[Pass]] = {
    "float32": [],
    "W8": [Quantize(bits=8, group_size=0, embeddings=True, head=True)],
    "W4 g64": [Quantize(bits=4, group_size=64, embeddings=True, head=True)],
}
CHECKPOINTS = {"float32 checkpoint": torch.float32, "bfloat16 checkpoint": torch.bfloat16}
FILES = {"float32 file": "float32", "W8 file": "W8", "W4 g64 file": "W4 g64", "GGUF file": "GGUF"}
IMPORT = "GGUF import"


def memory() -> dict[str, int]:
    """Bytes of this process now (``rss``, ``pss``, ``anonymous``) and at its peak (``peak``, ``maxrss``)."""
    found: dict[str, int] = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, count = line.split(":")[0], line.split()[1]
        if name in ("Rss", "Pss", "Anonymous"):
            found[name.lower()] = int(count) * 1024
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    found["peak"] = int(status["VmHWM"].split()[0]) * 1024
    found["maxrss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found


def reset_peak() -> bool:
    """Begin VmHWM anew; False where the system does not let us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _compiled(model: torch.nn.Module, passes: list[Pass]) -> Any:
    return compile(model, [*passes, KVCache(max_length=ROOM)], rest="eager", validate=False)


def _float(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """From the float32 checkpoint, once that is made; from the bundled GGUF before."""
    from transformers import AutoModelForCausalLM

    made = folder / next(iter(CHECKPOINTS))
    if made.is_dir():
        return AutoModelForCausalLM.from_pretrained(str(made), dtype=dtype).eval()
    packed = AutoModelForCausalLM.from_pretrained(str(bundled_folder(MODEL)), gguf_file=BUNDLED[MODEL].gguf)
    config = packed.config
    if hasattr(config, "quantization_config"):  # transformers refuses to save what it read from a GGUF file
        del config.quantization_config
    model: Any = type(packed)(config)
    model = model.to(dtype)
    model.load_state_dict(packed.state_dict())
    return model.eval()


def make(way: str, folder: Path) -> dict[str, Any]:
    """Write the file of one way. The whole work happens here, so the peak is that of quantizing (and of saving)."""
    if way in CHECKPOINTS:
        _float(folder, CHECKPOINTS[way]).save_pretrained(folder / way)
        return {}
    kind = FILES[way]
    if kind == "GGUF":
        compiled = _compiled(load_quantized(MODEL).model, [])
    else:
        compiled = _compiled(_float(folder), BITS[kind])
    compiled.release()
    save(compiled, folder / way)
    return {"report": compiled.report.weights}


def bring(way: str, folder: Path) -> tuple[Callable[..., Any], Any]:
    """What is measured: the module to call, and its report's bytes."""
    if way == IMPORT:
        compiled = _compiled(load_quantized(MODEL).model, []).release()
        return compiled, compiled.report.weights
    if way in CHECKPOINTS:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder / way, dtype=CHECKPOINTS[way]).eval()
        tensors = {t.data_ptr(): t.nbytes for t in model.state_dict().values()}
        return model, {"after": sum(tensors.values())}
    loaded = load(folder / way)
    return loaded, loaded.report.weights


def run(way: str, folder: Path, stage: str) -> dict[str, Any]:
    """One stage of one way, in this process."""
    import transformers

    _ = transformers.LlamaForCausalLM, transformers.AutoTokenizer  # imported before anything is measured
    torch.set_num_threads(1)
    give_memory_back()
    row: dict[str, Any] = {"way": way, "stage": stage, "peak_reset": reset_peak(), "before": memory()}
    start = time.perf_counter()
    if stage == "make":
        row |= make(way, folder)
        row["seconds"] = time.perf_counter() - start
        return row | {"after": memory()}
    module, row["report"] = bring(way, folder)
    row["seconds"] = time.perf_counter() - start
    row["loaded"] = memory()
    give_memory_back()
    row["rested"] = memory()
    with torch.no_grad():
        out = module(input_ids=torch.arange(1, 9)[None])
        module(input_ids=torch.tensor([[9]]), past_key_values=out.past_key_values)
        del out
    give_memory_back()
    row["called"] = memory()
    if stage == "load" and (folder / way).is_file():
        row["file_bytes"] = (folder / way).stat().st_size
    return row


def table(study: dict[str, Any]) -> str:
    """Markdown: what loading adds to a process that has imported everything, in MB."""
    head = [
        "way",
        "report's weights",
        "resident",
        "Pss",
        "anonymous",
        "resident after a call",
        "peak: loading",
        "and a call",
    ]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for row in study["rows"]:
        if row["stage"] != "load":
            continue
        base = row["before"]
        figures = [row["report"]["after"], *(row["rested"][n] - base[n] for n in ("rss", "pss", "anonymous"))]
        figures += [row["called"]["rss"] - base["rss"]]
        figures += [row[when]["peak"] - base["rss"] for when in ("loaded", "called")]
        lines.append(f"| {row['way']} | " + " | ".join(f"{one / 1e6:,.0f}" for one in figures) + " |")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tilewright.benchmarks.weight_bytes", description=__doc__)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--ways", nargs="+", default=[*CHECKPOINTS, *FILES, IMPORT], help="a part of them")
    parser.add_argument("--one", nargs=3, metavar=("STAGE", "WAY", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        stage, way, folder = options.one
        print(json.dumps(run(way, Path(folder), stage)))
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for way in options.ways:
            for stage in ("make", "load") if way != IMPORT else ("load",):
                command = [sys.executable, "-m", "tilewright.benchmarks.weight_bytes", "--one", stage, way, folder]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    print(done.stderr, file=sys.stderr)
                    return 1
                rows.append(json.loads(done.stdout.splitlines()[-1]))
                print(stage, way, f"{rows[-1]['seconds']:.1f} s", flush=True)
    write(rows, options.output)
    return 0


def write(rows: list[dict[str, Any]], output: Path | None) -> None:
    """Print the table, and write the JSON where an output is named."""
    study = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "versions": machine.versions(),
        "commit": machine.commit(),
        "rows": rows,
    }
    print(table(study))
    if output:
        output.write_text(json.dumps(study, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
