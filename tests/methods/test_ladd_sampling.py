"""What a LADD student is trained on is what a stock scheduler samples: the same times, inputs and samples."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adversaries import Convolutional, config
from oracle import calls, normal, opened, stock
from tiny import tiny_pipeline
from tiny_pixels import tiny_pixels
from torch import Tensor
from torch.testing import assert_close

from stepdistill.diffusion.schedule import Flow
from stepdistill.diffusion.solver import multistep_consistency
from stepdistill.errors import InputError
from stepdistill.export.ladd import ladd_sampling
from stepdistill.methods.ladd import LADD
from stepdistill.networks.lora import StudentConfig

PIPELINES = {
    "sd-v-ztsnr": functools.partial(tiny_pipeline, prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "sd-v": functools.partial(tiny_pipeline, prediction_type="v_prediction"),
    "sd-eps": tiny_pipeline,
    "pixels-x0": functools.partial(tiny_pixels, prediction_type="sample"),
}
FULL, LOW = (1.0, 0.75, 0.5, 0.25), (0.4, 0.3, 0.2, 0.1)
VISITED = {4: [0, 1, 2, 3], 2: [0, 2], 1: [0]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in PIPELINES.items()}


def noises(shape: tuple[int, ...], seed: int) -> Callable[[int], Tensor]:
    """What a scheduler draws from a generator of this seed, step after step."""
    draws = torch.Generator().manual_seed(seed)
    return lambda _: torch.randn(shape, generator=draws)


@torch.no_grad()
def stock_loop(scheduler: Any, student: Any, x: Tensor, cond: dict[str, Tensor], steps: int, seed: int) -> Tensor:
    scheduler.set_timesteps(steps)
    embeds = {"encoder_hidden_states": cond["prompt_embeds"]} if "prompt_embeds" in cond else {}
    draws = torch.Generator().manual_seed(seed)
    with student.active():
        for t in scheduler.timesteps:
            x = scheduler.step(student.module(x, t, **embeds).sample, t, x, generator=draws).prev_sample
    return x


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", PIPELINES)
def test_the_stock_scheduler_is_our_solver(folders: dict[str, Path], name: str, kind: str) -> None:
    model = opened(folders[name])
    times = LOW if name == "sd-eps" else FULL
    given = config(times, head_width=8)
    student = model.denoiser.student(StudentConfig(kind=kind, rank=2))  # type: ignore[arg-type]
    with torch.no_grad():
        for i, parameter in enumerate(student.trainable()):
            parameter.add_(0.05 * normal(*parameter.shape, seed=i))
    cond = model.conditions(["a red circle", "b"] if name.startswith("sd") else ["0", "0"])
    LADD(given, student, model.denoiser, model.latent_shape, cond)  # takes it
    plan = ladd_sampling(given, model)
    scheduler = type(plan.scheduler).from_config(
        json.loads(json.dumps(dict(plan.scheduler.config)))
    )  # as saved and loaded
    assert plan.steps == (1, 2, 4) and plan.default_steps == 4
    with pytest.raises(ValueError, match="original_steps"):  # of untrained times there are none to visit
        scheduler.set_timesteps(8)
    for steps, where in VISITED.items():
        shape = (2, *model.latent_shape)
        x, grid = normal(*shape, seed=steps), torch.tensor(times, dtype=torch.float64)[where]
        with torch.no_grad():
            ours = multistep_consistency(
                lambda x, t: student(x, t, cond).x0, model.denoiser.schedule, x, grid, noises(shape, 7)
            )
        theirs = stock_loop(scheduler, student, x, cond, steps, 7)
        assert plan.timesteps[str(steps)] == [int(t) for t in scheduler.timesteps]
        assert_close(model.denoiser.schedule.index(grid), scheduler.timesteps.double(), rtol=0, atol=1e-9)
        assert_close(theirs, ours, rtol=1e-5, atol=1e-5 * float(ours.abs().max()))


def test_the_boundary_scalings_are_exactly_none(folders: dict[str, Path]) -> None:
    """With LCM's own timestep_scaling c_skip is 4e-8 at 249; here the sample that goes in leaves no trace, however large."""
    model = opened(folders["sd-v"])
    scheduler = ladd_sampling(config(FULL), model).scheduler
    for steps in (4, 1):
        scheduler.set_timesteps(steps)
        t = scheduler.timesteps[-1]
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(t)
        assert float(c_out) == 1.0 and float(c_skip) < 1e-24
    x = normal(1, 4, 4, 4)
    alpha, sigma = scheduler.alphas_cumprod[999].sqrt(), (1 - scheduler.alphas_cumprod[999]).sqrt()
    output = normal(1, 4, 4, 4, seed=1)
    assert_close(scheduler.step(output, t, x).prev_sample, alpha * x - sigma * output, rtol=0, atol=0)


