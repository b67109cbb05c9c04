"""The same recipe on every family and with every kind of student: what it leaves opens in a stock pipeline and samples."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recipe_runs import load_recipe, run_in_process
from tiny import tiny_images, tiny_pipeline
from tiny_pixels import tiny_pixels
from tiny_sdxl import tiny_sdxl

TRAIN = [
    "--train.train_batch_size", "2", "--train.max_train_steps", "3", "--train.learning_rate", "1e-2",
    "--student.rank", "4", "--train.ema_decay", "0.5", "--data.max_bad_fraction", "0",
]  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    tiny_pipeline(folder / "sd")
    tiny_sdxl(folder / "sdxl")
    tiny_pixels(folder / "pixels")
    tiny_images(folder / "images")
    (folder / "prompts.txt").write_text("a red circle\na blue star\na green ring\n")
    return folder


def opened(family: str, kind: str, base: Path, run: Path) -> Any:
    """A stock pipeline with the run's export in it, as the card says."""
    from diffusers import (
        DDPMPipeline,
        LCMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )

    if family == "pixels":
        return DDPMPipeline.from_pretrained(run)
    cls = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    if kind == "full":
        pipe = cls.from_pretrained(base, unet=UNet2DConditionModel.from_pretrained(run, subfolder="unet"))
    else:
        pipe = cls.from_pretrained(base)
        pipe.load_lora_weights(str(run))
    pipe.scheduler = LCMScheduler.from_pretrained(run, subfolder="scheduler")
    return pipe


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("family", ["sd", "sdxl", "pixels"])
@pytest.mark.parametrize("data", ["images", "prompts.txt"])
def test_from_data_to_a_stock_pipeline(inputs: Path, tmp_path: Path, family: str, kind: str, data: str) -> None:
    extra = ["--data.caption_column", "none"] if family == "pixels" and data == "images" else []
    if data == "prompts.txt":
        extra += ["--data.num_inference_steps", "5", "--data.guidance_scale", "1" if family == "pixels" else "4"]
    if family != "pixels":
        extra += ["--export.formats", "diffusers,kohya" if kind == "lora" else "diffusers"]
    arguments = [
        "--teacher.path",
        inputs / family,
        "--student.kind",
        kind,
        "--data.path",
        inputs / data,
        *TRAIN,
        *extra,
    ]
    run_in_process(load_recipe(), [*arguments, "--output_dir", tmp_path])
    facts = json.loads((tmp_path / "stepdistill.json").read_text())
    assert facts["student"]["kind"] == kind
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] and all(np.isfinite(row["loss"]) for row in rows)
    pipe = opened(family, kind, inputs / family, tmp_path)
    pipe.set_progress_bar_config(disable=True)
    prompt = {} if family == "pixels" else {"prompt": "a red circle", "guidance_scale": facts["guidance_scale"]}
    images = pipe(**prompt, num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images
    assert images.shape[0] == 1 and np.isfinite(images).all() and images.std() > 0
