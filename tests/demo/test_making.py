"""The stages as the recipe runs them, a step each: what they write is a teacher, and `start` is what they go on from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from recipe_runs import load_recipe
from safetensors.torch import load_file

from stepdistill.config import parse
from stepdistill.demo import making
from stepdistill.families.loading import DEMO_TEACHER

DEMO = DEMO_TEACHER.parent
PARTS = {
    "unet": "teacher/unet/diffusion_pytorch_model.safetensors",
    "vae": "teacher/vae/diffusion_pytorch_model.safetensors",
    "text": "teacher/text_encoder/model.safetensors",
    "judge": "judge/judge.safetensors",
    "eye": "eye/model.safetensors",
}
STAGES = ("judge", "eye", "text", "autoencoder", "decoder", "unet")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The recipe with one step a stage of a rate that moves nothing: from random weights, and from those that ship."""
    recipe, found = load_recipe("demo_teacher"), {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CHECKED", "SCALED"):
            patch.setattr(making, name, 16)
        for name, flags in (("new", []), ("on", ["--start", str(DEMO)])):
            folder = tmp_path_factory.mktemp(name)
            words = ["--output_dir", str(folder), "--images", "8", "--unet_images", "8", *flags]
            for stage in STAGES:
                words += [f"--{stage}.max_train_steps=1", f"--{stage}.train_batch_size=2"]
                words += [f"--{stage}.learning_rate=1e-9", f"--{stage}.lr_warmup_steps=0"]
            recipe.main(parse(recipe.Recipe, words))
            found[name] = folder
    return found


@pytest.mark.parametrize("part", PARTS)
def test_start_is_what_training_goes_on_from(made: dict[str, Path], part: str) -> None:
    shipped, on, new = (load_file(folder / PARTS[part]) for folder in (DEMO, made["on"], made["new"]))
    trained = [name for name in shipped if name not in ("mean", "std")]  # a judge's units are taken anew
    for name in trained:
        torch.testing.assert_close(on[name].float(), shipped[name].float(), rtol=2e-3, atol=1e-5)
    assert any(float((new[name].float() - shipped[name].float()).abs().max()) > 0.05 for name in trained)


def test_what_is_written_is_a_stock_pipeline(made: dict[str, Path]) -> None:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(made["on"] / "teacher", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red circle left of a blue star on plain grey", num_inference_steps=1, output_type="np").images[0]
    assert image.shape == (64, 64, 3)
    assert (made["on"] / "config.yaml").is_file()


def test_the_scale_of_latents_stays_what_the_denoiser_knows(made: dict[str, Path]) -> None:
    from diffusers import AutoencoderKL

    folders = (DEMO, made["on"], made["new"])
    shipped, on, new = (AutoencoderKL.from_pretrained(f / "teacher" / "vae").config.scaling_factor for f in folders)
    assert on == shipped != new


def test_what_is_written_does_not_tell_where_it_came_from(made: dict[str, Path]) -> None:
    files = [file for name in ("new", "on") for file in made[name].glob("teacher/*/config.json")]
    files += [made[name] / "eye" / "config.json" for name in ("new", "on")]
    assert len(files) == 8
    assert not [file for file in files if str(DEMO) in file.read_text(encoding="utf-8")]
