"""The run folder: the scheduler visits the trained grid, the facts are true, the card's code runs as pasted."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
import yaml
from students import look, opened, run_unet, student_of
from tiny import tiny_pipeline

from stepdistill.diffusion.prediction import read
from stepdistill.errors import ExportError, InputError
from stepdistill.export import lora
from stepdistill.export import student as student_module
from stepdistill.export.config import ExportConfig
from stepdistill.export.folder import ASIDE
from stepdistill.export.lcm import lcm_sampling
from stepdistill.export.lines import loading_lines
from stepdistill.export.student import export_student
from stepdistill.families import TeacherConfig
from stepdistill.methods.lcm import LCM, LCMConfig

FILES = ["README.md", "pytorch_lora_weights.safetensors", "scheduler/scheduler_config.json", "stepdistill.json"]


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def facts_of(folder: Path) -> dict:
    return json.loads((folder / "stepdistill.json").read_text())


def exported(base: Path, folder: Path, method: LCMConfig | None = None, **config: str):
    model = opened(base)
    student = student_of(model, 4, 64)
    plan = lcm_sampling(method or LCMConfig(), model, student.takes_guidance)
    export_student(folder, model, student, TeacherConfig(str(base)), plan, ExportConfig(**config))
    return student


def test_the_folder_holds_all_that_diffusers_needs(base: Path, tmp_path: Path) -> None:
    from diffusers import LCMScheduler, StableDiffusionPipeline

    student = exported(base, tmp_path / "run", verify="full")
    assert files(tmp_path / "run") == FILES
    pipeline = StableDiffusionPipeline.from_pretrained(str(base))
    pipeline.load_lora_weights(str(tmp_path / "run"))
    pipeline.scheduler = LCMScheduler.from_pretrained(str(tmp_path / "run"), subfolder="scheduler")
    assert torch.equal(run_unet(pipeline.unet), look(student))


@pytest.mark.parametrize(("points", "prediction_type"), [(50, "epsilon"), (40, "v_prediction"), (25, "sample")])
def test_the_scheduler_samples_the_trained_grid_with_the_trained_boundary(
    tmp_path: Path, points: int, prediction_type: str
) -> None:
    from diffusers import LCMScheduler

    zero_snr = prediction_type == "v_prediction"
    base = tiny_pipeline(tmp_path / "base", prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr)
    method = LCMConfig(num_ddim_timesteps=points, timestep_scaling=0.1)
    exported(base, tmp_path / "run", method)
    scheduler = LCMScheduler.from_pretrained(str(tmp_path / "run"), subfolder="scheduler")
    model = opened(base)
    lcm = LCM(method, model.denoiser, model.denoiser)
    trained = lcm.schedule.index(lcm.grid[:-1]).round().long().tolist()
    for steps in (1, 2, 4, 8):
        scheduler.set_timesteps(steps)
        assert set(scheduler.timesteps.tolist()) <= set(trained)
        assert scheduler.timesteps[0] == trained[0] == 999
    assert scheduler.config.prediction_type == prediction_type
    # a step of the scheduler is the consistency function of the training, at both ends of the grid
    for index in (trained[0], trained[-1]):
        scheduler.set_timesteps(points)
        x_t, output = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
        t = lcm.schedule.time(torch.full((2,), index))
        expected = lcm.consistency(x_t, t, read(model.denoiser.predicts, lcm.schedule, output, x_t, t))
        found = scheduler.step(output, index, x_t).denoised
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_facts_are_true(base: Path, tmp_path: Path) -> None:
    exported(base, tmp_path, LCMConfig(w_min=2.0, w_max=7.0), dtype="fp16")
    facts = json.loads((tmp_path / "stepdistill.json").read_text())
    weights = (tmp_path / "pytorch_lora_weights.safetensors").read_bytes()
    assert facts["schema"] == 3
    assert facts["method"] == "lcm"
    assert facts["steps"] == [1, 2, 4, 8]
    assert facts["timesteps"]["4"] == [999, 759, 499, 259]
    assert facts["guidance_scale"] == 1.0
    assert (facts["trained"]["w_min"], facts["trained"]["w_max"]) == (2.0, 7.0)
    assert facts["base_model"]["path"] == str(base)
    assert (facts["student"]["rank"], facts["student"]["alpha"], facts["student"]["modules"]) == (4, 64, 79)
    assert facts["weights"]["files"] == {"pytorch_lora_weights.safetensors": hashlib.sha256(weights).hexdigest()}
    assert facts["weights"]["dtype"] == "fp16"
    assert (facts["pipeline"], facts["takes"], facts["guidance_range"]) == ("StableDiffusionPipeline", "prompt", None)
    assert facts["files"] == FILES
    assert set(facts["versions"]) == {"stepdistill", "torch", "diffusers", "peft"}


def test_the_card_s_code_runs_as_pasted(base: Path, tmp_path: Path) -> None:
    student = exported(base, tmp_path)
    card = (tmp_path / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    assert code.strip() == loading_lines(tmp_path, facts_of(tmp_path))
    scope: dict[str, object] = {}
    exec(code, scope)
    assert scope["image"].size == (32, 32)
    assert torch.equal(run_unet(scope["pipe"].unet), look(student))
    assert len(scope["pipe"].scheduler.timesteps) == 4


def test_the_lines_name_revision_variant_and_autoencoder(base: Path, tmp_path: Path) -> None:
    exported(base, tmp_path)
    info = facts_of(tmp_path)

    def lines(**changes: object) -> str:
        return loading_lines(tmp_path, {**info, "base_model": {**info["base_model"], **changes}})

    hub = lines(path="org/model", revision="abc", variant="fp16", vae=str(base))
    assert 'from_pretrained("org/model", revision="abc", variant="fp16")' in hub
    assert f'AutoencoderKL.from_pretrained("{base}", subfolder="vae")' in hub
    compile(hub, "card", "exec")
    (tmp_path / "model.safetensors").touch()
    assert "from_single_file(" in lines(path=str(tmp_path / "model.safetensors"))


def test_the_card_has_front_matter_pictures_and_scores(base: Path, tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "step-100.png").touch()
    (tmp_path / "table.md").write_text("| model | steps |\n| :- | -: |\n| student | 4 |\n")
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    exported(base, tmp_path)
    card = (tmp_path / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == base.name
    assert front["library_name"] == "diffusers"
    assert front["tags"] == ["diffusers", "lora", "lcm", "stepdistill", "text-to-image"]
    assert "(samples/step-100.png)" in card
    assert "| student | 4 |" in card
    assert "alpha / rank = 16" in card
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"  # what else lies in the run folder stays


def test_a_failed_export_leaves_the_old_one_as_it_was(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(base, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    save = lora.save_lora

    def wrong(student, folder, *rest):
        path = save(student, folder, *rest)
        with torch.no_grad():
            student.trainable()[0].add_(1.0)
        return path

    monkeypatch.setattr(lora, "save_lora", wrong)
    with pytest.raises(ExportError, match="1 of 158 tensors"):
        exported(base, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before
    exported(base, tmp_path, verify="none")
    assert files(tmp_path) == FILES
    assert list(tmp_path.glob(".*")) == []


def test_a_failed_export_after_a_kill_puts_the_old_one_back(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(base, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    (tmp_path / ASIDE).mkdir()
    for name in ("stepdistill.json", "README.md", "pytorch_lora_weights.safetensors"):  # killed while it was replaced
        (tmp_path / name).rename(tmp_path / ASIDE / name)
    monkeypatch.setattr(student_module, "write_card", lambda *_: pytest.fail("as far as that"))
    with pytest.raises(pytest.fail.Exception):
        exported(base, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


def test_a_folder_that_is_a_file_is_named(base: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match=r"run.*free space or fix permissions"):
        exported(base, tmp_path / "run")


def test_what_lcm_scheduler_can_t_sample_is_said_before_training(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--method.sigma_data"):
        lcm_sampling(LCMConfig(sigma_data=1.0), opened(base))
    assert lcm_sampling(LCMConfig(num_ddim_timesteps=5), opened(base)).steps == (1, 2, 4)
