"""Divergences: closed forms on two tokens, gradients against autograd, bounds, limits and symmetries."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stepdistill.errors import InputError
from stepdistill.kd.divergences import Divergence, Kind, log_probs

KINDS = get_args(Kind)
TIGHT = {"rtol": 0.0, "atol": 1e-12}
P, Q = (0.7, 0.3), (0.4, 0.6)


def logits(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    """Float64, scale^2 their variance."""
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kl(a: tuple[float, float], b: tuple[float, float]) -> float:
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))


def mixed(share: float, a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    return (share * a[0] + (1 - share) * b[0], share * a[1] + (1 - share) * b[1])


BY_HAND = {
    "forward_kl": kl(P, Q),
    "reverse_kl": kl(Q, P),
    "jsd": 0.2 * kl(P, mixed(0.2, P, Q)) + 0.8 * kl(Q, mixed(0.2, P, Q)),
    "skew_kl": kl(P, mixed(0.1, P, Q)),
    "skew_reverse_kl": kl(Q, mixed(0.1, Q, P)),
    "tvd": 0.3,
}


@pytest.mark.parametrize("kind", KINDS)
def test_values_on_two_tokens_by_hand(kind: Kind) -> None:
    q, p = torch.tensor([Q], dtype=torch.float64).log(), torch.tensor([P], dtype=torch.float64).log()
    wanted = torch.tensor([BY_HAND[kind]], dtype=torch.float64)
    divergence = Divergence(kind, beta=0.2, alpha=0.1)
    assert_close(divergence(q + 3.0, p - 1.0), wanted, **TIGHT)  # logits mean the same up to a constant
    assert_close(divergence.value_and_gradient(q, p)[0], wanted, **TIGHT)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("parameter", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_closed_form_are_those_of_autograd(kind: Kind, parameter: float, temperature: float) -> None:
    divergence = Divergence(kind, parameter, parameter, temperature)
    z, teacher = logits(3, 4, 11).requires_grad_(), logits(3, 4, 11, seed=1)
    values = divergence(z, teacher)
    (wanted,) = torch.autograd.grad(values.sum(), z)
    value, gradient = divergence.value_and_gradient(*divergence.log_probs(z, teacher))
    assert_close(value, values.detach(), **TIGHT)
    assert_close(gradient, wanted, **TIGHT)
    assert not gradient.requires_grad and wanted.abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_autograd_agrees_with_finite_differences(kind: Kind) -> None:
    divergence = Divergence(kind, 0.3, 0.2, 1.5)
    z, teacher = logits(2, 5).requires_grad_(), logits(2, 5, seed=1)
    assert torch.autograd.gradcheck(lambda z: divergence(z, teacher), (z,))
    assert kind == "tvd" or torch.autograd.gradgradcheck(lambda z: divergence(z, teacher), (z,))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_lost_and_nothing_moves_where_the_two_agree(kind: Kind) -> None:
    divergence = Divergence(kind, 0.3, 0.2, 2.0)
    z = logits(6, 9).requires_grad_()
    shift = 0.0 if kind == "tvd" else 1.0  # the sign of a rounding error is one, too
    value, gradient = divergence.value_and_gradient(*divergence.log_probs(z, z.detach() + shift))
    assert_close(value, torch.zeros(6, dtype=torch.float64), **TIGHT)
    assert_close(gradient, torch.zeros(6, 9, dtype=torch.float64), **TIGHT)
    single = z.detach().float()
    value, gradient = divergence.value_and_gradient(*divergence.log_probs(single, single))
    assert value.abs().max() < 4e-6 and gradient.abs().max() < 4e-6


@pytest.mark.parametrize("kind", KINDS)
def test_all_are_positive_and_bounded_where_a_mixture_bounds_them(kind: Kind) -> None:
    """Also for distributions that have next to nothing in common."""
    divergence = Divergence(kind, 0.5, 0.1)
    far = torch.tensor([[60.0, 0.0, -60.0]], dtype=torch.float64)
    z, teacher = torch.cat([logits(50, 3), far]), torch.cat([logits(50, 3, seed=1), far.flip(1)])
    values = divergence(z, teacher)
    bound = {"jsd": math.log(2), "skew_kl": -math.log(0.1), "skew_reverse_kl": -math.log(0.1), "tvd": 1.0}
    assert values.min() > 0 and values.max() <= bound.get(kind, math.inf) + 1e-12
    reached = {"forward_kl": 120.0, "reverse_kl": 120.0, **bound}[kind]
    assert_close(values[-1], torch.tensor(reached, dtype=torch.float64), rtol=1e-9, atol=0.0)


def test_the_jsd_is_symmetric_with_beta_turned_round() -> None:
    a, b = logits(7, 8), logits(7, 8, seed=1)
    assert_close(Divergence("jsd", 0.3)(a, b), Divergence("jsd", 0.7)(b, a), **TIGHT)
    assert (Divergence("jsd", 0.3)(a, b) - Divergence("jsd", 0.3)(b, a)).abs().max() > 1e-3


def test_the_other_symmetries() -> None:
    a, b = logits(7, 8), logits(7, 8, seed=1)
    assert_close(Divergence("forward_kl")(a, b), Divergence("reverse_kl")(b, a), **TIGHT)
    assert_close(Divergence("skew_kl", alpha=0.2)(a, b), Divergence("skew_reverse_kl", alpha=0.2)(b, a), **TIGHT)
    assert_close(Divergence("tvd")(a, b), Divergence("tvd")(b, a), **TIGHT)


@pytest.mark.parametrize(("end", "kind", "near"), [(0.0, "forward_kl", 1e-6), (1.0, "reverse_kl", 1.0 - 1e-6)])
def test_the_ends_of_beta(end: float, kind: Kind, near: float) -> None:
    """Exactly 0 and 1 are the KLs; near them the paper's form vanishes, and the normalised one is almost a KL."""
    z, teacher = logits(5, 6).requires_grad_(), logits(5, 6, seed=1)
    pure = Divergence(kind)(z, teacher)
    assert_close(Divergence("jsd", end)(z, teacher), pure, **TIGHT)
    assert_close(Divergence("jsd", end, normalised=True)(z, teacher), pure, **TIGHT)
    share = min(near, 1.0 - near)
    assert_close(Divergence("jsd", near)(z, teacher) / share, pure, rtol=1e-4, atol=0.0)
    close = Divergence("jsd", near, normalised=True)
    assert_close(close(z, teacher), pure, rtol=1e-4, atol=0.0)
    (wanted,) = torch.autograd.grad(pure.sum(), z)
    assert_close(close.value_and_gradient(*close.log_probs(z, teacher))[1], wanted, rtol=1e-3, atol=1e-5)


