"""Weights leave memory: release() frees the model, files hold packed weights and decoders with a cache."""

from __future__ import annotations

import copy
import gc
import hashlib
import io
import json
import subprocess
import sys
import weakref
import zipfile
from types import SimpleNamespace

import pytest
import safetensors.torch
import tiny
import torch
from torch import nn

import tilewright as tw
from tilewright import errors
from tilewright.frontend.constants import drop_unread, weight_bytes
from tilewright.frontend.weights_file import read_tensors
from tilewright.passes import KVCache, Quantize, SigmoidAttention

transformers = pytest.importorskip("transformers")


IDS = tiny.tokens()


def floats(model: nn.Module) -> list[weakref.ref]:
    return [weakref.ref(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and m is not model.lm_head]


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> SimpleNamespace:
    """A quantized decoder with a cache, of which nobody else holds the model: before its release, and released."""
    model = tiny.llama(layers=1, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    passes = [Quantize(bits=4, group_size=32), KVCache(max_length=48)]
    compiled = tw.compile(model, passes, rest="eager", target="reference")
    folder = tmp_path_factory.mktemp("story")
    found = SimpleNamespace(compiled=compiled, refs=floats(model), report=compiled.report.to_dict())
    with torch.no_grad():
        found.out = compiled(input_ids=IDS, attention_mask=torch.ones_like(IDS))
        found.loss = compiled(input_ids=IDS, labels=IDS).loss
    found.text = compiled.generate(IDS, max_new_tokens=6, do_sample=False)
    found.cache = found.out.past_key_values.save(folder / "cache")
    found.path = tw.save(compiled, folder / "m")
    assert compiled.release() is compiled is compiled.release()
    found.again = tw.save(compiled, folder / "again")
    return found


def test_release_frees_float_weights_and_decoding_goes_on(story, tmp_path) -> None:
    compiled, report = story.compiled, story.report
    gc.collect()
    assert len(story.refs) == 7 and not any(ref() is not None for ref in story.refs)
    old = copy.deepcopy(story.out.past_key_values)  # a cache from before
    with torch.no_grad():
        got = compiled(input_ids=IDS)
        assert torch.equal(got.logits, story.out.logits) and type(got) is type(story.out)
        assert torch.equal(compiled(input_ids=IDS, labels=IDS).loss, story.loss)
        more = compiled(input_ids=IDS[:, :1], past_key_values=old).logits
        assert torch.equal(more, compiled(input_ids=IDS[:, :1], past_key_values=got.past_key_values).logits)
    assert torch.equal(compiled.generate(IDS, max_new_tokens=6, do_sample=False), story.text)
    assert compiled.report.to_dict() == report and compiled.decodes and compiled.config.vocab_size == 96
    assert sum(t.nbytes for t in compiled.state_dict().values()) == report["weights"]["after"]
    assert report["weights"]["after"] < report["weights"]["before"]
    compiled.dump(tmp_path / "dump")
    assert (tmp_path / "dump" / "01_lowered.py").is_file()


def test_released_modules_say_what_they_cannot_do() -> None:
    model = tiny.llama(layers=1)
    ids = tiny.tokens()
    kwargs = {"input_ids": ids, "use_cache": False}
    compiled = tw.compile(
        model, [SigmoidAttention()], example_kwargs=kwargs, rest="eager", target="reference"
    ).release()
    with torch.no_grad():
        assert compiled(**kwargs).logits.shape == (2, 7, 96)
    for call in (
        lambda: compiled.bisect(**kwargs),
        lambda: compiled.original_model,
        lambda: tw.tune(compiled, [kwargs], "centroids"),
        compiled.exported_program,
    ):
        with pytest.raises(errors.BadArgument, match=r"release\(\) let go of the model"):
            call()
    with pytest.raises(errors.BadArgument, match="compile the model in train"):
        compiled.train()
    assert not compiled.eval().training
    with pytest.raises(AttributeError, match=r"release\(\) let go"):
        compiled.lm_head  # noqa: B018
    with pytest.raises(errors.BadArgument, match="captured by Dynamo"):
        tw.compile(tiny.Mlp()).release()
    assert model.lm_head.weight.shape == (96, 32), "the user's model is whole"


def test_a_saved_decoder_generates_in_another_process(story, tmp_path) -> None:
    assert story.path.read_bytes() == story.again.read_bytes(), "released or not makes no difference"
    script = (
        "import torch, tilewright as tw\n"
        f"ids = torch.tensor({IDS.tolist()!r})\n"
        f"loaded = tw.load({str(story.path)!r})\n"
        f"assert loaded.generate(ids, max_new_tokens=6, do_sample=False).tolist() == {story.text.tolist()!r}\n"
        f"cache = loaded.new_cache({str(story.cache)!r})\n"
        "with torch.no_grad():\n"
        "    out = loaded(input_ids=ids[:, :1], past_key_values=cache)\n"
        f"torch.save(out.logits, {str(tmp_path / 'logits')!r})\n"
        "assert loaded.config.vocab_size == 96 and loaded.decodes and type(out).__name__ == 'CausalLMOutputWithPast'\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    cache = copy.deepcopy(story.out.past_key_values)
    with torch.no_grad():
        more = story.compiled(input_ids=IDS[:, :1], past_key_values=cache).logits
    assert torch.equal(torch.load(tmp_path / "logits"), more)


def test_a_file_holds_packed_weights_only_and_loads_them_once(story) -> None:
    path, after = story.path, story.report["weights"]["after"]
    with zipfile.ZipFile(path) as archive:
        size = archive.getinfo("weights.safetensors").file_size
        meta = json.loads(archive.read("meta.json"))
    assert after <= size < after + 8000
    loaded = tw.load(path)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in loaded.state_dict().values()}
    assert sum(held.values()) == after
    assert meta["decoding"]["model"]["class"] == "LlamaForCausalLM"
    assert loaded.report.to_dict() == story.report
    with pytest.raises(errors.SaveError, match="no PreTrainedModel named 'OSError'"):
        rewrite(path, lambda meta: meta["decoding"]["model"].update({"class": "OSError"}))
    with pytest.raises(errors.SaveError, match="not a file that Tilewright wrote"):
        rewrite(path, lambda meta: meta["decoding"]["sites"][0].update(kind="other"))
    with pytest.raises(errors.SaveError, match="its cache needs"):
        rewrite(path, lambda meta: meta["decoding"]["sites"].clear())


def rewrite(path, change) -> None:
    """Load a copy whose metadata were changed."""
    changed = path.with_name("changed")
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(changed, "w") as out:
        for name in archive.namelist():
            data = archive.read(name)
            if name == "meta.json":
                meta = json.loads(data)
                change(meta)
                data = json.dumps(meta).encode()
            out.writestr(zipfile.ZipInfo(name), data)
    tw.load(changed)


def test_what_nobody_reads_is_dropped() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))
            self.register_buffer("view", torch.ones(16)[:4])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.a + self.b + self.view.sum()

    compiled = tw.compile(Model(), example_inputs=(torch.ones(8),), rest="eager")
    lowered = compiled.records[0].lowered
    assert weight_bytes(lowered) == 32 + 32 + 16
    read = lowered.graph.find_nodes(op="get_attr")
    read[0].replace_all_uses_with(read[1])
    name = str(read[0].target)
    drop_unread(lowered)
    assert name not in lowered.state_dict() and weight_bytes(lowered) == 48
    assert lowered.recompile() is not None and "a" in dict(compiled.original_model.named_parameters())


