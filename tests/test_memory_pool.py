"""The memory pool: blocks come back, nothing else is touched, growth is bounded; threads, forks and exits are safe."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tilewright.codegen.native import MemoryPoolSpec
from tilewright.runtime import errors, load, memory, settings
from tilewright.runtime.native import NativeModule

MIB = 2**20
HUGE = 2 * MIB


_outside = memory.Statistics()


@pytest.fixture(autouse=True)
def ready():
    """The pool is empty but for what other modules' tests keep alive (a cached module's packed weights, say)."""
    global _outside
    if not memory.prepare():
        pytest.skip(f"the pool cannot be built here: {memory._module.problem}")
    gc.collect()
    memory.release()
    _outside = memory.statistics()
    yield
    gc.collect()
    assert used() == 0, "a test left a tensor behind, or a block never came back"


def used() -> int:
    """Blocks that this test uses."""
    return memory.statistics().used_blocks - _outside.used_blocks


def big(mib: int = 4) -> torch.Tensor:
    return memory.empty((mib, MIB // 4), torch.float32)


def taken(before: memory.Statistics) -> int:
    """Requests the pool has served since."""
    now = memory.statistics()
    return now.reused + now.mapped - before.reused - before.mapped


def test_a_big_output_is_a_plain_tensor_from_the_pool():
    before = memory.statistics()
    x = memory.empty((3, 5, MIB), torch.bfloat16)
    assert taken(before) == 1
    assert (x.shape, x.stride(), x.dtype, x.device.type) == ((3, 5, MIB), (5 * MIB, MIB, 1), torch.bfloat16, "cpu")
    assert x.data_ptr() % HUGE == 0
    x.fill_(2)
    assert x.sum(dtype=torch.float64).item() == 2 * x.numel()
    assert memory.statistics().used_bytes >= x.nbytes


@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 0, 5), (MIB // 4 - 1,), torch.Size([2, 2]), [3, 4]])
def test_a_small_output_is_not(shape):
    before = memory.statistics()
    x = memory.empty(shape, torch.float32)
    assert x.shape == torch.Size(shape) and x.is_contiguous()
    assert taken(before) == 0


def test_outputs_do_not_follow_the_default_device_or_dtype():
    with torch.device("meta"):
        assert memory.empty((2, 2), torch.float32).device.type == "cpu"
        assert big().device.type == "cpu"


def test_a_block_is_used_again():
    x = big()
    address = x.data_ptr()
    del x
    kept = memory.statistics()
    assert kept.free_blocks == 1
    y = big()
    assert y.data_ptr() == address
    assert memory.statistics().mapped == kept.mapped


def test_steady_state_maps_nothing_and_does_not_grow():
    def step() -> None:
        x = big(8).fill_(1)
        with memory.pool():
            ((x + 1) * 2).sum()

    for _ in range(20):
        step()
    before, resident = memory.statistics(), resident_bytes()
    for _ in range(1000):
        step()
    assert memory.statistics().mapped == before.mapped
    assert resident_bytes() - resident < 8 * MIB


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("hold", [lambda x: x.numpy(), lambda x: x[1:, ::2], lambda x: x.untyped_storage(), memoryview])
def test_whatever_shows_the_memory_keeps_it(hold):
    x = big()
    x.fill_(7)
    kept = hold(x.numpy() if hold is memoryview else x)
    del x
    assert used() == 1
    other = big()
    other.zero_()
    seen = torch.frombuffer(kept, dtype=torch.float32) if isinstance(kept, memoryview) else kept
    if isinstance(kept, torch.UntypedStorage):
        seen = torch.empty(0).set_(kept)
    assert numpy.asarray(seen).min() == 7
    del kept, seen
    assert used() == 1


def test_a_context_serves_every_operator_and_nothing_outside():
    a = torch.ones(HUGE)
    before = memory.statistics()
    with memory.pool():
        b = a + 1
        with memory.pool():
            c = torch.empty_strided((MIB, 2), (1, MIB))
        d = b * 2
        small = torch.ones(8)
    assert taken(before) == 3
    e = a + 1
    assert taken(before) == 3
    assert torch.equal(b, e) and d.sum() == 4 * HUGE and small.sum() == 8
    del b, c, d
    e = a + 1
    assert taken(before) == 3 and memory.statistics().free_blocks == 3


def test_a_context_ends_with_an_exception():
    before = memory.statistics()
    with pytest.raises(ZeroDivisionError), memory.pool():
        1 / 0  # noqa: B018
    torch.ones(HUGE)
    assert taken(before) == 0


def test_a_compiled_graph_can_be_wrapped():
    run = memory.pooled(lambda x, *, add: (x + add) * 2)
    before = memory.statistics()
    assert run(torch.ones(HUGE), add=1).sum() == 4 * HUGE
    assert taken(before) == 2
    with pytest.raises(TypeError):
        run()
    torch.ones(HUGE)
    assert taken(before) == 2


def test_a_context_is_of_its_thread_alone():
    inside, done = threading.Event(), threading.Event()
    served = []

    def other() -> None:
        inside.wait()
        before = memory.statistics()
        torch.ones(HUGE)
        served.append(taken(before))
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with memory.pool():
        inside.set()
        done.wait()
    thread.join()
    assert served == [0]


def test_a_block_comes_back_on_any_thread_after_the_context():
    with memory.pool():
        held = [torch.ones(HUGE) for _ in range(3)]
    threads = [threading.Thread(target=lambda: held.pop()) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert used() == 0 and memory.statistics().free_blocks == 3


def test_resizing_and_sharing_work():
    x = big(4).fill_(3)
    x.resize_(9, MIB // 4)
    assert x[:4].min() == 3 and x.numel() == 9 * MIB // 4
    x.untyped_storage().resize_(0)
    assert used() == 0
    y = big(4).fill_(5)
    y.share_memory_()
    assert y.is_shared() and y.min() == 5 and used() == 0
    z = big(4).fill_(6)
    w = torch._lazy_clone(z)
    w += 1
    assert z.max() == 6 and w.min() == 7
    assert torch.equal(z.clone(), z)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")
def test_onednn_may_return_memory_at_any_time():
    """It takes addresses from torch's allocator and hands them to the one that is in place when it is done."""
    x = torch.randn(1024, 1024)
    outside = x.to_mkldnn()
    with memory.pool():
        packed = x.to_mkldnn()
        product = x.bfloat16() @ x.bfloat16()
        del outside
    small = torch.ones(8)
    assert torch.equal(packed.to_dense(), x)
    del packed
    torch.testing.assert_close(product.float(), x @ x, atol=1.5, rtol=0.05)
    del product
    gc.collect()
    assert used() == 0 and small.sum() == 8
    again = x.to_mkldnn()
    assert used() == 0 and torch.equal(again.to_dense(), x)


