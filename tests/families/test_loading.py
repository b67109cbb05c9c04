"""Opening checkpoints: folders, hub ids and single files, and every way in which they can be incomplete."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from ldm import single_file
from safetensors.torch import load_file, save_file
from tiny import RESOLUTION, tiny_pipeline
from tiny_pixels import tiny_pixels
from tiny_sdxl import tiny_sdxl

from stepdistill.errors import InputError
from stepdistill.families import TABLE, TeacherConfig, load
from stepdistill.families.schedules import from_scheduler
from stepdistill.families.sdxl import StableDiffusionXL
from stepdistill.families.unet import StableDiffusion

EXACT = {"rtol": 0, "atol": 0}
UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {"sd": tiny_pipeline(root / "sd"), "sdxl": tiny_sdxl(root / "sdxl"), "pixels": tiny_pixels(root / "pixels")}


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["sd"], tmp_path / "copy"))


@pytest.fixture
def copies(folders: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    return {name: Path(shutil.copytree(folder, tmp_path / name)) for name, folder in folders.items()}


def opened(path: Path | str, dtype: torch.dtype | None = None, **options: Any) -> Any:
    return load(TeacherConfig(path=str(path), **options), dtype)


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def same_weights(ours: Any, theirs: Any) -> None:
    for a, b in zip(ours.modules, theirs.modules, strict=True):
        torch.testing.assert_close(a.state_dict(), b.state_dict(), **EXACT)


# weights that are missing or left over


@pytest.mark.parametrize(
    ("name", "part", "key"),
    [
        ("sd", "unet", "mid_block.resnets.0.conv1.bias"),
        ("sd", "vae", "decoder.conv_out.weight"),
        ("sd", "text_encoder", "final_layer_norm.weight"),
        ("sdxl", "unet", "add_embedding.linear_1.weight"),
        ("sdxl", "text_encoder_2", "text_projection.weight"),
        ("pixels", "unet", "conv_in.weight"),
    ],
)
def test_a_missing_weight_is_an_error_that_names_it(copies: dict[str, Path], name: str, part: str, key: str):
    (file,) = (copies[name] / part).glob("*.safetensors")
    weights = load_file(file)
    del weights[key]
    save_file(weights, file)
    with pytest.raises(InputError, match=rf"config of the {part} describes.*1 tensors missing from.*first {key};"):
        opened(copies[name])


def test_missing_weights_are_counted_and_the_first_ones_named(copy: Path):
    weights = load_file(copy / UNET)
    save_file({k: v for k, v in weights.items() if not k.startswith("time_embedding.")}, copy / UNET)
    first = "time_embedding.linear_1.bias, time_embedding.linear_1.weight, time_embedding.linear_2.bias;"
    with pytest.raises(InputError, match=f"4 tensors missing from .*, first {first}"):
        opened(copy)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_weights_that_the_config_knows_nothing_of_are_an_error(copy: Path, part: str):
    (file,) = (copy / part).glob("*.safetensors")
    save_file({**load_file(file), "another.weight": torch.zeros(2)}, file)
    with pytest.raises(InputError, match=rf"config of the {part} describes.*1 tensors left over in.*another\.weight"):
        opened(copy)


def test_a_text_encoder_may_come_with_the_rest_of_its_clip(copy: Path, folders: dict[str, Path]):
    more = {"text_model.embeddings.position_ids": torch.arange(24)[None], "text_projection.weight": torch.zeros(16, 16)}
    save_file({**load_file(copy / TEXT), **more}, copy / TEXT)
    same_weights(opened(copy), opened(folders["sd"]))


def test_names_of_older_attention_layers_count_as_todays(copy: Path, folders: dict[str, Path]):
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        weights = {k.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): v for k, v in weights.items()}
    assert "decoder.mid_block.attentions.0.query.weight" in weights
    save_file(weights, file)
    same_weights(opened(copy), opened(folders["sd"]))


def test_sharded_weights(copy: Path, folders: dict[str, Path]):
    from diffusers import UNet2DConditionModel

    UNet2DConditionModel.from_pretrained(copy / "unet").save_pretrained(copy / "unet", max_shard_size="100KB")
    (copy / UNET).unlink()
    shards = sorted((copy / "unet").glob("*.safetensors"))
    assert len(shards) > 1
    same_weights(opened(copy), opened(folders["sd"]))
    weights = load_file(shards[1])
    key = sorted(weights)[0]
    del weights[key]
    save_file(weights, shards[1])
    with pytest.raises(InputError, match=f"config of the unet describes.*missing from.*{key}"):
        opened(copy)


@pytest.mark.parametrize("part", ["unet/config.json", "scheduler/scheduler_config.json", "text_encoder/config.json"])
def test_missing_or_corrupted_parts_say_which(copy: Path, part: str):
    (copy / part).write_text("{")
    with pytest.raises(InputError, match="expected a loadable StableDiffusionPipeline"):
        opened(copy)
    (copy / part).unlink()
    with pytest.raises(InputError, match="expected a loadable StableDiffusionPipeline"):
        opened(copy)


@pytest.mark.parametrize("part", [UNET, TEXT])
@pytest.mark.parametrize("damage", ["cut", "missing", "shape"])
def test_damaged_weights(copy: Path, part: str, damage: str):
    file = copy / part
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:1000])
    elif damage == "missing":
        file.unlink()
    else:
        save_file({name: torch.zeros(3) for name in load_file(file)}, file)
    with pytest.raises(InputError, match=f"StableDiffusionPipeline at .*, with its {part.split('/')[0]}, got"):
        opened(copy)


# other autoencoders, variants, the hub


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_another_autoencoder(folders: dict[str, Path], tmp_path: Path, name: str):
    other = tiny_pipeline(tmp_path / "other", seed=1)
    reference = opened(other).vae.state_dict()
    for path in (other, other / "vae"):
        model = opened(folders[name], torch.bfloat16, vae=str(path))
        torch.testing.assert_close(model.vae.state_dict(), reference, **EXACT)
    with pytest.raises(InputError, match=r"AutoencoderKL at --teacher\.vae"):
        opened(folders[name], vae=str(tmp_path))
    file = other / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != "quant_conv.bias"}, file)
    with pytest.raises(InputError, match=r"config of the vae describes.*quant_conv\.bias"):
        opened(folders[name], vae=str(other))


def test_pixels_have_no_autoencoder(folders: dict[str, Path]):
    with pytest.raises(InputError, match=r"works on pixels; drop --teacher\.vae"):
        opened(folders["pixels"], vae=str(folders["sd"]))


def test_a_variant_is_taken_component_by_component(copy: Path, folders: dict[str, Path]):
    weights = load_file(copy / UNET)
    save_file({k: v + 1.0 for k, v in weights.items()}, copy / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    model = opened(copy, variant="fp16")
    expected = {k: v + 1.0 for k, v in weights.items()}
    torch.testing.assert_close(dict(model.denoiser.module.state_dict()), expected, **EXACT)
    torch.testing.assert_close(model.vae.state_dict(), opened(folders["sd"]).vae.state_dict(), **EXACT)
    with pytest.raises(InputError, match=r"variant 'ema' in .*, got none; drop --teacher\.variant"):
        opened(copy, variant="ema")


def test_a_hub_id_is_opened_from_the_cache(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("stepdistill.families.loading.hub_is_reachable", lambda: False)
    for name in ("sd", "pixels"):
        repository = tmp_path / f"models--org--{name}"
        shutil.copytree(folders[name], repository / "snapshots" / "abc")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("abc")
        model = opened(f"org/{name}")
        assert model.name == f"org/{name}"
        same_weights(model, opened(folders[name]))


def test_an_unreachable_hub_id_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("stepdistill.families.loading.hub_is_reachable", lambda: False)
    with pytest.raises(InputError, match=r"'no-such/model'.*neither a folder here nor .*give --teacher\.path"):
        opened("no-such/model")


def test_a_network_beside_the_index_as_the_first_ddpm_checkpoints_have_it(folders: dict[str, Path], tmp_path: Path):
    for file in folders["pixels"].rglob("*.*"):
        shutil.copy(file, tmp_path / file.name)
    same_weights(opened(tmp_path), opened(folders["pixels"]))


# what there is


def test_missing_folder_and_folder_without_a_pipeline(tmp_path: Path):
    with pytest.raises(InputError, match=r"got nothing there; give --teacher\.path"):
        opened(tmp_path / "none")
    with pytest.raises(InputError, match=r"without model_index\.json"):
        opened(tmp_path)
    (tmp_path / "stepdistill.json").write_text("{}")
    with pytest.raises(InputError, match=r"got a student of stepdistill.*save_pretrained.*--teacher\.path that folder"):
        opened(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '"a"', "\xff"])
def test_corrupted_model_index(copy: Path, text: str):
    (copy / "model_index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"model_index\.json"):
        opened(copy)


def test_an_unknown_pipeline_class_is_told_what_is_supported(copy: Path):
    edit(copy / "model_index.json", _class_name="SanaPipeline")
    with pytest.raises(InputError, match="expected a pipeline of class .*, got SanaPipeline") as caught:
        opened(copy)
    assert all(name in str(caught.value) for name in TABLE)


def test_the_table_names_pipelines_of_diffusers():
    import diffusers

    assert all(issubclass(getattr(diffusers, name), diffusers.DiffusionPipeline) for name in TABLE)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("sd", "StableDiffusionImg2ImgPipeline"), ("sd", "StableDiffusionInpaintPipeline"),
        ("sdxl", "StableDiffusionXLImg2ImgPipeline"), ("sdxl", "StableDiffusionXLInpaintPipeline"),
        ("pixels", "DDIMPipeline"),
    ],
)  # fmt: skip
def test_pipelines_of_the_same_parts_are_the_same_family(
    copies: dict[str, Path], folders: dict[str, Path], name: str, other: str
):
    edit(copies[name] / "model_index.json", _class_name=other)
    model, reference = opened(copies[name]), opened(folders[name])
    assert type(model) is type(reference)
    same_weights(model, reference)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_pickles_are_refused(tmp_path: Path, suffix: str):
    (tmp_path / f"a{suffix}").write_bytes(b"")
    with pytest.raises(InputError, match="a pickle that could run code"):
        opened(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("scheduler", ["EDMEulerScheduler", "CMStochasticIterativeScheduler"])
def test_schedulers_without_a_table_are_not_read_as_ddpm(scheduler: str):
    import diffusers

    with pytest.raises(InputError, match=f"got {scheduler}; this kind of teacher is not supported"):
        from_scheduler({**getattr(diffusers, scheduler)().config, "_class_name": scheduler})


# a single file


@pytest.mark.parametrize(("name", "family"), [("sd", StableDiffusion), ("sdxl", StableDiffusionXL)])
def test_a_single_file_is_the_same_model(folders: dict[str, Path], tmp_path: Path, name: str, family: type):
    file = single_file(folders[name], tmp_path / "model.safetensors")
    model, reference = opened(file, config=str(folders[name])), opened(folders[name])
    assert type(model) is family
    same_weights(model, reference)
    assert model.fingerprint() == reference.fingerprint()
    assert model.resolution == RESOLUTION
    half = opened(file, torch.float16, config=str(folders[name]))
    assert [next(m.parameters()).dtype for m in half.modules] == [
        torch.float32 if m is half.vae else torch.float16 for m in half.modules
    ]
    torch.testing.assert_close(half.vae.state_dict(), reference.vae.state_dict(), **EXACT)


def test_what_a_single_file_is_stands_in_its_header(folders: dict[str, Path], tmp_path: Path):
    """The weights themselves are cut off: the family is chosen, and the file found damaged, without reading them."""
    file = single_file(folders["sdxl"], tmp_path / "model.safetensors")
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    file.write_bytes(data[: 8 + length])
    with pytest.raises(InputError, match="expected a safetensors file at .*got"):
        opened(file, config=str(folders["sdxl"]))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["conditioner.embedders.0.model.ln_final.weight"], "got the SDXL refiner"),
        (["model.diffusion_model.x_embedder.weight"], "with its text encoder .*x_embedder"),
        (["lora_unet_down.weight"], "expected Stable Diffusion or SDXL"),
    ],
)
def test_single_files_of_other_models(tmp_path: Path, names: list[str], message: str):
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=message):
        opened(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("model.diffusion_model.out.2.bias", "lacks some"),
        ("first_stage_model.decoder.conv_out.bias", "lacks some"),
        (
            "cond_stage_model.transformer.text_model.final_layer_norm.bias",
            r"text_encoder .*first final_layer_norm\.bias",
        ),
    ],
)
def test_a_missing_weight_in_a_single_file(folders: dict[str, Path], tmp_path: Path, key: str, message: str):
    file = single_file(folders["sd"], tmp_path / "model.safetensors")
    weights = load_file(file)
    del weights[key]
    save_file(weights, file)
    with pytest.raises(InputError, match=message):
        opened(file, config=str(folders["sd"]))


def test_a_single_file_without_configs_says_what_to_give(folders: dict[str, Path], tmp_path: Path):
    file = single_file(folders["sd"], tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"give --teacher\.config a folder"):
        opened(file)
