"""The command line, `stepdistill` or `python -m stepdistill.cli`. Each command imports what it needs when it runs."""

from __future__ import annotations

import argparse
import inspect
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .bench.kinds import PIPELINE, kind_of_all
from .bench.model_options import ModelOptions, add_model_arguments, check_flags
from .bench.options import BenchOptions, add_arguments, reference_flags
from .config import fail
from .errors import ExportError, InputError


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command. Exits with 2 for bad input; with 1 for a broken export, or what doctor or bench found."""
    options = vars(_parser().parse_args(arguments))
    command = options.pop("command")
    warnings.formatwarning = _warning
    try:
        command(options)
    except (InputError, ExportError) as error:
        fail(error)


def _warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> str:
    """One line: where in the code it was raised says nothing to who typed a command."""
    return f"{category.__name__}: {message}\n"


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
    export.add_argument(
        "--checkpoint", default="latest", metavar="WHICH", help="latest, a step, a fit such as control, a folder"
    )
    export.add_argument("--teacher.path", metavar="PATH", help="teacher, where it has moved since the training")
    export.add_argument(
        "--student.path", metavar="PATH", help="what a student of classic distillation started from, too"
    )
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
    bench = commands.add_parser(
        "bench",
        help="at how few steps a student is as good as its teacher, and how fast it is then",
        description=inspect.getdoc(bench_command),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench.set_defaults(command=bench_command)
    add_arguments(bench)
    add_model_arguments(bench)
    cache = commands.add_parser(
        "cache-logits",
        help="ask a language model about a text once, to train students without it in memory",
        description=inspect.getdoc(cache_logits_command),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cache.set_defaults(command=cache_logits_command)
    _cache_arguments(cache)
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


def _cache_arguments(cache: argparse.ArgumentParser) -> None:
    cache.add_argument(
        "--teacher.path", required=True, metavar="PATH", help="folder or hub id of a causal language model"
    )
    cache.add_argument("--teacher.revision", metavar="NAME", help="branch, tag or commit on the hub")
    cache.add_argument(
        "--data.path", required=True, metavar="TEXT", help="as in the training; so are the other --data.*"
    )
    cache.add_argument("--data.split", metavar="NAME", help="of a data set of `datasets` (default: train)")
    cache.add_argument("--data.config_name", metavar="NAME", help="of a data set of several configurations")
    cache.add_argument("--data.text_column", metavar="NAME", help="its column of documents (default: text)")
    cache.add_argument("--data.block_size", type=int, metavar="N", help="tokens of a block (default: 128)")
    cache.add_argument(
        "--data.held_out", type=float, metavar="SHARE", help="of the documents, not cached (default: 0.05)"
    )
    cache.add_argument(
        "--output_dir", required=True, metavar="DIR", help="where answers go; one that was begun is finished"
    )
    cache.add_argument("--k", type=int, metavar="K", help="likeliest tokens that are kept (default: 64)")
    cache.add_argument(
        "--temperature", type=float, metavar="T", help="of the distributions, and of the loss (default: 1)"
    )
    cache.add_argument("--vocabulary", type=int, metavar="V", help="entries that are compared (default: the teacher's)")
    cache.add_argument("--stored", choices=("fp16", "fp32"), help="log-probabilities on disk (default: fp16)")
    cache.add_argument("--batch_size", type=int, metavar="B", help="rows that the teacher reads at once (default: 16)")
    cache.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="of its weights (default: fp32)"
    )


def export_command(options: dict[str, Any]) -> None:
    """Rebuilds the student of a run from its config.yaml and a checkpoint, and writes what stock libraries load.

    The result is loaded back and compared; a difference is an error, and nothing is written over then.
    """
    from .export.config import read_config

    read_config(Path(options["run"]))  # a wrong folder is said before the seconds that the next imports take
    from .export.rerun import export_run

    parts = (_section(options, name) for name in ("teacher", "export", "student"))
    print(f"exported to {export_run(options['run'], options['output_dir'], options['checkpoint'], *parts)}")


def _section(options: dict[str, Any], name: str) -> dict[str, Any]:
    """The options name.*, those that were given."""
    given = {key.removeprefix(f"{name}."): value for key, value in options.items() if key.startswith(f"{name}.")}
    return {key: value for key, value in given.items() if value is not None}


def bench_command(options: dict[str, Any]) -> None:
    """Runs teacher and students as stock Diffusers pipelines at several steps, and compares quality and speed.

    Writes results.json, results.csv, results.md and report.html. A stopped sweep goes on where it was. Several processes share
    the work: accelerate launch -m stepdistill.cli bench ... (or torchrun).

    Where the teacher is a language model or an image classifier of Transformers, its students are compared with it by
    perplexity or accuracy, size and speed, on what was held out from --data.path.
    """
    if options["compare"]:
        _compare(options["compare"], options["fail_if"])
        return
    if options["fail_if"]:
        raise InputError("expected --fail_if with --compare A.json B.json, got it alone; drop it, or add --compare")
    if options["make_reference"]:
        given = reference_flags(options)  # wrong flags are said before the seconds that the next imports take
        from .bench.command import make_reference

        found = make_reference(**given)
        print(f"{found.count} images, {len(found.held)} held out: {given['path']}")
        return
    kind = kind_of_all(options["teacher"], options["student"], network=options["prompts"] is None)
    if kind != PIPELINE:
        models = ModelOptions.read(options, kind)
        from .bench.models import bench_models

        bench_models(models)
        return
    check_flags(options, kind)
    sweep = BenchOptions.read(options)
    from .bench.command import bench

    bench(sweep)


def _compare(files: Sequence[str], fail_if: Sequence[str]) -> None:
    """Prints two results files side by side; exits with 1 where a rule is broken, and says which."""
    from .bench.compare import compare
    from .bench.rows import Results
    from .bench.rules import failed, parse_rules, undecided

    rules = [rule for text in fail_if for rule in parse_rules(text)]
    a, b = (Results.read(path) for path in files)
    print(compare(a, b).text())
    for line in undecided(rules, a, b):
        print(f"undecided: {line}")
    if broken := failed(rules, a, b):
        print("\n".join(f"failed: {line}" for line in broken), file=sys.stderr)
        raise SystemExit(1)


def cache_logits_command(options: dict[str, Any]) -> None:
    """Keeps a teacher's K likeliest tokens after each place of the training text, with the mass of all others.

    recipes/lm_kd.py then trains with --teacher.cache DIR, the same --teacher.path and --data.*, without the teacher in memory.
    A stopped run goes on where it was. A divergence of these K + 1 buckets is a lower bound of that of the whole vocabulary.
    """
    from .data.text import TextConfig
    from .kd.caching import TeacherCacheConfig, cache_logits
    from .kd.pair import LMTeacherConfig

    given = ("k", "temperature", "vocabulary", "stored", "batch_size")
    config = TeacherCacheConfig(**{name: options[name] for name in given if options[name] is not None})
    teacher, text = LMTeacherConfig(**_section(options, "teacher")), TextConfig(**_section(options, "data"))
    print(cache_logits(teacher, text, config, options["output_dir"], options["dtype"]))


def doctor_command(options: dict[str, Any]) -> None:
    """Looks at packages, devices, precisions, folders and the hub, and says how to fix what would stop a training.

    Exits with 1 if something would. Needs no network and leaves nothing behind.
    """
    from .doctor import diagnose

    raise SystemExit(diagnose(options["output_dir"], options["cache_dir"]))


if __name__ == "__main__":
    main()
