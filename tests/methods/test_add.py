"""One step of ADD: what each phase sees, moves and leaves alone, and the distillation term in closed form."""

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from adversaries import Convolutional, Prompted, batch, learning, moved, student_gradients
from eyes import Decoder, Sight, add_config, show, sight
from torch import Tensor, nn
from torch.testing import assert_close
from toys import EXACT, MEAN, STD, options, recorded, rows, sd_table

from stepdistill.batch import Batch
from stepdistill.diffusion.losses import discriminator_loss, generator_loss, mse
from stepdistill.diffusion.schedule import Cosine, Flow, NoiseSchedule
from stepdistill.diffusion.timesteps import trainable
from stepdistill.errors import InputError
from stepdistill.families.analytic import Gaussian, TwoClass
from stepdistill.methods.add import ADD
from stepdistill.methods.adversarial import distillation, diversity
from stepdistill.networks.augmentation import KINDS, Augmentation
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.image_features import ImageFeatures
from stepdistill.randomness import StepRandom
from stepdistill.training.trainer import Trainer

PLAIN: dict[str, Any] = {"distillation": 0.0, "r1_gamma": 0.0}


def frozen(method: ADD) -> list[nn.Module]:
    decoder: Any = method._decode
    return [method.eye.net.module, decoder]


def test_the_phases_are_the_discriminators_and_then_the_students() -> None:
    method = show(discriminator_rate=2.5)
    assert [(p.trains, p.every, p.rate) for p in method.phases()] == [
        (("discriminator",), 1, 2.5),
        (("student",), 1, 1.0),
    ]
    assert list(method.networks()) == ["student", "discriminator"]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_gradients_reach_the_student_through_eye_and_decoder_and_neither_changes(kind: str) -> None:
    teacher = Convolutional()
    method = moved(show(kind, teacher, distillation=0.0))
    states = [copy.deepcopy(module.state_dict()) for module in frozen(method)]
    base = {n: v.clone() for n, v in teacher.module.state_dict().items() if "lora" not in n}
    found = student_gradients(method, batch())
    assert all(float(g.abs().max()) > 0 for g in found)
    assert all(p.grad is None for p in method.discriminator.trainable())
    for module, before in zip(frozen(method), states, strict=True):
        assert all(not p.requires_grad and p.grad is None for p in module.parameters())
        assert_close(dict(module.state_dict()), dict(before), **EXACT)
    assert all(p.grad is None for n, p in teacher.module.named_parameters() if "lora" not in n)
    assert_close({n: v for n, v in teacher.module.state_dict().items() if "lora" not in n}, base, **EXACT)


def by_hand(method: ADD, one: Batch, pixels: Tensor) -> list[Tensor]:
    """Logits of pixels, written out: augmented, normalised (no resize), two blocks, heads."""
    look = method.look(one)
    net: Any = method.eye.net.module
    first = net.blocks[0](Augmentation(method.config.augmentations, one.rng)(pixels))  # mean .5 and std .5: as they are
    return method.discriminator([first, net.blocks[1](first.tanh())], look.condition)


def sample(method: ADD, one: Batch) -> Tensor:
    look = method.look(one)
    return method.student(look.x_t, look.t, one.cond).x0


def test_the_students_gradient_by_hand() -> None:
    method, one = moved(show(distillation=0.0)), batch()
    found = student_gradients(method, one)
    logits = by_hand(method, one, method._decode(sample(method, one)))
    loss = torch.stack([-part.mean() for part in logits]).mean()
    assert_close(found, list(torch.autograd.grad(loss, method.student.trainable())))


