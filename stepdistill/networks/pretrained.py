"""Models and tokenizers of Transformers by folder or hub id, whole or not at all, with errors that name the fix."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..families.loading import BROKEN, hub_is_reachable, is_local


def load_model(auto: str, path: str, flag: str, revision: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """The model at `path`, in eval mode; InputError where any weight of it is not in the files.

    The stock loaders only warn of missing weights, and draw them at random; a classifier whose head is new has a random one.

    Args:
        auto: a class of Transformers, such as "AutoModelForCausalLM".
        path: a folder with config.json and safetensors, or a hub id.
        flag: the option that said so, for messages.
        revision: branch, tag or commit on the hub.
        dtype: of the weights.
    """
    import transformers

    check_place(path, flag, revision)
    quiet()
    with explained(f"a model for {auto} at {path!r}", flag):
        model, info = getattr(transformers, auto).from_pretrained(
            str(Path(path).expanduser()) if is_local(path) else path,
            revision=revision or "main", dtype=dtype, use_safetensors=True, output_loading_info=True,
        )  # fmt: skip
    wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if wrong:
        raise InputError(
            f"expected all weights that the config at {path!r} describes, got {len(wrong)} missing or of another shape, first "
            f"{', '.join(wrong[:3])}; is it a model of another kind, without this head? fix {flag}"
        )
    return model


def load_tokenizer(path: str, flag: str, revision: str | None = None) -> Any:
    """The tokenizer beside a model."""
    from transformers import AutoTokenizer

    check_place(path, flag, revision)
    with explained(f"a tokenizer at {path!r}", flag):
        return AutoTokenizer.from_pretrained(
            str(Path(path).expanduser()) if is_local(path) else path, revision=revision or "main"
        )


def checkpoint_hash(path: str, flag: str, revision: str | None = None) -> str:
    """sha256 of the weights at `path`, of a tensor at a time and without a model; the same however files part them."""
    from safetensors import safe_open

    check_place(path, flag, revision)
    digest = hashlib.sha256()
    with explained(f"weights in safetensors at {path!r}", flag), ExitStack() as stack:
        files = [stack.enter_context(safe_open(place, framework="pt")) for place in _weight_files(path, revision)]
        for name, number in sorted((name, i) for i, file in enumerate(files) for name in file.keys()):  # noqa: SIM118
            tensor = files[number].get_tensor(name)
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _weight_files(path: str, revision: str | None) -> list[str]:
    """Those that Transformers reads: a single one, or what an index lists."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

    def found(name: str, missing: bool = False) -> str | None:
        place = str(Path(path).expanduser()) if is_local(path) else path
        file: str | None = cached_file(
            place, name, revision=revision or "main", _raise_exceptions_for_missing_entries=not missing
        )
        return file

    if single := found(SAFE_WEIGHTS_NAME, missing=True):
        return [single]
    index = Path(str(found(SAFE_WEIGHTS_INDEX_NAME)))
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return [str(found(name)) for name in names]


def check_place(path: str, flag: str, revision: str | None = None, file: str = "config.json") -> None:
    """InputError for a folder without a model, and for a hub id that is neither cached nor within reach.

    The hub's own client says so after a minute.
    """
    from huggingface_hub import try_to_load_from_cache

    fix = f"give {flag} a folder with {file} and safetensors, or a hub id such as org/name"
    if is_local(path):
        if not (Path(path).expanduser() / file).is_file():
            raise InputError(f"expected a model of Transformers at {path!r}, got no {file} there; {fix}")
    elif not isinstance(try_to_load_from_cache(path, file, revision=revision), str) and not hub_is_reachable():
        raise InputError(
            f"expected a hub id or folder in {flag}, got {path!r}, which is neither a folder here nor in the hub's cache, and "
            f"the hub cannot be reached; {fix}"
        )


def quiet() -> None:
    """No bar of Transformers' own for each file it reads or writes."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@contextmanager
def explained(what: str, flag: str) -> Iterator[None]:
    """Says in one paragraph what Transformers stumbled over."""
    try:
        yield
    except BROKEN as error:
        raise InputError(f"expected {what}, got: {' '.join(str(error).split())[:400]}; fix {flag}") from error
