"""Every recipe on Stable Diffusion 3 and Flux: what it leaves makes a stock pipeline do what was trained, to rounding."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recipe_runs import load_recipe, run_in_process
from tiny import tiny_images
from tiny_flux import tiny_flux
from tiny_sd3 import CHANNELS, tiny_sd3
from torch import Tensor

from stepdistill import families
from stepdistill.bench.contenders import open_contenders
from stepdistill.bench.generate import generate
from stepdistill.diffusion.solver import multistep_consistency, sample
from stepdistill.diffusion.timesteps import shift
from stepdistill.errors import InputError
from stepdistill.export.lines import loading_lines
from stepdistill.export.rerun import export_run
from stepdistill.families.flux import pack, unpack

TRAIN = [
    "--train.train_batch_size", "2", "--train.max_train_steps", "2", "--train.learning_rate", "1e-2", "--student.rank", "4",
    "--data.resolution", "32", "--data.max_bad_fraction", "0", "--train.checkpointing_steps", "1",
]  # fmt: skip
LCM = ["--method.num_ddim_timesteps", "10", "--method.shift", "3"]
LADDER = ["--method.teacher_steps", "8", "--method.rungs", "4,1", "--method.shift", "3"]
W = {"sd3": ["--method.w_min", "4", "--method.w_max", "4"], "flux": ["--method.w_min", "2.3", "--method.w_max", "2.3"]}
CASES = [(family, kind) for family in ("sd3", "flux") for kind in ("lora", "full")]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_sd3(folder / "sd3")
    tiny_flux(folder / "flux")
    tiny_sd3(folder / "sd3.5", with_t5=False, new=True)
    tiny_images(folder / "images")
    (folder / "prompts.txt").write_text("a red circle\na blue star\na green ring\n")
    return folder


@pytest.fixture
def bf16() -> Iterator[list[str]]:
    """Flags for it; Accelerate fixes the precision once in a process, so what it knows is forgotten before and after."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield ["--train.mixed_precision", "bf16"]
    AcceleratorState._reset_state(reset_partial_state=True)


def trained(name: str, inputs: Path, folder: Path, family: str, kind: str, *more: object) -> Path:
    words = ["--teacher.path", inputs / family, "--output_dir", folder, *TRAIN, *W[family[:4].rstrip(".")]]
    words += ["--data.path", inputs / "images"] if "--data.path" not in more else []
    run_in_process(load_recipe(name), [*words, "--student.kind", kind, *more])
    return folder


def facts_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "stepdistill.json").read_text()))


def opened(folder: Path) -> tuple[Any, dict[str, Any]]:
    """(the pipeline of the card's lines, run as pasted up to the call; what the call is given)."""
    facts = facts_of(folder)
    space: dict[str, Any] = {}
    exec(loading_lines(folder, facts).rsplit("\n", 1)[0], space)
    space["pipe"].set_progress_bar_config(disable=True)
    return space["pipe"], asked(folder, facts["default_steps"])


def asked(folder: Path, steps: int) -> dict[str, Any]:
    """What the call in the card's last line is given, were it for so many steps."""
    given: dict[str, Any] = {}
    call = loading_lines(folder, {**facts_of(folder), "default_steps": steps}).rsplit("\n", 1)[1]
    exec(call.replace("pipe(", "keep(").removesuffix(".images[0]"), {"keep": lambda _, **kwargs: given.update(kwargs)})
    return given


@torch.no_grad()
def theirs(pipe: Any, given: dict[str, Any], noise: Tensor) -> Tensor:
    flux = type(pipe).__name__ == "FluxPipeline"
    torch.manual_seed(11)
    latents = pipe("a cat", latents=pack(noise) if flux else noise, output_type="latent", **given).images
    return unpack(latents, *noise.shape[-2:]) if flux else latents


def denoiser_in(pipe: Any, base: Path) -> tuple[Any, dict[str, Tensor]]:
    model = families.load(families.TeacherConfig(str(base)))
    model.denoiser.net = pipe.transformer
    return model.denoiser, model.encode_prompts(["a cat"])


def draws(noise: Tensor, packed: bool) -> Any:
    """The noise that FlowMatchLCMScheduler draws between steps, from the global generator, step by step."""
    torch.manual_seed(11)
    made = [torch.randn((pack(noise) if packed else noise).shape) for _ in range(8)]
    return lambda k: unpack(made[k - 1], *noise.shape[-2:]) if packed else made[k - 1]


