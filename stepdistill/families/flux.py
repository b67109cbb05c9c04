"""Flux (Black Forest Labs, 2024): a CLIP and a T5, and a transformer over packed latents that predicts the flow.

The weights of dev hold classifier-free guidance, and are told its scale (arXiv 2210.03142): one evaluation a step, and no
"no prompt". Checkpoints without that input are guided by two evaluations, as the stock pipeline does with a negative prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..batch import Cond
from ..errors import InputError
from . import text
from .config import TeacherConfig
from .flow import FlowModel, FlowTransformer, check_widths, open_flow

# attention and feed-forward of both streams, and of the blocks of one stream
FLUX_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out",
)  # fmt: skip
T5_LENGTH = 512  # tokens, the stock pipeline's default
GUIDANCE = 3.5  # the stock pipeline's default
THOUSAND = 1000  # what the stock pipeline divides times by and the network multiplies them with


class FluxTransformer(FlowTransformer):
    """A FluxTransformer2DModel.

    Conditions: `prompt_embeds` [B, L, D], `pooled_prompt_embeds` [B, P]; `guidance` [B], the guidance_scale, where the network
    has an input for it, 3.5 unless it is given.
    """

    lora_targets = FLUX_TARGETS

    def __init__(self, net: Any, levels: int) -> None:
        super().__init__(net, levels, ("FluxTransformerBlock", "FluxSingleTransformerBlock"))
        self.takes_guidance = bool(net.config.guidance_embeds)

    def call(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        dtype, (height, width) = self.dtype, x_t.shape[-2:]
        time, embeds = self.native(t, x_t.device) / THOUSAND, cond["prompt_embeds"].to(dtype)
        with self._exactly(time):
            packed: Tensor = self.net(
                hidden_states=pack(x_t.to(dtype)),
                timestep=time,
                guidance=self._scale(cond, x_t) if self.takes_guidance else None,
                pooled_projections=cond["pooled_prompt_embeds"].to(dtype),
                encoder_hidden_states=embeds,
                txt_ids=x_t.new_zeros(embeds.shape[1], 3, dtype=torch.float32),
                img_ids=positions(height // 2, width // 2).to(x_t.device),
                return_dict=False,
            )[0]
        return unpack(packed, height, width)

    def _scale(self, cond: Cond, x_t: Tensor) -> Tensor:
        if "guidance" not in cond:
            return torch.full((len(x_t),), GUIDANCE, dtype=torch.float32, device=x_t.device)
        return cond["guidance"].to(torch.float32).to(x_t.device)

    @contextmanager
    def _exactly(self, time: Tensor) -> Iterator[None]:
        """Within it the network embeds `time` as it is; by itself it casts times to half precision first, if it is in that."""
        module: Any = self.module

        def given(_module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return time * THOUSAND, *inputs[1:]

        handle = module.time_text_embed.register_forward_pre_hook(given)
        try:
            yield
        finally:
            handle.remove()


def pack(x: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, (h/2)(w/2), 4C], a token for each 2 x 2 latents; ValueError for odd sides."""
    b, c, h, w = x.shape
    if h % 2 or w % 2:
        raise ValueError(f"expected latents of even height and width, got {h} x {w}; use a multiple of 16 pixels")
    return x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, (h // 2) * (w // 2), 4 * c)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of :func:`pack`: [B, (h/2)(w/2), 4C] -> [B, C, h, w]."""
    b, _, c = tokens.shape
    return (
        tokens.reshape(b, height // 2, width // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, -1, height, width)
    )


def positions(rows: int, columns: int) -> Tensor:
    """[rows * columns, 3] float32 (0, row, column) of each token; text is at (0, 0, 0)."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3).float()


class Flux(FlowModel):
    """A Flux checkpoint, opened as a FluxPipeline."""

    usual_guidance = GUIDANCE

    def __init__(self, pipeline: Any, name: str) -> None:
        net, vae = pipeline.transformer, pipeline.vae
        check_widths(
            name,
            "FluxTransformer2DModel",
            in_channels=(net.config.in_channels, 4 * vae.config.latent_channels),
            out_channels=(net.out_channels, 4 * vae.config.latent_channels),
            pooled_projection_dim=(net.config.pooled_projection_dim, pipeline.text_encoder.config.hidden_size),
            joint_attention_dim=(net.config.joint_attention_dim, pipeline.text_encoder_2.config.d_model),
        )
        # the transformer's config has no size of its own
        size, unit = vae.config.sample_size, 2 * pipeline.vae_scale_factor
        if not isinstance(size, int) or size % unit:
            raise InputError(
                f"expected a sample_size that is a multiple of {unit} in vae/config.json of {name!r}, got {size}; fix it "
                "(1024 is usual)"
            )
        levels = pipeline.scheduler.config["num_train_timesteps"]
        denoiser = FluxTransformer(net.requires_grad_(False).eval(), levels)
        super().__init__(pipeline, name, denoiser, size // pipeline.vae_scale_factor)

    @classmethod
    def load(cls, config: TeacherConfig, path: str, dtype: torch.dtype) -> Flux:
        """Opens a folder or hub id; transformer and text encoders in `dtype`, the autoencoder in float32."""
        from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
        from transformers import CLIPTextModel, T5EncoderModel

        classes = {
            "transformer": FluxTransformer2DModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel,
            "text_encoder_2": T5EncoderModel,
        }  # fmt: skip
        return cls(open_flow(FluxPipeline, path, config, classes, dtype), config.path)

    @property
    def stock_resolution(self) -> int:
        return int(self.parts.default_sample_size * self.parts.vae_scale_factor)

    @property
    def text_lengths(self) -> tuple[int, ...]:
        return self.tokenizers["tokenizer"].model_max_length, T5_LENGTH

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Cond:
        """`prompt_embeds` [B, 512, D], T5's states, and `pooled_prompt_embeds` [B, P] of CLIP."""
        pooled = text.clip(self.encoders["text_encoder"], self.tokenizers["tokenizer"], prompts).pooler_output
        embeds = text.t5(self.encoders["text_encoder_2"], self.tokenizers["tokenizer_2"], prompts, T5_LENGTH)
        return {"prompt_embeds": embeds.float(), "pooled_prompt_embeds": pooled.float()}

    def uncond(self, cond: Cond) -> Cond:
        """{} where the network is told its guidance, and holds it; else the encoding of ""."""
        return {} if self.denoiser.takes_guidance else super().uncond(cond)
