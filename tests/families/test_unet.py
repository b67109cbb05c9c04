"""What is Stable Diffusion's own; what it shares with other families is in test_every_family.py."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import normal, opened, stock
from safetensors.torch import load_file, save_file
from tiny import RESOLUTION, tiny_pipeline

from stepdistill.diffusion.guidance import guide_scale
from stepdistill.diffusion.solver import sample
from stepdistill.errors import InputError
from stepdistill.families import TeacherConfig, load
from stepdistill.families.unet import LCM_TARGETS, StableDiffusion


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("sd"))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def reopened(folder: Path) -> StableDiffusion:
    model = load(TeacherConfig(path=str(folder)))
    assert isinstance(model, StableDiffusion)
    return model


def test_lora_targets_are_modules_of_the_network(folder: Path):
    names = [name for name, _ in opened(folder).denoiser.module.named_modules()]
    for target in LCM_TARGETS:
        assert any(name.endswith(f".{target}") for name in names), target


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_the_scheduler_that_the_checkpoint_comes_with_is_followed_too(folder: Path, guidance: float):
    model, pipeline, x_t = opened(folder), stock(folder), normal(2, 4, 4, 4)
    prompts = ["a red circle", "b"]
    theirs = pipeline(
        prompts, num_inference_steps=5, guidance_scale=guidance, latents=x_t.clone(), output_type="latent"
    ).images
    cond = model.encode_prompts(prompts)
    uncond = model.uncond(cond)

    def denoise(x: torch.Tensor, t: torch.Tensor) -> Any:
        with torch.no_grad():
            return guide_scale(model.denoiser(x, t, cond), model.denoiser(x, t, uncond), torch.full((2,), guidance))

    # leading spacing with offset 1 visits 801, 601, ..., 1 and ends at level 0 (set_alpha_to_one is false)
    grid = model.denoiser.table.time(torch.tensor([801, 601, 401, 201, 1, 0]))
    ours = sample(denoise, model.denoiser.schedule, x_t, grid)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# the autoencoder's scale


def test_a_shifted_autoencoder_round_trips(folder: Path):
    model = opened(folder)
    pixels = normal(1, 3, RESOLUTION, RESOLUTION).clamp(-1, 1)
    plain, raw = model.posterior(pixels)[0], model.decode(model.posterior(pixels)[0])
    model.vae.register_to_config(shift_factor=0.5)
    shifted = model.posterior(pixels)[0]
    torch.testing.assert_close(shifted, plain - 0.5 * model.vae.config.scaling_factor)
    torch.testing.assert_close(model.decode(shifted), raw, rtol=1e-4, atol=1e-5)


def test_fingerprint_is_of_the_autoencoders_scale_and_the_tokenizer(folder: Path, copy: Path):
    prints = [opened(folder).fingerprint()]
    for fields in (
        {"scaling_factor": 0.5},
        {"shift_factor": 0.1},
        {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4},
    ):
        edit(copy / "vae" / "config.json", **fields)
        prints.append(reopened(copy).fingerprint())
    edit(copy / "text_encoder" / "config.json", use_attention_mask=True)
    prints.append(reopened(copy).fingerprint())
    edit(copy / "tokenizer" / "tokenizer_config.json", model_max_length=12)
    prints.append(reopened(copy).fingerprint())
    model = reopened(copy)
    model.text_encoder.register_buffer("scalar", torch.tensor(1.0))
    assert len({*prints, model.fingerprint()}) == len(prints) + 1


def test_a_text_encoder_that_uses_its_mask(copy: Path, folder: Path):
    edit(copy / "text_encoder" / "config.json", use_attention_mask=True)
    model, prompts = reopened(copy), ["a red circle", ""]
    ours = model.encode_prompts(prompts)["prompt_embeds"]
    theirs, _ = stock(copy).encode_prompt(prompts, "cpu", 1, False)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert not torch.allclose(ours, opened(folder).encode_prompts(prompts)["prompt_embeds"])


# networks that are another kind of model


def test_eps_with_zero_terminal_snr(tmp_path: Path):
    with pytest.raises(InputError, match=r"zero terminal SNR.*got epsilon"):
        load(TeacherConfig(path=str(tiny_pipeline(tmp_path / "a", rescale_betas_zero_snr=True))))


def test_a_few_step_model_is_no_teacher(copy: Path):
    edit(copy / "unet" / "config.json", time_cond_proj_dim=8)
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), "time_embedding.cond_proj.weight": torch.zeros(8, 8)}, file)
    with pytest.raises(InputError, match="undistilled teacher"):
        load(TeacherConfig(path=str(copy)))


def test_an_inpainting_model_is_refused(copy: Path):
    edit(copy / "unet" / "config.json", in_channels=9)
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({**weights, "conv_in.weight": weights["conv_in.weight"].repeat(1, 3, 1, 1)[:, :9].contiguous()}, file)
    with pytest.raises(InputError, match="sees 4 channels of latents, .* takes 9: models for inpainting"):
        load(TeacherConfig(path=str(copy)))


def test_a_network_with_class_labels_is_refused(copy: Path):
    edit(copy / "unet" / "config.json", num_class_embeds=3)
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), "class_embedding.weight": torch.zeros(3, 32)}, file)
    with pytest.raises(InputError, match=r"inputs of Stable Diffusion, got .*'num_class_embeds': 3"):
        load(TeacherConfig(path=str(copy)))


def test_latents_that_are_no_square_are_refused(copy: Path):
    edit(copy / "unet" / "config.json", sample_size=[4, 8])
    with pytest.raises(InputError, match=r"expected a square sample_size .*got \[4, 8\]"):
        load(TeacherConfig(path=str(copy)))