# Reading weights out of a file.


def test_weights_are_read_as_safetensors_reads_them() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.int64)
    kinds += (torch.uint8, torch.uint16, torch.bool)
    given = {str(kind): torch.randn(3, 5, generator=generator).to(kind) for kind in kinds}
    given |= {"empty": torch.zeros(0, 4), "one": torch.tensor(2.5), "large": torch.randn(1, 700_000)}
    data = safetensors.torch.save(given)
    got, digest = read_tensors(io.BytesIO(data), len(data))
    assert got.keys() == given.keys() and digest == hashlib.sha256(data).hexdigest()
    for name, tensor in safetensors.torch.load(data).items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape
        one, other = (t.reshape(-1).view(torch.uint8) if t.numel() else t for t in (got[name], tensor))
        assert torch.equal(one, other)


ROW = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "body"),
    [
        ({"a": ROW}, 4),
        ({"a": ROW}, 12),
        ({"a": ROW | {"shape": [3]}}, 8),
        ({"a": ROW | {"shape": [-2]}}, 8),
        ({"a": ROW | {"shape": [2**62]}}, 8),
        ({"a": ROW | {"dtype": "F7"}}, 8),
        ({"a": ROW, "b": ROW}, 8),
        ({"a": ROW | {"data_offsets": [4, 12]}}, 12),
        ({"a": {"dtype": "F32"}}, 8),
        ([ROW], 8),
        (b"\xff\xfe", 8),
    ],
)
def test_weights_with_a_wrong_header_are_refused(header, body) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(body)
    with pytest.raises(ValueError, match="weights"):
        read_tensors(io.BytesIO(data), len(data))
    with pytest.raises(ValueError, match="longer than"):
        read_tensors(io.BytesIO(b"\xff" * 8 + data), len(data))
