"""What progressive distillation asks of its networks and of the batch's randomness, and its loss in numbers."""

import itertools
import math

import pytest
import torch
from ladders import Net, batch, config, ladder
from torch import Tensor
from torch.testing import assert_close
from toys import EXACT, MEAN, STD, recorded, sd_table

from stepdistill.batch import Batch, Cond
from stepdistill.diffusion.prediction import Kind
from stepdistill.diffusion.schedule import Flow, Tabulated
from stepdistill.diffusion.solver import ddim
from stepdistill.errors import InputError
from stepdistill.families.analytic import Gaussian, LinearStudent
from stepdistill.methods.progressive import Progressive


def linear(schedule: Tabulated, kind: Kind, steps: int) -> LinearStudent:
    student = LinearStudent(schedule.grid(steps)[:-1], schedule, kind)
    student.module.double()
    return student


@pytest.mark.parametrize("weighting", [None, "truncated_snr", "snr+1", "snr"])
@pytest.mark.parametrize("kind", ["v", "eps"])
def test_the_loss_by_hand(kind: Kind, weighting: str | None) -> None:
    schedule = sd_table()
    student, teacher = linear(schedule, kind, 10), Gaussian(MEAN, STD, schedule, kind)
    torch.nn.init.normal_(student.module.weight, generator=torch.Generator().manual_seed(1))
    method = Progressive(config((10,), 20, weighting=weighting), student, teacher)
    one = batch(64)
    losses = method.training_step(one)
    i = one.rng.integers("time", 0, 10)
    t = 1.0 - i.double() / 10.0
    a, b = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    x_t = a * one.data() + b * one.rng.normal("noise", (3,), torch.float64)
    said = student.module.weight[i][:, None] * x_t
    x0 = a * x_t - b * said if kind == "v" else (x_t - b * said) / a
    mid, s = t - 0.05, t - 0.1
    z = ddim(schedule, teacher(x_t, t, {}), mid)
    z = ddim(schedule, teacher(z, mid, {}), s)
    r = schedule.sigma(s)[:, None] / b
    error = ((z - r * x_t) / (schedule.alpha(s)[:, None] - r * a) - x0).square().mean(1)
    snr = (a / b)[:, 0] ** 2
    by_name = {"truncated_snr": snr.clamp(min=1), "snr+1": snr + 1, "snr": snr}
    weight = by_name[weighting or {"v": "truncated_snr", "eps": "snr"}[kind]]
    assert float(snr.min()) < 1 < float(snr.max())
    assert_close(losses.total, (weight * error).mean(), rtol=1e-9, atol=0)
    assert set(losses.terms) == {"distillation"} and losses.count == 64
    assert float(losses.metrics["rung"]) == 10.0


