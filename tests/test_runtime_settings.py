"""Settings: read from the environment, checked, overridden for a while."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tilewright.runtime import announce, errors, settings


def test_defaults():
    found = settings.from_environment({})
    assert found.cache_dir == settings.default_cache_dir()
    assert (found.no_build, found.autotune, found.announce) == (False, False, True)
    assert found.build_jobs >= 1


def test_every_variable_is_read(tmp_path):
    given = {
        "TILEWRIGHT_CACHE_DIR": str(tmp_path / "x"),
        "TILEWRIGHT_NO_BUILD": "yes",
        "TILEWRIGHT_AUTOTUNE": "1",
        "TILEWRIGHT_AUTOTUNE_SECONDS": "0.5",
        "TILEWRIGHT_ANNOUNCE": "off",
        "TILEWRIGHT_BUILD_JOBS": "3",
        "TILEWRIGHT_LOCK_SECONDS": "7",
        "TILEWRIGHT_CPU_ISA": "avx2",
        "TILEWRIGHT_POOL_LIMIT": "4096",
        "TILEWRIGHT_FAST_CALLS": "no",
    }
    assert settings.from_environment(given) == settings.Settings(
        cache_dir=tmp_path / "x",
        no_build=True,
        autotune=True,
        autotune_seconds=0.5,
        announce=False,
        build_jobs=3,
        lock_seconds=7.0,
        cpu_isa="avx2",
        pool_limit=4096,
        fast_calls=False,
    )
    # Every field has its variable: a new field without one fails here.
    assert len(given) == len(dataclasses.fields(settings.Settings))


def test_home_and_relative_folders_are_resolved():
    assert settings.from_environment({"TILEWRIGHT_CACHE_DIR": "~/kernels"}).cache_dir == Path.home() / "kernels"
    assert settings.from_environment({"TILEWRIGHT_CACHE_DIR": "kernels"}).cache_dir == Path.cwd() / "kernels"


def test_empty_means_unset():
    assert settings.from_environment({"TILEWRIGHT_CACHE_DIR": "", "TILEWRIGHT_NO_BUILD": " "}) == (
        settings.from_environment({})
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NO_BUILD", "perhaps"),
        ("AUTOTUNE", "2"),
        ("AUTOTUNE_SECONDS", "soon"),
        ("AUTOTUNE_SECONDS", "0"),
        ("AUTOTUNE_SECONDS", "nan"),
        ("LOCK_SECONDS", "-1"),
        ("LOCK_SECONDS", "inf"),
        ("BUILD_JOBS", "0"),
        ("BUILD_JOBS", "1.5"),
        ("BUILD_JOBS", "inf"),
    ],
)
def test_nonsense_is_refused_with_the_variable_named(name, value):
    with pytest.raises(errors.BadArgument, match=f"TILEWRIGHT_{name}"):
        settings.from_environment({f"TILEWRIGHT_{name}": value})


def test_override_nests_and_restores(tmp_path):
    before = settings.get()
    with settings.override(no_build=True):
        with settings.override(cache_dir=tmp_path):
            assert settings.get().no_build and settings.get().cache_dir == tmp_path
        assert settings.get().cache_dir == before.cache_dir
    assert settings.get() is before
    with pytest.raises(ZeroDivisionError), settings.override(no_build=True):
        raise ZeroDivisionError
    assert settings.get() is before


def test_override_checks(tmp_path):
    with pytest.raises(errors.BadArgument, match="'chache_dir'"), settings.override(chache_dir=tmp_path):
        pass
    with pytest.raises(errors.BadArgument, match="BUILD_JOBS"), settings.override(build_jobs=0):
        pass
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.get().no_build = True


def test_announced_once_and_only_when_wanted():
    announce.forget()
    with settings.override(announce=False):
        assert not announce.announce("a toy fallback")
    with pytest.warns(errors.TilewrightWarning, match="a toy fallback"):
        assert announce.announce("a toy fallback")
    assert not announce.announce("a toy fallback")  # a warning here would be an error by the suite's filters or noise
    announce.forget()
