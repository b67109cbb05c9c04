"""What a recipe shows of any kind of student: samples in any precision, and at its end what the exported files make."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from students import full_student_of, look_at, opened, student_of
from tiny import tiny_pipeline
from tiny_flux import tiny_flux
from tiny_pixels import tiny_pixels
from tiny_sd3 import tiny_sd3
from tiny_sdxl import tiny_sdxl

from stepdistill.bench import finish as module
from stepdistill.bench.config import EvalConfig
from stepdistill.bench.contenders import open_contenders
from stepdistill.bench.finish import finish, sampler
from stepdistill.bench.generate import generate
from stepdistill.errors import InputError
from stepdistill.export.config import ExportConfig
from stepdistill.export.folder import read_facts
from stepdistill.export.lcm import lcm_sampling
from stepdistill.export.student import export_student
from stepdistill.families import TeacherConfig
from stepdistill.methods.lcm import LCMConfig

METHOD = LCMConfig()


def plan_of(model: Any, student: Any) -> Any:
    return lcm_sampling(METHOD, model, student.takes_guidance)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("checkpoints")
    return {
        "sd": tiny_pipeline(place / "sd"),
        "sdxl": tiny_sdxl(place / "sdxl"),
        "sd3": tiny_sd3(place / "sd3"),
        "flux": tiny_flux(place / "flux"),
        "pixels": tiny_pixels(place / "pixels"),
    }


def made(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    model = opened(folder, dtype)
    return model, full_student_of(model) if kind == "full" else student_of(model, targets=model.denoiser.lora_targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_samples_of_each_kind_in_each_precision(
    folders: dict[str, Path], tmp_path: Path, family: str, kind: str, dtype: torch.dtype
) -> None:
    """In training a teacher may be in half precision, beside an autoencoder and a full student that are not."""
    model, student = made(folders[family], kind, dtype)
    hooks = sum(len(m._forward_pre_hooks) for m in (*student.module.modules(), *model.pipeline().vae.modules()))
    sampler(model, student, lambda: plan_of(model, student), ["a b", "c"], tmp_path)(7)
    with Image.open(tmp_path / "samples" / "000007.png") as image:
        assert image.width > 4 * 32 and image.height > 2 * 32
    assert hooks == sum(len(m._forward_pre_hooks) for m in (*student.module.modules(), *model.pipeline().vae.modules()))


def test_networks_in_half_precision_are_told_exact_times(folders: dict[str, Path], tmp_path: Path) -> None:
    model, student = made(folders["sd3"], "lora", torch.bfloat16)
    times: list[float] = []
    embed: Any = student.module.get_submodule("time_text_embed.time_proj")
    embed.register_forward_pre_hook(lambda _, given: times.append(given[0][0].item()))
    plan = lcm_sampling(LCMConfig(shift=3.0), model)
    sampler(model, student, lambda: plan, ["a"], tmp_path)(1)
    assert times == pytest.approx([1000 * s for steps in plan.steps for s in plan.sigmas[str(steps)]], rel=1e-6)


@pytest.mark.parametrize(("kind", "scale"), [("lora", 1.0), ("full", 8.0)])
def test_samples_are_those_of_the_student_at_its_guidance(
    folders: dict[str, Path], tmp_path: Path, kind: str, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, student = made(folders["sd"], kind)
    asked: list[tuple[float, list[int], torch.Tensor]] = []

    def watched(pipe: Any, prompts: Any, **options: Any) -> Any:
        asked.append((options["guidance_scale"], options["steps"], look_at(model, _as(student, pipe.unet), scale)))
        return generate(pipe, prompts, **options)

    monkeypatch.setattr(module, "generate", watched)
    expected = look_at(model, student, scale)
    with model.denoiser.active():  # the teacher's turn: adapters off
        sampler(model, student, lambda: plan_of(model, student), ["a"], tmp_path)(1)
    assert [(g, n) for g, n, _ in asked] == [(scale, 1), (scale, 2), (scale, 4), (scale, 8)]
    assert all(torch.equal(output, expected) for _, _, output in asked)


def _as(student: Any, unet: Any) -> Any:
    """The student's way of calling a network, on this one as it is."""
    import copy

    twin = copy.copy(student)
    twin.net, twin.adapters = unet, None
    return twin


def test_prompts_for_a_model_that_reads_none(folders: dict[str, Path], tmp_path: Path) -> None:
    model, student = made(folders["pixels"], "full")
    with pytest.raises(InputError, match=r"--train\.validation_prompts"):
        sampler(model, student, lambda: plan_of(model, student), ["a"], tmp_path)
    sampler(model, student, lambda: plan_of(model, student), None, tmp_path)(1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_on_the_demo_teacher_the_exported_files_are_measured(
    folders: dict[str, Path],
    tmp_path: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The demo teacher is stood in for by the tiny pipeline, and its measurement by a look at what it is given."""
    model, student = made(folders["sd"], kind)
    export_student(tmp_path, model, student, TeacherConfig(str(folders["sd"])), plan_of(model, student))
    expected, seen = look_at(model, student, 8.0), {}

    def compare(folder: Path, entries: Any, bare: Any, *_: Any) -> None:
        (entry,) = entries
        pipe = entry.contender.pipe
        seen.update(
            scheduler=type(pipe.scheduler).__name__, own=pipe.unet is not bare.pipe.unet, guidance=entry.guidance
        )
        seen.update(names=(entry.contender.name, bare.name), steps=entry.steps)
        seen["output"] = look_at(model, _as(student, pipe.unet), 8.0)
        if kind == "lora":
            seen["moved"] = float((look_at(model, _as(student, bare.pipe.unet), 8.0) - seen["output"]).abs().max())
        seen["layers"] = [name for name, _ in pipe.unet.named_modules() if "lora" in name]
        (folder / "table.md").write_text("| row |")

    monkeypatch.setattr(module, "open_contenders", lambda _, runs: open_contenders(str(folders["sd"]), runs))
    monkeypatch.setattr(module, "recipes_yardstick", lambda config: config)
    monkeypatch.setattr(module, "compare_with_teacher", compare)
    finish(tmp_path, TeacherConfig("demo"), EvalConfig(images=4))
    torch.testing.assert_close(seen["output"], expected, rtol=1e-4, atol=1e-5)  # an adapter is fused
    assert seen.get("moved", 1.0) > 0.01 and not seen["layers"]
    assert (seen["guidance"], seen["scheduler"], seen["own"]) == (8.0 if kind == "full" else 1.0, "LCMScheduler", True)
    assert (seen["names"], seen["steps"]) == (("student", "teacher"), (8, 4, 2, 1))
    card = (tmp_path / "README.md").read_text()
    assert "## Results\n\n| row |" in card
    code = card.split("```python\n")[1].split("```")[0]
    assert code.strip() in capsys.readouterr().out


def test_the_upload_comes_last(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, student = made(folders["sd"], "lora")
    teacher = TeacherConfig(str(folders["sd"]))
    export_student(tmp_path, model, student, teacher, plan_of(model, student))
    pushed: list[bool] = []

    def push(folder: Path, config: ExportConfig) -> str:
        pushed.append(config.push_to_hub and bool(read_facts(folder)))
        return "https://the.hub/ada/run"

    monkeypatch.setattr(module, "push", push)
    finish(tmp_path, teacher, EvalConfig(), ExportConfig(push_to_hub=True))
    assert pushed == [True]
    assert "uploaded to https://the.hub/ada/run" in capsys.readouterr().out
