"""Saving and loading: equal outputs bit for bit, nothing of the model's code needed, hostile files refused."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from tiny import Breaks, Mlp, bert, llama, tokens
from torch import nn

import tilewright as tw
from tilewright import errors
from tilewright.frontend.graph_json import FUNCTIONS, find_target, graph_from_json, graph_to_json
from tilewright.passes import SigmoidAttention


class Tied(nn.Module):
    """Tied weights, an integer buffer, a transposed weight, a keyword constant, symbolic sizes, a nested output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight
        self.layers = nn.ModuleDict({"0": nn.Linear(8, 8)})
        self.layers["0"].weight = nn.Parameter(torch.randn(8, 8).t())
        self.register_buffer("shift", torch.tensor([1, 2]))
        self.register_buffer("extra", torch.randn(8).to(torch.bfloat16))

    def forward(self, x: torch.Tensor, *, scale: float = 2.0) -> dict:
        h = self.layers["0"](self.embed(x)) * scale + self.extra
        h = h.view(x.shape[0] * x.shape[1], -1) + self.shift.sum()
        h = h + torch.arange(x.shape[0] * x.shape[1], device=x.device)[:, None]
        return {"logits": self.head(h), "rest": (h.sum(), x.shape[1] * 2, h.masked_fill(h > 0, float("-inf")))}


def tied(**options):
    torch.manual_seed(0)
    x = torch.randint(0, 10, (3, 4))
    return tw.compile(Tied().eval(), example_inputs=(x,), example_kwargs={"scale": 3.0}, rest="eager", **options)


def leaves(output) -> list:
    return torch.utils._pytree.tree_leaves(output)


def assert_identical(one, other) -> None:
    one, other = leaves(one), leaves(other)
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        same = torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b
        assert same


def test_round_trip_keeps_every_bit(tmp_path) -> None:
    compiled = tied()
    loaded = tw.load(tw.save(compiled, tmp_path / "m.tilewright"))
    for shape in ((3, 4), (5, 2)):  # sizes stay dynamic
        x = torch.randint(0, 10, shape)
        assert_identical(compiled(x, scale=3.0), loaded(x, scale=3.0))
    assert isinstance(loaded(x, scale=3.0)["rest"], tuple)


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path) -> None:
    path = tw.save(tied(), tmp_path / "m")
    loaded = tw.load(path)
    parameters = dict(loaded.lowered.named_parameters(remove_duplicate=False))
    names = [name for name in parameters if name in ("embed.weight", "head.weight")]
    assert len({id(parameters[name]) for name in names}) == 1
    with zipfile.ZipFile(path) as archive:
        stored = archive.getinfo("weights.safetensors").file_size
    assert stored < 10 * 8 * 4 + 8 * 8 * 4 + 2000  # one embedding, not two


def test_layout_dtype_and_constants_survive(tmp_path) -> None:
    compiled = tied()
    loaded = tw.load(tw.save(compiled, tmp_path / "m"))
    weight = loaded.lowered.get_parameter("layers.0.weight")
    assert weight.stride() == (1, 8) and weight.requires_grad
    assert loaded.lowered.get_buffer("extra").dtype == torch.bfloat16
    assert set(loaded.state_dict()) <= set(compiled.state_dict())


@pytest.mark.parametrize(("make", "attn"), [(llama, "eager"), (llama, "sdpa"), (bert, "eager")])
def test_transformers_round_trip(tmp_path, make, attn) -> None:
    pytest.importorskip("transformers")
    ids = tokens()
    kwargs = {"input_ids": ids} | ({"use_cache": False} if make is llama else {"attention_mask": torch.ones_like(ids)})
    kwargs = {name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in kwargs.items()}
    compiled = tw.compile(make(attn), [SigmoidAttention()], example_kwargs=kwargs, rest="eager", target="reference")
    loaded = tw.load(tw.save(compiled, tmp_path / "m"))
    kwargs["input_ids"] = tokens(2, 9, seed=1)
    if make is bert:
        kwargs["attention_mask"] = torch.ones(2, 9, dtype=torch.long)
    with torch.no_grad():
        expected, got = compiled(**kwargs), loaded(**kwargs)
    assert type(got) is type(expected)
    assert_identical(expected, got)
    assert loaded.report.to_dict() == compiled.report.to_dict()
    assert len(loaded.report.passes[0].matched) == 2


