import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stepdistill.diffusion.losses import (
    min_snr,
    mse,
    pseudo_huber,
    pseudo_huber_norm,
    snr_plus_one,
    truncated_snr,
    x0_weight,
)
from stepdistill.diffusion.prediction import target
from stepdistill.diffusion.schedule import NoiseSchedule


def case() -> tuple[Tensor, Tensor]:
    x = torch.tensor([[[3.0, 0.0], [4.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]], dtype=torch.float64)
    return x, torch.zeros_like(x)


def test_by_hand() -> None:
    x, y = case()
    assert_close(mse(x, y), torch.tensor([25 / 4, 1.0]).double())
    c = 0.5
    row = (math.sqrt(9 + c * c) + math.sqrt(16 + c * c) + 2 * c) / 4 - c  # the two zeros contribute sqrt(c^2)
    assert_close(pseudo_huber(x, y, c), torch.tensor([row, math.sqrt(1 + c * c) - c]).double())
    assert_close(
        pseudo_huber_norm(x, y, c), torch.tensor([math.sqrt(25 + c * c) - c, math.sqrt(4 + c * c) - c]).double()
    )


def test_default_constants() -> None:
    x, y = case()
    assert_close(pseudo_huber(x, y), pseudo_huber(x, y, 0.001))
    assert_close(pseudo_huber_norm(x, y), pseudo_huber_norm(x, y, 0.00054 * 2.0))  # sqrt(D) = 2


def test_huber_is_quadratic_near_and_absolute_far() -> None:
    near, far = torch.full((1, 1), 1e-3).double(), torch.full((1, 1), 1e3).double()
    for loss in (pseudo_huber, pseudo_huber_norm):
        assert_close(loss(near, 0 * near, 1.0), near[0].square() / 2, rtol=1e-5, atol=0)
        assert_close(loss(far, 0 * far, 1.0), far[0] - 1, rtol=1e-5, atol=0)


@pytest.mark.parametrize("loss", [mse, pseudo_huber, pseudo_huber_norm])
def test_zero_with_zero_gradient_at_equality(loss) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    value = loss(x, x.detach().clone())
    assert torch.equal(value, torch.zeros(2))
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert torch.equal(gradient, torch.zeros_like(x))


def test_weights_turn_the_x0_error_into_the_errors_of_other_kinds(
    schedule: NoiseSchedule, numbers: torch.Generator
) -> None:
    x0, eps, error = (torch.randn(4, 3, dtype=torch.float64, generator=numbers) for _ in range(3))
    t = torch.tensor([0.95, 0.6, 0.3, 0.05]).double()
    x_t = schedule.add_noise(x0, eps, t)
    alpha, sigma = schedule.at(t, x_t)
    guess, snr = x0 + error, schedule.snr(t)
    guess_eps = (x_t - alpha * guess) / sigma
    assert_close(snr * mse(guess, x0), mse(guess_eps, eps))
    assert_close(truncated_snr(snr) * mse(guess, x0), torch.maximum(mse(guess, x0), mse(guess_eps, eps)))
    if bool(torch.isclose(alpha**2 + sigma**2, torch.ones_like(alpha)).all()):  # v is a rotation there only
        v, guess_v = (target("v", schedule, a, e, t) for a, e in ((x0, eps), (guess, guess_eps)))
        assert_close(snr_plus_one(snr) * mse(guess, x0), mse(guess_v, v))


def test_min_snr() -> None:
    snr = torch.tensor([0.0, 2.0, 5.0, 80.0, math.inf])
    assert min_snr(snr).tolist() == [0.0, 2.0, 5.0, 5.0, 5.0]
    assert min_snr(snr, 1.0).tolist() == [0.0, 1.0, 1.0, 1.0, 1.0]


def test_weights_by_name() -> None:
    snr = torch.tensor([0.0, 0.5, 4.0])
    assert x0_weight("truncated_snr", snr).tolist() == [1.0, 1.0, 4.0]
    assert x0_weight("snr+1", snr).tolist() == [1.0, 1.5, 5.0]
    assert x0_weight("snr", snr).tolist() == [0.0, 0.5, 4.0]
    with pytest.raises(ValueError, match=r"'truncated_snr', 'snr\+1', 'snr'\), got 'none'"):
        x0_weight("none", snr)  # type: ignore[arg-type]
