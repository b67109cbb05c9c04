"""What is SD3's and Flux's own; what they share with other families is in test_every_family.py."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import SIGMAS, normal, opened, stock
from safetensors.torch import save_file
from tiny import LENGTH
from tiny_flux import WIDTH, tiny_flux
from tiny_sd3 import CHANNELS, PROJECTIONS, T5_WIDTH, WIDTHS, tiny_sd3

from stepdistill.data.latents import latent_shape
from stepdistill.diffusion.guidance import guide_scale
from stepdistill.diffusion.solver import sample
from stepdistill.errors import InputError
from stepdistill.families import TeacherConfig, load
from stepdistill.families.flux import pack, positions, unpack

EXACT = {"rtol": 0, "atol": 0}


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd3(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(params=["sd3", "flux"])
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


# conditions


def test_shapes_of_the_conditions(sd3: Path, flux: Path):
    shapes = [
        {key: tuple(value.shape) for key, value in opened(path).conditions(["a", "b", "c"]).items()}
        for path in (sd3, flux)
    ]
    assert shapes == [
        {"prompt_embeds": (3, LENGTH + 256, T5_WIDTH), "pooled_prompt_embeds": (3, sum(PROJECTIONS))},
        {"prompt_embeds": (3, 512, T5_WIDTH), "pooled_prompt_embeds": (3, WIDTH)},
    ]


def test_without_t5_its_tokens_are_zeros_and_clips_are_padded(tmp_path: Path):
    cond = opened(tiny_sd3(tmp_path, with_t5=False)).encode_prompts(["a red circle"])["prompt_embeds"]
    assert cond[:, :LENGTH, : sum(WIDTHS)].abs().min() > 0
    assert not cond[:, :LENGTH, sum(WIDTHS) :].any() and not cond[:, LENGTH:].any()


def test_the_networks_listen_to_each_of_their_conditions(folder: Path):
    model = opened(folder)
    x_t, t, cond = normal(1, CHANNELS, 4, 4), torch.tensor([0.5], dtype=torch.float64), model.conditions(["a"])
    if model.denoiser.takes_guidance:
        cond["guidance"] = torch.tensor([3.5], dtype=torch.float64)
    with torch.no_grad():
        plain = model.denoiser.call(x_t, t, cond)
        for key in cond:
            assert (model.denoiser.call(x_t, t, {**cond, key: cond[key] + 1.0}) - plain).abs().max() > 1e-3, key
        assert (model.denoiser.call(x_t, t - 0.1, cond) - plain).abs().max() > 1e-3


def test_guidance_that_nobody_says_is_the_stock_pipelines(flux: Path):
    model = opened(flux)
    x_t, t, cond = normal(1, CHANNELS, 4, 4), torch.tensor([0.5], dtype=torch.float64), model.conditions(["a"])
    with torch.no_grad():
        said = model.denoiser.call(x_t, t, {**cond, "guidance": torch.tensor([3.5])})
        torch.testing.assert_close(model.denoiser.call(x_t, t, cond), said, **EXACT)


def test_a_teacher_that_has_guidance_in_it_is_told_w_and_evaluated_once(flux: Path):
    model = opened(flux)
    x_t, t, cond = (
        normal(2, CHANNELS, 4, 4),
        torch.tensor([0.5, 0.9], dtype=torch.float64),
        model.conditions(["a", "b"]),
    )
    w = torch.tensor([2.5, 0.3], dtype=torch.float64)
    with torch.no_grad():
        for uncond in ({}, cond):
            guided = model.denoiser.guide(x_t, t, cond, uncond, w).x0
            said = model.denoiser(x_t, t, {**cond, "guidance": w + 1.0}).x0
            torch.testing.assert_close(guided, said, **EXACT)


@torch.no_grad()
def test_flux_without_a_guidance_embedding_is_guided_by_two_evaluations(tmp_path: Path):
    folder = tiny_flux(tmp_path, guidance=False)
    model, pipeline = opened(folder), stock(folder)
    assert not model.denoiser.takes_guidance
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    pipeline = FluxPipeline(**{**pipeline.components, "scheduler": FlowMatchEulerDiscreteScheduler()})
    pipeline.set_progress_bar_config(disable=True)
    noise, prompts = normal(2, CHANNELS, 4, 4), ["a red circle", "b"]
    theirs = pipeline(
        prompts, negative_prompt=["", ""], true_cfg_scale=4.0, sigmas=list(SIGMAS), latents=pack(noise), output_type="latent",
        height=32, width=32,
    ).images  # fmt: skip
    cond = model.conditions(prompts)
    uncond, scale = model.uncond(cond), torch.full((2,), 4.0)
    grid = torch.tensor([*SIGMAS, 0.0], dtype=torch.float64)
    ours = sample(
        lambda x, t: guide_scale(model.denoiser(x, t, cond), model.denoiser(x, t, uncond), scale),
        model.denoiser.schedule, noise, grid,
    )  # fmt: skip
    torch.testing.assert_close(ours, unpack(theirs, 4, 4), rtol=1e-5, atol=1e-5)


# times, shapes, taps


def test_half_precision_embeds_exact_times(folder: Path):
    model = opened(folder, torch.bfloat16)
    seen: list[Any] = []
    embed = model.denoiser.module.time_text_embed
    embed.time_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    t = torch.tensor([0.749, 0.7501], dtype=torch.float64)
    with torch.no_grad():
        model.denoiser.call(normal(2, CHANNELS, 4, 4), t, model.conditions(["a", "b"]))
    assert seen[0].dtype == torch.float32
    torch.testing.assert_close(seen[0].double(), 1000 * t, rtol=1e-6, atol=0)


def test_the_network_is_left_as_it_was(flux: Path):
    model = opened(flux)
    embed = model.denoiser.module.time_text_embed
    with torch.no_grad():
        model.denoiser.call(normal(1, CHANNELS, 4, 4), torch.ones(1), model.conditions(["a"]))
    assert not embed._forward_pre_hooks
    with pytest.raises(ValueError, match="expected latents of even height and width, got 4 x 3"):
        model.denoiser.call(normal(1, CHANNELS, 4, 3), torch.ones(1), model.conditions(["a"]))
    assert not embed._forward_pre_hooks


def test_outputs_have_a_gradient_in_time(folder: Path):
    model = opened(folder)
    t = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    model.denoiser.call(normal(1, CHANNELS, 4, 4), t, model.conditions(["a"])).sum().backward()
    assert t.grad is not None and t.grad.abs() > 0


@torch.no_grad()
def test_images_that_are_not_square(folder: Path):
    from diffusers import FlowMatchEulerDiscreteScheduler

    model, pipeline = opened(folder), stock(folder)
    parts = {**pipeline.components, "scheduler": FlowMatchEulerDiscreteScheduler()}
    pipeline = type(pipeline)(**parts)
    pipeline.set_progress_bar_config(disable=True)
    noise, is_flux = normal(1, CHANNELS, 6, 8), "flux" in type(pipeline).__name__.lower()
    theirs = pipeline(
        "a cat", sigmas=[1.0], guidance_scale=1.0, latents=pack(noise) if is_flux else noise, output_type="latent",
        height=48, width=64,
    ).images  # fmt: skip
    cond = {**model.conditions(["a cat"]), "guidance": torch.tensor([1.0])}
    ours = model.denoiser(noise, torch.ones(1, dtype=torch.float64), cond).x0
    torch.testing.assert_close(ours, unpack(theirs, 6, 8) if is_flux else theirs, rtol=1e-5, atol=1e-5)


def test_packing_is_the_pipelines_and_has_an_inverse():
    from diffusers import FluxPipeline

    x = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    torch.testing.assert_close(pack(x), FluxPipeline._pack_latents(x, 2, 3, 4, 6), **EXACT)
    torch.testing.assert_close(unpack(pack(x), 4, 6), x, **EXACT)
    theirs = FluxPipeline._prepare_latent_image_ids(1, 2, 3, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(positions(2, 3), theirs, **EXACT)


def test_taps_are_the_images_tokens(folder: Path):
    model = opened(folder)
    names = model.denoiser.tap_points
    with model.denoiser.taps(names) as features, torch.no_grad():
        model.denoiser.call(normal(2, CHANNELS, 4, 8), torch.ones(2), model.conditions(["a", "b"]))
    assert [tuple(features[name].shape) for name in names] == [(2, 8, 16)] * len(names)


def test_resolutions_that_fill_no_token_are_refused(folder: Path):
    model = opened(folder)
    assert latent_shape(model, 48) == (CHANNELS, 6, 6)
    with pytest.raises(
        InputError, match="expected a multiple of 16 pixels, .* got resolution 40; fix --data.resolution"
    ):
        latent_shape(model, 40)


# shifts


def test_shift_is_the_schedulers(sd3: Path, flux: Path, tmp_path: Path):
    assert opened(sd3).shift((CHANNELS, 4, 4)) == 3.0
    model, pipeline = opened(flux), stock(flux)
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    for rows, columns in ((4, 4), (128, 128), (64, 96)):
        mu = calculate_shift(rows * columns // 4)
        factor = model.shift((CHANNELS, rows, columns))
        assert factor == pytest.approx(math.exp(mu), rel=1e-12)
        grid = torch.tensor(SIGMAS, dtype=torch.float64)
        moved = factor * grid / (1 + (factor - 1) * grid)
        theirs = pipeline.scheduler.time_shift(mu, 1.0, grid)
        torch.testing.assert_close(moved, theirs, rtol=1e-12, atol=0)
    linear = tiny_flux(tmp_path / "linear", time_shift_type="linear")
    assert opened(linear).shift((CHANNELS, 128, 128)) == pytest.approx(1.15)


# checkpoints that can't be opened


def test_parts_of_two_models_are_refused(sd3: Path, flux: Path, tmp_path: Path):
    both = copied(sd3, tmp_path)
    shutil.rmtree(both / "text_encoder")
    shutil.copytree(both / "text_encoder_2", both / "text_encoder")
    with pytest.raises(InputError, match=f"with pooled_projection_dim {2 * PROJECTIONS[1]}, .* got {sum(PROJECTIONS)}"):
        load(TeacherConfig(str(both)))


def test_another_kind_of_scheduler_is_refused(folder: Path, tmp_path: Path):
    from diffusers import DDIMScheduler

    copy = copied(folder, tmp_path)
    DDIMScheduler().save_pretrained(copy / "scheduler")
    index = json.loads((copy / "model_index.json").read_text())
    edit(copy / "model_index.json", scheduler=[index["scheduler"][0], "DDIMScheduler"])
    with pytest.raises(InputError, match="expected a flow-matching scheduler, got DDIMScheduler"):
        load(TeacherConfig(str(copy)))


@pytest.mark.parametrize("part", ["transformer", "text_encoder_2"])
def test_missing_weights_are_refused(folder: Path, tmp_path: Path, part: str):
    from safetensors.torch import load_file

    copy = copied(folder, tmp_path)
    (file,) = (copy / part).glob("*.safetensors")
    weights = load_file(file)
    gone = next(name for name in weights if name.endswith("weight") and "embed" not in name)
    save_file({name: value for name, value in weights.items() if name != gone}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"config of the {part} describes, got 1 tensors missing"):
        load(TeacherConfig(str(copy)))


def test_an_autoencoder_without_a_size_is_refused(flux: Path, tmp_path: Path):
    copy = copied(flux, tmp_path)
    edit(copy / "vae" / "config.json", sample_size=40)
    with pytest.raises(InputError, match="multiple of 16 in vae/config.json of .*, got 40"):
        load(TeacherConfig(str(copy)))


@pytest.mark.parametrize(("key", "name"), [("joint_blocks.0.x", "Stable Diffusion 3"), ("double_blocks.0.x", "Flux")])
def test_single_files_are_refused_with_what_they_are(tmp_path: Path, key: str, name: str):
    file = tmp_path / "model.safetensors"
    save_file({f"model.diffusion_model.{key}": torch.zeros(1)}, file)
    with pytest.raises(
        InputError, match=f"got {name}, which is not opened from a single file; give --teacher.path a Diff"
    ):
        load(TeacherConfig(str(file)))


# methods


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_every_method_trains_a_student_of_them(folder: Path, kind: Any):
    from stepdistill.batch import Batch
    from stepdistill.methods.denoising import Denoising, DenoisingConfig
    from stepdistill.methods.guidance_distill import GuidanceDistill, GuidanceDistillConfig
    from stepdistill.methods.lcm import LCM, LCMConfig
    from stepdistill.methods.progressive import Progressive, ProgressiveConfig
    from stepdistill.networks.lora import StudentConfig
    from stepdistill.randomness import StepRandom

    made = {
        "lcm": lambda student, teacher: LCM(LCMConfig(shift=3.0), student, teacher),
        "progressive": lambda student, teacher: Progressive(ProgressiveConfig(shift=3.0), student, teacher),
        "from itself": lambda student, _: Progressive(ProgressiveConfig(), student),
        "guidance": lambda student, teacher: GuidanceDistill(GuidanceDistillConfig(), student, teacher),
        "denoising": lambda student, _: Denoising(DenoisingConfig(), student),
    }
    for name, make in made.items():
        model = opened(folder)
        student = model.denoiser.student(StudentConfig(kind=kind, rank=2), embed_guidance=True)
        cond = model.conditions(["a red circle", "b"])
        batch = Batch(normal(2, *model.latent_shape), cond, model.uncond(cond), StepRandom(0, 0, range(2)))
        method = make(student, model.denoiser)
        if name == "guidance" and model.denoiser.takes_guidance:  # which its teacher has in it
            with pytest.raises(InputError, match="leave the guidance distillation out"):
                method.training_step(batch)
            continue
        losses = method.training_step(batch)
        losses.total.backward()
        assert torch.isfinite(losses.total), name
        gradients = [p.grad.abs().max() for p in student.trainable() if p.grad is not None]
        assert torch.stack(gradients).isfinite().all() and max(gradients) > 0, name