def test_a_small_beta_has_a_small_gradient() -> None:
    z, teacher = logits(5, 6), logits(5, 6, seed=1)

    def size(divergence: Divergence) -> float:
        return float(divergence.value_and_gradient(*divergence.log_probs(z, teacher))[1].norm())

    assert 0.0009 < size(Divergence("jsd", 0.001)) / size(Divergence("forward_kl")) < 0.001


@pytest.mark.parametrize(("kind", "pure"), [("skew_kl", "forward_kl"), ("skew_reverse_kl", "reverse_kl")])
def test_without_a_skew_they_are_the_kls_also_where_probabilities_underflow(kind: Kind, pure: Kind) -> None:
    z, teacher = logits(5, 6, scale=300.0).float(), logits(5, 6, seed=1, scale=300.0).float()
    assert_close(Divergence(kind, alpha=0.0)(z, teacher), Divergence(pure)(z, teacher), rtol=0, atol=0)
    assert Divergence(pure)(z, teacher).max() > 200  # more than the logarithm of the smallest float32


@pytest.mark.parametrize("kind", KINDS)
def test_the_temperature_scales_logits_by_one_over_t_and_the_loss_by_t_squared(kind: Kind) -> None:
    z, teacher, t = logits(4, 7).requires_grad_(), logits(4, 7, seed=1), 3.0
    plain, hot = Divergence(kind, 0.3, 0.2), Divergence(kind, 0.3, 0.2, t)
    assert_close(hot(z, teacher), t**2 * plain(z / t, teacher / t), **TIGHT)
    gradient = hot.value_and_gradient(*hot.log_probs(z, teacher))[1]
    cool = plain.value_and_gradient(*plain.log_probs(z / t, teacher / t))[1]
    assert_close(gradient, t * cool, **TIGHT)


