"""Opening checkpoints: a Diffusers folder, a hub id or a single file, with errors that name the fix."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import InputError
from .config import TeacherConfig

DEMO_TEACHER = Path(__file__).resolve().parent.parent / "demo" / "teacher"
DEMO_JUDGE = DEMO_TEACHER.with_name("judge")
DEMO_EYE = DEMO_TEACHER.with_name("eye")
STUDENT = "stepdistill.json"  # beside what training exports
FIX = (
    "give --teacher.path a Diffusers folder (with model_index.json), a hub id such as org/name, or a .safetensors file"
)

# by which a single file tells what it is: the prefix of a text encoder's tensors -> pipeline class; the first match counts
TEXT_ENCODERS = (
    ("conditioner.embedders.1.", "StableDiffusionXLPipeline"),
    ("conditioner.embedders.0.", "the SDXL refiner"),
    ("cond_stage_model.", "StableDiffusionPipeline"),
)

# and what is not opened from one, by its transformer's tensors, text encoders or not
TRANSFORMERS = (("joint_blocks.", "Stable Diffusion 3"), ("double_blocks.", "Flux"))

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
        if (folder / STUDENT).is_file():
            raise InputError(
                f"expected a Diffusers pipeline in {path!r}, got a student of stepdistill, which is its denoiser or an adapter "
                f"alone; make the pipeline as its README.md says (fuse an adapter), save it with pipe.save_pretrained and give "
                "--teacher.path that folder, or give the teacher that the student was made from"
            )
        raise InputError(f"expected a Diffusers pipeline in {path!r}, got a folder without model_index.json; {FIX}")
    return str(folder)


def read_index(path: str, config: TeacherConfig) -> dict[str, Any]:
    """The checkpoint's model_index.json; of a single file, what the names of its tensors say of it."""
    if is_single_file(path):
        return {"_class_name": _class_of_file(path)}
    file = Path(path) / "model_index.json" if Path(path).is_dir() else _index_of_hub(path, config)
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"expected JSON in {path}/model_index.json, got {error}; {FIX}") from error
    if not isinstance(index, dict):
        raise InputError(f"expected an object in {path}/model_index.json, got {type(index).__name__}; {FIX}")
    return index


def _index_of_hub(path: str, config: TeacherConfig) -> Path:
    from huggingface_hub import hf_hub_download

    if not is_cached(path, config.revision) and not hub_is_reachable():
        raise InputError(
            f"expected a hub id or folder in --teacher.path, got {path!r}, which is neither a folder here nor in the hub's "
            f"cache, and the hub cannot be reached; {FIX}"
        )
    try:
        return Path(hf_hub_download(path, "model_index.json", revision=config.revision))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"expected a hub id or folder in --teacher.path, got {path!r}: {reason}; {FIX}") from error


