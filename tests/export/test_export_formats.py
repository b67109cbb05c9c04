"""Adapter files in both layouts through stock pipelines, SD and SDXL: no module lost, the right strength, error 0."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from students import ATTENTION, MODULES, log_lines, look_at, opened, student_of

from stepdistill.errors import ExportError, InputError
from stepdistill.export.config import ExportConfig
from stepdistill.export.kohya import KOHYA, base_version, kohya_layout
from stepdistill.export.lcm import lcm_sampling
from stepdistill.export.lora import WEIGHTS, AdapterFile, diffusers_layout
from stepdistill.export.student import export_student
from stepdistill.export.verify import verify
from stepdistill.families import TeacherConfig
from stepdistill.families.unet import LCM_TARGETS
from stepdistill.methods.lcm import LCMConfig

CASES = [(4, 4, ATTENTION), (4, 4, LCM_TARGETS), (4, 64, LCM_TARGETS), (6, 2.5, ATTENTION)]


@pytest.fixture(params=["sd", "sdxl"])
def checkpoint(request: pytest.FixtureRequest, base: Path, sdxl: Path) -> Path:
    return base if request.param == "sd" else sdxl


def part_of(model: Any, student: Any, checkpoint: Path, layout: str) -> AdapterFile:
    made = diffusers_layout() if layout == "diffusers" else kohya_layout(model.pipeline())
    return AdapterFile(model, student, TeacherConfig(str(checkpoint)), made)


def strengths(unet: Any) -> list[float]:
    return [s for m in unet.modules() if "lora_A" in dict(m.named_children()) for s in m.scaling.values()]


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize(("rank", "alpha", "targets"), CASES)
def test_round_trip_through_a_stock_pipeline_is_exact(
    checkpoint: Path, tmp_path: Path, rank: int, alpha: float, targets: tuple[str, ...], layout: str
) -> None:
    from diffusers import DiffusionPipeline

    model = opened(checkpoint)
    student = student_of(model, rank, alpha, targets)
    part = part_of(model, student, checkpoint, layout)
    part.save(tmp_path, torch.float32)
    pipeline = DiffusionPipeline.from_pretrained(str(checkpoint))
    fresh = opened(checkpoint)
    fresh.denoiser.net = pipeline.unet
    bare = look_at(fresh, fresh.denoiser)
    with log_lines() as lines, warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline.load_lora_weights(str(tmp_path / part.name))
    assert {line.split(" associated")[0] for line in lines} == {"No LoRA keys"}
    assert strengths(pipeline.unet) == [alpha / rank] * MODULES[targets]
    found = look_at(fresh, fresh.denoiser)
    assert torch.equal(found, look_at(model, student))
    assert (found - bare).abs().max() > 1e-3


@pytest.mark.parametrize("how", ["shared", "full"])
@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_check_passes_both(checkpoint: Path, tmp_path: Path, layout: str, dtype: torch.dtype, how: str) -> None:
    model = opened(checkpoint)
    part = part_of(model, student_of(model, 4, 0.7), checkpoint, layout)
    part.save(tmp_path, dtype)
    with log_lines() as lines:
        verify(part, tmp_path, how)
    assert lines == []


def test_a_folder_with_both_loads_diffusers_own_and_says_nothing(base: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    model = opened(base)
    student = student_of(model, 4, 8)
    teacher, config = TeacherConfig(str(base)), ExportConfig(formats=("diffusers", "kohya"))
    export_student(tmp_path, model, student, teacher, lcm_sampling(LCMConfig(), model, student.takes_guidance), config)
    assert {p.name for p in tmp_path.glob("*.safetensors")} == {WEIGHTS, KOHYA}
    tensors = load_file(tmp_path / KOHYA)
    save_file({k: torch.zeros_like(v) for k, v in tensors.items()}, tmp_path / KOHYA)
    pipeline = StableDiffusionPipeline.from_pretrained(str(base))
    with log_lines() as lines:
        pipeline.load_lora_weights(str(tmp_path))
    assert [line.split(" associated")[0] for line in lines] == ["No LoRA keys"]
    expected = look_at(model, student)
    fresh = opened(base)
    fresh.denoiser.net = pipeline.unet
    assert torch.equal(look_at(fresh, fresh.denoiser), expected)
    assert f"`{KOHYA}`" in (tmp_path / "README.md").read_text()


def test_what_kohya_s_tools_read_is_there(base: Path, sdxl: Path, tmp_path: Path) -> None:
    model = opened(base)
    part_of(model, student_of(model, 4, 2.5, ATTENTION), base, "kohya").save(tmp_path, torch.float16)
    with safe_open(tmp_path / KOHYA, "pt") as file:
        metadata, keys = file.metadata(), set(file.keys())
    assert metadata["ss_network_dim"] == "4"
    assert metadata["ss_network_alpha"] == "2.5"
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["ss_network_module"] == "networks.lora"
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert {f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"} <= keys
    assert len(keys) == 3 * 32
    alpha = load_file(tmp_path / KOHYA)[f"{name}.alpha"]
    assert (alpha.dtype, alpha.shape, alpha.item()) == (torch.float32, torch.Size([]), 2.5)
    assert base_version(opened(sdxl).pipeline()) == "sdxl_base_v1-0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(next(k for k in t if k.endswith("lora_up.weight"))), r"1 of 158 trained tensors are missing"),
        (lambda t: [t.pop(k) for k in list(t) if k.endswith(".alpha")], r"79 of 79 modules load at another strength"),
        (lambda t: t.update({k: v * 2 for k, v in t.items() if k.endswith(".alpha")}), r"another strength.*\(4 instead of 2\)"),
        (lambda t: t[next(k for k in t if "lora_down" in k)].view(-1)[:1].add_(1.0), r"1 of 158 tensors .* differ"),
        (lambda t: t.update({"lora_unet_conv_in.lora_down.weight": torch.ones(4, 4, 3, 3)}), r"not trained"),
    ],
    ids=["a tensor less", "no alphas", "other alphas", "a tensor off", "a tensor more"],
)  # fmt: skip
def test_a_tampered_kohya_file_is_an_error(base: Path, tmp_path: Path, change: Any, message: str) -> None:
    model = opened(base)
    student = student_of(model, 4, 8)
    part = part_of(model, student, base, "kohya")
    part.save(tmp_path, torch.float32)
    part_of(model, student, base, "diffusers").save(tmp_path, torch.float32)  # a good file beside it hides nothing
    tensors = load_file(tmp_path / KOHYA)
    change(tensors)
    save_file(tensors, tmp_path / KOHYA)
    with pytest.raises(ExportError, match=message):
        verify(part, tmp_path)


@pytest.mark.parametrize("formats", [(), ("kohya",), ("diffusers", "onnx")])
def test_formats_that_are_none(formats: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match=r"--export\.formats"):
        ExportConfig(formats=formats)
