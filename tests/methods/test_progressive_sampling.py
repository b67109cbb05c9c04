"""What a rung is trained on is what a stock scheduler samples at its number of steps: the same times, the same samples."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from ladders import Net, config
from oracle import calls, normal, opened, stock
from tiny import tiny_pipeline
from tiny_pixels import tiny_pixels
from torch import Tensor
from torch.testing import assert_close

from stepdistill.batch import Batch
from stepdistill.diffusion.schedule import Flow
from stepdistill.diffusion.solver import sample
from stepdistill.methods.progressive import Progressive
from stepdistill.networks.lora import StudentConfig
from stepdistill.randomness import StepRandom

PIPELINES = {
    "pixels-eps": tiny_pixels,
    "pixels-v": functools.partial(tiny_pixels, prediction_type="v_prediction"),
    "pixels-x0": functools.partial(tiny_pixels, prediction_type="sample"),
    "sd-v-ztsnr": functools.partial(tiny_pipeline, prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "sd-eps": tiny_pipeline,
}
STOCK = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
"""What the scheduler of a student has in place of its teacher's; the table and the prediction_type stay."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in PIPELINES.items()}


def ddim_of(pipeline: Any, **fields: Any) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_config(pipeline.scheduler.config, **fields)


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("kind", ["full", "lora"])
@torch.no_grad()
def test_a_student_at_its_rung_sampled_by_the_stock_ddim_scheduler(
    folders: dict[str, Path], name: str, kind: str
) -> None:
    model = opened(folders[name])
    eps = model.denoiser.predicts == "eps"
    rungs = (20, 10) if eps else (8, 4, 2, 1)
    student = model.denoiser.student(StudentConfig(kind=kind, rank=2))  # type: ignore[arg-type]
    for i, parameter in enumerate(student.trainable()):
        parameter.add_(0.05 * normal(*parameter.shape, seed=i))
    method = Progressive(config(rungs, 40), student, model.denoiser)
    cond = model.conditions(["a red circle", "b"] if name.startswith("sd") else ["0", "0"])
    scheduler = ddim_of(stock(folders[name]), **STOCK)
    for steps in rungs:
        assert method.steps == steps
        x = ours = normal(2, *model.latent_shape, seed=steps)
        ours = sample(lambda x, t: student(x, t, cond), method.schedule, ours, method.grid)
        scheduler.set_timesteps(steps)
        assert_close(method.schedule.index(method.grid[:-1]), scheduler.timesteps.double(), rtol=0, atol=1e-9)
        embeds = {"encoder_hidden_states": cond["prompt_embeds"]} if cond else {}
        with student.active():
            for t in scheduler.timesteps:
                x = scheduler.step(student.module(x, t, **embeds).sample, t, x).prev_sample
        assert_close(x, ours, rtol=1e-5, atol=1e-5 * float(ours.abs().max()))
        method.next_round()


@torch.no_grad()
def test_a_stock_pipeline_at_the_number_of_steps_of_the_rung(folders: dict[str, Path]) -> None:
    from diffusers import StableDiffusionPipeline

    model = opened(folders["sd-v-ztsnr"])
    student = model.denoiser.full_student()
    method = Progressive(config((8, 4), 40), student, model.denoiser)
    method.next_round()
    parts = {**model.pipeline(student).components, "scheduler": ddim_of(stock(folders["sd-v-ztsnr"]), **STOCK)}
    pipeline = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    x, cond = normal(1, 4, 4, 4), model.conditions(["a red circle"])
    with calls(student.module) as seen:
        latents = pipeline(
            "a red circle", num_inference_steps=method.steps, guidance_scale=1.0, latents=x.clone(), output_type="latent"
        ).images  # fmt: skip
    assert [int(call["timestep"]) for call in seen] == [999, 749, 499, 249]
    ours = sample(lambda x, t: student(x, t, cond), method.schedule, x, method.grid)
    assert_close(latents, ours, rtol=1e-5, atol=1e-5)


