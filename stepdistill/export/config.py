"""How a student is exported, and the record of a run. Imports nothing heavy: recipes and the command line read it first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..config import CommaList
from ..errors import InputError

CONFIG = "config.yaml"

Verify = Literal["shared", "full", "none"]
Dtype = Literal["fp32", "fp16", "bf16"]
FORMATS = ("diffusers", "kohya")


@dataclass
class NetworkExportConfig:
    """In which precision a network is written, and where it goes.

    Attributes:
        dtype: of the saved weights; training keeps fp32, and whoever loads them may cast them.
        push_to_hub: upload the export at the end of the run; log in first with `hf auth login`, or set HF_TOKEN.
        hub_model_id: repository to upload to, `name` or `owner/name`; named like the output folder by default.
        hub_private_repo: make that repository private, where it is made.
    """

    dtype: Dtype = "fp32"
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private_repo: bool = False


@dataclass
class ExportConfig(NetworkExportConfig):
    """What is written of a diffusion student, how it is checked, and where it goes.

    Attributes:
        verify: "shared" loads an adapter back beside the student on the same weights, "full" into a fresh pipeline, "none"
            trusts it; a full student is loaded anew either way.
        formats: of a LoRA's files, comma separated: diffusers, and kohya, which web UIs read too.
    """

    verify: Verify = "shared"
    formats: CommaList = CommaList(("diffusers",))  # noqa: RUF009  # immutable

    def __post_init__(self) -> None:
        if "diffusers" not in self.formats or set(self.formats) - set(FORMATS):
            raise InputError(
                f"expected diffusers, or diffusers,kohya, got {','.join(self.formats)!r}; fix --export.formats"
            )


def read_config(run: Path) -> dict[str, Any]:
    """The sections of `run/config.yaml`; InputError where there is none."""
    import yaml  # type: ignore[import-untyped]

    path = run / CONFIG
    if not path.is_file():
        raise InputError(f"expected a run folder with {CONFIG}, got {str(run)!r}; give the --output_dir of a training")
    try:
        sections = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"expected YAML in {path}, got: {' '.join(str(error).split())}; restore the file") from error
    missing = [s for s in ("teacher", "student", "method") if not isinstance(sections, dict) or s not in sections]
    if missing:
        raise InputError(f"expected the sections {', '.join(missing)} in {path}; is this the folder of a distillation?")
    return dict(sections)
