"""What low-bit weights cost in quality: SmolLM2's text and MiniLM's sentences, by setting and rounding method.

    python -m tilewright.benchmarks.quant_quality --work DIR --seconds 500      # again and again, until it says "whole"

Each part is one setting with one method and is compared with the model as it is, in float32:

- text: SEQUENCES x LENGTH tokens of ``pydoc_data.topics``, each sequence in one plain call. Perplexity and top-1
  agreement over all positions, KL(model || setting) over every EVERY-th.
- sentences: COUNT sentences of the same text through MiniLM: the cosine of each embedding with the model's own, and how
  many of each sentence's NEAREST nearest ones stay among them.

Calibrating methods get ``--samples`` blocks of ``--tokens`` tokens from further on in the text, and stop after
``--budget`` seconds (``200``, or ``200,awq=60,cbq=400``), which the result records. The peers torchao
(to nearest) and llm-compressor (GPTQ) round the same layers to the same bits and groups where they are installed and
have such a format; else the reason is recorded.

A part is kept in DIR when it is done, so that a run may stop anywhere. DIR does not know which version of the code made
a part: empty it when that has changed. SmolLM2's weights were 4-bit numbers already, asymmetric in groups of 32, which
no setting here repeats. The result is one JSON file; docs/quantize_quality.md has its tables (scripts/bench_tables.py).
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..frontend.demo_sentences import calibration_batches
from ..frontend.models import LoadedModel, load_model
from ..frontend.text import token_blocks
from . import machine
from .quant_peers import PEERS, Unavailable

LENGTH, SEQUENCES, EVERY = 1024, 8, 4
SAMPLES, TOKENS, BUDGET = 16, 512, 180.0
COUNT, NEAREST = 128, 10
METHODS = ("rtn", "rtn{clip=true}", "awq", "flexround", "cbq", "ostquant", "qvlm")
PLAIN = "as it is"


@dataclass(frozen=True)
class Setting:
    """How weights and activations are kept. group: 0 is one scale a row."""

    name: str
    bits: int
    group: int
    activations: int | None = None

    @property
    def options(self) -> str:
        more = f",activations={self.activations}" if self.activations else ""
        return f"bits={self.bits},group_size={self.group}{more}"


SETTINGS = {
    "smollm2": (
        Setting("4 bits, groups of 128", 4, 128),
        Setting("4 bits, groups of 64", 4, 64),
        Setting("3 bits, groups of 64", 3, 64),
        Setting("2 bits, groups of 64", 2, 64),
        Setting("W4A8, groups of 64", 4, 64, 8),
        Setting("W8A8", 8, 0, 8),
    ),
    "minilm": (Setting("W8A8", 8, 0, 8), Setting("4 bits, groups of 64", 4, 64)),
}


@dataclass(frozen=True)
class Part:
    """One thing to measure. setting: None for the model as it is. method: of ours, or a peer's name."""

    model: str
    setting: Setting | None
    method: str

    @property
    def name(self) -> str:
        return f"{self.model}: {self.setting.name if self.setting else PLAIN}, {self.method}"

    @property
    def file(self) -> str:
        return "".join(c if c.isalnum() or c in ".=" else "-" for c in self.name) + ".json"


def parts(methods: tuple[str, ...] = (*METHODS, *PEERS)) -> list[Part]:
    """All of them; the models as they are first, which the others are compared with."""
    found = [Part(model, None, PLAIN) for model in SETTINGS]
    for model, settings in SETTINGS.items():
        found += [Part(model, one, method) for one in settings for method in methods]
    return found


@dataclass(frozen=True)
class Budget:
    """Seconds for calibrating, by method; the rest gets ``default``."""

    default: float = BUDGET
    own: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def parse(text: str) -> Budget:
        """``200`` or ``200,awq=60``. Raises ValueError."""
        pairs = [item.strip().partition("=") for item in text.split(",") if item.strip()]
        own = {name.strip(): float(given) for name, equals, given in pairs if equals}
        rest = [float(name) for name, equals, _ in pairs if not equals]
        if len(rest) > 1 or not all(0 < each < math.inf for each in (*own.values(), *rest)):
            raise ValueError(f"{text!r} is no budget: give seconds, as in 200,awq=60")
        return Budget(rest[0] if rest else BUDGET, own)

    def of(self, method: str) -> float:
        return self.own.get(method.partition("{")[0], self.default)


