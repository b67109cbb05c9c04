"""The ladder as users run it: a folder a rung that stock pipelines load, resumed where it stopped, refused with a reason."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_runs import load_recipe, run_in_process
from safetensors.torch import load_file
from tiny import tiny_images, tiny_pipeline
from tiny_pixels import tiny_pixels
from tiny_sdxl import tiny_sdxl

from stepdistill import families
from stepdistill.bench.options import check_student
from stepdistill.diffusion.solver import sample
from stepdistill.errors import InputError
from stepdistill.export.rerun import export_run

RUNGS = (4, 2, 1)
TRAIN = [
    "--method.teacher_steps", "8", "--method.rungs", "4,2,1", "--train.train_batch_size", "2", "--train.max_train_steps", "2",
    "--train.learning_rate", "1e-3", "--data.resolution", "32", "--train.checkpointing_steps", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def recipe() -> Any:
    return load_recipe("progressive")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_pipeline(folder / "sd", prediction_type="v_prediction")
    tiny_pipeline(folder / "eps")
    tiny_sdxl(folder / "sdxl", prediction_type="v_prediction")
    tiny_pixels(folder / "pixels", prediction_type="v_prediction")
    tiny_images(folder / "images")
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
    prompts = ["--train.validation_prompts", "a red circle", "--train.ema_decay", "0.5"]
    arguments = words(
        inputs, folder, "sd", "--student.kind", request.param, "--student.rank", "4", *prompts, "--guidance_steps", "2"
    )
    run_in_process(recipe, arguments)
    return folder, arguments


def opened(inputs: Path, rung: Path) -> Any:
    """A stock pipeline with the rung in it, as its card says."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    if (rung / "unet").is_dir():
        pipe = StableDiffusionPipeline.from_pretrained(
            inputs / "sd", unet=UNet2DConditionModel.from_pretrained(rung, subfolder="unet")
        )
    else:
        pipe = StableDiffusionPipeline.from_pretrained(inputs / "sd")
        pipe.load_lora_weights(str(rung))
    pipe.scheduler = DDIMScheduler.from_pretrained(rung, subfolder="scheduler")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_each_rung_is_a_student_of_its_own(finished: Any) -> None:
    folder, _ = finished
    assert sorted(p.name for p in (folder / "rungs").iterdir()) == ["1", "2", "4"]
    weights = []
    for steps in RUNGS:
        facts = json.loads((folder / "rungs" / str(steps) / "stepdistill.json").read_text())
        assert (facts["method"], facts["steps"], facts["guidance_scale"]) == ("progressive", [steps], 1.0)
        assert facts["timesteps"] == {str(steps): [round(1000 * (1 - i / steps)) - 1 for i in range(steps)]}
        weights.append(tuple(facts["weights"]["files"].values()))
        card = (folder / "rungs" / str(steps) / "README.md").read_text()
        assert f"pictures in {steps} step" in card and "guidance_scale of 7.5 of the base model" in card
    assert len(set(weights)) == 3
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("rung") for row in rows] == [None, None, 4, 4, 2, 2, 1, 1]
    assert sorted(p.name for p in (folder / "samples").iterdir()) == ["000004.png", "000006.png", "000008.png"]


@torch.no_grad()
def test_a_stock_pipeline_samples_a_rung_as_our_own_solver_does(finished: Any, inputs: Path) -> None:
    folder, _ = finished
    for steps in RUNGS:
        pipe = opened(inputs, folder / "rungs" / str(steps))
        noise = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(3))
        theirs = pipe(
            "a cat", num_inference_steps=steps, guidance_scale=1.0, latents=noise, output_type="latent"
        ).images
        model = families.load(families.TeacherConfig(str(inputs / "sd")))
        denoiser, cond = model.denoiser, model.encode_prompts(["a cat"])
        denoiser.net = pipe.unet
        grid = denoiser.schedule.grid(steps)
        ours = sample(lambda x, t, d=denoiser, c=cond: d(x, t, c), denoiser.schedule, noise, grid)
        torch.testing.assert_close(theirs, ours.to(theirs), rtol=1e-4, atol=1e-5)


def test_a_finished_run_resumed_is_the_same_run(recipe: Any, finished: Any) -> None:
    folder, arguments = finished
    before = {path: load_file(path) for path in (folder / "rungs").rglob("*.safetensors")}
    metrics = (folder / "metrics.jsonl").read_text()
    run_in_process(recipe, [*arguments, "--train.resume_from_checkpoint", "latest"])
    assert before.keys() == {*(folder / "rungs").rglob("*.safetensors")}
    for path, tensors in before.items():
        after = load_file(path)
        assert tensors.keys() == after.keys() and all(torch.equal(after[name], t) for name, t in tensors.items())
    assert (folder / "metrics.jsonl").read_text() == metrics


