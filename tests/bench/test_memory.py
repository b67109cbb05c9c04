"""The first call by itself, peaks of known tensors and of readings we choose, limits of containers."""

from __future__ import annotations

import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from stepdistill.bench import memory
from stepdistill.bench.memory import Peak, available_memory, first_call, free_cached, peak_memory

CPU = torch.device("cpu")
MB = 2**20


def block(megabytes: int) -> Tensor:
    return torch.ones(megabytes * MB, dtype=torch.uint8)


def test_only_the_first_call_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 0.0, "queued": 0.0}

    def synchronise() -> None:
        clock["now"] += clock["queued"]
        clock["queued"] = 0.0

    monkeypatch.setattr(time, "perf_counter", lambda: clock["now"])
    monkeypatch.setattr(memory, "synchronise", synchronise)
    costs = iter([5.0, 1.0, 1.0])

    def make() -> Callable[[], None]:
        clock["queued"] += 100.0  # loading
        return lambda: clock.update(queued=clock["queued"] + next(costs))

    assert first_call(make) == 5.0
    assert next(costs) == 1.0


def test_peak_of_a_tensor_that_is_returned() -> None:
    peak = peak_memory(lambda: block(64), CPU)
    assert not peak.exact
    assert 0.95 * 64 * MB < peak.rise < 1.5 * 64 * MB
    assert peak.before > 64 * MB  # torch itself


def test_peak_of_a_tensor_that_is_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    used, reads = memory._used, threading.Semaphore(0)

    def read(device: torch.device) -> int:
        value = used(device)
        reads.release()
        return value

    def call() -> None:
        kept = block(64)
        while reads.acquire(blocking=False):
            pass
        for _ in range(2):  # the second of these began with the tensor there
            assert reads.acquire(timeout=20)
        del kept

    monkeypatch.setattr(memory, "_used", read)
    assert 0.95 * 64 * MB < peak_memory(call, CPU).rise < 1.5 * 64 * MB


@pytest.mark.skipif(sys.platform != "linux", reason="how glibc keeps memory")
def test_a_second_call_needs_as_much_as_the_first() -> None:
    def call() -> list[Tensor]:
        result = [torch.ones(2**14) for _ in range(1024)]  # 64 MB that come from the heap
        keep.append(torch.ones(2**14))  # above them, so that the heap can't simply shrink when they are gone
        return result

    keep: list[Tensor] = []
    for _ in range(2):
        assert peak_memory(call, CPU).rise > 0.8 * 64 * MB


class Readings:
    """Memory in use as a test wants it read; `seen` is set when a wanted value was read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.value, self.wanted, self.seen = 10, -1, threading.Event()
        monkeypatch.setattr(memory, "_used", self.read)

    def read(self, _device: torch.device) -> int:
        value = self.value
        if value == self.wanted:
            self.seen.set()
        return value


def test_what_lives_inside_the_call_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = Readings(monkeypatch)

    def call() -> None:
        readings.value = readings.wanted = 100
        assert readings.seen.wait(20)
        readings.value = 20
        time.sleep(3 * memory.INTERVAL)  # lower readings don't replace a high one

    assert peak_memory(call, CPU) == Peak(before=10, peak=100, exact=False)


def test_the_result_is_held_until_the_last_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = Readings(monkeypatch)
    monkeypatch.setattr(memory, "INTERVAL", 1000.0)

    class Result:
        pass

    def call() -> Result:
        result = Result()
        readings.value = 50
        weakref.finalize(result, setattr, readings, "value", 10)
        return result

    assert peak_memory(call, CPU) == Peak(before=10, peak=50, exact=False)
    assert readings.value == 10


def test_the_thread_ends_with_the_call() -> None:
    def call() -> None:
        assert "memory" in [thread.name for thread in threading.enumerate()]
        raise KeyError("x")

    with pytest.raises(KeyError):
        peak_memory(call, CPU)
    assert "memory" not in [thread.name for thread in threading.enumerate()]


GROUPS = {
    # v2: the group's own limit leaves 600, its parent's 500 + 50 of cache
    "v2": (
        "0::/jobs/one\n",
        {
            "jobs/one/memory.max": "1000",
            "jobs/one/memory.current": "400",
            "jobs/one/memory.stat": "anon 1\ninactive_file 0\n",
            "jobs/memory.max": "2000",
            "jobs/memory.current": "1500",
            "jobs/memory.stat": "inactive_file 50\n",
            "memory.stat": "inactive_file 0\n",
        },
        [600, 550],
    ),
    "no limit": ("0::/\n", {"memory.max": "max", "memory.current": "4", "memory.stat": "inactive_file 0\n"}, []),
    "over the limit": (
        "0::/\n",
        {"memory.max": "10", "memory.current": "14", "memory.stat": "inactive_file 1\n"},
        [0],
    ),
    # v1 in a container: named by the host's path, mounted as its own root
    "v1": (
        "5:cpu,cpuacct:/docker/ab\n4:memory:/docker/ab\n0::/\n",
        {
            "memory/memory.limit_in_bytes": "1000",
            "memory/memory.usage_in_bytes": "700",
            "memory/memory.stat": "inactive_file 5\ntotal_inactive_file 100\n",
        },
        [400],
    ),
}


@pytest.mark.parametrize("case", GROUPS)
def test_limits_of_containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    own, files, expected = GROUPS[case]
    (tmp_path / "self").write_text(own)
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory, "_OWN_CGROUPS", tmp_path / "self")
    assert list(memory._cgroups_free()) == expected
    if expected:
        assert available_memory(CPU) == min(expected)
    monkeypatch.setattr(memory, "_OWN_CGROUPS", tmp_path / "missing")
    assert 0 < available_memory(CPU) <= psutil.virtual_memory().total


def test_this_machine() -> None:
    free_cached()
    free_cached(CPU)
    assert available_memory() > 0 and 0 < available_memory(CPU) <= psutil.virtual_memory().total
