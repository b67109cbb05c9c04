"""Steps against quality where the truth is known: writes benchmarks/results/steps_vs_quality.json.

The teacher is the perfect network of N(2, 0.3^2) on Stable Diffusion's noise table. What N steps of DDIM make of N(0, 1) is a
Gaussian too, so its distance from the data is a formula, and so is what a perfect student scores in one step. Three columns:
the formula; what the harness says of samples by Diffusers' own scheduler, from noise whose moments are exact; and what it says
of a few thousand random samples, many times over: how often its interval of the difference to the teacher at 50 steps holds
the true difference, and how often it finds one. No weights, two minutes: python benchmarks/steps_vs_quality.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.config import CommaList, Parsed, run
from stepdistill.errors import InputError

MEAN, STD = 2.0, 0.3
PERFECT = "perfect student"
Map = Callable[[Tensor], Tensor]
Key = tuple[str, int]  # model and steps


@dataclass
class Benchmark:
    """DDIM on a Gaussian, exactly and as the harness sees it.

    Attributes:
        steps: of the teacher, beside the perfect student's one; the first is what the others are held against.
        images: random samples of a row.
        repeats: rows of each, from noise of their own; 0 for none.
        output: the results file.
    """

    steps: CommaList = field(default_factory=lambda: CommaList.parse("50,25,8,4,2,1"))
    images: CommaList = field(default_factory=lambda: CommaList.parse("100,500,2000"))
    repeats: int = 200
    output: str = str(Path(__file__).parent / "results" / "steps_vs_quality.json")

    def __post_init__(self) -> None:
        counts = [*self.steps.ints(), *self.images.ints()]
        if len(self.steps) < 2 or not self.images or min(counts) < 1 or self.repeats < 0 or min(self.images.ints()) < 5:
            raise InputError(
                f"expected two --steps or more, --images of at least 5 and no negative --repeats, got {self}"
            )


@dataclass(frozen=True)
class Row:
    """One model at one number of steps.

    Attributes:
        model, steps: which.
        exact: squared Wasserstein distance to the data, by the formula.
        measured: the harness's Frechet distance of samples by the stock scheduler, from noise of exact moments.
        noisy: number of random samples -> what the harness said of them.
    """

    model: str
    steps: int
    exact: float
    measured: float
    noisy: dict[str, dict[str, float]]


def table() -> Tensor:
    """Stable Diffusion's alphas_cumprod, [1000] float64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1.0 - betas).cumprod(0)


def teacher() -> Any:
    """The perfect eps network of the data."""
    from stepdistill.diffusion.schedule import Tabulated
    from stepdistill.families.analytic import Gaussian

    return Gaussian(MEAN, STD, Tabulated(table()))


def exact(model: Any, steps: int | None) -> tuple[float, float]:
    """Mean and standard deviation of the samples, by the formula; None for the perfect student's single step."""
    times = [torch.tensor([1.0 - i / (steps or 1)], dtype=torch.float64) for i in range(steps or 1)]
    end = (
        torch.zeros(1, dtype=torch.float64) if steps is None else model.schedule.time(torch.zeros(1))
    )  # abar[0], as DDIM
    if steps is None:
        gain = (model.variance(end) / model.variance(times[0])).sqrt()
    else:  # TRAPS: product of k(t -> u) = (a_u a_t s^2 + s_u s_t) / v_t
        gain = torch.ones(1, dtype=torch.float64)
        for t, s in zip(times, [*times[1:], end], strict=True):
            gain = gain * model.ddim_multiplier(t, s)
    mean = model.schedule.alpha(end) * MEAN - gain * model.schedule.alpha(times[0]) * MEAN
    return float(mean), float(gain.abs())


def wasserstein(mean: float, std: float) -> float:
    """Squared, of N(mean, std^2) to the data."""
    return (mean - MEAN) ** 2 + (std - STD) ** 2


