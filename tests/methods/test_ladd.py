"""One step of LADD: what each phase sees, moves and leaves alone, and what is told of it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from adversaries import Convolutional, Prompted, batch, game, learning, moved, penalties, student_gradients
from torch import Tensor
from torch.testing import assert_close
from toys import EXACT, options, recorded, sd_table

from stepdistill.batch import Batch
from stepdistill.diffusion.losses import discriminator_loss, generator_loss
from stepdistill.methods.adversarial import distillation, diversity
from stepdistill.methods.ladd import LADD
from stepdistill.training.trainer import Trainer


def test_the_phases_are_the_discriminators_and_then_the_students() -> None:
    method = game(discriminator_rate=2.5)
    assert [(p.trains, p.every, p.rate) for p in method.phases()] == [
        (("discriminator",), 1, 2.5),
        (("student",), 1, 1.0),
    ]
    assert list(method.networks()) == ["student", "discriminator"]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_gradients_reach_the_student_through_a_frozen_teacher(kind: str) -> None:
    teacher = Convolutional()
    method = moved(game(kind, teacher))
    before = {name: value.clone() for name, value in teacher.module.state_dict().items() if "lora" not in name}
    found = student_gradients(method, batch())
    assert all(float(g.abs().max()) > 0 for g in found)
    assert all(p.grad is None for p in method.discriminator.trainable())
    base = {n: p for n, p in teacher.module.named_parameters() if "lora" not in n}
    assert all(not p.requires_grad and p.grad is None for p in base.values())
    after = {name: value for name, value in teacher.module.state_dict().items() if "lora" not in name}
    assert_close(after, before, **EXACT)


def test_the_students_gradient_by_hand() -> None:
    method, one = moved(game()), batch()
    found = student_gradients(method, one)
    look = method.look(one)
    x_hat = method.student(look.x_t, look.t, one.cond).x0
    a, s = (f(look.level).float()[:, None, None, None] for f in (method.schedule.alpha, method.schedule.sigma))
    maps = method.features(a * x_hat + s * look.eps, look.level, one.cond)
    logits = method.discriminator(maps, look.condition)
    loss = torch.stack([-part.mean() for part in logits]).mean()
    assert_close(found, list(torch.autograd.grad(loss, method.student.trainable())))


@pytest.mark.parametrize("loss_type", ["hinge", "non_saturating"])
def test_the_discriminators_loss_by_hand(loss_type: Any) -> None:
    method, one = moved(game(loss_type=loss_type, r1_gamma=0.0)), batch()
    with learning(method, "discriminator"):
        losses = method.discriminate(one)
    look = method.look(one)
    with torch.no_grad():
        x_hat = method.student(look.x_t, look.t, one.cond).x0
        logits = [
            method.discriminator(method.features(method.schedule.add_noise(x, look.eps, look.level), look.level, one.cond),
                                 look.condition)
            for x in (one.data(), x_hat)
        ]  # fmt: skip
    wanted = torch.stack([discriminator_loss(loss_type, r, f) for r, f in zip(*logits, strict=True)]).mean()
    assert set(losses.terms) == {"real_or_made"} and losses.count == 4
    assert_close(losses.total.detach(), wanted)
    assert_close(losses.metrics["logit_real"], torch.stack([part.mean() for part in logits[0]]).mean())
    assert_close(losses.metrics["logit_fake"], torch.stack([part.mean() for part in logits[1]]).mean())
    with learning(method, "student"):
        deceived = method.deceive(one)
    adversarial = deceived.terms["adversarial"]
    assert deceived.count == 4
    assert_close(adversarial.detach(), torch.stack([generator_loss(loss_type, f) for f in logits[1]]).mean())
    losses.total.backward()
    assert all(p.grad is None for p in method.student.trainable()), "the phase needs no graph of the student"
    none = [
        n for n, p in method.discriminator.named_trainable().items() if p.grad is None or float(p.grad.abs().max()) == 0
    ]
    assert all(name.endswith("last.bias") for name in none), "what a margin not reached adds to both sides alike"


def test_real_and_made_share_noise_and_level_and_both_phases_see_one_sample() -> None:
    method, one = moved(game(r1_gamma=0.0)), batch()
    seen: list[tuple[Tensor, Tensor]] = []
    original = method.teacher.call

    def call(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        seen.append((x_t.detach(), t))
        return original(x_t, t, cond)

    method.teacher.call = call  # type: ignore[method-assign]
    method.taken = 1  # no look of the guard
    with recorded(method.student.module) as forwards:
        method.discriminate(one)
        method.deceive(one)
    (both, t_both), (again, t_again) = seen
    (x_real, x_fake), (t_real, t_fake) = both.chunk(2), t_both.chunk(2)
    assert torch.equal(t_real, t_fake) and torch.equal(t_real, t_again)
    assert torch.equal(x_fake, again), "the student has not changed in between"
    look = one.memo["look"]
    assert method.look(one) is look, "drawn once"
    a, s = (f(t_real).float()[:, None, None, None] for f in (method.schedule.alpha, method.schedule.sigma))
    assert_close(x_real - a * one.data(), s * look.eps)
    x_hat = (x_fake - s * look.eps) / a
    assert_close(x_hat, method.student(look.x_t, look.t, one.cond).x0.detach(), rtol=1e-3, atol=1e-4)
    assert [graph for _, graph in forwards] == [False, True]
    assert torch.equal(forwards[0][0][0], forwards[1][0][0])


def test_the_discriminators_noise_is_not_the_students() -> None:
    """Or it could tell a sample by the noise that made it."""
    look = game(warmup_steps=0, probabilities=(1.0, 0.0, 0.0, 0.0)).look(batch(50))
    both = torch.stack([look.x_t.flatten(), look.eps.flatten()])  # at the first time x_t is the noise
    assert abs(float(both.corrcoef()[0, 1])) < 5 / both.shape[1] ** 0.5


def test_diversity_is_of_two_samples_of_each_prompt_from_pure_noise() -> None:
    method, one = moved(game(guard_every=1)), batch()
    found = penalties(method, one).metrics["diversity"]
    with torch.no_grad():
        a, b = (
            method.student(one.rng.normal(f"guard {i}", (1, 4, 4)), torch.ones(4).double(), one.cond).x0 for i in (0, 1)
        )
    assert float(found) > 0.01
    assert_close(found, diversity(a, b, one.data()))


def test_the_level_is_logit_normal_and_the_time_has_its_chances() -> None:
    method = game(probabilities=(0.5, 0.0, 0.0, 0.5), noise_mean=0.4, noise_std=0.7, warmup_steps=2)
    data = Prompted()
    look = method.look(batch(800, data=data))
    z = (torch.logit(look.level) - 0.4) / 0.7
    assert abs(float(z.mean())) < 5 / 800**0.5 and abs(float(z.std()) - 1) < 5 / 1600**0.5
    assert look.t.unique().tolist() == [0.25, 0.5, 0.75, 1.0], "the warm-up's own chances"
    method.taken = 2
    late = method.look(batch(800, data=data)).t
    assert late.unique().tolist() == [0.25, 1.0] and abs(float((late == 1).double().mean()) - 0.5) < 5 * 0.5 / 800**0.5
    tabulated = game(teacher=Convolutional(sd_table()))
    levels = 1000 * tabulated.look(batch(50)).level
    assert_close(levels, levels.round(), rtol=0, atol=1e-9)


# -- the distillation term -------------------------------------------------------------------------------------------------


def test_the_distillation_term_is_added_at_the_same_level_and_noise() -> None:
    method, one = moved(game(distillation=3.0, w=1.5)), batch()
    with learning(method, "student"):
        losses = method.deceive(one)
    look = method.look(one)
    x_hat = method.student(look.x_t, look.t, one.cond).x0
    wanted = distillation(method.teacher, x_hat, look.level, look.eps, one.cond, one.uncond, 1.5).mean()
    assert_close(losses.terms["distillation"], 3.0 * wanted)
    plain = moved(game())
    with learning(plain, "student"):
        assert set(plain.deceive(batch()).terms) == {"adversarial"}


# -- the loop --------------------------------------------------------------------------------------------------------------


def snapshot(method: LADD) -> dict[str, dict[str, Tensor]]:
    return {role: {n: v.clone() for n, v in net.state().items()} for role, net in method.networks().items()}


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_only_the_roles_of_a_phase_move_in_it(tmp_path: Path, kind: str) -> None:
    teacher = Convolutional()
    before = copy.deepcopy({n: v for n, v in teacher.module.state_dict().items()})
    method = game(kind, teacher)
    states: list[tuple[str, dict[str, dict[str, Tensor]], tuple[str, ...]]] = []

    def noting(name: str, loss: Any) -> Any:
        def run(one: Batch) -> Any:
            learns = [role for role, net in method.networks().items() if all(p.requires_grad for p in net.trainable())]
            states.append((name, snapshot(method), tuple(learns)))
            return loss(one)

        return run

    method.discriminate = noting("discriminator", method.discriminate)  # type: ignore[method-assign]
    method.deceive = noting("student", method.deceive)  # type: ignore[method-assign]
    Trainer(options(max_train_steps=3, train_batch_size=4), tmp_path).fit(method, Prompted())
    assert [name for name, _, _ in states] == ["discriminator", "student"] * 3
    assert all(learns == (name,) for name, _, learns in states)
    ends = [*states[1:], ("end", snapshot(method), ())]
    for (name, was, _), (_, now, _) in zip(states, ends, strict=True):
        changed = {role: {n for n in was[role] if not torch.equal(was[role][n], now[role][n])} for role in was}
        vectors = {n for n in was["discriminator"] if n.endswith((".u", ".v"))}
        if name == "discriminator":
            assert changed["student"] == set() and changed["discriminator"] == set(was["discriminator"]) - vectors - {
                "scales"
            }
        else:
            assert changed["student"] == set(was["student"])
            assert changed["discriminator"] <= vectors and changed["discriminator"], "the norms follow after the step"
    after = {n.replace(".base_layer", ""): v for n, v in teacher.module.state_dict().items() if "lora" not in n}
    assert_close(after, before, **EXACT)


def test_a_lora_student_starts_with_one_half_of_its_adapter_at_zero(tmp_path: Path) -> None:
    """Its first gradient reaches B alone; the game moves it all the same."""
    method = game("lora")
    found = student_gradients(method, batch())
    assert sum(float(g.abs().max()) > 0 for g in found) == 3


def test_the_guard_looks_after_the_warm_up_and_a_collapse_is_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A student whose samples do not depend on the noise."""
    teacher = Convolutional()
    student = teacher.full_student()
    with torch.no_grad():
        student.module.last.weight.zero_()
    student.predicts = "x0"
    config = game(guard_every=1, warmup_steps=4).config
    method = LADD(config, student, teacher, (1, 4, 4), {"label": torch.zeros(1).long()})
    Trainer(options(max_train_steps=12, train_batch_size=4, learning_rate=1e-9), tmp_path).fit(method, Prompted())
    lines = [r.getMessage() for r in caplog.records if "collapsed" in r.getMessage()]
    (line,) = lines
    assert line.startswith("step 9: the student has collapsed")  # five looks from the fifth step on
    assert "--method.distillation" in line
    assert [r.levelname for r in caplog.records if "collapsed" in r.getMessage()] == ["WARNING"]


def test_the_metrics_of_a_step(tmp_path: Path) -> None:
    from toys import rows

    method = game(guard_every=2, r1_every=2)
    Trainer(options(max_train_steps=4, train_batch_size=4), tmp_path).fit(method, Prompted())
    found = rows(tmp_path)
    always = {"logit_real", "logit_fake", "accuracy", "real_or_made", "adversarial"}
    always |= {"loss/discriminator", "loss/student", "grad_norm/discriminator", "grad_norm/student"}
    assert all(always <= row.keys() for row in found)
    assert [("r1" in row, "diversity" in row) for row in found] == [(True, True), (False, False)] * 2
    assert all(0 <= row["accuracy"] <= 1 for row in found)
