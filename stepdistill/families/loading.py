"""Opening checkpoints: a Diffusers folder, a hub id or a single file, with errors that name the fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from .model import TeacherConfig

DEMO_TEACHER = Path(__file__).resolve().parent.parent / "demo" / "teacher"
FIX = (
    "give --teacher.path a Diffusers folder (with model_index.json), a hub id such as org/name, or a .safetensors file"
)


def is_local(path: str) -> bool:
    """Whether `path` can only mean something on disk (hub ids are `name` or `org/name`)."""
    return Path(path).exists() or path.startswith((".", "/", "~")) or path.count("/") > 1 or is_single_file(path)


def is_single_file(path: str) -> bool:
    """Whether `path` names a checkpoint in one file."""
    return Path(path).suffix in (".safetensors", ".ckpt", ".bin", ".pt")


def resolve(path: str) -> str:
    """ "demo" and ~ resolved; raises InputError where a local path is missing, no pipeline, or a pickle."""
    if path == "demo":
        path = str(DEMO_TEACHER)
    folder = Path(path).expanduser()
    if not is_local(path):
        return path
    if not folder.exists():
        raise InputError(f"expected a checkpoint at {path!r}, got nothing there; {FIX}")
    if folder.is_file() and folder.suffix != ".safetensors":
        raise InputError(
            f"expected safetensors, got {path!r}, a pickle that could run code; convert it to .safetensors first"
        )
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise InputError(f"expected a Diffusers pipeline in {path!r}, got a folder without model_index.json; {FIX}")
    return str(folder)


def pipeline_class(path: str, config: TeacherConfig) -> str:
    """The class name in the checkpoint's model_index.json; single files count as StableDiffusionPipeline."""
    if is_single_file(path):
        return "StableDiffusionPipeline"
    if Path(path).is_dir():
        try:
            index = json.loads((Path(path) / "model_index.json").read_text())
        except ValueError as error:
            raise InputError(f"expected JSON in {path}/model_index.json, got {error}; {FIX}") from error
    else:
        from diffusers import DiffusionPipeline

        try:
            index = DiffusionPipeline.load_config(path, revision=config.revision)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"expected a hub id or folder in --teacher.path, got {path!r}: {reason}; {FIX}") from error
    return str(index.get("_class_name", "nothing"))


def load_pipeline(cls: Any, path: str, config: TeacherConfig, dtype: torch.dtype, **parts: Any) -> Any:
    """`cls.from_pretrained` (or from_single_file) with what can go wrong said in one paragraph."""
    try:
        if is_single_file(path):
            return cls.from_single_file(path, dtype=dtype, **parts)
        dtypes = {
            "default": dtype,
            "vae": torch.float32,
        }  # an autoencoder read in half precision has lost its last bits
        return cls.from_pretrained(
            path, revision=config.revision, variant=config.variant, dtype=dtypes, use_safetensors=True, **parts
        )
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:500]
        raise InputError(f"expected a loadable {cls.__name__} at {path!r}, got: {reason}; {FIX}") from error


def load_vae(path: str) -> Any:
    """An AutoencoderKL from its own folder or hub id, or from the `vae` folder of a pipeline, in float32."""
    from diffusers import AutoencoderKL

    subfolder = "vae" if (Path(path) / "vae").is_dir() else None
    try:
        return AutoencoderKL.from_pretrained(path, subfolder=subfolder, dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:500]
        raise InputError(f"expected an AutoencoderKL at --teacher.vae {path!r}, got: {reason}; fix the path") from error
