"""Opening teacher and students: what each is called with, what they share, and what can't be compared."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from students import full_student_of, opened, student_of
from sweeping import small_plan, teacher_of
from tiny import tiny_pipeline
from tiny_pixels import tiny_pixels
from tiny_sdxl import tiny_sdxl

from stepdistill.bench.contenders import Contender, open_contenders, side_of, unique_name, weights_of
from stepdistill.bench.generate import denoiser_of
from stepdistill.bench.rows import Cell
from stepdistill.config import CommaList
from stepdistill.errors import InputError
from stepdistill.export.folder import rung_folder
from stepdistill.export.lcm import lcm_sampling
from stepdistill.export.progressive import progressive_sampling
from stepdistill.export.student import export_student
from stepdistill.families import TeacherConfig
from stepdistill.methods.lcm import LCMConfig
from stepdistill.methods.progressive import ProgressiveConfig


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("sd"))


def exported(base: Path, folder: Path, kind: str = "lora", points: int = 50, path: str | None = None) -> Path:
    model = opened(base)
    student = student_of(model) if kind == "lora" else full_student_of(model)
    plan = lcm_sampling(LCMConfig(num_ddim_timesteps=points), model, student.takes_guidance)
    return export_student(folder, model, student, TeacherConfig(path or str(base)), plan)


@pytest.fixture(scope="module")
def lora(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(base, tmp_path_factory.mktemp("runs") / "lcm")


@pytest.fixture(scope="module")
def full(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(base, tmp_path_factory.mktemp("others") / "lcm", "full")


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A teacher, and the run folder of two rungs of it."""
    base = tiny_pipeline(tmp_path_factory.mktemp("v"), prediction_type="v_prediction")
    model, run = opened(base), tmp_path_factory.mktemp("ladders") / "rapid"
    student = student_of(model)
    config = ProgressiveConfig(teacher_steps=20, rungs=CommaList(("10", "2")))
    for steps in config.ladder():
        plan = progressive_sampling(config, model, steps)
        export_student(rung_folder(run, steps), model, student, TeacherConfig(str(base)), plan)
    return base, run


def test_a_ladder_is_one_model_whose_rungs_make_their_own_steps(ladder: tuple[Path, Path]) -> None:
    base, run = ladder
    _, ten, two = open_contenders(str(base), [str(run)])
    assert [(c.name, c.rung, c.steps()) for c in (ten, two)] == [("rapid", True, (10,)), ("rapid", True, (2,))]
    assert (ten.steps((2, 1)), two.steps((2, 1))) == ((), (2,))
    assert denoiser_of(ten.pipe) is not denoiser_of(two.pipe)


def test_a_single_rung_is_sampled_as_asked(ladder: tuple[Path, Path]) -> None:
    base, run = ladder
    teacher, two = open_contenders(str(base), [str(run / "rungs" / "2")])
    assert (two.name, two.rung, two.steps(), two.steps((4, 1))) == ("rapid-2", False, (2,), (4, 1))
    assert teacher.steps() == (8, 4, 2, 1)


@torch.no_grad()
def predicted(contender: Contender) -> torch.Tensor:
    """What the denoiser makes of one input."""
    draws = torch.Generator().manual_seed(1)
    x, text = torch.randn((1, 4, 4, 4), generator=draws), torch.randn((1, 24, 16), generator=draws)
    cond = None if contender.pipe.unet.config.time_cond_proj_dim is None else torch.ones(1, 256)
    out: torch.Tensor = contender.pipe.unet(x, 499, encoder_hidden_states=text, timestep_cond=cond).sample
    return out


