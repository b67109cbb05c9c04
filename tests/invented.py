"""Results of a sweep that never ran: two students and a teacher, plausible numbers, everything that a report can show."""

from __future__ import annotations

from typing import Any

import numpy as np

from stepdistill.bench.environment import environment
from stepdistill.bench.features import Images
from stepdistill.bench.rows import TEACHER, Cell, Quality, Results, Speed, Value

N = 1200
FLOOR, SPREAD = 2.1, 0.12
MAIN = Cell(TEACHER, 50, 2.0)
DISTANCES = {
    (TEACHER, 2.0): {50: 3.6, 8: 4.1, 4: 6.2, 2: 24.0, 1: 403.0},
    (TEACHER, 1.0): {50: 9.8, 8: 11.5, 4: 16.0, 2: 61.0, 1: 380.0},
    ("lcm", 1.0): {8: 3.7, 4: 3.65, 2: 5.4, 1: 19.0},
    ("progressive", 1.0): {8: 3.9, 4: 4.6, 2: 6.9, 1: 12.5},
}


def _span(value: float, half: float) -> Value:
    return Value(value, (value - half, value + half))


def _values(distance: float, teacher: float) -> dict[str, Value]:
    worse = np.log(distance / FLOOR)
    right = float(np.exp(-worse * 0.55))
    return {
        "fd": _span(distance, 0.05 * distance + 0.05),
        "kid": Value(0.002 * (distance - FLOOR)),
        "recall": Value(max(0.05, 0.93 - 0.14 * worse)),
        "coverage": Value(max(0.05, 0.95 - 0.16 * worse)),
        "diversity": Value(4.1 - 0.5 * worse),
        "clip_score": _span(31.0 - worse, 0.25),
        "rms_to_teacher": _span(0.02 + 0.05 * abs(distance - teacher) ** 0.5, 0.004),
        "accuracy": _span(right, 0.02),
        "accuracy/shape": Value(right**0.3),
        "accuracy/colour": Value(right**0.5),
    }


def _speed(cell: Cell, batch: int) -> Speed:
    each = 2 if cell.guidance > 1 else 1
    draws = np.random.default_rng([cell.steps, each, batch, len(cell.model)])
    text, rest, decode, denoiser = 0.006 * each, 0.004, 0.05 * batch, 0.021 * each * cell.steps * (0.3 + 0.7 * batch)
    scatter = 1 + 0.02 * draws.random((12, 5))
    stages = {"text": text, "denoiser": denoiser, "decode": decode, "rest": rest}
    return Speed(
        cell=cell,
        batch_size=batch,
        seconds=tuple(float(x) for x in (text + rest + decode + denoiser) * scatter[:, 0]),
        stages={
            name: tuple(float(x) for x in seconds * scatter[:3, i]) for i, (name, seconds) in enumerate(stages.items())
        },
        evaluations=float(each * cell.steps),
        first_call=1.9 + denoiser,
        peak_memory=int(4e8 + 3e7 * batch),
    )


def invented(**changes: Any) -> Results:
    """All at N = 1200; lcm is as good as its teacher from 4 steps on, progressive at 8, the teacher alone never."""
    quality, speed = [], []
    for (model, guidance), distances in DISTANCES.items():
        for steps, distance in distances.items():
            cell = Cell(model, steps, guidance)
            difference = distance - DISTANCES[TEACHER, 2.0][50]
            against = None if cell == MAIN else _span(difference, 0.18 + 0.04 * difference)
            evaluations = float(steps * (2 if guidance > 1 else 1))
            quality.append(Quality(cell, N, evaluations, _values(distance, 3.6), against))
            speed += [_speed(cell, 1), _speed(cell, 4)]
    real = {"value": FLOOR, "interval": [FLOOR - 1.96 * SPREAD, FLOOR + 1.96 * SPREAD]}
    scores = {"kid": 0.0, "recall": 0.95, "coverage": 0.97, "diversity": 4.3, "accuracy": 1.0}
    facts: dict[str, Any] = {
        "protocol": {
            "features": {"name": "demo judge", "hash": "6a1f00c2", "dim": 96},
            "seeds": {"noise": 0, "bootstrap": 0},
            "prompts": {"source": "prompts.txt", "count": N, "hash": "09ab12ef"},
            "reference": {"source": "held-out images of the demo world", "count": 20_000},
            "real": {str(N): {"fd": real, **{k: {"value": v, "interval": None} for k, v in scores.items()}}},
            "bootstrap": "300 resamples, the same prompts drawn for all",
        },
        "speed": sorted(speed, key=lambda s: s.batch_size),
        "teacher": MAIN,
        "samples": {MAIN.slug: {"accuracy": [0.0, 1.0, 1.0]}},
        "environment": environment(),
        "notes": ["Text encoder and autoencoder are the teacher's for both students."],
    }
    return Results(quality, **{**facts, **changes})


def pictures(results: Results, prompts: int = 8, size: int = 64) -> dict[Cell, Images]:
    """A few images a cell: soft blobs in colours of the prompt, noisier at fewer steps."""
    y, x = np.mgrid[0:size, 0:size] / size
    found = {}
    for row in results.quality:
        draws = np.random.default_rng(7)
        images = []
        for _ in range(prompts):
            ground, colour, (cx, cy) = draws.random(3) * 120, draws.random(3) * 255, 0.3 + 0.4 * draws.random(2)
            blob = 1 / (1 + np.exp(40 * (np.hypot(x - cx, y - cy) - 0.22)))
            image = ground * (1 - blob[..., None]) + colour * blob[..., None]
            image = image + np.random.default_rng(row.cell.steps).normal(0, 90 / row.cell.steps, (size, size, 3))
            images.append(np.clip(image, 0, 255).astype(np.uint8))
        found[row.cell] = np.stack(images)
    return found