def test_every_step_of_the_rung_is_as_likely_and_no_other_time_is_asked_for() -> None:
    asked: dict[str, list[Tensor]] = {"student": [], "teacher": []}

    class Asked(Gaussian):
        name = "teacher"

        def call(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
            asked[self.name].append(t)
            return super().call(x_t, t, cond)

    class Student(Asked):
        name = "student"

    schedule = sd_table()
    method = Progressive(config((8, 4), 40), Student(MEAN, STD, schedule, "v"), Asked(MEAN, STD, schedule, "v"))
    size = 4000
    method.training_step(batch(size))
    levels, counts = schedule.index(asked["student"][0]).round().unique(return_counts=True)
    assert levels.tolist() == [124, 249, 374, 499, 624, 749, 874, 999]  # DDIMScheduler's, trailing
    assert_close(counts / size, torch.full((8,), 1 / 8), rtol=0, atol=5 * math.sqrt(7 / 64 / size))
    times = schedule.index(torch.cat(asked["teacher"])).unique()
    assert_close(times, torch.arange(24, 1000, 25).double(), rtol=0, atol=1e-9)
    # each of the k steps goes on from the one before
    assert all(torch.allclose(t - s, torch.tensor(0.025).double()) for t, s in itertools.pairwise(asked["teacher"]))
    asked["student"].clear()
    asked["teacher"].clear()
    method.next_round()
    method.training_step(batch(size))
    assert schedule.index(asked["student"][-1]).round().unique().tolist() == [249, 499, 749, 999]


def test_the_noise_is_standard_normal_and_each_draw_a_stream_of_its_own() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Seen(Gaussian):
        def call(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
            seen.append((x_t, t))
            return super().call(x_t, t, cond)

    method = Progressive(config((4,), 8), linear(sd_table(), "v", 4), Seen(MEAN, STD, sd_table(), "v"))
    one = batch(4000)
    streams: list[str] = []
    draw = one.rng._generators
    one.rng._generators = lambda stream: (streams.append(stream), draw(stream))[1]  # type: ignore[method-assign]
    method.training_step(one)
    assert len(streams) == len(set(streams)) == 3
    x_t, t = seen[0]
    eps = (x_t - sd_table().alpha(t)[:, None] * one.data()) / sd_table().sigma(t)[:, None]
    assert abs(float(eps.mean())) < 5 / math.sqrt(eps.numel())
    assert abs(float(eps.var()) - 1) < 5 * math.sqrt(2 / eps.numel())
    for other in (one.data(), t[:, None].expand_as(eps)):
        both = torch.stack([eps.flatten(), other.flatten()])
        assert abs(float(torch.corrcoef(both)[0, 1])) < 5 / math.sqrt(eps.numel())


# -- networks ----------------------------------------------------------------------------------------------------------


def conds(size: int) -> dict[str, Cond]:
    return {"cond": {"text": torch.ones(size, 1)}, "uncond": {"text": torch.zeros(size, 1)}}


def small(size: int = 8, **given: Cond) -> Batch:
    one = batch(size, **given)
    one.x0 = one.data().float()
    return one


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("w", [0.0, 2.0])
def test_a_step_costs_k_forwards_of_the_teacher_and_one_of_the_student(k: int, w: float) -> None:
    teacher = Net(Flow())
    student = teacher.full_student()
    method = Progressive(config((4, 2), 4 * k, w_min=w, w_max=w), student, teacher)
    for rung in (0, 1):
        steps = (k, 2)[rung]
        with recorded(student.module) as of_student, recorded(method.teacher.module) as of_teacher:
            method.training_step(small(**conds(8)))
        assert [(len(x[0]), grad) for x, grad in of_student] == [(8, True)]
        size = 16 if w and rung == 0 else 8  # both halves in one forward, and only of a teacher without guidance in it
        assert [(len(x[0]), grad) for x, grad in of_teacher] == [(size, False)] * steps
        method.next_round()


def test_two_networks_and_the_first_teacher_is_let_go_of_as_it_was() -> None:
    teacher = Net()
    before = {n: v.clone() for n, v in teacher.state().items()}
    student = teacher.full_student()
    method = Progressive(config(), student, teacher)
    assert method.networks() == {"student": student} and method.teacher is teacher
    copies = []
    for _ in range(2):
        with torch.no_grad():
            for parameter in student.trainable():
                parameter.add_(1.0)
        assert method.next_round()
        assert method.networks() == {"student": student, "teacher": method.teacher}
        assert_close(method.teacher.state(), student.state(), **EXACT)
        assert not method.teacher.trainable() and not any(p.requires_grad for p in method.teacher.module.parameters())
        copies.append(method.teacher)
    assert copies[0] is copies[1] is not student and copies[0].module is not student.module
    assert_close(teacher.state(), before, **EXACT)
    assert all(value is not teacher for value in vars(method).values())
    assert not method.next_round() and method.steps == 1


def test_without_a_teacher_the_student_as_it_starts_is_one() -> None:
    student = Net().full_student()
    method = Progressive(config(w_min=2.0, w_max=2.0), student)
    twin = method.teacher
    assert method.networks() == {"student": student, "teacher": twin} and twin.module is not student.module
    assert_close(twin.state(), student.state(), **EXACT)
    with recorded(twin.module) as calls:
        method.training_step(small(**conds(8)))
    assert [len(x[0]) for x, _ in calls] == [8, 8], "its guidance is in it already"
    method.next_round()
    assert method.teacher is twin


@pytest.mark.parametrize("given", [True, False])
def test_a_lora_ladder_is_two_adapters_on_one_base(given: bool) -> None:
    method = ladder("lora", given)
    student, base = method.student, method.student.module
    for rung in range(3):
        active: list[tuple[str | None, int, bool]] = []
        hook = base.register_forward_pre_hook(
            lambda _, x, a=active: a.append((student.adapters.current, len(x[0]), torch.is_grad_enabled()))
        )
        method.training_step(small()).total.backward()
        hook.remove()
        name = None if given and rung == 0 else "student_frozen_1"
        assert active == [(name, 8, False)] * 2 + [("student", 8, True)]
        assert all(p.grad is not None for p in student.trainable())
        assert [n for n, p in base.named_parameters() if p.grad is not None and ".student." not in n] == []
        with torch.no_grad():
            for parameter in student.trainable():
                parameter.add_(0.1)
        trained = student.trainable()
        assert method.next_round() == (rung < 2)
        if rung < 2:
            assert_close(method.teacher.state(), student.state(), **EXACT)
            assert method.teacher.module is base and method.teacher.adapter == "student_frozen_1"
        assert [id(p) for p in student.trainable()] == [id(p) for p in trained], "what trains is the same parameters"
        assert set(student.adapters.specs) == {"student", "student_frozen_1"}
        assert sorted(n for n, p in base.named_parameters() if p.requires_grad) == sorted(
            n for n, _ in base.named_parameters() if ".student." in n
        )


def test_the_teacher_does_not_follow_the_student_within_a_rung() -> None:
    for kind in ("full", "lora"):
        method = ladder(kind, given=False)
        before = {n: v.clone() for n, v in method.teacher.state().items()}
        with torch.no_grad():
            for parameter in method.student.trainable():
                parameter.add_(1.0)
        assert_close(method.teacher.state(), before, **EXACT)


def test_the_state_of_another_ladder_is_refused_and_a_later_rung_brings_its_teacher() -> None:
    method = ladder()
    method.next_round()
    state = method.state_dict()
    assert state == {"ladder": [8, 4, 2, 1], "rung": 1}
    again = ladder()
    again.load_state_dict(state)
    assert (again.rung, again.steps, set(again.networks())) == (1, 2, {"student", "teacher"})
    again.load_state_dict({**state, "rung": 0})
    with pytest.raises(InputError, match=r"8, 4, 2, 1 of this checkpoint, got 40, 8, 4, 2, 1; .*start anew"):
        Progressive(config((8, 4, 2, 1), 40), Net().full_student()).load_state_dict(state)


def test_gradients_reach_a_float32_student_in_every_kind() -> None:
    for kind in ("v", "x0", "eps", "flow"):
        teacher = Net(kind=kind)  # type: ignore[arg-type]
        student = teacher.full_student()
        losses = Progressive(config((8,), 40), student, teacher).training_step(small())
        losses.total.backward()
        assert losses.total.dtype == torch.float32
        assert all(float(p.grad.norm()) > 0 for p in student.trainable())
