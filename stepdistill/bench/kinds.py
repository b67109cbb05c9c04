"""Which kind of model a folder or hub id holds: a language model, an image classifier, or none of Transformers' two.

Found from `architectures` in config.json and Transformers' own tables of classes, so that a class counts by what it does and
not by the end of its name. Transformers is imported only where there is such a config.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError

PIPELINE, LANGUAGE, CLASSIFIER = "diffusion pipeline", "language model", "image classifier"
CONFIG, INDEX = "config.json", "model_index.json"
FILES = (".safetensors", ".ckpt", ".bin", ".pt")


def kind_of_all(teacher: str | None, students: Sequence[str], network: bool = True) -> str:
    """The one kind of a teacher and its students. Raises InputError for kinds that are mixed.

    Args:
        teacher: folder, hub id, "demo"; None is for the check of the flags to miss.
        students: folders or hub ids.
        network: whether the hub may be asked what a teacher is that isn't cached.
    """
    if teacher is None:
        return PIPELINE
    kind = kind_of(teacher, "--teacher", network)
    for path in students:
        found = kind_of(path, "--student", network and kind is not None)
        if found != kind:
            raise InputError(
                f"expected models of one kind, got {_said(kind, 'teacher', teacher)} and {_said(found, 'student', path)}; "
                "compare a student with the teacher that it was made from, in a bench of its own"
            )
    return kind or PIPELINE


def _said(kind: str | None, flag: str, path: str) -> str:
    if kind is not None:
        return f"{'an' if kind == CLASSIFIER else 'a'} {kind} at --{flag} {path}"
    return f"no language model or classifier (no {CONFIG} of one) at --{flag} {path}"


def kind_of(path: str, flag: str, network: bool = True) -> str | None:
    """LANGUAGE or CLASSIFIER; None for what is no single model of Transformers: a pipeline, a student of one, nothing at all.

    Raises InputError for a model of Transformers of another kind, and for a config.json that can't be read.
    """
    file = _config_file(path, network)
    if file is None:
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"expected JSON in {CONFIG} of {flag} {path}, got: {error}; get the model again or write it again"
        ) from error
    if not isinstance(config, Mapping) or not {"architectures", "model_type"} & config.keys():
        return None  # of a part of a pipeline
    return _kind_of_config(config, path, flag)


def _kind_of_config(config: Mapping[str, Any], path: str, flag: str) -> str:
    from transformers.models.auto import modeling_auto as known

    classes = set(config.get("architectures") or ())
    for kind, table in (
        (LANGUAGE, known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        (CLASSIFIER, known.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
    ):
        names = {name for entry in table.values() for name in ((entry,) if isinstance(entry, str) else entry)}
        if classes & names:
            return kind
    found = ", ".join(sorted(classes)) or f"no `architectures` in its {CONFIG}"
    raise InputError(
        f"expected a causal language model or an image classifier of Transformers in {flag} {path}, got {found}; bench has no "
        "measure for other models: give another, saved with save_pretrained"
    )


def _config_file(path: str, network: bool) -> Path | None:
    folder = Path(path).expanduser()
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1 or folder.suffix in FILES:
        return folder / CONFIG if (folder / CONFIG).is_file() and not (folder / INDEX).is_file() else None
    return None if path == "demo" else _of_hub(path, network)


def _of_hub(path: str, network: bool) -> Path | None:
    """config.json of a hub id; None where there is none: what opens the model says what else is wrong with the id."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    try:
        if isinstance(try_to_load_from_cache(path, INDEX), str):
            return None
        found = try_to_load_from_cache(path, CONFIG)
        if isinstance(found, str):
            return Path(found)
        if not network:
            return None
        from ..families.loading import hub_is_reachable

        return Path(hf_hub_download(path, CONFIG)) if hub_is_reachable() else None
    except (OSError, ValueError):
        return None
