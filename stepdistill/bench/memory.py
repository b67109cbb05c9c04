"""The first call, the memory a call takes, and the batch sizes that fit.

CUDA's and XPU's allocators keep their own peak, which is exact. Elsewhere memory is shared with the whole machine: the peak
is the largest of many readings taken while the call runs, an estimate that misses what lives shorter than the gap between two;
and a batch that doesn't fit is not refused but swapped or killed, so that it must not be tried at all.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # a dependency of accelerate and peft
import torch

from ..errors import InputError
from .latency import synchronise

OWN_MEMORY = ("cuda", "xpu")  # devices whose allocator counts, and refuses what it doesn't have
INTERVAL = 0.002  # seconds between two readings
SHARE = 0.8  # of the free memory that a batch may be expected to take
_REFUSALS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")  # of plain RuntimeErrors
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def first_call(make: Callable[[], Callable[[], object]]) -> float:
    """Seconds of the very first call: compiling, choosing kernels and growing pools, which later calls find done.

    `make` loads what is needed and returns the call; it is not timed. What an earlier model in the same process has warmed
    up, this one finds warm: only the first call of a fresh process is cold in everything.
    """
    call = make()
    synchronise()
    start = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Peak:
    """Memory around a call, in bytes.

    Attributes:
        before: in use before it: on CUDA and XPU by tensors (weights, whatever else is loaded), on the CPU by the process.
        peak: the most while it ran.
        exact: counted by the allocator (max_memory_allocated), not sampled.
    """

    before: int
    peak: int
    exact: bool

    @property
    def rise(self) -> int:
        """What the call itself took."""
        return self.peak - self.before


def _device(device: torch.device | None) -> torch.device:
    """The one given, or the accelerator, or the CPU."""
    if device is not None:
        return device
    return (torch.accelerator.is_available() and torch.accelerator.current_accelerator()) or torch.device("cpu")


def free_cached(device: torch.device | None = None) -> None:
    """Gives back what is held without being used: garbage, and the allocator's pools.

    On Linux glibc keeps freed memory in the process; unless it is returned, a call seems to need nothing after a larger one.
    """
    device = _device(device)
    gc.collect()
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()
    if sys.platform == "linux":
        with suppress(AttributeError):  # musl has no such function
            ctypes.CDLL(None).malloc_trim(0)


def _used(device: torch.device) -> int:
    """Bytes in use now where memory is shared: Metal's allocations, or the resident memory of the process."""
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return int(psutil.Process().memory_info().rss)


def peak_memory(call: Callable[[], object], device: torch.device | None = None) -> Peak:
    """Runs `call` and tells what it took; warm up first, or the peak holds what is loaded once as well.

    Args:
        call: what it returns counts as its memory.
        device: where it runs; by default the accelerator, without one the CPU.
    """
    device = _device(device)
    free_cached(device)
    if device.type in OWN_MEMORY:
        counters = torch.get_device_module(device)
        counters.reset_peak_memory_stats(device)
        before = counters.memory_allocated(device)
        call()
        return Peak(before, counters.max_memory_allocated(device), exact=True)
    with _sampling(partial(_used, device)) as readings:
        before = readings[0]
        kept = call()  # held until the last reading
    del kept
    return Peak(before, max(readings), exact=False)


@contextmanager
def _sampling(read: Callable[[], int]) -> Iterator[list[int]]:
    """A list that holds a reading from before the block, the highest from inside it and, on leaving, one from its end."""
    readings = [first := read(), first]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(INTERVAL):
            readings[1] = max(readings[1], read())

    thread = threading.Thread(target=watch, name="memory", daemon=True)
    thread.start()
    try:
        yield readings
        readings.append(read())
    finally:
        done.set()
        thread.join()


def available_memory(device: torch.device | None = None) -> int:
    """Bytes that can still be taken without swapping: the device's, or the machine's within the limits of its container."""
    device = _device(device)
    if device.type in OWN_MEMORY:
        memory = torch.get_device_module(device)
        unused = memory.memory_reserved(device) - memory.memory_allocated(device)  # in the allocator's own pool
        return int(memory.mem_get_info(device)[0] + unused)
    return min([int(psutil.virtual_memory().available), *_cgroups_free()])


