"""What adversarial methods share, in closed form: the distillation term, the game's losses, the student's times, the guard."""

import math
from typing import Any

import pytest
import torch
from adversaries import Convolutional, config
from torch import Tensor
from torch.testing import assert_close
from toys import MEAN, STD, sd_table

from stepdistill.config import CommaList
from stepdistill.diffusion.losses import discriminator_loss, generator_loss
from stepdistill.diffusion.schedule import Cosine, Flow, NoiseSchedule, Tabulated
from stepdistill.errors import InputError
from stepdistill.families.analytic import Gaussian, TwoClass
from stepdistill.methods.adversarial import (
    CollapseGuard,
    StudentTimes,
    deception,
    distillation,
    diversity,
    judgement,
)
from stepdistill.networks.denoiser import Denoiser

SCHEDULES: dict[str, NoiseSchedule] = {"table": sd_table(), "flow": Flow(), "cosine": Cosine()}


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# -- the distillation term ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_distillation_term_of_a_gaussian_teacher_and_its_gradient(name: str) -> None:
    """c (1 - k a)^2 |x - m|^2 + c k^2 s^2 D in the mean over the noise; its gradient is 2 c (1 - k a) (x - m), and not
    another (1 - k a) times that, as it would be if the teacher's input were not detached."""
    schedule, n, d = SCHEDULES[name], 4000, 3
    teacher = Gaussian(MEAN, STD, schedule, "x0")
    t = torch.full((n,), 0.3, dtype=torch.float64)
    a, s = schedule.alpha(t)[0], schedule.sigma(t)[0]
    k = a * STD**2 / (a**2 * STD**2 + s**2)
    x = torch.tensor([2.7, 1.1, 2.2], dtype=torch.float64).expand(n, d).clone().requires_grad_(True)
    eps = draws(n, d)
    found = distillation(teacher, x, t, eps, {}, {})
    off = x.detach() - MEAN
    exact = a * ((1 - k * a) * off - k * s * eps).square().mean(1)  # c = a; the mean over D elements
    assert_close(found, exact)
    truth = a * ((1 - k * a) ** 2 * off[0].square().mean() + k**2 * s**2)
    spread = float(found.detach().std()) / math.sqrt(n)
    assert abs(float(found.mean().detach()) - float(truth)) < 5 * spread
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert_close(gradient, 2 * a / d * ((1 - k * a) * off - k * s * eps))
    wrong = (1 - k * a) * gradient
    assert float((gradient - wrong).abs().mean()) > 0.02 * float(gradient.abs().mean()), (
        "the two must be told apart here"
    )


def test_the_teacher_of_the_distillation_term_is_guided_as_asked() -> None:
    teacher = TwoClass((2.0, -1.0), STD, Cosine(), "x0", uncond_mean=0.4)
    x, t, eps = draws(2, 3), torch.tensor([0.4, 0.7]).double(), draws(2, 3, seed=1)
    cond, uncond = {"label": torch.tensor([0, 1])}, {"label": torch.tensor([-1, -1])}
    for w in (0.0, 2.5):
        alone = [distillation(teacher.guided(i, w), x[i : i + 1], t[i : i + 1], eps[i : i + 1], {}, {}) for i in (0, 1)]
        assert_close(distillation(teacher, x, t, eps, cond, uncond, w), torch.cat(alone))
    plain = Gaussian(MEAN, STD, Cosine(), "x0")
    assert_close(distillation(plain, x, t, eps, {}, {}, 3.0), distillation(plain, x, t, eps, {}, {}))  # no "no prompt"


# -- the game --------------------------------------------------------------------------------------------------------------