def test_the_limit_bounds_what_is_kept_and_the_longest_idle_go_first():
    with settings.override(pool_limit=12 * MIB):
        assert memory.statistics().limit == 12 * MIB
        sizes = [big(mib) for mib in (4, 6, 8)]
        addresses = [x.data_ptr() for x in sizes]
        while sizes:
            sizes.pop(0)
        assert memory.statistics().free_bytes <= 12 * MIB
        assert big(8).data_ptr() == addresses[2]
    with settings.override(pool_limit=0):
        assert memory.statistics().free_blocks == 0
        x = big()
        del x
        assert memory.statistics().free_bytes == 0


def test_a_block_that_nobody_wants_is_returned():
    odd = big(64)
    del odd
    for _ in range(5000):
        big(2)
    assert memory.statistics().free_bytes < 64 * MIB


def test_a_much_smaller_tensor_does_not_take_a_large_block():
    x = big(64)
    del x
    y = big(4)
    assert memory.statistics().used_bytes - _outside.used_bytes < 8 * MIB
    assert y.numel()


def test_release_gives_memory_back_to_the_system():
    x = big(64).fill_(1)
    del x
    resident = resident_bytes()
    assert memory.release() >= 64 * MIB
    assert memory.release() == 0
    assert resident - resident_bytes() > 48 * MIB


def test_impossible_requests_raise_as_ever():
    with pytest.raises(RuntimeError):
        memory.empty((2**50,), torch.float32)
    with pytest.raises(RuntimeError), memory.pool():
        torch.empty(2**50)
    with pytest.raises(RuntimeError):
        memory.empty((-1, MIB * 8), torch.float32)


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=30))
def test_live_tensors_never_overlap(steps):
    """Model: every live tensor still holds the number it was filled with."""
    live: list[torch.Tensor] = []
    for number, (mib, drop) in enumerate(steps):
        if drop and live:
            live.pop(len(live) // 2)
        live.append(big(mib).fill_(number))
        assert all(x[0, 0] == x[-1, -1] == x.min() for x in live)
    spans = sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in live)
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
    assert used() == len(live)


