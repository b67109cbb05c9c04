"""Stable Diffusion 1.x and 2.x: one text encoder, an f=8 autoencoder, a cross-attention UNet; eps or v prediction."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..batch import Cond
from ..diffusion.schedule import Tabulated
from ..errors import InputError
from ..networks.denoiser import Denoiser
from .config import TeacherConfig
from .loading import load_pipeline, load_vae
from .model import Model
from .schedules import from_scheduler

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

# The modules LCM-LoRA (arXiv 2311.05556) adapts: attention, feed-forward, residual blocks, resamplers, time projections
LCM_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip


GUIDANCE_CHANNELS = 256  # of the embedded guidance, as in the published LCMs


class UNet(Denoiser):
    """A UNet2DConditionModel; conditions: `prompt_embeds` [B, L, D], and `guidance` [B] where it has an input for it."""

    lora_targets = LCM_TARGETS

    def __init__(self, net: Any, schedule: Tabulated, predicts: Any) -> None:
        from diffusers.models.attention import BasicTransformerBlock

        super().__init__(net, schedule, predicts)
        self.table = schedule
        self.dtype = next(net.parameters()).dtype
        self.takes_guidance = net.config.time_cond_proj_dim is not None
        self.tap_points = tuple(n for n, m in net.named_modules() if isinstance(m, BasicTransformerBlock))

    def call(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        # native timesteps stay in float32: bfloat16 would round 999 to 1000 and 749 to 748
        timestep = self.table.index(t).to(torch.promote_types(torch.float32, self.dtype)).to(x_t.device)
        embeds = cond["prompt_embeds"].to(self.dtype)
        guidance = self._embedded(cond["guidance"]).to(x_t.device, self.dtype) if self.takes_guidance else None
        return self.net(
            x_t.to(self.dtype), timestep, encoder_hidden_states=embeds, timestep_cond=guidance, return_dict=False
        )[0]

    def _embedded(self, guidance: Tensor) -> Tensor:
        module: Any = self.module
        return embed_guidance(guidance.float().cpu() - 1.0, module.config.time_cond_proj_dim)

    def _add_guidance_input(self) -> None:
        module: Any = self.module
        projection = nn.Linear(GUIDANCE_CHANNELS, module.time_embedding.linear_1.in_features, bias=False)
        nn.init.zeros_(
            projection.weight
        )  # at random, as a non-strict load leaves it, the student starts off the teacher
        module.time_embedding.cond_proj = projection.to(next(module.parameters()).device)
        module.register_to_config(time_cond_proj_dim=GUIDANCE_CHANNELS)
        self.takes_guidance = True

    def full_student(self, embed_guidance: bool = False) -> UNet:
        student = super().full_student(embed_guidance)
        student.dtype = torch.float32
        return student

    def checkpoint_activations(self, wanted: bool = True) -> None:
        module: Any = self.module
        if wanted:
            module.enable_gradient_checkpointing()


def embed_guidance(w: Tensor, channels: int) -> Tensor:
    """Sinusoids of 1000 w, w = guidance_scale - 1: [B] -> [B, channels] float32 (arXiv 2310.04378, section 4.2).

    In float32 and in this order of operations, since the stock pipelines feed these very bits: 1000 w is large.
    """
    half = channels // 2
    rates = torch.exp(torch.arange(half, dtype=torch.float32) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = (w * 1000.0).float()[:, None] * rates[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class StableDiffusion(Model):
    """An SD 1.x / 2.x checkpoint, opened as a StableDiffusionPipeline."""

    denoiser: UNet

    def __init__(self, pipeline: StableDiffusionPipeline, name: str) -> None:
        self.name = name
        self.parts = pipeline
        self.vae, self.text_encoder, self.tokenizer = pipeline.vae, pipeline.text_encoder, pipeline.tokenizer
        for module in (pipeline.unet, self.vae, self.text_encoder):
            module.requires_grad_(False).eval()
        schedule, predicts = from_scheduler(pipeline.scheduler.config)
        if not isinstance(schedule, Tabulated):
            raise InputError(
                f"expected a UNet with a discrete noise table, got {pipeline.scheduler.config['_class_name']}"
            )
        config = pipeline.unet.config
        if config.time_cond_proj_dim is not None:
            raise InputError(
                f"expected an undistilled teacher, got {name!r} whose UNet has a guidance embedding (time_cond_proj_dim): "
                "it is a few-step model already; give --teacher.path the model it was distilled from"
            )
        self.denoiser = UNet(pipeline.unet, schedule, predicts)
        size = config.sample_size if isinstance(config.sample_size, int) else config.sample_size[0]
        self.resolution = size * pipeline.vae_scale_factor
        self.latent_shape = (config.in_channels, size, size)
        self._empty: Tensor | None = None

    @classmethod
    def load(cls, config: TeacherConfig, path: str, dtype: torch.dtype) -> StableDiffusion:
        """Opens a folder, hub id or single file; the denoiser and text encoder in `dtype`, the autoencoder in float32."""
        from diffusers import StableDiffusionPipeline

        pipeline = load_pipeline(StableDiffusionPipeline, path, config, dtype, safety_checker=None)
        if config.vae is not None:
            pipeline.register_modules(vae=load_vae(config.vae))
        if pipeline.vae.dtype != torch.float32:
            pipeline.vae.to(torch.float32)
        return cls(pipeline, config.path)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.vae.parameters()).device

    def to(self, device: Any) -> StableDiffusion:
        for module in (self.denoiser.module, self.vae, self.text_encoder):
            module.to(device)
        return self

    @torch.no_grad()
    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        distribution = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist
        shift = self.vae.config.shift_factor or 0.0
        mean = (distribution.mean.float() - shift) * self.vae.config.scaling_factor
        return mean, distribution.std.float() * self.vae.config.scaling_factor

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Cond:
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        mask = tokens.attention_mask.to(self.device) if self._uses_mask() else None
        embeds = self.text_encoder(tokens.input_ids.to(self.device), attention_mask=mask)[0]
        return {"prompt_embeds": embeds.float()}

    def _uses_mask(self) -> bool:
        return bool(self.text_encoder.config.to_dict().get("use_attention_mask"))

    def uncond(self, cond: Cond) -> Cond:
        if self._empty is None:
            self._empty = self.encode_prompts([""])["prompt_embeds"]
        embeds = cond["prompt_embeds"]
        return {**cond, "prompt_embeds": self._empty.to(embeds).expand_as(embeds)}

    def decode(self, latents: Tensor) -> Tensor:
        shift = self.vae.config.shift_factor or 0.0
        z = latents.to(self.vae.dtype) / self.vae.config.scaling_factor + shift
        return self.vae.decode(z, return_dict=False)[0]

    def pipeline(self, student: Denoiser | None = None) -> StableDiffusionPipeline:
        from diffusers import StableDiffusionPipeline

        unet = self.denoiser.module if student is None else student.module
        pipeline = StableDiffusionPipeline(
            vae=self.vae, text_encoder=self.text_encoder, tokenizer=self.tokenizer, unet=unet,
            scheduler=type(self.parts.scheduler).from_config(self.parts.scheduler.config),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        scale, shift = self.vae.config.scaling_factor, self.vae.config.shift_factor
        digest.update(repr((scale, shift, self._uses_mask(), self.tokenizer.model_max_length)).encode())
        digest.update(repr(sorted(self.tokenizer.get_vocab().items())).encode())
        for module in (self.vae, self.text_encoder):
            for name, value in sorted(module.state_dict().items()):
                digest.update(name.encode())
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()