def test_other_settings_of_the_stock_scheduler_visit_other_times(folders: dict[str, Path]) -> None:
    """Why trailing, why alpha to one, and why rungs divide the table."""
    pipeline = stock(folders["sd-eps"])
    leading = ddim_of(pipeline, timestep_spacing="leading")
    assert pipeline.scheduler.config.steps_offset == 1 and not pipeline.scheduler.config.set_alpha_to_one
    leading.set_timesteps(4)
    assert leading.timesteps.tolist() == [751, 501, 251, 1]  # it begins with noise of level 999 and calls it 751
    leading.set_timesteps(1)
    assert leading.timesteps.tolist() == [1]
    # the step from timestep n is to n - 1000 // steps, wherever the next timestep is
    trailing = ddim_of(pipeline, **STOCK)
    trailing.set_timesteps(32)
    n = trailing.timesteps.tolist()
    assert (n[2] - 1000 // 32, n[3]) == (906, 905)
    trailing.set_timesteps(8)
    n = trailing.timesteps.tolist()
    assert n == [999, 874, 749, 624, 499, 374, 249, 124] and [m - 125 for m in n] == [*n[1:], -1]
    # beyond the last timestep there is clean data, or else level 0
    x, output = normal(1, 3), normal(1, 3, seed=1)
    ends = {}
    for to_one in (True, False):
        scheduler = ddim_of(pipeline, **{**STOCK, "set_alpha_to_one": to_one})
        scheduler.set_timesteps(8)
        ends[to_one] = scheduler.step(output, 124, x)
    assert_close(ends[True].prev_sample, ends[True].pred_original_sample, rtol=0, atol=0)
    assert float((ends[False].prev_sample - ends[True].prev_sample).abs().max()) > 1e-2


def euler(student: Net, x: Tensor, **how: Any) -> Tensor:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(**how)
    for timestep in scheduler.timesteps:
        t = (timestep / 1000).double().expand(len(x))
        x = scheduler.step(student.output(x, t, {}), timestep, x).prev_sample
    return x


@pytest.mark.parametrize("shift", [1.0, 3.0])
@torch.no_grad()
def test_a_flow_student_at_its_rung_sampled_by_the_stock_euler_scheduler(shift: float) -> None:
    student = Net(Flow(), "flow").full_student()
    method = Progressive(config((32, 16, 8, 4, 2, 1), 64, shift=shift), student, Net(Flow(), "flow", seed=1))
    x = normal(4, 3)
    for steps in (32, 16, 8, 4, 2, 1):
        assert method.steps == steps
        plain = torch.arange(steps, -1, -1, dtype=torch.float64) / steps
        assert_close(method.grid, shift * plain / (1 + (shift - 1) * plain), rtol=0, atol=1e-12)
        ours = sample(lambda x, t: student(x, t, {}), Flow(), x, method.grid)
        static = method.grid[:-1].tolist()  # what is exported for stock pipelines, whose `sigmas` they are
        assert_close(euler(student, x, sigmas=static), ours, rtol=1e-5, atol=1e-5)
        if steps == 4:
            by_count = euler(student, x, num_inference_steps=steps)
            assert float((by_count - ours).abs().max()) > 1e-3, "by their number alone it takes other steps"
        method.next_round()


@torch.no_grad()
def test_the_grids_of_student_and_teacher_meet_on_a_shifted_flow() -> None:
    asked: list[Tensor] = []

    class Asked(Net):
        def call(self, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
            asked.append(t)
            return super().call(x_t, t, cond)

    teacher = Asked(Flow(), "flow")
    method = Progressive(config((4,), 12, shift=3.0), teacher.full_student(), teacher)
    method.training_step(Batch(normal(256, 3), {}, {}, StepRandom(0, 0, range(256))))
    plain = torch.arange(12, 0, -1, dtype=torch.float64) / 12
    of_teacher, of_student = (times.unique().flip(0) for times in (torch.cat(asked[:3]), asked[3]))
    assert_close(of_teacher, 3 * plain / (1 + 2 * plain), rtol=0, atol=1e-12)
    assert_close(of_student, of_teacher[::3], rtol=0, atol=1e-12)
