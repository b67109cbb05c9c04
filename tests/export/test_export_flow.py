"""Students of SD3 and Flux against stock Diffusers: whole, at the right strength, the same output to the bit."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from students import full_student_of, log_lines, look_at, opened, student_of
from tiny_flux import tiny_flux
from tiny_sd3 import tiny_sd3

from stepdistill.errors import ExportError
from stepdistill.export.config import ExportConfig
from stepdistill.export.lcm import lcm_sampling
from stepdistill.export.lora import WEIGHTS, diffusers_layout, save_lora
from stepdistill.export.progressive import progressive_sampling
from stepdistill.export.student import export_student, parts_of
from stepdistill.export.verify import verify
from stepdistill.families import Model, TeacherConfig
from stepdistill.families.flux import FLUX_TARGETS
from stepdistill.families.sd3 import SD3_TARGETS
from stepdistill.methods.lcm import LCMConfig
from stepdistill.methods.progressive import ProgressiveConfig

# an output projection beside attention: in Diffusers' converted keys one of nine modules of SD3 would load
TRAP = ("to_q", "proj_out")
CASES = [("sd3", SD3_TARGETS), ("sd3", TRAP), ("flux", FLUX_TARGETS), ("flux", TRAP)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {"sd3": tiny_sd3(folder / "sd3", new=True), "flux": tiny_flux(folder / "flux")}


def fresh(base: Path) -> Any:
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(base)


def seen_by(model: Model, transformer: Any, guidance: float | None) -> torch.Tensor:
    model.denoiser.net = transformer
    with torch.no_grad():
        return look_at(model, model.denoiser, guidance)


@pytest.mark.parametrize(("family", "targets"), CASES)
def test_an_adapter_loads_whole_and_at_its_strength(
    bases: dict[str, Path], tmp_path: Path, family: str, targets: tuple[str, ...]
) -> None:
    guidance = 3.5 if family == "flux" else None
    student = student_of(opened(bases[family]), rank=4, alpha=10, targets=targets)
    expected = look_at(opened(bases[family]), student, guidance)
    save_lora(student, tmp_path, layout=diffusers_layout("transformer"))
    pipe = fresh(bases[family])
    bare = seen_by(opened(bases[family]), pipe.transformer, guidance)
    with log_lines() as lines, warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.load_lora_weights(str(tmp_path))
    assert not [line for line in lines if "No LoRA keys associated to" not in line]
    loaded = {n: m.scaling for n, m in pipe.transformer.named_modules() if "lora_A" in dict(m.named_children())}
    assert len(loaded) == len(student.adapters.scalings("student"))  # type: ignore[union-attr]
    assert {strength for scaling in loaded.values() for strength in scaling.values()} == {2.5}
    found = seen_by(opened(bases[family]), pipe.transformer, guidance)
    assert torch.equal(found, expected)
    assert (found - bare).abs().max() > 1e-3


@pytest.mark.parametrize("how", ["shared", "full"])
@pytest.mark.parametrize(("family", "targets"), CASES)
def test_verification_of_adapters(
    bases: dict[str, Path], tmp_path: Path, family: str, targets: tuple[str, ...], how: Any
) -> None:
    model = opened(bases[family])
    student, teacher = student_of(model, rank=4, alpha=10, targets=targets), TeacherConfig(str(bases[family]))
    plan = progressive_sampling(ProgressiveConfig(w_min=2.5, w_max=2.5), model, 4, student.takes_guidance)
    export_student(tmp_path, model, student, teacher, plan, ExportConfig(verify=how))
    (part,) = parts_of(model, student, teacher, ExportConfig())
    weights = load_file(tmp_path / WEIGHTS)
    save_file({k: v for k, v in weights.items() if ".proj_out." not in k and "to_k" not in k}, tmp_path / WEIGHTS)
    with pytest.raises(ExportError, match="trained tensors are missing"):
        verify(part, tmp_path, how)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_full_student_is_a_transformer_that_stock_opens(bases: dict[str, Path], tmp_path: Path, family: str) -> None:
    model, guidance = opened(bases[family]), 3.5 if family == "flux" else None
    student = full_student_of(model)
    plan = progressive_sampling(ProgressiveConfig(w_min=2.5, w_max=2.5), model, 4, student.takes_guidance)
    export_student(tmp_path, model, student, TeacherConfig(str(bases[family])), plan)
    assert sorted(p.name for p in (tmp_path / "transformer").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    transformer = type(student.module).from_pretrained(tmp_path, subfolder="transformer")  # type: ignore[attr-defined]
    expected = look_at(model, student, guidance)
    assert torch.equal(seen_by(opened(bases[family]), transformer, guidance), expected)


# how students are sampled


def test_sigmas_are_those_of_the_grid_and_nothing_shifts_them_again(bases: dict[str, Path]) -> None:
    model = opened(bases["flux"])
    for plan in (
        lcm_sampling(LCMConfig(w_min=2.5, w_max=2.5, shift=3.0), model, True),
        progressive_sampling(ProgressiveConfig(w_min=2.5, w_max=2.5, shift=3.0), model, 4, True),
    ):
        sigmas = plan.sigmas["4"]
        plan.scheduler.set_timesteps(sigmas=sigmas, mu=1.15)
        assert plan.scheduler.sigmas.tolist() == pytest.approx([*sigmas, 0.0], rel=1e-6)
        assert plan.scheduler.timesteps.tolist() == pytest.approx([1000 * s for s in sigmas], rel=1e-6)
        assert (plan.guidance_scale, plan.guidance_range) == (3.5, (3.5, 3.5))
    assert lcm_sampling(LCMConfig(shift=1.0), model).sigmas["4"] == pytest.approx([1.0, 0.76, 0.5, 0.26])


def test_lcm_spreads_its_steps_as_on_a_table(base: Path, bases: dict[str, Path]) -> None:
    table, flow = (lcm_sampling(LCMConfig(), opened(path)) for path in (base, bases["sd3"]))
    assert table.steps == flow.steps == (1, 2, 4, 8)
    for count in ("1", "2", "4", "8"):
        assert flow.sigmas[count] == pytest.approx([(t + 1) / 1000 for t in table.timesteps[count]])


def test_the_guidance_of_examples_is_the_familys_where_it_was_trained(bases: dict[str, Path]) -> None:
    model = opened(bases["flux"])
    scales = [
        progressive_sampling(ProgressiveConfig(w_min=low, w_max=high), model, 4, True).guidance_scale
        for low, high in ((1.0, 4.0), (3.0, 4.0), (0.0, 1.0))
    ]
    assert scales == [3.5, 4.0, 2.0]


def test_levels_are_the_schedulers(tmp_path: Path) -> None:
    model = opened(tiny_sd3(tmp_path, num_train_timesteps=500))
    for plan in (lcm_sampling(LCMConfig(), model), progressive_sampling(ProgressiveConfig(), model, 4)):
        plan.scheduler.set_timesteps(sigmas=[0.5])
        assert plan.scheduler.timesteps.tolist() == [250.0]
    given = model.denoiser.native(torch.tensor([0.5], dtype=torch.float64), torch.device("cpu"))
    assert given.tolist() == [250.0]


def test_the_card_names_what_the_pipeline_must_be_told(bases: dict[str, Path], tmp_path: Path) -> None:
    model = opened(bases["flux"])
    student = student_of(model, targets=TRAP)
    plan = progressive_sampling(ProgressiveConfig(w_min=2.5, w_max=2.5), model, 4, True)
    export_student(tmp_path, model, student, TeacherConfig(str(bases["flux"])), plan)
    card = (tmp_path / "README.md").read_text()
    assert "guidance_scale=3.5, sigmas=[1.0, 0.75, 0.5, 0.25], height=32, width=32)" in card
    assert "- guidance_scale: 3.5: the network reads it" in card
