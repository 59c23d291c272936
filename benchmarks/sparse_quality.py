"""What block-sparse attention costs in quality: SmolLM2 on real text and on a retrieval probe, setting by setting.

    python -m tilewright.benchmarks.sparse_quality --work DIR --seconds 50      # again and again, until it says "whole"

Each setting compiles the model's backbone with ``BlockSparseAttention`` and compares it with the dense model, all in
float32:

- text: SEQUENCES x LENGTH tokens of ``pydoc_data.topics``; perplexity over all tokens, KL(dense || sparse) and top-1
  agreement over every fourth position (logits of all would be 800 MB a sequence). Of the first sequence also, for each
  site, the relative L2 error of its output against dense attention on the same q, k and v, and the density: tiles read
  over tiles that causal attention reads.
- needle: a sentence planted in LENGTH tokens of other text and asked for at the end; the log-probability of the right
  word and how many words the model holds likelier. It is a sentence that the dense model completes rightly.

A part (one sequence of one setting) is kept in DIR when it is done, so that a run may stop anywhere. DIR does not know
which version of the code made a part: empty it when that has changed. The result is one JSON file; the table and the
picture of docs/block_sparse.md come from it (scripts/bench_tables.py).
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..frontend.models import LoadedModel, load_model
from ..frontend.text import token_blocks
from ..passes.metrics import tensor_error
from ..runtime.ops.block_lists import EMPTY, block_lists
from ..runtime.ops.block_states import BLOCK_STATES
from . import machine

MODEL, LENGTH, SEQUENCES, SLICE, EVERY, BLOCK = "smollm2", 4096, 4, 512, 4, 128
CAUSAL = "k_idx <= q_idx"
DEPTHS = (0.1, 0.35, 0.6, 0.85)
PLANTED, ASKED, ANSWER = (
    "\n\nThe special keyword of Alice is banana.\n\n",
    "\n\nThe special keyword of Alice is",
    " banana",
)
Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    """method: a line of the picture. options: of the pass; none is the dense model."""

    method: str
    detail: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.method} {self.detail}".strip()

    @property
    def file(self) -> str:
        return "".join(c if c.isalnum() or c == "." else "-" for c in self.name)


def _window(size: int) -> Setting:
    return Setting("window + sinks", f"{size} + 4", {"mask": f"causal & (window({size}) | sinks(4))"})


def _selected(method: str, text: str) -> Setting:
    return Setting(method, text, {"select": f"{method.lower()}({text})"})


DENSE = Setting("dense")
SETTINGS = (
    DENSE,
    *(_window(size) for size in (2048, 1024, 256)),
    *(_selected("XAttention", f"threshold={mass}") for mass in (0.98, 0.9, 0.6)),
    *(_selected("ProxyAttn", text) for text in ("threshold=0.98, least=1024", "threshold=0.9, least=512")),
    _selected("ProxyAttn", "threshold=0.6, least=256"),
    *(_selected("PBS", f"threshold={mass}") for mass in (0.98, 0.9, 0.6)),
    *(_selected("DHSA", f"budget={keys}") for keys in (2048, 1024, 512)),
)
PARTS = (*(f"text{n}" for n in range(SEQUENCES)), *(f"needle{n}" for n in range(len(DEPTHS))))


class Backbone(torch.nn.Module):
    """A causal language model without its head: last hidden states, so that logits are made in slices."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).last_hidden_state


class Sites(TorchDispatchMode):
    """Looks at every attention kernel that runs: what it reads, and how far its output is from dense attention's."""

    def __init__(self) -> None:
        super().__init__()
        self.densities: list[float] = []
        self.errors: list[float] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.ops.tilewright.attention_forward.default:
            names = [argument.name for argument in func._schema.arguments]
            named = dict(zip(names, args, strict=False)) | kwargs
            self.densities.append(density(named))
            self.errors.append(tensor_error(result[0], func(**dense(named))[0])["rel_l2"])
        return result


def density(named: dict[str, Any]) -> float:
    """Tiles that a kernel call reads over the tiles that a causal mask leaves."""
    q, k = named["q"], named["k"]
    if named.get("counts") is None:
        read = (tiles(q, k, named["mask"], BLOCK, BLOCK) > EMPTY).sum().item()
        return read / (tiles(q, k, CAUSAL, BLOCK, BLOCK) > EMPTY).sum().item()
    counts = named["counts"]
    whole = (tiles(q, k, CAUSAL, named["block_q"], named["block_k"]) > EMPTY).sum().item()
    return counts.sum().item() / (counts.shape[0] * counts.shape[1] * whole)


