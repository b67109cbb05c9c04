"""`stepdistill bench` of language models or classifiers: opens, measures, writes. Stopped, it starts anew: it is short."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from ..errors import InputError
from .contenders import unique_name
from .features import hash_weights
from .kinds import CLASSIFIER
from .model_options import ModelOptions
from .model_report import model_page
from .model_rows import ModelResults, ModelRow
from .rows import TEACHER
from .writing import write_whole

RESULTS = "results.json"


def bench_models(options: ModelOptions) -> ModelResults:
    """A comparison from beginning to end.

    Writes results.md, results.csv, report.html and results.json into the output folder once all of it is measured; each
    replaces an older one as a whole. Raises InputError.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            f"expected one process for {options.kind}s, got {os.environ['WORLD_SIZE']}; start it without a launcher"
        )
    folder = Path(options.output_dir).expanduser()
    check_replaced(folder / RESULTS, options)
    device = (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None) or "cpu"
    paths, taken = {TEACHER: _expanded(options.teacher)}, {TEACHER}
    for path in options.students:
        paths[unique_name(path, taken)] = _expanded(path)
    results = measured(options, paths, torch.device(device))
    texts = {
        "results.md": results.markdown(),
        "results.csv": results.to_csv(),
        "report.html": model_page(results),
        RESULTS: results.to_json(),
    }
    for name, text in texts.items():  # all of them exist before the first replaces an older one
        write_whole(folder / name, text.encode("utf-8", "replace"))
    print(f"{results.markdown()}\nreport: {folder / 'report.html'}")
    return results


def _expanded(path: str) -> str:
    return str(Path(path).expanduser()) if path.startswith("~") else path


def measured(options: ModelOptions, paths: dict[str, str], device: torch.device) -> ModelResults:
    """The results of models, by name; the teacher is the first."""
    from .classifiers import ClassifierExam
    from .language import LanguageExam

    exam = (ClassifierExam if options.kind == CLASSIFIER else LanguageExam)(options, paths, device)
    found = exam.measure()
    rows = []
    for name, path in paths.items():
        module = exam.networks[name].module
        parameters = list(module.parameters())
        rows.append(
            ModelRow(
                name=name,
                path=path,
                architecture=type(module).__name__,
                parameters=sum(p.numel() for p in parameters),
                bytes=sum(p.numel() * p.element_size() for p in parameters),
                weights=hash_weights(module),
                values=found.values[name],
                seconds=found.seconds.get(name, {}),
            )
        )
    shared = {"dtype": options.dtype, "device": device.type, "seed": options.seed, "repeats": options.repeats}
    return ModelResults(options.kind, rows, found.columns, found.against, {**found.protocol, **shared})


def check_replaced(file: Path, options: ModelOptions) -> None:
    """InputError where the output folder has results of models of another kind, which may have taken hours."""
    if options.overwrite or not file.is_file():
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        kind = found.get("kind", "diffusion pipeline") if isinstance(found, dict) else None
    except (OSError, ValueError):
        kind = None
    if kind != options.kind:
        raise InputError(
            f"expected no results, or older ones of {options.kind}s, in --output_dir {options.output_dir}, got "
            f"{'a file of something else' if kind is None else f'those of {kind}s'}; give another --output_dir, or --overwrite"
        )