def test_teacher_and_students_side_by_side(base: Path, lora: Path, full: Path) -> None:
    teacher, first, second = found = open_contenders(str(base), [str(lora), str(full)])
    assert [c.name for c in found] == ["teacher", "lcm", "lcm-2"]
    assert len({id(denoiser_of(c.pipe)) for c in found}) == 3
    assert len({id(c.pipe.scheduler) for c in found}) == 3
    assert len({id(c.pipe.vae) for c in found}) == len({id(c.pipe.text_encoder) for c in found}) == 1
    assert [type(c.pipe.scheduler).__name__ for c in found] == ["DDIMScheduler", "LCMScheduler", "LCMScheduler"]
    assert len({c.weights for c in found}) == 3
    assert first.facts["guidance_scale"] == 1.0 and second.facts["guidance_scale"] == 8.0 and not teacher.facts
    # the students' weights are in them and not in the teacher
    assert torch.equal(predicted(teacher), predicted(teacher_of(base)))
    assert not torch.allclose(predicted(first), predicted(teacher), atol=1e-3)
    assert not any("lora" in name for name, _ in teacher.pipe.unet.named_parameters())
    assert second.pipe.unet.config.time_cond_proj_dim == 256


def test_the_same_files_have_the_same_hash(base: Path, lora: Path) -> None:
    once, again = (open_contenders(str(base), [str(lora)]) for _ in range(2))
    assert [c.weights for c in once] == [c.weights for c in again]
    pipe = once[1].pipe
    changed = [weights_of(pipe, {}) == once[1].weights]
    with torch.no_grad():
        next(pipe.unet.parameters()).add_(1e-3)
    changed.append(weights_of(pipe, {}) == once[1].weights)
    pipe = once[0].pipe
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="trailing")
    assert [*changed, weights_of(pipe, {}) == once[0].weights] == [True, False, False]


def test_a_pipeline_without_our_facts_is_a_student_too(base: Path, tmp_path: Path) -> None:
    other = tiny_pipeline(tmp_path / "turbo", seed=5)
    found = open_contenders(str(base), [str(other)])[1]
    assert (found.name, found.facts) == ("turbo", {})
    assert found.schedule(2) == {} and found.note(Cell("turbo", 99, 7.0)) is None


def test_names_are_files_and_their_own(base: Path, lora: Path, tmp_path: Path) -> None:
    names = ("Teacher", "a b", "a_b", "A_b")  # some disks don't tell the last two apart
    for number, name in enumerate(names):
        shutil.copytree(lora, tmp_path / str(number) / name)
    paths = [str(tmp_path / str(number) / name) for number, name in enumerate(names)]
    assert [c.name for c in open_contenders(str(base), paths)][1:] == ["Teacher-2", "a_b", "a_b-2", "A_b-3"]


def test_a_students_base_is_the_teacher_by_its_name(base: Path, lora: Path, tmp_path: Path) -> None:
    """A checkpoint that has moved is still the same, and another one is opened beside the teacher."""
    moved = tmp_path / "elsewhere" / base.name
    shutil.copytree(base, moved)
    teacher, student = open_contenders(str(moved), [str(lora)])
    assert student.pipe.vae is teacher.pipe.vae
    expected = predicted(open_contenders(str(base), [str(lora)])[1])
    for name in ("other", f"others/{base.name}"):  # of another name, and of the same one in another folder
        other = tiny_pipeline(tmp_path / name, seed=4)
        teacher, student = open_contenders(str(other), [str(lora)])
        assert student.pipe.vae is not teacher.pipe.vae
        assert torch.equal(predicted(student), expected)
    gone = tmp_path / "run"
    shutil.copytree(lora, gone)
    change(gone, lambda facts: facts["base_model"].update(name="x", path=str(tmp_path / "gone")))
    with pytest.raises(InputError, match=r"that --student .*run was made from, x, which is not the --teacher, got"):
        open_contenders(str(base), [str(gone)])


def change(run: Path, how: Any) -> None:
    facts = json.loads((run / "stepdistill.json").read_text())
    how(facts)
    (run / "stepdistill.json").write_text(json.dumps(facts))


