"""The licence of the base model, which a student inherits: from its model card, on disk or on the hub. Never slow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..families import TeacherConfig
from ..families.loading import hub_is_reachable, is_local, is_single_file

CARD = "README.md"
FIELDS = ("license", "license_name", "license_link")
ENDPOINT = "https://huggingface.co"
TIMEOUT = 5.0  # seconds, of a look-up


def licence(base: TeacherConfig) -> dict[str, str]:
    """The fields `license`, `license_name` and `license_link` of the base's card; {} where it has none or is out of reach."""
    if base.path == "demo":
        return {"license": "apache-2.0"}
    hub = not is_local(base.path) and not is_single_file(base.path)
    card = _from_hub(base) if hub else Path(base.path).expanduser() / CARD
    if card is None or not card.is_file():
        return {}
    found = {key: value for key in FIELDS if isinstance(value := _front_matter(card).get(key), str) and value}
    link = found.get("license_link", "")
    if link and "://" not in link:  # relative to the base, not to the student
        if hub:
            found["license_link"] = f"{ENDPOINT}/{base.path}/blob/{base.revision or 'main'}/{link}"
        else:
            del found["license_link"]
    return found if "license" in found else {}


def _front_matter(card: Path) -> dict[str, Any]:
    import yaml  # type: ignore[import-untyped]
    from huggingface_hub import metadata_load

    try:
        fields = metadata_load(card)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return fields or {}


def _from_hub(base: TeacherConfig) -> Path | None:
    """The card in the hub's cache, else fetched if the hub answers at once."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    cached = try_to_load_from_cache(base.path, CARD, revision=base.revision)
    if isinstance(cached, str):
        return Path(cached)
    if not hub_is_reachable():
        return None
    try:
        return Path(hf_hub_download(base.path, CARD, revision=base.revision, etag_timeout=TIMEOUT))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError):
        return None