def _class_of_file(path: str) -> str:
    """The pipeline class by the text encoders that are in the file; its header is read, not the weights."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise InputError(f"expected a safetensors file at {path!r}, got: {error}; {FIX}") from error
    for prefix, name in TEXT_ENCODERS:
        if any(n.startswith(prefix) for n in names):
            return name
    for part, name in TRANSFORMERS:
        if any(part in n for n in names):
            raise InputError(
                f"expected Stable Diffusion or SDXL in {path!r}, got {name}, which is not opened from a single file; give "
                "--teacher.path a Diffusers folder or a hub id of it"
            )
    raise InputError(
        f"expected Stable Diffusion or SDXL with its text encoder in {path!r}, got tensors such as {sorted(names)[:3]}; "
        "give --teacher.path a whole checkpoint, or a Diffusers folder"
    )


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


@contextmanager
def _explained(what: str, fix: str) -> Iterator[None]:
    """Says in one paragraph what Diffusers or Transformers stumbled over."""
    try:
        yield
    except InputError:
        raise
    except BROKEN as error:
        reason = " ".join(str(error).split())[:500]
        raise InputError(f"expected {what}, got: {reason}; {fix}") from error


def load_pipeline(
    cls: Any, path: str, config: TeacherConfig, classes: Mapping[str, Any], dtype: torch.dtype, **parts: Any
) -> Any:
    """`cls.from_pretrained` (or from_single_file), where every weight of the modules must come from the checkpoint.

    The stock loaders only warn when weights are missing, and draw them at random. The autoencoder is read in float32: in
    half precision it would lose its last bits, and some overflow.

    Args:
        cls: the stock pipeline class.
        path: a folder, a hub id or a single file, resolved.
        config: revision, variant, configs of a single file.
        classes: the modules with weights and what they must be, e.g. {"unet": UNet2DConditionModel}.
        dtype: of all modules but the autoencoder.
        parts: components that are not to be loaded, given to the pipeline as they are.
    """
    if config.vae is not None:
        parts["vae"] = load_vae(config.vae)
        classes = {name: module for name, module in classes.items() if name != "vae"}
    dtypes = {name: torch.float32 if name == "vae" else dtype for name in classes}
    with _explained(f"a loadable {cls.__name__} at {path!r}", FIX):
        if is_single_file(path):
            return _from_file(cls, path, config, dtypes, parts)
        folder = Path(path)
        if not folder.is_dir():
            options = {"revision": config.revision, "variant": config.variant, "use_safetensors": True}
            folder = Path(cls.download(path, **options, **parts))
        variants = {name: _variant(_place(folder, name), config.variant) for name in classes}
        if config.variant and not any(variants.values()):
            raise InputError(
                f"expected weights of the variant {config.variant!r} in {path!r}, got none; drop --teacher.variant"
            )
        modules = {}
        for name, module in classes.items():
            with _explained(f"a loadable {cls.__name__} at {path!r}, with its {name}", FIX):
                modules[name] = load_module(module, _place(folder, name), name, dtypes[name], variants[name])
        return cls.from_pretrained(folder, **modules, **parts)


def _from_file(
    cls: Any, path: str, config: TeacherConfig, dtypes: Mapping[str, torch.dtype], parts: Mapping[str, Any]
) -> Any:
    """`cls.from_single_file`; the configs of the parts come from the hub unless a folder with them is given."""
    fix = (
        FIX
        if config.config
        else f"{FIX}; without the network, give --teacher.config a folder of the same kind of model"
    )
    with _explained(f"a loadable {cls.__name__} in {path!r}", fix):
        try:
            pipeline = cls.from_single_file(path, config=config.config, **parts)
        except NotImplementedError as error:  # it moves weights that were given no values, and does not say which
            raise InputError(
                f"expected all weights of a {cls.__name__} in {path!r}, got a file that lacks some; get it again, or {fix}"
            ) from error
        for name, dtype in dtypes.items():
            module = pipeline.components[name]
            check_weights(name, path, _empty(module))
            if module.dtype != dtype:
                module.to(dtype)
        return pipeline


def _place(folder: Path, name: str) -> Path:
    """Where a component's files are: in a folder of its own, or beside the index in pipelines of one network."""
    return folder / name if (folder / name).is_dir() else folder


def _variant(folder: Path, variant: str | None) -> str | None:
    """`variant` where the component has files of it, as the stock pipelines fall back component by component."""
    return variant if variant and any(f".{variant}" in file.name for file in folder.iterdir()) else None


def load_module(cls: Any, folder: str | Path, name: str, dtype: torch.dtype, variant: str | None = None) -> Any:
    """`cls.from_pretrained`, a Diffusers or Transformers model, where every weight comes from the files."""
    from diffusers import ModelMixin

    options = {"dtype": dtype, "use_safetensors": True} | ({"variant": variant} if variant else {})
    module, info = cls.from_pretrained(str(folder), output_loading_info=True, **options)
    # a text encoder may be cut out of a whole CLIP; a UNet that leaves weights over is not the one its config describes
    extra = info["unexpected_keys"] if issubclass(cls, ModelMixin) else ()
    check_weights(name, str(folder), {*info["missing_keys"], *_empty(module)}, extra)
    return module


def _empty(module: Any) -> list[str]:
    """Names of parameters that were given no values: Diffusers takes a sharded checkpoint's index for its contents."""
    return [name for name, parameter in module.named_parameters() if parameter.is_meta]


def check_weights(name: str, path: str, missing: Iterable[str], extra: Iterable[str] = ()) -> None:
    """InputError where weights of a component are missing, or left over."""
    for keys, found in ((sorted(missing), "missing from"), (sorted(extra), "left over in")):
        if keys:
            raise InputError(
                f"expected the weights that the config of the {name} describes, got {len(keys)} tensors {found} the files "
                f"in {path!r}, first {', '.join(keys[:3])}; the checkpoint is damaged or mixed from two models: get it again"
            )


def load_vae(path: str) -> Any:
    """An AutoencoderKL from its own folder or hub id, or from the `vae` folder of a pipeline, in float32."""
    from diffusers import AutoencoderKL

    subfolder = Path(path) / "vae"
    with _explained(f"an AutoencoderKL at --teacher.vae {path!r}", "fix the path"):
        return load_module(AutoencoderKL, subfolder if subfolder.is_dir() else path, "vae", torch.float32)


def side(sample_size: Any, name: str) -> int:
    """The side of the square that a UNet's config gives as its sample_size; InputError where it is none."""
    sizes = {sample_size} if isinstance(sample_size, int) else set(sample_size or ())
    if len(sizes) != 1:
        raise InputError(
            f"expected a square sample_size in the config of the UNet of {name!r}, got {sample_size}; fix it"
        )
    return int(sizes.pop())
