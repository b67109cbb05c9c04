"""A student trained by LCM through the real Trainer ends at the fixed point that test_lcm.py knows in closed form."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from toys import MEAN, STD, options, sd_table

from stepdistill.batch import Batch
from stepdistill.diffusion.prediction import Kind
from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.families.analytic import Gaussian, LinearStudent
from stepdistill.methods.lcm import LCM, LCMConfig
from stepdistill.randomness import StepRandom
from stepdistill.training.trainer import Trainer


def linear(method_grid: Tensor, schedule: NoiseSchedule, kind: Kind = "x0") -> LinearStudent:
    student = LinearStudent(method_grid, schedule, kind)
    student.module.double()
    return student


def test_the_gradient_flows_through_the_jump_alone() -> None:
    schedule = sd_table()
    teacher = Gaussian(MEAN, STD, schedule, "x0")
    student = linear(LCM(LCMConfig(), teacher, teacher).grid, schedule).imitate(teacher)
    batch = Batch(torch.full((1, 3), 1.7, dtype=torch.float64), {}, {}, StepRandom(0, 3, [0]))
    LCM(LCMConfig(), student, teacher).training_step(batch).total.backward()
    moved = student.module.weight.grad.nonzero().flatten().tolist()
    k = int(batch.rng.integers("time", 0, 50))
    assert moved == [k], "the entry of the target must have no gradient"


class Rows:
    """Fresh samples of a Gaussian, in float64."""

    def __init__(self, mean: float, std: float) -> None:
        self.mean, self.std = mean, std

    def __len__(self) -> int:
        return 4096

    def batch(self, indices: Sequence[int], rng: StepRandom) -> Batch:
        noise = rng.normal("data", (32,), torch.float64)
        return Batch(self.mean + self.std * noise, {}, {}, rng)


def reached(
    folder: Path, data: tuple[float, float], points: int, kind: Kind, steps: int, lr: float, batch: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, width) of one-step samples from each grid point, [2, points]: trained, of the fixed point, at the start."""
    schedule = sd_table()
    teacher = Gaussian(*data, schedule, kind)
    config = LCMConfig(num_ddim_timesteps=points)
    grid = LCM(config, teacher, teacher).grid
    student = linear(grid, schedule, kind).imitate(teacher)  # as LoRA does, it starts as the teacher
    method = LCM(config, student, teacher)
    mean, width = (schedule.alpha(grid) * data[0])[:-1, None], teacher.variance(grid).sqrt()[:-1, None]

    @torch.no_grad()
    def moments() -> Tensor:
        low, high = (method.consistency(x, grid[:-1], student(x, grid[:-1], {})) for x in (mean - width, mean + width))
        return torch.cat([(low + high) / 2, (high - low) / 2], 1).T

    start = moments()
    train = options(
        max_train_steps=steps, learning_rate=lr, train_batch_size=batch, lr_scheduler="cosine", adam_weight_decay=0.0,
        adam_beta2=0.99, max_grad_norm=0.0, checkpointing_steps=10**6,
    )  # fmt: skip
    Trainer(train, folder).fit(method, Rows(*data))
    product = teacher.ddim_multiplier(grid[:-1], grid[1:]).flip(0).cumprod(0).flip(0)
    truth = torch.stack([(schedule.alpha(grid[-1:]) * data[0]).expand(points), product * width[:, 0]])
    return moments(), truth, start


def test_training_reaches_the_fixed_point_within_one_percent(tmp_path: Path) -> None:
    got, truth, start = reached(tmp_path, (MEAN, STD), points=5, kind="x0", steps=400, lr=0.03, batch=16)
    assert float((start[1] / truth[1]).min()) < 0.1, "it starts as the teacher, whose one step is a blur"
    assert_close(got, truth, rtol=0.01, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["x0", "eps", "v"])
def test_training_on_the_full_grid_reaches_the_fixed_point_within_one_percent(tmp_path: Path, kind: Kind) -> None:
    got, truth, start = reached(tmp_path, (1.0, STD), points=50, kind=kind, steps=6000, lr=0.005, batch=50)
    assert float((start[1] / truth[1]).min()) < 0.1
    assert_close(got, truth, rtol=0.01, atol=0)
