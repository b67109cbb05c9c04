"""ADD on real network classes: a UNet, an autoencoder and a vision transformer; with adapters and gradient checkpointing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from adversaries import learning, student_gradients
from eyes import add_config
from students import LCM_TARGETS, opened, randomised
from tiny import tiny_pipeline
from torch.testing import assert_close
from toys import recorded
from vision import build, save

from stepdistill.batch import Batch
from stepdistill.families import EyeConfig, open_eye
from stepdistill.methods.add import ADD
from stepdistill.networks.lora import LoraSpec
from stepdistill.randomness import StepRandom

EXACT = {"rtol": 0, "atol": 0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("base")
    save(build("dinov2"), root / "eye")
    return tiny_pipeline(root / "sd", prediction_type="v_prediction")


def game(base: Path, kind: str = "lora", recompute: bool = False, **options: Any) -> tuple[ADD, Batch, Any]:
    model = opened(base)
    if kind == "lora":
        student = model.denoiser.with_lora(LoraSpec(2, 2.0, LCM_TARGETS))
        randomised(student, scale=0.05)
    else:
        student = model.denoiser.full_student()
    model.checkpoint_activations(student, recompute)
    eye = open_eye(EyeConfig(str(base.parent / "eye")))
    method = ADD(add_config(**options), student, model.denoiser, eye, model.decode, *model.example())
    cond = model.conditions(["a", "b"])
    x0 = torch.randn((2, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    return method, Batch(x0, cond, model.uncond(cond), StepRandom(0, 0, range(2))), model


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_with_gradient_checkpointing_a_student_learns_the_same_and_no_copy_of_the_teacher_is_made(
    base: Path, kind: str
) -> None:
    """The teacher computes without gradient: in backward nothing of it is computed again."""
    plain, one, _ = game(base, kind, w=1.0)
    recomputed, other, model = game(base, kind, recompute=True, w=1.0)
    assert recomputed.teacher is model.denoiser and not recomputed.teacher.recomputes
    assert recomputed.student.recomputes
    wanted = student_gradients(plain, one)
    with recorded(model.vae.decoder.mid_block) as blocks:
        found = student_gradients(recomputed, other)
    assert sum(float(g.abs().max()) > 0 for g in wanted) > 100
    assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert len(blocks) == 3, "real pictures, the made ones, and the latter once more in backward"


def test_a_loras_teacher_is_its_base_with_the_adapter_off(base: Path) -> None:
    method, one, _ = game(base)
    x, t = one.data(), torch.full((2,), 0.5, dtype=torch.float64)
    assert method.student.adapters is not None and method.student.adapters.current == "student"
    said = method.teacher.output(x, t, one.cond)
    assert_close(said, opened(base).denoiser.output(x, t, one.cond), **EXACT)
    assert not torch.allclose(said, method.student.output(x, t, one.cond), atol=1e-3)
    assert method.deceive(one).terms["distillation"].requires_grad
    assert method.student.adapters.current == "student"


@pytest.mark.parametrize("crop", [0, 2])
def test_a_batch_of_one_and_what_stays(base: Path, crop: int) -> None:
    method, one, model = game(base, crop=crop, image_condition=True)
    still = [model.vae, method.eye.net.module, model.text_encoder]
    before = [{n: v.clone() for n, v in module.state_dict().items()} for module in still]
    single = Batch(one.data()[:1], {k: v[:1] for k, v in one.cond.items()}, {}, StepRandom(0, 0, range(1)))
    for role, loss in (("discriminator", method.discriminate), ("student", method.deceive)):
        with learning(method, role):
            losses = loss(single)
            losses.total.backward()
        assert all(torch.isfinite(v) for v in {**losses.terms, **losses.metrics}.values())
    for module, was in zip(still, before, strict=True):
        assert all(p.grad is None and not p.requires_grad for p in module.parameters())
        assert_close(dict(module.state_dict()), was, **EXACT)


def test_a_crop_is_decoded_alone(base: Path) -> None:
    method, one, model = game(base, crop=2)
    with recorded(model.vae.decoder) as calls:
        method.discriminate(one)
    assert [tuple(inputs[0].shape) for inputs, _ in calls] == [(2, 4, 2, 2)] * 2
    with torch.no_grad():
        look = method.look(one)
        (y, x) = look.corner[1].tolist()
        alone = model.decode(one.data()[1:, :, y : y + 2, x : x + 2])
    assert_close(method.real(one, look.corner)[1:], alone, rtol=1e-4, atol=1e-5)
