"""MiniLLM's estimator against the gradient of the exact KL over all sequences of 3 tokens out of 3."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from toys import EXACT

from stepdistill.kd.policy_gradient import PolicyGradient, Variant, Written

V = T = 3
SEQUENCES = torch.tensor(list(itertools.product(range(V), repeat=T)))
PREFIXES = sum(V**t for t in range(T))  # each has a distribution of its own


def places() -> Tensor:
    """[27, T]: the number of the prefix that each token follows."""
    found, number = [], torch.zeros(len(SEQUENCES), dtype=torch.int64)
    for t in range(T):
        found.append(sum(V**s for s in range(t)) + number)
        number = number * V + SEQUENCES[:, t]
    return torch.stack(found, 1)


def policies(seed: int = 1) -> tuple[Tensor, Tensor]:
    """Logits [prefixes, V] of student and teacher, in float64."""
    draws = torch.Generator().manual_seed(seed)
    q, p = (torch.randn(PREFIXES, V, generator=draws, dtype=torch.float64) for _ in range(2))
    return q.requires_grad_(), p


def look(q: Tensor, p: Tensor) -> Written:
    log_q, log_p = q.log_softmax(-1)[places()], p.log_softmax(-1)[places()]
    ours, theirs = (x.gather(2, SEQUENCES[..., None]).squeeze(2) for x in (log_q, log_p))
    return Written((log_q.exp() * (log_q - log_p)).sum(-1), ours, theirs, torch.ones(len(SEQUENCES), T).bool())


def true_gradient(q: Tensor, p: Tensor) -> Tensor:
    """Of sum_y q(y) log q(y) / p(y)."""
    seen = look(q, p)
    kl = (seen.log_q.sum(1).exp() * (seen.log_q - seen.log_p).sum(1)).sum()
    return torch.autograd.grad(kl, q)[0]


def expected(q: Tensor, p: Tensor, estimator: PolicyGradient, centre: float = 0.0, scale: float = 1.0) -> Tensor:
    """The estimate's expectation over what is drawn from alpha p + (1 - alpha) q, token by token."""
    seen, alpha = look(q, p), estimator.teacher_share
    drawn = ((1 - alpha) * seen.log_q.detach().exp() + alpha * seen.log_p.exp()).prod(1)
    assert_close(drawn.sum(), torch.ones((), dtype=torch.float64))
    return torch.autograd.grad((drawn * estimator.surrogate(seen, centre, scale)).sum(), q)[0]


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


PAPER = PolicyGradient()
EXACTLY = {"rtol": 1e-12, "atol": 1e-12}


@pytest.mark.parametrize("seed", range(4))
def test_the_papers_form_is_the_gradient_of_the_kl_over_sequences(seed: int) -> None:
    q, p = policies(seed)
    assert_close(expected(q, p, PAPER), true_gradient(q, p), **EXACTLY)


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_so_it_is_on_mixed_samples_with_exact_weights_and_with_any_centre(share: float) -> None:
    q, p = policies()
    estimator = replace(PAPER, teacher_share=share, weights="exact")
    assert_close(expected(q, p, estimator), true_gradient(q, p), **EXACTLY)
    assert_close(expected(q, p, estimator, centre=0.7), true_gradient(q, p), **EXACTLY)
    assert_close(expected(q, p, PAPER, centre=-2.0), true_gradient(q, p), **EXACTLY)


def test_the_references_form_counts_a_step_twice() -> None:
    """The true gradient, and the single step's on top of it: 76 % away."""
    q, p = policies()
    seen = look(q, p)
    single = torch.autograd.grad((seen.log_q.detach().sum(1).exp()[:, None] * seen.kl).sum(), q)[0]
    found = expected(q, p, PolicyGradient("reference"))
    assert_close(found, true_gradient(q, p) + single, **EXACTLY)
    assert error(found, true_gradient(q, p)) == pytest.approx(0.756, abs=5e-4)


def test_what_the_approximations_cost() -> None:
    """Measured on these policies: of one factor as the weight, of eq. 5's product, and of means in the place of sums."""
    q, p = policies()
    wanted = true_gradient(q, p)
    token = expected(q, p, replace(PAPER, teacher_share=0.2))
    assert error(token, wanted) == pytest.approx(0.2175, abs=5e-4)
    means = expected(q, p, replace(PAPER, length_normalised=True))
    assert error(means, wanted) == pytest.approx(0.197, abs=5e-4)
    # eq. 5 as it is printed: w_t = the product up to t, before all of R_{t+1}
    seen = look(q, p)
    ours = seen.log_q.detach()
    mixed = torch.log(0.8 * ours.exp() + 0.2 * seen.log_p.exp())
    weights, rewards = (ours - mixed).cumsum(1).exp(), seen.log_p - ours
    later = rewards.sum(1, keepdim=True) - rewards.cumsum(1)
    loss = mixed.sum(1).exp() * (weights * (seen.kl - later * seen.log_q)).sum(1)
    assert error(torch.autograd.grad(loss.sum(), q)[0], wanted) == pytest.approx(0.2086, abs=5e-4)