def test_the_autoencoder_a_student_was_trained_with(base: Path, lora: Path, tmp_path: Path) -> None:
    other = tiny_pipeline(tmp_path / "other", seed=4)
    run = tmp_path / "run"
    shutil.copytree(lora, run)
    change(run, lambda facts: facts["base_model"].update(vae=str(other)))
    teacher, student = open_contenders(str(base), [str(run)])
    assert student.pipe.vae is not teacher.pipe.vae and student.pipe.text_encoder is teacher.pipe.text_encoder


def test_times_come_from_the_facts_where_the_scheduler_has_others(base: Path, lora: Path) -> None:
    student = open_contenders(str(base), [str(lora)])[1]
    assert student.schedule(4) == {}  # the scheduler visits them by itself
    student = Contender("x", student.pipe, "", {**student.facts, "timesteps": {"2": [999, 259]}})
    assert student.schedule(2) == {"timesteps": [999, 259]} and student.schedule(4) == {}
    with pytest.raises(
        InputError, match="take the sigmas that stepdistill.json of --student x has, got .*LCMScheduler"
    ):
        Contender("x", student.pipe, "", {"sigmas": {"2": [1.0, 0.5]}}).schedule(2)
    flow = copy.copy(student.pipe)
    flow.register_modules(scheduler=FlowMatchEulerDiscreteScheduler())
    assert Contender("x", flow, "", {"sigmas": {"2": [1.0, 0.5]}}).schedule(2) == {"sigmas": [1.0, 0.5]}
    bare = teacher_of(base).pipe  # its scheduler takes no times but its own
    with pytest.raises(InputError, match="take the timesteps .*got StableDiffusionPipeline and DDIMScheduler"):
        Contender("x", bare, "", {"timesteps": {"2": [999, 259]}}).schedule(2)
    seen: list[int] = []
    given = Contender("x", student.pipe, "", {"timesteps": {"2": [999, 259]}})
    handle = given.pipe.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(int(args[1])), with_kwargs=True
    )
    given.images(Cell("x", 2, 1.0), ["a"], small_plan())
    handle.remove()
    assert seen == [999, 259]


def test_steps_that_a_scheduler_refuses(base: Path, tmp_path: Path) -> None:
    run = exported(base, tmp_path / "short", points=20)
    teacher, student = open_contenders(str(base), [str(run)])
    with pytest.raises(InputError, match=r"LCMScheduler of short takes, got 32 .*fix --steps"):
        student.schedule(32)
    with pytest.raises(InputError, match=r"fix --teacher_steps or --steps"):
        teacher.schedule(5000)


