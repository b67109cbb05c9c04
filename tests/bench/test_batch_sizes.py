"""Sizes that fit: until a device with memory of its own refuses, and short of what is free where memory is shared."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stepdistill.bench import memory
from stepdistill.bench.memory import (
    BatchSizes,
    Peak,
    available_memory,
    batch_sizes_that_fit,
    expected_rise,
    peak_memory,
)
from stepdistill.errors import InputError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MB = 2**20


def block(megabytes: int) -> Tensor:
    return torch.ones(megabytes * MB, dtype=torch.uint8)


class Counters:
    """torch.cuda's memory, played: 1000 bytes of weights."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allocated, self.peak, self.reserved, self.free, self.emptied = 1000, 9999, 1500, 3000, 0
        monkeypatch.setattr(torch, "get_device_module", lambda device: self)

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.peak = self.allocated

    def memory_allocated(self, device: torch.device) -> int:
        return self.allocated

    def max_memory_allocated(self, device: torch.device) -> int:
        return self.peak

    def memory_reserved(self, device: torch.device) -> int:
        return self.reserved

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return self.free, 80_000

    def empty_cache(self) -> None:
        self.emptied += 1

    def use(self, size: int) -> None:
        """What a call at this size does to the peak."""
        if size > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.peak = max(self.peak, self.allocated + 100 * size)


def test_an_allocator_that_counts_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    counters = Counters(monkeypatch)
    peak = peak_memory(lambda: counters.use(3), CUDA)
    assert peak == Peak(before=1000, peak=1300, exact=True)
    assert peak.rise == 300
    assert available_memory(CUDA) == 3500


def test_sizes_until_the_device_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    counters, tried = Counters(monkeypatch), []
    monkeypatch.setattr(memory, "available_memory", lambda device: 0)  # not asked: a refusal is cheap

    def call(size: int) -> None:
        tried.append(size)
        counters.use(size)

    found = batch_sizes_that_fit([8, 1, 4, 2, 16, 2], call, CUDA)
    assert tried == [1, 2, 4, 8]
    assert found == BatchSizes(
        fit=(1, 2, 4),
        too_large=8,
        reason="out of memory",
        peaks={n: Peak(1000, 1000 + 100 * n, True) for n in (1, 2, 4)},
    )
    assert batch_sizes_that_fit([1, 2], call, CUDA).too_large is None


def test_the_failed_call_is_gone_when_the_cache_is_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    counters, alive = Counters(monkeypatch), []

    def call(size: int) -> None:
        held = block(1)
        alive.append(weakref.ref(held))
        raise torch.OutOfMemoryError("CUDA out of memory")

    def empty_cache() -> None:
        emptied.append([ref() is not None for ref in alive])

    emptied: list[list[bool]] = []
    monkeypatch.setattr(counters, "empty_cache", empty_cache)
    assert batch_sizes_that_fit([1], call, CUDA).fit == ()
    assert emptied[-1] == [False]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_other_ways_to_say_out_of_memory(error: Exception) -> None:
    def call(size: int) -> None:
        if size == 2:
            raise error

    found = batch_sizes_that_fit([1, 2, 4], call, CPU)
    assert (found.fit, found.too_large, found.reason) == ((1,), 2, "out of memory")


def test_other_errors_are_passed_on() -> None:
    def call(size: int) -> None:
        raise RuntimeError("shapes don't match")

    with pytest.raises(RuntimeError, match="shapes don't match"):
        batch_sizes_that_fit([1], call, CPU)


def sizes_tried(monkeypatch: pytest.MonkeyPatch, rise: Callable[[int], int], free: int, **options: Any) -> Any:
    """(sizes that ran, what was found) where a size takes rise(size) bytes of `free`, and the machine is asked each time."""
    tried: list[int] = []

    def played(call: Callable[[], None], device: torch.device) -> Peak:
        call()
        return Peak(0, rise(tried[-1]), exact=False)

    monkeypatch.setattr(memory, "peak_memory", played)
    monkeypatch.setattr(memory, "free_cached", lambda device: None)
    monkeypatch.setattr(memory, "available_memory", lambda device: free)
    found = batch_sizes_that_fit([1, 2, 4, 8, 16], tried.append, CPU, **options)
    return tried, found


def test_shared_memory_is_never_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    tried, found = sizes_tried(monkeypatch, lambda n: n * 10**9, free=10**10 - 1)
    assert tried == [1, 2, 4]  # 8 GB would be just over 0.8 of what is free
    assert (found.fit, found.too_large) == ((1, 2, 4), 8)
    assert found.reason == "not tried: would take about 8 GB of 10 GB that are free"
    assert sizes_tried(monkeypatch, lambda n: n * 10**9, free=10**10)[0] == [1, 2, 4, 8]
    assert sizes_tried(monkeypatch, lambda n: n * 10**9, free=10**10, share=0.4)[0] == [1, 2, 4]
    assert sizes_tried(monkeypatch, lambda n: n * 10**9, free=10**12)[1].fit == (1, 2, 4, 8, 16)
    assert sizes_tried(monkeypatch, lambda n: n * 10**9, free=0)[0] == [1]


def test_real_tensors_stop_short_of_a_small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda device: 200 * MB)
    found = batch_sizes_that_fit([1, 2, 4, 8], lambda n: block(32 * n), CPU)
    assert (found.fit, found.too_large) == ((1, 2, 4), 8)
    assert [peak.rise / MB for peak in found.peaks.values()] == pytest.approx([32, 64, 128], rel=0.2)


def test_what_the_next_size_should_take() -> None:
    def peaks(**rises: int) -> dict[int, Peak]:
        return {int(name[1:]): Peak(7, 7 + rise, exact=False) for name, rise in rises.items()}

    assert expected_rise(peaks(n1=100), 4) == 400
    assert expected_rise(peaks(n1=100, n2=200), 4) == 400
    assert expected_rise(peaks(n4=900, n1=100, n2=200), 8) == 900 + 4 * 350  # steeper than through the origin
    assert expected_rise(peaks(n1=100, n2=110), 4) == 220  # an almost flat line is not believed
    with pytest.raises(ValueError, match="peak of one size"):
        expected_rise({}, 2)


@pytest.mark.parametrize("sizes", [[], [0, 1], [-1]])
def test_bad_sizes(sizes: list[int]) -> None:
    with pytest.raises(InputError, match="--batch_sizes"):
        batch_sizes_that_fit(sizes, lambda n: None)


@pytest.mark.parametrize("share", [0.0, 1.1])
def test_bad_shares(share: float) -> None:
    with pytest.raises(ValueError, match="share in"):
        batch_sizes_that_fit([1], lambda n: None, share=share)
