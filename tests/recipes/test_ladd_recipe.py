"""The adversarial recipe as users run it: an export that a stock pipeline samples as our solver does, resumed, refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_runs import ROOT, load_recipe, run_in_process
from safetensors.torch import load_file
from tiny import tiny_images, tiny_pipeline
from tiny_pixels import tiny_pixels
from tiny_sdxl import tiny_sdxl

from stepdistill import families
from stepdistill.config import parse
from stepdistill.diffusion.solver import multistep_consistency
from stepdistill.errors import InputError
from stepdistill.export.rerun import export_run

TRAIN = [
    "--train.train_batch_size", "2", "--train.max_train_steps", "3", "--train.learning_rate", "1e-3", "--data.resolution", "32",
    "--train.checkpointing_steps", "1", "--method.head_width", "8", "--method.warmup_steps", "1", "--method.guard_every", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def recipe() -> Any:
    return load_recipe("ladd")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_pipeline(folder / "sd", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    tiny_pipeline(folder / "eps")
    tiny_sdxl(folder / "sdxl", prediction_type="v_prediction")
    tiny_pixels(folder / "pixels", prediction_type="v_prediction")
    tiny_images(folder / "images")
    (folder / "prompts.txt").write_text("a cat\na dog\na red circle\n")
    return folder


def words(inputs: Path, folder: Path, family: str = "sd", *more: object) -> list[object]:
    none = ["--data.caption_column", "none"] if family == "pixels" else []
    return [
        "--teacher.path", inputs / family, "--data.path", inputs / "images", "--output_dir", folder, *TRAIN, *none, *more
    ]  # fmt: skip


@pytest.fixture(scope="module", params=["full", "lora"])
def finished(
    recipe: Any, inputs: Path, tmp_path_factory: pytest.TempPathFactory, request: Any
) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("run") / "out"
    more = [
        "--train.validation_prompts",
        "a red circle",
        "--train.ema_decay",
        "0.5",
        "--train.gradient_checkpointing",
        "true",
    ]
    arguments = words(inputs, folder, "sd", "--student.kind", request.param, "--student.rank", "4", *more)
    run_in_process(recipe, arguments)
    return folder, arguments


def test_what_a_run_leaves_behind(finished: Any) -> None:
    folder, _ = finished
    facts = json.loads((folder / "stepdistill.json").read_text())
    assert (facts["method"], facts["steps"], facts["guidance_scale"]) == ("ladd", [1, 2, 4], 1.0)
    assert facts["timesteps"] == {"1": [999], "2": [999, 499], "4": [999, 749, 499, 249]}
    assert facts["scheduler"] == "LCMScheduler" and facts["trained"]["times"] == [1.0, 0.75, 0.5, 0.25]
    card = (folder / "README.md").read_text()
    assert "adversarially distilled" in card and "pictures in 1 to 4 steps" in card
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] and [("diversity" in row) for row in rows] == [True, False, True]
    assert all({"logit_real", "logit_fake", "accuracy", "r1"} <= row.keys() for row in rows)
    assert [p.name for p in (folder / "samples").iterdir()] == ["000003.png"]


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


def test_a_finished_run_resumed_is_the_same_run(recipe: Any, finished: Any) -> None:
    folder, arguments = finished
    kept = {path: load_file(path) for path in folder.rglob("*.safetensors") if "checkpoints" not in path.parts}
    metrics = (folder / "metrics.jsonl").read_text()
    run_in_process(recipe, [*arguments, "--train.resume_from_checkpoint", "latest"])
    for path, tensors in kept.items():
        after = load_file(path)
        assert tensors.keys() == after.keys() and all(torch.equal(after[name], t) for name, t in tensors.items())
    assert (folder / "metrics.jsonl").read_text() == metrics


def test_no_other_teacher_may_take_its_place(recipe: Any, finished: Any, tmp_path: Path) -> None:
    """Its features are what the heads know."""
    folder, arguments = finished
    run = shutil.copytree(folder, tmp_path / "run")
    other = tiny_pipeline(tmp_path / "sd", prediction_type="v_prediction", rescale_betas_zero_snr=True, seed=1)
    again = [*arguments, "--output_dir", run, "--train.resume_from_checkpoint", "latest", "--teacher.path", other]
    with pytest.raises(InputError, match=r"expected the teacher of checkpoint .*/3, got other.*--teacher\.path"):
        run_in_process(recipe, again)


def test_the_run_is_exported_again(finished: Any, tmp_path: Path) -> None:
    folder, _ = finished
    export_run(folder, tmp_path)
    (ours,) = tmp_path.rglob("*.safetensors")
    (theirs,) = (p for p in folder.rglob("*.safetensors") if "checkpoints" not in p.parts)
    again = load_file(theirs)
    for name, tensor in load_file(ours).items():
        assert torch.equal(tensor, again[name]), name
    assert (tmp_path / "scheduler" / "scheduler_config.json").read_text() == (
        folder / "scheduler" / "scheduler_config.json"
    ).read_text()


@pytest.mark.parametrize("family", ["sdxl", "pixels"])
def test_other_families(recipe: Any, inputs: Path, tmp_path: Path, family: str) -> None:
    run_in_process(recipe, words(inputs, tmp_path / "run", family, "--student.kind", "full"))
    facts = json.loads((tmp_path / "run" / "stepdistill.json").read_text())
    assert facts["steps"] == [1, 2, 4] and facts["scheduler"] == "LCMScheduler"


def test_latents_of_the_teacher_and_a_lower_first_time_for_eps(recipe: Any, inputs: Path, tmp_path: Path) -> None:
    """From prompts alone, with constant guidance; and one of the ways out for eps models."""
    more = ["--data.path", inputs / "prompts.txt", "--data.guidance_scale", "3", "--data.num_inference_steps", "4"]
    more += [
        "--method.times",
        "0.4,0.3,0.2,0.1",
        "--method.taps",
        "mid_block,up_blocks.1.attentions.0.transformer_blocks.0",
    ]
    run_in_process(recipe, words(inputs, tmp_path / "run", "eps", *more))
    facts = json.loads((tmp_path / "run" / "stepdistill.json").read_text())
    assert facts["timesteps"]["4"] == [399, 299, 199, 99]
    export_run(tmp_path / "run", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "stepdistill.json").read_text())["trained"] == facts["trained"]


BAD = {
    "eps at pure noise": (["--teacher.path", "{inputs}/eps"], "Two ways out"),
    "a tap that is not there": (["--method.taps", "mid_block,nowhere"], "--method.taps"),
    "times that LCMScheduler leaves": (["--method.times", "1,0.8,0.5,0.25"], "--method.times"),
    "times between levels": (["--method.times", "1,0.7503,0.5,0.25"], "--method.times"),
    "a first time that is never trained": (["--method.probabilities", "0,0,0.5,0.5"], "--method.probabilities"),
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
    recipe = load_recipe("ladd")
    parsed = parse(recipe.Recipe, [], defaults=ROOT / "recipes" / "configs" / "ladd_demo.yaml")
    assert parsed.recipe.eval.steps.ints() == (4, 2, 1), "LCMScheduler makes no more steps than there are times"
