"""R1 and its approximation in a step of LADD: where they are taken, when, and how much they count."""

import torch
from adversaries import batch, game, moved, penalties
from torch.testing import assert_close


def test_r1_is_taken_on_the_heads_inputs_at_real_samples() -> None:
    method, one = moved(game(r1_gamma=0.6)), batch()
    losses = penalties(method, one)
    look = method.look(one)
    maps = method.features(method.schedule.add_noise(one.data(), look.eps, look.level), look.level, one.cond)
    per_head = []
    for i in range(len(maps)):
        inputs = [m.detach().requires_grad_(True) for m in maps]
        logits = method.discriminator(inputs, look.condition)[i]
        (gradient,) = torch.autograd.grad(logits.sum(), inputs[i])
        per_head.append(gradient.square().sum((1, 2, 3)).mean() / logits.shape[1])
    wanted = torch.stack(per_head).mean()
    assert_close(losses.metrics["r1"].detach(), wanted)
    assert_close(losses.terms["r1_penalty"].detach(), 0.3 * wanted)
    assert set(losses.terms) == {"real_or_made", "r1_penalty"}
    losses.terms["r1_penalty"].backward()
    taught = [
        n for n, p in method.discriminator.named_trainable().items() if p.grad is not None and p.grad.abs().max() > 0
    ]
    assert {f"heads.{i}.{layer}.weight" for i in (0, 1) for layer in ("point", "around", "last")} <= set(taught)


def test_lazy_penalties_come_every_k_steps_times_k() -> None:
    at_once, lazy = (moved(game(r1_gamma=0.6, approximate_r1=2.0, r1_every=k)) for k in (1, 4))
    wanted = penalties(at_once, batch()).terms
    found = penalties(lazy, batch()).terms
    for name in ("r1_penalty", "approximate_r1_penalty"):
        assert_close(found[name].detach(), 4 * wanted[name].detach())
        assert float(wanted[name].detach()) > 0
    for lazy.taken in (1, 2, 3):
        assert set(penalties(lazy, batch()).terms) == {"real_or_made"}
    lazy.taken = 4
    assert set(penalties(lazy, batch()).terms) == {"real_or_made", "r1_penalty", "approximate_r1_penalty"}


def test_approximate_r1_is_exactly_zero_without_noise() -> None:
    """The perturbed input differs from the real one by sigma n and nothing else."""
    method = moved(game(approximate_r1=2.0, approximate_r1_sigma=0.0))
    losses = penalties(method, batch())
    assert float(losses.metrics["approximate_r1"].detach()) == 0.0


def test_approximate_r1_adds_its_noise_to_the_teachers_input() -> None:
    method, one = moved(game(approximate_r1=2.0, approximate_r1_sigma=0.05)), batch()
    losses = penalties(method, one)
    look, n = method.look(one), one.rng.normal("perturbation", (1, 4, 4))
    x_real = method.schedule.add_noise(one.data(), look.eps, look.level)
    with torch.no_grad():
        logits, near = (
            method.discriminator(method.features(x, look.level, one.cond), look.condition)
            for x in (x_real, x_real + 0.05 * n)
        )
        wanted = torch.stack([(p - q).square().mean() for p, q in zip(logits, near, strict=True)]).mean()
    assert_close(losses.metrics["approximate_r1"].detach(), wanted)
    assert_close(losses.terms["approximate_r1_penalty"].detach(), 2.0 * wanted)


def test_r1_is_taken_in_float32_under_autocast() -> None:
    """Of features in half precision, by heads in full."""
    method, one = moved(game(r1_gamma=1.0)), batch()
    with torch.autocast("cpu", torch.bfloat16):
        losses = penalties(method, one)
    look = method.look(one)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        maps = method.features(method.schedule.add_noise(one.data(), look.eps, look.level), look.level, one.cond)
    assert any(m.dtype == torch.bfloat16 for m in maps)
    inputs = [m.float().requires_grad_(True) for m in maps]
    parts = []
    for logits, given in zip(method.discriminator(inputs, look.condition), inputs, strict=True):
        (gradient,) = torch.autograd.grad(logits.sum(), given, retain_graph=True)
        parts.append(gradient.square().sum((1, 2, 3)).mean() / logits.shape[1])
    assert losses.metrics["r1"].dtype == torch.float32
    assert_close(losses.metrics["r1"].detach(), torch.stack(parts).mean(), rtol=1e-5, atol=0)
