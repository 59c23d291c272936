"""The cache on disk: damage is found, killed builders leave nothing that loads, many processes build once."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runtime_toy
from runtime_toy import ToySpec

from tilewright.runtime import announce, cache, errors, load, settings, targets

FILES = ("kernel.py", "kernel.bin", "spec.json", "meta.json")


@pytest.fixture(autouse=True)
def toys(fresh_cache, monkeypatch, tmp_path):
    monkeypatch.setattr(load, "render", runtime_toy.toy_text)
    monkeypatch.setitem(targets._targets, "counting", runtime_toy.CountingTarget())
    monkeypatch.setenv("TOY_LOG", str(tmp_path / "builds.log"))
    announce.forget()
    monkeypatch.setattr(cache, "_private", {})
    monkeypatch.setattr(cache, "_swept", set())


def builds(tmp_path) -> int:
    log = tmp_path / "builds.log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def entry() -> Path:
    return load.build(ToySpec(), "counting")


def test_an_entry_is_complete_and_private(fresh_cache, tmp_path):
    folder = entry()
    assert folder.parent == fresh_cache / "kernels"
    assert {path.name for path in folder.iterdir()} == set(FILES)
    assert json.loads((folder / "spec.json").read_text()) == ToySpec().to_dict()
    for path in (fresh_cache, fresh_cache / "kernels", folder, fresh_cache / "locks", fresh_cache / "building"):
        assert path.stat().st_mode & 0o777 == 0o700, path
    assert not list((fresh_cache / "building").iterdir())
    assert entry() == folder and builds(tmp_path) == 1


def test_an_entry_holds_no_time_and_no_path(fresh_cache, tmp_path):
    first = {path.name: path.read_bytes() for path in entry().iterdir()}
    time.sleep(0.01)
    with settings.override(cache_dir=tmp_path / "elsewhere"):
        second = {path.name: path.read_bytes() for path in entry().iterdir()}
    assert first == second


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncate", "empty", "flip", "append", "remove", "folder"])
def test_damage_is_found_and_mended(name, damage, tmp_path):
    folder = entry()
    path = folder / name
    data = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "flip":
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    elif damage == "append":
        path.write_bytes(data + b"\n0")
    else:
        path.unlink()
        if damage == "folder":
            path.mkdir()
    assert not load.is_built(ToySpec(), "counting")
    assert load.try_load(ToySpec(), "counting") is None
    assert [state.ok for state in cache.verify()] == [False]
    kernel = load.load(ToySpec(), "counting")
    assert kernel.launch(7) == (64, "a", 7)
    assert builds(tmp_path) == 2
    assert [state.problem for state in cache.verify()] == [None]
    assert not list((settings.get().cache_dir / "building").iterdir())


def test_a_stranger_in_an_entry_is_damage(tmp_path):
    (entry() / "kernel.so").write_bytes(b"not built here")
    assert load.try_load(ToySpec(), "counting") is None
    assert "kernel.so does not belong" in cache.verify()[0].problem
    load.load(ToySpec(), "counting")
    assert builds(tmp_path) == 2


def test_an_entry_under_another_name_is_damage():
    folder, other = entry(), load.build(ToySpec(note="b"), "counting")
    shutil.rmtree(other)
    shutil.copytree(folder, other)  # sound by itself, and not what its name says
    assert load.try_load(ToySpec(note="b"), "counting") is None
    assert {state.name: state.ok for state in cache.verify()} == {folder.name: True, other.name: False}
    assert load.load(ToySpec(note="b"), "counting").launch(0) == (64, "b", 0)


def test_text_and_meta_changed_together_are_found():
    """Whoever changes the source and its hash in meta.json still does not get it loaded."""
    folder = entry()
    evil = b"def launch(x):\n    return 'evil'\n"
    meta = json.loads((folder / "meta.json").read_text())
    meta["files"]["kernel.py"] = meta["ingredients"]["text_sha256"] = cache.fingerprint.sha256(evil)
    (folder / "kernel.py").write_bytes(evil)
    (folder / "meta.json").write_text(json.dumps(meta))
    assert load.load(ToySpec(), "counting").launch(0) == (64, "a", 0)


CHILD = """
import os, sys, time
import runtime_toy
runtime_toy.install()
from tilewright.runtime import cache, load

