"""What a smaller KV cache costs in quality: SmolLM2 token by token through the real cache, and a retrieval probe.

    python -m tilewright.benchmarks.kv_quality --work DIR --seconds 500      # again and again, until it says "whole"

Each setting compiles the model with its passes, in float32, and is compared with the model as it is:

- decode: SEQUENCES x LENGTH tokens of ``pydoc_data.topics`` as one batch, PROMPT tokens in a first call and then
  ``--step`` tokens a call, so that each sees older ones as the cache holds them by then. With 8 a call, the last
  token's cache is seen by all 8, which is never less quantized than with 1, and the study is done sooner.
  Perplexity over all tokens, KL(model || setting) and top-1 agreement over every fourth position.
- needle: a line planted in LENGTH tokens of other text and asked for at the end, for PAIRS x DEPTHS. The text is read
  in one call, the question token by token; how many words the model then holds likelier than the right one, and
  whether greedy decoding gives it.
- bytes: a cache is allocated for two lengths. The difference is what a token costs, the rest does not grow. In
  bfloat16, as models are served: codes and scales are the same in float32, whole numbers are twice as large.

What needs calibration gets CALIBRATION x LENGTH tokens from further on in the text. A part of a setting is kept in DIR
when it is done, so that a run may stop anywhere. DIR does not know which version of the code made a part: empty it when
that has changed. The result is one JSON file; the table of docs/quantized_cache.md comes from it
(scripts/bench_tables.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..frontend.models import LoadedModel, load_model
from ..frontend.text import token_blocks
from . import machine

MODEL, LENGTH, SEQUENCES, PROMPT, STEP, EVERY = "smollm2", 1024, 8, 16, 8, 4
CALIBRATION = 8
DEPTHS = (0.1, 0.35, 0.6, 0.85)
PAIRS = (("Alice", " banana"), ("Peter", " castle"), ("Maria", " violet"), ("Simon", " copper"))
PLANTED, ASKED = "\n\nThe special keyword of {} is{}.\n\n", "\n\nThe special keyword of {} is"
PARTS = ("bytes", "needle", "decode")


@dataclass(frozen=True)
class Setting:
    """passes: their text, as on the command line; none is the model as it is, without a cache."""

    name: str
    passes: str = ""

    @property
    def file(self) -> str:
        return "".join(c if c.isalnum() or c == "." else "-" for c in self.name)

    @property
    def calibrated(self) -> bool:
        return "factor-keys" in self.passes


def _cached(name: str, passes: str = "") -> Setting:
    return Setting(name, f"kv-cache{{max_length={LENGTH}}}" + (f",{passes}" if passes else ""))


SETTINGS = (
    Setting("no cache"),
    _cached("whole"),
    _cached("8 bits", "quantize-kv{bits=8}"),
    _cached("4 bits", "quantize-kv{bits=4}"),
    _cached("2 bits", "quantize-kv{bits=2}"),
    _cached("GEAR, 2 bits", "gear{bits=2}"),
    _cached("keys of rank 96", "factor-keys{rank=96}"),
    _cached("keys of rank 48", "factor-keys{rank=48}"),
    _cached("rank 96, 8 bits", "factor-keys{rank=96},quantize-kv{bits=8}"),
    _cached("rank 96, 4 bits", "factor-keys{rank=96},quantize-kv{bits=4}"),
    _cached("rank 48, 4 bits", "factor-keys{rank=48},quantize-kv{bits=4}"),
    _cached("keys 4 bits, values 2 bits", "quantize-kv{bits_k=4,bits_v=2}"),
    _cached("GEAR, 4 bits, rank 2, 1 % outliers", "gear{bits=4,rank=2,outliers=0.01}"),
    _cached("GEAR, 2 bits, no rank, 5 % outliers", "gear{bits=2,rank=0,outliers=0.05}"),
    Setting("window 256, 4 sinks", "streaming-cache{window=256,sinks=4}"),
    Setting("window 512, 4 sinks", "streaming-cache{window=512,sinks=4}"),
)
Feed = Callable[[Tensor], Tensor]
"""Tokens (B, L) in, their logits (B, L, vocabulary) out; goes on where the last call ended."""


@dataclass
class Study:
    """One model, and a folder that keeps what is done. length: tokens of a sequence."""

    work: Path
    loaded: LoadedModel
    length: int = LENGTH
    sequences: int = SEQUENCES
    step: int = STEP

    def compiled(self, setting: Setting) -> Any:
        from ..frontend.compile import compile

        given: dict[str, Any] = {}
        if setting.calibrated:
            blocks = token_blocks(self.loaded.tokenizer, CALIBRATION, self.length, start=self.sequences + 1)
            given["calibration"] = [((), {"input_ids": block}) for block in blocks]
        return compile(self.loaded.model, setting.passes, rest="eager", validate=False, strict=True, **given)

    def feed_of(self, compiled: Any) -> Feed:
        """A new batch of sequences."""
        cache = compiled.new_cache()
        return lambda ids: compiled(input_ids=ids, past_key_values=cache, use_cache=True).logits

    @functools.cached_property
    def text(self) -> Tensor:
        return torch.cat(token_blocks(self.loaded.tokenizer, self.sequences, self.length))

    def measure(self, setting: Setting, compiled: Any, part: str) -> dict[str, Any]:
        begin = time.perf_counter()
        with torch.no_grad():
            if part == "bytes":
                result: dict[str, Any] = sizes(compiled)
            elif part == "needle":
                result = self.needle(compiled)
            else:
                result = self.decode(compiled) if setting.passes else self.plain()
        return result | {"seconds": time.perf_counter() - begin}

    # Text.

    def plain(self) -> dict[str, Any]:
        """The model as it is, each sequence at once; keeps its log-probabilities for the others to be compared with."""
        model: Any = self.loaded.model
        loss, kept = 0.0, []
        for row in self.text:
            logs = F.log_softmax(model(input_ids=row[None], use_cache=False).logits[0].float(), -1)
            loss -= logs[:-1].gather(-1, row[1:, None]).double().sum().item()
            kept.append(logs[::EVERY].clone())
        torch.save(torch.stack(kept, dim=1), self.truth)
        return {"loss": loss, "tokens": len(self.text) * (self.length - 1), "compared": 0}

    def decode(self, compiled: Any) -> dict[str, Any]:
        ids, feed, truths = self.text, self.feed_of(compiled), torch.load(self.truth, mmap=True)
        loss, kl, same, compared, at = 0.0, 0.0, 0, 0, 0
        steps = range(PROMPT, self.length, self.step)
        for count in (PROMPT, *(min(self.step, self.length - start) for start in steps)):
            for logits in feed(ids[:, at : at + count]).unbind(1):
                logs = F.log_softmax(logits.float(), -1)
                if at + 1 < self.length:
                    loss -= logs.gather(-1, ids[:, at + 1, None]).double().sum().item()
                if at % EVERY == 0:
                    truth = truths[at // EVERY]
                    kl += F.kl_div(logs, truth, reduction="sum", log_target=True).item()
                    same += int((logs.argmax(-1) == truth.argmax(-1)).sum())
                    compared += len(truth)
                at += 1
        tokens = len(ids) * (self.length - 1)
        return {"loss": loss, "tokens": tokens, "kl": kl, "same": same, "compared": compared}

    @property
    def truth(self) -> Path:
        """The model's own log-probabilities (LENGTH / EVERY, B, vocabulary)."""
        return self.work / "truth.pt"

    # Retrieval.

    def prompts(self) -> list[tuple[float, Tensor, Tensor, Tensor]]:
        """For each depth: text (B, N) with a line planted, the question (B, M), the answer (B, A), a row a pair."""
        tokenizer: Any = self.loaded.tokenizer

        def tokens(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        hay = token_blocks(tokenizer, 1, self.length, start=self.sequences)[0][0].tolist()
        found = []
        for depth in DEPTHS:
            rows = []
            for who, word in PAIRS:
                planted, asked = tokens(PLANTED.format(who, word)), tokens(ASKED.format(who))
                room = self.length - len(planted) - len(asked)
                cut = round(depth * room)
                rows.append((hay[:cut] + planted + hay[cut:room], asked, tokens(word)))
            # Rows of one length: the pairs are chosen so that the model's tokenizer makes them so.
            text, question, answer = (torch.tensor(list(each)) for each in zip(*rows, strict=True))
            found.append((depth, text, question, answer))
        return found

    def needle(self, compiled: Any) -> dict[str, Any]:
        rows = []
        for depth, text, asked, answer in self.prompts():
            feed = self.feed_of(compiled)
            feed(text)
            for index in range(asked.shape[1]):
                logs = F.log_softmax(feed(asked[:, index : index + 1])[:, -1].float(), -1)
            right = logs.gather(-1, answer[:, :1])
            ranks = (logs > right).sum(-1) + 1
            exact = torch.ones(len(answer), dtype=torch.bool)
            for index in range(answer.shape[1]):
                exact &= logs.argmax(-1) == answer[:, index]
                if index + 1 < answer.shape[1]:
                    logs = feed(answer[:, index : index + 1])[:, -1]
            for pair, rank, log, hit in zip(PAIRS, ranks.tolist(), right[:, 0].tolist(), exact.tolist(), strict=True):
                rows.append({"depth": depth, "who": pair[0], "rank": rank, "log": log, "exact": hit})
        return {"needles": rows}

    # Doing it.

    def path(self, setting: Setting, part: str) -> Path:
        step = f".step{self.step}" if part == "decode" else ""
        return self.work / f"{setting.file}.{part}{step}.json"

    def run(self, settings: tuple[Setting, ...], parts: tuple[str, ...], seconds: float) -> bool:
        """Do parts until ``seconds`` are over; whether all are done. A part that would not fit is not begun."""
        begin, longest = time.perf_counter(), 0.0
        for setting in settings:
            compiled = None
            # Without a cache there are no bytes, and asking token by token would read the text again and again.
            wanted = parts if setting.passes else [p for p in parts if p == "decode"]
            for part in [p for p in wanted if not self.path(setting, p).exists()]:
                if time.perf_counter() - begin + longest > seconds:
                    return False
                started = time.perf_counter()
                if setting.passes and compiled is None:
                    compiled = self.compiled(setting)
                result = self.measure(setting, compiled, part)
                self.path(setting, part).write_text(json.dumps(result), encoding="utf-8")
                longest = max(longest, time.perf_counter() - started)
                print(f"{setting.name}: {part}, {result['seconds']:.1f} s", file=sys.stderr, flush=True)
        return True

    def collect(self, settings: tuple[Setting, ...]) -> dict[str, Any]:
        """What is done, as the JSON of the study. Settings with nothing done are left out."""
        rows = []
        for setting in settings:
            done = {part: self.path(setting, part) for part in PARTS if self.path(setting, part).exists()}
            if done:
                rows.append(summary(setting, {p: json.loads(f.read_text(encoding="utf-8")) for p, f in done.items()}))
        return {
            "model": MODEL,
            "length": self.length,
            "sequences": self.sequences,
            "prompt": PROMPT,
            "step": self.step,
            "device": machine.cpu_model(),
            "threads": os.environ.get("OMP_NUM_THREADS", ""),
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "versions": machine.versions(),
            "commit": machine.commit(),
            "rows": rows,
        }


def sizes(compiled: Any) -> dict[str, float]:
    """Bytes of one sequence's cache in bfloat16, as allocated: a token's of keys and values, and what does not grow."""
    from ..runtime.kv_cache import KVState

    sites = compiled.new_cache().owner.sites
    sites = tuple(dataclasses.replace(site, dtype=torch.bfloat16) for site in sites)
    short, long = 2048, 6144
    found: dict[tuple[int, str], float] = {}
    for length in (short, long):
        state = KVState(sites, length, 1)
        names = [name for site in sites for name in site.names()]
        for name, tensor in zip(names, state.flat, strict=True):
            side = (length, "v" if name.startswith("v") else "k")
            found[side] = found.get(side, 0) + tensor.nbytes
    grown = {side: (found[long, side] - found[short, side]) / (long - short) for side in "kv"}
    constant = {side: found[short, side] - short * grown[side] for side in "kv"}
    return {
        "key_bytes": grown["k"],
        "value_bytes": grown["v"],
        "key_constant": constant["k"],
        "value_constant": constant["v"],
    }


def summary(setting: Setting, read: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One setting's row."""
    row: dict[str, Any] = {"setting": setting.name, "passes": setting.passes}
    if (text := read.get("decode")) is not None:
        row["perplexity"] = math.exp(text["loss"] / text["tokens"])
        if text["compared"]:
            row["kl"], row["top1"] = text["kl"] / text["compared"], text["same"] / text["compared"]
        row["seconds"] = text["seconds"]
    if (found := read.get("needle")) is not None:
        needles = found["needles"]
        row["needles"] = len(needles)
        row["exact"] = sum(one["exact"] for one in needles)
        row["log"] = sum(one["log"] for one in needles) / len(needles)
        row["ranks"] = {str(d): [one["rank"] for one in needles if one["depth"] == d] for d in DEPTHS}
    for name in ("key_bytes", "value_bytes", "key_constant", "value_constant"):
        if name in read.get("bytes", {}):
            row[name] = read["bytes"][name]
    return row


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="the folder that keeps what is done")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no part after so many")
    parser.add_argument(
        "--filter", default="", help="only settings of these names, or else whose name contains one: A|B"
    )
    parser.add_argument("--step", type=int, default=STEP, help="tokens a call, 1 to 8")
    parser.add_argument("--parts", default="", help="only parts whose name begins so: bytes, needle, decode")
    parser.add_argument("--output", type=Path, default=None, help="the JSON to write")
    given = parser.parse_args(arguments)
    given.work.mkdir(parents=True, exist_ok=True)
    study = Study(given.work, load_model(MODEL), step=given.step)
    wanted = given.filter.lower().split("|")
    exactly = tuple(s for s in SETTINGS if s.name.lower() in wanted)
    settings = exactly or tuple(s for s in SETTINGS if any(text in s.name.lower() for text in wanted))
    parts = tuple(part for part in PARTS if part.startswith(given.parts))
    whole = study.run(settings, parts, given.seconds)
    if given.output is not None:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(study.collect(SETTINGS), indent=1) + "\n", encoding="utf-8")
    print("whole" if whole else "more is left: run it again")
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
