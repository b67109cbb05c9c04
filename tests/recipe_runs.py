"""Recipes loaded from their files and run in this process."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from stepdistill.config import parse

ROOT = Path(__file__).resolve().parents[1]


def load_recipe(name: str = "lcm_lora") -> Any:
    return load_script("recipes", name)


def load_script(folder: str, name: str) -> Any:
    """A script of the repository's folder, which is no package, as a module."""
    spec = importlib.util.spec_from_file_location(f"{folder}_{name}", ROOT / folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run_in_process(recipe: Any, arguments: Sequence[Any]) -> None:
    recipe.main(parse(recipe.Recipe, [str(a) for a in arguments]))


def run_in_two_processes(name: str, arguments: Sequence[Any]) -> None:
    """The recipe of this name under torchrun, on the CPU."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "recipes" / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def lives(name: str, kind: str, folder: Path) -> tuple[list[int], str, str]:
    """(exit codes, stdout, stderr) of the recipe killed again and again: tests/recipe_process.py."""
    tests = Path(__file__).resolve().parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tests)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-u", str(tests / "recipe_process.py"), name, kind, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout, done.stderr


def exported(run: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(all tensors, all facts) of what a run has exported, by file; a file's hash is not one of its contents."""
    own = {"checkpoints", "samples"}
    paths = (p for p in run.rglob("*") if p.is_file() and not own & set(p.relative_to(run).parts))
    files = {str(path.relative_to(run)): path for path in paths}
    facts = {name: json.loads(path.read_text()) for name, path in files.items() if path.name == "stepdistill.json"}
    for fact in facts.values():
        fact["weights"]["files"] = sorted(fact["weights"]["files"])
    weights = (name for name in files if name.endswith(".safetensors"))
    tensors = {f"{name}/{key}": value for name in weights for key, value in load_file(files[name]).items()}
    return tensors, {**facts, "files": sorted(files)}