def stop(where):
    if where == os.environ.get("TOY_STOP"):
        open(os.environ["TOY_MARK"], "w").close()
        time.sleep(600)

write_file, sync = cache.write_file, cache._sync
def stopping_write(path, data):
    if path.name == os.environ.get("TOY_STOP", "").removeprefix("half of "):
        write_file(path, data[: len(data) // 2])
        stop("half of " + path.name)
    write_file(path, data)
    stop(path.name)
def stopping_sync(path):
    sync(path)
    if path.name == "kernels":
        stop("renamed")
cache.write_file, cache._sync = stopping_write, stopping_sync
kernel = load.load(runtime_toy.ToySpec(), "counting")
print(kernel.launch(7))
"""


def wait_for(path: Path, child: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert child.poll() is None, f"the child ended with {child.returncode}"
        assert time.monotonic() < deadline, "the child never reached the point to be killed at"
        time.sleep(0.01)


@pytest.mark.parametrize(
    "point", ["half of kernel.py", "kernel.py", "spec.json", "half of meta.json", "meta.json", "renamed"]
)
def test_a_killed_builder_leaves_nothing_that_loads(point, fresh_cache, tmp_path):
    mark = tmp_path / "mark"
    extra = {"TOY_STOP": point, "TOY_MARK": str(mark), "TOY_LOG": os.environ["TOY_LOG"]}
    child = subprocess.Popen([sys.executable, "-c", CHILD], env=runtime_toy.environment(fresh_cache, **extra))
    try:
        wait_for(mark, child)
        if point != "renamed":
            assert load.try_load(ToySpec(), "counting") is None
            assert len(list((fresh_cache / "building").iterdir())) == 1
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    before = builds(tmp_path)
    if point == "renamed":  # the entry was complete: it is used, and nobody builds again
        assert load.load(ToySpec(), "counting").launch(7) == (64, "a", 7)
        assert builds(tmp_path) == before == 1
    else:
        assert load.try_load(ToySpec(), "counting") is None
        assert load.load(ToySpec(), "counting").launch(7) == (64, "a", 7)
        assert builds(tmp_path) == before + 1
    assert [state.problem for state in cache.verify()] == [None]
    assert not list((fresh_cache / "building").iterdir())


def test_what_killed_builders_of_other_kernels_left_is_swept(fresh_cache, tmp_path):
    store = cache.Store(fresh_cache)
    store.prepare()
    left = store.building / ("0" * 32 + ".1234abcd")
    left.mkdir()
    (left / "kernel.py").write_text("half")
    with store.lock("f" * 32, timeout=1):
        busy = store.building / ("f" * 32 + ".1234abcd")
        busy.mkdir()
        entry()
        assert not left.exists()  # nobody holds its lock
        assert busy.exists()  # its builder lives


def test_eight_processes_build_once(fresh_cache, tmp_path):
    extra = {"TOY_SECONDS": "0.5", "TOY_LOG": os.environ["TOY_LOG"]}
    environment = runtime_toy.environment(fresh_cache, **extra)
    command = [sys.executable, "-c", CHILD]
    children = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    results = [child.communicate(timeout=120) for child in children]
    assert [out.strip() for out, _ in results] == ["(64, 'a', 7)"] * 8, results
    assert builds(tmp_path) == 1
    assert [state.problem for state in cache.verify()] == [None]


def test_a_builder_that_fails_leaves_nothing(fresh_cache):
    store = cache.Store(fresh_cache)
    store.prepare()
    name = cache.short(load._order(ToySpec(note="broken"), "counting").digest)
    (store.building / f"{name}.1234abcd").mkdir()  # a builder before it was killed
    with pytest.raises(errors.BuildError, match="found the note broken"):
        load.load(ToySpec(note="broken"), "counting")
    assert not list((fresh_cache / "kernels").iterdir())
    assert not list((fresh_cache / "building").iterdir())


# A folder that cannot be used. The tests may run as root, whom permissions do not stop.


def failing(monkeypatch, root: Path, code: int, after: int = 0) -> None:
    """Every write below ``root`` fails with that errno, after so many that worked."""
    real, count = cache.write_file, 0

    def write_file(path, data):
        nonlocal count
        count += 1
        if path.is_relative_to(root) and count > after:
            path.write_bytes(data[:3])  # a full disk takes a part first
            raise OSError(code, os.strerror(code), str(path))
        real(path, data)

    monkeypatch.setattr(cache, "write_file", write_file)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("after", [0, 2])
def test_a_disk_that_fails_is_announced_once(monkeypatch, fresh_cache, code, after):
    failing(monkeypatch, fresh_cache, code, after)
    with pytest.warns(errors.TilewrightWarning, match="cannot be used.*TILEWRIGHT_CACHE_DIR") as said:
        first = load.load(ToySpec(), "counting")
        second = load.load(ToySpec(note="b"), "counting")
    assert [str(warning.message).count(os.strerror(code)) for warning in said] == [1]
    assert first.launch(1) == (64, "a", 1) and second.launch(1) == (64, "b", 1)
    assert not first.path.is_relative_to(fresh_cache)
    assert not list((fresh_cache / "kernels").iterdir())
    assert not list((fresh_cache / "building").iterdir())


def test_two_threads_that_fail_differently_announce_once(tmp_path):
    with pytest.warns(errors.TilewrightWarning) as said:
        first = cache.abandon(tmp_path, "No space left on device (a)")
        assert cache.abandon(tmp_path, "Read-only file system (b)") == first
    assert len(said) == 1


def test_a_cache_below_a_file_is_announced(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with settings.override(cache_dir=tmp_path / "file" / "cache"):
        with pytest.warns(errors.TilewrightWarning, match="cannot be used"):
            kernel = load.load(ToySpec(), "counting")
        assert kernel.launch(1) == (64, "a", 1)
        assert not cache.status().writable
        assert cache.verify() == []


def test_a_read_only_cache_is_still_read(monkeypatch, fresh_cache, tmp_path):
    built = entry()
    failing(monkeypatch, fresh_cache, errno.EROFS)
    kernel = load.load(ToySpec(), "counting")  # a warning here is not expected, and none is needed
    assert kernel.path.parent == built and builds(tmp_path) == 1


def test_others_must_not_be_able_to_put_code_into_the_cache(fresh_cache):
    entry()
    (fresh_cache / "kernels").chmod(0o777)
    load.forget()
    with pytest.warns(errors.TilewrightWarning, match="other users may write to it"):
        kernel = load.load(ToySpec(note="b"), "counting")
    assert not kernel.path.is_relative_to(fresh_cache)


def test_nowhere_to_write_is_a_typed_error(monkeypatch, fresh_cache):
    failing(monkeypatch, Path("/"), errno.ENOSPC)
    with (
        pytest.warns(errors.TilewrightWarning),
        pytest.raises(errors.CacheError, match="neither .* can be written.*free some space"),
    ):
        load.load(ToySpec(), "counting")


def test_no_temporary_folder_is_a_typed_error(monkeypatch, fresh_cache):
    failing(monkeypatch, Path("/"), errno.ENOSPC)

    def mkdtemp(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache.tempfile, "mkdtemp", mkdtemp)
    with pytest.raises(errors.CacheError, match="no temporary folder can be made"):
        load.load(ToySpec(), "counting")


def test_a_real_write_failure(fresh_cache, tmp_path):
    """The kernel itself refuses to write more than 16 bytes into a file: no simulation."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (16, 16))\n"
        "import warnings; warnings.simplefilter('ignore')\n"
        "import runtime_toy; runtime_toy.install()\n"
        "from tilewright.runtime import load, errors\n"
        "try:\n    load.load(runtime_toy.ToySpec(), 'counting')\n"
        "except errors.CacheError as error:\n    print('CacheError', error)\n"
    )
    environment = runtime_toy.environment(fresh_cache, PYTHONDONTWRITEBYTECODE="1")
    environment.pop("TOY_LOG")
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert run.stdout.startswith("CacheError neither"), run.stderr
    assert os.strerror(errno.EFBIG) in run.stdout
    assert not list((fresh_cache / "kernels").iterdir())


def test_a_hung_builder_is_not_waited_for_for_ever(fresh_cache):
    store = cache.Store(fresh_cache)
    store.prepare()
    name = cache.short(load._order(ToySpec(), "counting").digest)
    with store.lock(name, timeout=1), settings.override(lock_seconds=0.1):
        with pytest.warns(errors.TilewrightWarning, match="another process has been building"):
            kernel = load.load(ToySpec(), "counting")
    assert kernel.launch(1) == (64, "a", 1)


def test_the_private_folder_goes_with_its_process(tmp_path):
    (tmp_path / "file").write_text("")
    code = (
        "import runtime_toy; runtime_toy.install()\n"
        "from tilewright.runtime import load\n"
        "print(load.load(runtime_toy.ToySpec(), 'counting').path)\n"
    )
    environment = runtime_toy.environment(tmp_path / "file" / "cache")
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("TilewrightWarning") == 1
    folder = Path(run.stdout.strip()).parent.parent.parent
    assert folder.name.startswith("tilewright-") and not folder.exists()


def test_status_counts(fresh_cache):
    assert cache.status() == cache.CacheStatus(str(fresh_cache), exists=False, writable=True, entries=0, bytes=0)
    load.build(ToySpec(), "counting")
    load.build(ToySpec(note="b"), "counting")
    load.build(ToySpec(), "triton-interpret")
    status = cache.status()
    assert (status.entries, status.by_kind, status.by_target) == (3, {"toy": 3}, {"counting": 2, "triton-interpret": 1})
    assert status.bytes == sum(path.stat().st_size for path in (fresh_cache / "kernels").rglob("*") if path.is_file())
    assert status.exists and status.writable and status.unreadable == 0 and status.unfinished == 0


def test_looking_at_a_cache_that_is_not_there_makes_nothing(tmp_path):
    root = tmp_path / "never"
    with settings.override(cache_dir=root):
        assert not load.is_built(ToySpec(), "counting")
        assert load.try_load(ToySpec(), "counting") is None
        assert cache.verify() == []
        assert cache.status().writable
        assert cache.clear().entries == 0
        assert not root.exists()


def test_clear_removes_everything_but_what_is_being_built(fresh_cache):
    kernel = load.load(ToySpec(), "counting")
    busy = load.build(ToySpec(note="b"), "counting")
    with cache.Store(fresh_cache).lock(busy.name, timeout=1):
        cleared = cache.clear()
    assert cleared.entries == 1 and cleared.bytes > 0
    assert [line.partition(":")[0] for line in cleared.kept] == [busy.name]
    assert [state.name for state in cache.verify()] == [busy.name]
    assert kernel.launch(2) == (64, "a", 2)  # loaded kernels keep working
    load.forget()
    assert load.load(ToySpec(), "counting").launch(2) == (64, "a", 2)


def test_clear_only_damaged():
    good, bad = entry(), load.build(ToySpec(note="b"), "counting")
    (bad / "kernel.py").write_text("")
    assert cache.clear(only_damaged=True).entries == 1
    assert [state.name for state in cache.verify()] == [good.name]
