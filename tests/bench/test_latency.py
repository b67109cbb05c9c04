"""Turns, warm-up and percentiles of the timer; evaluations counted by what ran."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from stepdistill.bench import latency
from stepdistill.bench.latency import Timing, count_evaluations, latency_pass, measure, summary


def test_calls_are_warmed_up_and_take_turns() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds = measure(calls, repeats=4, warmup=2)
    assert "".join(order) == "aabbcc" + "abc" + "bca" + "cab" + "abc"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 4, "b": 4, "c": 4}
    assert all(value >= 0 for values in seconds.values() for value in values)


def test_seconds_are_seconds() -> None:
    seconds = measure({"slow": lambda: time.sleep(0.02), "quick": lambda: None}, repeats=3, warmup=0)
    assert min(seconds["slow"]) >= 0.02
    assert summary(seconds["quick"])["p50"] < 0.01


class Clock:
    """A clock that stands still, and a device whose work takes its time when it is waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.queued = 0.0, 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(latency, "synchronise", self.synchronise)

    def queue(self, seconds: float) -> None:
        self.queued += seconds

    def synchronise(self) -> None:
        self.now, self.queued = self.now + self.queued, 0.0

    def wait(self, seconds: float) -> None:
        self.now += seconds


def test_queued_work_belongs_to_its_call_and_what_follows_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, after = Clock(monkeypatch), []

    def after_call() -> None:
        after.append(clock.now)
        clock.wait(500.0)
        clock.queue(1000.0)  # left over when the next call starts

    calls = {"a": lambda: clock.queue(2.0), "b": lambda: clock.wait(3.0)}
    assert measure(calls, repeats=2, warmup=1, after_call=after_call) == {"a": [2.0, 2.0], "b": [3.0, 3.0]}
    assert len(after) == 6


def test_a_pass_interleaves_the_cells_within_each_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order, progress = Clock(monkeypatch), [], []

    def cell(name: str, seconds: float) -> Callable[[int], None]:
        def call(size: int) -> None:
            order.append(f"{name}{size}")
            clock.queue(1.0 + seconds * size)

        return call

    cells = {"a": cell("a", 2.0), "b": cell("b", 4.0)}
    timings = latency_pass(cells, [1, 4, 1], 2, 1, lambda done, total: progress.append((done, total)))
    assert "".join(order) == "a1b1" + "a1b1" + "b1a1" + "a4b4" + "a4b4" + "b4a4"
    assert timings == {
        ("a", 1): Timing(1, (3.0, 3.0)),
        ("b", 1): Timing(1, (5.0, 5.0)),
        ("a", 4): Timing(4, (9.0, 9.0)),
        ("b", 4): Timing(4, (17.0, 17.0)),
    }
    assert timings["b", 4].per_image == (4.25, 4.25)
    assert progress == [(i, 12) for i in range(1, 13)]


@pytest.mark.parametrize(("cells", "sizes"), [({}, [1]), ({"a": int}, []), ({"a": int}, [2, 0])])
def test_bad_passes(cells: dict[str, type], sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="expected cells and batch sizes"):
        latency_pass(cells, sizes, repeats=1)
    with pytest.raises(ValueError, match="repeats >= 1"):
        latency_pass({"a": int}, [1], repeats=0)


def test_summary_by_hand() -> None:
    assert summary([float(i) for i in range(101)]) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert summary([2.0]) == {"p50": 2.0, "p90": 2.0, "p99": 2.0}


@pytest.mark.parametrize(("calls", "repeats", "warmup"), [({}, 1, 1), ({"a": int}, 0, 1), ({"a": int}, 1, -1)])
def test_bad_measurements(calls: dict[str, type], repeats: int, warmup: int) -> None:
    with pytest.raises(ValueError, match="expected calls"):
        measure(calls, repeats, warmup)
    with pytest.raises(ValueError, match="at least one"):
        summary([])


class Net(nn.Module):
    def forward(self, sample: Tensor, t: Tensor | int, scale: float = 1.0) -> Tensor:
        if scale < 0:
            raise RuntimeError("negative")
        return sample * scale


def test_evaluations_are_counted_however_called() -> None:
    net = Net()
    with count_evaluations(net) as count:
        net(torch.zeros(3, 2), 5)
        net(sample=torch.zeros(4, 2), t=torch.tensor(1))
        net(t=torch.tensor(1), sample=torch.zeros(5, 2))
    net(torch.zeros(7, 2), 5)
    assert (count.calls, count.samples) == (3, 12)


def test_counter_is_gone_after_an_error() -> None:
    net = Net()
    with pytest.raises(RuntimeError, match="negative"), count_evaluations(net) as count:
        net(torch.zeros(3, 2), 5, scale=-1.0)
    net(torch.zeros(3, 2), 5)
    assert count.calls == 1
    assert not net._forward_pre_hooks
