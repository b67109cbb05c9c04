"""Opening what is compared: a stock Diffusers pipeline from a checkpoint, and a student's from what its training wrote."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..export.card import base_model
from ..export.folder import FACTS, read_facts
from ..families import TeacherConfig, load
from ..families.loading import BROKEN, is_single_file, load_pipeline, load_vae, read_index, resolve
from .features import hash_weights
from .generate import denoiser_of

NEEDED = ("prompt", "latents", "guidance_scale", "num_inference_steps")  # arguments of a pipeline that can be compared


def open_pipeline(config: TeacherConfig, flag: str, dtype: torch.dtype = torch.float32) -> Any:
    """A stock pipeline all of whose weights are in the checkpoint, without a safety checker; InputError otherwise.

    Args:
        config: which checkpoint.
        flag: where it was given, for messages.
        dtype: of all weights.
    """
    import diffusers

    with _told(flag):
        path = resolve(config.path)
        index = read_index(path, config)
        cls = getattr(diffusers, str(index.get("_class_name")), None)
        given = set(inspect.signature(cls.__call__).parameters) if isinstance(cls, type) and callable(cls) else set()
        if not {*NEEDED} <= given:
            raise InputError(
                f"expected a text-to-image pipeline of Diffusers in {config.path!r}, got {index.get('_class_name', 'nothing')}"
                f"{', which takes no ' + ' or '.join(n for n in NEEDED if n not in given) if given else ''}; fix --teacher.path"
            )
        if is_single_file(path):
            pipe: Any = load(config, dtype).pipeline()
        else:
            checker = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            absent = {name: None for name, part in index.items() if isinstance(part, list) and part[0] is None}
            parts = {**absent, **(checker if "safety_checker" in index else {})}
            pipe = load_pipeline(cls, path, config, _modules(index), dtype, **parts)
        return _cast(pipe, dtype)


def _cast(pipe: Any, dtype: torch.dtype) -> Any:
    """All of a pipeline's weights in one type; loaded are autoencoders, and networks of exports, in float32."""
    return pipe if dtype == torch.float32 else pipe.to(dtype)


def _modules(index: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a pipeline that have weights, with their classes."""
    import diffusers
    import transformers

    libraries = {"diffusers": diffusers, "transformers": transformers}
    parts = {name: part for name, part in index.items() if isinstance(part, list) and part[0] in libraries}
    kinds = {name: getattr(libraries[library], kind, None) for name, (library, kind) in parts.items()}
    return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, nn.Module)}


@contextmanager
def _told(flag: str) -> Iterator[None]:
    """Messages of the loaders name the flag that was used here."""
    try:
        yield
    except InputError as error:
        said = str(error).replace("--teacher.variant", "--variant")
        raise InputError(said.replace("--teacher.path", flag)) from error


def open_student(path: str, teacher: Any, config: TeacherConfig, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """A student's pipeline and its stepdistill.json, {} where it has none.

    Args:
        path: as in :func:`open_contenders`.
        teacher: its pipeline, whose denoiser is copied and whose other parts are shared.
        config: which checkpoint the teacher is.
    """
    folder = Path(path).expanduser()
    if not (folder / FACTS).is_file():
        return open_pipeline(TeacherConfig(path), "--student", dtype), {}
    facts = read_facts(folder)
    try:
        if facts["takes"] != "prompt":
            raise InputError(
                f"expected a text-to-image student in --student {path}, got one that takes {facts['takes']}; the harness "
                "compares models that read prompts"
            )
        base = _base(path, facts["base_model"], teacher, config, dtype)
        facts["guidance_scale"]  # noqa: B018  # of its cells, where --guidance doesn't say another
        return student_pipeline(base, folder, facts, dtype), facts
    except KeyError as error:
        raise InputError(
            f"expected {FACTS} of an export in --student {path}, got one without {error}; stepdistill export {path}"
        ) from error


def _base(path: str, base: dict[str, Any], teacher: Any, config: TeacherConfig, dtype: torch.dtype) -> Any:
    """The pipeline that a student goes into: the teacher's, unless it was made from another checkpoint or autoencoder."""
    pipe, named_alike = teacher, base["name"] == base_model(config)
    if not named_alike or _lies_elsewhere(base["path"], config.path):
        own = TeacherConfig(base["path"], revision=base["revision"], variant=base["variant"])
        try:
            pipe = open_pipeline(own, f"base_model.path in {FACTS}", dtype)
            if named_alike and _hashes(pipe) == _hashes(teacher):
                pipe = teacher  # a copy
        except InputError as error:
            raise InputError(
                f"expected the model that --student {path} was made from, {base['name']}, which is not the --teacher, got: "
                f"{error}"
            ) from error
    if base["vae"]:
        pipe = _twin(pipe, vae=load_vae(base["vae"]).to(dtype))
    return pipe


def _lies_elsewhere(path: str, teacher: str) -> bool:
    """Whether both are folders or files here and not the same ones; a checkpoint may have moved since, and kept its name."""
    own, other = Path(path).expanduser(), Path(teacher).expanduser()
    return own.exists() and other.exists() and own.resolve() != other.resolve()


def _hashes(pipe: Any) -> dict[str, str]:
    return {name: hash_weights(part) for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def student_pipeline(
    base: Any, folder: str | Path, facts: Mapping[str, Any], dtype: torch.dtype = torch.float32
) -> Any:
    """A pipeline of the base model with an export's adapter or network in it, and its scheduler; `base` stays as it is.

    InputError where Diffusers can't load one of them.
    """
    import diffusers

    name = "unet" if "unet" in base.components else "transformer"
    network, folder = facts["weights"]["network"], Path(folder)
    try:
        scheduler = getattr(diffusers, facts["scheduler"]).from_pretrained(str(folder), subfolder="scheduler")
        if network is None:
            pipe = _twin(base, **{name: copy.deepcopy(denoiser_of(base))}, scheduler=scheduler)
            pipe.load_lora_weights(str(folder))
            pipe.fuse_lora()  # as one would to make images quickly: beside the weights it costs time at every layer
            pipe.unload_lora_weights()  # the layers that held it; what was fused stays
        else:
            cls, place = getattr(diffusers, network["class"]), network["folder"]
            own = cls.from_pretrained(str(folder), subfolder=place, use_safetensors=True).eval()
            pipe = _twin(base, **{place: own}, scheduler=scheduler)
    except BROKEN as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"expected an export in {str(folder)!r}, got: {reason}; write it again: stepdistill export {folder}"
        ) from error
    return _cast(pipe, dtype)


def _twin(pipe: Any, **parts: Any) -> Any:
    """A pipeline with some parts of its own; the others are shared."""
    twin = copy.copy(pipe)
    twin.register_modules(**parts)
    return twin
