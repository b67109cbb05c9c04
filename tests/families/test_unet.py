import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import LENGTH, RESOLUTION, tiny_pipeline

from stepdistill.diffusion.guidance import guide_scale
from stepdistill.diffusion.solver import sample
from stepdistill.errors import InputError
from stepdistill.families import TeacherConfig, load
from stepdistill.families.unet import LCM_TARGETS, StableDiffusion


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {
        "eps": tiny_pipeline(root / "eps"),
        "v": tiny_pipeline(root / "v", prediction_type="v_prediction"),
        "ztsnr": tiny_pipeline(root / "ztsnr", prediction_type="v_prediction", rescale_betas_zero_snr=True),
    }


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["eps"], tmp_path / "copy"))


def opened(path: Path, **options: Any) -> StableDiffusion:
    model = load(TeacherConfig(path=str(path), **options))
    assert isinstance(model, StableDiffusion)
    return model


def stock(path: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(path, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


# what a checkpoint says


def test_facts_of_a_checkpoint(folders: dict[str, Path]):
    model = opened(folders["eps"])
    assert (model.resolution, model.latent_shape, model.denoiser.predicts) == (RESOLUTION, (4, 4, 4), "eps")
    assert model.name == str(folders["eps"])
    assert model.device == torch.device("cpu")
    assert not any(
        p.requires_grad for m in (model.denoiser.module, model.vae, model.text_encoder) for p in m.parameters()
    )
    names = [name for name, _ in model.denoiser.module.named_modules()]
    for target in LCM_TARGETS:
        assert any(name.endswith(f".{target}") for name in names), target
    assert len(model.denoiser.tap_points) == 4
    assert set(model.denoiser.tap_points) <= set(names)


def test_schedule_and_kind_come_from_the_scheduler_config(folders: dict[str, Path]):
    from diffusers import DDIMScheduler

    for name, kind in (("eps", "eps"), ("v", "v"), ("ztsnr", "v")):
        denoiser = opened(folders[name]).denoiser
        table = DDIMScheduler.from_pretrained(folders[name], subfolder="scheduler").alphas_cumprod
        t = denoiser.table.time(torch.arange(1000))
        assert denoiser.predicts == kind
        torch.testing.assert_close(denoiser.schedule.alpha(t), table.double().sqrt(), rtol=0, atol=0)
        assert denoiser.table.zero_terminal_snr == (name == "ztsnr")


def test_dtype_leaves_the_autoencoder_and_the_timestep_in_float32(folders: dict[str, Path]):
    model = load(TeacherConfig(path=str(folders["eps"])), dtype=torch.bfloat16)
    assert isinstance(model, StableDiffusion)
    assert model.denoiser.module.dtype == model.text_encoder.dtype == torch.bfloat16
    reference = opened(folders["eps"])
    for name, value in model.vae.state_dict().items():
        torch.testing.assert_close(value, reference.vae.state_dict()[name], rtol=0, atol=0)
    seen = []
    hook = lambda _, args, kwargs: seen.append((args[1].dtype, args[1].tolist()))  # noqa: E731
    model.denoiser.module.register_forward_pre_hook(hook, with_kwargs=True)
    t = model.denoiser.table.time(torch.tensor([999, 749]))
    cond = model.encode_prompts(["a", "b"])
    assert cond["prompt_embeds"].dtype == torch.float32
    output = model.denoiser(normal(2, 4, 4, 4), t, cond)
    assert seen == [(torch.float32, [999.0, 749.0])]
    assert output.x0.dtype == torch.float32


# the parts


@pytest.mark.parametrize("name", ["eps", "v"])
def test_call_is_the_pipelines_unet_call_bit_for_bit(folders: dict[str, Path], name: str):
    model, pipeline = opened(folders[name]), stock(folders[name])
    x_t, cond = normal(3, 4, 4, 4), model.encode_prompts(["a red circle", "b", ""])
    steps = torch.tensor([0, 500, 999])
    with torch.no_grad():
        ours = model.denoiser.call(x_t, model.denoiser.table.time(steps), cond)
        theirs = pipeline.unet(x_t, steps, encoder_hidden_states=cond["prompt_embeds"], return_dict=False)[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_prompts_are_encoded_as_the_pipeline_does_and_cut_at_its_length(folders: dict[str, Path]):
    model, pipeline = opened(folders["eps"]), stock(folders["eps"])
    prompts = ["a red circle", "x" * 100, ""]
    ours = model.encode_prompts(prompts)["prompt_embeds"]
    theirs, empty = pipeline.encode_prompt(prompts, "cpu", 1, True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert ours.shape == (3, LENGTH, 16)
    extra = torch.arange(3)
    uncond = model.uncond({"prompt_embeds": ours, "size": extra})
    torch.testing.assert_close(uncond["prompt_embeds"], empty, rtol=0, atol=1e-6)
    assert uncond["size"] is extra
    assert not torch.equal(ours[0], ours[1])


def test_latents_are_scaled_and_decoded_back_to_what_the_autoencoder_gives(folders: dict[str, Path]):
    model = opened(folders["eps"])
    pixels = normal(2, 3, RESOLUTION, RESOLUTION).clamp(-1, 1)
    mean, std = model.posterior(pixels)
    assert mean.shape == std.shape == (2, 4, 4, 4)
    assert mean.dtype == std.dtype == torch.float32
    assert not mean.requires_grad
    with torch.no_grad():
        distribution = model.vae.encode(pixels).latent_dist
        factor = model.vae.config.scaling_factor
        torch.testing.assert_close(mean, distribution.mean * factor)
        torch.testing.assert_close(std, distribution.std * factor)
        torch.testing.assert_close(model.decode(mean), model.vae.decode(distribution.mean).sample, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.encode_images(pixels), mean, rtol=0, atol=0)
    latents = mean.requires_grad_()
    model.decode(latents).sum().backward()
    assert latents.grad is not None
    assert float(latents.grad.abs().sum()) > 0


def test_a_shifted_autoencoder_round_trips(folders: dict[str, Path]):
    model = opened(folders["eps"])
    pixels = normal(1, 3, RESOLUTION, RESOLUTION).clamp(-1, 1)
    plain, raw = model.posterior(pixels)[0], model.decode(model.posterior(pixels)[0])
    model.vae.register_to_config(shift_factor=0.5)
    shifted = model.posterior(pixels)[0]
    torch.testing.assert_close(shifted, plain - 0.5 * model.vae.config.scaling_factor)
    torch.testing.assert_close(model.decode(shifted), raw, rtol=1e-4, atol=1e-5)


# the whole


@pytest.mark.parametrize("name", ["eps", "v"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_our_solver_samples_what_stock_ddim_samples(folders: dict[str, Path], name: str, guidance: float):
    model, pipeline = opened(folders[name]), stock(folders[name])
    x_t = normal(2, 4, 4, 4)
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


def test_pipeline_shares_the_weights_and_gives_what_stock_gives(folders: dict[str, Path]):
    model = opened(folders["v"])
    pipeline: Any = model.pipeline()
    assert pipeline.unet is model.denoiser.module
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
    theirs = stock(folders["v"])("a", generator=torch.Generator().manual_seed(0), **options).images
    ours = pipeline("a", generator=torch.Generator().manual_seed(0), **options).images
    assert (ours == theirs).all()


def test_fingerprint_is_of_the_autoencoder_and_the_text_encoder(folders: dict[str, Path], copy: Path):
    first = opened(folders["eps"]).fingerprint()
    assert opened(folders["v"]).fingerprint() == first  # same weights; another scheduler changes no latent
    used = opened(copy)
    used.encode_prompts(["a"])
    assert used.fingerprint() == first
    edit(copy / "vae" / "config.json", scaling_factor=0.5)
    scaled = opened(copy).fingerprint()
    edit(copy / "vae" / "config.json", scaling_factor=0.5, shift_factor=0.1)
    shifted = opened(copy).fingerprint()
    model = opened(copy)
    model.text_encoder.register_buffer("scalar", torch.tensor(1.0))
    assert len({first, scaled, shifted, model.fingerprint()}) == 4


def test_another_autoencoder(folders: dict[str, Path], tmp_path: Path):
    other = tiny_pipeline(tmp_path / "other", seed=1)
    reference = opened(other).vae.state_dict()
    for path in (other, other / "vae"):
        vae = opened(folders["eps"], vae=str(path)).vae.state_dict()
        torch.testing.assert_close(vae, reference, rtol=0, atol=0)
    with pytest.raises(InputError, match=r"--teacher\.vae"):
        opened(folders["eps"], vae=str(tmp_path))


# a single file


def ldm_unet(key: str) -> str:
    """The name that a weight of the tiny UNet has in CompVis' checkpoints (one layer a block, two levels)."""
    if ".resnets." in key:
        for ours, theirs in (
            ("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("norm2", "out_layers.0"), ("conv2", "out_layers.3"),
            ("time_emb_proj", "emb_layers.1"), ("conv_shortcut", "skip_connection"),
        ):  # fmt: skip
            key = key.replace(ours, theirs)
    place = re.match(r"(down|up|mid)_blocks?(?:\.(\d))?\.(\w+)\.(\d)\.", key)
    if place:
        side, block, part, layer = place[1], int(place[2] or 0), place[3], int(place[4])
        rest = key[place.end() :]
        if side == "mid":
            return f"middle_block.{2 * layer if part == 'resnets' else 1}.{rest}"
        if part == "downsamplers":
            return f"input_blocks.{2 * block + 2}.0.{rest.replace('conv', 'op')}"
        if part == "upsamplers":
            return f"output_blocks.{2 * block + 1}.1.{rest}"
        first = f"input_blocks.{2 * block + layer + 1}" if side == "down" else f"output_blocks.{2 * block + layer}"
        return f"{first}.{0 if part == 'resnets' else 1}.{rest}"
    for ours, theirs in (
        ("conv_in", "input_blocks.0.0"), ("time_embedding.linear_1", "time_embed.0"), ("conv_norm_out", "out.0"),
        ("time_embedding.linear_2", "time_embed.2"), ("conv_out", "out.2"),
    ):  # fmt: skip
        key = key.replace(ours, theirs)
    return key


def ldm_vae(key: str) -> str:
    """The same for the autoencoder (four levels)."""
    key = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{3 - int(m[1])}", key).replace("down_blocks", "down")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    for ours, theirs in (
        ("resnets", "block"), ("mid_block.attentions.0", "mid.attn_1"), ("group_norm", "norm"), ("to_q", "q"),
        ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"), ("conv_norm_out", "norm_out"),
        ("conv_shortcut", "nin_shortcut"), ("downsamplers.0", "downsample"), ("upsamplers.0", "upsample"),
    ):  # fmt: skip
        key = key.replace(ours, theirs)
    return key


def single_file(folder: Path, file: Path) -> Path:
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    text = load_file(folder / "text_encoder" / "model.safetensors")
    weights = {f"model.diffusion_model.{ldm_unet(k)}": v for k, v in unet.items()}
    weights |= {f"first_stage_model.{ldm_vae(k)}": v for k, v in vae.items()}
    weights |= {f"cond_stage_model.transformer.text_model.{k.removeprefix('text_model.')}": v for k, v in text.items()}
    assert len(weights) == len(unet) + len(vae) + len(text)
    save_file(weights, file)
    return file


def test_a_single_file_is_the_same_model(folders: dict[str, Path], tmp_path: Path):
    file = single_file(folders["eps"], tmp_path / "model.safetensors")
    model, reference = opened(file, config=str(folders["eps"])), opened(folders["eps"])
    for ours, theirs in zip(
        (model.denoiser.module, model.vae, model.text_encoder),
        (reference.denoiser.module, reference.vae, reference.text_encoder),
        strict=True,
    ):
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    assert model.fingerprint() == reference.fingerprint()
    assert model.resolution == RESOLUTION
    half = load(TeacherConfig(path=str(file), config=str(folders["eps"])), dtype=torch.float16)
    assert isinstance(half, StableDiffusion)
    assert half.denoiser.module.dtype == half.text_encoder.dtype == torch.float16
    torch.testing.assert_close(half.vae.state_dict(), reference.vae.state_dict(), rtol=0, atol=0)


# what can go wrong


def test_missing_folder_and_folder_without_a_pipeline(tmp_path: Path):
    with pytest.raises(InputError, match=r"got nothing there; give --teacher\.path"):
        load(TeacherConfig(path=str(tmp_path / "none")))
    with pytest.raises(InputError, match=r"without model_index\.json"):
        load(TeacherConfig(path=str(tmp_path)))


@pytest.mark.parametrize("text", ["{", "[]", '"a"', "\xff"])
def test_corrupted_model_index(copy: Path, text: str):
    (copy / "model_index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"model_index\.json"):
        load(TeacherConfig(path=str(copy)))


def test_unknown_pipeline_class(copy: Path):
    edit(copy / "model_index.json", _class_name="OtherPipeline")
    with pytest.raises(InputError, match="expected a pipeline of class .*StableDiffusionPipeline.*got OtherPipeline"):
        load(TeacherConfig(path=str(copy)))


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_pickles_are_refused(tmp_path: Path, suffix: str):
    (tmp_path / f"a{suffix}").write_bytes(b"")
    with pytest.raises(InputError, match="a pickle that could run code"):
        load(TeacherConfig(path=str(tmp_path / f"a{suffix}")))


def test_eps_with_zero_terminal_snr(tmp_path: Path):
    with pytest.raises(InputError, match=r"zero terminal SNR.*got epsilon"):
        load(TeacherConfig(path=str(tiny_pipeline(tmp_path / "a", rescale_betas_zero_snr=True))))


def test_a_few_step_model_is_no_teacher(copy: Path):
    edit(copy / "unet" / "config.json", time_cond_proj_dim=8)
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), "time_embedding.cond_proj.weight": torch.zeros(8, 8)}, file)
    with pytest.raises(InputError, match="undistilled teacher"):
        load(TeacherConfig(path=str(copy)))


@pytest.mark.parametrize("part", ["unet/config.json", "scheduler/scheduler_config.json", "text_encoder/config.json"])
def test_missing_or_corrupted_parts_say_which(copy: Path, part: str):
    (copy / part).write_text("{")
    with pytest.raises(InputError, match="expected a loadable StableDiffusionPipeline"):
        load(TeacherConfig(path=str(copy)))
    (copy / part).unlink()
    with pytest.raises(InputError, match="expected a loadable StableDiffusionPipeline"):
        load(TeacherConfig(path=str(copy)))


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "missing", "shape"])
def test_damaged_weights(copy: Path, part: str, damage: str):
    file = copy / part
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:1000])
    elif damage == "missing":
        file.unlink()
    else:
        save_file({name: torch.zeros(3) for name in load_file(file)}, file)
    with pytest.raises(InputError, match="expected a loadable StableDiffusionPipeline"):
        load(TeacherConfig(path=str(copy)))


def test_an_unreachable_hub_id_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("stepdistill.families.loading.hub_is_reachable", lambda: False)
    with pytest.raises(InputError, match=r"'no-such/model'.*neither a folder here nor .*give --teacher\.path"):
        load(TeacherConfig(path="no-such/model"))