def test_a_lower_first_time_is_the_end_of_a_shorter_table(folders: dict[str, Path]) -> None:
    model = opened(folders["sd-eps"])
    plan = ladd_sampling(config(LOW), model)
    assert plan.timesteps == {"1": [399], "2": [399, 199], "4": [399, 299, 199, 99]}
    whole = stock(folders["sd-eps"]).scheduler.alphas_cumprod
    assert torch.equal(plan.scheduler.alphas_cumprod, whole[:400])
    assert plan.scheduler.init_noise_sigma == 1.0, "pure noise, as the training begins"


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "times", "native"), [("sd-v-ztsnr", FULL, [999, 749, 499, 249]), ("sd-eps", LOW, [399, 299, 199, 99])]
)
def test_a_stock_pipeline_needs_no_more_than_a_number_of_steps(
    folders: dict[str, Path], tmp_path: Path, name: str, times: tuple[float, ...], native: list[int]
) -> None:
    from diffusers import LCMScheduler, StableDiffusionPipeline

    model = opened(folders[name])
    student = model.denoiser.full_student()
    ladd_sampling(config(times), model).scheduler.save_pretrained(tmp_path / "scheduler")
    pipeline = StableDiffusionPipeline(**model.pipeline(student).components, requires_safety_checker=False)
    pipeline.scheduler = LCMScheduler.from_pretrained(tmp_path / "scheduler")
    pipeline.set_progress_bar_config(disable=True)
    x, cond = normal(1, 4, 4, 4), model.conditions(["a red circle"])
    for steps, where in VISITED.items():
        with calls(student.module) as seen:
            latents = pipeline(
                "a red circle", num_inference_steps=steps, guidance_scale=1.0, latents=x.clone(), output_type="latent",
                generator=torch.Generator().manual_seed(3),
            ).images  # fmt: skip
        assert [int(call["timestep"]) for call in seen] == [native[i] for i in where]
        assert torch.equal(seen[0]["sample"], x), "the first input is the noise itself, as in training"
        grid = torch.tensor(times, dtype=torch.float64)[where]
        ours = multistep_consistency(
            lambda x, t: student(x, t, cond).x0, model.denoiser.schedule, x, grid, noises((1, 4, 4, 4), 3)
        )
        assert_close(latents, ours, rtol=1e-5, atol=1e-5)


# -- flows -----------------------------------------------------------------------------------------------------------------


class FlowModel:
    """As much of a flow-matching model as an export asks for."""

    usual_guidance = 3.5

    def __init__(self) -> None:
        self.denoiser = Convolutional(Flow(), "flow")
        self.denoiser.module.requires_grad_(True)

    def pipeline(self) -> Any:
        from types import SimpleNamespace

        from diffusers import FlowMatchEulerDiscreteScheduler

        return SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))


@torch.no_grad()
def test_on_a_flow_the_sigmas_are_handed_over() -> None:
    model: Any = FlowModel()
    times = (1.0, 0.9, 0.5, 0.2)  # of any spacing
    plan = ladd_sampling(config(times), model)
    assert plan.guidance_scale == 1.0 and plan.guidance_range is None, "it has no input for guidance"
    assert plan.timesteps == {} and plan.sigmas == {"1": [1.0], "2": [1.0, 0.5], "4": list(times)}
    scheduler = type(plan.scheduler).from_config(json.loads(json.dumps(dict(plan.scheduler.config))))
    assert type(scheduler).__name__ == "FlowMatchLCMScheduler"
    for steps, where in VISITED.items():
        scheduler.set_timesteps(sigmas=plan.sigmas[str(steps)])
        assert_close(scheduler.sigmas, torch.tensor([*plan.sigmas[str(steps)], 0.0]))
        x = start = normal(2, 1, 4, 4)
        draws = torch.Generator().manual_seed(5)
        for t in scheduler.timesteps:
            output = model.denoiser.output(x, (t / 1000).double().expand(2), {})
            x = scheduler.step(output, t, x, generator=draws).prev_sample
        grid = torch.tensor(times, dtype=torch.float64)[where]
        ours = multistep_consistency(
            lambda x, t: model.denoiser(x, t, {}).x0, Flow(), start, grid, noises((2, 1, 4, 4), 5)
        )
        assert_close(x, ours, rtol=1e-5, atol=1e-5)


# -- what can't be sampled -------------------------------------------------------------------------------------------------


def test_what_no_stock_scheduler_visits_is_refused(folders: dict[str, Path]) -> None:
    model = opened(folders["sd-v"])
    with pytest.raises(InputError, match=r"evenly spaced.*--method\.times"):
        ladd_sampling(config((1.0, 0.9, 0.5, 0.2)), model)
    with pytest.raises(InputError, match=r"--method\.probabilities"):
        ladd_sampling(config(FULL, probabilities=(0.0, 0.0, 0.5, 0.5)), model)


def test_only_steps_that_were_trained_are_offered(folders: dict[str, Path]) -> None:
    model = opened(folders["sd-v"])
    assert ladd_sampling(config((1.0,)), model).timesteps == {"1": [999]}
    plan = ladd_sampling(config(FULL, probabilities=(0.5, 0.0, 0.5, 0.0)), model)
    assert plan.steps == (1, 2) and plan.default_steps == 2
    assert plan.guidance_scale == 1.0 and plan.guidance_range is None
    assert json.loads(json.dumps(plan.trained))["times"] == list(FULL)
