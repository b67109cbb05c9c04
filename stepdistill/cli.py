"""The command line, `stepdistill` or `python -m stepdistill.cli`. Each command imports what it needs when it runs."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .config import fail
from .errors import ExportError, InputError


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command. Exits with 2 for bad input; with 1 for an export that does not load back, or what doctor found."""
    options = vars(_parser().parse_args(arguments))
    command = options.pop("command")
    try:
        command(options)
    except (InputError, ExportError) as error:
        fail(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stepdistill", description="Few-step diffusion models by distillation.", allow_abbrev=False
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    export = commands.add_parser(
        "export",
        help="write the weights, scheduler, facts and model card of a run",
        description=inspect.getdoc(export_command),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.set_defaults(command=export_command)
    export.add_argument("run", metavar="RUN", help="run folder: the --output_dir of a training")
    export.add_argument("--output_dir", metavar="DIR", help="where to write (default: RUN)")
    export.add_argument("--checkpoint", default="latest", metavar="WHICH", help="latest (default), a step, or a folder")
    export.add_argument("--teacher.path", metavar="PATH", help="base model, where it has moved since the training")
    export.add_argument(
        "--export.dtype", choices=("fp32", "fp16", "bf16"), help="of the saved weights (default: the run's)"
    )
    export.add_argument(
        "--export.verify", choices=("shared", "full", "none"), help="how it is checked (default: the run's)"
    )
    export.add_argument("--export.formats", metavar="LIST", help="of a LoRA: diffusers (default), or diffusers,kohya")
    export.add_argument(
        "--export.push_to_hub", action="store_true", default=None, help="upload it; log in first (hf auth login)"
    )
    export.add_argument("--export.hub_model_id", metavar="ID", help="name or owner/name (default: the folder's name)")
    export.add_argument("--export.hub_private_repo", action="store_true", default=None, help="make that one private")
    doctor = commands.add_parser(
        "doctor",
        help="what this machine can do, and what would stop a training on it",
        description=inspect.getdoc(doctor_command),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    doctor.set_defaults(command=doctor_command)
    doctor.add_argument("--output_dir", default="out", metavar="DIR", help="where runs are to go (default: out)")
    doctor.add_argument("--cache_dir", metavar="DIR", help="where latents are to be cached (default: as in training)")
    return parser


def export_command(options: dict[str, Any]) -> None:
    """Rebuilds the student of a run from its config.yaml and a checkpoint, and writes what stock Diffusers loads.

    The result is loaded back and compared; a difference is an error, and nothing is written over then.
    """
    from .export.config import read_config

    read_config(Path(options["run"]))  # a wrong folder is said before the seconds that the next imports take
    from .export.rerun import export_run

    def section(name: str) -> dict[str, Any]:
        given = {key.removeprefix(f"{name}."): value for key, value in options.items() if key.startswith(f"{name}.")}
        return {key: value for key, value in given.items() if value is not None}

    folder = export_run(
        options["run"], options["output_dir"], options["checkpoint"], section("teacher"), section("export")
    )
    print(f"exported to {folder}")


def doctor_command(options: dict[str, Any]) -> None:
    """Looks at packages, devices, precisions, folders and the hub, and says how to fix what would stop a training.

    Exits with 1 if something would. Needs no network and leaves nothing behind.
    """
    from .doctor import diagnose

    raise SystemExit(diagnose(options["output_dir"], options["cache_dir"]))


if __name__ == "__main__":
    main()