def test_what_a_student_was_not_made_for_is_noted(base: Path, lora: Path, full: Path) -> None:
    _, small, large = open_contenders(str(base), [str(lora), str(full)])
    assert small.note(Cell("lcm", 8, 1.0)) is None and "1, 2, 4, 8" in str(small.note(Cell("lcm", 3, 1.0)))
    assert "beyond the steps" in str(small.note(Cell("lcm", 16, 1.0))) and "1, 2, 4, 8" in str(
        small.note(Cell("lcm", 16, 1.0))
    )
    low, high = large.facts["guidance_range"]
    assert large.note(Cell("lcm", 8, high)) is None and large.note(Cell("lcm", 8, low)) is None
    assert "beyond the guidance" in str(large.note(Cell("lcm", 8, high + 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_weights_have_one_type(base: Path, lora: Path, full: Path, dtype: torch.dtype) -> None:
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    for contender in open_contenders(str(base), [str(lora), str(full)], name):
        parts = (contender.pipe.unet, contender.pipe.vae, contender.pipe.text_encoder)
        assert {p.dtype for part in parts for p in part.parameters()} == {dtype}
        images = contender.images(Cell(contender.name, 1, 1.0), ["a"], small_plan())
        assert images.shape == (1, 32, 32, 3)


def test_the_size_of_images(base: Path) -> None:
    teacher = teacher_of(base)
    assert side_of(teacher, small_plan()) == 32 and side_of(teacher, small_plan(resolution=64)) == 64
    assert teacher.images(Cell("teacher", 1, 1.0), ["a"], small_plan(resolution=64)).shape == (1, 64, 64, 3)
    wide = Contender("wide", copy.deepcopy(teacher.pipe), "")
    wide.pipe.unet.register_to_config(sample_size=(4, 8))
    with pytest.raises(InputError, match="expected square images, got latents of 4x8 from wide; give --resolution"):
        side_of(wide, small_plan())
    assert side_of(wide, small_plan(resolution=64)) == 64


def test_models_of_other_resolutions(base: Path, tmp_path: Path) -> None:
    other = tiny_pipeline(tmp_path / "large", seed=1)
    config = json.loads((other / "unet" / "config.json").read_text())
    (other / "unet" / "config.json").write_text(json.dumps({**config, "sample_size": 8}))
    with pytest.raises(InputError, match="of one resolution, .* teacher 4x4x4, large 4x8x8"):
        open_contenders(str(base), [str(other)])


def test_sdxl_is_compared_as_well(tmp_path: Path) -> None:
    base = tiny_sdxl(tmp_path / "sdxl")
    model = opened(base)
    run = export_student(
        tmp_path / "run", model, student_of(model), TeacherConfig(str(base)), lcm_sampling(LCMConfig(), model)
    )
    for contender in open_contenders(str(base), [str(run)]):
        images = contender.images(Cell(contender.name, 1, 1.0), ["a b"], small_plan())
        assert images.shape[0] == 1 and images.std() > 0


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda run: (run / "pytorch_lora_weights.safetensors").unlink(), "expected an export in .*stepdistill export"),
        (lambda run: shutil.rmtree(run / "scheduler"), "expected an export in"),
        (
            lambda run: change(run, lambda f: f.pop("weights")),
            r"of an export in --student .*, got one without 'weights'",
        ),
        (lambda run: change(run, lambda f: f.pop("guidance_scale")), "got one without 'guidance_scale'"),
        (lambda run: change(run, lambda f: f.update(takes="nothing")), "text-to-image student .* takes nothing"),
    ],
)
def test_exports_that_are_broken(base: Path, lora: Path, tmp_path: Path, break_it: Any, message: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(lora, run)
    break_it(run)
    with pytest.raises(InputError, match=message):
        open_contenders(str(base), [str(run)])


def test_what_is_no_text_to_image_pipeline(base: Path, tmp_path: Path) -> None:
    pixels = tiny_pixels(tmp_path / "pixels")
    for teacher, students in ((pixels, []), (base, [str(pixels)])):
        flag = "--student" if students else "--teacher"
        with pytest.raises(
            InputError, match=rf"text-to-image pipeline .*DDPMPipeline, which takes no prompt.*fix {flag}"
        ):
            open_contenders(str(teacher), students)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    with pytest.raises(InputError, match="got NoSuchPipeline"):
        open_contenders(str(tmp_path / "odd"), [])
    with pytest.raises(InputError, match="give --teacher a Diffusers folder"):
        open_contenders(str(tmp_path / "nothing"), [])


def test_weights_that_are_missing_are_not_drawn(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, tmp_path / "sd")
    file = tmp_path / "sd" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors.pop("conv_in.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="1 tensors missing from"):
        open_contenders(str(base), [str(tmp_path / "sd")])


def test_names_of_folders(tmp_path: Path) -> None:
    """A number comes with what it is a number of, a name that is taken with a number."""
    taken = set[str]()
    paths = ("kd/0", "jsd/0", "kd/0", "ladder/rungs/4", "my run")
    found = [unique_name(str(tmp_path / path), taken) for path in paths]
    assert found == ["kd-0", "jsd-0", "kd-0-2", "ladder-4", "my_run"]
