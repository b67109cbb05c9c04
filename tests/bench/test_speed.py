"""The latency pass of a sweep: what is timed at which size, and what is kept of it."""

from __future__ import annotations

from typing import Any

import pytest
from sweeping import jobs_of, small_plan

from stepdistill.bench import speed as module
from stepdistill.bench.contenders import Contender
from stepdistill.bench.memory import BatchSizes, Peak
from stepdistill.bench.plan import Plan
from stepdistill.bench.rows import Cell
from stepdistill.bench.speed import speeds


def test_each_cell_at_each_size(teacher: Contender) -> None:
    jobs, words = jobs_of([teacher]), list[str]()
    found, notes = speeds(jobs, small_plan(), (2, 1, 2), repeats=4, progress=words.append)
    assert not notes and len(words) == 4
    assert [(s.cell.steps, s.batch_size) for s in found] == [(2, 1), (2, 2), (1, 1), (1, 2)]
    parts = (teacher.pipe.unet, teacher.pipe.vae, teacher.pipe.text_encoder)
    weights = sum(p.numel() * 4 for part in parts for p in part.parameters())
    for speed in found:
        assert len(speed.seconds) == 4 and min(speed.seconds) > 0
        assert set(speed.stages) == {"text", "denoiser", "decode", "rest"}
        assert all(len(values) == 3 for values in speed.stages.values()) and min(speed.stages["denoiser"]) > 0
        assert speed.evaluations == 2 * speed.cell.steps
        assert (speed.first_call is not None) == (speed.batch_size == 1)
        assert speed.peak_memory is not None and weights <= speed.peak_memory < weights + 2e9


def test_calls_are_the_cells_own_and_take_turns(teacher: Contender, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    original = Contender.images

    def images(self: Contender, cell: Cell, prompts: Any, plan: Plan, start: int = 0) -> Any:
        calls.append((cell.steps, len(prompts)))
        assert list(prompts) == [plan.prompts[i % len(plan.prompts)] for i in range(len(prompts))]
        return original(self, cell, prompts, plan, start)

    monkeypatch.setattr(Contender, "images", images)
    speeds(jobs_of([teacher]), small_plan(), (1, 12), repeats=2)
    first = [(2, 1), (2, 1), (2, 12), (1, 1), (1, 1), (1, 12)]  # the first call, then the sizes that fit
    turns = [(2, 1), (1, 1), (2, 1), (1, 1), (1, 1), (2, 1)]  # warm-up, and two rounds
    parts = [(2, 1)] * 2 + [(1, 1)] * 2
    assert calls[:16] == first + turns + parts
    assert {size for _, size in calls[16:]} == {12}


def test_a_cell_that_fits_at_no_size(teacher: Contender, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are timed all the same; what is no lack of memory is no note."""
    original, text = Contender.images, ["can't allocate memory"]

    def images(self: Contender, cell: Cell, *rest: Any) -> Any:
        if cell.steps == 2:
            raise RuntimeError(text[0])
        return original(self, cell, *rest)

    monkeypatch.setattr(Contender, "images", images)
    found, notes = speeds(jobs_of([teacher]), small_plan(), (1,), repeats=1)
    assert [(s.cell.steps, s.batch_size) for s in found] == [(1, 1)]
    assert notes == ["teacher, 2 steps, guidance 3: batches of 1 out of memory."]
    text[0] = "shapes don't match"
    with pytest.raises(RuntimeError, match="shapes"):
        speeds(jobs_of([teacher]), small_plan(), (1,), repeats=1)


def test_sizes_that_dont_fit_are_noted(teacher: Contender, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {1: Peak(0, 10, True)}

    def fit(sizes: Any, call: Any) -> BatchSizes:
        steps = call.args[0].steps
        return (
            BatchSizes((1,), 2, "out of memory", peaks)
            if steps == 2
            else BatchSizes((1, 2), peaks={**peaks, 2: peaks[1]})
        )

    monkeypatch.setattr(module, "batch_sizes_that_fit", fit)
    found, notes = speeds(jobs_of([teacher]), small_plan(), (1, 2), repeats=1)
    assert [(s.cell.steps, s.batch_size) for s in found] == [(2, 1), (1, 1), (1, 2)]
    assert notes == ["teacher, 2 steps, guidance 3: batches of 2 out of memory."]
