"""The pixel recipe as users run it: an export that a stock pipeline samples as our solver does, resumed, refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_runs import ROOT, load_recipe, run_in_process
from safetensors.torch import load_file
from tiny import tiny_images, tiny_pipeline
from tiny_flux import tiny_flux
from tiny_pixels import tiny_pixels
from tiny_sd3 import tiny_sd3
from tiny_sdxl import tiny_sdxl
from vision import build, save

from stepdistill import families
from stepdistill.config import parse
from stepdistill.diffusion.solver import multistep_consistency
from stepdistill.errors import InputError
from stepdistill.export.rerun import export_run

TRAIN = [
    "--train.train_batch_size", "2", "--train.max_train_steps", "3", "--train.learning_rate", "1e-3", "--data.resolution", "32",
    "--train.checkpointing_steps", "1", "--method.head_width", "8", "--method.guard_every", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def recipe() -> Any:
    return load_recipe("add")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_pipeline(folder / "sd", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    tiny_pipeline(folder / "eps")
    tiny_sdxl(folder / "sdxl", prediction_type="v_prediction")
    tiny_pixels(folder / "pixels", prediction_type="v_prediction")
    tiny_pixels(folder / "grey", prediction_type="v_prediction", channels=1)
    tiny_sd3(folder / "sd3")
    tiny_flux(folder / "flux")
    for kind in ("dinov2", "vit", "clip"):
        save(build(kind), folder / kind)
    tiny_images(folder / "images")
    return folder


def words(inputs: Path, folder: Path, family: str = "sd", *more: object, eye: str = "dinov2") -> list[object]:
    none = ["--data.caption_column", "none"] if family in ("pixels", "grey") else []
    return [
        "--teacher.path", inputs / family, "--eye.path", inputs / eye, "--data.path", inputs / "images", "--output_dir", folder,
        *TRAIN, *none, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module", params=["full", "lora"])
def finished(
    recipe: Any, inputs: Path, tmp_path_factory: pytest.TempPathFactory, request: Any
) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("run") / "out"
    more = ["--train.validation_prompts", "a red circle", "--train.ema_decay", "0.5"]
    more += ["--train.gradient_checkpointing", "true", "--method.crop", "3"]
    arguments = words(inputs, folder, "sd", "--student.kind", request.param, "--student.rank", "4", *more)
    run_in_process(recipe, arguments)
    return folder, arguments


def test_what_a_run_leaves_behind(finished: Any) -> None:
    folder, _ = finished
    facts = json.loads((folder / "stepdistill.json").read_text())
    assert (facts["method"], facts["steps"], facts["guidance_scale"]) == ("add", [1, 2, 4], 1.0)
    assert facts["timesteps"] == {"1": [999], "2": [999, 499], "4": [999, 749, 499, 249]}
    assert facts["scheduler"] == "LCMScheduler" and facts["trained"]["times"] == [1.0, 0.75, 0.5, 0.25]
    assert facts["trained"]["augmentations"] == ["colour", "translation", "cutout"] and facts["trained"]["crop"] == 3
    card = (folder / "README.md").read_text()
    assert "adversarially distilled" in card and "ADD" in card and "pictures in 1 to 4 steps" in card
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] and [("diversity" in row) for row in rows] == [True, False, True]
    assert all({"logit_real", "logit_fake", "accuracy", "r1", "distillation"} <= row.keys() for row in rows)
    assert [p.name for p in (folder / "samples").iterdir()] == ["000003.png"]
    (last,) = (folder / "checkpoints").glob("*3/state.json")
    assert json.loads(last.read_text())["teacher"], "by which another one is refused when the run goes on"


@torch.no_grad()
def test_a_stock_pipeline_samples_the_export_as_our_own_solver_does(finished: Any, inputs: Path) -> None:
    from diffusers import LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    folder, _ = finished
    if (folder / "unet").is_dir():
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
        pipe = StableDiffusionPipeline.from_pretrained(inputs / "sd", unet=unet)
    else:
        pipe = StableDiffusionPipeline.from_pretrained(inputs / "sd")
        pipe.load_lora_weights(str(folder))
    pipe.scheduler = LCMScheduler.from_pretrained(folder, subfolder="scheduler")
    pipe.set_progress_bar_config(disable=True)
    model = families.load(families.TeacherConfig(str(inputs / "sd")))
    denoiser, cond = model.denoiser, model.encode_prompts(["a cat"])
    denoiser.net = pipe.unet
    for steps in (1, 2, 4):
        noise = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(3))
        theirs = pipe(
            "a cat", num_inference_steps=steps, guidance_scale=1.0, latents=noise, output_type="latent",
            generator=torch.Generator().manual_seed(4),
        ).images  # fmt: skip
        fresh = torch.Generator().manual_seed(4)
        ours = multistep_consistency(
            lambda x, t: denoiser(x, t, cond).x0, denoiser.schedule, noise, denoiser.schedule.grid(steps)[:-1],
            lambda _, fresh=fresh: torch.randn((1, 4, 4, 4), generator=fresh),
        )  # fmt: skip
        torch.testing.assert_close(theirs, ours.to(theirs), rtol=1e-4, atol=1e-5)


def test_a_finished_run_resumed_is_the_same_run_and_is_exported_again(
    recipe: Any, finished: Any, tmp_path: Path
) -> None:
    folder, arguments = finished
    kept = {path: load_file(path) for path in folder.rglob("*.safetensors") if "checkpoints" not in path.parts}
    metrics = (folder / "metrics.jsonl").read_text()
    run_in_process(recipe, [*arguments, "--train.resume_from_checkpoint", "latest"])
    for path, tensors in kept.items():
        after = load_file(path)
        assert tensors.keys() == after.keys() and all(torch.equal(after[name], t) for name, t in tensors.items())
    assert (folder / "metrics.jsonl").read_text() == metrics
    export_run(folder, tmp_path)
    (ours,) = tmp_path.rglob("*.safetensors")
    (theirs,) = (load_file(p) for p in folder.rglob("*.safetensors") if "checkpoints" not in p.parts)
    for name, tensor in load_file(ours).items():
        assert torch.equal(tensor, theirs[name]), name
    for file in ("stepdistill.json", "scheduler/scheduler_config.json"):
        assert json.loads((tmp_path / file).read_text()) == json.loads((folder / file).read_text())


@pytest.mark.parametrize(
    ("family", "kind", "eye"),
    [
        ("sdxl", "full", "vit"),
        ("sdxl", "lora", "clip"),
        ("pixels", "full", "vit"),
        ("grey", "full", "clip"),
        ("sd3", "lora", "dinov2"),
        ("sd3", "full", "vit"),
        ("flux", "lora", "clip"),
        ("flux", "full", "dinov2"),
    ],
)
def test_every_family_with_every_kind_of_eye(
    recipe: Any, inputs: Path, tmp_path: Path, family: str, kind: str, eye: str
) -> None:
    more = ["--method.image_condition", "true", "--method.distance", "pixels"] if eye == "clip" else []
    more += ["--method.taps", "embeddings,layernorm"] if eye == "dinov2" else []
    run_in_process(recipe, words(inputs, tmp_path / "run", family, "--student.kind", kind, *more, eye=eye))
    facts = json.loads((tmp_path / "run" / "stepdistill.json").read_text())
    wanted = "FlowMatchLCMScheduler" if family in ("sd3", "flux") else "LCMScheduler"
    assert facts["steps"] == [1, 2, 4] and facts["scheduler"] == wanted


BAD = {
    "eps at pure noise": (["--teacher.path", "{inputs}/eps"], "Two ways out"),
    "no eye": (["--eye.path", "{inputs}/images"], "--eye.path"),
    "a tap that is not there": (["--method.taps", "encoder.layer.0,nowhere"], "--method.taps"),
    "a size that is no multiple of the patch": (["--eye.size", "30"], "--eye.size"),
    "a crop that is too large": (["--method.crop", "5"], "--method.crop"),
    "an augmentation that is not there": (["--method.augmentations", "flip"], "--method.augmentations"),
    "times that LCMScheduler leaves": (["--method.times", "1,0.8,0.5,0.25"], "--method.times"),
    "fsdp": (["--train.parallel", "fsdp", "--student.kind", "full"], "--train.parallel"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_fix_and_trains_nothing(recipe: Any, inputs: Path, tmp_path: Path, case: str) -> None:
    arguments, named = BAD[case]
    given = [a.format(inputs=inputs) for a in arguments]
    with pytest.raises(InputError, match=named):
        run_in_process(recipe, words(inputs, tmp_path / "run", "sd", *given))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_demos_config_parses() -> None:
    recipe = load_recipe("add")
    parsed = parse(recipe.Recipe, [], defaults=ROOT / "recipes" / "configs" / "add_demo.yaml")
    assert parsed.recipe.eval.steps.ints() == (4, 2, 1), "LCMScheduler makes no more steps than there are times"
    assert parsed.recipe.eye.path == "demo" and parse(recipe.Recipe, []).recipe.eye.path == "facebook/dinov2-small"
