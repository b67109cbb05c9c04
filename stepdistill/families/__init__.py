"""Floor 1: one file per backbone. :func:`load` picks it by the pipeline class that the checkpoint names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import InputError
from .config import EyeConfig, TeacherConfig
from .eyes import open_eye
from .flux import Flux
from .loading import read_index, resolve
from .model import Model
from .pixels import Pixels
from .sd3 import StableDiffusion3
from .sdxl import StableDiffusionXL
from .unet import StableDiffusion

if TYPE_CHECKING:
    import torch

__all__ = ["EyeConfig", "Model", "TeacherConfig", "load", "open_eye"]

# the pipeline class that a checkpoint names -> its family; the one place where families are listed
TABLE: dict[
    str, type[StableDiffusion] | type[StableDiffusionXL] | type[StableDiffusion3] | type[Flux] | type[Pixels]
] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionImg2ImgPipeline": StableDiffusion,
    "StableDiffusionInpaintPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusionXLImg2ImgPipeline": StableDiffusionXL,
    "StableDiffusionXLInpaintPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "StableDiffusion3Img2ImgPipeline": StableDiffusion3,
    "StableDiffusion3InpaintPipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "FluxImg2ImgPipeline": Flux,
    "FluxInpaintPipeline": Flux,
    "DDPMPipeline": Pixels,
    "DDIMPipeline": Pixels,
}


def load(config: TeacherConfig, dtype: torch.dtype | None = None) -> Model:
    """Opens the teacher: a Diffusers folder, a hub id, a single safetensors file, or the demo teacher.

    Args:
        config: path or hub id, revision, variant, another autoencoder.
        dtype: of the frozen denoiser and text encoders, float32 by default; the autoencoder stays in float32.

    Raises InputError where nothing, no pipeline, or a pipeline of an unknown class is found.
    """
    import torch

    path = resolve(config.path)
    name = read_index(path, config).get("_class_name", "nothing")
    if name not in TABLE:
        raise InputError(
            f"expected a pipeline of class {', '.join(TABLE)}, got {name} in {config.path!r}; this family is not supported yet"
        )
    return TABLE[name].load(config, path, dtype or torch.float32)