def test_heads_count_alike_however_many_logits_they_have() -> None:
    real = [torch.tensor([[2.0], [0.0]]), torch.tensor([[0.5, 0.5, -1.0], [3.0, 3.0, 3.0]])]
    fake = [torch.tensor([[-1.0], [1.0]]), torch.tensor([[0.0, 0.0, 0.0], [-2.0, -2.0, 1.0]])]
    loss, metrics = judgement("hinge", real, fake)
    first, second = (0 + 0) + (1 + 2), (3.0 / 3 + 1) + (0 + 2.0 / 3)
    assert_close(float(loss), (first + second) / 4)
    assert_close(float(metrics["logit_real"]), ((2 + 0) / 2 + (0 + 3) / 2) / 2)
    assert_close(float(metrics["logit_fake"]), ((-1 + 1) / 2 + (0 - 1) / 2) / 2)
    right = [(1 + 1) / 2, (0 + 0) / 2, (2 / 3 + 0) / 2, (1 + 2 / 3) / 2]  # 0 is on no side
    assert_close(float(metrics["accuracy"]), sum(right) / 4)
    assert_close(float(deception("hinge", fake)), -((-1 + 1) / 2 + (0 - 1) / 2) / 2)
    for kind in ("hinge", "non_saturating"):
        whole = torch.stack([discriminator_loss(kind, r, f) for r, f in zip(real, fake, strict=True)]).mean()
        assert_close(judgement(kind, real, fake)[0], whole)
        assert_close(deception(kind, fake), torch.stack([generator_loss(kind, f) for f in fake]).mean())


def test_diversity_is_one_for_strangers_and_zero_for_twins() -> None:
    data, one, other = (3.0 + 0.5 * draws(50, 1, 16, 16, seed=i) for i in range(3))
    assert_close(float(diversity(one, other, data)), 1.0, rtol=0.02, atol=0)
    assert float(diversity(one, one, data)) == 0.0
    assert_close(float(diversity(one, one + 0.1, data)), 0.1 / math.sqrt(2) / 0.5, rtol=0.02, atol=0)
    assert math.isfinite(float(diversity(one, other, torch.ones_like(data))))


# -- the student's times ---------------------------------------------------------------------------------------------------

PAPER = StudentTimes((1.0, 0.75, 0.5, 0.25), (0.7, 0.1, 0.1, 0.1), (0.0, 0.0, 0.5, 0.5), 500)


def test_the_warm_up_and_what_comes_after_it() -> None:
    u = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    assert PAPER.index(u, 0).bincount(minlength=4).tolist() == [0, 0, 1000, 1000]
    assert PAPER.index(u, 499).bincount(minlength=4).tolist() == [0, 0, 1000, 1000]
    assert PAPER.index(u, 500).bincount(minlength=4).tolist() == [1400, 200, 200, 200]
    made = config((1.0, 0.75, 0.5, 0.25)).student_times()
    assert made.index(u, 0).bincount(minlength=4).tolist() == [500] * 4


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_first_time_begins_with_pure_noise_as_a_sampler_does(name: str) -> None:
    """Stable Diffusion's table would leave .068 of the data there."""
    schedule, x0, eps = SCHEDULES[name], draws(4, 2, 3), draws(4, 2, 3, seed=1)
    index = torch.tensor([0, 1, 3, 0])
    t, x_t = PAPER.start(schedule, x0, eps, index)
    assert t.tolist() == [1.0, 0.75, 0.25, 1.0]
    assert torch.equal(x_t[[0, 3]], eps[[0, 3]])
    assert_close(x_t[1:3], schedule.add_noise(x0, eps, t)[1:3])
    assert x_t.dtype == eps.dtype


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rising": ({"times": "0.5,1"}, "--method.times"),
    "zero": ({"times": "1,0"}, "--method.times"),
    "above one": ({"times": "999"}, "--method.times"),
    "none": ({"times": ""}, "--method.times"),
    "words": ({"times": "one"}, "--method.times"),
    "too few chances": ({"probabilities": "0.5,0.5"}, "--method.probabilities"),
    "negative": ({"probabilities": "1.5,-0.5,0,0"}, "--method.probabilities"),
    "not one": ({"warmup_probabilities": "0.5,0.5,0.5,0.5"}, "--method.warmup_probabilities"),
    "odd warm-up": ({"warmup_steps": -1}, "--method.warmup_steps"),
    "no width": ({"head_width": 0}, "--method.head_width"),
    "r1": ({"r1_gamma": -1.0}, "--method.r1_gamma"),
    "lazy": ({"r1_every": 0}, "--method.r1_every"),
    "rate": ({"discriminator_rate": 0.0}, "--method.discriminator_rate"),
    "infinite": ({"distillation": float("inf")}, "--method.distillation"),
    "loss": ({"loss_type": "wgan"}, "--method.loss_type"),
}


