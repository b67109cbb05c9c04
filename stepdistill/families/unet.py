"""Stable Diffusion 1.x and 2.x: one text encoder, an f=8 autoencoder, a cross-attention UNet; eps or v prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..batch import Cond
from ..diffusion.schedule import Tabulated
from ..errors import InputError
from ..networks.denoiser import Denoiser
from . import text
from .autoencoder import Autoencoder
from .config import TeacherConfig
from .fingerprint import fingerprint
from .loading import load_pipeline, side
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
    """A UNet2DConditionModel with the text conditions of Stable Diffusion or of SDXL.

    Conditions: `prompt_embeds` [B, L, D]; for SDXL also `pooled_prompt_embeds` [B, P] and `time_ids` [B, 6]; `guidance` [B]
    where the network has an input for it.
    """

    lora_targets = LCM_TARGETS

    def __init__(self, net: Any, schedule: Tabulated, predicts: Any) -> None:
        from diffusers.models.attention import BasicTransformerBlock

        super().__init__(net, schedule, predicts)
        self.table = schedule
        self.takes_guidance = net.config.time_cond_proj_dim is not None
        self.takes_size = net.config.addition_embed_type == "text_time"
        self.tap_points = tuple(n for n, m in net.named_modules() if isinstance(m, BasicTransformerBlock))

    def call(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        dtype = self.dtype
        # native timesteps stay in float32: bfloat16 would round 999 to 1000 and 749 to 748
        timestep = self.table.index(t).to(torch.promote_types(torch.float32, dtype)).to(x_t.device)
        added = None
        if self.takes_size:  # sizes stay in float32 too: bfloat16 would round 1023 to 1024
            added = {"text_embeds": cond["pooled_prompt_embeds"].to(dtype), "time_ids": cond["time_ids"]}
        guidance = self._embedded(cond["guidance"]).to(x_t.device, dtype) if self.takes_guidance else None
        return self.net(
            x_t.to(dtype),
            timestep,
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            timestep_cond=guidance,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]

    def _embedded(self, guidance: Tensor) -> Tensor:
        module: Any = self.module
        w = guidance.cpu().double() - 1.0  # in float64, as the pipelines subtract: 8.1 - 1 is another float32
        return embed_guidance(w.float(), module.config.time_cond_proj_dim)

    def _add_guidance_input(self) -> None:
        module: Any = self.module
        projection = nn.Linear(GUIDANCE_CHANNELS, module.time_embedding.linear_1.in_features, bias=False)
        # zeros: at random, as a non-strict load leaves it, the student starts off the teacher
        nn.init.zeros_(projection.weight)
        module.time_embedding.cond_proj = projection.to(next(module.parameters()).device)
        module.register_to_config(time_cond_proj_dim=GUIDANCE_CHANNELS)
        self.takes_guidance = True

    def checkpoint_activations(self, wanted: bool = True) -> None:
        module: Any = self.module
        if wanted:
            module.enable_gradient_checkpointing()
            self.recomputes = True

    def pooled(self, cond: Cond) -> Tensor:
        """SDXL's pooled text; of one text encoder without it the mean of the prompt's states."""
        return cond["pooled_prompt_embeds"] if self.takes_size else cond["prompt_embeds"].mean(1)


def embed_guidance(w: Tensor, channels: int) -> Tensor:
    """Sinusoids of 1000 w, w = guidance_scale - 1: [B] -> [B, channels] float32 (arXiv 2310.04378, section 4.2).

    In float32 and in this order of operations, since the stock pipelines feed these very bits: 1000 w is large.
    """
    half = channels // 2
    rates = torch.exp(torch.arange(half, dtype=torch.float32) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = (w * 1000.0).float()[:, None] * rates[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def open_unet(pipeline: Any, name: str, addition: str | None) -> UNet:
    """The frozen denoiser of a stock pipeline; InputError where its network needs what the family doesn't give it.

    Args:
        pipeline: with `unet`, `vae` and `scheduler`.
        name: of the checkpoint, for messages.
        addition: the network's addition_embed_type: None, or "text_time" for SDXL.
    """
    schedule, predicts = from_scheduler(pipeline.scheduler.config)
    config = pipeline.unet.config
    if not isinstance(schedule, Tabulated):
        raise InputError(f"expected a UNet with a discrete noise table, got {pipeline.scheduler.config['_class_name']}")
    if config.time_cond_proj_dim is not None:
        raise InputError(
            f"expected an undistilled teacher, got {name!r} whose UNet has a guidance embedding (time_cond_proj_dim): "
            "it is a few-step model already; give --teacher.path the model it was distilled from"
        )
    if config.in_channels != pipeline.vae.config.latent_channels:
        raise InputError(
            f"expected a UNet that sees {pipeline.vae.config.latent_channels} channels of latents, got {name!r} whose UNet "
            f"takes {config.in_channels}: models for inpainting, depth or editing are not supported"
        )
    inputs = {
        "addition_embed_type": addition,
        "class_embed_type": None,
        "num_class_embeds": None,
        "encoder_hid_dim_type": None,
    }
    strange = {key: config[key] for key, value in inputs.items() if config[key] != value}
    if strange:
        raise InputError(
            f"expected a UNet with the inputs of {'Stable Diffusion' if addition is None else 'SDXL'}, got {name!r} with "
            f"{strange} in unet/config.json; this kind of model is not supported"
        )
    return UNet(pipeline.unet.requires_grad_(False).eval(), schedule, predicts)


class StableDiffusion(Model):
    """An SD 1.x / 2.x checkpoint, opened as a StableDiffusionPipeline."""

    denoiser: UNet

    def __init__(self, pipeline: StableDiffusionPipeline, name: str) -> None:
        self.name = name
        self.parts = pipeline
        self.autoencoder = Autoencoder(pipeline.vae)
        self.vae, self.tokenizer = pipeline.vae, pipeline.tokenizer
        self.text_encoder = pipeline.text_encoder.requires_grad_(False).eval()
        self.denoiser = open_unet(pipeline, name, addition=None)
        config = pipeline.unet.config
        size = side(config.sample_size, name)
        self.resolution = size * pipeline.vae_scale_factor
        self.latent_shape = (config.in_channels, size, size)
        self._empty: Cond | None = None

    @classmethod
    def load(cls, config: TeacherConfig, path: str, dtype: torch.dtype) -> StableDiffusion:
        """Opens a folder, hub id or single file; the denoiser and text encoder in `dtype`, the autoencoder in float32."""
        from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
        from transformers import CLIPTextModel

        classes = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
        parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = load_pipeline(StableDiffusionPipeline, path, config, classes, dtype, **parts)
        return cls(pipeline, config.path)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return self.denoiser.module, self.vae, self.text_encoder

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self.autoencoder.posterior(pixels)

    def decode(self, latents: Tensor) -> Tensor:
        return self.autoencoder.decode(latents)

    def _checkpoint_decoder(self) -> None:
        self.autoencoder.checkpoint_activations()

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Cond:
        tokens = text.tokenize(self.tokenizer, prompts)
        mask = tokens.attention_mask.to(self.device) if self._uses_mask() else None
        embeds = self.text_encoder(tokens.input_ids.to(self.device), attention_mask=mask)[0]
        return {"prompt_embeds": embeds.float()}

    def _uses_mask(self) -> bool:
        return bool(self.text_encoder.config.to_dict().get("use_attention_mask"))

    def uncond(self, cond: Cond) -> Cond:
        if self._empty is None:
            self._empty = self.encode_prompts([""])
        return text.replaced(cond, self._empty)

    def pipeline(self, student: Denoiser | None = None) -> StableDiffusionPipeline:
        from diffusers import StableDiffusionPipeline

        denoiser = self.denoiser if student is None else student
        pipeline = StableDiffusionPipeline(
            vae=self.vae, text_encoder=self.text_encoder, tokenizer=self.tokenizer, unet=denoiser.module,
            scheduler=type(self.parts.scheduler).from_config(self.parts.scheduler.config),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def fingerprint(self) -> str:
        facts = (self.autoencoder.facts(), self._uses_mask(), text.facts(self.tokenizer))
        return fingerprint(facts, self.vae, self.text_encoder)
