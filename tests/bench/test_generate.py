"""Images depend on (seed, prompt index, configuration) alone, through a stock pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_pipeline
from torch import nn

from stepdistill.bench.generate import denoiser_of, generate, initial_noise, step_generators
from stepdistill.bench.latency import count_evaluations
from stepdistill.errors import InputError

PROMPTS = ["a red disc", "a blue cross", "two", "nothing", "a cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(params=["DDIMScheduler", "LCMScheduler"])
def pipe(request: pytest.FixtureRequest, folder: Path) -> Any:
    return load(folder, request.param)


def load(folder: Path, scheduler: str) -> Any:
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    return pipe


def images(pipe: Any, prompts: list[str] = PROMPTS, **changes: Any) -> np.ndarray:
    return generate(pipe, prompts, **{"steps": 3, "guidance_scale": 2.0, "seed": 0, **changes})


def apart(a: np.ndarray, b: np.ndarray) -> int:
    """The largest difference in levels."""
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def test_form(pipe: Any) -> None:
    made = images(pipe)
    assert (made.dtype, made.shape) == (np.uint8, (5, 32, 32, 3))
    assert made.std() > 5


def test_images_are_those_the_pipeline_saves(pipe: Any) -> None:
    noise, draws = initial_noise((4, 4, 4), 0, range(5)), step_generators(0, range(5))
    made = pipe(PROMPTS, num_inference_steps=3, guidance_scale=2.0, latents=noise, generator=draws).images
    np.testing.assert_array_equal(images(pipe), np.stack([np.asarray(image) for image in made]))


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_batch_size_changes_nothing_but_rounding(pipe: Any, batch_size: int) -> None:
    assert apart(images(pipe, batch_size=batch_size), images(pipe, batch_size=5)) <= 1


def test_an_image_belongs_to_its_prompt_alone(pipe: Any) -> None:
    whole = images(pipe)
    assert apart(images(pipe, PROMPTS[3:4], start_index=3), whole[3:4]) <= 1
    others = images(pipe, [*PROMPTS[:3], "another", "one"])
    assert apart(others[:3], whole[:3]) <= 1
    assert apart(others[3:], whole[3:]) > 1


def test_deterministic_without_the_global_generators(pipe: Any) -> None:
    before = torch.get_rng_state()
    first = images(pipe)
    torch.testing.assert_close(torch.get_rng_state(), before)
    torch.manual_seed(99)
    np.testing.assert_array_equal(images(pipe), first)
    assert apart(images(pipe, seed=1), first) > 1


def first_inputs(pipe: Any, call: Callable[[], object]) -> torch.Tensor:
    """What the denoiser is given at the first step, of all batches."""
    seen: dict[int, list[torch.Tensor]] = {}

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.setdefault(int(args[1]), []).append(args[0].clone())

    handle = denoiser_of(pipe).register_forward_pre_hook(hook)
    try:
        call()
    finally:
        handle.remove()
    return torch.cat(seen[max(seen)])


def test_every_configuration_starts_from_the_same_noise(folder: Path) -> None:
    expected = initial_noise((4, 4, 4), 0, range(5))
    for scheduler, options in [
        ("DDIMScheduler", {"steps": 7, "guidance_scale": 1.0}),
        ("DDIMScheduler", {"steps": 1, "guidance_scale": 1.0, "batch_size": 2}),
        ("LCMScheduler", {"steps": 4, "guidance_scale": 1.0}),
        ("LCMScheduler", {"steps": 2, "guidance_scale": 1.0, "batch_size": 1}),
    ]:
        pipe = load(folder, scheduler)
        torch.testing.assert_close(
            first_inputs(pipe, lambda p=pipe, o=options: images(p, **o)), expected, atol=0, rtol=0
        )


def test_noise_is_standard_and_rows_differ() -> None:
    noise = initial_noise((4, 16, 16), 0, range(20))
    assert abs(float(noise.mean())) < 0.03 and abs(float(noise.std()) - 1) < 0.03
    assert float(torch.corrcoef(noise.flatten(1)).fill_diagonal_(0).abs().max()) < 0.15
    torch.testing.assert_close(initial_noise((4, 16, 16), 0, [13])[0], noise[13], atol=0, rtol=0)
    draws = torch.stack([torch.randn(1024, generator=g) for g in step_generators(0, range(20))])
    together = torch.corrcoef(torch.cat([draws, noise.flatten(1)])).fill_diagonal_(0)
    assert float(together.abs().max()) < 0.2


def test_exact_timesteps_are_run(folder: Path) -> None:
    pipe = load(folder, "LCMScheduler")
    seen: list[int] = []
    handle = denoiser_of(pipe).register_forward_pre_hook(lambda _module, args: seen.append(int(args[1])))
    images(pipe, timesteps=[999, 499], steps=2)
    handle.remove()
    assert seen == [999, 499]
    with pytest.raises(InputError, match="as many timesteps as steps"):
        images(pipe, timesteps=[999, 499], steps=3)


def test_guidance_costs_two_evaluations_a_step(folder: Path) -> None:
    pipe = load(folder, "DDIMScheduler")
    for guidance, samples in ((1.0, 15), (3.0, 30)):
        with count_evaluations(denoiser_of(pipe)) as count:
            images(pipe, guidance_scale=guidance, batch_size=2)
        assert (count.calls, count.samples) == (9, samples)  # 3 batches of 3 steps


def test_dropout_is_off_and_training_goes_on(pipe: Any) -> None:
    expected = images(pipe)
    pipe.unet.train()
    pipe.unet.mid_block.eval()
    for module in pipe.unet.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.9
    np.testing.assert_array_equal(images(pipe), expected)
    assert pipe.unet.training and pipe.unet.down_blocks.training
    assert not pipe.unet.mid_block.training and not pipe.vae.training


def test_the_progress_bar_is_off(pipe: Any, capfd: pytest.CaptureFixture[str]) -> None:
    images(pipe)
    assert capfd.readouterr() == ("", "")


def test_bfloat16_starts_from_the_same_noise_rounded(folder: Path) -> None:
    pipe = load(folder, "DDIMScheduler").to(torch.bfloat16)
    expected = initial_noise((4, 4, 4), 0, range(5)).bfloat16()
    seen = first_inputs(pipe, lambda: images(pipe, guidance_scale=1.0))
    torch.testing.assert_close(seen, expected, atol=0, rtol=0)


def test_other_sizes(folder: Path) -> None:
    assert images(load(folder, "DDIMScheduler"), height=48, width=64).shape == (5, 48, 64, 3)


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([], {}, "list of one or more prompts"),
        ("a cat", {}, "list of one or more prompts"),
        (PROMPTS, {"steps": 0}, "steps >= 1"),
        (PROMPTS, {"batch_size": 0}, "batch_size >= 1"),
    ],
)
def test_bad_requests(folder: Path, prompts: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        images(load(folder, "DDIMScheduler"), prompts, **changes)


def test_blacked_out_images_are_no_images(folder: Path) -> None:
    pipe = load(folder, "DDIMScheduler")
    pipe.run_safety_checker = lambda image, device, dtype: (image, [False, True])
    with pytest.raises(InputError, match="safety_checker=None"):
        images(pipe, PROMPTS[:2])
