"""Stable Diffusion XL (arXiv 2307.01952): two text encoders, and a UNet that is told the size and the crop of its images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..batch import Cond
from ..errors import InputError
from ..networks.denoiser import Denoiser
from . import text
from .autoencoder import Autoencoder
from .config import TeacherConfig
from .fingerprint import fingerprint
from .loading import is_single_file, load_pipeline, read_index, side
from .model import Model
from .unet import UNet, open_unet

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

SIZES = 6  # numbers in time_ids; the refiner has 5, an aesthetic score in place of the target size
ENCODERS = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
BASE = "refiners are not supported; give --teacher.path a base model such as stabilityai/stable-diffusion-xl-base-1.0"


class StableDiffusionXL(Model):
    """An SDXL base checkpoint, opened as a StableDiffusionXLPipeline."""

    denoiser: UNet

    def __init__(self, pipeline: StableDiffusionXLPipeline, name: str) -> None:
        self.name = name
        self.parts = pipeline
        self.autoencoder = Autoencoder(pipeline.vae)
        self.vae = pipeline.vae
        self.encoders = tuple(m.requires_grad_(False).eval() for m in (pipeline.text_encoder, pipeline.text_encoder_2))
        self.tokenizers = (pipeline.tokenizer, pipeline.tokenizer_2)
        self.zeros_for_empty = bool(pipeline.config["force_zeros_for_empty_prompt"])
        self.denoiser = open_unet(pipeline, name, addition="text_time")
        config = pipeline.unet.config
        added, given = config.projection_class_embeddings_input_dim, pipeline.text_encoder_2.config.projection_dim
        if added != SIZES * config.addition_time_embed_dim + given:
            raise InputError(
                f"expected an SDXL base model, got {name!r} whose UNet takes {added} numbers besides the prompt and not "
                f"{SIZES} x {config.addition_time_embed_dim} of sizes and {given} of pooled text: {BASE}"
            )
        size = side(config.sample_size, name)
        self.resolution = size * pipeline.vae_scale_factor
        self.latent_shape = (config.in_channels, size, size)
        self._empty: Cond | None = None

    @classmethod
    def load(cls, config: TeacherConfig, path: str, dtype: torch.dtype) -> StableDiffusionXL:
        """Opens a folder, hub id or single file; denoiser and text encoders in `dtype`, the autoencoder in float32."""
        from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        if not is_single_file(path):
            _check_base(read_index(path, config), config.path)
        classes = {
            "unet": UNet2DConditionModel, "vae": AutoencoderKL,
            "text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection,
        }  # fmt: skip
        pipeline = load_pipeline(
            StableDiffusionXLPipeline, path, config, classes, dtype, add_watermarker=False, image_encoder=None
        )
        return cls(pipeline, config.path)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return self.denoiser.module, self.vae, *self.encoders

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self.autoencoder.posterior(pixels)

    def decode(self, latents: Tensor) -> Tensor:
        return self.autoencoder.decode(latents)

    def _checkpoint_decoder(self) -> None:
        self.autoencoder.checkpoint_activations()

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Cond:
        """`prompt_embeds` [B, L, D1 + D2], the last states but one of both; `pooled_prompt_embeds` [B, P] of the second."""
        first, second = (text.clip(e, t, prompts) for e, t in zip(self.encoders, self.tokenizers, strict=True))
        embeds = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return {"prompt_embeds": embeds.float(), "pooled_prompt_embeds": second.text_embeds.float()}

    def uncond(self, cond: Cond) -> Cond:
        """Zeros where the checkpoint says force_zeros_for_empty_prompt, else the encoding of ""; sizes stay."""
        if self._empty is None:
            empty = self.encode_prompts([""])
            self._empty = {k: torch.zeros_like(v) for k, v in empty.items()} if self.zeros_for_empty else empty
        return text.replaced(cond, self._empty)

    def size_cond(
        self, original: Sequence[tuple[int, int]], crop: Sequence[tuple[int, int]], target: Sequence[tuple[int, int]]
    ) -> Cond:
        """`time_ids` [B, 6]: original height and width, top and left of the crop, height and width aimed at."""
        rows = [(*o, *c, *t) for o, c, t in zip(original, crop, target, strict=True)]
        return {"time_ids": torch.tensor(rows, dtype=torch.float32, device=self.device)}

    def pipeline(self, student: Denoiser | None = None) -> StableDiffusionXLPipeline:
        from diffusers import StableDiffusionXLPipeline

        denoiser = self.denoiser if student is None else student
        parts: dict[str, Any] = {name: self.parts.components[name] for name in ENCODERS}
        pipeline = StableDiffusionXLPipeline(
            vae=self.vae, unet=denoiser.module, **parts,
            scheduler=type(self.parts.scheduler).from_config(self.parts.scheduler.config),
            force_zeros_for_empty_prompt=self.zeros_for_empty, add_watermarker=False,
        )  # fmt: skip
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def fingerprint(self) -> str:
        facts = (self.autoencoder.facts(), *(text.facts(tokenizer) for tokenizer in self.tokenizers))
        return fingerprint(facts, self.vae, *self.encoders)


def _check_base(index: dict[str, Any], name: str) -> None:
    """InputError for a refiner, by what its model_index.json says."""
    missing = [part for part in ENCODERS if (index.get(part) or [None])[0] is None]
    if missing:
        raise InputError(f"expected SDXL with two text encoders, got {name!r} without {' and '.join(missing)}: {BASE}")
    if index.get("requires_aesthetics_score"):
        raise InputError(f"expected SDXL without aesthetic scores, got {name!r} that asks for them: {BASE}")
