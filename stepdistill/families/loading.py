"""Opening checkpoints: a Diffusers folder, a hub id or a single file, with errors that name the fix."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..errors import InputError
from .config import TeacherConfig

DEMO_TEACHER = Path(__file__).resolve().parent.parent / "demo" / "teacher"
DEMO_JUDGE = DEMO_TEACHER.with_name("judge")
FIX = (
    "give --teacher.path a Diffusers folder (with model_index.json), a hub id such as org/name, or a .safetensors file"
)

# what Diffusers and Transformers raise on checkpoints that are incomplete, damaged or of another model
BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)


def is_local(path: str) -> bool:
    """Whether `path` can only mean something on disk (hub ids are `name` or `org/name`)."""
    return Path(path).exists() or path.startswith((".", "/", "~")) or path.count("/") > 1 or is_single_file(path)


def is_single_file(path: str) -> bool:
    """Whether `path` names a checkpoint in one file."""
    return Path(path).suffix in (".safetensors", ".ckpt", ".bin", ".pt")


def resolve(path: str) -> str:
    """The path that "demo" and ~ stand for; InputError where a local path is missing, no pipeline, or a pickle."""
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
            index = json.loads((Path(path) / "model_index.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"expected JSON in {path}/model_index.json, got {error}; {FIX}") from error
    else:
        from diffusers import DiffusionPipeline

        if not is_cached(path, config.revision) and not hub_is_reachable():
            raise InputError(
                f"expected a hub id or folder in --teacher.path, got {path!r}, which is neither a folder here nor in the hub's "
                f"cache, and the hub cannot be reached; {FIX}"
            )
        try:
            index = DiffusionPipeline.load_config(path, revision=config.revision)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"expected a hub id or folder in --teacher.path, got {path!r}: {reason}; {FIX}") from error
    if not isinstance(index, dict):
        raise InputError(f"expected an object in {path}/model_index.json, got {type(index).__name__}; {FIX}")
    return str(index.get("_class_name", "nothing"))


def is_cached(path: str, revision: str | None) -> bool:
    """Whether the hub's cache on this machine has the pipeline's index."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(path, "model_index.json", revision=revision), str)


def hub_is_reachable() -> bool:
    """One quick look; the hub's own client tries for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=5).close()
    except urllib.error.HTTPError:
        return True  # it answers
    except (OSError, ValueError):
        return False
    return True


def load_pipeline(cls: Any, path: str, config: TeacherConfig, dtype: torch.dtype, **parts: Any) -> Any:
    """`cls.from_pretrained` (or from_single_file) with what can go wrong said in one paragraph.

    The autoencoder is read in float32: in half precision it would lose its last bits, and some overflow.
    """
    try:
        if is_single_file(path):
            # this one takes a single dtype; SD's own configs come from the hub unless a folder with them is given
            pipeline = cls.from_single_file(path, dtype=torch.float32, config=config.config, **parts)
            pipeline.unet.to(dtype)
            pipeline.text_encoder.to(dtype)
            return pipeline
        dtypes = {"default": dtype, "vae": torch.float32}
        return cls.from_pretrained(
            path, revision=config.revision, variant=config.variant, dtype=dtypes, use_safetensors=True, **parts
        )
    except BROKEN as error:
        reason = " ".join(str(error).split())[:500]
        fix = FIX
        if is_single_file(path) and config.config is None:
            fix += "; without the network, give --teacher.config a Diffusers folder of the same kind of model"
        raise InputError(f"expected a loadable {cls.__name__} at {path!r}, got: {reason}; {fix}") from error


def load_vae(path: str) -> Any:
    """An AutoencoderKL from its own folder or hub id, or from the `vae` folder of a pipeline, in float32."""
    from diffusers import AutoencoderKL

    subfolder = "vae" if (Path(path) / "vae").is_dir() else None
    try:
        return AutoencoderKL.from_pretrained(path, subfolder=subfolder, dtype=torch.float32)
    except BROKEN as error:
        reason = " ".join(str(error).split())[:500]
        raise InputError(f"expected an AutoencoderKL at --teacher.vae {path!r}, got: {reason}; fix the path") from error
