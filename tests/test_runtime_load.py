"""The loader's four verbs, the fingerprint, parallel builds."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import runtime_toy
from runtime_toy import CountingTarget, ToySpec

import tilewright
from tilewright.codegen.spec import SpecError
from tilewright.runtime import cache, errors, fingerprint, load, settings, targets


@pytest.fixture(autouse=True)
def toys(fresh_cache, monkeypatch, tmp_path):
    monkeypatch.setattr(load, "render", runtime_toy.toy_text)
    monkeypatch.setitem(targets._targets, "counting", CountingTarget())
    monkeypatch.setenv("TOY_LOG", str(tmp_path / "builds.log"))


def builds(tmp_path) -> int:
    log = tmp_path / "builds.log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_the_verbs_in_turn(tmp_path):
    spec = ToySpec()
    assert not load.is_built(spec, "counting")
    assert load.try_load(spec, "counting") is None
    assert builds(tmp_path) == 0
    folder = load.build(spec, "counting")
    assert load.build(spec, "counting") == folder
    assert load.is_built(spec, "counting")
    kernel = load.try_load(spec, "counting")
    assert kernel is load.load(spec, "counting")
    assert builds(tmp_path) == 1
    assert (kernel.spec, kernel.target) == (spec, "counting")
    assert kernel.text == kernel.path.read_text() == runtime_toy.toy_text(spec, "counting")
    assert kernel.path.parent == folder and folder.name == cache.short(kernel.digest) and len(kernel.digest) == 64
    assert kernel.launch(3) == (64, "a", 3)


def test_a_steady_state_load_is_a_lookup(monkeypatch):
    """Nothing is rendered, fingerprinted or read for a kernel in memory; an equal spec finds the same object."""
    kernel = load.load(ToySpec(), "counting")

    def never(*args):
        raise AssertionError("a kernel in memory was worked out again")

    monkeypatch.setattr(load, "render", never)
    monkeypatch.setattr(load, "_order", never)
    assert load.load(ToySpec(), "counting") is kernel
    assert load.try_load(ToySpec(), "counting") is kernel


def test_another_process_loads_without_building(tmp_path):
    load.build(ToySpec(), "counting")
    code = (
        "import runtime_toy; runtime_toy.install()\nimport sys\nfrom tilewright.runtime import load\n"
        "print(load.load(runtime_toy.ToySpec(), 'counting').launch(5), 'torch' in sys.modules)\n"
    )
    environment = runtime_toy.environment(settings.get().cache_dir, TILEWRIGHT_NO_BUILD="1", PYTHONHASHSEED="7")
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "(64, 'a', 5) False", run.stderr  # the loader itself does not import torch
    assert builds(tmp_path) == 1


def test_building_can_be_forbidden(tmp_path):
    with settings.override(no_build=True):
        for verb in (load.load, load.build):
            with pytest.raises(errors.NotBuilt, match="TILEWRIGHT_NO_BUILD"):
                verb(ToySpec(), "counting")
        assert load.try_load(ToySpec(), "counting") is None
    assert builds(tmp_path) == 0
    load.build(ToySpec(), "counting")
    with settings.override(no_build=True):
        assert load.load(ToySpec(), "counting").launch(1) == (64, "a", 1)


def test_what_cannot_be_had_is_said():
    with pytest.raises(errors.BadArgument, match="'tritn'.*choose one of .*triton-interpret"):
        load.load(ToySpec(), "tritn")
    with pytest.raises(SpecError, match="block is 0"):
        ToySpec(block=0)


def test_a_spec_without_a_template_is_unsupported(monkeypatch):
    from tilewright.codegen.render import render

    monkeypatch.setattr(load, "render", render)

    class Bare(ToySpec):
        templates = {}

    with pytest.raises(errors.UnsupportedKernel, match="no triton template"):
        load.load(Bare(), "triton-interpret")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def launch(:\n", "is no Python, line 1"),
        ("import no_such_module_at_all\n", "does not import: ModuleNotFoundError"),
        ("x = 1\n", "defines no launch function"),
    ],
)
def test_a_kernel_file_that_is_wrong_is_a_build_error(monkeypatch, text, message):
    monkeypatch.setattr(load, "render", lambda spec, target: text)
    modules = set(sys.modules)
    with pytest.raises(errors.BuildError, match=message):
        load.load(ToySpec(), "triton-interpret")
    assert not [name for name in set(sys.modules) - modules if name.startswith("tilewright_kernel")]


def test_threads_build_once_and_share_the_kernel(tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_SECONDS", "0.2")
    barrier, found = threading.Barrier(8), []

    def work():
        barrier.wait()
        found.append(load.load(ToySpec(), "counting"))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len({id(kernel) for kernel in found}) == 1
    assert builds(tmp_path) == 1


def test_an_entry_cleared_between_check_and_open_is_built_again(monkeypatch, tmp_path):
    load.build(ToySpec(), "counting")
    target, real = targets.get("counting"), CountingTarget.open
    calls = []

    def open_late(folder, spec, text, digest):
        calls.append(folder)
        if len(calls) == 1:
            cache.clear()
        return real(target, folder, spec, text, digest)

    monkeypatch.setattr(target, "open", open_late, raising=False)
    assert load.load(ToySpec(), "counting").launch(1) == (64, "a", 1)
    assert builds(tmp_path) == 2 and len(calls) == 2


def test_a_sound_entry_that_does_not_open_is_a_build_error(monkeypatch, tmp_path):
    def cannot(folder, spec, text, digest):
        raise OSError("undefined symbol: launch")

    monkeypatch.setattr(targets.get("counting"), "open", cannot, raising=False)
    with pytest.raises(errors.BuildError, match="undefined symbol"):
        load.load(ToySpec(), "counting")
    assert builds(tmp_path) == 1


def test_an_entry_that_is_always_damaged_ends_in_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "_private", {})
    monkeypatch.setattr(cache.Store, "problem", lambda self, folder: "damaged by a test")
    with pytest.warns(errors.TilewrightWarning), pytest.raises(errors.CacheError, match="built twice"):
        load.load(ToySpec(), "counting")
    assert builds(tmp_path) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_fork_during_a_build_does_not_hang_the_child(tmp_path):
    """In the child, the thread that built the kernel is gone, and the locks it held must not be."""
    code = (
        "import os, signal, threading, time\nimport runtime_toy; runtime_toy.install()\n"
        "from tilewright.runtime import load\n"
        "thread = threading.Thread(target=load.load, args=(runtime_toy.ToySpec(), 'counting'))\nthread.start()\n"
        "while not os.path.exists(os.environ['TOY_LOG']): time.sleep(0.01)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    signal.alarm(30)\n"
        "    os._exit(0 if load.load(runtime_toy.ToySpec(), 'counting').launch(1) else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\nthread.join()\n"
    )
    environment = runtime_toy.environment(
        settings.get().cache_dir, TOY_LOG=os.environ["TOY_LOG"], TOY_SECONDS="1", PYTHONWARNINGS="ignore"
    )
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=90)
    assert run.stdout.strip() == "0", run.stderr


def test_many_are_built_at_the_same_time(tmp_path, monkeypatch):
    """Three builds wait for each other, which only ends when all three run at once."""
    barrier = threading.Barrier(3, timeout=30)

    class Meeting(CountingTarget):
        name = "meeting"

        def build(self, folder, spec):
            barrier.wait()
            super().build(folder, spec)

    monkeypatch.setitem(targets._targets, "meeting", Meeting())
    monkeypatch.setattr(load, "render", lambda spec, target: runtime_toy.toy_text(spec, "counting"))
    wanted = [(ToySpec(note=note), "meeting") for note in "abca"]
    heard = []
    caller = threading.get_ident()
    results = load.build_many(wanted, lambda result: heard.append((result.spec.note, threading.get_ident())), jobs=3)
    assert [result.spec.note for result in results] == ["a", "b", "c"]
    assert all(result.built and result.error is None and result.path.is_dir() for result in results)
    assert sorted(note for note, _ in heard) == ["a", "b", "c"] and {thread for _, thread in heard} == {caller}
    assert not any(result.built for result in load.build_many(wanted))
    assert builds(tmp_path) == 3


def test_one_of_many_may_fail(tmp_path):
    wanted = [
        (ToySpec(note=note), target) for note, target in [("a", "counting"), ("broken", "counting"), ("b", "nope")]
    ]
    results = load.build_many(wanted, jobs=2)
    assert [type(result.error) for result in results] == [type(None), errors.BuildError, errors.BadArgument]
    assert [result.built for result in results] == [True, False, False]
    assert load.build_many([]) == []


# The fingerprint.

PARTS = {
    "spec": ToySpec(),
    "target": "triton",
    "text": "def launch(x): ...",
    "toolchain": {"torch": "2.13", "gpu": "a"},
}


def digest(**changes) -> str:
    return fingerprint.digest(fingerprint.ingredients(**{**PARTS, **changes}))


@pytest.mark.parametrize(
    "change",
    [
        {"spec": ToySpec(block=128)},
        {"spec": ToySpec(note="b")},
        {"target": "triton-interpret"},
        {"text": "def launch(x): ... "},
        {"toolchain": {"torch": "2.14", "gpu": "a"}},
        {"toolchain": {"torch": "2.13", "gpu": "b"}},
        {"toolchain": {"torch": "2.13"}},
    ],
)
def test_every_ingredient_changes_the_fingerprint(change):
    assert digest(**change) != digest()


def test_our_version_and_the_format_change_the_fingerprint(monkeypatch):
    before = digest()
    monkeypatch.setattr(fingerprint, "__version__", tilewright.__version__ + ".1")
    assert digest() != before
    monkeypatch.undo()
    monkeypatch.setattr(fingerprint, "ENTRY_FORMAT", fingerprint.ENTRY_FORMAT + 1)
    assert digest() != before


def test_nothing_else_changes_the_fingerprint():
    assert digest() == digest(toolchain={"gpu": "a", "torch": "2.13"}, spec=ToySpec())
    code = "import test_runtime_load as t\nprint(t.digest())\n"
    environment = runtime_toy.environment(settings.get().cache_dir, PYTHONHASHSEED="99", TZ="Asia/Tokyo")
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == digest(), run.stderr


def test_another_toolchain_is_another_entry(monkeypatch, tmp_path):
    first = load.build(ToySpec(), "counting")
    monkeypatch.setitem(targets._targets, "counting", CountingTarget(version="2"))
    assert not load.is_built(ToySpec(), "counting")
    assert load.build(ToySpec(), "counting") != first
    assert builds(tmp_path) == 2


def test_the_triton_targets_name_their_versions():
    import torch
    import triton

    for name in ("triton", "triton-interpret"):
        toolchain = targets.get(name).toolchain()
        assert (toolchain["torch"], toolchain["triton"]) == (torch.__version__, triton.__version__)
    assert "capability" in targets.get("triton").toolchain()