def dense(named: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the same call, reading everything. Moved keys keep their mask, which looks their places up."""
    if named.get("counts") is None:
        return named | {"mask": CAUSAL}
    if named.get("table") is None:
        return named | {"mask": CAUSAL, "counts": None, "indices": None, "block_q": 0, "block_k": 0}
    everything = torch.ones_like(tiles(named["q"], named["k"], "", named["block_q"], named["block_k"]))
    counts, indices = block_lists(everything)
    return named | {"counts": counts, "indices": indices}


def tiles(q: Tensor, k: Tensor, mask: str, block_q: int, block_k: int) -> Tensor:
    return BLOCK_STATES(q, k, None, mask=mask, block_q=block_q, block_k=block_k)


@dataclass
class Study:
    """One model, and a folder that keeps what is done. length: tokens of a sequence."""

    work: Path
    loaded: LoadedModel
    length: int = LENGTH

    @functools.cached_property
    def backbone(self) -> Backbone:
        whole: Any = self.loaded.model
        return Backbone(whole.model).eval()

    def forward_of(self, setting: Setting) -> Forward:
        if not setting.options:
            return self.backbone
        from ..frontend.compile import compile
        from ..passes.block_sparse_attention import BlockSparseAttention

        ids = torch.zeros(1, self.length, dtype=torch.long)
        one = BlockSparseAttention(block_size=BLOCK, **setting.options)
        fixed: dict[str, Any] = {"input_ids": {}}
        return compile(self.backbone, [one], (ids,), dynamic_shapes=fixed, rest="eager", validate=False, strict=True)

    def texts(self) -> list[Tensor]:
        return token_blocks(self.loaded.tokenizer, SEQUENCES, self.length)

    def needle(self, depth: float) -> tuple[Tensor, int]:
        """The prompt (1, length), which ends where the answer is due, and the answer's first token."""
        tokenizer: Any = self.loaded.tokenizer
        planted, asked, answer = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (PLANTED, ASKED, ANSWER)
        )
        hay = token_blocks(tokenizer, 1, self.length, start=SEQUENCES)[0][0].tolist()
        room = self.length - len(planted) - len(asked)
        cut = round(depth * room)
        return torch.tensor([hay[:cut] + planted + hay[cut:room] + asked]), answer[0]

    def hidden(self, number: int, ids: Tensor) -> Tensor:
        """The dense model's hidden states of a sequence, computed once."""
        path = self.work / f"hidden{number}.pt"
        if path.exists():
            return torch.load(path)
        found = self.backbone(ids)
        torch.save(found, path)
        return found

    def logs(self, hidden: Tensor) -> Tensor:
        """Log-probabilities of the next token: (N, C) -> (N, vocabulary)."""
        head: Any = self.loaded.model.lm_head
        return F.log_softmax(F.linear(hidden, head.weight, head.bias).float(), -1)

    def measure(self, forward: Forward, part: str) -> dict[str, Any]:
        begin = time.perf_counter()
        number = int(part[-1])
        with torch.no_grad():
            if part.startswith("needle"):
                result = self._needle(forward, DEPTHS[number])
            else:
                result = self._text(forward, number)
        return result | {"seconds": time.perf_counter() - begin}

    def _needle(self, forward: Forward, depth: float) -> dict[str, Any]:
        ids, answer = self.needle(depth)
        logs = self.logs(forward(ids)[0, -1:])[0]
        return {"depth": depth, "log": logs[answer].item(), "rank": int((logs > logs[answer]).sum()) + 1}

    def _text(self, forward: Forward, number: int) -> dict[str, Any]:
        ids = self.texts()[number]
        before = self.hidden(number, ids)[0]
        sites = Sites()
        if forward is self.backbone:
            after = before
        elif number == 0:
            with sites:
                after = forward(ids)[0]
        else:
            after = forward(ids)[0]
        loss, kl, same, compared = 0.0, 0.0, 0, 0
        for start in range(0, self.length, SLICE):
            logs = self.logs(after[start : start + SLICE])
            wanted = ids[0, start + 1 : start + SLICE + 1]
            loss -= logs[: len(wanted)].gather(-1, wanted[:, None]).double().sum().item()
            logs, truth = logs[::EVERY], self.logs(before[start : start + SLICE : EVERY])
            kl += F.kl_div(logs, truth, reduction="sum", log_target=True).item()
            same += int((logs.argmax(-1) == truth.argmax(-1)).sum())
            compared += len(truth)
        result: dict[str, Any] = {"loss": loss, "tokens": self.length - 1, "kl": kl, "same": same, "compared": compared}
        if sites.errors:
            result |= {"densities": sites.densities, "errors": sites.errors}
        return result

    def path(self, setting: Setting, part: str) -> Path:
        return self.work / f"{setting.file}.{part}.json"

    def left(self, settings: tuple[Setting, ...], parts: tuple[str, ...]) -> Iterator[tuple[Setting, list[str]]]:
        for setting in settings:
            if missing := [part for part in parts if not self.path(setting, part).exists()]:
                yield setting, missing

    def run(self, settings: tuple[Setting, ...], parts: tuple[str, ...], seconds: float) -> bool:
        """Do parts until ``seconds`` are over; whether all are done. A part that would not fit is not begun."""
        begin, longest = time.perf_counter(), 0.0
        for setting, missing in list(self.left(settings, parts)):
            forward = None
            for part in missing:
                if time.perf_counter() - begin + longest > seconds:
                    return False
                started = time.perf_counter()
                forward = forward or self.forward_of(setting)
                result = self.measure(forward, part)
                self.path(setting, part).write_text(json.dumps(result), encoding="utf-8")
                longest = max(longest, time.perf_counter() - started)
                print(f"{setting.name}: {part}, {result['seconds']:.1f} s", file=sys.stderr, flush=True)
        return True

    def collect(self, settings: tuple[Setting, ...]) -> dict[str, Any]:
        """What is done, as the JSON of the study. Settings with nothing done are left out."""
        rows = []
        for setting in settings:
            done = {part: self.path(setting, part) for part in PARTS if self.path(setting, part).exists()}
            read = {part: json.loads(path.read_text(encoding="utf-8")) for part, path in done.items()}
            if read:
                rows.append(summary(setting, read))
        return {
            "model": MODEL,
            "length": self.length,
            "sequences": SEQUENCES,
            "block": BLOCK,
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "versions": machine.versions(),
            "commit": machine.commit(),
            "rows": rows,
        }


