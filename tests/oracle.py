"""Every family with a tiny checkpoint of it and the stock sampler that it is compared with."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_pipeline
from tiny_flux import tiny_flux
from tiny_pixels import tiny_pixels
from tiny_sd3 import tiny_sd3
from tiny_sdxl import tiny_sdxl
from torch import Tensor

from stepdistill.batch import concat
from stepdistill.diffusion.guidance import guide_scale
from stepdistill.diffusion.solver import sample
from stepdistill.families import Model, TeacherConfig, load
from stepdistill.networks.denoiser import Denoiser

STEPS = 4
TIMESTEPS = (999, 749, 499, 249)  # trailing
SIGMAS = (1.0, 0.9, 0.749, 0.3)  # of flows


@dataclass(frozen=True)
class Family:
    """A kind of checkpoint.

    Attributes:
        make: writes a tiny one into a folder.
        prompts: that it is sampled with.
        guidance: scale that it is sampled with; None where there is no guidance.
        latent: whether it has an autoencoder and text encoders.
        classes: whether it takes class labels, for which there is no stock pipeline.
        flow: whether it is a transformer that predicts a flow.
        told: whether it has its guidance in it, and is told the scale.
        thousands: what its network counts times in, where it is a flow's.
    """

    make: Callable[[Path], Path]
    prompts: tuple[str, str] = ("a red circle", "b")
    guidance: float | None = 5.0
    latent: bool = True
    classes: bool = False
    flow: bool = False
    told: bool = False
    thousands: float = 1.0

    @property
    def rows(self) -> int:
        """Of the network's batch for one image with guidance."""
        return 1 if self.guidance is None or self.told else 2

    def native(self, k: int) -> Tensor:
        """What the network is told as its time at the k-th step."""
        return torch.tensor(SIGMAS[k]) * 1000 / self.thousands if self.flow else torch.tensor(float(TIMESTEPS[k]))


def _v(make: Callable[..., Path], **options: Any) -> Callable[[Path], Path]:
    return functools.partial(make, prediction_type="v_prediction", **options)


FAMILIES = {
    "sd-eps": Family(tiny_pipeline),
    "sd-v": Family(_v(tiny_pipeline)),
    "sd-v-ztsnr": Family(_v(tiny_pipeline, rescale_betas_zero_snr=True)),
    "sdxl-eps": Family(tiny_sdxl),
    "sdxl-v-encodes-the-empty-prompt": Family(_v(tiny_sdxl, zeros=False)),
    "sd3": Family(tiny_sd3, flow=True),
    "sd3.5-without-t5": Family(functools.partial(tiny_sd3, with_t5=False, new=True), flow=True),
    "flux": Family(tiny_flux, flow=True, told=True, thousands=1000.0),
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

    index = json.loads((folder / "model_index.json").read_text())
    absent = [name for name, part in index.items() if part == [None, None]]
    pipeline = DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(absent))
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            # on some CPUs kernels of weights that may train, or lie unaligned in a mapped file, round in another way
            for weight in part.requires_grad_(False).parameters():
                weight.data = weight.data.clone()
    return pipeline


def network(pipeline: Any) -> Any:
    """The denoiser of a stock pipeline."""
    return pipeline.components.get("unet") or pipeline.transformer


@torch.no_grad()
def encoded(pipeline: Any, prompts: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(conditions, those without a prompt) of the stock pipeline's own encode_prompt; the latter {} where it has none."""
    name, options = type(pipeline).__name__, {"device": "cpu", "num_images_per_prompt": 1}
    keys = ("prompt_embeds", "pooled_prompt_embeds")
    if name == "FluxPipeline":
        return dict(zip(keys, pipeline.encode_prompt(prompts, **options)[:2], strict=True)), {}
    others = {"prompt_2": None, "prompt_3": None} if name == "StableDiffusion3Pipeline" else {}
    found = pipeline.encode_prompt(prompts, **others, **options, do_classifier_free_guidance=True)
    return dict(zip(keys, found[::2], strict=False)), dict(zip(keys, found[1::2], strict=False))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@contextmanager
def calls(unet: torch.nn.Module) -> Iterator[list[dict[str, Tensor]]]:
    """What a network is called with meanwhile: the tensors by name, one dictionary a call; absent inputs are left out."""
    seen: list[dict[str, Tensor]] = []

    def keep(_module: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("sample", "timestep"), args, strict=False)) | kwargs | (kwargs.get("added_cond_kwargs") or {})
        if "hidden_states" in given:
            given["sample"] = given.pop("hidden_states")
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
    """The stock scheduler that visits TIMESTEPS or, where it is handed them, SIGMAS."""
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    if "use_dynamic_shifting" in pipeline.scheduler.config:
        return FlowMatchEulerDiscreteScheduler(shift=1.0)
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
    with calls(network(pipeline)) as seen:
        if family.latent:
            sampler = type(pipeline)(**{**pipeline.components, "scheduler": scheduler}, **_options(pipeline))
            sampler.set_progress_bar_config(disable=True)
            told = {"sigmas": list(SIGMAS)} if family.flow else {"num_inference_steps": STEPS}
            if packs(pipeline):
                x_t, told = pipeline._pack_latents(x_t, *x_t.shape), told | {"height": 32, "width": 32}
            images = sampler(
                list(family.prompts), guidance_scale=family.guidance, latents=x_t.clone(), output_type="pt", **told
            ).images
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
    latents = pipeline._unpack_latents(ends[-1], 32, 32, 8) if packs(pipeline) else ends[-1]
    return Run(seen, latents, images)


def packs(pipeline: Any) -> bool:
    """Whether the pipeline takes packed latents."""
    return type(pipeline).__name__ == "FluxPipeline"


def _options(pipeline: Any) -> dict[str, Any]:
    given = {"requires_safety_checker": False, "force_zeros_for_empty_prompt": None, "add_watermarker": None}
    return {k: pipeline.config.get(k, v) for k, v in given.items() if k in pipeline.config}


@torch.no_grad()
def our_run(family: Family, model: Model, denoiser: Denoiser, x_t: Tensor) -> Run:
    """The same with what stepdistill makes of the checkpoint."""
    cond = model.conditions(family.prompts)
    uncond = model.uncond(cond)
    if family.told:
        cond = denoiser.tell(cond, torch.full((len(x_t),), family.guidance, dtype=torch.float64) - 1.0)

    def denoise(x: Tensor, t: Tensor) -> Any:
        if family.rows == 1:
            assert uncond == {}
            return denoiser(x, t, cond)
        without, prompted = denoiser(torch.cat([x, x]), torch.cat([t, t]), concat(uncond, cond)).chunk(2)
        return guide_scale(prompted, without, torch.full((len(x),), family.guidance))

    if family.flow:
        grid = torch.tensor([*SIGMAS, 0.0], dtype=torch.float64)
    else:
        ends_at_table = not trailing(stock(Path(model.name))).config.set_alpha_to_one
        grid = denoiser.table.time(torch.tensor([*TIMESTEPS, 0 if ends_at_table else -1]))
    with calls(denoiser.module) as seen:
        latents = sample(denoise, denoiser.schedule, x_t, grid)
    return Run(seen, latents, (model.decode(latents) / 2 + 0.5).clamp(0, 1))