@pytest.mark.parametrize("variant", ["paper", "reference"])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_student_that_is_its_teacher_has_no_gradient_on_any_sample(
    variant: Variant, normalised: bool, share: float
) -> None:
    q, _ = policies()
    seen = look(q, q.detach())
    for row in range(0, len(SEQUENCES), 5):
        loss = PolicyGradient(variant, share, length_normalised=normalised).surrogate(seen)[row]
        assert loss.item() == pytest.approx(0.0, abs=1e-14)
        gradient = torch.autograd.grad(loss, q, retain_graph=True)[0]
        assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-14)


# -- by hand: rewards 1, -2, 4 of three tokens, and one of 8 in the second row -----------------------------------------------


def by_hand() -> tuple[Written, Tensor]:
    log_q = torch.full((2, 4), -1.0, dtype=torch.float64).requires_grad_()
    rewards = torch.tensor([[99.0, 1.0, -2.0, 4.0], [99.0, 8.0, 99.0, float("nan")]], dtype=torch.float64)
    mask = torch.tensor([[False, True, True, True], [False, True, False, False]])
    kl = torch.where(mask, torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64), torch.nan)
    return Written(kl, log_q, rewards + log_q.detach(), mask), log_q


@pytest.mark.parametrize(
    ("estimator", "wanted"),
    [
        (PAPER, [[0, 2, 4, 0], [0, 0, 0, 0]]),
        (replace(PAPER, length_normalised=True), [[0, 1, 4, 0], [0, 0, 0, 0]]),
        (replace(PAPER, reward_clip=3.0), [[0, 1, 3, 0], [0, 0, 0, 0]]),
        (replace(PAPER, reward_clip=1.5), [[0, 0, 1.5, 0], [0, 0, 0, 0]]),
        (PolicyGradient("reference"), [[0, 3, 2, 4], [0, 8, 0, 0]]),
        (PolicyGradient("reference", length_normalised=True), [[0, 1, 1, 4], [0, 8, 0, 0]]),
    ],
)  # fmt: skip
def test_returns_by_hand(estimator: PolicyGradient, wanted: list[list[float]]) -> None:
    """Tokens that were not written count nowhere, whatever stands there, and have no gradient."""
    written, log_q = by_hand()
    returns = torch.tensor(wanted, dtype=torch.float64)
    assert_close(estimator.returns(written), returns, **EXACT)
    found = estimator.surrogate(written)
    assert_close(
        found.detach(), torch.tensor([0.9, 0.2], dtype=torch.float64) + returns.sum(1)
    )  # - R log q, log q = -1
    assert_close(torch.autograd.grad(found.sum(), log_q)[0], -returns)
    moved = estimator.surrogate(written, centre=0.5, scale=2.0)
    advantages = torch.where(written.mask, (returns - 0.5) / 2.0, 0.0)
    assert_close(torch.autograd.grad(moved.sum(), log_q)[0], -advantages)


def test_weights_by_hand() -> None:
    """q = e^-1 of each token, p = q e^r, p~ = 3/4 q + 1/4 p, so that w = 1 / (3/4 + e^r / 4)."""
    written, log_q = by_hand()
    w = [1 / (0.75 + 0.25 * torch.tensor(r).double().exp()) for r in (1.0, -2.0, 4.0)]
    token = PolicyGradient(teacher_share=0.25)
    found = torch.autograd.grad(token.surrogate(written).sum(), log_q)[0][0]
    assert_close(found, -torch.stack([w[0] * 0, w[0] * 2, w[1] * 4, w[2] * 0]))
    assert_close(token.surrogate(written)[0].detach(), w[0] * 2.2 + w[1] * 4.3 + w[2] * 0.4)
    exactly = replace(token, weights="exact")
    found = torch.autograd.grad(exactly.surrogate(written).sum(), log_q)[0][0]
    later = [w[0] * w[1] * -2 + w[0] * w[1] * w[2] * 4, w[0] * w[1] * w[2] * 4]
    assert_close(found, -torch.stack([w[0] * 0, later[0], later[1], w[0] * 0]))
    assert_close(exactly.surrogate(written)[0].detach(), 0.2 + later[0] + w[0] * 0.3 + later[1] + w[0] * w[1] * 0.4)
    reference = PolicyGradient("reference", 0.25)
    # its single step has no weight
    assert_close(reference.surrogate(written)[0].detach(), 0.9 + w[0] * 3 + w[1] * 2 + w[2] * 4)
    assert_close(token.returns(written), PAPER.returns(written), **EXACT)
