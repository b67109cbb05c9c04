"""What is SDXL's own; what it shares with other families is in test_every_family.py."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import normal, opened, stock
from safetensors.torch import load_file, save_file
from tiny import LENGTH, RESOLUTION
from tiny_sdxl import PROJECTION, SIZE_DIM, WIDTHS, tiny_sdxl

from stepdistill.errors import InputError
from stepdistill.families import TeacherConfig, load


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_shapes_of_the_conditions(folder: Path):
    cond = opened(folder).conditions(["a", "b", "c"])
    assert {key: tuple(value.shape) for key, value in cond.items()} == {
        "prompt_embeds": (3, LENGTH, sum(WIDTHS)), "pooled_prompt_embeds": (3, PROJECTION), "time_ids": (3, 6),
    }  # fmt: skip


def test_the_network_listens_to_each_of_its_conditions(folder: Path):
    model = opened(folder)
    x_t, t, cond = normal(1, 4, 4, 4), torch.tensor([0.5], dtype=torch.float64), model.conditions(["a"])
    with torch.no_grad():
        plain = model.denoiser.call(x_t, t, cond)
        for key in cond:
            assert not torch.equal(model.denoiser.call(x_t, t, {**cond, key: cond[key] + 1.0}), plain), key


def test_images_through_latents_of_a_mean_and_a_std_of_their_own(copy: Path):
    mean, std = [0.1, -0.2, 0.3, 0.0], [0.5, 1.0, 2.0, 4.0]
    edit(copy / "vae" / "config.json", latents_mean=mean, latents_std=std)
    model, pipeline = opened(copy), stock(copy)
    pixels = normal(2, 3, RESOLUTION, RESOLUTION).clamp(-1, 1)
    latents, noise = model.posterior(pixels)
    with torch.no_grad():
        raw = pipeline.vae.encode(pixels).latent_dist
        centre, scale = (torch.tensor(v).reshape(1, 4, 1, 1) for v in (mean, std))
        torch.testing.assert_close(latents, (raw.mean - centre) * pipeline.vae.config.scaling_factor / scale)
        torch.testing.assert_close(noise, raw.std * pipeline.vae.config.scaling_factor / scale)
        torch.testing.assert_close(model.decode(latents), pipeline.vae.decode(raw.mean).sample, rtol=1e-4, atol=1e-5)
    # the stock pipeline, told to end before its first step, decodes the latents that it is given
    images = pipeline("a", num_inference_steps=1, latents=latents[:1].clone(), output_type="pt", denoising_end=0.0001)
    ours = (model.decode(latents[:1]) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images.images, ours, rtol=1e-5, atol=1e-5)


def test_a_pad_token_of_its_own_is_part_of_the_fingerprint(copy: Path, folder: Path):
    config = copy / "tokenizer_2" / "tokenizer_config.json"
    assert json.loads(config.read_text())["pad_token"] == "'"
    edit(config, pad_token="z")
    assert opened(copy).fingerprint() != opened(folder).fingerprint()


# checkpoints that are no base model


def test_a_refiner_is_refused(copy: Path):
    edit(copy / "model_index.json", text_encoder=[None, None], tokenizer=[None, None])
    with pytest.raises(
        InputError, match="two text encoders, got .* without tokenizer and text_encoder: refiners are not"
    ):
        load(TeacherConfig(path=str(copy)))


@pytest.mark.parametrize("part", ["tokenizer_2", "text_encoder_2"])
def test_a_missing_part_is_named(copy: Path, part: str):
    index = json.loads((copy / "model_index.json").read_text())
    del index[part]
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=f"two text encoders, got .* without {part}"):
        load(TeacherConfig(path=str(copy)))


def test_aesthetic_scores_are_refused(copy: Path):
    edit(copy / "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline", requires_aesthetics_score=True)
    with pytest.raises(InputError, match="without aesthetic scores, got .*give --teacher.path a base model"):
        load(TeacherConfig(path=str(copy)))


def test_a_network_for_five_numbers_is_refused(copy: Path):
    inputs = 5 * SIZE_DIM + PROJECTION
    edit(copy / "unet" / "config.json", projection_class_embeddings_input_dim=inputs)
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({**weights, "add_embedding.linear_1.weight": torch.zeros(32, inputs)}, file)
    with pytest.raises(InputError, match=f"takes {inputs} numbers besides the prompt and not 6 x {SIZE_DIM} of sizes"):
        load(TeacherConfig(path=str(copy)))


def test_stable_diffusions_network_in_an_sdxl_pipeline_is_refused(copy: Path, tmp_path: Path):
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    edit(copy / "unet" / "config.json", addition_embed_type=None)
    save_file({k: v for k, v in load_file(file).items() if not k.startswith("add_embedding")}, file)
    with pytest.raises(InputError, match="expected a UNet with the inputs of SDXL"):
        load(TeacherConfig(path=str(copy)))
