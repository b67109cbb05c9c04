import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stepdistill.diffusion.guidance import guide_scale, guide_w
from stepdistill.diffusion.prediction import KINDS, Kind, Prediction, read, target
from stepdistill.diffusion.schedule import NoiseSchedule, Tabulated

COND, UNCOND, STD = 2.0, 0.5, 0.3


def gaussian(mean: float | Tensor, schedule: NoiseSchedule, x_t: Tensor, t: Tensor) -> Prediction:
    """The posterior of data N(mean, 0.3^2), written out."""
    alpha, sigma = schedule.at(t, x_t)
    variance = alpha**2 * STD**2 + sigma**2
    offset = x_t - alpha * mean
    return Prediction(x0=mean + alpha * STD**2 / variance * offset, eps=sigma / variance * offset)


def case() -> tuple[Tensor, Tensor, Tensor]:
    w = torch.tensor([0.0, 1.5, 7.0, -0.5], dtype=torch.float64)
    return torch.linspace(-1, 3, 8, dtype=torch.float64).reshape(4, 2), torch.tensor([0.95, 0.6, 0.3, 0.02]).double(), w


def test_guidance_on_equal_variances_is_a_shift_of_the_mean(schedule: NoiseSchedule) -> None:
    x_t, t, w = case()
    cond, uncond = gaussian(COND, schedule, x_t, t), gaussian(UNCOND, schedule, x_t, t)

    lcm = gaussian((COND + w * (COND - UNCOND))[:, None], schedule, x_t, t)
    assert_close(guide_w(cond, uncond, w).x0, lcm.x0, rtol=0, atol=1e-12)
    assert_close(guide_w(cond, uncond, w).eps, lcm.eps, rtol=0, atol=1e-12)

    imagen = gaussian((UNCOND + w * (COND - UNCOND))[:, None], schedule, x_t, t)
    assert_close(guide_scale(cond, uncond, w).x0, imagen.x0, rtol=0, atol=1e-12)
    assert_close(guide_scale(cond, uncond, w).eps, imagen.eps, rtol=0, atol=1e-12)


def test_no_guidance_is_exactly_the_conditional() -> None:
    cond, uncond = (Prediction(x0=torch.randn(2, 3), eps=torch.randn(2, 3)) for _ in range(2))
    for guided in (guide_w(cond, uncond, torch.zeros(2)), guide_scale(cond, uncond, torch.ones(2))):
        assert torch.equal(guided.x0, cond.x0)
        assert torch.equal(guided.eps, cond.eps)
    assert_close(guide_scale(cond, uncond, torch.zeros(2)).x0, uncond.x0)


@pytest.mark.parametrize("kind", KINDS)
def test_guiding_predictions_is_guiding_outputs(kind: Kind, sd: Tabulated) -> None:
    """Diffusers guides the raw output, whatever its kind: uncond + g (cond - uncond)."""
    x_t, t, w = case()
    outputs = [target(kind, sd, p.x0, p.eps, t) for p in (gaussian(m, sd, x_t, t) for m in (COND, UNCOND))]
    raw = outputs[1] + w[:, None] * (outputs[0] - outputs[1])
    guided = guide_scale(*(read(kind, sd, o, x_t, t) for o in outputs), w)
    expected = read(kind, sd, raw, x_t, t)
    assert_close(guided.x0, expected.x0, rtol=0, atol=1e-11)
    assert_close(guided.eps, expected.eps, rtol=0, atol=1e-11)


def test_a_guided_pair_still_explains_x_t(schedule: NoiseSchedule) -> None:
    x_t, t, w = case()
    guided = guide_w(gaussian(COND, schedule, x_t, t), gaussian(UNCOND, schedule, x_t, t), w)
    assert_close(schedule.add_noise(guided.x0, guided.eps, t), x_t, rtol=0, atol=1e-12)


def test_scales_in_float64_do_not_promote_the_latents() -> None:
    pair = [Prediction(x0=torch.ones(2, 3, 4, 4), eps=torch.ones(2, 3, 4, 4)) for _ in range(2)]
    assert guide_w(pair[0], pair[1], torch.ones(2, dtype=torch.float64)).x0.dtype == torch.float32