def test_many_threads_at_once():
    wrong: list[str] = []

    def work(seed: int) -> None:
        for step in range(60):
            x = memory.empty((1 + (seed + step) % 3, MIB // 2), torch.float32).fill_(seed)
            with memory.pool():
                y = x + 1
            if x.min() != seed or y.max() != seed + 1:
                wrong.append(f"thread {seed}, step {step}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    before = memory.statistics()
    torch.ones(HUGE)
    assert taken(before) == 0, "the allocator stayed registered"


def run_python(text: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TILEWRIGHT_CACHE_DIR": str(settings.get().cache_dir)}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(text)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_fork_inside_a_context_and_beside_busy_threads():
    done = run_python("""
        import os, threading, torch
        from tilewright.runtime import memory
        torch.set_num_threads(1)
        stop = threading.Event()
        def busy():
            while not stop.is_set():
                memory.empty((2**20,), torch.float32)
        threads = [threading.Thread(target=busy, daemon=True) for _ in range(2)]
        memory.prepare()
        spare = memory.empty((2**22,), torch.float32); del spare
        [t.start() for t in threads]
        for attempt in range(20):
            with memory.pool():
                held = torch.ones(2**20)
                child = os.fork()
                if child == 0:
                    x = torch.ones(2**20) + held
                    ok = x.min().item() == 2
            if child == 0:
                before = memory.statistics()
                torch.ones(2**20)
                now = memory.statistics()
                ok = ok and now.reused + now.mapped == before.reused + before.mapped
                memory.empty((2**20,), torch.float32).fill_(1)
                os._exit(0 if ok else 3)
            assert os.waitpid(child, 0)[1] == 0, attempt
            assert held.min().item() == 1
        stop.set(); [t.join() for t in threads]
        print("fine")
    """)
    assert (done.stdout.strip(), done.returncode) == ("fine", 0), done.stderr


def test_the_interpreter_ends_with_tensors_alive():
    done = run_python("""
        import threading, time, torch
        from tilewright.runtime import memory
        held = memory.empty((2**22,), torch.float32).fill_(1)
        memory.prepare()
        more = [memory.empty((2**22,), torch.float32) for _ in range(3)]
        torch.kept_for_ever = more[0].numpy()
        context = memory.pool(); context.__enter__()
        def loop():
            # It rests before the end: Python 3.11 unwinds a daemon thread that is inside torch
            # then, and torch itself aborts on that (torch.empty in a loop does), pool or not.
            for _ in range(100): mine = memory.empty((2**20,), torch.float32)
            allocated.set()
            time.sleep(3600)
        allocated = threading.Event()
        threading.Thread(target=loop, daemon=True).start()
        allocated.wait()
        print("fine")
    """)
    assert (done.stdout.strip(), done.returncode) == ("fine", 0), done.stderr


def test_the_profiler_sees_pooled_memory():
    with torch.profiler.profile(profile_memory=True) as profile, memory.pool():
        x = torch.ones(HUGE)
    del x
    assert sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages()) >= 4 * HUGE


# Without the pool.


def another(monkeypatch: pytest.MonkeyPatch) -> NativeModule[memory.Functions]:
    """The module as a new process finds it."""
    module = NativeModule(MemoryPoolSpec(), memory._open, "big outputs are allocated afresh")
    monkeypatch.setattr(memory, "_module", module)
    return module


def test_a_forbidden_build_is_announced_once_and_torch_serves(fresh_cache, monkeypatch):
    with settings.override(no_build=True):
        another(monkeypatch)
        with pytest.warns(errors.TilewrightWarning, match="TILEWRIGHT_NO_BUILD"), memory.pool():
            x = torch.ones(HUGE)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            y = big()
            with memory.pool():
                y = y.fill_(1) + x[: y.numel()].view_as(y)
        assert y.max() == 2 and memory.statistics() == memory.Statistics() and memory.release() == 0
        assert not memory.prepare() and memory.allocator() == 0


def test_no_compiler_is_no_error(fresh_cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    another(monkeypatch)
    with pytest.warns(errors.TilewrightWarning, match="no C\\+\\+ compiler"):
        assert not memory.prepare()
    assert big().numel() == MIB


def test_an_output_does_not_wait_for_the_build(fresh_cache, monkeypatch):
    module = another(monkeypatch)
    release = threading.Event()
    load_now = load.load

    def slow(*args):
        release.wait(60)
        return load_now(*args)

    monkeypatch.setattr(load, "load", slow)
    x = big().fill_(1)
    assert module.made is None and module._builder is not None
    assert module.get(start=False) is None
    release.set()
    deadline = time.monotonic() + 60
    while module.made is None and module.problem is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert module.made is not None, module.problem
    y = big()
    assert y.data_ptr() % HUGE == 0 and x.min() == 1
    assert memory.statistics().used_blocks == 1  # of the other pool


def test_a_module_that_is_not_asked_to_start_looks_once(fresh_cache, monkeypatch):
    module = another(monkeypatch)
    looked = []
    monkeypatch.setattr(load, "try_load", lambda *a: looked.append(a))
    assert [module.get(start=False) for _ in range(3)] == [None] * 3
    assert len(looked) == 1 and module._builder is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="huge pages are asked for on Linux")
def test_zeros_that_stay_ask_for_huge_pages() -> None:
    small, big = memory.lasting_zeros((3, 5), torch.bfloat16), memory.lasting_zeros((2**20, 3), torch.float32)
    assert small.shape == (3, 5) and small.dtype == torch.bfloat16
    assert not small.any() and not big.any()
    flags, inside = "", False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= big.data_ptr() + 2**21 < int(match[2], 16)
        elif inside and line.startswith("VmFlags:"):
            flags = line
    assert " hg" in flags
