"""Transformers checkpoints that judge images: found, opened in float32 and frozen, with errors that name the flag."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from .loading import BROKEN, hub_is_reachable, is_local

CLIPS = ("clip", "clip_vision_model")  # `model_type` of a whole CLIP and of its vision part alone


@dataclass(frozen=True)
class Tower:
    """A checkpoint's place.

    Attributes:
        path: a folder or a hub id.
        flag: where it was given.
        offline: only the hub's cache on this machine is asked.
        revision: of a hub id; its main branch by default.
    """

    path: str
    flag: str
    offline: bool = False
    revision: str | None = None

    @classmethod
    def find(cls, spec: str, flag: str) -> Tower:
        """From a folder with a config.json, a hub id, or a hub id and its revision: `org/name@revision`.

        Raises InputError for a folder without, a path that does not exist, and an id that is not cached while the hub is away.
        """
        name, _, revision = spec.partition("@")
        if Path(spec).exists() or is_local(name):
            folder = Path(spec).expanduser()
            if not (folder / "config.json").is_file():
                found = "a folder without config.json" if folder.is_dir() else "nothing of the kind there"
                raise InputError(
                    f"expected a transformers checkpoint at {flag} {spec!r}, got {found}; give a folder that "
                    "save_pretrained wrote, or a hub id"
                )
            return cls(str(folder), flag)
        offline = not hub_is_reachable()
        if offline and not _is_cached(name, revision or None):
            raise InputError(
                f"expected a folder or a hub id at {flag}, got {spec!r}, which is no folder here and not in the hub's cache, "
                "and the hub cannot be reached; fix the path, or download the checkpoint first"
            )
        return cls(name, flag, offline, revision or None)

    @contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Says in one paragraph what transformers stumbled over, and keeps its reports of half-used checkpoints quiet."""
        from transformers.utils import logging

        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            yield
        except InputError:
            raise
        except (*BROKEN, ImportError, IndexError) as error:  # ImportError: it needs another library, e.g. timm
            reason = " ".join(str(error).split())[:500] or type(error).__name__
            raise InputError(f"expected {what} at {self}, got: {reason}; {self.fix}") from error
        finally:
            logging.set_verbosity(verbosity)

    def __str__(self) -> str:
        """As it was given, with its flag."""
        return f"{self.flag} {self.path + (f'@{self.revision}' if self.revision else '')!r}"

    @property
    def fix(self) -> str:
        """What to do when the checkpoint is no good."""
        return f"give {self.flag} another checkpoint, such as a DINOv2 or CLIP that save_pretrained wrote"

    @property
    def options(self) -> dict[str, Any]:
        """For every `from_pretrained`. No code from a checkpoint is run."""
        return {"local_files_only": self.offline, "trust_remote_code": False, "revision": self.revision}

    def config(self) -> Any:
        """The checkpoint's configuration."""
        from transformers import AutoConfig

        with self.explained("the config of a transformers model"):
            return AutoConfig.from_pretrained(self.path, **self.options)

    def image_settings(self) -> dict[str, Any]:
        """The checkpoint's preprocessor_config.json (or that part of its processor_config.json)."""
        from transformers import ImageProcessingMixin

        files = [Path(self.path) / name for name in ("preprocessor_config.json", "processor_config.json")]
        if is_local(self.path) and not any(file.is_file() for file in files):
            raise InputError(
                f"expected a vision model with its preprocessor_config.json at {self}, got none; "
                f"save the model's image processor into the folder, or {self.fix}"
            )
        with self.explained("a vision model with its preprocessor_config.json"):
            where = {"local_files_only": self.offline, "revision": self.revision}
            settings, _ = ImageProcessingMixin.get_image_processor_dict(self.path, **where)
            return dict(settings)

    def load(self, cls: Any, what: str, **options: Any) -> tuple[Any, list[str]]:
        """(the module in float32 and eval mode, frozen; the names of its weights that the checkpoint lacks).

        Raises InputError where it can't be loaded, or has weights of other shapes than its config says.
        """
        options = self.options | options | {"dtype": torch.float32, "output_loading_info": True}
        with self.explained(what):  # on other shapes transformers points at a report that isn't shown here
            module, info = cls.from_pretrained(self.path, ignore_mismatched_sizes=True, **options)
        if others := sorted(name for name, *_ in info["mismatched_keys"]):
            raise InputError(
                f"expected {what} at {self}, got {len(others)} tensors of other shapes than its config says, first "
                f"{', '.join(others[:3])}; {self.fix}"
            )
        return module.requires_grad_(False).eval(), sorted(info["missing_keys"])

    def vision_model(self, config: Any) -> Any:
        """The part for images, with all of its weights from the checkpoint; a pooler that has none there is taken off."""
        from transformers import AutoModel, CLIPVisionModelWithProjection

        projects = config.model_type in CLIPS and "CLIPVisionModel" not in (config.architectures or ())
        if "vision_config" in config.to_dict():
            whole, config = config, config.vision_config
            if projects:  # some CLIPs say the true size of the projection only once
                config.projection_dim = whole.projection_dim
        cls = CLIPVisionModelWithProjection if projects else AutoModel
        module, missing = self.load(cls, "a vision model", config=config)
        if module.main_input_name != "pixel_values":
            raise InputError(
                f"expected a vision model at {self}, got {type(module).__name__}, which reads "
                f"{module.main_input_name}; {self.fix}"
            )
        if any(key.startswith("pooler.") for key in missing):
            module.pooler = None
            missing = [key for key in missing if not key.startswith("pooler.")]
        self.complete("vision model", missing)
        return module

    def complete(self, name: str, missing: list[str]) -> None:
        """InputError where weights are missing: transformers would draw them at random."""
        if missing:
            raise InputError(
                f"expected all weights of the {name} at {self}, got a checkpoint that lacks {len(missing)} tensors, first "
                f"{', '.join(missing[:3])}; get it again, or {self.fix}"
            )


def _is_cached(name: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)
    except ValueError:  # no name that a repository could have
        return False
