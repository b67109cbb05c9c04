"""Turns, warm-up and percentiles of the timer; evaluations counted by what ran."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

from stepdistill.bench.latency import count_evaluations, measure, summary


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