def stock(model: Any, steps: int) -> Map:
    """What `steps` steps of Diffusers' DDIMScheduler make of noise [N, 1]."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        timestep_spacing="trailing",
    )  # fmt: skip
    scheduler.alphas_cumprod = table()  # in float64, as the formula has it
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(steps)

    def sampled(x: Tensor) -> Tensor:
        for index in scheduler.timesteps:
            t = model.schedule.time(index.double().expand(len(x)))
            x = scheduler.step(model(x, t, {}).eps, index, x).prev_sample
        return x

    return sampled


def perfect(model: Any) -> Map:
    """The end of the exact ODE, in one step."""
    return lambda x: model.exact_map(
        x, torch.ones(len(x), dtype=torch.float64), torch.zeros(len(x), dtype=torch.float64)
    )


def even_noise(n: int) -> Tensor:
    """[n, 1]: quantiles of N(0, 1), scaled so that mean and variance are exact."""
    x = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    return ((x - x.mean()) / x.std())[:, None]


def moments() -> tuple[Tensor, Tensor]:
    """Of the data."""
    return torch.tensor([MEAN], dtype=torch.float64), torch.tensor([[STD**2]], dtype=torch.float64)


def harness(seed: int) -> Any:
    """What the harness measures with: it knows the data's moments, and compares numbers as they are."""
    from stepdistill.bench.quality import Measure
    from stepdistill.bench.reference import Reference

    real = (MEAN + STD * even_noise(200)).float()
    return Measure(Reference(*moments(), features=real, held=real[:0], about={"count": 10**9}), seed)


def verdict(found: Any, true: float) -> tuple[bool, bool]:
    """Whether the interval of a difference holds the true one, and whether it finds a difference."""
    low, high = found.against.interval
    return low <= true <= high, not low <= 0 <= high


def repeated(maps: dict[Key, Map], truth: dict[Key, float], n: int, repeats: int) -> dict[Key, dict[str, float]]:
    """Of each row but the first: how often the interval holds the true difference, and how often it finds one."""
    from stepdistill.bench.rows import Cell
    from stepdistill.bench.samples import Samples
    from stepdistill.randomness import generator

    first, *others = maps
    said: dict[Key, list[tuple[bool, bool]]] = {key: [] for key in others}
    for seed in range(repeats):
        noise = torch.from_numpy(generator(seed, "benchmarks/steps_vs_quality").standard_normal((n, 1)))
        made = {key: Samples(one(noise), None, {}, None, key[1]) for key, one in maps.items()}
        measure = harness(seed)
        for key in others:
            (row,) = measure.rows(Cell(*key, 1.0), made[key], [n], teacher=made[first])
            said[key].append(verdict(row, truth[key] - truth[first]))
    return {
        key: {"holds the truth": sum(h for h, _ in found) / repeats, "told apart": sum(d for _, d in found) / repeats}
        for key, found in said.items()
    }


def rows(options: Benchmark) -> Iterator[Row]:
    """All rows: the teacher's, then the perfect student's."""
    from stepdistill.bench.metrics import frechet_to

    model, distance = teacher(), frechet_to(*moments())
    maps: dict[Key, Map] = {("teacher", k): stock(model, k) for k in options.steps.ints()}
    maps[PERFECT, 1] = perfect(model)
    truth = {key: wasserstein(*exact(model, None if key[0] == PERFECT else key[1])) for key in maps}
    noisy: dict[str, Any] = {}
    if options.repeats:
        noisy = {str(n): repeated(maps, truth, n, options.repeats) for n in options.images.ints()}
    for key, one in maps.items():
        measured = distance(one(even_noise(10_000)))
        yield Row(*key, truth[key], measured, {n: found[key] for n, found in noisy.items() if key in found})


def main(parsed: Parsed[Benchmark]) -> None:
    """Measures, writes, prints."""
    from stepdistill.bench.environment import environment
    from stepdistill.bench.table import aligned

    options, found = parsed.recipe, list(rows(parsed.recipe))
    asked = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(options).items() if name != "output"}
    protocol = {
        **asked,
        "data": f"N({MEAN:g}, {STD:g}^2)",
        "interval": "95 % bootstrap of the difference to the first row",
    }
    data = {"protocol": protocol, "environment": environment(), "rows": [asdict(row) for row in found]}
    Path(options.output).write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print("\n".join(aligned(*spelled(found))))
    print(f"written to {options.output}")


def spelled(found: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and cells of a table for people."""
    sizes = list(dict.fromkeys(n for row in found for n in row.noisy))
    head = ["model", "steps", "formula", "harness"]
    head += [f"{what}, N = {n}" for n in sizes for what in ("interval right", "told apart")]
    cells = [
        [row.model, str(row.steps), f"{row.exact:.4f}", f"{row.measured:.4f}"]
        + [f"{value:.1%}" for n in sizes for value in row.noisy.get(n, {}).values()]
        for row in found
    ]
    return head, [line + [""] * (len(head) - len(line)) for line in cells]


if __name__ == "__main__":
    run(Benchmark, main, __doc__)
