"""The recipe as users run it: bad input ends in one paragraph, a tiny Stable Diffusion folder in an adapter that loads."""

import json
import runpy
import shutil
import subprocess
import sys
import time

import pytest
import torch
from recipe_runs import ROOT, load_recipe, run_in_process
from safetensors.torch import load_file, save_file
from tiny import tiny_images, tiny_pipeline

from stepdistill.config import parse
from stepdistill.errors import InputError

RECIPE = ROOT / "recipes" / "lcm_lora.py"


@pytest.fixture(scope="module")
def recipe():
    return load_recipe()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny pipeline, a folder of 12 pictures, and broken variants of both."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_pipeline(folder / "sd")
    tiny_pipeline(folder / "ztsnr")  # the pipeline itself would refuse to be made like this
    scheduler = folder / "ztsnr" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "rescale_betas_zero_snr": True}))
    tiny_images(folder / "images")
    tiny_images(folder / "no_captions")
    for extra in [*(folder / "no_captions").glob("*.jsonl"), *(folder / "no_captions").glob("*.txt")]:
        extra.unlink()
    (folder / "unreadable").mkdir()
    for i in range(3):
        (folder / "unreadable" / f"{i}.png").write_bytes(b"not a picture")
        (folder / "unreadable" / f"{i}.txt").write_text("a caption")
    (folder / "empty").mkdir()
    (folder / "blank.txt").write_text("\n  \n")
    (folder / "broken.tar").write_bytes(b"no archive")
    (folder / "broken.parquet").write_bytes(b"no table")
    (folder / "model.ckpt").write_bytes(b"a pickle")
    shutil.copytree(folder / "sd", folder / "holes")
    weights = folder / "holes" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["conv_out.weight"]  # Diffusers would fill it with random numbers
    save_file(tensors, weights)
    return folder


