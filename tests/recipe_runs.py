"""Recipes loaded from their files and run in this process."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