def _cgroups_free() -> Iterator[int]:
    """What the control groups (v2 and v1) that this process is in leave it; none outside Linux or without a limit.

    File cache that the kernel can drop doesn't count as used.
    """
    if not _OWN_CGROUPS.is_file():
        return
    for line in _OWN_CGROUPS.read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, usage, cache = _CGROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, usage = _CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):  # a group's limit binds all below it
            # the root has no limit, others say "max", and a container doesn't see all that it is named
            with suppress(OSError, ValueError, KeyError):
                stat = dict(row.split() for row in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
                used = int((group / usage).read_text(encoding="utf-8")) - int(stat[cache])
                yield max(int((group / limit).read_text(encoding="utf-8")) - used, 0)
            if group == root:
                break


@dataclass(frozen=True)
class BatchSizes:
    """What `batch_sizes_that_fit` found.

    Attributes:
        fit: sizes that ran, ascending.
        too_large: the first that didn't fit or wasn't tried; None if all fit.
        reason: why it is too large, in words; "" if all fit.
        peaks: size -> memory of the call at it.
    """

    fit: tuple[int, ...]
    too_large: int | None = None
    reason: str = ""
    peaks: dict[int, Peak] = field(default_factory=dict)


def batch_sizes_that_fit(
    sizes: Sequence[int], call: Callable[[int], object], device: torch.device | None = None, share: float = SHARE
) -> BatchSizes:
    """Runs `call(size)` at ascending sizes until one doesn't fit.

    Where the device has memory of its own, that is its out-of-memory error. Elsewhere (CPU, MPS) a size is not tried if what it
    should take, extrapolated from the peaks so far, is more than `share` of the memory that is free; the smallest size has no
    peaks before it and always runs. Memory is given back after each size.

    Args:
        sizes: batch sizes, in any order.
        call: runs one batch of a size, ready to run.
        device: where it runs; by default the accelerator, without one the CPU.
        share: in (0, 1].

    Raises:
        InputError: no sizes, or one below 1.
        ValueError: share outside (0, 1].
        RuntimeError: whatever else goes wrong in `call` is passed on.
    """
    if not sizes or min(sizes) < 1:
        raise InputError(f"--batch_sizes: expected one or more sizes >= 1, got {list(sizes)}; give some, e.g. 1,2,4")
    if not 0 < share <= 1:
        raise ValueError(f"expected a share in (0, 1], got {share}")
    device, peaks = _device(device), dict[int, Peak]()
    for size in sorted(set(sizes)):
        if device.type not in OWN_MEMORY and peaks:
            needed, free = expected_rise(peaks, size), available_memory(device)
            if needed > share * free:
                reason = f"not tried: would take about {needed / 1e9:.2g} GB of {free / 1e9:.2g} GB that are free"
                return BatchSizes(tuple(peaks), size, reason, peaks)
        peak = _attempt(partial(call, size), device)
        free_cached(device)  # here, where a failed call is gone, and before the next look at what is free
        if peak is None:
            return BatchSizes(tuple(peaks), size, "out of memory", peaks)
        peaks[size] = peak
    return BatchSizes(tuple(peaks), peaks=peaks)


def _attempt(call: Callable[[], Any], device: torch.device) -> Peak | None:
    """The call's memory; None if it ran out of it. The error dies here: its traceback holds the tensors of the failed call."""
    try:
        return peak_memory(call, device)
    except MemoryError:
        return None
    except RuntimeError as error:  # torch.OutOfMemoryError is one; CPU, MPS and libraries raise it bare
        if isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _REFUSALS):
            return None
        raise


def expected_rise(peaks: dict[int, Peak], size: int) -> float:
    """Bytes that a call at `size` should take: the higher of two straight lines, as sampled peaks err to the low side.

    One through the last two sizes measured, one from the origin through the last; ValueError for no peaks.
    """
    if not peaks:
        raise ValueError("expected the peak of one size or more, got none")
    *before, last = sorted(peaks)
    rise = peaks[last].rise
    proportional = rise * size / last
    if not before:
        return proportional
    slope = (rise - peaks[before[-1]].rise) / (last - before[-1])
    return max(proportional, rise + slope * (size - last))
