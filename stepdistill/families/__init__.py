"""Floor 1: one file per backbone. :func:`load` picks it by the pipeline class that the checkpoint names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import InputError
from .config import TeacherConfig
from .model import Model

if TYPE_CHECKING:
    import torch

__all__ = ["Model", "TeacherConfig", "load"]

# pipeline class -> family file; the one place where families are listed
TABLE = {"StableDiffusionPipeline": "unet", "StableDiffusionImg2ImgPipeline": "unet"}


def load(config: TeacherConfig, dtype: torch.dtype | None = None) -> Model:
    """Opens the teacher: a Diffusers folder, a hub id, a single safetensors file, or the demo teacher.

    Args:
        config: path or hub id, revision, variant, another autoencoder.
        dtype: of the frozen denoiser and text encoder, float32 by default; the autoencoder stays in float32.

    Raises InputError where nothing, no pipeline, or a pipeline of an unknown class is found.
    """
    import torch

    from .loading import pipeline_class, resolve

    path = resolve(config.path)
    name = pipeline_class(path, config)
    if name not in TABLE:
        raise InputError(
            f"expected a pipeline of class {' or '.join(sorted(TABLE))}, got {name} in {config.path!r}; "
            "this family is not supported yet"
        )
    from .unet import StableDiffusion

    return StableDiffusion.load(config, path, dtype or torch.float32)