def test_loads_where_the_model_class_is_unknown(tmp_path) -> None:
    compiled = tied()
    path = tw.save(compiled, tmp_path / "m")
    x = torch.randint(0, 10, (2, 3))
    torch.save(compiled(x, scale=3.0)["logits"], tmp_path / "expected.pt")
    script = (
        "import sys, torch, tilewright as tw\n"
        f"x = torch.tensor({x.tolist()!r})\n"
        f"got = tw.load({str(path)!r})(x, scale=3.0)['logits']\n"
        f"assert torch.equal(got, torch.load({str(tmp_path / 'expected.pt')!r}))\n"
        "assert 'test_save' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_kernels_come_back(tmp_path, fresh_cache) -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.Softmax(-1)).eval()
    x = torch.randn(3, 6)
    compiled = tw.compile(model, example_inputs=(x,), rest="eager", target="triton-interpret")
    assert [use.op for use in compiled.kernels] == ["softmax"]
    loaded = tw.load(tw.save(compiled, tmp_path / "m"))
    assert [(u.site, u.digest, u.target) for u in loaded.kernels] == [
        (u.site, u.digest, u.target) for u in compiled.kernels
    ]
    with torch.no_grad():
        assert_identical(compiled(x), loaded(x))


def test_saved_again(tmp_path) -> None:
    first = tw.save(tied(), tmp_path / "a")
    second = tw.save(tw.load(first), tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()


def test_trainable(tmp_path) -> None:
    loaded = tw.load(tw.save(tied(), tmp_path / "m"))
    loaded(torch.randint(0, 10, (2, 3)), scale=3.0)["logits"].sum().backward()
    assert loaded.lowered.get_parameter("layers.0.weight").grad is not None


def test_device_can_be_named(tmp_path) -> None:
    path = tw.save(tied(), tmp_path / "m")
    x = torch.randint(0, 10, (2, 3))
    assert_identical(tw.load(path)(x, scale=3.0), tw.load(path, device="cpu")(x, scale=3.0))
    if not torch.cuda.is_available():
        with pytest.raises(errors.SaveError, match="cannot be put on cuda"):
            tw.load(path, device="cuda")


# Calls and modes.


def test_call_is_checked_like_the_original(tmp_path) -> None:
    loaded = tw.load(tw.save(tied(), tmp_path / "m"))
    x = torch.randint(0, 10, (2, 3))
    with pytest.raises(errors.BadArgument, match="captured with 3.0"):
        loaded(x, scale=4.0)
    with pytest.raises(errors.BadArgument, match="does not fit the model's signature"):
        loaded(x, 3.0)
    with pytest.raises(errors.BadArgument, match="float32"):
        loaded(x.float(), scale=3.0)
    with pytest.raises(errors.BadArgument, match="1-d"):
        loaded(x[0], scale=3.0)


def test_other_mode_and_bisect_are_refused(tmp_path) -> None:
    loaded = tw.load(tw.save(tied(), tmp_path / "m"))
    assert loaded.eval() is loaded
    with pytest.raises(errors.BadArgument, match=r"graph of eval\(\) mode"):
        loaded.train()
    with pytest.raises(errors.BadArgument, match="no original graph"):
        loaded.bisect(torch.randint(0, 10, (2, 3)), scale=3.0)


# What cannot be saved.


def test_dynamo_modules_are_refused(tmp_path) -> None:
    with pytest.raises(errors.SaveError, match="give compile"):
        tw.save(tw.compile(Mlp().eval()), tmp_path / "m")
    with pytest.warns(errors.TilewrightWarning, match="Dynamo"):
        compiled = tw.compile(Breaks(), example_inputs=(torch.ones(2, 4),), rest="eager")
    with pytest.raises(errors.SaveError, match="captured by Dynamo because"):
        tw.save(compiled, tmp_path / "m")
    with pytest.raises(errors.SaveError, match="is not what compile"):
        tw.save(Mlp(), tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_unwritable_place_keeps_the_old_file(tmp_path, monkeypatch) -> None:
    compiled = tied()
    with pytest.raises(errors.SaveError, match="No such file"):
        tw.save(compiled, tmp_path / "nowhere" / "m")
    path = tw.save(compiled, tmp_path / "m")
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(errors.SaveError, match="No space left"):
        tw.save(compiled, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# Damaged and hostile files.


def rewrite(path: Path, change) -> Path:
    """A copy of a saved file with ``change`` applied to its parts and all hashes made right again."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    meta, graph = json.loads(parts["meta.json"]), json.loads(parts["graph.json"])
    change(meta, graph, parts)
    parts["graph.json"] = json.dumps(graph).encode()
    for name in meta.get("sha256", {}):
        meta["sha256"][name] = hashlib.sha256(parts[name]).hexdigest()
    parts["meta.json"] = json.dumps(meta).encode()
    target = path.with_name("changed")
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return target


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return tw.save(tied(), tmp_path_factory.mktemp("saved") / "m")


def test_rewriting_alone_changes_nothing(saved) -> None:
    x = torch.randint(0, 10, (2, 3))
    assert_identical(tw.load(rewrite(saved, lambda *_: None))(x, scale=3.0), tw.load(saved)(x, scale=3.0))


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9, 0.999])
def test_damaged_bytes(saved, tmp_path, place) -> None:
    data = bytearray(saved.read_bytes())
    data[int(len(data) * place)] ^= 0xFF
    (tmp_path / "m").write_bytes(data)
    try:
        loaded = tw.load(tmp_path / "m")
    except errors.SaveError:
        return
    # Only bytes that say nothing, such as an entry's permissions in the directory at the end, may pass.
    assert place > 0.99
    x = torch.randint(0, 10, (2, 3))
    assert_identical(loaded(x, scale=3.0), tw.load(saved)(x, scale=3.0))


def test_truncated_empty_missing_and_foreign(saved, tmp_path) -> None:
    path = tmp_path / "m"
    for content in (b"", saved.read_bytes()[:1000], b"PK\x03\x04 not really"):
        path.write_bytes(content)
        with pytest.raises(errors.SaveError, match="damaged or no saved"):
            tw.load(path)
    with pytest.raises(errors.SaveError, match="cannot read"):
        tw.load(tmp_path / "nothing")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"x")
    with pytest.raises(errors.SaveError, match="is not a saved Tilewright module"):
        tw.load(path)
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(errors.SaveError, match="compressed"):
        tw.load(path)


def first_call(graph: list) -> dict:
    return next(row for row in graph if row["op"] == "call_function")


def _set(where, **values):
    def change(meta, graph, parts) -> None:
        row = {"call": first_call(graph), "input": graph[[r["op"] for r in graph].index("placeholder")]}
        row["attr"] = next(r for r in graph if r["op"] == "get_attr")
        row["meta"], row["output"] = meta, graph[-1]
        row[where].update(values)

    return change


def _spec(text: str):
    def change(meta, graph, parts) -> None:
        meta["out_spec"] = json.dumps([1, json.loads(text)])

    return change


HOSTILE = {
    "os.system": _set("call", target="os.system", args=["true"]),
    "builtins": _set("call", target="builtins.eval"),
    "attrgetter": _set("call", target="operator.attrgetter", args=["__class__"]),
    "methodcaller": _set("call", target="operator.methodcaller", args=["__reduce__"]),
    "other namespace": _set("call", target="profiler._record_function_enter.default"),
    "reads a file": _set("call", target="aten.from_file.default", args=["/etc/passwd"]),
    "dunder": _set("call", target="aten.__class__.mro"),
    "kernel op": _set("call", target="tilewright.softmax_forward.default"),
    "no such op": _set("call", target="aten.not_there.default"),
    "call_method": _set("call", op="call_method", target="__reduce__"),
    "call_module": _set("call", op="call_module", target="embed"),
    "input name": _set("input", target="x=__import__('os').system('true')"),
    "keyword": _set("call", kwargs={"x=1); import os; (": 1}),
    "node name": _set("call", name="a; import os"),
    "attribute": _set("attr", target='x"]); import os #'),
    "attribute that is not there": _set("attr", target="embed.bias"),
    "unknown node": _set("output", args=[{"tuple": [{"node": "nobody"}]}]),
    "argument": _set("call", args=[{"pickle": "gASV"}]),
    "device": _set("call", kwargs={"device": {"device": "cpu'+x"}}),
    "dtype": _set("call", kwargs={"dtype": {"dtype": "load"}}),
    "format": _set("meta", format=2),
    "no options": _set("meta", options=None),
    "signature": _set(
        "meta", call={"parameters": [{"name": "a b", "kind": "KEYWORD_ONLY"}], "names": [], "by_name": True}
    ),
    "kernel": _set("meta", kernels=[{"spec": {"kind": "zzz"}}]),
    "imports a module": _spec('{"type": "subprocess.Popen", "context": "[]", "children_spec": []}'),
    "defaultdict": _spec('{"type": "collections.defaultdict", "context": "{}", "children_spec": []}'),
    "enum context": _spec(
        '{"type": "builtins.dict", "context": "[{\\"__enum__\\": \\"os.x\\"}]", "children_spec": []}'
    ),
    "spec is a number": _spec("3"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(saved, name, monkeypatch) -> None:
    path = rewrite(saved, HOSTILE[name])
    monkeypatch.setattr("os.system", lambda *_: pytest.fail("the file ran code"))
    with pytest.raises(errors.SaveError, match=str(path)):
        tw.load(path)


def test_every_named_function_is_harmless_and_found() -> None:
    assert all(find_target(name) is function for name, function in FUNCTIONS.items())
    assert not any(word in name for name in FUNCTIONS for word in ("getter", "caller", "eval", "setitem"))


def test_unknown_nodes_cannot_be_written() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.relu, (x,)),))
    with pytest.raises(errors.SaveError, match="which a file cannot hold"):
        graph_to_json(torch.fx.GraphModule({}, graph))


def test_arguments_round_trip() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    a = torch.ops.aten
    pieces = [
        graph.call_function(
            a.full_like.default, (x, float("-inf")), {"dtype": torch.float16, "device": torch.device("cpu")}
        ),
        graph.call_function(a.permute.default, (x, [1, 0])),
        graph.call_function(a.clone.default, (x,), {"memory_format": torch.contiguous_format}),
        graph.call_function(a.index.Tensor, (x, [None, graph.call_function(a.arange.default, (2,))])),
        graph.call_function(a.mul.Scalar, (x, 1e-300)),
        graph.call_function(a.zeros.default, ([2],), {"layout": torch.strided, "pin_memory": False}),
    ]
    graph.output(tuple(pieces))
    module = torch.fx.GraphModule({}, graph)
    again = graph_from_json(json.loads(json.dumps(graph_to_json(module), allow_nan=False)), nn.Module())
    value = torch.randn(2, 2, dtype=torch.float64)
    assert_identical(module(value), again(value))
