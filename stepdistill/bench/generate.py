"""Images of a stock Diffusers pipeline, with noise that belongs to the prompt: f(seed, index of the prompt).

Every configuration of every model then starts from the same noise, whatever its batch size, dtype or device, so that images
compare pairwise and a difference in quality is one of the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from ..families.flux import pack
from ..randomness import derived_seed, generator
from .features import Images

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


SIDES = ("height", "width")


def denoiser_of(pipe: DiffusionPipeline) -> nn.Module:
    """The network that is run at every step: the pipeline's `unet` or `transformer`."""
    parts = pipe.components
    network = parts.get("unet") or parts.get("transformer")
    if not isinstance(network, nn.Module):
        raise InputError(
            f"expected a pipeline with a unet or a transformer, got parts {sorted(parts)}; use another pipeline"
        )
    return network


def initial_noise(shape: Sequence[int], seed: int, indices: Sequence[int]) -> Tensor:
    """N(0, 1) of shape [B, *shape] float32 on the CPU, one row a prompt index."""
    rows = [generator(seed, "bench/latents", i).standard_normal(tuple(shape), dtype=np.float32) for i in indices]
    return torch.from_numpy(np.stack(rows))


def step_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """One generator a prompt, for schedulers that add noise between steps (LCM)."""
    return [torch.Generator().manual_seed(derived_seed(seed, "bench/steps", i)) for i in indices]


@contextmanager
def _evaluating(pipe: DiffusionPipeline) -> Iterator[None]:
    """Dropout and the like off in every part; the modes are put back afterwards, a training may go on."""
    modules = [m for part in pipe.components.values() if isinstance(part, nn.Module) for m in part.modules()]
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


@contextmanager
def _drawing(scheduler: Any, draws: list[torch.Generator]) -> Iterator[None]:
    """Within it the noise between steps comes from `draws`: pipelines of flow models hand their generators to no step."""
    step, shadow = scheduler.step, vars(scheduler).get("step")
    flow = type(scheduler).__name__.startswith("FlowMatch")
    if not flow or "generator" not in inspect.signature(step).parameters:
        yield
        return

    @wraps(step)
    def drawn(*args: Any, **kwargs: Any) -> Any:
        return step(*args, **{"generator": draws, **kwargs})

    scheduler.step = drawn
    try:
        yield
    finally:
        if shadow is None:
            del scheduler.step
        else:
            scheduler.step = shadow


def _check(
    prompts: Sequence[str], steps: int, timesteps: Sequence[int] | None, batch_size: int, start_index: int
) -> None:
    if isinstance(prompts, str) or not len(prompts):
        raise InputError("expected a list of one or more prompts, got a single string or none; pass a list")
    if steps < 1 or batch_size < 1 or start_index < 0:
        raise InputError(
            f"expected steps >= 1, batch_size >= 1 and start_index >= 0, got {steps}, {batch_size} and {start_index}; "
            "raise what is too small"
        )
    if timesteps is not None and len(timesteps) != steps:
        raise InputError(f"expected as many timesteps as steps, got {len(timesteps)} and {steps}; make them agree")


def generate(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance_scale: float,
    seed: int,
    batch_size: int = 50,
    timesteps: Sequence[int] | None = None,
    start_index: int = 0,
    **options: Any,
) -> Images:
    """One image a prompt: uint8 [N, H, W, 3], in the order of the prompts.

    Args:
        pipe: a stock pipeline that takes `latents` [B, C, h, w]. Its progress bar is switched off and stays off.
        prompts: N of them.
        steps: number of denoising steps; where `timesteps` are given, their number.
        guidance_scale: as the pipeline reads it (1 is no guidance).
        seed: initial noise and noise between steps are functions of (seed, prompt index), nothing else.
        batch_size: prompts a call; changes the images by rounding only.
        timesteps: the scheduler's own timesteps, for students that need exact ones.
        start_index: the index of the first prompt, to generate a long list in parts.
        options: passed on to the pipeline (negative_prompt, height, ...).

    Raises:
        InputError: no prompts, steps or batch_size < 1, a safety checker that blacked images out, or pixels that are nan.
    """
    _check(prompts, steps, timesteps, batch_size, start_index)
    pipe.set_progress_bar_config(disable=True)
    network = denoiser_of(pipe)
    call: Any = pipe  # the base class declares no __call__
    shape, dtype = latent_shape(network, pipe, options), next(network.parameters()).dtype
    schedule: dict[str, Any] = {"num_inference_steps": steps} if timesteps is None else {"timesteps": list(timesteps)}
    if _is_packed(network):  # and doesn't see the size of what it is given
        options |= {name: side * int(pipe.vae_scale_factor) for name, side in zip(SIDES, shape[1:], strict=True)}
    images = []
    with _evaluating(pipe):
        for first in range(0, len(prompts), batch_size):
            batch = list(prompts[first : first + batch_size])
            indices = range(start_index + first, start_index + first + len(batch))
            noise, draws = initial_noise(shape, seed, indices).to(dtype), step_generators(seed, indices)
            with _drawing(pipe.scheduler, draws):
                output = call(
                    prompt=batch,
                    guidance_scale=guidance_scale,
                    latents=pack(noise) if _is_packed(network) else noise,
                    generator=draws,
                    output_type="np",
                    **schedule,
                    **options,
                )
            images.append(_bytes(output))
    return np.concatenate(images)


def _bytes(output: Any) -> Images:
    """A pipeline's float images as Diffusers makes its PIL images of them."""
    if any(output.get("nsfw_content_detected") or ()):
        raise InputError("expected images, got some blacked out by a safety checker; load with safety_checker=None")
    if not np.isfinite(output.images).all():
        raise InputError(
            "expected finite pixels, got nan or inf; sample in another precision, e.g. --dtype fp32 or bf16"
        )
    images: Images = (output.images * 255).round().astype(np.uint8)
    return images


def latent_shape(network: nn.Module, pipe: DiffusionPipeline, options: dict[str, Any]) -> tuple[int, int, int]:
    """(C, h, w) of the latents: the network's own sample size, or the height and width asked for."""
    config: dict[str, Any] = dict(network.config)  # type: ignore[arg-type]
    factor, packed = pipe.vae_scale_factor, _is_packed(network)
    size = pipe.vae.config["sample_size"] // factor if packed else config["sample_size"]
    h, w = (size, size) if isinstance(size, int) else size
    h, w = options.get("height", h * factor) // factor, options.get("width", w * factor) // factor
    if packed:
        return config["in_channels"] // 4, h - h % 2, w - w % 2
    return config["in_channels"], h, w


def _is_packed(network: nn.Module) -> bool:
    """Whether the network is Flux's, which takes four latents as one token, and whose config names no size."""
    return type(network).__name__ == "FluxTransformer2DModel"