@pytest.mark.parametrize("loss_type", ["hinge", "non_saturating"])
def test_the_games_losses_by_hand(loss_type: Any) -> None:
    method, one = moved(show(loss_type=loss_type, **PLAIN)), batch()
    with learning(method, "discriminator"):
        losses = method.discriminate(one)
    with torch.no_grad():
        real, made = (by_hand(method, one, method._decode(x)) for x in (one.data(), sample(method, one)))
    wanted = torch.stack([discriminator_loss(loss_type, r, f) for r, f in zip(real, made, strict=True)]).mean()
    assert set(losses.terms) == {"real_or_made"} and losses.count == 4
    assert_close(losses.total.detach(), wanted)
    assert_close(losses.metrics["logit_real"], torch.stack([part.mean() for part in real]).mean())
    with learning(method, "student"):
        deceived = method.deceive(one)
    assert set(deceived.terms) == {"adversarial"} and deceived.count == 4
    assert_close(deceived.total.detach(), torch.stack([generator_loss(loss_type, f) for f in made]).mean())
    losses.total.backward()
    assert all(p.grad is None for p in method.student.trainable()), "the phase needs no graph of the student"


def test_real_pictures_are_decoded_data_and_all_are_treated_alike_in_both_phases() -> None:
    method, one = moved(show(crop=3, **PLAIN)), batch()
    method.taken = 1  # no look of the guard
    seen: list[Tensor] = []
    decode = method._decode
    method._decode = lambda latents: (seen.append(latents.detach()), decode(latents))[1]
    with recorded(method.eye.net.module.blocks[0]) as looks, recorded(method.student.module) as forwards:
        method.discriminate(one)
        method.deceive(one)
    (real,), (made,), (again,) = (inputs for inputs, _ in looks)
    assert [graph for _, graph in looks] == [False, False, True] and [graph for _, graph in forwards] == [False, True]
    look = method.look(one)
    assert method.look(one) is look, "drawn once"
    parts = [
        torch.stack([x[:, y : y + 3, c : c + 3] for x, (y, c) in zip(latents, look.corner.tolist(), strict=True)])
        for latents in (one.data(), sample(method, one).detach())
    ]
    assert len({tuple(corner) for corner in look.corner.tolist()}) > 1
    assert_close(seen, [parts[0], parts[1], parts[1]])  # decoded alone
    small = method.eye.prepared(look.augmentation(decode(parts[0])))
    assert_close(real, small)
    assert_close(made, method.eye.prepared(look.augmentation(decode(parts[1]))))
    assert torch.equal(made, again), "the student has not changed in between"


def test_crops_are_anywhere_and_each_as_likely() -> None:
    corners = show(crop=3).look(batch(400)).corner
    assert corners.shape == (400, 2) and corners.unique().tolist() == [0, 1]
    assert float((corners.double().mean(0) - 0.5).abs().max()) < 5 * 0.5 / 20
    assert (
        show(crop=0).look(batch(5)).corner.unique().tolist()
        == [0]
        == show(crop=4).look(batch(5)).corner.unique().tolist()
    )
    with pytest.raises(InputError, match=r"at most 4 latents.*got 5; fix --method\.crop"):
        show(crop=5)


def test_a_crop_of_all_is_no_crop() -> None:
    whole, cropped = moved(show(crop=0)), moved(show(crop=4))
    assert_close(student_gradients(cropped, batch()), student_gradients(whole, batch()), **EXACT)


# -- what the heads know ---------------------------------------------------------------------------------------------------


def test_heads_know_the_prompt_and_nothing_else_by_default() -> None:
    method, one = show(), batch()
    label = nn.functional.one_hot(one.cond["label"] + 1, 4).float()
    assert_close(method.look(one).condition, nn.functional.layer_norm(label, (4,)))
    plain = ADD(add_config(), Convolutional().full_student(), Convolutional(), sight(), Decoder(), (1, 4, 4), {})
    assert_close(plain.look(Batch(one.data(), {}, {}, one.rng)).condition, torch.ones(4, 1))


