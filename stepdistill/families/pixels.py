"""Diffusion on pixels (arXiv 2006.11239): a UNet2DModel, unconditional or with class labels; no text, no autoencoder.

The stock samplers of such checkpoints often clamp x0 at each step (`clip_sample` of their scheduler). That belongs to the
sampler, not to the network: predictions here are what the network says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..batch import Cond
from ..diffusion.schedule import Tabulated
from ..errors import InputError
from ..networks.denoiser import Denoiser
from .config import TeacherConfig
from .fingerprint import fingerprint
from .loading import load_pipeline, read_index, side
from .model import Model
from .schedules import from_scheduler

if TYPE_CHECKING:
    from diffusers import DDIMPipeline, DDPMPipeline

# attention, residual blocks, resamplers and time projections, as in LCM-LoRA's list; such a UNet has no feed-forward
PIXEL_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_shortcut",
    "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in grey (ITU-R BT.601), as Pillow converts


class PixelUNet(Denoiser):
    """A UNet2DModel; conditions: none, or `class_labels` [B] int64."""

    lora_targets = PIXEL_TARGETS

    def __init__(self, net: Any, schedule: Tabulated, predicts: Any) -> None:
        from diffusers.models.attention_processor import Attention

        super().__init__(net, schedule, predicts)
        self.table = schedule
        self.takes_classes = net.config.num_class_embeds is not None
        attention = tuple(n for n, m in net.named_modules() if isinstance(m, Attention))
        self.tap_points = attention or (("mid_block",) if net.mid_block is not None else ())

    def call(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        dtype = self.dtype
        # native timesteps stay in float32: bfloat16 would round 999 to 1000
        timestep = self.table.index(t).to(torch.promote_types(torch.float32, dtype)).to(x_t.device)
        labels = cond["class_labels"] if self.takes_classes else None
        return self.net(x_t.to(dtype), timestep, class_labels=labels, return_dict=False)[0]

    def checkpoint_activations(self, wanted: bool = True) -> None:
        module: Any = self.module
        if wanted:
            module.enable_gradient_checkpointing()
            self.recomputes = True

    def pooled(self, cond: Cond) -> Tensor | None:
        """The class, as one of N."""
        module: Any = self.module
        if not self.takes_classes:
            return None
        return nn.functional.one_hot(cond["class_labels"], module.config.num_class_embeds).float()


class Pixels(Model):
    """A DDPMPipeline or DDIMPipeline. Its "latents" are the pixels themselves, and its prompts class labels or nothing.

    Args:
        pipeline: stock; of class-conditional checkpoints it can't be called, since no stock pipeline passes labels on.
        name: path or hub id.
        labels: index -> name of the classes, where the checkpoint gives them.
    """

    denoiser: PixelUNet

    def __init__(
        self, pipeline: DDPMPipeline | DDIMPipeline, name: str, labels: Mapping[int, str] | None = None
    ) -> None:
        self.name = name
        self.parts = pipeline
        schedule, predicts = from_scheduler(pipeline.scheduler.config)
        config = pipeline.unet.config
        _check(config, name)
        if not isinstance(schedule, Tabulated):
            raise InputError(f"expected a discrete noise table, got {pipeline.scheduler.config['_class_name']}")
        self.denoiser = PixelUNet(pipeline.unet.requires_grad_(False).eval(), schedule, predicts)
        self.resolution = side(config.sample_size, name)
        self.latent_shape = (config.in_channels, self.resolution, self.resolution)
        self.classes = int(config.num_class_embeds or 0)
        self.examples = ("0", str(max(self.classes - 1, 0)))
        self.numbers = {str(i): i for i in range(self.classes)}
        for index, names in (labels or {}).items():  # ImageNet's come as "tench, Tinca tinca"
            self.numbers |= {label.strip(): index for label in names.split(",") if index < self.classes}

    @classmethod
    def load(cls, config: TeacherConfig, path: str, dtype: torch.dtype) -> Pixels:
        """Opens a folder or hub id, with the denoiser in `dtype`."""
        import diffusers

        if config.vae is not None:
            raise InputError(f"expected no autoencoder for {config.path!r}, which works on pixels; drop --teacher.vae")
        index = read_index(path, config)
        pipeline_class = {"DDPMPipeline": diffusers.DDPMPipeline, "DDIMPipeline": diffusers.DDIMPipeline}
        classes = {"unet": diffusers.UNet2DModel}
        pipeline = load_pipeline(pipeline_class[index["_class_name"]], path, config, classes, dtype)
        labels = {int(number): str(names) for number, names in (index.get("id2label") or {}).items()}
        return cls(pipeline, config.path, labels)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return (self.denoiser.module,)

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(pixels, 0), in grey where the network has one channel."""
        pixels = pixels.to(self.device, torch.float32)
        if self.latent_shape[0] == 1 and pixels.shape[1] == 3:
            pixels = (pixels * pixels.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)
        return pixels, torch.zeros_like(pixels)

    def decode(self, latents: Tensor) -> Tensor:
        """The pixels [B, 1 or 3, H, W] as they are; clamping is the pipeline's."""
        return latents

    def encode_prompts(self, prompts: Sequence[str]) -> Cond:
        """{} for unconditional networks, else `class_labels` [B] int64 of prompts such as "3", or the class's name."""
        if not self.classes:
            return {}
        unknown = [prompt for prompt in prompts if prompt.strip() not in self.numbers]
        if unknown:
            names = ", or their names" if len(self.numbers) > self.classes else ""
            raise InputError(
                f"expected class labels from 0 to {self.classes - 1}{names}, got {unknown[0]!r}; fix the prompts or captions"
            )
        numbers = [self.numbers[prompt.strip()] for prompt in prompts]
        return {"class_labels": torch.tensor(numbers, dtype=torch.int64, device=self.device)}

    def uncond(self, cond: Cond) -> Cond:
        """{}: these networks know no "no label", so there is no guidance."""
        return {}

    def pipeline(self, student: Denoiser | None = None) -> DDPMPipeline | DDIMPipeline:
        denoiser = self.denoiser if student is None else student
        scheduler = type(self.parts.scheduler).from_config(self.parts.scheduler.config)
        pipeline = type(self.parts)(unet=denoiser.module, scheduler=scheduler)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def fingerprint(self) -> str:
        return fingerprint(("pixels", self.latent_shape, sorted(self.numbers.items())))


def _check(config: Any, name: str) -> None:
    """InputError for networks that are no plain eps, x0 or v model."""
    if config.in_channels not in (1, 3) or config.out_channels != config.in_channels:
        raise InputError(
            f"expected a UNet2DModel from 1 or 3 channels of pixels to as many, got {name!r} with {config.in_channels} and "
            f"{config.out_channels}: latents and learned variances are not supported"
        )
    if config.time_embedding_type != "positional":
        raise InputError(
            f"expected a UNet2DModel that takes timesteps (time_embedding_type positional), got {name!r} with "
            f"{config.time_embedding_type!r}: score-based models in continuous time are not supported"
        )
    if config.class_embed_type == "identity" or (config.class_embed_type and not config.num_class_embeds):
        raise InputError(
            f"expected class labels from 0 to num_class_embeds - 1, got {name!r} with class_embed_type "
            f"{config.class_embed_type!r} and num_class_embeds {config.num_class_embeds}; this kind of model is not supported"
        )
