"""How long calls take and how often a network really runs.

Configurations are timed in turns, not one after the other, so that a machine that warms up, slows down or is shared treats
them all alike; the accelerator is synchronised on both sides; raw values are kept, because a mean hides the tail.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def synchronise() -> None:
    """Waits until the accelerator, if there is one, has done all its work."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def measure(
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    after_call: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each call, `repeats` of them by name, in the order in which they were taken.

    Every call first runs `warmup` times untimed (same shapes, same steps: give calls that are ready to run). Then each round
    times each call once, starting with another one every round, so that none always follows the same neighbour. `after_call`
    runs after each call, warm-up too, and is not timed.

    Raises ValueError for no calls, repeats < 1 or warmup < 0.
    """
    if not calls or repeats < 1 or warmup < 0:
        raise ValueError(f"expected calls, repeats >= 1 and warmup >= 0, got {list(calls)}, {repeats} and {warmup}")
    for call in calls.values():
        for _ in range(warmup):
            call()
            after_call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            synchronise()
            start = time.perf_counter()
            calls[name]()
            synchronise()
            seconds[name].append(time.perf_counter() - start)
            after_call()
    return seconds


@dataclass(frozen=True)
class Timing:
    """One cell at one batch size.

    Attributes:
        batch_size: images a call.
        seconds: of each call, raw, in the order in which they were taken.
    """

    batch_size: int
    seconds: tuple[float, ...]

    @property
    def per_image(self) -> tuple[float, ...]:
        """Seconds an image of each call."""
        return tuple(value / self.batch_size for value in self.seconds)


def latency_pass(
    cells: Mapping[str, Callable[[int], object]],
    batch_sizes: Sequence[int],
    repeats: int,
    warmup: int = 1,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> dict[tuple[str, int], Timing]:
    """Times all cells at each batch size, in turns as `measure` does; (cell, batch size) -> timing.

    One pass over everything, redone whole rather than continued: values from two sittings are not comparable.

    Args:
        cells: name -> call that makes one batch of so many images.
        batch_sizes: sizes that fit, one after the other, as a large batch would disturb its small neighbours.
        repeats, warmup: calls a cell and size, timed and not.
        progress: gets (calls done, calls in all) after each, warm-up calls too.

    Raises ValueError for no cells, no sizes or one below 1, repeats < 1 or warmup < 0.
    """
    sizes = list(dict.fromkeys(batch_sizes))
    if not cells or not sizes or min(sizes) < 1:
        raise ValueError(f"expected cells and batch sizes >= 1, got {list(cells)} and {sizes}")
    total, done = len(cells) * len(sizes) * (repeats + warmup), 0

    def count() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    timings: dict[tuple[str, int], Timing] = {}
    for size in sizes:
        calls = {name: partial(cell, size) for name, cell in cells.items()}
        for name, seconds in measure(calls, repeats, warmup, count).items():
            timings[name, size] = Timing(size, tuple(seconds))
    return timings


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """The 50th, 90th and 99th percentile as p50, p90, p99; ValueError for no values."""
    if not len(seconds):
        raise ValueError("expected at least one measurement, got none")
    return {f"p{q}": float(np.percentile(seconds, q)) for q in (50, 90, 99)}


@dataclass
class Evaluations:
    """What `count_evaluations` counts.

    Attributes:
        calls: forwards of the module.
        samples: batch rows over all of them. Guidance that stacks two conditions doubles these, not the calls.
    """

    calls: int = 0
    samples: int = 0


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The batch of a forward: that of its first tensor with dimensions."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim:
            return len(value)
    return 0


@contextmanager
def count_evaluations(module: nn.Module) -> Iterator[Evaluations]:
    """Counts the forwards of `module` inside the block, by a hook: what ran, not what a scheduler was asked for."""
    counter = Evaluations()

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        counter.calls += 1
        counter.samples += _rows(args, kwargs)

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield counter
    finally:
        handle.remove()