def noise_of(seed: int = 3) -> Tensor:
    return torch.randn((1, CHANNELS, 4, 4), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_rung_is_sampled_as_our_own_solver_does(inputs: Path, tmp_path: Path, family: str, kind: str) -> None:
    run = trained("progressive", inputs, tmp_path / "run", family, kind, *LADDER)
    for steps in (4, 1):
        rung = run / "rungs" / str(steps)
        facts = facts_of(rung)
        grid = shift(torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64), 3.0)
        assert facts["scheduler"] == "FlowMatchEulerDiscreteScheduler"
        assert (facts["timesteps"], facts["sigmas"]) == ({}, {str(steps): grid[:-1].tolist()})
        assert facts["guidance_scale"] == pytest.approx(3.3 if family == "flux" else 1.0)
        pipe, given = opened(rung)
        denoiser, cond = denoiser_in(pipe, inputs / family)
        if family == "flux":
            assert (given["height"], given["width"]) == (32, 32)
            cond["guidance"] = torch.tensor([3.3])
        with torch.no_grad():
            ours = sample(lambda x, t, d=denoiser, c=cond: d(x, t, c), denoiser.schedule, noise_of(), grid)
        torch.testing.assert_close(theirs(pipe, given, noise_of()), ours, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def lcm(inputs: Path, tmp_path_factory: pytest.TempPathFactory, request: Any) -> tuple[str, Path]:
    """(the family, a finished run of LCM)."""
    family, kind = request.param
    return family, trained("lcm_lora", inputs, tmp_path_factory.mktemp("lcm"), family, kind, *LCM)


def test_an_lcm_is_sampled_at_the_times_it_was_trained_at(inputs: Path, lcm: tuple[str, Path]) -> None:
    family, run = lcm
    facts = facts_of(run)
    assert facts["scheduler"] == "FlowMatchLCMScheduler" and facts["steps"] == [1, 2, 4, 8]
    even = torch.linspace(1.0, 0.0, 11, dtype=torch.float64)
    assert facts["sigmas"]["4"] == shift(even[[0, 2, 5, 7]], 3.0).tolist()
    trained_at = shift(even, 3.0).tolist()
    assert all(s in trained_at[:-1] for sigmas in facts["sigmas"].values() for s in sigmas)
    pipe, _ = opened(run)
    denoiser, cond = denoiser_in(pipe, inputs / family)
    cond |= {"guidance": torch.tensor([3.3])} if family == "flux" else {}
    for steps in (1, 4, 8):
        given = asked(run, steps)
        times = torch.tensor(facts["sigmas"][str(steps)], dtype=torch.float64)
        with torch.no_grad():
            ours = multistep_consistency(
                lambda x, t, d=denoiser, c=cond: d(x, t, c).x0, denoiser.schedule, noise_of(), times,
                draws(noise_of(), family == "flux"),
            )  # fmt: skip
        torch.testing.assert_close(theirs(pipe, given, noise_of()), ours, rtol=1e-5, atol=1e-5)


def test_the_harness_samples_the_exports(inputs: Path, lcm: tuple[str, Path]) -> None:
    family, run = lcm
    teacher, student = open_contenders(str(inputs / family), [str(run)])
    assert student.schedule(4) == {"sigmas": student.facts["sigmas"]["4"]} and teacher.schedule(4) == {}
    options = {"steps": 4, "guidance_scale": student.facts["guidance_scale"], "seed": 5, **student.schedule(4)}
    prompts = ["a red circle", "a blue star", "a green ring"]
    images = generate(student.pipe, prompts, **options)
    assert images.shape == (3, 32, 32, 3) and images.std() > 1
    torch.rand(7)  # the noise between steps belongs to the prompt, not to what ran before or is beside it
    parts = [generate(student.pipe, prompts[i : i + 1], start_index=i, **options) for i in range(3)]
    assert np.abs(images.astype(int) - np.concatenate(parts)).max() <= 1
    by_teacher = generate(teacher.pipe, prompts, steps=4, guidance_scale=3.3, seed=5)
    assert np.abs(images.astype(int) - by_teacher).max() > 1


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_an_adversarial_student_is_sampled_at_its_times(inputs: Path, tmp_path: Path, family: str, kind: str) -> None:
    """Heads on every block, judged with the pooled text; Flux is told the usual scale in training and when it is sampled."""
    words = ["--teacher.path", inputs / family, "--output_dir", tmp_path, *TRAIN, "--data.path", inputs / "images"]
    words += ["--student.kind", kind, "--method.head_width", "8", "--method.warmup_steps", "0"]
    run_in_process(load_recipe("ladd"), words)
    facts = facts_of(tmp_path)
    assert facts["scheduler"] == "FlowMatchLCMScheduler" and facts["steps"] == [1, 2, 4]
    assert facts["sigmas"] == {"1": [1.0], "2": [1.0, 0.5], "4": [1.0, 0.75, 0.5, 0.25]}
    pipe, given = opened(tmp_path)
    assert given["guidance_scale"] == (3.5 if family == "flux" else 1.0)
    denoiser, cond = denoiser_in(pipe, inputs / family)
    assert denoiser.pooled(cond).shape == cond["pooled_prompt_embeds"].shape
    times = torch.tensor(facts["sigmas"]["4"], dtype=torch.float64)
    with torch.no_grad():  # with no guidance in `cond`, as in training
        ours = multistep_consistency(
            lambda x, t: denoiser(x, t, cond).x0, denoiser.schedule, noise_of(), times,
            draws(noise_of(), family == "flux"),
        )  # fmt: skip
    torch.testing.assert_close(theirs(pipe, given, noise_of()), ours, rtol=1e-5, atol=1e-5)


def test_without_t5_and_in_half_precision_and_with_prompts_alone(inputs: Path, tmp_path: Path, bf16: list[str]) -> None:
    more = [*bf16, "--train.validation_prompts", "a red circle", "--export.verify", "full"]
    data = ["--data.path", inputs / "prompts.txt", "--data.num_inference_steps", "3", "--data.guidance_scale", "4"]
    run = trained(
        "lcm_lora",
        inputs,
        tmp_path / "run",
        "sd3.5",
        "lora",
        *LCM,
        *more,
        *data,
        "--train.gradient_checkpointing",
        "true",
    )
    assert facts_of(run)["base_model"]["without"] == ["text_encoder_3", "tokenizer_3"]
    pipe, given = opened(run)
    assert torch.isfinite(theirs(pipe, given, noise_of())).all()
    assert (run / "samples" / "000002.png").is_file()
    export_run(run, tmp_path / "again")
    assert facts_of(tmp_path / "again")["sigmas"] == facts_of(run)["sigmas"]
    teacher, student = open_contenders(str(inputs / "sd3.5"), [str(run)])
    assert generate(student.pipe, ["a"], steps=1, guidance_scale=1.0, seed=0, **student.schedule(1)).std() > 0
    assert generate(teacher.pipe, ["a"], steps=2, guidance_scale=4.0, seed=0).std() > 0


def test_a_range_of_guidance_for_flux_in_half_precision(inputs: Path, tmp_path: Path, bf16: list[str]) -> None:
    more = ["--method.w_min", "1", "--method.w_max", "4", *bf16]
    more += ["--train.validation_prompts", "a red circle", "--train.gradient_checkpointing", "true"]
    data = ["--data.path", inputs / "prompts.txt", "--data.num_inference_steps", "3", "--data.guidance_scale", "4"]
    run = trained("lcm_lora", inputs, tmp_path / "run", "flux", "lora", *LCM, *more, *data)
    facts = facts_of(run)
    assert (facts["guidance_scale"], facts["guidance_range"]) == (3.5, [2.0, 5.0])
    assert "guidance_scale: 3.5, or another from 2 to 5: the network reads it" in (run / "README.md").read_text()
    assert (run / "samples" / "000002.png").is_file()


def test_guidance_is_distilled_first_where_it_is_not_in_the_teacher(inputs: Path, tmp_path: Path) -> None:
    first = ["--guidance_steps", "1", "--method.rungs", "2"]
    run = trained("progressive", inputs, tmp_path / "sd3", "sd3", "lora", *LADDER, *first)
    assert facts_of(run / "rungs" / "2")["sigmas"] == {"2": [1.0, 0.75]}
    export_run(run, tmp_path / "guided", checkpoint="1")
    facts = facts_of(tmp_path / "guided")
    assert (facts["method"], facts["timesteps"], facts["sigmas"]) == ("guidance-distillation", {}, {})
    assert "- steps: 50, 25\n" in (tmp_path / "guided" / "README.md").read_text()
    with pytest.raises(InputError, match="leave the guidance distillation out"):
        trained("progressive", inputs, tmp_path / "flux", "flux", "lora", *LADDER, *first)


def test_kohyas_layout_and_a_shift_on_a_table_are_refused(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a UNet for the kohya layout, got a transformer"):
        trained("lcm_lora", inputs, tmp_path / "a", "sd3", "lora", *LCM, "--export.formats", "diffusers,kohya")
    with pytest.raises(InputError, match="--method.shift"):
        run_in_process(load_recipe(), ["--teacher.path", "demo", "--method.shift", "3", "--output_dir", tmp_path / "b"])
    with pytest.raises(InputError, match="expected shift > 0, got 0.0; fix --method.shift"):
        run_in_process(load_recipe(), ["--method.shift", "0", "--output_dir", tmp_path / "c"])
