"""A ladder through the real Trainer ends at the fixed point that test_progressive.py knows in closed form."""

from pathlib import Path

import pytest
import torch
from ladders import Rows, config, ladder
from torch import Tensor, nn
from torch.testing import assert_close
from toys import EXACT, Numbers, options, rows, saved, sd_table, weights

from stepdistill.batch import Cond
from stepdistill.diffusion.prediction import Kind
from stepdistill.diffusion.schedule import Flow, NoiseSchedule
from stepdistill.diffusion.solver import sample
from stepdistill.families.analytic import Analytic, Gaussian, LinearStudent, Mixture
from stepdistill.methods.progressive import Progressive
from stepdistill.networks.denoiser import Denoiser
from stepdistill.training.trainer import Trainer

SCHEDULES: dict[str, NoiseSchedule] = {"table": sd_table(), "flow": Flow()}
TRAIN = {"adam_weight_decay": 0.0, "max_grad_norm": 0.0, "checkpointing_steps": 10**6, "lr_scheduler": "cosine"}


@pytest.mark.parametrize(("name", "kind"), [("table", "v"), ("flow", "flow")])
def test_the_whole_ladder_reaches_the_fixed_point_within_one_percent(tmp_path: Path, name: str, kind: Kind) -> None:
    schedule = SCHEDULES[name]
    mean, std = 1.0, 0.5
    teacher = Gaussian(mean, std, schedule, kind)
    student = LinearStudent(schedule.grid(8)[:-1], schedule, kind)
    student.module.double()
    method = Progressive(config((8, 4, 2, 1), 40), student.imitate(teacher), teacher)
    one = torch.ones(1, dtype=torch.float64)
    centre, width = schedule.alpha(one) * mean, teacher.variance(one).sqrt()

    @torch.no_grad()
    def moments(steps: int) -> Tensor:
        """(mean, width) of the student's samples: its map is affine, so two points tell all of it."""
        ends = sample(
            lambda x, t: student(x, t, {}), schedule, torch.cat([centre - width, centre + width]), schedule.grid(steps)
        )
        return torch.stack([ends.mean(), (ends[1] - ends[0]) / 2])

    product = teacher.ddim_multiplier(schedule.grid(40)[:-1], schedule.grid(40)[1:]).prod()
    truth = torch.cat([torch.full((1,), mean).double(), product * width])
    start, seen = moments(1), {}
    train = options(max_train_steps=100, learning_rate=0.05, adam_beta2=0.99, train_batch_size=16, **TRAIN)

    def on_round(_number: int) -> None:
        seen[method.steps] = moments(method.steps)

    Trainer(train, tmp_path).fit(method, Rows(lambda normal, _: mean + std * normal, width=16), on_round=on_round)
    assert list(seen) == [8, 4, 2, 1]
    assert float(start[1] / truth[1]) < 0.1, "one step of the teacher is a blur"
    for steps, got in seen.items():
        assert_close(got, truth, rtol=0.01, atol=0, msg=lambda m, n=steps: f"at {n} steps: {m}")


class Bumps(nn.Module):
    """A mix of bumps and a line in each element of x, another one at each time."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.centres = torch.linspace(-4.0, 4.0, 33, dtype=torch.float64)
        self.weight = nn.Parameter(torch.zeros(times, 35, dtype=torch.float64))

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        bumps = torch.exp(-8.0 * (x[..., None] - self.centres).square())
        features = torch.cat([bumps, x[..., None], torch.ones_like(x)[..., None]], -1)
        return torch.einsum("bwf,bf->bw", features, self.weight[index])


class Curve(Denoiser):
    """A student of one dimension that can be any smooth curve at each time of its grid."""

    def __init__(self, grid: Tensor, schedule: NoiseSchedule, kind: Kind) -> None:
        super().__init__(Bumps(len(grid)), schedule, kind)
        self.grid = grid

    def call(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.net(x_t, (t[:, None] - self.grid).abs().argmin(1))


@pytest.mark.parametrize(("name", "kind", "k"), [("table", "v", 2), ("flow", "flow", 5)])
def test_on_a_mixture_a_rungs_student_lands_on_its_teachers_map(tmp_path: Path, name: str, kind: Kind, k: int) -> None:
    schedule, steps = SCHEDULES[name], 4
    means, stds = (-0.7, 0.9), (0.35, 0.5)  # near enough that no time has a gap without samples
    teacher: Analytic = Mixture(means, stds, (0.4, 0.6), schedule, kind)
    student = Curve(schedule.grid(steps)[:-1], schedule, kind)
    method = Progressive(config((steps,), k * steps), student, teacher)

    def draw(normal: Tensor, which: Tensor) -> Tensor:
        first = which < 0.4
        return torch.where(first, means[0] + stds[0] * normal, means[1] + stds[1] * normal)

    train = options(max_train_steps=300, learning_rate=0.1, adam_beta2=0.99, train_batch_size=32, **TRAIN)
    Trainer(train, tmp_path).fit(method, Rows(draw, width=64))
    x = torch.special.ndtri(torch.linspace(0.02, 0.98, 41, dtype=torch.float64))[:, None]
    with torch.no_grad():
        got = sample(lambda x, t: student(x, t, {}), schedule, x, schedule.grid(steps))
    truth = sample(lambda x, t: teacher(x, t, {}), schedule, x, schedule.grid(k * steps))
    alone = sample(lambda x, t: teacher(x, t, {}), schedule, x, schedule.grid(steps))
    off, gap = (float((map_ - truth).square().mean().sqrt()) for map_ in (got, alone))
    assert off < 0.01 < 0.1 < gap, "the teacher in as few steps is elsewhere"


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_each_rung_starts_afresh_from_the_average_of_the_one_before(tmp_path: Path, kind: str) -> None:
    method, ends, starts = ladder(kind), [], []
    original, last = method.training_step, [-1]

    def step(batch):  # type: ignore[no-untyped-def]
        if method.rung != last[0]:
            last[0] = method.rung
            starts.append(weights(method))
        return original(batch)

    method.training_step = step  # type: ignore[method-assign]
    train = options(
        max_train_steps=5, ema_decay=0.5, learning_rate=0.1, lr_scheduler="linear", checkpoints_total_limit=None
    )
    Trainer(train, tmp_path).fit(method, Numbers(), on_round=lambda n: ends.append((n, method.steps, weights(method))))
    assert [end[:2] for end in ends] == [(0, 4), (1, 2), (2, 1)]
    for end, start in zip(ends, starts[1:], strict=False):
        student = {n: v for n, v in end[2].items() if n.startswith("student/")}
        for role in ("student", "teacher"):  # the average that on_round was shown
            assert_close({n.replace("student/", f"{role}/"): v for n, v in student.items()},
                         {n: v for n, v in start.items() if n.startswith(f"{role}/")}, **EXACT)  # fmt: skip
    tensors, state = saved(tmp_path)
    assert {"student", "teacher", "student.optimizer", "student.ema"} == {n.split("/")[0] for n in tensors}
    # anew in each rung: the moments' count, the average's count, the rate that falls to 0
    assert (state["round"], state["round_start"], state["ema_updates"]) == (2, 10, 5)
    assert {float(v) for n, v in tensors.items() if n.endswith(".step")} == {5.0}
    told = rows(tmp_path)
    assert_close([row["learning_rate"] for row in told], [0.1, 0.08, 0.06, 0.04, 0.02] * 3, rtol=1e-12, atol=0)
    assert [row["rung"] for row in told] == [4.0] * 5 + [2.0] * 5 + [1.0] * 5
    assert [row["step"] for row in told] == list(range(1, 16)), "the global step counts on"
