"""What is the pixel models' own; what they share with other families is in test_every_family.py."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import normal, opened
from PIL import Image
from tiny_pixels import SIDE, tiny_pixels

from stepdistill.errors import InputError
from stepdistill.families import TeacherConfig, load


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pixels(tmp_path_factory.mktemp("classes"), classes=5)


def index(folder: Path, **fields: Any) -> None:
    file = folder / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_labels_are_numbers(folder: Path):
    model = opened(folder)
    cond = model.encode_prompts(["3", " 0", "4\n"])
    assert cond["class_labels"].tolist() == [3, 0, 4]
    assert cond["class_labels"].dtype == torch.int64
    assert model.conditions(model.examples)["class_labels"].tolist() == [0, 4]
    assert model.uncond(cond) == {}


@pytest.mark.parametrize("prompt", ["5", "-1", "a cat", "", "1.0", "03"])
def test_labels_out_of_range_are_told_the_range(folder: Path, prompt: str):
    with pytest.raises(InputError, match=f"expected class labels from 0 to 4, got '{prompt}'"):
        opened(folder).encode_prompts(["1", prompt])


def test_labels_have_names_where_the_checkpoint_gives_them(tmp_path: Path):
    folder = tiny_pixels(tmp_path / "a", classes=3)
    index(folder, id2label={"0": "tench, Tinca tinca", "2": "great white shark", "3": "of no class"})
    model = load(TeacherConfig(path=str(folder)))
    cond = model.encode_prompts(["Tinca tinca", "great white shark", "tench", "1"])
    assert cond["class_labels"].tolist() == [0, 2, 0, 1]
    for prompt in ("of no class", "shark", "3"):
        with pytest.raises(InputError, match=f"from 0 to 2, or their names, got '{prompt}'"):
            model.encode_prompts([prompt])


def test_the_label_matters_and_is_each_samples_own(folder: Path):
    model = opened(folder)
    x_t, t = normal(1, 3, SIDE, SIDE).repeat(2, 1, 1, 1), torch.full((2,), 0.5, dtype=torch.float64)
    with torch.no_grad():
        first, second = model.denoiser.call(x_t, t, model.conditions(["1", "2"]))
        again, _ = model.denoiser.call(x_t, t, model.conditions(["1", "1"]))
    assert not torch.allclose(first, second)
    torch.testing.assert_close(again, first)


def test_unconditional_models_ask_for_nothing(tmp_path: Path):
    model = opened(tiny_pixels(tmp_path / "a"))
    assert model.conditions(["anything", ""]) == model.encode_prompts([]) == model.uncond({}) == {}


def test_labels_that_are_embedded_as_timesteps(tmp_path: Path):
    model = opened(tiny_pixels(tmp_path / "a", classes=4, class_embed_type="timestep"))
    x_t, t = normal(2, 3, SIDE, SIDE), torch.full((2,), 0.5, dtype=torch.float64)
    with torch.no_grad():
        ours = model.denoiser.call(x_t, t, model.conditions(["1", "3"]))
        theirs = model.denoiser.module(x_t, 499.0, class_labels=torch.tensor([1, 3])).sample
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_grey_is_pillows(tmp_path: Path):
    model = opened(tiny_pixels(tmp_path / "a", channels=1))
    colours = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    pixels = torch.from_numpy(colours).permute(2, 0, 1)[None].float() / 127.5 - 1.0
    grey = torch.from_numpy(np.array(Image.fromarray(colours).convert("L"))).float() / 127.5 - 1.0
    mean, std = model.posterior(pixels)
    torch.testing.assert_close(mean[0, 0], grey, rtol=0, atol=1.01 / 127.5)
    assert not std.any()
    torch.testing.assert_close(model.posterior(mean)[0], mean, rtol=0, atol=0)  # what is grey stays as it is


@pytest.mark.parametrize(
    ("unet", "message"),
    [
        ({"out_channels": 6}, "with 3 and 6: latents and learned variances"),
        ({"in_channels": 4, "out_channels": 4}, "with 4 and 4"),
        ({"time_embedding_type": "fourier"}, "with 'fourier': score-based models"),
        ({"class_embed_type": "timestep"}, "class_embed_type 'timestep' and num_class_embeds None"),
        ({"class_embed_type": "identity", "num_class_embeds": 3}, "class_embed_type 'identity'"),
        ({"sample_size": (16, 8)}, r"expected a square sample_size .*got \[16, 8\]"),
        ({"sample_size": None}, "expected a square sample_size .*got None"),
    ],
)
def test_networks_of_other_kinds_are_refused(tmp_path: Path, unet: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        load(TeacherConfig(path=str(tiny_pixels(tmp_path / "a", **unet))))


def test_a_network_without_attention_is_tapped_in_its_middle(tmp_path: Path):
    plain = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "add_attention": False}
    denoiser = opened(tiny_pixels(tmp_path / "a", **plain)).denoiser
    assert denoiser.tap_points == ("mid_block",)


def test_names_of_the_first_ddpm_checkpoints(tmp_path: Path):
    """Their attention layers have other names in the file, which Diffusers translates; nothing counts as missing."""
    from safetensors.torch import load_file, save_file

    folder = tiny_pixels(tmp_path / "a")
    reference = opened(folder).denoiser.module.state_dict()
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        weights = {k.replace(f".{new}.", f".{old}."): v for k, v in weights.items()}
    save_file(weights, file)
    loaded = load(TeacherConfig(path=str(folder))).denoiser.module.state_dict()
    torch.testing.assert_close(loaded, reference, rtol=0, atol=0)
