"""What the transformers that predict a flow share (arXiv 2403.03206): Stable Diffusion 3 and Flux.

The stock schedulers of these checkpoints shift their times, some by the size of the image. That belongs to the sampler:
a network's time is sigma, and grids are shifted by whoever makes them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..batch import Cond
from ..diffusion.schedule import Flow
from ..errors import InputError
from ..networks.denoiser import Denoiser
from . import text
from .autoencoder import Autoencoder
from .config import TeacherConfig
from .fingerprint import fingerprint
from .loading import load_pipeline, read_index
from .model import Model
from .schedules import from_scheduler

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class FlowTransformer(Denoiser, ABC):
    """A transformer of two streams, text and image, that predicts eps - x0.

    Args:
        net: the stock module.
        levels: the scheduler's num_train_timesteps, by which the networks' times are counted.
        blocks: the class names of the blocks, whose image stream is tapped by default.
    """

    def __init__(self, net: Any, levels: int, blocks: Sequence[str]) -> None:
        super().__init__(net, Flow(), "flow")
        self.levels = levels
        self.tap_points = tuple(name for name, module in net.named_modules() if type(module).__name__ in blocks)

    def native(self, t: Tensor, device: torch.device) -> Tensor:
        """The timestep of t [B], sigma times the levels, in float32 or better: half precision would round 749 to 748."""
        wide = torch.promote_types(torch.float32, self.dtype)
        return self.schedule.sigma(t).to(wide).to(device) * self.levels

    def tapped(self, name: str, output: Any) -> Any:
        """The image's tokens [B, N, D], which blocks return after those of the text."""
        return output[-1] if isinstance(output, tuple) else output

    def pooled(self, cond: Cond) -> Tensor:
        """The pooled text [B, P] that the network adds to its times."""
        return cond["pooled_prompt_embeds"]

    def checkpoint_activations(self, wanted: bool = True) -> None:
        module: Any = self.module
        if wanted:
            module.enable_gradient_checkpointing()


class FlowModel(Model, ABC):
    """A checkpoint in the parts of its stock pipeline.

    Args:
        pipeline: stock.
        name: path or hub id.
        denoiser: over the pipeline's transformer.
        side: of the latents of a square image at the size that the checkpoint was made for.
    """

    patch = 2  # the networks see 2 x 2 latents as one token
    denoiser: FlowTransformer

    def __init__(self, pipeline: Any, name: str, denoiser: FlowTransformer, side: int) -> None:
        self.name, self.parts, self.denoiser = name, pipeline, denoiser
        self.vae, self.autoencoder = pipeline.vae, Autoencoder(pipeline.vae)
        self.encoders = {n: m.requires_grad_(False).eval() for n, m in self._parts_named("text_encoder")}
        self.tokenizers = dict(self._parts_named("tokenizer"))
        self.resolution = side * pipeline.vae_scale_factor
        self.latent_shape = (pipeline.vae.config.latent_channels, side, side)
        self._empty: Cond | None = None

    def _parts_named(self, start: str) -> list[tuple[str, Any]]:
        parts = self.parts.components
        return [(name, parts[name]) for name in sorted(parts) if name.startswith(start) and parts[name] is not None]

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return self.denoiser.module, self.vae, *self.encoders.values()

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self.autoencoder.posterior(pixels)

    def decode(self, latents: Tensor) -> Tensor:
        return self.autoencoder.decode(latents)

    @property
    @abstractmethod
    def text_lengths(self) -> tuple[int, ...]:
        """Tokens of a prompt, by encoder."""

    def uncond(self, cond: Cond) -> Cond:
        """The encoding of "" in the place of the prompt's."""
        if self._empty is None:
            self._empty = self.encode_prompts([""])
        return text.replaced(cond, self._empty)

    def shift(self, latent_shape: tuple[int, ...]) -> float:
        """Of the stock scheduler, for latents (C, h, w): fixed, or as its dynamic shifting makes it of the number of tokens."""
        config = self.parts.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return float(config.get("shift", 1.0))
        first, last = config["base_image_seq_len"], config["max_image_seq_len"]
        tokens = (latent_shape[-2] // self.patch) * (latent_shape[-1] // self.patch)
        slope = (config["max_shift"] - config["base_shift"]) / (last - first)
        mu = config["base_shift"] + slope * (tokens - first)
        return float(math.exp(mu)) if config["time_shift_type"] == "exponential" else float(mu)

    def pipeline(self, student: Denoiser | None = None) -> DiffusionPipeline:
        denoiser = self.denoiser if student is None else student
        scheduler = type(self.parts.scheduler).from_config(self.parts.scheduler.config)
        pipeline: DiffusionPipeline = type(self.parts)(
            **{**self.parts.components, "transformer": denoiser.module, "scheduler": scheduler}
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def fingerprint(self) -> str:
        tokenizers = (text.facts(tokenizer) for tokenizer in self.tokenizers.values())
        return fingerprint((self.autoencoder.facts(), self.text_lengths, *tokenizers), *self.modules[1:])


def open_flow(cls: Any, path: str, config: TeacherConfig, classes: dict[str, Any], dtype: torch.dtype) -> Any:
    """The stock pipeline in a folder or hub id, with every weight from its files and without what it has for images.

    Text encoders that model_index.json has as null are left out. Raises InputError for a scheduler that is none of a flow.
    """
    index = read_index(path, config)
    absent = [name for name, part in index.items() if isinstance(part, list) and part[0] is None]
    absent += ["image_encoder", "feature_extractor"]
    present = {name: module for name, module in classes.items() if name not in absent}
    pipeline = load_pipeline(cls, path, config, present, dtype, **dict.fromkeys(absent))
    _, kind = from_scheduler(pipeline.scheduler.config)
    if kind != "flow":
        raise InputError(
            f"expected a flow-matching scheduler, got {pipeline.scheduler.config['_class_name']} in {config.path!r}; fix its "
            "scheduler/scheduler_config.json"
        )
    return pipeline


def check_widths(name: str, network: str, **pairs: tuple[int, int]) -> None:
    """InputError where a field of the transformer's config is not what the other parts make; field -> (has, needs)."""
    for field, (has, needs) in pairs.items():
        if has != needs:
            raise InputError(
                f"expected a {network} with {field} {needs}, as the other parts of {name!r} need it, got {has}; models for "
                "inpainting, depth or editing are not supported, nor parts of two models"
            )