@pytest.mark.parametrize("case", BAD)
def test_impossible_options_name_their_flag(case: str) -> None:
    from stepdistill.methods.ladd import LADDConfig

    options, flag = BAD[case]
    with pytest.raises(InputError, match=flag):
        LADDConfig(
            **{k: CommaList.parse(v) if isinstance(v, str) and k != "loss_type" else v for k, v in options.items()}
        )


def ztsnr() -> Tabulated:
    abar = sd_table().alpha(torch.arange(1, 1001, dtype=torch.float64) / 1000)
    return Tabulated(((abar - abar[-1]) * abar[0] / (abar[0] - abar[-1])) ** 2)


def test_eps_prediction_can_not_begin_at_the_end_of_the_table() -> None:
    """Two ways out: another checkpoint, or a lower first time."""
    one = StudentTimes((1.0,), (1.0,), (1.0,), 0)
    with pytest.raises(InputError, match=r"t = 1.* 14\.6 times .*v or flow prediction or with zero terminal SNR"):
        one.check(Convolutional(sd_table(), "eps"))
    with pytest.raises(InputError, match=r"--teacher\.path.* a lower time, such as --method\.times 0\.4"):
        one.check(Convolutional(sd_table(), "eps"))
    with pytest.raises(InputError, match="inf times"):
        one.check(Convolutional(Flow(), "eps"))
    allowed: list[Denoiser] = [
        Convolutional(sd_table(), "v"), Convolutional(ztsnr(), "v"), Convolutional(Flow(), "flow"),
        Convolutional(sd_table(), "x0"),
    ]  # fmt: skip
    for student in allowed:
        one.check(student)
    even = (0.25,) * 4
    StudentTimes((0.4, 0.3, 0.2, 0.1), even, even, 0).check(Convolutional(sd_table(), "eps"))


def test_times_lie_on_the_levels_of_a_table() -> None:
    with pytest.raises(InputError, match=r"1000 levels.*--method\.times"):
        StudentTimes((1.0, 0.3333), (0.5, 0.5), (0.5, 0.5), 0).check(Convolutional(sd_table(), "v"))
    StudentTimes((1.0, 0.3333), (0.5, 0.5), (0.5, 0.5), 0).check(Convolutional(Flow(), "flow"))


# -- the guard -------------------------------------------------------------------------------------------------------------


def test_the_guard_is_silent_in_a_healthy_game() -> None:
    guard = CollapseGuard()
    assert not any(guard.look(0.5 + 0.4 * (i % 2), 0.6 if i % 50 == 0 else None) for i in range(2000))


def test_a_collapse_is_said_once_with_what_to_change_and_again_after_a_recovery() -> None:
    guard = CollapseGuard()
    looks = [guard.look(0.6, value) for value in [0.05] * 4 + [0.5] + [0.05] * 7 + [math.nan] + [0.5] + [0.05] * 5]
    said = [i for i, words in enumerate(looks) if words]
    assert said == [9, 18]
    assert "collapsed" in looks[9] and "0.05" in looks[9] and "--method.distillation 1" in looks[9]
    assert "--method.discriminator_rate" in looks[9]


def test_a_discriminator_that_wins_is_said_once() -> None:
    guard = CollapseGuard()
    words = [guard.look(1.0, None) for _ in range(400)]
    (when,) = [i for i, said in enumerate(words) if said]
    assert 100 < when < 200 and "discriminator has won" in words[when] and "--method.r1_gamma" in words[when]
    assert not any(guard.look(math.nan, None) or guard.look(None, None) for _ in range(10))
    [guard.look(0.5, None) for _ in range(200)]
    assert any(guard.look(1.0, None) for _ in range(400)), "it had recovered"


def test_the_guard_goes_on_where_it_was() -> None:
    one = CollapseGuard()
    for _ in range(4):
        one.look(0.99, 0.01)
    other = CollapseGuard()
    other.load_state_dict(one.state_dict())
    assert one.look(0.9, 0.01) == other.look(0.9, 0.01) != ""
    assert one.state_dict() == other.state_dict()