def test_the_latest_rung_is_exported_again(finished: Any, tmp_path: Path) -> None:
    folder, _ = finished
    export_run(folder, tmp_path)
    facts = json.loads((tmp_path / "stepdistill.json").read_text())
    assert (facts["method"], facts["steps"]) == ("progressive", [1])
    (ours,) = tmp_path.rglob("*.safetensors")
    (theirs,) = (folder / "rungs" / "1").rglob("*.safetensors")
    for name, tensor in load_file(ours).items():
        assert torch.equal(tensor, load_file(theirs)[name]), name


def test_the_teacher_may_move_and_no_other_may_take_its_place(
    recipe: Any, finished: Any, inputs: Path, tmp_path: Path
) -> None:
    folder, arguments = finished
    run, moved = tmp_path / "run", shutil.copytree(inputs / "sd", tmp_path / "of another name")
    shutil.copytree(folder, run)
    again = [*arguments, "--output_dir", run, "--train.resume_from_checkpoint", "latest", "--teacher.path"]
    other = tiny_pipeline(tmp_path / "sd", prediction_type="v_prediction", seed=1)
    before = contents(run)
    with pytest.raises(
        InputError, match=r"expected rungs of sd alone .*, got 4 of sd with other weights.*--output_dir"
    ):
        run_in_process(recipe, [*again, other])
    (run / "rungs").rename(tmp_path / "rungs")
    with pytest.raises(
        InputError, match=r"expected the teacher of checkpoint .*/guidance/2, got other.*--teacher\.path"
    ):
        run_in_process(recipe, [*again, other])
    (tmp_path / "rungs").rename(run / "rungs")
    assert contents(run) == before
    run_in_process(recipe, [*again, moved])
    bases = [json.loads((run / "rungs" / n / "stepdistill.json").read_text())["base_model"] for n in ("4", "1")]
    assert [base["path"] for base in bases] == [str(inputs / "sd"), str(moved)] and bases[0]["hash"] == bases[1]["hash"]
    check_student(str(run), ())  # for the harness they are still one ladder
    shutil.rmtree(run / "rungs" / "2")
    run_in_process(recipe, [*again, inputs / "sd"])
    assert sorted(path.name for path in (run / "rungs").iterdir()) == ["1", "4"]


def contents(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}


def test_rungs_of_another_ladder_are_refused_and_left_alone(
    recipe: Any, finished: Any, inputs: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished[0] / "rungs", tmp_path / "run" / "rungs")
    before = contents(tmp_path)
    for given, got in ((["--method.rungs", "4,2"], r"rungs \[4, 2, 1\]"), (["--method.w_min", "2"], "w_min 6.5")):
        with pytest.raises(InputError, match=f"got 4 of sd with .*{got}; choose another --output_dir"):
            run_in_process(recipe, words(inputs, tmp_path / "run", "sd", *given))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("family", ["sdxl", "pixels"])
def test_other_families(recipe: Any, inputs: Path, tmp_path: Path, family: str) -> None:
    run_in_process(recipe, words(inputs, tmp_path / "run", family, "--student.kind", "full", "--method.rungs", "4"))
    facts = json.loads((tmp_path / "run" / "rungs" / "4" / "stepdistill.json").read_text())
    assert facts["steps"] == [4] and facts["scheduler"] == "DDIMScheduler"


BAD = {
    "eps at few steps": (["--teacher.path", "{inputs}/eps"], "eps"),
    "rungs that don't divide": (["--method.rungs", "3,1"], "--method"),
    "a grid that the table lacks": (["--method.teacher_steps", "48", "--method.rungs", "12,6"], "1000"),
    "a range that nobody is told": (["--student.kind", "lora", "--method.w_min", "1"], "--method.w_min"),
    "two ways at once": (["--method.start_steps", "4"], "both"),
    "no rungs": (["--method.rungs", ""], "--method.rungs"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_fix_and_trains_nothing(recipe: Any, inputs: Path, tmp_path: Path, case: str) -> None:
    arguments, named = BAD[case]
    given = [a.format(inputs=inputs) for a in arguments]
    with pytest.raises(InputError, match=named):
        run_in_process(recipe, words(inputs, tmp_path / "run", "sd", *given))
    assert not (tmp_path / "run").exists()
