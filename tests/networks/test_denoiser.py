"""What a denoiser makes of itself: students of both kinds. Whether a family's do what they should is tested with the family."""

from pathlib import Path

import pytest
import torch
from students import inputs, look, opened
from toys import EXACT, recorded, sd_table

from stepdistill.errors import InputError
from stepdistill.families.analytic import Gaussian, LinearStudent, TwoClass
from stepdistill.networks.lora import LoraSpec, StudentConfig


def linear() -> LinearStudent:
    return LinearStudent(torch.tensor([1.0, 0.5]), sd_table())


def test_kinds_of_students(base: Path):
    teacher = opened(base).denoiser
    full = teacher.student(StudentConfig(kind="full"))
    lora = teacher.student(StudentConfig(kind="lora", rank=2, alpha=3.0, targets=("to_q",)), seed=1)
    assert full.adapters is None and full.module is not teacher.module
    assert lora.module is teacher.module
    assert lora.adapters is not None
    assert lora.adapters.specs == {"student": LoraSpec(2, 3.0, ("to_q",))}
    assert type(full) is type(lora) is type(teacher)


def test_an_adapters_start_is_a_function_of_the_seed(base: Path):
    spec = StudentConfig(rank=2, targets=("to_q",))
    first, again, other = (opened(base).denoiser.student(spec, seed=seed).state() for seed in (1, 1, 2))
    torch.testing.assert_close(first, again, **EXACT)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_default_targets_are_the_familys(base: Path):
    teacher = opened(base).denoiser
    student = teacher.student(StudentConfig(rank=2))
    assert student.adapters is not None
    assert student.adapters.specs["student"].targets == tuple(teacher.lora_targets)


def test_a_full_student_trains_all_its_weights_in_float32_and_leaves_the_teacher_alone(base: Path):
    teacher = opened(base, torch.bfloat16).denoiser
    before = teacher.module.state_dict()
    student = teacher.full_student()
    assert [p.dtype for p in student.trainable()] == [torch.float32] * len(list(teacher.module.parameters()))
    assert all(p.requires_grad for p in student.trainable())
    assert set(student.named_trainable()) == {name for name, _ in student.module.named_parameters()}
    student.output(*inputs()).sum().backward()
    with torch.no_grad():
        for parameter in student.trainable():
            parameter.add_(1.0)
    torch.testing.assert_close(teacher.module.state_dict(), before, **EXACT)
    assert not any(p.requires_grad or p.grad is not None for p in teacher.module.parameters())


def test_a_full_student_of_a_network_with_adapters_is_refused(base: Path):
    teacher = opened(base).denoiser
    teacher.student(StudentConfig(rank=2))
    with pytest.raises(ValueError, match="without adapters to copy in full"):
        teacher.full_student()


def test_a_guidance_input_is_asked_for_and_only_the_student_has_it(base: Path):
    teacher = opened(base).denoiser
    expected = look(teacher)
    plain, told = teacher.full_student(), teacher.full_student(embed_guidance=True)
    assert (teacher.takes_guidance, plain.takes_guidance, told.takes_guidance) == (False, False, True)
    assert len(told.trainable()) == len(plain.trainable()) + 1
    assert any("cond_proj" in name for name in told.named_trainable())
    torch.testing.assert_close(look(teacher), expected, **EXACT)
    with pytest.raises(KeyError, match="guidance"):
        look(told)


def test_families_without_a_guidance_input_make_a_student_without():
    student = linear().full_student(embed_guidance=True)
    assert not student.takes_guidance
    assert len(student.trainable()) == 2


def test_activation_checkpointing_where_there_is_none():
    network = Gaussian(2.0, 0.3, sd_table())
    network.checkpoint_activations(False)
    with pytest.raises(
        InputError, match=r"Gaussian has no gradient checkpointing; drop --train\.gradient_checkpointing"
    ):
        network.checkpoint_activations()


def test_a_network_is_told_the_guidance_scale_where_it_has_an_input_for_it():
    network, w, cond = linear(), torch.tensor([0.0, 6.5]).double(), {"text": torch.ones(2, 1)}
    assert network.tell(cond, w) is cond
    network.takes_guidance = True
    told = network.tell(cond, w)
    assert told["guidance"].tolist() == [1.0, 7.5] and told["text"] is cond["text"] and "guidance" not in cond


def test_guidance_is_one_forward_of_both_halves():
    teacher = TwoClass((2.0, -1.0), 0.3, sd_table(), "v", uncond_mean=0.4)
    label, w = torch.tensor([0, 1, 1]), torch.tensor([0.0, 1.0, 7.5]).double()
    x_t, t = (
        torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).double(),
        torch.tensor([1.0, 0.5, 0.2]).double(),
    )
    with recorded(teacher.module) as calls:
        got = teacher.guide(x_t, t, {"label": label}, {"label": torch.full((3,), -1)}, w)
    assert [len(inputs[0]) for inputs, _ in calls] == [6]
    for i in range(3):
        wanted = teacher.guided(int(label[i]), float(w[i]))(x_t[i : i + 1], t[i : i + 1], {})
        torch.testing.assert_close(got.x0[i : i + 1], wanted.x0)
        torch.testing.assert_close(got.eps[i : i + 1], wanted.eps)
    with recorded(teacher.module) as calls:
        plain = teacher.guide(x_t, t, {"label": label}, {}, w)
    assert [len(inputs[0]) for inputs, _ in calls] == [3]
    torch.testing.assert_close(plain.x0, teacher(x_t, t, {"label": label}).x0, **EXACT)
