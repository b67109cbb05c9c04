"""Uploading an export to the Hugging Face Hub: what could stop it is found before training, and only the export goes up.

The login is the hub's own (`hf auth login`, or the variable HF_TOKEN): no option takes a token, so no config records one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError
from ..families.loading import is_local
from .card import CARD, SAMPLES, TABLE, card
from .config import NetworkExportConfig
from .folder import FACTS, read_facts
from .lines import PLACE, loading_lines
from .transformer import card as network_card
from .transformer import elsewhere

LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
SHOWN = (f"{SAMPLES}/*.png", TABLE, "grid.png")  # beside the export itself


def check_hub(config: NetworkExportConfig, output_dir: str | Path) -> str | None:
    """The repository that the export will go to, made if missing; None where nothing is to be uploaded.

    Raises:
        InputError: no network, no login, a token that may only read, or a name that is not ours to write to.
    """
    if not config.push_to_hub:
        return None
    from huggingface_hub import HfApi

    api = HfApi()
    with _explained("reach the hub", LOGIN):
        user = api.whoami(cache=True)
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise InputError(f"expected a token that may write to the hub, got one that may only read; {LOGIN}")
    repo = _repository(config, output_dir, user["name"])
    owners = [user["name"], *(org["name"] for org in user.get("orgs", []))]
    if repo.split("/")[0] not in owners:
        raise InputError(
            f"expected a repository of {' or '.join(owners)}, got {repo!r}; fix --export.hub_model_id, or log in as its owner"
        )
    with _explained(f"write to {repo!r} on the hub", "fix --export.hub_model_id, or ask its owner for access"):
        api.create_repo(repo, private=config.hub_private_repo or None, exist_ok=True)  # None: the owner's default
    return repo


def push(folder: str | Path, config: NetworkExportConfig) -> str | None:
    """Uploads the export in `folder` in one commit; returns its address, or None where nothing is to be uploaded.

    What goes up: the files of the export, samples, the table and the picture grid. Not: config.yaml, metrics and checkpoints.
    The card's code names the repository, and neither it nor stepdistill.json says where things lie on this machine.

    Raises:
        InputError: as :func:`check_hub`, or the upload fails; the export in `folder` is whole all the same.
    """
    folder = Path(folder)
    repo = check_hub(config, folder)
    if repo is None:
        return None
    from huggingface_hub import CommitOperationAdd, HfApi

    operations = [CommitOperationAdd(name, _content(folder, name, repo)) for name in files_to_upload(folder)]
    with _explained(f"upload {folder} to {repo!r}", f"it is whole here; repeat with `stepdistill export {folder}`"):
        commit = HfApi().create_commit(repo, operations, commit_message="stepdistill export")
    return str(commit.repo_url)


def files_to_upload(folder: Path) -> list[str]:
    """The files of the export and what its card shows, relative to `folder`."""
    shown = [str(path.relative_to(folder)) for pattern in SHOWN for path in folder.glob(pattern)]
    return sorted({*read_facts(folder)["files"], *shown})


def _content(folder: Path, name: str, repo: str) -> bytes | str:
    """A file's path, or for the two that speak of this machine what they say to others."""
    info = read_facts(folder)
    if "task" in info and name in (CARD, FACTS):  # a network of Transformers
        told = elsewhere(info)
        return (network_card(repo, told) if name == CARD else json.dumps(told, indent=1) + "\n").encode()
    if name == CARD:
        return card(info, loading_lines(repo, info, elsewhere=True), folder, elsewhere=True).encode()
    if name == FACTS:
        base = info["base_model"]
        paths = {
            key: PLACE.format(Path(base[key]).name) for key in ("path", "vae") if base[key] and is_local(base[key])
        }
        return (json.dumps({**info, "base_model": {**base, **paths}}, indent=1) + "\n").encode()
    return str(folder / name)


def _repository(config: NetworkExportConfig, output_dir: str | Path, user: str) -> str:
    """`owner/name`; InputError for a name that the hub does not take."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name = config.hub_model_id or re.sub(r"[^\w.-]+", "-", Path(output_dir).resolve().name).strip("-.")
    repo = name if "/" in name else f"{user}/{name}"
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(
            f"expected a repository such as {user}/name, got {repo!r}; fix --export.hub_model_id"
        ) from error
    return repo


@contextmanager
def _explained(wanted: str, fix: str) -> Iterator[None]:
    """Turns what the hub's client raises, without a network too, into InputError."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (OSError, HTTPError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"expected to {wanted}, got: {reason}; {fix}, or drop --export.push_to_hub") from error