def test_heads_may_know_the_real_picture_where_the_student_was_given_something_of_it() -> None:
    method, one = show(image_condition=True), batch(40)
    look = method.look(one)
    seen = method.eye.pooled(method._decode(one.data()))
    wanted = nn.functional.layer_norm(seen, seen.shape[1:])
    image = look.condition[:, 4:]
    informed = look.t < 1
    assert 0 < int(informed.sum()) < 40
    assert_close(image[informed], wanted[informed])
    assert not image[~informed].any(), "pure noise says nothing of it"
    assert not look.condition.requires_grad
    plain = show().look(batch(40))
    assert_close(look.condition[:, :4], plain.condition)


# -- draws ------------------------------------------------------------------------------------------------------------------


def test_every_draw_has_a_stream_of_its_own() -> None:
    """Start noise, the distillation's noise and the guard's differ, and so do the two times."""
    method, one = show(probabilities=(1.0, 0.0, 0.0, 0.0), guard_every=0), batch(60)
    seen: list[Tensor] = []
    original = method.teacher.call

    def call(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        seen.extend((x_t.detach(), t))
        return original(x_t, t, cond)

    method.teacher.call = call  # type: ignore[method-assign]
    with torch.no_grad():
        method.deceive(one)
        x_hat = sample(method, one)
    x_t, t = seen
    a, s = (f(t).float()[:, None, None, None] for f in (method.schedule.alpha, method.schedule.sigma))
    eps = (x_t - a * x_hat) / s
    assert_close(eps, one.rng.normal("distillation noise", (1, 4, 4)), rtol=1e-2, atol=1e-2)
    noises = torch.stack([method.look(one).x_t.flatten(), eps.flatten()])
    assert abs(float(noises.corrcoef()[0, 1])) < 5 / noises.shape[1] ** 0.5
    assert abs(float(t.mean()) - 0.5) < 5 * 12**-0.5 / 60**0.5 and float(t.std()) > 0.2, "uniform"
    assert len(t.unique()) == 60, "a time a sample"


def test_distillation_times_are_those_that_the_teacher_was_trained_at() -> None:
    method, one = show(teacher=Convolutional(sd_table())), batch(30)
    with recorded_times(method.teacher) as seen:
        method.deceive(one)
    levels = 1000 * seen[-1]
    assert_close(levels, levels.round(), rtol=0, atol=1e-9)
    assert float(levels.min()) >= 1 and len(levels.unique()) > 20


class recorded_times:  # noqa: N801
    """The times of a denoiser's calls within it."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser, self.times, self.call = denoiser, [], denoiser.call  # type: ignore[var-annotated]

    def __enter__(self) -> list[Tensor]:
        def call(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
            self.times.append(t)
            return self.call(x_t, t, cond)

        self.denoiser.call = call  # type: ignore[method-assign]
        return self.times

    def __exit__(self, *_: object) -> None:
        self.denoiser.call = self.call  # type: ignore[method-assign]


# -- the distillation term --------------------------------------------------------------------------------------------------


class Given(Denoiser):
    """A student that says the same x0 whatever it is given."""

    def __init__(self, x0: Tensor, schedule: NoiseSchedule) -> None:
        super().__init__(nn.ParameterList([nn.Parameter(x0)]), schedule, "x0")

    def call(self, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        (x0,) = self.net.parameters()
        return x0


@pytest.mark.parametrize("schedule", [sd_table(), Flow(), Cosine()], ids=["table", "flow", "cosine"])
def test_the_distillation_term_of_a_gaussian_teacher_and_its_gradient(schedule: NoiseSchedule) -> None:
    """lambda c [(1 - k a)(x - m) - k s eps]^2, c = a; its gradient 2 lambda c (1 - k a) (...) and no factor more."""
    x0 = torch.tensor([2.7, 1.1, 2.2, 1.6]).expand(6, 1, 4, 4).clone()
    student, teacher, weight = Given(x0, schedule), Gaussian(MEAN, STD, schedule, "x0"), 2.5
    method = ADD(add_config(), student, teacher, sight(), Decoder(), (1, 4, 4), {})
    assert method.config.distillation == weight == 2.5
    one = Batch(torch.zeros(6, 1, 4, 4), {}, {}, StepRandom(0, 0, range(6)))
    term = method.deceive(one).terms["distillation"]
    t = trainable(one.rng.uniform("distillation time"), schedule)
    eps = one.rng.normal("distillation noise", (1, 4, 4)).double()
    a, s = (f(t)[:, None, None, None] for f in (schedule.alpha, schedule.sigma))
    k = a * STD**2 / (a**2 * STD**2 + s**2)
    rest = (1 - k * a) * (x0.double() - MEAN) - k * s * eps
    assert_close(float(term.detach()), float((weight * a * rest.square()).mean()), rtol=1e-4, atol=0)
    (gradient,) = torch.autograd.grad(term, student.trainable())
    exact = 2 * weight * a * rest / x0.numel()
    assert_close(gradient.double(), exact, rtol=1e-3, atol=1e-6)
    attached = (1 - k * a) * exact  # what a missing detach makes of it
    assert float((gradient - attached).abs().max()) > 0.1 * float(gradient.abs().max())


def test_the_teacher_is_guided_as_asked() -> None:
    teacher = TwoClass((2.0, -1.0), STD, Cosine(), "x0", uncond_mean=0.4)
    x0 = torch.randn((2, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    cond, uncond = {"label": torch.tensor([0, 1])}, {"label": torch.tensor([-1, -1])}
    one = Batch(x0, cond, uncond, StepRandom(0, 0, range(2)))
    terms = []
    for w in (0.0, 2.5):
        method = ADD(add_config(w=w), Given(x0, Cosine()), teacher, sight(), Decoder(), (1, 4, 4), cond)
        t, eps = one.rng.uniform("distillation time"), one.rng.normal("distillation noise", (1, 4, 4))
        alone = [
            distillation(teacher.guided(i, w), x0[i : i + 1], t[i : i + 1], eps[i : i + 1], {}, {}) for i in (0, 1)
        ]
        terms.append(method.deceive(Batch(x0, cond, uncond, one.rng)).terms["distillation"].detach())
        assert_close(terms[-1], 2.5 * torch.cat(alone).mean())
    assert abs(float(terms[0] - terms[1])) > 1e-3


def test_the_distance_may_be_measured_on_the_pixels_that_are_judged() -> None:
    method, one = moved(show(distance="pixels", distillation=3.0, w=1.5, crop=3)), batch()
    with learning(method, "student"):
        term = method.deceive(one).terms["distillation"]
    look, x_hat = method.look(one), sample(method, one)
    t = trainable(one.rng.uniform("distillation time"), method.schedule)
    eps = one.rng.normal("distillation noise", (1, 4, 4))
    with torch.no_grad():
        x_t = method.schedule.add_noise(x_hat, eps, t)
        guided = method.teacher.guide(x_t, t, one.cond, one.uncond, torch.full((4,), 1.5, dtype=torch.float64)).x0
        wanted = method.decoded(guided, look.corner)
    c = method.schedule.alpha(t).float()
    by_hand = 3.0 * (c * mse(method.decoded(x_hat, look.corner), wanted)).mean()
    assert_close(term, by_hand)
    found, exact = (torch.autograd.grad(loss, method.student.trainable()) for loss in (term, by_hand))
    assert_close(found, exact)
    on_latents = moved(show(distillation=3.0, w=1.5, crop=3)).deceive(batch()).terms["distillation"]
    assert abs(float((term - on_latents).detach())) > 1e-3


# -- the loop ----------------------------------------------------------------------------------------------------------------


def snapshot(method: ADD) -> dict[str, dict[str, Tensor]]:
    return {role: {n: v.clone() for n, v in net.state().items()} for role, net in method.networks().items()}


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_only_the_roles_of_a_phase_move_in_it(tmp_path: Path, kind: str) -> None:
    teacher = Convolutional()
    method = show(kind, teacher)
    watched = [*frozen(method), teacher.module]
    before = [
        {n.replace(".base_layer", ""): v.clone() for n, v in m.state_dict().items() if "lora" not in n} for m in watched
    ]
    states: list[tuple[str, dict[str, dict[str, Tensor]]]] = []

    def noting(name: str, loss: Any) -> Any:
        def run(one: Batch) -> Any:
            states.append((name, snapshot(method)))
            learns = [role for role, net in method.networks().items() if all(p.requires_grad for p in net.trainable())]
            assert learns == [name]
            return loss(one)

        return run

    method.discriminate = noting("discriminator", method.discriminate)  # type: ignore[method-assign]
    method.deceive = noting("student", method.deceive)  # type: ignore[method-assign]
    Trainer(options(max_train_steps=3, train_batch_size=4), tmp_path).fit(method, Prompted())
    assert [name for name, _ in states] == ["discriminator", "student"] * 3
    ends = [*states[1:], ("end", snapshot(method))]
    for (name, was), (_, now) in zip(states, ends, strict=True):
        changed = {role: {n for n in was[role] if not torch.equal(was[role][n], now[role][n])} for role in was}
        vectors = {n for n in was["discriminator"] if n.endswith((".u", ".v"))}
        if name == "discriminator":
            assert changed["student"] == set()
            assert changed["discriminator"] == set(was["discriminator"]) - vectors - {"scales"}
        else:
            assert changed["student"] == set(was["student"])
            assert changed["discriminator"] <= vectors and changed["discriminator"], "the norms follow after the step"
    after = [{n.replace(".base_layer", ""): v for n, v in m.state_dict().items() if "lora" not in n} for m in watched]
    assert_close(after, before, **EXACT)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, {"student": 2, "teacher": 1, "decoder": 3, "eye": 3}),
        ({"distillation": 0.0}, {"student": 2, "teacher": 0, "decoder": 3, "eye": 3}),
        ({"distance": "pixels"}, {"student": 2, "teacher": 1, "decoder": 4, "eye": 3}),
        ({"image_condition": True}, {"student": 2, "teacher": 1, "decoder": 3, "eye": 4}),
        ({"guard_every": 1}, {"student": 4, "teacher": 1, "decoder": 3, "eye": 3}),
    ],
)
def test_forwards_of_a_step(tmp_path: Path, given: dict[str, Any], wanted: dict[str, int]) -> None:
    """The real pictures are decoded once, and neither they nor the teacher has a graph."""
    method = show(**{"guard_every": 0, **given})
    modules = {"student": method.student.module, "teacher": method.teacher.module}
    modules |= dict(zip(("eye", "decoder"), frozen(method), strict=True))
    with contextlib.ExitStack() as stack:
        calls = {name: stack.enter_context(recorded(module)) for name, module in modules.items()}
        Trainer(options(max_train_steps=2, train_batch_size=4), tmp_path).fit(method, Prompted())
    assert {name: len(found) for name, found in calls.items()} == {name: 2 * n for name, n in wanted.items()}
    graphs = {name: sum(graph for _, graph in found) for name, found in calls.items()}
    pixels = "distance" in given  # where the teacher's sample is decoded with grad on, though nothing asks for one
    assert graphs == {"student": 2, "teacher": 0, "eye": 2, "decoder": 4 if pixels else 2}


def test_r1_on_the_heads_inputs_every_so_many_steps() -> None:
    method, one = moved(show(r1_gamma=0.6, r1_every=4)), batch()
    with learning(method, "discriminator"):
        losses = method.discriminate(one)
    look = method.look(one)
    inputs = [m.detach().requires_grad_(True) for m in method.eye(look.augmentation(method._decode(one.data())))]
    parts = []
    for logits, given in zip(method.discriminator(inputs, look.condition), inputs, strict=True):
        (gradient,) = torch.autograd.grad(logits.sum(), given, retain_graph=True)
        parts.append(gradient.square().sum((1, 2, 3)).mean() / logits.shape[1])
    wanted = torch.stack(parts).mean()
    assert_close(losses.terms["r1_penalty"].detach(), 4 * 0.3 * wanted)
    for method.taken in (1, 2, 3):
        assert set(method.discriminate(batch()).terms) == {"real_or_made"}
    method.taken = 4
    assert set(method.discriminate(batch()).terms) == {"real_or_made", "r1_penalty"}


def test_heads_read_features_in_units_of_their_size_on_decoded_noise() -> None:
    method = show(crop=3)
    noise = torch.randn((1, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    maps = method.eye(method._decode(noise[:, :, :3, :3]))
    scales: Any = method.discriminator.module.scales
    assert_close(scales, torch.stack([m.square().mean().sqrt() for m in maps]))


def test_decoding_is_in_float32_under_autocast() -> None:
    """Some autoencoders overflow in half precision."""
    method, one = show(), batch()
    seen: list[torch.dtype] = []
    net: Any = method._decode
    net.up.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        method.discriminate(one)
        method.deceive(one)
    assert set(seen) == {torch.float32} and len(seen) == 3


def test_the_metrics_of_a_step_and_diversity(tmp_path: Path) -> None:
    method = show(guard_every=2, r1_every=2)
    Trainer(options(max_train_steps=4, train_batch_size=4), tmp_path).fit(method, Prompted())
    found = rows(tmp_path)
    always = {"logit_real", "logit_fake", "accuracy", "real_or_made", "adversarial", "distillation"}
    always |= {"loss/discriminator", "loss/student", "grad_norm/discriminator", "grad_norm/student"}
    assert all(always <= row.keys() for row in found)
    assert [("r1" in row, "diversity" in row) for row in found] == [(True, True), (False, False)] * 2
    method, one = moved(show(guard_every=1)), batch()
    told = method.discriminate(one).metrics["diversity"]
    with torch.no_grad():
        a, b = (
            method.student(one.rng.normal(f"guard {i}", (1, 4, 4)), torch.ones(4).double(), one.cond).x0 for i in (0, 1)
        )
    assert_close(told, diversity(a, b, one.data()))


# -- bad input ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"augmentations": "color"}, r"--method\.augmentations"),
        ({"crop": -1}, r"--method\.crop"),
        ({"distance": "features"}, r"\('latents', 'pixels'\).*--method\.distance"),
        ({"loss_type": "wasserstein"}, r"--method\.loss_type"),
        ({"head_width": 0}, r"--method\.head_width"),
        ({"distillation": float("nan")}, r"--method\.distillation"),
        ({"discriminator_rate": 0.0}, r"--method\.discriminator_rate"),
        ({"times": "0.5,1"}, r"--method\.times"),
        ({"probabilities": "1,1,1,1"}, r"--method\.probabilities"),
    ],
)
def test_bad_options(given: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        add_config(**given)


def test_bad_networks_are_refused_before_anything_is_trained() -> None:
    with pytest.raises(InputError, match="Two ways out"):
        show(teacher=Convolutional(sd_table(), "eps"))
    with pytest.raises(InputError, match=r"'third'; fix --method\.taps"):
        ImageFeatures(Sight(), ["blocks.0", "third"], (8, 8))


def test_defaults_are_the_papers() -> None:
    given = add_config(head_width=64)
    assert given.times.floats() == (1.0, 0.75, 0.5, 0.25) and given.distillation == 2.5 and given.loss_type == "hinge"
    assert given.probabilities.floats() == (0.25,) * 4 and given.warmup_steps == 0 and given.distance == "latents"
    assert tuple(given.augmentations) == KINDS and add_config(augmentations="").augmentations == ()
