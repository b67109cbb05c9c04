"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): two CLIPs and a T5, and a transformer that predicts the flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..batch import Cond
from . import text
from .config import TeacherConfig
from .flow import FlowModel, FlowTransformer, check_widths, open_flow
from .loading import side

# attention and feed-forward of both streams; the ends of names, so that 3.5's second attention (attn2) is among them
SD3_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
)  # fmt: skip
T5_LENGTH = 256  # tokens, the stock pipeline's default


class SD3Transformer(FlowTransformer):
    """An SD3Transformer2DModel; conditions: `prompt_embeds` [B, L, D] and `pooled_prompt_embeds` [B, P]."""

    lora_targets = SD3_TARGETS

    def call(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        dtype = self.dtype
        output: Tensor = self.net(
            hidden_states=x_t.to(dtype),
            timestep=self.native(t, x_t.device),
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            pooled_projections=cond["pooled_prompt_embeds"].to(dtype),
            return_dict=False,
        )[0]
        return output


class StableDiffusion3(FlowModel):
    """An SD 3 or 3.5 checkpoint, opened as a StableDiffusion3Pipeline; its T5 may be absent."""

    def __init__(self, pipeline: Any, name: str) -> None:
        net, vae = pipeline.transformer, pipeline.vae
        encoders = (pipeline.text_encoder, pipeline.text_encoder_2)
        t5 = pipeline.text_encoder_3
        self.width = int(net.config.joint_attention_dim)
        check_widths(
            name,
            "SD3Transformer2DModel",
            in_channels=(net.config.in_channels, vae.config.latent_channels),
            out_channels=(net.out_channels, vae.config.latent_channels),
            pooled_projection_dim=(net.config.pooled_projection_dim, sum(e.config.projection_dim for e in encoders)),
            joint_attention_dim=(self.width, self.width if t5 is None else t5.config.d_model),
        )
        levels = pipeline.scheduler.config["num_train_timesteps"]
        denoiser = SD3Transformer(net.requires_grad_(False).eval(), levels, ("JointTransformerBlock",))
        super().__init__(pipeline, name, denoiser, side(net.config.sample_size, name))

    @classmethod
    def load(cls, config: TeacherConfig, path: str, dtype: torch.dtype) -> StableDiffusion3:
        """Opens a folder or hub id; transformer and text encoders in `dtype`, the autoencoder in float32."""
        from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
        from transformers import CLIPTextModelWithProjection, T5EncoderModel

        classes = {
            "transformer": SD3Transformer2DModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModelWithProjection,
            "text_encoder_2": CLIPTextModelWithProjection, "text_encoder_3": T5EncoderModel,
        }  # fmt: skip
        return cls(open_flow(StableDiffusion3Pipeline, path, config, classes, dtype), config.path)

    @property
    def text_lengths(self) -> tuple[int, ...]:
        clip = self.tokenizers["tokenizer"].model_max_length  # of the first, for both
        return clip, clip, T5_LENGTH

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Cond:
        """`prompt_embeds` [B, L1 + 256, D] and `pooled_prompt_embeds` [B, P1 + P2].

        The first L1 tokens are the last states but one of both CLIPs, side by side, and zeros up to D; then come T5's states,
        or zeros without a T5.
        """
        length = self.text_lengths[0]
        first, second = (
            text.clip(self.encoders[f"text_encoder{n}"], self.tokenizers[f"tokenizer{n}"], prompts, length)
            for n in ("", "_2")
        )
        clip = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        clip = torch.nn.functional.pad(clip, (0, self.width - clip.shape[-1]))
        if "text_encoder_3" in self.encoders:
            t5 = text.t5(self.encoders["text_encoder_3"], self.tokenizers["tokenizer_3"], prompts, T5_LENGTH)
        else:
            t5 = clip.new_zeros(len(prompts), T5_LENGTH, self.width)
        pooled = torch.cat([first.text_embeds, second.text_embeds], dim=-1)
        return {"prompt_embeds": torch.cat([clip, t5], dim=-2).float(), "pooled_prompt_embeds": pooled.float()}
