"""From a loaded model to its first output in a new process: ``python -m tilewright.benchmarks.first_call``.

Prints one line of JSON with the seconds, and writes the output to a safetensors file. Loading the model is not counted;
importing what compiles it is. Whether caches are cold is up to the environment that the caller sets.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from .harness import Timed, first_line

WAYS = ("compile", "ours")
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TILEWRIGHT_CACHE_DIR")
SECONDS = 240


def measure(model: str, dtype: str, batch: int, length: int, way: str, threads: int, caches: Path) -> Timed:
    """Run this module in a process of its own, with all compilers' caches in the folder ``caches``.

    Raises RuntimeError with the last line of what the process said when it fails.
    """
    from safetensors.torch import load_file

    environment = os.environ | {name: str(caches / name.lower()) for name in CACHES} | {"HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.safetensors"
        sizes = (str(number) for number in (batch, length, threads))
        command = [sys.executable, "-m", __spec__.name, model, dtype, way, *sizes, str(out)]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"no output after {SECONDS} s") from error
        if done.returncode != 0:
            raise RuntimeError((done.stderr.strip().splitlines() or ["no word"])[-1])
        return Timed(json.loads(done.stdout.splitlines()[-1])["seconds"], load_file(out)["out"])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "dtype"):
        parser.add_argument(name)
    parser.add_argument("way", choices=WAYS)
    for name in ("batch", "length", "threads"):
        parser.add_argument(name, type=int)
    parser.add_argument("out", type=Path)
    given = parser.parse_args(arguments)
    from safetensors.torch import save_file

    from .suites import _models

    torch.set_num_threads(given.threads)
    model = _models.loaded(given.model, getattr(torch, given.dtype)).model
    kwargs = _models.model_inputs(given.model, given.batch, given.length)
    begin = time.perf_counter()
    with torch.no_grad():
        out = getattr(_models, {"compile": "compiled", "ours": "ours"}[given.way])(model, kwargs)()
    seconds = time.perf_counter() - begin
    save_file({"out": out.contiguous()}, given.out)
    print(json.dumps({"seconds": seconds}))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except RuntimeError as failure:
        sys.exit(first_line(failure))