def test_forward_kl_at_a_high_temperature_matches_centred_logits() -> None:
    """T^2 KL -> |z_S - z_T|^2 / 2V of centred logits (arXiv 1503.02531, section 2.1), so gradients keep their size."""
    z, teacher = (x - x.mean(-1, keepdim=True) for x in (logits(4, 7), logits(4, 7, seed=1)))
    wanted = (z - teacher).square().mean(-1) / 2
    assert_close(Divergence(temperature=1e4)(z, teacher), wanted, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_tables_of_other_sizes_are_restricted_to_what_they_share(kind: Kind) -> None:
    divergence = Divergence(kind, 0.3, 0.2, 2.0)
    z, teacher = logits(3, 9).requires_grad_(), logits(3, 6, seed=1)
    assert_close(divergence(z, teacher), divergence(z[:, :6], teacher), rtol=0, atol=0)
    assert_close(divergence(teacher, z), divergence(teacher, z[:, :6]), rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(divergence(z, teacher).sum(), z)
    assert gradient[:, 6:].abs().max() == 0
    assert_close(
        gradient[:, :6].sum(1), torch.zeros(3, dtype=torch.float64), **TIGHT
    )  # renormalised: it is a softmax's


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_before_the_softmax(kind: Kind, dtype: torch.dtype) -> None:
    divergence = Divergence(kind, 0.3, 0.2, 2.0)
    z, teacher = logits(3, 500).to(dtype), logits(3, 500, seed=1).to(dtype)
    found = divergence(z, teacher)
    assert found.dtype == torch.float32
    assert_close(found.double(), divergence(z.double(), teacher.double()), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_suppressed_tokens_count_nothing(kind: Kind) -> None:
    """Logits of -inf in both: as if the entries were not there."""
    divergence = Divergence(kind, 0.3, 0.2)
    z, teacher = logits(3, 6), logits(3, 6, seed=1)
    none = torch.full((3, 2), -math.inf, dtype=torch.float64)
    wide, wide_teacher = torch.cat([z, none], 1), torch.cat([teacher, none], 1)
    assert_close(divergence(wide, wide_teacher), divergence(z, teacher), **TIGHT)
    value, gradient = divergence.value_and_gradient(*divergence.log_probs(wide, wide_teacher))
    assert_close(value, divergence(z, teacher), **TIGHT)
    assert_close(gradient[:, 6:], torch.zeros(3, 2, dtype=torch.float64), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_logit_is_not_hidden(kind: Kind) -> None:
    z, teacher = logits(2, 5), logits(2, 5, seed=1)
    z[0, 3] = math.nan
    found = Divergence(kind)(z, teacher)
    assert found[0].isnan() and found[1].isfinite()


def test_the_teacher_gets_no_gradient() -> None:
    z, teacher = logits(2, 5).requires_grad_(), logits(2, 5, seed=1).requires_grad_()
    Divergence("jsd")(z, teacher).sum().backward()
    assert z.grad is not None and teacher.grad is None


def test_log_probs_are_those_of_a_softmax() -> None:
    z = logits(3, 8)
    assert_close(log_probs(z, 2.0), torch.softmax(z / 2.0, -1).log(), **TIGHT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "kl"}, "divergence.kind"),
        ({"kind": "jsd", "beta": 1.2}, r"beta in \[0, 1\]"),
        ({"kind": "skew_kl", "alpha": 1.0}, "no student left"),
        ({"kind": "skew_kl", "alpha": -0.1}, "alpha"),
        ({"temperature": 0.0}, "temperature > 0"),
        ({"temperature": math.inf}, "temperature > 0"),
        ({"kind": "tvd", "normalised": True}, "jsd alone"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Divergence(**options)  # type: ignore[arg-type]


def test_logits_of_other_tokens() -> None:
    with pytest.raises(ValueError, match="of the same tokens"):
        Divergence()(logits(2, 5), logits(3, 5))
