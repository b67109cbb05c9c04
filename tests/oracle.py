"""Every family with a tiny checkpoint of it and the stock sampler that it is compared with."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_pipeline
from tiny_pixels import tiny_pixels
from tiny_sdxl import tiny_sdxl
from torch import Tensor

from stepdistill.batch import concat
from stepdistill.diffusion.guidance import guide_scale
from stepdistill.diffusion.solver import sample
from stepdistill.families import Model, TeacherConfig, load
from stepdistill.networks.denoiser import Denoiser

STEPS = 4
TIMESTEPS = (999, 749, 499, 249)  # trailing


@dataclass(frozen=True)
class Family:
    """A kind of checkpoint.

    Attributes:
        make: writes a tiny one into a folder.
        prompts: that it is sampled with.
        guidance: scale that it is sampled with; None where there is no guidance.
        latent: whether it has an autoencoder and text encoders.
        classes: whether it takes class labels, for which there is no stock pipeline.
    """

    make: Callable[[Path], Path]
    prompts: tuple[str, str] = ("a red circle", "b")
    guidance: float | None = 5.0
    latent: bool = True
    classes: bool = False


def _v(make: Callable[..., Path], **options: Any) -> Callable[[Path], Path]:
    return functools.partial(make, prediction_type="v_prediction", **options)


FAMILIES = {
    "sd-eps": Family(tiny_pipeline),
    "sd-v": Family(_v(tiny_pipeline)),
    "sd-v-ztsnr": Family(_v(tiny_pipeline, rescale_betas_zero_snr=True)),
    "sdxl-eps": Family(tiny_sdxl),
    "sdxl-v-encodes-the-empty-prompt": Family(_v(tiny_sdxl, zeros=False)),
    "pixels": Family(tiny_pixels, guidance=None, latent=False),
    "pixels-grey-x0": Family(
        functools.partial(tiny_pixels, channels=1, prediction_type="sample", pipeline="DDIMPipeline"),
        guidance=None, latent=False,
    ),
    "pixels-classes": Family(
        functools.partial(tiny_pixels, classes=5), prompts=("3", "0"), guidance=None, latent=False, classes=True
    ),
}  # fmt: skip


@functools.cache
def _loaded(folder: Path, dtype: torch.dtype) -> Model:
    return load(TeacherConfig(str(folder)), dtype)


def opened(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The checkpoint, opened; a copy of its own for each caller."""
    return copy.deepcopy(_loaded(folder, dtype))


@functools.cache
def stock(folder: Path) -> Any:
    """The pipeline as Diffusers opens it."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@contextmanager
def calls(unet: torch.nn.Module) -> Iterator[list[dict[str, Tensor]]]:
    """What a UNet is called with meanwhile: the tensors by name, one dictionary a call; absent inputs are left out."""
    seen: list[dict[str, Tensor]] = []

    def keep(_module: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        given = {"sample": args[0], "timestep": args[1], **kwargs, **(kwargs.get("added_cond_kwargs") or {})}
        seen.append({k: v.detach().clone() for k, v in given.items() if isinstance(v, Tensor)})

    hook = unet.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


@dataclass
class Run:
    """A sampling run: what the network was called with, and what came out ([B, C, H, W] latents, [B, C, H, W] images)."""

    calls: list[dict[str, Tensor]]
    latents: Tensor
    images: Tensor


def trailing(pipeline: Any) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")


@torch.no_grad()
def stock_run(family: Family, folder: Path, x_t: Tensor) -> Run:
    """A few DDIM steps of the stock pipeline from x_t; of UNet2DModel itself where no stock pipeline takes labels."""
    from diffusers import DDIMPipeline

    pipeline = stock(folder)
    scheduler = trailing(pipeline)
    ends: list[Tensor] = []
    step = scheduler.step

    def kept(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        ends.append(result[0] if isinstance(result, tuple) else result.prev_sample)
        return result

    scheduler.step = kept
    with calls(pipeline.unet) as seen:
        if family.latent:
            sampler = type(pipeline)(**{**pipeline.components, "scheduler": scheduler}, **_options(pipeline))
            sampler.set_progress_bar_config(disable=True)
            images = sampler(
                list(family.prompts), num_inference_steps=STEPS, guidance_scale=family.guidance, latents=x_t.clone(),
                output_type="pt",
            ).images  # fmt: skip
        elif family.classes:
            x, labels = x_t, torch.tensor([int(p) for p in family.prompts])
            scheduler.set_timesteps(STEPS)
            for t in scheduler.timesteps:
                x = scheduler.step(pipeline.unet(x, t, class_labels=labels).sample, t, x).prev_sample
            images = (x / 2 + 0.5).clamp(0, 1)
        else:
            sampler = DDIMPipeline(pipeline.unet, scheduler)  # makes a scheduler of its own
            sampler.scheduler = scheduler
            sampler.set_progress_bar_config(disable=True)
            generator = torch.Generator().manual_seed(0)  # draws what normal(...) draws
            images = sampler(len(x_t), generator, num_inference_steps=STEPS, output_type="pt").images
    return Run(seen, ends[-1], images)


def _options(pipeline: Any) -> dict[str, Any]:
    given = {"requires_safety_checker": False, "force_zeros_for_empty_prompt": None, "add_watermarker": None}
    return {k: pipeline.config.get(k, v) for k, v in given.items() if k in pipeline.config}


@torch.no_grad()
def our_run(family: Family, model: Model, denoiser: Denoiser, x_t: Tensor) -> Run:
    """The same with what stepdistill makes of the checkpoint."""
    ends_at_table = not trailing(stock(Path(model.name))).config.set_alpha_to_one
    cond = model.conditions(family.prompts)
    uncond = model.uncond(cond)

    def denoise(x: Tensor, t: Tensor) -> Any:
        if family.guidance is None:
            assert uncond == {}
            return denoiser(x, t, cond)
        without, prompted = denoiser(torch.cat([x, x]), torch.cat([t, t]), concat(uncond, cond)).chunk(2)
        return guide_scale(prompted, without, torch.full((len(x),), family.guidance))

    grid = denoiser.table.time(torch.tensor([*TIMESTEPS, 0 if ends_at_table else -1]))
    with calls(denoiser.module) as seen:
        latents = sample(denoise, denoiser.schedule, x_t, grid)
    return Run(seen, latents, (model.decode(latents) / 2 + 0.5).clamp(0, 1))
