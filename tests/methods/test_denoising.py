"""Plain diffusion training: the perfect denoiser's loss is a posterior variance, which is known in closed form."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from toys import MEAN, STD, sd_table

from stepdistill.batch import Batch
from stepdistill.diffusion.prediction import Kind
from stepdistill.diffusion.schedule import Cosine, Flow, NoiseSchedule, Tabulated
from stepdistill.errors import InputError
from stepdistill.families.analytic import Gaussian
from stepdistill.methods.denoising import Denoising, DenoisingConfig
from stepdistill.randomness import StepRandom

WIDTH = 16


def batch(size: int, step: int = 0) -> Batch:
    x0 = MEAN + STD * torch.randn(size, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    return Batch(x0, {}, {}, StepRandom(0, step, range(size)))


def method(schedule: NoiseSchedule, kind: Kind, **options: Any) -> Denoising:
    return Denoising(DenoisingConfig(**options), Gaussian(MEAN, STD, schedule, kind))


def x0_variance(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """Var(x0 | x_t) = s^2 sigma^2 / v."""
    a, b = schedule.alpha(t), schedule.sigma(t)
    return STD**2 * b**2 / (a**2 * STD**2 + b**2)


def per_x0(schedule: NoiseSchedule, kind: Kind, t: Tensor) -> Tensor:
    """|output error|^2 over |x0 error|^2: given x_t, an error e of x0 is one of -e alpha/sigma of eps; the rest follows."""
    a, b = schedule.alpha(t), schedule.sigma(t)
    if kind == "v":
        return (a * a / b + b) ** 2
    if kind == "flow":  # on the straight path: eps - x0
        return (a / b + 1) ** 2
    return {"eps": (a / b) ** 2, "x0": torch.ones_like(t)}[kind]


WELL_POSED: list[tuple[NoiseSchedule, Kind]] = [
    (sd_table(), "eps"), (sd_table(), "v"), (sd_table(), "x0"),
    (Flow(), "flow"), (Flow(), "x0"), (Flow(), "v"), (Cosine(), "v"), (Cosine(), "x0"),
]  # fmt: skip


@pytest.mark.parametrize(("schedule", "kind"), WELL_POSED)
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_perfect_denoiser_has_the_posterior_variance_as_its_loss(
    schedule: NoiseSchedule, kind: Kind, gamma: float | None
) -> None:
    perfect, size = method(schedule, kind, snr_gamma=gamma), 2000
    one = batch(size)
    t = perfect.times(one)
    expected = x0_variance(schedule, t) * per_x0(schedule, kind, t)
    if gamma is not None:
        snr = (schedule.alpha(t) / schedule.sigma(t)) ** 2
        expected = x0_variance(schedule, t) * snr.clamp(max=gamma)
    # given the times, each element's squared error is expected * chi^2_1, of variance 2 expected^2
    spread = math.sqrt(float((2 * expected**2 / WIDTH).sum())) / size
    losses = perfect.training_step(one)
    assert abs(float(losses.terms["denoising"]) - float(expected.mean())) < 5 * spread
    assert spread < 0.03 * float(expected.mean()) and losses.count == size


@pytest.mark.parametrize("schedule", [sd_table(), Flow()])
def test_snr_weights_make_the_loss_the_same_in_every_kind(schedule: NoiseSchedule) -> None:
    """The same opinion on x0, whatever the network puts out, has the same weighted loss: exactly, not on average."""
    kinds: tuple[Kind, ...] = ("eps", "x0", "v", "flow")
    losses = [float(method(schedule, kind, snr_gamma=5.0).training_step(batch(64)).total) for kind in kinds]
    plain = [float(method(schedule, kind).training_step(batch(64)).total) for kind in kinds]
    assert_close(losses, [losses[0]] * 4, rtol=1e-9, atol=0)
    assert max(plain) > 1.1 * min(plain)
    other = float(method(schedule, "x0", snr_gamma=1.0).training_step(batch(64)).total)
    assert other < losses[0]


def test_times_are_the_levels_of_a_table_and_each_is_as_likely() -> None:
    table = Tabulated(torch.tensor([0.9, 0.6, 0.25, 0.0], dtype=torch.float64))
    t = method(table, "v").times(batch(4000))
    assert t.dtype == torch.float64 and set(t.tolist()) == {0.25, 0.5, 0.75, 1.0}
    for level in (0.25, 0.5, 0.75, 1.0):
        assert_close(float((t == level).double().mean()), 0.25, rtol=0, atol=5 * math.sqrt(0.25 * 0.75 / 4000))
    index = sd_table().index(method(sd_table(), "eps").times(batch(500)))
    assert_close(index, index.round(), rtol=0, atol=1e-9)
    assert float(index.min()) >= 0 and float(index.max()) <= 999


def test_times_on_a_path_are_uniform_or_logit_normal_and_never_zero() -> None:
    t = method(Flow(), "flow").times(batch(4000))
    quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    assert float(t.min()) >= 1e-5 and float(t.max()) < 1
    assert_close(torch.quantile(t, quantiles), quantiles, rtol=0, atol=0.04)
    t = method(Flow(), "flow", time_distribution="logit_normal").times(batch(4000))
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    assert_close(torch.quantile(t, quantiles), torch.sigmoid(normal.icdf(quantiles)), rtol=0, atol=0.03)


def prompted(size: int, step: int = 0) -> Batch:
    one = batch(size, step)
    one.cond = {"text": torch.ones(size, 2, 3), "label": torch.arange(size)}
    one.uncond = {"text": torch.zeros(size, 2, 3), "label": torch.full((size,), -1)}
    return one


def test_prompts_are_dropped_as_often_as_asked_and_whole() -> None:
    size, share = 4000, 0.1
    one = prompted(size)
    cond = method(sd_table(), "eps", caption_dropout=share).drop_prompts(one)
    dropped = cond["label"] == -1
    assert_close(float(dropped.double().mean()), share, rtol=0, atol=5 * math.sqrt(share * (1 - share) / size))
    assert_close(cond["text"].mean((1, 2)), 1.0 - dropped.float(), rtol=0, atol=0)
    assert_close(cond["label"][~dropped], torch.arange(size)[~dropped], rtol=0, atol=0)
    # another step drops others, the same step the same
    again, later = (method(sd_table(), "eps", caption_dropout=share).drop_prompts(prompted(size, s)) for s in (0, 1))
    assert torch.equal(again["label"], cond["label"]) and not torch.equal(later["label"], cond["label"])


@pytest.mark.parametrize(("share", "kept"), [(0.0, 8), (1.0, 0)])
def test_the_ends_of_caption_dropout(share: float, kept: int) -> None:
    cond = method(sd_table(), "eps", caption_dropout=share).drop_prompts(prompted(8))
    assert int((cond["label"] >= 0).sum()) == kept


def test_without_an_unconditional_form_prompts_are_kept() -> None:
    one = prompted(8)
    one.uncond = {}
    assert method(sd_table(), "eps", caption_dropout=1.0).drop_prompts(one) is one.cond


@pytest.mark.parametrize("options", [{"caption_dropout": 1.1}, {"caption_dropout": -0.1}, {"snr_gamma": 0.0}])
def test_impossible_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        DenoisingConfig(**options)
