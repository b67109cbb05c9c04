"""Students on pixels: `DDPMPipeline.from_pretrained(folder)` alone samples them, on the grid they were trained on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from students import full_student_of, log_lines, look_at, opened, student_of
from tiny_pixels import tiny_pixels

from stepdistill.diffusion.solver import multistep_consistency
from stepdistill.errors import ExportError
from stepdistill.export.config import ExportConfig
from stepdistill.export.full import WholeNetwork
from stepdistill.export.lcm import lcm_sampling
from stepdistill.export.student import export_student
from stepdistill.export.verify import verify
from stepdistill.families import TeacherConfig
from stepdistill.families.pixels import PIXEL_TARGETS
from stepdistill.methods.lcm import LCM, LCMConfig

FILES = [
    "README.md", "model_index.json", "scheduler/scheduler_config.json", "stepdistill.json", "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
]  # fmt: skip


def exported(checkpoint: Path, folder: Path, kind: str = "full", **config: Any) -> Any:
    model = opened(checkpoint)
    student = full_student_of(model) if kind == "full" else student_of(model, 4, 8, PIXEL_TARGETS)
    export_student(
        folder, model, student, TeacherConfig(str(checkpoint)), lcm_sampling(LCMConfig(), model), ExportConfig(**config)
    )
    return model, student


def facts_of(folder: Path) -> dict[str, Any]:
    info: dict[str, Any] = json.loads((folder / "stepdistill.json").read_text())
    return info


def code_of(folder: Path) -> str:
    return (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("pipeline", ["DDPMPipeline", "DDIMPipeline"])
def test_the_folder_is_a_pipeline_that_samples_as_the_method_does(tmp_path: Path, pipeline: str, steps: int) -> None:
    from diffusers import DDPMPipeline, LCMScheduler

    checkpoint = tiny_pixels(tmp_path / "base", pipeline=pipeline, prediction_type="v_prediction")
    model, student = exported(checkpoint, tmp_path / "run")
    with log_lines() as lines:
        pipe = DDPMPipeline.from_pretrained(str(tmp_path / "run"))
    assert lines == []
    assert type(pipe.scheduler) is LCMScheduler
    assert "import DDPMPipeline" in code_of(tmp_path / "run")  # a DDIMPipeline would put a DDIMScheduler in its place
    found = pipe(2, torch.Generator().manual_seed(7), num_inference_steps=steps, output_type="pt").images

    lcm = LCM(LCMConfig(), student, model.denoiser)
    times = lcm.schedule.time(torch.tensor(facts_of(tmp_path / "run")["timesteps"][str(steps)]))
    draws = torch.Generator().manual_seed(7)
    noise = [torch.randn((2, 3, 16, 16), generator=draws) for _ in range(steps)]
    with torch.no_grad():
        expected = multistep_consistency(
            lambda x, t: lcm.consistency(x, t, student(x, t, {})), lcm.schedule, noise[0], times, lambda i: noise[i]
        )
    assert pipe.scheduler.timesteps.tolist() == lcm.schedule.index(times).round().long().tolist()
    torch.testing.assert_close(found, (expected / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-4)
    assert 0.02 < found.std() < 0.5  # not clamped to black and white


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_card_s_code_runs_and_says_what_the_weights_are(pixels: Path, tmp_path: Path, kind: str) -> None:
    model, student = exported(pixels, tmp_path, kind, verify="full")
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == FILES
    scope: dict[str, Any] = {}
    exec(code_of(tmp_path), scope)
    assert scope["image"].size == (16, 16)
    info, card = facts_of(tmp_path), (tmp_path / "README.md").read_text()
    assert (info["pipeline"], info["takes"], info["student"]["kind"]) == ("DDPMPipeline", "nothing", kind)
    assert info["weights"]["network"] == {"folder": "unet", "class": "UNet2DModel"}
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["pipeline_tag"] == "unconditional-image-generation"
    assert front["base_model_relation"] == "finetune" and "lora" not in front["tags"]
    assert ("merged into its weights (rank 4, alpha 8" in card) == (kind == "lora")
    assert "guidance" not in card
    expected = look_at(model, student)
    model.denoiser.net = scope["pipe"].unet
    torch.testing.assert_close(look_at(model, model.denoiser), expected, rtol=1e-4, atol=1e-4)


def test_a_merged_adapter_leaves_the_student_alone(pixels: Path, tmp_path: Path) -> None:
    model = opened(pixels)
    student = student_of(model, 4, 8, PIXEL_TARGETS)
    before = look_at(model, student)
    export_student(
        tmp_path,
        model,
        student,
        TeacherConfig(str(pixels)),
        lcm_sampling(LCMConfig(), model),
        ExportConfig(dtype="fp16"),
    )
    assert torch.equal(look_at(model, student), before)
    assert student.adapters is not None and student.adapters.current == "student"


def test_a_wrong_merge_is_an_error(pixels: Path, tmp_path: Path) -> None:
    model = opened(pixels)
    student = student_of(model, 4, 8, PIXEL_TARGETS)
    part = WholeNetwork(model, student)
    with torch.no_grad():
        student.trainable()[0].add_(1.0)  # after the merge
    part.save(tmp_path, torch.float32)
    with pytest.raises(ExportError, match="merged into the weights computes something else"):
        verify(part, tmp_path)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_network_with_classes_is_sampled_by_hand(tmp_path: Path, kind: str) -> None:
    checkpoint = tiny_pixels(tmp_path / "base", classes=5)
    exported(checkpoint, tmp_path / "run", kind)
    assert not (tmp_path / "run" / "model_index.json").exists()  # no stock pipeline passes labels on
    scope: dict[str, Any] = {}
    exec(code_of(tmp_path / "run"), scope)
    assert scope["image"].shape == (1, 3, 16, 16)
    assert bool(scope["image"].isfinite().all())


def test_half_precision(pixels: Path, tmp_path: Path) -> None:
    exported(pixels, tmp_path, "lora", dtype="bf16", verify="full")
    assert facts_of(tmp_path)["weights"]["dtype"] == "bf16"
