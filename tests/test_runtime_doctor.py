"""What the doctor finds, and the remedy for what it does not."""

from __future__ import annotations

import json
import sys

import pytest

from tilewright.runtime import compilers, doctor, errors, settings
from tilewright.runtime.doctor import State


@pytest.fixture(autouse=True)
def one_cache(fresh_cache):
    pass


def fact(name: str) -> doctor.Fact:
    return next(check(name) for known, check in doctor._CHECKS if known == name)


def test_a_whole_examination():
    heard = []
    found = doctor.examine(heard.append)
    assert heard == list(found.facts) and len(heard) == len(doctor._CHECKS)
    by_name = {item.name: item for item in found.facts}
    assert found.ok
    for name in ("python", "torch", "triton", "interpreter", "cross-compilation", "cache"):
        assert by_name[name].state is State.OK, by_name[name]
    for item in found.facts:
        assert item.remedy or item.state is State.OK  # whatever does not work has a remedy
    assert json.loads(json.dumps(found.to_dict()))["ok"] is True


def test_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(errors.MissingCompiler, match="g\\+\\+: not found.*CXX"):
        compilers.find_cxx()
    found = fact("C++ compiler")
    assert found.state is State.LIMITED and "CXX" in found.found


def test_a_compiler_that_does_not_compile(monkeypatch, tmp_path):
    fake = tmp_path / "fake-g++"
    fake.write_text("#!/bin/sh\n[ $1 = --version ] && echo fake 1.0 && exit 0\necho 'no omp.h' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    assert compilers.find_cxx() == compilers.Compiler((str(fake),), "fake 1.0")
    found = fact("C++ compiler")
    assert found.state is State.LIMITED and "no omp.h" in found.found and found.remedy
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(errors.MissingCompiler, match="no-such-compiler -O2: not found"):
        compilers.find_cxx()


def test_a_package_that_is_missing_or_old(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert fact("triton").state is State.LIMITED and "pip install triton" in fact("triton").remedy
    monkeypatch.undo()
    import torch

    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    found = fact("torch")
    assert found.state is State.BROKEN and "2.11" in found.found and "torch>=2.11" in found.remedy
    monkeypatch.setattr(torch, "__version__", "2.11.0a0+git123")
    assert fact("torch").state is State.OK


def test_a_wrong_result_of_the_interpreter_is_noticed(monkeypatch):
    monkeypatch.setattr(doctor, "_PROBE", doctor._PROBE.replace("tl.sum(row, 0)", "tl.max(row, 0)"))
    assert fact("interpreter").state is State.BROKEN


def test_settings(monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_NO_BUILD", "1")
    assert "TILEWRIGHT_NO_BUILD" in fact("settings").remedy
    monkeypatch.setenv("TILEWRIGHT_NO_BUILD", "maybe")
    assert fact("settings").state is State.BROKEN
    monkeypatch.delenv("TILEWRIGHT_NO_BUILD")
    monkeypatch.setenv("TILEWRIGHT_CACHEDIR", "/x")
    assert "TILEWRIGHT_CACHEDIR is set and means nothing" in fact("settings").found


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with settings.override(cache_dir=tmp_path / "file" / "cache"):
        found = fact("cache")
    assert found.state is State.LIMITED and "TILEWRIGHT_CACHE_DIR" in found.remedy


def test_a_check_that_fails_is_a_finding(monkeypatch):
    def broken(name):
        raise OSError("libcudart.so not found")

    monkeypatch.setattr(doctor, "_CHECKS", (("torch", broken),))
    found = doctor.examine()
    assert not found.ok and "libcudart.so" in found.facts[0].found and found.facts[0].remedy
