"""GAN losses and gradient penalties, by hand and in closed form."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from stepdistill.diffusion.losses import approximate_r1, discriminator_loss, generator_loss, r1

REAL = torch.tensor([[2.0, 0.5, -1.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
FAKE = torch.tensor([[-3.0, 0.25, -1.0], [0.0, 2.0, -0.5]], dtype=torch.float64)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_hinge_by_hand() -> None:
    # sample 0: real (0 + .5 + 2) / 3, fake (0 + 1.25 + 0) / 3; sample 1: real 0, fake (1 + 3 + .5) / 3
    assert_close(discriminator_loss("hinge", REAL, FAKE), torch.tensor([3.75 / 3, 4.5 / 3]).double())
    assert_close(generator_loss("hinge", FAKE), torch.tensor([3.75 / 3, -1.5 / 3]).double())


def test_non_saturating_by_hand() -> None:
    real, fake = torch.tensor([[0.0, 2.0]]).double(), torch.tensor([[1.0, -3.0]]).double()
    soft = lambda z: math.log1p(math.exp(z))  # noqa: E731
    wanted = (soft(0.0) + soft(-2.0)) / 2 + (soft(1.0) + soft(-3.0)) / 2
    assert_close(discriminator_loss("non_saturating", real, fake), torch.tensor([wanted]).double())
    assert_close(generator_loss("non_saturating", fake), torch.tensor([(soft(-1.0) + soft(3.0)) / 2]).double())
    huge = torch.full((1, 1), 1e4)
    assert torch.isfinite(discriminator_loss("non_saturating", -huge, huge)).all()


def test_each_logit_has_a_hinge_of_its_own() -> None:
    """A token that is 9 past the margin must not pay for one that is wrong."""
    real = torch.tensor([[10.0, -8.0]])
    assert float(discriminator_loss("hinge", real, torch.full((1, 2), -1.0))) == 4.5
    maps = torch.tensor([[[[10.0, -8.0]]]])
    assert float(discriminator_loss("hinge", maps, torch.full((1, 1, 1, 2), -1.0))) == 4.5


def test_the_best_discriminator_of_the_non_saturating_loss_is_the_log_ratio_of_densities() -> None:
    """N(1, 1) against N(-1, 1): log p / q = 2 x, of which the gradient of the loss vanishes."""
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    p, q = (torch.exp(-0.5 * (x - m) ** 2) / math.sqrt(2 * math.pi) for m in (1.0, -1.0))
    logits = (2.0 * x).requires_grad_(True)
    # the two expectations as integrals: each point is a sample, weighted by its density
    per_point = discriminator_loss("non_saturating", logits[:, None], torch.full_like(x, -1e9)[:, None]) * p
    per_point = per_point + discriminator_loss("non_saturating", torch.full_like(x, 1e9)[:, None], logits[:, None]) * q
    (gradient,) = torch.autograd.grad(per_point.sum(), logits)
    assert float(gradient.abs().max()) < 1e-12


def test_r1_of_a_linear_discriminator() -> None:
    w, x = draws(5), draws(4, 5, seed=1).requires_grad_(True)
    w.requires_grad_(True)
    penalty = r1((x @ w)[:, None], x)
    assert_close(penalty, w.detach().square().sum().expand(4))
    gamma = 3.0
    (gradient,) = torch.autograd.grad(gamma / 2 * penalty.mean(), w)  # d (gamma / 2) |w|^2
    assert_close(gradient, gamma * w.detach())


def test_r1_of_a_quadratic_discriminator_is_each_samples_own() -> None:
    x = draws(6, 2, 3).requires_grad_(True)
    assert_close(r1(x.square().sum((1, 2))[:, None], x), 4 * x.detach().square().sum((1, 2)))


def test_r1_of_many_logits_is_the_mean_of_theirs() -> None:
    """Tokens that each read their own part of the inputs: n logits are no n times the penalty."""
    w, x = draws(7), draws(3, 4, 7, seed=1).requires_grad_(True)
    assert_close(r1(x @ w, x), w.square().sum().expand(3))


def test_approximate_r1_of_a_linear_discriminator() -> None:
    """Its mean over the noise is sigma^2 |w|^2, with a standard error of sqrt(2 / N) of that."""
    w, x, sigma, n = draws(5), draws(1, 5, seed=1), 0.3, 40_000
    noise = draws(n, 5, seed=2)
    found = approximate_r1((x @ w).expand(n, 1), ((x + sigma * noise) @ w)[:, None])
    assert_close(found, (sigma * noise @ w) ** 2)
    truth = sigma**2 * float(w.square().sum())
    assert abs(float(found.mean()) - truth) < 5 * truth * math.sqrt(2 / n)


def test_approximate_r1_tends_to_r1_and_is_zero_without_noise() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    x, sigma, n = draws(1, 5).requires_grad_(True), 1e-3, 20_000
    near = net(x + sigma * draws(n, 5, seed=3))
    exact = float(r1(net(x), x).detach())
    found = float(approximate_r1(net(x).expand(n, 1), near).mean().detach()) / sigma**2
    assert abs(found - exact) < 5 * exact * math.sqrt(2 / n)
    assert float(approximate_r1(net(x), net(x + 0.0 * draws(1, 5))).detach()) == 0.0


def test_an_unknown_loss() -> None:
    with pytest.raises(ValueError, match="hinge"):
        discriminator_loss("wasserstein", REAL, FAKE)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="hinge"):
        generator_loss("wasserstein", FAKE)  # type: ignore[arg-type]