BAD = {
    "unknown key": (["--train.learning_rat", "1"], "learning_rat"),
    "wrong type": (["--train.max_train_steps", "many"], "max_train_steps"),
    "negative steps": (["--train.max_train_steps", "-1"], "--train.max_train_steps"),
    "rank 0": (["--student.rank", "0"], "--student.rank"),
    "unknown student": (["--student.kind", "tiny"], "student.kind"),
    "w range": (["--method.w_min", "9", "--method.w_max", "3"], "--method.w_min"),
    "missing teacher": (["--teacher.path", "{inputs}/nothing/here"], "--teacher.path"),
    "no pipeline": (["--teacher.path", "{inputs}/empty"], "model_index.json"),
    "eps with zero terminal SNR": (["--teacher.path", "{inputs}/ztsnr"], "rescale_betas_zero_snr"),
    "missing images": (["--data.path", "{inputs}/nothing"], "nothing"),
    "empty images": (["--data.path", "{inputs}/empty"], "empty"),
    "no captions": (["--data.path", "{inputs}/no_captions"], "metadata.jsonl"),
    "unreadable images": (["--data.path", "{inputs}/unreadable"], "0.png"),
    "resolution": (["--data.resolution", "30"], "--data.resolution"),
    "targets that fit nothing": (["--student.targets", "nowhere"], "--student.targets"),
    "grid that does not divide": (["--method.num_ddim_timesteps", "30"], "num_ddim_timesteps"),
    "precision the device lacks": (["--train.mixed_precision", "fp16"], "mixed_precision"),
    "no learning rate": (["--train.learning_rate", "0"], "--train.learning_rate"),
    "average that forgets": (["--train.ema_decay", "1"], "--train.ema_decay"),
    "target that never moves": (["--method.target_decay", "1"], "--method.target_decay"),
    "sampler that cannot": (["--method.sigma_data", "1"], "--method.sigma_data"),
    "alpha 0": (["--student.alpha", "0"], "--student.alpha"),
    "unknown tracker": (["--train.report_to", "paper"], "report_to"),
    "unknown choice": (["--train.on_nonfinite", "pray"], "on_nonfinite"),
    "missing prompts": (["--train.validation_prompts", "nowhere.txt"], "nowhere.txt"),
    "missing checkpoint": (["--train.resume_from_checkpoint", "7"], "7"),
    "LoRA in shards": (["--train.parallel", "fsdp"], "--train.parallel"),
    "unknown format": (["--export.formats", "onnx"], "--export.formats"),
    "hub out of reach": (["--export.push_to_hub", "true"], "hub"),
    "a pickle": (["--teacher.path", "{inputs}/model.ckpt"], "safetensors"),
    "weights with a hole": (["--teacher.path", "{inputs}/holes"], "conv_out.weight"),
    "blank prompts": (["--data.path", "{inputs}/blank.txt"], "blank.txt"),
    "no archive": (["--data.path", "{inputs}/broken.tar"], "broken.tar"),
    "no table": (["--data.path", "{inputs}/broken.parquet"], "broken.parquet"),
    "unknown data set": (["--data.path", "no-such/data"], "no-such/data"),
    "variants that are the same": (["--data.variants", "3"], "--data.variants"),
    "bad fraction": (["--data.max_bad_fraction", "2"], "--data.max_bad_fraction"),
    "gradients of nothing": (["--train.max_grad_norm", "-1"], "--train.max_grad_norm"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_fix_and_writes_nothing(recipe, inputs, tmp_path, case, monkeypatch):
    arguments, named = BAD[case]
    if case == "precision the device lacks" and torch.cuda.is_available():
        pytest.skip("a GPU has fp16")
    defaults = ["--teacher.path", inputs / "sd", "--data.path", inputs / "images", "--data.resolution", "32"]
    given = [a.format(inputs=inputs) for a in arguments]
    with pytest.raises(InputError, match=named):
        run_in_process(recipe, [*defaults, "--output_dir", tmp_path / "run", *given])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments",
    [["--train.learning_rat", "1"], ["--teacher.path", "/nothing/at/all"], ["--data.path", "{inputs}/no_captions"]],
    ids=["unknown key", "missing teacher", "no captions"],
)
def test_as_from_the_shell_one_paragraph_and_no_traceback(inputs, tmp_path, arguments, monkeypatch, capsys):
    """In this process, which has imported what takes seconds; what leaves it is the interpreter's exit code."""
    given = [a.format(inputs=inputs) for a in arguments]
    defaults = ["--teacher.path", str(inputs / "sd"), "--output_dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *defaults, *given])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(RECIPE), run_name="__main__")
    assert stop.value.code == 2
    one_paragraph(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def one_paragraph(told):
    assert "Traceback" not in told
    assert told.splitlines()[-1] != ""
    assert "error: " in told


def test_from_the_shell_one_paragraph_and_no_traceback(tmp_path):
    command = [sys.executable, RECIPE, "--data.resolution", "32", "--train.learning_rat", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    one_paragraph(done.stderr)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_a_run_is_not_written_over(recipe, inputs, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(InputError, match=r"resume_from_checkpoint latest"):
        run_in_process(recipe, ["--teacher.path", inputs / "sd", "--output_dir", tmp_path])
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]


@pytest.fixture(scope="module")
def finished(recipe, inputs, tmp_path_factory):
    """A run of four steps on the tiny pipeline, and its arguments."""
    folder = tmp_path_factory.mktemp("run") / "out"
    arguments = [
        "--teacher.path", inputs / "sd", "--data.path", inputs / "images", "--data.resolution", "32", "--output_dir", folder,
        "--student.rank", "4", "--student.alpha", "8", "--train.train_batch_size", "2", "--train.max_train_steps", "4",
        "--train.learning_rate", "1e-2", "--train.checkpointing_steps", "2", "--train.validation_steps", "2",
        "--train.validation_prompts", "a red circle|a blue star",
    ]  # fmt: skip
    began = time.perf_counter()
    run_in_process(recipe, arguments)
    return folder, arguments, time.perf_counter() - began


def test_the_run_folder_is_complete(finished):
    folder, _, _ = finished
    for name in (
        "pytorch_lora_weights.safetensors", "scheduler/scheduler_config.json", "stepdistill.json", "README.md", "config.yaml",
        "metrics.jsonl", "checkpoints/4/manifest.json", "samples/000002.png", "samples/000004.png",
    ):  # fmt: skip
        assert (folder / name).is_file(), name
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row["loss"] == pytest.approx(row["consistency"])
        assert {"learning_rate", "seconds", "grad_norm"} <= row.keys()


def test_the_config_is_taken_back_verbatim(recipe, finished, tmp_path):
    folder, arguments, _ = finished
    again = parse(recipe.Recipe, ["--config", str(folder / "config.yaml")])
    assert again.yaml == (folder / "config.yaml").read_text()
    assert again.recipe == parse(recipe.Recipe, [str(a) for a in arguments]).recipe


def test_a_finished_run_resumed_is_the_same_run(recipe, finished):
    folder, arguments, _ = finished
    before = load_file(folder / "pytorch_lora_weights.safetensors")
    run_in_process(recipe, [*arguments, "--train.resume_from_checkpoint", "latest"])
    after = load_file(folder / "pytorch_lora_weights.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_fresh_pipeline_loads_it_and_it_changes_the_picture(finished, inputs):
    from diffusers import LCMScheduler, StableDiffusionPipeline

    def picture(adapter):
        pipe = StableDiffusionPipeline.from_pretrained(inputs / "sd", safety_checker=None)
        pipe.set_progress_bar_config(disable=True)
        if adapter:
            pipe.load_lora_weights(str(finished[0]))
        pipe.scheduler = LCMScheduler.from_pretrained(str(finished[0]), subfolder="scheduler")
        noise = torch.Generator().manual_seed(0)
        return torch.from_numpy(
            pipe("a red circle", num_inference_steps=4, guidance_scale=1.0, generator=noise, output_type="np").images
        )

    assert (picture(True) - picture(False)).abs().max() > 1e-3
