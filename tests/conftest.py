"""What every test shares: the interpreter switch, a private kernel cache, few threads, hypothesis profiles, markers."""

from __future__ import annotations

import os
import shutil
import tempfile

# Before anything imports triton: the standard library of the language (tl.sum, tl.max ...) is interpretable only then.
os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
_cache_root = tempfile.mkdtemp(prefix="tilewright-tests-")
os.environ["TILEWRIGHT_CACHE_DIR"] = os.path.join(_cache_root, "cache")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck  # noqa: E402
from hypothesis import settings as hypothesis_settings  # noqa: E402

torch.set_num_threads(min(2, int(os.environ["OMP_NUM_THREADS"])))

_common = {"deadline": None, "max_examples": 25, "suppress_health_check": [HealthCheck.too_slow]}
hypothesis_settings.register_profile("default", **_common)
hypothesis_settings.register_profile("ci", derandomize=True, **_common)
hypothesis_settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than about ten seconds; `-m 'not slow'` leaves it out")
    # Triton 3.9 says once per process that a default will change; which test happens to be first is no matter.
    config.addinivalue_line("filterwarnings", "ignore:TRITON_DEFAULT_FP_FUSION is unset")
    config.addinivalue_line("markers", "grid: the rest of a large grid, of which `make test` runs a part")
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped with the reason where there is none")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        # Row kernels have no AMX instructions, and AVX2 is the same text with shorter vectors.
        isa = getattr(item, "callspec", None) and item.callspec.params.get("cpu_isa")
        if isa in ("amx", "avx2") and getattr(item, "module", None) and hasattr(item.module, "ROW_KERNELS"):
            item.add_marker(pytest.mark.grid)
        # Where every spec is a kernel to build on each instruction set, it is built for two of them, in turn.
        in_turn = getattr(getattr(item, "module", None), "TWO_IN_TURN", ())
        given = item.callspec.params if in_turn and hasattr(item, "callspec") else {}
        if given.get("name") in in_turn and "isa" in given:
            place = in_turn.index(given["name"]) + ("amx", "avx512", "avx2", "baseline").index(given["isa"])
            if place % 2:
                item.add_marker(pytest.mark.grid)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_sessionfinish(session: pytest.Session) -> None:
    shutil.rmtree(_cache_root, ignore_errors=True)


@pytest.fixture
def fresh_dynamo():
    """Dynamo forgets every compiled frame before and after the test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def fresh_cache(tmp_path):
    """An empty kernel cache for one test; loaded kernels are forgotten before and after. Yields its folder."""
    from tilewright.runtime import load, settings

    load.forget()
    with settings.override(cache_dir=tmp_path / "cache"):
        yield tmp_path / "cache"
    load.forget()


@pytest.fixture(autouse=True)
def fresh_announcements():
    """What is announced once per process is announced once per test."""
    from tilewright.runtime import announce

    announce.forget()


CPU_ISAS = ("amx", "avx512", "avx2", "baseline")


@pytest.fixture(params=CPU_ISAS)
def cpu_isa(request):
    """Native kernels built for each instruction set in turn; skips those that this CPU lacks. Yields its name."""
    from tilewright.runtime import cpu, load, settings

    if request.param not in cpu.supported():
        pytest.skip(f"this CPU has no {request.param}")
    load.forget()
    with settings.override(cpu_isa=request.param):
        yield request.param
    load.forget()