@dataclass
class Study:
    """A folder that keeps what is done. length: tokens of a sequence."""

    work: Path
    budget: Budget = field(default_factory=Budget)
    samples: int = SAMPLES
    tokens: int = TOKENS
    seed: int = 0
    length: int = LENGTH
    sequences: int = SEQUENCES
    load: Callable[[str], LoadedModel] = load_model

    @functools.cached_property
    def _models(self) -> dict[str, LoadedModel]:
        return {}

    def loaded(self, model: str) -> LoadedModel:
        if model not in self._models:
            self._models.clear()  # one at a time
            self._models[model] = self.load(model)
        return self._models[model]

    # Making them.

    def compiled(self, part: Part) -> tuple[Any, dict[str, Any]]:
        """The model as ``part`` says, and facts about its making."""
        loaded, setting = self.loaded(part.model), part.setting
        if setting is None:
            return loaded.model, {}
        if part.method in PEERS:
            begin = time.perf_counter()
            given = self.calibration(part.model)
            batches = [{k: v for k, v in _keywords(one).items() if isinstance(v, Tensor)} for one in given]
            made = PEERS[part.method](loaded.model, setting.bits, setting.group, setting.activations, batches)
            return made, {"calibration_seconds": time.perf_counter() - begin}
        from ..frontend.compile import compile

        calibrated = not part.method.startswith("rtn")
        limit = f",seconds={self.budget.of(part.method):g}" if calibrated else ""
        text = f"quantize{{{setting.options},method={part.method},seed={self.seed}{limit}}}"
        begin = time.perf_counter()
        compiled = compile(
            loaded.model,
            text,
            example_kwargs=loaded.kwargs,
            dynamic_shapes=loaded.dynamic_shapes,
            target="reference",  # what is computed is the same, and no kernel has to be built
            rest="eager",
            validate=False,
            strict=True,
            # Without calibration inputs, clipping minimises the error of weights.
            calibration=self.calibration(part.model) if calibrated or "clip" in part.method else None,
        )
        facts: dict[str, Any] = {"passes": text, "compile_seconds": time.perf_counter() - begin}
        rows = compiled.report.to_dict()["passes"]
        facts["calibration_seconds"] = sum(row.get("facts", {}).get("seconds", 0.0) for row in rows)
        known = [row["facts"] for row in rows if "weight_bytes" in row.get("facts", {})]
        if known:
            facts |= {name: known[0].get(name) for name in ("weight_bytes", "weight_bytes_before", "stopped_early")}
        if calibrated:
            facts |= {"budget": self.budget.of(part.method), "samples": self.samples, "tokens": self.tokens}
        return compiled, facts

    def calibration(self, model: str) -> list[Any]:
        loaded = self.loaded(model)
        if loaded.kind == "encoder":
            return calibration_batches(loaded.tokenizer, COUNT // 8 + self.samples)[COUNT // 8 :]
        start = -(-(self.sequences + 1) * self.length // self.tokens)
        blocks = token_blocks(loaded.tokenizer, self.samples, self.tokens, start=start)
        return [((), {"input_ids": block, "use_cache": False}) for block in blocks]

    # Measuring.

    def truth(self, model: str) -> Path:
        """What the model as it is gives: log-probabilities of every EVERY-th token, or embeddings."""
        return self.work / f"{model}.truth.pt"

    def measure(self, part: Part, model: Any) -> dict[str, Any]:
        encoder = self.loaded(part.model).kind == "encoder"
        with torch.no_grad():
            return self.sentences(part, model) if encoder else self.text(part, model)

    def text(self, part: Part, model: Any) -> dict[str, Any]:
        blocks = token_blocks(self.loaded(part.model).tokenizer, self.sequences, self.length)
        truth = None if part.setting is None else torch.load(self.truth(part.model), mmap=True)
        loss, kl, same, compared, kept = 0.0, 0.0, 0, 0, []
        for number, block in enumerate(blocks):
            logs = F.log_softmax(model(input_ids=block, use_cache=False).logits[0].float(), -1)
            loss -= logs[:-1].gather(-1, block[0, 1:, None]).double().sum().item()
            best = logs.argmax(-1)
            if truth is None:
                kept.append((logs[::EVERY].clone(), best))
                continue
            known, top = truth["logs"][number], truth["best"][number]
            kl += F.kl_div(logs[::EVERY], known, reduction="sum", log_target=True).item()
            same += int((best == top).sum())
            compared += len(known)
        if truth is None:
            logs, best = (torch.stack(list(each)) for each in zip(*kept, strict=True))
            torch.save({"logs": logs, "best": best}, self.truth(part.model))
        tokens = len(blocks) * (self.length - 1)
        found: dict[str, Any] = {"perplexity": math.exp(loss / tokens) if loss / tokens < 700 else math.inf}
        if compared:
            found |= {"kl": kl / compared, "top1": same / (len(blocks) * self.length)}
        return found

    def sentences(self, part: Part, model: Any) -> dict[str, Any]:
        batches = calibration_batches(self.loaded(part.model).tokenizer, COUNT // 8)
        found = torch.cat([_embeddings(model, batch) for batch in batches])
        if part.setting is None:
            torch.save(found, self.truth(part.model))
            return {"sentences": len(found)}
        known = torch.load(self.truth(part.model))
        cosine = (found * known).sum(-1)
        return {"cosine": float(cosine.mean()), "least_cosine": float(cosine.min()), "ranking": ranking(known, found)}

    # Doing it.

    def run(self, wanted: list[Part], seconds: float) -> bool:
        """Do parts until ``seconds`` are over; whether all are done. A part that would not fit is not begun."""
        begin, longest = time.perf_counter(), 0.0
        for part in wanted:
            if (self.work / part.file).exists():
                continue
            if time.perf_counter() - begin + longest > seconds:
                return False
            started = time.perf_counter()
            try:
                model, facts = self.compiled(part)
                result = self.measure(part, model) | facts
            except Unavailable as reason:
                result = {"unavailable": str(reason)}
            result["seconds"] = time.perf_counter() - started
            (self.work / part.file).write_text(json.dumps(result), encoding="utf-8")
            longest = max(longest, result["seconds"])
            shown = {name: round(n, 4) for name, n in result.items() if isinstance(n, float)}
            print(f"{part.name}: {result.get('unavailable') or shown}", file=sys.stderr, flush=True)
        return True

    def collect(self) -> dict[str, Any]:
        """What is done, as the JSON of the study."""
        rows, missing = [], []
        for part in parts():
            if not (file := self.work / part.file).exists():
                missing.append(part.name)
            else:
                setting = part.setting.name if part.setting else PLAIN
                known = json.loads(file.read_text(encoding="utf-8"))
                rows.append({"model": part.model, "setting": setting, "method": part.method, **known})
        return {
            "length": self.length,
            "sequences": self.sequences,
            "every": EVERY,
            "sentences": COUNT,
            "nearest": NEAREST,
            "seed": self.seed,
            "device": machine.cpu_model(),
            "threads": os.environ.get("OMP_NUM_THREADS", ""),
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "versions": machine.versions(),
            "commit": machine.commit(),
            "rows": rows,
            "not_run": missing,
        }


def _keywords(inputs: Any) -> dict[str, Any]:
    """Of a calibration input: (args, kwargs), or kwargs alone."""
    return dict(inputs if isinstance(inputs, Mapping) else inputs[1])


def _embeddings(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Mean-pooled and normalised (S, C), float32."""
    hidden = model(**inputs).last_hidden_state.float()
    keep = inputs["attention_mask"][..., None].float()
    return F.normalize((hidden * keep).sum(1) / keep.sum(1), dim=-1)


def ranking(known: Tensor, found: Tensor, nearest: int = NEAREST) -> float:
    """The share of each row's ``nearest`` nearest other rows (by cosine) that stay among them, mean over rows."""
    tops = []
    for rows in (known, found):
        cosines = rows @ rows.T
        tops.append(cosines.fill_diagonal_(-2.0).topk(nearest).indices)
    kept = (tops[0][:, :, None] == tops[1][:, None, :]).any(-1)
    return float(kept.float().mean())


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="the folder that keeps what is done")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no part after so many")
    parser.add_argument("--budget", default=f"{BUDGET:g}", help="seconds for calibrating: 200, or 200,awq=60")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="calibration blocks")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens of a calibration block")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--filter", default="", help="only parts whose name contains one: 'smollm2: 4 bits|minilm'")
    parser.add_argument("--methods", default="", help="these methods and peers: rtn|awq|torchao")
    parser.add_argument("--output", type=Path, default=None, help="the JSON to write")
    given = parser.parse_args(arguments)
    try:
        budget = Budget.parse(given.budget)
    except ValueError as error:
        parser.error(str(error))
    given.work.mkdir(parents=True, exist_ok=True)
    study = Study(given.work, budget, given.samples, given.tokens, given.seed)
    texts = given.filter.lower().split("|")
    chosen = tuple(method for method in given.methods.split("|") if method)
    wanted = [part for part in parts(*([chosen] if chosen else [])) if any(t in part.name.lower() for t in texts)]
    # What the others are compared with comes first.
    wanted = [p for p in parts(()) if any(p.model == one.model for one in wanted)] + [p for p in wanted if p.setting]
    whole = study.run(wanted, given.seconds)
    if given.output is not None:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(study.collect(), indent=1) + "\n", encoding="utf-8")
    print("whole" if whole else "more is left: run it again")
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