def summary(setting: Setting, read: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One setting's row. sequences, needles: how many went into it."""
    texts = [result for part, result in read.items() if part.startswith("text")]
    needles = [result for part, result in read.items() if part.startswith("needle")]
    row: dict[str, Any] = {"method": setting.method, "setting": setting.detail, "options": setting.options}
    row |= {"sequences": len(texts), "needles": len(needles)}
    if texts:
        compared = sum(t["compared"] for t in texts)
        row["perplexity"] = math.exp(sum(t["loss"] for t in texts) / sum(t["tokens"] for t in texts))
        row["kl"] = sum(t["kl"] for t in texts) / compared
        row["top1"] = sum(t["same"] for t in texts) / compared
    first = read.get("text0", {})
    if "errors" in first:
        errors = sorted(first["errors"])
        row["density"] = sum(first["densities"]) / len(first["densities"])
        row["densities"], row["errors"] = first["densities"], first["errors"]
        row["error"], row["error_most"] = errors[len(errors) // 2], errors[-1]
    elif not setting.options:
        row["density"] = 1.0
    if needles:
        row["found"] = sum(n["rank"] == 1 for n in needles)
        row["log"] = sum(n["log"] for n in needles) / len(needles)
        row["ranks"] = {str(n["depth"]): n["rank"] for n in needles}
    return row


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="the folder that keeps what is done")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no part after so many")
    parser.add_argument("--filter", default="", help="only settings whose name contains it")
    parser.add_argument("--parts", default="", help="only parts whose name begins so: text, needle")
    parser.add_argument("--output", type=Path, default=None, help="the JSON to write")
    given = parser.parse_args(arguments)
    given.work.mkdir(parents=True, exist_ok=True)
    study = Study(given.work, load_model(MODEL))
    settings = tuple(s for s in SETTINGS if given.filter.lower() in s.name.lower())
    parts = tuple(part for part in PARTS if part.startswith(given.parts))
    whole = study.run(settings, parts, given.seconds)
    if given.output is not None:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(study.collect(SETTINGS), indent=1) + "\n", encoding="utf-8")
    print("whole" if whole else "more is left: run it again")
    return 0 if whole else 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
