"""Whose eyes LADD's discriminator looks through: with adapters, with gradient checkpointing, in a UNet; and who is refused."""

from pathlib import Path

import pytest
import torch
from adversaries import Convolutional, batch, game, gradients, learning, moved, student_gradients
from students import LCM_TARGETS, opened, randomised
from torch.testing import assert_close
from toys import EXACT, sd_table

from stepdistill.batch import Batch
from stepdistill.config import CommaList
from stepdistill.errors import InputError
from stepdistill.methods.ladd import LADD, LADDConfig
from stepdistill.networks.lora import LoraSpec


def test_a_lora_student_is_judged_with_its_adapter_off() -> None:
    teacher = Convolutional()
    method = game("lora", teacher)
    x_t, t, cond = torch.randn(2, 1, 4, 4), torch.full((2,), 0.5).double(), {"label": torch.tensor([0, 1])}
    before = [m.clone() for m in method.features(x_t, t, cond)]
    moved(method)
    assert method.teacher is teacher and method.note == ""
    assert_close(method.features(x_t, t, cond), before, **EXACT)
    assert method.student.adapters is not None and method.student.adapters.current == "student"
    assert not torch.allclose(method.student.output(x_t, t, cond), teacher.output(x_t, t, cond), atol=1e-3)


def test_with_gradient_checkpointing_a_lora_student_is_judged_by_a_copy_and_that_is_said() -> None:
    plain = moved(game("lora", Convolutional()))
    teacher = Convolutional()
    student = teacher.with_lora(LoraSpec(2, 2.0, teacher.lora_targets))
    student.checkpoint_activations()
    method = moved(LADD(plain.config, student, teacher, (1, 4, 4), {"label": torch.zeros(1).long()}))
    assert method.teacher is not teacher and method.teacher.module is not teacher.module
    assert not any("lora" in name for name, _ in method.teacher.module.named_parameters())
    assert method.teacher.recomputes
    assert_close(student_gradients(method, batch()), student_gradients(plain, batch()))
    said = method.watch({})
    assert "copy of the teacher's weights" in said and "gradient checkpointing" in said
    assert method.watch({}) == ""
    # the trap: on one base, the recomputation finds the adapter on, or as many tensors as it did not save
    method.features.backbone = teacher
    try:
        wrong = student_gradients(method, batch())
    except torch.utils.checkpoint.CheckpointError:
        return
    assert any(float((a - b).abs().max()) > 1e-4 for a, b in zip(wrong, student_gradients(plain, batch()), strict=True))


def test_with_gradient_checkpointing_a_full_student_needs_no_copy() -> None:
    plain, teacher = moved(game("full", Convolutional())), Convolutional()
    student = teacher.full_student()
    student.checkpoint_activations()
    method = moved(LADD(plain.config, student, teacher, (1, 4, 4), {"label": torch.zeros(1).long()}))
    assert method.teacher is teacher and teacher.recomputes and method.watch({}) == ""
    assert_close(student_gradients(method, batch()), student_gradients(plain, batch()))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import tiny_pipeline

    return tiny_pipeline(tmp_path_factory.mktemp("base"), prediction_type="v_prediction")


def unet_game(base: Path, checkpointing: bool = False, kind: str = "lora") -> tuple[LADD, Batch]:
    from stepdistill.randomness import StepRandom

    model = opened(base)
    student = (
        model.denoiser.with_lora(LoraSpec(2, 2.0, LCM_TARGETS)) if kind == "lora" else model.denoiser.full_student()
    )
    randomised(student, scale=0.05)
    student.checkpoint_activations(checkpointing)
    cond = model.conditions(["a", "b"])
    config = LADDConfig(head_width=8, warmup_steps=0)
    method = LADD(config, student, model.denoiser, model.latent_shape, model.conditions(model.examples))
    x0 = torch.randn((2, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    return method, Batch(x0, cond, model.uncond(cond), StepRandom(0, 0, range(2)))


def test_a_unets_lora_learns_the_same_with_and_without_gradient_checkpointing(base: Path) -> None:
    plain, one = unet_game(base)
    recomputed, other = unet_game(base, checkpointing=True)
    assert recomputed.teacher.module is not recomputed.student.module
    wanted, found = student_gradients(plain, one), student_gradients(recomputed, other)
    assert sum(float(g.abs().max()) > 0 for g in wanted) > 100
    assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_a_batch_of_one(base: Path) -> None:
    from stepdistill.randomness import StepRandom

    method, one = unet_game(base)
    single = Batch(one.data()[:1], {k: v[:1] for k, v in one.cond.items()}, {}, StepRandom(0, 0, range(1)))
    for role, loss in (("discriminator", method.discriminate), ("student", method.deceive)):
        with learning(method, role):
            losses = loss(single)
            losses.total.backward()
        assert all(torch.isfinite(v) for v in {**losses.terms, **losses.metrics}.values())
        assert all(torch.isfinite(g).all() for g in gradients(method.networks()[role]))


def test_bad_networks_are_refused_before_anything_is_trained(base: Path) -> None:
    with pytest.raises(InputError, match=r"got 'third'; fix --method\.taps"):
        game(taps=CommaList(("first", "third")))
    with pytest.raises(InputError, match="Two ways out"):
        game(teacher=Convolutional(sd_table(), "eps"))
    small = game(taps=CommaList(("second",)), head_width=5, guard_every=0)
    assert small.features.names == ("second",)
    assert {n: tuple(v.shape) for n, v in small.discriminator.state().items()}["heads.0.point.weight"] == (5, 6, 1, 1)
    assert "diversity" not in small.discriminate(batch()).metrics
